"""pot_kernel/run.cpp against sample.py's way to generate, the package tokenizers, and NumPy."""

import ctypes
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fuzz_run
import numpy as np
import pytest
import torch
from conftest import write_tokenizer

import checkpoint
import pot_kernel
from model import GPT, GPTConfig
from pot import PoTConfig, allow_int8_activations, quantize_
from tokenizer import FileTokenizer, tokenizer_of

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("c++")
pytestmark = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux", reason="needs Linux, whose C library counts memory, and a C++ compiler"
)
slow = pytest.mark.skipif("NANOPOT_TEST_RUN" not in os.environ, reason="takes minutes: set NANOPOT_TEST_RUN=1")
MODELS = {
    "gpt2": (fuzz_run.GPT2, PoTConfig()),
    "gpt2, short": (replace(fuzz_run.GPT2, block_size=16), PoTConfig(granularity="channel")),
    "llama": (fuzz_run.LLAMA, PoTConfig(terms=2, group_size=32)),
    "llama, 3 bits": (fuzz_run.LLAMA, PoTConfig(bits=3, granularity="tensor")),
}
PROMPT = "the other naïve café"


@pytest.fixture(scope="session")
def program():
    return fuzz_run.build("-O1", fuzz_run.NATIVE)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, (shape, config) in MODELS.items():
        fuzz_run.write_model(folder / name, shape, config)
    return folder


