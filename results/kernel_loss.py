"""
Does the kernel change the loss of a packed model? Test loss of a model: fake-quantized, and by each path of the kernel.

    python results/kernel_loss.py out-pydoc-char data/pydoc_char
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
from metrics import evaluate
from model import KVCache
from pot import PoTConfig, allow_int8_activations, convert, prepare

TOKENS = 20_000  # of the test split; few, because the decode step takes them one at a time


def by_single_tokens(model, ids):
    """Loss with the fused decode step for every token but the first of a window."""
    decode, T, total = checkpoint.make_decoder(model), min(model.config.block_size, 1024), 0.0
    for x, y in dataset.windows(ids, T, 1):
        cache = KVCache(T, torch.float16)
        logits = [model(x[:, :1], cache=cache)[:, -1]] + [decode(x[:, i : i + 1], cache) for i in range(1, x.shape[1])]
        total += F.cross_entropy(torch.cat(logits), y[0], reduction="sum").item()
    return total / (len(ids) - 1)


@torch.no_grad()
def main(folder, data, tokens=TOKENS):
    model, _ = checkpoint.load_model(folder)
    ids = dataset.load(data, "test")[0][: int(tokens) + 1]
    rows = []
    for config in (PoTConfig(), PoTConfig(terms=2), PoTConfig(grid="uniform", bits=8), PoTConfig(act_bits=8)):
        fake = copy.deepcopy(model)
        prepare(fake, config)
        packed = convert(copy.deepcopy(fake))
        losses = {"fake-quantized": evaluate(fake, ids)["loss"], "windows": evaluate(packed, ids)["loss"]}
        losses["single tokens"] = by_single_tokens(packed, ids)
        allow_int8_activations(packed)
        losses["windows, 8 bits"] = evaluate(packed, ids)["loss"]
        losses["single tokens, 8 bits"] = by_single_tokens(packed, ids)
        for way, loss in losses.items():
            difference = loss - losses["fake-quantized"]
            rows.append({"weights": str(config), "way": way, "loss": loss, "minus": difference})
            print(f"{config!s:<50} {way:<22} {loss:.6f} {difference:+.1e}", flush=True)
    path = Path(__file__).with_name(f"kernel_loss_{Path(folder).name}.json")
    path.write_text(json.dumps({"rows": rows, "tokens": len(ids) - 1, **provenance()}, indent=1))
    print(f"written to {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
