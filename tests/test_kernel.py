"""pot_kernel against float64, on every instruction set that this machine has."""

import copy
import ctypes
import os
import pickle
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import pot
import pot_kernel
from checkpoint import make_decoder
from model import GPT, GPTConfig, KVCache
from pot import (
    PackedWeight,
    PoTConfig,
    allow_bfloat16,
    compute_scale,
    convert,
    fake_quantize_activations,
    prepare,
    quantize_,
)

ROOT = Path(__file__).parent.parent
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture
def kernel(monkeypatch):
    """kernel("avx2") loads the library with that instruction set; the tests around run without any."""
    before = pot_kernel.load

    def load(name=""):
        monkeypatch.setenv("NANOPOT_KERNEL", name)
        pot_kernel.load.cache_clear()
        return pot_kernel.load()

    yield load
    if (library := load()) is not None:
        library.pot_choose(library.pot_instruction_sets().split()[0])
    monkeypatch.undo()
    pot_kernel.load.cache_clear()
    assert pot_kernel.load is before


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
]
SHAPES = [(1, 64), (5, 128), (33, 384), (64, 768), (7, 200), (3, 1000), (2, 1), (9, 77)]


def packed(out, columns, config, dtype=torch.float32):
    torch.manual_seed(out + columns)
    if config.granularity == "group" and columns % config.group_size:
        pytest.skip("groups do not divide the columns")
    w = torch.randn(out, columns).to(dtype)
    return PackedWeight.pack(w, compute_scale(w, config), config)


@every_set
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("out, columns", SHAPES)
def test_products(kernel, name, config, out, columns):
    kernel("off")
    expected = packed(out, columns, config)()
    assert kernel(name)
    weight = packed(out, columns, config)
    assert torch.equal(weight().view(torch.int32) & 0x7FFFFFFF, expected.view(torch.int32) & 0x7FFFFFFF)
    assert torch.equal(weight(), expected)  # to the bit, but for the sign of zeros
    for n in (1, 2, 3, 4, 5, 8, 17, 33, 70):
        x, bias = torch.randn(n, columns), torch.randn(out) if n % 2 else None
        check_product(weight, expected, x, bias, fake_quantize_activations(x) if config.act_bits else x)


def check_product(weight, expected, x, bias, seen):
    """weight's product with x is that of its float weights `expected` with the activations `seen`."""
    found = weight.linear(x, bias)
    exact = F.linear(seen.double(), expected.double(), None if bias is None else bias.double())
    bound = F.linear(seen.double().abs(), expected.double().abs(), None if bias is None else bias.double().abs())
    assert ((found - exact).abs() <= 2**-20 * bound).all()


