# The papers' character GPT (0.8 M parameters) in float, on Python's own documentation.
# Needs `python data/pydoc_char/prepare.py`. About a minute on 2 cores.
out_dir = "out-pydoc-char"
dataset = "pydoc_char"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
bias = False

batch_size = 32
max_iters = 3000
learning_rate = 2e-3
warmup_iters = 100
eval_interval = 500
