"""
Damages at random what the scripts read, and lets them read it. Each input must end with an error of one line, or be
taken: then a model runs, an optimizer steps, a tokenizer encodes, a command does its work. After a crash, a hang, another
exception, code that ran or too much memory, the script stops and prints the seed that repeats it.

    python tests/fuzz.py --inputs=1000 --seed=0                     # of each target; all are listed below
    python tests/fuzz.py --targets=packed,commands --inputs=5000

A target is a function that reads a damaged copy of a folder.
"""

import ast
import contextlib
import importlib
import importlib.util
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent / "stand_in"))
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import dataset
import machine
import tokenizer
from configurator import run
from model import GPT, GPTConfig
from pot import PoTConfig, prepare, quantize_
from train import Settings as TrainSettings
from train import load_optimizer, make_optimizer

ROOT = Path(__file__).parent.parent
ENV = os.environ | {"NANOPOT_KERNEL": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # of workers
CHUNK = 1000  # inputs per process, which takes seconds to start
SECONDS = 20  # of a processor, limit per input; the slowest takes 2 s
MEMORY = 16 << 20  # bytes allowed beyond twice the file size, for the interpreter and a forward pass
ADDRESSES = 6 << 30  # bytes of addresses of a process, so that a memory bomb ends here and not the machine
WITNESS = "/tmp/nanopot-fuzz-was-here"  # a file that hostile pickles make


@dataclass
class Settings:
    targets: str = "packed,checkpoints,folders,tokenizers,datasets,lines,results,gguf,commands"
    inputs: int = 1000  # of each target
    seed: int = 0
    worker: str | None = None  # folder of a worker process; set by the script


def main(s: Settings):
    names = s.targets.split(",")
    if unknown := set(names) - set(TARGETS):
        raise ValueError(f"targets={s.targets}: there is no {min(unknown)}, choose among {', '.join(TARGETS)}")
    if s.worker:
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
        return run_worker(s)
    with tempfile.TemporaryDirectory() as folder:
        write_originals(folder, names)
        for name in [name for name in names if not list(Path(folder).glob(f"{name}-*"))]:
            print(f"{name}: left out, because it needs `pip install gguf accelerate`")
            names.remove(name)
        counts = {name: {"loaded": 0, "refused": 0} for name in names}
        share = max(1, CHUNK // max(1, len(names)))
        for start in range(0, s.inputs if names else 0, share):
            n, seed = min(share, s.inputs - start), s.seed + start
            command = [sys.executable, "-W", "ignore", __file__, f"--worker={folder}", f"--seed={seed}"]
            command += [f"--targets={','.join(names)}", f"--inputs={n}"]
            limit = 600 + n * len(names) * SECONDS
            try:
                result = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=limit)
            except subprocess.TimeoutExpired as e:
                raise ValueError(f"hangs at {(e.stdout or b'nothing').decode().splitlines()[-1]}") from None
            last = result.stdout.splitlines()[-1:] or ["nothing"]
            if result.returncode:
                raise ValueError(f"exit {result.returncode} at {last[0]}: {result.stderr[-800:]}")
            for name, outcomes in json.loads(last[0]).items():
                counts[name] = {outcome: counts[name][outcome] + more for outcome, more in outcomes.items()}
                print(f"{name} {start + n} of {s.inputs}: {counts[name]}", flush=True)


def run_worker(s):
    counts = {}
    for name in s.targets.split(","):
        target, counts[name] = TARGETS[name], {"loaded": 0, "refused": 0}
        originals = sorted(Path(s.worker).glob(f"{name}-*"))
        for folder in originals:  # warm up
            with contextlib.suppress(ValueError):
                target.read(copy_of(folder, s.worker))
        for seed in range(s.seed, s.seed + s.inputs):
            counts[name][try_input(s.worker, originals, name, seed)] += 1
    print(json.dumps(counts))


def try_input(worker, originals, name, seed) -> str:
    """Damages and reads one input. Returns "loaded" or "refused"; any other end is an exception."""
    target, rng = TARGETS[name], random.Random(f"{name} {seed}")
    folder = copy_of(rng.choice(originals), worker)
    path = rng.choice(sorted(path for pattern in target.files for path in folder.glob(pattern)))
    data = path.read_bytes()
    mutation = rng.choice(next(choices for ending, choices in MUTATIONS.items() if path.name.endswith(ending)))
    path.write_bytes(mutation(rng, data))
    print(f"{name}, seed {seed}, {path.name}, {mutation.__name__}", flush=True)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    before, start = reset_peak(), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # ends the process, whatever library hangs
    try:
        target.read(folder)
    except (ValueError, OSError) as e:
        assert 20 < len(str(e)) < 2000 and "\n" not in str(e), e
        outcome = "refused"
    else:
        outcome = "loaded"
    signal.setitimer(signal.ITIMER_PROF, 0)
    grown = (machine.process_memory("VmHWM") or 0) - before
    assert time.process_time() - start < SECONDS, "too slow"
    assert grown < 2 * size + target.memory, f"{grown} bytes of memory for {size}"
    assert not os.path.exists(WITNESS), "the file ran code"
    return outcome


def copy_of(original, worker):
    folder = Path(worker) / f"mutant-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    return folder


def reset_peak():
    """Resets the peak memory of this process. Returns the current memory in bytes, or 0 without Linux."""
    if not os.path.exists("/proc/self/clear_refs"):
        return 0
    Path("/proc/self/clear_refs").write_text("5")
    return machine.process_memory("VmRSS")


# -----------------------------------------------------------------------------
# Originals: folders TARGET-NAME. Models have 1 or 2 layers, so that an input takes milliseconds.

SHAPE = GPTConfig(block_size=16, vocab_size=20, n_layer=2, n_head=2, n_embd=64)
LLAMA = dict(n_kv_head=1, n_inner=128, norm="rms", position="rotary", mlp="swiglu", bias=False, tie=False)
SETTINGS = {"dataset": "tiny", "seed": 1}
TRAIN = "train.py --dataset=tiny --batch_size=2 --eval_tokens=40 --out_dir=out-new"
COMMANDS = (  # of the target "commands"
    f"{TRAIN} --n_layer=1 --n_head=2 --n_embd=32 --block_size=16 --max_iters=1",
    f"{TRAIN} --init_from=out-float --pot_bits=4 --max_iters=0 --calibrate_tokens=64",
    f"{TRAIN} --init_from=out-float --pot_bits=3 --table_bits=4 --distill=0.5 --max_iters=1",
    "train.py --init_from=resume --dataset=tiny --pot_bits=4 --batch_size=2 --out_dir=out-qat --max_iters=4",
    "eval.py --ckpt=out-packed,out-qat --dataset=tiny --tokens=50 --reference=out-float --sqnr=True",
    "sample.py --ckpt=out-packed --prompt=the --max_new_tokens=3 --top_k=5",
    "sweep.py sweep_tiny.py --tokens=50",
    "data/text/prepare.py --input=text.txt,documents.jsonl --tokenizer=char --name=new",
    "extras/export.py --ckpt=out-packed --out=exported",
    "extras/plot.py --grids=out-float --layer=transformer.h.0.mlp.c_fc --out_dir=pictures",
)
SWEEP = """init_from = "out-float"
finetune = "finetune.py"
methods = "rtn"
results = "sweep"
weights = [{"bits": 4}, {"bits": 3, "granularity": "channel"}]
"""
TEXT = "the quick brown fox jumps over the lazy dog, and then he sleeps for a while.\n" * 40


def write_originals(folder, names):
    from conftest import write_tokenizer  # here, because it turns the kernel off

    from extras import export

    def save(name, shape=SHAPE, config=None, meta=None, train=False):
        """Writes a checkpoint to a folder; train: with a training state."""
        torch.manual_seed(0)
        meta = meta or {"tokenizer": "char", "chars": "".join(map(chr, range(97, 97 + shape.vocab_size)))}
        info = checkpoint.CheckpointInfo(meta, "QAT", shape, step=3, settings=SETTINGS)
        path, model = os.path.join(folder, name), GPT(shape)
        if train:
            prepare(model, config)
            optimizer = make_optimizer(model, TrainSettings(), "cpu")
            model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1].backward()
            optimizer.step()
            checkpoint.save_training(path, model, replace(info, pot=config), optimizer.state_dict(), scaler={})
        else:
            checkpoint.save_model(path, quantize_(model, config) if config else model, replace(info, pot=config))
        return path

    def made(name):
        os.makedirs(os.path.join(folder, name))
        return Path(folder) / name

    channel = PoTConfig(bits=3, granularity="channel")
    if "packed" in names:
        save("packed-a", config=PoTConfig())
        save("packed-b", config=channel)
        save("packed-c", GPTConfig(block_size=16, vocab_size=5000, n_layer=2, n_head=2, n_embd=256))  # 11 MB, float
        save("packed-d", replace(SHAPE, qkv_bias=True, **LLAMA), PoTConfig(terms=2, act_bits=8))
    if "checkpoints" in names:
        save("checkpoints-a", config=PoTConfig(), train=True)
    if "tokenizers" in names:
        write_tokenizer(path := made("tokenizers-a"))
        meta = tokenizer.FileTokenizer(str(path)).meta
        save("tokenizers-a", replace(SHAPE, vocab_size=meta["vocab_size"]), PoTConfig(), meta)
    if "folders" in names or "gguf" in names:
        write_tokenizer(path := made("source"))
        meta = tokenizer.FileTokenizer(str(path)).meta
        for kind, shape in (("gpt2", SHAPE), ("llama", replace(SHAPE, **LLAMA))):
            save("source", replace(shape, vocab_size=meta["vocab_size"]), meta=meta)
            outs = [f"folders-{kind}"] if "folders" in names else []
            # transformers reads a GPT-2 with a context of 1,024 only.
            if "gguf" in names and kind == "llama" and all(map(importlib.util.find_spec, ("gguf", "accelerate"))):
                outs.append(made("gguf-a") / "model.gguf")
            for out in outs:
                with contextlib.redirect_stdout(io.StringIO()):
                    export.main(export.Settings(os.path.join(folder, "source"), os.path.join(folder, out)))
    if "folders" in names:  # the same models in an older format, and in two files
        for kind, old in (("gpt2", True), ("llama", False)):
            shutil.copytree(os.path.join(folder, f"folders-{kind}"), path := Path(folder) / f"folders-{kind}-other")
            tensors = load_file(path / checkpoint.MODEL)
            (path / checkpoint.MODEL).unlink()
            if old:
                torch.save(tensors, path / "pytorch_model.bin")
                continue
            parts = {f"model-{i}.safetensors": list(tensors)[i::2] for i in range(2)}
            for part, keys in parts.items():
                save_file({key: tensors[key] for key in keys}, path / part)
            index = {"weight_map": {key: part for part, keys in parts.items() for key in keys}}
            (path / f"{checkpoint.MODEL}.index.json").write_text(json.dumps(index))
    if "datasets" in names:
        for name in ("datasets-new", "datasets-old"):
            with contextlib.redirect_stdout(io.StringIO()):
                dataset.write_chars(path := made(name), {"train": TEXT, "val": TEXT[:300], "test": TEXT[:300]})
        meta = json.loads((path / "meta.json").read_text())  # older data sets have no digests
        del meta["digests"]
        (path / "meta.json").write_text(json.dumps(meta))
    if "lines" in names:
        entries = [{"step": 0, "float_loss": 2.5}, {"step": 0, "val_loss": 2.6}]
        entries += [{"step": i, "loss": 3 - i / 9, "text_loss": 2.9, "lr": 0.1, "tokens_per_s": 9} for i in range(1, 9)]
        entries += [{"step": 8, "val_loss": 2.1}, {"step": 8, "seconds": 1.5, "steps": 8, "peak_bytes": 10**8}]
        write_lines(made("lines-log") / checkpoint.LOG, entries)
        write_lines(made("lines-documents") / "documents.jsonl", [{"text": line} for line in TEXT.splitlines()])
        path = made("lines-rows")
        shutil.copytree(write_place(folder, save), path, dirs_exist_ok=True)
        call(path, ["sweep.py", "sweep_tiny.py", "--tokens=50"])
        (path / "documents.jsonl").unlink()
    if "results" in names:
        for name, key in (("bench", "speed"), ("hardware", "hardware"), ("sweep_shakespeare_char", "sweep")):
            shutil.copy(ROOT / "results" / f"{name}.json", made(f"results-{key}") / f"{key}.json")
    if "commands" in names:
        place = write_place(folder, save)
        for i, command in enumerate(COMMANDS):
            shutil.copytree(place, path := Path(folder) / f"commands-{i}")
            (path / "command.json").write_text(json.dumps(command.split()))


