"""
Speed, memory and file size of a GPT in each format, measured in turn in one run. Or the speed of single layers, or the
time of a QAT step.

    python bench.py                                  # the shape of GPT-2 124M, random weights
    python bench.py --model=gpt2-medium --vocab_multiple=64
    python bench.py --ckpt=gpt2
    python bench.py --vocab_multiple=64 --llama_bench=llama.cpp/build/bin/llama-bench    # llama.cpp in the same rounds
    python bench.py --what=rows --rounds=15          # single layers, for 1 to 512 rows of input
    python bench.py --what=qat                       # a training step: float, fake-quantized, distilled
"""

import copy
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
import torch.ao.nn.quantized.dynamic as int8
import torch.nn as nn
import torch.nn.functional as F
from torch.ao.quantization import default_dynamic_qconfig, float_qparams_weight_only_qconfig, quantize_dynamic

import checkpoint
import machine
import pot_kernel
from checkpoint import CheckpointInfo
from configurator import check_minimum, run
from model import GPT, GPTConfig, KVCache
from pot import PoTConfig, PoTQuantizer, allow_int8_activations, convert, packed_state, prepare

SHAPES = {  # settings of GPTConfig
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
    "smollm2-135m": dict(
        n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_inner=1536, vocab_size=49152, norm="rms", position="rotary",
        rope_theta=1e5, mlp="swiglu", bias=False,
    ),
}  # fmt: skip
PACKED = {  # absmax because it is quick to compute; the scale makes no difference to speed
    "int4": PoTConfig(grid="uniform", scale="absmax"),  # the same kernel with another table
    "pot4": PoTConfig(scale="absmax"),
    "pot4-two": PoTConfig(terms=2, scale="absmax"),
}
ENGINES = torch.backends.quantized.supported_engines  # of int8
# The ways of each format, and the largest relative error of their logits, from those of the same weights in float32.
# int8 rounds the weights, too. The ways of packed weights are the dtypes to which layer inputs are rounded.
WAYS = {
    "float32": dict.fromkeys(("eager", "oneDNN", "compiled"), 1e-4),
    "bfloat16": dict.fromkeys(("eager", "oneDNN", "compiled"), 0.05),
    "int8": dict.fromkeys([e for e in ("x86", "onednn") if e in ENGINES] or ENGINES[-1:], 0.25),
    **dict.fromkeys(PACKED, {"float32": 1e-3, "int8": 0.1}),  # the decode step keeps keys and values in float16
}
LLAMA = ("Q4_0", "IQ4_NL", "Q4_K", "MXFP4", "Q8_0", "F32")  # llama.cpp's formats
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)  # of inputs of single layers
COPIES = 200_000_000  # bytes of float32 among which single layers rotate, so that no weight stays in the cache
BATCHES = {"decode": 1, "decode8": 8, "decode16": 16}  # sequences decoded at once
RANGE = "{:.1f} ({:.1f}, {:.1f})"
COLUMNS = (  # of the table: head, width, key of a row, what is shown of its median and quartiles
    ("decode", 24, "decode_tok_s", RANGE), ("ratio", 7, "decode_ratio", "{:.2f}"),
    ("/best", 7, "decode_ratio_best", "{:.2f}"), ("share", 7, "bandwidth_share", "{:.0%}"),
    ("8 rows", 9, "decode8_tok_s", "{:.1f}"), ("ratio", 7, "decode8_ratio", "{:.2f}"),
    ("16 rows", 9, "decode16_tok_s", "{:.1f}"), ("ratio", 7, "decode16_ratio", "{:.2f}"),
    ("prompt", 27, "prompt_tok_s", RANGE), ("ratio", 7, "prompt_ratio", "{:.2f}"),
)  # fmt: skip
PROMPT = 32  # tokens before the decoded ones
SEED = 1337  # of weights and tokens


