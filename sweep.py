"""
Quantizes a float model in many ways and measures each: rounded to nearest (rtn), by GPTQ (gptq), and by QAT (qat),
beside a float control that is trained as long as QAT on the same batches.

    python sweep.py config/sweep_shakespeare_char.py

Each row is a checkpoint of train.py, measured by eval.py. out_dir/rows.jsonl keeps a row as soon as it is measured, so
a sweep that was cut goes on when it is started again, even in the middle of a QAT run. Two sweeps of different seeds or
methods may share an out_dir.
"""

import json
import math
import os
import re
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import checkpoint
import dataset
import train
from configurator import CONTROL, check_minimum, check_names, configure, run
from eval import Settings as EvalSettings
from eval import check, measure
from machine import keep_freed_memory, pick_device, provenance
from metrics import WINDOW, perplexity
from model import GPT
from pot import PoTConfig, convert, prepare

METHODS = ("rtn", "gptq", "qat")
RESULTS = (".json", ".md", ".png")
GPTQ_TOKENS = 16384
NUMBERS = {"tokens", "block_size", "loss", "bits_per_weight", "bytes", "steps", "seconds", "seed"}  # of a row
TYPES = dict.fromkeys(NUMBERS, int | float) | dict.fromkeys(("name", "kind", "weights", "dataset", "split"), str)
TYPES |= {"papers": object, "tokens_seen": int | None, "config": dict | None}
OPTIONAL = {"shared": dict, "float": str, "data": str | None, "kl": int | float, "top1_agreement": int | float}
# Settings that all rows of an out_dir share: of this script, and of train.py in the config `finetune`. A row's name
# holds the others.
SHARED = ("init_from", "calibrate_tokens", "split", "tokens", "protocol")
SHARED_TRAINING = (
    *("dataset", "calibrate_tokens", "block_tokens", "distill", "last_position", "block_size", "dropout", "dtype"),
    *("batch_size", "gradient_accumulation_steps", "learning_rate", "min_lr", "warmup_iters"),
    *("weight_decay", "beta1", "beta2", "grad_clip"),
)  # fmt: skip


@dataclass
class Settings:
    init_from: str = "out"  # the float model: a folder, gpt2, ...; {seed} in it stands for the seed
    # train.py's config for QAT and the float control
    finetune: str = "config/finetune_shakespeare_char_pot4.py"
    # a dict of PoTConfig's keys for each row; also "seeds", and "papers": {method: loss that the papers report}
    weights: list | None = None
    methods: str = "rtn,gptq,qat"  # methods to run, with commas between them
    # seeds of batches and calibration text, with commas between them; a row of weights may have its own
    seeds: str = "1337"
    max_iters: int | None = None  # QAT steps; None: those of finetune
    calibrate_tokens: int | None = None  # for gptq and the start of qat; None: 16,384 for gptq, finetune's for qat

    # --- measuring and results ---
    split: str = "test"  # train, val or test
    tokens: int | None = None  # use only this many tokens, from the start of the split; None: all
    protocol: str = "windows"  # "windows": every position; "paper": last position of 1,200 random windows of 64
    out_dir: str = "out-sweep"  # folder of the checkpoints and of rows.jsonl
    results: str = "sweep"  # written: .json, .md and .png with this name
    left_out: str = ""  # a note below the table
    device: str = "auto"  # "auto", or cuda, mps or cpu


