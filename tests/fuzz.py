"""
Damages packed files and checkpoints at random and loads them. Each file must either raise an error of one line, or give
a model that runs and an optimizer that steps. After a crash, a hang, another exception or too much memory, the script
stops and prints the seed that repeats the failure.

    python tests/fuzz.py --packed=5000 --checkpoints=1000 --seed=0
"""

import copy
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

import checkpoint
import machine
from configurator import run
from model import GPT, GPTConfig
from pot import PoTConfig, prepare, quantize_
from train import Settings as TrainSettings
from train import load_optimizer, make_optimizer

CHUNK = 250  # mutations per process
SECONDS = 20  # limit per mutation; the slowest takes 0.1 s
MEMORY = 16 << 20  # bytes allowed beyond twice the file size, for the interpreter and a forward pass


@dataclass
class Settings:
    packed: int = 5000  # mutations of model.safetensors
    checkpoints: int = 1000  # mutations of ckpt.pt
    seed: int = 0
    worker: str | None = None  # folder of a worker process; set by the script


def main(s: Settings):
    if s.worker:
        return run_worker(s)
    counts = {}
    with tempfile.TemporaryDirectory() as folder:
        write_originals(folder)
        for kind, total in (("packed", s.packed), ("checkpoints", s.checkpoints)):
            for start in range(0, total, CHUNK):
                n, seed = min(CHUNK, total - start), s.seed + start
                sizes = {"packed": 0, "checkpoints": 0} | {kind: n}
                command = [sys.executable, "-W", "ignore", __file__, f"--worker={folder}", f"--seed={seed}"]
                command += [f"--{k}={v}" for k, v in sizes.items()]
                try:
                    result = subprocess.run(command, capture_output=True, text=True, timeout=60 + n * 2)
                except subprocess.TimeoutExpired as e:
                    raise ValueError(f"{kind}: hangs at {(e.stdout or b'nothing').decode().splitlines()[-1]}") from None
                last = result.stdout.splitlines()[-1:] or ["nothing"]
                if result.returncode:
                    raise ValueError(f"{kind}: exit {result.returncode} at {last[0]}: {result.stderr[-3000:]}")
                for outcome, count in json.loads(last[0]).items():
                    counts[outcome] = counts.get(outcome, 0) + count
                print(f"{kind} {start + n} of {total}: {counts}", flush=True)


def write_originals(folder):
    """Writes the original files: two packed models, a float model of 11 MB, and a QAT checkpoint."""
    torch.manual_seed(0)
    shape = GPTConfig(block_size=16, vocab_size=20, n_layer=2, n_head=2, n_embd=64)
    large = GPTConfig(block_size=16, vocab_size=5000, n_layer=2, n_head=2, n_embd=256)
    chars = "".join(map(chr, range(97, 117)))
    tokenizer, settings = {"tokenizer": "char", "chars": chars}, {"dataset": "tiny", "seed": 1}
    info = checkpoint.CheckpointInfo(tokenizer, "QAT", shape, step=3, settings=settings)
    for name, config in (("a", PoTConfig()), ("b", PoTConfig(bits=3, granularity="channel")), ("c", None)):
        model = GPT(shape if config else large)
        packed = copy.deepcopy(model) if config is None else quantize_(copy.deepcopy(model), config)
        checkpoint.save_model(os.path.join(folder, name), packed, replace(info, model_args=model.config))
    model = GPT(shape)
    prepare(model, PoTConfig())
    optimizer = make_optimizer(model, TrainSettings(), "cpu")
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1].backward()
    optimizer.step()
    info = replace(info, pot=PoTConfig())
    checkpoint.save_training(os.path.join(folder, "d"), model, info, optimizer.state_dict(), scaler={})


