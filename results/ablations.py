"""
What matters in PTQ and QAT? The papers' character model with one thing changed at a time: validation loss above that of
the float model. Methods that did not pay have no option in calibrate.py and train.py. They are written out here.

    python results/ablations.py out-shakespeare-s1

Each row is written to results/ablations.json as soon as it is measured. A second start goes on with the missing rows.
"""

import json
import math
import os
import sys
import tempfile
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import calibrate
import checkpoint
import dataset
import pot
import train
from configurator import configure
from machine import provenance
from metrics import evaluate
from pot import PoTConfig, PoTQuantizer, compute_unit, fake_quantize, prepare, weight_matrix

STEPS = 500  # of QAT
TOKENS = 30_001  # of validation text
CALIBRATION = 16_384  # tokens of calibration text
WEIGHTS = {
    "4 bits": {},
    "two terms": {"terms": 2},
    "3 bits": {"bits": 3},
    "4 bits, per tensor": {"granularity": "tensor"},
}
CONFIG = "config/finetune_shakespeare_char_pot4.py"
RESULT = Path(__file__).with_suffix(".json")


# -----------------------------------------------------------------------------
# PTQ: alternatives to what calibrate.py does


def levels_of(w, q):
    """(levels, unit) of the weights as q rounds them: (out, groups, group_size) and (out or 1, groups, 1)."""
    unit = q.unit.float().unsqueeze(-1)
    return q.config.round_(w.float().unflatten(1, (unit.shape[1], -1)) / unit), unit


def refined_unit(target, levels, q, moment):
    """The units with the smallest output error |(target - levels x unit) x|^2, as in the second step of PoTPTQ."""
    out, groups, size = levels.shape
    if q.config.granularity == "tensor":
        flat = levels.flatten(1)
        unit = (((flat @ moment) * target).sum() / ((flat @ moment) * flat).sum()).view(1, 1)
    else:  # each row gives a linear system, because a unit multiplies the levels of one group
        seen = torch.einsum("ogs,gsn->ogn", levels, moment.unflatten(0, (groups, size)))
        a = torch.einsum("oghs,ohs->ogh", seen.unflatten(2, (groups, size)), levels).double()
        a.diagonal(dim1=1, dim2=2).add_(1e-4 * a.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True) + 1e-12)
        unit = torch.linalg.solve(a, torch.einsum("ogn,on->og", seen, target).double()).float()
    return torch.where(unit > 0, unit, q.unit.float()).to(q.unit.dtype)


