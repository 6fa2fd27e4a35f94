"""
Exports a model: as a folder that transformers loads, or as a GGUF file for llama.cpp.

    python extras/export.py --ckpt out-gpt2-pot4 --out exported        # AutoModelForCausalLM.from_pretrained("exported")
    python extras/export.py --ckpt out-gpt2-mxfp4 --out model.gguf     # needs `pip install gguf`

A folder holds the tokenizer and the dequantized weights: in bfloat16 where that loses nothing, else in float32. A GGUF
file holds the matrices as MXFP4, 4.25 bits per weight, and is written only if that loses nothing. This is so for two-term
weights and for single powers at 3 bits, in groups of 32 with scale_format="e8m0" (config/finetune_gpt2_mxfp4.py).
"""

import json
import os
import sys
import tempfile
from dataclasses import dataclass, replace

import torch
from safetensors.torch import save_file

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import checkpoint  # noqa: E402
import tokenizer  # noqa: E402
from configurator import run  # noqa: E402
from model import GPT, GPTConfig, huggingface_names, rotary_frequencies  # noqa: E402
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
    parent = os.path.dirname(os.path.abspath(s.out))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as folder:  # the export appears whole or not at all
        path = os.path.join(folder, "export")
        write(model, info.tokenizer, s.ckpt, path)
        os.rename(path, s.out)
    size = sum(os.path.getsize(os.path.join(d, f)) for d, _, files in os.walk(s.out) for f in files)
    print(f"{s.out}: {size or os.path.getsize(s.out):,} bytes")
    if os.path.isdir(s.out) and not os.path.exists(os.path.join(s.out, "tokenizer.json")):
        why = (
            "this model knows characters" if info.tokenizer != tokenizer.GPT2 else "GPT-2's byte pairs are not at hand"
        )
        print(f"without a tokenizer, because {why}")


def family(config: GPTConfig) -> str:
    """The model_type of Hugging Face that a model is. Raises ValueError if it is none."""
    parts = config.norm, config.position, config.mlp
    if parts == ("layer", "learned", "gelu") and config.n_kv_head == config.n_head and config.qkv_bias == config.bias:
        return "gpt2"
    if parts == ("rms", "rotary", "swiglu"):
        return "llama" if config.qkv_bias == config.bias else "qwen2"
    raise ValueError(
        f"neither transformers nor llama.cpp has a model with {', '.join(parts)}: there is nothing to export to"
    )


def dense(model: GPT) -> dict[str, torch.Tensor]:
    """Float32 tensors by our names. Matrices are (out, in). Biases that GPT-2 has and the model has not are 0."""
    tensors, biased = {}, family(model.config) == "gpt2"
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or isinstance(module, PackedWeight) or name == "lm_head" and model.config.tie:
            continue
        tensors[f"{name}.weight"] = weight.detach().float()
        bias = getattr(module, "bias", None)
        if bias is not None:
            tensors[f"{name}.bias"] = bias.detach().float()
        elif biased and (".h." in name or "ln_f" in name):
            tensors[f"{name}.bias"] = torch.zeros(len(weight))
    return tensors


