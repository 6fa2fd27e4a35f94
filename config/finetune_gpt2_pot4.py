# QAT: fine-tunes GPT-2 (124M) with 4-bit power-of-two weights, embeddings included, in groups of 64, from GPTQ's codes and
# towards the float model's predictions: its text was like this one, and vastly more, so there is little left to learn from it.
# Needs: `python data/openwebtext/prepare.py` and GPT-2 from the hub; a folder instead: --init_from=FOLDER.
# Gives: out-gpt2-pot4/model.safetensors, packed, 66.5 MB for 498 MB, and ckpt.pt to go on from.
# Takes: 500 steps of 24,576 tokens, about 2.8 minutes a step on 2 cores, a fifth of them for the float model's predictions.
# Sequences of 64 tokens, as the papers'. For longer texts: --block_size=1024 --batch_size=4 --gradient_accumulation_steps=6
# The float control, on the same batches: --pot=None --out_dir=out-gpt2-control
# Not run here as it stands: shorter, on a model of this shape with random weights (README).
init_from = "gpt2"
out_dir = "out-gpt2-pot4"
dataset = "openwebtext"

pot_bits = 4
pot_granularity = "group"
pot_group_size = 64
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
