# The papers' own QAT of GPT-2 (124M), as the code of arXiv 2601.02298 does it, for the row [-2^7, 2^7] (perplexity
# 30.47 by the paper's count): its quantizer with one scale per tensor that follows the range of the weights, the head
# quantized, embeddings in float, context 64, batch 12 x 32, the loss of the last position alone, AdamW with weight
# decay 0.1, gradient norm clipped at 1.0, 500 steps.
# The quantizer has 17 levels here, which take 5 bits; the paper says 4. Range 2^5: --pot_bits=4 --pot_range=5
# Learning rate: 5e-5 as in the code; the paper's text says 0.5e-5. Unknown: AdamW's betas (here nanoGPT's) and the
# schedule (here constant).
# Run:   python train.py config/paper_gpt2_pot4.py
# Then:  python eval.py --ckpt=gpt2,out-gpt2-paper --dataset=openwebtext --protocol=paper
# Needs and takes the same as config/finetune_gpt2_pot4.py, without the time for the float model's predictions.
# Gives: out-gpt2-paper. Not run on GPT-2's own weights.
init_from = "gpt2"
out_dir = "out-gpt2-paper"
dataset = "openwebtext"

pot_grid = "paper"
pot_bits = 5
pot_range = 7
pot_granularity = "tensor"
pot_scale = "absmax"
pot_eps = 2.0**-5

last_position = True
block_size = 64
batch_size = 12
gradient_accumulation_steps = 32
max_iters = 500
learning_rate = 5e-5
min_lr = 5e-5
weight_decay = 0.1
grad_clip = 1.0
eval_interval = 100
eval_tokens = 100_000
log_interval = 10