def main(s: Settings):
    check_minimum(s, max_iters=0, calibrate_tokens=1, tokens=2)
    check_names(s, "out_dir", "init_from")
    methods = [m for m in s.methods.split(",") if m]
    if unknown := [m for m in methods if m not in METHODS]:
        raise ValueError(f"methods={s.methods}: there is no {unknown[0]}, choose among {', '.join(METHODS)}")
    plan = plan_of(s, methods)
    folders = sorted({s.init_from.replace("{seed}", str(seed)) for *_, seed in plan})
    check(EvalSettings(split=s.split, tokens=s.tokens, protocol=s.protocol), folders)
    checkpoint.check_writable(s.out_dir)
    for suffix in RESULTS:
        checkpoint.check_file(s.results + suffix)
    if pick_device(s.device) == "cpu":
        keep_freed_memory()
    os.makedirs(s.out_dir, exist_ok=True)
    path = os.path.join(s.out_dir, "rows.jsonl")
    training = configure(train.Settings, [s.finetune])
    s = replace(s, max_iters=training.max_iters if s.max_iters is None else s.max_iters)
    digests = {}
    for folder in folders:
        model, info = checkpoint.load_float(folder)
        digests[folder], shape = checkpoint.digest_of(model), info.model_args
    for config in {str(c): c for _, c, *_ in plan if c}.values():  # notice a bad group size before any row
        prepare(GPT.meta(shape), config)
    if s.max_iters < 1 and "qat" in methods:
        raise ValueError(f"max_iters={s.max_iters}: QAT takes at least 1 step; for PTQ only, pass --methods=rtn,gptq")
    if s.calibrate_tokens is not None:
        training = replace(training, calibrate_tokens=s.calibrate_tokens)
    shared = {key: getattr(s, key) for key in SHARED} | {"calibrate_tokens": s.calibrate_tokens or GPTQ_TOKENS}
    shared |= {f"finetune.{key}": getattr(training, key) for key in SHARED_TRAINING}
    data = os.path.join("data", training.dataset)
    # Before any row, because the data set may be missing or damaged.
    digest = dataset.load_and_digest(data, "train", s.split)[-1]
    for row in read(path).values():
        if "shared" not in row:
            raise ValueError(f"{s.out_dir} holds rows of an older version of sweep.py: choose another --out_dir")
        refuse_other_settings(s, row["shared"], shared)
        base = s.init_from.replace("{seed}", str(row["seed"]))
        if base in digests and row.get("float") not in (None, digests[base]):
            raise ValueError(f"{s.out_dir} holds rows of another model than {base} holds now: choose another --out_dir")
        if row.get("data") not in (None, digest):
            raise ValueError(f"{s.out_dir} holds rows of another text than {data} holds now: choose another --out_dir")
    for i, (method, config, papers, seed) in enumerate(plan, start=1):
        name, kept = name_of(s, method, config, seed), read(path)
        if name in kept:
            continue
        left = [m for m, c, _, r in plan if name_of(s, m, c, r) not in kept]
        print(f"--- {i} of {len(plan)}: {method}, {config or 'float32'}, seed {seed}", end="")
        print(time_left(left, kept.values()), flush=True)
        float_digest = digests[s.init_from.replace("{seed}", str(seed))]
        row = {"name": name, "kind": method, "papers": papers}
        row |= make_row(s, method, config, seed, name, float_digest)
        row |= {"seed": seed, "config": asdict(config) if config else None, "float": float_digest, "data": digest}
        if dataset.load_and_digest(data, s.split)[-1] != digest:
            raise ValueError(f"{data} was replaced while a row was measured: choose another --out_dir")
        append(path, row | {"shared": shared, "provenance": provenance()})
        state = os.path.join(s.out_dir, name, checkpoint.TRAINING)
        if os.path.exists(state):  # as large as three float models, and no longer needed
            os.remove(state)
    kept = read(path)
    write(s, [kept[name_of(s, method, config, seed)] for method, config, _, seed in plan])


def time_left(methods, rows):
    """The end of a progress line, from the mean seconds of finished rows; empty before there is one. methods: of the rows
    that are left. QAT and the control stand in for each other."""
    seconds = {m: [r["seconds"] for r in rows if r["kind"] == m] for m in ("float", "control", *METHODS)}
    for method, other in (("qat", "control"), ("control", "qat")):
        seconds[method] = seconds[method] or seconds[other]
    known = [statistics.mean(seconds[m]) for m in methods if seconds[m]]
    if not known:
        return ""
    minutes = math.ceil(sum(known) / 60)
    amount = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
    return f", {'about' if len(known) == len(methods) else 'at least'} {amount} for all that is left"


def refuse_other_settings(s, kept, shared):
    if keys := sorted(key for key in shared | kept if shared.get(key) != kept.get(key)):
        kept, shared = ({key: settings.get(key) for key in keys} for settings in (kept, shared))
        raise ValueError(
            f"{s.out_dir} holds rows that were measured with {kept}, the settings say {shared}: choose another --out_dir"
        )


