"""
OpenWebText in GPT-2's tokens. Each document goes whole to train, val or test; exact duplicates are left out first.

    python data/openwebtext/prepare.py                       # streams 20,000 documents: about 24 M tokens, 50 MB on disk
    python data/openwebtext/prepare.py --documents=None      # all 8 million: about 9 billion tokens, 18 GB
    python data/openwebtext/prepare.py --input FILE.jsonl    # no download: {"text": ...} lines, or text files

Only --input was run by us; the stream was tried with a stand-in for the hub.
"""

import os
import sys
from dataclasses import dataclass
from itertools import islice

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(here)))
import dataset  # noqa: E402
from configurator import run  # noqa: E402

HUB = "Skylion007/openwebtext"


@dataclass
class Settings:
    documents: int | None = 20_000  # the first so many; None: all
    input: str | None = None  # .jsonl or text files, commas between them, instead of the download


def main(s: Settings):
    if s.documents is not None and s.documents < 1:
        raise ValueError(f"documents={s.documents} must be at least 1, or None for all")
    documents = dataset.read_documents(s.input) if s.input else stream()
    dataset.write_documents(here, islice(documents, s.documents))


def stream():
    import datasets

    try:
        # Its main branch was a loading script, which datasets 4 no longer runs; the hub keeps a conversion.
        rows = datasets.load_dataset(HUB, revision="refs/convert/parquet", split="train", streaming=True)
        for row in rows:
            yield row["text"]
    except Exception as e:  # of datasets, the hub, requests or httpx, by version and by what is wrong with the network
        raise ValueError(
            f"cannot stream {HUB} from the Hugging Face hub ({type(e).__name__}): check the network, or get the text "
            "another way and pass it with --input FILE.jsonl"
        ) from None


if __name__ == "__main__":
    run(main, Settings)
