"""pot_kernel against float64, with every instruction set of this machine."""

import copy
import ctypes
import itertools
import os
import pickle
import platform
import shutil
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import forward_ad

import pot_kernel
from checkpoint import make_decoder
from model import GPT, ROPE_SCALING, GPTConfig, KVCache
from pot import (
    PackedWeight,
    PoTConfig,
    allow_int8_activations,
    compute_unit,
    convert,
    fake_quantize_activations,
    prepare,
    quantize_,
    unpack_codes,
)
from pot_kernel.decode import Decoder, DecoderShape

ROOT = Path(__file__).parent.parent
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture
def kernel(monkeypatch):
    """kernel("avx2") loads the library with that instruction set. All other tests run without the library."""
    original = pot_kernel.load

    def load(name=""):
        monkeypatch.setenv("NANOPOT_KERNEL", name)
        pot_kernel.load.cache_clear()
        return pot_kernel.load()

    yield load
    if (library := load()) is not None:
        library.pot_choose(library.pot_instruction_sets().split()[0])
    monkeypatch.undo()
    pot_kernel.load.cache_clear()
    assert pot_kernel.load is original


def instruction_sets():
    if COMPILER is None:
        return []
    library = ctypes.CDLL(pot_kernel.build(pot_kernel.SOURCE))
    library.pot_instruction_sets.restype = ctypes.c_char_p
    return library.pot_instruction_sets().decode().split()


every_set = pytest.mark.parametrize("name", instruction_sets() or [pytest.param("", marks=needs_compiler)])

CONFIGS = [
    PoTConfig(),
    PoTConfig(group_size=128),
    PoTConfig(group_size=32),
    PoTConfig(terms=2, granularity="channel"),
    PoTConfig(grid="uniform", granularity="tensor"),
    PoTConfig(range=5, granularity="channel"),
    PoTConfig(bits=4, range=3, grid="paper", granularity="tensor", scale="absmax"),
    PoTConfig(act_bits=8),
    PoTConfig(act_bits=8, terms=2, granularity="channel"),
    PoTConfig(act_bits=8, grid="uniform", group_size=32),
    PoTConfig(bits=3, group_size=32),
    PoTConfig(bits=3, granularity="channel", act_bits=8),
    PoTConfig(bits=8, grid="uniform", granularity="channel"),
    PoTConfig(bits=8, grid="uniform", group_size=64, act_bits=8),
]
SHAPES = [(1, 64), (5, 128), (33, 384), (64, 768), (7, 200), (3, 1000), (2, 1), (9, 77)]


def packed(out, columns, config, dtype=torch.float32):
    torch.manual_seed(out + columns)
    if config.granularity == "group" and columns % config.group_size:
        pytest.skip("groups do not divide the columns")
    w = torch.randn(out, columns).to(dtype)
    return PackedWeight.pack(w, compute_unit(w, config), config)


@every_set
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("out, columns", SHAPES)
def test_products(kernel, name, config, out, columns):
    kernel("off")
    expected = packed(out, columns, config)()
    assert kernel(name)
    weight = packed(out, columns, config)
    assert torch.equal(weight().view(torch.int32) & 0x7FFFFFFF, expected.view(torch.int32) & 0x7FFFFFFF)
    assert torch.equal(weight(), expected)  # to the bit, except the sign of zeros
    for n in (1, 2, 3, 4, 5, 8, 17, 33, 70):
        x, bias = torch.randn(n, columns), torch.randn(out) if n % 2 else None
        rounded, size = x, None
        if config.act_bits:  # the kernel sums q - 128 and adds the share of 128 - zero at the end
            rounded = fake_quantize_activations(x)
            size = rounded.abs() + (x.amax(1, keepdim=True).clamp_min(0) - x.amin(1, keepdim=True).clamp_max(0))
        check_product(weight, expected, x, bias, rounded, size)


def check_product(weight, float_weight, x, bias, rounded_x, size=None):
    """weight.linear(x, bias) equals the float64 product of `rounded_x` and `float_weight`, up to float32 rounding.
    size: of what is summed, if that is not x."""
    actual = weight.linear(x, bias)
    x, w, bias = rounded_x.double(), float_weight.double(), None if bias is None else bias.double()
    bound = F.linear(x.abs() if size is None else size.double(), w.abs(), None if bias is None else bias.abs())
    assert ((actual - F.linear(x, w, bias)).abs() <= 2**-20 * bound).all()


def round_by_groups(x):
    """x (n, columns) in 8 bits per 64 columns, as pot.cpp says: x = scale * q, q from -127 to 127, ties to even."""
    out = torch.empty_like(x, dtype=torch.float64)
    for c in range(0, x.shape[1], 64):
        scale = x[:, c : c + 64].abs().amax(1, keepdim=True).clamp_min(2.0**-100) / 127
        out[:, c : c + 64] = (x[:, c : c + 64] / scale).round().double() * scale.double()
    return out


