# QAT of the small web-text model with 4-bit power-of-two weights in groups of 64, embeddings included. It starts from
# GPTQ's codes and learns the float model's predictions instead of the text: more training on the text, at a higher
# learning rate than the last one of the float training, makes the float model itself worse.
# Run:   python train.py config/finetune_webtext_pot4.py
# Also:  the float control, trained on the same batches: --pot=None --out_dir=out-webtext-control
# Needs: `python train.py config/train_webtext.py`. Gives: out-webtext-pot4.
# Takes: about 9 minutes of one free core. Pass --dtype=float32 if the processor has no bfloat16 products.
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