def write_lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def write_place(folder, save):
    """A folder to call scripts in. Returns its path."""
    place = Path(folder) / "place"
    if place.exists():
        return place
    (place / "data" / "tiny").mkdir(parents=True)
    (place / "data" / "text").mkdir()
    shutil.copy(ROOT / "data" / "text" / "prepare.py", place / "data" / "text")
    with contextlib.redirect_stdout(io.StringIO()):
        dataset.write_chars(place / "data" / "tiny", {"train": TEXT, "val": TEXT[:300], "test": TEXT[:300]})
    meta = json.loads((place / "data" / "tiny" / "meta.json").read_text())
    shape = GPTConfig(16, len(meta["chars"]), 1, 2, 64)
    del meta["digests"]
    save("place/out-float", shape, meta=meta)
    save("place/out-packed", shape, PoTConfig(), meta)
    save("place/out-qat", shape, PoTConfig(), meta, train=True)
    (place / "text.txt").write_text(TEXT)
    write_lines(place / "documents.jsonl", [{"text": f"{i} men went to mow, {TEXT[:60]}"} for i in range(20)])
    (place / "finetune.py").write_text('dataset = "tiny"\nbatch_size = 2\neval_interval = 1\n')
    (place / "sweep_tiny.py").write_text(SWEEP)
    return place


