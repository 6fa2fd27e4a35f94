"""
Quantizes a float model in many ways and tells what each one costs: rounded to nearest (rtn), by GPTQ (gptq), and by
QAT (qat), which stands beside a float control trained equally long on the same batches.

    python sweep.py config/sweep_shakespeare_char.py

A row is kept in out_dir/rows.jsonl as soon as it is measured: a sweep that was cut goes on when it is started again,
in the middle of a QAT run if need be. Two sweeps of different seeds or methods may work on one out_dir side by side.
"""

import json
import math
import os
import re
import statistics
import time
from dataclasses import asdict, dataclass, replace

import checkpoint
import eval
import train
from configurator import check_minimum, configure, provenance, run
from pot import PoTConfig, convert

METHODS = ("rtn", "gptq", "qat")
# What all rows of an out_dir have in common, of the settings and of train.py's in finetune; the rest is in their names.
HOW = ("init_from", "calibrate_tokens", "split", "tokens", "block_size", "protocol")
TRAINING = (
    *("dataset", "calibrate_tokens", "distill", "last_position", "block_size", "dropout", "dtype"),
    *("batch_size", "gradient_accumulation_steps", "learning_rate", "min_lr", "warmup_iters"),
    *("weight_decay", "beta1", "beta2", "grad_clip"),
)  # fmt: skip


@dataclass
class Settings:
    init_from: str = "out"  # the float model: a folder, gpt2, ...; {seed} in it stands for the seed
    finetune: str = "config/finetune_shakespeare_char_pot4.py"  # train.py's config for QAT and the float control
    weights: list | None = None  # one dict of PoTConfig's keys a row; also "seeds" and "papers": {method: their loss}
    methods: str = "rtn,gptq,qat"  # which of them, with commas between
    seeds: str = "1337"  # of batches and calibration text, with commas between; a row of weights may say others
    max_iters: int | None = None  # QAT steps; None: those of finetune
    calibrate_tokens: int = 16384  # for GPTQ
    # what on, and where to
    split: str = "test"  # train, val or test
    tokens: int | None = None  # the first so many tokens of it; None: all
    block_size: int | None = None  # tokens a window; None: the model's own context
    protocol: str = "windows"  # "windows": every position; "paper": last position of 1,200 random windows of 64
    out_dir: str = "out-sweep"  # runs and rows.jsonl
    results: str = "sweep"  # written: .json, .md and .png with this name
    left_out: str = ""  # said below the table
    device: str = "auto"  # "auto": cuda, mps or cpu; or one of them


def main(s: Settings):
    check_minimum(s, max_iters=0, calibrate_tokens=1, tokens=2, block_size=1)
    methods = [m for m in s.methods.split(",") if m]
    if unknown := [m for m in methods if m not in METHODS]:
        raise ValueError(f"methods={s.methods}: there is no {unknown[0]}, choose among {', '.join(METHODS)}")
    plan = plan_of(s, methods)
    if eval.pick_device(s.device) == "cpu":
        eval.keep_freed_memory()
    for *_, seed in plan:
        checkpoint.require_folder(s.init_from.replace("{seed}", str(seed)))
    os.makedirs(s.out_dir, exist_ok=True)
    path = os.path.join(s.out_dir, "rows.jsonl")
    training = configure(train.Settings, [s.finetune])
    s = replace(s, max_iters=training.max_iters if s.max_iters is None else s.max_iters)
    how = {key: getattr(s, key) for key in HOW} | {f"finetune.{key}": getattr(training, key) for key in TRAINING}
    for row in read(path).values():
        if other := sorted(key for key in how | row["how"] if how.get(key) != row["how"].get(key)):
            theirs, ours = ({key: which.get(key) for key in other} for which in (row["how"], how))
            raise ValueError(
                f"{s.out_dir} holds rows that were measured with {theirs}, the settings say {ours}: choose another --out_dir"
            )
    for i, (method, config, papers, seed) in enumerate(plan, start=1):
        name = name_of(s, method, config, seed)
        if name in read(path):
            continue
        print(f"--- {i} of {len(plan)}: {method}, {config or 'float32'}, seed {seed}", flush=True)
        row = {"name": name, "kind": method, "papers": papers} | measured(s, method, config, seed, name)
        row |= {"seed": seed, "config": asdict(config) if config else None, "how": how, "provenance": provenance()}
        append(path, row)
        state = os.path.join(s.out_dir, name, checkpoint.TRAINING)
        if os.path.exists(state):  # as large as three float models, and of no more use
            os.remove(state)
    kept = read(path)
    rows = [kept[name_of(s, method, config, seed)] for method, config, _, seed in plan]
    write(s, rows)


