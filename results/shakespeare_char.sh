#!/bin/sh
# Tiny Shakespeare at 4 bits: float, float control, PTQ and QAT, test loss. One argument a seed:
#     sh results/shakespeare_char.sh 1 2 3
# Needs `python data/shakespeare_char/prepare.py`. Half an hour a seed on 2 cores; what is there is kept.
set -eu
cd "$(dirname "$0")/.."
all=
for seed in "$@"; do
    out=out-shakespeare-s$seed
    tune="python train.py config/finetune_shakespeare_char_pot4.py --seed=$seed --init_from=$out"
    [ -e "$out/model.safetensors" ] || python train.py config/train_shakespeare_char.py --seed="$seed" --out_dir="$out"
    [ -e "$out-control/model.safetensors" ] || $tune --pot=None --out_dir="$out-control"
    [ -e "$out-ptq/model.safetensors" ] || python eval.py --ckpt="$out" --pot_bits=4 --out_dir="$out-ptq"
    [ -e "$out-pot4/model.safetensors" ] || $tune --out_dir="$out-pot4"
    all=$all,$out,$out-control,$out-ptq,$out-pot4
done
python eval.py --ckpt="$all" --json=results/shakespeare_char.json
