# QAT of the demo's character model with 4-bit power-of-two weights in groups of 64, embeddings included. It starts
# from GPTQ's codes and learns from the text alone (distill = 0): the float model still improves on this text, as its
# control shows.
# Run:   python train.py config/finetune_pydoc_char_pot4.py
# Also:  the float control, trained on the same batches: --pot=None --out_dir=out-pydoc-char-control
#        PTQ, without training: config/ptq_pydoc_char_pot4.py
# Needs: `python train.py config/train_pydoc_char.py`. Gives: out-pydoc-char-pot4. Takes: about a minute on 2 cores.
init_from = "out-pydoc-char"
out_dir = "out-pydoc-char-pot4"
dataset = "pydoc_char"

pot_bits = 4
pot_granularity = "group"
pot_group_size = 64
calibrate_tokens = 16384

batch_size = 8
max_iters = 1000
learning_rate = 3e-4
weight_decay = 0.0
eval_interval = 500
eval_tokens = 50_000
