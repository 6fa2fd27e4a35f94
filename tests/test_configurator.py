"""configurator.py: config files, command-line keys, errors and --help."""

import dataclasses
import importlib
import os
import re
import sys

import pytest

from configurator import configure, run
from pot import PoTConfig


@dataclasses.dataclass
class Settings:
    learning_rate: float = 1e-3  # highest
    max_iters: int = 10  # steps
    block_size: int | None = None  # context
    out_dir: str = "out"  # folder
    compile: bool = False  # compile
    pot: PoTConfig | None = None  # quantize

    # --- a heading ---
    # a comment above a field, of more than
    # one line
    seed: int = 1


def parse(text):
    return configure(Settings, text.split())


def test_order_types_and_both_option_forms(tmp_path):
    path = tmp_path / "c.py"
    path.write_text("import math\nmax_iters = 5\nlearning_rate = 1\nblock_size = None\n_hidden = 3\n")
    s = parse(f"--max_iters=3 {path} --out_dir a=b --compile=True --block_size 7")
    assert s == Settings(1.0, 5, 7, "a=b", True)
    assert type(s.learning_rate) is float
    assert parse(f"{path} --max_iters=6").max_iters == 6
    assert parse("--block_size=None --learning_rate 1e-4") == Settings(1e-4)


def test_fields_of_a_nested_dataclass(tmp_path):
    path = tmp_path / "c.py"
    path.write_text("pot_bits = 3\npot_granularity = 'channel'\n")
    assert parse("").pot is None
    assert parse(str(path)).pot == PoTConfig(bits=3, granularity="channel")
    assert parse(f"{path} --pot_bits=4 --pot_act_bits=8").pot == PoTConfig(granularity="channel", act_bits=8)
    assert parse(f"{path} --pot=None").pot is None
    assert parse(f"{path} --pot=None --pot_bits=5").pot == PoTConfig(bits=5)
    assert parse("--pot_range=5").pot == PoTConfig(range=5)


def test_inherited_settings():
    @dataclasses.dataclass
    class Resumed(Settings):
        @staticmethod
        def inherited(given):
            old = {"max_iters": 7, "learning_rate": 2, "pot": {"bits": 3, "granularity": "channel"}, "unknown": 1}
            return old if given.get("out_dir") == "old" else {"seed": "x"} if given.get("out_dir") == "bad" else {}

    def parse(text):
        return configure(Resumed, text.split())

    assert parse("") == Resumed()
    expected = Resumed(2.0, 7, out_dir="old", pot=PoTConfig(bits=3, granularity="channel"))
    assert parse("--out_dir=old") == expected
    given = parse("--out_dir=old --max_iters=10 --pot_bits=4")  # also a value that is the default
    assert given == dataclasses.replace(expected, max_iters=10, pot=PoTConfig(bits=4, granularity="channel"))
    assert parse("--out_dir=old --pot=None").pot is None
    with pytest.raises(ValueError, match="seed='x': expected an integer"):
        parse("--out_dir=bad")


