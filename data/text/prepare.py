"""
Your own text, in the tokens of the model that learns it. Its size does not matter, above a few contexts of that model.

    python data/text/prepare.py --input=FILE                                   # to data/text, in GPT-2's tokens
    python data/text/prepare.py --input=FILE,FILE --name=mytext                # two files, to data/mytext
    python data/text/prepare.py --input=FILE --name=mytext --tokenizer=FOLDER  # for the model in FOLDER
    python data/text/prepare.py --input=FILE --name=mytext --tokenizer=char    # by characters, to train from scratch

A file is plain text, or .jsonl with a document {"text": ...} in each line. Each file is cut in its order: 80 % of its
tokens are for training, then 10 % for validation and 10 % for test, but at most 500,000 tokens each. So no file is only
trained on, or only tested on. Exact duplicates among the documents are left out first. An end-of-text token follows each
document, if the tokenizer has one.
"""

import os
import sys
from dataclasses import dataclass

import numpy as np

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(here)))
import checkpoint  # noqa: E402
import dataset  # noqa: E402
import tokenizer  # noqa: E402
from configurator import run  # noqa: E402


@dataclass
class Settings:
    input: str | None = None  # text or .jsonl files, with commas between them
    # "gpt2", "char", a folder with a model or a tokenizer.json, or a model's name on the hub
    tokenizer: str = "gpt2"
    name: str = "text"  # of the data set: its folder under data/, and --dataset of train.py and eval.py


def main(s: Settings):
    if not s.input:
        raise ValueError("there is no text: pass --input=FILE, or several files with commas between them")
    folder = dataset.folder(here, s.name)
    files = read(s.input)
    named = named_tokenizer(s.tokenizer, files)
    pieces = (piece for path in files for piece in split(path, files[path], named))
    dataset.write(folder, named.meta, pieces, s.tokenizer)


def read(paths: str) -> dict[str, list[str]]:
    """{path: documents}, without empty documents and exact duplicates."""
    files, seen = {}, set()
    for path in paths.split(","):
        documents = dataset.read_documents(path) if path.endswith(".jsonl") else [dataset.read_text(path)]
        files[path] = [d for d in documents if d.strip() and not (d in seen or seen.add(d))]
    return files


def named_tokenizer(name: str, files: dict[str, list[str]]) -> tokenizer.Tokenizer:
    if name == "char":
        characters = set().union(*(document for documents in files.values() for document in documents))
        return tokenizer.CharTokenizer("".join(sorted(characters)))
    if os.path.isdir(name) and not os.path.exists(os.path.join(name, "tokenizer.json")) and name != "gpt2":
        return tokenizer.tokenizer_of(checkpoint.load_model(name)[1].tokenizer)  # of characters, or GPT-2's
    return tokenizer.named(name)


def split(path, documents, named):
    """Yields (split, token ids) of a file."""
    ids = np.concatenate([np.array(i, dtype=np.int32) for i in named.encode_documents(documents) or [[]]])
    held_out = min(len(ids) // 10, dataset.HELD_OUT)
    if not held_out:
        raise ValueError(f"{path} holds {len(ids)} tokens, too few to cut into train, val and test: pass more text")
    yield "train", ids[: -2 * held_out]
    yield "val", ids[-2 * held_out : -held_out]
    yield "test", ids[-held_out:]


if __name__ == "__main__":
    run(main, Settings)