@every_set
@pytest.mark.parametrize("config", [c for c in CONFIGS if not c.act_bits], ids=str)
@pytest.mark.parametrize("out, columns", [(5, 128), (33, 384), (7, 200), (9, 77)])
def test_products_with_int8_activations(kernel, name, config, out, columns):
    assert kernel(name)
    weight = packed(out, columns, config)
    allow_int8_activations(weight)
    for n in (1, 2, 5, 16, 33, 70):
        x, bias = torch.randn(n, columns + 3)[:, :columns], torch.randn(out) if n % 2 else None
        check_product(weight, weight(), x, bias, round_by_groups(x))
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(20, columns)
        x[7, columns // 2] = bad
        rows = weight.linear(x, None).isnan()
        assert rows[7].all() and rows.sum() == out


def shift_multiply(q, level):
    """q * level by shifts and additions."""
    size, total, shift = abs(level), 0, 0
    while size:
        if size & 1:
            total += q << shift
        size, shift = size >> 1, shift + 1
    return -total if level < 0 else total


@every_set
@pytest.mark.parametrize("terms, group_size", [(1, 64), (2, 128), (1, 12), (2, 7)])
def test_8_bit_activations_are_integer_sums(kernel, name, terms, group_size):
    """Codes, zero points and sums are exact: units are 1 and activations are integers, so nothing is rounded."""
    library = kernel(name)
    columns, out = 6 * group_size, 9
    config = PoTConfig(terms=terms, group_size=group_size, act_bits=8)
    torch.manual_seed(columns)
    codes = torch.randint(16, (out, columns), dtype=torch.uint8)
    weight = PackedWeight.from_codes(codes, torch.ones(out, 6).half(), torch.float32, config)
    for zero in (0, 1, 100, 128, 254, 255):
        q = torch.randint(256, (columns,))
        q[0], q[1] = 0, 255
        x = (q - zero).float()
        actual, step, z = torch.zeros(columns, dtype=torch.uint8), ctypes.c_float(), ctypes.c_int32()
        pointers = actual.data_ptr(), ctypes.addressof(step), ctypes.addressof(z)
        assert library.pot_quantize(x.data_ptr(), columns, *pointers) == 0
        assert (step.value, z.value) == (1, zero) and torch.equal(actual.long(), q)
        sums = []
        for levels in config.table()[codes.long()].int().tolist():
            products = [shift_multiply(a, v) - shift_multiply(zero, v) for a, v in zip(q.tolist(), levels)]
            sums.append(sum(products))
        assert weight.linear(x.view(1, -1), None).tolist() == [sums]


@needs_compiler
def test_8_bit_activations_round_like_fake_quantization(kernel):
    library = kernel()
    torch.manual_seed(0)
    for i in range(300):
        x = torch.randn(1, 77) * 10.0 ** torch.randint(-6, 6, (1,)) + (i % 3) * torch.randn(1)
        x = {5: x.abs(), 6: -x.abs(), 7: x * 0, 8: x * 1e-42}.get(i % 10, x)
        q, step, z = torch.zeros(77, dtype=torch.uint8), ctypes.c_float(), ctypes.c_int32()
        pointers = q.data_ptr(), ctypes.addressof(step), ctypes.addressof(z)
        assert library.pot_quantize(x.data_ptr(), 77, *pointers) == 0
        assert torch.equal((q.float() - z.value) * step.value, fake_quantize_activations(x)[0])


@needs_compiler
def test_non_finite_8_bit_activations(kernel):
    assert kernel()
    weight = packed(33, 256, PoTConfig(act_bits=8))
    for n in (3, 20):
        for bad in (torch.nan, torch.inf, -torch.inf):
            x = torch.randn(n, 256)
            x[1, 70] = bad
            rows = weight.linear(x, None).isnan()
            assert rows[1].all() and rows.sum() == 33


@every_set
def test_every_code_at_every_position(kernel, name):
    assert kernel(name)
    for config in (PoTConfig(), PoTConfig(terms=2), PoTConfig(grid="uniform")):
        codes = torch.arange(16, dtype=torch.uint8).repeat(128, 1).flatten().view(16, 128)
        codes = torch.stack([codes.roll(k, 1) for k in range(16)]).flatten(0, 1)
        weight = PackedWeight.from_codes(codes, torch.ones(256, 2).half(), torch.float32, config)
        expected = config.table()[codes.long()].double()
        for column in (0, 1, 15, 16, 63, 64, 127):
            x = torch.zeros(1, 128)
            x[0, column] = 1
            assert torch.allclose(weight.linear(x, None)[0].double(), expected[:, column], rtol=1e-6, atol=0)


@needs_compiler
def test_input_layouts_and_dtypes(kernel):
    assert kernel()
    weight = packed(33, 256, PoTConfig())
    w = weight().double()
    base = torch.randn(4, 600)
    kinds = {
        "strided rows": base[:, 3:259],
        "transposed": torch.randn(256, 3).t(),
        "every other": torch.randn(3, 512)[:, ::2],
        "expanded": torch.randn(1, 256).expand(5, 256),
        "three dimensions": torch.randn(2, 3, 256),
        "one dimension": torch.randn(256),
        "no rows": torch.randn(0, 256),
        "bfloat16": torch.randn(3, 256).bfloat16(),
    }
    for kind, x in kinds.items():
        single = x.dtype == torch.float32
        y = weight.linear(x, None) if single else copy.deepcopy(weight).to(x.dtype).linear(x, None)
        expected = F.linear(x.double(), w if single else w.to(x.dtype).double())
        assert y.shape == expected.shape and y.dtype == x.dtype
        assert torch.allclose(y.double(), expected, atol=1e-4 if single else 0.3), kind
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(2, 256)
        x[1, 70] = bad
        y, expected = weight.linear(x, None), F.linear(x, weight())
        assert torch.allclose(y[0], expected[0], atol=1e-4)
        assert torch.equal(y[1].isnan(), expected[1].isnan())
        assert torch.equal(y[1][~y[1].isnan()], expected[1][~expected[1].isnan()])
    with pytest.raises(RuntimeError):
        weight.linear(torch.randn(2, 255), None)


@needs_compiler
def test_gradients_pass_through_packed_layers(kernel):
    assert kernel()
    layer = quantize_(nn.Linear(64, 8))
    x = torch.randn(2, 64, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(2, 64), atol=1e-5)


@needs_compiler
def test_unaligned_and_read_only_buffers(kernel):
    assert kernel()
    weight = packed(17, 384, PoTConfig())
    x = torch.randn(1, 384)
    expected = weight.linear(x, None)
    raw = weight.codes.numpy().tobytes()
    for offset in (1, 3, 61):
        buffer = np.frombuffer(b"\0" * offset + raw, dtype=np.uint8)[offset:]  # read-only
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            codes = torch.from_numpy(buffer).view(weight.codes.shape)
        moved = PackedWeight(codes, weight.unit, (17, 384), torch.float32, weight.config)
        assert torch.equal(moved.linear(x, None), expected)
    shifted = torch.cat([torch.zeros(1), x[0]])[1:].view(1, -1)
    assert torch.equal(weight.linear(shifted, None), expected)


@needs_compiler
def test_loaded_and_copied_weights(kernel):
    assert kernel()
    layer = nn.Sequential(nn.Linear(128, 16))
    unrelated = quantize_(copy.deepcopy(layer).requires_grad_(False))
    unrelated[0].bias.data += 1
    convert(prepare(layer) and layer)
    x = torch.randn(1, 128)
    before = layer(x)
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), before)
    layer.load_state_dict({k: v.clone() for k, v in copied.state_dict().items()}, assign=True)
    with torch.no_grad():
        layer[0].packed.codes.zero_()
    assert torch.equal(layer(x)[0], layer[0].bias) and torch.equal(copied(x), before)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_activations_reach_the_kernel(kernel, dtype, monkeypatch):
    assert kernel()
    x, calls, linear = torch.randn(3, 128, dtype=dtype), [], pot_kernel.linear
    layer = quantize_(nn.Linear(128, 16, bias=False)).requires_grad_(False)
    expected = layer(x.float()).to(dtype)  # levels times units in float32, rounded once
    layer.to(dtype)
    monkeypatch.setattr(pot_kernel, "linear", lambda *args: calls.append(1) or linear(*args))
    assert torch.equal(layer(x), expected) and len(calls) == 1
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), expected) and len(calls) == 2


@needs_compiler
def test_units_of_other_dtypes(kernel):
    """A user may cast a whole state_dict to save memory."""
    assert kernel()
    layer, x = quantize_(nn.Linear(128, 16)).requires_grad_(False), torch.randn(2, 128)
    for dtype in (torch.bfloat16, torch.float64):
        loaded = quantize_(nn.Linear(128, 16)).requires_grad_(False)
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in layer.state_dict().items()}
        loaded.load_state_dict(state)
        assert torch.allclose(loaded(x), F.linear(x, loaded.weight, loaded.bias), atol=1e-4)
        assert torch.allclose(loaded(x), layer(x), atol=0.1)


@needs_compiler
def test_8_bit_activations_after_loading_moving_and_pickling(kernel):
    assert kernel()
    config = PoTConfig(act_bits=8)
    layer, loaded = (quantize_(nn.Linear(128, 16), config).requires_grad_(False) for _ in range(2))
    x = torch.randn(2, 128) + 1  # zero points differ from 0
    expected = F.linear(fake_quantize_activations(x).double(), layer.weight.double(), layer.bias.double())
    loaded.load_state_dict(layer.state_dict())
    copied = pickle.loads(pickle.dumps(layer))
    layer.packed._row_sums.fill_(torch.nan)  # stale row sums: .to() must compute them again
    layer.to("cpu")
    kernel("off")
    assert torch.allclose(pickle.loads(pickle.dumps(loaded))(x).double(), expected, atol=1e-4)
    pickled_without_kernel = pickle.dumps(quantize_(copy.deepcopy(loaded)))
    assert kernel()
    for restored in (loaded, copied, layer, pickle.loads(pickled_without_kernel)):
        assert restored.packed.on_kernel and torch.allclose(restored(x).double(), expected, atol=1e-4)


