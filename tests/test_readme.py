"""Runs the commands and the Python code of README.md, docs/ and results/ that are fast and need no network."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from conftest import gpt2, transformers_model, write_tokenizer

ROOT = Path(__file__).parent.parent
# The demo's commands come first, because the commands of README.md start from its models.
RESULTS = [ROOT / "results" / name for name in ("README.md", "small_models.md", "speed.md")]
PAGES = [*RESULTS, ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCKS = [
    (page.relative_to(ROOT), kind, block)
    for page in PAGES
    for kind, block in re.findall(r"```(\w+)\n(.*?)```", page.read_text(), re.DOTALL)
]
COMMANDS = [line for _, kind, block in BLOCKS if kind == "sh" for line in block.splitlines() if line and line[0] != "#"]
CODE = [(f"{page.name}-{i}.py", block) for i, (page, kind, block) in enumerate(BLOCKS) if kind == "python"]

# Options that shorten the commands.
STEPS = "--eval_interval=2 --batch_size=2 --gradient_accumulation_steps=1 --max_iters=4"
SHORTER = {
    "train.py": "--eval_tokens=500 --calibrate_tokens=200",
    "eval.py": "--tokens=500",
    "sample.py": "--max_new_tokens=20",
    "sweep.py": "--max_iters=2 --tokens=500 --calibrate_tokens=200 --methods=rtn",
    "bench.py": "--ckpt=gpt2 --compile=False --rounds=2 --new_tokens=4 --prompt_tokens=20 --steps=1 --block_size=16",
}
# Other tests cover these, or they need minutes, a compiler for another processor, or an encoder from the hub.
SKIPPED = re.compile(
    "make |git |cd |pip |.*[.]gguf|sudo |aarch64|sh results/|torchrun |.*--wandb_log|.*--encoder=roberta-base"
    "|.*--protocol=paper|.*papers-(ptq(3|5|15|20|30)|uniform|qat|ours|control)"  # one row of the papers runs here
)
# Inputs for the data scripts, which would download them. For `gpt2` and `smollm2`, the test writes folders of that name.
INPUTS = {"shakespeare_char": "input.txt", "openwebtext": "documents.jsonl", "wikitext2": "input.txt"}


def test_readme_names_make_demo_and_make_test():
    assert "make demo" in COMMANDS and "make test" in COMMANDS
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220


def test_commands(tmp_path, monkeypatch, capfd):
    """Runs the commands in the order of the pages, in a copy of the repository."""
    workdir = tmp_path / "nanopot"
    ignored = shutil.ignore_patterns(".*", "out*", "gpt2*", "smollm2*", "*.bin", "meta.json", "__pycache__", "wandb")
    shutil.copytree(ROOT, workdir, ignore=ignored)
    article = " = Title = \n\nFirst Citizen:\nBefore we proceed any further, hear me speak.\n\n"
    (tmp_path / "input.txt").write_text("".join(f"{article}{i}\n" for i in range(60)))
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps({"text": f"{i} men " * 30}) + "\n" for i in range(60)))
    gpt2(vocab_size=50257, n_positions=96).save_pretrained(workdir / "gpt2")
    transformers_model("llama grouped").save_pretrained(workdir / "smollm2")
    write_tokenizer(workdir / "smollm2")
    monkeypatch.chdir(workdir)
    count = 0
    for line in COMMANDS:
        if SKIPPED.match(line):
            continue
        words = shlex.split(line, comments=True)
        assert words[0] == "python" and (workdir / words[1]).exists(), line
        if Path(words[1]).parent.name in INPUTS:
            words += ["--input", str(tmp_path / INPUTS[Path(words[1]).parent.name])]
        given = {w.split("=")[0] for w in words}
        options = SHORTER.get(words[1], "")
        if words[1] == "train.py" and "config/ptq_" not in line:
            options += f" {STEPS}"
        words += [w for w in options.split() if w.split("=")[0] not in given]
        start = time.time()
        monkeypatch.setattr(sys, "argv", words[1:])
        try:  # in this process, because importing torch takes longer than most commands
            runpy.run_path(words[1], run_name="__main__")
        except SystemExit as e:
            assert not e.code, f"{line}\n{capfd.readouterr().err}"
        print(f"{time.time() - start:.1f} s  {line}")
        count += 1
    assert count >= 15


def test_python_code(tmp_path):
    """Each block runs by itself, beside the files that a user copies into another project."""
    for name in ("pot.py", "calibrate.py", "extras/pot_transformers.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name, block in CODE:
        (tmp_path / name).write_text(block)
    run = "import runpy, sys\nfor name in sys.argv[1:]: runpy.run_path(name)"  # one process: imports take seconds
    command = [sys.executable, "-c", run, *(name for name, _ in CODE)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "tokens are few" not in done.stderr, done.stderr


def test_demo_script_names_existing_files():
    text = (ROOT / "demo.sh").read_text()
    for path in set(re.findall(r"(?:config/|data/)?\w+(?:/\w+)*\.py", text)):
        assert (ROOT / path).exists(), path


def test_links_have_targets():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page}: {link}"


def test_promises_name_tests_that_exist():
    named = re.findall(r"`(\w+)::(test_\w+)`", (ROOT / "docs" / "reliability.md").read_text())
    assert len(named) > 40
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / f"test_{file}.py").read_text(), f"{file}::{test}"


def test_files_to_copy_need_torch_alone():
    for name, allowed in (("pot.py", {"pot_kernel"}), ("calibrate.py", {"pot"}), ("pot_kernel/__init__.py", set())):
        imports = re.findall(r"^\s*(?:import|from) (\w+)", (ROOT / name).read_text(), re.MULTILINE)
        assert set(imports) <= {"torch", *allowed, *sys.stdlib_module_names}, name


def test_imports_run_one_way():
    """Imports have no cycle, only sweep.py imports scripts, and no module uses private names of another."""
    scripts = {"train", "eval", "sample", "bench", "sweep"}
    files = {str(p.relative_to(ROOT)): p.read_text() for pattern in ("*.py", "*/*.py") for p in ROOT.glob(pattern)}
    modules = {n.removesuffix(".py").removesuffix("/__init__").replace("/", "."): text for n, text in files.items()}
    own = {m for m in modules if not m.startswith(("tests", "config", "results", "."))}
    imports = {}
    for name in own:
        lines = re.findall(r"^ *(?:import ([\w.]+)|from ([\w.]+) import (\w+))", modules[name], re.MULTILINE)
        parts = {p for a, b, c in lines for p in (a, b, f"{b}.{c}")}
        imports[name] = {p for p in parts if p in own and p != name}
    for name in own:
        if name != "sweep":
            assert not imports[name] & scripts, f"{name} imports {imports[name] & scripts}"
        private = re.findall(rf"\b(?:{'|'.join(imports[name]) or '(?!)'})\.(_[a-z]\w*)", modules[name])
        private += re.findall(rf"^ *from (?:{'|'.join(own)}) import .*\b_[a-z]\w*", modules[name], re.MULTILINE)
        assert not private, f"{name} uses {private}"
    while imports:
        leaves = {name for name in imports if not imports[name] & imports.keys()}
        assert leaves, f"import cycle among {sorted(imports)}"
        imports = {name: imported for name, imported in imports.items() if name not in leaves}
