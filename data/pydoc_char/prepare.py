"""
Python's own documentation by characters: the help topics and the docstrings of the standard library. Every CPython has
these megabytes of English, so no network is needed. The text differs a little between Python versions.

    python data/pydoc_char/prepare.py
"""

import ast
import hashlib
import os
import sys
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(here)))
import dataset  # noqa: E402
from configurator import run  # noqa: E402


@dataclass
class Settings:
    pass


def main(s: Settings):
    documents, seen = [], set()  # a document is a help topic, or the docstrings of a module
    for texts in (*topics(), *docstrings()):
        kept = []
        for paragraph in (p for text in texts for p in clean(text).split("\n\n")):
            # Help topics quote each other and modules copy docstrings. No paragraph may be in two splits.
            if len(paragraph) < 100 or paragraph not in seen:
                kept.append(paragraph)
                seen.add(paragraph)
        if kept:
            documents.append("\n\n".join(kept) + "\n\n")
    # Sorted by hash: a random order that is the same on every machine.
    documents.sort(key=lambda d: hashlib.sha256(d.encode()).digest())
    splits = {"train": [], "val": [], "test": []}
    total, done = sum(map(len, documents)), 0
    for document in documents:  # a document is never cut in two
        splits["train" if done < 0.8 * total else "val" if done < 0.9 * total else "test"].append(document)
        done += len(document)
    print(f"Python {sys.version.split()[0]}: {len(documents):,} documents")
    dataset.write_chars(here, {name: "".join(docs) for name, docs in splits.items()})


def parse(path):
    """Syntax tree of a source file, which is not run. None if this Python cannot parse it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return None


def topics():
    """The texts of help("topic"), a document each."""
    tree = parse(Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py"))
    values = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    return [[text] for text in ast.literal_eval(values[0]).values()]


def docstrings():
    """All docstrings of a module, a document each."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not {"site-packages", "dist-packages", "test", "tests", "pydoc_data"} & set(parts) and (tree := parse(path)):
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            yield [d for node in ast.walk(tree) if isinstance(node, kinds) and (d := ast.get_docstring(node))]


def clean(text):
    """ASCII only, so that the vocabulary is small and nearly the same everywhere."""
    text = "\n".join(line.rstrip() for line in text.expandtabs().splitlines()).strip()
    return "".join(c for c in text if c == "\n" or " " <= c <= "~")


if __name__ == "__main__":
    run(main, Settings)
