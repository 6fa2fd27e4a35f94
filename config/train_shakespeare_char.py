# Trains the papers' character GPT (0.8 M parameters) in float on tiny Shakespeare, for 15,000 steps as in the papers.
# Run:   python train.py config/train_shakespeare_char.py
# Needs: `python data/shakespeare_char/prepare.py`. Gives: out-shakespeare-char. Takes: some minutes on 2 cores.
out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
bias = False

batch_size = 12
max_iters = 15000
learning_rate = 1e-3
warmup_iters = 100
eval_interval = 2500
log_interval = 500
