"""
A data set is a folder: train.bin, val.bin and test.bin (token ids, uint16) and meta.json (the tokenizer). Scripts under
data/ write such folders; training and evaluation read them here.
"""

import json
import os

import numpy as np
import torch

SPLITS = ("train", "val", "test")


class CharTokenizer:
    """One token a character."""

    def __init__(self, chars: str):
        self.chars = chars
        self.ids = {c: i for i, c in enumerate(chars)}

    @property
    def vocab_size(self):
        return len(self.chars)

    def encode(self, text: str) -> list[int]:
        try:
            return [self.ids[c] for c in text]
        except KeyError as e:
            raise ValueError(
                f"the character {e.args[0]!r} is not in this model's vocabulary of {len(self.chars)} characters"
            ) from None

    def decode(self, ids) -> str:
        return "".join(self.chars[i] for i in ids)


def tokenizer_of(meta: dict) -> CharTokenizer:
    """Tokenizer that a meta.json or a checkpoint describes."""
    if not isinstance(meta, dict) or meta.get("tokenizer") != "char" or not isinstance(meta.get("chars"), str):
        raise ValueError("unknown tokenizer: expected a data set or checkpoint of characters")
    return CharTokenizer(meta["chars"])


def read_text(path) -> str:
    try:
        with open(path, encoding="utf-8") as f:
            return f.read()
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text: {e.reason} at byte {e.start}") from None


def write(folder, texts: dict[str, str]):
    """Writes the texts of the three splits as a character data set; prints what it holds."""
    tokenizer = CharTokenizer("".join(sorted(set().union(*texts.values()))))
    files = {"meta.json": json.dumps({"tokenizer": "char", "chars": tokenizer.chars}).encode()}
    for split in SPLITS:
        files[f"{split}.bin"] = np.array(tokenizer.encode(texts[split]), dtype=np.uint16).tobytes()
    for name, content in files.items():
        with open(os.path.join(folder, name + ".tmp"), "wb") as f:
            f.write(content)
    for name in files:
        os.replace(os.path.join(folder, name + ".tmp"), os.path.join(folder, name))
    counts = ", ".join(f"{split} {len(texts[split]):,}" for split in SPLITS)
    print(f"{os.path.relpath(folder)}: {tokenizer.vocab_size} characters; tokens: {counts}")


def load(folder, split) -> tuple[np.ndarray, dict]:
    """(token ids, meta) of one split. Raises ValueError that names the command which makes the data set."""
    path, meta_path = os.path.join(folder, f"{split}.bin"), os.path.join(folder, "meta.json")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    script = os.path.join(folder, "prepare.py")
    if not os.path.exists(path) or not os.path.exists(meta_path):
        if os.path.exists(script):
            raise ValueError(f"the data set {folder} is not there yet: make it with `python {script}`")
        here = (
            sorted(d for d in os.listdir("data") if os.path.exists(f"data/{d}/prepare.py"))
            if os.path.isdir("data")
            else []
        )
        raise ValueError(f"no data set {folder}: choose one of {', '.join(here)}" if here else f"no data set {folder}")
    with open(meta_path) as f:
        try:
            meta = json.load(f)
        except ValueError:
            raise ValueError(f"{meta_path} is damaged: make the data set anew with `python {script}`") from None
    if os.path.getsize(path) % 2:
        raise ValueError(f"{path} is cut short: make the data set anew with `python {script}`")
    small = os.path.getsize(path) < 2**20
    ids = np.fromfile(path, dtype=np.uint16) if small else np.memmap(path, dtype=np.uint16, mode="r")
    if len(ids) and ids.max() >= tokenizer_of(meta).vocab_size:
        raise ValueError(
            f"{path} holds the token {ids.max()}, unknown to {meta_path}: make the data set anew with `python {script}`"
        )
    return ids, meta


def check_vocabulary(folder, theirs, name, meta):
    """Raises ValueError if a checkpoint's tokenizer is not that of the data set."""
    if theirs != meta:
        raise ValueError(
            f"{folder} was trained with another vocabulary than data/{name} has: use the data set it was trained on"
        )


def windows(ids, block_size, batch_size):
    """Cuts ids into fixed windows, yields (x, y) int64 (batch, length): each position but the first is a target once."""
    n = (len(ids) - 1) // block_size * block_size
    x = torch.from_numpy(ids[:n].astype(np.int64)).view(-1, block_size)
    y = torch.from_numpy(ids[1 : n + 1].astype(np.int64)).view(-1, block_size)
    yield from zip(x.split(batch_size), y.split(batch_size))
    if n < len(ids) - 1:  # the rest, a shorter window
        rest = torch.from_numpy(ids[n:].astype(np.int64))
        yield rest[None, :-1], rest[None, 1:]
