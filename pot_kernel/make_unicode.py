"""
Writes unicode.h: which code points are letters and numbers for the package `tokenizers`, whose cuts run.cpp repeats. Each
part of that package has its own version of Unicode, so this script asks the package itself.

    python pot_kernel/make_unicode.py
"""

import os

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]  # surrogates are no characters


def removed_by(pattern: str) -> set[int]:
    """The code points that a regular expression matches."""
    text = "".join(map(chr, CODE_POINTS))
    return set(CODE_POINTS) - set(map(ord, normalizers.Replace(Regex(pattern), "").normalize_str(text)))


def cut_by_digits() -> set[int]:
    """The code points that the pre-tokenizer Digits cuts off."""
    cut = pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str
    return {c for c in CODE_POINTS if len(cut(f"a{chr(c)}a")) > 1}


def table(name: str, points: set[int], comment: str) -> str:
    ranges = []
    for c in sorted(points):
        if ranges and ranges[-1][1] == c - 1:
            ranges[-1][1] = c
        else:
            ranges.append([c, c])
    lines, line = [], "   "
    for first, last in ranges:
        item = f" {{{first:#x}, {last:#x}}},"
        if len(line) + len(item) > 120:
            lines.append(line)
            line = "   "
        line += item
    body = "\n".join([*lines, line])
    return f"// {comment}\nconst uint32_t {name}[][2] = {{\n{body}\n}};\n"


def main():
    numbers = removed_by(r"\p{N}")
    parts = [
        f"// Code points as the package tokenizers {tokenizers.__version__} has them, for run.cpp: ranges (first, last) in\n"
        "// ascending order. make_unicode.py wrote this file.\n\n#include <cstdint>\n",
        table("LETTERS", removed_by(r"\p{L}"), r"\p{L} of regular expressions"),
        table("NUMBERS", numbers, r"\p{N} of regular expressions"),
        table("NEW_NUMBERS", cut_by_digits() - numbers, "numbers that only the pre-tokenizer Digits knows"),
    ]
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "unicode.h"), "w") as f:
        f.write("\n".join(parts))


if __name__ == "__main__":
    main()
