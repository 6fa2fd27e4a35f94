"""
Damages packed models and tokenizers at random and lets run.cpp read them, under the sanitizers for addresses and undefined
behaviour. Each run must write text, or one line of an error and exit status 2. It may allocate twice the size of the
files. After anything else the script stops and prints the seed that repeats it.

    python tests/fuzz_run.py --mutations=2000 --seed=0
"""

import functools
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENV = os.environ | {"NANOPOT_KERNEL": ""}  # conftest.py turns the kernel off
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import torch  # noqa: E402
from conftest import write_tokenizer  # noqa: E402
from fuzz import PACKED, change_length, flip_bytes, mutate  # noqa: E402

import checkpoint  # noqa: E402
from configurator import run  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from pot import PoTConfig, quantize_  # noqa: E402
from tokenizer import FileTokenizer  # noqa: E402

BATCH = 200  # mutations per process
MEMORY = 1 << 20  # bytes allowed beyond twice the files, for a prompt of one token
SANITIZE = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
NATIVE = "-mcpu=native" if os.uname().machine in ("arm64", "aarch64") else "-march=native"


@dataclass
class Settings:
    mutations: int = 2000
    seed: int = 0


@functools.cache
def build(*flags: str, source: str = "tests/run.cpp", compiler: str = "c++") -> str:
    """Path of a program of tests/run.cpp or another source. It is kept in the user's cache, as the kernel is."""
    key = hashlib.sha256(repr((compiler, flags, os.uname().machine)).encode())
    parts = ("run.cpp", "decode.cpp", "pot.cpp", "shift.h", "unicode.h")
    for path in (source, *(f"pot_kernel/{name}" for name in parts)):
        key.update((ROOT / path).read_bytes())
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanopot"
    home.mkdir(parents=True, exist_ok=True)
    program = home / f"run-{key.hexdigest()[:16]}"
    if not program.exists():
        with tempfile.TemporaryDirectory(dir=home) as folder:  # several processes may build at once
            command = [compiler, *flags, "-std=c++17", "-pthread", "-o", f"{folder}/run", str(ROOT / source), "-ldl"]
            subprocess.run(command, check=True)
            os.replace(f"{folder}/run", program)
    return str(program)


GPT2 = GPTConfig(block_size=256, vocab_size=261, n_layer=2, n_head=2, n_embd=64)
LLAMA = GPTConfig(
    256, 261, 2, n_head=4, n_embd=64, bias=False, n_kv_head=2, n_inner=96, norm="rms", position="rotary", mlp="swiglu",
    tie=False,
)  # fmt: skip


def write_model(folder: Path, shape: GPTConfig, config: PoTConfig, seed: int = 0) -> None:
    """A packed model with random weights that writes varied text, and a tokenizer of 261 tokens."""
    torch.manual_seed(seed)
    folder.mkdir()
    write_tokenizer(folder)
    model = GPT(shape)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.25 if p.dim() > 1 else 0.1)
        if "ln_" in name and name.endswith("weight"):
            p.data += 1
    meta = FileTokenizer(str(folder)).meta
    info = checkpoint.CheckpointInfo(meta, "PTQ", shape, pot=config)
    checkpoint.save_model(str(folder), quantize_(model, config), info)


def change_json(rng, data):
    content = json.loads(data)
    return json.dumps(mutate(rng, content)).encode()


def main(s: Settings):
    program, counts = build(*SANITIZE), {0: 0, 2: 0}
    with tempfile.TemporaryDirectory() as temporary:
        originals = [Path(temporary) / name for name in "abc"]
        write_model(originals[0], GPT2, PoTConfig())
        write_model(originals[1], LLAMA, PoTConfig(terms=2, granularity="channel"))
        write_model(originals[2], LLAMA, PoTConfig(bits=3, group_size=32))
        for start in range(s.seed, s.seed + s.mutations, BATCH):
            seeds = range(start, min(start + BATCH, s.seed + s.mutations))
            for status, count in run_batch(program, originals, seeds, Path(temporary) / "mutants").items():
                counts[status] += count
            print(
                f"{seeds.stop - s.seed} of {s.mutations}: {counts[0]} wrote text, {counts[2]} were refused", flush=True
            )


def run_batch(program, originals, seeds, folder):
    folders, sizes = [], []
    for seed in seeds:
        rng = random.Random(f"run {seed}")
        mutant = folder / str(seed)
        shutil.copytree(rng.choice(originals), mutant)
        if rng.random() < 0.8:
            path, mutation = mutant / checkpoint.MODEL, rng.choice(PACKED)
        else:
            path, mutation = (
                mutant / "tokenizer.json",
                rng.choice([change_json, change_json, flip_bytes, change_length]),
            )
        path.write_bytes(mutation(rng, path.read_bytes()))
        folders.append(f"{mutant}\n")
        sizes.append(sum(f.stat().st_size for f in mutant.iterdir()))
    done = subprocess.run(
        [program, "fuzz"], input="".join(folders).encode(), capture_output=True, timeout=1200, env=ENV
    )
    lines = done.stderr.decode(errors="replace").split("\n")[:-1]
    counts = {0: 0, 2: 0}
    for seed, size in zip(seeds, sizes):
        # Two lines a run: an error, or the speed; then its status and memory.
        line, end = [*lines[:2], "", ""][:2]
        fail = f"seed {seed}, exit {done.returncode}: " + "\n".join(lines[:30])
        _, status, memory = end.split() if end.startswith("done ") else ("", "-1", "0")
        if line.startswith("run: error: ") != (status == "2") or int(status) not in counts or len(line) > 700:
            raise ValueError(fail)
        if int(memory) > 2 * size + MEMORY:
            raise ValueError(f"seed {seed}: {memory} bytes of memory for files of {size}")
        counts[int(status)] += 1
        del lines[:2]
    shutil.rmtree(folder)
    return counts


if __name__ == "__main__":
    run(main, Settings)
