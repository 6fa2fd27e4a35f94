"""
Draws training runs and results. Each key draws one picture, next to its source or in --out_dir.

    python extras/plot.py --speed results/bench.json                       # decode speed against bytes read
    python extras/plot.py --sweep results/sweep_shakespeare_char.json      # loss above float of each kind of weights
    python extras/plot.py --curves "our QAT=out-a,control=out-b"           # training and validation loss of runs
    python extras/plot.py --grids out-pydoc-char                           # the levels below the weights of a layer
    python extras/plot.py --hardware results/hardware.json                 # transistors of units, and the energy of a token

train.py draws loss.png and sweep.py its picture with the functions of this file.
"""

import json
import os
import re
import sys
from dataclasses import dataclass

os.environ["MPLBACKEND"] = "Agg"  # a notebook sets another one, which need not be installed
import matplotlib.pyplot as plt  # noqa: E402

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import checkpoint  # noqa: E402
from configurator import run  # noqa: E402
from pot import PoTConfig, compute_unit, fake_quantize, sqnr  # noqa: E402

# The palette of Okabe and Ito, which colour-blind readers can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv<>p"
METHODS = {"rtn": "PTQ, nearest level", "gptq": "PTQ, GPTQ", "qat": "QAT"}  # of sweep.py
FORMATS = {  # of bench.py
    "float32": "float32, PyTorch as it comes", "float32-best": "float32, fastest way", "int8": "PyTorch's dynamic int8",
    "int4": "uniform 4 bits, our kernel", "pot4": "PoT 4 bits", "pot4-two": "two-term PoT 4 bits",
}  # fmt: skip


@dataclass
class Settings:
    speed: str | None = None  # JSON file of bench.py
    sweep: str | None = None  # JSON file of sweep.py
    curves: str | None = None  # folders of training runs, separated by commas; NAME=FOLDER names a run
    grids: str | None = None  # folder of a float model
    layer: str = "transformer.h.0.mlp.c_fc"  # for --grids: the layer to show
    hardware: str | None = None  # JSON file of extras/hardware/hardware.py
    out_dir: str | None = None  # folder of the pictures; None: next to the source


def main(s: Settings):
    pictures = {  # key: (source, name of the picture, function that draws it)
        "speed": (s.speed, "speed", lambda path: draw_speed(_read_json(s.speed), path)),
        "sweep": (s.sweep, _stem(s.sweep), lambda path: draw_sweep(_read_json(s.sweep)["table"], path)),
        "curves": (s.curves, "curves", lambda path: draw_curves(s.curves.split(","), path)),
        "grids": (s.grids, "grids", lambda path: draw_grids(s.grids, s.layer, path)),
        "hardware": (s.hardware, _stem(s.hardware), lambda path: draw_hardware(_read_json(s.hardware), path)),
    }
    pictures = {key: picture for key, picture in pictures.items() if picture[0]}
    if not pictures:
        raise ValueError(
            "nothing to draw: pass --speed, --sweep, --curves, --grids or --hardware; --help explains them"
        )
    for key, (source, name, draw) in pictures.items():
        first = source.split(",")[0].rpartition("=")[2]
        folder = s.out_dir or (first if os.path.isdir(first) else os.path.dirname(first))
        path = os.path.join(folder, name + ".png")
        try:
            draw(path)
        except (LookupError, TypeError, AttributeError, ArithmeticError) as e:
            raise ValueError(f"{source} is not what --{key} draws ({e!r}): see --help") from None
        print(f"written to {path}")


def _stem(path):
    return os.path.splitext(os.path.basename(path or ""))[0]


def _read_json(path):
    try:
        with open(path) as f:
            return json.load(f)
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is no JSON: pass a file that bench.py or sweep.py wrote") from None


def _save(figure, path):
    checkpoint.write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    plt.close(figure)


# -----------------------------------------------------------------------------
# Training runs


