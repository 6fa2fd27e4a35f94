"""
Data sets. A data set is a folder with train.bin, val.bin and test.bin (token ids, uint16, or uint32 for a vocabulary
beyond that) and meta.json (the tokenizer, and digests of these files). The scripts under data/ write such folders;
training and evaluation read them.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import tokenizer
from tokenizer import GPT2, CharTokenizer, tokenizer_of, vocab_size

SPLITS = ("train", "val", "test")


def read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as f:
            return f.read()
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text: {e.reason} at byte {e.start}") from None


def read_documents(paths: str) -> Iterator[str]:
    """Yields the documents of files, separated by commas. A .jsonl file has lines {"text": ...}. Any other file is
    text, cut at blank lines into documents of at least 10,000 characters."""
    for path in paths.split(","):
        if not path.endswith(".jsonl"):
            document = ""
            for paragraph in re.findall(r".+?(?:\n\s*\n|\Z)", read_text(path), re.DOTALL):
                document += paragraph
                if len(document) >= 10_000:
                    yield document
                    document = ""
            yield document
            continue
        with open(path, "rb") as f:
            for number, line in enumerate(f, start=1):
                if line.strip():
                    try:
                        text = json.loads(line)["text"]
                        text.encode()  # fails for half a surrogate pair and for anything but text
                    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
                        raise ValueError(
                            f'{path}, line {number} is no {{"text": ...}} ({type(e).__name__}): correct or remove it'
                        ) from None
                    yield text


def stream_documents(hub: str, splits: Iterable[str] = ("train",), revision: str | None = None) -> Iterator[str]:
    """Yields the documents of a data set on the Hugging Face hub that has a column "text"."""
    import datasets

    try:
        for split in splits:
            for row in datasets.load_dataset(hub, revision=revision, split=split, streaming=True):
                yield row["text"]
    except Exception as e:  # of datasets, the hub, requests or httpx, by version and by the state of the network
        raise ValueError(
            f"cannot stream {hub} from the Hugging Face hub ({type(e).__name__}): check the network, or get the text "
            "another way and pass it with --input FILE.jsonl"
        ) from None


# The main branch holds a loading script, which datasets 4 no longer runs. The hub keeps a conversion to parquet.
OPENWEBTEXT = {"hub": "Skylion007/openwebtext", "revision": "refs/convert/parquet"}


def folder(here: str, name: str | None) -> str:
    """Where a prepare.py in the folder `here` writes: there, or to its neighbour `name`. Raises ValueError for a name that
    is a path, and for a neighbour that has its own prepare.py."""
    if name is not None and (os.path.basename(name) != name or name in ("", ".", "..")):
        raise ValueError(f"{name!r} must be the name of a folder under data/, without slashes")
    target = here if name is None else os.path.join(os.path.dirname(here), name)
    if target != here and os.path.exists(os.path.join(target, "prepare.py")):
        raise ValueError(f"data/{name} is made by its own prepare.py: choose another name")
    return target


def token_dtype(meta: dict) -> type:
    """numpy's type of the token ids."""
    return np.uint16 if vocab_size(meta) <= 2**16 else np.uint32


