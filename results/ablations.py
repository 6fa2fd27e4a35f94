"""
What matters in PTQ and QAT? The papers' character model, one thing changed at a time; what pot.py and train.py have no
option for, as it did not pay, is written out here. Loss on the validation split above the float model's.

    python results/ablations.py out-shakespeare-s1

Rows are kept in results/ablations.json as they are measured; started again, it goes on.
"""

import json
import math
import os
import sys
import tempfile
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint
import dataset
import pot
import train
from configurator import configure, provenance
from eval import evaluate, random_windows
from pot import PoTConfig, PoTQuantizer, calibrate, compute_scale, fake_quantize, prepare

STEPS, TOKENS, CALIBRATION = 500, 30_001, 16_384
WEIGHTS = {
    "4 bits": {},
    "two terms": {"terms": 2},
    "3 bits": {"bits": 3},
    "4 bits, per tensor": {"granularity": "tensor"},
}
RESULT = Path(__file__).with_suffix(".json")


# --- PTQ: what calibrate might do besides ---


def levels_of(w, q):
    """(levels, unit) of the weights as q rounds them, (out, groups, group_size) and (out or 1, groups, 1)."""
    unit = pot._unit(q.scale, q.config)
    return pot._round_(w.float().unflatten(1, (unit.shape[1], -1)) / unit, q.config), unit


def refined_scale(target, levels, q, moment):
    """The scales with the least output error |(target - levels x scale) x|^2, as in the second step of PoTPTQ."""
    out, groups, size = levels.shape
    if q.config.granularity == "tensor":
        flat = levels.flatten(1)
        scale = (((flat @ moment) * target).sum() / ((flat @ moment) * flat).sum()).view(1, 1)
    else:  # a linear system a row: a scale multiplies one group's levels
        seen = torch.einsum("ogs,gsn->ogn", levels, moment.unflatten(0, (groups, size)))
        a = torch.einsum("oghs,ohs->ogh", seen.unflatten(2, (groups, size)), levels).double()
        a.diagonal(dim1=1, dim2=2).add_(1e-4 * a.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True) + 1e-12)
        scale = torch.linalg.solve(a, torch.einsum("ogn,on->og", seen, target).double()).float()
    scale = scale * q.config.top
    return torch.where(scale > 0, scale, q.scale.float()).to(q.scale.dtype)


