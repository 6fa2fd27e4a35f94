#!/bin/sh
# llama.cpp's 4-bit formats of SmolLM2-135M-Instruct through our own evaluation, so that text and windows are the same as
# for our weights. llama-quantize takes the GGUF file that our float weights come from. Q4_0 and IQ4_NL are made twice:
# as they are, and with an importance matrix of 16,384 tokens of the text that GPTQ's windows come from. Their values are
# then float32 weights.
# The first argument is the folder of llama-quantize and llama-imatrix, the second the GGUF file (results/smollm2.sh gets
# it; results/smollm2_texts.py makes the texts). Takes 20 minutes on one core.
#     sh results/llama_formats.sh llama.cpp/build/bin SmolLM2-135M-Instruct.Q4_1.gguf
set -eu
bin=$(realpath "$1")
gguf=$(realpath "$2")
cd "$(dirname "$0")/.."
out=out-llama-formats
mkdir -p $out

[ -e $out/text.txt ] || python - <<'PYTHON'
import numpy as np
import tokenizer

ids = np.fromfile("data/smollm2-web/train.bin", dtype=np.uint16)[:17_500]
with open("out-llama-formats/text.txt", "w", encoding="utf-8") as f:
    f.write(tokenizer.named("smollm2").decode(ids.tolist()))
PYTHON
[ -e $out/imatrix.gguf ] || \
    "$bin/llama-imatrix" -m "$gguf" -f $out/text.txt -o $out/imatrix.gguf --process-output -c 1024 --chunks 16

all=
for kind in Q4_0 IQ4_NL MXFP4_MOE Q4_0-imatrix IQ4_NL-imatrix; do
    if [ ! -e $out/$kind/model.safetensors ]; then
        [ ${kind%-imatrix} = $kind ] && matrix= || matrix="--imatrix $out/imatrix.gguf"
        # shellcheck disable=SC2086
        "$bin/llama-quantize" --allow-requantize --pure $matrix "$gguf" $out/$kind.gguf ${kind%-imatrix} > /dev/null
        python extras/import_gguf.py --gguf=$out/$kind.gguf --out=$out/$kind
    fi
    all=$all,$out/$kind  # eval.py skips the empty name before the first comma
done
python eval.py --ckpt=$all --dataset=smollm2-wiki --split=val --block_size=1024 --json=$out/eval.json

python - <<'PYTHON'
import json
import os

import gguf

with open("out-llama-formats/eval.json") as f:
    report = json.load(f)
for row in report["rows"]:
    file = row["ckpt"] + ".gguf"
    if os.path.exists(file):
        row["tensor_bytes"] = sum(int(t.n_bytes) for t in gguf.GGUFReader(file).tensors)
    print(f"{row['ckpt']:<36}{row['loss']:.4f}  {row.get('tensor_bytes', row['bytes']):,} bytes")
report["command"] = "sh results/llama_formats.sh llama.cpp/build/bin SmolLM2-135M-Instruct.Q4_1.gguf"
with open("results/llama_formats.json", "w") as f:
    json.dump(report, f, indent=1)
PYTHON