@needs_compiler
def test_trainable_bias_and_strided_buffers(kernel):
    assert kernel()
    layer = quantize_(nn.Linear(128, 64))
    layer.bias.requires_grad_()
    layer(torch.randn(3, 128)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((64,), 3.0))
    layer.requires_grad_(False)
    x = torch.randn(1, 128)
    for bias in (torch.randn(64, 5)[:, 0], torch.randn(1).expand(64)):
        layer.bias = nn.Parameter(bias, requires_grad=False)
        assert torch.allclose(layer(x), F.linear(x, layer.weight, bias), atol=1e-5)
    p = layer.packed
    codes, unit = p.codes.t().contiguous().t(), p.unit.mT.contiguous().mT
    strided = PackedWeight(codes, unit, p.shape, torch.float32, p.config)
    assert torch.equal(strided(), p())


@needs_compiler
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("granularity", ["group", "tensor"])
def test_embeddings_by_index(kernel, bits, on, granularity):
    kernel("off")
    embedding = nn.Embedding(37, 64)
    config = PoTConfig(bits=bits, grid="uniform" if bits == 8 else "pot", granularity=granularity)
    expected = quantize_(copy.deepcopy(embedding), config).weight
    assert bool(kernel("" if on else "off")) == on
    table = quantize_(embedding, config)
    for index in (
        torch.tensor([[3, 36], [0, 15], [16, 31]]),
        torch.tensor([5, 5], dtype=torch.int32),
        torch.tensor([1, 0, 1], dtype=torch.uint8),  # no mask
        torch.tensor(32),
    ):
        assert torch.equal(table(index), expected[index.long()])
    assert table(torch.zeros(0, dtype=torch.int64)).shape == (0, 64)
    for bad in (-1, -37, 37):
        with pytest.raises(IndexError):
            table(torch.tensor([0, bad]))
        if bits == 3 and granularity == "tensor":
            with pytest.raises(IndexError):
                torch.compile(table, backend="eager")(torch.tensor([0, bad]))
    for bad in (torch.tensor([2.7]), torch.ones(37, dtype=torch.bool)):
        with pytest.raises(TypeError, match="integers"):
            table(bad)
    with pytest.raises(RuntimeError, match="the index is on meta"):
        table(torch.tensor([2], device="meta"))


@needs_compiler
def test_jit_trace(kernel):
    assert kernel()
    layer = quantize_(nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 8))).requires_grad_(False)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced, x = torch.jit.trace(layer, torch.randn(2, 128)), torch.randn(2, 128)
    assert torch.allclose(traced(x), layer(x), atol=1e-5)


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """compiler(script) makes a shell script the compiler, with an empty cache. Returns the folder of the cache."""

    def make(script):
        path = tmp_path / "compiler"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return tmp_path / "cache" / "nanopot"

    return make


COPY = 'if [ "$1" = --version ]; then exit; fi; while [ "$1" != -o ]; do shift; done; cat {} > "$2"'  # a fast compiler


@needs_compiler
def test_library_is_built_again_for_another_processor_and_after_damage(compiler, monkeypatch, tmp_path):
    whole = b"a library" * 999
    (tmp_path / "library").write_bytes(whole)
    folder = compiler(COPY.format(tmp_path / "library"))
    path = Path(pot_kernel.build(pot_kernel.SOURCE))
    for damaged in (b"", whole[:1000], whole + b"more", b"another library"):
        path.write_bytes(damaged)
        path = Path(pot_kernel.build(pot_kernel.SOURCE))
        assert path.read_bytes() == whole and list(folder.iterdir()) == [path]
    compiler('[ "$1" = --version ]')  # a library that is whole is not built again
    assert pot_kernel.build(pot_kernel.SOURCE) == str(path)
    compiler(COPY.format(tmp_path / "library"))
    monkeypatch.setattr(pot_kernel, "_processor", lambda: "another")
    assert pot_kernel.build(pot_kernel.SOURCE) != str(path)


@needs_compiler
def test_no_other_user_can_write_into_the_cache(compiler, monkeypatch, tmp_path):
    (tmp_path / "library").write_bytes(b"a library")
    folder = compiler(COPY.format(tmp_path / "library"))
    before = os.umask(0)
    try:
        path = pot_kernel.build(pot_kernel.SOURCE)
        assert folder.stat().st_mode & 0o777 == 0o700
        folder.chmod(0o777)
        assert pot_kernel.build(pot_kernel.SOURCE) == path and folder.stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)
    os.utime(path, (0, 0))
    with monkeypatch.context() as patch:
        patch.setattr(pot_kernel, "_is_trusted", lambda p: p != path)
        assert pot_kernel.build(pot_kernel.SOURCE) == path and os.stat(path).st_mtime > 0  # built again
    if os.geteuid() == 0:
        os.chown(folder, 1, 1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(OSError, match="nanopot belongs to another user"):
        pot_kernel.build(pot_kernel.SOURCE)


@needs_compiler
@pytest.mark.parametrize(
    "script, message",
    [
        ("sleep 20 & sleep 20", "takes longer than 0.3 s"),
        ("exit 3", "ends with code 3"),
        (r"printf 'note: \351\n error: \377\n'; exit 1", "error: \ufffd"),
        (r'printf "version \351\n"; [ "$1" = --version ] || { printf "error: \377\n" >&2; exit 1; }', "error: \ufffd"),
        ('[ "$1" = --version ]', "ends with code 1"),
        (
            '[ "$1" = --version ] && exit; while [ "$1" != -o ]; do shift; done; echo text > "$2"',
            "file too short|invalid",
        ),
    ],
    ids=["hangs", "no version", "version not in UTF-8", "messages not in UTF-8", "fails", "writes no library"],
)
def test_compilers_that_fail(compiler, monkeypatch, script, message):
    """pot.py warns, and PyTorch unpacks."""
    folder = compiler(script)
    monkeypatch.setenv("NANOPOT_KERNEL", "")
    if "sleep" in script:
        monkeypatch.setattr(pot_kernel, "TIMEOUT", 0.3)
    with pytest.warns(UserWarning, match=message):
        assert pot_kernel.load.__wrapped__() is None
    assert not folder.exists() or not list(folder.glob("*.tmp"))


@needs_compiler
def test_a_fault_of_the_kernel_is_not_told_as_the_files(kernel, tmp_path):
    import checkpoint

    kernel("off")
    shape = GPTConfig(16, 50, 1, 2, 64)
    meta, settings = {"tokenizer": "char", "chars": "abc"}, {"dataset": None, "seed": None}
    info = checkpoint.CheckpointInfo(meta, "PTQ", shape, PoTConfig(), settings=settings)
    checkpoint.save_model(str(tmp_path), random_gpt(PoTConfig(), shape), info)
    with pytest.raises(ValueError, match="NANOPOT_KERNEL"):
        kernel("sse")
    with pytest.raises(ValueError, match="^NANOPOT_KERNEL=sse: this machine has"):
        checkpoint.load_model(str(tmp_path))


@needs_compiler
def test_concurrent_calls_and_any_number_of_threads(kernel):
    assert kernel()
    weight, x = packed(515, 768, PoTConfig()), torch.randn(3, 768)
    expected = weight.linear(x, None)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7, 2):
            torch.set_num_threads(threads)
            assert torch.equal(weight.linear(x, None), expected)
    finally:
        torch.set_num_threads(before)
    wrong = []

    def work():
        for _ in range(300):
            if not torch.equal(weight.linear(x, None), expected):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for t in workers:
        t.start()
    for t in workers:
        t.join(60)
    assert not wrong and not any(t.is_alive() for t in workers)


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_forked_process():
    code = (
        "import os, sys, torch, pot\n"
        "torch.set_num_threads(2)\n"
        "layer = pot.quantize_(torch.nn.Linear(256, 64)).requires_grad_(False)\n"
        "x = torch.randn(1, 256)\n"
        "torch.randn(3000, 3000).exp_()\n"  # starts PyTorch's threads before the first call of the kernel
        "pid = os.fork()\n"
        "if pid == 0: os._exit(0 if layer(x).isfinite().all() else 3)\n"
        "y = layer(x)\n"
        "again = os.fork()\n"
        "if again == 0: os._exit(0 if torch.equal(layer(x), y) else 4)\n"
        "os.waitpid(again, 0)[1] and sys.exit(5)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    env = os.environ | {"NANOPOT_KERNEL": ""}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=env, check=True, timeout=60)


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork_while_another_thread_decodes():
    code = (
        "import os, signal, sys, threading, torch\n"
        "from checkpoint import make_decoder\n"
        "from model import GPT, GPTConfig, KVCache\n"
        "from pot import quantize_\n"
        "torch.set_num_threads(1)\n"
        "decode = make_decoder(quantize_(GPT(GPTConfig(256, 50, 4, 4, 128)).eval().requires_grad_(False)))\n"
        "ids = torch.randint(50, (1, 256))\n"
        "ready, done = threading.Event(), threading.Event()\n"
        "def work():\n"
        "    while not done.is_set():\n"
        "        decode(ids, KVCache(256)), ready.set()\n"  # holds the lock nearly always
        "thread = threading.Thread(target=work)\n"
        "thread.start(), ready.wait()\n"
        "for _ in range(5):\n"
        "    pid = os.fork()\n"
        "    if pid == 0: signal.alarm(90), os._exit(0 if decode(ids[:, :3], KVCache(3)).isfinite().all() else 3)\n"
        "    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])\n"
        "    if code: break\n"
        "done.set(), thread.join(), sys.exit(code)\n"
    )
    env = os.environ | {"NANOPOT_KERNEL": ""}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=env, check=True, timeout=120)