def plan_of(s, methods):
    """(method, PoTConfig or None, the papers' loss or None, seed) of each row, float models first."""
    seeds, plan = _seeds(s.seeds), []
    same_float = "{seed}" not in s.init_from  # then rounding to nearest gives the same for every seed
    for given in s.weights or []:
        if not isinstance(given, dict) or not isinstance(given.get("papers", {}), dict):
            raise ValueError(f"weights: {given!r} is no dict of PoTConfig's keys (and papers = {{method: loss}})")
        given = dict(given)
        row_seeds, papers = _seeds(given.pop("seeds", s.seeds)), given.pop("papers", {})
        if not all(isinstance(p, int | float | str) and not CONTROL.search(str(p)) for p in papers.values()):
            raise ValueError(f"weights: papers={papers!r} must hold numbers or short texts")
        try:
            config = PoTConfig(**given)
        except TypeError as e:
            raise ValueError(f"weights: {given}: {e}") from None
        for method in methods:
            used = row_seeds[:1] if same_float and method == "rtn" else row_seeds
            plan += [(method, config, papers.get(method), seed) for seed in used]
        seeds += [seed for seed in row_seeds if seed not in seeds]
    if not plan:
        raise ValueError('nothing to do: pass a config with weights, such as [{"bits": 4}]')
    names = [name_of(s, method, config, seed) for method, config, _, seed in plan]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ValueError(
                f"weights: {plan[i][1]!r} with seed {plan[i][3]} is there twice, and would say nothing new"
            )
    floats = [("float", seed) for seed in (seeds[:1] if same_float else seeds)]
    floats += [("control", seed) for seed in seeds if "qat" in methods]
    return [(method, None, None, seed) for method, seed in floats] + plan


def _seeds(text):
    try:
        seeds = [int(seed) for seed in str(text).split(",")]
    except ValueError:
        raise ValueError(f"seeds={text}: expected integers with commas between them") from None
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={text}: a seed is there twice, and would say nothing new")
    if not all(0 <= seed < 2**53 for seed in seeds):
        raise ValueError(f"seeds={text}: a seed must be from 0 to 2^53 - 1")
    return seeds


def name_of(s, method, config, seed):
    """Name of a row and of its folder."""
    parts = [str(config or "float"), method, f"s{seed}"]
    if method in ("qat", "control"):
        parts[1] += str(s.max_iters)
    return re.sub("[^a-z0-9]+", "-", " ".join(parts).lower())


def read(path):
    """Rows by name. A row that lacks a value, or has one of another type, is measured again."""
    if not os.path.exists(path):
        return {}
    return {row["name"]: row for row in checkpoint.read_lines(path) if is_row(row)}


def is_row(row):
    given = TYPES | {key: kind for key, kind in OPTIONAL.items() if key in row}
    if not all(key in row and isinstance(row[key], kind) for key, kind in given.items()):
        return False
    try:
        if row["config"] is not None:
            PoTConfig(**row["config"])
        kinds = METHODS if row["config"] else ("float", "control")
        numbers = NUMBERS | ({"kl", "top1_agreement"} & set(row))
        shown = not any(CONTROL.search(str(value)) for value in row.values())
        sizes = all(abs(row[key]) < 2**53 for key in numbers)
        return row["kind"] in kinds and shown and sizes and ("kl" in row) == ("top1_agreement" in row)
    except (TypeError, ValueError, OverflowError):  # of PoTConfig, or of a number beyond float
        return False


def append(path, row):
    with open(path, "a+b") as f:
        f.seek(max(0, f.seek(0, os.SEEK_END) - 1))
        cut = f.read() not in (b"", b"\n")
        f.write(b"\n" * cut + json.dumps(row).encode() + b"\n")


def make_row(s, method, config, seed, name, digest):
    """Makes the checkpoint of a row by train.py, unless it exists, and measures it by eval.py. digest: of the float model,
    see checkpoint.digest_of."""
    start, base = time.time(), s.init_from.replace("{seed}", str(seed))
    folder = base if method == "float" else os.path.join(s.out_dir, name)
    steps = s.max_iters if method in ("qat", "control") else 0
    argv = [s.finetune, f"--device={s.device}", f"--seed={seed}", f"--max_iters={steps}", "--pot=None", "--table=None"]
    argv += [f"--pot_{key}={value}" for key, value in (asdict(config) if config else {}).items()]
    if not steps:  # eval.py measures the row, so train.py need not validate on many tokens
        tokens = s.calibrate_tokens or GPTQ_TOKENS if method == "gptq" else 0
        argv += [f"--calibrate_tokens={tokens}", "--eval_tokens=1000"]
    elif s.calibrate_tokens is not None:
        argv.append(f"--calibrate_tokens={s.calibrate_tokens}")
    state = os.path.exists(os.path.join(folder, checkpoint.TRAINING))
    argv += [f"--out_dir={folder}", f"--init_from={'resume' if state else base}"]
    settings = configure(train.Settings, argv)
    if method != "float" and not os.path.exists(os.path.join(folder, checkpoint.MODEL)):
        train.main(settings)
    model, info = checkpoint.load_model(folder)
    if (checkpoint.digest_of(model) if method == "float" else info.origin_digest) not in (None, digest):
        raise ValueError(f"{base} was replaced while a row was measured: choose another --out_dir")
    seconds = time.time() - start
    measuring = EvalSettings(dataset=settings.dataset, split=s.split, tokens=s.tokens, protocol=s.protocol, seed=seed)
    row = measure(measuring, convert(model), info, folder, pick_device(s.device))
    return row | {"tokens_seen": tokens_seen(info), "seconds": round(seconds, 1)}


