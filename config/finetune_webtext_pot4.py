# QAT: goes on from config/train_webtext.py with 4-bit power-of-two weights, embeddings included, from GPTQ's codes and
# towards the float model's predictions: its own text, at a higher rate than it ended with, makes the float model itself worse.
# The float control, trained on the same batches: --pot=None --out_dir=out-webtext-control
init_from = "out-webtext"
out_dir = "out-webtext-pot4"
dataset = "webtext"

pot_bits = 4
pot_granularity = "group"
pot_group_size = 64
calibrate_tokens = 16384
distill = 1.0

batch_size = 8
max_iters = 200
learning_rate = 1e-4
weight_decay = 0.0
beta2 = 0.99
eval_interval = 200
eval_tokens = 65_537
log_interval = 20
dtype = "bfloat16"
