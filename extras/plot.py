"""
Draws training runs and results. Each key draws one picture, next to its source or in --out_dir.

    python extras/plot.py --speed results/bench.json                       # decode speed against bytes read
    python extras/plot.py --sweep results/sweep_shakespeare_char.json      # loss against bits per weight and file size
    python extras/plot.py --curves out-a,out-b                             # training and validation loss of runs
    python extras/plot.py --grids out-pydoc-char                           # the levels below the weights of a layer
    python extras/plot.py --hardware results/hardware.json                 # transistors and energy of products

train.py draws loss.png and sweep.py its picture with the functions of this file.
"""

import json
import math
import os
import re
import sys
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import checkpoint  # noqa: E402
from configurator import run  # noqa: E402
from pot import PoTConfig, compute_unit, fake_quantize, sqnr  # noqa: E402

# The palette of Okabe and Ito, which colour-blind readers can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv<>p"
TITLES = {"rtn": "PTQ, nearest level", "gptq": "PTQ, GPTQ", "qat": "QAT"}  # panels of a sweep, by method


@dataclass
class Settings:
    speed: str | None = None  # JSON file of bench.py
    sweep: str | None = None  # JSON file of sweep.py
    curves: str | None = None  # folders of training runs, separated by commas
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
        first = source.split(",")[0]
        folder = s.out_dir or (first if os.path.isdir(first) else os.path.dirname(first))
        path = os.path.join(folder, name + ".png")
        try:
            draw(path)
        except (KeyError, TypeError, IndexError, AttributeError) as e:
            raise ValueError(f"{source} is not what --{key} draws ({e!r}): see --help") from None
        print(f"written to {path}")


def _stem(path):
    return os.path.splitext(os.path.basename(path or ""))[0]


def _read_json(path):
    try:
        with open(path) as f:
            return json.load(f)
    except ValueError:
        raise ValueError(f"{path} is no JSON: pass a file that bench.py or sweep.py wrote") from None


def _save(figure, path):
    checkpoint.write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    plt.close(figure)


# -----------------------------------------------------------------------------
# Training runs


def draw_training(entries: list[dict], title: str, path: str) -> None:
    """Training and validation loss of one run. entries: the result of checkpoint.read_log."""
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o--")):
        points = [(e["step"], e[key]) for e in entries if key in e]
        if points:
            ax.plot(*zip(*points), style, label=label, markersize=4)
    ax.set(xlabel="step", ylabel="loss (nats)", title=title)
    ax.legend()
    _save(figure, path)


def draw_curves(folders: list[str], path: str) -> None:
    """Losses of several runs in one picture. Raises ValueError for a folder without a log."""
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for i, folder in enumerate(folders):
        entries = checkpoint.read_log(folder)
        marked = dict(marker=MARKERS[i % 8], ms=4, label=folder)
        for key, style in (("loss", dict(alpha=0.4, lw=1)), ("val_loss", marked)):
            points = [(e["step"], e[key]) for e in entries if key in e]
            if points:
                ax.plot(*zip(*points), color=COLOURS[i % 7], **style)
    ax.set(xlabel="step", ylabel="loss (nats): validation, and training pale")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    _save(figure, path)


# -----------------------------------------------------------------------------
# Results of bench.py and sweep.py


def draw_speed(results: dict, path: str) -> None:
    """Decode speed against the bytes that a token has to read, and the line of the memory's bandwidth."""
    rows, bandwidth = results["rows"], results["read_gb_s"]
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    megabytes = [row["bytes_per_token"] / 1e6 for row in rows]
    for i, (x, row) in enumerate(zip(megabytes, rows)):
        y, (low, high) = row["decode_tok_s"], row["decode_tok_s_quartiles"]
        style = {"fmt": MARKERS[i % 8], "color": COLOURS[i % 7], "label": row["name"], "capsize": 3}
        ax.errorbar(x, y, [[y - low], [high - y]], **style)
    x = [min(megabytes) * 0.8, max(megabytes) * 1.2]
    ax.plot(x, [bandwidth * 1e3 / v for v in x], "k:", lw=1, label=f"memory: {bandwidth:.0f} GB/s")
    ax.set(xscale="log", yscale="log", xlabel="weights read a token (MB)", ylabel="decode (tokens/s)")
    ax.grid(alpha=0.3, which="both")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    ax.legend(fontsize=8)
    _save(figure, path)