@dataclass
class Settings:
    # "speed" of inference in each format, "rows": speed of single layers, or "qat": seconds of a training step
    what: str = "speed"
    # folder of a float checkpoint, or gpt2, gpt2-medium, ...; None: random weights
    ckpt: str | None = None
    model: str = "gpt2"  # shape of the random weights: gpt2, gpt2-medium, gpt2-large, gpt2-xl or smollm2-135m
    n_layer: int | None = None  # fewer layers than the shape has, for shapes that do not fit into memory
    vocab_multiple: int = 1  # the vocabulary is padded to a multiple of this, for example 64
    rounds: int = 5  # in each round everything is measured once, in turn
    json: str | None = None  # file of the result; None: results/bench.json, bench_rows.json or bench_qat.json
    # --- what=speed ---
    new_tokens: int = 128  # tokens decoded one by one, after a prompt of 32
    prompt_tokens: int = 512  # tokens of the prompt that is timed
    compile: bool = True  # also measure torch.compile, which needs a minute or two to compile
    # llama.cpp's llama-bench, with llama-quantize beside it, to measure its formats too; needs `pip install gguf`
    llama_bench: str | None = None
    # --- what=qat ---
    batch_size: int = 12  # sequences in a step
    block_size: int = 64  # tokens in a sequence
    steps: int = 3  # steps timed in a row, after one that is not timed
    device: str = "auto"  # "auto": cuda, mps or cpu; or one of them


def main(s: Settings):
    measures = {"speed": speed, "rows": single_layers, "qat": qat}
    if s.what not in measures or s.model not in SHAPES:
        choices = f"choose {', '.join(measures)}, and one of {', '.join(SHAPES)}"
        raise ValueError(f"what={s.what}, model={s.model}: {choices}")
    least = ("n_layer", "vocab_multiple", "new_tokens", "prompt_tokens", "batch_size", "block_size", "steps")
    check_minimum(s, **dict.fromkeys(least, 1))
    if s.rounds < 2:
        raise ValueError(f"rounds={s.rounds} has no spread: take at least 2")
    path = s.json or os.path.join("results", "bench.json" if s.what == "speed" else f"bench_{s.what}.json")
    checkpoint.check_json(path)
    torch.manual_seed(SEED)
    model = build(s)
    results = measures[s.what](s, model)
    shape = {k: getattr(model.config, k) for k in ("n_layer", "n_head", "n_embd", "vocab_size")}
    results |= {"weights": s.ckpt or "random", **shape, "rounds": s.rounds, "seed": SEED, **machine.provenance()}
    checkpoint.write_json(path, results)
    print(f"{results['machine']}, {results['threads']} threads, torch {results['torch']}; written to {path}")


def build(s):
    """The float model, in eval mode."""
    config, tensors = GPTConfig(**SHAPES[s.model]), None
    config.n_layer = s.n_layer or config.n_layer
    if s.ckpt:
        if s.n_layer:
            raise ValueError(f"n_layer={s.n_layer} shortens random weights only: leave out n_layer or ckpt")
        loaded, info = checkpoint.load_model(s.ckpt)
        if info.pot:
            raise ValueError(f"{s.ckpt} is quantized ({info.method}): pass the float checkpoint that it came from")
        config, tensors = loaded.config, loaded.state_dict()
    padding = -config.vocab_size % s.vocab_multiple
    model = GPT(replace(config, vocab_size=config.vocab_size + padding))
    if tensors:
        tables = {n: F.pad(tensors[n], (0, 0, 0, padding)) for n in ("transformer.wte.weight", "lm_head.weight")}
        model.load_state_dict(tensors | tables)
    return model.eval()


def quartiles(values):
    """[lower, median, upper]"""
    return statistics.quantiles(values, n=4, method="inclusive")


def spread(key, values):
    lower, median, upper = quartiles(values)
    return {key: median, f"{key}_quartiles": [lower, upper]}


def relative_error(x, expected):
    return ((x.float() - expected).norm() / expected.norm()).item()


# -----------------------------------------------------------------------------
# Speed