def descended(target, value, q, moment, passes=3):
    """Coordinate descent: a weight after the other goes to the level with the least output error, given all others."""
    unit = pot._unit(q.scale, q.config).expand(len(target), -1, target.shape[1] // q.scale.shape[1]).flatten(1)
    value, slope = value.clone(), (value - target) @ moment
    for _ in range(passes):
        for i in range(target.shape[1]):
            best = value[:, i] - slope[:, i] / moment[i, i]
            best = pot._round_(best / unit[:, i], q.config) * unit[:, i]
            slope += (best - value[:, i])[:, None] * moment[i]
            value[:, i] = best
    return value


def calibrating(weighted=False, refine=0, descend=False):
    """A stand-in for pot._calibrate_layer."""

    def layer(layer, xx, dx, dd):
        w, q = pot._matrix(layer), layer.quantizer
        moment, old = pot._damped(xx, pot._DAMPING), w.clone()
        if weighted:
            q.scale = compute_scale(w, q.config, moment.diagonal()[None])
        target = old + torch.linalg.solve(moment.double(), (old @ dx).double().t()).t().float()
        lost = target - q(w)
        best, chosen = ((lost @ moment) * lost).sum().item(), (q.scale, old)  # a layer that would lose stays as it is
        for _ in range(refine + 1):
            found = pot._compensated(target, q.scale, q.config, xx)
            levels, unit = levels_of(found, q)
            if descend:
                found = descended(target, (levels * unit).flatten(1), q, moment)
                levels, unit = levels_of(found, q)
            lost = target - (levels * unit).flatten(1)
            if (error := ((lost @ moment) * lost).sum().item()) < best:
                best, chosen = error, (q.scale, found)
            q.scale = refined_scale(target, levels, q, moment)
        q.scale, found = chosen
        w.copy_(found)
        return 1.0, 0.0

    return mock.patch.object(pot, "_calibrate_layer", layer)


def tables_unweighted():
    """Tables of embeddings and heads keep the scales of prepare, which count every weight alike."""
    return mock.patch.object(pot, "compute_scale", lambda w, config, importance=None: compute_scale(w, config))


def tables_nearest():
    """Nor does GPTQ touch them."""
    return mock.patch.object(pot, "_calibrate_shared", lambda *args: None)


PTQ = {  # what: (more of PoTConfig, which draw of text for GPTQ, what to change)
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
        windows = random_windows(ids, length, CALIBRATION // length, info["settings"]["seed"] + draw - 1)
        with change() if change else mock.patch.object(pot, "_DAMPING", pot._DAMPING):
            calibrate(model, windows.split(4096 // length))
    return evaluate(model, dataset.load(data, "val")[0][:TOKENS])["loss"]


# --- QAT: what train.py might do besides ---


def plain_identity():
    """A gradient that passes everywhere, as the papers' does."""
    return mock.patch.object(pot._FakeQuantize, "backward", staticmethod(lambda ctx, grad: (grad, None, None)))


@contextmanager
def at_start(act):
    """act(model) once the model is prepared and the optimizer about to be made; what it returns goes into the latter."""
    make = train.make_optimizer

    def with_more(model, s, device):
        more = act(model)
        optimizer = make(model, s, device)
        if more:
            optimizer.add_param_group({"params": more, "weight_decay": 0.0})
        return optimizer

    with mock.patch.object(train, "make_optimizer", with_more):
        yield


def dampened(strength=1e-2):
    """Weights are drawn to their levels, ever more, so that they do not oscillate (Nagel et al., arXiv 2203.11086)."""

    def act(model):
        done = {}
        for m in model.modules():
            if isinstance(m, pot.PoTLinear) and m.quantizer not in done:
                done[m.quantizer] = 0
                m.weight.register_hook(lambda grad, w=m.weight, q=m.quantizer: pull(grad, w.detach(), q, done))

    def pull(grad, w, q, done):
        weight = strength * (1 - math.cos(math.pi * done[q] / STEPS)) / 2
        done[q] += 1
        off = w - fake_quantize(w, q.scale, q.config)
        off *= (w.abs().unflatten(1, (q.scale.shape[1], -1)) <= q.scale.float().unsqueeze(-1)).flatten(1)
        return grad + 2 * weight * off

    return at_start(act)


class LSQ(torch.autograd.Function):
    """Fake quantization with the gradient of learned scales (Esser et al., arXiv 1902.08153)."""

    @staticmethod
    def forward(ctx, w, scale, config):
        scale = scale.half().float()
        q = fake_quantize(w, scale, config)
        ctx.save_for_backward(w, scale, q)
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
            learned[q] = torch.nn.Parameter(q.scale.float())
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
            q.scale = scale.detach().half()
        save(*args, **more)

    with at_start(act), mock.patch.object(checkpoint, "save_training", save_with_scales):
        yield


NEAREST, TEXT = "--calibrate_tokens=0 ", "--distill=0 "
QAT = {  # what: (options of train.py, what to change)
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
    """Validation loss after STEPS steps."""
    with tempfile.TemporaryDirectory() as out, open(os.devnull, "w") as devnull, redirect_stdout(devnull):
        steps = f"--eval_interval={STEPS} --eval_tokens={TOKENS} --max_iters={STEPS} "
        if options.startswith("narrow"):
            options = options.removeprefix("narrow")
            first = f"--init_from={folder} --out_dir={out}/first {steps} --max_iters={STEPS // 2} --pot_terms=2"
            train.main(configure(train.Settings, [CONFIG, *first.split()]))
            folder, steps = f"{out}/first", steps + f"--max_iters={STEPS // 2} "
        words = f"--init_from={folder} --out_dir={out}/run {steps} {options}".split()
        with change() if change else redirect_stdout(devnull):
            train.main(configure(train.Settings, [CONFIG, *words]))
        return checkpoint.load_model(f"{out}/run")[1]["val_loss"]


CONFIG = "config/finetune_shakespeare_char_pot4.py"


def main(folder, only=""):
    model, info = checkpoint.load_model(folder)
    data = f"data/{info['settings']['dataset']}"
    base = evaluate(model, dataset.load(data, "val")[0][:TOKENS])["loss"]
    same = {"float": base, "seed": info["settings"]["seed"], "tokens": TOKENS - 1, "steps": STEPS, "split": "val"}
    found = json.loads(RESULT.read_text()) if RESULT.exists() else same | {"rows": []}
    rows = found.pop("rows")
    if found != same:
        raise SystemExit(f"{RESULT} was measured with {found}, this is {same}: move it away first")

    def measure(kind, weights, what, run):
        if only not in kind or any((r["kind"], r["weights"], r["what"]) == (kind, weights, what) for r in rows):
            return
        row = {"kind": kind, "weights": weights, "what": what, "above": run() - base}
        rows.append(row | provenance())
        checkpoint.write(str(RESULT), lambda tmp: Path(tmp).write_text(json.dumps(same | {"rows": rows}, indent=1)))
        print(f"{kind:<8} {weights:<20} {what:<56} {rows[-1]['above']:+.4f}", flush=True)

    print(f"float {base:.4f}; above it:")
    for what, (more, draw, change) in PTQ.items():
        for weights, config in WEIGHTS.items():
            if config.get("granularity") != "tensor" or "group_size" not in more:
                c = PoTConfig(**config | more)
                measure("PTQ", weights, what, lambda c=c, d=draw, how=change: ptq(folder, data, c, d, how))
    for rate in CONTROLS:
        options = f"--pot=None --learning_rate={rate}"
        measure("control", "float", f"learning rate {rate}", lambda o=options: qat(folder, o))
    for what, (options, change) in QAT.items():
        for weights in ("4 bits", "3 bits"):
            more = options + "".join(f" --pot_{key}={value}" for key, value in WEIGHTS[weights].items())
            measure("QAT", weights, what, lambda o=more, how=change: qat(folder, o, how))
    print(f"written to {RESULT}")


if __name__ == "__main__":
    main(*sys.argv[1:])
