"""
Power-of-two weights for PyTorch, in one file that needs torch alone: copy it into your project.

A weight is stored as sign x level x scale. With single powers the levels are 0, 1, 2, 4, 8, ... so that multiplying by
a weight is a shift, and at 4 bits one byte holds two weights. The way of a weight:

    float model --prepare--> fake-quantized model --(calibrate | train)--> --convert--> packed model

    names = prepare(model, PoTConfig(bits=4))   # nn.Linear -> PoTLinear, nn.Embedding -> PoTEmbedding, in place
    calibrate(model, batches)                   # optional: error-compensated rounding (GPTQ), from a little text
    ...                                         # fine-tune as usual, or not at all: that is PTQ
    convert(model)                              # -> PackedPoTLinear, PackedPoTEmbedding: codes of `bits` bits
    tensors, metadata = packed_state(model)     # what a file has to hold; load_packed reads it back

With the folder kernels/ beside this file and a C++ compiler, a processor multiplies by packed 4-bit weights as they are;
without, PyTorch unpacks them.

Sections: grid, scale, fake quantization, layers, kernel, packing, prepare and convert, calibrate, state.
"""

import copy
import ctypes
import functools
import graphlib
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

# -----------------------------------------------------------------------------
# Grid: which values a weight may take


@dataclass(frozen=True)
class PoTConfig:
    """How the weights of a layer are quantized.

    Raises ValueError for a combination that does not exist, and says which ones do.
    """

    bits: int = 4  # bits of a code, the sign's bit included
    grid: str = "pot"  # "pot": powers of two; "uniform": to compare with; "paper": the quantizer of arXiv 2601.02298
    terms: int = 1  # 1: single powers; 2: a power, or a power and the half of it: two shifts and an add
    range: int | None = None  # R: single powers narrowed to R of them, the papers' [-2^R, 2^R]; None: all that fit
    granularity: str = "group"  # what shares a scale: "tensor", "channel" (output row) or "group" (of input features)
    group_size: int = 64  # consecutive input features that share a scale, for granularity "group"
    scale: str = "mse"  # "mse": least squared error, by search; "absmax": the largest weight is the top level
    scale_format: str = "float16"  # "e8m0": the smallest level is a power of two, so that a whole weight is a shift
    act_bits: int | None = None  # 8: layer inputs are quantized too, uniform affine, per token; None: not at all
    eps: float = 2.0**-5  # grid "paper" only: lower bound of the smallest level

    def __post_init__(self):
        _choose("grid", self.grid, ("pot", "uniform", "paper"))
        _choose("granularity", self.granularity, ("tensor", "channel", "group"))
        _choose("scale", self.scale, ("mse", "absmax"))
        _choose("scale_format", self.scale_format, ("float16",) if self.grid == "paper" else ("float16", "e8m0"))
        _choose("act_bits", self.act_bits, (None, 8))
        _choose("terms", self.terms, (1, 2) if self.grid == "pot" else (1,), f" with grid={self.grid!r}")
        lowest, highest = {"pot": (2, 6), "uniform": (2, 8), "paper": (3, 6)}[self.grid]
        if self.terms == 2:
            lowest = 4
        _choose("bits", self.bits, tuple(range(lowest, highest + 1)), f" with grid={self.grid!r}, terms={self.terms}")
        for key in ("range", "group_size"):
            if type(getattr(self, key)) is not int and (key, self.range) != ("range", None):
                raise ValueError(f"{key}={getattr(self, key)!r} must be an integer")
        if self.range is not None:
            if self.grid == "uniform" or self.terms == 2:
                raise ValueError(
                    f"range={self.range} narrows single powers only: use grid='pot' with terms=1, or leave range out"
                )
            if not 1 <= self.range <= self._full_range():
                needed = f"; levels of range {self.range} need more bits" if self.range > self._full_range() else ""
                raise ValueError(
                    f"range={self.range} does not fit: {self.bits} bits with grid={self.grid!r} hold ranges 1 to {self._full_range()}{needed}"
                )
        if self.granularity == "group" and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} must be at least 1; 64 and 128 are usual")
        if self.grid == "paper" and (self.granularity, self.scale) != ("tensor", "absmax"):
            raise ValueError("grid='paper' is per tensor and by absmax: use granularity='tensor', scale='absmax'")
        if not self.eps > 0:
            raise ValueError(
                f"eps={self.eps} must be positive; the papers use 2**-5 for GPT-2 and 2**-12 for characters"
            )

    def _full_range(self) -> int:
        # The papers' code makes 2R + 3 levels (0 and +-2^0 ... +-2^R), ours 2R + 1.
        return (2**self.bits - 3) // 2 if self.grid == "paper" else 2 ** (self.bits - 1) - 1

    def levels(self) -> list[int]:
        """Non-negative levels in units of the smallest non-zero one, ascending; the last is the top level."""
        n = self._full_range() if self.range is None else self.range
        if self.grid == "uniform":
            return list(range(2 ** (self.bits - 1)))
        if self.grid == "paper":
            return [0] + [2**e for e in range(n + 1)]
        if self.terms == 1:
            return [0] + [2**e for e in range(n)]
        return ([0, 1] + [m * 2**e for e in range(n) for m in (2, 3)])[: n + 1]

    @property
    def top(self) -> float:
        return float(self.levels()[-1])

    @property
    def edge(self) -> float:
        """Outer edge of the top level's cell, relative to the top level: 1.25 for single powers."""
        *_, below, top = self.levels()
        return 1 + (1 - below / top) / 2

    def table(self) -> torch.Tensor:
        """(2**bits,) float32: the level of every code `sign << (bits - 1) | index`, in units of the smallest one.

        Indices beyond the last level (a narrowed range leaves some) read as the top level, so every code is finite.
        """
        levels = self.levels()
        half = [float(levels[min(i, len(levels) - 1)]) for i in range(2 ** (self.bits - 1))]
        return torch.tensor(half + [-v + 0.0 for v in half], dtype=torch.float32)

    def __str__(self):
        kind = {"pot": "PoT" if self.terms == 1 else "two-term PoT", "uniform": "uniform", "paper": "paper PoT"}[
            self.grid
        ]
        share = f"groups of {self.group_size}" if self.granularity == "group" else f"per {self.granularity}"
        narrow = "" if self.range is None else f", range 2^{self.range}"
        by = ", absmax" if self.scale == "absmax" and self.grid != "paper" else ""
        by += ", E8M0 scales" if self.scale_format == "e8m0" else ""
        by += f", eps {self.eps:g}" if self.grid == "paper" and self.eps != PoTConfig.eps else ""
        acts = "" if self.act_bits is None else f", {self.act_bits}-bit activations"
        return f"{kind} {self.bits} bits, {share}{by}{narrow}{acts}"


def _choose(key, value, possible, where=""):
    if (type(value), value) not in [(type(p), p) for p in possible]:
        raise ValueError(f"{key}={value!r} is not possible{where}: choose one of {', '.join(map(repr, possible))}")