# -----------------------------------------------------------------------------
# Targets: functions that read a damaged folder


def read_packed(folder):
    model, _ = checkpoint.load_model(str(folder))
    with torch.no_grad():
        model(torch.zeros(1, 5, dtype=torch.long))


def read_checkpoint(folder):
    model, _ = checkpoint.load_model(str(folder))
    training = checkpoint.load_training(str(folder))
    optimizer = make_optimizer(model, TrainSettings(), "cpu")
    load_optimizer(optimizer, torch.amp.GradScaler(enabled=False), training)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    with torch.no_grad():
        model(torch.zeros(1, 5, dtype=torch.long))


def read_folder(folder):
    model, info = checkpoint.load_model(str(folder))
    with torch.no_grad():
        model(torch.zeros(1, 5, dtype=torch.long))
    if info.tokenizer != tokenizer.GPT2:  # it may need a network
        assert max(tokenizer.tokenizer_of(info.tokenizer, str(folder)).encode("the sky")) < model.config.vocab_size


def read_tokenizer(folder):
    meta = checkpoint.finished_tokenizer(str(folder))
    named = tokenizer.tokenizer_of(meta, str(folder)) if meta else tokenizer.named(str(folder))
    ids = named.encode("the sky is <|im_start|> blue") + named.encode_documents(["the sky", ""])[0]
    assert all(0 <= i < named.vocab_size for i in ids), "a token beyond the vocabulary"
    assert isinstance(named.decode(ids) + "".join(named.stream(ids)), str)
    named.special_ids(), named.byte_pairs()
    named.encode_chat([{"role": "user", "content": "Why?"}])


