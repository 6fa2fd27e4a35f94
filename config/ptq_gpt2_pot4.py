# PTQ of GPT-2 (124M), with train.py: 4-bit power-of-two weights in groups of 64, embeddings included, whose codes
# GPTQ chooses on 16,384 tokens. No training.
# Run:   python train.py config/ptq_gpt2_pot4.py
# Then:  python eval.py config/eval_gpt2.py --ckpt=gpt2,out-gpt2-ptq4
# Also:  --calibrate_tokens=0 rounds to the nearest level; --init_from=FOLDER takes GPT-2 from a folder.
# Needs: `python data/openwebtext/prepare.py`, and GPT-2 from the Hugging Face hub or in a folder.
# Gives: out-gpt2-ptq4/model.safetensors, 66.6 MB instead of 498 MB.
# Takes: about 3 minutes on 2 cores for GPTQ, then about 4 for the validation loss.
# Not run on GPT-2's own weights, only on random weights of its shape.
init_from = "gpt2"
out_dir = "out-gpt2-ptq4"
dataset = "openwebtext"

pot_bits = 4
pot_granularity = "group"
pot_group_size = 64
calibrate_tokens = 16384

max_iters = 0
eval_tokens = 100_000
