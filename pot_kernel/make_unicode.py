"""
Writes unicode.h: which code points are letters, numbers and white space for the package `tokenizers`, whose cuts run.cpp
repeats. Each part of that package has its own version of Unicode, so this script asks the package itself.

    python pot_kernel/make_unicode.py
"""

import os

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]  # surrogates are no characters
HEADER = f"""// Code points as the package tokenizers {tokenizers.__version__} has them, for run.cpp. make_unicode.py wrote this file.

#include <algorithm>
#include <cstdint>
#include <iterator>

enum Kind : uint32_t {{
    LETTER,  // \\p{{L}} of regular expressions
    NUMBER,  // \\p{{N}}
    SPACE,   // \\s
    DIGIT,   // a number that the pre-tokenizer Digits cuts off
    OTHER,
}};

struct KindRange {{
    uint32_t first, last;  // code points
    Kind kind;
}};

// digits: the pre-tokenizer Digits is there. It knows more numbers than the regular expressions.
inline Kind kind_of(uint32_t code, bool digits) {{
    static const KindRange ranges[] = {{  // in ascending order
"""
FOOTER = """    };
    const auto before = [](const KindRange& range, uint32_t c) { return range.last < c; };
    const auto* range = std::lower_bound(std::begin(ranges), std::end(ranges), code, before);
    const Kind kind = range != std::end(ranges) && range->first <= code ? range->kind : OTHER;
    return digits && kind == NUMBER ? DIGIT : !digits && kind == DIGIT ? OTHER : kind;
}
"""


def removed_by(pattern: str) -> set[int]:
    """The code points that a regular expression matches."""
    text = "".join(map(chr, CODE_POINTS))
    return set(CODE_POINTS) - set(map(ord, normalizers.Replace(Regex(pattern), "").normalize_str(text)))


def cut_by_digits() -> set[int]:
    """The code points that the pre-tokenizer Digits cuts off."""
    cut = pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str
    return {c for c in CODE_POINTS if len(cut(f"a{chr(c)}a")) > 1}


def main():
    kinds = dict.fromkeys(cut_by_digits(), "DIGIT")
    for name, pattern in ("LETTER", r"\p{L}"), ("NUMBER", r"\p{N}"), ("SPACE", r"\s"):
        kinds |= dict.fromkeys(removed_by(pattern), name)
    ranges = []
    for c in sorted(kinds):
        if ranges and ranges[-1][1:] == [c - 1, kinds[c]]:
            ranges[-1][1] = c
        else:
            ranges.append([c, c, kinds[c]])
    lines, line = [], " " * 7
    for first, last, kind in ranges:
        item = f" {{{first:#x}, {last:#x}, {kind}}},"
        if len(line) + len(item) > 120:
            lines.append(line)
            line = " " * 7
        line += item
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "unicode.h"), "w") as f:
        f.write(HEADER + "\n".join([*lines, line]) + "\n" + FOOTER)


if __name__ == "__main__":
    main()
