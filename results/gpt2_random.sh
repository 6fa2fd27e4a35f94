#!/bin/sh
# The file size of packed GPT-2 124M. We have no access to GPT-2's weights, so this makes a folder of its shape and
# format with random weights, and packs it in groups of 64 and per channel. The losses mean nothing.
# The argument is OpenWebText as .jsonl, or any text: train.py needs a data set to validate on. Takes about a minute.
#     sh results/gpt2_random.sh openwebtext.jsonl
set -eu
cd "$(dirname "$0")/.."
python data/openwebtext/prepare.py --input="$1"
[ -e gpt2-random/config.json ] || python -c "
import torch, transformers
torch.manual_seed(0)
transformers.GPT2LMHeadModel(transformers.GPT2Config()).save_pretrained('gpt2-random')"
pack="python train.py config/ptq_gpt2_pot4.py --init_from=gpt2-random --calibrate_tokens=0 --eval_tokens=2000"
[ -e out-gpt2-random-pot4/model.safetensors ] || $pack --out_dir=out-gpt2-random-pot4
[ -e out-gpt2-random-channel/model.safetensors ] || \
    $pack --pot_granularity=channel --out_dir=out-gpt2-random-channel
python - <<'PYTHON'
import json, os
from machine import provenance

FLOAT = 497_759_232  # bytes of GPT-2's tensors in float32
rows = {}
for name in ("pot4", "channel"):
    size = os.path.getsize(f"out-gpt2-random-{name}/model.safetensors")
    rows[f"file {name}"] = {"bytes": size, "share": size / FLOAT}
    print(f"{name:<8} {size:>12,} bytes  {size / FLOAT:7.2%} of float32's {FLOAT:,}")
origin = provenance() | {"command": "sh results/gpt2_random.sh openwebtext.jsonl"}
with open("results/gpt2_random.json", "w") as f:
    json.dump({"rows": rows, **origin}, f, indent=1)
print("written to results/gpt2_random.json")
PYTHON
