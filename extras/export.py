"""
Exports a model: as a folder that transformers loads, or as a GGUF file for llama.cpp.

    python extras/export.py --ckpt out-gpt2-pot4 --out exported        # AutoModelForCausalLM.from_pretrained("exported")
    python extras/export.py --ckpt out-gpt2-mxfp4 --out model.gguf     # needs `pip install gguf`
    python extras/export.py --ckpt out-smollm2-mxfp4 --out exported --packed=True    # needs `pip install compressed-tensors`

A folder holds the tokenizer and the dequantized weights: in bfloat16 where that loses nothing, else in float32. A GGUF
file holds each matrix in the smallest format of llama.cpp that loses nothing:

    MXFP4  4.25 bits per weight   two terms, and single powers at 3 bits, with scale_format="e8m0"
    Q4_0   4.5                    levels up to 7: single powers at 3 bits, uniform at 4 bits
    Q5_0   5.5                    levels up to 15: two terms at 4 bits, uniform at 5 bits
    Q8_0   8.5                    levels up to 127: single powers at 4 bits, uniform at 8 bits
    BF16   16                     5 and 6 bits with scale_format="e8m0"

All but the last have blocks of 32 weights that share a scale, which is our unit. So the group size must be a multiple of
32, and the unit a float16. Other weights are rounded, if --lossy=True allows it. Layers that were not quantized stay in
bfloat16 where that loses nothing, else in float32.

With --packed=True a folder holds the linear layers of a Llama-type model as MXFP4, in the format mxfp4-pack-quantized of
compressed-tensors, which vLLM and transformers read. Their package decodes the same weights; vLLM was not tried here. The
token table and the head stay in bfloat16.
"""

import json
import os
import sys
import tempfile
from dataclasses import dataclass, replace

import numpy as np
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
    packed: bool = False  # a folder holds packed MXFP4 weights, for compressed-tensors
    lossy: bool = False  # a .gguf file may round weights for which llama.cpp has no exact format


@torch.no_grad()
def main(s: Settings):
    if os.path.exists(s.out):
        raise ValueError(f"{s.out} exists already: remove it, or choose another --out")
    if s.packed and s.out.endswith(".gguf"):
        raise ValueError("--packed=True is for a folder: a .gguf file is packed anyway")
    parent = os.path.dirname(os.path.abspath(s.out))
    checkpoint.check_writable(parent)
    model, info = checkpoint.load_model(s.ckpt)
    model = convert(model)
    if any(m.config.act_bits for m in model.modules() if isinstance(m, PackedWeight)):
        print("8-bit activations are left out: the exported model has the same weights and float activations")
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as folder:  # the export appears whole or not at all
        path = os.path.join(folder, "export")
        if s.out.endswith(".gguf"):
            to_gguf(model, info.tokenizer, s.ckpt, path, s.lossy)
        else:
            to_huggingface(model, info.tokenizer, s.ckpt, path, s.packed)
        checkpoint.publish(path, s.out)
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


def to_huggingface(model: GPT, meta: dict, ckpt: str, folder: str, packed: bool = False):
    """Writes the folder, with the tokenizer of checkpoint `ckpt`, which meta describes. Raises ValueError if packed is
    asked for and the model is of GPT-2's kind, or its linear layers are not MXFP4."""
    c, kind, tensors = model.config, family(model.config), {}
    if packed and kind == "gpt2":
        raise ValueError("--packed=True is for Llama-type models: transformers' GPT-2 has no nn.Linear layers")
    for name, t in dense(model).items():
        exact = torch.equal(t.bfloat16().float(), t)
        t = t.bfloat16() if exact else t
        if packed and ".h." in name and name.endswith(".weight") and t.ndim == 2:
            layer = model.get_submodule(name.removesuffix(".weight"))
            unit = unit_rows(layer.packed) if hasattr(layer, "packed") else None
            for i, full_name in enumerate(huggingface_names(kind, name)):
                w, u = (x if x is None else parts_of(c, name, x)[i].numpy() for x in (t.float(), unit))
                tensors |= compressed(full_name, w, u)
        elif kind != "gpt2":
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
    config |= {"quantization_config": COMPRESSED} if packed else {}
    os.mkdir(folder)
    checkpoint.keep_tokenizer(folder, meta, ckpt)
    config |= {"bos_token_id": None, "eos_token_id": None}
    if os.path.exists(os.path.join(folder, "tokenizer.json")):
        config |= tokenizer.FileTokenizer(folder).special_ids()
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:
        json.dump(config, f, indent=1)
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    path = os.path.join(folder, "model.safetensors")
    checkpoint.write(path, lambda temporary: save_file(tensors, temporary, {"format": "pt"}))


