# QAT of GPT-2 (124M) with 4-bit power-of-two weights in groups of 64, embeddings included. It starts from GPTQ's
# codes and learns the float model's predictions instead of the text: GPT-2 has seen far more text of this kind than
# we can show it. For a text that the model shall learn, take config/finetune_text_pot4.py.
# Run:   python train.py config/finetune_gpt2_pot4.py
# Also:  --init_from=FOLDER takes GPT-2 from a folder. Sequences have 64 tokens, as in the papers; for longer ones
#        pass --block_size=1024 --batch_size=4 --gradient_accumulation_steps=6
#        The float control, trained on the same batches: --pot=None --out_dir=out-gpt2-control
# Needs: `python data/openwebtext/prepare.py`, and GPT-2 from the Hugging Face hub or in a folder.
# Gives: out-gpt2-pot4 with model.safetensors (packed, 66.6 MB instead of 498 MB) and ckpt.pt (to resume).
# Takes: 500 steps of 24,576 tokens. On 2 cores a step takes about 3.4 minutes, so all of them a bit more than a day; a
#        third of that time goes to the float model's predictions. Estimated from `python bench.py --what=qat`.
# Not run on GPT-2's own weights, only for some steps on random weights of its shape.
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