def run_worker(s):
    kind = "packed" if s.packed else "checkpoints"
    name = checkpoint.MODEL if kind == "packed" else checkpoint.TRAINING
    counts, folder = {"loaded": 0, "refused": 0}, os.path.join(s.worker, f"mutant-{os.getpid()}")
    os.makedirs(folder)
    path = os.path.join(folder, name)
    model = load_and_step(os.path.join(s.worker, "a" if kind == "packed" else "d"), kind)
    model(torch.zeros(1, 5, dtype=torch.long))  # warm up
    for seed in range(s.seed, s.seed + (s.packed or s.checkpoints)):
        rng = random.Random(f"{kind} {seed}")
        source = os.path.join(s.worker, rng.choice("abc") if kind == "packed" else "d", name)
        data = Path(source).read_bytes()
        mutation = rng.choice(PACKED if kind == "packed" else CHECKPOINTS)
        Path(path).write_bytes(mutation(rng, data))
        print(f"seed {seed}, {mutation.__name__}", flush=True)
        before, start = reset_peak(), time.time()
        try:
            model = load_and_step(folder, kind)
        except (ValueError, OSError) as e:
            assert 20 < len(str(e)) < 2000 and "\n" not in str(e), e
            counts["refused"] += 1
        else:
            with torch.no_grad():
                model(torch.zeros(1, 5, dtype=torch.long))
            counts["loaded"] += 1
        assert time.time() - start < SECONDS, "too slow"
        grown = (machine.process_memory("VmHWM") or 0) - before
        assert grown < 2 * len(data) + MEMORY, f"{grown} bytes of memory for {len(data)}"
        assert not os.path.exists("/tmp/nanopot-fuzz-was-here"), "the file ran code"
    print(json.dumps(counts))


def load_and_step(folder, kind):
    model, _ = checkpoint.load_model(folder)
    if kind == "checkpoints":
        training = checkpoint.load_training(folder)
        optimizer = make_optimizer(model, TrainSettings(), "cpu")
        load_optimizer(optimizer, torch.amp.GradScaler(enabled=False), training)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    return model


def reset_peak():
    """Resets the peak memory of this process. Returns the current memory in bytes, or 0 without Linux."""
    if not os.path.exists("/proc/self/clear_refs"):
        return 0
    Path("/proc/self/clear_refs").write_text("5")
    return machine.process_memory("VmRSS")


def flip_bytes(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 9))):
        data[rng.randrange(rng.choice((8, 300, len(data) // 4, len(data))))] ^= rng.randrange(1, 256)
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
    fields = json.loads(data[8 : 8 + n])
    key = rng.choice([k for k in fields if k != "__metadata__"])
    text = json.dumps(fields | {key: mutate(rng, fields[key])}).encode()
    if rng.random() < 0.1:
        return struct.pack("<Q", rng.choice((0, n + 1, 2**40, 2**63))) + data[8:]
    return struct.pack("<Q", len(text)) + text + data[8 + n :]


def change_metadata(rng, data):
    (n,) = struct.unpack("<Q", data[:8])
    fields = json.loads(data[8 : 8 + n])
    info = json.loads(fields["__metadata__"]["nanopot"])
    part = rng.choice(["packed", "model_args", None])
    info = mutate(rng, info) if part is None else info | {part: mutate(rng, info[part])}
    fields["__metadata__"]["nanopot"] = json.dumps(info)
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + n :]


def change_value(rng, data):
    """Writes NaN, inf, -inf, zero or a tiny negative number into a unit, or into another tensor without units."""
    (n,) = struct.unpack("<Q", data[:8])
    fields, data = json.loads(data[8 : 8 + n]), bytearray(data)
    keys = [k for k in fields if k.endswith("unit")] or [k for k in fields if k != "__metadata__"]
    start, end = fields[rng.choice(keys)]["data_offsets"]
    offset = 8 + n + rng.randrange(start, end - 3) // 2 * 2
    data[offset : offset + 2] = rng.choice((b"\x00\x7e", b"\x00\x7c", b"\x00\xfc", b"\x00\x00", b"\x01\x80"))
    return bytes(data)


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch /tmp/nanopot-fuzz-was-here",)


def change_checkpoint(rng, data):
    import io

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
    import io
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    return out.getvalue()


PACKED = [flip_bytes, change_length, change_header, change_metadata, change_value]
CHECKPOINTS = [flip_bytes, flip_bytes, change_length, change_checkpoint, change_checkpoint]

if __name__ == "__main__":
    run(main, Settings)
