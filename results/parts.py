"""
What does it cost to quantize each part of a model? Test loss above that of the float model, with one part or everything
quantized.

    python results/parts.py out-shakespeare-s1 data/shakespeare_char results/parts_shakespeare_char.json
"""

import copy
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint
import dataset
from calibrate import calibrate
from machine import provenance
from metrics import evaluate
from pot import PoTConfig, prepare

TOKENS = 100_000  # of the test split
PARTS = {  # part: pieces of the names of its layers
    "token table and head": ("wte", "lm_head"),
    "token table alone": ("wte",),
    "head alone": ("lm_head",),
    "positions": ("wpe",),
    "attention": (".attn.",),
    "MLPs": (".mlp.",),
    "all linear layers but the head": (".attn.", ".mlp."),
    "everything": ("",),
}


@torch.no_grad()
def main(folder, data, path):
    model, info = checkpoint.load_model(folder)
    ids, train = dataset.load(data, "test")[0][: TOKENS + 1], dataset.load(data, "train")[0]
    length = model.config.block_size
    batches = dataset.random_windows(train, length, 16384 // length, info.settings["seed"]).split(4096 // length)
    base, rows = evaluate(model, ids)["loss"], []
    print(f"float {base:.4f}; above it:")
    for config in (PoTConfig(), PoTConfig(bits=3), PoTConfig(terms=2), PoTConfig(act_bits=8)):
        for part, names in PARTS.items():
            row = {"weights": str(config), "part": part}
            for way in ("nearest", "GPTQ"):
                quantized = copy.deepcopy(model)
                if "alone" in part:  # table and head are one tensor
                    quantized.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
                prepare(quantized, config, lambda module, name, names=names: any(n in name for n in names))
                if way == "GPTQ":
                    calibrate(quantized, batches)
                row[way] = evaluate(quantized, ids)["loss"] - base
            rows.append(row)
            print(f"{config!s:<50} {part:<32} {row['nearest']:+.4f} {row['GPTQ']:+.4f}", flush=True)
    Path(path).write_text(json.dumps({"float": base, "rows": rows, "tokens": len(ids) - 1, **provenance()}, indent=1))
    print(f"written to {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
