"""
Measures checkpoints: loss and perplexity over a whole split or text, distance to the float model, and size of the file.

    python eval.py --ckpt out/                                  # any checkpoint: float, in training, packed
    python eval.py --ckpt out-a/,out-b/,out-c/                  # one table
    python eval.py --ckpt gpt2 --text FILE                      # perplexity of any text, at the model's own context
    python eval.py --ckpt out/ --sqnr=True                      # signal-to-quantization-noise ratio of each layer
    python eval.py --ckpt out/ --reference gpt2                 # distance to another model than the one it comes from
"""

import hashlib
import math
import os
import statistics
from dataclasses import dataclass

import numpy as np

import checkpoint
from checkpoint import CheckpointInfo
from configurator import check_minimum, run
from dataset import tokens_for
from machine import keep_freed_memory, pick_device, provenance
from metrics import WINDOW, evaluate, evaluate_last_position
from model import GPT
from pot import PackedPoTEmbedding, PackedPoTLinear, convert, is_prepared, sqnr


@dataclass
class Settings:
    # folder of a training run or in Hugging Face's format, or a name on the hub (gpt2, org/name); several with commas between
    ckpt: str = "out"
    dataset: str | None = None  # folder under data/; None: the data set that the model was trained on
    split: str = "test"  # train, val or test
    text: str | None = None  # a text file, instead of a split of a data set
    tokens: int | None = None  # use only this many tokens, from the start of the split or text; None: all
    block_size: int | None = None  # tokens per window; None: the model's own context, at most 1,024
    protocol: str = "windows"  # "windows": every position; "paper": last position of 1,200 random windows of 64
    # the float model to compare with; None: the model that a checkpoint comes from
    reference: str | None = None
    sqnr: bool = False  # also print each layer's signal-to-quantization-noise ratio
    seed: int = 1337  # seed of the windows of protocol "paper"
    json: str | None = None  # file for the results; None: eval.json in the last checkpoint's folder
    device: str = "auto"  # "auto", or cuda, mps or cpu


def main(s: Settings):
    device = pick_device(s.device)
    if device == "cpu":
        keep_freed_memory()
    folders = [f for f in s.ckpt.split(",") if f]
    check(s, folders)
    path = s.json or os.path.join("." if checkpoint.is_foreign(folders[-1]) else folders[-1], "eval.json")
    checkpoint.check_json(path)
    for folder in folders[1:]:  # a check alone: measuring the folders before them may take long
        info = checkpoint.load_model(folder)[1]
        load_tokens(s, info, folder)
        load_reference(s, info, folder, "cpu")
    rows = []
    for folder in folders:
        model, info = checkpoint.load_model(folder)
        if s.sqnr:
            print_sqnr(model, info, folder)
        rows.append(measure(s, convert(model), info, folder, device))
        same = (r["text_digest"] for r in rows if r["dataset"] == rows[-1]["dataset"])
        if not s.text and len(set(same)) > 1:
            raise ValueError(f"data/{rows[-1]['dataset']} was replaced while models were measured on it: start again")
    seeds = over_seeds(rows)
    checkpoint.write_json(path, {"rows": rows, "seeds": seeds, **provenance()})
    print_table(s, rows)
    for r in seeds:
        kind = f"{r['method']}, {r['weights']}, {r['steps']} steps"
        print(f"mean of seeds {r['seeds']}: {kind}: loss {r['loss_mean']:.4f} +- {r['loss_std']:.4f}")
    print(f"written to {path}")


def check(s, folders):
    check_minimum(s, tokens=2, block_size=1, seed=0)
    if not folders:
        raise ValueError("pass at least one folder to --ckpt")
    for folder in [*folders, *([s.reference] if s.reference else [])]:
        checkpoint.require_folder(folder)
    if s.protocol not in ("windows", "paper"):
        raise ValueError(f"unknown protocol {s.protocol!r}: choose windows or paper")
    if s.protocol == "paper" and s.block_size not in (None, 64):
        raise ValueError(f"block_size={s.block_size}: protocol=paper has a context of 64, leave block_size out")