def draw_training(entries: list[dict], title: str, path: str) -> None:
    """Training and validation loss of one run, both of the text, and the line of the float model that QAT starts from.
    entries: the result of checkpoint.read_log."""
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for points, label, style in zip(_losses(entries), ("training", "validation"), ("-", "o--")):
        if points:
            ax.plot(*zip(*points), style, label=label, markersize=4)
    for e in entries:
        if "float_loss" in e:
            ax.axhline(e["float_loss"], color="black", lw=0.8, ls=":", label="validation, float model before training")
    ax.set(xlabel="step", ylabel="loss on the text (nats)", title=_plain(title))
    ax.legend()
    _save(figure, path)


def _plain(name):
    return name.replace("$", r"\$")  # matplotlib reads what is between two as a formula


def _losses(entries):
    """[(step, loss), ...] of training and of validation, both of the text, so that they and other runs compare."""
    logged = [e for e in entries if "loss" in e]
    starts = [0, *(e["step"] for e in logged)]  # a loss is the mean of the steps since then, so it belongs between
    training = [((start + e["step"]) / 2, e.get("text_loss", e["loss"])) for start, e in zip(starts, logged)]
    return training, [(e["step"], e["val_loss"]) for e in entries if "val_loss" in e]


def draw_curves(runs: list[str], path: str) -> None:
    """Losses of several runs on the text, in one picture. runs: FOLDER or NAME=FOLDER. Raises ValueError for a folder
    without a log."""
    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, given in enumerate(runs):
        name, _, folder = given.rpartition("=")
        entries = checkpoint.read_log(folder)
        marked = dict(marker=MARKERS[i % 8], ms=4, label=_plain(name or os.path.basename(os.path.normpath(folder))))
        for points, style in zip(_losses(entries), (dict(alpha=0.4, lw=1), marked)):
            ax.plot(*zip(*points) if points else ([], []), color=COLOURS[i % 7], **style)
    ax.set(xlabel="step", ylabel="loss on the text (nats); pale: training")
    ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    _save(figure, path)


# -----------------------------------------------------------------------------
# Results of bench.py and sweep.py: a row for each format or kind of weights, so that no two points or labels meet


def draw_speed(results: dict, path: str) -> None:
    """Decode speed of each format, and the speed at which the memory could deliver its weights."""
    rows, bandwidth = results["rows"], results["read_gb_s"]
    figure, ax = plt.subplots(figsize=(7, 0.28 * len(rows) + 1.2), layout="constrained")
    speed = [row["decode_tok_s"] for row in rows]
    low, high = zip(*(row["decode_tok_s_quartiles"] for row in rows))
    errors = [[v - a for v, a in zip(speed, low)], [b - v for v, b in zip(speed, high)]]
    names = [FORMATS.get(row["name"], row["name"].replace("llama.cpp-", "llama.cpp ")) for row in rows]
    colours = [COLOURS[0 if "4 bits" in n else 4 if "llama" in n else 5] for n in names]
    ax.barh(names, speed, xerr=errors, height=0.7, color=colours, error_kw=dict(capsize=2, elinewidth=0.8))
    limit = [bandwidth * 1e9 / row["bytes_per_token"] for row in rows]
    ax.plot(limit, names, "|", color="black", ms=11, mew=1.5, label=f"as fast as memory is read ({bandwidth:.0f} GB/s)")
    ax.set(xlabel="decode (tokens/s)", ylim=(len(rows) - 0.4, -0.6))  # the first row on top
    ax.grid(alpha=0.3, axis="x")
    right = ax.secondary_yaxis("right")
    right.set_yticks(range(len(rows)), [f"{row['bytes_per_token'] / 1e6:.0f} MB" for row in rows])
    ax.set_title("weights read for a token", loc="right", fontsize=9)
    for axis in (ax, right):
        axis.tick_params(axis="y", length=0, labelsize=9)
    figure.legend(loc="outside lower center", fontsize=9)
    _save(figure, path)


