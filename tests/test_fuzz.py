"""Short runs of tests/fuzz.py and tests/kills.py, and a check that fuzz.py reports unexpected errors."""

import subprocess
import sys

import pytest
from conftest import ROOT

import checkpoint


def run(script, *args):
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / script), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_damaged_files_are_rejected_or_run():
    done = run("fuzz.py", "--packed=80", "--checkpoints=40", "--seed=100000")
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("checkpoints 40 of 40") and "'loaded': " in last and "'refused': " in last


@pytest.mark.parametrize("error", ["KeyError('x')", "MemoryError()", "IndexError('out of range')"])
def test_fuzz_reports_unexpected_errors(tmp_path, monkeypatch, error):
    import fuzz as module

    load = checkpoint.load_model

    def broken(folder):
        if "mutant" in folder:
            raise eval(error)
        return load(folder)

    monkeypatch.setattr(checkpoint, "load_model", broken)
    module.write_originals(str(tmp_path))
    with pytest.raises((LookupError, MemoryError)):
        module.main(module.Settings(packed=2, checkpoints=0, worker=str(tmp_path)))


def test_killed_run_resumes():
    done = run("kills.py", "--kills=2")
    assert done.returncode == 0, done.stderr
    assert "the weights equal those of an uninterrupted run" in done.stdout
