# Trains the papers' character GPT (0.8 M parameters) in float on Python's own documentation.
# Run:   python train.py config/train_pydoc_char.py
# Needs: `python data/pydoc_char/prepare.py`. Gives: out-pydoc-char. Takes: about 2 minutes on 2 cores.
out_dir = "out-pydoc-char"
dataset = "pydoc_char"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
bias = False

batch_size = 8
max_iters = 3000
learning_rate = 2e-3
warmup_iters = 100
eval_interval = 1000
eval_tokens = 50_000
