# PTQ: GPT-2 (124M) with 4-bit power-of-two weights in groups of 64, chosen by GPTQ on 16k tokens; evaluated beside the
# float model, and kept packed. For eval.py: python eval.py config/ptq_gpt2_pot4.py
# Needs: `python data/openwebtext/prepare.py` and GPT-2 from the hub; a folder instead: --ckpt=FOLDER.
# Gives: out-gpt2-ptq4/model.safetensors, 66.5 MB for 498 MB, and eval.json. Round to nearest instead: --calibrate_tokens=0
# Takes: 3 minutes on 2 cores for GPTQ, then twice the time of config/eval_gpt2.py.
# Not run here on GPT-2's own weights: on a model of this shape with random ones.
ckpt = "gpt2"
out_dir = "out-gpt2-ptq4"
dataset = "openwebtext"

pot_bits = 4
pot_granularity = "group"
pot_group_size = 64
calibrate_tokens = 16384

tokens = 100_000
