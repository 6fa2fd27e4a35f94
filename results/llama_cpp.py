"""
Does llama.cpp compute the same as we do from an exported .gguf file? It continues prompts greedily, and we compare its
ten best log-probabilities at each token with ours. It rounds activations to 8 bits, so they differ a little.

    pip install gguf xllamacpp    # the second is llama.cpp, built for Python
    python extras/export.py --ckpt out-mxfp4 --out mxfp4.gguf
    python results/llama_cpp.py out-mxfp4 mxfp4.gguf
    python results/llama_cpp.py out-smollm2-mxfp4 smollm2-mxfp4.gguf results/llama_cpp_smollm2.json 40
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
from tokenizer import tokenizer_of

PROMPTS = (
    "The film was a",
    "In the beginning of the year, the government",
    "I have never seen such",
    "She said that the new law would",
    "What I like about this movie is",
)


@torch.no_grad()
def main(folder, gguf, path="results/llama_cpp.json", tokens=48):
    """tokens: of each continuation."""
    model, info = checkpoint.load_model(folder)
    tokenizer, tokens = tokenizer_of(info.tokenizer, folder), int(tokens)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx = gguf, min(model.config.block_size, 1024)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(params)
    same, differences = 0, []
    for prompt in PROMPTS:
        request = {"prompt": prompt, "n_predict": tokens, "temperature": 0.0, "n_probs": 10, "ignore_eos": True}
        theirs = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
        ids = torch.tensor([tokenizer.encode(prompt) + [token["id"] for token in theirs]])
        ours = model(ids)[0, -len(theirs) - 1 : -1].log_softmax(-1)
        for token, row in zip(theirs, ours):
            same += token["id"] == row.argmax().item()
            differences += [abs(row[t["id"]].item() - t["logprob"]) for t in token["top_logprobs"]]
    report = {
        "model": folder,
        "tokens": len(PROMPTS) * tokens,
        "same_best_token": same,
        "log_probability_difference": {"mean": sum(differences) / len(differences), "max": max(differences)},
        "xllamacpp": version("xllamacpp"),
    }
    Path(path).write_text(json.dumps(report | provenance(), indent=1))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
