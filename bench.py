"""
What QAT costs: seconds of a training step, float beside fake-quantized weights, in one run.

    python bench.py                       # GPT-2 124M's shape, random weights
    python bench.py --pot_terms=2 --json=results/bench_qat.json
"""

import json
import os
import statistics
import time
from dataclasses import dataclass

import torch

from configurator import provenance, run
from eval import pick_device
from model import GPT, GPTConfig
from pot import PoTConfig, prepare


@dataclass
class Settings:
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # width
    vocab_size: int = 50257  # tokens
    batch_size: int = 12  # sequences a step
    block_size: int = 64  # tokens a sequence
    rounds: int = 15  # steps of each that are timed, in turn
    warmup: int = 3  # steps of each before them
    pot: PoTConfig | None = None  # the weights of the second model; None: the default, 4 bits in groups of 64
    seed: int = 1337  # of weights and tokens
    json: str | None = None  # where to write the result
    device: str = "auto"  # "auto": cuda, mps or cpu; or one of them


def main(s: Settings):
    if s.rounds < 2:
        raise ValueError(f"rounds={s.rounds} has no spread: take at least 2")
    pot = s.pot or PoTConfig()
    device = pick_device(s.device)
    torch.manual_seed(s.seed)
    shape = GPTConfig(s.block_size, s.vocab_size, s.n_layer, s.n_head, s.n_embd)
    models = {"float32": GPT(shape).to(device), str(pot): GPT(shape).to(device)}
    prepare(models[str(pot)], pot)
    optimizers = {name: torch.optim.AdamW(m.parameters(), lr=1e-5, fused=device != "mps") for name, m in models.items()}
    tokens = torch.randint(s.vocab_size, (s.batch_size, s.block_size + 1), device=device)

    def step(name):
        start = time.perf_counter()
        models[name](tokens[:, :-1], tokens[:, 1:])[1].backward()
        torch.nn.utils.clip_grad_norm_(models[name].parameters(), 1.0)
        optimizers[name].step()
        optimizers[name].zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds = {name: [] for name in models}
    for i in range(s.warmup + s.rounds):
        for name in models:
            taken = step(name)
            if i >= s.warmup:
                seconds[name].append(taken)
        print(
            f"round {i + 1}/{s.warmup + s.rounds}  " + "  ".join(f"{t[-1]:.2f} s" for t in seconds.values() if t),
            flush=True,
        )

    base, rows = seconds["float32"], []
    for name, times in seconds.items():
        ratios = [t / b for t, b in zip(times, base)]
        rows.append({"name": name, "step_s": _spread(times), "ratio": _spread(ratios)})
    print(
        f"\na step of {s.batch_size} x {s.block_size} tokens, seconds: median (lower, upper quartile); ratio of the same round"
    )
    for r in rows:
        print(f"{r['name']:<28} " + "   ".join(f"{m:.3f} ({a:.3f}, {b:.3f})" for a, m, b in (r["step_s"], r["ratio"])))
    results = {"rows": rows, "rounds": s.rounds, "tokens": s.batch_size * s.block_size, "seed": s.seed, **provenance()}
    if s.json:
        os.makedirs(os.path.dirname(s.json) or ".", exist_ok=True)
        with open(s.json, "w") as f:
            json.dump(results, f, indent=1)
        print(f"written to {s.json}")


def _spread(values):
    return [round(q, 4) for q in statistics.quantiles(values, n=4)]


if __name__ == "__main__":
    run(main, Settings)