def parts_of(config: GPTConfig, name: str, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Query, key and value of c_attn, or gate and up of c_fc, of a Llama-type model. Any other tensor as it is."""
    if ".attn.c_attn." in name:
        kv = config.n_kv_head * config.head_size
        return t.split([len(t) - 2 * kv, kv, kv])
    return t.chunk(2) if ".mlp.c_fc." in name else (t,)


# -----------------------------------------------------------------------------
# Hugging Face


def to_huggingface(model: GPT, meta: dict, ckpt: str, folder: str):
    """Writes the folder, with the tokenizer of checkpoint `ckpt`, which meta describes."""
    c, kind, tensors = model.config, family(model.config), {}
    for name, t in dense(model).items():
        exact = torch.equal(t.bfloat16().float(), t)
        t = t.bfloat16() if exact else t
        if kind != "gpt2":
            tensors |= zip(huggingface_names(kind, name), parts_of(c, name, t))
        elif name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")):
            tensors[name] = t.t()  # Conv1D: (in, out)
        else:
            tensors[name] = t
    config = {"model_type": kind, "vocab_size": c.vocab_size, "tie_word_embeddings": c.tie, "dtype": "float32"}
    if kind == "gpt2":
        config |= {
            "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "n_positions": c.block_size,
            "n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head, "n_inner": c.n_inner,
            "layer_norm_epsilon": c.norm_eps, "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout,
        }  # fmt: skip
    else:
        config |= {
            "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[kind]], "hidden_act": "silu",
            "max_position_embeddings": c.block_size, "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head,
            "num_key_value_heads": c.n_kv_head, "head_dim": c.head_size, "hidden_size": c.n_embd,
            "intermediate_size": c.n_inner, "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta,
            "rope_scaling": {"rope_type": "llama3", **c.rope_scaling} if c.rope_scaling else None,
        }  # fmt: skip
        config |= {"attention_bias": c.bias, "mlp_bias": c.bias} if kind == "llama" else {}
    os.mkdir(folder)
    tokenizer.keep(folder, meta, ckpt)
    config |= {"bos_token_id": None, "eos_token_id": None}
    if os.path.exists(os.path.join(folder, "tokenizer.json")):
        config |= tokenizer.FileTokenizer(folder).special_ids()
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:
        json.dump(config, f, indent=1)
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    save_file(tensors, os.path.join(folder, "model.safetensors"), {"format": "pt"})


# -----------------------------------------------------------------------------
# GGUF

GGUF_NAMES = {
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
    "lm_head": "output", "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
GGUF_PARTS = {"attn_qkv": ("attn_q", "attn_k", "attn_v"), "ffn_up": ("ffn_gate", "ffn_up")}  # of Llama-type models


def to_gguf(model: GPT, meta: dict, ckpt: str, path: str):
    """Writes the file. Raises ValueError for a model of characters, for a tokenizer that llama.cpp spells otherwise, and
    for weights that are not MXFP4."""
    if meta.get("tokenizer") == "char":
        raise ValueError("llama.cpp needs byte pairs, and this model knows characters: export to a folder instead")
    try:
        import gguf
        from gguf import quants
    except ImportError:
        raise ValueError("a .gguf file needs the package gguf: pip install gguf") from None
    c, kind, mxfp4 = model.config, family(model.config), gguf.GGMLQuantizationType.MXFP4
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(c.n_inner)
    writer.add_block_count(c.n_layer)
    writer.add_head_count(c.n_head)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_MXFP4_MOE)
    if kind == "gpt2":
        writer.add_layer_norm_eps(c.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(c.norm_eps)
        writer.add_vocab_size(c.vocab_size)
        writer.add_head_count_kv(c.n_kv_head)
        writer.add_key_length(c.head_size)
        writer.add_value_length(c.head_size)
        writer.add_rope_dimension_count(c.head_size)
        writer.add_rope_freq_base(c.rope_theta)
    if c.rope_scaling is not None:  # llama.cpp divides the unscaled frequencies by these
        factors = rotary_frequencies(replace(c, rope_scaling=None)) / rotary_frequencies(c)
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    add_vocabulary(writer, gguf, tokenizer.tokenizer_of(meta, ckpt), c.vocab_size)
    for name, t in dense(model).items():
        layer, _, part = name.rpartition(".")
        *block, own = layer.removeprefix("transformer.h.").split(".", 1) if ".h." in layer else (layer,)
        own = GGUF_NAMES[own]
        names = (own,) if kind == "gpt2" else GGUF_PARTS.get(own, (own,))
        for own, w in zip(names, parts_of(c, name, t) if len(names) > 1 else (t,)):
            if kind == "llama" and own in ("attn_q", "attn_k"):
                w = interleave(w, c.head_size)
            add_tensor(writer, quants, mxfp4, ".".join([*(["blk", *block] if block else []), own, part]), layer, w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave(t: torch.Tensor, head_size: int) -> torch.Tensor:
    """Orders the rows of query or key for llama.cpp, which turns neighbours by an angle: i and i + head_size / 2 become 2
    i and 2 i + 1."""
    return t.view(-1, 2, head_size // 2, *t.shape[1:]).transpose(1, 2).reshape(t.shape)


def add_tensor(writer, quants, mxfp4, name, layer, t):
    w = t.contiguous().numpy()
    if t.ndim == 1 or name.startswith("position_embd"):  # llama.cpp keeps these in float32
        writer.add_tensor(name, w)
        return
    if t.shape[1] % 32 == 0:
        blocks = quants.quantize(w, mxfp4)
    if t.shape[1] % 32 or not (quants.dequantize(blocks, mxfp4) == w).all():
        raise ValueError(
            f"{layer} is not MXFP4: quantize to two terms (or single powers at 3 bits) in groups of 32 with "
            "scale_format='e8m0', as config/finetune_gpt2_mxfp4.py does, or export to a folder"
        )
    writer.add_tensor(name, blocks, raw_dtype=mxfp4)


def add_vocabulary(writer, gguf, named, rows):
    """Tokens, merges and special tokens. The table may have more rows than there are tokens."""
    if isinstance(named, tokenizer.BPETokenizer):
        tokens, merges = tokenizer.gpt2_vocabulary()
        special, pre, template = {len(tokens) - 1}, "gpt-2", None
        ids = dict.fromkeys(("bos_token_id", "eos_token_id"), len(tokens) - 1)
    else:
        (tokens, merges, special, pre), ids, template = named.byte_pairs(), named.special_ids(), named.template
    kinds = [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(len(tokens))]
    padding = [f"[PAD{i}]" for i in range(len(tokens), rows)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens + padding)
    writer.add_token_types(kinds + [gguf.TokenType.UNUSED] * len(padding))
    writer.add_token_merges(merges)
    if ids["bos_token_id"] is not None:
        writer.add_bos_token_id(ids["bos_token_id"])
        writer.add_add_bos_token(named.encode("")[:1] == [ids["bos_token_id"]])
    if ids["eos_token_id"] is not None:
        writer.add_eos_token_id(ids["eos_token_id"])
    if template is not None:
        writer.add_chat_template(template)


if __name__ == "__main__":
    run(main, Settings)