@needs_compiler
def test_compile_and_export_use_one_operator(kernel):
    assert kernel()
    layer = quantize_(nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 8))).requires_grad_(False)
    x = torch.randn(2, 128)
    with torch.no_grad():
        expected = layer(x)
        exported = torch.export.export(layer, (x,))
        assert str(exported.graph).count("nanopot.linear") == 2
        assert torch.equal(exported.module()(x), expected)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)
        rounded = quantize_(nn.Linear(128, 64), PoTConfig(act_bits=8)).requires_grad_(False)
        allow_int8_activations(layer)
        for module in (rounded, layer):
            many = torch.randn(20, 128)  # enough rows for AMX tiles
            assert torch.equal(torch.compile(module, backend="aot_eager", fullgraph=True)(many), module(many))
    torch.library.opcheck(torch.ops.nanopot.linear, op_inputs(layer[0].packed, x))


def op_inputs(weight, x):
    return (
        x,
        weight.codes,
        weight.unit,
        None,
        weight.config.code_levels(),
        weight.out_features,
        weight.config.bits,
        2,
        None,
    )


def random_gpt(config, shape):
    torch.manual_seed(shape.n_embd)
    model = GPT(shape)
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.1
    return quantize_(model.eval().requires_grad_(False), config)


LLAMA = {"norm": "rms", "position": "rotary", "mlp": "swiglu", "bias": False}
DECODED = [
    PoTConfig(),
    PoTConfig(terms=2, granularity="channel"),
    PoTConfig(bits=3),
    PoTConfig(grid="uniform", bits=8),
    PoTConfig(act_bits=8),
]


def layer_by_layer(model):
    """What a decoder does, by the model itself, with the same cache."""
    return lambda token, cache: model(token, cache=cache)[:, -1]


@every_set
@pytest.mark.parametrize("config", DECODED, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        GPTConfig(40, 101, 3, 4, 128),
        GPTConfig(40, 300, 2, 3, 192, bias=False),
        GPTConfig(40, 50, 1, 1, 64),
        GPTConfig(40, 101, 2, 6, 192, n_kv_head=2, n_inner=320, **LLAMA),
        GPTConfig(
            40, 101, 2, 4, 64, n_kv_head=2, head_size=32, n_inner=128, tie=False, qkv_bias=True,
            rope_scaling=dict(zip(ROPE_SCALING, (8.0, 1.0, 4.0, 16))), **LLAMA,
        ),
    ],
    ids=["gpt2", "no-bias", "one-head", "llama", "llama-qkv-bias"],
)  # fmt: skip
def test_decoder(kernel, name, config, shape):
    """The decoder, which reads some tokens and then one after the other, against the model's own layers."""
    assert kernel(name)
    model = random_gpt(config, shape)
    decode = make_decoder(model)
    ids = torch.randint(shape.vocab_size, (1, 40))
    model_cache, decode_cache = KVCache(40, torch.float16), KVCache(40, torch.float16)
    errors, ends = [], [3, 4, 17, *range(18, 41)]
    for start, end in zip([0, *ends], ends):
        expected, actual = model(ids[:, start:end], cache=model_cache)[:, -1], decode(ids[:, start:end], decode_cache)
        assert actual.shape == expected.shape and decode_cache.length == end
        errors.append((actual - expected).abs().max() / expected.abs().max())
    # An 8-bit activation between two steps may round either way, and so may a key or value of float16.
    errors = torch.stack(errors)
    assert errors.median() < (1e-2 if config.act_bits else 1e-4) and (config.act_bits or errors.max() < 1e-3)
    with pytest.raises(ValueError, match="context of 40"):
        decode(ids[:, :1], decode_cache)
    batch = KVCache(40, torch.float16)
    model(ids[:, :3].expand(2, 3), cache=batch)
    single = KVCache(40)
    model(ids[:, :3], cache=single)
    for wrong in (batch, single):
        with pytest.raises(ValueError, match="begin with an empty cache"):
            decode(ids[:, :1], wrong)
    for token in (shape.vocab_size, -1):
        with pytest.raises(ValueError, match=f"token {token} is not in the vocabulary"):
            decode(torch.tensor([[0, token, 0]]), KVCache(3))
    for tokens in (ids[:, :0], ids[0], ids[:, :4].view(2, 2)):
        with pytest.raises(ValueError, match="batch of one"):
            decode(tokens, KVCache(3))
    with pytest.raises(ValueError, match="4 tokens from position 0 on do not fit a cache of 3"):
        decode(ids[:, :4], KVCache(3))
    if not config.act_bits:
        for prompt in (ids[:, :1], ids[:, :30]):  # the second prompt runs beyond the context
            ways = layer_by_layer(model), decode
            a, b = (torch.cat(list(model.generate(prompt, 15, temperature=0, decode=d))) for d in ways)
            assert torch.equal(a, b)


