"""
Does llama.cpp compute the same as we do from an exported .gguf file? It continues prompts greedily, and we compare its
ten best log-probabilities at each token with ours. It rounds activations to 8 bits, so they differ a little.

    pip install gguf xllamacpp    # the second is llama.cpp, built for Python
    python extras/export.py --ckpt out-mxfp4 --out mxfp4.gguf
    python results/llama_cpp.py out-mxfp4 mxfp4.gguf
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
import xllamacpp

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint
from machine import provenance
from tokenizer import BPETokenizer

PROMPTS = (
    "The film was a",
    "In the beginning of the year, the government",
    "I have never seen such",
    "She said that the new law would",
    "What I like about this movie is",
)
TOKENS = 48  # of each continuation


@torch.no_grad()
def main(folder, gguf):
    model, _ = checkpoint.load_model(folder)
    bpe = BPETokenizer()
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx = gguf, model.config.block_size
    server = xllamacpp.Server(params)
    same, differences = 0, []
    for prompt in PROMPTS:
        request = {"prompt": prompt, "n_predict": TOKENS, "temperature": 0.0, "n_probs": 10, "ignore_eos": True}
        theirs = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
        ids = torch.tensor([bpe.encode(prompt) + [token["id"] for token in theirs]])
        ours = model(ids)[0, -len(theirs) - 1 : -1].log_softmax(-1)
        for token, row in zip(theirs, ours):
            same += token["id"] == row.argmax().item()
            differences += [abs(row[t["id"]].item() - t["logprob"]) for t in token["top_logprobs"]]
    report = {
        "model": folder,
        "tokens": len(PROMPTS) * TOKENS,
        "same_best_token": same,
        "log_probability_difference": {"mean": sum(differences) / len(differences), "max": max(differences)},
        "xllamacpp": version("xllamacpp"),
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(report | provenance(), indent=1))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
