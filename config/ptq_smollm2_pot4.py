# PTQ of SmolLM2-135M-Instruct, with train.py: 4-bit power-of-two weights in groups of 64, whose codes GPTQ chooses on 16
# windows of 1,024 tokens. The tied token table, which costs most, has two terms at the same 4 bits, in groups of 32. No
# training.
# Run:   python train.py config/ptq_smollm2_pot4.py
# Then:  python sample.py --ckpt=out-smollm2-ptq4 --chat=True --prompt="Why is the sky blue?"
# Also:  --pot_terms=2 --out_dir=out-smollm2-ptq4-two-terms is much better; --table=None gives the table single powers,
#        too; --calibrate_tokens=0 rounds to the nearest level; --init_from=HuggingFaceTB/SmolLM2-135M-Instruct takes the
#        model from the hub.
# Needs: the model in smollm2/ (extras/import_gguf.py says how to get it), and
#        `python data/openwebtext/prepare.py --tokenizer=smollm2 --out=openwebtext-smollm2`
# Gives: out-smollm2-ptq4/model.safetensors, 72 MB instead of 538 MB.
# Takes: 5 minutes and 3.0 GB on 2 cores with AVX2, then 1 minute for the validation loss.
init_from = "smollm2"
out_dir = "out-smollm2-ptq4"
dataset = "openwebtext-smollm2"

pot_bits = 4
pot_granularity = "group"
pot_group_size = 64
table_terms = 2
table_group_size = 32
calibrate_tokens = 16384

max_iters = 0
eval_tokens = 32_768
