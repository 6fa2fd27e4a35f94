# QAT of GPT-2 (124M) on your own text, with 4-bit power-of-two weights in groups of 64, embeddings included. It starts
# from GPTQ's codes and learns the text: distill = 0. config/finetune_gpt2_pot4.py, whose distill is 1, learns to predict
# as the float model does, so it never learns your text.
# Run:   python data/text/prepare.py --input=FILE --name=mytext
#        python train.py config/finetune_text_pot4.py --dataset=mytext
# Then:  python sample.py --ckpt=out-text-pot4/best --prompt="..."
# Also:  --init_from=FOLDER takes another model (prepare the text with --tokenizer=FOLDER);
#        the float control, trained on the same batches: --pot=None --out_dir=out-text-control
# Needs: a text of 10 kB or more, and GPT-2 from the Hugging Face hub or in a folder.
# Gives: out-text-pot4, with the model of the last step, and out-text-pot4/best, with the model of the lowest validation
#        loss: a small text is soon learned by heart.
# Takes: 200 steps of 4,096 tokens. On 2 cores a bit more than an hour, by the cost of a step of finetune_gpt2_pot4.py.
# Not run on GPT-2's own weights. The demo's character model, after 150 steps on the first 60,000 characters of tiny
# Shakespeare, had a validation loss of 1.977 with distill=0, 2.046 with 0.5 and 2.509 with 1; in float, before, 2.522:
#        head -c 60000 tinyshakespeare.txt > small.txt
#        python data/text/prepare.py --input=small.txt --name=small --tokenizer=out-pydoc-char
#        python train.py config/finetune_text_pot4.py --init_from=out-pydoc-char --dataset=small --block_size=64
#            --batch_size=8 --gradient_accumulation_steps=1 --max_iters=150 --learning_rate=3e-4 --eval_tokens=6000
init_from = "gpt2"
out_dir = "out-text-pot4"
dataset = "text"

pot_bits = 4
pot_granularity = "group"
pot_group_size = 64
calibrate_tokens = 16384
distill = 0.0

block_size = 256
batch_size = 4
gradient_accumulation_steps = 4
max_iters = 200
learning_rate = 5e-5
weight_decay = 0.0
eval_interval = 20
eval_tokens = 20_000
keep = "best"
log_interval = 5