def read_dataset(folder):
    loaded = [dataset.load(str(folder), split) for split in dataset.SPLITS]
    original = folder.parent / "datasets-new"
    for split, (ids, meta) in zip(dataset.SPLITS, loaded):
        assert len(ids) == 0 or ids.max() < dataset.vocab_size(meta)
        if (folder / "meta.json").read_bytes() == (original / "meta.json").read_bytes():
            assert ids.tobytes() == (original / f"{split}.bin").read_bytes(), "a file of another digest was read"


def read_lines(folder):
    import sweep

    if (path := folder / "documents.jsonl").exists():
        assert all(isinstance(text, str) for text in dataset.read_documents(str(path)))
    elif (folder / checkpoint.LOG).exists():
        call(folder, ["extras/plot.py", "--curves=."])
    else:

        def measure(*_):
            raise ValueError("a row is gone, so it would be measured again")

        made, sweep.make_row = sweep.make_row, measure
        try:
            call(folder, ["sweep.py", "sweep_tiny.py", "--tokens=50"])
        finally:
            sweep.make_row = made


def read_results(folder):
    key = next(folder.glob("*.json")).stem
    call(folder, ["extras/plot.py", f"--{key}={key}.json"])


def read_gguf(folder):
    call(folder, ["extras/import_gguf.py", "--gguf=model.gguf", "--out=imported"])


