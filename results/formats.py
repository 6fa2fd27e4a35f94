"""
Two formats that do not pay on a real model, and by how much. A choice between single powers and two terms for each group
of 64 weights; and a correction of rank 4 in float16 for each linear layer, for the inputs of 16,384 tokens of text.

    python results/formats.py smollm2 out-smollm2-ptq4,out-smollm2-ptq4-two-terms smollm2-web smollm2-wiki

float model, its models by GPTQ, data set of the inputs (train), data set of the loss (val, 16,384 tokens).
"""

import copy
import json
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint
import dataset
from calibrate import DAMPING
from machine import provenance
from metrics import evaluate
from pot import PoTConfig, PoTQuantizer

RANK, GROUP = 4, 64


def is_layer(name, module):
    return isinstance(module, torch.nn.Linear) and name != "lm_head"


def choice_per_group(model):
    """SQNR in dB of all linear layers, rounded to nearest, with the format of the smaller error in each group."""
    errors, energy, single, groups = dict.fromkeys(("single powers", "two terms", "choice"), 0.0), 0.0, 0, 0
    for name, module in model.named_modules():
        if is_layer(name, module):
            w = module.weight
            one, two = (
                (PoTQuantizer(w, config)(w) - w).square().view(-1, GROUP).sum(1)
                for config in (PoTConfig(group_size=GROUP), PoTConfig(group_size=GROUP, terms=2))
            )
            for kind, error in zip(errors, (one, two, torch.minimum(one, two))):
                errors[kind] += error.sum().item()
            energy += w.square().sum().item()
            single += (one < two).sum().item()
            groups += len(one)
    return {kind: 10 * math.log10(energy / e) for kind, e in errors.items()} | {
        "share of single powers": single / groups
    }


def input_factors(model, ids):
    """{name: L}: the second moment of a layer's inputs is L L^T."""
    moments = {}

    def record(name):
        def hook(_, args):
            x = args[0].flatten(0, -2)
            moments[name] = moments.get(name, 0) + x.t() @ x

        return hook

    hooks = [m.register_forward_pre_hook(record(n)) for n, m in model.named_modules() if is_layer(n, m)]
    for x in dataset.random_windows(ids, 1024, 16, 1337):
        model(x[None], last=True)
    for hook in hooks:
        hook.remove()
    for name, m in moments.items():
        m.diagonal().add_(DAMPING * m.diagonal().mean())
        moments[name] = torch.linalg.cholesky(m)
    return moments


def correct(quantized, model, factors):
    """A float copy of a packed model whose layers have the best correction of rank 4. Also (error before, after), relative to
    the squared output, mean of the layers; and the corrections' bytes."""
    corrected, errors, size = copy.deepcopy(model), [], 0
    floats, packed = dict(model.named_modules()), dict(quantized.named_modules())
    for name, module in corrected.named_modules():
        if getattr(packed.get(name), "packed", None) is None:
            continue
        module.weight.copy_(packed[name].weight)
        if name in factors:
            w, factor = floats[name].weight, factors[name]
            u, s, v = torch.linalg.svd((w - module.weight) @ factor, full_matrices=False)
            right = torch.linalg.solve_triangular(factor, v[:RANK], upper=False, left=False)
            module.weight += (u[:, :RANK] * s[:RANK]).half().float() @ right.half().float()
            errors.append(
                (torch.stack([s.square().sum(), s[RANK:].square().sum()]) / (w @ factor).square().sum()).tolist()
            )
            size += 2 * RANK * sum(w.shape)
    before, after = (sum(e) / len(errors) for e in zip(*errors))
    return corrected, before, after, size


@torch.no_grad()
def main(folder, quantized_folders, train, val):
    model, _ = checkpoint.load_model(folder)
    result = {"choice per group, SQNR in dB": choice_per_group(model), f"rank {RANK}": []}
    print(result["choice per group, SQNR in dB"], flush=True)
    ids = dataset.load(f"data/{val}", "val")[0][:16384]
    factors = input_factors(model, dataset.load(f"data/{train}", "train")[0])
    base = evaluate(model, ids)["loss"]
    for name in quantized_folders.split(","):
        quantized, info = checkpoint.load_model(name)
        corrected, before, after, size = correct(quantized, model, factors)
        row = {"weights": info.weights, "bytes": size, "layer error": before, "layer error, corrected": after}
        for key, m in (("", quantized), (", corrected", corrected)):
            measured = evaluate(m, ids, reference=model)
            row |= {f"above float{key}": measured["loss"] - base, f"kl{key}": measured["kl"]}
        result[f"rank {RANK}"].append(row)
        print(row, flush=True)
    path = Path(__file__).with_name("formats.json")
    path.write_text(
        json.dumps(result | {"float": base, "tokens": len(ids) - 1, "seed": 1337, **provenance()}, indent=1)
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