@needs_compiler
def test_decode_step_with_large_attention_scores(kernel):
    """Exponentials of attention scores overflow unless the largest score is subtracted first."""
    assert kernel()
    shape = GPTConfig(40, 101, 2, 2, 64)
    torch.manual_seed(0)
    model = GPT(shape)
    for block in model.transformer.h:
        block.attn.c_attn.weight.data *= 60
    model = quantize_(model.eval().requires_grad_(False))
    model_cache, decode_cache, ids = *(KVCache(40, torch.float16) for _ in range(2)), torch.randint(101, (1, 30))
    for cache in (model_cache, decode_cache):
        model(ids[:, :10], cache=cache)
    decode = make_decoder(model)
    for i in range(10, 30):
        expected, actual = model(ids[:, i : i + 1], cache=model_cache)[:, -1], decode(ids[:, i : i + 1], decode_cache)
        assert (actual - expected).abs().max() <= 1e-3 * expected.abs().max()
    assert (decode(ids, KVCache(30)) - actual).abs().max() <= 1e-3 * actual.abs().max()


@needs_compiler
def test_a_long_prompt(kernel):
    """The decoder reads long prompts in parts."""
    assert kernel()
    model = random_gpt(PoTConfig(), GPTConfig(400, 101, 2, 4, 128, n_kv_head=2, n_inner=192, **LLAMA))
    ids, decode = torch.randint(101, (1, 400)), make_decoder(model)
    for n in (144, 145, 333, 399):
        caches = [KVCache(400, torch.float16) for _ in range(2)]
        for tokens in (ids[:, :n], ids[:, n : n + 1]):
            expected, actual = model(tokens, cache=caches[0], last=True)[:, -1], decode(tokens, caches[1])
            assert (actual - expected).abs().max() <= 1e-3 * expected.abs().max()