def tokens_seen(info):
    """Tokens of training and calibration, by a float model or after it. None if that is not known, as of GPT-2."""
    settings = info.settings
    try:
        calibration = int(settings["calibrate_tokens"]) if info.pot else 0
        length = int(settings["block_size"] or min(info.model_args.block_size, WINDOW))
        return (
            info.step * int(settings["batch_size"]) * int(settings["gradient_accumulation_steps"]) * length
            + calibration
        )
    except (KeyError, TypeError, ValueError):
        return None


def write(s, rows):
    """Writes the table, its JSON and its picture."""
    from extras.plot import draw_sweep  # here, because matplotlib takes a second to import

    first = rows[0]
    amount = f"{first['tokens']:,} tokens in windows of {first['block_size']}"
    if s.protocol == "paper":
        amount = "the last position of 1,200 random windows of 64"
    lines = [
        f"{first['dataset']}, {first['split']} split, {amount}. Above float: the loss minus that of the float model. Above "
        "control: the loss minus that of the float model trained for as long as qat. With several seeds: mean of the paired "
        "differences and its 95 % interval. Tokens seen: by the float model, or after it. s: seconds of the process that "
        "finished a row; another process may have started the row.",
        "",
        "| weights | method | tokens seen | loss | perplexity | above float | above control | KL | top-1 | bits/weight | bytes | s | papers |",
        "| --- | --- " + "| ---: " * 11 + "|",
    ]
    table = summary(rows)
    for t in table:
        seen = "" if t["tokens_seen"] is None else f"{t['tokens_seen']:,}"
        cells = [t["weights"], t["kind"], seen, f"{t['loss']:.4f}", f"{perplexity(t['loss']):.3f}"]
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
    checkpoint.write_json(s.results + ".json", {"table": table, "rows": rows, **provenance()})
    checkpoint.write(s.results + ".md", lambda path: Path(path).write_text(text, encoding="utf-8"))
    print(text)
    draw_sweep(table, s.results + ".png")
    print(f"written to {s.results}.json, .md and .png")


def summary(rows):
    """A row for all seeds of a method and config."""
    losses = {(r["kind"], r["seed"]): r["loss"] for r in rows if r["config"] is None}
    float_loss = rows[0]["loss"]  # for seeds that share the float model
    groups, table = {}, []
    for r in rows:
        groups.setdefault((r["kind"], r["weights"]), []).append(r)
    for (kind, _), members in groups.items():
        same = ("kind", "weights", "config", "steps", "tokens_seen", "bits_per_weight", "bytes", "papers")
        t = {key: members[0][key] for key in same}
        t["seeds"] = [r["seed"] for r in members]
        for key, source in (("loss", "loss"), ("kl", "kl"), ("top1", "top1_agreement"), ("seconds", "seconds")):
            t[key] = statistics.mean(r[source] for r in members) if source in members[0] else None
        for key, other, has in (("above", "float", kind != "float"), ("above_control", "control", kind == "qat")):
            above = [r["loss"] - losses.get((other, r["seed"]), float_loss) for r in members] if has else []
            t[key] = statistics.mean(above) if above else None
            t[f"{key}_interval"] = None
            if len(above) > 1:
                quantile = STUDENT[min(len(above), len(STUDENT) + 1) - 2]
                t[f"{key}_interval"] = quantile * statistics.stdev(above) / len(above) ** 0.5
        table.append(t)
    return table


STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 % quantiles of t for 2, 3, ... values


if __name__ == "__main__":
    run(main, Settings)
