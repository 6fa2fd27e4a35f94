#!/bin/sh
# What `make demo` runs: train, quantize, fine-tune, evaluate, sample. A run that is finished already is not run again.
set -eu

step() { # step "what it does, how long" command...
    echo
    echo "# $1"
    shift
    echo "\$ $*"
    "$@"
}

train() { # train "what it does" config out_dir more...; goes on where an earlier demo was cut
    what=$1 config=$2 out=$3
    shift 3
    if [ -e "$out/model.safetensors" ]; then
        printf '\n# %s: %s is there already\n' "$what" "$out"
    elif [ -e "$out/ckpt.pt" ]; then
        step "$what" python train.py "$config" "$@" --init_from=resume
    else
        step "$what" python train.py "$config" "$@"
    fi
}

base=out-pydoc-char
[ -e data/pydoc_char/test.bin ] || step "Text: Python's own documentation, as characters (20 s)" \
    python data/pydoc_char/prepare.py
train "Float: the papers' character GPT, 3,000 steps (2 min)" config/train_pydoc_char.py $base
train "PTQ: its weights as powers of two, 4 bits, chosen by GPTQ (10 s)" config/finetune_pydoc_char_pot4.py $base-ptq \
    --max_iters=0 --out_dir=$base-ptq
train "QAT: 1,000 steps with power-of-two weights (1 min)" config/finetune_pydoc_char_pot4.py $base-pot4
train "Float control: the same 1,000 steps in float (1 min)" config/finetune_pydoc_char_pot4.py $base-control \
    --pot=None --out_dir=$base-control
step "All four on the test split (10 s)" \
    python eval.py --ckpt=$base,$base-control,$base-ptq,$base-pot4 --json=$base-pot4/demo.json
step "Text from the float model (5 s)" python sample.py --ckpt=$base --prompt="Return " --max_new_tokens=300
step "Text from the packed model (5 s)" python sample.py --ckpt=$base-pot4 --prompt="Return " --max_new_tokens=300