COMPRESSED = {  # of compressed-tensors
    "quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True, "dynamic": False,
        "scale_dtype": "torch.uint8",
    }}},
}  # fmt: skip


def compressed(name: str, w: np.ndarray, unit: np.ndarray | None) -> dict[str, torch.Tensor]:
    """The tensors of a linear layer: codes (out, in / 2), the even columns in the lower halves of bytes, and E8M0 scales
    (out, in / 32), both uint8. unit: (out, groups), or None for a float layer."""
    blocks = None if unit is None else in_blocks(w, unit)
    coded = None if blocks is None else mxfp4(*blocks)
    if coded is None:
        raise ValueError(
            f"{name} is not MXFP4: quantize to two terms in groups of 32 with scale_format='e8m0', as "
            "config/finetune_gpt2_mxfp4.py does, or leave out --packed"
        )
    scale, code = coded[0].squeeze(-1), coded[1].reshape(w.shape)
    return {
        f"{name}_packed": torch.from_numpy(code[:, ::2] | code[:, 1::2] << 4),
        f"{name}_scale": torch.from_numpy(scale),
    }


# -----------------------------------------------------------------------------
# GGUF

GGUF_NAMES = {
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
    "lm_head": "output", "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
GGUF_PARTS = {"attn_qkv": ("attn_q", "attn_k", "attn_v"), "ffn_up": ("ffn_gate", "ffn_up")}  # of Llama-type models


def to_gguf(model: GPT, meta: dict, ckpt: str, path: str, lossy: bool = False):
    """Writes the file, and prints which formats it has. Raises ValueError for a model of characters, for a tokenizer that
    llama.cpp spells otherwise, and, unless lossy, for weights that no format of llama.cpp holds."""
    if meta.get("tokenizer") == "char":
        raise ValueError("llama.cpp needs byte pairs, and this model knows characters: export to a folder instead")
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise ValueError("a .gguf file needs the package gguf: pip install gguf") from None
    kind = family(model.config)
    writer = gguf.GGUFWriter(path, kind)
    add_shape(writer, model.config, kind)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_vocabulary(writer, gguf, tokenizer.tokenizer_of(meta, ckpt), model.config.vocab_size)
    written, losses = {}, []  # {format: [matrices, weights, bytes]}; a line for each matrix that loses something
    for name, w, unit in gguf_tensors(model, kind):
        if w.ndim == 1 or name.startswith(("position_embd", "rope_freqs")):  # llama.cpp keeps these in float32
            writer.add_tensor(name, w.view(Written))
            continue
        form, data, loss = encode(gguf, w, unit)
        writer.add_tensor(name, data.view(Written), raw_dtype=gguf.GGMLQuantizationType[form])
        written[form] = [a + b for a, b in zip(written.get(form, (0, 0, 0)), (1, w.size, data.nbytes))]
        if loss:
            losses.append(f"{name} by {loss:.2g} as {form}")
    if losses:
        shown = "; ".join(losses[:5]) + (f"; and {len(losses) - 5} more" if len(losses) > 5 else "")
        count = f"{len(losses)} of {sum(n for n, *_ in written.values())} matrices"
        message = f"{count} lose something (relative error): {shown}"
        if not lossy:
            raise ValueError(
                f"llama.cpp has no format that holds these weights. {message}. Pass --lossy=True to round them, or export "
                "to a folder, which loses nothing"
            )
        print(message)
    most = max(written, key=lambda form: written[form][2])
    file_type = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}.get(most, f"MOSTLY_{most}")
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for form, (count, weights, size) in written.items():
        print(f"{count} matrices as {form}: {size:,} bytes, {8 * size / weights:.4g} bits per weight")
    packed = {id(m.packed): m.packed for m in model.modules() if hasattr(m, "packed")}.values()
    before, after = sum(p.codes.nbytes + p.unit.nbytes for p in packed), sum(size for *_, size in written.values())
    if packed and after > 1.1 * before:
        print(f"The checkpoint has them in {before:,} bytes: llama.cpp has no smaller format with these levels")
    if packed and most in ("Q5_0", "Q8_0", "BF16"):
        print("Two terms in groups of 32 with scale_format='e8m0' take 4.25 bits (config/finetune_gpt2_mxfp4.py)")


