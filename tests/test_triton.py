"""The Triton kernels against float64: on a GPU if there is one, else by Triton's interpreter (see conftest.py)."""

import copy
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import pot_kernel
from pot import PackedWeight, PoTConfig, compute_unit, fake_quantize_activations, load_packed, packed_state, quantize_

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow) encountered:RuntimeWarning"
)  # of the interpreter
DEVICE = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
PAPER = PoTConfig(range=3, grid="paper", granularity="tensor", scale="absmax")
CASES = [  # rows and columns of the weight
    (1, 64, PoTConfig()),
    (5, 128, PoTConfig(terms=2, granularity="channel")),
    (33, 384, PoTConfig(group_size=32)),
    (64, 320, PoTConfig(grid="uniform")),
    (7, 200, PoTConfig(terms=2, group_size=20)),
    (3, 600, PoTConfig(range=5, granularity="channel")),
    (2, 1, PoTConfig(granularity="tensor")),
    (9, 77, PoTConfig(grid="uniform", group_size=7)),
    (70, 256, PAPER),
    (17, 128, PoTConfig(act_bits=8, group_size=128)),
    (80, 96, PoTConfig(scale_format="e8m0", group_size=8)),
    (20, 72, PoTConfig(terms=2, group_size=24)),
]
ROWS = {torch.float16: (1, 2, 17), torch.bfloat16: (1, 16, 70), torch.float32: (1, 3)}  # of x


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    """triton.py, in use."""
    pot_kernel.load()  # keeps the CPU's kernel off
    monkeypatch.setenv("NANOPOT_KERNEL", "triton")
    module = pot_kernel.load_triton(DEVICE)
    yield module
    assert not module._failed


def packed(out, columns, config, dtype=torch.float32):
    torch.manual_seed(out + columns)
    w = torch.randn(out, columns).to(DEVICE, dtype)
    return PackedWeight.pack(w, compute_unit(w, config), config)


def exact_weight(weight):
    """(out, in) float64"""
    return PackedWeight(weight.codes, weight.unit, weight.shape, torch.float32, weight.config)().double()


def check_product(weight, x, bias, rounded_x=None):
    """weight.linear(x, bias) is the float64 product, but for float32 sums and a rounding of the result. With more than one
    row of x, the weight is rounded to x's dtype, too. Triton's interpreter rounds to bfloat16 towards 0."""
    y, w = weight.linear(x, bias), exact_weight(weight)
    cut = x.dtype == torch.bfloat16 and DEVICE.type == "cpu"
    if x.numel() > x.shape[-1]:
        w = ((w.float().view(torch.int32) & -65536).view(torch.float32) if cut else w.to(x.dtype)).double()
    x64, bias = (x if rounded_x is None else rounded_x).double(), None if bias is None else bias.double()
    expected = F.linear(x64, w, bias)
    size = F.linear(x64.abs(), w.abs(), None if bias is None else bias.abs())
    info, error = torch.finfo(x.dtype), (y.double() - expected).abs()
    assert y.dtype == x.dtype and y.shape == expected.shape
    assert (error <= 2**-20 * size + info.eps / (1 if cut else 2) * expected.abs() + info.smallest_normal).all()


@pytest.mark.parametrize("dtype", ROWS, ids=str)
@pytest.mark.parametrize("out, columns, config", CASES, ids=str)
def test_products(dtype, out, columns, config):
    weight = packed(out, columns, config, dtype)
    assert weight.on_triton
    for n in ROWS[dtype]:
        x = torch.randn(n, columns, device=DEVICE).to(dtype)
        bias = torch.randn(out, device=DEVICE).to(dtype) if n % 2 else None
        check_product(weight, x, bias, fake_quantize_activations(x) if config.act_bits else None)