def draw_sweep(table: list[dict], path: str) -> None:
    """Loss above float: a row for each kind of weights, a point for each method."""
    groups = {}  # kind without bits and range: {(bits, range): rows of the table}
    for t in table:
        if t["config"]:
            c = PoTConfig(**t["config"])
            kind = re.sub(r" \d bits|, range 2\^\d+", "", str(c))
            groups.setdefault(kind, {}).setdefault((c.bits, c.range or 99, str(c)), []).append(t)
    kinds = [(key[-1], members) for group in groups.values() for key, members in sorted(group.items())]
    figure, ax = plt.subplots(figsize=(7, 0.25 * len(kinds) + 1.6), layout="constrained")
    ax.axvline(0, color="black", lw=1, label="float model")
    for t in table:
        if t["kind"] == "control" and t["above"] is not None:
            ax.axvline(t["above"], color="black", lw=1, ls=":", label="float model, trained on as long as QAT")
    methods = [m for m in METHODS if any(t["kind"] == m for t in table)]
    for i, method in enumerate(methods):
        rows = [(y, t) for y, (_, members) in enumerate(kinds) for t in members if t["kind"] == method]
        y = [y + 0.25 * (i - (len(methods) - 1) / 2) for y, _ in rows]
        intervals = [t["above_interval"] or 0.0 for _, t in rows]
        bars = intervals if any(intervals) else None
        style = {"fmt": MARKERS[i], "color": COLOURS[i], "ms": 4.5, "capsize": 2, "elinewidth": 0.8}
        ax.errorbar([t["above"] for _, t in rows], y, xerr=bars, label=METHODS[method], **style)
    edges = [
        t["above"] + sign * (t["above_interval"] or 0) for _, members in kinds for t in members for sign in (-1, 1)
    ]
    for y in range(0, len(kinds), 2):
        ax.axhspan(y - 0.5, y + 0.5, color="0.95", zorder=0)
    labels = [re.sub(r", eps [\d.e-]+|, absmax", "", name) for name, _ in kinds]
    labels = [name if labels.count(short) > 1 else short for short, (name, _) in zip(labels, kinds)]
    ax.set_yticks(range(len(kinds)), [re.sub(r"2\^(\d+)", r"$2^{\1}$", label) for label in labels])
    ax.set(ylim=(len(kinds) - 0.5, -0.5), xlabel="loss above the float model (nats), logarithmic beyond 0.01")
    ax.set_xscale("symlog", linthresh=0.01)
    ticks = [0.005, 0.01, 0.03, 0.1, 0.3, 1, 3, 10]
    ax.set_xticks([-v for v in ticks] + [0] + ticks)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlim(min(1.3 * min(edges), -0.003), 1.3 * max(*edges, 0.01))
    ax.grid(alpha=0.3, axis="x")
    right = ax.secondary_yaxis("right")
    sizes = [members[0] for _, members in kinds]
    right.set_yticks(range(len(kinds)), [f"{t['bits_per_weight']:.2f}, {t['bytes'] / 1e6:.2f}" for t in sizes])
    ax.set_title("bits per weight, MB of the file", loc="right", fontsize=8)
    for axis in (ax, right):
        axis.tick_params(axis="y", length=0, labelsize=8)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    _save(figure, path)


# -----------------------------------------------------------------------------
# Grids


