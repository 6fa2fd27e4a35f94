# Trains a small GPT with GPT-2's tokenizer from scratch: 17.7 M parameters, 12.9 M of them in the token table, on 8 M
# tokens of web text. It writes English sentences without sense.
# Run:   python train.py config/train_webtext.py
# Needs: `python data/webtext/prepare.py`. Gives: out-webtext.
# Takes: about 1 h 20 min on 2 cores with AMX. Pass --dtype=float32 if the processor has no bfloat16 products.
dataset = "webtext"
out_dir = "out-webtext"
n_layer, n_head, n_embd, block_size, bias, dropout = 6, 4, 256, 256, False, 0.0
max_iters = 4000
batch_size = 8
learning_rate = 1e-3
warmup_iters = 100
weight_decay = 0.1
beta2 = 0.99
eval_interval = 250
eval_tokens = 65_537
log_interval = 20
dtype = "bfloat16"