@pytest.fixture
def kernel(monkeypatch):
    """Lets Python use the kernel, in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("NANOPOT_KERNEL", "")
    pot_kernel.load.cache_clear()
    yield
    torch.set_num_threads(threads)
    monkeypatch.undo()
    pot_kernel.load.cache_clear()


def call(program, *words, texts=(), ok=True):
    texts = [t if isinstance(t, bytes) else t.encode() for t in texts]
    given = b"".join(b"%d\n%s" % (len(t), t) for t in texts)
    done = subprocess.run(
        [*program.split(), *map(str, words)], input=given, capture_output=True, timeout=900, env=fuzz_run.ENV
    )
    assert (done.returncode == 0) == ok, done.stderr.decode()
    return done.stdout.decode().splitlines() if ok else done.stderr.decode()


def greedy(folder, n):
    """Tokens that sample.py would generate with temperature 0."""
    model, info = checkpoint.load_model(str(folder))
    allow_int8_activations(model)
    ids = tokenizer_of(info.tokenizer, str(folder)).encode(PROMPT)
    decode = checkpoint.make_decoder(model)
    assert decode is not None
    return [int(t) for t in model.generate(torch.tensor([ids]), n, 0.0, decode=decode)]


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama, 3 bits"])
def test_greedy_tokens_equal_those_of_sample(program, models, kernel, name):
    expected = greedy(models / name, 200)
    assert len(set(expected)) > 10
    for threads, count in ((1, 200), (3, 5)):  # on a busy machine threads wait long for each other
        (line,) = call(program, "generate", models / name, count, threads, texts=[PROMPT])
        assert [int(t) for t in line.split()] == expected[:count]


def test_window_slides_beyond_the_context(program, models, kernel):
    """The window is then a prompt of its own, which the decoder takes as a whole."""
    (line,) = call(program, "generate", models / "gpt2, short", 30, 1, texts=["the other"])
    tokens = [int(t) for t in line.split()]
    model, info = checkpoint.load_model(str(models / "gpt2, short"))
    allow_int8_activations(model)
    ids = tokenizer_of(info.tokenizer, str(models / "gpt2, short")).encode("the other") + tokens
    for end in range(len(ids) - 20, len(ids)):
        window = torch.tensor([ids[max(0, end - 16) : end]])
        assert int(next(model.generate(window, 1, 0.0, decode=checkpoint.make_decoder(model)))) == ids[end]


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama, 3 bits"])
def test_shifts_give_the_same_tokens(program, models, kernel, name):
    (line,) = call(program, "shifts", models / name, 50, 1, texts=[PROMPT])
    assert [int(t) for t in line.split()] == greedy(models / name, 50)


@slow
@pytest.mark.parametrize("machine", ["aarch64", "riscv64"])
def test_other_processors_give_the_same_tokens(models, kernel, machine):
    """By user-mode emulation. The whole program is linked in, so it needs no libraries of that machine."""
    compiler, emulator = shutil.which(f"{machine}-linux-gnu-g++"), shutil.which(f"qemu-{machine}")
    if not compiler or not emulator:
        pytest.skip(f"needs g++-{machine}-linux-gnu and qemu-user")
    program = fuzz_run.build("-O2", "-static", compiler=compiler)
    for name in ("gpt2", "llama", "llama, 3 bits"):
        (line,) = call(f"{emulator} {program}", "generate", models / name, 200, 1, texts=[PROMPT])
        assert [int(t) for t in line.split()] == greedy(models / name, 200)


def test_products_by_shifts_equal_integers(tmp_path):
    """All levels of the grids times all activations, to the bit."""
    header, library = ROOT / "pot_kernel" / "shift.h", tmp_path / "shift.so"
    source = f'#include "{header}"\n' + SHIFT_FUNCTIONS
    flags = ["-std=c99", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    subprocess.run([COMPILER, "-x", "c", *flags, "-o", library, "-"], input=source.encode(), check=True)
    lib = ctypes.CDLL(str(library))
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    lib.dot.argtypes = [number, pointer, pointer, number, pointer]
    shifts, one = (ctypes.c_uint8 * (8 * 256))(), (ctypes.c_uint8 * 8)()
    assert lib.of(7, one) == lib.of(-21, one) == -1  # three powers
    kinds = [PoTConfig(), PoTConfig(terms=2), PoTConfig(bits=3)]
    levels = np.unique([int(v) for config in kinds for v in config.table()]).astype(np.int8)
    assert {-64, -12, 0, 3, 64} <= set(levels.tolist())
    for level in levels:
        assert lib.of(int(level), ctypes.byref(shifts, 8 * int(level.view(np.uint8)))) == 0
    for x in range(-128, 128):
        q = np.full(len(levels), x, np.int8)
        for n in (1, 4, len(levels)):
            expected = 5 + int(levels[:n].astype(np.int32) @ q[:n].astype(np.int32))
            assert lib.dot(5, levels.ctypes.data, q.ctypes.data, n, shifts) == expected
        for level in levels[:, None]:
            assert lib.dot(0, level.ctypes.data, q.ctypes.data, 1, shifts) == int(level[0]) * x


SHIFT_FUNCTIONS = """
int of(int32_t level, struct PotShift* out) { return pot_shift_of(level, out); }
int32_t dot(int32_t sum, const int8_t* levels, const int8_t* x, int n, const struct PotShift* shifts) {
    return pot_shift_dot(sum, levels, x, n, shifts);
}
"""


@pytest.mark.skipif(shutil.which("clang") is None, reason="needs clang")
@pytest.mark.parametrize("level", ["-O1", "-O2", "-Os"])
def test_shifts_need_no_multiplication(level):
    """On RV32I, which has none. A call would be one to a library that multiplies."""
    source = f'#include "{ROOT / "pot_kernel" / "shift.h"}"\n' + SHIFT_FUNCTIONS
    command = ["clang", "--target=riscv32", "-march=rv32i", "-ffreestanding", level, "-S", "-x", "c", "-o", "-", "-"]
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    if "unable to create target" in done.stderr or "unknown target" in done.stderr:
        pytest.skip("this clang has no RISC-V")
    words = set(re.findall(r"^\s+([a-z][\w.]*)", done.stdout, re.MULTILINE))
    assert {"sll", "add"} <= words and not [w for w in words if re.match("mul|div|rem|call|tail|jalr", w)], words


# --- tokenizer ---


def mixed_texts(n):
    """Lines of English, code, all scripts, emoji, digits, white space, control bytes and bytes that are no UTF-8."""
    rng = random.Random(0)
    lines = [line for path in ("README.md", "pot.py") for line in (ROOT / path).read_text().splitlines()]
    pieces = ["'s", "'LL", "'ll", " ", "  ", "\n", "\t", "\r\n", "\u00a0", "\u3000", "12", "٣", "Ⅷ", "½", "e\u0301", "ß",
              "<|endoftext|>", "<|im_start|>", "<|", "日本語", "русский", "العربية", "हिन्दी", "👩‍👩‍👧‍👦", "🇫🇷", "\U0001f600",
              "\x00", "\x1b", "\x7f", "\ufffd", "\U00011de0", "a" * 70, "-" * 40]  # fmt: skip
    bad = [b"\xff", b"\xc3", b"\xe2\x82", b"\xed\xa0\x80", b"\xf0\x9f\x98", b"\xc0\xaf", b"\xf5\x80", b"\x80"]

    def piece():
        kind = rng.randrange(5)
        if kind < 2:
            return rng.choice(pieces)
        if kind == 2:
            return rng.choice(lines)[: rng.randrange(60)]
        code = rng.randrange(0x110000 if rng.random() < 0.2 else 0x3000)
        return chr(code if not 0xD800 <= code < 0xE000 else 0xFFFD)

    texts = []
    for i in range(n):
        text = "".join(piece() for _ in range(rng.randrange(1, 8))).encode()
        if i % 3 == 0:
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice(bad) + text[at:]
        texts.append(text)
    return texts


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Folders of models with trained byte pairs: GPT-2's kind, and SmolLM2's, which cuts off single digits."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    root, folders = tmp_path_factory.mktemp("tokenizers"), {}
    for name in ("gpt2", "smollm2"):
        tokenizer = Tokenizer(models.BPE())
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = byte_level if name == "gpt2" else pre_tokenizers.Sequence([digits, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=letters, show_progress=False)
        texts = [t.decode(errors="replace") for t in mixed_texts(300)]
        tokenizer.train_from_iterator([(ROOT / "README.md").read_text(), *texts], trainer)
        tokenizer.add_special_tokens(["<|im_start|>", "<|endoftext|>"])
        tokenizer.add_tokens([AddedToken("日本", normalized=False), AddedToken("a b", normalized=False)])
        folders[name] = folder = root / name
        folder.mkdir()
        tokenizer.save(str(folder / "tokenizer.json"))
        shape = GPTConfig(block_size=8, vocab_size=1024, n_layer=1, n_head=1, n_embd=64)
        info = checkpoint.CheckpointInfo(FileTokenizer(str(folder)).meta, "PTQ", shape, pot=PoTConfig())
        checkpoint.save_model(str(folder), quantize_(GPT(shape)), info)
    return folders


@pytest.mark.parametrize("name", ["gpt2", "smollm2"])
def test_tokenizer_equals_tokenizers(program, trained, name):
    own, texts = FileTokenizer(str(trained[name])), mixed_texts(10000)
    lines = call(program, "encode", trained[name], texts=texts)
    for text, line in zip(texts, lines, strict=True):
        expected = own.encode(text.decode(errors="replace"))
        *ids, back = line.split(" ")
        assert [int(i) for i in ids] == expected, text
        assert bytes.fromhex(back).decode(errors="replace") == own.decode(expected)


def test_other_tokenizers_are_refused(program, trained, tmp_path):
    shutil.copytree(trained["gpt2"], tmp_path, dirs_exist_ok=True)
    original = json.loads((tmp_path / "tokenizer.json").read_text())
    changes = {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False},
        "normalizer": {"type": "NFC"},
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "a"}}, {"Sequence": {}}]},
        "model": original["model"] | {"type": "Unigram"},
        "added_tokens": [original["added_tokens"][0] | {"lstrip": True}],
    }
    for key, value in changes.items():
        (tmp_path / "tokenizer.json").write_text(json.dumps(original | {key: value}))
        error = call(program, "encode", tmp_path, texts=["a"], ok=False)
        kind = "added token of a kind that is not known" if key == "added_tokens" else "is no tokenizer of GPT-2's"
        assert kind in error


def test_a_header_that_would_take_minutes(program, tmp_path):
    """Each tensor of each layer is looked for in the whole header."""
    shape = replace(fuzz_run.LLAMA, n_layer=64, n_head=1, n_kv_head=None, n_embd=16, n_inner=16)
    fuzz_run.write_model(tmp_path / "model", shape, PoTConfig(group_size=16))
    assert call(program, "encode", tmp_path / "model", texts=["a"])
    path = tmp_path / "model" / checkpoint.MODEL
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + n].rstrip()[:-1] + b',"long":"' + b"x" * 2**20 + b'"}'
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + n :])
    assert "its header is too long for its layers" in call(program, "encode", tmp_path / "model", texts=["a"], ok=False)


# --- sampling, stop tokens and the command line ---


def test_draws_follow_the_probabilities(program):
    logits = torch.tensor([i * 7 % 20 / 4 for i in range(20)])
    for temperature, top_k in ((1.0, 20), (0.5, 5), (2.0, 100), (0.7, 1)):
        (line,) = call(program, "draw", temperature, top_k, 20000)
        likely = logits.topk(min(top_k, 20))
        p = torch.zeros(20).scatter(0, likely.indices, (likely.values / temperature).softmax(0))
        share = torch.tensor([int(n) / 20000 for n in line.split()])
        assert ((share - p).abs() <= 5 * (p * (1 - p) / 20000).sqrt()).all()


@pytest.fixture(scope="session")
def run(program):
    """run(--key=value, ...) calls the program itself, which multiplies by shifts."""

    def call(*words, status=0):
        done = subprocess.run([program, "text", *words], capture_output=True, timeout=900, env=fuzz_run.ENV)
        assert done.returncode == status, done.stderr
        return done.stdout.decode(errors="replace"), done.stderr.decode()

    return call


def test_text_of_the_program(run, models, kernel):
    folder = models / "llama"
    text, speed = run(f"--ckpt={folder}", "--temperature=0", "--threads=1", "--max_new_tokens=50", f"--prompt={PROMPT}")
    own, ids = FileTokenizer(str(folder)), greedy(folder, 50)
    end = next((i for i, t in enumerate(ids) if t in own.stops), 50)
    assert text == PROMPT + own.decode(ids[:end]) + "\n"
    assert re.fullmatch(rf"--- {min(end + 1, 50)} tokens, [\d.]+ tokens/s, .*llama\n", speed)
    texts = [run(f"--ckpt={folder}", f"--seed={seed}", "--max_new_tokens=20", "--threads=1")[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_stop_tokens_end_the_text(run, models, kernel, tmp_path):
    shutil.copytree(models / "llama", tmp_path, dirs_exist_ok=True)
    stop = greedy(tmp_path, 50)[5]
    own = FileTokenizer(str(tmp_path))
    for form in (stop, [stop, 3]):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": form}))
        text, _ = run(f"--ckpt={tmp_path}", "--temperature=0", f"--prompt={PROMPT}", "--threads=1")
        ids = greedy(tmp_path, 50)
        end = min(i for i, t in enumerate(ids) if t in {stop, *own.stops} or form != stop and t == 3)
        assert text == PROMPT + own.decode(ids[:end]) + "\n"


def test_bad_settings_and_foreign_files(run, models, tmp_path):
    for words, message in {
        ("--ckpt=nowhere",): "nowhere/model.safetensors: No such file",
        (f"--ckpt={models / 'llama'}", "--prompt="): "the prompt is empty",
        ("--temperature=-1",): "--temperature is missing or no number above 0",
        ("--top_k=0",): "--top_k is missing or no whole number from 1",
        ("--tokens=3",): "there is no setting --tokens; usage: run --ckpt=FOLDER",
    }.items():
        text, error = run(*words, status=2)
        assert not text and error.startswith("run: error: ") and message in error and error.count("\n") == 1
    write_tokenizer(tmp_path)
    shape = GPTConfig(block_size=8, vocab_size=261, n_layer=1, n_head=1, n_embd=64)
    info = checkpoint.CheckpointInfo(FileTokenizer(str(tmp_path)).meta, "float", shape)
    checkpoint.save_model(str(tmp_path), GPT(shape), info)
    assert "is not packed: quantize" in run(f"--ckpt={tmp_path}", status=2)[1]
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "it is no safetensors file" in run(f"--ckpt={tmp_path}", status=2)[1]
    for name in ("model.safetensors", "tokenizer.json"):  # nobody writes to the pipe
        pipe = tmp_path / f"pipe-{name}"
        shutil.copytree(models / "llama", pipe)
        (pipe / name).unlink(missing_ok=True)
        os.mkfifo(pipe / name)
        assert f"{pipe / name}: " in run(f"--ckpt={pipe}", status=2)[1]
    for config in (PoTConfig(bits=8, grid="uniform"), PoTConfig(act_bits=8)):
        checkpoint.save_model(str(tmp_path), quantize_(GPT(shape), config), replace(info, pot=config))
        assert run(f"--ckpt={tmp_path}", status=2)[1].startswith("run: error: ")
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    characters = {"tokenizer": "char", "chars": "".join(map(chr, range(261)))}
    for shape, tokenizer, message in (
        (replace(fuzz_run.LLAMA, rope_scaling=scaling), info.tokenizer, "it has Llama 3's rotary scaling, which only"),
        (fuzz_run.LLAMA, characters, "it is a model of characters, which only"),
    ):
        changed = replace(info, tokenizer=tokenizer, model_args=shape, pot=PoTConfig(group_size=32))
        checkpoint.save_model(str(tmp_path), quantize_(GPT(shape), changed.pot), changed)
        assert f"run: error: {tmp_path}/model.safetensors: {message}" in run(f"--ckpt={tmp_path}", status=2)[1]


def test_damaged_files_are_refused_or_run(capsys):
    fuzz_run.main(fuzz_run.Settings(mutations=100, seed=10**6))
    assert re.search(r"100 of 100: [2-6]\d wrote text", capsys.readouterr().out)