class Written(np.ndarray):
    """A tensor for gguf, which calls tofile. numpy's own tofile does not notice that the last bytes cannot be written."""

    def tofile(self, file):
        file.write(np.ascontiguousarray(self).tobytes())


def add_shape(writer, c: GPTConfig, kind: str):
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(c.n_inner)
    writer.add_block_count(c.n_layer)
    writer.add_head_count(c.n_head)
    if kind == "gpt2":
        writer.add_layer_norm_eps(c.norm_eps)
        return
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_head_count_kv(c.n_kv_head)
    writer.add_key_length(c.head_size)
    writer.add_value_length(c.head_size)
    writer.add_rope_dimension_count(c.head_size)
    writer.add_rope_freq_base(c.rope_theta)


def gguf_tensors(model: GPT, kind: str):
    """Yields llama.cpp's name, the float32 tensor, and, of a quantized matrix (out, in), its unit (out, groups)."""
    c, packed = model.config, {f"{name}.weight": m.packed for name, m in model.named_modules() if hasattr(m, "packed")}
    if c.rope_scaling is not None:  # llama.cpp divides the unscaled frequencies by these
        factors = rotary_frequencies(replace(c, rope_scaling=None)) / rotary_frequencies(c)
        yield "rope_freqs.weight", factors.numpy(), None
    for name, t in dense(model).items():
        layer, _, part = name.rpartition(".")
        *block, own = layer.removeprefix("transformer.h.").split(".", 1) if ".h." in layer else (layer,)
        own = GGUF_NAMES[own]
        names = (own,) if kind == "gpt2" else GGUF_PARTS.get(own, (own,))
        tensors = (t, unit_rows(packed[name])) if name in packed else (t,)
        split = [parts_of(c, name, x) if len(names) > 1 else (x,) for x in tensors]
        for own, *tensors in zip(names, *split):
            if kind == "llama" and own in ("attn_q", "attn_k"):
                tensors = [interleave(x, c.head_size) for x in tensors]
            w, unit = [x.contiguous().numpy() for x in tensors] + [None] * (2 - len(tensors))
            yield ".".join([*(["blk", *block] if block else []), own, part]), w, unit


def unit_rows(packed: PackedWeight) -> torch.Tensor:
    """The unit as (out, groups) float32, whatever its granularity and layout."""
    unit = packed.unit.float()
    if unit.ndim == 3:  # in tiles of 16 rows
        unit = unit.transpose(1, 2).flatten(0, 1)[: packed.out_features]
    return unit.expand(packed.out_features, -1)


def interleave(t: torch.Tensor, head_size: int) -> torch.Tensor:
    """Orders the rows of query or key for llama.cpp, which turns neighbours by an angle: i and i + head_size / 2 become 2
    i and 2 i + 1."""
    return t.view(-1, 2, head_size // 2, *t.shape[1:]).transpose(1, 2).reshape(t.shape)


def encode(gguf, w: np.ndarray, unit: np.ndarray | None) -> tuple[str, np.ndarray, float]:
    """The smallest format that holds w (out, in) without loss. If there is none: the one that loses least.

    unit: (out, groups), or None for a float layer. Returns the format's name, its bytes (out, bytes of a row), and the
    relative error, which is the norm of the difference divided by the norm of w.
    """
    best = None
    for form, data in candidates(gguf, w, unit):
        lost = float(np.linalg.norm(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[form]) - w))
        if best is None or lost < best[2]:
            best = form, data, lost
        if not lost:
            return best
    return *best[:2], best[2] / float(np.linalg.norm(w))