def read_command(folder):
    call(folder, json.loads((folder / "command.json").read_text()))


def call(folder, argv):
    """Runs a script in a folder, in this process. Raises ValueError with its error, which must be one line."""
    out, err, before = io.StringIO(), io.StringIO(), (os.getcwd(), sys.argv)
    module = module_of(argv[0], folder)
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sys.argv = argv
            run(module.main, module.Settings)
    except SystemExit as e:
        if e.code:
            error = err.getvalue().rpartition(f"{os.path.basename(argv[0])}: error: ")[2]
            assert e.code == 2 and error.endswith("\n"), f"exit {e.code}: {err.getvalue()}"
            raise ValueError(f"{argv[0]}: {error[:-1]}") from None
    finally:
        os.chdir(before[0])
        sys.argv = before[1]


def module_of(script, folder=ROOT):
    if "prepare" not in script:
        return importlib.import_module(script.removesuffix(".py").replace("/", "."))
    spec = importlib.util.spec_from_file_location("fuzzed_prepare", folder / script)  # it writes beside its own file
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -----------------------------------------------------------------------------
# Mutations: functions of random numbers and the bytes of a file


def flip_bytes(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 9))):
        data[rng.randrange(min(len(data), rng.choice((8, 300, len(data) // 4 + 1, len(data)))))] ^= rng.randrange(
            1, 256
        )
    return bytes(data)


def change_length(rng, data):
    return data[: rng.randrange(len(data))] if rng.random() < 0.8 else data + bytes(rng.randrange(1, 99))


def random_value(rng):
    numbers = [-1, 0, 1, 3, 2**31, 10**9, 10**18, -(10**18), 1e300, 0.5]
    return rng.choice([None, True, *numbers, "", "x", "load", "int8", [], [1], {}, {"a": 1}])


def mutate(rng, value):
    """Returns `value` with a random part replaced, removed or duplicated."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if rng.random() < 0.1:
            return value | {key + "x" if isinstance(key, str) else 7: value[key]}
        return value | {key: mutate(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        i = rng.randrange(len(value))
        return value[:i] + [mutate(rng, value[i])] + value[i + 1 :]
    if isinstance(value, torch.Tensor):
        changed = [value.flatten()[:-1], value.int(), value.double(), value * torch.nan, -value, value.flatten()]
        changed += [value[None], value.as_strided(value.shape, [0] * value.dim()), value.flatten()[:1].expand(10**9)]
        return rng.choice([*changed, 7])
    return random_value(rng)


def change_header(rng, data):
    """Changes the header of safetensors: shapes, dtypes, offsets, names."""
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n])
    key = rng.choice([k for k in header if k != "__metadata__"])
    text = json.dumps(header | {key: mutate(rng, header[key])}).encode()
    if rng.random() < 0.1:
        return struct.pack("<Q", rng.choice((0, n + 1, 2**40, 2**63))) + data[8:]
    return struct.pack("<Q", len(text)) + text + data[8 + n :]


def change_metadata(rng, data):
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n])
    if "nanopot" not in header.get("__metadata__", ()):  # a file of Hugging Face
        return change_header(rng, data)
    info = json.loads(header["__metadata__"]["nanopot"])
    part = rng.choice(["packed", "model_args", None])
    info = mutate(rng, info) if part is None else info | {part: mutate(rng, info[part])}
    header["__metadata__"]["nanopot"] = json.dumps(info)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + n :]


def change_value(rng, data):
    """Writes NaN, inf, -inf, zero or a tiny negative number into a unit, or into another tensor without units."""
    (n,) = struct.unpack("<Q", data[:8])
    header, data = json.loads(data[8 : 8 + n]), bytearray(data)
    keys = [k for k in header if k.endswith("unit")] or [k for k in header if k != "__metadata__"]
    start, end = header[rng.choice(keys)]["data_offsets"]
    offset = 8 + n + rng.randrange(start, end - 3) // 2 * 2
    data[offset : offset + 2] = rng.choice((b"\x00\x7e", b"\x00\x7c", b"\x00\xfc", b"\x00\x00", b"\x01\x80"))
    return bytes(data)


class RunsCode:
    def __reduce__(self):
        return os.system, (f"touch {WITNESS}",)


def change_checkpoint(rng, data):
    content = torch.load(io.BytesIO(data), weights_only=True)
    part = rng.choice(["model", "info", "info", "optimizer", None])
    content = mutate(rng, content) if part is None else content | {part: mutate(rng, content[part])}
    if rng.random() < 0.1:
        content = {"model": RunsCode(), "info": content}
    out, bomb = io.BytesIO(), rng.random() < 0.05
    if bomb:
        content["padding"] = torch.zeros(64 << 20, dtype=torch.uint8)
    torch.save(content, out)
    return deflate(out.getvalue()) if bomb else out.getvalue()


def deflate(data):
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    return out.getvalue()


def change_json(rng, data):
    return json.dumps(mutate(rng, json.loads(data))).encode()


def change_lines(rng, data):
    """Replaces, repeats, cuts or removes lines of a .jsonl file."""
    lines = data.splitlines(keepends=True)
    i = rng.randrange(len(lines))
    changed = json.dumps(mutate(rng, json.loads(lines[i]))).encode() + b"\n"
    new = rng.choice(
        [changed] * 4 + [lines[i] * 2, lines[i][: rng.randrange(len(lines[i]))], b"", change_text(rng, b"")]
    )
    return b"".join([*lines[:i], new, *lines[i + 1 :]])


def change_text(rng, data):
    """Inserts what is odd in a text, or puts it in place of the text."""
    odd = rng.choice([
        b"", b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5000, b"\xff\xfe", "\ufeff{}".encode(), b"NaN", b"-Infinity", b"null",
        b"123", b"{}", b'"\\ud800"', b'"\\u0000"', b"\x00", b'"\x1b[31m"', b"1e999", b"\n\n", b"{{ 7*7 }}", b"{% for x in y %}",
        b"{% for i in range(10**9) %}x{% endfor %}", b'{"a": 1, "a": 2}',
    ])  # fmt: skip
    at = rng.randrange(len(data) + 1)
    return odd if rng.random() < 0.3 else data[:at] + odd + data[at:]


def change_numbers(rng, data):
    """Writes a hostile number over 4 or 8 bytes near the start of a file, where GGUF has its sizes."""
    width, letter = rng.choice(((4, "<I"), (8, "<Q")))
    number = rng.choice((0, 1, 2, 7, 8, 9, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1))
    at = rng.randrange(min(rng.choice((24, 400, 8000)), len(data) - width))
    return data[:at] + struct.pack(letter, number % 256**width) + data[at + width :]


def change_tokens(rng, data):
    at, ids = 2 * rng.randrange(len(data) // 2), (27, 28, 29, 255, 65535, rng.randrange(28))
    return data[:at] + struct.pack("<H", rng.choice(ids)) + data[at + 2 :]


def change_pickle(rng, data):
    content = torch.load(io.BytesIO(data), weights_only=True)
    content = {"a": RunsCode()} if rng.random() < 0.1 else mutate(rng, content)
    torch.save(content, out := io.BytesIO(), _use_new_zipfile_serialization=rng.random() < 0.7)
    return out.getvalue()


NUMBERS = (
    "-1",
    "0",
    "1",
    "2",
    "3",
    "7",
    "65",
    "1e-320",
    "0.5",
    "nan",
    "inf",
    "-inf",
    "1e300",
    "1_0",
    "0x10",
    " 4",
    "\u0661",
)
HUGE = (
    str(2**20),
    str(2**31),
    str(2**40),
    str(2**62),
    str(2**63),
    str(10**20),
    "9" * 5000,
)  # most need too much memory
TEXTS = (
    "", "None", "True", "false", "x" * 300, "\udcff", "a\nb", "\x1b[31m", ".", "..", "-", "~", "*", "a/b", "gpt2", "out-float",
    "out-packed", "out-qat", "out-float,out-float", "out-packed,", ",", "data", "text.txt", "text.txt/x", "/dev/null/x",
    "/proc/x", "missing", "tiny", "char", "resume", "scratch", "cuda", "meta", "pot", "paper", "uniform", "tensor", "x.json",
    "model.gguf", "out-float/model.safetensors", "rtn,gptq", "qat,x", "1,2,1", "{seed}",
)  # fmt: skip
WORK = ("max_iters", "max_new_tokens", "num_samples")  # a large number is no error, and takes its time


def change_command(rng, data):
    """Gives hostile values to settings, and leaves out, repeats or garbles arguments."""
    script, *arguments = json.loads(data)
    keys = [f.name for f in fields(module_of(script).Settings)]
    keys += [f"{part}_{f.name}" for part in ("pot", "table") if part in keys for f in fields(PoTConfig)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind, key = rng.random(), rng.choice(keys)
        if kind < 0.8:
            value = rng.choice(rng.choice((NUMBERS, NUMBERS if key in WORK else HUGE, TEXTS)))
            arguments += [f"--{key}={value}"] if rng.random() < 0.9 else [f"--{key}", value]
        elif kind < 0.9 and arguments:
            i = rng.randrange(len(arguments))
            arguments[i : i + 1] = rng.choice(([], [arguments[i]] * 2, [arguments[i][: rng.randrange(9)]]))
        else:
            arguments.insert(rng.randrange(len(arguments) + 1), rng.choice(TEXTS))
    return json.dumps([script, *arguments]).encode()


def change_config(rng, data):
    """Gives a hostile value to a setting of a config file."""
    lines = data.decode().splitlines()
    i = rng.randrange(len(lines))
    name, value = lines[i].split(" = ", 1)
    lines[i] = f"{name} = {mutate(rng, ast.literal_eval(value))!r}"
    return "\n".join(lines).encode()


JSON = [flip_bytes, change_length, change_text, change_json, change_json, change_json]
PACKED = [flip_bytes, change_length, change_header, change_metadata, change_value]
CHECKPOINTS = [flip_bytes, flip_bytes, change_length, change_checkpoint, change_checkpoint]

MUTATIONS = {  # by the end of a file's name
    "command.json": [change_command],
    ".safetensors": PACKED,
    "ckpt.pt": CHECKPOINTS,
    "pytorch_model.bin": [flip_bytes, change_length, change_pickle, change_pickle],
    ".bin": [flip_bytes, change_length, change_tokens],
    ".json": JSON,
    ".jsonl": [flip_bytes, change_length, change_lines, change_lines, change_lines],
    ".jinja": [flip_bytes, change_length, change_text],
    ".gguf": [flip_bytes, change_length, change_numbers, change_numbers],
    ".py": [change_config],
}


@dataclass
class Target:
    read: Callable[[Path], object]
    files: tuple[str, ...]  # patterns of files that are damaged, one at a time
    memory: int = MEMORY  # bytes allowed beyond twice the size of the folder


TARGETS = {
    "packed": Target(read_packed, ("model.safetensors",)),
    "checkpoints": Target(read_checkpoint, ("ckpt.pt",)),
    "folders": Target(read_folder, ("*",), 64 << 20),  # a panic of Rust prints its stack
    "tokenizers": Target(read_tokenizer, ("*.json", "*.jinja"), 128 << 20),  # nested templates
    "datasets": Target(read_dataset, ("meta.json", "*.bin")),
    "lines": Target(read_lines, ("*.jsonl", "out-sweep/rows.jsonl"), 64 << 20),  # pictures
    "results": Target(read_results, ("*.json",), 64 << 20),
    "gguf": Target(read_gguf, ("*.gguf",), 64 << 20),
    "commands": Target(read_command, ("command.json", "*.py"), ADDRESSES),
}


if __name__ == "__main__":
    run(main, Settings)
