"""
OpenWebText in GPT-2's tokens. Each document goes whole to train, val or test; exact duplicates are left out first.

    python data/openwebtext/prepare.py                       # streams 20,000 documents: about 24 M tokens, 50 MB on disk
    python data/openwebtext/prepare.py --all=True            # all 8 million: about 9 billion tokens, 18 GB
    python data/openwebtext/prepare.py --input FILE.jsonl    # no download: {"text": ...} lines, or text files

Only --input was run by us; the stream was tried with a stand-in for the hub, so it is not known whether the hub's
conversion to Parquet, which is what streams, has all 8 million.
"""

import os
import sys
from dataclasses import dataclass
from itertools import islice

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(here)))
import dataset  # noqa: E402
from configurator import check_minimum, run  # noqa: E402

HUB = "Skylion007/openwebtext"


@dataclass
class Settings:
    documents: int = 20_000  # the first so many of the stream
    all: bool = False  # the whole stream
    input: str | None = None  # .jsonl or text files, commas between them, all of them, instead of the stream


def main(s: Settings):
    check_minimum(s, documents=1)
    documents = dataset.read_documents(s.input) if s.input else islice(stream(), None if s.all else s.documents)
    dataset.write_documents(here, documents)


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
