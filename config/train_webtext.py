# A small GPT on GPT-2's byte pairs, from nothing: 17.7 M parameters, of which 12.9 M are the token table, 8 M tokens of web
# text. It writes English sentences and no sense. On 2 cores with AMX about 1 h 20 min; --dtype=float32 where the processor
# has no bfloat16 products.
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
