"""Every command of the README that needs no network runs, and so does its Python."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import gpt2

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines() if line and line[0] != "#"]

# Short versions of the same commands.
FEWER = {
    "train.py": "--max_iters=4 --eval_interval=2 --eval_tokens=500 --batch_size=2 --gradient_accumulation_steps=1 --calibrate_tokens=200",
    "eval.py": "--tokens=500",
    "sample.py": "--max_new_tokens=20",
    "sweep.py": "--max_iters=2 --tokens=500 --calibrate_tokens=200 --methods=rtn",
    "bench.py": "--ckpt=gpt2 --compile=False --rounds=2 --new_tokens=4 --prompt_tokens=20 --steps=1 --block_size=16",
}
# Other tests run these; minutes of training; an encoder from the hub.
NOT_HERE = re.compile(
    "make |git |cd |pip |.*[.]gguf|sudo |aarch64|sh results/|torchrun |.*--wandb_log|.*--bertscore=roberta-base|.*--protocol=paper"
)
# What the others take from the network; `gpt2` is a folder here, which goes before the hub's.
INPUTS = {"shakespeare_char": "input.txt", "openwebtext": "documents.jsonl", "wikitext2": "input.txt"}


def test_the_two_commands_are_there():
    assert "make demo" in COMMANDS and "make test" in COMMANDS


def test_commands(tmp_path, monkeypatch, capfd):
    """In the order of the README, in a copy of the repository, as if by a new user."""
    house = tmp_path / "nanopot"
    ignored = shutil.ignore_patterns(".*", "out*", "*.bin", "meta.json", "__pycache__", "wandb")
    shutil.copytree(ROOT, house, ignore=ignored)
    article = " = Title = \n\nFirst Citizen:\nBefore we proceed any further, hear me speak.\n\n"
    (tmp_path / "input.txt").write_text("".join(f"{article}{i}\n" for i in range(60)))
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps({"text": f"{i} men " * 30}) + "\n" for i in range(60)))
    gpt2(vocab_size=50257, n_positions=96).save_pretrained(house / "gpt2")
    monkeypatch.chdir(house)
    ran = 0
    for line in COMMANDS:
        if NOT_HERE.match(line):
            continue
        words = shlex.split(line, comments=True)
        assert words[0] == "python" and (house / words[1]).exists(), line
        if Path(words[1]).parent.name in INPUTS:
            words += ["--input", str(tmp_path / INPUTS[Path(words[1]).parent.name])]
        given = {w.split("=")[0] for w in words}
        words += [w for w in FEWER.get(words[1], "").split() if w.split("=")[0] not in given]
        start = time.time()
        monkeypatch.setattr(sys, "argv", words[1:])
        try:  # here, as importing torch anew takes longer than most of them
            runpy.run_path(words[1], run_name="__main__")
        except SystemExit as e:
            assert not e.code, f"{line}\n{capfd.readouterr().err}"
        print(f"{time.time() - start:.1f} s  {line}")
        ran += 1
    assert ran >= 20


@pytest.mark.parametrize("code", [block for kind, block in BLOCKS if kind == "python"])
def test_python(code, tmp_path):
    shutil.copy(ROOT / "pot.py", tmp_path)  # as a user copies it: this file alone
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_demo_script_names_real_files():
    text = (ROOT / "demo.sh").read_text()
    for path in set(re.findall(r"(?:config/|data/)?\w+(?:/\w+)*\.py", text)):
        assert (ROOT / path).exists(), path


def test_pot_py_needs_nothing_but_torch():
    imports = re.findall(r"^\s*(?:import|from) (\w+)", (ROOT / "pot.py").read_text(), re.MULTILINE)
    assert set(imports) <= {"torch", *sys.stdlib_module_names}
