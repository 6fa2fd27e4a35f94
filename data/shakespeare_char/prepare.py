"""
Tiny Shakespeare by characters: 1.1 MB of plays, split 80/10/10 in order as the PoT papers do.

    python data/shakespeare_char/prepare.py                    # downloads the text
    python data/shakespeare_char/prepare.py --input FILE.txt   # reads it from a file
"""

import http.client
import os
import sys
import urllib.request
from dataclasses import dataclass

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(here)))
import dataset  # noqa: E402
from configurator import run  # noqa: E402

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


@dataclass
class Settings:
    input: str | None = None  # text file to use instead of the download


def main(s: Settings):
    if s.input is None:
        try:
            with urllib.request.urlopen(URL, timeout=60) as response:
                text = response.read().decode("utf-8")
        except (OSError, http.client.HTTPException) as e:
            raise ValueError(
                f"cannot download {URL} ({e}): get the text another way and pass it with --input FILE"
            ) from None
    else:
        text = dataset.read_text(s.input)
    n = len(text)
    if n < 1000:
        raise ValueError(f"{s.input or URL} holds {n} characters: too few to split into train, val and test")
    dataset.write_chars(
        here, {"train": text[: n * 8 // 10], "val": text[n * 8 // 10 : n * 9 // 10], "test": text[n * 9 // 10 :]}
    )


if __name__ == "__main__":
    run(main, Settings)
