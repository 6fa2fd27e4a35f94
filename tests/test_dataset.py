import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dataset

ROOT = Path(__file__).parent.parent


def test_windows_cover_every_position_once():
    for n, size, batch in ((100, 8, 4), (65, 8, 3), (66, 8, 100), (5, 8, 1), (2, 8, 1), (17, 1, 5)):
        ids = np.random.default_rng(0).integers(0, 999, n).astype(np.uint16)
        found = list(dataset.windows(ids, size, batch))
        assert torch.cat([y.flatten() for _, y in found]).tolist() == ids[1:].tolist()
        assert torch.cat([x.flatten() for x, _ in found]).tolist() == ids[:-1].tolist()
        assert all(x.shape == y.shape and x.shape[1] <= size and len(x) <= batch for x, y in found)


def test_write_load_and_text_roundtrip(tmp_path):
    texts = {"train": "abc\n" * 10, "val": "xyz", "test": "äb"}
    dataset.write_chars(tmp_path, texts)
    for split, text in texts.items():
        ids, meta = dataset.load(tmp_path, split)
        tokenizer = dataset.tokenizer_of(meta)
        assert ids.dtype == np.uint16 and tokenizer.decode_bytes(ids.tolist()).decode() == text
        assert tokenizer.encode(text) == ids.tolist() and tokenizer.vocab_size == 8
    with pytest.raises(ValueError, match="'q' is not in this model's vocabulary of 8"):
        tokenizer.encode("q")
    with pytest.raises(ValueError, match="unknown split 'all'"):
        dataset.load(tmp_path, "all")
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(ValueError, match="meta.json is damaged"):
        dataset.load(tmp_path, "val")


def test_missing_data_names_the_command(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="no data set data/nowhere: choose one of pydoc_char, shakespeare_char"):
        dataset.load("data/nowhere", "train")


@pytest.fixture
def scripts(tmp_path):
    """The data scripts in a place of their own, so that a user's data stay untouched."""
    for path in ("dataset.py", "configurator.py", "data/pydoc_char/prepare.py", "data/shakespeare_char/prepare.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text((ROOT / path).read_text())

    def run(name, *args):
        return subprocess.run(
            [sys.executable, f"data/{name}/prepare.py", *args], cwd=tmp_path, capture_output=True, text=True
        )

    return run, tmp_path / "data"


def test_shakespeare_char(scripts, tmp_path):
    run, data = scripts
    text = "".join(f"line {i}\n" for i in range(500))
    (tmp_path / "plays.txt").write_text(text)
    done = run("shakespeare_char", "--input", str(tmp_path / "plays.txt"))
    assert done.returncode == 0, done.stderr
    parts = []
    for split in dataset.SPLITS:
        ids, meta = dataset.load(data / "shakespeare_char", split)
        parts.append(dataset.tokenizer_of(meta).decode(ids.tolist()))
    assert "".join(parts) == text  # in order, no overlap, nothing lost
    assert [round(len(p) / len(text), 2) for p in parts] == [0.8, 0.1, 0.1]
    for args in (("--input", "nowhere.txt"), ("--inptu", "x")):
        done = run("shakespeare_char", *args)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


def test_pydoc_char(scripts):
    run, data = scripts
    done = run("pydoc_char")
    assert done.returncode == 0, done.stderr
    texts = {}
    for split in dataset.SPLITS:
        ids, meta = dataset.load(data / "pydoc_char", split)
        texts[split] = dataset.tokenizer_of(meta).decode(ids.tolist())
    assert len(texts["train"]) > 1_000_000 and min(len(texts["val"]), len(texts["test"])) > 100_000
    assert set("".join(texts.values())) <= {"\n", *map(chr, range(32, 127))}
    # No paragraph but the shortest is in two splits.
    seen = {split: {p for p in text.split("\n\n") if len(p) >= 100} for split, text in texts.items()}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not seen[a] & seen[b]
