"""
What GPT-2 costs in each format: speed, memory and file, all formats in turn in one run. Or what QAT costs.

    python bench.py                                  # GPT-2 124M's shape, random weights
    python bench.py --model=gpt2-medium --vocab_multiple=64
    python bench.py --ckpt=gpt2
    python bench.py --what=qat                       # a training step, float and fake-quantized
"""

import copy
import ctypes
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.ao.quantization import default_dynamic_qconfig, float_qparams_weight_only_qconfig, quantize_dynamic

import checkpoint
from configurator import check_minimum, provenance, run
from decode import decoder_of
from eval import keep_freed_memory, pick_device
from model import GPT, GPTConfig, KVCache
from pot import PoTConfig, PoTQuantizer, _kernel, allow_bfloat16, convert, packed_state, prepare

SHAPES = {  # n_layer, n_head, n_embd
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
PACKED = {  # absmax, as it is found at once: another scale takes as long to multiply by
    "int4": PoTConfig(grid="uniform", scale="absmax"),  # the same kernel, with another table
    "pot4": PoTConfig(scale="absmax"),
    "pot4-int8": PoTConfig(scale="absmax", act_bits=8),
}
# What a format's logits may differ by, relative to those of the same weights in float32. Many rows of packed weights are
# multiplied in bfloat16; int8 rounds the weights as well.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "int8": 0.25} | dict.fromkeys(PACKED, 0.05)
PROMPT = 32  # tokens before those that are decoded


@dataclass
class Settings:
    what: str = "speed"  # "speed": of inference, by format; "qat": seconds of a training step, float and fake-quantized
    ckpt: str | None = (
        None  # folder of a float checkpoint or of GPT-2, or gpt2, ...; None: random weights of the shape of
    )
    model: str = "gpt2"  # gpt2, gpt2-medium, gpt2-large or gpt2-xl
    vocab_multiple: int = 1  # the vocabulary is padded to a multiple of this, 64 say
    rounds: int = 5  # times that all take turns
    seed: int = 1337  # of weights and tokens
    json: str | None = None  # where to write the result; None: results/bench.json, or results/bench_qat.json
    # what=speed
    new_tokens: int = 128  # tokens that are decoded one by one, after a prompt of 32
    prompt_tokens: int = 512  # tokens of the prompt whose reading is timed
    compile: bool = True  # try torch.compile as well, which takes a minute or two at first
    # what=qat
    batch_size: int = 12  # sequences a step
    block_size: int = 64  # tokens a sequence
    steps: int = 3  # steps in a row that are timed each time, after one that is not
    pot: PoTConfig | None = None  # the fake-quantized weights; None: the default, 4 bits in groups of 64
    device: str = "auto"  # "auto": cuda, mps or cpu; or one of them


def main(s: Settings):
    if s.what not in ("speed", "qat") or s.model not in SHAPES:
        raise ValueError(f"what={s.what}, model={s.model}: choose speed or qat, and one of {', '.join(SHAPES)}")
    check_minimum(s, vocab_multiple=1, new_tokens=1, prompt_tokens=1, batch_size=1, block_size=1, steps=1)
    if s.rounds < 2:
        raise ValueError(f"rounds={s.rounds} has no spread: take at least 2")
    torch.manual_seed(s.seed)
    model = build(s)
    results = speed(s, model) if s.what == "speed" else qat(s, model)
    shape = {k: getattr(model.config, k) for k in ("n_layer", "n_head", "n_embd", "vocab_size")}
    results |= {"weights": s.ckpt or "random", **shape, "rounds": s.rounds, "seed": s.seed, **provenance()}
    path = s.json or os.path.join("results", "bench.json" if s.what == "speed" else "bench_qat.json")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w") as f:
        json.dump(results, f, indent=1)
    print(f"{results['machine']}, {results['threads']} threads, torch {results['torch']}; written to {path}")


def build(s):
    """Float model in eval mode."""
    config, tensors = GPTConfig(1024, 50257, *SHAPES[s.model]), None
    if s.ckpt:
        loaded, info = checkpoint.load_model(s.ckpt)
        if info["pot"]:
            raise ValueError(f"{s.ckpt} is quantized ({info['method']}): pass the float checkpoint that it came from")
        config, tensors = loaded.config, loaded.state_dict()
    more = -config.vocab_size % s.vocab_multiple
    model = GPT(replace(config, vocab_size=config.vocab_size + more))
    if tensors:
        tables = {n: F.pad(tensors[n], (0, 0, 0, more)) for n in ("transformer.wte.weight", "lm_head.weight")}
        model.load_state_dict(tensors | tables)
    return model.eval()


# --- speed ---


@torch.no_grad()
def speed(s, model):
    """Every format is written to a file, loaded from there, checked against float32, and timed in turn with the others.

    A format that can run in several ways is timed in all of them; its row has the quickest by median, to decode and to read
    the prompt each. Row float32 is PyTorch as it comes.
    """
    context = model.config.block_size
    if max(PROMPT + s.new_tokens + 1, s.prompt_tokens) > context:
        raise ValueError(
            f"{PROMPT} + 1 + new_tokens={s.new_tokens} or prompt_tokens={s.prompt_tokens} is more than the context of {context}"
        )
    tokens = torch.randint(model.config.vocab_size, (1, max(PROMPT + 1, s.prompt_tokens)))
    before = torch.backends.quantized.engine
    with tempfile.TemporaryDirectory() as folder:
        try:
            files, expected = write_formats(model, folder, tokens[:, : PROMPT + 1])
            models, left_out = load_all(s, files, expected, tokens)
            read = take_turns(s, models, tokens, os.path.getsize(files["pot4"]))
            names = {"float32": "float32", "float32-best": "float32"} | {f: f for f in files if f != "float32"}
            rows = [make_row(s, name, files[format], format, models, read) for name, format in names.items()]
        finally:
            torch.backends.quantized.engine = before
    print_table(s, rows, read)
    return {
        "read_gb_s": statistics.median(read) / 1e9,
        "read_gb_s_quartiles": quartiles(r / 1e9 for r in read),
        "rows": rows,
        "ways": [{"format": f, "way": w, **found} for (f, w), (_, _, found) in models.items()],
        "left_out": left_out,
        "new_tokens": s.new_tokens,
        "prompt_tokens": s.prompt_tokens,
        "obtained": {
            "file_bytes": "checkpoint.save_model; int8: torch.save of the model, embeddings quantized too",
            "bytes_per_token": "all weights, but of tables that single rows are read of",
            "peak_bytes": f"a new process loads the file and decodes {s.new_tokens} tokens after {PROMPT}: its peak less what it took before, modules imported",
            "decode, prompt": "tokens/s, median; quartiles beside it; ratios are to float32 and to float32-best in the same round",
            "bandwidth_share": "bytes_per_token x decode tokens/s / bytes/s of reading a buffer of pot4's file size in the same round",
            "error": "of the first logits, relative to float32's; packed formats: to those of the same weights in float32",
        },
    }


def write_formats(model, folder, tokens):
    """({format: its file}, {format: logits that are right})"""
    files, expected = {}, {}

    def write(format, model, like):
        no_text = {"tokenizer": "char", "chars": ""}
        info = {"tokenizer": no_text, "method": format, "pot": None, "origin": None, "step": 0}
        checkpoint.save_model(os.path.join(folder, format), model, info | {"settings": {"dataset": None, "seed": None}})
        files[format], expected[format] = os.path.join(folder, format, checkpoint.MODEL), like

    exact = model(tokens)[:, -1]
    write("float32", model, exact)
    write("bfloat16", copy.deepcopy(model).bfloat16(), exact)
    kinds = {nn.Linear: default_dynamic_qconfig, nn.Embedding: float_qparams_weight_only_qconfig}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that all of torch.ao.quantization is deprecated
        torch.save(quantize_dynamic(copy.deepcopy(model), kinds), os.path.join(folder, "int8.pt"))
    files["int8"], expected["int8"] = os.path.join(folder, "int8.pt"), exact
    for format, pot in PACKED.items():
        packed = copy.deepcopy(model)
        prepare(packed, pot)
        like = packed(tokens)[:, -1]
        write(format, convert(packed), like)
    return files, expected


def ways_of(format, compiled):
    if format in PACKED:
        return ["packed"]
    engines = torch.backends.quantized.supported_engines
    if format == "int8":
        return [e for e in ("x86", "onednn") if e in engines] or engines[-1:]
    return ["eager"] + ["oneDNN"] * torch.backends.mkldnn.is_available() + ["compiled"] * compiled


def load(format, way, file):
    """(model, what decodes one token in one call or None), which later calls of `use` switch to."""
    use(format, way)
    if format == "int8":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, weights_only=False), None
    model, _ = checkpoint.load_model(os.path.dirname(file))
    if way == "oneDNN":
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, OneDNNLinear(child))
    if way == "compiled":
        torch._dynamo.config.recompile_limit = 64  # prompt and single tokens, in two dtypes
        model.compile()  # not dynamic=True: thousands of symbols, minutes; lengths become symbols when they change
    allow_bfloat16(model)  # for prompts, if it is packed
    return model, decoder_of(model) if format in PACKED else None