@pytest.mark.parametrize(
    "config", [PoTConfig(), PoTConfig(terms=2), PoTConfig(grid="uniform"), PoTConfig(range=2), PAPER]
)
def test_every_code_at_every_position(triton, config):
    """Codes without a level, too. All figures are exact."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(16, 1)
    codes = torch.stack([row.roll(k) for k, row in enumerate(codes)]).to(DEVICE)
    config = PoTConfig(**vars(config) | {"granularity": "tensor"})
    weight = PackedWeight.from_codes(codes, torch.ones(1, 1, device=DEVICE).half(), torch.float16, config)
    expected = config.table().to(DEVICE)[codes.long()].half()
    x = torch.eye(16, device=DEVICE).half()
    assert torch.equal(weight.linear(x, None), expected.t())
    assert torch.equal(weight.linear(x[5], None), expected[:, 5])
    words = weight.codes.view(torch.int32).view(1, -1, 16)
    assert torch.equal(triton.unpack(words, weight.unit, config.code_levels(), (16, 16)).half(), expected)


def test_input_layouts():
    weight, base = packed(33, 64, PoTConfig(), torch.float16), torch.randn(4, 200, device=DEVICE).half()
    kinds = {
        "strided rows": base[:, 3:67],
        "transposed": base[:, :64].t().contiguous().t(),
        "every other": base[:, :128:2],
        "expanded": base[:1, :64].expand(5, 64),
        "three dimensions": base[:, :192].view(2, 2, 3, 64)[:, 0],
        "one dimension": base[0, :64],
        "no rows": base[:0, :64],
        "negated": torch._neg_view(base[:, :64]),
    }
    for kind, x in kinds.items():
        try:
            check_product(weight, x, None)
        except AssertionError as e:
            raise AssertionError(kind) from e
    bias = torch.randn(66, device=DEVICE)[::2]
    check_product(weight, base[:2, :64], bias.half())
    assert torch.equal(weight.linear(base[:2, :64], bias), weight.linear(base[:2, :64], bias.half()))


@pytest.mark.parametrize("n", [1, 3])
def test_non_finite_inputs(n):
    weight = packed(20, 64, PoTConfig(), torch.bfloat16)
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(n, 64, device=DEVICE).bfloat16()
        x[-1, 40] = bad
        y, expected = weight.linear(x, None), F.linear(x, weight())
        assert torch.equal(y.isfinite(), expected.isfinite()) and torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y[-1].nan_to_num(), expected[-1].nan_to_num())


@pytest.mark.parametrize("n", [1, 2])
def test_extreme_units(n):
    """Weights beyond float16's range have float32 units."""
    for scale in (1e-30, 1e30):
        w = torch.randn(5, 64, device=DEVICE) * scale
        weight = PackedWeight.pack(w, compute_unit(w, PoTConfig()), PoTConfig())
        assert weight.unit.dtype == torch.float32
        check_product(weight, torch.randn(n, 64, device=DEVICE), None)


def test_columns_in_parts_are_summed_in_a_fixed_order(triton, monkeypatch):
    weight, x = packed(16, 1024, PoTConfig(), torch.float16), torch.randn(2, 1024, device=DEVICE).half()
    bias, grids, kernel = torch.randn(16, device=DEVICE).half(), [], triton._product

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(triton, "_product", Recorder())
    y = weight.linear(x, bias)
    assert torch.equal(weight.linear(x, bias), y)
    check_product(weight, x, bias)
    monkeypatch.setattr(triton, "_processors", lambda device: 0)
    check_product(weight, x, bias)
    assert grids == [(1, 1, 4)] * 3 + [(1, 1, 1)]


