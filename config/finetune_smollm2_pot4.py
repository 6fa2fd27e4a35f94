# QAT of SmolLM2-135M-Instruct with 4-bit power-of-two weights in groups of 64; the tied token table, which costs most,
# has two terms at the same 4 bits, in groups of 32. It starts from GPTQ's codes and learns the float model's
# predictions instead of the text, because the float model has seen far more text than we can show it.
# Run:   python train.py config/finetune_smollm2_pot4.py
# Also:  --pot_terms=2 --out_dir=out-smollm2-pot4-two-terms; --block_size=128 --batch_size=6 needs 5.8 GiB
#        The float control, trained on the same batches: --pot=None --table=None --out_dir=out-control
# Needs: the model in smollm2/ (extras/import_gguf.py says how to get it, --init_from=HuggingFaceTB/SmolLM2-135M-Instruct
#        takes it from the hub), and `python data/openwebtext/prepare.py --tokenizer=smollm2 --out=openwebtext-smollm2`
# Gives: out-smollm2-pot4 with model.safetensors (packed, 72 MB instead of 538 MB) and ckpt.pt (to resume).
# Takes: GPTQ, then 500 steps of 1,024 tokens, each 25 s on one core with AVX2, and 6.7 GiB. On a core with AMX,
#        --dtype=bfloat16 makes it 5 to 7 s. README.md's losses come from bfloat16: 1,000 steps at 5e-4; two terms: 500.
init_from = "smollm2"
out_dir = "out-smollm2-pot4"
dataset = "openwebtext-smollm2"

pot_bits = 4
pot_granularity = "group"
pot_group_size = 64
table_terms = 2
table_group_size = 32
calibrate_tokens = 16384
distill = 1.0

block_size = 512
batch_size = 2
max_iters = 500
learning_rate = 3e-4
warmup_iters = 20
weight_decay = 0.0
eval_interval = 100
eval_tokens = 32_768
log_interval = 10