def use(format, way):
    if format == "int8":
        torch.backends.quantized.engine = way


class OneDNNLinear(nn.Module):
    """A linear layer whose weight lies as oneDNN likes it, rather than to be rearranged in every call."""

    def __init__(self, linear):
        super().__init__()
        # For 16 rows: on AMX, in bfloat16, one row is multiplied as quickly as in the order for one.
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 16), linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def load_all(s, files, expected, tokens):
    """({(format, way): (model, decoder, what was found out)}, {way: why it was left out})"""
    models, left_out = {}, {}
    for format, file in files.items():
        for way in ways_of(format, s.compile):
            start = time.perf_counter()
            try:
                model, decoder = load(format, way, file)
                cache = KVCache(PROMPT + 1 + s.new_tokens)  # as generate has it, so that it compiles once
                model(tokens[:, :PROMPT], cache=cache)
                last = tokens[:, PROMPT : PROMPT + 1]
                logits = decoder(last, cache) if decoder else model(last, cache=cache)[:, -1]
            except Exception as e:  # torch.compile raises whatever it meets, such as no compiler
                if way != "compiled":
                    raise
                left_out[f"{format}, {way}"] = why = f"{type(e).__name__}: {e}".splitlines()[0]
                print(f"{format} {way} is left out: {why}")
                continue
            error = ((logits.float() - expected[format]).norm() / expected[format].norm()).item()
            if not error <= TOLERANCE[format]:
                raise ValueError(f"{format} {way}: its logits are off by {error:.2g}, relative to float32")
            ready = time.perf_counter() - start
            print(f"{format:<10}{way:<9} ready in {ready:5.1f} s, logits off by {error:.1e}", flush=True)
            found = {"error": error, "ready_s": ready, "decode": [], "prompt": []}
            models[format, way] = model, decoder, found
    return models, left_out


