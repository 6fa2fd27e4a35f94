# The QAT of arXiv 2601.02298 as its code does it, for its row "[-2^7, 2^7], 4 bits" (perplexity 111 at 2^5, 30.47 at 2^7,
# by its own count): its quantizer with one scale a tensor that follows the weights' range, head quantized and embeddings
# in float, context 64, batch 12 x 32, the loss of the last position alone, AdamW, weight decay 0.1, clip 1.0, 500 steps.
# Its 17 levels take 5 bits, not the 4 that the paper says; its range 2^5 is --pot_bits=4 --pot_range=5.
# Learning rate: the code's 5e-5; the text says 0.5e-5. Not known: AdamW's betas (nanoGPT's here) and any schedule (none).
# Needs: as finetune_gpt2_pot4.py. Gives: out-gpt2-paper. Then: python eval.py --ckpt=out-gpt2-paper --protocol=paper
# Takes: as finetune_gpt2_pot4.py. Not run here: it takes GPT-2's weights.
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
