# QAT for llama.cpp: GPT-2 (124M) with weights that MXFP4 holds without loss: two neighbouring powers of two a weight, groups of
# 32, scales that are powers of two themselves. Then: python extras/export.py --ckpt out-gpt2-mxfp4 --out gpt2-mxfp4.gguf
# Needs and takes what config/finetune_gpt2_pot4.py does, of which this is a variant.
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