@needs_compiler
def test_threads_share_a_decoder_that_outlives_the_weights(kernel):
    assert kernel()
    model = random_gpt(PoTConfig(), GPTConfig(64, 101, 2, 4, 128))
    decode = make_decoder(model)
    prompts = [torch.randint(101, (1, 5)) for _ in range(3)]
    expected = [torch.cat(list(model.generate(p, 50, temperature=0, decode=layer_by_layer(model)))) for p in prompts]
    wrong = []

    def work(i):
        for _ in range(5):
            tokens = torch.cat(list(model.generate(prompts[i], 50, temperature=0, decode=decode)))
            if not torch.equal(tokens, expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in workers:
        t.start()
    for t in workers:
        t.join(120)
    assert not wrong and not any(t.is_alive() for t in workers)
    cache = KVCache(64, torch.float16)
    model(prompts[0], cache=cache)
    before = model(prompts[0][:, :1], cache=copy.deepcopy(cache))[:, -1]
    model.bfloat16()  # the decoder keeps the old tensors
    assert torch.allclose(decode(prompts[0][:, :1], cache), before, rtol=1e-3, atol=1e-3)


@needs_compiler
def test_threads_share_a_cache(kernel):
    """Each token takes a position of its own, and none lies beyond the cache."""
    assert kernel()
    model = random_gpt(PoTConfig(), GPTConfig(64, 101, 2, 4, 128))
    decode, cache, refused = make_decoder(model), KVCache(20, torch.float16), []
    model(torch.randint(101, (1, 5)), cache=cache)

    def work():
        for _ in range(10):
            try:
                decode(torch.tensor([[1]]), cache)
            except ValueError as e:
                refused.append(str(e))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for t in workers:
        t.start()
    for t in workers:
        t.join(120)
    assert cache.length == 20 and len(refused) == 40 - 15 and "do not fit a cache of 20" in refused[0]


@needs_compiler
def test_decoders_share_a_cache(kernel):
    """They take no turns, but nothing is written beyond the cache."""
    assert kernel()
    model = random_gpt(PoTConfig(), GPTConfig(64, 101, 2, 4, 128))
    decoders, cache = [make_decoder(model) for _ in range(4)], KVCache(20, torch.float16)
    refused = []

    def work(decode):
        for _ in range(100):
            try:
                decode(torch.tensor([[1]]), cache)
            except ValueError as e:
                refused.append(str(e))

    workers = [threading.Thread(target=work, args=(decode,)) for decode in decoders]
    for t in workers:
        t.start()
    for t in workers:
        t.join(120)
    assert cache.length == 20 and all("do not fit a cache of 20" in message for message in refused)


@needs_compiler
def test_a_cache_that_changes_between_calls(kernel):
    assert kernel()
    model = random_gpt(PoTConfig(), GPTConfig(64, 101, 2, 4, 128))
    decode, cache, ids = make_decoder(model), KVCache(20, torch.float16), torch.randint(101, (1, 20))
    expected = decode(ids, cache)
    cache.length = 10  # goes back
    assert torch.allclose(decode(ids[:, 10:], cache), expected, rtol=1e-3, atol=1e-3)
    cache.layers = {i: [t.clone() for t in kv] for i, kv in cache.layers.items()}
    cache.length = 10
    assert torch.allclose(decode(ids[:, 10:], cache), expected, rtol=1e-3, atol=1e-3)
    cache.length = -1
    with pytest.raises(ValueError, match="from position -1 on do not fit"):
        decode(ids[:, :1], cache)
    cache.length, cache.capacity = 20, 64
    with pytest.raises(ValueError, match="begin with an empty cache"):
        decode(ids[:, :1], cache)
    cache.capacity, cache.length = 20, 0
    cache.layers[1][0] = torch.empty(1, 4, 20, 32, dtype=torch.float16)[..., ::2].expand(1, 4, 20, 16)
    with pytest.raises(ValueError, match="begin with an empty cache"):
        decode(ids[:, :1], cache)


@needs_compiler
def test_decoder_rejects_what_does_not_fit_its_shape(kernel):
    assert kernel()
    shape = GPTConfig(16, 50, 1, 2, 64)
    model = random_gpt(PoTConfig(act_bits=8), shape)
    for name, p in model.named_parameters():
        whole = p.data
        for wrong in (whole[1:], torch.cat([whole, whole]), whole.double(), torch.stack([whole] * 2, 1)[:, 0]):
            p.data = wrong
            with pytest.raises(ValueError, match=f"{name} is .* the kernel takes"):
                decoder_of(model, shape)
        p.data = whole
    for bad in (replace(shape, n_inner=128), replace(shape, vocab_size=51), replace(shape, block_size=17)):
        with pytest.raises(ValueError, match="expected"):
            decoder_of(model, bad)
    decode = decoder_of(model, shape)
    before = decode(torch.tensor([[3, 4]]), KVCache(2))
    for p in model.parameters():
        p.data = torch.full_like(p, torch.nan)  # the decoder keeps the old memory
    for module in model.modules():
        if isinstance(module, PackedWeight):
            module.codes.data, module.unit.data = torch.zeros(3, dtype=torch.uint8), torch.zeros(3)
    assert torch.equal(decode(torch.tensor([[3, 4]]), KVCache(2)), before)
    with pytest.raises(ValueError, match="tokens are|tokens is"):
        decode(torch.tensor([[3, 4]], device="meta"), KVCache(2))


SIZES = ("n_layer", "n_head", "n_kv_head", "head_size", "n_embd", "n_inner", "block_size", "vocab_size")


@needs_compiler
@pytest.mark.parametrize("key", SIZES)
def test_decoder_refuses_hostile_sizes(kernel, key):
    """The kernel takes sizes as they are. Negative ones may fit each other."""
    assert kernel()
    model = random_gpt(PoTConfig(), GPTConfig(16, 50, 1, 2, 64))
    right = getattr(model.config, key)
    for value in (0, -1, -right, right + 1, 2 * right, 2**31, 2**62, -(2**62), 1.0, None):
        with pytest.raises(ValueError, match="at least 1|into heads|expected|missing|the kernel takes"):
            decoder_of(model, SimpleNamespace(**vars(model.config) | {key: value}))
    with pytest.raises(ValueError, match="at least 1"):
        decoder_of(model, SimpleNamespace(**vars(model.config) | {"n_head": -2, "n_kv_head": -2, "head_size": -32}))


@needs_compiler
def test_decoder_refuses_positions_past_the_context(kernel):
    assert kernel()
    decode = decoder_of(random_gpt(PoTConfig(), GPTConfig(16, 50, 1, 2, 64)), GPTConfig(16, 50, 1, 2, 64))
    for capacity, length, tokens in (
        (2, 0, 3),
        (2, 1, 2),
        (16, 16, 1),
        (99, 16, 1),
        (16, -1, 1),
        (16, 2**62, 1),
        (-1, 0, 1),
    ):
        cache = KVCache(capacity, torch.float16)
        cache.length = length
        with pytest.raises(ValueError, match="do not fit a cache"):
            decode(torch.zeros(1, tokens, dtype=torch.long), cache)


def decoder_of(model, c):
    """make_decoder without its own checks."""
    shape = DecoderShape(
        c.n_layer, c.n_head, c.n_kv_head, c.head_size, c.n_embd, c.n_inner, c.block_size, c.vocab_size,
        rms=False, gated=False, norm_eps=c.norm_eps,
    )  # fmt: skip
    weights = {n: m.packed.kernel_weight() for n, m in model.named_modules() if hasattr(m, "packed")}
    return Decoder(shape, weights, dict(model.named_parameters()))


@needs_compiler
def test_models_without_a_decoder(kernel):
    shape = GPTConfig(16, 50, 1, 2, 64)
    assert kernel() and make_decoder(random_gpt(PoTConfig(), shape))
    assert make_decoder(GPT(shape)) is None and make_decoder(prepare(model := GPT(shape)) and model) is None
    assert make_decoder(random_gpt(PoTConfig(bits=5), shape)) is None
    assert make_decoder(random_gpt(PoTConfig(), shape).bfloat16()) is None
    mixed = GPT(shape)
    prepare(mixed, filter_fn=lambda module, name: "mlp" not in name)
    assert make_decoder(convert(mixed)) is None
    kernel("off")
    assert make_decoder(random_gpt(PoTConfig(), shape)) is None


@needs_compiler
def test_loss_and_text_of_a_packed_model(kernel, workdir, sh, qat_run, monkeypatch):
    """The kernel computes what PyTorch computes, up to the order of summation."""
    import checkpoint

    kernel("off")
    plain, _ = checkpoint.load_model(str(workdir / qat_run))
    assert kernel()
    fast, _ = checkpoint.load_model(str(workdir / qat_run))
    assert fast.lm_head.packed.on_kernel and not plain.lm_head.packed.on_kernel
    x = torch.randint(0, 28, (3, 32))
    calls, linear = [], pot_kernel.linear
    monkeypatch.setattr(pot_kernel, "linear", lambda *args: calls.append(args) or linear(*args))
    with torch.no_grad():
        a, b = plain(x), fast(x)
    # On some processors PyTorch sums in the same order, and both are equal to the bit.
    assert len(calls) == 1 + 4 * fast.config.n_layer and (a - b).abs().max() <= 1e-5 * a.abs().max()
    assert len(sh(f"sample.py --ckpt={qat_run} --max_new_tokens=50 --prompt=the").stdout) == 54


PACKED_LINEAR = (
    "import torch, pot\n"
    "config = pot.PoTConfig(granularity='channel')\n"
    "model = pot.quantize_(torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Linear(8, 3)), config)\n"
    "x = torch.randn(1, 64)\n"
    "h = torch.nn.functional.linear(x, model[0].weight, model[0].bias)\n"
    "y = torch.nn.functional.linear(h, model[1].weight, model[1].bias)\n"
    "assert torch.allclose(model(x), y, atol=1e-6)\n"
)


def run_copy(folder, code, **env):
    """Runs code in a folder with copied files. Returns stderr."""
    env = os.environ | {"NANOPOT_KERNEL": ""} | env
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stderr


def copy_kernel(folder):
    shutil.copytree(ROOT / "pot_kernel", folder / "pot_kernel", ignore=shutil.ignore_patterns("__pycache__"))


def test_copy_of_pot_py_alone(tmp_path):
    """PTQ by rounding, QAT and packed files work without the kernel and without a warning."""
    shutil.copy(ROOT / "pot.py", tmp_path)
    code = PACKED_LINEAR + (
        "layers = torch.nn.Sequential(torch.nn.Embedding(9, 64), torch.nn.Linear(64, 9))\n"
        "pot.prepare(layers)\n"
        "index = torch.arange(9)\n"
        "torch.nn.functional.cross_entropy(layers(index), index).backward()\n"
        "assert layers[1].weight.grad.any()\n"
        "y = pot.convert(layers)(index)\n"
        "tensors, metadata = pot.packed_state(layers)\n"
        "empty = torch.nn.Sequential(torch.nn.Embedding(9, 64), torch.nn.Linear(64, 9))\n"
        "assert torch.equal(pot.load_packed(empty, tensors, metadata)(index), y)\n"
        "assert not layers[1].packed.on_kernel\n"
    )
    assert run_copy(tmp_path, code) == ""


def test_copy_with_calibrate(tmp_path):
    for name in ("pot.py", "calibrate.py"):
        shutil.copy(ROOT / name, tmp_path)
    code = (
        "import torch, pot, calibrate\n"
        "layer, x = torch.nn.Sequential(torch.nn.Linear(64, 8)), torch.randn(600, 64) @ torch.randn(64, 64)\n"
        "pot.prepare(layer)\n"
        "((before, after),) = calibrate.calibrate(layer, [x]).values()\n"
        "assert after < before\n"
    )
    assert run_copy(tmp_path, code) == ""


@needs_compiler
def test_copy_with_the_kernel(tmp_path):
    shutil.copy(ROOT / "pot.py", tmp_path)
    copy_kernel(tmp_path)
    assert run_copy(tmp_path, PACKED_LINEAR + "assert model[0].packed.on_kernel\n") == ""


def test_kernel_that_cannot_be_built(tmp_path):
    """pot.py warns once, and PyTorch unpacks."""
    shutil.copy(ROOT / "pot.py", tmp_path)
    copy_kernel(tmp_path)
    stderr = run_copy(tmp_path, PACKED_LINEAR, PATH="/nowhere", CXX="")
    assert stderr.count("PyTorch unpacks packed weights") == 1 and "there is no C++ compiler" in stderr
    assert run_copy(tmp_path, PACKED_LINEAR, NANOPOT_KERNEL="off") == ""
    if COMPILER:
        (tmp_path / "pot_kernel" / "pot.cpp").write_text("no C++")
        stderr = run_copy(tmp_path, PACKED_LINEAR, XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert stderr.count("PyTorch unpacks packed weights") == 1
        assert not list((tmp_path / "cache" / "nanopot").iterdir())


DTYPES = (
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)
LAYOUTS = {
    "contiguous": lambda t: t,
    "every other": lambda t: torch.stack([t, t], -1)[..., 0],
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t.flip(0),
    "expanded": lambda t: t[..., :1].expand(t.shape),
    "negated": lambda t: torch._neg_view(-t) if t.dtype == torch.float32 else t,  # PyTorch's cast of others is wrong
    "shifted": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "shorter": lambda t: t[..., :-1],
    "longer": lambda t: torch.cat([t, t], -1),
    "meta": lambda t: t.to("meta"),
}


@needs_compiler
@pytest.mark.parametrize(
    "on, layer, config",
    [
        (False, nn.Linear(128, 32), PoTConfig()),
        (True, nn.Linear(128, 32), PoTConfig()),
        (True, nn.Linear(128, 32), PoTConfig(act_bits=8)),
        (False, nn.Embedding(40, 64), PoTConfig(bits=3, group_size=32)),
        (True, nn.Embedding(40, 64), PoTConfig(bits=3, group_size=32)),
        (False, nn.Embedding(40, 64), PoTConfig(bits=5)),  # codes in rows
    ],
    ids=["linear off", "linear", "8-bit inputs", "embedding off", "embedding", "embedding in rows"],
)
def test_any_state_dict_gives_the_right_product_or_an_error(kernel, on, layer, config):
    """load_state_dict(assign=True) and `.data =` take tensors of any dtype, layout and device. The kernel reads raw
    memory."""
    assert bool(kernel("" if on else "off")) == on
    shape, is_linear = tuple(layer.weight.shape), isinstance(layer, nn.Linear)
    layer, other = (
        quantize_(copy.deepcopy(source), config).requires_grad_(False)
        for source in (layer, type(layer)(*(shape[::-1] if is_linear else shape)))
    )
    x, right = torch.randn(2, shape[1]) if is_linear else torch.tensor([[0, 5], [17, 39]]), set()
    rounded = fake_quantize_activations(x) if config.act_bits else x
    names = ("packed.codes", "packed.unit", "bias") if is_linear else ("packed.codes", "packed.unit")
    for name, part in itertools.product(names, ("load", "assign", "data")):
        dtypes = DTYPES if part == "assign" else {layer.state_dict()[name].dtype, torch.float64}  # the rest alike
        for dtype, (layout, change) in itertools.product(dtypes, LAYOUTS.items()):
            state = layer.state_dict()
            value = state[name] = change(state[name].to(dtype))
            if part == "data" and layout in ("shorter", "longer") and not on:
                continue  # a misuse, but PyTorch reads nothing beyond a tensor
            loaded = copy.deepcopy(other)
            try:
                if part == "data":
                    loaded.load_state_dict(layer.state_dict())
                    loaded(x)
                    getattr(loaded.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]).data = value
                    loaded.packed._refresh()  # the sums of rows
                else:
                    loaded.load_state_dict(state, assign=part == "assign")
                y = loaded(x)
            except (RuntimeError, ValueError, TypeError, IndexError):
                continue
            if y.is_meta:
                continue
            codes, unit = unpack_codes(state["packed.codes"].to(torch.uint8), config.bits, shape), state["packed.unit"]
            if unit.dim() == 3:
                unit = unit.transpose(1, 2).reshape(-1, unit.shape[1])
            w = config.table()[codes.long()].double() * unit.double()[: shape[0]].repeat_interleave(
                config.group_size, 1
            )
            expected = F.linear(rounded.double(), w, state["bias"].double()) if is_linear else w[x]
            assert (y - expected).abs().max() <= 1e-4 * (1 + expected.abs().max()), (name, part, dtype, layout)
            right.add((name, part, layout))
    copied = ("contiguous", "every other", "transposed", "expanded", "negated", "shifted")
    assert right >= set(itertools.product(names, ("load",), copied))
    assert right >= set(itertools.product(names, ("assign", "data"), ("contiguous", "shifted")))


@needs_compiler
def test_kernel_rejects_memory_that_it_would_misread(kernel):
    assert kernel()
    layer = quantize_(nn.Linear(128, 32)).requires_grad_(False)
    weight, x, table = layer.packed.kernel_weight(), torch.randn(2, 128), layer.packed.config.code_levels()
    for wrong in (x[:, 1:], torch.cat([x, x], 1), x.double(), x.to("meta"), x[0, 0]):
        with pytest.raises(ValueError, match="the kernel takes"):
            pot_kernel.linear(weight, wrong, None)
    bias = layer.bias.detach()
    for wrong in (bias[1:], bias.half(), bias.to("meta"), bias.view(1, 32), torch.stack([bias] * 2, 1)[:, 0]):
        with pytest.raises(ValueError, match="bias is .* the kernel takes"):
            pot_kernel.linear(weight, x, wrong)
    freed = bias.clone()
    freed.untyped_storage().resize_(8)
    with pytest.raises(ValueError, match="bias has more elements than memory"):
        pot_kernel.linear(weight, x, freed)
    with pytest.raises(ValueError, match="row_sums"):
        sums = pot_kernel.Weight(layer.packed.codes, layer.packed.unit, None, (32, 128), 4, table, 1)
        pot_kernel.linear(sums, x, None)
    with pytest.raises(ValueError, match="do not fit"):
        pot_kernel.Weight(layer.packed.codes, torch.empty(2, 0, 16), None, (32, 128), 4, table, 0)
    with pytest.raises(ValueError, match="index is"):
        pot_kernel.unpack(weight, torch.tensor([0], device="meta"))
    with pytest.raises(ValueError, match="buffer is"):
        pot_kernel.read_once(torch.zeros(8, 8).t()[:, ::2])


@needs_compiler
def test_defaults_of_torch_do_not_matter(kernel):
    """Results are float32 on the CPU, also where new tensors would be float64 or have no memory."""
    assert kernel()
    model = random_gpt(PoTConfig(act_bits=8), GPTConfig(16, 50, 1, 2, 64))
    layer, ids, x = model.transformer.h[0].mlp.c_fc, torch.tensor([[3, 4]]), torch.randn(2, 64)
    calls = [lambda: layer(x), lambda: layer.weight, lambda: model.transformer.wte(ids)]
    calls += [lambda: make_decoder(model)(ids, KVCache(2)), lambda: pot_kernel.row_sums(layer.packed.kernel_weight())]
    expected = [call() for call in calls]
    for setting in (torch.device("meta"), torch.device("cpu")):
        torch.set_default_dtype(torch.float64)
        try:
            with setting:
                assert all(torch.equal(call(), y) and y.dtype == torch.float32 for call, y in zip(calls, expected))
        finally:
            torch.set_default_dtype(torch.float32)


@needs_compiler
def test_forward_derivatives_and_negated_views(kernel):
    assert kernel()
    layer = quantize_(nn.Linear(128, 16)).requires_grad_(False)
    x, direction = torch.randn(2, 128), torch.randn(2, 128)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, direction))).tangent
        assert torch.allclose(tangent, F.linear(direction, layer.weight), atol=1e-4)
        bias = layer.bias.detach()
        y = layer.packed.linear(x, forward_ad.make_dual(bias, bias + 1))
        assert torch.allclose(forward_ad.unpack_dual(y).tangent, (bias + 1).expand(2, 16))
    assert torch.equal(layer.packed.linear(x, torch._neg_view(-bias)), layer(x))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        cast = copy.deepcopy(layer).to(dtype)
        assert torch.equal(cast(torch._neg_view(x.to(dtype))), cast(-x.to(dtype)))