@needs_compiler
@pytest.mark.skipif("amx" not in instruction_sets(), reason="no AMX")
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("out, columns", [(5, 128), (33, 384), (64, 768), (3, 1000), (9, 77), (100, 1600)])
def test_products_of_many_rows_by_tiles(kernel, config, out, columns):
    """Weights enter them as they are, activations in bfloat16 or 8 bits."""
    assert kernel("amx")
    weight = packed(out, columns, config)
    if config.granularity == "group" and config.group_size % 64:
        pytest.skip("tiles need groups of a multiple of 64")
    allow_bfloat16(weight)
    expected = weight()
    for n in (17, 32, 33, 100):
        x, bias = torch.randn(n, columns + 3)[:, :columns], torch.randn(out) if n % 2 else None
        check_product(weight, expected, x, bias, fake_quantize_activations(x) if config.act_bits else x.bfloat16())
    for bad in (torch.nan, torch.inf):
        x = torch.randn(20, columns)
        x[7, columns // 2] = bad
        rows = weight.linear(x, None).isfinite().all(1)
        assert rows.sum() == 19 and not rows[7]


def by_shifts(q, level):
    """q times a level, by shifts, additions and a sign."""
    size, total, shift = abs(level), 0, 0
    while size:
        if size & 1:
            total += q << shift
        size, shift = size >> 1, shift + 1
    return -total if level < 0 else total


@every_set
@pytest.mark.parametrize("terms, group_size", [(1, 64), (2, 128), (1, 12), (2, 7)])
def test_8_bit_activations_are_integer_sums(kernel, name, terms, group_size):
    """Codes, zero points and sums, bit by bit. Units of 1 and activations on whole numbers leave nothing to round."""
    library = kernel(name)
    columns, out = 6 * group_size, 9
    config = PoTConfig(terms=terms, group_size=group_size, act_bits=8)
    torch.manual_seed(columns)
    codes = torch.randint(16, (out, columns), dtype=torch.uint8)
    scale = torch.full((out, 6), config.top).half()
    weight = PackedWeight(pot.pack_codes(codes, 4), scale, columns, torch.float32, config)
    for zero in (0, 1, 100, 128, 254, 255):
        q = torch.randint(256, (columns,))
        q[0], q[1] = 0, 255
        x = (q - zero).float()
        found, step, z = torch.zeros(columns, dtype=torch.uint8), ctypes.c_float(), ctypes.c_int32()
        assert (
            library.pot_quantize(x.data_ptr(), columns, found.data_ptr(), ctypes.addressof(step), ctypes.addressof(z))
            == 0
        )
        assert (step.value, z.value) == (1, zero) and torch.equal(found.long(), q)
        levels = config.table()[codes.long()].int().tolist()
        sums = [
            sum(by_shifts(a, level) - by_shifts(zero, level) for a, level in zip(q.tolist(), row)) for row in levels
        ]
        assert weight.linear(x.view(1, -1), None).tolist() == [sums]


@needs_compiler
def test_8_bit_activations_round_as_the_fake_quantization(kernel):
    library = kernel()
    torch.manual_seed(0)
    for i in range(300):
        x = torch.randn(1, 77) * 10.0 ** torch.randint(-6, 6, (1,)) + (i % 3) * torch.randn(1)
        x = {5: x.abs(), 6: -x.abs(), 7: x * 0, 8: x * 1e-42}.get(i % 10, x)
        q, step, z = torch.zeros(77, dtype=torch.uint8), ctypes.c_float(), ctypes.c_int32()
        assert library.pot_quantize(x.data_ptr(), 77, q.data_ptr(), ctypes.addressof(step), ctypes.addressof(z)) == 0
        assert torch.equal((q.float() - z.value) * step.value, fake_quantize_activations(x)[0])


@needs_compiler
def test_8_bit_activations_that_are_not_finite(kernel):
    assert kernel()
    weight = packed(33, 256, PoTConfig(act_bits=8))
    for n in (3, 20):
        for bad in (torch.nan, torch.inf, -torch.inf):
            x = torch.randn(n, 256)
            x[1, 70] = bad
            rows = weight.linear(x, None).isnan()
            assert rows[1].all() and rows.sum() == 33


@every_set
def test_every_code_of_every_position(kernel, name):
    assert kernel(name)
    for config in (PoTConfig(), PoTConfig(terms=2), PoTConfig(grid="uniform")):
        codes = torch.arange(16, dtype=torch.uint8).repeat(128, 1).flatten().view(16, 128)
        codes = torch.stack([codes.roll(k, 1) for k in range(16)]).flatten(0, 1)
        scale = torch.full((256, 2), 1.0).half()
        weight = PackedWeight(pot.pack_codes(codes, 4), scale, 128, torch.float32, config)
        expected = config.table()[codes.long()].double() / config.top
        for column in (0, 1, 15, 16, 63, 64, 127):
            x = torch.zeros(1, 128)
            x[0, column] = 1
            assert torch.allclose(weight.linear(x, None)[0].double(), expected[:, column], rtol=1e-6, atol=0)


@needs_compiler
def test_inputs_of_all_kinds(kernel):
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
        w_as = w.to(x.dtype) if x.dtype != torch.float32 else w
        y = (
            weight.linear(x, None)
            if x.dtype == torch.float32
            else PackedWeight.linear(weight_in(weight, x.dtype), x, None)
        )
        expected = F.linear(x.double(), w_as.double())
        assert y.shape == expected.shape and y.dtype == x.dtype
        assert torch.allclose(y.double(), expected, atol=1e-4 if x.dtype == torch.float32 else 0.3), kind
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(2, 256)
        x[1, 70] = bad
        y, expected = weight.linear(x, None), F.linear(x, weight())
        assert torch.allclose(y[0], expected[0], atol=1e-4)
        assert torch.equal(y[1].isnan(), expected[1].isnan())
        assert torch.equal(y[1][~y[1].isnan()], expected[1][~expected[1].isnan()])
    with pytest.raises(RuntimeError):
        weight.linear(torch.randn(2, 255), None)


def weight_in(weight, dtype):
    return copy.deepcopy(weight).to(dtype)


@needs_compiler
def test_gradients_pass_packed_layers(kernel):
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
        buffer = np.frombuffer(b"\0" * offset + raw, dtype=np.uint8)[offset:]  # numpy says it is read-only
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            codes = torch.from_numpy(buffer).view(17, 192)
        moved = PackedWeight(codes, weight.scale, 384, torch.float32, weight.config)
        assert torch.equal(moved.linear(x, None), expected)
    shifted = torch.cat([torch.zeros(1), x[0]])[1:].view(1, -1)
    assert torch.equal(weight.linear(shifted, None), expected)


@needs_compiler
def test_moved_loaded_and_copied_weights(kernel):
    assert kernel()
    layer = nn.Sequential(nn.Linear(128, 16))
    other = quantize_(copy.deepcopy(layer).requires_grad_(False))
    other[0].bias.data += 1
    convert(prepare(layer) and layer)
    x = torch.randn(1, 128)
    before = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), before)
    layer.load_state_dict({k: v.clone() for k, v in twin.state_dict().items()}, assign=True)
    with torch.no_grad():
        layer[0].packed.codes.zero_()
    assert torch.equal(layer(x)[0], layer[0].bias) and torch.equal(twin(x), before)


