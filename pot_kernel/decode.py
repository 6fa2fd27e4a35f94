"""
A GPT in one call: tokens in, logits of the last one out, by decode.cpp. For packed weights on a CPU.
"""

import ctypes
import os
import threading
import weakref
from dataclasses import dataclass

import torch

from . import Weight, address, load


@dataclass(frozen=True)
class DecoderShape:
    """Sizes and kind of a GPT. Raises ValueError for a size below 1, and for queries that share no whole head of keys."""

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

    def __post_init__(self):
        sizes = self.n_layer, self.n_head, self.n_kv_head, self.head_size, self.n_embd, self.n_inner
        if not all(type(n) is int and n >= 1 for n in (*sizes, self.block_size, self.vocab_size)):
            raise ValueError(f"{self}: each size must be an integer of at least 1")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"{self} does not divide into heads")


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
    or assigning weights. Raises ValueError for a weight or tensor that does not fit shape.
    """

    def __init__(
        self, shape: DecoderShape, weights: dict[str, Weight], tensors: dict[str, torch.Tensor],
        frequencies: torch.Tensor | None = None,
    ):  # fmt: skip
        self.shape, self.lock = shape, threading.Lock()
        self.cache = lambda: None  # a weak reference to the cache of the last call
        self.pointers = None  # its capacity and its pointers
        tensors = {name: t.detach() for name, t in tensors.items()}  # survive `.data = ` of the caller's tensors
        self.kept = weights, tensors, frequencies
        self.step = load().gpt_decode
        self.step.argtypes = [
            ctypes.POINTER(_Gpt), ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
        ]  # fmt: skip
        self.step.restype = None

        if frequencies is not None and shape.head_size % 2:
            raise ValueError(f"{shape} has heads of an odd size, and rotary positions turn pairs")
        width, inner = shape.n_head * shape.head_size, shape.n_inner * (2 if shape.gated else 1)

        def pointer(name, size):
            return address(name, tensors[name], (size,), torch.float32) if name in tensors else None

        def norm(name):
            if f"{name}.weight" not in tensors:
                raise ValueError(f"{name}.weight is missing")
            return _Norm(*(pointer(f"{name}.{part}", shape.n_embd) for part in ("weight", "bias")))

        def table(name, rows, columns=shape.n_embd):
            if (weight := weights.get(name)) is None:
                raise ValueError(f"the weight {name} is missing")
            if (weight.rows, weight.columns) != (rows, columns):
                raise ValueError(f"{name} is ({weight.rows}, {weight.columns}), expected ({rows}, {columns})")
            if weight.activations == 1 and not weight.row_sums:
                raise ValueError(f"{name}: 8-bit activations per row need its row_sums")
            return weight

        def linear(name, rows, columns=shape.n_embd):
            return _Linear(table(name, rows, columns), pointer(f"{name}.bias", rows))

        layers = [  # before the array, because a wrong number of layers must take no memory
            _Layer(
                norm(f"{block}.ln_1"), norm(f"{block}.ln_2"),
                linear(f"{block}.attn.c_attn", width + 2 * shape.n_kv_head * shape.head_size),
                linear(f"{block}.attn.c_proj", shape.n_embd, width),
                linear(f"{block}.mlp.c_fc", inner), linear(f"{block}.mlp.c_proj", shape.n_embd, shape.n_inner),
            )
            for block in (f"transformer.h.{i}" for i in range(shape.n_layer))
        ]  # fmt: skip
        self.layers = (_Layer * shape.n_layer)(*layers)
        wte, learned = table("transformer.wte", shape.vocab_size), frequencies is None
        self.gpt = _Gpt(
            shape.n_layer, shape.n_head, shape.n_kv_head, shape.head_size, shape.n_embd, shape.n_inner, 0, shape.rms,
            shape.gated, shape.norm_eps,
            None if learned else address("frequencies", frequencies, (shape.head_size // 2,), torch.float32),
            wte, table("transformer.wpe", shape.block_size) if learned else wte, norm("transformer.ln_f"),
            linear("lm_head", shape.vocab_size), self.layers,
        )  # fmt: skip
        _decoders.add(self)

    def __call__(self, tokens: torch.Tensor, cache) -> torch.Tensor:
        """cache: model.KVCache, empty or of float16. Raises ValueError for tokens or a cache that do not fit."""
        shape = self.shape
        if tokens.dim() != 2 or len(tokens) != 1 or not tokens.numel():
            raise ValueError(f"tokens of shape {tuple(tokens.shape)}: the decoder takes a batch of one, (1, T)")
        tokens = tokens.long().contiguous()
        pointer, n = address("tokens", tokens, tokens.shape, torch.int64), tokens.shape[1]
        low, high = (int(t) for t in tokens.aminmax())
        if not 0 <= low <= high < shape.vocab_size:
            raise ValueError(f"token {low if low < 0 else high} is not in the vocabulary of {shape.vocab_size}")
        logits = torch.empty(1, shape.vocab_size, dtype=torch.float32, device="cpu")
        with self.lock:
            position = cache.length  # read once: another decoder may advance it
            if not 0 <= position <= min(cache.capacity, shape.block_size) - n:
                raise ValueError(
                    f"{n} tokens from position {position} on do not fit a cache of {cache.capacity} and a context of "
                    f"{shape.block_size}"
                )
            tensors = self._point_to(cache)
            self.step(self.gpt, pointer, n, position, logits.data_ptr(), torch.get_num_threads())
            cache.length = position + n
            del tensors  # alive until here, even if another thread emptied the cache
        return logits

    def _point_to(self, cache):
        """Points to the keys and values of a cache, and returns them. Checks those that the last call did not have."""
        n, size = self.shape.n_layer, (1, self.shape.n_kv_head, cache.capacity, self.shape.head_size)
        if not cache.layers:
            empty = [torch.empty(size, dtype=torch.float16, device="cpu") for _ in range(2 * n)]
            cache.layers = {i: empty[2 * i : 2 * i + 2] for i in range(n)}
        tensors = [t for i in range(n) for t in cache.layers.get(i, ())]
        pointers = [cache.capacity, *(t.data_ptr() for t in tensors)]
        if self.cache() is cache and self.pointers == pointers:
            return tensors
        self.cache = lambda: None
        try:
            for t in tensors:
                address("the cache", t, size, torch.float16)
            if len(tensors) != 2 * n:
                raise ValueError(f"the cache has {len(tensors)} keys and values for {n} layers")
        except ValueError as e:
            raise ValueError(
                f"{e}: begin with an empty cache, or with KVCache(..., torch.float16) and a batch of one"
            ) from None
        self.gpt.capacity, *starts = pointers
        for i, layer in enumerate(self.layers):
            layer.keys, layer.values = starts[2 * i : 2 * i + 2]
        self.cache, self.pointers = weakref.ref(cache), pointers
        return tensors


# A lock that another thread holds while the process forks would stay locked in the child.
_decoders = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [setattr(d, "lock", threading.Lock()) for d in _decoders])
