"""
Products of packed 4-bit weights on a GPU, in Triton. NANOPOT_KERNEL=triton asks for them: they were tested by Triton's
interpreter (TRITON_INTERPRET=1, on a CPU) and compiled for GPUs, but have never run on one, so nobody knows how fast they
are.

Codes and units stay as a CPU has them; pot.cpp describes the tiles. A word of 32 bits has 8 columns of a row of the
weight. The next word in memory belongs to the next row, so neighbouring threads read neighbouring words.

A code needs no table, because its index (the low 3 bits) is a small float. Placed at the right bits of a float16, with
the code's sign at the sign bit, it is the level times a power of two:
    single powers   the index is the exponent: level * 2^-14, and 0 stays 0
    two terms       2 bits of exponent, 1 of mantissa (FP4 E2M1): level * 2^-15
    uniform         the mantissa of a number below 2^-14: level * 2^-17
So some integer operations decode two codes of a word at once. Units must be below 2^111, because they take the factor.

One row of x multiplies and adds in float32. More rows use tensor cores, for which a weight is rounded to x's dtype, as
unpacking does; sums are float32. Few rows and a small weight give too few programs to fill a GPU. Then each program sums
a part of the columns, and `_add_parts` adds the parts in a fixed order, so a result is the same every time.
"""

import functools
import warnings

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import address

