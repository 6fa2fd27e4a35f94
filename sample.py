"""
Text from any checkpoint, printed as it is generated.

    python sample.py --ckpt out/ --prompt "The "
    python sample.py --ckpt gpt2 --prompt "Once upon a time"
"""

import codecs
import sys
import time
from dataclasses import dataclass

import torch

import checkpoint
import dataset
from configurator import run
from machine import pick_device
from pot import allow_int8_activations


@dataclass
class Settings:
    # folder of a checkpoint (float, in training or packed) or of GPT-2; or gpt2, gpt2-medium, ...
    ckpt: str = "out"
    prompt: str = "\n"  # the text to continue
    prompt_file: str | None = None  # a file with the prompt, instead
    num_samples: int = 1  # texts
    max_new_tokens: int = 500  # tokens a text
    temperature: float = 0.8  # 0: always the most likely token; higher: more surprising
    top_k: int | None = 200  # draw from this many most likely tokens; None: from all
    seed: int = 1337  # same seed, same text
    device: str = "auto"  # "auto", or cuda, mps or cpu


def main(s: Settings):
    if not s.temperature >= 0 or s.num_samples < 1 or s.max_new_tokens < 1 or (s.top_k is not None and s.top_k < 1):
        raise ValueError("temperature must be at least 0, num_samples, max_new_tokens and top_k at least 1")
    device = pick_device(s.device)
    model, info = checkpoint.load_model(s.ckpt)
    tokenizer = dataset.tokenizer_of(info.tokenizer)
    prompt = dataset.read_text(s.prompt_file) if s.prompt_file else s.prompt
    if not prompt:
        raise ValueError("the prompt is empty: pass at least one character")
    try:
        prompt.encode()
    except UnicodeEncodeError:  # the command line holds bytes that are no UTF-8
        raise ValueError("the prompt is not UTF-8 text: correct it, or pass a file by --prompt_file") from None
    ids = torch.tensor([tokenizer.encode(prompt)], device=device)
    model.to(device)
    decode = checkpoint.make_decoder(model)
    allow_int8_activations(model)  # for the prompt of a packed model
    generator = torch.Generator(device).manual_seed(s.seed)
    for _ in range(s.num_samples):
        print(prompt, end="", flush=True)
        start, utf8 = time.time(), codecs.getincrementaldecoder("utf-8")("replace")  # a token may be part of a letter
        for new in model.generate(ids, s.max_new_tokens, s.temperature, s.top_k, generator, decode=decode):
            print(utf8.decode(tokenizer.decode_bytes(new[0].tolist())), end="", flush=True)
        speed = s.max_new_tokens / (time.time() - start)
        print(utf8.decode(b"", final=True), flush=True)
        # To stderr, so that standard output is the text alone.
        print(f"--- {s.max_new_tokens} tokens, {speed:,.0f} tokens/s, {s.ckpt} on {device}", file=sys.stderr)


if __name__ == "__main__":
    run(main, Settings)