@torch.no_grad()
def speed(s, model):
    """Writes every format to a file, loads it, checks its logits, and times all formats in turn.

    A row has the fastest way of its format by median, separately for decoding and for the prompt. Row float32 is
    PyTorch's default. The figures of a row:
    - file_bytes: the file of checkpoint.save_model; for int8 of torch.save, with quantized embeddings; or the GGUF
    - bytes_per_token: all weights, except tables of which a decode step reads single rows
    - peak_bytes: peak memory of a new process that loads the file and decodes, minus its memory after the imports; None
      for llama.cpp
    - decode, decode8, decode16, prompt: tokens/s, of 1, 8 and 16 sequences at once and of a prompt, and ratios in the
      same round: to float32, to float32-best and to the fastest of llama.cpp's formats of 4 bits
    - bandwidth_share: bytes_per_token x decode tokens/s, relative to plain reading in the same round (see take_turns)
    """
    context = model.config.block_size
    if max(PROMPT + s.new_tokens + 1, s.prompt_tokens) > context:
        lengths = f"{PROMPT} + 1 + new_tokens={s.new_tokens} or prompt_tokens={s.prompt_tokens}"
        raise ValueError(f"{lengths} is more than the context of {context}")
    tokens = torch.randint(model.config.vocab_size, (1, max(PROMPT + 1, s.prompt_tokens)))
    engine = torch.backends.quantized.engine
    with tempfile.TemporaryDirectory() as folder:
        try:
            llama, left_out = load_llama(s, model, folder) if s.llama_bench else ([], {})
            files, expected = write_formats(model, folder, tokens[:, : PROMPT + 1])
            ours, failed = load_ways(s, files, expected, tokens)
            ways = ours + llama
            rates = take_turns(s, ways, tokens, os.path.getsize(files["pot4"]))
        finally:
            torch.backends.quantized.engine = engine
        read = rates["read_once"]
        check_read(read, rates["sum"])
        groups = {w.format: [v for v in ways if v.format == w.format] for w in ways}
        floats, four_bits = groups.pop("float32"), [w for w in llama if "4" in w.format]
        groups = {"float32": floats[:1], "float32-best": floats} | groups
        bases = {"ratio": floats[:1], "ratio_best": floats} | ({"ratio_llama": four_bits} if four_bits else {})
        rows = [make_row(s, name, group, bases, read) for name, group in groups.items()]
    results = spread("read_gb_s", [r / 1e9 for r in read]) | spread("sum_gb_s", [r / 1e9 for r in rates["sum"]])
    best = {kind: fastest(four_bits, kind).format for kind in four_bits[0].rates} if four_bits else {}
    print_table(s, rows, results["read_gb_s"], best)
    results |= {"rows": rows, "left_out": failed | left_out, "new_tokens": s.new_tokens}
    results |= {"prompt_tokens": s.prompt_tokens} | ({"llama_cpp": llama[0].build | {"best": best}} if best else {})
    results["ways"] = [{k: getattr(w, k) for k in ("format", "way", "error", "ready_s")} | w.rates for w in ways]
    return results


def write_formats(model, folder, tokens):
    """({format: its file}, {format: the right logits after tokens})"""
    files, expected = {}, {}

    def write(format, model, logits):
        info = CheckpointInfo({"tokenizer": "char", "chars": ""}, format, model.config)  # tokens here are no text
        checkpoint.save_model(os.path.join(folder, format), model, info)
        files[format], expected[format] = os.path.join(folder, format, checkpoint.MODEL), logits

    exact = model(tokens)[:, -1]
    write("float32", model, exact)
    write("bfloat16", copy.deepcopy(model).bfloat16(), exact)
    files["int8"], expected["int8"] = os.path.join(folder, "int8.pt"), exact
    qconfigs = {nn.Linear: default_dynamic_qconfig, nn.Embedding: float_qparams_weight_only_qconfig}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all of torch.ao.quantization is deprecated
        torch.save(quantize_dynamic(copy.deepcopy(model), qconfigs), files["int8"])
    for format, config in PACKED.items():
        packed = copy.deepcopy(model)
        prepare(packed, config)
        logits = packed(tokens)[:, -1]
        write(format, convert(packed), logits)
    return files, expected