@needs_compiler
def test_scales_of_other_dtypes(kernel):
    """A whole state_dict cast, as some do to save memory."""
    assert kernel()
    layer, x = quantize_(nn.Linear(128, 16)).requires_grad_(False), torch.randn(2, 128)
    for dtype in (torch.bfloat16, torch.float64):
        other = quantize_(nn.Linear(128, 16)).requires_grad_(False)
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in layer.state_dict().items()}
        other.load_state_dict(state)
        assert torch.allclose(other(x), F.linear(x, other.weight, other.bias), atol=1e-4)
        assert torch.allclose(other(x), layer(x), atol=0.1)


@needs_compiler
def test_8_bit_activations_after_loading_moving_and_pickling(kernel):
    assert kernel()
    config = PoTConfig(act_bits=8)
    layer, other = (quantize_(nn.Linear(128, 16), config).requires_grad_(False) for _ in range(2))
    x = torch.randn(2, 128) + 1  # so that zero points are not 0
    expected = F.linear(fake_quantize_activations(x).double(), layer.weight.double(), layer.bias.double())
    other.load_state_dict(layer.state_dict())
    copied = pickle.loads(pickle.dumps(layer))
    layer.packed._row_sums.fill_(torch.nan)  # as of a weight that was packed elsewhere
    layer.to("cpu")
    kernel("off")
    assert torch.allclose(pickle.loads(pickle.dumps(other))(x).double(), expected, atol=1e-4)
    without = pickle.dumps(quantize_(copy.deepcopy(other)))
    assert kernel()
    for found in (other, copied, layer, pickle.loads(without)):
        assert found.packed.on_kernel and torch.allclose(found(x).double(), expected, atol=1e-4)


@needs_compiler
def test_a_trainable_bias_and_odd_strides(kernel):
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
    strided = PackedWeight(p.codes.t().contiguous().t(), p.scale.t().contiguous().t(), 128, torch.float32, p.config)
    assert torch.equal(strided(), p())


@needs_compiler
def test_products_in_slices(kernel, monkeypatch):
    assert kernel()
    monkeypatch.setattr(pot_kernel, "SLICE", 1000)
    weight, x, bias = packed(33, 384, PoTConfig()), torch.randn(70, 384), torch.randn(33)
    check_product(weight, weight(), x, bias, x)