def plan_of(s, methods):
    """(method, PoTConfig or None, papers' loss or None, seed) of every row: float models first."""
    seeds, plan = _seeds(s.seeds), []
    one = "{seed}" not in s.init_from  # float model: rounding it to nearest comes out the same for every seed
    for given in s.weights or []:
        if not isinstance(given, dict) or not isinstance(given.get("papers", {}), dict):
            raise ValueError(
                f"weights: {given!r} is no dict of PoTConfig's keys, with papers = {{method: loss}} perhaps"
            )
        given = dict(given)
        its, papers = _seeds(given.pop("seeds", s.seeds)), given.pop("papers", {})
        try:
            config = PoTConfig(**given)
        except TypeError as e:
            raise ValueError(f"weights: {given}: {e}") from None
        for method in methods:
            few = its[:1] if one and method == "rtn" else its
            plan += [(method, config, papers.get(method), seed) for seed in few]
        seeds += [seed for seed in its if seed not in seeds]
    if not plan:
        raise ValueError('nothing to do: pass a config with weights = [{"bits": 4}], say')
    controls = [("float", seed) for seed in (seeds[:1] if one else seeds)]
    controls += [("control", seed) for seed in seeds if "qat" in methods]
    return [(method, None, None, seed) for method, seed in controls] + plan


def _seeds(text):
    try:
        return [int(seed) for seed in str(text).split(",")]
    except ValueError:
        raise ValueError(f"seeds={text}: expected integers with commas between") from None


def name_of(s, method, config, seed):
    """Of a row, and of its folder if it is trained."""
    parts = [str(config or "float"), method, f"s{seed}"]
    if method in ("qat", "control"):
        parts[1] += str(s.max_iters)
    return re.sub("[^a-z0-9]+", "-", " ".join(parts).lower())


def read(path):
    """Rows by name."""
    if not os.path.exists(path):
        return {}
    rows = {}
    with open(path) as f:
        for line in f:
            try:
                row = json.loads(line)
            except ValueError:  # of a sweep that was killed while it wrote
                continue
            rows[row["name"]] = row
    return rows


def append(path, row):
    with open(path, "a+b") as f:
        f.seek(max(0, f.seek(0, os.SEEK_END) - 1))
        cut = f.read() not in (b"", b"\n")
        f.write(b"\n" * cut + json.dumps(row).encode() + b"\n")


def measured(s, method, config, seed, name):
    base, device, start = s.init_from.replace("{seed}", str(seed)), eval.pick_device(s.device), time.time()
    training = [s.finetune, f"--device={s.device}", f"--seed={seed}", f"--max_iters={s.max_iters}", "--pot=None"]
    training += [f"--pot_{key}={value}" for key, value in (asdict(config) if config else {}).items()]
    dataset = configure(train.Settings, training).dataset
    folder = None
    if method in ("qat", "control"):
        folder = os.path.join(s.out_dir, name)
        state = os.path.exists(os.path.join(folder, checkpoint.TRAINING))
        training += [f"--out_dir={folder}", f"--init_from={'resume' if state else base}"]
        if not os.path.exists(os.path.join(folder, checkpoint.MODEL)):  # else trained, and not measured yet
            train.main(configure(train.Settings, training))
    model, info = checkpoint.load_model(folder or base)
    if config and not folder:
        tokens = s.calibrate_tokens if method == "gptq" else 0
        ptq = eval.quantize(model.to(device), config, tokens, dataset, info["tokenizer"], seed, device)
        convert(model)
        info |= {"method": ptq, "pot": asdict(config), "origin": base, "step": 0}
    seconds = time.time() - start
    how = dict(dataset=dataset, split=s.split, tokens=s.tokens, block_size=s.block_size, protocol=s.protocol, seed=seed)
    row = eval.measure(eval.Settings(**how), model, info, folder or (None if config else base), device)
    seen = s.calibrate_tokens if method == "gptq" else 0 if method == "rtn" else tokens_seen(info, model)
    return row | {"tokens_seen": seen, "seconds": round(seconds, 1)}


def tokens_seen(info, model):
    """In training, after the float model if it goes on from one; None if that is not known, as of GPT-2."""
    its = info["settings"]
    if "batch_size" not in its:
        return None
    calibration = its["calibrate_tokens"] if info["pot"] else 0
    step = its["batch_size"] * its["gradient_accumulation_steps"] * (its["block_size"] or model.config.block_size)
    return info["step"] * step + calibration