@pytest.mark.filterwarnings("error")
def test_models():
    """A model in Triton's hands moves, compiles, copies, and is stored like any other, and has gradients."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 24), nn.GELU(), nn.Linear(24, 8, bias=False))
    config = PoTConfig(granularity="channel")
    model = quantize_(layers.bfloat16(), config).requires_grad_(False).to(DEVICE)
    x = torch.randn(3, 64, device=DEVICE).bfloat16()
    y = model(x)
    expected = F.linear(F.gelu(F.linear(x, model[0].weight, model[0].bias)), model[2].weight)
    assert torch.allclose(y, expected, atol=0.02) and model[0].packed.on_triton
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), y) and torch.equal(compiled(x[:1]), model(x[:1]))
    assert torch.equal(copy.deepcopy(model)(x), y) and torch.equal(pickle.loads(pickle.dumps(model))(x), y)
    empty = nn.Sequential(nn.Linear(64, 24), nn.GELU(), nn.Linear(24, 8, bias=False)).bfloat16().to("meta")
    assert torch.equal(load_packed(empty, *packed_state(model))(x), y)
    followed = x.clone().requires_grad_()
    model(followed).sum().backward()
    assert followed.grad.isfinite().all()
    exported = torch.export.export(model, (x,))
    assert str(exported.graph).count("nanopot.linear") == 2 and torch.equal(exported.module()(x), y)
    assert torch.equal(model.double()(x.double()), F.linear(F.gelu(model[0](x.double())), model[2].weight))
    assert model.float()(x.float()).dtype == torch.float32


def test_operator():
    weight, x = packed(20, 64, PoTConfig(), torch.float16), torch.randn(2, 64, device=DEVICE).half()
    arguments = x, weight.codes, weight.unit, None, weight.config.code_levels(), 20, 4, 0, None
    torch.library.opcheck(torch.ops.nanopot.linear, arguments)
    assert torch.equal(torch.ops.nanopot.linear(*arguments), weight.linear(x, None))


def test_unaligned_codes():
    weight, x = packed(20, 64, PoTConfig(), torch.float16), torch.randn(1, 64, device=DEVICE).half()
    storage = torch.cat([weight.codes.new_zeros(1), weight.codes.flatten()])
    moved = PackedWeight(storage[1:].view(weight.codes.shape), weight.unit, (20, 64), torch.float16, PoTConfig())
    assert moved.codes.storage_offset() == 1 and torch.equal(moved.linear(x, None), weight.linear(x, None))


def test_tensors_that_do_not_fit(triton):
    weight, x = packed(20, 64, PoTConfig(), torch.float16), torch.randn(2, 64, device=DEVICE).half()
    good = {"codes": weight.codes, "unit": weight.unit, "levels": PoTConfig().code_levels(), "rows": 20, "bias": None}
    triton.linear(x, **good)
    wrong = [{"rows": 40}, {"codes": weight.codes[:, :64]}, {"unit": weight.unit[:1]}, {"unit": weight.unit.double()}]
    wrong += [{"unit": weight.unit[:, :, :3]}, {"bias": torch.zeros(19, device=DEVICE)}]
    wrong += [{"codes": weight.codes.to("meta")}, {"unit": torch.ones(1, 7, device=DEVICE)}]
    for change in wrong:
        with pytest.raises(ValueError, match="codes|units?|bias"):
            triton.linear(x, **good | change)
    with pytest.raises(RuntimeError):
        weight.linear(torch.randn(2, 63, device=DEVICE).half(), None)


@pytest.mark.parametrize("config", [PoTConfig(group_size=4), PoTConfig(terms=2, granularity="tensor")], ids=str)
def test_a_kernel_that_does_not_compile(triton, monkeypatch, config):
    weight, x = packed(20, 60, config, torch.float16), torch.randn(2, 60, device=DEVICE).half()
    bias, tries = torch.randn(20, device=DEVICE).half(), []

    def fail(*arguments):
        tries.append(1)
        raise RuntimeError("no such instruction\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(triton, "_failed", False)
        patch.setattr(triton, "_launch", fail)
        with pytest.warns(UserWarning, match=r"unpacks packed weights.*RuntimeError: no such instruction\)") as caught:
            y = weight.linear(x, bias)
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(weight.linear(x, bias), y) and len(tries) == 1
    assert torch.equal(y, F.linear(x, weight(), bias))


def test_when_triton_is_used(monkeypatch):
    assert not packed(5, 64, PoTConfig(bits=3)).on_triton
    for choice in ("", "off"):
        monkeypatch.setenv("NANOPOT_KERNEL", choice)
        assert pot_kernel.load_triton(DEVICE) is None and pot_kernel.load_triton(torch.device("cuda")) is None
    monkeypatch.setenv("NANOPOT_KERNEL", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert pot_kernel.load_triton(torch.device("cpu")) is None and pot_kernel.load_triton(torch.device("cuda"))
    monkeypatch.setattr("importlib.import_module", lambda *name: exec("raise ImportError('No module named triton')"))
    pot_kernel._import_triton.cache_clear()
    with pytest.warns(UserWarning, match="pip install triton"):
        assert pot_kernel.load_triton(torch.device("cuda")) is None
    assert pot_kernel.load_triton(torch.device("cuda")) is None
    pot_kernel._import_triton.cache_clear()


COMPILE = """
import importlib, sys, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

kernels = importlib.import_module("pot_kernel.triton")
sizes = dict.fromkeys(["m", "n", "columns", "vectors", "groups", "x_stride", "steps"], "i32")
for dtype, dot, rows, group, top in [
    ("fp16", tl.float16, 1, 64, 7), ("bf16", tl.bfloat16, 16, 0, 5), ("fp32", tl.float32, 16, 20, 7)
]:
    constants = dict(GROUP=group, PER_ROW=True, PLACE=10, TOP=top, DOT=dot, BM=rows, BN=64, BV=32)
    types = {"x": dtype, "codes": "i32", "unit": "fp16", "bias": dtype, "y": dtype}
    signature = {k: "*" + v for k, v in types.items()} | sizes | {"factor": "fp32"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernels._product, signature, constants)
    stages = {"num_stages": 1 if dtype == "fp32" else 3}
    done = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=stages)
    assert done.asm["cubin"] and done.metadata.shared < 99 * 1024 and (rows == 1 or "mma" in done.asm["ptx"] or dtype == "fp32")
signature = {"partial": "*fp32", "bias": "*bf16", "y": "*bf16", "size": "i32", "n": "i32", "parts": "i32", "BLOCK": "constexpr"}
triton.compile(ASTSource(kernels._add_parts, signature, {"BLOCK": 1024}), target=GPUTarget("cuda", int(sys.argv[1]), 32))
"""


def test_kernels_compile_for_gpus(tmp_path):
    """Triton's compiler needs no GPU, and refuses code that its interpreter runs."""
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, "90"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("n", [1, 2])
def test_memory_around_units_is_not_used(n):
    weight = packed(33, 72, PoTConfig(group_size=24), torch.float16)
    around = weight.unit.new_full((weight.unit.numel() + 4096,), torch.nan)
    unit = around[2048:-2048].view(weight.unit.shape).copy_(weight.unit)
    moved = PackedWeight(weight.codes, unit, (33, 72), torch.float16, weight.config)
    check_product(moved, torch.randn(n, 72, device=DEVICE).half(), None)