@needs_compiler
def test_rows_that_are_not_there(kernel):
    table = quantize_(nn.Embedding(10, 64))
    expected = table(torch.tensor([3, 9]))
    assert kernel()
    table = copy.deepcopy(table)
    assert torch.equal(table(torch.tensor([3, 9], dtype=torch.int32)), expected)
    for bad in (-1, 10):
        with pytest.raises(IndexError):
            table(torch.tensor([0, bad]))
    with pytest.raises(TypeError, match="integers"):
        table(torch.tensor([2.7]))
    with pytest.raises(RuntimeError, match="the index is on meta"):
        table(torch.tensor([2], device="meta"))


@needs_compiler
def test_tracing_sees_what_happens(kernel):
    assert kernel()
    layer = quantize_(nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 8))).requires_grad_(False)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced, x = torch.jit.trace(layer, torch.randn(2, 128)), torch.randn(2, 128)
    assert torch.allclose(traced(x), layer(x), atol=1e-5)


@needs_compiler
def test_a_library_for_each_processor_and_after_damage(kernel, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernel()
    (path,) = (tmp_path / "nanopot").iterdir()
    path.unlink()  # this process has it mapped
    path.write_bytes(b"")  # a full disk
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import pot_kernel; assert pot_kernel.load()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    monkeypatch.setattr(pot_kernel, "_processor", lambda: "another")
    assert pot_kernel.build(pot_kernel.SOURCE) != str(path)


@needs_compiler
def test_two_threads_at_once_and_any_number_of_threads(kernel):
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
def test_a_forked_process_does_its_work_alone():
    code = (
        "import os, sys, torch, pot\n"
        "torch.set_num_threads(2)\n"
        "layer = pot.quantize_(torch.nn.Linear(256, 64)).requires_grad_(False)\n"
        "x = torch.randn(1, 256)\n"
        "torch.randn(3000, 3000).exp_()\n"  # threads are there, and the kernel has not run yet
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
def test_compile_and_export_see_one_operator(kernel):
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
        allow_bfloat16(layer)
        for module in (rounded, layer):  # 20 rows: tiles, where there are some
            many = torch.randn(20, 128)
            assert torch.equal(torch.compile(module, backend="aot_eager", fullgraph=True)(many), module(many))
    torch.library.opcheck(torch.ops.nanopot.linear, op_inputs(layer[0].packed, x))


def op_inputs(weight, x):
    return x, weight.codes, weight.scale, None, weight.config.table(), weight.config.top, None, False


def random_gpt(config, shape):
    torch.manual_seed(shape.n_embd)
    model = GPT(shape)
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.1
    return quantize_(model.eval().requires_grad_(False), config)


@every_set
@pytest.mark.parametrize(
    "config", [PoTConfig(), PoTConfig(terms=2, granularity="channel"), PoTConfig(act_bits=8)], ids=str
)
@pytest.mark.parametrize(
    "shape", [GPTConfig(40, 101, 3, 4, 128), GPTConfig(40, 300, 2, 3, 192, bias=False), GPTConfig(40, 50, 1, 1, 64)]
)
def test_decode_step(kernel, name, config, shape):
    """A token at a time in one call, beside the model's own layers."""
    assert kernel(name)
    model = random_gpt(config, shape)
    decode = make_decoder(model)
    ids = torch.randint(shape.vocab_size, (1, 40))
    one, other = KVCache(40), KVCache(40)
    model(ids[:, :3], cache=one)
    model(ids[:, :3], cache=other)
    errors = []
    for i in range(3, 40):
        expected, found = model(ids[:, i : i + 1], cache=one)[:, -1], decode(ids[:, i : i + 1], other)
        assert found.shape == expected.shape and other.length == i + 1
        errors.append((found - expected).abs().max() / expected.abs().max())
    # An activation on the edge between two of 256 steps may fall either way.
    assert torch.stack(errors).quantile(0.5 if config.act_bits else 1.0) < (1e-2 if config.act_bits else 1e-5)
    with pytest.raises(ValueError, match="context of 40"):
        decode(ids[:, :1], other)
    batch = KVCache(40)
    model(ids[:, :3].expand(2, 3), cache=batch)
    halves = KVCache(40)
    halves.length, halves.layers = 3, {i: [k.bfloat16() for k in kept] for i, kept in one.layers.items()}
    for wrong in (KVCache(40), batch, halves):
        with pytest.raises(ValueError, match="let the model itself read"):
            decode(ids[:, :1], wrong)
    with pytest.raises(ValueError, match="vocabulary"):
        decode(torch.tensor([[shape.vocab_size]]), KVCache(3))
    if not config.act_bits:
        for prompt in (ids[:, :1], ids[:, :30]):  # the second slides beyond the context
            a, b = (torch.cat(list(model.generate(prompt, 15, temperature=0, decode=d))) for d in (None, decode))
            assert torch.equal(a, b)


@needs_compiler
def test_decoding_of_large_scores(kernel):
    """Attention whose exponentials overflow, but for the largest score taken off first."""
    assert kernel()
    shape = GPTConfig(40, 101, 2, 2, 64)
    torch.manual_seed(0)
    model = GPT(shape)
    for block in model.transformer.h:
        block.attn.c_attn.weight.data *= 60
    model = quantize_(model.eval().requires_grad_(False))
    one, other, ids = KVCache(40), KVCache(40), torch.randint(101, (1, 30))
    for cache in (one, other):
        model(ids[:, :10], cache=cache)
    decode = make_decoder(model)
    for i in range(10, 30):
        expected, found = model(ids[:, i : i + 1], cache=one)[:, -1], decode(ids[:, i : i + 1], other)
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@needs_compiler
def test_threads_share_a_decoder_and_weights_may_go(kernel):
    assert kernel()
    model = random_gpt(PoTConfig(), GPTConfig(64, 101, 2, 4, 128))
    decode = make_decoder(model)
    prompts = [torch.randint(101, (1, 5)) for _ in range(3)]
    expected = [torch.cat(list(model.generate(p, 50, temperature=0))) for p in prompts]
    wrong = []

    def work(i):
        for _ in range(5):
            if not torch.equal(
                torch.cat(list(model.generate(prompts[i], 50, temperature=0, decode=decode))), expected[i]
            ):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in workers:
        t.start()
    for t in workers:
        t.join(120)
    assert not wrong and not any(t.is_alive() for t in workers)
    cache = KVCache(64)
    model(prompts[0], cache=cache)
    before = model(prompts[0][:, :1], cache=copy.deepcopy(cache))[:, -1]
    model.bfloat16()  # the decoder keeps what it was made of
    assert torch.allclose(decode(prompts[0][:, :1], cache), before, rtol=1e-4, atol=1e-4)


@needs_compiler
def test_what_cannot_be_decoded_in_one_call(kernel):
    shape = GPTConfig(16, 50, 1, 2, 64)
    assert kernel() and make_decoder(random_gpt(PoTConfig(), shape))
    assert make_decoder(GPT(shape)) is None and make_decoder(prepare(model := GPT(shape)) and model) is None
    assert make_decoder(random_gpt(PoTConfig(bits=3), shape)) is None
    assert make_decoder(random_gpt(PoTConfig(), shape).bfloat16()) is None
    mixed = GPT(shape)
    prepare(mixed, filter_fn=lambda name, module: "mlp" not in name)
    assert make_decoder(convert(mixed)) is None
    kernel("off")
    assert make_decoder(random_gpt(PoTConfig(), shape)) is None


@needs_compiler
def test_loss_and_text_of_a_packed_model(kernel, house, sh, qat_run):
    """Evaluation takes whole windows, so it is the unpacked product; a token at a time is the kernel's."""
    import checkpoint

    kernel("off")
    plain, _ = checkpoint.load_model(str(house / qat_run))
    assert kernel()
    fast, _ = checkpoint.load_model(str(house / qat_run))
    assert fast.lm_head.packed.on_kernel and not plain.lm_head.packed.on_kernel
    x = torch.randint(0, 28, (3, 32))
    with torch.no_grad():
        assert torch.equal(plain(x), fast(x))
        a, b = plain(x[:, :1]), fast(x[:, :1])
    assert not torch.equal(a, b) and (a - b).abs().max() <= 1e-5 * a.abs().max()
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
    """Runs code in a folder that files were copied to. Returns stderr."""
    env = os.environ | {"NANOPOT_KERNEL": ""} | env
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stderr


def copy_kernel(folder):
    shutil.copytree(ROOT / "pot_kernel", folder / "pot_kernel", ignore=shutil.ignore_patterns("__pycache__"))


def test_a_copy_of_pot_py_alone(tmp_path):
    """PTQ by rounding, QAT and packed files work, and nothing warns about a missing kernel."""
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


def test_a_copy_with_calibrate(tmp_path):
    for name in ("pot.py", "calibrate.py"):
        shutil.copy(ROOT / name, tmp_path)
    code = (
        "import torch, pot, calibrate\n"
        "layer, x = torch.nn.Sequential(torch.nn.Linear(64, 8)), torch.randn(99, 64) @ torch.randn(64, 64)\n"
        "pot.prepare(layer)\n"
        "((before, after),) = calibrate.calibrate(layer, [x]).values()\n"
        "assert after < before\n"
    )
    assert run_copy(tmp_path, code) == ""


@needs_compiler
def test_a_copy_with_the_kernel(tmp_path):
    shutil.copy(ROOT / "pot.py", tmp_path)
    copy_kernel(tmp_path)
    assert run_copy(tmp_path, PACKED_LINEAR + "assert model[0].packed.on_kernel\n") == ""


def test_a_kernel_that_cannot_be_built(tmp_path):
    """One warning, and PyTorch unpacks."""
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


@needs_compiler
def test_weights_that_the_kernel_would_misread_are_refused(kernel):
    """load_state_dict(assign=True) takes tensors of any dtype and layout. The kernel reads them by a pointer."""
    assert kernel()
    layer = quantize_(nn.Linear(128, 16)).requires_grad_(False)
    state = layer.state_dict()
    codes, scale = state["packed.codes"], state["packed.scale"]
    wrong = [
        {"packed.codes": codes.long()},
        {"packed.codes": codes.t().contiguous().t()},
        {"packed.scale": scale.double()},
        {"packed.scale": scale.bfloat16()},
        {"packed.scale": scale.t().contiguous().t()},
    ]
    for part in wrong:
        other = quantize_(nn.Linear(128, 16)).requires_grad_(False)
        other.load_state_dict(state | part, assign=True)
        with pytest.raises(ValueError, match="the kernel takes codes|must be contiguous"):
            other(torch.randn(1, 128))


@needs_compiler
def test_an_unknown_instruction_set(kernel):
    with pytest.raises(ValueError, match="NANOPOT_KERNEL=sse: this machine has .*portable; or off"):
        kernel("sse")


def build_and_run(tmp_path, compiler, flags, *emulator):
    program = str(tmp_path / "kernel")
    built = subprocess.run(
        [compiler, *flags, "-std=c++17", "-pthread", str(ROOT / "tests" / "kernel.cpp"), "-o", program],
        capture_output=True, text=True,
    )  # fmt: skip
    if built.returncode and "sanitize" in " ".join(flags) and "error:" not in built.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert built.returncode == 0, built.stderr[-2000:]
    done = subprocess.run([*emulator, program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@needs_compiler
def test_no_kernel_leaves_its_buffers(tmp_path):
    flags = ["-O1", "-g", "-march=native", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    assert "portable: largest error" in build_and_run(tmp_path, COMPILER, flags)


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs the Debian packages g++-aarch64-linux-gnu and qemu-user",
)
def test_neon_under_emulation(tmp_path):
    out = build_and_run(tmp_path, "aarch64-linux-gnu-g++", ["-O2", "-static"], "qemu-aarch64")
    assert "neon: largest error" in out
