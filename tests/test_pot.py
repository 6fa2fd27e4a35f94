"""pot.py against independent references: float64, brute force, and torch's own modules."""

import copy
import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.utils.prune

import pot
from calibrate import calibrate
from model import GPT, GPTConfig
from pot import PackedWeight, PoTConfig, PoTEmbedding, PoTLinear, PoTQuantizer, convert, fake_quantize, prepare

PAPER = dict(grid="paper", granularity="tensor", scale="absmax")
# The non-negative levels, written by hand in units of the smallest level.
LEVELS = [
    (dict(bits=2), [0, 1]),
    (dict(bits=3), [0, 1, 2, 4]),
    (dict(bits=4), [0, 1, 2, 4, 8, 16, 32, 64]),
    (dict(bits=4, range=5), [0, 1, 2, 4, 8, 16]),
    (dict(bits=5), [0, *(2**e for e in range(15))]),
    (dict(bits=6), [0, *(2**e for e in range(31))]),
    (dict(bits=6, range=20), [0, *(2**e for e in range(20))]),
    (dict(bits=4, terms=2), [0, 1, 2, 3, 4, 6, 8, 12]),
    (dict(bits=5, terms=2), [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192]),
    (dict(bits=6, terms=2), [0, 1, *(m * 2**e for e in range(15) for m in (2, 3))]),
    *((dict(bits=b, grid="uniform"), list(range(2 ** (b - 1)))) for b in range(2, 9)),
]
CONFIGS = [PoTConfig(**c) for c, _ in LEVELS]
PAPER_CONFIGS = [PoTConfig(bits=b, range=r, **PAPER) for r, b in ((3, 4), (5, 4), (7, 5), (15, 6), (20, 6), (30, 6))]


def tiny_gpt(**kw):
    return GPT(GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=64) if not kw else GPTConfig(**kw))


# --- grid ---


