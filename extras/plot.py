"""
Draws what was measured. Each key makes one picture beside what it is drawn from, or in --out_dir.

    python extras/plot.py --speed results/bench.json                       # decode speed against bytes read
    python extras/plot.py --sweep results/sweep_shakespeare_char.json      # loss against bits per weight, and file size
    python extras/plot.py --curves out-a,out-b                             # training and validation loss of runs
    python extras/plot.py --grids out-pydoc-char                           # the levels over the weights of a layer
"""

import json
import os
import sys
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import checkpoint  # noqa: E402
import sweep as sweeping  # noqa: E402
import train  # noqa: E402
from configurator import run  # noqa: E402
from pot import PoTConfig, compute_scale, fake_quantize, sqnr  # noqa: E402
from sweep import COLOURS  # noqa: E402


@dataclass
class Settings:
    speed: str | None = None  # bench.py's JSON
    sweep: str | None = None  # sweep.py's JSON
    curves: str | None = None  # folders of runs, with commas between
    grids: str | None = None  # folder of a float model
    layer: str = "transformer.h.0.mlp.c_fc"  # for grids: whose weights
    out_dir: str | None = None  # where to; None: beside the source


def main(s: Settings):
    drawn = [
        (draw, source)
        for draw, source in ((speed, s.speed), (sweep, s.sweep), (curves, s.curves), (grids, s.grids))
        if source
    ]
    if not drawn:
        raise ValueError("nothing to draw: pass --speed, --sweep, --curves or --grids; --help says what they take")
    for draw, source in drawn:
        first = source.split(",")[0]
        beside = first if os.path.isdir(first) else os.path.dirname(first)
        name = draw.__name__ if draw is not sweep else os.path.splitext(os.path.basename(source))[0]
        path = os.path.join(s.out_dir or beside, name + ".png")
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        try:
            draw(s, source, path)
        except (KeyError, TypeError, IndexError, AttributeError) as e:
            raise ValueError(f"{source} is not what --{draw.__name__} draws ({e!r}): see --help") from None
        print(f"written to {path}")


def _read(path):
    try:
        with open(path) as f:
            return json.load(f)
    except ValueError:
        raise ValueError(f"{path} is no JSON: pass what bench.py or sweep.py wrote") from None


def _save(path):
    plt.savefig(path, dpi=120)
    plt.close()


def speed(s, source, path):
    found = _read(source)
    _, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for i, row in enumerate(found["rows"]):
        x, y = row["bytes_per_token"] / 1e6, row["decode_tok_s"]
        low, high = row["decode_tok_s_quartiles"]
        ax.errorbar(
            x, y, [[y - low], [high - y]], fmt="os^Dv<>p"[i % 8], color=COLOURS[i % 7], label=row["name"], capsize=3
        )
    reads = [row["bytes_per_token"] / 1e6 for row in found["rows"]]
    x = [min(reads) * 0.8, max(reads) * 1.2]
    ax.plot(x, [found["read_gb_s"] * 1e3 / v for v in x], "k:", lw=1, label=f"memory: {found['read_gb_s']:.0f} GB/s")
    ax.set(xscale="log", yscale="log", xlabel="weights read a token (MB)", ylabel="decode (tokens/s)")
    ax.grid(alpha=0.3, which="both")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    ax.legend(fontsize=8)
    _save(path)


def sweep(s, source, path):
    sweeping.plot(_read(source)["table"], path)


def curves(s, source, path):
    _, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for i, folder in enumerate(source.split(",")):
        log = os.path.join(folder, "log.jsonl")
        if not os.path.exists(log):
            raise ValueError(f"there is no {log}: pass the out_dir of training runs")
        with open(log) as f:
            entries = [e for e in map(train._entry, f) if e]
        for key, style in (
            ("loss", dict(alpha=0.4, lw=1)),
            ("val_loss", dict(marker="os^Dv<>p"[i % 8], ms=4, label=folder)),
        ):
            points = [(e["step"], e[key]) for e in entries if key in e]
            if points:
                ax.plot(*zip(*points), color=COLOURS[i % 7], **style)
    ax.set(xlabel="step", ylabel="loss (nats): validation, and training pale")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    _save(path)


def grids(s, source, path):
    model, info = checkpoint.load_model(source)
    modules = dict(model.named_modules())
    if info["pot"]:
        raise ValueError(f"{source} is quantized ({info['method']}): pass the float model's folder")
    if getattr(getattr(modules.get(s.layer), "weight", None), "ndim", 0) != 2:
        raise ValueError(
            f"{source} has no matrix in {s.layer}: choose among {', '.join(n for n in modules if n.endswith('c_fc'))}"
        )
    w = modules[s.layer].weight.detach().float()
    configs = [PoTConfig(bits=3), PoTConfig(), PoTConfig(terms=2), PoTConfig(grid="uniform")]
    fig, (top, ax) = plt.subplots(2, 1, figsize=(7, 4.5), sharex=True, layout="constrained", height_ratios=[2, 1.3])
    scale = compute_scale(w, PoTConfig(granularity="tensor")).item()
    top.hist((w / scale).flatten().numpy(), bins=200, range=(-1.5, 1.5), color="0.75")
    top.set(ylabel="weights", yticks=[], title=f"{s.layer}, {w.shape[0]} x {w.shape[1]}", xlim=(-1.5, 1.5))
    for i, config in enumerate(configs):
        one = PoTConfig(config.bits, config.grid, config.terms, granularity="tensor")
        unit = compute_scale(w, one).item() / scale / one.top
        levels = [sign * level * unit for level in one.levels() for sign in (-1, 1)]
        ax.plot(levels, [-i] * len(levels), "|", color=COLOURS[i], ms=14, mew=2)
        db = sqnr(w, fake_quantize(w, compute_scale(w, one), one))
        ax.text(1.48, -i + 0.2, f"{db:.1f} dB", ha="right", fontsize=8)
    ax.set(
        yticks=[-i for i in range(len(configs))],
        ylim=(-len(configs) + 0.4, 0.7),
        xlabel="weight / scale of single powers",
    )
    ax.set_yticklabels([str(c).split(",")[0] for c in configs], fontsize=8)
    _save(path)


if __name__ == "__main__":
    run(main, Settings)
