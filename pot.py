"""
Power-of-two (PoT) weights for PyTorch, in one file that needs torch alone: copy it into your project.

A weight is `sign x level x unit`. With single powers the levels are 0, 1, 2, 4, 8, ..., so 4 bits store a weight (a
sign and an exponent) and a shift multiplies by it. The unit is a scale that neighbouring weights share. These are the 15
values of a weight at 4 bits, as multiples of the top level, for single powers and for the two other grids of this file:

    single powers  |                   |         |    |  |||||  |    |         |                   |
    two terms      |            |      |      |  |  |   |  |  |   |  |  |      |      |            |
    uniform        |     |    |     |     |     |    |     |     |    |     |     |     |    |     |
                   -1                 -0.5                  0                  0.5                  1

Consequences:
- The relative error of a single power is the same at every magnitude: about 15.4 dB of signal-to-quantization-noise
  ratio (SQNR) in groups of 64. More bits add levels near zero only, so they hardly help.
- Two terms (a power, or a power and its half: two shifts and an add) reach about 20 dB at the same 4 bits.
- Rounding a trained model (post-training quantization, PTQ) costs quality. Training with rounded weights
  (quantization-aware training, QAT) wins it back: the forward pass uses the rounded weights, and the gradient passes
  the rounding unchanged (straight-through estimator, STE).
- A CPU or GPU multiplies as fast as it shifts. There the gain is memory: 4.25 bits a weight in groups of 64.

The steps:

    float model --prepare--> fake-quantized model --(calibrate | train)--> --convert--> packed model

    prepare(model, PoTConfig(bits=4))           # nn.Linear -> PoTLinear, nn.Embedding -> PoTEmbedding, in place
    ...                                         # fine-tune as usual (QAT), or do nothing (PTQ)
    convert(model)                              # -> PackedPoTLinear, PackedPoTEmbedding: codes of `bits` bits
    tensors, metadata = packed_state(model)     # the content of a file; load_packed reads it back

Two other parts are optional. calibrate.py chooses better codes from a little text (GPTQ). The folder pot_kernel/
multiplies by packed 4-bit weights on a CPU; without it PyTorch unpacks a weight whenever it is used.

Left out on purpose: learned scales (no gain was measured), asymmetric grids, and quantized biases and norms (too small
to matter).

Sections: grid, scale, fake quantization, layers, packing, prepare and convert, state.
"""

import importlib
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, TypeGuard

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import forward_ad

pot_kernel: Any
try:  # beside this file, which may be part of a package
    pot_kernel = importlib.import_module(f"{__package__}.pot_kernel" if __package__ else "pot_kernel")
except ImportError:  # this file was copied alone
    pot_kernel = None

__version__ = "0.1.0"
__all__ = [
    "FakeQuantize", "PackedPoTEmbedding", "PackedPoTLinear", "PackedWeight", "PoTConfig", "PoTConv1D",
    "PoTEmbedding", "PoTLinear", "PoTQuantizer", "allow_int8_activations", "check_parameter", "check_weight",
    "compute_unit", "convert", "fake_quantize", "fake_quantize_activations", "is_prepared", "load_packed",
    "pack_codes", "packed_state", "prepare", "quantize_", "row_blocks", "sqnr", "unpack_codes", "weight_matrix",
]  # fmt: skip

# -----------------------------------------------------------------------------
# Grid: the values that a weight may take


