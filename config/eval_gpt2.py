# GPT-2 (124M) in float: loss and perplexity on 100,000 tokens of OpenWebText's test split, at its own context of 1,024.
# For eval.py: python eval.py config/eval_gpt2.py
# The papers' protocol (context 64, last position, 1,200 samples): --protocol=paper. WikiText-2: --dataset=wikitext2
# Needs: `python data/openwebtext/prepare.py` and GPT-2 from the hub; a folder or another size: --ckpt=gpt2-medium
# Gives: eval.json. Takes: about 4 minutes on 2 cores.
# Not run here on GPT-2's own weights: on a model of this shape with random ones.
ckpt = "gpt2"
dataset = "openwebtext"
tokens = 100_000