@needs_compiler
def test_transforms_of_torch_func(kernel):
    assert kernel()
    layer = quantize_(nn.Linear(128, 16)).requires_grad_(False)
    x, direction, bias, w = torch.randn(5, 128), torch.randn(5, 128), torch.randn(3, 16), layer.weight

    def close(actual, expected):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    close(torch.func.jvp(layer, (x,), (direction,))[1], direction @ w.T)
    close(torch.func.grad(lambda x: layer(x).sum())(x), w.sum(0).expand(5, -1))
    close(torch.func.vmap(layer)(x), layer(x))
    close(torch.func.vmap(lambda b: layer.packed.linear(x, b))(bias), torch.stack([F.linear(x, w, b) for b in bias]))
    close(torch.func.hessian(lambda x: layer(x).square().sum())(x[0]), 2 * w.T @ w)
    table, index = quantize_(nn.Embedding(40, 64)), torch.randint(40, (3, 4))
    assert torch.equal(torch.func.vmap(table)(index), table(index))


@needs_compiler
def test_transforms_of_torch_func_with_8_bit_inputs(kernel):
    """Rounding an input has the gradient of the identity."""
    assert kernel()
    x, direction = torch.randn(5, 128), torch.randn(5, 128)
    layer = quantize_(nn.Linear(128, 16), PoTConfig(act_bits=8)).requires_grad_(False)
    expected = F.linear(fake_quantize_activations(x), layer.weight, layer.bias)
    torch.testing.assert_close(torch.func.vmap(layer)(x), expected, rtol=1e-4, atol=1e-4)
    gradient = torch.func.grad(lambda x: layer(x).sum())(x)
    torch.testing.assert_close(gradient, layer.weight.sum(0).expand(5, -1), rtol=1e-4, atol=1e-4)
    tangent = torch.func.jvp(layer, (x,), (direction,))[1]
    torch.testing.assert_close(tangent, direction @ layer.weight.T, rtol=1e-4, atol=1e-4)


