"""
GPT-2's decode step in one call, by kernels/decode.cpp: for packed models on a processor.

    decode = decoder_of(model)  # None: this model goes layer by layer
    for token in model.generate(ids, 100, decode=decode):
        ...
"""

import ctypes
import threading

import torch

import pot
from model import GPT, KVCache
from pot import PackedPoTEmbedding, PackedPoTLinear


class _Norm(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p)]


class _Linear(ctypes.Structure):
    _fields_ = [("weight", pot._PotWeight), ("bias", ctypes.c_void_p)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Norm) for name in ("ln_1", "ln_2")),
        *((name, _Linear) for name in ("c_attn", "attn_c_proj", "c_fc", "mlp_c_proj")),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
    ]


class _Gpt(ctypes.Structure):
    """struct Gpt of decode.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n_layer", "n_head", "n_embd", "capacity")),
        *((name, pot._PotWeight) for name in ("wte", "wpe")),
        ("ln_f", _Norm),
        ("lm_head", _Linear),
        ("layers", ctypes.POINTER(_Layer)),
    ]


def decoder_of(model: GPT) -> "Decoder | None":
    """A Decoder, or None if not all of the model is packed to 4 bits in float32, on the CPU, with the kernel at hand."""
    layers = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Embedding))]
    packed = [m.packed for m in model.modules() if isinstance(m, (PackedPoTLinear, PackedPoTEmbedding))]
    tensors = [*model.parameters(), *(p.codes for p in packed)]
    if layers or not all(p._fast and p._like.dtype == torch.float32 for p in packed):
        return None
    if not all(
        t.device.type == "cpu" and t.dtype in (torch.float32, torch.uint8) and t.is_contiguous() for t in tensors
    ):
        return None
    library = pot._kernel()
    return Decoder(model, library) if hasattr(library, "gpt_decode") else None


class Decoder:
    """decode(token, cache): logits (1, vocab_size) of what follows token (1, 1), which continues the cache, as
    model(token, cache=cache) computes them up to the order of summation. For a batch of one.

    It holds the tensors that the model has now: make another one after moving, casting or assigning weights. Raises
    ValueError for a token, or a cache, that does not fit. Threads may call it at once; they take turns."""

    def __init__(self, model: GPT, library: ctypes.CDLL):
        self.model, self.lock = model, threading.Lock()
        self.kept = [t.detach() for t in (*model.parameters(), *model.buffers())]  # pointers into these are kept below
        self.step = library.gpt_decode
        self.step.argtypes = [ctypes.POINTER(_Gpt), ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int]
        self.step.restype = None
        config, parts = model.config, model.transformer
        self.layers = (_Layer * config.n_layer)(
            *(
                _Layer(
                    *map(_norm, (block.ln_1, block.ln_2)),
                    *map(_linear, (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)),
                )
                for block in parts.h
            )
        )
        self.gpt = _Gpt(
            config.n_layer, config.n_head, config.n_embd, 0, parts.wte.packed._weight(), parts.wpe.packed._weight(),
            _norm(parts.ln_f), _linear(model.lm_head), self.layers,
        )  # fmt: skip

    def __call__(self, token: torch.Tensor, cache: KVCache) -> torch.Tensor:
        config, token = self.model.config, int(token)
        if not 0 <= token < config.vocab_size or cache.length >= min(cache.capacity, config.block_size):
            raise ValueError(
                f"token {token} at position {cache.length} does not fit a vocabulary of {config.vocab_size}, a cache of "
                f"{cache.capacity} and a context of {config.block_size}"
            )
        shape = (1, config.n_head, cache.capacity, config.n_embd // config.n_head)
        layers = [cache.layers.get(i) for i in range(config.n_layer)]
        if not all(kept and all(map(_is_plain, kept)) and kept[0].shape == kept[1].shape == shape for kept in layers):
            raise ValueError(
                f"the cache does not hold float32 keys and values of shape {shape} for {config.n_layer} layers on the CPU: "
                "let the model itself read the first tokens, a batch of one"
            )
        logits = torch.empty(1, self.gpt.lm_head.weight.rows)
        with self.lock:
            self.gpt.capacity = cache.capacity
            for layer, kept in zip(self.layers, layers):
                layer.keys, layer.values = (t.data_ptr() for t in kept)
            self.step(self.gpt, token, cache.length, logits.data_ptr(), torch.get_num_threads())
        cache.length += 1
        return logits


def _is_plain(tensor):
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()


def _norm(norm):
    return _Norm(norm.weight.data_ptr(), None if norm.bias is None else norm.bias.data_ptr())


def _linear(layer):
    return _Linear(layer.packed._weight(), None if layer.bias is None else layer.bias.data_ptr())
