"""
Size, memory and speed of the program without Python (pot_kernel/run.cpp), beside llama.cpp's and llama2.c's. Writes
results/run.json. Programs for other processors are built by Debian's cross compilers and run in emulation.

    python results/run.py --ckpt=out-smollm2-pot4 --gguf=SmolLM2.Q4_1.gguf --llama_bench=PATH --llama2c=FOLDER
"""

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import machine  # noqa: E402
from configurator import run  # noqa: E402

PROMPT = "The sky is blue because"


@dataclass
class Settings:
    ckpt: str = "out"  # a packed model
    tokens: int = 64  # that the program writes
    emulated_tokens: int = 12  # that it writes in emulation, which is slow
    gguf: str | None = None  # the same model for llama.cpp
    llama_bench: str | None = None  # llama.cpp's program
    llama2c: str | None = None  # a checkout of llama2.c; it gets a file of the model's shape with zeros
    out: str = "results/run.json"


def build(folder: Path, name: str, compiler: str, source: Path, *flags: str) -> dict:
    """Builds a program. Returns its path and its bytes without symbols."""
    program = folder / name
    subprocess.run(
        [compiler, "-O3", *flags, "-o", program, source, *(["-lm"] if source.suffix == ".c" else [])], check=True
    )
    strip = compiler.removesuffix("g++") + "strip" if compiler.endswith("-g++") else "strip"
    subprocess.run([strip, program], check=True)
    return {"path": str(program), "bytes": program.stat().st_size}


def measure(command: list[str]) -> dict:
    """Runs a command. Returns its output, the last line of its errors, its seconds and its peak memory in bytes."""
    start = time.time()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.time() - start
        texts = []
        for f in (out, err):
            f.seek(0)
            texts.append(f.read().decode(errors="replace"))
    if process.returncode:
        raise ValueError(f"{' '.join(map(str, command))} ended with status {process.returncode}: {texts[1][-500:]}")
    peak = usage.ru_maxrss * 1024
    return {"text": texts[0], "log": texts[1].strip().splitlines()[-1:], "seconds": seconds, "peak_bytes": peak}


def write_llama2c(path: Path, ckpt: str) -> None:
    """A checkpoint of llama2.c's first version with the model's shape: float32 zeros."""
    with open(os.path.join(ckpt, "model.safetensors"), "rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        c = json.loads(json.loads(f.read(length))["__metadata__"]["nanopot"])["model_args"]
    layer = 2 * c["n_embd"] + 3 * c["n_embd"] * c["n_inner"]
    layer += 2 * c["n_embd"] * c["head_size"] * (c["n_head"] + c["n_kv_head"])
    floats = c["vocab_size"] * c["n_embd"] + c["n_layer"] * layer + c["n_embd"] + c["block_size"] * c["head_size"]
    names = ("n_embd", "n_inner", "n_layer", "n_head", "n_kv_head", "vocab_size", "block_size")
    with open(path, "wb") as f:
        f.write(struct.pack("<7i", *(c[name] for name in names)))
        f.truncate(28 + 4 * floats)


def main(s: Settings):
    source, result = ROOT / "pot_kernel" / "run.cpp", {"model_bytes": os.path.getsize(f"{s.ckpt}/model.safetensors")}
    flags, words = ["-std=c++17", "-pthread"], [f"--ckpt={s.ckpt}", f"--prompt={PROMPT}", "--temperature=0"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        own = build(folder, "run", "g++", source, "-march=native", *flags, "-ldl")
        path = own.pop("path")
        for threads in (1, os.cpu_count()):
            own[f"{threads} threads"] = measure([path, *words, f"--max_new_tokens={s.tokens}", f"--threads={threads}"])
        short = [*words, f"--max_new_tokens={s.emulated_tokens}", "--threads=1"]
        expected = measure([path, *short])["text"]
        result["programs"] = {"run, x86-64, native": own}
        for name in ("aarch64", "riscv64"):
            compiler, emulator = f"{name}-linux-gnu-g++", f"qemu-{name}"
            if shutil.which(compiler) and shutil.which(emulator):
                program = build(folder, name, compiler, source, "-static", *flags)
                emulated = measure([emulator, program.pop("path"), *short])
                program["same_text"] = emulated["text"] == expected
                program["emulated_seconds"] = emulated["seconds"]
                result["programs"][f"run, {name}, static"] = program
                print(name, program, flush=True)
        if s.llama_bench and s.gguf:
            program = folder / "llama-bench"
            shutil.copy(s.llama_bench, program)
            subprocess.run(["strip", program], check=True)
            figures = measure(
                [program, "-m", s.gguf, "-p", "0", "-n", str(s.tokens), "-r", "1", "-t", "1", "-o", "json"]
            )
            speed = json.loads(figures.pop("text"))[0]["avg_ts"]
            size = {"bytes": program.stat().st_size, "model_bytes": os.path.getsize(s.gguf), "tokens_per_second": speed}
            result["programs"]["llama.cpp, llama-bench"] = size | {"1 threads": figures}
        if s.llama2c:
            program = build(folder, "llama2c", "gcc", Path(s.llama2c) / "run.c", "-march=native", "-Ofast")
            write_llama2c(folder / "model.bin", s.ckpt)
            with open(folder / "tokenizer.bin", "wb") as f:  # one letter for each token
                vocabulary = struct.unpack("<7i", open(folder / "model.bin", "rb").read(28))[5]
                f.write(struct.pack("<i", 1) + b"".join(struct.pack("<fi", 0.0, 1) + b"a" for _ in range(vocabulary)))
            command = [
                program.pop("path"),
                folder / "model.bin",
                "-z",
                folder / "tokenizer.bin",
                "-n",
                str(s.tokens),
                "-t",
                "0",
            ]
            program |= {"model_bytes": (folder / "model.bin").stat().st_size, "1 threads": measure(command)}
            result["programs"]["llama2.c, run.c, float32"] = program
    result |= {"prompt": PROMPT, "provenance": machine.provenance()}
    with open(s.out, "w") as f:
        json.dump(result, f, indent=1, ensure_ascii=False)
        f.write("\n")
    print(json.dumps(result["programs"], indent=1))


if __name__ == "__main__":
    run(main, Settings)
