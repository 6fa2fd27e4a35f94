# QAT of the papers' character model on tiny Shakespeare, with 4-bit power-of-two weights in groups of 64, embeddings
# included. It starts from GPTQ's codes and learns the float model's predictions instead of the text: the float model
# has learned this small text so well that more training on it only overfits.
# Run:   python train.py config/finetune_shakespeare_char_pot4.py
# Also:  the float control, trained on the same batches: --pot=None --out_dir=out-shakespeare-char-control
# Needs: `python train.py config/train_shakespeare_char.py`. Gives: out-shakespeare-char-pot4.
# Takes: about 5 minutes on 2 cores.
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
