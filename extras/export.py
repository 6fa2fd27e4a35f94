"""
Exports a model: as a folder that transformers loads, or as a GGUF file for llama.cpp.

    python extras/export.py --ckpt out-gpt2-pot4 --out exported        # GPT2LMHeadModel.from_pretrained("exported")
    python extras/export.py --ckpt out-gpt2-mxfp4 --out model.gguf     # needs `pip install gguf`

A folder holds the dequantized weights: in bfloat16 where that loses nothing, else in float32. A GGUF file holds the
matrices as MXFP4, 4.25 bits per weight, and is written only if that loses nothing. This is so for two-term weights and
for single powers at 3 bits, in groups of 32 with scale_format="e8m0" (config/finetune_gpt2_mxfp4.py).
"""

import json
import os
import sys
import tempfile
from dataclasses import dataclass

import torch
from safetensors.torch import save_file

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import checkpoint  # noqa: E402
import dataset  # noqa: E402
from configurator import run  # noqa: E402
from model import GPT  # noqa: E402
from pot import PackedWeight, convert  # noqa: E402


@dataclass
class Settings:
    ckpt: str = "out"  # folder of a checkpoint
    out: str = "exported"  # a .gguf file or a folder to write; it must not exist yet


@torch.no_grad()
def main(s: Settings):
    if os.path.exists(s.out):
        raise ValueError(f"{s.out} exists already: remove it, or choose another --out")
    model, info = checkpoint.load_model(s.ckpt)
    model = convert(model)
    if any(m.config.act_bits for m in model.modules() if isinstance(m, PackedWeight)):
        print("8-bit activations are left out: the exported model has the same weights and float activations")
    write = to_gguf if s.out.endswith(".gguf") else to_huggingface
    bpe = info.tokenizer == dataset.GPT2
    parent = os.path.dirname(os.path.abspath(s.out))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as folder:  # the export appears whole or not at all
        path = os.path.join(folder, "export")
        write(model, bpe, path)
        os.rename(path, s.out)
    size = sum(os.path.getsize(os.path.join(d, f)) for d, _, files in os.walk(s.out) for f in files)
    print(f"{s.out}: {size or os.path.getsize(s.out):,} bytes")
    if not bpe:
        print("without a tokenizer, because this model knows characters, not GPT-2's byte pairs")


def dense(model: GPT) -> dict[str, torch.Tensor]:
    """Float32 tensors by GPT-2's names. Matrices are (out, in). Biases that the model does not have are 0."""
    tensors = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or isinstance(module, PackedWeight) or name == "lm_head":
            continue
        tensors[f"{name}.weight"] = weight.detach().float()
        if ".h." in name or "ln_f" in name:
            bias = module.bias
            tensors[f"{name}.bias"] = torch.zeros(len(weight)) if bias is None else bias.detach().float()
    return tensors


# -----------------------------------------------------------------------------
# Hugging Face


def to_huggingface(model: GPT, bpe: bool, folder: str):
    """Writes the folder. bpe: the model has GPT-2's byte pairs, so their vocabulary is written too."""
    c = model.config
    tensors = {}
    for name, t in dense(model).items():
        t = t.t() if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")) else t  # Conv1D: (in, out)
        exact = torch.equal(t.bfloat16().float(), t)
        tensors[name] = (t.bfloat16() if exact else t).contiguous()
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
        "vocab_size": c.vocab_size, "n_positions": c.block_size, "n_embd": c.n_embd, "n_layer": c.n_layer,
        "n_head": c.n_head, "layer_norm_epsilon": 1e-5, "resid_pdrop": c.dropout, "embd_pdrop": c.dropout,
        "attn_pdrop": c.dropout, "tie_word_embeddings": True, "dtype": "float32",
    }  # fmt: skip
    os.mkdir(folder)
    end = dataset.BPETokenizer.end_of_text if bpe else None
    config |= {"bos_token_id": end, "eos_token_id": end}
    if bpe:
        tokens, merges = vocabulary()
        _write(folder, "vocab.json", json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False))
        _write(folder, "merges.txt", "#version: 0.2\n" + "".join(f"{m}\n" for m in merges))
        tokenizer = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": c.block_size}
        _write(folder, "tokenizer_config.json", json.dumps(tokenizer))
    _write(folder, "config.json", json.dumps(config, indent=1))
    save_file(tensors, os.path.join(folder, "model.safetensors"), {"format": "pt"})


def _write(folder, name, text):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        f.write(text)


def vocabulary() -> tuple[list[str], list[str]]:
    """GPT-2's (tokens by id, merges by rank), in the letters of its files: a printable byte is its own letter, the
    other bytes are the letters from 256 on."""
    bpe = dataset.BPETokenizer()
    end = bpe.end_of_text
    tokens = [bpe.decode_bytes([i]) for i in range(end)]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    rank, merges = {t: i for i, t in enumerate(tokens)}, []

    def spelled(token):
        return "".join(letters[b] for b in token)

    for token in tokens:
        parts = [bytes([b]) for b in token]
        # A token is the merge of two halves. Merging all lower ranks leaves these two.
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: rank.get(parts[i] + parts[i + 1], end))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(" ".join(map(spelled, parts)))
    return [*map(spelled, tokens), "<|endoftext|>"], merges


# -----------------------------------------------------------------------------
# GGUF

GGUF_NAMES = {
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip


def to_gguf(model: GPT, bpe: bool, path: str):
    """Writes the file. Raises ValueError for a model of characters and for weights that are not MXFP4."""
    if not bpe:
        raise ValueError(
            "llama.cpp needs GPT-2's byte pairs, and this model knows characters: export to a folder instead"
        )
    try:
        import gguf
        from gguf import quants
    except ImportError:
        raise ValueError("a .gguf file needs the package gguf: pip install gguf") from None
    c, mxfp4 = model.config, gguf.GGMLQuantizationType.MXFP4
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(4 * c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_head_count(c.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_MXFP4_MOE)
    tokens, merges = vocabulary()
    padding = [f"[PAD{i}]" for i in range(len(tokens), c.vocab_size)]  # the table may have more rows than tokens
    kinds = [gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens + padding)
    writer.add_token_types(kinds + [gguf.TokenType.UNUSED] * len(padding))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)
    for name, t in dense(model).items():
        layer, _, part = name.rpartition(".")
        *block, own = layer.removeprefix("transformer.h.").split(".", 1) if ".h." in layer else (layer,)
        name, w = ".".join(["blk", *block] * bool(block) + [GGUF_NAMES[own], part]), t.numpy()
        if t.ndim == 1 or own == "transformer.wpe":  # llama.cpp keeps these in float32
            writer.add_tensor(name, w)
            continue
        if t.shape[1] % 32 == 0:
            blocks = quants.quantize(w, mxfp4)
        if t.shape[1] % 32 or not (quants.dequantize(blocks, mxfp4) == w).all():
            raise ValueError(
                f"{layer} is not MXFP4: quantize to two terms (or single powers at 3 bits) in groups of 32 with "
                "scale_format='e8m0', as config/finetune_gpt2_mxfp4.py does, or export to a folder"
            )
        writer.add_tensor(name, blocks, raw_dtype=mxfp4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    run(main, Settings)
