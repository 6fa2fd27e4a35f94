"""
Measures checkpoints: loss and perplexity over a whole split, distance to the float model, size of the file.

    python eval.py --ckpt out/                                  # any checkpoint: float, QAT, packed
    python eval.py --ckpt out/ --pot_bits=4                     # a float one, quantized here (PTQ)
    python eval.py --ckpt out/ --pot_bits=4 --out_dir out-ptq/  # and the packed model kept
    python eval.py --ckpt out-a/,out-b/,out-c/                  # one table
"""

import json
import math
import os
import statistics
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

import checkpoint
import dataset
from configurator import provenance, run
from model import GPT
from pot import PoTConfig, PoTQuantizer, convert, prepare, sqnr


@dataclass
class Settings:
    ckpt: str = "out"  # folder of a training run, or several with commas between them
    pot: PoTConfig | None = None  # any pot_ key quantizes a float checkpoint: PTQ
    out_dir: str | None = None  # with pot_ keys: where to write the packed model
    dataset: str | None = None  # folder under data/; None: the one trained on
    split: str = "test"  # train, val or test
    tokens: int | None = None  # the first so many tokens of the split; None: all
    reference: str | None = None  # folder of the float model to compare with; None: the one that a row comes from
    sqnr: bool = False  # also print each layer's signal-to-quantization-noise ratio
    batch_size: int = 64  # windows at a time
    json: str | None = None  # where to write the results; None: eval.json in the last folder
    device: str = "auto"  # "auto": cuda, mps or cpu; or one of them


def main(s: Settings):
    device = pick_device(s.device)
    folders = [f for f in s.ckpt.split(",") if f]
    if not folders or s.batch_size < 1:
        raise ValueError("pass at least one folder to --ckpt, and a batch_size of at least 1")
    if s.pot and len(folders) != 1:
        raise ValueError("pot_ settings quantize one float checkpoint: pass one folder to --ckpt")
    if s.out_dir and not s.pot:
        raise ValueError(
            "--out_dir is where the packed model of pot_ settings goes: pass --pot_bits=4, say, or leave it out"
        )
    if s.out_dir and checkpoint.exists(s.out_dir):
        raise ValueError(f"{s.out_dir} holds a checkpoint already: choose another --out_dir")
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
        prepare(model, s.pot)
        if s.sqnr:
            print_sqnr(model, folders[0])
        convert(model)
        info |= {"method": "PTQ", "pot": asdict(s.pot), "origin": folders[0], "step": 0}
        if s.out_dir:
            checkpoint.save_model(s.out_dir, model, info | {"provenance": provenance()})
        rows.append(measure(s, model, info, s.out_dir, device))
    results = {"rows": rows, "seeds": over_seeds(rows), **provenance()}
    path = s.json or os.path.join(s.out_dir or folders[-1], "eval.json")
    print_table(rows)
    for r in results["seeds"]:
        what = f"{r['method']}, {r['weights']}, {r['steps']} steps"
        print(f"mean of seeds {r['seeds']}: {what}: loss {r['loss_mean']:.4f} +- {r['loss_std']:.4f}")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w") as f:
        json.dump(results, f, indent=1)
    print(f"written to {path}")
    print(json.dumps(results))


def measure(s, model, info, folder, device):
    """One row of the table; folder is None for a model that was not written."""
    name = s.dataset or info["settings"]["dataset"]
    ids, meta = dataset.load(os.path.join("data", name), s.split)
    dataset.check_vocabulary(folder, info["tokenizer"], name, meta)
    reference, other = s.reference, None
    if reference is None and info["origin"] and checkpoint.exists(info["origin"]):
        reference = info["origin"]
    if reference and reference != folder:
        other, other_info = checkpoint.load_model(reference)
        dataset.check_vocabulary(reference, other_info["tokenizer"], name, meta)
        other.to(device)
    result = evaluate(model.to(device), ids[: s.tokens], s.batch_size, device, other)
    size = checkpoint.file_size(folder, model.to("cpu"), info)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT(model.config).parameters())
    return {
        "ckpt": folder or "(not kept)",
        "method": info["method"],
        "weights": str(PoTConfig(**info["pot"])) if info["pot"] else "float32",
        "dataset": name,
        "split": s.split,
        "tokens": len(ids[: s.tokens]) - 1,
        "block_size": model.config.block_size,
        **result,
        "bits_per_weight": round(8 * size / parameters, 3),
        "bytes": size,
        "steps": info["step"],
        "seed": info["settings"]["seed"],
    }


@torch.no_grad()
def evaluate(model, ids, batch_size=64, device="cpu", reference=None) -> dict:
    """Mean loss (nats) and perplexity over ids, cut into fixed windows of the model's context, every position counted.

    With a reference model also the mean KL divergence from it (nats) and how often both have the same likeliest token.
    Uses no random numbers and leaves the model in the mode that it was in.
    """
    if len(ids) < 2:
        raise ValueError(f"{len(ids)} tokens cannot be evaluated: pass at least 2")
    training = model.training
    model.eval()
    loss = kl = same = 0.0
    for x, y in dataset.windows(ids, model.config.block_size, batch_size):
        x, y = x.to(device), y.to(device)
        logits = model(x).float().flatten(0, 1)
        loss += F.cross_entropy(logits, y.flatten(), reduction="sum").item()
        if reference is not None:
            theirs = reference(x).float().flatten(0, 1)
            kl += F.kl_div(logits.log_softmax(-1), theirs.log_softmax(-1), reduction="sum", log_target=True).item()
            same += (logits.argmax(-1) == theirs.argmax(-1)).sum().item()
    model.train(training)
    n = len(ids) - 1
    result = {"loss": loss / n, "perplexity": perplexity(loss / n)}
    return result if reference is None else result | {"kl": kl / n, "top1_agreement": same / n}


def perplexity(loss):
    return math.exp(loss) if loss < 700 else math.inf


def print_sqnr(model, folder):
    found = [(name, m) for name, m in model.named_modules() if isinstance(getattr(m, "quantizer", None), PoTQuantizer)]
    if not found:
        print(
            f"{folder}: no float weights beside quantized ones, so no SQNR: it takes a QAT run in training, or PTQ by pot_ settings"
        )
    for name, m in found:
        print(f"{name:<40} {sqnr(m.weight, m.quantizer(m.weight)):6.2f} dB")


def print_table(rows):
    columns = {
        "checkpoint": lambda r: r["ckpt"],
        "method": lambda r: r["method"],
        "weights": lambda r: r["weights"],
        "steps": lambda r: str(r["steps"]),
        "loss": lambda r: f"{r['loss']:.4f}",
        "perplexity": lambda r: f"{r['perplexity']:.3f}",
        "KL": lambda r: f"{r['kl']:.4f}" if "kl" in r else "",
        "top-1": lambda r: f"{r['top1_agreement']:.1%}" if "kl" in r else "",
        "bits/weight": lambda r: f"{r['bits_per_weight']:.2f}",
        "bytes": lambda r: f"{r['bytes']:,}",
    }
    table = [list(columns)] + [[cell(r) for cell in columns.values()] for r in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    print(
        f"{rows[0]['dataset']}, {rows[0]['split']} split, {rows[0]['tokens']:,} tokens in windows of {rows[0]['block_size']}"
    )
    for row in table:
        left = [cell.ljust(w) for cell, w in zip(row[:3], widths)]
        print("  ".join(left + [cell.rjust(w) for cell, w in zip(row[3:], widths[3:])]))


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


def pick_device(device):
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