def draw_grids(folder: str, layer: str, path: str) -> None:
    """Histogram of the weights of a layer, and below it the levels of four grids with one scale for the whole tensor.

    Raises ValueError if the model is quantized or the layer has no weight matrix.
    """
    model, info = checkpoint.load_model(folder)
    modules = dict(model.named_modules())
    if info.pot:
        raise ValueError(f"{folder} is quantized ({info.method}): pass the float model's folder")
    if getattr(getattr(modules.get(layer), "weight", None), "ndim", 0) != 2:
        choices = ", ".join(n for n in modules if n.endswith("c_fc"))
        raise ValueError(f"{folder} has no matrix in {layer}: choose among {choices}")
    w = modules[layer].weight.detach().float()
    kinds = [{"bits": 3}, {}, {"terms": 2}, {"grid": "uniform"}]
    configs = [PoTConfig(**kind, granularity="tensor") for kind in kinds]
    top = compute_unit(w, configs[1]).item() * configs[1].top  # of single powers at 4 bits
    size = dict(figsize=(7, 4.5), height_ratios=[2, 1.3])
    figure, (histogram, ax) = plt.subplots(2, 1, sharex=True, layout="constrained", **size)
    histogram.hist((w / top).flatten().numpy(), bins=200, range=(-1.5, 1.5), color="0.75")
    title = f"{layer}, {w.shape[0]} x {w.shape[1]}"
    histogram.set(ylabel="weights", yticks=[], title=title, xlim=(-1.5, 1.5))
    for i, config in enumerate(configs):
        unit = compute_unit(w, config)
        levels = (config.table() * unit.item() / top).tolist()
        ax.plot(levels, [-i] * len(levels), "|", color=COLOURS[i], ms=14, mew=2)
        ax.text(1.48, -i + 0.2, f"{sqnr(w, fake_quantize(w, unit, config)):.1f} dB", ha="right", fontsize=8)
    ax.set(yticks=[-i for i in range(len(configs))], ylim=(-len(configs) + 0.4, 0.7))
    ax.set(xlabel="weight / top level of single powers")
    ax.set_yticklabels([str(c).split(",")[0] for c in configs], fontsize=8)
    _save(figure, path)


# -----------------------------------------------------------------------------
# Results of extras/hardware/hardware.py


def draw_hardware(results: dict, path: str) -> None:
    """Transistors of each unit of whole numbers, and the energy of a token against the tokens that share one read of the
    weights."""
    figure, (bars, ax) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=[1.1, 1], layout="constrained")
    units = [row for row in results["units"] if "common_sum" in row]
    total = [row["mac"]["area"]["transistors"] for row in units]
    product = [row["product"]["transistors"] for row in units]
    common = [row["common_sum"]["transistors"] for row in units]
    y = range(len(units), 0, -1)
    bars.barh(y, product, color=COLOURS[0], height=0.6, label="the product alone")
    rest = [t - p for t, p in zip(total, product)]
    bars.barh(y, rest, left=product, color=COLOURS[5], height=0.6, label="its sum: adder and register")
    bars.plot(common, y, "|", color="black", ms=14, mew=1.5, label="with a 32-bit sum")
    for row, t, p, position in zip(units, total, product, y):
        bars.text(p / 2, position, f"{p:,}", va="center", ha="center", fontsize=8, color="white")
        text = f"{t:,} ({row['sum_bits']} bits)"
        bars.text(t - 30, position, text, va="center", ha="right", fontsize=8)
    bars.set(yticks=list(y), xlabel="transistors, mapped for area", xlim=(0, max(common) * 1.05))
    bars.set_yticklabels(
        [row["title"].replace(" (", "\n(").replace("4 bits, ", "4 bits,\n") for row in units], fontsize=8
    )
    bars.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1))
    tokens = [2**i for i in range(15)]  # that share a read of the weights
    model = results["energy"][0]["model"]
    rows = {row["unit"]: row for row in results["energy"] if row["model"] == model}
    titles = {row["unit"]: row["title"].split(" (")[0] for row in results["units"]}
    for i, name in enumerate(("float16", "int8", "int4", "pot")):
        row = rows[name]
        joules = [row["dram_mj"][0] / n + row["products_mj"] for n in tokens]
        style = dict(color=COLOURS[i], marker=MARKERS[i], ms=4, markevery=2, ls="--" if name == "pot" else "-")
        ax.plot(tokens, joules, label=titles[name].split(",")[0], **style)
        ax.axhline(row["products_mj"], color=COLOURS[i], lw=0.7, ls=":")
    ax.set(xscale="log", yscale="log", xlabel="tokens that share one read of the weights")
    ax.set(ylabel="mJ a token")
    ax.set_title(f"{model}: products, and weights from DRAM", fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, title="dotted: products alone", title_fontsize=8)
    _save(figure, path)


if __name__ == "__main__":
    run(main, Settings)