def take_turns(s, models, tokens, size):
    """Appends each round's tokens/s to what was found out of the models; returns each round's bytes/s of mere reading."""
    buffer, read = torch.ones(size // 4), []
    for i in range(s.rounds + 1):
        line = []
        for (format, way), (model, decoder, found) in models.items():
            use(format, way)
            generated = model.generate(tokens[:, :PROMPT], s.new_tokens + 1, temperature=0, decode=decoder)
            next(generated)  # reads the prompt
            start = time.perf_counter()
            for _ in generated:
                pass
            middle = time.perf_counter()
            model(tokens[:, : s.prompt_tokens], cache=KVCache(s.prompt_tokens), last=True)
            end = time.perf_counter()
            if i > 0:  # the first round warms up
                found["decode"].append(s.new_tokens / (middle - start))
                found["prompt"].append(s.prompt_tokens / (end - middle))
                line.append(f"{format} {way} {found['decode'][-1]:.1f}")
        start = time.perf_counter()
        for _ in range(10):
            read_once(buffer)
        if i > 0:
            read.append(10 * buffer.nbytes / (time.perf_counter() - start))
            print(f"round {i}/{s.rounds}, tokens/s: {', '.join(line)}; reads {read[-1] / 1e9:.1f} GB/s", flush=True)
    return read


def read_once(buffer):
    library = _kernel()
    if library is None:
        return buffer.sum()
    library.pot_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    library.pot_read(buffer.data_ptr(), buffer.nbytes // 8, torch.get_num_threads())


def read_per_token(model):
    """Bytes of weights that a decode step reads: all but the tables that it takes single rows of."""
    if hasattr(model.lm_head, "_weight_bias"):  # int8, whose tables are apart from the head
        tensors = [t for m in model.modules() if type(m) is type(model.lm_head) for t in m._weight_bias()]
        return sum(t.nbytes for t in [*tensors, *model.parameters()] if t is not None)
    return sum(t.nbytes for n, t in packed_state(model)[0].items() if not n.startswith("transformer.wpe."))


def make_row(s, name, file, format, models, read):
    ways = {
        way: found for (f, way), (*_, found) in models.items() if f == format and (name != "float32" or way == "eager")
    }
    best = {kind: max(ways, key=lambda way: statistics.median(ways[way][kind])) for kind in ("decode", "prompt")}
    weights = read_per_token(load(format, ways_of(format, False)[0], file)[0])
    row = {"name": name, "ways": best, "file_bytes": os.path.getsize(file), "bytes_per_token": weights}
    row["peak_bytes"] = peak_bytes(format, best["decode"], file, s.new_tokens)
    floats = [found for (f, _), (*_, found) in models.items() if f == "float32"]
    for kind, way in best.items():
        rates = ways[way][kind]
        quickest = max((found[kind] for found in floats), key=statistics.median)
        row[f"{kind}_tok_s"], row[f"{kind}_tok_s_quartiles"] = statistics.median(rates), quartiles(rates)
        for key, base in ((f"{kind}_ratio", floats[0][kind]), (f"{kind}_ratio_best", quickest)):
            ratios = [r / b for r, b in zip(rates, base)]
            row[key], row[f"{key}_quartiles"] = statistics.median(ratios), quartiles(ratios)
    shares = [weights * rate / r for rate, r in zip(ways[best["decode"]]["decode"], read)]
    row["bandwidth_share"], row["bandwidth_share_quartiles"] = statistics.median(shares), quartiles(shares)
    return row


@functools.cache
def peak_bytes(format, way, file, new_tokens):
    """In a process of its own, which inherits nothing; None where the system does not tell."""
    here = os.path.dirname(os.path.abspath(__file__))
    call = f"import bench; bench.print_peak{(format, way, file, new_tokens, torch.get_num_threads())}"
    paths = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", call], env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def print_peak(format, way, file, new_tokens, threads):
    torch.set_num_threads(threads)
    before = memory("VmRSS")
    model, decoder = load(format, way, file)
    for _ in model.generate(torch.zeros(1, PROMPT, dtype=torch.long), new_tokens + 1, temperature=0, decode=decoder):
        pass
    print("null" if before is None else memory("VmHWM") - before)


def memory(key):
    # getrusage's peak would be that of the process which started this one, if that is larger.
    if not os.path.exists("/proc/self/status"):
        return None
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))


