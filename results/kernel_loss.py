"""
Does the kernel change the loss of a packed model? Mean loss of the same positions: by PyTorch with unpacked weights, and
by each path of the kernel, which are: whole windows, layer by layer; one token after the other by the decode step; and
half a window in one call of the decode step, then the other half token by token. "8 bits": activations are rounded, as
sample.py does.

    python results/kernel_loss.py out-pydoc-char data/pydoc_char
    python results/kernel_loss.py out-smollm2-ptq4 data/smollm2-web 2048    # tokens of the test split

A float model is rounded to several kinds of weights. A packed model is measured as it is.
"""

import copy
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint
import dataset
from machine import provenance
from model import KVCache
from pot import PackedWeight, PoTConfig, allow_int8_activations, quantize_

TOKENS = 20_000  # of the test split; few, because the decode step takes them one at a time
CONFIGS = (PoTConfig(), PoTConfig(terms=2), PoTConfig(grid="uniform", bits=8), PoTConfig(act_bits=8))


def losses_of_windows(model, ids):
    """Loss of each position, (n): whole windows of at most 1,024 tokens."""
    T = min(model.config.block_size, 1024)
    return torch.cat([F.cross_entropy(model(x)[0], y[0], reduction="none") for x, y in dataset.windows(ids, T, 1)])


def losses_of_decoder(model, ids, share):
    """The same by the decode step. It takes this share of a window in one call, and at least one token; positions before
    the last one of that call are NaN, because the step gives the logits of the last token only."""
    decode, T, losses = checkpoint.make_decoder(model), min(model.config.block_size, 1024), []
    for x, y in dataset.windows(ids, T, 1):
        cache, n = KVCache(T, torch.float16), max(1, int(share * x.shape[1]))
        logits = [decode(x[:, :n], cache)] + [decode(x[:, i : i + 1], cache) for i in range(n, x.shape[1])]
        losses += [torch.full((n - 1,), torch.nan), F.cross_entropy(torch.cat(logits), y[0, n - 1 :], reduction="none")]
    return torch.cat(losses)


@torch.no_grad()
def main(folder, data, tokens=TOKENS):
    model, info = checkpoint.load_model(folder)
    ids = dataset.load(data, "test")[0][: int(tokens) + 1]
    rows, configs = [], [info.weights] if info.pot else CONFIGS
    for config in configs:
        packed = model if info.pot else quantize_(copy.deepcopy(model), config)
        unpacked = copy.deepcopy(packed)
        for module in unpacked.modules():
            if isinstance(module, PackedWeight):
                module.on_kernel = False
        reference = losses_of_windows(unpacked, ids)
        for activations in ("", ", 8 bits"):
            if activations:
                allow_int8_activations(packed)
            for way, losses in {
                "windows": losses_of_windows(packed, ids),
                "single tokens": losses_of_decoder(packed, ids, 0),
                "half windows": losses_of_decoder(packed, ids, 0.5),
            }.items():
                differences = (losses - reference)[~losses.isnan()]
                minus, error = differences.mean().item(), differences.std().item() / len(differences) ** 0.5
                row = {"weights": str(config), "way": way + activations, "loss": reference.mean().item()}
                rows.append(row | {"minus": minus, "standard_error": error, "tokens": len(differences)})
                print(f"{config!s:<50} {way + activations:<22} {minus:+.1e} (standard error {error:.0e})", flush=True)
    path = Path(__file__).with_name(f"kernel_loss_{Path(folder).name}.json")
    path.write_text(json.dumps({"rows": rows, "tokens": len(ids) - 1, **provenance()}, indent=1))
    print(f"written to {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