@needs_compiler
def test_tensors_without_memory_of_their_own(kernel):
    """Fake tensors, wrappers and traces of operations do not reach the kernel, which reads and writes memory."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.testing._internal.two_tensor import TwoTensor

    assert kernel()
    x, index = torch.randn(3, 128), torch.tensor([1, 0, 39])
    layer, table = quantize_(nn.Linear(128, 16)).requires_grad_(False), quantize_(nn.Embedding(40, 64))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == (3, 16)
        assert table(mode.from_tensor(index)).shape == (3, 64)
    assert layer(mode.from_tensor(x)).shape == (3, 16)
    torch.testing.assert_close(layer(TwoTensor(x, x + 1)).b, layer(x + 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(make_fx(layer)(x)(x + 1), layer(x + 1), rtol=1e-4, atol=1e-4)
    assert torch.equal(make_fx(table)(index)(index + 0), table(index))
    assert torch.equal(make_fx(table)(torch.zeros_like(index))(index), table(index))
    resized = torch.randn(3, 128)
    resized.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="more elements than memory"):
        layer(resized)


@every_set
def test_sums_of_a_wide_group_exceed_32_bits(kernel, name):
    assert kernel(name)
    for kind in ({"bits": 8, "grid": "uniform"}, {}, {"bits": 3}):
        config = PoTConfig(granularity="channel", act_bits=8, **kind)
        codes = torch.full((1, 140_000), 2 ** (config.bits - 1) - 1, dtype=torch.uint8)  # the top level
        weight = PackedWeight.from_codes(codes, torch.ones(1, 1), torch.float32, config)
        for x in (torch.ones(1, 140_000), torch.arange(140_000.0)[None] % 2, -torch.ones(20, 140_000)):
            expected = config.top * fake_quantize_activations(x).double().sum(1, keepdim=True)
            assert torch.allclose(weight.linear(x, None).double(), expected, rtol=1e-3)


@needs_compiler
@pytest.mark.parametrize("words", [0, 1, 31, 32, 33, 1000, 100_003])
def test_read_once_reads_every_word(kernel, words):
    assert kernel()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        buffer = torch.randint(-(2**62), 2**62, (words,))
        assert pot_kernel.read_once(buffer) == int(buffer.numpy().view(np.uint64).sum(dtype=np.uint64))
    torch.set_num_threads(2)


@needs_compiler
def test_unknown_instruction_set(kernel):
    with pytest.raises(ValueError, match="NANOPOT_KERNEL=sse: this machine has .*portable; or off"):
        kernel("sse")


def build_and_run(tmp_path, compiler, flags, emulator=(), argument=()):
    """Builds and runs tests/kernel.cpp. Returns what it prints."""
    program = str(tmp_path / "kernel")
    built = subprocess.run(
        [compiler, *flags, "-std=c++17", "-pthread", str(ROOT / "tests" / "kernel.cpp"), "-o", program],
        capture_output=True, text=True,
    )  # fmt: skip
    if built.returncode and "sanitize" in " ".join(flags) and "error:" not in built.stderr:
        pytest.skip("the compiler has no sanitizers")
    if "simde" in built.stderr and "-DPOT_EMULATE" in flags and "No such file" in built.stderr:
        pytest.skip("needs SIMDe, the Debian package libsimde-dev")
    assert built.returncode == 0, built.stderr[-2000:]
    done = subprocess.run([*emulator, program, *argument], capture_output=True, text=True, timeout=600)
    if "ThreadSanitizer: unexpected memory mapping" in done.stderr:
        pytest.skip("this system's address space is laid out in a way that ThreadSanitizer does not support")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@needs_compiler
def test_no_kernel_reads_or_writes_out_of_bounds(tmp_path):
    flags = ["-O1", "-g", "-march=native", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    assert "portable passes" in build_and_run(tmp_path, COMPILER, flags)


@needs_compiler
def test_threads_order_their_reads_and_writes(tmp_path):
    flags = ["-O1", "-g", "-fsanitize=thread"]
    assert build_and_run(tmp_path, COMPILER, flags, argument=["threads"]) == "threads pass\n"


@needs_compiler
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="emulates x86's instructions on x86 only")
def test_amx_avx512_and_avx_vnni_under_emulation(tmp_path):
    """SIMDe computes each instruction in plain C++, so that any x86 processor tests them."""
    out = build_and_run(tmp_path, COMPILER, ["-O1", "-DPOT_EMULATE", "-Wno-psabi"], argument=["amx avx512 avxvnni"])
    assert out == "amx passes\navx512 passes\navxvnni passes\n"


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs the Debian packages g++-aarch64-linux-gnu and qemu-user",
)
@pytest.mark.parametrize("march", ["armv8-a", "armv8.2-a+dotprod"])
def test_neon_under_emulation(tmp_path, march):
    flags = ["-O1", "-static", f"-march={march}"]
    out = build_and_run(tmp_path, "aarch64-linux-gnu-g++", flags, ["qemu-aarch64", "-cpu", "max"], ["neon"])
    assert out == "neon passes\n"
