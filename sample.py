"""
Text from any checkpoint, printed as it is generated.

    python sample.py --ckpt out/ --prompt "The "
    python sample.py --ckpt gpt2 --prompt "Once upon a time"
    python sample.py --ckpt HuggingFaceTB/SmolLM2-135M-Instruct --chat=True --prompt "Why is the sky blue?"
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

import checkpoint
from configurator import run
from dataset import read_text
from machine import pick_device, return_freed_memory
from pot import allow_int8_activations
from tokenizer import FileTokenizer, tokenizer_of


@dataclass
class Settings:
    # folder of a checkpoint (float, in training or packed, or in Hugging Face's format); or a name on the hub: gpt2, org/name
    ckpt: str = "out"
    prompt: str = "\n"  # the text to continue
    prompt_file: str | None = None  # a file with the prompt, instead
    chat: bool = False  # the prompt is a question to an instruct model; on a terminal, the conversation goes on
    num_samples: int = 1  # texts
    max_new_tokens: int = 500  # most tokens of a text, which ends earlier at an end-of-text token
    temperature: float = 0.8  # 0: always the most likely token; higher: more surprising
    top_k: int | None = 200  # draw from this many most likely tokens; None: from all
    seed: int = 1337  # same seed, same text
    device: str = "auto"  # "auto", or cuda, mps or cpu


def main(s: Settings):
    if (
        not (s.temperature == 0 or s.temperature >= 1e-6)
        or s.num_samples < 1
        or s.max_new_tokens < 1
        or (s.top_k is not None and s.top_k < 1)
    ):
        raise ValueError(
            "temperature must be at least 0 (and 1e-6 if not 0), num_samples, max_new_tokens and top_k at least 1"
        )
    if s.chat and s.num_samples != 1:
        raise ValueError("num_samples must be 1 with chat, because a conversation goes on from one answer")
    device = pick_device(s.device)
    # Reading a tokenizer takes twice its memory for a moment, so the weights come second.
    meta = checkpoint.finished_tokenizer(s.ckpt)
    tokenizer = tokenizer_of(meta, s.ckpt) if meta else None
    return_freed_memory()
    model, info = checkpoint.load_model(s.ckpt)
    tokenizer = tokenizer or tokenizer_of(info.tokenizer, s.ckpt)
    prompt = read_prompt(s)
    model.to(device)
    allow_int8_activations(model)
    decode = checkpoint.make_decoder(model)
    generator = torch.Generator(device).manual_seed(s.seed)
    count = 0

    def new_tokens(ids):
        nonlocal count
        ids = torch.tensor([ids], device=device)
        for new in model.generate(ids, s.max_new_tokens, s.temperature, s.top_k, generator, decode=decode):
            count += 1
            if int(new) in tokenizer.stops or getattr(sys.stdout, "broken", False):
                return
            yield int(new)

    def write(ids) -> str:
        """Prints what the model writes after ids. Returns it."""
        nonlocal count
        start, count, text = time.time(), 0, ""
        for piece in tokenizer.stream(new_tokens(ids)):
            print(piece, end="", flush=True)
            text += piece
        print(flush=True)
        # To stderr, so that standard output is the text alone.
        speed = count / max(time.time() - start, 1e-9)  # a clock may stand still
        print(f"--- {count} tokens, {speed:,.0f} tokens/s, {s.ckpt} on {device}", file=sys.stderr)
        return text

    if s.chat:
        if not isinstance(tokenizer, FileTokenizer):
            raise ValueError(f"{s.ckpt} has no chat template, so it is no instruct model: leave chat out")
        converse(tokenizer, prompt, write)
        return
    ids = tokenizer.encode(prompt)
    if not ids:  # a tokenizer may leave out white space
        raise ValueError(f"the prompt {prompt!r} has no tokens in the vocabulary of {s.ckpt}: pass another --prompt")
    for _ in range(s.num_samples):
        if getattr(sys.stdout, "broken", False):  # nobody reads it
            return
        print(prompt, end="", flush=True)
        write(ids)


def read_prompt(s: Settings) -> str:
    prompt = read_text(s.prompt_file) if s.prompt_file else s.prompt
    if not prompt or s.chat and not prompt.strip() and not sys.stdin.isatty():
        raise ValueError("the prompt is empty: pass at least one character")
    return prompt


def converse(tokenizer: FileTokenizer, question: str, write: Callable[[list[int]], str]):
    """Answers the question, then those that are typed on a terminal, up to its end (Ctrl-D)."""
    messages = []
    while True:
        if question.strip():
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": write(tokenizer.encode_chat(messages))})
        if not sys.stdin.isatty():
            return
        try:
            question = input("> ")
        except EOFError:
            print()
            return


if __name__ == "__main__":
    run(main, Settings)
