#!/bin/sh
# What fine-tuning GPT-2 124M with power-of-two weights costs, on a model of its shape with random weights, so figures of
# quality mean nothing here. One argument: OpenWebText as .jsonl, or any text.
#     sh results/gpt2_random.sh openwebtext.jsonl
# 20 steps of 12 x 64 tokens in float, in QAT on the text alone, and in QAT as the config has it, distilled; in turn, three
# times; then the finished model. 25 minutes on 2 cores.
set -eu
cd "$(dirname "$0")/.."
python data/openwebtext/prepare.py --input="$1"
[ -e gpt2-random/config.json ] || python -c "
import torch, transformers
torch.manual_seed(0)
transformers.GPT2LMHeadModel(transformers.GPT2Config()).save_pretrained('gpt2-random')"
tune="python train.py config/finetune_gpt2_pot4.py --init_from=gpt2-random --gradient_accumulation_steps=1 --max_iters=20"
tune="$tune --eval_tokens=2000 --calibrate_tokens=0"
for round in 1 2 3; do
    out=out-gpt2-random-$round
    [ -e "$out-float/model.safetensors" ] || $tune --pot=None --out_dir="$out-float"
    [ -e "$out-text/model.safetensors" ] || $tune --distill=0 --out_dir="$out-text"
    [ -e "$out-pot4/model.safetensors" ] || $tune --out_dir="$out-pot4"
done
[ -e out-gpt2-random-channel/model.safetensors ] || $tune --pot_granularity=channel --out_dir=out-gpt2-random-channel
python eval.py --ckpt=out-gpt2-random-1-float,out-gpt2-random-1-pot4,out-gpt2-random-channel --tokens=10000
python sample.py --ckpt=out-gpt2-random-1-pot4 --prompt="The " --max_new_tokens=20
[ -e out-gpt2-random-ptq/model.safetensors ] || \
    python eval.py config/ptq_gpt2_pot4.py --ckpt=gpt2-random --out_dir=out-gpt2-random-ptq --tokens=5000
python - <<'PYTHON'
import glob, json, os, statistics
from configurator import provenance

rows = {}
kinds = "float", "text", "pot4"
for kind in kinds:
    ends = [json.loads(open(f).readlines()[-1]) for f in sorted(glob.glob(f"out-gpt2-random-[0-9]-{kind}/log.jsonl"))]
    seconds, peaks = ([e["seconds"] / e["steps"] for e in ends], [e["peak_bytes"] for e in ends])
    rows[kind] = {"step_s": seconds, "step_s_median": statistics.median(seconds), "peak_bytes": peaks}
for name in ("1-float", "1-pot4", "channel", "ptq"):
    size = os.path.getsize(f"out-gpt2-random-{name}/model.safetensors")
    rows[f"file {name}"] = {"bytes": size, "share": size / 497_759_232}
    print(f"{name:<8} {size:>12,} bytes  {size / 497_759_232:7.2%} of float32's 497,759,232")
for kind in kinds:
    r = rows[kind]
    print(f"{kind:<8} {r['step_s_median']:.2f} s a step (of {[round(s, 2) for s in r['step_s']]}), "
          f"peak {max(r['peak_bytes']) / 2**20:,.0f} MiB")
origin = provenance() | {"command": "sh results/gpt2_random.sh openwebtext.jsonl", "seed": 1337}
with open("results/gpt2_random.json", "w") as f:
    json.dump({"rows": rows, **origin}, f, indent=1)
print("written to results/gpt2_random.json")
PYTHON