def draw_sweep(table: list[dict], path: str) -> None:
    """Loss above float against bits per weight: a panel for each method, a line for each kind of weights."""
    methods = [m for m in TITLES if any(t["kind"] == m for t in table)]
    lines = {}  # label of a line: {method: [(bits per weight, loss above float, interval, range)]}
    for t in table:
        if t["config"]:
            c = PoTConfig(**t["config"])
            label = re.sub(r" \d bits|, range 2\^\d+", "", str(c))  # bits and range vary along a line
            key = "above_control" if t["kind"] == "qat" else "above"
            point = t["bits_per_weight"], t[key], t[f"{key}_interval"] or 0.0, f"$2^{{{c.range}}}$" if c.range else ""
            lines.setdefault(label, {}).setdefault(t["kind"], []).append(point)
    bytes_per_bit = table[0]["bytes"] / table[0]["bits_per_weight"]  # bytes of a file with one bit per weight
    size = (4 * len(methods), 4.5)
    figure, axes = plt.subplots(1, len(methods), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for ax, method in zip(axes[0], methods):
        for i, (label, points) in enumerate(lines.items()):
            # A method without points draws nothing, but its panel keeps the legend of all lines.
            x, y, intervals, ranges = zip(*sorted(points.get(method, [(math.nan, math.nan, 0.0, "")])))
            for a, b, text in zip(x, y, ranges):
                if text:
                    ax.annotate(text, (a, b), (3, 4), textcoords="offset points", fontsize=7, color=COLOURS[i % 7])
            style = {"fmt": MARKERS[i % 8], "ls": "-" if len(x) > 1 else "", "ms": 5}
            bars = intervals if any(intervals) else None
            ax.errorbar(x, y, bars, color=COLOURS[i % 7], label=label, capsize=3, elinewidth=0.8, **style)
        ax.set(title=TITLES[method], xlabel="bits per weight, whole file")
        megabytes = (lambda bits: bits * bytes_per_bit / 1e6, lambda mb: mb / bytes_per_bit * 1e6)
        ax.secondary_xaxis("top", functions=megabytes).set_xlabel("file, MB")
        ax.axhline(0, color="black", lw=0.8, ls=":", label="float; with QAT, trained as long")
        ax.set_yscale("symlog", linthresh=0.01)
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("loss above float (nats)")
    figure.legend(*axes[0][-1].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
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
    """Transistors of each unit, and the energy of a token against the tokens that share one read of the weights."""
    figure, (bars, ax) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=[1.2, 1], layout="constrained")
    units = results["units"]
    total = [row["mac"]["area"]["transistors"] for row in units]
    product = [row["product"]["area"]["transistors"] for row in units]
    y = range(len(units), 0, -1)
    bars.barh(y, product, color=COLOURS[0], label="the product")
    rest = [t - p for t, p in zip(total, product)]
    bars.barh(y, rest, left=product, color=COLOURS[5], label="its sum: adder and register")
    for a, b in zip(total, y):
        bars.text(a + 100, b, f"{a:,}", va="center", fontsize=8)
    bars.set(yticks=list(y), xlabel="transistors, mapped for area", xlim=(0, max(total) * 1.12))
    bars.set_yticklabels([row["title"] for row in units], fontsize=8)
    bars.legend(fontsize=8)
    tokens = [2**i for i in range(15)]  # that share a read of the weights
    model = results["energy"][0]["model"]
    rows = {row["unit"]: row for row in results["energy"] if row["model"] == model}
    titles = {row["unit"]: row["title"].split(" (")[0] for row in units}
    for i, name in enumerate(("float16", "int8", "int4", "pot", "two")):
        row = rows[name]
        joules = [row["dram_mj"][0] / n + row["products_mj"] for n in tokens]
        ax.plot(tokens, joules, color=COLOURS[i], marker=MARKERS[i], ms=4, markevery=2, label=titles[name])
    ax.plot(tokens, [rows["pot"]["dram_mj"][0] / n for n in tokens], "k:", lw=1, label="DRAM alone, 4 bits")
    lowest = min(row["products_mj"] for row in rows.values()) / 2
    ax.set(xscale="log", yscale="log", xlabel="tokens that share one read of the weights", ylim=(lowest, None))
    ax.set(ylabel="mJ a token, DRAM and products", title=f"{model}, 45 nm, estimated")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    _save(figure, path)


if __name__ == "__main__":
    run(main, Settings)
