"""
1,000 documents of OpenWebText, then the film reviews of the Large Movie Review Dataset (Maas et al. 2011), in GPT-2's
tokens: enough to train a small GPT from scratch.

    python data/webtext/prepare.py                                    # streams both: about 29 M tokens, 60 MB on disk
    python data/webtext/prepare.py --input OPENWEBTEXT,REVIEWS        # no download: two .jsonl or text files

Each document goes whole to train, val or test. Exact duplicates are left out first. We ran --input only.
"""

import os
import sys
from dataclasses import dataclass
from itertools import chain, islice

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(here)))
import dataset  # noqa: E402
from configurator import run  # noqa: E402


@dataclass
class Settings:
    input: str | None = None  # .jsonl or text files to use instead of the streams, with commas between them
    tokenizer: str = "gpt2"  # or a folder with a tokenizer.json, or a model's name on the hub
    out: str | None = None  # folder to write under data/; None: this one


def main(s: Settings):
    reviews = dataset.stream_documents("stanfordnlp/imdb", ("train", "test", "unsupervised"))
    streamed = chain(islice(dataset.stream_documents(**dataset.OPENWEBTEXT), 1000), reviews)
    folder = dataset.folder(here, s.out)
    dataset.write_documents(folder, dataset.read_documents(s.input) if s.input else streamed, s.tokenizer)


if __name__ == "__main__":
    run(main, Settings)
