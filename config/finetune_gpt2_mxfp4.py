# QAT of GPT-2 (124M) for llama.cpp: weights that the format MXFP4 holds without loss. A weight has two terms (a power
# of two, or a power of two and its half), groups have 32 weights, and scales are powers of two.
# Run:   python train.py config/finetune_gpt2_mxfp4.py
# Then:  python extras/export.py --ckpt out-gpt2-mxfp4 --out gpt2-mxfp4.gguf
# Needs and takes the same as config/finetune_gpt2_pot4.py. Gives: out-gpt2-mxfp4.
# Not run on GPT-2's own weights.
init_from = "gpt2"
out_dir = "out-gpt2-mxfp4"
dataset = "openwebtext"

pot_terms = 2
pot_group_size = 32
pot_scale_format = "e8m0"
calibrate_tokens = 16384
distill = 1.0

block_size = 64
batch_size = 12
gradient_accumulation_steps = 32
max_iters = 500
learning_rate = 5e-5
weight_decay = 0.0
eval_interval = 100
eval_tokens = 100_000
log_interval = 10
