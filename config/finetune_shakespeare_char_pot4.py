# QAT: goes on from config/train_shakespeare_char.py with 4-bit power-of-two weights, embeddings included, from GPTQ's codes
# and towards the float model's predictions: this one knows its small text by heart, and its text teaches nothing more.
# The float control, trained on the same batches: --pot=None --out_dir=out-shakespeare-char-control
init_from = "out-shakespeare-char"
out_dir = "out-shakespeare-char-pot4"
dataset = "shakespeare_char"

pot_bits = 4
pot_granularity = "group"
pot_group_size = 64
calibrate_tokens = 16384
distill = 1.0

batch_size = 12
max_iters = 2000
learning_rate = 3e-4
weight_decay = 0.0
eval_interval = 1000
log_interval = 500