@pytest.mark.parametrize("config, levels", LEVELS, ids=str)
def test_levels(config, levels):
    config = PoTConfig(**config)
    assert config.levels() == levels
    assert config.edge == pytest.approx((levels[-1] + (levels[-1] - levels[-2]) / 2) / levels[-1], rel=0)
    table = config.table()
    assert table.shape == (2**config.bits,) and table.isfinite().all() and table[0] == table[len(table) // 2] == 0
    assert {abs(v) for v in table.tolist()} == set(levels)


@pytest.mark.parametrize("config", PAPER_CONFIGS, ids=str)
def test_paper_grid_has_2r_plus_3_levels(config):
    signed = set(config.table().tolist())
    assert len(signed) == 2 * config.range + 3 and max(signed) == 2**config.range


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_nearest_level_at_every_boundary(config):
    # The unit is 1, so levels, midpoints and their float neighbours are exact.
    levels = torch.tensor(config.levels(), dtype=torch.float64)
    midpoints = (levels[1:] + levels[:-1]) / 2
    x = torch.cat([levels, midpoints, levels[-1:] * 1.3, levels[-1:] * 100]).float()
    x = torch.cat([x, x.nextafter(torch.tensor(torch.inf)), x.nextafter(torch.tensor(-torch.inf))])
    x = torch.cat([x, -x])[None]
    q = fake_quantize(x, torch.ones(1, 1), config)
    signed = torch.cat([levels, -levels])
    distance = (x.double().unsqueeze(-1) - signed).abs()
    assert torch.isin(q.double(), signed).all()
    assert torch.equal((q.double() - x.double()).abs(), distance.amin(-1))
    assert not torch.signbit(q[q == 0]).any()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_nearest_level_on_random_weights(config):
    torch.manual_seed(0)
    w, unit = torch.randn(64, 96), (torch.rand(64, 1) + 0.01) / config.top
    q = fake_quantize(w, unit, config)
    values = torch.tensor(config.levels(), dtype=torch.float64) * unit.double()  # (64, levels)
    best = (w.double().abs().unsqueeze(-1) - values.unsqueeze(1)).abs().amin(-1)
    assert ((q.double() - w.double()).abs() <= best + 1e-6 * config.top * unit).all()
    assert (q * w >= 0).all()


@pytest.mark.parametrize("config", PAPER_CONFIGS, ids=str)
def test_paper_quantizer_against_the_papers_formula(config):
    torch.manual_seed(0)
    for w in (torch.randn(64, 64), torch.randn(64, 64) * 0.01, torch.randn(64, 64) * 30):
        s = max(w.abs().max().item() / 2**config.range, 2**-5)
        expected = []
        for v in w.flatten().tolist():
            a = round(float(torch.tensor(abs(v)) / torch.tensor(s)))
            power = 2.0 ** round(torch.tensor(a, dtype=torch.float64).log2().item()) if a else 0.0
            y = min(power, 2.0**config.range)
            expected.append(y * s if v > 0 else -y * s)
        q = fake_quantize(w, pot.compute_unit(w, config), config)
        assert torch.allclose(q, torch.tensor(expected).view_as(w), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "bad",
    [
        dict(bits=1), dict(bits=7), dict(bits=9, grid="uniform"), dict(bits=3, terms=2), dict(terms=3),
        dict(terms=2, grid="uniform"), dict(range=8), dict(range=0), dict(range=3, grid="uniform"),
        dict(range=3, terms=2), dict(granularity="block"), dict(group_size=0), dict(scale="max"), dict(act_bits=4),
        dict(grid="apot"), dict(grid="paper"), dict(bits=4, range=7, **PAPER), dict(bits=True), dict(bits=4.0),
        dict(range=3.0), dict(group_size=None), dict(eps=0.0), dict(eps=float("inf")),
    ],
    ids=str,
)  # fmt: skip
def test_invalid_config(bad):
    message = "choose one of|must be an integer|hold ranges|narrows single|at least 1|use granularity|positive"
    with pytest.raises(ValueError, match=message):
        PoTConfig(**bad)


# --- scale: the unit ---


@pytest.mark.parametrize("granularity, shape", [("tensor", (1, 1)), ("channel", (48, 1)), ("group", (48, 4))])
@pytest.mark.parametrize("grid", [dict(), dict(terms=2), dict(bits=3), dict(grid="uniform"), dict(bits=2)], ids=str)
def test_unit_is_close_to_brute_force(granularity, shape, grid):
    torch.manual_seed(0)
    w = torch.randn(48, 128) * torch.rand(48, 1)
    config = PoTConfig(granularity=granularity, group_size=32, **grid)
    unit = pot.compute_unit(w, config)
    assert unit.shape == shape and unit.dtype == torch.float16

    def error(u):  # (out or 1, groups)
        e = (fake_quantize(w, u.expand(shape), config) - w).double().square().unflatten(1, (shape[1], -1)).sum(-1)
        return e.sum().view(1, 1) if granularity == "tensor" else e

    start = w.abs().max() if granularity == "tensor" else w.abs().unflatten(1, (shape[1], -1)).amax(-1)
    brute = torch.stack([error(start * f / config.top) for f in torch.linspace(0.05, 1.3, 400)]).amin(0)
    assert error(unit).sum() <= 1.03 * brute.sum()
    absmax = PoTConfig(granularity=granularity, group_size=32, scale="absmax", **grid)
    assert error(unit).sum() <= error(pot.compute_unit(w, absmax)).sum()


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("grid", [{}, {"terms": 2}, {"bits": 3}, {"grid": "uniform"}], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_e8m0_units_are_the_best_powers_of_two(granularity, grid, weighted):
    torch.manual_seed(0)
    w = torch.randn(24, 96) * torch.rand(24, 1)
    w[3] = 0
    w[5, :32] = 0
    importance = torch.rand(96) if weighted else torch.ones(96)
    config = PoTConfig(granularity=granularity, group_size=32, scale_format="e8m0", **grid)
    unit = pot.compute_unit(w, config, importance)
    shape = unit.shape
    assert (torch.frexp(unit.float()).mantissa == 0.5).all()

    def error(u):
        e = importance * (fake_quantize(w, u.expand(shape), config) - w).double().square()
        e = e.unflatten(1, (shape[1], -1)).sum(-1)
        return e.sum().view(1, 1) if granularity == "tensor" else e

    brute = torch.stack([error(torch.tensor([[2.0**k]])) for k in range(-14, 3)]).amin(0)
    assert torch.allclose(error(unit), brute, rtol=1e-6)
    top = config.top * pot.compute_unit(w, dataclasses.replace(config, scale="absmax"))
    largest = w.abs().unflatten(1, (shape[1], -1)).amax(-1) if shape[0] > 1 else w.abs().max().view(1, 1)
    assert ((largest <= top) & ((top < 2 * largest) | (largest == 0))).all()
    assert (torch.frexp(pot.compute_unit(torch.zeros(24, 96), config).float()).mantissa == 0.5).all()


def test_absmax_unit():
    w = torch.randn(8, 64).half().float()
    unit = pot.compute_unit(w, PoTConfig(scale="absmax", group_size=16))
    assert torch.equal(unit.float() * 64, w.abs().view(8, 4, 16).amax(-1))


def test_unit_outside_float16_stays_float32():
    torch.manual_seed(0)
    config, few = PoTConfig(), torch.ones(4, 1)
    few[1] = 1e-4  # one row is enough
    w = torch.randn(4, 64)
    for factor, dtype in ((1, torch.float16), (1e-4, torch.float32), (few, torch.float32), (1e8, torch.float32)):
        unit = pot.compute_unit(w * factor, config)
        assert unit.dtype == dtype
        assert pot.sqnr(w * factor, fake_quantize(w * factor, unit, config)) > 13
    for power, dtype in ((-14, torch.float16), (-15, torch.float32), (15, torch.float16), (16, torch.float32)):
        absmax = PoTConfig(scale="absmax", scale_format="e8m0")  # float16's normal range is 2^-14 to 65504
        assert pot.compute_unit(torch.full((1, 64), 64 * 2.0**power), absmax).dtype == dtype


def test_sqnr_on_gaussian_weights():
    torch.manual_seed(0)
    w = torch.randn(512, 512)
    sqnrs = {c: pot.sqnr(w, fake_quantize(w, pot.compute_unit(w, c), c)) for c in (PoTConfig(), PoTConfig(terms=2))}
    assert [round(v) for v in sqnrs.values()] == [15, 20]


@pytest.mark.parametrize(
    "config",
    [PoTConfig(group_size=16), PoTConfig(granularity="channel", terms=2), PoTConfig(granularity="tensor")],
    ids=str,
)
def test_zero_rows_and_groups(config):
    w = torch.randn(6, 32)
    w[2] = 0
    w[3, :16] = 0
    for weight in (w, torch.zeros(6, 32)):
        layer = PoTLinear(32, 6, config=config)
        with torch.no_grad():
            layer.weight.copy_(weight)
        layer.quantizer = PoTQuantizer(layer.weight, config)
        q = layer.quantizer(layer.weight)
        assert q.isfinite().all() and (q[weight == 0] == 0).all()
        assert torch.equal(convert(layer).weight, q)


# --- fake quantization ---


def test_gradient_is_identity_up_to_the_edge():
    for config, edge in ((PoTConfig(), 1.25), (PoTConfig(terms=2), 14 / 12), (PoTConfig(grid="uniform"), 7.5 / 7)):
        unit = torch.ones(1, 1)  # so the edge is exact
        e = torch.tensor(edge * config.top)
        w = torch.tensor([[0.0, 0.3, -config.top, e, -e, e * 1.001, -e * 1.001, 1e9]], requires_grad=True)
        g = torch.randn_like(w)
        fake_quantize(w, unit, config).backward(g)
        assert torch.equal(w.grad, g * torch.tensor([1, 1, 1, 1, 1, 0, 0, 0.0]))
    w = torch.tensor([[1.0, 1e9]], requires_grad=True)
    fake_quantize(w, torch.ones(1, 1), PAPER_CONFIGS[0]).sum().backward()
    assert torch.equal(w.grad, torch.ones(1, 2))


def test_blocks_of_a_large_weight_equal_single_rows():
    torch.manual_seed(0)
    w = torch.randn(1000, 768, requires_grad=True)  # several blocks; the last is shorter
    g = torch.randn_like(w)
    for granularity in ("tensor", "channel", "group"):
        config = PoTConfig(granularity=granularity)
        unit = pot.compute_unit(w, config)
        fake_quantize(w, unit, config).backward(g)
        rows = [unit if len(unit) == 1 else unit[i : i + 1] for i in range(1000)]
        whole = torch.cat([fake_quantize(w[i : i + 1], rows[i], config) for i in range(1000)])
        assert torch.equal(fake_quantize(w, unit, config), whole)
        assert torch.equal(PackedWeight.pack(w, unit, config)(), whole)
        inside = w.detach().view(1000, unit.shape[1], -1).abs() <= 1.25 * 64 * unit.float().unsqueeze(-1)
        assert (w.grad == g * inside.view_as(g)).float().mean() > 0.999999
        w.grad = None


def test_activations_are_quantized_uniformly_per_token():
    torch.manual_seed(0)
    x = torch.cat(
        [
            torch.randn(5, 33),
            torch.rand(2, 33) + 3,
            -torch.rand(2, 33) - 3,
            torch.zeros(1, 33),
            torch.full((1, 33), 2.0),
        ]
    )
    y = pot.fake_quantize_activations(x)
    for row, actual in zip(x.double(), y):
        low, high = min(row.min().item(), 0), max(row.max().item(), 0)
        scale = (high - low) / 255 or 1.0
        zero = round(-low / scale)
        expected = [(min(max(round(v / scale) + zero, 0), 255) - zero) * scale for v in row.tolist()]
        error = (actual.double() - torch.tensor(expected, dtype=torch.float64)).abs()
        assert error.max() <= 1.001 * scale
        assert error.median() < 1e-6 * max(high, -low, 1)
        assert len(actual.unique()) <= 256
    x.requires_grad_()
    pot.fake_quantize_activations(x).backward(g := torch.randn_like(x))
    assert torch.equal(x.grad, g)
    nan_rows = pot.fake_quantize_activations(torch.tensor([[1.0, torch.nan], [1.0, 2.0]])).isnan().any(1)
    assert nan_rows.tolist() == [True, False]


def test_nan_weights_stay_nan():
    for config in (*CONFIGS, PAPER_CONFIGS[0]):
        assert fake_quantize(torch.tensor([[torch.nan, 1.0]]), torch.ones(1, 1), config)[0, 0].isnan()


# --- layers ---


def test_disabled_quantization_equals_torch_to_the_bit():
    torch.manual_seed(0)
    layer, table = PoTLinear(64, 48, config=PoTConfig(act_bits=8)), PoTEmbedding(10, 64)
    layer.quantizer.enabled = table.quantizer.enabled = False
    x, i = torch.randn(5, 64), torch.tensor([[1, 2], [9, 0]])
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert torch.equal(table(i), F.embedding(i, table.weight))
    layer.quantizer.enabled = table.quantizer.enabled = True
    assert not torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not torch.equal(table(i), F.embedding(i, table.weight))


def test_embedding_quantizes_the_rows_that_are_read():
    for config in (PoTConfig(group_size=16), PoTConfig(granularity="channel"), PoTConfig(granularity="tensor")):
        table = PoTEmbedding(20, 64, padding_idx=3, config=config)
        i = torch.randint(0, 20, (4, 7))
        whole = fake_quantize(table.weight, table.quantizer.unit, config)
        assert torch.equal(table(i), whole[i])
        g = torch.randn(4, 7, 64)
        table(i).backward(g)
        expected = nn.Embedding(20, 64, padding_idx=3)
        expected(i).backward(g)
        unit = table.quantizer.unit.float()
        inside = table.weight.detach().view(20, unit.shape[1], -1).abs() <= 1.25 * 64 * unit.unsqueeze(-1)
        assert torch.allclose(table.weight.grad, expected.weight.grad * inside.view(20, 64), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64)).to(dtype)
    prepare(model)
    i = torch.arange(10)
    y = model(i)
    y.sum().backward()
    assert y.dtype == model[1].weight.grad.dtype == model[0].weight.grad.dtype == dtype
    assert model[1].quantizer.unit.dtype == torch.float16
    y = y.detach()
    assert torch.equal(convert(model)(i), y)
    assert y.dtype == model(i).dtype


def test_casting_a_model_keeps_its_units():
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.mul_(1e-6)  # float32 units
    prepare(model)
    unit = model[0].quantizer.unit.clone()
    assert unit.dtype == torch.float32
    model.bfloat16()
    assert torch.equal(model[0].quantizer.unit, unit) and model[0].weight.dtype == torch.bfloat16
    convert(model).half()
    units = model[0].packed.unit  # (4, 1, 16): in tiles
    assert torch.equal(units.flatten(), unit.flatten()) and model[0].weight.dtype == torch.float16
    assert model(torch.randn(2, 64, dtype=torch.float16)).dtype == torch.float16


# --- packing ---


def random_codes(bits, shape):
    """Codes of all levels; with 8 bits without 128, whose byte is that of level 0."""
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    return torch.where(codes == 128, 0, codes)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(768, 768), (3, 129), (7, 1), (1, 13), (5, 255), (2, 640), (11, 77), (33, 31)])
def test_pack_unpack(bits, shape):
    codes = random_codes(bits, shape)
    packed = pot.pack_codes(codes, bits)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    if bits in (3, 4, 8):
        columns = -(-shape[1] // {3: 32, 4: 8, 8: 4}[bits]) * {3: 32, 4: 8, 8: 4}[bits]
        assert packed.shape == (-(-shape[0] // 16), 16 * columns * bits // 8)
    else:
        assert packed.shape == (shape[0], -(-shape[1] * bits // 8))
    assert torch.equal(pot.unpack_codes(packed, bits, shape), codes)


@pytest.mark.parametrize("bits", [2, 5, 6, 7])
def test_packed_bytes_are_the_documented_bit_stream(bits):
    n = 150
    codes = torch.randint(0, 2**bits, (2, n), dtype=torch.uint8)
    for row, packed in zip(codes.tolist(), pot.pack_codes(codes, bits).tolist()):
        stream = sum(code << (bits * i) for i, code in enumerate(row))
        assert bytes(packed) == stream.to_bytes(-(-n * bits // 8), "little")


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("rows, columns", [(1, 1), (16, 64), (19, 77), (33, 33)])
def test_packed_bytes_are_the_documented_tiles(bits, rows, columns):
    """Byte by byte, as the head of pot_kernel/pot.cpp says."""
    codes = random_codes(bits, (rows, columns)).tolist()

    def code(row, column):  # zeros behind the matrix
        return codes[row][column] if row < rows and column < columns else 0

    width, expected = {3: 32, 4: 8, 8: 4}[bits], []
    for block in range(0, rows, 16):
        line = []
        for tile in range(0, columns, width):
            for vector in range({3: 3, 4: 1, 8: 1}[bits]):
                for row in range(block, block + 16):
                    for b in range(4):
                        if bits == 8:
                            c = code(row, tile + b)
                            byte = (-(c & 127) if c & 128 else c) % 256
                        elif bits == 4:
                            byte = code(row, tile + b) + 16 * code(row, tile + 4 + b)
                        elif vector < 2:
                            first = tile + 16 * vector + b
                            byte = sum(code(row, first + 4 * j) % 4 * 4**j for j in range(4))
                        else:
                            byte = sum(code(row, tile + 4 * j + b) // 4 * 2**j for j in range(8))
                        line.append(byte)
        expected.append(line)
    assert pot.pack_codes(torch.tensor(codes, dtype=torch.uint8), bits).tolist() == expected


@pytest.mark.parametrize("bits", [3, 4, 5, 8])
def test_units_lie_as_documented(bits):
    config = PoTConfig(bits=bits, grid="uniform", group_size=8)
    codes = random_codes(bits, (19, 24))
    for shape in ((19, 3), (19, 1), (1, 1)):
        unit = torch.rand(shape) + 1
        weight = PackedWeight.from_codes(codes, unit, torch.float32, config)
        if bits == 5 or shape[0] == 1:
            assert torch.equal(weight.unit, unit)
        else:
            assert weight.unit.shape == (2, shape[1], 16) and weight.unit.isfinite().all()
            for row in range(19):
                assert torch.equal(weight.unit[row // 16, :, row % 16], unit[row])
        values = config.table()[codes.int()] * unit.expand(19, -1).repeat_interleave(24 // shape[1], 1)
        assert torch.equal(weight(), values)
        index = torch.tensor([[0, 18], [15, 16]])
        assert torch.equal(weight(index), values[index])


@pytest.mark.parametrize("config", [*CONFIGS, *PAPER_CONFIGS], ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_prepared_equals_converted_to_the_bit(config, granularity):
    if config.grid == "paper" and granularity != "tensor":
        pytest.skip("per tensor only")
    torch.manual_seed(0)
    fields = {f: getattr(config, f) for f in config.__dataclass_fields__}
    config = PoTConfig(**fields | dict(granularity=granularity, group_size=11 if granularity == "group" else 64))
    layer = PoTLinear(77, 53, config=config)
    q = layer.quantizer(layer.weight).detach()
    x = torch.randn(5, 77)
    y = layer(x)
    packed = convert(layer)
    assert torch.equal(packed.weight.view(torch.int32), q.view(torch.int32))
    assert torch.equal(packed(x), y)
    tiles = {3: (4, 3 * 192), 4: (4, 10 * 64), 8: (4, 20 * 64)}
    assert packed.packed.codes.shape == tiles.get(config.bits, (53, -(-77 * config.bits // 8)))


def test_code_of_a_power_is_the_shift():
    config = PoTConfig(granularity="tensor")
    w = torch.tensor([[0.0, 1, 2, 64, -1, -2, -64, 100]])
    packed = PackedWeight.pack(w, torch.ones(1, 1), config)
    assert pot.unpack_codes(packed.codes, 4, (1, 8)).tolist() == [[0, 1, 2, 7, 9, 10, 15, 7]]


# --- prepare, convert, state ---


@pytest.mark.parametrize(
    "config",
    [PoTConfig(), PoTConfig(bits=3, granularity="channel"), PoTConfig(act_bits=8, terms=2), PAPER_CONFIGS[2]],
    ids=str,
)
def test_prepare_convert_save_and_load(config):
    torch.manual_seed(0)
    model, x = tiny_gpt().eval(), torch.randint(0, 65, (3, 16))
    before = dict(model.named_parameters())
    names = prepare(model, config)
    assert all(p is before[n] for n, p in model.named_parameters())  # the same Parameters, and the tie
    embeddings = 0 if config.grid == "paper" else 2
    assert len(names) == 9 + embeddings and prepare(model, config) == []
    y = model(x)
    clone = copy.deepcopy(model)
    assert torch.equal(clone(x), y)
    if embeddings:
        assert clone.lm_head.quantizer is clone.transformer.wte.quantizer
        assert clone.lm_head.weight is clone.transformer.wte.weight
        assert "lm_head.quantizer.unit" not in model.state_dict()
    loaded_state = tiny_gpt().eval()
    prepare(loaded_state, config)
    loaded_state.load_state_dict(model.state_dict())
    assert torch.equal(loaded_state(x), y)
    assert convert(model) is model and torch.equal(model(x), y)
    assert torch.equal(copy.deepcopy(model)(x), y)
    tensors, metadata = pot.packed_state(model)
    metadata = json.loads(json.dumps(metadata))
    with torch.device("meta"):
        empty = tiny_gpt()
    for target in (empty, tiny_gpt()):
        loaded = pot.load_packed(target, tensors, metadata).eval()
        assert torch.equal(loaded(x), y)
        if embeddings:
            assert loaded.lm_head.packed is loaded.transformer.wte.packed
        loaded.load_state_dict(model.state_dict())


def test_tied_weights_are_counted_once():
    model = tiny_gpt()
    rows = [-(-len(p) // 16) * 16 for p in model.parameters() if p.dim() == 2]  # whole tiles
    parameters = sum(n * p.shape[1] for n, p in zip(rows, (p for p in model.parameters() if p.dim() == 2)))
    pot.quantize_(model, PoTConfig())
    tensors, metadata = pot.packed_state(model)
    codes = sum(t.numel() for n, t in tensors.items() if n.endswith("codes"))
    units = sum(t.numel() for n, t in tensors.items() if n.endswith("unit"))
    assert codes == parameters / 2 and units == parameters / 64
    assert metadata["aliases"]["lm_head.packed.codes"] == "transformer.wte.packed.codes"


def test_packed_state_is_whole_though_the_first_user_of_a_weight_is_gone():
    model = pot.quantize_(tiny_gpt())
    expected = pot.packed_state(model.lm_head)[0]
    model.transformer.wte = nn.Embedding(65, 64)  # the shared weight was registered here
    tensors, metadata = pot.packed_state(model)
    assert torch.equal(tensors["lm_head.packed.codes"], expected["packed.codes"]) and not metadata["aliases"]


def test_tied_gradient_is_the_sum_of_both_uses():
    torch.manual_seed(0)
    model, x = tiny_gpt(), torch.randint(0, 65, (2, 8))
    prepare(model, PoTConfig())
    model(x, x)[1].backward()
    tied_grad = model.transformer.wte.weight.grad.clone()
    untied = copy.deepcopy(model)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    untied.zero_grad()
    untied(x, x)[1].backward()
    assert torch.allclose(tied_grad, untied.lm_head.weight.grad + untied.transformer.wte.weight.grad, atol=1e-6)


def test_filter_fn_chooses_layers_and_configs():
    model = tiny_gpt()

    def choose(module, name):
        if isinstance(module, nn.Embedding) or name == "lm_head":
            return False
        return PoTConfig(bits=3) if "mlp" in name else True

    names = prepare(model, PoTConfig(), choose)
    assert len(names) == 8 and "lm_head" not in names
    assert model.transformer.h[0].mlp.c_fc.quantizer.config.bits == 3
    assert model.transformer.h[0].attn.c_attn.quantizer.config.bits == 4
    x = torch.randint(0, 65, (1, 4))
    y = model.eval()(x)
    assert torch.equal(convert(model)(x), y)
    tensors, metadata = pot.packed_state(model)
    assert metadata["aliases"] == {"lm_head.weight": "transformer.wte.weight"}
    loaded = pot.load_packed(tiny_gpt().eval(), tensors, metadata)
    assert torch.equal(loaded(x), y) and loaded.lm_head.weight is loaded.transformer.wte.weight


def test_bad_weights_raise_by_name_and_change_nothing():
    def model(**kw):
        return nn.ModuleDict({"good": nn.Linear(64, 8), "bad": nn.Linear(kw.get("width", 64), kw.get("out", 8))})

    for value in (torch.nan, torch.inf):
        m = model()
        with torch.no_grad():
            m["bad"].weight[1, 2] = value
        with pytest.raises(ValueError, match="^bad: .*NaN or inf"):
            prepare(m)
        assert type(m["good"]) is nn.Linear
    with pytest.raises(ValueError, match="^bad: .*shape"):
        prepare(model(out=0))
    with pytest.raises(ValueError, match="^bad: group_size 64 does not divide its 65"):
        prepare(m := model(width=65))
    assert type(m["good"]) is nn.Linear
    prepare(m := model())
    with torch.no_grad():
        m["bad"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="^bad: .*NaN"):
        convert(m)
    assert type(m["good"]) is PoTLinear
    m = tiny_gpt()
    with pytest.raises(ValueError, match="^lm_head: shares its weight"):
        prepare(m, filter_fn=lambda _, n: PoTConfig(bits=3) if n == "lm_head" else True)
    with pytest.raises(ValueError, match="max_norm"):
        prepare(nn.Embedding(5, 64, max_norm=1.0))


def test_hooks_training_mode_and_shared_modules_survive():
    layer = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(64, 64)}).eval()
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    assert prepare(model) == ["a", "c"]
    model["b"](torch.randn(1, 64))
    assert calls == [1] and not model["a"].training
    convert(model)
    assert model["a"] is model["b"] and isinstance(model["a"], pot.PackedPoTLinear) and not model["a"].training


def test_subclasses_are_not_prepared():
    model = nn.MultiheadAttention(64, 2)  # reads out_proj.weight without calling out_proj
    with pytest.warns(UserWarning, match="no layer was quantized"):
        assert prepare(model) == []


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.prune.identity])
def test_weights_that_hooks_compute_are_refused(wrap):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    arguments = ("weight",) if wrap is nn.utils.prune.identity else ()
    wrap(model[1], *arguments)
    with pytest.raises(ValueError, match="1: its weight is computed before each call"):
        prepare(model)
    assert type(model[0]) is nn.Linear
    model = nn.Sequential(nn.Linear(64, 64))
    prepare(model)
    wrap(model[0], *arguments)
    for change in (convert, lambda model: calibrate(model, [torch.randn(8, 64)])):
        with pytest.raises(ValueError, match="0: its weight is computed before each call"):
            change(model)


def test_torchaos_filter_chooses_the_same_layers():
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 8))
    pot.quantize_(model, filter_fn=lambda m, fqn: isinstance(m, nn.Linear) and fqn == "1")
    assert isinstance(model[0], nn.Embedding) and isinstance(model[1], pot.PackedPoTLinear)
    with pytest.warns(UserWarning, match="filter_fn\\(module, name\\) left all out"):
        assert prepare(nn.Linear(64, 8), filter_fn=lambda m, fqn: False) == []


def test_load_packed_rejects_bad_tensors_and_metadata():
    model = tiny_gpt()
    pot.quantize_(model)
    tensors, metadata = pot.packed_state(model)
    key = "transformer.h.0.attn.c_attn"

    def load(t=tensors, m=metadata, into=tiny_gpt):
        return pot.load_packed(into(), t, m)

    load()
    for name in tensors:
        with pytest.raises(ValueError, match="missing|incomplete"):
            load({n: t for n, t in tensors.items() if n != name})
        with pytest.raises(ValueError):
            load(tensors | {name: tensors[name][:-1]})
    with pytest.raises(ValueError, match="c_attn.packed.codes is .*uint8"):
        load(tensors | {f"{key}.packed.codes": tensors[f"{key}.packed.codes"].float()})
    with pytest.raises(ValueError, match="no positive number"):
        load(tensors | {f"{key}.packed.unit": tensors[f"{key}.packed.unit"] * torch.nan})
    with pytest.raises(ValueError, match="Missing key.*packed.unit"):  # a file that holds values of the top level
        load({n.replace(".packed.unit", ".packed.scale"): t for n, t in tensors.items()}, metadata | {"aliases": {}})
    for name in (f"{key}.bias", "transformer.ln_f.weight"):
        with pytest.raises(ValueError, match="is torch.int32, expected torch.float32"):
            load(tensors | {name: tensors[name].int()})
    for alias in metadata["aliases"]:
        remaining = {a: t for a, t in metadata["aliases"].items() if a != alias}
        with pytest.raises(ValueError, match="is missing|Missing key|Unexpected key"):
            load(m=metadata | {"aliases": remaining | {"unknown." + alias: metadata["aliases"][alias]}})
    with pytest.raises(ValueError, match='Unexpected key.* "stranger"'):
        load(tensors | {"stranger": torch.zeros(1)})
    with pytest.raises(ValueError, match="of shape"):
        load(into=lambda: tiny_gpt(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=128))
    for broken in (
        {},
        metadata | {"configs": []},
        metadata | {"layers": {key: {}}},
        metadata | {"configs": [{"bits": 99}]},
    ):
        with pytest.raises(ValueError):
            load(m=broken)
    wrong_aliases = {f"{key[:-6]}c_proj.packed.{part}": f"{key}.packed.{part}" for part in ("codes", "unit")}
    without_c_proj = {n: t for n, t in tensors.items() if n not in wrong_aliases}
    with pytest.raises(ValueError, match="c_proj shares .*c_attn.packed.codes, which is of another shape"):
        load(without_c_proj, metadata | {"aliases": metadata["aliases"] | wrong_aliases})
    for size in (48, 1000):  # fewer and more than the 64 input features, and no divisor of 64
        with pytest.raises(ValueError, match=f"groups of {size} do not divide the 64 input features"):
            load(m=metadata | {"configs": [metadata["configs"][0] | {"group_size": size}]})
    with pytest.raises(ValueError, match="unknown layout"):
        load(m=metadata | {"configs": [metadata["configs"][0] | {"layout": "else"}]})
    with pytest.raises(ValueError, match="call convert first"):
        prepare(m := tiny_gpt())
        pot.packed_state(m)


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    model, x = tiny_gpt(), torch.randint(0, 65, (4, 16))
    prepare(model, PoTConfig())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = model(x, x)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_paper_observer_updates_in_training_only():
    layer = PoTLinear(64, 64, config=PAPER_CONFIGS[2])
    old = layer.weight.detach().aminmax()
    with torch.no_grad():
        layer.weight.mul_(100)
    layer.eval()(torch.randn(1, 64))
    assert layer.quantizer.unit.item() == pytest.approx(max(max(old).item() / 128, 2**-5, -old.min.item() / 128))
    layer.train()(torch.randn(1, 64))
    low, high = (0.99 * b.item() + 0.01 * n.item() for b, n in zip(old, layer.weight.aminmax()))
    assert layer.quantizer.minmax.tolist() == pytest.approx([low, high])
    assert layer.quantizer.unit.item() == pytest.approx(max(-low / 128, high / 128, 2**-5))


def test_float32_units_survive_a_state_dict():
    models = []
    for factor in (1e-7, 1.0):
        models.append(nn.Sequential(nn.Linear(64, 8)))
        with torch.no_grad():
            models[-1][0].weight.mul_(factor)
        prepare(models[-1])
    x = torch.randn(3, 64)
    models[1].load_state_dict(models[0].state_dict())
    assert torch.equal(models[1](x), models[0](x)) and models[1][0].quantizer.unit.dtype == torch.float32
    for m in models:
        convert(m)
    packed = convert(nn.Sequential(PoTLinear(64, 8)))
    packed.load_state_dict(models[0].state_dict())
    assert torch.equal(packed(x), models[0](x))


def test_weights_untied_after_prepare_are_packed_separately():
    model = tiny_gpt()
    prepare(model)
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.02)
    x = torch.randint(0, 65, (1, 5))
    y = model.eval()(x)
    assert torch.equal(convert(model)(x), y)


def test_preparing_a_tied_partner_later_shares_the_quantizer():
    model = tiny_gpt()
    prepare(model, filter_fn=lambda _, n: n == "lm_head")
    prepare(model, filter_fn=lambda _, n: n == "transformer.wte")
    assert model.lm_head.quantizer is model.transformer.wte.quantizer


def test_transformer_encoder_layer_does_not_bypass_forward():
    layer = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True).eval()
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        before = layer(x)
        prepare(layer)
        prepared = layer(x)
        assert not torch.allclose(prepared, before)
        assert torch.allclose(convert(layer)(x), prepared, atol=1e-6)


@pytest.mark.parametrize("act_bits", [None, 8])
def test_transformer_encoder_with_a_padded_batch(act_bits):
    """In eval mode it makes a nested tensor of the tokens that are no padding."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    pot.prepare(encoder, PoTConfig(act_bits=act_bits))
    x, padding = torch.randn(3, 7, 64), torch.arange(7) >= torch.tensor([[7], [5], [3]])
    with torch.no_grad():
        nested = encoder(x, src_key_padding_mask=padding)
        for row, length in enumerate([7, 5, 3]):
            alone = encoder(x[row : row + 1, :length])[0]
            torch.testing.assert_close(nested[row, :length], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_activations_of_nested_tensors(layout):
    torch.manual_seed(0)
    rows = [torch.randn(3, 64), torch.randn(5, 64)]
    x = torch.nested.nested_tensor(rows, layout=layout, requires_grad=True)
    y = pot.fake_quantize_activations(x)
    assert all(torch.equal(a, pot.fake_quantize_activations(row)) for a, row in zip(y.unbind(), rows, strict=True))
    sum(t.sum() for t in y.unbind()).backward()
    assert all(torch.equal(g, torch.ones_like(g)) for g in x.grad.unbind())


def test_paper_layer_used_twice_and_cast():
    layer = PoTLinear(64, 64, config=PAPER_CONFIGS[2]).train()
    layer(layer(torch.randn(1, 64))).sum().backward()
    layer.bfloat16()
    layer(torch.randn(1, 64, dtype=torch.bfloat16)).sum().backward()
    assert layer.quantizer.minmax.dtype == torch.float32


def test_default_dtype_does_not_matter():
    config = PoTConfig(bits=6, granularity="tensor")
    w = torch.randn(8, 64)
    torch.set_default_dtype(torch.float16)
    try:
        unit = pot.compute_unit(w, config)
        assert torch.equal(PackedWeight.pack(w, unit, config)(), fake_quantize(w, unit, config))
    finally:
        torch.set_default_dtype(torch.float32)


def test_unit_of_a_tensor_with_an_outlier():
    torch.manual_seed(0)
    w = torch.randn(256, 256)
    w[3, 5] = 40.0
    config = PoTConfig(grid="uniform", granularity="tensor")
    units = (torch.linspace(1, 40, 300) / config.top).tolist()
    best = max(pot.sqnr(w, fake_quantize(w, torch.full((1, 1), u), config)) for u in units)
    assert pot.sqnr(w, fake_quantize(w, pot.compute_unit(w, config), config)) > best - 0.2


def test_embedding_index_shapes():
    table = PoTEmbedding(10, 64)
    packed = convert(copy.deepcopy(table))
    for index in (
        torch.tensor(3),
        torch.tensor([1, 2]),
        torch.zeros(0, dtype=torch.long),
        torch.zeros(2, 0, 3, dtype=torch.long),
    ):
        assert torch.equal(table(index), packed(index)) and table(index).shape == (*index.shape, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", ["mse", "absmax"])
def test_largest_weights_stay_finite(dtype, scale):
    torch.manual_seed(0)
    largest = torch.finfo(dtype).max
    for kind in ({}, {"terms": 2}, {"grid": "uniform"}, {"grid": "uniform", "bits": 8}, {"scale_format": "e8m0"}):
        for granularity in ("group", "tensor"):
            config = PoTConfig(scale=scale, granularity=granularity, **kind)
            for w in (torch.randn(8, 64).sign() * largest, (torch.rand(8, 64) * 2 - 1) * largest):
                w = w.to(dtype)
                unit = pot.compute_unit(w, config)
                q = fake_quantize(w, unit, config)
                assert q.isfinite().all() and torch.equal(pot.PackedWeight.pack(w, unit, config)(), q)
                if config.scale_format == "e8m0":
                    assert (torch.frexp(unit.float()).mantissa == 0.5).all()
                else:
                    assert pot.sqnr(w, q) > 10


def test_largest_float16_weights_stay_finite():
    for kind in ({}, {"terms": 2}, {"grid": "uniform"}, {"grid": "uniform", "scale": "absmax"}):
        layer = nn.Linear(64, 8).half()
        with torch.no_grad():
            layer.weight.fill_(65504.0).mul_(torch.randn(8, 64).sign())
        prepare(layer, PoTConfig(**kind))
        q = layer.quantizer(layer.weight)
        assert torch.allclose(q, layer.weight, rtol=2e-3), kind  # 7 units of 9,360 would be infinite


# --- compile, export, models of transformers ---


def prepared_and_packed():
    torch.manual_seed(0)
    model = tiny_gpt(block_size=16, vocab_size=65, n_layer=1, n_head=2, n_embd=64).eval()
    prepare(model, PoTConfig(act_bits=8))
    return [model, convert(copy.deepcopy(model))]


def test_a_compiled_training_step_is_one_graph():
    """Forward, distillation loss and backward of a prepared GPT, as train.py computes them. fullgraph raises an error where
    the graph breaks."""
    model, x = prepared_and_packed()[0].train(), torch.randint(0, 65, (2, 16))
    teacher = tiny_gpt(block_size=16, vocab_size=65, n_layer=1, n_head=2, n_embd=64).eval()
    soft = teacher(x).flatten(0, 1).softmax(-1).detach()

    def loss(x):
        return F.cross_entropy(model(x).flatten(0, 1).float(), soft)

    expected = loss(x)
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    actual = torch.compile(loss, backend="aot_eager", fullgraph=True)(x)
    actual.backward()
    assert torch.allclose(actual, expected, atol=1e-6)
    assert all(torch.allclose(p.grad, gradients[n], atol=1e-6) for n, p in model.named_parameters())


def test_a_compiled_packed_model_is_one_graph():
    model, x = prepared_and_packed()[1], torch.randint(0, 65, (2, 16))
    with torch.no_grad():  # "eager": only the capture is in question
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_compile_with_inductor():
    w = torch.cat([torch.randn(4000), torch.tensor([-0.0, 0.5, 1.5, 3.0, 96.0])]).view(1, -1) * 20
    for config in (
        PoTConfig(granularity="tensor"),
        PoTConfig(granularity="tensor", terms=2),
        PoTConfig(granularity="tensor", grid="uniform"),
    ):
        unit = torch.ones(1, 1)
        compiled = torch.compile(lambda w, unit=unit, config=config: fake_quantize(w, unit, config), fullgraph=True)
        assert torch.equal(compiled(w), fake_quantize(w, unit, config))


def test_export():
    x = torch.randint(0, 65, (2, 16))
    for model in prepared_and_packed():
        exported = torch.export.export(model, (x,)).module()
        assert torch.allclose(exported(x), model(x), atol=1e-6)


@pytest.mark.parametrize("bits", [4, 5])  # tiles and a bit stream
def test_export_for_any_number_of_rows(bits):
    model = pot.quantize_(nn.Sequential(nn.Embedding(20, 64), nn.Linear(64, 8)), PoTConfig(bits=bits))
    size = {0: torch.export.Dim("batch")}
    exported = torch.export.export(model, (torch.arange(6),), dynamic_shapes=(size,)).module()
    for rows in (2, 20):
        x = torch.arange(rows).flip(0)
        assert torch.allclose(exported(x), model(x), atol=1e-6)


def hugging_face(name):
    transformers = pytest.importorskip("transformers")
    small = dict(vocab_size=99, bos_token_id=0, eos_token_id=0)
    if name == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_embd=64, n_head=2, n_positions=32, **small)
        return transformers.GPT2LMHeadModel(config).eval()
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **small)).eval()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_hugging_face_models(name):
    torch.manual_seed(0)
    model, x = hugging_face(name), torch.randint(0, 99, (2, 8))
    float_weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    names = prepare(model, PoTConfig())
    assert len(names) == (2 + 2 * 4 + 1 if name == "gpt2" else 1 + 2 * 7 + 1)
    # The reference is the float model with each matrix rounded.
    y = model(x).logits
    reference = hugging_face(name)
    with torch.no_grad():
        for n, p in reference.named_parameters():
            w = float_weights[n]
            if w.dim() == 2:
                conv1d = name == "gpt2" and "h." in n
                w = w.t() if conv1d else w
                w = fake_quantize(w, pot.compute_unit(w, PoTConfig()), PoTConfig())
                w = w.t() if conv1d else w
            p.copy_(w)
    assert torch.allclose(reference(x).logits, y, atol=1e-5)
    model.train()
    model(input_ids=x, labels=x).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    single_logits = model(x[:1, :1]).logits
    convert(model)
    assert torch.equal(model(x).logits, y) and torch.equal(model(x[:1, :1]).logits, single_logits)
    tensors, metadata = pot.packed_state(model)
    loaded = pot.load_packed(hugging_face(name), tensors, json.loads(json.dumps(metadata)))
    assert torch.equal(loaded(x).logits, y)
    exported = torch.export.export(model, (), {"input_ids": x, "use_cache": False}, strict=False).module()
    assert torch.allclose(exported(input_ids=x, use_cache=False).logits, y, atol=1e-5)


def test_every_grid_granularity_and_activation_setting_runs():
    x = torch.randn(2, 64)
    for c, g, a in itertools.product(CONFIGS, ("tensor", "channel", "group"), (None, 8)):
        fields = {f: getattr(c, f) for f in c.__dataclass_fields__}
        layer = PoTLinear(64, 3, config=PoTConfig(**fields | dict(granularity=g, act_bits=a)))
        y = layer(x)
        assert torch.equal(convert(layer)(x), y)


USER = """
import torch
from calibrate import calibrate
from pot import PoTConfig, PoTLinear, convert, load_packed, packed_state, prepare

layer = PoTLinear(64, 64, config=PoTConfig(terms=2))
unit: torch.Tensor = layer.quantizer.unit
model = torch.nn.Sequential(layer)
names: list[str] = prepare(model, PoTConfig(), lambda module, name: name != "1")
errors: dict[str, tuple[float, float]] = calibrate(model, [torch.randn(8, 64)])
loaded: torch.nn.Module = load_packed(model, *packed_state(convert(model)))
prepare(model, 4)
"""


def test_a_type_checker_accepts_the_public_api_and_finds_a_mistake(tmp_path):
    pytest.importorskip("mypy")
    root = Path(pot.__file__).parent
    (tmp_path / "user.py").write_text(USER)
    files = [root / "pot.py", root / "calibrate.py", root / "pot_kernel" / "__init__.py", tmp_path / "user.py"]
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), *map(str, files)]
    lines = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == 2 and "user.py:12: error: Argument 2 to" in lines[0] and "Found 1 error" in lines[1], lines


def test_state_dict_of_another_grid_is_refused(tmp_path):
    """Codes and units of two grids may have one shape. They would be other weights."""
    configs = [PoTConfig(), PoTConfig(terms=2), PoTConfig(range=5), PoTConfig(grid="uniform")]
    for make, (a, b) in itertools.product((pot.quantize_, prepare), itertools.product(configs, configs)):
        source, target = nn.Sequential(nn.Linear(64, 16)), nn.Sequential(nn.Linear(64, 16))
        make(source, a), make(target, b)
        torch.save(source.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        for assign in (False, True):
            if a == b:
                target.load_state_dict(state, assign=assign)
                assert torch.equal(source(torch.ones(64)), target(torch.ones(64)))
            else:
                with pytest.raises(RuntimeError, match="holds codes of the grid .*, but this layer has"):
                    target.load_state_dict(state, assign=assign)


@pytest.mark.parametrize(
    "config", [PoTConfig(bits=2), PoTConfig(bits=3), PoTConfig(), PoTConfig(bits=8, grid="uniform")]
)
def test_convert_inside_autocast(config):
    layer = nn.Linear(64, 20)
    expected = pot.quantize_(copy.deepcopy(layer), config).state_dict()
    with torch.autocast("cpu", torch.bfloat16):
        actual = pot.quantize_(copy.deepcopy(layer), config).state_dict()
    assert all(torch.equal(value, actual[key]) for key, value in expected.items())
