"""
What QAT costs: seconds of a training step, float beside fake-quantized weights, in one run.

    python bench.py                       # GPT-2 124M's shape, random weights
    python bench.py --ckpt=gpt2-medium --pot_terms=2
    python bench.py --json=results/bench_qat.json
"""

import json
import os
import statistics
import time
from dataclasses import dataclass

import torch

import checkpoint
from configurator import provenance, run
from eval import pick_device
from model import GPT, GPTConfig
from pot import PoTConfig, PoTQuantizer, prepare
from train import keep_freed_memory


@dataclass
class Settings:
    ckpt: str | None = (
        None  # folder of a float checkpoint or of GPT-2, or gpt2, ...; None: random weights of this shape:
    )
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # width
    vocab_size: int = 50257  # tokens
    batch_size: int = 12  # sequences a step
    block_size: int = 64  # tokens a sequence
    rounds: int = 5  # times that float and fake-quantized steps take turns
    steps: int = 3  # steps in a row that are timed each time, after one that is not
    pot: PoTConfig | None = None  # the weights of the second model; None: the default, 4 bits in groups of 64
    seed: int = 1337  # of weights and tokens
    json: str | None = None  # where to write the result
    device: str = "auto"  # "auto": cuda, mps or cpu; or one of them


def main(s: Settings):
    if s.rounds < 2:
        raise ValueError(f"rounds={s.rounds} has no spread: take at least 2")
    pot = s.pot or PoTConfig()
    keep_freed_memory()  # as train.py does
    device = pick_device(s.device)
    torch.manual_seed(s.seed)
    if s.ckpt:
        model, _ = checkpoint.load_float(s.ckpt)
        if s.block_size > model.config.block_size:
            raise ValueError(
                f"block_size={s.block_size} is more than the context of {s.ckpt}: {model.config.block_size}"
            )
    else:
        model = GPT(GPTConfig(s.block_size, s.vocab_size, s.n_layer, s.n_head, s.n_embd))
    model.to(device).train()
    prepare(model, pot)
    quantizers = [m for m in model.modules() if isinstance(m, PoTQuantizer)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device != "mps")
    tokens = torch.randint(model.config.vocab_size, (s.batch_size, s.block_size + 1), device=device)

    def step():
        start = time.perf_counter()
        model(tokens[:, :-1], tokens[:, 1:])[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - start

    # One model, its quantizers off and on: both steps work in the same memory, which a step has to fault in anew.
    seconds = {"float32": [], str(pot): []}
    for i in range(s.rounds + 1):
        for name, times in seconds.items():
            for q in quantizers:
                q.enabled = name != "float32"
            step()
            mean = statistics.mean(step() for _ in range(s.steps))
            if i > 0:  # the first round warms up
                times.append(mean)
            print(f"round {i}/{s.rounds}  {name:<28} {mean:.3f} s", flush=True)

    base, rows = seconds["float32"], []
    for name, times in seconds.items():
        ratios = [t / b for t, b in zip(times, base)]
        rows.append({"name": name, "step_s": _spread(times), "ratio": _spread(ratios)})
    print(
        f"\na step of {s.batch_size} x {s.block_size} tokens, seconds: median (lower, upper quartile); ratio of the same round"
    )
    for r in rows:
        print(f"{r['name']:<28} " + "   ".join(f"{m:.3f} ({a:.3f}, {b:.3f})" for a, m, b in (r["step_s"], r["ratio"])))
    results = {
        "rows": rows,
        "rounds": s.rounds,
        "steps": s.steps,
        "tokens": s.batch_size * s.block_size,
        "model": s.ckpt or "random weights",
        "seed": s.seed,
        **provenance(),
    }
    if s.json:
        os.makedirs(os.path.dirname(s.json) or ".", exist_ok=True)
        with open(s.json, "w") as f:
            json.dump(results, f, indent=1)
        print(f"written to {s.json}")


def _spread(values):
    return [round(q, 4) for q in statistics.quantiles(values, n=4)]


if __name__ == "__main__":
    run(main, Settings)
