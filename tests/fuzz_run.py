"""
Damages packed models and tokenizers at random and lets run.cpp read them, under the sanitizers for addresses and undefined
behaviour. Each run must write text, or one line of an error and exit status 2, and `new` may give it twice the size of
the files and 32 KiB. Files made to take memory come first. After anything else the script stops and prints the name or
the seed that repeats it.

    python tests/fuzz_run.py --mutations=2000 --seed=0
    python tests/fuzz_run.py --guided=600    # seconds in which libFuzzer looks for new branches; needs clang++
"""

import functools
import hashlib
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
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
MEMORY = 32 << 10  # bytes allowed beyond twice the files, for a prompt of one token
BOMB = 50_000  # bytes of a file that is made to take memory, about
SANITIZE = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
NATIVE = "-mcpu=native" if os.uname().machine in ("arm64", "aarch64") else "-march=native"


@dataclass
class Settings:
    mutations: int = 2000
    seed: int = 0
    guided: int = 0  # seconds that libFuzzer takes instead


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


def write_bombs(folder: Path) -> list[Path]:
    """Folders whose files try to take more memory than they have bytes, wherever run.cpp allocates by what it reads."""
    plain, wide = folder / "plain", folder / "wide"
    shape = GPTConfig(block_size=8, vocab_size=261, n_layer=1, n_head=1, n_embd=4)
    write_model(plain, shape, PoTConfig(granularity="tensor"))
    write_model(wide, replace(shape, vocab_size=BOMB // 4), PoTConfig(granularity="tensor"))
    own, folders = json.loads((plain / "tokenizer.json").read_text()), [wide]

    def add(name: str, file: str, text: str | bytes):
        folders.append(folder / name)
        shutil.copytree(plain, folders[-1])
        (folders[-1] / file).write_bytes(text if isinstance(text, bytes) else text.encode())

    def repeat(entry: str, brackets: str) -> str:  # $ counts up from 300
        entries = (entry.replace("$", str(300 + i)) for i in range(BOMB // (len(entry) + 1)))
        return brackets[0] + ",".join(entries) + brackets[1]

    long, half = "a" * BOMB, "a" * (BOMB // 2)
    vocab = {
        "same id": repeat('"":0', "{}"),
        "same text": repeat('"":$', "{}"),
        "short tokens": repeat('"$":$', "{}"),
        "long tokens": repeat(f'"${"a" * 3000}":$', "{}"),
        "long token": f'{{"{long}":0}}',
        "two long tokens": f'{{"{half}":0,"{half}b":1}}',
        "escapes": '{"' + "\\u0120" * (BOMB // 6) + '":0}',
    }
    merges = {
        "empty merges": repeat('""', "[]"),
        "short merges": repeat('"t h"', "[]"),
        "pairs": repeat('["t","h"]', "[]"),
        "long merge": f'["{half} {half}"]',
        "long pair": f'[["{half}","{half}"]]',
    }
    added = {
        "empty tokens": repeat("{}", "[]"),
        "added tokens": repeat('{"content":"+$","id":$}', "[]"),
        "one added token": f'[{{"content":"{long}","id":261}}]',
        "brackets": "[" * BOMB,
    }
    for name, text in vocab.items():
        content = json.dumps(own | {"model": own["model"] | {"vocab": "@"}})
        add(name, "tokenizer.json", content.replace('"@"', text))
    for name, text in merges.items():
        content = json.dumps(own | {"model": own["model"] | {"merges": "@"}})
        add(name, "tokenizer.json", content.replace('"@"', text))
    for name, text in added.items():
        add(name, "tokenizer.json", json.dumps(own | {"added_tokens": "@"}).replace('"@"', text))
    add("stops", "generation_config.json", '{"eos_token_id":' + repeat("1", "[]") + "}")
    add("long stop", "tokenizer_config.json", f'{{"eos_token":"{long}"}}')
    data = (plain / checkpoint.MODEL).read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n])
    info = header["__metadata__"]["nanopot"]
    for name, change in {
        "tensors": {f"t{i}": {} for i in range(BOMB // 12)},
        "metadata": {"__metadata__": {"nanopot": f'{info[:-1]}, "more": "{long}"}}'}},
        "quotes": {"__metadata__": {"nanopot": info[:-1] + ', "more": "' + "\\n" * (BOMB // 3) + '"}'}},
    }.items():
        text = json.dumps(header | change).encode()
        text += b" " * (-len(text) % 8)
        add(name, checkpoint.MODEL, struct.pack("<Q", len(text)) + text + data[8 + n :])
    return folders


def main(s: Settings):
    if s.guided:
        return guide(s)
    program, counts = build(*SANITIZE), {0: 0, 2: 0}
    with tempfile.TemporaryDirectory() as temporary:
        bombs = write_bombs(Path(temporary))
        most = run_all(program, bombs, counts)
        print(f"{len(bombs)} files made to take memory: {counts[2]} were refused, {most:.2f} of their size at most")
        originals, counts = [Path(temporary) / name for name in "abc"], {0: 0, 2: 0}
        write_model(originals[0], GPT2, PoTConfig())
        write_model(originals[1], LLAMA, PoTConfig(terms=2, granularity="channel"))
        write_model(originals[2], LLAMA, PoTConfig(bits=3, group_size=32))
        for start in range(s.seed, s.seed + s.mutations, BATCH):
            seeds = range(start, min(start + BATCH, s.seed + s.mutations))
            folders = [write_mutant(originals, Path(temporary) / str(seed), seed) for seed in seeds]
            most = max(most, run_all(program, folders, counts))
            for folder in folders:
                shutil.rmtree(folder)
            print(
                f"{seeds.stop - s.seed} of {s.mutations}: {counts[0]} wrote text, {counts[2]} were refused, "
                f"memory of {most:.2f} times the files at most",
                flush=True,
            )


def guide(s: Settings):
    """Lets libFuzzer change model.safetensors and tokenizer.json, guided by the branches of run.cpp that they reach."""
    flags = ("-O1", "-g1", "-DGUIDED", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all", NATIVE)
    program = build(*flags, compiler="clang++")
    with tempfile.TemporaryDirectory() as temporary:
        folder, corpus = Path(temporary), Path(temporary) / "corpus"
        corpus.mkdir()
        configs = PoTConfig(group_size=16), PoTConfig(terms=2, granularity="channel"), PoTConfig(bits=3, group_size=8)
        for i, (shape, config) in enumerate(zip((GPT2, LLAMA, LLAMA), configs)):
            place = folder / ("model", "tokenizer", "third")[i]
            write_model(place, replace(shape, n_layer=1, n_head=1, n_kv_head=None, n_embd=16, n_inner=16), config)
            for name in (checkpoint.MODEL, "tokenizer.json"):
                (corpus / f"{name}-{i}").write_bytes(name[:1].encode() + (place / name).read_bytes())
        words = {word for path in corpus.iterdir() for word in re.findall(rb"[a-zA-Z_0-9.]{2,40}", path.read_bytes())}
        (folder / "words").write_text("".join(f'"{word.decode()}"\n' for word in sorted(words)))
        command = [program, str(corpus), f"-dict={folder}/words", f"-max_total_time={s.guided}", f"-seed={s.seed + 1}"]
        command += ["-max_len=40000", "-timeout=20", "-rss_limit_mb=1000", "-malloc_limit_mb=64", "-close_fd_mask=3"]
        command += ["-print_final_stats=1", f"-artifact_prefix={ROOT}/"]
        environment = ENV | {"GUIDED_FOLDER": temporary}
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", env=environment)
        lines = done.stderr.splitlines()
        if done.returncode:
            raise ValueError("an input does not end as it should: " + "\n".join(lines[-40:]))
        print("\n".join(line for line in lines if "INITED" in line or "DONE" in line or line.startswith("stat::")))


def write_mutant(originals: list[Path], folder: Path, seed: int) -> Path:
    rng = random.Random(f"run {seed}")
    shutil.copytree(rng.choice(originals), folder)
    if rng.random() < 0.8:
        path, mutation = folder / checkpoint.MODEL, rng.choice(PACKED)
    else:
        path = folder / "tokenizer.json"
        mutation = rng.choice([change_json, change_json, flip_bytes, change_length])
    path.write_bytes(mutation(rng, path.read_bytes()))
    return folder


def run_all(program: str, folders: list[Path], counts: dict) -> float:
    """Runs the program on each folder and counts its exit status. Returns the most memory, in sizes of the files."""
    given = "".join(f"{folder}\n" for folder in folders).encode()
    done = subprocess.run([program, "fuzz"], input=given, capture_output=True, timeout=1200, env=ENV)
    lines, most = done.stderr.decode(errors="replace").split("\n")[:-1], 0.0
    for folder in folders:
        # Two lines a run: an error, or the speed; then its status and memory.
        line, end = [*lines[:2], "", ""][:2]
        fail = f"{folder.name}, exit {done.returncode}: " + "\n".join(lines[:30])
        _, status, memory = end.split() if end.startswith("done ") else ("", "-1", "0")
        if line.startswith("run: error: ") != (status == "2") or int(status) not in counts or len(line) > 700:
            raise ValueError(fail)
        size = sum(f.stat().st_size for f in folder.iterdir())
        if int(memory) > 2 * size + MEMORY:
            raise ValueError(f"{folder.name}: {memory} bytes of memory for files of {size}")
        most = max(most, int(memory) / size)
        counts[int(status)] += 1
        del lines[:2]
    return most


if __name__ == "__main__":
    run(main, Settings)
