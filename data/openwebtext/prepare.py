"""
OpenWebText in the tokens of GPT-2 or of another model. Each document goes whole to train, val or test. Exact duplicates
are left out first.

    python data/openwebtext/prepare.py                       # streams 20,000 documents: about 24 M tokens, 50 MB on disk
    python data/openwebtext/prepare.py --all=True            # all 8 million: about 9 billion tokens, 18 GB
    python data/openwebtext/prepare.py --input FILE.jsonl    # no download: {"text": ...} lines, or text files
    python data/openwebtext/prepare.py --tokenizer=FOLDER --out=NAME    # for another model, to data/NAME

We ran --input only. The stream was tested with a stand-in for the hub, so we do not know whether the hub's parquet
conversion, which is streamed, holds all 8 million documents.
"""

import os
import sys
from dataclasses import dataclass
from itertools import islice

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(here)))
import dataset  # noqa: E402
from configurator import check_minimum, run  # noqa: E402


@dataclass
class Settings:
    documents: int = 20_000  # number of documents from the start of the stream
    all: bool = False  # the whole stream
    input: str | None = None  # .jsonl or text files to use instead of the stream, with commas between them
    tokenizer: str = "gpt2"  # or a folder with a tokenizer.json, or a model's name on the hub
    out: str | None = None  # folder to write under data/; None: this one


def main(s: Settings):
    check_minimum(s, documents=1)
    streamed = islice(dataset.stream_documents(**dataset.OPENWEBTEXT), None if s.all else s.documents)
    folder = dataset.folder(here, s.out)
    dataset.write_documents(folder, dataset.read_documents(s.input) if s.input else streamed, s.tokenizer)


if __name__ == "__main__":
    run(main, Settings)
