"""
The texts of SmolLM2's figures, in its tokens, as data sets:

    data/smollm2-web     train: documents 0 to 699 of OpenWebText and, on request, film reviews; val: documents 700 to 799;
                         test: documents 800 to 999
    data/smollm2-wiki    WikiText-2's raw validation text. val: the first 16,384 tokens; test: the last 65,536; train: the
                         rest, which is not used

Calibration and training use train. Choices are made on val. The figures that are reported come from test alone.

    python results/smollm2_texts.py openwebtext.jsonl wikitext2_valid.txt [reviews.jsonl[.xz] TOKENS]
"""

import json
import lzma
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint
import dataset
import tokenizer

VAL, TEST = 16_384, 65_536  # tokens of WikiText-2


def documents(path):
    with (lzma.open if path.endswith(".xz") else open)(path, "rt", encoding="utf-8") as f:
        for line in f:
            yield json.loads(line)["text"]


def main(web, wiki, reviews=None, tokens=0):
    named = tokenizer.named("smollm2")

    def web_pieces():
        for i, ids in enumerate(named.encode_documents(list(documents(web)))):
            yield "train" if i < 700 else "val" if i < 800 else "test", ids
        left = int(tokens)
        for text in documents(reviews) if left > 0 else ():
            (ids,) = named.encode_documents([text])
            yield "train", ids
            left -= len(ids)
            if left <= 0:
                return

    ids = named.encode(Path(wiki).read_text(encoding="utf-8"), special=False)
    wiki_pieces = [("val", ids[:VAL]), ("train", ids[VAL:-TEST]), ("test", ids[-TEST:])]
    for name, pieces in (("smollm2-web", web_pieces()), ("smollm2-wiki", wiki_pieces)):
        folder = f"data/{name}"
        dataset.write(folder, named.meta, pieces)
        checkpoint.keep_tokenizer(folder, named.meta, "smollm2")


if __name__ == "__main__":
    main(*sys.argv[1:])
