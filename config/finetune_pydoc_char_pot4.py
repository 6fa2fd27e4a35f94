# QAT: goes on from config/train_pydoc_char.py with 4-bit power-of-two weights, embeddings included, from GPTQ's codes.
# It learns from the text (distill = 0): the float model is not done with it, as its control shows.
# About a minute on 2 cores. The float control, trained on the same batches: --pot=None --out_dir=out-pydoc-char-control
# PTQ is QAT with no steps: --max_iters=0 --out_dir=out-pydoc-char-ptq
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