def write(s, rows):
    """The table, its JSON and its plot."""
    first = rows[0]
    measured_on = f"{first['tokens']:,} tokens in windows of {first['block_size']}"
    if s.protocol == "paper":
        measured_on = "the last position of 1,200 random windows of 64"
    lines = [
        f"{first['dataset']}, {first['split']} split, {measured_on}. Above float, above control: the loss minus that of the "
        "float model, and minus that of the float model trained on for as long as qat; where there are several seeds, the "
        "mean of the paired differences and its 95 % interval. Tokens seen: by the float model, or after it. s: seconds of the "
        "process that finished a row, which may have gone on from another.",
        "",
        "| weights | method | tokens seen | loss | perplexity | above float | above control | KL | top-1 | bits/weight | bytes | s | papers |",
        "| --- | --- " + "| ---: " * 11 + "|",
    ]
    table = summary(rows)
    for t in table:
        seen = "" if t["tokens_seen"] is None else f"{t['tokens_seen']:,}"
        cells = [t["weights"], t["kind"], seen, f"{t['loss']:.4f}", f"{math.exp(t['loss']):.3f}"]
        for key in ("above", "above_control"):
            cells.append("" if t[key] is None else f"{t[key]:+.4f}")
            if t[f"{key}_interval"] is not None:
                cells[-1] += f" ± {t[f'{key}_interval']:.4f}"
        cells += ["", ""] if t["kl"] is None else [f"{t['kl']:.4f}", f"{t['top1']:.1%}"]
        cells += [f"{t['bits_per_weight']:.2f}", f"{t['bytes']:,}", f"{t['seconds']:.0f}", t["papers"] or ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if s.left_out:
        lines += ["", s.left_out]
    text = "\n".join(lines) + "\n"
    print(text)
    os.makedirs(os.path.dirname(s.results) or ".", exist_ok=True)
    with open(s.results + ".json", "w") as f:
        json.dump({"table": table, "rows": rows, **provenance()}, f, indent=1)
    with open(s.results + ".md", "w") as f:
        f.write(text)
    plot(table, s.results + ".png")
    print(f"written to {s.results}.json, .md and .png")


def summary(rows):
    """One row for all seeds of one method and config."""
    losses = {(r["kind"], r["seed"]): r["loss"] for r in rows if r["config"] is None}
    the_float = rows[0]["loss"]  # for seeds without one of their own: they share it
    groups, table = {}, []
    for r in rows:
        groups.setdefault((r["kind"], r["weights"]), []).append(r)
    for (kind, _), found in groups.items():
        same = ("kind", "weights", "config", "steps", "tokens_seen", "bits_per_weight", "bytes", "papers")
        t = {key: found[0][key] for key in same}
        t["seeds"] = [r["seed"] for r in found]
        for key, source in (("loss", "loss"), ("kl", "kl"), ("top1", "top1_agreement"), ("seconds", "seconds")):
            t[key] = statistics.mean(r[source] for r in found) if source in found[0] else None
        for key, beside, has in (("above", "float", kind != "float"), ("above_control", "control", kind == "qat")):
            above = [r["loss"] - losses.get((beside, r["seed"]), the_float) for r in found] if has else []
            t[key] = statistics.mean(above) if above else None
            t[f"{key}_interval"] = None
            if len(above) > 1:
                quantile = STUDENT[min(len(above), len(STUDENT) + 1) - 2]
                t[f"{key}_interval"] = quantile * statistics.stdev(above) / len(above) ** 0.5
        table.append(t)
    return table


STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 % quantiles of t, from 2 values on
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's, for all eyes


def plot(table, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = [k for k in METHODS if any(t["kind"] == k for t in table)]
    fig, axes = plt.subplots(
        1, len(kinds), figsize=(4 * len(kinds), 4.5), sharey=True, squeeze=False, layout="constrained"
    )
    lines, size = {}, table[0]["bytes"] / table[0]["bits_per_weight"]
    for t in table:
        if t["config"]:
            c = PoTConfig(**t["config"])
            label = re.sub(r" \d bits|, range 2\^\d+", "", str(c))  # what is left is one line
            power = f"$2^{{{c.range}}}$" if c.range else ""
            key = "above_control" if t["kind"] == "qat" else "above"
            point = t["bits_per_weight"], t[key], t[f"{key}_interval"] or 0.0, power
            lines.setdefault(label, {}).setdefault(t["kind"], []).append(point)
    for ax, kind in zip(axes[0], kinds):
        for i, (label, found) in enumerate(lines.items()):
            x, y, intervals, powers = zip(*sorted(found.get(kind, [(math.nan, math.nan, 0.0, "")])))
            for a, b, power in zip(x, y, powers):
                if power:
                    ax.annotate(power, (a, b), (3, 4), textcoords="offset points", fontsize=7, color=COLOURS[i % 7])
            bars = intervals if any(intervals) else None
            style = {"fmt": "os^Dv<>p"[i % 8], "ls": "-" if len(x) > 1 else "", "ms": 5}
            ax.errorbar(x, y, bars, color=COLOURS[i % 7], label=label, capsize=3, elinewidth=0.8, **style)
        ax.set(
            title={"rtn": "PTQ, nearest level", "gptq": "PTQ, GPTQ", "qat": "QAT"}[kind],
            xlabel="bits per weight, whole file",
        )
        top = ax.secondary_xaxis("top", functions=(lambda bits: bits * size / 1e6, lambda mb: mb / size * 1e6))
        top.set_xlabel("file, MB")
        ax.axhline(0, color="black", lw=0.8, ls=":", label="float; with QAT, trained as long")
        ax.set_yscale("symlog", linthresh=0.01)
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("loss above float (nats)")
    fig.legend(*axes[0][-1].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    plt.savefig(path, dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    run(main, Settings)
