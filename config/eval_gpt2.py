# Measures GPT-2 (124M) in float, with eval.py: loss and perplexity on the first 100,000 tokens of OpenWebText's test
# split, in windows of 1,024 tokens.
# Run:   python eval.py config/eval_gpt2.py
# Also:  --ckpt=gpt2-medium or --ckpt=FOLDER measures another model, --dataset=wikitext2 another text,
#        --protocol=paper measures as the papers do (context 64, last position, 1,200 windows).
# Needs: `python data/openwebtext/prepare.py`, and GPT-2 from the Hugging Face hub or in a folder.
# Gives: eval.json. Takes: about 4 minutes on 2 cores.
# Not run on GPT-2's own weights, only on random weights of its shape.
ckpt = "gpt2"
dataset = "openwebtext"
tokens = 100_000