def descended(target, value, q, moment, passes=3):
    """Coordinate descent: each weight in turn takes the level with the smallest output error, given all others."""
    unit = q.unit.float().unsqueeze(-1).expand(len(target), -1, target.shape[1] // q.unit.shape[1]).flatten(1)
    value, slope = value.clone(), (value - target) @ moment
    for _ in range(passes):
        for i in range(target.shape[1]):
            best = value[:, i] - slope[:, i] / moment[i, i]
            best = q.config.round_(best / unit[:, i]) * unit[:, i]
            slope += (best - value[:, i])[:, None] * moment[i]
            value[:, i] = best
    return value


def calibrating(weighted=False, refine=0, descend=False):
    """Replaces calibrate.calibrate_layer."""

    def calibrate_layer(layer, xx, dx, dd):
        w, q = weight_matrix(layer), layer.quantizer
        moment, old = calibrate.damped(xx, calibrate.DAMPING), w.clone()
        if weighted:
            q.unit = compute_unit(w, q.config, moment.diagonal()[None])
        target = old + torch.linalg.solve(moment.double(), (old @ dx).double().t()).t().float()
        lost = target - q(w)
        best, chosen = ((lost @ moment) * lost).sum().item(), (q.unit, old)  # a layer that would lose stays as it was
        for _ in range(refine + 1):
            candidate = calibrate.gptq(target, q.unit, q.config, xx)
            levels, unit = levels_of(candidate, q)
            if descend:
                candidate = descended(target, (levels * unit).flatten(1), q, moment)
                levels, unit = levels_of(candidate, q)
            lost = target - (levels * unit).flatten(1)
            if (error := ((lost @ moment) * lost).sum().item()) < best:
                best, chosen = error, (q.unit, candidate)
            q.unit = refined_unit(target, levels, q, moment)
        q.unit, weights = chosen
        w.copy_(weights)
        return 1.0, 0.0  # errors that nobody reads

    return mock.patch.object(calibrate, "calibrate_layer", calibrate_layer)


def tables_unweighted():
    """Tables of embeddings and heads keep the units of prepare, which give every weight the same importance."""
    return mock.patch.object(calibrate, "compute_unit", lambda w, config, importance=None: compute_unit(w, config))


def tables_nearest():
    """Tables of embeddings and heads are rounded to nearest."""
    return mock.patch.object(calibrate, "calibrate_shared", lambda *args: None)


PTQ = {  # name of the row: (keys of PoTConfig, number of the draw of calibration text or 0 for no GPTQ, change)
    "nearest level": ({}, 0, None),
    "GPTQ": ({}, 1, None),
    "GPTQ, second draw of its text": ({}, 2, None),
    "GPTQ, third draw of its text": ({}, 3, None),
    "GPTQ, tables' scales not weighted": ({}, 1, tables_unweighted),
    "GPTQ, tables rounded to nearest": ({}, 1, tables_nearest),
    "GPTQ, coordinate descent after it": ({}, 1, lambda: calibrating(descend=True)),
    "GPTQ, scales weighted by the inputs' mean squares": ({}, 1, lambda: calibrating(weighted=True)),
    "GPTQ, and those refined on a layer's output error": ({}, 1, lambda: calibrating(weighted=True, refine=2)),
    "GPTQ, and coordinate descent, all three": ({}, 1, lambda: calibrating(weighted=True, refine=2, descend=True)),
    "GPTQ, scales a power of two": ({"scale_format": "e8m0"}, 1, None),
    "GPTQ, groups of 32": ({"group_size": 32}, 1, None),
    "GPTQ, 8-bit activations": ({"act_bits": 8}, 1, None),
}


@torch.no_grad()
def ptq(folder, data, config, draw, change):
    model, info = checkpoint.load_model(folder)
    ids, length = dataset.load(data, "train")[0], model.config.block_size
    prepare(model, config)
    if draw:
        windows = dataset.random_windows(ids, length, CALIBRATION // length, info.settings["seed"] + draw - 1)
        with change() if change else nullcontext():
            calibrate.calibrate(model, windows.split(4096 // length))
    return evaluate(model, dataset.load(data, "val")[0][:TOKENS])["loss"]


# -----------------------------------------------------------------------------
# QAT: alternatives to what train.py does


def plain_identity():
    """The gradient passes everywhere, as in the papers."""
    return mock.patch.object(pot.FakeQuantize, "backward", staticmethod(lambda ctx, grad: (grad, None, None)))


@contextmanager
def at_start(act):
    """Calls act(model) between prepare and the optimizer. Parameters that it returns are trained, too."""
    make = train.make_optimizer

    def make_optimizer(model, s, device):
        extra = act(model)
        optimizer = make(model, s, device)
        if extra:
            optimizer.add_param_group({"params": extra, "weight_decay": 0.0})
        return optimizer

    with mock.patch.object(train, "make_optimizer", make_optimizer):
        yield


def dampened(strength=1e-2):
    """A growing force pulls weights to their levels, so that they do not oscillate (Nagel et al., arXiv 2203.11086)."""

    def act(model):
        steps = {}
        for m in model.modules():
            if isinstance(m, pot.PoTLinear) and m.quantizer not in steps:
                steps[m.quantizer] = 0
                m.weight.register_hook(lambda grad, w=m.weight, q=m.quantizer: pull(grad, w.detach(), q, steps))

    def pull(grad, w, q, steps):
        weight = strength * (1 - math.cos(math.pi * steps[q] / STEPS)) / 2
        steps[q] += 1
        off = w - fake_quantize(w, q.unit, q.config)
        off *= (w.abs().unflatten(1, (q.unit.shape[1], -1)) <= q.config.top * q.unit.float().unsqueeze(-1)).flatten(1)
        return grad + 2 * weight * off

    return at_start(act)


class LSQ(torch.autograd.Function):
    """Fake quantization with the gradient of learned scales (Esser et al., arXiv 1902.08153).

    What is learned is the value of the top level, because a step of Adam is large beside a unit.
    """

    @staticmethod
    def forward(ctx, w, scale, config):
        unit = (scale / config.top).half()
        q = fake_quantize(w, unit, config)
        ctx.save_for_backward(w, unit.float() * config.top, q)
        ctx.config = config
        return q.clone()

    @staticmethod
    def backward(ctx, grad):
        (w, scale, q), config = ctx.saved_tensors, ctx.config
        w, g, q = (t.unflatten(1, (scale.shape[1], -1)) for t in (w, grad, q))
        s = scale.unsqueeze(-1)
        inside = w.abs() <= config.edge * s
        to_scale = (g * torch.where(inside, (q - w) / s, w.sign())).sum(-1)
        to_scale = to_scale.sum(0, keepdim=True) if len(scale) == 1 else to_scale
        return (g * inside).flatten(1), to_scale / math.sqrt(w.numel() / scale.numel() * config.top), None


@contextmanager
def learned_scales():
    learned = {}

    def act(model):
        for q in [m for m in model.modules() if isinstance(m, PoTQuantizer)]:
            learned[q] = torch.nn.Parameter(q.unit.float() * q.config.top)
            q.forward = lambda w, q=q: LSQ.apply(w, learned[q], q.config)
            q.rows = lambda rows, index, q=q: LSQ.apply(
                rows.reshape(-1, rows.shape[-1]),
                learned[q] if len(learned[q]) == 1 else learned[q][index.flatten()],
                q.config,
            ).view(rows.shape)
        return list(learned.values())

    save = checkpoint.save_training

    def save_with_scales(*args, **more):
        for q, scale in learned.items():
            q.unit = (scale.detach() / q.config.top).half()
        save(*args, **more)

    with at_start(act), mock.patch.object(checkpoint, "save_training", save_with_scales):
        yield


NEAREST, TEXT = "--calibrate_tokens=0 ", "--distill=0 "
QAT = {  # name of the row: (options of train.py, change)
    "as config/finetune_shakespeare_char_pot4.py": ("", None),
    "batches and calibration text of seed 2": ("--seed=2", None),
    "batches and calibration text of seed 3": ("--seed=3", None),
    "no distillation": (TEXT, None),
    "half distillation": ("--distill=0.5", None),
    "from the nearest levels": (NEAREST, None),
    "from the nearest levels, no distillation": (NEAREST + TEXT, None),
    "learning rate 1e-4": ("--learning_rate=1e-4", None),
    "learning rate 6e-4": ("--learning_rate=6e-4", None),
    "learning rate 1e-3": ("--learning_rate=1e-3", None),
    "constant learning rate 1e-4": ("--learning_rate=1e-4 --min_lr=1e-4", None),
    "weight decay 0.1": ("--weight_decay=0.1", None),
    "no gradient mask": ("", plain_identity),
    "dampened oscillation": ("", dampened),
    "learned scales": ("", learned_scales),
    "scales a power of two": ("--pot_scale_format=e8m0", None),
    "8-bit activations": ("--pot_act_bits=8", None),
    "largest weight as scale, from the nearest levels": (NEAREST + "--pot_scale=absmax", None),
    "narrowed: half the steps with two terms": ("narrow", None),
    "papers' learning rate 5e-6, last position, from the nearest levels": (
        NEAREST + TEXT + "--learning_rate=5e-6 --min_lr=5e-6 --last_position=True --weight_decay=0.1",
        None,
    ),
}
CONTROLS = ("1e-4", "3e-4", "1e-3")  # learning rates


def qat(folder, options, change=None):
    """Validation loss after STEPS steps. "narrow": two terms in the first half of the steps."""
    with tempfile.TemporaryDirectory() as out, open(os.devnull, "w") as devnull, redirect_stdout(devnull):
        steps = f"--eval_interval={STEPS} --eval_tokens={TOKENS} --max_iters={STEPS} "
        if options.startswith("narrow"):
            options = options.removeprefix("narrow")
            first = f"--init_from={folder} --out_dir={out}/first {steps} --max_iters={STEPS // 2} --pot_terms=2"
            train.main(configure(train.Settings, [CONFIG, *first.split()]))
            folder, steps = f"{out}/first", steps + f"--max_iters={STEPS // 2} "
        words = f"--init_from={folder} --out_dir={out}/run {steps} {options}".split()
        with change() if change else nullcontext():
            train.main(configure(train.Settings, [CONFIG, *words]))
        return checkpoint.load_model(f"{out}/run")[1].val_loss


# -----------------------------------------------------------------------------
# All rows


def main(folder, only=""):
    """only: measure the kinds of rows whose name contains it: PTQ, control or QAT."""
    model, info = checkpoint.load_model(folder)
    data, seed = f"data/{info.settings['dataset']}", info.settings["seed"]
    base = evaluate(model, dataset.load(data, "val")[0][:TOKENS])["loss"]
    conditions = {"float": base, "seed": seed, "tokens": TOKENS - 1, "steps": STEPS, "split": "val"}
    earlier = json.loads(RESULT.read_text()) if RESULT.exists() else conditions | {"rows": []}
    rows = earlier.pop("rows")
    if earlier != conditions:
        raise SystemExit(f"{RESULT} was measured with {earlier}, this is {conditions}: move it away first")

    def measure(kind, weights, name, run):
        if only not in kind or any((r["kind"], r["weights"], r["what"]) == (kind, weights, name) for r in rows):
            return
        row = {"kind": kind, "weights": weights, "what": name, "above": run() - base}
        rows.append(row | provenance())
        text = json.dumps(conditions | {"rows": rows}, indent=1)
        checkpoint.write(str(RESULT), lambda temporary: Path(temporary).write_text(text))
        print(f"{kind:<8} {weights:<20} {name:<56} {rows[-1]['above']:+.4f}", flush=True)

    print(f"float {base:.4f}; above it:")
    for name, (keys, draw, change) in PTQ.items():
        for weights, config in WEIGHTS.items():
            if config.get("granularity") != "tensor" or "group_size" not in keys:
                c = PoTConfig(**config | keys)
                measure("PTQ", weights, name, lambda c=c, d=draw, change=change: ptq(folder, data, c, d, change))
    for rate in CONTROLS:
        options = f"--pot=None --learning_rate={rate}"
        measure("control", "float", f"learning rate {rate}", lambda o=options: qat(folder, o))
    for name, (options, change) in QAT.items():
        for weights in ("4 bits", "3 bits"):
            o = options + "".join(f" --pot_{key}={value}" for key, value in WEIGHTS[weights].items())
            measure("QAT", weights, name, lambda o=o, change=change: qat(folder, o, change))
    print(f"written to {RESULT}")


if __name__ == "__main__":
    main(*sys.argv[1:])