@pytest.mark.parametrize(
    "text, message",
    [
        ("--learning_rat=1", "unknown key --learning_rat: did you mean --learning_rate"),
        ("--pot_bit=4", "did you mean --pot_bits"),
        ("--lr=1", "did you mean --learning_rate"),
        ("--epochs=1", "did you mean --max_iters"),
        ("--iters=1", "did you mean --max_iters"),
        ("--bits=3", "did you mean --pot_bits"),
        ("--max_iters=1.5", "--max_iters=1.5: expected an integer"),
        ("--max_iters=None", "expected an integer"),
        ("--block_size=x", "expected an integer or None"),
        ("--compile=1", "expected True or False"),
        ("--learning_rate=fast", "expected a number"),
        ("--pot=4", "expected None; set its parts"),
        ("--pot_bits=9", "bits=9 is not possible"),
        ("--out_dir", "--out_dir needs a value"),
        ("--out_dir=a\udcff", "is not UTF-8 text"),
        (f"--max_iters={2**63}", "is beyond 64 bits"),
        (f"--max_iters={'9' * 5000}", "expected an integer"),
        ("config/nowhere.py", "no config file config/nowhere.py"),
    ],
)
def test_errors_on_the_command_line(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize(
    "content, message",
    [
        ("max_iter = 3", "c.py: max_iter: did you mean .*max_iters"),
        ("max_iters = 3.0", "max_iters=3.0: expected an integer"),
        ("compile = 1", "expected True or False"),
        ("max_iters = ", "does not run: SyntaxError"),
        ("max_iters = 1 / 0", "does not run: ZeroDivisionError"),
        ("import sys; sys.exit(0)", "does not run: SystemExit"),
    ],
)
def test_errors_in_config_files(tmp_path, content, message):
    (tmp_path / "c.py").write_text(content)
    with pytest.raises(ValueError, match=message):
        parse(str(tmp_path / "c.py"))


@pytest.mark.parametrize(
    "error, message",
    [
        (MemoryError(), "MemoryError: not enough memory"),
        (OverflowError("int too large"), "OverflowError: int too large"),
        (RecursionError("maximum"), "RecursionError: maximum"),
        (RuntimeError("[alloc_cpu.cpp:1] can't allocate memory:\nyou tried"), "can't allocate memory: you tried"),
        (RuntimeError("Storage size calculation overflowed"), "size calculation overflowed"),
        (ValueError("\x1b[31mred"), r"error: \\x1b\[31mred"),
        (ValueError("no folder 日本\u3000語"), "error: no folder 日本\u3000語"),
        (OSError(28, "No space left on device", "out"), "No space left on device: out"),
        (RuntimeError("our mistake"), None),
    ],
)
def test_errors_of_a_script(monkeypatch, capsys, error, message):
    def main(s):
        raise error

    monkeypatch.setattr("sys.argv", ["script.py"])
    with pytest.raises(SystemExit if message else RuntimeError):
        run(main, Settings)
    shown = capsys.readouterr().err
    assert message is None or re.search(message, shown) and shown.count("\n") == 1 and shown.startswith("script.py: ")


def test_script_ends_its_work_though_nobody_reads_it(monkeypatch, tmp_path):
    """After `| head -1`, and with closed standard output and error."""
    done = []

    def main(s):
        for _ in range(3):
            print("text", flush=True)
            print("text", file=sys.stderr, flush=True)
            assert not sys.stderr.isatty()
            done.append(sys.stdout.broken)

    monkeypatch.setattr("sys.argv", ["script.py"])
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        monkeypatch.setattr("sys.stdout", broken)
        monkeypatch.setattr("sys.stderr", None)
        run(main, Settings)
    assert done == [True] * 3
    monkeypatch.setattr("sys.stdout", None)
    run(main, Settings)
    assert done[3:] == [False] * 3


def test_characters_that_a_terminal_does_not_know(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["script.py"])
    with open(tmp_path / "shown", "w", encoding="ascii") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        run(lambda s: print("0.5 ± 0.1"), Settings)
    assert (tmp_path / "shown").read_text() == "0.5 \\xb1 0.1\n"


def test_long_values_make_no_long_error(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", "--seed=" + "9" * 100_000])
    with pytest.raises(SystemExit) as e:
        run(lambda s: None, Settings)
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.startswith("script.py: error: --seed=999") and len(error) < 1100


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit) as e:
        parse("--help")
    text = capsys.readouterr().out
    assert e.value.code == 0
    for part in ("--learning_rate=0.001", "highest", "--pot_bits=4", "bits of a code", "--pot=None"):
        assert part in text
    assert "--seed=1" in text and text.endswith("  a comment above a field, of more than one line\n")


SCRIPTS = ["train", "eval", "sample", "sweep", "bench", "extras.bertscore", "extras.export", "extras.plot"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_setting_has_a_help_text(name, capsys):
    with pytest.raises(SystemExit):
        configure(importlib.import_module(name).Settings, ["--help"])
    for line in capsys.readouterr().out.splitlines()[2:]:
        assert re.fullmatch(r"  --\w+=.*?  +\S.*", line) and not line.endswith(("of", "the", ",")), line