def quartiles(values):
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return [lower, upper]


def print_table(s, rows, read):
    line = "{:<13}{:>8}{:>9}{:>8}   {:<22}{:>6}{:>7}{:>9}   {:<28}{:>6}"
    print(
        f"\n{s.new_tokens} tokens decoded one by one after {PROMPT}, a prompt of {s.prompt_tokens} read: tokens/s, median (quartiles), "
        f"ratio to float32 and\nto the best float32; MB of the file, read per token, and at most in memory; share of the {statistics.median(read) / 1e9:.1f} GB/s that memory is read at"
    )
    print(line.format("", "file", "a token", "peak", "decode", "ratio", "/best", "share", "prompt", "ratio"))
    for r in rows:
        sizes = [
            "-" if (n := r[k]) is None else f"{n / 1e6:.1f}" for k in ("file_bytes", "bytes_per_token", "peak_bytes")
        ]
        rates = [
            f"{r[k]:.1f} ({', '.join(f'{q:.1f}' for q in r[k + '_quartiles'])})"
            for k in ("decode_tok_s", "prompt_tok_s")
        ]
        ratios = [f"{r[k]:.2f}" for k in ("decode_ratio", "decode_ratio_best", "prompt_ratio")]
        share = f"{r['bandwidth_share']:.0%}"
        print(line.format(r["name"], *sizes, rates[0], *ratios[:2], share, rates[1], ratios[2]))
    for r in rows[1:4]:
        print(f"{r['name']}: {r['ways']['decode']} to decode, {r['ways']['prompt']} for the prompt")


# --- qat ---


def qat(s, model):
    if s.block_size > model.config.block_size:
        raise ValueError(
            f"block_size={s.block_size} is more than the context of {s.ckpt or s.model}: {model.config.block_size}"
        )
    pot = s.pot or PoTConfig()
    keep_freed_memory()  # as train.py does
    device = pick_device(s.device)
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
        step_s, ratio = (
            [round(q, 4) for q in statistics.quantiles(v, n=4, method="inclusive")] for v in (times, ratios)
        )
        rows.append({"name": name, "step_s": step_s, "ratio": ratio})
    print(
        f"\na step of {s.batch_size} x {s.block_size} tokens, seconds: median (lower, upper quartile); ratio of the same round"
    )
    for r in rows:
        print(f"{r['name']:<28} " + "   ".join(f"{m:.3f} ({a:.3f}, {b:.3f})" for a, m, b in (r["step_s"], r["ratio"])))
    return {"rows": rows, "steps": s.steps, "tokens": s.batch_size * s.block_size}


if __name__ == "__main__":
    run(main, Settings)
