"""
Speed on a GPU: products of packed weights, decoding by CUDA graphs, and training steps, beside bfloat16. It was never run
on a GPU, because none was at hand; `--device=cpu --small=True` tries its logic by Triton's interpreter.

    NANOPOT_KERNEL=triton python results/gpu.py
    NANOPOT_KERNEL=triton TRITON_INTERPRET=1 python results/gpu.py --device=cpu --small=True --json=gpu_try.json
"""

import itertools
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import machine
from bench import SHAPES
from configurator import run
from model import GPT, GPTConfig, KVCache
from pot import PackedWeight, PoTConfig, prepare, quantize_

WEIGHTS = {  # (out, in)
    "gpt2": [(2304, 768), (768, 768), (3072, 768), (768, 3072), (50304, 768)],
    "smollm2-135m": [(960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)],
    "large": [(4096, 4096), (11008, 4096), (8192, 8192), (28672, 8192)],
}
ROWS = (1, 2, 4, 8, 16, 64, 512)  # of inputs
ROTATED = 200_000_000  # bytes of weights that a way rotates among, more than a cache holds
PACKED = {"pot4": PoTConfig(scale="absmax"), "pot4-two": PoTConfig(terms=2, scale="absmax")}
SEED = 1337


@dataclass
class Settings:
    device: str = "cuda"
    small: bool = False  # tiny shapes and few repetitions, to try the script itself
    rounds: int = 15  # in each, every way is measured once, in turn
    new_tokens: int = 128  # decoded one by one
    json: str = "results/gpu.json"  # file of the result


