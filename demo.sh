#!/bin/sh
# `make demo` runs this: train, quantize, fine-tune, evaluate, sample. It skips finished runs and resumes a run that was cut.
set -eu

step() { # step "purpose and duration" command...
    echo
    echo "# $1"
    shift
    echo "\$ $*"
    "$@"
}

make_model() { # make_model "purpose and duration" out_dir config more...
    purpose=$1 out=$2
    shift 2
    if [ -e "$out/model.safetensors" ]; then
        printf '\n# %s: %s is there already\n' "$purpose" "$out"
    elif [ -e "$out/ckpt.pt" ]; then
        step "$purpose" python train.py "$@" --init_from=resume
    else
        step "$purpose" python train.py "$@"
    fi
}

base=out-pydoc-char
[ -e data/pydoc_char/test.bin ] || step "Text: Python's own documentation, as characters (20 s)" \
    python data/pydoc_char/prepare.py
make_model "Float: the papers' character GPT, 3,000 steps (2 min)" $base config/train_pydoc_char.py
make_model "PTQ: its weights as powers of two, 4 bits, chosen by GPTQ (10 s)" $base-ptq config/ptq_pydoc_char_pot4.py
make_model "QAT: 1,000 steps with power-of-two weights (1 min)" $base-pot4 config/finetune_pydoc_char_pot4.py
make_model "Float control: the same 1,000 steps in float (1 min)" $base-control config/finetune_pydoc_char_pot4.py \
    --pot=None --out_dir=$base-control
step "All four on the test split (10 s)" \
    python eval.py --ckpt=$base,$base-control,$base-ptq,$base-pot4 --json=$base-pot4/demo.json
step "Text from the float model (5 s)" python sample.py --ckpt=$base --prompt="Return " --max_new_tokens=300
step "Text from the packed model (5 s)" python sample.py --ckpt=$base-pot4 --prompt="Return " --max_new_tokens=300