class Way:
    """A format that runs in one of its ways, loaded from its file."""

    def __init__(self, format, way, file):
        self.format, self.way, self.file, self.decoder = format, way, file, None
        self.rates = {}  # {kind: tokens/s of each round}
        self.use()
        if format == "int8":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.model = torch.load(file, weights_only=False)
            return
        self.model, _ = checkpoint.load_model(os.path.dirname(file))
        if way == "oneDNN":
            self.model.apply(reorder_weight)
        if way == "compiled":
            torch._dynamo.config.recompile_limit = 64  # prompts and single tokens, in two dtypes
            self.model.compile()  # dynamic=True makes thousands of symbols; lengths become symbols when they change
        if format in PACKED:
            if way == "int8":
                allow_int8_activations(self.model)
            self.decoder = checkpoint.make_decoder(self.model)

    def use(self):
        if self.format == "int8":
            torch.backends.quantized.engine = self.way

    def generate(self, prompt, new_tokens):
        """Yields the token that the prompt gives, then new_tokens decoded ones."""
        decode = self.decoder if len(prompt) == 1 else None
        return self.model.generate(prompt, new_tokens + 1, temperature=0, decode=decode)

    def read(self, tokens, cache):
        """Logits of the token after `tokens` (1, T)."""
        return self.decoder(tokens, cache) if self.decoder else self.model(tokens, cache=cache, last=True)[:, -1]

    def measure(self, s, tokens):
        """{kind: tokens/s}"""
        self.use()
        rates = {}
        for kind, rows in BATCHES.items():
            steps = -(-s.new_tokens // rows)
            generated = self.generate(tokens[:, :PROMPT].repeat(rows, 1), steps)
            next(generated)  # reads the prompt
            start = time.perf_counter()
            for _ in generated:
                pass
            rates[kind] = rows * steps / (time.perf_counter() - start)
        start = time.perf_counter()
        self.read(tokens[:, : s.prompt_tokens], KVCache(s.prompt_tokens))
        return rates | {"prompt": s.prompt_tokens / (time.perf_counter() - start)}

    @property
    def bytes_per_token(self):
        """See speed."""
        if isinstance(self.model.lm_head, int8.Linear):  # its tables are separate from the head
            layers = [m for m in self.model.modules() if isinstance(m, int8.Linear)]
            tensors = [t for m in layers for t in (m.weight(), m.bias()) if t is not None]
            return sum(t.nbytes for t in [*tensors, *self.model.parameters()])
        return sum(t.nbytes for n, t in packed_state(self.model)[0].items() if not n.startswith("transformer.wpe."))


def reorder_weight(module):
    """Makes a linear layer keep its weight in oneDNN's own order, so that no call has to reorder it.

    Raises RuntimeError where oneDNN does not have the dtype, such as bfloat16 without AVX-512.
    """
    if isinstance(module, nn.Linear):
        # The order for 16 rows. On AMX in bfloat16, it is as fast for a single row as the order for one row.
        weight, bias = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), 16), module.bias
        module.forward = lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        module.weight = None


def load_ways(s, files, expected, tokens):
    """(every Way that runs, {"format, way": why it was left out})"""
    ways, left_out = [], {}
    for format, way in [(f, way) for f in files for way in WAYS[f] if s.compile or way != "compiled"]:
        start = time.perf_counter()
        try:
            w = Way(format, way, files[format])
            # of the size that generate uses, to compile only once
            cache = KVCache(PROMPT + 1 + s.new_tokens)
            w.read(tokens[:, :PROMPT], cache)
            logits = w.read(tokens[:, PROMPT : PROMPT + 1], cache)
        except Exception as e:  # torch.compile raises errors of many types, for example without a compiler
            if way not in ("oneDNN", "compiled"):
                raise
            left_out[f"{format}, {way}"] = reason = f"{type(e).__name__}: {e}".splitlines()[0]
            print(f"{format} {way} is left out: {reason}")
            continue
        w.error = relative_error(logits, expected[format])
        if not w.error <= WAYS[format][way]:
            raise ValueError(f"{format} {way}: its logits are off by {w.error:.2g}, relative to float32")
        w.ready_s = time.perf_counter() - start
        print(f"{format:<10}{way:<9} ready in {w.ready_s:5.1f} s, logits off by {w.error:.1e}", flush=True)
        ways.append(w)
    return ways, left_out