GRIDS = {  # non-negative levels: bit of a float16 to which an index moves, and the factor that makes it the level
    (0, 1, 2, 4, 8, 16, 32, 64): (10, 2.0**14),
    (0, 1, 2, 3, 4, 6, 8, 12): (9, 2.0**15),
    (0, 1, 2, 3, 4, 5, 6, 7): (7, 2.0**17),
}
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def _decode(words, BIT: tl.constexpr, PLACE: tl.constexpr, TOP: tl.constexpr):
    """(level / factor) of the codes at bits BIT and BIT + 16 of words: uint32 -> two float32 of the same shape."""
    index = (words >> BIT) & 0x00070007
    if TOP < 7:  # a narrowed range: indices without a level read as the top level
        index = tl.minimum(index & 7, TOP) | (tl.minimum(index >> 16, TOP) << 16)
    halves = (index << PLACE) | ((words << (12 - BIT)) & 0x80008000)
    low = (halves & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    high = (halves >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit(do_not_specialize=["m", "steps"])
def _product(
    x, codes, unit, bias, y, m, n, columns, vectors, groups, x_stride, steps, factor,
    GROUP: tl.constexpr, PER_ROW: tl.constexpr, PLACE: tl.constexpr, TOP: tl.constexpr, DOT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """x (m, columns) times the weight (n, columns), plus bias (n) or None -> y (parts, m, n). A program takes BM rows of
    x, BN rows of the weight, and `steps` times BV vectors of 8 columns, which make a part.

    codes: int32 (blocks, vectors, 16); unit: (1, groups), or (blocks, groups, 16) if PER_ROW; GROUP: columns that share
    a unit, 0 for all; DOT: dtype of tl.dot's inputs; the others are as in `_decode` and GRIDS.
    """
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    out = tl.program_id(0) * BN + tl.arange(0, BN)
    exists = (out < tl.cdiv(n, 16) * 16)[None, :]  # in memory; rows of padding are not stored
    x_row = x + rows[:, None].to(tl.int64) * x_stride
    code_row = codes + (out // 16 * vectors * 16 + out % 16)[None, :]
    unit_row = unit + ((out // 16 * groups * 16 + out % 16) if PER_ROW else out * 0)[None, :]
    unit_stride: tl.constexpr = 16 if PER_ROW else 1
    total = tl.zeros((BV if BM == 1 else BM, BN), tl.float32)
    first = tl.program_id(2) * steps
    for step in range(first, first + steps):
        v = step * BV + tl.arange(0, BV)
        inside = (v < vectors)[:, None] & exists
        words = tl.load(code_row + v[:, None] * 16, mask=inside, other=0).to(tl.uint32, bitcast=True)
        if GROUP % 8 == 0:  # a vector is in one group
            group = (8 * v // GROUP if GROUP else v * 0)[:, None]
            u = tl.load(unit_row + group * unit_stride, mask=inside, other=0).to(tl.float32) * factor
        for pair in tl.static_range(4):
            low, high = _decode(words, 4 * pair, PLACE, TOP)
            for half in tl.static_range(2):
                # byte b of a word has column b in the low half and column 4 + b in the high half
                column = 8 * v + (pair // 2 + 2 * half + 4 * (pair % 2))
                if GROUP % 8 != 0:
                    known = (column < columns)[:, None] & exists
                    group = (column // GROUP)[:, None]
                    u = tl.load(unit_row + group * unit_stride, mask=known, other=0).to(tl.float32) * factor
                weight = (low if half == 0 else high) * u
                mask = (rows < m)[:, None] & (column < columns)[None, :]
                part = tl.load(x_row + column[None, :], mask=mask, other=0)
                if BM == 1:
                    total += tl.trans(part).to(tl.float32) * weight
                else:
                    weight = weight.to(x.dtype.element_ty).to(DOT)
                    total = tl.dot(part.to(DOT), weight, total, input_precision="ieee")
    if BM == 1:
        total = tl.sum(total, axis=0)[None, :]
    if bias is not None:
        total += tl.load(bias + out, mask=out < n, other=0).to(tl.float32)[None, :]
    y_row = y + (tl.program_id(2) * m + rows)[:, None].to(tl.int64) * n
    tl.store(y_row + out[None, :], total.to(y.dtype.element_ty), mask=(rows < m)[:, None] & (out < n)[None, :])


@triton.jit(do_not_specialize=["size", "parts"])
def _add_parts(partial, bias, y, size, n, parts, BLOCK: tl.constexpr):
    """partial (parts, size) float32, summed over its parts, plus bias (n) or None -> y (size), of rows of n."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total += tl.load(partial + part * size + i, mask=i < size, other=0)
    if bias is not None:
        total += tl.load(bias + i % n, mask=i < size, other=0).to(tl.float32)
    tl.store(y + i, total.to(y.dtype.element_ty), mask=i < size)


@functools.cache
def _grid(levels):
    """(bit, factor) of GRIDS and the index of the top level, for the levels of all non-negative codes."""
    top = levels.index(levels[-1])
    return next((*place, top) for full, place in GRIDS.items() if full[: top + 1] == levels[: top + 1])


@functools.cache
def _processors(device):
    return 8 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def _launch(x, words, unit, levels, rows, bias):
    """The kernels' part of `linear`: x (m, columns), words int32 (blocks, vectors, 16) -> (m, rows)."""
    (m, columns), vectors, groups = x.shape, words.shape[1], unit.shape[1]
    bit, factor, top = _grid(tuple(levels[:8]))
    # Not tuned: no GPU was at hand. In float32, 64 rows, or stages, need too much shared memory.
    bm, bn, bv = (1 if m == 1 else 16 if m <= 16 or x.dtype == torch.float32 else 64), 64, 32
    tiles, steps = triton.cdiv(rows, bn) * triton.cdiv(m, bm), triton.cdiv(vectors, bv)
    steps_per_part = triton.cdiv(steps, max(1, 4 * _processors(x.device) // tiles))
    parts = triton.cdiv(steps, steps_per_part)
    y = x.new_empty(m, rows)
    sums = y if parts == 1 else x.new_empty(parts, m, rows, dtype=torch.float32)
    # The interpreter multiplies bfloat16's bits as if they were integers.
    dot = tl.float32 if INTERPRETED or x.dtype == torch.float32 else getattr(tl, str(x.dtype).split(".")[1])
    with torch.cuda.device_of(x):
        _product[triton.cdiv(rows, bn), triton.cdiv(m, bm), parts](
            x, words, unit, bias if parts == 1 else None, sums, m, rows, columns, vectors, groups, x.stride(0),
            steps_per_part, factor, GROUP=0 if groups == 1 else columns // groups, PER_ROW=unit.dim() == 3, PLACE=bit,
            TOP=top, DOT=dot, BM=bm, BN=bn, BV=bv, num_stages=1 if x.dtype == torch.float32 else 3,
        )  # fmt: skip
        if parts > 1:
            _add_parts[(triton.cdiv(m * rows, 1024),)](sums, bias, y, m * rows, rows, parts, BLOCK=1024)
    return y


_failed = False  # a kernel did not compile or start: do not try again


def linear(
    x: torch.Tensor, codes: torch.Tensor, unit: torch.Tensor, levels: list[int], rows: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """x (..., columns) float16, bfloat16 or float32 times a packed weight (rows, columns), plus bias (rows) -> (..., rows)
    in x's dtype.

    codes: uint8 tiles of 4 bits; unit: (1, groups), or (ceil(rows / 16), groups, 16), float16 or float32; levels: of all
    16 codes. Raises ValueError for tensors that do not fit or lie on another device than x. If a kernel does not
    compile, one warning says so, and PyTorch unpacks the weight, now and later.
    """
    global _failed
    columns, blocks = x.shape[-1], -(-rows // 16)
    groups = unit.shape[1] if unit.dim() > 1 else 1
    if not groups or columns % groups:
        raise ValueError(f"units {tuple(unit.shape)} do not fit a weight of {rows} rows and {columns} columns")
    address("codes", codes, (blocks, -(-columns // 8) * 64), torch.uint8, device=x.device)
    unit_shape = (blocks, groups, 16) if unit.dim() == 3 else (1, groups)
    address("unit", unit, unit_shape, torch.float16, torch.float32, device=x.device)
    floats = torch.float16, torch.bfloat16, torch.float32
    if bias is not None:
        address("bias", bias, (rows,), *floats, device=x.device)
    flat = x.resolve_neg().reshape(-1, columns)
    flat = flat if flat.stride(1) == 1 or columns == 1 else flat.contiguous()
    words = codes.clone() if codes.storage_offset() % 4 else codes
    words = words.view(torch.int32).view(blocks, -1, 16)
    if not len(flat):
        return x.new_empty(*x.shape[:-1], rows)
    if not _failed:
        try:
            return _launch(flat, words, unit, levels, rows, bias).view(*x.shape[:-1], rows)
        except torch.OutOfMemoryError:
            raise
        except Exception as e:  # of many types: no C compiler, an old GPU, too little shared memory
            _failed = True
            reason = (str(e).strip().splitlines() or [""])[0]
            warnings.warn(
                f"PyTorch unpacks packed weights, which is slow, because a Triton kernel fails ({type(e).__name__}: "
                f"{reason}): take NANOPOT_KERNEL=triton away to silence this",
                stacklevel=2,
            )
    return F.linear(x, unpack(words, unit, levels, (rows, columns)).to(x.dtype), None if bias is None else bias.to(x))


def unpack(words: torch.Tensor, unit: torch.Tensor, levels: list[int], shape: tuple[int, int]) -> torch.Tensor:
    """The weight (rows, columns) = shape, float32, by PyTorch: words int32 (blocks, vectors, 16)."""
    rows, columns = shape
    bits = torch.tensor([0, 8, 16, 24, 4, 12, 20, 28], device=words.device).view(8, 1)  # of columns 0 to 7
    table = torch.tensor(levels, dtype=torch.float32, device=words.device)
    level = table[(words.unsqueeze(2) >> bits) & 15]  # (blocks, vectors, 8, 16)
    level = level.permute(0, 3, 1, 2).flatten(0, 1).flatten(1)[:rows, :columns]
    unit = unit.transpose(1, 2).flatten(0, 1)[:rows] if unit.dim() == 3 else unit
    return (level.unflatten(1, (unit.shape[1], -1)) * unit.unsqueeze(2)).flatten(1)
