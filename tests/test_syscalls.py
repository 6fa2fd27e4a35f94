"""A short run of tests/syscalls.py, and checks that it finds what it looks for."""

import shutil
import subprocess
import sys

import pytest
import syscalls
from conftest import ROOT


def strace_works():
    command = ["strace", "-e", "trace=none", "true"]  # containers may forbid it
    return shutil.which("strace") and not subprocess.run(command, capture_output=True).returncode


needs_strace = pytest.mark.skipif(not strace_works(), reason="needs strace, and the right to trace")


def run(script, *arguments):
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, timeout=600)


@needs_strace
def test_failed_and_killed_calls():
    done = run("import syscalls; syscalls.configurator.run(syscalls.main, syscalls.Settings)",
               "--writer=data/shakespeare_char", "--faults=12")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 faults" in done.stdout and ", 0 findings" in done.stdout


BROKEN = """
import os, pathlib, syscalls
os.replace = lambda source, target: pathlib.Path(target).write_bytes(pathlib.Path(source).read_bytes())
syscalls.configurator.run(syscalls.main, syscalls.Settings)
"""


@needs_strace
def test_broken_writers_are_noticed():
    """Files are written in place: a death leaves meta.json empty, and a loss of power as well."""
    done = run(BROKEN, "--writer=data/shakespeare_char")
    assert done.returncode == 1, done.stdout + done.stderr
    for problem in (
        "no fsync after the last write: ",
        "neither an old nor a new version",
        "the outputs are not whole: ",
    ):
        assert problem in done.stdout


def test_calls_of_a_trace():
    """Each process counts its own calls. Paths are whole, whatever they are relative to."""
    trace = """\
1 openat(AT_FDCWD</disk>, "out/a.tmp", O_WRONLY|O_CREAT, 0666) = 3</disk/out/a.tmp>
2 write(3</disk/out/b>, ""..., 10) = 10
1 write(3</disk/out/a.tmp>, ""..., 10) = -1 ENOSPC (No space left on device) (INJECTED)
1 write(3</disk/out/a.tmp>, ""..., 10) = 10
1 rename("out/a.tmp", "/disk/out/a") = 0
1 unlinkat(4</disk/out>, "c", 0) = 0
1 +++ exited with 0 +++
"""
    calls = syscalls.calls_of(trace, "/disk")
    expected = [("openat", 1, ["out/a.tmp"]), ("write", 1, ["out/b"]), ("write", 1, ["out/a.tmp"])]
    expected += [("write", 2, ["out/a.tmp"]), ("rename", 1, ["out/a.tmp", "out/a"]), ("unlinkat", 1, ["out/c"])]
    assert [(c.name, c.number, c.paths) for c in calls] == [(n, k, [f"/disk/{p}" for p in ps]) for n, k, ps in expected]
    problems = syscalls.not_durable(calls, ["/disk/out"], ())
    assert sum("renamed before fsync: /disk/out/a.tmp" in p for p in problems) == 1
    assert sum("no fsync after the last write: /disk/out/b" in p for p in problems) == 1
    assert sum("no fsync of the folder after the last change: /disk/out" in p for p in problems) == 1
