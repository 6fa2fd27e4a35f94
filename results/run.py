"""
Size and memory of the program without Python (pot_kernel/run.cpp), beside llama.cpp's and llama2.c's. Writes
results/run.json. Programs for other processors are built by Debian's cross compilers and run in emulation. Their memory is
what the kernel counts as resident in the addresses that the emulator gives to the program, without the emulator's own.

    python results/run.py --ckpt=out-smollm2-pot4 --gguf=SmolLM2.Q4_1.gguf --llama_bench=PATH --llama2c=FOLDER
"""

import json
import os
import re
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
GUEST, SPACE = 1 << 45, 1 << 32  # address and bytes that a program in emulation gets


@dataclass
class Settings:
    ckpt: str = "out"  # a packed model
    tokens: int = 64  # that the program writes
    emulated_tokens: int = 12  # that it writes in emulation, which is slow; 0: leave other processors out
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


def guest_memory(pid: int) -> int:
    """Bytes that are resident in the addresses of an emulated program: its code, its memory and its mapped files."""
    total, inside = 0, False
    with open(f"/proc/{pid}/smaps") as f:
        for line in f:
            if match := re.match("([0-9a-f]+)-[0-9a-f]+ ", line):
                inside = GUEST <= int(match[1], 16) < GUEST + SPACE
            elif inside and line.startswith("Rss:"):
                total += 1024 * int(line.split()[1])
    return total


def measure(command: list, emulated: bool = False) -> dict:
    """Runs a command. Returns its output and its peak memory in bytes, mapped files included. In emulation the peak is
    the largest of ten samples a second."""
    with tempfile.TemporaryFile() as out:
        process, peak = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL), 0
        program = os.path.realpath(shutil.which(command[0]))
        while process.poll() is None:  # getrusage would tell the peak of this process, if that is larger
            try:
                if os.readlink(f"/proc/{process.pid}/exe") == program:  # not before it is started
                    own = guest_memory(process.pid) if emulated else machine.process_memory("VmHWM", process.pid)
                    peak = max(peak, own or 0)
            except OSError:  # it has just ended
                pass
            time.sleep(0.1 if emulated else 0.02)
        out.seek(0)
        text = out.read().decode(errors="replace")
    if process.returncode:
        raise ValueError(f"{' '.join(map(str, command))} ended with status {process.returncode}")
    return {"text": text, "peak_bytes": peak}


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
        own |= measure([path, *words, f"--max_new_tokens={s.tokens}", "--threads=1"])
        short = [*words, f"--max_new_tokens={s.emulated_tokens}", "--threads=1"]
        expected = measure([path, *short])["text"] if s.emulated_tokens else None
        result["programs"] = {"run, x86-64, native": own}
        for name in ("aarch64", "riscv64") if s.emulated_tokens else ():
            compiler, emulator = f"{name}-linux-gnu-g++", f"qemu-{name}"
            if shutil.which(compiler) and shutil.which(emulator):
                program = build(folder, name, compiler, source, "-static", *flags)
                space = ["-B", hex(GUEST), "-R", hex(SPACE)]
                emulated = measure([emulator, *space, program.pop("path"), *short], emulated=True)
                program |= {"same_text": emulated["text"] == expected, "peak_bytes": emulated["peak_bytes"]}
                result["programs"][f"run, {name}, static"] = program
                print(name, program, flush=True)
        if s.llama_bench and s.gguf:
            program = folder / "llama-bench"
            shutil.copy(s.llama_bench, program)
            subprocess.run(["strip", program], check=True)
            figures = measure([program, "-m", s.gguf, "-p", "0", "-n", str(s.tokens), "-r", "1", "-t", "1"])
            size = {"bytes": program.stat().st_size, "model_bytes": os.path.getsize(s.gguf)}
            result["programs"]["llama.cpp, llama-bench"] = size | {"peak_bytes": figures["peak_bytes"]}
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
            program |= {
                "model_bytes": (folder / "model.bin").stat().st_size,
                "peak_bytes": measure(command)["peak_bytes"],
            }
            result["programs"]["llama2.c, run.c, float32"] = program
    result |= {"prompt": PROMPT, "provenance": machine.provenance()}
    with open(s.out, "w") as f:
        json.dump(result, f, indent=1, ensure_ascii=False)
        f.write("\n")
    print(json.dumps(result["programs"], indent=1))


if __name__ == "__main__":
    run(main, Settings)
