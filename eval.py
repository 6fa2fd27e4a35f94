"""
Measures checkpoints: loss and perplexity over a whole split or text, distance to the float model, size of the file, and,
if asked, BERTScore of what they write.

    python eval.py --ckpt out/                                  # any checkpoint: float, QAT, packed
    python eval.py --ckpt gpt2 --text FILE                      # perplexity of any text, at the model's own context
    python eval.py --ckpt out/ --pot_bits=4                     # a float one, quantized here (PTQ)
    python eval.py --ckpt out/ --pot_bits=4 --calibrate_tokens=16384 --out_dir out-ptq/  # by GPTQ, and kept
    python eval.py --ckpt out-a/,out-b/,out-c/                  # one table
"""

import ctypes
import json
import math
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
import dataset
from configurator import check_minimum, provenance, run
from model import GPT
from pot import PoTConfig, PoTQuantizer, calibrate, convert, prepare, sqnr


@dataclass
class Settings:
    ckpt: str = "out"  # folder of a training run or of GPT-2, or gpt2, gpt2-medium, ...; several with commas between
    pot: PoTConfig | None = None  # any pot_ key quantizes a float checkpoint: PTQ
    calibrate_tokens: int = 0  # with pot_ keys: GPTQ on so many tokens of the training split; 0: round to nearest
    out_dir: str | None = None  # with pot_ keys: where to write the packed model
    # what on
    dataset: str | None = None  # folder under data/; None: the one trained on
    split: str = "test"  # train, val or test
    text: str | None = None  # a text file, instead of a data set's split
    tokens: int | None = None  # the first so many tokens of it; None: all
    block_size: int | None = None  # tokens a window; None: the model's own context
    protocol: str = "windows"  # "windows": every position; "paper": last position of 1,200 random windows of 64
    reference: str | None = None  # the float model to compare with; None: the one that a row comes from
    # what else
    sqnr: bool = False  # also print each layer's signal-to-quantization-noise ratio
    bertscore: str | None = None  # encoder, a name or folder: also score continuations; the papers': roberta-base
    bertscore_texts: int = 10  # continuations a model, 64 tokens after 64
    bertscore_temperature: float = 0.8  # that they are drawn at; the papers': 0.5 to 0.8
    seed: int = 1337  # of calibration text, protocol "paper" and continuations
    json: str | None = None  # where to write the results; None: eval.json in the last folder
    device: str = "auto"  # "auto": cuda, mps or cpu; or one of them


def main(s: Settings):
    device = pick_device(s.device)
    if device == "cpu":
        keep_freed_memory()
    folders = [f for f in s.ckpt.split(",") if f]
    check(s, folders)
    scorer = load_scorer(s, device) if s.bertscore else None
    rows = []
    for folder in folders:
        model, info = checkpoint.load_model(folder)
        if s.pot and info["pot"]:
            raise ValueError(f"{folder} is quantized already ({info['method']}): pass the float checkpoint")
        if s.sqnr and not s.pot:
            print_sqnr(model, folder)
        rows.append(measure(s, convert(model), info, folder, device))
    if s.pot:
        model, info = checkpoint.load_model(folders[0])  # anew, as measure has moved the other to the device
        name = s.dataset or info["settings"]["dataset"]
        ptq = quantize(model.to(device), s.pot, s.calibrate_tokens, name, info["tokenizer"], s.seed, device)
        if s.sqnr:
            print_sqnr(model, folders[0])
        convert(model).cpu()
        info |= {"method": ptq, "pot": asdict(s.pot), "origin": folders[0], "step": 0}
        if s.out_dir:
            checkpoint.save_model(s.out_dir, model, info | {"provenance": provenance()})
        rows.append(measure(s, model, info, s.out_dir, device))
    print_table(s, rows)
    if s.bertscore:
        add_bertscore(s, rows, scorer)
    results = {"rows": rows, "seeds": over_seeds(rows), **provenance()}
    for r in results["seeds"]:
        what = f"{r['method']}, {r['weights']}, {r['steps']} steps"
        print(f"mean of seeds {r['seeds']}: {what}: loss {r['loss_mean']:.4f} +- {r['loss_std']:.4f}")
    kept = s.out_dir or ("." if checkpoint.is_foreign(folders[-1]) else folders[-1])
    path = s.json or os.path.join(kept, "eval.json")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w") as f:
        json.dump(results, f, indent=1)
    print(f"written to {path}")
    print(json.dumps(results))


