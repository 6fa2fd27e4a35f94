"""
WikiText-2 (raw) in the tokens of GPT-2 or of another model, with its own three splits.

    python data/wikitext2/prepare.py                                # downloads it, 5 MB
    python data/wikitext2/prepare.py --input TRAIN,VALID,TEST       # from its three files
    python data/wikitext2/prepare.py --input FILE                   # from one of them, split by article

We ran --input only. The download was tested with a stand-in for the hub. Blank lines join the rows of the download, as is
usual in comparisons of GPT-2's perplexity on WikiText-2.
"""

import os
import re
import sys
from dataclasses import dataclass

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(here)))
import dataset  # noqa: E402
import tokenizer  # noqa: E402
from configurator import run  # noqa: E402

HUB = "Salesforce/wikitext"


@dataclass
class Settings:
    # the files train, valid and test with commas between them, or one of them; None: download
    input: str | None = None
    tokenizer: str = "gpt2"  # or a folder with a tokenizer.json, or a model's name on the hub
    out: str | None = None  # folder to write under data/; None: this one


def main(s: Settings):
    folder = dataset.folder(here, s.out)
    paths = s.input.split(",") if s.input else []
    if len(paths) == 1:
        articles = re.split(r"^(?= = [^=])", dataset.read_text(paths[0]), flags=re.MULTILINE)
        dataset.write_documents(folder, articles, s.tokenizer)
        return
    if len(paths) not in (0, 3):
        raise ValueError(f"--input names {len(paths)} files: pass train, valid and test, or one file")
    named = tokenizer.named(s.tokenizer)
    texts = [dataset.read_text(path) for path in paths] or download()
    pieces = ((split, named.encode(text)) for split, text in zip(dataset.SPLITS, texts))
    dataset.write(folder, named.meta, pieces, s.tokenizer)


def download():
    import datasets

    try:
        rows = datasets.load_dataset(HUB, "wikitext-2-raw-v1")
        return ["\n\n".join(rows[split]["text"]) for split in ("train", "validation", "test")]
    except Exception as e:  # of datasets, the hub, requests or httpx, by version and by the state of the network
        raise ValueError(
            f"cannot download {HUB} from the Hugging Face hub ({type(e).__name__}): check the network, or get the files "
            "another way and pass them with --input TRAIN,VALID,TEST"
        ) from None


if __name__ == "__main__":
    run(main, Settings)