class Int4:
    """torch's own product of 4-bit weights, uniform in groups of 64, for bfloat16 inputs on a GPU."""

    def __init__(self, out, width, device):
        codes = torch.randint(256, (out, width // 2), dtype=torch.uint8, device=device)
        self.codes = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        self.scales = torch.ones(width // 64, out, 2, dtype=torch.bfloat16, device=device)

    def __call__(self, x):
        return torch.ops.aten._weight_int4pack_mm(x, self.codes, 64, self.scales)


def measure(function, device, repetitions):
    """Seconds of function(). On a GPU it is captured in a CUDA graph, so that the time is the GPU's."""
    if device.type == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    if function not in measure.graphs:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # compiles kernels and chooses algorithms
            for _ in range(3):
                function()
        torch.cuda.synchronize()
        measure.graphs[function] = graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repetitions):
        measure.graphs[function].replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / repetitions


measure.graphs = {}


def copy_bandwidth(s, device):
    """Bytes/s that copying a large tensor reads and writes."""
    source = torch.ones(2**20 if s.small else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(measure(lambda: target.copy_(source), device, 5) for _ in range(3))


@torch.no_grad()
def products(s, device, bandwidth):
    """Every way of every shape: microseconds, ratio to bfloat16 in the same round, and the share of the bandwidth at which
    its weight is read."""
    shapes = [("small", (48, 64))] if s.small else [(m, shape) for m, shapes in WEIGHTS.items() for shape in shapes]
    table = []
    for (model, (out, width)), n in itertools.product(shapes, ROWS[:3] if s.small else ROWS):
        x = torch.randn(n, width, device=device).bfloat16()
        count = 2 if s.small else max(2, -(-4 * ROTATED // (2 * out * width)))  # 4 bits then fill ROTATED, too
        weights = [torch.randn(out, width, device=device).bfloat16() for _ in range(count)]
        ways = {"bfloat16": ([lambda x, w=w: F.linear(x, w) for w in weights], 2 * out * width)}
        for name, config in PACKED.items():
            layer = nn.Linear(width, out, bias=False, device=device, dtype=torch.bfloat16)
            packed = quantize_(layer, config).requires_grad_(False).packed
            if not packed.on_triton:
                raise ValueError("the Triton kernels are off: set NANOPOT_KERNEL=triton, and pip install triton")
            expected = F.linear(x.double(), packed().double())
            error = ((packed.linear(x, None) - expected).norm() / expected.norm()).item()
            if not error < 0.02:
                raise ValueError(f"{name}: {n} rows of {out} x {width} are off by {error:.2g}")
            own = packed.unit, packed.shape, packed.dtype, config
            copies = [PackedWeight(packed.codes.clone(), *own) for _ in range(count)]
            ways[name] = [lambda x, p=p: p.linear(x, None) for p in copies], packed.codes.nbytes + packed.unit.nbytes
        if device.type == "cuda" and width % 128 == 0 and out % 8 == 0:
            own = [Int4(out, width, device) for _ in range(count)]
            ways["torch int4"] = own, own[0].codes.nbytes + own[0].scales.nbytes
        calls = {name: lambda layers=layers, x=x: [layer(x) for layer in layers] for name, (layers, _) in ways.items()}
        seconds = {name: [] for name in ways}
        for _ in range(s.rounds):
            for name, call in calls.items():
                seconds[name].append(measure(call, device, 10) / count)
        measure.graphs.clear()
        for name, times in seconds.items():
            ratios = [base / t for t, base in zip(times, seconds["bfloat16"])]
            us, share = 1e6 * statistics.median(times), ways[name][1] / statistics.median(times) / bandwidth
            row = {"model": model, "shape": (out, width), "rows": n, "way": name, "us": us, "share": share}
            table.append(row | {"ratio": statistics.quantiles(ratios, n=4, method="inclusive")})
            print(f"{out:>6} x {width:<6}{n:>4} rows  {name:<12}{us:9.1f} us {table[-1]['ratio'][1]:6.2f} {share:6.0%}")
    return table


@torch.no_grad()
def decoding(s, device):
    """Tokens/s of a whole model that decodes one token after a context, in a CUDA graph, and the ratio to bfloat16. The
    graph reads the same token at the same position again and again; its time is that of a step."""
    names = ["gpt2"] if s.small else ["gpt2", "gpt2-xl", "smollm2-135m"]
    table = []
    for name in names:
        config = GPTConfig(**SHAPES[name])
        if s.small:
            config = GPTConfig(32, 64, 1, 2, 64)
        seconds, context = {}, config.block_size // 2
        for way in ("bfloat16", *PACKED):
            torch.manual_seed(SEED)
            model = GPT(config).eval().requires_grad_(False).to(device)
            if way in PACKED:
                quantize_(model, PACKED[way])
            model.bfloat16()
            tokens = torch.zeros(1, context, dtype=torch.long, device=device)

            def step(model=model, tokens=tokens, context=context):
                cache = KVCache(context + 1)
                cache.length = context  # keys and values of the context may be anything
                model(tokens[:, :1], cache=cache)

            seconds[way] = [measure(step, device, s.new_tokens) for _ in range(s.rounds)]
            measure.graphs.clear()
        for way, times in seconds.items():
            ratio = statistics.median(seconds["bfloat16"]) / statistics.median(times)
            table.append({"model": name, "way": way, "tok_s": 1 / statistics.median(times), "ratio": ratio})
            print(f"{name:<14} {way:<12}{table[-1]['tok_s']:9.1f} tokens/s {ratio:6.2f}")
    return table


def training(s, device):
    """Seconds of a compiled training step in bfloat16 at GPT-2 124M's shape: float, QAT, and QAT towards a teacher's
    predictions. mfu: the share of the rate of a large product that 6 operations per weight and token take."""
    config, batch = GPTConfig(**SHAPES["gpt2"], vocab_size=50304), 12
    if s.small:
        config, batch = GPTConfig(32, 64, 1, 2, 64), 2
    a = torch.randn(64 if s.small else 8192, 64 if s.small else 8192, device=device).bfloat16()
    peak = 2 * len(a) ** 3 / min(measure(lambda: a @ a, device, 10) for _ in range(3))
    measure.graphs.clear()
    tokens = torch.randint(config.vocab_size, (batch, config.block_size + 1), device=device)
    x, y = tokens[:, :-1], tokens[:, 1:].contiguous()
    table = []
    for name in ("float", "QAT", "QAT, distilled"):
        torch.manual_seed(SEED)
        model = GPT(config).to(device).train()
        teacher = torch.compile(GPT(config).to(device).eval(), backend="eager" if s.small else "inductor")
        if name != "float":
            prepare(model, PoTConfig())
        compiled = torch.compile(model, backend="aot_eager" if s.small else "inductor")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def step(name=name, model=model, teacher=teacher, compiled=compiled, optimizer=optimizer):
            with torch.autocast(device.type, torch.bfloat16):
                if name == "QAT, distilled":
                    with torch.no_grad():
                        soft = teacher(x).flatten(0, 1).float().softmax(-1)
                    loss = F.cross_entropy(compiled(x).flatten(0, 1).float(), soft)
                else:
                    loss = compiled(x, y)[1]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()

        times = []
        for i in range(3 + s.rounds):
            start = time.perf_counter()
            step()
            if i >= 3:  # the first ones compile
                times.append(time.perf_counter() - start)
        seconds = statistics.median(times)
        ratio = seconds / table[0]["step_s"] if table else 1.0
        rate, weights = x.numel() / seconds, sum(p.numel() for p in model.parameters())
        table.append({"name": name, "step_s": seconds, "ratio": ratio, "tok_s": rate, "mfu": 6 * weights * rate / peak})
        print("{name:<16}{step_s:9.4f} s {ratio:6.2f} {tok_s:10,.0f} tokens/s, MFU {mfu:.0%}".format(**table[-1]))
    return table


def main(s: Settings):
    device = torch.device(machine.pick_device(s.device))
    torch.manual_seed(SEED)
    bandwidth = copy_bandwidth(s, device)
    measure.graphs.clear()
    print(f"copies at {bandwidth / 1e9:.0f} GB/s")
    results = {
        "copy_gb_s": bandwidth / 1e9,
        "products": products(s, device, bandwidth),
        "decoding": decoding(s, device),
    }
    results |= {"training": training(s, device), "rounds": s.rounds, "seed": SEED, **machine.provenance()}
    with open(s.json, "w") as f:
        json.dump(results, f, indent=1)


if __name__ == "__main__":
    run(main, Settings)
