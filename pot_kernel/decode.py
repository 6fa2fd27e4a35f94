"""
A GPT in one call: tokens in, logits of the last one out, by decode.cpp. For packed weights on a CPU.
"""

import ctypes
import threading
import weakref
from dataclasses import dataclass

import torch

from . import Weight, load


@dataclass(frozen=True)
class DecoderShape:
    """Sizes and kind of a GPT."""

    n_layer: int
    n_head: int
    n_kv_head: int
    head_size: int
    n_embd: int
    n_inner: int
    block_size: int  # context in tokens
    vocab_size: int
    rms: bool  # RMSNorm, not LayerNorm
    gated: bool  # SwiGLU, not GELU
    norm_eps: float


class _Norm(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p)]


class _Linear(ctypes.Structure):
    _fields_ = [("weight", Weight), ("bias", ctypes.c_void_p)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Norm) for name in ("ln_1", "ln_2")),
        *((name, _Linear) for name in ("c_attn", "attn_c_proj", "c_fc", "mlp_c_proj")),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
    ]


class _Gpt(ctypes.Structure):
    """struct Gpt of decode.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n_layer", "n_head", "n_kv_head", "head_size", "n_embd", "n_inner")),
        ("capacity", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("rms", "gated")),
        ("norm_eps", ctypes.c_float),
        ("frequencies", ctypes.c_void_p),
        *((name, Weight) for name in ("wte", "wpe")),
        ("ln_f", _Norm),
        ("lm_head", _Linear),
        ("layers", ctypes.POINTER(_Layer)),
    ]


class Decoder:
    """decoder(tokens, cache) -> logits (1, vocab_size) float32 of the token after `tokens` (1, T), for a batch of one.

    The result is that of the model layer by layer with a float16 cache, up to the order of summation. The tokens
    continue the cache, which grows by them. Threads may share a decoder; they take turns.

    weights: a packed weight for each matrix, by GPT-2's names ("transformer.h.0.attn.c_attn").
    tensors: norms and biases, float32 and contiguous on the CPU, by name ("transformer.h.0.ln_1.weight"). A bias may be
    missing. frequencies: (head_size / 2) float32, the rotary angles in radians a position; None for learned positions,
    whose table is weights["transformer.wpe"]. The decoder keeps pointers into both: make a new one after moving, casting
    or assigning weights.
    """

    def __init__(
        self, shape: DecoderShape, weights: dict[str, Weight], tensors: dict[str, torch.Tensor],
        frequencies: torch.Tensor | None = None,
    ):  # fmt: skip
        self.shape, self.lock = shape, threading.Lock()
        self.cache = lambda: None  # a weak reference to the cache of the last call
        self.kept = weights, tensors, frequencies
        self.step = load().gpt_decode
        self.step.argtypes = [
            ctypes.POINTER(_Gpt), ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
        ]  # fmt: skip
        self.step.restype = None

        def pointer(name):
            return tensors[name].data_ptr() if name in tensors else None

        def norm(name):
            return _Norm(pointer(f"{name}.weight"), pointer(f"{name}.bias"))

        def linear(name):
            return _Linear(weights[name], pointer(f"{name}.bias"))

        self.layers = (_Layer * shape.n_layer)()
        for i in range(shape.n_layer):
            block = f"transformer.h.{i}"
            norms = norm(f"{block}.ln_1"), norm(f"{block}.ln_2")
            parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
            self.layers[i] = _Layer(*norms, *(linear(f"{block}.{part}") for part in parts))
        self.gpt = _Gpt(
            shape.n_layer, shape.n_head, shape.n_kv_head, shape.head_size, shape.n_embd, shape.n_inner, 0, shape.rms,
            shape.gated, shape.norm_eps, None if frequencies is None else frequencies.data_ptr(),
            weights["transformer.wte"], weights["transformer.wte" if frequencies is not None else "transformer.wpe"],
            norm("transformer.ln_f"), linear("lm_head"), self.layers,
        )  # fmt: skip

    def __call__(self, tokens: torch.Tensor, cache) -> torch.Tensor:
        """cache: model.KVCache, empty or of float16. Raises ValueError for tokens or a cache that do not fit."""
        shape = self.shape
        if tokens.dim() != 2 or len(tokens) != 1 or not tokens.numel():
            raise ValueError(f"tokens of shape {tuple(tokens.shape)}: the decoder takes a batch of one, (1, T)")
        tokens = tokens.long().contiguous()
        low, high = (int(t) for t in tokens.aminmax())
        if not 0 <= low <= high < shape.vocab_size:
            raise ValueError(f"token {low if low < 0 else high} is not in the vocabulary of {shape.vocab_size}")
        logits, n = torch.empty(1, self.gpt.lm_head.weight.rows), tokens.shape[1]
        with self.lock:
            if cache.length + n > min(cache.capacity, shape.block_size):
                raise ValueError(
                    f"{n} tokens from position {cache.length} on do not fit a cache of {cache.capacity} and a context of "
                    f"{shape.block_size}"
                )
            if self.cache() is not cache:
                self._point_to(cache)
            self.step(self.gpt, tokens.data_ptr(), n, cache.length, logits.data_ptr(), torch.get_num_threads())
            cache.length += n
        return logits

    def _point_to(self, cache):
        """Checks the tensors of a cache, which stay the same as long as it lives, and keeps pointers to them."""
        shape, self.cache = self.shape, lambda: None
        size = (1, shape.n_kv_head, cache.capacity, shape.head_size)
        if not cache.layers:
            cache.layers = {i: [torch.empty(size, dtype=torch.float16) for _ in range(2)] for i in range(shape.n_layer)}
        layers = [cache.layers.get(i) for i in range(shape.n_layer)]
        if not all(kv and all(map(_is_plain, kv)) and kv[0].shape == kv[1].shape == size for kv in layers):
            raise ValueError(
                f"the cache does not hold float16 keys and values of shape {size} for {shape.n_layer} layers on the "
                "CPU: begin with an empty cache, or with KVCache(..., torch.float16) and a batch of one"
            )
        self.gpt.capacity = cache.capacity
        for layer, kv in zip(self.layers, layers):
            layer.keys, layer.values = (t.data_ptr() for t in kv)
        self.cache = weakref.ref(cache)


def _is_plain(tensor):
    return tensor.dtype == torch.float16 and tensor.device.type == "cpu" and tensor.is_contiguous()