def _round_(x, config):
    """Rounds x (float32, in units of the smallest level) to the nearest level; overwrites x. NaN stays NaN.

    The spacing of a floating-point grid follows from the exponent bits of x: [2^e, 2^(e+1)) is cut into `terms` steps.
    Comparing with every boundary (bucketize) gives the same levels and takes ten times as long.
    """
    if config.grid == "paper":  # 2506.00315: integers first, then the nearest power in the log domain
        a = x.abs().round_()
        power = torch.exp2(a.log2().round_()).clamp_(max=config.top)
        return torch.where(a == 0, a, power.copysign_(x))
    x.clamp_(-config.top, config.top)
    # Adding 1.5 * 2^23 steps leaves no bits below one step, so the sum is rounded (half to even); taking them off again
    # gives a whole number of steps, and +0 where x was just below zero.
    if config.grid == "uniform":
        return x.add_(_MAGIC).sub_(_MAGIC)
    step = (x.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2^floor(log2 |x|), `terms` steps long
    step.clamp_(min=config.terms)  # below, the levels are 0, 1, 2 whatever the exponent
    return x.add_(step, alpha=_MAGIC / config.terms).sub_(step, alpha=_MAGIC / config.terms)


_MAGIC = 1.5 * 2**23


# -----------------------------------------------------------------------------
# Scale: the value of the top level, one per tensor, channel or group
#
# A weight is a matrix (out, in), its scale (1, 1), (out, 1) or (out, in / group_size). Arithmetic is float32 throughout
# and a weight's value is level * unit, unit = scale / top: fake quantization and unpacking do the very same operations,
# so they agree to the bit.


def _unit(scale, config):
    """scale (out or 1, groups) -> value of the smallest level (out or 1, groups, 1), float32."""
    return (scale.float() / config.top).unsqueeze(-1)


def _blocks(unit, *matrices):
    """Cuts matrices (out, in) and their unit into row blocks that stay in the cache, where ten passes over one cost
    little more than one pass. Yields (unit (rows or 1, groups, 1), (rows, groups, size) of each matrix), as views."""
    matrices = [m.unflatten(-1, (unit.shape[1], -1)) for m in matrices]
    first = matrices[0]
    if first.device.type != "cpu" or torch.compiler.is_compiling() or first.numel() <= _BLOCK:
        return [(unit, *matrices)]
    rows = max(1, _BLOCK // first[0].numel())
    units = [unit] * -(-len(first) // rows) if len(unit) == 1 else unit.split(rows)
    return zip(units, *(m.split(rows) for m in matrices))


_BLOCK = 2**18  # weights: 1 MiB of float32


def compute_scale(w: torch.Tensor, config: PoTConfig, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Scale of w (out, in): (1, 1), (out, 1) or (out, in / group_size).

    importance, broadcastable to w and positive, weighs the squared errors that scale="mse" minimizes.
    float16; float32 for the whole tensor if one scale lies outside float16's normal range, and for grid "paper". With
    scale_format "e8m0" it is the top level times a power of two.
    An all-zero group gets the tensor's largest scale, so that training can still move it.
    """
    w = w.detach()
    groups = w.shape[-1] // config.group_size if config.granularity == "group" else 1
    if w.is_meta:
        return w.new_empty(1 if config.granularity == "tensor" else len(w), groups, dtype=torch.float16)
    if config.granularity == "tensor":
        absmax = w.abs().amax().float().view(1, 1)
    else:
        absmax = w.abs().unflatten(-1, (groups, -1)).amax(-1).float()
    if config.grid == "paper":
        return absmax.clamp(min=config.eps * config.top)
    if config.scale_format == "e8m0":  # the next power of two from here on
        mantissa, exponent = torch.frexp(absmax / config.top)
        absmax = torch.ldexp(torch.full_like(absmax, config.top), exponent - (mantissa == 0.5).int()) * (absmax > 0)
    scale = absmax if config.scale == "absmax" else _search_scale(w, absmax, config, importance)
    fallback = scale.max() if absmax.any() else torch.ones_like(scale.max())
    scale = torch.where(absmax > 0, scale, fallback)
    # The unit must not underflow, nor the top level overflow the weight's dtype.
    single = torch.finfo(torch.float32)
    scale = scale.clamp(config.top * single.tiny, min(torch.finfo(w.dtype).max, single.max))
    half = torch.finfo(torch.float16)
    return scale.half() if scale.min() >= half.tiny and scale.max() <= half.max else scale


def _search_scale(w, absmax, config, importance):
    """Least squared error: a coarse search below absmax, then three rounds of alternating least squares."""
    weighing = () if importance is None else (importance.float().expand(w.shape),)

    def moments(scale):  # (3, *scale.shape): squared error, <w, level>, <level, level>
        parts = []
        for unit, b, *h in _blocks(_unit(scale, config), w, *weighing):
            b = b.float()
            level = _round_(b / unit, config)
            error = (b - level * unit).square_()
            weighed = level
            if h:
                error.mul_(h[0])
                weighed = level * h[0]
            parts.append(torch.stack([error.sum(-1), (b * weighed).sum(-1), (level * weighed).sum(-1)]))
        parts = torch.cat(parts, dim=1)
        return parts.sum((1, 2)).view(3, 1, 1) if config.granularity == "tensor" else parts

    # The more weights share a scale, the further below the largest it may lie; the fewer, the bumpier their error is.
    steps, octave = (15, 8) if config.granularity == "group" else (25, 4)
    whole = config.scale_format == "e8m0"  # powers of two alone
    if whole:
        steps, octave = 10, 1
    best, best_moments = absmax, torch.full((3, *absmax.shape), torch.inf, device=w.device)
    for step in range(steps if whole else steps + 3):
        if step < steps:
            scale = absmax * 2 ** ((2 - step) / octave)
        else:  # the best scale for the best levels so far
            scale = best_moments[1] / best_moments[2] * config.top
        scale = torch.where(scale > 0, scale, 1.0)  # an all-zero group: anything but a division by zero
        found = moments(scale)
        better = found[0] < best_moments[0]
        best, best_moments = torch.where(better, scale, best), torch.where(better, found, best_moments)
    return best


def sqnr(w: torch.Tensor, quantized: torch.Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB; inf where nothing was lost."""
    noise = (w.double() - quantized.double()).square().sum()
    return (10 * torch.log10(w.double().square().sum() / noise)).item() if noise > 0 else float("inf")


# -----------------------------------------------------------------------------
# Fake quantization


class _FakeQuantize(torch.autograd.Function):
    # w + (q - w).detach() would be shorter and wrong by an ulp now and then.

    @staticmethod
    def forward(ctx, w, scale, config):
        ctx.save_for_backward(w, scale)
        ctx.config = config
        unit = _unit(scale, config)
        if torch.compiler.is_compiling():  # torch.export has no gradient for out=
            w = w.unflatten(1, (unit.shape[1], -1))
            return (_round_(w.float() / unit, config) * unit).flatten(1).to(w.dtype).contiguous()
        # Contiguous also where w is a transposed view, so that products are summed in the order of the packed layer's.
        out = torch.empty_like(w, memory_format=torch.contiguous_format)
        for u, b, o in _blocks(unit, w, out):
            torch.mul(_round_(b.float() / u, config), u, out=o)
        return out

    @staticmethod
    def backward(ctx, grad):
        w, scale = ctx.saved_tensors
        if ctx.config.grid == "paper":  # the papers' gradient passes everywhere
            return grad, None, None
        out = torch.empty_like(w)
        # hardtanh's own gradient kernel, as comparing and masking take ten times as long. It wants |x| below its bound,
        # and the edge itself still belongs to the cell.
        edge = ctx.config.edge * ctx.config.top * (1 + 2**-23)
        for per_unit, b, g, o in _blocks(1 / _unit(scale, ctx.config), w, grad, out):
            torch.ops.aten.hardtanh_backward.grad_input(g.float(), b.float() * per_unit, -edge, edge, grad_input=o)
        return out, None, None


def fake_quantize(w: torch.Tensor, scale: torch.Tensor, config: PoTConfig) -> torch.Tensor:
    """w (out, in) rounded to the nearest level x scale, in w's dtype; scale as compute_scale gives it.

    Straight-through estimator: the gradient to w is the identity up to the outer edge of the top level's cell (1.25 x
    scale for single powers) and zero beyond. Grid "paper" has no such mask.
    """
    return _FakeQuantize.apply(w, scale, config)


def fake_quantize_activations(x: torch.Tensor) -> torch.Tensor:
    """x (..., features) through uniform affine 8 bits and back, one scale and zero point per token, from its own range.

    The range is widened to contain 0, so that 0 stays 0: q = round(x / scale) + zero_point in 0 ... 255, half to even.
    The gradient is the identity.
    """
    return _FakeQuantizeActivations.apply(x)


class _FakeQuantizeActivations(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        f = x.float()
        low, high = f.amin(-1, keepdim=True).clamp(max=0), f.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny)
        zero_point = (-low / scale).round()
        q = ((f / scale).round() + zero_point).clamp(0, 255)
        return ((q - zero_point) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad


# -----------------------------------------------------------------------------
# Layers for training: float weights, fake-quantized in every forward


class _Scaled(nn.Module):
    """Keeps the dtype of its scale in .half() and .bfloat16(), and takes that of a state_dict's: casting a scale would
    change every weight."""

    def _apply(self, fn, recurse=True):
        before = {n: b for n, b in self._buffers.items() if b is not None and b.is_floating_point() and n != "_like"}
        super()._apply(fn, recurse)
        for name, b in before.items():
            if self._buffers[name].dtype != b.dtype:
                self._buffers[name] = b.to(self._buffers[name].device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if prefix + "scale" in state_dict:
            dtype = state_dict[prefix + "scale"].dtype
            self.scale = self.scale.to(dtype if dtype == torch.float16 else torch.float32)
        super()._load_from_state_dict(state_dict, prefix, *args)


class PoTQuantizer(_Scaled):
    """Config and scale of one weight. Layers that share a weight share this object."""

    def __init__(self, weight: torch.Tensor, config: PoTConfig):
        super().__init__()
        self.config = config
        self.enabled = True  # False: the layer computes with its float weight and inputs; convert packs it all the same
        self.register_buffer("scale", compute_scale(weight, config))
        if config.grid == "paper":
            self.register_buffer("minmax", torch.stack(weight.detach().float().aminmax()))

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        """Fake-quantized w (out, in)."""
        if not self.enabled:
            return w
        if self.config.grid == "paper" and self.training:
            self._observe(w.detach())
        return fake_quantize(w, self.scale, self.config)

    def rows(self, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Fake-quantized rows (*index.shape, in) of a weight, where they are rows `index` of it."""
        if not self.enabled:
            return rows
        scale = self.scale if len(self.scale) == 1 else self.scale[index.flatten()]
        return fake_quantize(rows.reshape(-1, rows.shape[-1]), scale, self.config).view(rows.shape)

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        return fake_quantize_activations(x) if self.enabled and self.config.act_bits else x

    def _observe(self, w):
        # torch's moving-average observer with its default constant, which the papers keep running while they train.
        # New tensors, as the old ones may be saved for a backward still to come.
        self.minmax = self.minmax.lerp(torch.stack(w.float().aminmax()), 0.01)
        self.scale = self.minmax.abs().amax().clamp(min=self.config.eps * self.config.top).view(1, 1)

    def extra_repr(self):
        return str(self.config)


class PoTLinear(nn.Linear):
    """nn.Linear whose forward quantizes the weight to signed exponents (or to another grid of PoTConfig).

    weight (out, in) and bias (out) are nn.Linear's. The scale is computed from the weight once: here, from the random
    one, or in `prepare`, which makes this of an nn.Linear that exists. So load weights first, then prepare.
    """

    def __init__(
        self, in_features: int, out_features: int, bias=True, device=None, dtype=None, config: PoTConfig = PoTConfig()
    ):  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        _check("PoTLinear", self.weight, config)
        self.quantizer = PoTQuantizer(self.weight, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.quantizer.inputs(x), self.quantizer(self.weight), self.bias)


class PoTConv1D(nn.Module):
    """What `prepare` makes of transformers' Conv1D, a linear layer that keeps its weight as (in, out)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.quantizer.inputs(x), self.quantizer(self.weight.t()), self.bias)


class PoTEmbedding(nn.Embedding):
    """nn.Embedding with a quantized table (num, dim). A forward quantizes the rows that it reads, not the table."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, device=None, dtype=None,
        config: PoTConfig = PoTConfig(),
    ):  # fmt: skip
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        _check("PoTEmbedding", self.weight, config)
        self.quantizer = PoTQuantizer(self.weight, config)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.quantizer.rows(super().forward(index), index)


# -----------------------------------------------------------------------------
# Kernel: kernels/pot.cpp, built at its first use for this machine and kept in the user's cache


class _PotWeight(ctypes.Structure):
    """struct PotWeight of pot.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "row_sums")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "groups")),
        *((name, ctypes.c_int32) for name in ("scale_per_row", "scale_is_half")),
        ("top", ctypes.c_float),
        ("table", ctypes.c_float * 16),
    ]


@functools.cache
def _kernel():
    """The library of kernels/pot.cpp, or of decode.cpp, which includes it, if that lies there: one team of threads does
    for both. Or None: then PyTorch unpacks weights, and one warning has said why.

    NANOPOT_KERNEL=off does without it; the name of an instruction set (amx, avx512, avx2, neon, portable) forces it.
    """
    wanted = os.environ.get("NANOPOT_KERNEL", "")
    if wanted == "off":
        return None
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "kernels")
    source = os.path.join(folder, "decode.cpp")
    source = source if os.path.exists(source) else os.path.join(folder, "pot.cpp")
    try:
        path = _build(source)
        try:
            library = ctypes.CDLL(path)
        except OSError:  # damaged: a full disk, say
            os.remove(path)
            library = ctypes.CDLL(_build(source))
    except (OSError, subprocess.CalledProcessError) as e:
        lines = (getattr(e, "stderr", None) or str(e)).strip().splitlines()
        why = next((line for line in lines if "error" in line), lines[0] if lines else e)
        warnings.warn(
            f"packed weights are unpacked by PyTorch, which is slow, as {source} cannot be built ({why}): put the folder "
            "kernels/ beside pot.py, install g++ or clang++, and let XDG_CACHE_HOME name a folder that can be written, or "
            "silence this by NANOPOT_KERNEL=off",
            stacklevel=2,
        )
        return None
    weight, pointer, i64 = ctypes.POINTER(_PotWeight), ctypes.c_void_p, ctypes.c_int64
    linear = [weight, pointer, pointer, i64, i64, pointer, i64, ctypes.c_int]
    library.pot_linear.argtypes = library.pot_linear_tiles.argtypes = linear
    library.pot_unpack.argtypes = [weight, pointer, i64, i64, pointer, ctypes.c_int]
    library.pot_row_sums.argtypes = [weight, pointer]
    library.pot_linear.restype = library.pot_row_sums.restype = None
    library.pot_instruction_sets.restype = ctypes.c_char_p
    if wanted and library.pot_choose(wanted.encode()):
        here = library.pot_instruction_sets().decode().replace(" ", ", ")
        raise ValueError(f"NANOPOT_KERNEL={wanted}: this machine has {here}; or off")
    return library


def _build(source):
    """Path of the shared library, built anew if source, compiler, flags or processor are others."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    if compiler is None:
        raise OSError("there is no C++ compiler")
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    flags = ["-O3", native, "-std=c++17", "-shared", "-fPIC", "-pthread", "-ldl"]
    key = hashlib.sha256()
    for path in dict.fromkeys([source, os.path.join(os.path.dirname(source), "pot.cpp")]):
        with open(path, "rb") as f:
            key.update(f.read())
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    key.update(repr((compiler, version, flags, _processor())).encode())
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = os.path.splitext(os.path.basename(source))[0]
    path = os.path.join(home, "nanopot", f"{name}-{key.hexdigest()[:16]}.so")
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handle, built = tempfile.mkstemp(suffix=".so", dir=os.path.dirname(path))
        os.close(handle)
        try:  # renamed when done: several processes may start at once
            subprocess.run([compiler, *flags, "-o", built, source], capture_output=True, text=True, check=True)
            os.replace(built, path)
        finally:
            if os.path.exists(built):
                os.remove(built)
    return path


def _processor():
    # A home folder may be shared by machines of several kinds.
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            return sorted({line for line in f if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return platform.processor()


def _kernel_linear(weight, x, bias, bfloat16):
    """x (..., in) float32 times a _PotWeight, plus bias (out) float32 or None -> (..., out) float32. With row_sums x is
    rounded to 8 bits; with bfloat16 many rows of it may be rounded to that."""
    library, threads = _kernel(), torch.get_num_threads()
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
    y = rows.new_empty(len(rows), weight.rows)
    bias_at = None if bias is None else bias.data_ptr()
    args = (weight, bias_at, rows.data_ptr(), len(rows), rows.stride(0), y.data_ptr(), weight.rows, threads)
    if len(rows) > _TILE and (weight.row_sums or bfloat16) and library.pot_linear_tiles(*args) == 0:
        pass
    elif len(rows) <= _FEW_ROWS:
        library.pot_linear(*args)
    else:
        rows = fake_quantize_activations(rows) if weight.row_sums else rows
        for i in range(0, weight.rows, step := max(1, _SLICE // weight.columns)):
            w = rows.new_empty(min(step, weight.rows - i), weight.columns)
            library.pot_unpack(weight, None, i, len(w), w.data_ptr(), threads)
            y[:, i : i + step] = F.linear(rows, w, None if bias is None else bias[i : i + step])
    return y.view(*x.shape[:-1], weight.rows)


_TILE = 16  # rows of a tile: what is no more than one gains little
_FEW_ROWS = 64  # with more, unpacking a weight once and one large product is quicker
_SLICE = 2**22  # weights unpacked at a time: 16 MiB of float32, which all but the largest layers fit in


def _pot_weight(codes, scale, row_sums, columns, table, top):
    return _PotWeight(
        codes.data_ptr(), scale.data_ptr(), None if row_sums is None else row_sums.data_ptr(), len(codes), columns,
        scale.shape[1], len(scale) > 1, scale.dtype == torch.float16, top, (ctypes.c_float * 16)(*table.tolist()),
    )  # fmt: skip


@torch.library.custom_op("nanopot::linear", mutates_args=(), device_types="cpu")
def _linear_op(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    row_sums: torch.Tensor | None,
    table: torch.Tensor,
    top: float,
    bias: torch.Tensor | None,
    bfloat16: bool,
) -> torch.Tensor:
    """The kernel as one operator, for torch.compile and torch.export."""
    return _kernel_linear(_pot_weight(codes, scale, row_sums, x.shape[-1], table, top), x, bias, bfloat16)


@_linear_op.register_fake
def _(x, codes, scale, row_sums, table, top, bias, bfloat16):
    return x.new_empty(*x.shape[:-1], len(codes))


# -----------------------------------------------------------------------------
# Packing: codes `sign << (bits - 1) | index` as a little-endian bit stream per row, rows padded to whole bytes
#
# At 4 bits each run of 128 features is interleaved first: nibble j of 32-bit word i is feature 16 j + i, so that a
# vector of 16 words yields 16 neighbouring weights per shift. What is left of a row (in % 128) stays in order.


def _layout(bits):
    return "interleaved-8x16" if bits == 4 else "stream"


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes (rows, n) uint8 below 2**bits -> (rows, ceil(n * bits / 8)) uint8."""
    rows, n = codes.shape
    if bits == 4:
        codes = _interleave(codes, (8, 16))
    codes = F.pad(codes, (0, -n % 8)).view(rows, -(-n // 8), 8).long()  # 8 codes fill `bits` bytes
    words = (codes << (bits * torch.arange(8, device=codes.device))).sum(-1, keepdim=True)
    packed = words >> (8 * torch.arange(bits, device=codes.device)) & 255
    return packed.to(torch.uint8).flatten(1)[:, : -(-n * bits // 8)].contiguous()


def unpack_codes(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """(rows, ceil(n * bits / 8)) uint8 -> codes (rows, n) uint8."""
    packed = F.pad(packed, (0, -packed.shape[1] % bits)).view(len(packed), -(-n // 8), bits).long()
    words = (packed << (8 * torch.arange(bits, device=packed.device))).sum(-1, keepdim=True)
    codes = words >> (bits * torch.arange(8, device=packed.device)) & (2**bits - 1)
    codes = codes.to(torch.uint8).flatten(1)[:, :n]
    return _interleave(codes, (16, 8)) if bits == 4 else codes


def _interleave(codes, shape):
    whole = codes.shape[1] // 128 * 128
    blocks = codes[:, :whole].unflatten(1, (whole // 128, *shape)).transpose(-1, -2).flatten(1)
    return torch.cat([blocks, codes[:, whole:]], dim=1)


@functools.cache
def _levels_of_bytes(config):
    """(256, 8 / bits) float32: where a byte holds whole codes, one look-up decodes all of them."""
    table, bits = config.table().tolist(), config.bits
    return torch.tensor([[table[byte >> k & (2**bits - 1)] for k in range(0, 8, bits)] for byte in range(256)])


class PackedWeight(_Scaled):
    """Codes and scale of one weight: all that is left of it. Layers that shared the weight share this object."""

    def __init__(
        self, codes: torch.Tensor, scale: torch.Tensor, in_features: int, dtype: torch.dtype, config: PoTConfig
    ):
        super().__init__()
        self.in_features, self.config = in_features, config
        self.bfloat16 = False  # see allow_bfloat16
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", scale.contiguous())
        self.register_buffer("_like", codes.new_empty(0, dtype=dtype), persistent=False)  # .half() changes its dtype
        if 8 % config.bits == 0:
            self.register_buffer("_bytes", _levels_of_bytes(config).to(codes.device, copy=True), persistent=False)
        self._prepare_kernel()

    def _prepare_kernel(self):
        self._fast, sums = self.config.bits == 4 and _kernel() is not None, None
        if self._fast and self.config.act_bits:  # what integer sums of activations with a zero point take off
            sums = torch.zeros(len(self.codes), device=self.codes.device)
        self.register_buffer("_row_sums", None, persistent=False)
        if sums is not None and sums.device.type == "cpu":
            _kernel().pot_row_sums(self._weight(), sums.data_ptr())
        self._row_sums = sums

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._prepare_kernel()
        return self

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self._prepare_kernel()

    def __setstate__(self, state):
        super().__setstate__(state)
        self._prepare_kernel()  # that of this machine

    @classmethod
    @torch.no_grad()
    def pack(cls, w: torch.Tensor, scale: torch.Tensor, config: PoTConfig) -> "PackedWeight":
        """w (out, in) float, scale as compute_scale gives it."""
        levels = torch.tensor(config.levels(), dtype=torch.float32, device=w.device)
        packed = []
        for unit, b in _blocks(_unit(scale, config), w):
            level = _round_(b.float() / unit, config).flatten(1)
            index = torch.searchsorted(levels, level.abs().contiguous())
            codes = torch.where(level < 0, index + 2 ** (config.bits - 1), index)
            packed.append(pack_codes(codes.to(torch.uint8), config.bits))
        return cls(torch.cat(packed), scale, w.shape[1], w.dtype, config)

    def forward(self, index: torch.Tensor | None = None) -> torch.Tensor:
        """The weight (out, in) in its own dtype, or of its rows `index` (int tensor) alone (*index.shape, in)."""
        if index is not None and index.device != self.codes.device:
            raise RuntimeError(f"the index is on {index.device}, the table on {self.codes.device}: move one of them")
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if self._fast and self.codes.device.type == "cpu" and not traced:
            return self._unpack(index).to(self._like.dtype)
        codes, scale = self.codes, self.scale
        if index is not None:
            codes, scale = codes[index.flatten()], scale if len(scale) == 1 else scale[index.flatten()]
        out = self._like.new_empty(len(codes), self.in_features)
        start = 0
        for unit, o in _blocks(_unit(scale, self.config), out):
            torch.mul(self._levels(codes[start : start + len(o)]).reshape(o.shape), unit, out=o)
            start += len(o)
        return out if index is None else out.view(*index.shape, self.in_features)

    def _unpack(self, index):
        library, threads, rows = _kernel(), torch.get_num_threads(), len(self.codes)
        if index is None:
            out = torch.empty(rows, self.in_features)
            library.pot_unpack(self._weight(), None, 0, rows, out.data_ptr(), threads)
            return out
        if index.is_floating_point():
            raise TypeError(f"an index of {index.dtype}: rows are looked up by integers")
        at, out = index.long().contiguous(), torch.empty(*index.shape, self.in_features)
        if library.pot_unpack(self._weight(), at.data_ptr(), 0, at.numel(), out.data_ptr(), threads):
            raise IndexError(f"an index is out of range: there are {rows} rows")
        return out

    def _levels(self, codes):
        bits, n = self.config.bits, self.in_features
        if 8 % bits:
            return self.config.table().to(codes.device)[unpack_codes(codes, bits, n).int()]
        levels = F.embedding(codes.int(), self._bytes).flatten(1)[:, :n]
        return _interleave(levels, (16, 8)) if bits == 4 else levels

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """F.linear with this weight, and with inputs of 8 bits if the config says so. In float32 on a processor the
        kernel does it, which adds up in another order."""
        if (
            not self._fast or x.dtype != torch.float32 or x.device.type != "cpu" or self.codes.device.type != "cpu"
            or x.shape[-1] != self.in_features or torch.jit.is_tracing()
            or torch.is_grad_enabled() and (x.requires_grad or bias is not None and bias.requires_grad)
        ):  # fmt: skip
            return F.linear(fake_quantize_activations(x) if self.config.act_bits else x, self(), bias)
        bias = None if bias is None else bias.float().contiguous()
        if torch.compiler.is_compiling():
            config, table = self.config, self._bytes[:16, 0]
            tensors = self.codes, self.scale, self._row_sums, table
            return torch.ops.nanopot.linear(x, *tensors, config.top, bias, self.bfloat16)
        return _kernel_linear(self._weight(), x, bias, self.bfloat16)

    def _weight(self):
        # Made anew when the tensors are others: moved, loaded, copied.
        weight, sums = self._pointers, None if self._row_sums is None else self._row_sums.data_ptr()
        if (
            weight is None
            or (weight.codes, weight.scale, weight.row_sums) != (self.codes.data_ptr(), self.scale.data_ptr(), sums)
        ):  # fmt: skip
            self._pointers = weight = _pot_weight(
                self.codes, self.scale, self._row_sums, self.in_features, self.config.table(), self.config.top
            )
        return weight

    _pointers = None

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_pointers"}

    def extra_repr(self):
        return f"({len(self.codes)}, {self.in_features}), {self.config}"


class PackedPoTLinear(nn.Module):
    """A linear layer whose weight is held as codes."""

    def __init__(self, packed: PackedWeight, bias: torch.Tensor | None):
        super().__init__()
        self.packed = packed
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        return self.packed()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.packed.linear(x, self.bias)


class PackedPoTEmbedding(nn.Module):
    """An embedding whose table is held as codes; unpacks the rows that it looks up."""

    def __init__(self, packed: PackedWeight):
        super().__init__()
        self.packed = packed

    @property
    def weight(self) -> torch.Tensor:
        return self.packed()

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.packed(index)


def allow_bfloat16(model: nn.Module) -> None:
    """Lets a packed model's products of more than 16 rows round their inputs, not the weights, to bfloat16 where the
    processor has AMX tiles for that. It reads a prompt several times as fast; what it does to the loss, the README says."""
    for module in model.modules():
        if isinstance(module, PackedWeight):
            module.bfloat16 = True


# -----------------------------------------------------------------------------
# prepare, convert

Filter = Callable[[str, nn.Module], bool | PoTConfig]


def _is_conv1d(module):
    # transformers' Conv1D by its interface: weight (in, nf), bias (nf)
    w, nf = getattr(module, "weight", None), getattr(module, "nf", None)
    return isinstance(nf, int) and isinstance(w, nn.Parameter) and w.ndim == 2 and w.shape[1] == nf


def _prepared_class(module):
    # Subclasses are left alone: they may read their weight without calling forward (nn.MultiheadAttention's does).
    if type(module) in (nn.Linear, nn.Embedding):
        return PoTLinear if type(module) is nn.Linear else PoTEmbedding
    return PoTConv1D if _is_conv1d(module) and not isinstance(module, _PREPARED) else None


_PREPARED = (PoTLinear, PoTConv1D, PoTEmbedding)


def _matrix(module):
    """The weight as (out, in)."""
    return module.weight.t() if isinstance(module, PoTConv1D) or _is_conv1d(module) else module.weight


def _check(name, w, config):
    if not w.is_floating_point() or w.numel() == 0:
        raise ValueError(
            f"{name}: cannot quantize a weight of shape {tuple(w.shape)} and {w.dtype}: leave this layer out by filter_fn"
        )
    if config.granularity == "group" and w.shape[1] % config.group_size:
        raise ValueError(
            f"{name}: group_size {config.group_size} does not divide its {w.shape[1]} input features: choose a divisor, "
            "or granularity='channel' (for this layer alone: return a PoTConfig from filter_fn)"
        )
    if not w.is_meta and not torch.isfinite(w.float()).all():
        raise ValueError(f"{name}: its weight holds NaN or inf: quantize a checkpoint from before training diverged")


def prepare(model: nn.Module, config: PoTConfig = PoTConfig(), filter_fn: Filter | None = None) -> list[str]:
    """Makes every nn.Linear, nn.Embedding and transformers Conv1D of model fake-quantize its weight, in place.

    The layers keep their Parameters, so an optimizer that holds them stays valid. Returns the layers' names.
    filter_fn(name, module) -> False (leave it), True, or a PoTConfig for this layer. Grid "paper" leaves embeddings
    in float, as the papers' code does. On a meta model no scale is computed; load_state_dict brings them.

    Raises ValueError, and changes nothing, for a weight that is empty, holds NaN or inf, or that group_size does not
    divide, and for layers that share a weight but not a config.
    """
    quantizers = {id(m.weight): m.quantizer for m in model.modules() if isinstance(m, _PREPARED)}
    found = []
    for name, module in model.named_modules():
        cls = _prepared_class(module)
        choice = cls is not None and (True if filter_fn is None else filter_fn(name, module))
        if not choice:
            continue
        own = choice if isinstance(choice, PoTConfig) else config
        if own.grid == "paper" and cls is PoTEmbedding:
            continue
        shown = name or type(module).__name__
        if getattr(module, "max_norm", None) is not None:
            raise ValueError(
                f"{shown}: an embedding with max_norm rescales its table while it runs: leave it out by filter_fn"
            )
        w = _matrix(module)
        if id(module.weight) not in quantizers:
            _check(shown, w, own)
            quantizers[id(module.weight)] = PoTQuantizer(w, own)
        quantizer = quantizers[id(module.weight)]
        if quantizer.config != own:
            raise ValueError(
                f"{shown}: shares its weight with another layer, which has another PoTConfig: give both the same"
            )
        found.append((name, module, cls, quantizer))
    for _, module, cls, quantizer in found:
        module.__class__ = cls  # rather than a new module: bias, hooks, training mode and all else stay as they are
        module.quantizer = quantizer
        # nn.TransformerEncoderLayer has a fast path that reads weights past forward; it does not take it with a hook.
        module.register_forward_pre_hook(_no_fast_path)
    return [name for name, *_ in found]


def _no_fast_path(module, inputs):
    return None


@torch.no_grad()
def convert(model: nn.Module) -> nn.Module:
    """Replaces prepared layers by packed ones, in place, and returns model (a new one if it is itself such a layer).

    Raises ValueError, and changes nothing, if a weight holds NaN or inf.
    """
    packed, layers = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, _PREPARED):
            w, q = _matrix(module), module.quantizer
            key = id(q), id(module.weight)  # a tie may have been cut since
            if key not in packed:
                _check(name or type(module).__name__, w, q.config)
                packed[key] = PackedWeight.pack(w, q.scale, q.config)
            weight = packed[key]
            is_embedding = isinstance(module, PoTEmbedding)
            layer = PackedPoTEmbedding(weight) if is_embedding else PackedPoTLinear(weight, module.bias)
            layers[module] = layer.train(module.training)
    return _replace(model, layers)


def _replace(model, layers):
    if model in layers:
        return layers[model]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children would list a shared module once
            if child in layers:
                setattr(parent, name, layers[child])
    return model


def quantize_(model: nn.Module, config: PoTConfig = PoTConfig(), filter_fn: Filter | None = None) -> nn.Module:
    """Post-training quantization by rounding to the nearest level: prepare, then convert."""
    prepare(model, config, filter_fn)
    return convert(model)


# -----------------------------------------------------------------------------
# calibrate: error-compensated rounding
#
# GPTQ (Frantar et al., arXiv 2210.17323) on our grid: what rounding the weights of one input feature does to a layer's
# output is made up for by the features still to be rounded. It takes the second moment of the layer's inputs.


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable, progress: Callable[[int, int], None] | None = None
) -> dict[str, tuple[float, float]]:
    """Chooses the codes of a prepared model by the inputs that its layers see, not by nearest level alone; in place.

    batches: text, 16k tokens of it are usual, as the model takes it: model(batch), model(*batch) for a tuple or list,
    model(**batch) for a mapping. For each of them an output of every finished block is kept in memory.
    progress(done, total), if given, is called after each set of layers.

    First the weights of embeddings and those that several layers share (a tied head): weighted least squares gives
    them new scales, and GPTQ the codes of those that a linear layer uses. Then linear layers in the order of execution:
    GPTQ on the inputs that they see once the layers before them are quantized, towards the outputs that the float model
    has there, so that a layer makes up for the errors before it, too (as in GPTAQ, arXiv 2504.02692). Afterwards `weight`
    holds the compensated values, not yet rounded, and the layer's own rounding gives the codes: convert the model, or
    train on. A layer that the batches do not reach, or that would lose, stays as it was. While it works a copy of the
    float model is kept.

    Returns {name: (before, after)}: squared distance of a linear layer's output from the float model's, relative to the
    squared output. Raises ValueError if there is nothing to calibrate, or nothing to calibrate on, or if weights or
    inputs hold NaN or inf.
    """
    batches = list(batches)
    names = {m: name for name, m in model.named_modules() if isinstance(m, _PREPARED) and m.quantizer.enabled}
    if not names:
        raise ValueError("the model has no prepared layer to calibrate: call prepare first")
    if not batches:
        raise ValueError("there is no batch to calibrate on: pass some text, 16k tokens are usual")
    users = {}
    for layer in names:
        _check(names[layer] or type(layer).__name__, _matrix(layer), layer.quantizer.config)
        users.setdefault(layer.quantizer, []).append(layer)
    shared = {q: layers for q, layers in users.items() if len(layers) > 1 or isinstance(layers[0], PoTEmbedding)}
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        runner, errors, reference = _Runner(model, batches, names), {}, copy.deepcopy(model)
        twins = dict(reference.named_modules())
        twins = {layer: twins[name] for layer, name in names.items()}
        for twin in twins.values():
            twin.quantizer.enabled = False
        of_float = _Runner(reference, batches, twins.values())
        sets, calls, importance = _record(of_float, {twins[layer]: layer for layer in names}, shared)
        for q, weight in importance.items():
            if not torch.isfinite(weight).all():
                raise ValueError(f"{names[shared[q][0]]}: its inputs hold NaN or inf: calibrate a model that works")
        for q, weight in importance.items():
            _calibrate_shared(_matrix(shared[q][0]), q, weight)
        unreached = names.keys() - {layer for layers in sets for layer in layers}
        runner.finish(unreached)
        of_float.finish(twins[layer] for layer in unreached)
        for done, layers in enumerate(sets, start=1):
            moments = _moments(runner, of_float, layers[0], twins[layers[0]], calls)
            if not all(torch.isfinite(m).all() for m in moments):
                raise ValueError(f"{names[layers[0]]}: its inputs hold NaN or inf: calibrate a model that works")
            for layer in layers:
                errors[names[layer]] = _calibrate_layer(layer, *moments)
            runner.finish(layers)
            of_float.finish(twins[layer] for layer in layers)
            if progress:
                progress(done, len(sets))
        return errors
    finally:
        for m in training:
            m.training = True


class _Stop(BaseException):
    """Ends a forward pass: nothing that comes later is of interest. No Exception, as models may catch those."""


class _Runner:
    """Runs a model over batches, without computing again what is known.

    A module is finished when all prepared layers in it are. What it returns before the first unfinished layer of a pass
    stays the same from then on, and is kept until that of a finished module around it is. So a pass up to a layer of
    block n computes in block n alone.
    """

    def __init__(self, model, batches, layers):
        self.model, self.batches = model, batches
        self.unfinished = {m: {d for d in m.modules() if d in layers} for m in model.modules()}
        self.unfinished = {m: inside for m, inside in self.unfinished.items() if inside}
        compiled = [m for m in model.modules() if hasattr(m, "_orig_mod")]
        self.untouched = {d for m in compiled for d in m.modules()}  # torch.compile does not trace what follows here
        self.finished, self.outputs = [], {}

    def finish(self, layers):
        layers = set(layers)
        for m in list(self.unfinished):
            self.unfinished[m] -= layers
            if not self.unfinished[m]:
                del self.unfinished[m]
                self.finished += [m] if m not in self.untouched else []

    def call(self, batch):
        batch = copy.deepcopy(batch)  # a model may change it
        if isinstance(batch, (tuple, list)):
            self.model(*batch)
        elif hasattr(batch, "keys"):
            self.model(**batch)
        else:
            self.model(batch)

    def inputs(self, layer, i, most):
        """What layer sees in batch i, in its first `most` calls, or all: a list of (rows, in) float32."""
        seen = []

        def see(_, inputs):
            rows = _rows(layer.quantizer, inputs[0])
            seen.append(rows.clone() if rows.data_ptr() == inputs[0].data_ptr() else rows)  # may be changed in place
            if len(seen) == most:
                raise _Stop

        self.settled, calls, hidden = True, {}, {}
        hooks = [m.register_forward_pre_hook(self._unsettle) for m in self.unfinished if isinstance(m, _PREPARED)]
        hooks.append(layer.register_forward_pre_hook(see))
        try:
            for m in self.finished:
                hidden[m] = vars(m).get("forward")  # hooks of other libraries may live there
                m.forward = self._remembering(m, i, calls)
            self.call(self.batches[i])
        except _Stop:
            pass
        finally:
            for hook in hooks:
                hook.remove()
            for m, forward in hidden.items():
                del m.forward
                if forward is not None:
                    m.forward = forward
        return seen

    def _unsettle(self, module, inputs):
        self.settled = False

    def _remembering(self, module, i, calls):
        compute = module.forward

        def forward(*args, **kwargs):
            call = calls[module] = calls.get(module, -1) + 1
            known = self.outputs.setdefault((module, i), {})
            if call in known:
                return copy.deepcopy(known[call])  # what comes next may work in place
            before, earlier = _fingerprint(args, kwargs), dict(calls)
            result = compute(*args, **kwargs)
            if self.settled and before == _fingerprint(args, kwargs):  # else it did more than return something
                known[call] = copy.deepcopy(result)
                for inner in module.modules():
                    if inner is not module:
                        self.outputs.pop((inner, i), None)
                        calls[inner] = earlier.get(inner, -1)  # as in a pass that does not enter module
            return result

        return forward


def _fingerprint(args, kwargs):
    """What changes if a module writes to its arguments."""
    found = []
    for a in (*args, *kwargs.values()):
        values = a.values() if hasattr(a, "keys") else a if isinstance(a, list) else ()
        found.append((a._version if isinstance(a, torch.Tensor) else None, [id(v) for v in values]))
    return found


def _record(runner, layers, shared):
    """One whole pass -> (sets of layers with the same inputs, in the order of execution; how often a batch calls a layer,
    by (index, layer); importance of shared weights, by quantizer: how often a row is read (rows, 1), or what the rows are
    multiplied with, as the sum of x x^T (in, in)). layers: {module that runs: layer to name in its place}."""
    inputs_of, calls, importance, number, last = {}, {}, {}, 0, None
    before, previous = {}, None  # which layers a layer follows: a batch need not call all of them

    def see(module, inputs):
        nonlocal number, last, previous
        x, layer = inputs[0], layers[module]
        q = layer.quantizer
        if q in shared:
            if not isinstance(layer, PoTEmbedding):
                rows = _rows(q, x)
                importance[q] = importance.get(q, 0) + rows.t() @ rows
            elif all(isinstance(user, PoTEmbedding) for user in shared[q]):  # a row counts as often as it is read
                importance[q] = importance.get(q, 0) + torch.bincount(x.flatten(), minlength=len(layer.weight))[:, None]
            return
        this = x, None if x.is_nested else x._version, q.config.act_bits
        number += not (last is not None and last[0] is x and last[1:] == this[1:])
        last = this
        inputs_of.setdefault(layer, []).append(number)
        if (i, layer) not in calls:
            before.setdefault(layer, set()).update([previous] if previous is not None else [])
            previous = layer
        calls[i, layer] = calls.get((i, layer), 0) + 1

    hooks = [module.register_forward_pre_hook(see) for module in layers]
    try:
        for i in range(len(runner.batches)):
            previous = None
            runner.call(runner.batches[i])
    finally:
        for hook in hooks:
            hook.remove()
    try:
        order = list(graphlib.TopologicalSorter(before).static_order())
    except graphlib.CycleError:  # batches that disagree
        order = list(inputs_of)
    sets = {}
    for layer in order:
        sets.setdefault(tuple(inputs_of[layer]), []).append(layer)
    return list(sets.values()), calls, {q: weight.float() for q, weight in importance.items() if weight.any()}


def _rows(quantizer, x):
    """Inputs of a layer as it sees them: (rows, in) float32."""
    x = torch.cat(x.unbind()) if x.is_nested else x
    return quantizer.inputs(x).float().reshape(-1, x.shape[-1])


def _damped(moment, by):
    moment = moment.clone()
    moment.diagonal().add_(by * moment.diagonal().mean())
    return moment


_DAMPING = 0.01  # of the mean square: what this text hardly uses another may use, and every Hessian has an inverse
_SHARED = (
    0.1  # of the head's inputs, for the look-ups that read a tied table's rows as they are, whatever is next to them
)


def _moments(runner, of_float, layer, twin, calls):
    """Over all inputs x of a layer as it is now and y of the float model's, in their place, the sums (in, in) float32 of
    x x^T, (y - x) x^T and (y - x) (y - x)^T."""
    n = _matrix(layer).shape[1]
    xx, dx, dd = (layer.weight.new_zeros(n, n, dtype=torch.float32) for _ in range(3))
    for i in range(len(runner.batches)):
        most = calls.get((i, layer))  # None: only what is quantized before it may lead here
        seen, wanted = runner.inputs(layer, i, most), of_float.inputs(twin, i, most) if most else []
        for k, x in enumerate(seen):
            xx.addmm_(x.t(), x)
            y = wanted[k] if len(seen) == len(wanted) and wanted[k].shape == x.shape else x
            d = y - x
            # Tokens of a mixture of experts may have gone another way: then there is nothing to compare with.
            if not d.square().sum() >= y.square().sum():
                dx.addmm_(d.t(), x)
                dd.addmm_(d.t(), d)
    return xx, dx, dd


def _calibrate_shared(w, q, importance):
    """Scale, and by GPTQ the codes, of a weight that several layers or an embedding use, in place."""
    product = importance.shape[1] > 1
    weights = importance.diagonal() if product else importance  # an input feature counts by its mean square
    if q.config.scale == "mse":
        q.scale = compute_scale(w, q.config, weights + _DAMPING * weights.mean())
    if product:
        moment, old, rounded = _damped(importance, _SHARED), w.clone(), q(w)
        w.copy_(_compensated(w, q.scale, q.config, moment))
        before, after = (((d @ moment) * d).sum() for d in ((old - rounded).float(), (old - q(w)).float()))
        if not after < before:
            w.copy_(old)


def _calibrate_layer(layer, xx, dx, dd):
    """GPTQ for one layer by its _moments -> (error before, after)."""
    w, q = _matrix(layer), layer.quantizer
    old = w.float().clone()
    signal = ((old @ (xx + dx + dx.t() + dd)) * old).sum().item()

    def error():  # of y W^T - x Q^T = (y - x) W^T + x (W - Q)^T
        lost = old - q(w).float()
        noise = ((old @ dd) * old).sum() + 2 * ((old @ dx) * lost).sum() + ((lost @ xx) * lost).sum()
        return max(0.0, noise.item()) / signal if signal > 0 else 0.0

    before, kept = error(), w.clone()
    if before == 0:
        return before, before
    # The float weight whose product with x comes nearest to y W^T. Damped, so that it stays near W where x says little.
    solve = torch.linalg.cholesky(_double(_damped(xx, _DAMPING)))
    target = old + torch.cholesky_solve(_double(old @ dx).t(), solve).t().to(old)
    w.copy_(_compensated(target.to(w.dtype), q.scale, q.config, xx))
    after = error()
    if not after < before:
        w.copy_(kept)
    return before, min(before, after)


def _double(x):
    return x.double() if x.device.type != "mps" else x.cpu().double()  # mps has none


def _compensated(w, scale, config, moment):
    """w (out, in) as GPTQ leaves each weight before it rounds it, in w's dtype.

    Features in the order of their mean squares, largest first, as rounding those costs most and the most are left to
    make up for it; scales are fixed before ("static groups"), so a group need not be in order.
    """
    n = w.shape[1]
    order = moment.diagonal().argsort(descending=True)
    hessian = _damped(_double(moment[order][:, order]), _DAMPING)
    # Upper U with U^T U = hessian^-1: the flipped inverse of the flipped hessian's Cholesky factor.
    factor = torch.linalg.cholesky(hessian.flip(0, 1))
    eye = torch.eye(n, dtype=factor.dtype, device=factor.device)
    u = torch.linalg.solve_triangular(factor, eye, upper=False).flip(0, 1).float().to(w.device)
    units = _unit(scale, config).squeeze(-1).t().expand(-1, len(w)).contiguous()  # (groups, out)
    group = order // (n // len(units))
    left = w.float().t()[order]  # (in, out): a feature's weights lie side by side
    result = torch.empty_like(left)
    for start in range(0, n, 128):  # blocks, as one large product for what is far is quicker than many small ones
        end = min(start + 128, n)
        errors = left.new_empty(end - start, len(w))
        for i in range(start, end):
            column, unit = left[i].to(w.dtype).float(), units[group[i]]
            result[i] = column
            errors[i - start] = (column - _round_(column / unit, config) * unit) / u[i, i]
            left[i + 1 : end].addr_(u[i, i + 1 : end], errors[i - start], alpha=-1)
        left[end:].addmm_(u[start:end, end:].t(), errors, alpha=-1)
    return result[order.argsort()].t().to(w.dtype)


# -----------------------------------------------------------------------------
# State: what a file of a packed model holds


def packed_state(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict]:
    """Converted model -> (tensors by name, metadata for json). What layers share is listed once, then in `aliases`."""
    tensors, aliases, seen = {}, {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first = seen.setdefault(id(tensor), name)
        if first == name:
            tensors[name] = tensor.detach()
        else:
            aliases[name] = first
    configs, layers = [], {}
    for name, module in model.named_modules():
        if isinstance(module, _PREPARED):
            raise ValueError(f"{name or 'the model'} is prepared, not packed: call convert first")
        if isinstance(module, (PackedPoTLinear, PackedPoTEmbedding)):
            p = module.packed
            if p.config not in configs:
                configs.append(p.config)
            layers[name] = {
                "shape": [len(p.codes), p.in_features],
                "dtype": str(p._like.dtype).removeprefix("torch."),
                "config": configs.index(p.config),
            }
    metadata = {
        "configs": [asdict(c) | {"layout": _layout(c.bits)} for c in configs],
        "layers": layers,
        "aliases": aliases,
    }
    return tensors, metadata


def load_packed(model: nn.Module, tensors: dict[str, torch.Tensor], metadata: dict) -> nn.Module:
    """Turns model, the float model's structure, into the packed model of packed_state; returns it as convert does.

    On a meta model (built under `torch.device("meta")`) no float copy of a quantized weight ever exists. Raises
    ValueError if tensors, metadata and model do not fit together.
    """
    tensors = dict(tensors)
    try:
        configs = []
        for c in metadata["configs"]:
            config = PoTConfig(**{k: v for k, v in c.items() if k != "layout"})
            if c["layout"] != _layout(config.bits):
                raise ValueError(f"unknown layout {c['layout']!r}: this file was written by another version of pot.py")
            configs.append(config)
        layers, aliases = [], dict(metadata["aliases"])
        for name, its in metadata["layers"].items():
            (rows, columns), dtype = its["shape"], getattr(torch, its["dtype"])
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                raise TypeError(f"{name} is said to be {its['dtype']}")
            if type(rows) is not int or type(columns) is not int:
                raise TypeError(f"{name} is said to have the shape {its['shape']}")
            layers.append((name, rows, columns, dtype, configs[its["config"]]))
        if not all(isinstance(name, str) for pair in aliases.items() for name in pair):
            raise TypeError(f"aliases are names, not {aliases}")
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        raise ValueError(f"metadata of a packed model is incomplete or damaged: {e!r}") from None
    modules, packed, replaced = dict(model.named_modules()), {}, {}
    for name, rows, columns, dtype, config in layers:
        module = modules.get(name)
        cls = _prepared_class(module)
        if cls is None or tuple(_matrix(module).shape) != (rows, columns):
            raise ValueError(
                f"{name}: the file holds a packed layer of shape ({rows}, {columns}), the model does not: build the model with the file's settings"
            )
        key = aliases.pop(f"{name}.packed.codes", f"{name}.packed.codes")
        aliases.pop(f"{name}.packed.scale", None)
        if key not in packed:
            codes, scale = tensors.pop(key, None), tensors.pop(key.removesuffix("codes") + "scale", None)
            _check_packed(key, codes, scale, rows, columns, config)
            packed[key] = PackedWeight(codes, scale, columns, dtype, config)
        p = packed[key]
        if ((len(p.codes), p.in_features), p.config, p._like.dtype) != ((rows, columns), config, dtype):
            raise ValueError(f"{name} shares {key}, which is of another shape or config: the file is damaged")
        bias = None
        if cls is not PoTEmbedding and module.bias is not None:
            bias = tensors.pop(f"{name}.bias", None)
            if bias is None or bias.shape != (rows,) or not bias.is_floating_point():
                raise ValueError(
                    f"{name}.bias: missing, or no floats of shape ({rows},): the file is incomplete or of another model"
                )
        layer = PackedPoTEmbedding(packed[key]) if cls is PoTEmbedding else PackedPoTLinear(packed[key], bias)
        replaced[module] = layer.train(module.training)
    model = _replace(model, replaced)

    # What is left are float tensors: biases were taken above, so LayerNorms and layers that were not quantized.
    for alias, target in aliases.items():
        if target not in tensors:
            raise ValueError(f"{target}, which {alias} shares, is missing: the file is incomplete or of another model")
        tensors[alias] = tensors[target]
    done = {id(t) for layer in replaced.values() for t in layer.state_dict(keep_vars=True).values()}
    wanted = {name: t for name, t in model.state_dict(keep_vars=True).items() if id(t) not in done}
    for name in wanted.keys() | tensors.keys():
        if name not in tensors or name not in wanted or _kind(tensors[name]) != _kind(wanted[name]):
            what = "missing" if name not in tensors else "not in the model" if name not in wanted else "of another kind"
            raise ValueError(f"{name} is {what}: the file is incomplete or of another model")
    model.load_state_dict(tensors, strict=False, assign=True)
    for alias, target in aliases.items():
        (a, leaf), (t, target_leaf) = (n.rpartition(".")[::2] for n in (alias, target))
        setattr(model.get_submodule(a), leaf, getattr(model.get_submodule(t), target_leaf))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ValueError(
                f"{name} is no part of a state_dict, so a meta model cannot get it from a file: build the model without meta"
            )
    return model


def _kind(tensor):
    return tensor.shape, tensor.is_floating_point()


def _check_packed(key, codes, scale, rows, columns, config):
    if config.granularity == "group" and columns % config.group_size:
        raise ValueError(
            f"{key}: groups of {config.group_size} do not divide the {columns} input features: the file is damaged"
        )
    width = {"tensor": 1, "channel": 1, "group": columns // config.group_size}[config.granularity]
    shapes = {
        "codes": (rows, -(-columns * config.bits // 8)),
        "scale": (1 if config.granularity == "tensor" else rows, width),
    }
    for part, tensor, dtypes in (("codes", codes, (torch.uint8,)), ("scale", scale, (torch.float16, torch.float32))):
        name = key.removesuffix("codes") + part
        if tensor is None:
            raise ValueError(f"{name} is missing: the file is incomplete")
        if tensor.shape != shapes[part] or tensor.dtype not in dtypes:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected {shapes[part]} {dtypes[0]}: the file is damaged"
            )
    low, high = scale.aminmax()  # NaN if there is one
    if not (low > 0 and high < torch.inf):
        raise ValueError(
            f"{key.removesuffix('codes')}scale holds a value that is no positive number: the file is damaged"
        )