@dataclass(frozen=True)
class PoTConfig:
    """How the weights of a layer are quantized.

    Raises ValueError for a combination that does not exist. The message names the possible ones.
    """

    bits: int = 4  # bits of a code, sign included
    # "pot": powers of two; "uniform": the comparison; "paper": the quantizer of arXiv 2601.02298
    grid: str = "pot"
    terms: int = 1  # 1: single powers; 2: a power, or a power and its half (two shifts and an add)
    # R narrows single powers to R of them, the papers' [-2^R, 2^R]; None: as many as the bits hold
    range: int | None = None
    # weights that share a scale: "tensor", "channel" (an output row) or "group" (of input features)
    granularity: str = "group"
    group_size: int = 64  # consecutive input features that share a scale, for granularity "group"
    scale: str = "mse"  # "mse": search the least squared error; "absmax": the largest weight is the top level
    # "float16", or "e8m0": the unit is a power of two, so a whole weight is a shift
    scale_format: str = "float16"
    act_bits: int | None = None  # 8: layer inputs are quantized too, uniform affine, per token; None: they stay float
    eps: float = 2.0**-5  # grid "paper" only: lower bound of the unit

    def __post_init__(self):
        _check_choice("grid", self.grid, ("pot", "uniform", "paper"))
        _check_choice("granularity", self.granularity, ("tensor", "channel", "group"))
        _check_choice("scale", self.scale, ("mse", "absmax"))
        _check_choice("scale_format", self.scale_format, ("float16",) if self.grid == "paper" else ("float16", "e8m0"))
        _check_choice("act_bits", self.act_bits, (None, 8))
        _check_choice("terms", self.terms, (1, 2) if self.grid == "pot" else (1,), f" with grid={self.grid!r}")
        lowest, highest = {"pot": (2, 6), "uniform": (2, 8), "paper": (3, 6)}[self.grid]
        lowest = 4 if self.terms == 2 else lowest
        where = f" with grid={self.grid!r}, terms={self.terms}"
        _check_choice("bits", self.bits, tuple(range(lowest, highest + 1)), where)
        for key in ("range", "group_size"):
            if type(getattr(self, key)) is not int and (key, self.range) != ("range", None):
                raise ValueError(f"{key}={getattr(self, key)!r} must be an integer")
        if self.range is not None:
            if self.grid == "uniform" or self.terms == 2:
                raise ValueError(
                    f"range={self.range} narrows single powers only: use grid='pot' with terms=1, or leave range out"
                )
            if not 1 <= self.range <= self._full_range():
                hint = f"; range {self.range} needs more bits" if self.range > self._full_range() else ""
                raise ValueError(
                    f"range={self.range} does not fit: {self.bits} bits with grid={self.grid!r} hold ranges 1 to "
                    f"{self._full_range()}{hint}"
                )
        if self.granularity == "group" and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} must be at least 1; 64 and 128 are usual")
        if self.grid == "paper" and (self.granularity, self.scale) != ("tensor", "absmax"):
            raise ValueError("grid='paper' is per tensor and by absmax: use granularity='tensor', scale='absmax'")
        if not 0 < self.eps < float("inf"):
            raise ValueError(
                f"eps={self.eps} must be positive and finite; the papers use 2**-5 for GPT-2 and 2**-12 for characters"
            )

    def _full_range(self) -> int:
        # The papers' code makes 2R + 3 levels (0 and +-2^0 ... +-2^R). This file makes 2R + 1.
        return (2**self.bits - 3) // 2 if self.grid == "paper" else 2 ** (self.bits - 1) - 1

    def levels(self) -> list[int]:
        """Non-negative levels in units of the smallest non-zero level, ascending. The last is the top level."""
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
        """The top level."""
        return float(self.levels()[-1])

    @property
    def edge(self) -> float:
        """Outer edge of the top level's cell, as a multiple of the top level: 1.25 for single powers."""
        *_, below, top = self.levels()
        return 1 + (1 - below / top) / 2

    def code_levels(self) -> list[int]:
        """The level of every code `sign << (bits - 1) | index`: 2**bits integers.

        A narrowed range leaves indices without a level. They read as the top level, so every code is finite.
        """
        levels = self.levels()
        half = [levels[min(i, len(levels) - 1)] for i in range(2 ** (self.bits - 1))]
        return half + [-v for v in half]

    def table(self) -> torch.Tensor:
        """`code_levels` as a tensor (2**bits,) float32."""
        return torch.tensor(self.code_levels(), dtype=torch.float32)

    def round_(self, x: torch.Tensor) -> torch.Tensor:
        """x (float32, any shape, in units of the smallest level) rounded to the nearest level. May overwrite x. NaN
        stays NaN.

        The exponent bits of x give the spacing of a floating-point grid: [2^e, 2^(e+1)) has `terms` steps. Comparing
        with every boundary (bucketize) gives the same levels and takes ten times as long.
        """
        if self.grid == "paper":  # 2506.00315: to integers first, then to the nearest power in the log domain
            a = x.abs().round_()
            power = torch.exp2(a.log2().round_()).clamp_(max=self.top)
            return torch.where(a == 0, a, power.copysign_(x))
        top = self.top
        x.clamp_(-top, top)
        # A float32 of 1.5 * 2^23 steps has no bits below one step. Adding it rounds the sum to a whole number of steps
        # (half to even). Subtracting it again gives that number, and +0 where x was just below zero.
        if self.grid == "uniform":
            return x.add_(_MAGIC).sub_(_MAGIC)
        step = (x.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2^floor(log2 |x|): `terms` steps
        step.clamp_(min=self.terms)  # the lowest levels are 0, 1, 2 whatever the exponent
        return x.add_(step, alpha=_MAGIC / self.terms).sub_(step, alpha=_MAGIC / self.terms)

    def __str__(self):
        kinds = {"pot": "PoT" if self.terms == 1 else "two-term PoT", "uniform": "uniform", "paper": "paper PoT"}
        share = f"groups of {self.group_size}" if self.granularity == "group" else f"per {self.granularity}"
        extras = ", absmax" if self.scale == "absmax" and self.grid != "paper" else ""
        extras += ", E8M0 scales" if self.scale_format == "e8m0" else ""
        extras += f", eps {self.eps:g}" if self.grid == "paper" and self.eps != PoTConfig.eps else ""
        extras += "" if self.range is None else f", range 2^{self.range}"
        extras += "" if self.act_bits is None else f", {self.act_bits}-bit activations"
        return f"{kinds[self.grid]} {self.bits} bits, {share}{extras}"


_MAGIC = 1.5 * 2**23


def _check_choice(key, value, choices, where=""):
    if (type(value), value) not in [(type(c), c) for c in choices]:
        raise ValueError(f"{key}={value!r} is not possible{where}: choose one of {', '.join(map(repr, choices))}")


# -----------------------------------------------------------------------------
# Scale: the unit, which is the value of the smallest level, shared by a tensor, a channel or a group
#
# A weight is a matrix (out, in). Its unit is (1, 1), (out, 1) or (out, in / group_size). The value of a weight is
# level * unit in float32. Fake quantization and unpacking do the same operations, so they agree to the bit.


def row_blocks(unit: torch.Tensor, *matrices: torch.Tensor) -> Iterable[tuple[torch.Tensor, ...]]:
    """Cuts matrices (out, in) and their unit into blocks of rows that fit the cache: ten passes over a block cost
    little more than one. Yields unit (rows or 1, groups, 1) in float32, and views (rows, groups, size) of each matrix."""
    unit = unit.float().unsqueeze(-1)
    grouped = [m.unflatten(-1, (unit.shape[1], -1)) for m in matrices]
    first = grouped[0]
    if first.device.type != "cpu" or torch.compiler.is_compiling() or first.numel() <= _BLOCK:
        return [(unit, *grouped)]
    rows = max(1, _BLOCK // first[0].numel())
    units = [unit] * -(-len(first) // rows) if len(unit) == 1 else unit.split(rows)
    return zip(units, *(m.split(rows) for m in grouped))


_BLOCK = 2**18  # weights in a block: 1 MiB of float32


def compute_unit(w: torch.Tensor, config: PoTConfig, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Unit of w (out, in): (1, 1), (out, 1) or (out, in / group_size).

    scale="mse" minimizes the squared error. importance, positive and broadcastable to w, weights the squares.
    The result is float16. It is float32 for grid "paper", or where one unit lies outside float16's normal range. With
    scale_format "e8m0" it is a power of two. An all-zero group gets the tensor's largest unit, so that training can
    still move it.
    """
    w = w.detach()
    groups = w.shape[-1] // config.group_size if config.granularity == "group" else 1
    if w.is_meta:
        return w.new_empty(1 if config.granularity == "tensor" else len(w), groups, dtype=torch.float16)
    if config.granularity == "tensor":
        absmax = w.abs().amax().float().view(1, 1)
    else:
        absmax = w.abs().unflatten(-1, (groups, -1)).amax(-1).float()
    unit = absmax / config.top
    if config.grid == "paper":
        return unit.clamp(min=config.eps)
    if config.scale_format == "e8m0":  # round up to a power of two
        mantissa, exponent = torch.frexp(unit)
        unit = torch.ldexp(torch.ones_like(unit), exponent - (mantissa == 0.5).int()) * (absmax > 0)
    if config.scale == "mse":
        unit = _search_unit(w, unit, config, importance)
    # An all-zero tensor gets levels up to about 1.
    fallback = unit.max() if absmax.any() else 0.5 ** (int(config.top) - 1).bit_length()
    unit = torch.where(absmax > 0, unit, fallback)
    # The unit must not underflow, and the top level must not overflow the weight's dtype. Float16 may round the unit up
    # by a factor of 1 + 2**-11.
    single, half = torch.finfo(torch.float32), torch.finfo(torch.float16)
    highest = min(torch.finfo(w.dtype).max, single.max) / config.top * (1 - 2**-11)
    if config.scale_format == "e8m0":
        highest = 2.0 ** (math.frexp(highest)[1] - 1)  # the power of two below
    unit = unit.clamp(single.tiny, highest)
    return unit.half() if unit.min() >= half.tiny and unit.max() <= half.max else unit


def _search_unit(w, largest, config, importance):
    """The unit of the least squared error: a coarse search below `largest`, then three rounds of least squares."""
    weights = () if importance is None else (importance.float().expand(w.shape),)

    def moments(unit):
        """(3, *unit.shape): squared error, <w, level>, <level, level>."""
        parts = []
        for u, b, *h in row_blocks(unit, w, *weights):
            b = b.float()
            level = config.round_(b / u)
            error = (b - level * u).square_()
            weighted = level
            if h:
                error.mul_(h[0])
                weighted = level * h[0]
            parts.append(torch.stack([error.sum(-1), (b * weighted).sum(-1), (level * weighted).sum(-1)]))
        parts = torch.cat(parts, dim=1)
        return parts.sum((1, 2)).view(3, 1, 1) if config.granularity == "tensor" else parts

    # Many weights under one unit want the top level far below the largest weight. Few weights make the error bumpy in
    # the unit.
    steps, per_octave = (15, 8) if config.granularity == "group" else (25, 4)
    refinements = 3
    if config.scale_format == "e8m0":  # powers of two only
        steps, per_octave, refinements = 10, 1, 0
    best, best_moments = largest, torch.full((3, *largest.shape), torch.inf, device=w.device)
    for step in range(steps + refinements):
        if step < steps:
            unit = largest * 2 ** ((2 - step) / per_octave)
        else:  # the best unit for the best levels so far
            unit = best_moments[1] / best_moments[2]
        unit = torch.where(unit > 0, unit, 1.0)  # an all-zero group must not divide by zero
        candidate = moments(unit)
        better = candidate[0] < best_moments[0]
        best, best_moments = torch.where(better, unit, best), torch.where(better, candidate, best_moments)
    return best


def sqnr(w: torch.Tensor, quantized: torch.Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB of two tensors of one shape; inf where nothing is lost."""
    noise = (w.double() - quantized.double()).square().sum()
    return (10 * torch.log10(w.double().square().sum() / noise)).item() if noise > 0 else float("inf")


# -----------------------------------------------------------------------------
# Fake quantization


class FakeQuantize(torch.autograd.Function):
    """Rounding with a straight-through gradient. `w + (q - w).detach()` is shorter but sometimes off by an ulp."""

    @staticmethod
    def forward(ctx, w, unit, config):
        ctx.save_for_backward(w, unit)
        ctx.config = config
        if torch.compiler.is_compiling():  # torch.export has no gradient for out=
            unit = unit.float().unsqueeze(-1)
            w = w.unflatten(1, (unit.shape[1], -1))
            return (config.round_(w.float() / unit) * unit).flatten(1).to(w.dtype).contiguous()
        # Contiguous even if w is a transposed view: then products sum in the same order as with the packed layer.
        out = torch.empty_like(w, memory_format=torch.contiguous_format)
        for u, b, o in row_blocks(unit, w, out):
            torch.mul(config.round_(b.float() / u), u, out=o)
        return out

    @staticmethod
    def backward(ctx, grad):
        w, unit = ctx.saved_tensors
        config = ctx.config
        if config.grid == "paper":  # the papers' gradient has no mask
            return grad, None, None
        out = torch.empty_like(w)
        # hardtanh's gradient kernel takes a tenth of the time of comparing and masking. It keeps |x| < edge, but the
        # edge itself belongs to the cell. So the edge is one ulp higher.
        edge = config.edge * config.top * (1 + 2**-23)
        for per_unit, b, g, o in row_blocks(1 / unit.float(), w, grad, out):
            torch.ops.aten.hardtanh_backward.grad_input(g.float(), b.float() * per_unit, -edge, edge, grad_input=o)
        return out, None, None


def fake_quantize(w: torch.Tensor, unit: torch.Tensor, config: PoTConfig) -> torch.Tensor:
    """w (out, in) rounded to the nearest level, in w's dtype. unit is a result of compute_unit.

    Straight-through estimator: the gradient to w is the identity up to the outer edge of the top level's cell (1.25
    times the top level for single powers) and zero beyond. Grid "paper" has no such mask.
    """
    return FakeQuantize.apply(w, unit, config)


def fake_quantize_activations(x: torch.Tensor) -> torch.Tensor:
    """x (..., features) through uniform affine 8 bits and back, with a scale and a zero point per token.

    q = round(x / scale) + zero_point in 0 ... 255, half to even. The range of a token is widened to contain 0, so that
    0 stays 0. The gradient is the identity.
    """
    if x.is_nested and x.layout == torch.strided:  # nn.TransformerEncoder makes such a tensor of a padded batch
        return torch.nested.as_nested_tensor([fake_quantize_activations(t) for t in x.unbind()])
    if _in_transform(x) or _has_derivative(x):  # torch.func and forward-mode derivatives know no autograd.Function
        return x + (_round_activations(x) - x).detach()
    return _FakeQuantizeActivations.apply(x)


def _round_activations(x):
    f = x.float()
    low, high = f.amin(-1, keepdim=True).clamp(max=0), f.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny)
    zero_point = (-low / scale).round()
    q = ((f / scale).round() + zero_point).clamp(0, 255)
    return ((q - zero_point) * scale).to(x.dtype)


class _FakeQuantizeActivations(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return _round_activations(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


# -----------------------------------------------------------------------------
# Layers for training: float weights that every forward pass fake-quantizes


class _WithUnit(nn.Module):
    """A module with a unit that keeps its dtype in .half() and .bfloat16(), because a cast of the unit would change
    every weight. It takes the dtype of a state_dict's unit. The metadata of a state_dict names the grid, because the codes
    of one grid are other weights in another."""

    unit: torch.Tensor
    config: PoTConfig

    def _apply(self, fn, recurse=True):
        before = {n: b for n, b in self._buffers.items() if b is not None and b.is_floating_point() and n != "_like"}
        super()._apply(fn, recurse)
        for name, b in before.items():
            if self._buffers[name].dtype != b.dtype:
                self._buffers[name] = b.to(self._buffers[name].device)
        return self

    def _grid(self):
        c = self.config
        return f"{c.grid}, {c.bits} bits, {c.terms} terms, {len(c.levels())} levels"

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["grid"] = self._grid()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if prefix + "unit" in state_dict:
            dtype = state_dict[prefix + "unit"].dtype
            self.unit = self.unit.to(dtype if dtype == torch.float16 else torch.float32)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        grid, errors = local_metadata.get("grid", self._grid()), args[-1]
        if grid != self._grid():
            errors.append(f"{prefix[:-1]} holds codes of the grid {grid}, but this layer has {self._grid()}")


class PoTQuantizer(_WithUnit):
    """Config and unit of a weight. Layers that share a weight share this object.

    enabled=False makes the layer compute with its float weight and inputs. convert packs it all the same.
    """

    minmax: torch.Tensor

    def __init__(self, weight: torch.Tensor, config: PoTConfig):
        super().__init__()
        self.config = config
        self.enabled = True
        self.register_buffer("unit", compute_unit(weight, config))
        if config.grid == "paper":
            self.register_buffer("minmax", torch.stack(weight.detach().float().aminmax()))

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        """Fake-quantized w (out, in)."""
        if not self.enabled:
            return w
        if self.config.grid == "paper" and self.training:
            self._observe(w.detach())
        return fake_quantize(w, self.unit, self.config)

    def rows(self, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Fake-quantizes rows (*index.shape, in), which are the rows `index` of a weight."""
        if not self.enabled:
            return rows
        unit = self.unit if len(self.unit) == 1 else self.unit[index.flatten()]
        return fake_quantize(rows.reshape(-1, rows.shape[-1]), unit, self.config).view(rows.shape)

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        """Layer inputs x (..., in), in 8 bits if the config says so."""
        return fake_quantize_activations(x) if self.enabled and self.config.act_bits else x

    def _observe(self, w):
        # torch's moving-average observer with its default constant, which the papers keep running during training. It
        # makes new tensors because a later backward pass may still need the old ones.
        self.minmax = self.minmax.lerp(torch.stack(w.float().aminmax()), 0.01)
        self.unit = (self.minmax.abs().amax() / self.config.top).clamp(min=self.config.eps).view(1, 1)

    def extra_repr(self):
        return str(self.config)


class PoTLinear(nn.Linear):
    """nn.Linear whose forward quantizes the weight to signed exponents (or to another grid of PoTConfig).

    weight (out, in) and bias (out) are nn.Linear's. The unit is computed once: here, from the random weight, or in
    `prepare`, which turns an existing nn.Linear into this class. So load weights first, then prepare.
    """

    def __init__(
        self, in_features: int, out_features: int, bias=True, device=None, dtype=None, config: PoTConfig = PoTConfig()
    ):  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        check_weight("PoTLinear", self.weight, config)
        self.quantizer = PoTQuantizer(self.weight, config)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(self.quantizer.inputs(input), self.quantizer(self.weight), self.bias)


class PoTConv1D(nn.Module):
    """`prepare` turns transformers' Conv1D into this class: a linear layer that keeps its weight as (in, out)."""

    weight: nn.Parameter
    bias: nn.Parameter
    quantizer: PoTQuantizer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.quantizer.inputs(x), self.quantizer(self.weight.t()), self.bias)


class PoTEmbedding(nn.Embedding):
    """nn.Embedding with a quantized table (num, dim). A forward pass quantizes only the rows that it reads."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, device=None, dtype=None,
        config: PoTConfig = PoTConfig(),
    ):  # fmt: skip
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        check_weight("PoTEmbedding", self.weight, config)
        self.quantizer = PoTQuantizer(self.weight, config)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.quantizer.rows(super().forward(input), input)


# -----------------------------------------------------------------------------
# Packing: codes `sign << (bits - 1) | index` of a matrix (rows, n)
#
# At 3, 4 and 8 bits, codes lie in tiles of 16 rows, for vector instructions: a vector of 64 bytes holds 4 bytes of each
# row. pot_kernel/pot.cpp describes the tiles. Units follow the tiles: (rows / 16, groups, 16). At other widths each row
# is a little-endian bit stream, padded to whole bytes. A file says which layout it has.

_TILE_COLUMNS = {3: 32, 4: 8, 8: 4}  # bits: columns of a tile


def _layout(bits):
    return "tiles-16" if bits in _TILE_COLUMNS else "stream"


def _codes_shape(rows, n, bits):
    if bits not in _TILE_COLUMNS:
        return rows, -(-n * bits // 8)
    width = _TILE_COLUMNS[bits]
    return -(-rows // 16), -(-n // width) * 2 * width * bits  # 16 rows of `width` codes


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes (rows, n) uint8 below 2**bits -> uint8: (rows, ceil(n * bits / 8)), or (ceil(rows / 16), bytes) in tiles."""
    rows, n = codes.shape
    if bits not in _TILE_COLUMNS:
        codes = F.pad(codes, (0, -n % 8)).view(rows, -(-n // 8), 8).long()  # 8 codes fill `bits` bytes
        words = (codes << (bits * torch.arange(8, device=codes.device))).sum(-1, keepdim=True)
        packed = words >> (8 * torch.arange(bits, device=codes.device)) & 255
        return packed.to(torch.uint8).flatten(1)[:, : -(-n * bits // 8)].contiguous()
    width = _TILE_COLUMNS[bits]
    codes = F.pad(codes, (0, -n % width, 0, -rows % 16))
    tiles = codes.unflatten(1, (-1, width // 4, 4)).unflatten(0, (-1, 16)).permute(0, 2, 3, 1, 4)  # (.., quads, 16, 4)
    if bits == 8:  # the level as a signed byte
        tiles = torch.where(tiles > 127, 128 - tiles, tiles)  # modulo 256
    elif bits == 4:
        tiles = tiles[:, :, 0] | tiles[:, :, 1] << 4
    else:
        low, high = (tiles & 3).unflatten(2, (2, 4)), tiles >> 2
        parts = [sum(low[:, :, i, j] << 2 * j for j in range(4)) for i in range(2)]
        tiles = torch.stack([*parts, sum(high[:, :, j] << j for j in range(8))], dim=2)
    return tiles.to(torch.uint8).flatten(1).contiguous()


def unpack_codes(packed: torch.Tensor, bits: int, shape: tuple[int, int]) -> torch.Tensor:
    """The inverse of pack_codes -> codes (rows, n) = shape, uint8; code 128 of 8 bits, minus zero, becomes 0. Raises
    TypeError for packed codes of another dtype, whose signs would become bits."""
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed codes are {packed.dtype}, and must be torch.uint8")
    rows, n = shape
    if bits not in _TILE_COLUMNS:
        packed = F.pad(packed, (0, -packed.shape[1] % bits)).view(rows, -(-n // 8), bits).long()
        words = (packed << (8 * torch.arange(bits, device=packed.device))).sum(-1, keepdim=True)
        codes = words >> (bits * torch.arange(8, device=packed.device)) & (2**bits - 1)
        return codes.to(torch.uint8).flatten(1)[:, :n]
    tiles = packed.unflatten(1, (-1, 16, 4))  # (blocks, vectors, 16, 4)
    if bits == 8:
        tiles = torch.where(tiles > 127, 128 - tiles, tiles)
    elif bits == 4:
        tiles = torch.stack([tiles & 15, tiles >> 4], dim=2).flatten(1, 2)
    else:
        vectors = tiles.unflatten(1, (-1, 3))
        low = [vectors[:, :, j // 4] >> 2 * (j % 4) & 3 for j in range(8)]
        tiles = torch.stack([v | (vectors[:, :, 2] >> j & 1) << 2 for j, v in enumerate(low)], dim=2).flatten(1, 2)
    return tiles.permute(0, 2, 1, 3).flatten(0, 1).flatten(1)[:rows, :n]


def _pack_unit(unit, bits):
    """(rows, groups) -> (ceil(rows / 16), groups, 16), if the codes lie in tiles and rows have units of their own."""
    if bits not in _TILE_COLUMNS or len(unit) == 1:
        return unit.contiguous()
    rows = torch.arange(len(unit) + -len(unit) % 16, device=unit.device).clamp(max=len(unit) - 1)
    return unit[rows].unflatten(0, (-1, 16)).transpose(1, 2).contiguous()


def _has_derivative(x):
    """Does autograd follow x, backward or forward? The kernel computes no derivatives."""
    if torch.is_grad_enabled() and x.requires_grad:
        return True
    return not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None


def _in_transform(*tensors):
    """Does torch.func, a trace or a mode of torch look at every operation, or is a tensor a wrapper of others? Then the
    kernel cannot replace operations, or finds no memory to read."""
    return not torch.compiler.is_compiling() and (
        torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or any(torch._C._dispatch_keys(t).has(torch._C.DispatchKey.Python) for t in tensors)
    )


class PackedWeight(_WithUnit):
    """Codes and units of a weight (out, in). Layers that share a weight share this object.

    codes: a result of pack_codes, uint8; unit: (1, groups), (out, groups), or (ceil(out / 16), groups, 16) where codes
    lie in tiles and rows have units of their own; shape: (out, in); dtype: that of the unpacked weight.
    on_kernel: pot_kernel multiplies by this weight where its inputs are on the CPU; on_triton: its Triton kernels do, on
    a GPU.
    """

    codes: torch.Tensor
    _like: torch.Tensor
    _table: torch.Tensor
    _row_sums: torch.Tensor | None

    def __init__(
        self, codes: torch.Tensor, unit: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype, config: PoTConfig
    ):
        super().__init__()
        (self.out_features, self.in_features), self.config = shape, config
        self.int8_activations = False  # see allow_int8_activations
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("unit", unit.contiguous())
        self.register_buffer("_like", codes.new_empty(0, dtype=dtype), persistent=False)  # .half() changes the dtype
        self.register_buffer("_table", config.table().to(codes.device), persistent=False)
        self.register_buffer("_row_sums", None, persistent=False)
        self._refresh()

    def _refresh(self):
        """Computes what follows from codes and unit, which may be new: moved, loaded, or unpickled on this machine."""
        device, config = self.codes.device, self.config
        self._like = torch.empty(0, dtype=self.dtype, device=device)
        self._table = config.table().to(device)
        self.on_kernel = (
            config.bits in _TILE_COLUMNS and device.type == "cpu"
            and pot_kernel is not None and pot_kernel.load() is not None
        )  # fmt: skip
        self.on_triton = config.bits == 4 and pot_kernel is not None and pot_kernel.load_triton(device) is not None
        self._kernel_weight = self._row_sums = None
        if self.on_kernel and config.act_bits:  # the part of integer sums that belongs to the zero point
            self._row_sums = pot_kernel.row_sums(self.kernel_weight())
            self._kernel_weight = None

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._refresh()
        return self

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self._refresh()

    def __getstate__(self):
        return self.__dict__ | {"_kernel_weight": None}  # it holds pointers

    def __setstate__(self, state):
        super().__setstate__(state)
        self._refresh()

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.out_features, self.in_features

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the unpacked weight."""
        return self._like.dtype

    @classmethod
    def from_codes(
        cls, codes: torch.Tensor, unit: torch.Tensor, dtype: torch.dtype, config: PoTConfig
    ) -> "PackedWeight":
        """codes (out, in) uint8; unit (1, 1), (out, 1) or (out, groups)."""
        rows, columns = codes.shape
        return cls(pack_codes(codes, config.bits), _pack_unit(unit, config.bits), (rows, columns), dtype, config)

    @classmethod
    @torch.no_grad()
    def pack(cls, w: torch.Tensor, unit: torch.Tensor, config: PoTConfig) -> "PackedWeight":
        """w (out, in) float; unit is a result of compute_unit."""
        levels = torch.tensor(config.levels(), dtype=torch.float32, device=w.device)
        codes = []
        for u, b in row_blocks(unit, w):
            level = config.round_(b.float() / u).flatten(1)
            index = torch.searchsorted(levels, level.abs().contiguous())
            codes.append(torch.where(level < 0, index + 2 ** (config.bits - 1), index).to(torch.uint8))
        return cls.from_codes(torch.cat(codes), unit, w.dtype, config)

    def forward(self, index: torch.Tensor | None = None) -> torch.Tensor:
        """The weight (out, in) in its dtype, or only its rows `index` (an int tensor): (*index.shape, in)."""
        if index is not None:
            if index.device != self.codes.device:
                raise RuntimeError(
                    f"the index is on {index.device}, the table on {self.codes.device}: move one of them"
                )
            if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
                raise TypeError(f"an index of {index.dtype}: rows are looked up by integers")
        traced = _in_transform(*(() if index is None else (index,)))
        if self.on_kernel and not (traced or torch.compiler.is_compiling()):
            return pot_kernel.unpack(self.kernel_weight(), index).to(self.dtype)
        codes, unit, bits, rows = self.codes, self.unit, self.config.bits, self.out_features
        if unit.dim() == 3:  # tiles
            unit = unit.transpose(1, 2).flatten(0, 1)[:rows]
        if index is not None:
            flat = index.flatten().long()
            # F.embedding checks the range. Behind the last row a tile has padding.
            unit, rows = F.embedding(flat, unit.expand(rows, -1)), flat.numel()  # len() would fix it in a graph
            if bits in _TILE_COLUMNS:  # a block of one row, 16 times
                lanes = codes.unflatten(1, (-1, 16, 4))[flat // 16, :, flat % 16]
                codes = F.pad(lanes.unsqueeze(2), (0, 0, 0, 15)).flatten(1)
                codes = unpack_codes(codes, bits, (16 * rows, self.in_features))[::16]
            else:
                codes = unpack_codes(codes[flat], bits, (rows, self.in_features))
        else:
            codes = unpack_codes(codes, bits, self.shape)
        if traced:  # vmap has no out=
            blocks = [(self._table[c.int()] * u).to(self.dtype).flatten(1) for u, c in row_blocks(unit, codes)]
            out = torch.cat(blocks)
        else:
            out = self._like.new_empty(rows, self.in_features)
            for u, c, o in row_blocks(unit, codes, out):
                torch.mul(self._table[c.int()], u, out=o)
        return out if index is None else out.view(*index.shape, self.in_features)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """F.linear of x (..., in) with this weight, with inputs of 8 bits if the config says so -> (..., out).

        The kernel sums in float32, and in another order than PyTorch.
        """
        tensors = (x,) if bias is None else (x, bias)
        if (
            not (self.on_kernel or self.on_triton) or x.dtype not in (torch.float32, torch.bfloat16, torch.float16)
            or x.is_nested or x.layout != torch.strided or x.shape[-1:] != (self.in_features,)
            or bias is not None and (bias.shape != (self.out_features,) or not bias.is_floating_point())
            or _in_transform(*tensors)
            or any(t.device != self.codes.device or _has_derivative(t) for t in tensors)
        ):  # fmt: skip
            return F.linear(fake_quantize_activations(x) if self.config.act_bits else x, self(), bias)
        if self.on_triton:
            return self._linear_by_triton(fake_quantize_activations(x) if self.config.act_bits else x, bias)
        # resolve_neg comes first: PyTorch's conversion of a negated view from float16 to float32 loses the sign.
        bias = None if bias is None else bias.resolve_neg().float().contiguous()
        f = x.resolve_neg().float()
        if torch.compiler.is_compiling():
            weight = self.codes, self.unit, self._row_sums, self.config.code_levels(), self.out_features
            y = torch.ops.nanopot.linear(f, *weight, self.config.bits, self.activations, bias)
        else:
            y = pot_kernel.linear(self.kernel_weight(), f, bias)
        return y.to(x.dtype)

    def _linear_by_triton(self, x, bias):
        bias = None if bias is None else bias.resolve_neg().to(x.dtype).contiguous()
        levels = self.config.code_levels()
        if torch.compiler.is_compiling():
            return torch.ops.nanopot.linear(x, self.codes, self.unit, None, levels, self.out_features, 4, 0, bias)
        kernel = pot_kernel.load_triton(x.device)
        return kernel.linear(x, self.codes, self.unit, levels, self.out_features, bias)

    @property
    def activations(self) -> int:
        """How pot_kernel takes layer inputs: 0: float32; 1: 8 bits, per token; 2: 8 bits, per 64 features."""
        return 1 if self.config.act_bits else 2 if self.int8_activations else 0

    def kernel_weight(self) -> Any:
        """This weight as a pot_kernel.Weight, where on_kernel is true. It is kept: making it takes as long as a product."""
        kept = self._kernel_weight
        # load_state_dict(assign=True) and `.data =` put other tensors in place of these.
        if kept is None or kept.key != (self.codes.data_ptr(), self.unit.data_ptr(), self.activations):
            self._kernel_weight = kept = pot_kernel.Weight(
                self.codes, self.unit, self._row_sums, self.shape, self.config.bits, self.config.code_levels(),
                self.activations,
            )  # fmt: skip
        return kept

    def extra_repr(self):
        return f"{self.shape}, {self.config}"


class PackedPoTLinear(nn.Module):
    """A linear layer that holds its weight as codes."""

    def __init__(self, packed: PackedWeight, bias: torch.Tensor | None):
        super().__init__()
        self.packed = packed
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        return self.packed()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.packed.linear(input, self.bias)


class PackedPoTEmbedding(nn.Module):
    """An embedding that holds its table as codes and unpacks the rows that it looks up."""

    def __init__(self, packed: PackedWeight):
        super().__init__()
        self.packed = packed

    @property
    def weight(self) -> torch.Tensor:
        return self.packed()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.packed(input)


def allow_int8_activations(model: nn.Module) -> None:
    """Lets a packed model round layer inputs to 8 bits, with a scale for each 64 features of a token, where pot_kernel
    multiplies. Decoding and prompts are faster. results/speed.md says how little the loss changes."""
    for module in model.modules():
        if isinstance(module, PackedWeight):
            module.int8_activations = True


# -----------------------------------------------------------------------------
# prepare, convert

Filter = Callable[[nn.Module, str], bool | PoTConfig]
PreparedLayer = PoTLinear | PoTConv1D | PoTEmbedding


def is_prepared(module: nn.Module) -> TypeGuard[PreparedLayer]:
    """Is it a layer that prepare made?"""
    return isinstance(module, PreparedLayer)


def _is_conv1d(module):
    # transformers' Conv1D, recognized by its interface: weight (in, nf), bias (nf)
    w, nf = getattr(module, "weight", None), getattr(module, "nf", None)
    return isinstance(nf, int) and isinstance(w, nn.Parameter) and w.ndim == 2 and w.shape[1] == nf


def _prepared_class(module):
    # Subclasses are left alone: they may read their weight without calling forward (nn.MultiheadAttention's does).
    if type(module) in (nn.Linear, nn.Embedding):
        return PoTLinear if type(module) is nn.Linear else PoTEmbedding
    return PoTConv1D if _is_conv1d(module) and not is_prepared(module) else None


def weight_matrix(module: nn.Module) -> torch.Tensor:
    """The weight of a layer as (out, in)."""
    w: Any = module.weight
    return w.t() if _is_conv1d(module) else w


def check_parameter(name: str, module: nn.Module) -> None:
    """Raises ValueError for a layer whose weight hooks compute before each call: a change of it would be lost."""
    if "weight" not in module._parameters:
        raise ValueError(
            f"{name}: its weight is computed before each call (weight_norm, spectral_norm or pruning): make it a Parameter "
            "first, for instance by torch.nn.utils.remove_weight_norm or prune.remove"
        )


def check_weight(name: str, w: torch.Tensor, config: PoTConfig) -> None:
    """Raises ValueError for a weight (out, in) that config cannot quantize. name is for the message."""
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

    The layers keep their Parameters, so an optimizer that holds them stays valid. Returns the names of the layers.
    filter_fn(module, name) returns False (leave it), True, or a PoTConfig for this layer. A warning says if no layer is
    left. Grid "paper" leaves embeddings in float, as the papers' code does. On a meta model no unit is computed;
    load_state_dict brings the units. Code that reads layer.weight without calling the layer gets the float weight.

    Raises ValueError, and changes nothing, for a weight that is empty, holds NaN or inf, or does not divide into
    groups, and for layers that share a weight but not a config.
    """
    quantizers = {id(m.weight): m.quantizer for m in model.modules() if is_prepared(m)}
    layers, registered = [], set(quantizers.values())
    for name, module in model.named_modules():
        cls = _prepared_class(module)
        choice = cls is not None and (True if filter_fn is None else filter_fn(module, name))
        if not choice:
            continue
        layer_config = choice if isinstance(choice, PoTConfig) else config
        if layer_config.grid == "paper" and cls is PoTEmbedding:
            continue
        shown = name or type(module).__name__
        if getattr(module, "max_norm", None) is not None:
            raise ValueError(
                f"{shown}: an embedding with max_norm rescales its table while it runs: leave it out by filter_fn"
            )
        check_parameter(shown, module)
        w = weight_matrix(module)
        if id(module.weight) not in quantizers:
            check_weight(shown, w, layer_config)
            quantizers[id(module.weight)] = PoTQuantizer(w, layer_config)
        quantizer = quantizers[id(module.weight)]
        if quantizer.config != layer_config:
            raise ValueError(
                f"{shown}: shares its weight with another layer, which has another PoTConfig: give both the same"
            )
        layers.append((name, module, cls, quantizer))
    if not quantizers:
        warnings.warn(
            "no layer was quantized: the model has none, or filter_fn(module, name) left all out", stacklevel=2
        )
    for _, module, cls, quantizer in layers:
        module.__class__ = cls  # a new module would lose hooks, training mode and other attributes
        module.quantizer = quantizer
        if quantizer in registered:
            _unregister(module, "quantizer")
        registered.add(quantizer)
        # The fast path of nn.TransformerEncoderLayer reads weights without calling forward. A hook disables it.
        module.register_forward_pre_hook(_no_fast_path)
    return [name for name, *_ in layers]


def _no_fast_path(module, inputs):
    return None


def _unregister(layer, child):
    # A child that layers share is registered in the first of them alone. A state_dict then holds its tensors once;
    # safetensors, Trainer and others refuse to save tensors that share memory.
    vars(layer)[child] = layer._modules.pop(child)


@torch.no_grad()
def convert(model: nn.Module) -> nn.Module:
    """Replaces prepared layers by packed ones, in place. Returns model, or a new module if model is itself a layer.

    Raises ValueError, and changes nothing, if a weight holds NaN or inf.
    """
    packed, layers = {}, {}
    for name, module in model.named_modules():
        if is_prepared(module):
            check_parameter(name or type(module).__name__, module)
            w, q = weight_matrix(module), module.quantizer
            key = id(q), id(module.weight)  # both, because a tie may have been cut since
            shared = key in packed
            if not shared:
                check_weight(name or type(module).__name__, w, q.config)
                packed[key] = PackedWeight.pack(w, q.unit, q.config)
            p = packed[key]
            layer = PackedPoTEmbedding(p) if isinstance(module, PoTEmbedding) else PackedPoTLinear(p, module.bias)
            if shared:
                _unregister(layer, "packed")
            layers[module] = layer.train(module.training)
    return _replace(model, layers)


def _replace(model, layers):
    if model in layers:
        return layers[model]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children lists a shared module only once
            if child in layers:
                setattr(parent, name, layers[child])
    return model


def quantize_(model: nn.Module, config: PoTConfig = PoTConfig(), filter_fn: Filter | None = None) -> nn.Module:
    """Post-training quantization by rounding to the nearest level: prepare, then convert."""
    prepare(model, config, filter_fn)
    return convert(model)


# -----------------------------------------------------------------------------
# State: the content of a packed model's file


def packed_state(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict]:
    """Converted model -> (tensors by name, metadata for json). A shared tensor is in `tensors` once, then in aliases."""
    _register_shared(model)
    tensors, aliases = {}, {}
    names: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first = names.setdefault(id(tensor), name)
        if first == name:
            tensors[name] = tensor.detach()
        else:
            aliases[name] = first
    configs, layers = [], {}
    owners: dict[PackedWeight, str] = {}
    for name, module in model.named_modules():
        if is_prepared(module):
            raise ValueError(f"{name or 'the model'} is prepared, not packed: call convert first")
        if isinstance(module, (PackedPoTLinear, PackedPoTEmbedding)):
            p = module.packed
            first = owners.setdefault(p, name)
            if first != name:
                aliases |= {f"{name}.packed.{part}": f"{first}.packed.{part}" for part in ("codes", "unit")}
            if p.config not in configs:
                configs.append(p.config)
            layers[name] = {
                "shape": list(p.shape),
                "dtype": str(p.dtype).removeprefix("torch."),
                "config": configs.index(p.config),
            }
    written = [asdict(c) | {"layout": _layout(c.bits)} for c in configs]
    return tensors, {"configs": written, "layers": layers, "aliases": aliases}


def _register_shared(model):
    # The layer that a shared weight is registered in may have left the model. The next layer takes it then.
    registered = set(model.modules())
    for module in model.modules():
        if isinstance(module, (PackedPoTLinear, PackedPoTEmbedding)) and module.packed not in registered:
            registered.add(module.packed)
            module._modules["packed"] = vars(module).pop("packed")


def load_packed(model: nn.Module, tensors: dict[str, torch.Tensor], metadata: dict) -> nn.Module:
    """Turns model (the float model's structure) into the packed model of packed_state. Returns it as convert does.

    On a meta model (built under `torch.device("meta")`) no float copy of a quantized weight ever exists. Raises
    ValueError if tensors, metadata and model do not fit together.
    """
    layers, aliases = _read_metadata(metadata)
    modules, packed, replaced = dict(model.named_modules()), {}, {}
    shared = set()
    for name, (rows, columns), dtype, config in layers:
        module = modules.get(name)
        cls = None if module is None else _prepared_class(module)
        if module is None or cls is None or weight_matrix(module).shape != (rows, columns):
            raise ValueError(
                f"{name}: the file holds a packed layer of shape ({rows}, {columns}), the model does not: build the model "
                "with the file's settings"
            )
        own = f"{name}.packed.codes"
        key = aliases.get(own, own)
        if key not in packed:
            packed[key] = _empty_packed(name, rows, columns, dtype, config)
        p = packed[key]
        if (p.shape, p.config, p.dtype) != ((rows, columns), config, dtype):
            raise ValueError(f"{name} shares {key}, which is of another shape or config: the file is damaged")
        layer = PackedPoTEmbedding(p) if cls is PoTEmbedding else PackedPoTLinear(p, module.bias)
        if key != own:
            _unregister(layer, "packed")
            shared |= {own, f"{name}.packed.unit"}
        replaced[module] = layer.train(module.training)
    model = _replace(model, replaced)
    for alias, target in aliases.items():
        if target not in tensors:
            raise ValueError(f"{target}, which {alias} shares, is missing: the file is incomplete or of another model")
    aliases = {alias: target for alias, target in aliases.items() if alias not in shared}
    tensors = tensors | {alias: tensors[target] for alias, target in aliases.items()}
    for name, t in model.state_dict(keep_vars=True).items():
        if name in tensors:
            _check_tensor(name, tensors[name], t)
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as e:
        message = " ".join(str(e).split())
        raise ValueError(f"the file is incomplete or of another model: {message[:500]}") from None
    for alias, target in aliases.items():  # assigning cuts ties
        (a, leaf), (t, target_leaf) = (n.rpartition(".")[::2] for n in (alias, target))
        setattr(model.get_submodule(a), leaf, getattr(model.get_submodule(t), target_leaf))
    compute_buffers = getattr(model, "_init_weights", None)
    for module in model.modules():
        meta = {n: b for n, b in module.named_buffers(recurse=False) if b.is_meta and b.is_floating_point()}
        if compute_buffers and meta and not list(module.parameters(recurse=False)):  # anew, as Llama's inv_freq
            module._buffers.update({n: torch.full_like(b, torch.nan, device="cpu") for n, b in meta.items()})
            compute_buffers(module)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta or name not in tensors and tensor.is_floating_point() and tensor.isnan().any():
            raise ValueError(
                f"{name} is no part of a state_dict, so a meta model cannot get it from a file: build the model without meta"
            )
    return model


def _read_metadata(metadata):
    """Checked metadata: ([(name, shape, dtype, config) of each packed layer], {alias: target})."""
    try:
        configs = []
        for c in metadata["configs"]:
            config = PoTConfig(**{k: v for k, v in c.items() if k != "layout"})
            if c["layout"] != _layout(config.bits):
                raise ValueError(f"unknown layout {c['layout']!r}: this file was written by another version of pot.py")
            configs.append(config)
        layers, aliases = [], dict(metadata["aliases"])
        for name, layer in metadata["layers"].items():
            (rows, columns), dtype = layer["shape"], getattr(torch, layer["dtype"])
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                raise TypeError(f"the dtype of {name} is {layer['dtype']}")
            if type(rows) is not int or type(columns) is not int:
                raise TypeError(f"the shape of {name} is {layer['shape']}")
            layers.append((name, (rows, columns), dtype, configs[layer["config"]]))
        if not all(isinstance(name, str) for pair in aliases.items() for name in pair):
            raise TypeError(f"aliases must be names, not {aliases}")
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        raise ValueError(f"the metadata of this packed model is incomplete or damaged: {e!r}") from None
    return layers, aliases


def _empty_packed(name, rows, columns, dtype, config):
    """A PackedWeight without memory, for load_state_dict to fill."""
    if config.granularity == "group" and columns % config.group_size:
        raise ValueError(
            f"{name}: groups of {config.group_size} do not divide the {columns} input features: the file is damaged"
        )
    w = torch.empty(rows, columns, dtype=dtype, device="meta")
    codes = w.new_empty(_codes_shape(rows, columns, config.bits), dtype=torch.uint8)
    unit = compute_unit(w, config)
    if (
        len(unit) > 1 and config.bits in _TILE_COLUMNS
    ):  # the shape of _pack_unit; its operations would import the compiler
        unit = unit.new_empty(len(codes), unit.shape[1], 16)
    return PackedWeight(codes, unit, (rows, columns), dtype, config)


def _check_tensor(name, tensor, expected):
    """Checks what load_state_dict(assign=True) does not: dtype, memory layout, and that units are positive numbers."""
    if tensor.shape != expected.shape:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)}, expected {tuple(expected.shape)}: the file is damaged or of another model"
        )
    is_unit = name.endswith(".packed.unit")
    if is_unit:
        fits = tensor.dtype in (torch.float16, torch.float32)
    elif expected.is_floating_point():
        fits = tensor.is_floating_point()
    else:
        fits = tensor.dtype == expected.dtype
    if not fits:
        raise ValueError(
            f"{name} is {tensor.dtype}, expected {expected.dtype}: the file is damaged or of another model"
        )
    if ".packed." in name and not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous: pass tensors as packed_state and safetensors give them")
    if is_unit:
        low, high = tensor.aminmax()  # NaN if there is one
        if not (low > 0 and high < torch.inf):
            raise ValueError(f"{name} holds a value that is no positive number: the file is damaged")