def measure(s: Settings, model: GPT, info: CheckpointInfo, folder: str, device: str) -> dict:
    """A row of the table: the model of a folder, converted."""
    name, ids = load_tokens(s, info, folder)
    size = checkpoint.file_size(folder, model, info)  # first, because it may write a temporary file
    model.to(device)
    if s.protocol == "paper":
        result = evaluate_last_position(model, ids, s.seed, device)
    else:
        result = evaluate(model, ids, device, load_reference(s, info, folder, device), s.block_size)
    if not math.isfinite(result["loss"]):
        raise ValueError(f"the loss of {folder} is {result['loss']}: its file is damaged, or its training diverged")
    parameters = sum(p.numel() for p in GPT.meta(model.config).parameters())
    return {
        "ckpt": folder,
        "method": info.method,
        "weights": info.weights,
        "dataset": name,
        "split": None if s.text else s.split,
        "tokens": len(ids) - 1,
        "block_size": 64 if s.protocol == "paper" else s.block_size or min(model.config.block_size, WINDOW),
        "protocol": s.protocol,
        **result,
        "bits_per_weight": round(8 * size / parameters, 3),
        "bytes": size,
        "text_digest": hashlib.blake2b(np.ascontiguousarray(ids), digest_size=16).hexdigest(),
        "steps": info.step,
        "seed": info.settings["seed"],
    }


def load_tokens(s, info, folder):
    """(name of the text, token ids) to measure the model of a folder on."""
    name = s.text or s.dataset or info.settings["dataset"]
    return name, tokens_for(folder, info.tokenizer, name, s.split, s.text, s.tokens)


def load_reference(s, info, folder, device):
    """The float model to compare with, on the device; None if there is none at hand."""
    if s.reference == folder:
        return None
    if s.reference is not None:
        return checkpoint.load_reference(s.reference, info, folder).to(device)
    if info.origin in (None, folder) or not checkpoint.is_at_hand(info.origin):
        return None
    return checkpoint.load_origin(info, folder).to(device)


def print_sqnr(model: GPT, info: CheckpointInfo, folder: str):
    """Prints each layer's SQNR: of a model in training against its own float weights, of a PTQ model against the float
    model that it comes from."""
    pairs = [(n, m.weight, m.quantizer(m.weight)) for n, m in model.named_modules() if is_prepared(m)]
    if info.method.startswith("PTQ") and info.origin and checkpoint.is_at_hand(info.origin):
        floats = dict(checkpoint.load_origin(info, folder).named_modules())
        packed = (PackedPoTLinear, PackedPoTEmbedding)
        pairs = [(n, floats[n].weight, m.weight) for n, m in model.named_modules() if isinstance(m, packed)]
    if not pairs:
        print(
            f"{folder}: no SQNR, because there are no float weights to compare with: pass a QAT run in training, or a PTQ "
            "model whose float model is at hand"
        )
    for name, w, quantized in pairs:
        print(f"{name:<40} {sqnr(w, quantized):6.2f} dB")


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
    source = first["dataset"] + (f", {first['split']} split" if first["split"] else "")
    amount = f"{first['tokens']:,} tokens" + ("" if "window" in columns else f" in windows of {first['block_size']}")
    if s.protocol == "paper":
        amount = "last position of 1,200 random windows of 64, with standard error"
    print(f"{source}, {amount}")
    table = [list(columns)] + [[cell(r) for cell in columns.values()] for r in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        cells = [c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())


def over_seeds(rows):
    """Mean and standard deviation of the loss over seeds, for rows of the same method, weights, steps and data."""
    groups = {}
    for r in rows:
        groups.setdefault(tuple(r[k] for k in ("method", "weights", "steps", "dataset", "split")), []).append(r)
    summary = []
    for (method, weights, steps, *_), members in groups.items():
        if len({r["seed"] for r in members}) > 1:
            losses = [r["loss"] for r in members]
            row = {"method": method, "weights": weights, "steps": steps, "seeds": [r["seed"] for r in members]}
            summary.append(row | {"loss_mean": statistics.mean(losses), "loss_std": statistics.stdev(losses)})
    return summary


if __name__ == "__main__":
    run(main, Settings)