def check(s, folders):
    check_minimum(s, tokens=2, block_size=1, calibrate_tokens=0, seed=0, bertscore_texts=2, bertscore_temperature=0)
    if not folders:
        raise ValueError("pass at least one folder to --ckpt")
    for folder in folders:
        checkpoint.require_folder(folder)
    if s.pot and len(folders) != 1:
        raise ValueError("pot_ settings quantize one float checkpoint: pass one folder to --ckpt")
    for key in ("out_dir", "calibrate_tokens"):
        if getattr(s, key) and not s.pot:
            raise ValueError(
                f"--{key} goes with pot_ settings, which quantize: pass --pot_bits=4, say, or leave it out"
            )
    if s.out_dir and checkpoint.exists(s.out_dir):
        raise ValueError(f"{s.out_dir} holds a checkpoint already: choose another --out_dir")
    if s.protocol not in ("windows", "paper"):
        raise ValueError(f"unknown protocol {s.protocol!r}: choose windows or paper")
    if s.protocol == "paper" and s.block_size not in (None, 64):
        raise ValueError(f"block_size={s.block_size}: protocol=paper has a context of 64, leave block_size out")


def read(s, info, folder):
    """(token ids, name of the data set or text) that the settings say."""
    if s.text:
        tokenizer = dataset.tokenizer_of(info["tokenizer"])
        return np.array(tokenizer.encode(dataset.read_text(s.text)), dtype=np.uint16)[: s.tokens], s.text
    name = s.dataset or info["settings"]["dataset"]
    if name is None:
        raise ValueError(
            f"{folder} does not say what to evaluate it on: pass --dataset=openwebtext, say, or --text FILE"
        )
    ids, meta = dataset.load(os.path.join("data", name), s.split)
    dataset.check_vocabulary(folder, info["tokenizer"], name, meta)
    return ids[: s.tokens], name