def candidates(gguf, w, unit):
    """Yields (name of a format, bytes of w in it), the smallest first."""
    split = None if unit is None else in_blocks(w, unit)
    for form in FORMATS if split else ():
        blocks = blocks_of(form, *split)
        if blocks is not None:
            yield form, blocks.reshape(len(w), -1)
    bfloat16 = gguf.quants.quantize(w, gguf.GGMLQuantizationType.BF16)
    if (gguf.quants.dequantize(bfloat16, gguf.GGMLQuantizationType.BF16) == w).all():
        yield "BF16", bfloat16
    if unit is None or w.shape[1] % 32:
        yield "F32", w
    else:
        yield "Q8_0", gguf.quants.quantize(w, gguf.GGMLQuantizationType.Q8_0)  # rounded, with a scale of its own


E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12])  # levels of MXFP4, times two
FORMATS = ("MXFP4", "Q4_0", "Q5_0", "Q8_0")  # by size
TOPS = {"Q4_0": 7, "Q5_0": 15, "Q8_0": 127}  # the largest level


def in_blocks(w: np.ndarray, unit: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """w (out, in) and its unit (out, groups) as level (out, in / 32, 32) int32 and unit (out, in / 32, 1). None if a block
    of 32 weights would have several units."""
    repeats, rest = divmod(w.shape[1] // unit.shape[1], 32)
    if rest:
        return None
    unit = unit.repeat(repeats, axis=1)[:, :, None]
    return np.rint(w.reshape(*unit.shape[:2], 32) / unit).astype(np.int32), unit


def mxfp4(level: np.ndarray, unit: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """E8M0 scales (out, blocks, 1) and FP4 codes (out, blocks, 32), both uint8. None if a unit is no power of two, or a
    level is none of FP4's."""
    mantissa, exponent = np.frexp(unit)  # unit = mantissa * 2^exponent, 0.5 <= mantissa < 1
    size = np.abs(level)
    if (mantissa != 0.5).any() or not np.isin(size, E2M1).all():
        return None
    code = np.searchsorted(E2M1, size) + 8 * (level < 0)
    return (exponent + 127).astype(np.uint8), code.astype(
        np.uint8
    )  # a scale is the value of FP4's 1.0, which is level 2


def blocks_of(form: str, level: np.ndarray, unit: np.ndarray) -> np.ndarray | None:
    """Bytes of the weights level * unit: level (rows, blocks, 32), unit (rows, blocks, 1) -> (rows, blocks, bytes). None
    if the format lacks a level, or if it takes only powers of two as scales and a unit is none.

    A block is a scale, then (Q5_0) the fifth bit of each code, then 4 or 8 bits of each code. Half a block's codes lie in
    the lower halves of bytes, the other half in the upper ones. ggml/src/ggml-common.h of llama.cpp declares the blocks.
    """
    if form == "MXFP4":
        coded = mxfp4(level, unit)
        return None if coded is None else np.concatenate([coded[0], nibbles(coded[1])], axis=-1)
    if np.abs(level).max() > TOPS[form]:
        return None
    half = np.finfo(np.float16)
    scale = unit.clip(half.smallest_subnormal, half.max).astype(np.float16).view(np.uint8)
    if form == "Q8_0":
        return np.concatenate([scale, level.astype(np.int8).view(np.uint8)], axis=-1)
    code = (level + TOPS[form] + 1).astype(np.uint8)
    high = [np.packbits(code > 15, axis=-1, bitorder="little")] if form == "Q5_0" else []
    return np.concatenate([scale, *high, nibbles(code & 15)], axis=-1)


def nibbles(code):
    return code[..., :16] | code[..., 16:] << 4


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
