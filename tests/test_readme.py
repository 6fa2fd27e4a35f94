"""Every command of the README that needs no network runs, and so does its Python."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines() if line and line[0] != "#"]

# Short versions of the same commands.
FEWER = {
    "train.py": "--max_iters=4 --eval_interval=2 --eval_tokens=500 --batch_size=2",
    "eval.py": "--tokens=500",
    "sample.py": "--max_new_tokens=20",
    "bench.py": "--n_layer=1 --n_head=1 --n_embd=64 --vocab_size=99 --rounds=2 --steps=1",
}
NOT_HERE = ("make ", "git ", "cd ", "pip ", "sh results/")  # the other tests; minutes of training


def test_the_two_commands_are_there():
    assert "make demo" in COMMANDS and "make test" in COMMANDS


def test_commands(tmp_path):
    """In the order of the README, in a copy of the repository, as if by a new user."""
    house = tmp_path / "nanopot"
    ignored = shutil.ignore_patterns(".*", "out*", "*.bin", "meta.json", "__pycache__", "wandb")
    shutil.copytree(ROOT, house, ignore=ignored)
    (tmp_path / "input.txt").write_text("First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 100)
    ran = 0
    for line in COMMANDS:
        if line.startswith(NOT_HERE):
            continue
        words = shlex.split(line, comments=True)
        assert words[0] == "python" and (house / words[1]).exists(), line
        if words[1] == "data/shakespeare_char/prepare.py":  # downloads, unless given the text
            words += ["--input", str(tmp_path / "input.txt")]
        args = [sys.executable, *words[1:]]
        given = {w.split("=")[0] for w in words}
        args += [w for w in FEWER.get(words[1], "").split() if w.split("=")[0] not in given]
        done = subprocess.run(args, cwd=house, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        ran += 1
    assert ran >= 8


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
    assert set(imports) <= {"torch", "copy", "dataclasses"}