def quantize(
    model: GPT, pot: PoTConfig, calibrate_tokens: int, name: str | None, tokenizer: dict, seed: int, device: str
) -> str:
    """Prepares a float model in place, by GPTQ if there are tokens to calibrate on: windows of the training split.
    Returns the method's name."""
    start = time.time()
    prepare(model, pot)
    if not calibrate_tokens:
        return "PTQ"
    if name is None:
        raise ValueError("--calibrate_tokens are taken from a data set: pass --dataset=openwebtext, say")
    ids, meta = dataset.load(os.path.join("data", name), "train")
    dataset.check_vocabulary("the checkpoint", tokenizer, name, meta)
    length = min(model.config.block_size, len(ids), calibrate_tokens)
    x = random_windows(ids, length, max(1, calibrate_tokens // length), seed)
    batches = x.to(device).split(max(1, BATCH // (length * model.config.vocab_size)))

    first = not dist.is_initialized() or dist.get_rank() == 0

    def progress(done, total):
        seconds = time.time() - start
        line = f"GPTQ on {x.numel():,} tokens of {name}: {done}/{total} sets of layers, "
        if first and done == total:
            print(f"{line}{seconds:.0f} s", file=sys.stderr)
        elif first and sys.stderr.isatty():
            print(f"{line}{seconds * (total - done) / done:.0f} s left  ", end="\r", file=sys.stderr)

    errors = calibrate(model, batches, progress).values()
    if first:
        before, after = (statistics.mean(e) for e in zip(*errors))
        print(f"GPTQ: mean relative output error of the layers {before:.5f} -> {after:.5f}")
    return f"PTQ, GPTQ on {x.numel():,} tokens"


def random_windows(ids: np.ndarray, length: int, count: int, seed: int) -> torch.Tensor:
    """(count, length) int64, from random places of ids."""
    if len(ids) < length:
        raise ValueError(f"{len(ids)} tokens are too few to draw windows of {length} from: pass more text")
    places = np.random.default_rng(seed).integers(len(ids) - length + 1, size=count)
    return torch.from_numpy(np.stack([ids[i : i + length] for i in places]).astype(np.int64))


def measure(s: Settings, model: GPT, info: dict, folder: str | None, device: str) -> dict:
    """One row of the table; folder is None for a model that was not written."""
    ids, name = read(s, info, folder)
    reference, other = s.reference, None
    if reference is None and info["origin"] and checkpoint.is_at_hand(info["origin"]):
        reference = info["origin"]
    model.to(device)
    if s.protocol == "paper":
        result = evaluate_as_papers(model, ids, s.seed, device)
    else:
        if reference and reference != folder:
            other, other_info = checkpoint.load_model(reference)
            dataset.check_vocabulary(reference, other_info["tokenizer"], name, info["tokenizer"])
            other.to(device)
        result = evaluate(model, ids, device, other, s.block_size)
    if s.bertscore:
        tokenizer = dataset.tokenizer_of(info["tokenizer"])
        result |= continuations(s, model, ids, tokenizer, device)
    size = checkpoint.file_size(folder, model.to("cpu"), info)
    parameters = sum(p.numel() for p in GPT.meta(model.config).parameters())
    return {
        "ckpt": folder or "(not kept)",
        "method": info["method"],
        "weights": str(PoTConfig(**info["pot"])) if info["pot"] else "float32",
        "dataset": name,
        "split": None if s.text else s.split,
        "tokens": len(ids) - 1,
        "block_size": 64 if s.protocol == "paper" else s.block_size or model.config.block_size,
        "protocol": s.protocol,
        **result,
        "bits_per_weight": round(8 * size / parameters, 3),
        "bytes": size,
        "steps": info["step"],
        "seed": info["settings"]["seed"],
    }


@torch.no_grad()
def evaluate(
    model: GPT, ids: np.ndarray, device: str = "cpu", reference: GPT | None = None, block_size: int | None = None
) -> dict[str, float]:
    """Mean loss (nats) and perplexity over ids, cut into fixed windows without overlap, of the model's context or of
    block_size, every position but the first counted.

    With a reference model also the mean KL divergence from it (nats) and how often both have the same likeliest token.
    Uses no random numbers and leaves the model in the mode that it was in.
    """
    block_size = model.config.block_size if block_size is None else block_size
    if len(ids) < 2:
        raise ValueError(f"{len(ids)} tokens cannot be evaluated: pass at least 2")
    if not 1 <= block_size <= model.config.block_size:
        raise ValueError(f"block_size={block_size} must be at least 1 and fit the model's {model.config.block_size}")
    training = model.training
    model.eval()
    loss = kl = same = 0.0
    batch_size = max(1, min(64, BATCH // (block_size * model.config.vocab_size)))
    batches = -(-len(ids) // (batch_size * block_size))
    windows = dataset.windows(ids, block_size, batch_size)
    for x, y in tqdm(windows, total=batches, delay=5, leave=False, disable=None):
        x, y = x.to(device), y.to(device)
        log_p, top = log_probabilities(model, x)
        loss += F.nll_loss(log_p, y.flatten(), reduction="sum").item()
        if reference is not None:
            log_q, other_top = log_probabilities(reference, x)
            kl += F.kl_div(log_p, log_q, reduction="sum", log_target=True).item()
            same += (top == other_top).sum().item()
    model.train(training)
    n = len(ids) - 1
    result = {"loss": loss / n, "perplexity": perplexity(loss / n)}
    return result if reference is None else result | {"kl": kl / n, "top1_agreement": same / n}


def log_probabilities(model, x):
    """Of every position's next tokens (B * T, vocab_size), in nats, and the likeliest token (B * T)."""
    logits = model(x).float().flatten(0, 1)
    return logits.log_softmax(-1), logits.argmax(-1)


BATCH = 2**26  # logits at a time: 256 MiB


@torch.no_grad()
def evaluate_as_papers(model: GPT, ids: np.ndarray, seed: int, device: str) -> dict[str, float]:
    """Loss (nats) of the last position in 100 x 12 random windows of 64, as arXiv 2601.02298 measures it, with its
    standard error; seeded, so that all models see the same."""
    if model.config.block_size < 64:
        raise ValueError(f"protocol=paper takes a context of 64, this model has {model.config.block_size}")
    rows = random_windows(ids, 65, 1200, seed).to(device)
    losses = [F.cross_entropy(model(x[:, :-1])[:, -1].float(), x[:, -1], reduction="none") for x in rows.split(12)]
    losses = torch.cat(losses)
    loss = losses.mean().item()
    return {"loss": loss, "perplexity": perplexity(loss), "loss_se": losses.std().item() / len(losses) ** 0.5}


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def print_sqnr(model, folder):
    found = [(name, m) for name, m in model.named_modules() if isinstance(getattr(m, "quantizer", None), PoTQuantizer)]
    if not found:
        print(
            f"{folder}: no float weights beside quantized ones, so no SQNR: it takes a QAT run in training, or PTQ by pot_ settings"
        )
    for name, m in found:
        print(f"{name:<40} {sqnr(m.weight, m.quantizer(m.weight)):6.2f} dB")


def print_table(s, rows):
    columns = {
        "checkpoint": lambda r: r["ckpt"],
        "method": lambda r: r["method"],
        "weights": lambda r: r["weights"],
        "steps": lambda r: str(r["steps"]),
        "loss": lambda r: f"{r['loss']:.4f}" + (f" +- {r['loss_se']:.4f}" if "loss_se" in r else ""),
        "perplexity": lambda r: f"{r['perplexity']:.3f}",
        "KL": lambda r: f"{r['kl']:.4f}" if "kl" in r else "",
        "top-1": lambda r: f"{r['top1_agreement']:.1%}" if "kl" in r else "",
        "bits/weight": lambda r: f"{r['bits_per_weight']:.2f}",
        "bytes": lambda r: f"{r['bytes']:,}",
    }
    first = rows[0]
    if len({r["block_size"] for r in rows}) > 1:
        columns["window"] = lambda r: str(r["block_size"])
    where = first["dataset"] + (f", {first['split']} split" if first["split"] else "")
    how = f"{first['tokens']:,} tokens in windows of {first['block_size']}"
    if "window" in columns:
        how = f"{first['tokens']:,} tokens"
    if s.protocol == "paper":
        how = "last position of 1,200 random windows of 64, with standard error"
    print(f"{where}, {how}")
    _print_columns([list(columns)] + [[cell(r) for cell in columns.values()] for r in rows], left=3)


def _print_columns(table, left):
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())


def over_seeds(rows):
    """Mean and standard deviation of the loss over the seeds of rows that are alike in method, weights, steps and data."""
    groups = {}
    for r in rows:
        groups.setdefault(tuple(r[k] for k in ("method", "weights", "steps", "dataset", "split")), []).append(r)
    summary = []
    for (method, weights, steps, *_), found in groups.items():
        if len({r["seed"] for r in found}) > 1:
            losses = [r["loss"] for r in found]
            row = {"method": method, "weights": weights, "steps": steps, "seeds": [r["seed"] for r in found]}
            summary.append(row | {"loss_mean": statistics.mean(losses), "loss_std": statistics.stdev(losses)})
    return summary


def continuations(s, model, ids, tokenizer, device):
    """What the model writes after prompts of 64 tokens, 64 tokens each, top-k 200 (the BERTScore of arXiv 2601.02298);
    the same prompts and random numbers for every model."""
    windows = random_windows(ids, 128, s.bertscore_texts, s.seed).to(device)
    written = []
    for i, x in enumerate(windows.split(10)):  # few at a time, as each has a KV cache
        generator = torch.Generator(device).manual_seed(s.seed + i)
        new = model.generate(x[:, :64], 64, s.bertscore_temperature, 200, generator)
        written += torch.cat(list(new), dim=1).tolist()
    found = {}
    for key, rows in (("written", written), ("true", windows[:, 64:].tolist())):
        texts = [tokenizer.decode_bytes(row).decode("utf-8", "replace") for row in rows]
        found[key] = [t if t.strip() else "." for t in texts]  # bert-score cannot score an empty text
    return found


def load_scorer(s, device):
    """bert-score's scorer for an encoder on the hub or in a folder, rescaled if bert-score has a baseline for it. A folder
    called like an encoder that bert-score knows is taken for that."""
    import bert_score
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name = os.path.basename(os.path.normpath(s.bertscore)) if os.path.isdir(s.bertscore) else s.bertscore
    baseline = os.path.join(os.path.dirname(bert_score.__file__), "rescale_baseline", "en", f"{name}.tsv")
    try:
        # The layer that bert-score recommends; of an encoder that it does not know, the last.
        layers = bert_score.utils.model2layers.get(name) or AutoConfig.from_pretrained(s.bertscore).num_hidden_layers
        return bert_score.BERTScorer(
            s.bertscore, layers, device=device, lang="en", rescale_with_baseline=os.path.isfile(baseline), baseline_path=baseline
        )  # fmt: skip
    except Exception as e:  # of transformers or the hub, by version and by what is wrong with the name or the network
        raise ValueError(
            f"cannot load the encoder {s.bertscore} ({type(e).__name__}): pass a name on the Hugging Face hub, with a "
            "network, or a folder that holds an encoder and its tokenizer"
        ) from None


def add_bertscore(s, rows, scorer):
    """Puts the BERTScore of the rows' continuations against the true ones in their place, and prints a table.

    Means with 95 % bootstrap intervals over the texts; the last column is paired: a row's F1 minus the first row's.
    """
    layers, rescaled = scorer.num_layers, scorer.rescale_with_baseline
    draws = np.random.default_rng(s.seed).integers(s.bertscore_texts, size=(10_000, s.bertscore_texts))

    def interval(scores):  # mean, lower, upper
        means = scores[draws].mean(1)
        return [round(float(v), 5) for v in (scores.mean(), *np.quantile(means, (0.025, 0.975)))]

    f1, table = [], [["checkpoint", "precision", "recall", "F1", "95 %", "F1 - first", "95 %"]]
    for r in rows:
        p, recall, f = (t.double().numpy() for t in scorer.score(r.pop("written"), r.pop("true")))
        f1.append(f)
        r["bertscore"] = found = {"encoder": s.bertscore, "layer": layers, "rescaled": rescaled, "texts": len(f)}
        found |= {
            "precision": p.mean(),
            "recall": recall.mean(),
            "f1": interval(f),
            "f1_difference": interval(f - f1[0]),
        }
        mean, *ends = found["f1"]
        difference, *its = found["f1_difference"]
        both = [f"{a:.4f} to {b:.4f}" for a, b in (ends, its)]
        first = len(f1) == 1
        table.append([r["ckpt"], f"{p.mean():.4f}", f"{recall.mean():.4f}", f"{mean:.4f}", both[0]])
        table[-1] += ["", ""] if first else [f"{difference:.4f}", both[1]]
    how = "rescaled with bert-score's baseline" if rescaled else "not rescaled"
    print(f"BERTScore by {s.bertscore}, layer {layers}, {how}; {s.bertscore_texts} texts of 64 tokens after 64")
    _print_columns(table, left=1)


def keep_freed_memory():
    """Has glibc keep what a step frees for the next one. By default it hands large tensors back to the system, which
    then clears every page anew: logits in evaluating, and in QAT as many fake-quantized weights as weights. Other C
    libraries are left as they are."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    if mallopt(m_mmap_threshold, 2**30):  # glibc before 2.35 refuses more than 32 MiB
        mallopt(m_trim_threshold, 2**31 - 1)


def pick_device(device: str) -> str:
    """The device's name, "auto" resolved. Raises ValueError if it cannot be used."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if torch.device(device).type in ("cpu", "cuda", "mps"):
            torch.empty(0, device=device)
            return device
        why = "not one of cpu, cuda and mps"
    except (RuntimeError, AssertionError) as e:
        why = str(e).splitlines()[0]
    raise ValueError(f"device={device} cannot be used: {why}; try --device=cpu")


if __name__ == "__main__":
    run(main, Settings)
