"""Short runs of tests/fuzz.py and tests/kills.py, and a check that fuzz.py reports unexpected errors."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

import checkpoint


def run(script, *args):
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / script), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_damaged_files_are_rejected_or_run():
    targets = "packed,checkpoints,folders,tokenizers,datasets"
    done = run("fuzz.py", f"--targets={targets}", "--inputs=40", "--seed=100000")
    assert done.returncode == 0, done.stderr
    for name, line in zip(targets.split(","), done.stdout.splitlines(), strict=True):
        assert re.fullmatch(rf"{name} 40 of 40: {{'loaded': [1-9]\d*, 'refused': [1-9]\d*}}", line), line


@pytest.mark.parametrize("error", ["KeyError('x')", "MemoryError()", "IndexError('out of range')"])
def test_fuzz_reports_unexpected_errors(tmp_path, monkeypatch, error):
    import fuzz as module

    load = checkpoint.load_model

    def broken(folder):
        if "mutant" in folder:
            raise eval(error)
        return load(folder)

    monkeypatch.setattr(checkpoint, "load_model", broken)
    module.write_originals(str(tmp_path), ["packed"])
    with pytest.raises((LookupError, MemoryError)):
        module.run_worker(module.Settings("packed", inputs=2, worker=str(tmp_path)))


def test_killed_run_resumes():
    done = run("kills.py", "--kills=2")
    assert done.returncode == 0, done.stderr
    assert "the weights equal those of an uninterrupted run" in done.stdout
