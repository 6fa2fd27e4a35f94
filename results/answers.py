"""
Answers of chat models to the same five questions, side by side: always the most likely token, none is picked.

    python results/answers.py smollm2 out-smollm2-two-16384 out-smollm2-single-16384    # writes results/answers.md
"""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from machine import provenance

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "Explain in two sentences what a computer does.",
    "I have three apples and eat one. How many are left?",
)
TOKENS = 80  # most tokens of an answer


def answer(folder: str, question: str) -> str:
    command = [sys.executable, "sample.py", f"--ckpt={folder}", "--chat=True", f"--prompt={question}"]
    command += ["--temperature=0", f"--max_new_tokens={TOKENS}"]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout


def main(*folders: str):
    origin = provenance()
    lines = [
        "# Five answers",
        "",
        "Always the most likely token, at most 80 tokens. The questions were chosen before any",
    ]
    lines += ["answer was read.", ""] + [f"- {key}: {value}" for key, value in origin.items()]
    for question in QUESTIONS:
        lines += ["", f"## {question}"]
        for folder in folders:
            text = " ".join(answer(folder, question).split()).replace("|", "\\|")
            lines += ["", f"**{Path(folder).name}:** {text}"]
    Path("results/answers.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("written to results/answers.md")


if __name__ == "__main__":
    main(*sys.argv[1:])
