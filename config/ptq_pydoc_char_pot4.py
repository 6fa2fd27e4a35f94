# PTQ of the demo's character model, with train.py: 4-bit power-of-two weights in groups of 64, embeddings included,
# whose codes GPTQ chooses on 16,384 characters. No training.
# Run:   python train.py config/ptq_pydoc_char_pot4.py
# Also:  any pot_ key changes the weights: --pot_bits=3 --out_dir=out-pydoc-char-ptq3
#        --calibrate_tokens=0 rounds to the nearest level; --init_from and --dataset name another model and its text.
# Needs: `python train.py config/train_pydoc_char.py`. Gives: out-pydoc-char-ptq/model.safetensors.
# Takes: about 10 seconds on 2 cores.
init_from = "out-pydoc-char"
out_dir = "out-pydoc-char-ptq"
dataset = "pydoc_char"

pot_bits = 4
pot_granularity = "group"
pot_group_size = 64
calibrate_tokens = 16384

max_iters = 0
eval_tokens = 50_000