def write(folder: str, meta: dict, pieces: Iterable[tuple[str, np.ndarray]], source: str | None = None) -> None:
    """Writes a data set whole or not at all, and prints its sizes. pieces: (split, token ids), in any order. source: the
    folder or the hub's model whose tokenizer is kept beside them, unless it is GPT-2's or of characters.

    meta.json is removed before the files are replaced, and written last, so that nobody reads the files of two data sets.
    Raises ValueError if another process writes to the folder, and for too little text.
    """
    counts, dtype = dict.fromkeys(SPLITS, 0), token_dtype(meta)
    digests = {split: _digest() for split in SPLITS}
    new = os.path.join(folder, "new.tmp")  # all files, until the disk has them
    with checkpoint.Lock(folder) as lock:
        lock.acquire()
        shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
        try:
            os.mkdir(new)
            with ExitStack() as stack:
                files = {split: stack.enter_context(open(os.path.join(new, f"{split}.bin"), "wb")) for split in SPLITS}
                for split, ids in pieces:
                    content = np.array(ids, dtype=dtype).tobytes()
                    files[split].write(content)
                    digests[split].update(content)
                    counts[split] += len(ids)
                for f in files.values():
                    f.flush()
                    os.fsync(f.fileno())
            if not all(counts.values()):
                raise ValueError(
                    f"too little text to split into train, val and test; the tokens would be {counts}: pass at least 11 "
                    "documents, or a shorter text to data/text/prepare.py, which cuts it at any place"
                )
            tokenizer_is_here = source is not None and os.path.isdir(source) and os.path.samefile(source, folder)
            if source is not None and meta != GPT2 and not tokenizer_is_here:
                checkpoint.keep_tokenizer(new, meta, source)
            content = json.dumps(meta | {"digests": {split: d.hexdigest() for split, d in digests.items()}})
            checkpoint.write(os.path.join(new, "meta.json"), lambda tmp: Path(tmp).write_text(content))
            for name in ("meta.json", *(() if tokenizer_is_here else tokenizer.FILES)):  # of the data set before
                if os.path.exists(os.path.join(folder, name)):
                    os.remove(os.path.join(folder, name))
            for name in sorted(os.listdir(new), key="meta.json".__eq__):
                os.replace(os.path.join(new, name), os.path.join(folder, name))
            checkpoint.sync_folder(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    shown = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    print(f"{os.path.relpath(folder)}: vocabulary of {vocab_size(meta):,}; tokens: {shown}")


def _digest():
    return hashlib.blake2b(digest_size=16)


def write_chars(folder: str, texts: dict[str, str]) -> None:
    """Writes the texts of the three splits as a data set of characters."""
    chars = CharTokenizer("".join(sorted(set().union(*texts.values()))))
    write(folder, chars.meta, ((split, chars.encode(text)) for split, text in texts.items()))


def write_documents(folder: str, documents: Iterable[str], name: str = "gpt2") -> None:
    """Writes texts as a data set for the tokenizer `name`. An end-of-text token follows each document.

    Exact duplicates are left out first. One document in 20 goes to test and one in 20 to val, until these hold HELD_OUT
    tokens each. All others go to train.
    """
    named, seen, number = tokenizer.named(name), set(), 0

    def new(documents):
        for text in tqdm(documents, unit=" documents", disable=None):
            key = hashlib.blake2b(text.encode(), digest_size=8).digest()
            if text.strip() and key not in seen:
                seen.add(key)
                yield text

    def pieces():
        nonlocal number
        held, texts = {"test": 0, "val": 0}, new(documents)
        while batch := list(islice(texts, 256)):  # a batch is encoded in parallel
            for ids in named.encode_documents(batch):
                split = {0: "test", 10: "val"}.get(number % 20, "train")
                if held.get(split, HELD_OUT) >= HELD_OUT:
                    split = "train"
                else:
                    held[split] += len(ids)
                number += 1
                yield split, ids

    write(folder, named.meta, pieces(), name)
    print(f"{number:,} documents, exact duplicates left out")


HELD_OUT = 500_000  # tokens of val and of test


def load(folder: str, *splits: str) -> tuple:
    """(token ids of each split, ..., meta). See load_and_digest."""
    return load_and_digest(folder, *splits)[:-1]


def load_and_digest(folder: str, *splits: str) -> tuple:
    """(token ids of each split, ..., meta, digest of the token ids of all splits). The digest is None for older data sets,
    which have none. The ValueError for a missing data set names the command that makes it.

    If the data set is replaced meanwhile, this gives the old one, or raises ValueError: meta.json is read once, and each
    file is opened once.
    """
    meta_path = os.path.join(folder, "meta.json")
    paths = [os.path.join(folder, f"{split}.bin") for split in splits]
    if unknown := [split for split in splits if split not in SPLITS]:
        raise ValueError(f"unknown split {unknown[0]!r}: choose one of {', '.join(SPLITS)}")
    script = os.path.join(folder, "prepare.py")
    if not all(map(os.path.exists, [*paths, meta_path])):
        raise _missing(folder, script)
    for path in paths:
        tokenizer.require_file(path)
    again = f"make the data set again{f' with `python {script}`' if os.path.exists(script) else ''}"
    try:
        meta = json.loads(tokenizer.read_small(meta_path))
        all_digests = meta.pop("digests", {})
        digests = [all_digests.get(split) for split in splits]
        content = json.dumps(all_digests, sort_keys=True).encode()
        digest = hashlib.blake2b(content, digest_size=16).hexdigest() if all_digests else None
        dtype = token_dtype(meta)
    except FileNotFoundError:  # another process replaces it at this moment
        raise _missing(folder, script) from None
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{meta_path} is damaged ({type(e).__name__}): {again}") from None
    loaded = []
    for path, expected in zip(paths, digests):
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            if size % np.dtype(dtype).itemsize:
                raise ValueError(f"{path} is cut short: {again}")
            if expected is not None and expected != hashlib.file_digest(f, _digest).hexdigest():
                raise ValueError(f"{path} is not the file that {meta_path} was written for: {again}")
            f.seek(0)
            ids = np.fromfile(f, dtype=dtype) if size < 2**20 else np.memmap(f, dtype=dtype, mode="r")
        if len(ids) and ids.max() >= vocab_size(meta):
            raise ValueError(f"{path} holds the token {ids.max()}, unknown to {meta_path}: {again}")
        loaded.append(ids)
    return *loaded, meta, digest


def _missing(folder, script):
    if os.path.exists(script):
        return ValueError(f"the data set {folder} is not there yet: make it with `python {script}`")
    known = sorted(d for d in _subfolders("data") if os.path.exists(f"data/{d}/prepare.py"))
    hint = f": choose one of {', '.join(known)}" if known else ""
    own = f"or make it from your text with `python data/text/prepare.py --input=FILE --name={os.path.basename(folder)}`"
    return ValueError(f"no data set {folder}{hint}, {own}")


def _subfolders(folder):
    return os.listdir(folder) if os.path.isdir(folder) else []


def check_vocabulary(ckpt: str, meta_of_ckpt: dict, name: str, meta: dict) -> None:
    """Raises ValueError if the tokenizer of checkpoint `ckpt` is not that of data set `name`, which is meta."""
    if meta_of_ckpt == meta:
        return
    if meta_of_ckpt.get("tokenizer") == "char":
        raise ValueError(
            f"{ckpt} was trained with another vocabulary than data/{name} has: use the data set it was trained on, or "
            f"prepare your text for it by `python data/text/prepare.py --input=FILE --name=NAME --tokenizer={ckpt}`"
        )
    wanted, script = "gpt2" if meta_of_ckpt == GPT2 else ckpt, os.path.join("data", name, "prepare.py")
    out = "" if os.path.exists(script) else f" --out={name}"
    raise ValueError(
        f"{ckpt} has another vocabulary than data/{name}: prepare that text for it by `python "
        f"{'data/DATASET/prepare.py' if out else script} --tokenizer={wanted}{out}`"
    )


def tokens_for(
    ckpt: str, meta: dict, name: str | None, split: str, text: str | None = None, count: int | None = None
) -> np.ndarray:
    """The first `count` token ids (None: all), (n) uint16 or uint32, of the file `text`, or else of a split of data/name,
    for checkpoint `ckpt` with the tokenizer `meta`. Raises ValueError without a data set, for another vocabulary, and for
    text with unknown characters."""
    if text:
        return np.array(tokenizer_of(meta, ckpt).encode(read_text(text)), dtype=token_dtype(meta))[:count]
    if name is None:
        raise ValueError(f"{ckpt} names no data set: pass --dataset=openwebtext or --text FILE")
    ids, meta_of_data = load(os.path.join("data", name), split)
    check_vocabulary(ckpt, meta, name, meta_of_data)
    return ids[:count]


def windows(ids: np.ndarray, block_size: int, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cuts ids into fixed windows. Yields (x, y) int64 (batch, length). Each id but the first is a target once."""
    n = (len(ids) - 1) // block_size * block_size
    for start in range(0, n, batch_size * block_size):
        end = min(start + batch_size * block_size, n)
        piece = torch.from_numpy(ids[start : end + 1].astype(np.int64))
        yield piece[:-1].view(-1, block_size), piece[1:].view(-1, block_size)
    if n < len(ids) - 1:  # the last window is shorter
        rest = torch.from_numpy(ids[n:].astype(np.int64))
        yield rest[None, :-1], rest[None, 1:]


def random_windows(ids: np.ndarray, length: int, count: int, seed: int) -> torch.Tensor:
    """(count, length) int64: windows at random places of ids. Raises ValueError if ids are fewer than length."""
    if len(ids) < length:
        raise ValueError(f"{len(ids)} tokens are too few to draw windows of {length} from: pass more text")
    places = np.random.default_rng(seed).integers(len(ids) - length + 1, size=count)
    return torch.from_numpy(np.stack([ids[i : i + length] for i in places]).astype(np.int64))