def take_turns(s, ways, tokens, size):
    """Appends tokens/s of each round to the rates of all ways. Returns bytes/s of reading a buffer of `size` bytes, or
    of 64 MiB if that is more, in each round: by pot_kernel.read_once, and by torch.sum, which checks it."""
    # in large pages, as packed weights are; at least 64 MiB, because a small model fits the cache
    buffer = machine.large_pages(max(size, 2**26) // 8 * 8).view(torch.float32).fill_(1)
    rates = {"read_once": [], "sum": []}
    reads = {"read_once": pot_kernel.read_once if pot_kernel.load() else torch.sum, "sum": torch.sum}
    for i in range(s.rounds + 1):
        line = []
        for w in ways:
            measured = w.measure(s, tokens)
            line.append(f"{w.format} {w.way} {measured['decode']:.1f}")
            for kind, rate in measured.items() if i > 0 else ():  # the first round warms up
                w.rates.setdefault(kind, []).append(rate)
        seconds = dict.fromkeys(reads, 0.0)
        for name in 5 * list(reads):  # in turn, as the speed of memory changes within a second
            reads[name](buffer)  # not timed: the other way of reading has left other parts of the buffer in the cache
            start = time.perf_counter()
            for _ in range(2):
                reads[name](buffer)
            seconds[name] += time.perf_counter() - start
        for name in reads if i > 0 else ():
            rates[name].append(10 * buffer.nbytes / seconds[name])
        if i > 0:
            bandwidth = rates["read_once"][-1] / 1e9
            print(f"round {i}/{s.rounds}, tokens/s: {', '.join(line)}; reads {bandwidth:.1f} GB/s", flush=True)
    return rates


def check_read(read, reference):
    """Raises ValueError if our read is slower than an independent one. Then every share of the bandwidth would look too
    good. It may be 10 % slower, because the rounds differ by as much."""
    read, reference = statistics.median(read), statistics.median(reference)
    if read < 0.9 * reference:
        raise ValueError(
            f"pot_kernel reads memory at {read / 1e9:.1f} GB/s, torch.sum at {reference / 1e9:.1f} GB/s: a read that is "
            "too slow makes every share of the bandwidth look too good; run again with nothing else running"
        )


def fastest(ways, kind):
    return max(ways, key=lambda w: statistics.median(w.rates[kind]))


def make_row(s, name, ways, bases, read):
    """A row of the table, for the best of ways. bases: {ratio: the ways to whose best it is}; read: of take_turns."""
    best = {kind: fastest(ways, kind) for kind in ways[0].rates}
    weights, w = ways[0].bytes_per_token, best["decode"]
    row = {"name": name, "ways": {kind: w.way for kind, w in best.items()}}
    row |= {"file_bytes": os.path.getsize(w.file), "bytes_per_token": weights}
    row["peak_bytes"] = peak_bytes(w.format, w.way, w.file, s.new_tokens) if isinstance(w, Way) else None
    for kind, w in best.items():
        row |= spread(f"{kind}_tok_s", w.rates[kind])
        for ratio, others in bases.items():
            if kind in others[0].rates:  # llama-bench has no batches
                base = fastest(others, kind).rates[kind]
                row |= spread(f"{kind}_{ratio}", [r / b for r, b in zip(w.rates[kind], base)])
    return row | spread("bandwidth_share", [weights * d / r for d, r in zip(best["decode"].rates["decode"], read)])


@functools.cache
def peak_bytes(format, way, file, new_tokens):
    """See speed. None where the system does not tell."""
    here = os.path.dirname(os.path.abspath(__file__))
    code = f"import sys; sys.path.insert(0, {here!r}); import bench; bench.print_peak"
    code += str((format, way, file, new_tokens, torch.get_num_threads()))
    return json.loads(call(sys.executable, "-c", code).splitlines()[-1])


def call(*command):
    """What a command prints. Raises ValueError if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}, without a message"
        raise ValueError(f"{os.path.basename(command[0])} fails: {reason}")
    return done.stdout


@torch.no_grad()
def print_peak(format, way, file, new_tokens, threads):
    torch.set_num_threads(threads)
    before = machine.process_memory("VmRSS")
    for _ in Way(format, way, file).generate(torch.zeros(1, PROMPT, dtype=torch.long), new_tokens):
        pass
    peak = machine.process_memory("VmHWM")
    print("null" if before is None or peak is None else peak - before)


def print_table(s, rows, bandwidth, best):
    print(
        f"\nDecoding {s.new_tokens} tokens one by one after {PROMPT}, and a prompt of {s.prompt_tokens}: tokens/s, "
        "median (quartiles); ratios to float32 and\nto the best float32. MB: file, read per token, peak memory. "
        f"Share: of the {bandwidth:.1f} GB/s at which memory is read."
    )
    print(" " * 16 + "    file  a token   peak" + "".join(f"{head:>{width}}" for head, width, _, _ in COLUMNS))
    for r in rows:
        sizes = ["-" if r[k] is None else f"{r[k] / 1e6:.1f}" for k in ("file_bytes", "bytes_per_token", "peak_bytes")]
        figures = "".join(f"{shown(r, key, form):>{width}}" for _, width, key, form in COLUMNS)
        print("{:<16}{:>8}{:>9}{:>7}".format(r["name"], *sizes) + figures)
    print("\nFastest ways" + (", and times as fast as llama.cpp's fastest of 4 bits" if best else ""))
    for r in rows:
        if r["name"] != "float32" and "llama" not in r["name"]:
            ratios = [f"{shown(r, f'{k}_ratio_llama', '{:.2f} ({:.2f}, {:.2f})')} x {name}" for k, name in best.items()]
            print(f"{r['name']:<16}" + ", ".join([f"{kind} {way}" for kind, way in r["ways"].items()] + ratios))


def shown(row, key, form):
    return form.format(row[key], *row[f"{key}_quartiles"]) if key in row else "-"


# -----------------------------------------------------------------------------
# llama.cpp


class LlamaCpp:
    """A format of llama.cpp, measured by llama-bench, in the place of a Way."""

    way, error = "llama-bench", None  # it does not show logits

    def __init__(self, llama_bench, name, file, bytes_per_token, ready_s):
        self.llama_bench, self.format, self.file, self.ready_s = llama_bench, f"llama.cpp-{name}", file, ready_s
        self.rates, self.bytes_per_token = {}, bytes_per_token

    def measure(self, s, tokens):
        return {"decode": self.bench(0, s.new_tokens, PROMPT), "prompt": self.bench(s.prompt_tokens, 0, 0)}

    def bench(self, prompt, new, depth):
        """Tokens/s of a prompt, or of new tokens after `depth` earlier ones. llama-bench warms up by itself."""
        sizes = f"-p {prompt} -n {new} -d {depth} -t {torch.get_num_threads()} -r 1 -o json"
        text = call(self.llama_bench, "-m", self.file, *sizes.split())
        try:
            [result] = json.loads(text)
            self.build = {key: result[key] for key in ("build_commit", "build_number")}
            return float(result["avg_ts"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{self.llama_bench} prints {text[:100]!r}, and no JSON of one result with its build: take a newer llama.cpp"
            ) from None


def load_llama(s, model, folder):
    """([LlamaCpp of each format], {format: why it was left out}). Writes the files."""
    quantize = os.path.join(os.path.dirname(s.llama_bench), "llama-quantize")
    for path in (s.llama_bench, quantize):
        if not os.path.isfile(path):
            raise ValueError(f"there is no {path}: pass the path of llama-bench, with llama-quantize beside it")
    try:
        import gguf
    except ImportError:
        raise ValueError("llama_bench needs the package gguf: pip install gguf") from None
    source = os.path.join(folder, "F32.gguf")
    write_gguf(gguf, model, source)
    LlamaCpp(s.llama_bench, "F32", source, 0, 0).bench(0, 1, 1)  # may fail, so before the long work
    ways, left_out = [], {}
    for name in LLAMA:
        file, start = os.path.join(folder, f"{name}.gguf"), time.perf_counter()
        kind = "MXFP4_MOE" if name == "MXFP4" else name  # --pure makes all matrices MXFP4
        try:
            if file != source:
                call(quantize, "--pure", source, file, kind, str(torch.get_num_threads()))
            tensors = [t for t in gguf.GGUFReader(file).tensors if t.name != "position_embd.weight"]
            types = {t.tensor_type.name for t in tensors if len(t.shape) == 2}
            if types != {name}:
                raise ValueError(f"these shapes become {', '.join(sorted(types))}")
        except ValueError as e:
            left_out[f"llama.cpp-{name}"] = str(e)
            print(f"llama.cpp-{name} is left out: {e}")
            continue
        size = sum(int(t.n_bytes) for t in tensors)
        ways.append(LlamaCpp(s.llama_bench, name, file, size, time.perf_counter() - start))
        print(f"{ways[-1].format:<19}ready in {ways[-1].ready_s:5.1f} s", flush=True)
    return ways, left_out


def write_gguf(gguf, model, path):
    """Writes the float32 weights without a tokenizer."""
    c = model.config
    if c.vocab_size % 16:
        raise ValueError(
            f"a vocabulary of {c.vocab_size} keeps llama.cpp from its fast code, which takes up to 16 rows of weights "
            "at once: pass --vocab_multiple=64"
        )
    writer = gguf.GGUFWriter(path, "llama" if c.position == "rotary" else "gpt2")
    sizes = {"context_length": c.block_size, "embedding_length": c.n_embd, "feed_forward_length": c.n_inner}
    sizes |= {"block_count": c.n_layer, "attention.head_count": c.n_head, "attention.head_count_kv": c.n_kv_head}
    for key, size in (sizes | {"rope.dimension_count": c.head_size, "vocab_size": c.vocab_size}).items():
        writer.add_uint32(f"{writer.arch}.{key}", size)
    writer.add_layer_norm_eps(c.norm_eps)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_tokenizer_model("no_vocab")  # llama-bench makes up tokens
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, c.n_layer)
    split, kv = {}, c.n_kv_head * c.head_size
    if writer.arch == "llama":  # the rows of queries and keys keep our order, which makes no difference to speed
        split["attn_qkv"] = ("attn_q", "attn_k", "attn_v"), (c.n_head * c.head_size, kv, kv)
        split["ffn_up"] = ("ffn_gate", "ffn_up"), (c.n_inner, c.n_inner)
    for name, p in model.named_parameters():  # without the head, if it is the token table
        name = names.get_name(name, (".weight", ".bias"))
        own = name.split(".")[-2]
        parts, rows = split.get(own, ((own,), len(p)))
        for part, t in zip(parts, p.detach().split(rows)):
            writer.add_tensor(name.replace(own, part), t.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# -----------------------------------------------------------------------------
# Single layers


@torch.no_grad()
def single_layers(s, model):
    """How many times as fast as in float32 each shape of linear layer is in each packed way, for 1 to 512 rows of
    inputs. A round multiplies by many copies of a layer in turn; see COPIES."""
    table, layers = [], [m for m in model.modules() if isinstance(m, nn.Linear)]
    for (out, width), layer in {m.weight.shape: m for m in layers}.items():
        x, count = torch.randn(max(ROWS), width), -(-COPIES // layer.weight.nbytes)
        ways = {("float32", "eager"): [copy.deepcopy(layer) for _ in range(count)]}
        for format, way in [(f, way) for f in PACKED for way in WAYS[f]]:
            packed = nn.Sequential(copy.deepcopy(layer))
            prepare(packed, PACKED[format])
            convert(packed)
            expected = F.linear(x, packed[0].weight, packed[0].bias)
            if way == "int8":
                allow_int8_activations(packed)
            for n in ROWS:
                error = relative_error(packed(x[:n]), expected[:n])
                if not error <= WAYS[format][way]:
                    raise ValueError(f"{format} {way}: {n} rows of {out} x {width} are off by {error:.2g}")
            ways[format, way] = [copy.deepcopy(packed[0]) for _ in range(count)]
        seconds = {(way, n): [] for n in ROWS for way in ways}
        for i in range(s.rounds + 1):
            for (way, n), times in seconds.items():
                start = time.perf_counter()
                for copied in ways[way]:
                    copied(x[:n])
                if i > 0:  # the first round warms up
                    times.append((time.perf_counter() - start) / count)
        print(f"\n{out} x {width}: times as fast as float32\nrows{'':<22}" + "".join(f"{n:>7}" for n in ROWS))
        for way in ways:
            times = [(seconds[way, n], seconds[next(iter(ways)), n]) for n in ROWS]
            ratios = [quartiles([base / t for t, base in zip(*both)]) for both in times]
            print("{:<12}{:<14}".format(*way) + "".join(f"{median:7.2f}" for _, median, _ in ratios), flush=True)
            row = {"shape": (out, width), "format": way[0], "way": way[1], "rows": ROWS, "ratio": ratios}
            table.append(row | {"us": [1e6 * statistics.median(ts) for ts, _ in times]})
    return {"rows": table}


# -----------------------------------------------------------------------------
# QAT


def qat(s, model):
    """Times a training step: float, fake-quantized, and fake-quantized towards a float teacher's predictions, as in
    train.py with distill=1."""
    if s.block_size > model.config.block_size:
        raise ValueError(
            f"block_size={s.block_size} is more than the context of {s.ckpt or s.model}: {model.config.block_size}"
        )
    device = machine.pick_device(s.device)
    machine.keep_freed_memory()  # as train.py does
    teacher = copy.deepcopy(model).to(device)
    model.to(device).train()
    config = PoTConfig()
    prepare(model, config)
    quantizers = [m for m in model.modules() if isinstance(m, PoTQuantizer)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device != "mps")
    tokens = torch.randint(model.config.vocab_size, (s.batch_size, s.block_size + 1), device=device)
    x, y = tokens[:, :-1], tokens[:, 1:]

    def step(distill):
        start = time.perf_counter()
        if distill:
            with torch.no_grad():
                soft = teacher(x).flatten(0, 1).float().softmax(-1)
            loss = F.cross_entropy(model(x).flatten(0, 1).float(), soft)
        else:
            loss = model(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - start

    # All kinds of steps use one model, and so the same memory; its quantizers are switched off and on.
    seconds = {"float32": [], str(config): [], "distilled": []}
    for i in range(s.rounds + 1):
        for name, times in seconds.items():
            for q in quantizers:
                q.enabled = name != "float32"
            _, *timed = [step(name == "distilled") for _ in range(s.steps + 1)]
            mean = statistics.mean(timed)
            if i > 0:  # the first round warms up
                times.append(mean)
            print(f"round {i}/{s.rounds}  {name:<28} {mean:.3f} s", flush=True)

    print(f"\nA step of {s.batch_size} x {s.block_size} tokens: seconds, and ratio to float32; median (quartiles)")
    rows = []
    for name, times in seconds.items():
        ratios = [t / base for t, base in zip(times, seconds["float32"])]  # in the same round
        row = {"step_s": [round(q, 4) for q in quartiles(times)], "ratio": [round(q, 4) for q in quartiles(ratios)]}
        print(f"{name:<28} " + "   ".join("{1:.3f} ({0:.3f}, {2:.3f})".format(*q) for q in row.values()))
        rows.append({"name": name} | row)
    return {"rows": rows, "steps": s.steps, "tokens": s.batch_size * s.block_size}


if __name__ == "__main__":
    run(main, Settings)
