"""The steps of reference.py as Triton kernels: a whole bucket at a time, in two or three launches.

One launch covers all tensors of a bucket: it finds them in a table of addresses on the device, program_id(1) being the
tensor and program_id(0) the block within it.

    _advance      steps += 1 and their bias corrections, in float64
    _elementwise  dense: moments, transform and the write of the parameter, in one pass; or a part of these
    _fused        projected, small ranks (see FUSED_RANK): a program owns a row block of W (a column block, on the left)
                  with its rows of M and V; G is read once, W is read and written once
    _project      larger ranks, first half: R tile by tile, in whose epilogue the moments advance
    _apply        larger ranks, second half: back(N) tile by tile, in whose epilogue W is written
    _lengths      GradNormLoRP: the lengths and radial parts of rows, and Adam on these; then _project of the tangential
                  part, and _apply twice, the first time for the lengths that rows would come to
    _encode       a quantised tensor at a time: scales, codes and their rounding in one pass; _decode is its inverse
    _coded_adam   dense, or R that is there already, on quantised moments: decoded, advanced, coded again and W or N
                  written in one pass

Nothing here waits for the device, and a step can be captured in a CUDA graph. What these kernels do not cover is done
by the reference: projections on both sides, float64, and tensors that are not contiguous. What the cautious transform
keeps is counted by a launch before the one that writes; projected, it steps in three pieces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import philox
from ..philox import ALL, Window
from ..types import BLOCK, Plan, Side
from . import reference
from .reference import back, grad_max, transform_

__all__ = [
    "adam_update_",
    "apply_",
    "back",
    "coded_adam_",
    "coded_adam_update_",
    "decode",
    "encode_",
    "grad_max",
    "project",
    "projected_adam_",
    "transform_",
    "weight_norm_adam_",
    "write_",
]

# How tl.dot multiplies, by dtype of the gradient (or, in apply_, of the parameter). tf32x3 is float32 to 1e-6; with
# 16-bit operands the basis and N are rounded as the gradient was, 0.2 % of an update's norm in bfloat16. "tf32x3" is
# valid for every dtype, at a sixth of the speed.
DOT = {torch.float32: "tf32x3", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Largest rank of _fused: above it the accumulators leave the registers, as they do where rows are not aligned.
FUSED_RANK = {"tf32x3": 128, "tf32": 128, "bf16": 256, "fp16": 256}
FUSED_MULTIPLE = 8  # of which n must be a multiple

_WORKSPACE = 2**27  # bytes of updates between _project and _apply: a larger bucket is stepped in parts
_BLOCK = 1024  # elements of a program of _elementwise
_CODED = 2048  # elements of a program of _encode, _decode and _coded_adam
_CODED_WARPS = 8  # of _coded_adam
_TINY = torch.finfo(torch.float32).tiny
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_DOT_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Blocks(NamedTuple):
    """Shape of a program: its tile, depth of one pass of its loop, columns of an epilogue's slice, warps, stages."""

    rows: int
    columns: int
    depth: int
    slice: int
    warps: int
    stages: int


# (kernel, 16-bit operands, generation) → blocks; the column block of _fused is the rank. 80 stands for every GPU with
# about 100 KB of shared memory, 90 for Hopper, 100 for data-centre Blackwell. tests/test_triton_aot.py compiles every
# row for six architectures and refuses spills.
BLOCKS = {
    ("fused", True, 80): Blocks(64, 0, 32, 16, 8, 2),
    ("fused", True, 90): Blocks(128, 0, 32, 16, 8, 2),
    ("fused", True, 100): Blocks(64, 0, 32, 16, 8, 2),
    ("fused", False, 80): Blocks(64, 0, 16, 32, 8, 2),
    ("fused", False, 90): Blocks(64, 0, 32, 32, 8, 2),
    ("fused", False, 100): Blocks(64, 0, 32, 32, 8, 2),
    ("project", True, 80): Blocks(128, 64, 32, 16, 8, 3),
    ("project", True, 90): Blocks(128, 128, 64, 32, 8, 3),
    ("project", True, 100): Blocks(128, 128, 64, 8, 8, 3),
    ("project", False, 80): Blocks(64, 64, 32, 16, 4, 2),
    ("project", False, 90): Blocks(64, 64, 32, 32, 4, 3),
    ("project", False, 100): Blocks(64, 64, 32, 32, 4, 3),
    ("apply", True, 80): Blocks(128, 64, 32, 32, 8, 3),
    ("apply", True, 90): Blocks(128, 128, 64, 32, 8, 3),
    ("apply", True, 100): Blocks(128, 128, 64, 32, 8, 3),
    ("apply", False, 80): Blocks(64, 64, 32, 32, 4, 2),
    ("apply", False, 90): Blocks(64, 64, 32, 32, 4, 3),
    ("apply", False, 100): Blocks(64, 64, 32, 32, 4, 3),
}


_LENGTH_BLOCKS = Blocks(16, 128, 0, 0, 4, 2)
_TANGENT_STAGES = 2  # of _project where a stage holds tiles of G and of W


def supports(plan: Plan | None) -> str | None:
    """Why a CUDA tensor of this plan cannot be stepped here, or None; without a plan, whether any can."""
    if torch.version.hip is not None:
        return "not tried on ROCm"
    if plan is None:
        return None
    if _capability(plan.device) < 80:
        return "the GPU is older than compute capability 8.0"
    return None if plan.dtype in _TYPES else f"no kernel for {plan.dtype}"


# ---- on the device ----------------------------------------------------------------------------------------------


@triton.jit
def _at(table, row: tl.constexpr, dtype: tl.constexpr, ALIGN: tl.constexpr):
    """The pointer to this program's tensor in a row of the table."""
    address = tl.load(table + row * tl.num_programs(1) + tl.program_id(1))
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), ALIGN)  # on the address the hint would be lost


@triton.jit
def _rate(lr, LR: tl.constexpr):
    """The learning rate: a value (LR = -1), one on the device (0), or one a tensor (1)."""
    if LR < 0:
        return lr
    else:
        return tl.load(lr + LR * tl.program_id(1)).to(tl.float32)


@triton.jit
def _within(width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets within a tile of a matrix with rows of `width`."""
    return tl.arange(0, ROWS)[:, None] * width + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _tile(pointer, i, j, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to the tile at (i, j): 64 bits for its corner, as a large embedding needs, 32 within it."""
    return pointer + tl.to_tensor(i).to(tl.int64) * width + j + _within(width, ROWS, COLUMNS)


@triton.jit
def _inside(i, j, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return (i + tl.arange(0, ROWS) < height)[:, None] & (j + tl.arange(0, COLUMNS) < width)[None, :]


@triton.jit
def _load(pointer, i, j, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile at (i, j) of a matrix, zero beyond its edges."""
    inside = _inside(i, j, height, width, ROWS, COLUMNS)
    return tl.load(_tile(pointer, i, j, width, ROWS, COLUMNS), mask=inside, other=0.0)


@triton.jit
def _gradient(g, w, lengths, i, j, m, n, TANGENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile at (i, j) of G, or where TANGENT of its part along which the length of no row of W changes."""
    grad = _load(g, i, j, m, n, ROWS, COLUMNS)
    if TANGENT:
        along = _row_numbers(lengths, 0, i, m, ROWS, 0.0)
        grad = grad.to(tl.float32) - _load(w, i, j, m, n, ROWS, COLUMNS).to(tl.float32) * along[:, None]
    return grad


@triton.jit
def _row_numbers(numbers, which: tl.constexpr, i, m, ROWS: tl.constexpr, other: tl.constexpr):
    """Of the rows from i on of this program's tensor, from one of the two lists of m."""
    row = i + tl.arange(0, ROWS)
    first = (2 * tl.program_id(1) + which).to(tl.int64) * m
    return tl.load(numbers + first + row, mask=row < m, other=other)


@triton.jit
def _operand(x, DOT: tl.constexpr):
    if DOT == "bf16":
        return x.to(tl.bfloat16)
    elif DOT == "fp16":
        return x.to(tl.float16)
    else:
        return x.to(tl.float32)


@triton.jit
def _dot(a, b, accumulator, DOT: tl.constexpr):
    if DOT == "bf16" or DOT == "fp16":
        return tl.dot(_operand(a, DOT), _operand(b, DOT), accumulator)
    else:
        return tl.dot(_operand(a, DOT), _operand(b, DOT), accumulator, input_precision=DOT)


@triton.jit
def _adam(g, mean, square, corrections, alpha1, beta2, alpha2, eps, GRAMS: tl.constexpr, EPS_INSIDE: tl.constexpr):
    """N and both moments, advanced by g."""
    first = tl.load(corrections + tl.program_id(1))
    second = tl.load(corrections + tl.num_programs(1) + tl.program_id(1))
    mean += alpha1 * (g - mean)
    square = beta2 * square + alpha2 * g * g
    root = tl.sqrt_rn(square)  # the approximate root flushes the smallest V to zero
    if EPS_INSIDE:
        root = tl.div_rn(root + eps, second)
    else:
        root = tl.div_rn(root, second) + eps
    update = tl.div_rn(mean, root * first)
    if GRAMS:
        size = tl.abs(update)
        update = tl.where(g > 0, size, tl.where(g < 0, -size, 0.0))
    return update, mean, square


@triton.jit
def _count(agrees, kept):
    """Adds those of a program to what this program's tensor keeps; whole numbers, so that no order matters."""
    tl.atomic_add(kept + tl.program_id(1), tl.sum(agrees.to(tl.int64)))


@triton.jit
def _cautious(update, agrees, kept, size):
    """N where it agrees with R, by the share of the `size` elements of which that is so, at least 1e-3."""
    share = tl.div_rn(tl.load(kept + tl.program_id(1)).to(tl.float32), size)
    return tl.where(agrees, update, 0.0) * tl.div_rn(1.0, tl.maximum(share, 1e-3))


@triton.jit
def _half_words(seed, step, block):
    """16 random bits for 8 elements a block, as philox.stochastic_round_ deals them out: (..., k) → (..., 8 k)."""
    zero = block * 0
    w0, w1, w2, w3 = tl.philox(seed, block, zero + step.to(tl.uint32), zero, zero)  # (..., k) each
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # (..., 4 k)
    return tl.interleave(words & 0xFFFF, words >> 16)


@triton.jit
def _noise(table, corner, pitch, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NOISE: tl.constexpr):
    """Rounding noise of a tile whose corner is element `corner` of a tensor with rows of `pitch`.

    NOISE = 8: rows hold whole blocks of 8 elements, which share one call of Philox. NOISE = 1: each element makes its
    own, and takes the half-word that is its.
    """
    seed, step = _seed_and_step(table)
    return _half_words_of_tile(seed, step, corner, pitch, ROWS, COLUMNS, NOISE)


@triton.jit
def _half_words_of_tile(seed, step, corner, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NOISE: tl.constexpr):
    first = (corner >> 3).to(tl.uint32)
    if NOISE == 8:
        return _half_words(seed, step, first + _within(n // 8, ROWS, COLUMNS // 8).to(tl.uint32))
    else:
        element = (corner & 7).to(tl.int32) + _within(n, ROWS, COLUMNS)
        return _half_word(seed, step, first + (element >> 3).to(tl.uint32), element & 7)


@triton.jit
def _half_word(seed, step, block, at):
    """16 random bits for each element: number `at` of the block of 8 that is its."""
    zero = block * 0
    w0, w1, w2, w3 = tl.philox(seed, block, zero + step.to(tl.uint32), zero, zero)
    word = at >> 1
    word = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    return tl.where((at & 1) == 0, word & 0xFFFF, word >> 16)


@triton.jit
def _seed_and_step(table):
    step = tl.load(_at(table, 5, tl.float32, 4)).to(tl.int32)
    return tl.load(table + 6 * tl.num_programs(1) + tl.program_id(1)), step


@triton.jit
def _round(value, noise):
    """Stochastically to bfloat16, still as float32: the 16 bits that will be dropped decide by chance."""
    return ((value.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _left_alone(finite):
    """Whether this program's tensor stays as it is; `finite` is None where none does."""
    if finite is None:
        return False
    else:
        return tl.load(finite + tl.program_id(1)) == 0


@triton.jit
def _advance(table, finite, corrections, count, log_beta1, log_beta2, BLOCK: tl.constexpr):
    """Steps advance; corrections (2, count): 1 - β₁ᵏ and √(1 - β₂ᵏ), in float64 because the difference cancels."""
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = b < count
    if finite is not None:
        here &= tl.load(finite + b, mask=here, other=0) != 0
    step = tl.load(table + 5 * count + b, mask=here, other=0).to(tl.pointer_type(tl.float32))
    k = tl.load(step, mask=here, other=0.0) + 1
    tl.store(step, k, mask=here)
    k = k.to(tl.float64)
    tl.store(corrections + b, (1 - tl.exp(k * log_beta1)).to(tl.float32), mask=here)
    tl.store(corrections + count + b, tl.sqrt(1 - tl.exp(k * log_beta2)).to(tl.float32), mask=here)


@triton.jit
def _elementwise(
    table,
    finite,
    corrections,
    kept,
    lr,
    size,
    alpha1,
    beta2,
    alpha2,
    eps,
    weight_decay,
    scale,
    origin,
    columns,
    pitch,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    ALIGN: tl.constexpr,
    LR: tl.constexpr,
    ADAM: tl.constexpr,
    COUNT: tl.constexpr,
    APPLY: tl.constexpr,
    SIGN: tl.constexpr,
    GRAMS: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    EPS_INSIDE: tl.constexpr,
    NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The input is G where ADAM, otherwise N; the output is W where APPLY, otherwise N. NOISE: see _noise.

    COUNT: only of what cautious keeps, which is not known before all are seen; nothing is written.
    """
    if _left_alone(finite):
        return
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = start + tl.arange(0, BLOCK)
    inside = i < size
    out = _at(table, 0, OUT, ALIGN) + i
    low = tl.load(_at(table, 1, IN, ALIGN) + i, mask=inside, other=0.0).to(tl.float32)
    update = low
    if ADAM:
        mean_at = _at(table, 2, tl.float32, ALIGN) + i
        square_at = _at(table, 3, tl.float32, ALIGN) + i
        mean = tl.load(mean_at, mask=inside, other=0.0)
        square = tl.load(square_at, mask=inside, other=0.0)
        update, mean, square = _adam(low, mean, square, corrections, alpha1, beta2, alpha2, eps, GRAMS, EPS_INSIDE)
        if COUNT:
            _count(update * low > 0, kept)
            return
        if CAUTIOUS:
            update = _cautious(update, update * low > 0, kept, tl.to_tensor(size).to(tl.float32))
        tl.store(mean_at, mean, mask=inside)
        tl.store(square_at, square, mask=inside)
    if APPLY:
        if SIGN:
            update = _sign(update)
        rate = _rate(lr, LR)
        update = (1 - rate * weight_decay) * tl.load(out, mask=inside).to(tl.float32) - rate * scale * update
        if NOISE > 0:
            seed, step = _seed_and_step(table)
            at = start + tl.arange(0, BLOCK // NOISE) * NOISE
            number = origin + at // columns * pitch + at % columns
            block = (number >> 3).to(tl.uint32)
            half = _half_words(seed, step, block) if NOISE == 8 else _half_word(seed, step, block, number & 7)
            update = _round(update, half)
    tl.store(out, update.to(OUT), mask=inside)


@triton.jit
def _accumulate(
    g,
    q,
    o,
    r,
    m,
    n,
    rank,
    LEFT: tl.constexpr,
    DOT: tl.constexpr,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    DEPTH: tl.constexpr,
    w=None,
    lengths=None,
    TANGENT: tl.constexpr = False,
):
    """G Q for ROWS rows of G from o (left: Qᵀ G for as many columns) and RANK columns of Q from r."""
    if LEFT:
        low = tl.zeros((RANK, ROWS), tl.float32)
        for d in range(0, m, DEPTH):
            basis = _load(q, d, r, m, rank, DEPTH, RANK)  # (DEPTH, RANK)
            grad = _gradient(g, w, lengths, d, o, m, n, TANGENT, DEPTH, ROWS)  # (DEPTH, ROWS)
            low = _dot(tl.trans(basis), grad, low, DOT)  # (RANK, ROWS)
    else:
        low = tl.zeros((ROWS, RANK), tl.float32)
        for d in range(0, n, DEPTH):
            basis = _load(q, d, r, n, rank, DEPTH, RANK)  # (DEPTH, RANK)
            grad = _gradient(g, w, lengths, o, d, m, n, TANGENT, ROWS, DEPTH)  # (ROWS, DEPTH)
            low = _dot(grad, basis, low, DOT)  # (ROWS, RANK)
    return low


@triton.jit
def _advance_tile(
    table,
    corrections,
    low,
    i,
    j,
    height,
    width,
    alpha1,
    beta2,
    alpha2,
    eps,
    ALIGN: tl.constexpr,
    GRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICE: tl.constexpr,
):
    """N of a tile of R, at (i, j); its moments advance.

    SLICE columns at a time, because a tile of R and of both moments together do not fit into the registers.
    """
    if COLUMNS > SLICE:
        HALF: tl.constexpr = COLUMNS // 2
        a, b = tl.split(tl.permute(tl.reshape(low, (ROWS, 2, HALF)), (0, 2, 1)))
        a = _advance_tile(
            *(table, corrections, a, i, j, height, width, alpha1, beta2, alpha2, eps),
            *(ALIGN, GRAMS, ROWS, HALF, SLICE),
        )
        b = _advance_tile(
            *(table, corrections, b, i, j + HALF, height, width, alpha1, beta2, alpha2, eps),
            *(ALIGN, GRAMS, ROWS, HALF, SLICE),
        )
        return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (ROWS, COLUMNS))
    else:
        inside = _inside(i, j, height, width, ROWS, COLUMNS)
        mean_at = _tile(_at(table, 2, tl.float32, ALIGN), i, j, width, ROWS, COLUMNS)
        square_at = _tile(_at(table, 3, tl.float32, ALIGN), i, j, width, ROWS, COLUMNS)
        mean = tl.load(mean_at, mask=inside, other=0.0)
        square = tl.load(square_at, mask=inside, other=0.0)
        update, mean, square = _adam(low, mean, square, corrections, alpha1, beta2, alpha2, eps, GRAMS, False)
        tl.store(mean_at, mean, mask=inside)
        tl.store(square_at, square, mask=inside)
        return update


@triton.jit
def _write(
    table,
    w,
    step,
    rate,
    weight_decay,
    scale,
    i,
    j,
    m,
    n,
    origin,
    pitch,
    SIGN: tl.constexpr,
    NOISE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICE: tl.constexpr,
    factor=None,
):
    """W ← (1 - lr·λ) W - lr·scale·step on the tile at (i, j); its rows times their factors if there are any.

    W begins at element `origin` of a tensor with rows of `pitch`, which is rounded as a whole.
    """
    if COLUMNS > SLICE:
        HALF: tl.constexpr = COLUMNS // 2
        a, b = tl.split(tl.permute(tl.reshape(step, (ROWS, 2, HALF)), (0, 2, 1)))
        same = (rate, weight_decay, scale, i)
        _write(table, w, a, *same, j, m, n, origin, pitch, SIGN, NOISE, ROWS, HALF, SLICE, factor)
        _write(table, w, b, *same, j + HALF, m, n, origin, pitch, SIGN, NOISE, ROWS, HALF, SLICE, factor)
    else:
        inside = _inside(i, j, m, n, ROWS, COLUMNS)
        at = _tile(w, i, j, n, ROWS, COLUMNS)
        if SIGN:
            step = _sign(step)
        value = (1 - rate * weight_decay) * tl.load(at, mask=inside).to(tl.float32) - rate * scale * step
        if factor is not None:
            value *= factor[:, None]
        if NOISE > 0:
            corner = origin + tl.to_tensor(i).to(tl.int64) * pitch + j
            value = _round(value, _noise(table, corner, pitch, ROWS, COLUMNS, NOISE))
        tl.store(at, value.to(w.dtype.element_ty), mask=inside)


@triton.jit
def _squares(w, step, rate, scale, i, j, m, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLICE: tl.constexpr):
    """Of the rows of W - lr·scale·step on the tile at (i, j), the sums of squares."""
    if COLUMNS > SLICE:
        HALF: tl.constexpr = COLUMNS // 2
        a, b = tl.split(tl.permute(tl.reshape(step, (ROWS, 2, HALF)), (0, 2, 1)))
        sums = _squares(w, a, rate, scale, i, j, m, n, ROWS, HALF, SLICE)
        return sums + _squares(w, b, rate, scale, i, j + HALF, m, n, ROWS, HALF, SLICE)
    else:
        moved = _load(w, i, j, m, n, ROWS, COLUMNS).to(tl.float32) - rate * scale * step
        return tl.sum(tl.where(_inside(i, j, m, n, ROWS, COLUMNS), moved * moved, 0.0), 1)


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def _fused(
    table,
    finite,
    corrections,
    lr,
    m,
    n,
    rank,
    alpha1,
    beta2,
    alpha2,
    eps,
    weight_decay,
    scale,
    origin,
    pitch,
    W: tl.constexpr,
    G: tl.constexpr,
    Q: tl.constexpr,
    ALIGN: tl.constexpr,
    LR: tl.constexpr,
    DOT: tl.constexpr,
    LEFT: tl.constexpr,
    GRAMS: tl.constexpr,
    NOISE: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    SLICE: tl.constexpr,
    RANK: tl.constexpr,
):
    if _left_alone(finite):
        return
    w = _at(table, 0, W, ALIGN)
    g = _at(table, 1, G, ALIGN)
    q = _at(table, 4, Q, ALIGN)
    o = tl.program_id(0) * ROWS
    low = _accumulate(g, q, o, 0, m, n, rank, LEFT, DOT, ROWS, RANK, DEPTH)
    rate = _rate(lr, LR)
    if LEFT:
        update = _advance_tile(
            *(table, corrections, low, 0, o, rank, n, alpha1, beta2, alpha2, eps),
            *(ALIGN, GRAMS, RANK, ROWS, SLICE),
        )
        update = _operand(update, DOT)  # (RANK, ROWS)
        for d in range(0, m, DEPTH):
            basis = _load(q, d, 0, m, rank, DEPTH, RANK)
            step = _dot(basis, update, tl.zeros((DEPTH, ROWS), tl.float32), DOT)  # (DEPTH, ROWS)
            same = (table, w, step, rate, weight_decay, scale)
            _write(*same, d, o, m, n, origin, pitch, False, NOISE, DEPTH, ROWS, ROWS)
    else:
        update = _advance_tile(
            *(table, corrections, low, o, 0, m, rank, alpha1, beta2, alpha2, eps),
            *(ALIGN, GRAMS, ROWS, RANK, SLICE),
        )
        update = _operand(update, DOT)  # (ROWS, RANK)
        for d in range(0, n, DEPTH):
            basis = _load(q, d, 0, n, rank, DEPTH, RANK)
            step = _dot(update, tl.trans(basis), tl.zeros((ROWS, DEPTH), tl.float32), DOT)  # (ROWS, DEPTH)
            same = (table, w, step, rate, weight_decay, scale)
            _write(*same, o, d, m, n, origin, pitch, False, NOISE, ROWS, DEPTH, DEPTH)


@triton.jit
def _lengths(
    table,
    finite,
    corrections,
    lengths,
    lr,
    m,
    n,
    alpha1,
    beta2,
    alpha2,
    eps,
    weight_decay,
    W: tl.constexpr,
    G: tl.constexpr,
    ALIGN: tl.constexpr,
    LR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of ROWS rows: what of W is in G, and the length they come to by Adam's step of it, or -1 if they are zero."""
    if _left_alone(finite):
        return
    i = tl.program_id(0) * ROWS
    w, g = _at(table, 0, W, ALIGN), _at(table, 1, G, ALIGN)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for j in range(0, n, COLUMNS):
        weight = _load(w, i, j, m, n, ROWS, COLUMNS).to(tl.float32)
        squares += weight * weight
        products += weight * _load(g, i, j, m, n, ROWS, COLUMNS).to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(squares, 1))
    divisor = tl.where(norm > 0, norm, 1.0)
    radial = tl.div_rn(tl.sum(products, 1), divisor)
    row = i + tl.arange(0, ROWS)
    mean_at, square_at = _at(table, 2, tl.float32, 4) + row, _at(table, 3, tl.float32, 4) + row
    mean = tl.load(mean_at, mask=row < m, other=0.0)
    square = tl.load(square_at, mask=row < m, other=0.0)
    growth, mean, square = _adam(radial, mean, square, corrections, alpha1, beta2, alpha2, eps, False, False)
    tl.store(mean_at, mean, mask=row < m)
    tl.store(square_at, square, mask=row < m)
    rate = _rate(lr, LR)
    aim = tl.maximum(norm * (1 - rate * weight_decay) - rate * growth, 0.0)
    at = lengths + (2 * tl.program_id(1)).to(tl.int64) * m + row
    tl.store(at, tl.div_rn(radial, divisor), mask=row < m)
    tl.store(at + m, tl.where(norm > 0, aim, -1.0), mask=row < m)


@triton.jit
def _project(
    table,
    finite,
    corrections,
    lengths,
    m,
    n,
    rank,
    alpha1,
    beta2,
    alpha2,
    eps,
    OUT: tl.constexpr,
    G: tl.constexpr,
    Q: tl.constexpr,
    W: tl.constexpr,
    ALIGN: tl.constexpr,
    DOT: tl.constexpr,
    LEFT: tl.constexpr,
    TANGENT: tl.constexpr,
    ADAM: tl.constexpr,
    GRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SLICE: tl.constexpr,
):
    """R of every tensor to the output, or where ADAM its N; see _gradient for TANGENT."""
    if _left_alone(finite):
        return
    tiles = tl.cdiv(rank, COLUMNS)
    o = tl.program_id(0) // tiles * ROWS
    r = tl.program_id(0) % tiles * COLUMNS
    g = _at(table, 1, G, ALIGN)
    q = _at(table, 4, Q, ALIGN)
    w = _at(table, 7, W, ALIGN) if TANGENT else None
    low = _accumulate(g, q, o, r, m, n, rank, LEFT, DOT, ROWS, COLUMNS, DEPTH, w, lengths, TANGENT)
    out = _at(table, 0, OUT, ALIGN)
    if LEFT:
        if ADAM:
            low = _advance_tile(
                *(table, corrections, low, r, o, rank, n, alpha1, beta2, alpha2, eps),
                *(ALIGN, GRAMS, COLUMNS, ROWS, SLICE),
            )
        inside = _inside(r, o, rank, n, COLUMNS, ROWS)
        tl.store(_tile(out, r, o, n, COLUMNS, ROWS), low.to(OUT), mask=inside)
    else:
        if ADAM:
            low = _advance_tile(
                *(table, corrections, low, o, r, m, rank, alpha1, beta2, alpha2, eps),
                *(ALIGN, GRAMS, ROWS, COLUMNS, SLICE),
            )
        inside = _inside(o, r, m, rank, ROWS, COLUMNS)
        tl.store(_tile(out, o, r, rank, ROWS, COLUMNS), low.to(OUT), mask=inside)


@triton.jit
def _apply(
    table,
    finite,
    lengths,
    squares,
    lr,
    m,
    n,
    rank,
    weight_decay,
    scale,
    origin,
    pitch,
    W: tl.constexpr,
    IN: tl.constexpr,
    Q: tl.constexpr,
    ALIGN: tl.constexpr,
    LR: tl.constexpr,
    DOT: tl.constexpr,
    LEFT: tl.constexpr,
    SIGN: tl.constexpr,
    MEASURE: tl.constexpr,
    NOISE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SLICE: tl.constexpr,
):
    """W, its rows brought to the lengths of _lengths if there are any.

    MEASURE: only the sums of squares of each row on this tile, to `squares` (tensor, tile of columns, row), by which
    the launch after it knows how long they would be.
    """
    if _left_alone(finite):
        return
    tiles = tl.cdiv(n, COLUMNS)
    i = tl.program_id(0) // tiles * ROWS
    j = tl.program_id(0) % tiles * COLUMNS
    update = _at(table, 1, IN, ALIGN)
    q = _at(table, 4, Q, ALIGN)
    step = tl.zeros((ROWS, COLUMNS), tl.float32)
    for r in range(0, rank, DEPTH):
        if LEFT:
            basis = _load(q, i, r, m, rank, ROWS, DEPTH)  # (ROWS, DEPTH)
            step = _dot(basis, _load(update, r, j, rank, n, DEPTH, COLUMNS), step, DOT)  # (ROWS, COLUMNS)
        else:
            basis = _load(q, j, r, n, rank, COLUMNS, DEPTH)  # (COLUMNS, DEPTH)
            step = _dot(_load(update, i, r, m, rank, ROWS, DEPTH), tl.trans(basis), step, DOT)  # (ROWS, COLUMNS)
    w = _at(table, 0, W, ALIGN)
    rate = _rate(lr, LR)
    factor = None
    if lengths is not None:
        row = i + tl.arange(0, ROWS)
        own = squares + tl.program_id(1).to(tl.int64) * tiles * m + row
        if MEASURE:
            here = own + tl.program_id(0) % tiles * m
            tl.store(here, _squares(w, step, rate, scale, i, j, m, n, ROWS, COLUMNS, SLICE), mask=row < m)
            return
        sums = tl.zeros((ROWS,), tl.float32)
        for tile in range(tiles):
            sums += tl.load(own + tile * m, mask=row < m, other=0.0)
        length, aim = tl.sqrt_rn(sums), _row_numbers(lengths, 1, i, m, ROWS, -1.0)
        factor = tl.where((aim >= 0) & (length > 0), tl.div_rn(aim, tl.where(length > 0, length, 1.0)), 1.0)
    same = (table, w, step, rate, weight_decay, scale)
    _write(*same, i, j, m, n, origin, pitch, SIGN, NOISE, ROWS, COLUMNS, SLICE, factor)


@triton.jit
def _coded_tile(i, j, count, length, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows, columns, and which are there, of the j-th block of the i-th ROWS rows of (count, length)."""
    row = tl.to_tensor(i).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = j * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, column, (row < count) & (column < length)


@triton.jit
def _decoded(
    codes,
    scales,
    values,
    i,
    j,
    count,
    length,
    code_row,
    code_column,
    scale_row,
    scale_column,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The numbers of a tile that are kept as codes."""
    row, column, inside = _coded_tile(i, j, count, length, ROWS, BLOCK)
    at = column // 2 if PACKED else column
    code = tl.load(codes + row * code_row + at * code_column, mask=inside, other=0).to(tl.int32)
    if PACKED:
        code = (code >> (column % 2 * 4)) & 15
    scale = tl.load(scales + row * scale_row + j * scale_column, mask=row < count, other=0.0)
    return tl.load(values + code) * scale


@triton.jit
def _keep(
    value,
    codes,
    scales,
    values,
    seed,
    step,
    begin,
    i,
    j,
    count,
    length,
    code_row,
    code_column,
    scale_row,
    scale_column,
    LAST: tl.constexpr,
    TINY: tl.constexpr,
    NOISE: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Codes and scales of a tile, which is zero beyond its edges; LAST: of the gaps between values."""
    row, column, inside = _coded_tile(i, j, count, length, ROWS, BLOCK)
    scale = tl.max(tl.abs(value), 1)[:, None]
    scale = tl.where(scale >= TINY, scale, 0.0)
    tl.store(scales + row * scale_row + j * scale_column, scale, mask=row < count)
    unit = tl.where(scale > 0, tl.div_rn(value, tl.where(scale > 0, scale, 1.0)), 0.0)
    low = tl.zeros((ROWS, BLOCK), tl.int32)  # the last value of the table that is not above it
    for bit in tl.static_range(8):
        next = low + (128 >> bit)
        there = next <= LAST
        low = tl.where(there & (tl.load(values + next, mask=there, other=0.0) <= unit), next, low)
    lower = tl.load(values + low)
    gap = tl.load(values + low + 1) - lower
    odds = 0.5
    if NOISE > 0:
        half = _half_words_of_tile(seed, step, begin + _first(i, j, length, ROWS, BLOCK), length, ROWS, BLOCK, NOISE)
        odds = (half.to(tl.float32) + 0.5) * (1.0 / 65536)
    code = tl.where(inside, low + (unit - lower > odds * gap).to(tl.int32), 0)
    if PACKED:
        first, second = tl.split(tl.reshape(code, (ROWS, BLOCK // 2, 2)))
        code = first | (second << 4)
        column = j * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        inside = (row < count) & (column < (length + 1) // 2)
    tl.store(codes + row * code_row + column * code_column, code.to(tl.uint8), mask=inside)


@triton.jit
def _first(i, j, length, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of a tile, the place of its first element where blocks' dimension is the last."""
    return tl.to_tensor(i).to(tl.int64) * ROWS * length + j * BLOCK


@triton.jit
def _encode(
    x,
    codes,
    scales,
    values,
    step,
    seed,
    begin,
    count,
    length,
    x_row,
    x_column,
    code_row,
    code_column,
    scale_row,
    scale_column,
    LAST: tl.constexpr,
    TINY: tl.constexpr,
    NOISE: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of each of ROWS rows of x (count, length). NOISE = 0 is to nearest."""
    i, j = tl.program_id(0), tl.program_id(1)
    row, column, inside = _coded_tile(i, j, count, length, ROWS, BLOCK)
    value = tl.load(x + row * x_row + column * x_column, mask=inside, other=0.0).to(tl.float32)
    _keep(
        *(value, codes, scales, values, seed, tl.load(step).to(tl.int32), begin, i, j, count, length),
        *(code_row, code_column, scale_row, scale_column, LAST, TINY, NOISE, PACKED, ROWS, BLOCK),
    )


@triton.jit
def _decode(
    out,
    codes,
    scales,
    values,
    count,
    length,
    out_row,
    out_column,
    code_row,
    code_column,
    scale_row,
    scale_column,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The inverse of _encode."""
    i, j = tl.program_id(0), tl.program_id(1)
    row, column, inside = _coded_tile(i, j, count, length, ROWS, BLOCK)
    value = _decoded(
        *(codes, scales, values, i, j, count, length, code_row, code_column, scale_row, scale_column),
        *(PACKED, ROWS, BLOCK),
    )
    tl.store(out + row * out_row + column * out_column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _coded_adam(
    table,
    finite,
    corrections,
    kept,
    lr,
    signed,
    unsigned,
    begin,
    count,
    length,
    x_row,
    x_column,
    code_row,
    code_column,
    scale_row,
    scale_column,
    alpha1,
    beta2,
    alpha2,
    eps,
    weight_decay,
    scale,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    ALIGN: tl.constexpr,
    LR: tl.constexpr,
    COUNT: tl.constexpr,
    APPLY: tl.constexpr,
    GRAMS: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    EPS_INSIDE: tl.constexpr,
    NOISE: tl.constexpr,
    ROUND: tl.constexpr,
    SIGNED_LAST: tl.constexpr,
    UNSIGNED_LAST: tl.constexpr,
    TINY: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of each of ROWS rows of a tensor: decoded, advanced, coded again; W written where APPLY, otherwise N."""
    if _left_alone(finite):
        return
    blocks = tl.cdiv(length, BLOCK)
    i, j = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row, column, inside = _coded_tile(i, j, count, length, ROWS, BLOCK)
    x = row * x_row + column * x_column
    low = tl.load(_at(table, 1, IN, ALIGN) + x, mask=inside, other=0.0).to(tl.float32)
    mean_codes, mean_scales = _at(table, 2, tl.uint8, ALIGN), _at(table, 7, tl.float32, 4)
    square_codes, square_scales = _at(table, 3, tl.uint8, ALIGN), _at(table, 8, tl.float32, 4)
    mean = _decoded(
        *(mean_codes, mean_scales, signed, i, j, count, length, code_row, code_column, scale_row, scale_column),
        *(PACKED, ROWS, BLOCK),
    )
    square = _decoded(
        *(square_codes, square_scales, unsigned, i, j, count, length, code_row, code_column, scale_row, scale_column),
        *(PACKED, ROWS, BLOCK),
    )
    update, mean, square = _adam(low, mean, square, corrections, alpha1, beta2, alpha2, eps, GRAMS, EPS_INSIDE)
    if COUNT:
        _count(update * low > 0, kept)
        return
    if CAUTIOUS:
        update = _cautious(update, update * low > 0, kept, tl.to_tensor(count).to(tl.float32) * length)
    seed, step = _seed_and_step(table)
    of_mean = tl.load(table + 9 * tl.num_programs(1) + tl.program_id(1))
    of_square = tl.load(table + 10 * tl.num_programs(1) + tl.program_id(1))
    _keep(
        *(tl.where(inside, mean, 0.0), mean_codes, mean_scales, signed, of_mean, step, begin, i, j, count, length),
        *(code_row, code_column, scale_row, scale_column, SIGNED_LAST, TINY, NOISE, PACKED, ROWS, BLOCK),
    )
    _keep(
        *(tl.where(inside, square, 0.0), square_codes, square_scales, unsigned, of_square, step, begin),
        *(i, j, count, length, code_row, code_column, scale_row, scale_column),
        *(UNSIGNED_LAST, TINY, NOISE, PACKED, ROWS, BLOCK),
    )
    out = _at(table, 0, OUT, ALIGN) + x
    if APPLY:
        rate = _rate(lr, LR)
        update = (1 - rate * weight_decay) * tl.load(out, mask=inside).to(tl.float32) - rate * scale * update
        if ROUND:
            corner = begin + _first(i, j, length, ROWS, BLOCK)  # W begins where its moments do
            update = _round(update, _half_words_of_tile(seed, step, corner, length, ROWS, BLOCK, NOISE))
    tl.store(out, update.to(OUT), mask=inside)


# ---- on the host ------------------------------------------------------------------------------------------------


def blocks(kernel: str, dot: str, capability: int) -> Blocks:
    """The program shape of a kernel on an architecture: 80, 86, 89, 90, 100, 120."""
    return BLOCKS[kernel, dot in _DOT_TYPES, capability // 10 * 10 if 90 <= capability < 110 else 80]


@lru_cache
def _capability(device: torch.device) -> int:
    if device.type != "cuda":  # interpreted
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


class _Table(NamedTuple):
    """Addresses and seeds of a bucket, (rows, B) on the device; whether all of the first 5 are multiples of 16."""

    on_device: Tensor
    align: int


def _table(
    out: Sequence[Tensor],
    grads: Sequence[Tensor] = (),
    exp_avgs: Sequence[Tensor] = (),
    exp_avg_sqs: Sequence[Tensor] = (),
    bases: Sequence[Tensor] = (),
    steps: Sequence[Tensor] = (),
    seeds: Sequence[int] = (),
    further: Sequence[int] = (),
) -> _Table:
    """The order of the rows is that of the arguments; a kernel reads only rows that its caller gave."""
    columns = (out, grads, exp_avgs, exp_avg_sqs, bases, steps)
    rows = [_addresses(column) or [0] * len(out) for column in columns]
    values = tuple(chain(*rows, seeds or [0] * len(out), further))
    device = out[0].device
    if device.type != "cuda":
        return _fill_table(values, len(out), device)
    if torch.cuda.is_current_stream_capturing():  # the graph writes its own table, and must find it at every replay
        return _fill_table(values, len(out), device)
    return _cached_table(values, len(out), device, torch.cuda.current_stream(device).cuda_stream)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


@lru_cache(maxsize=256)
def _cached_table(values: tuple[int, ...], count: int, device: torch.device, stream: int) -> _Table:
    """An unchanged bucket finds its table; the stream is a key because it orders the writing before the reading."""
    return _fill_table(values, count, device)


def _fill_table(values: tuple[int, ...], count: int, device: torch.device) -> _Table:
    table = philox.integers(values, device)
    return _Table(table, 16 if all(address % 16 == 0 for address in values[: 5 * count]) else 1)


def _launch(
    kernel,
    grid: tuple[int, ...],
    table: _Table,
    finite: Tensor | None,
    *args,
    blocks: Blocks | None = None,
    **constants,
) -> None:
    options = {} if blocks is None else {"num_warps": blocks.warps, "num_stages": blocks.stages}
    flags = None if finite is None else finite.contiguous()
    _start(kernel, grid, table.on_device, flags, *args, **constants, **options)


def _start(kernel, grid: tuple[int, ...], *args, **constants) -> None:
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **constants)


def _fits(*columns: Sequence[Tensor], bases: Sequence[Tensor] = ()) -> bool:
    """Whether the kernels can address these: contiguous, of one dtype a column, offsets within a tile below 2³¹."""
    return all(
        (tensor.is_contiguous() or column is bases)  # which _operands sees to
        and tensor.dtype == column[0].dtype
        and tensor.dtype in _TYPES
        and (tensor.ndim < 2 or tensor.shape[-1] < 2**23)
        for column in (*columns, bases)
        for tensor in column
    )


def _learning_rate(lr: Tensor) -> tuple[float | Tensor, int]:
    """As the kernels take it: by value from the host, by address from the device, where it is not waited for."""
    return (float(lr), -1) if lr.is_cpu and lr.ndim == 0 else (lr, lr.ndim)


def _operands(bases: list[Tensor], dot: str) -> list[Tensor]:
    """The bases, contiguous and as tl.dot takes them: every tile reads them again, and 16 bits cost L2 half as much."""
    dtype = _DOT_TYPES.get(dot, torch.float32)
    if not bases or (bases[0].dtype == dtype and all(basis.is_contiguous() for basis in bases)):
        return bases
    rounded = list(torch.empty((len(bases), *bases[0].shape), dtype=dtype, device=bases[0].device).unbind())
    torch._foreach_copy_(rounded, bases)
    return rounded


def _advanced(table: _Table, count: int, beta1: float, beta2: float, finite: Tensor | None) -> Tensor:
    """Bias corrections (2, count) of the steps in the table, which advance by one."""
    corrections = torch.empty((2, count), dtype=torch.float32, device=table.on_device.device)
    logs = (math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
    _launch(_advance, (triton.cdiv(count, 128),), table, finite, corrections, count, *logs, BLOCK=128)
    return corrections


def _moment_scalars(beta1: float, beta2: float, eps: float) -> tuple[float, float, float, float]:
    return 1 - beta1, beta2, 1 - beta2, max(eps, reference._EPS_FLOOR)


def _noise_mode(params: Sequence[Tensor], seeds: Sequence[int], *starts: int) -> int:
    """See _noise: 0 rounds to nearest; `starts` are where rows of whole blocks would have to begin."""
    if not seeds or params[0].dtype != torch.bfloat16:
        return 0
    return 8 if all(start % 8 == 0 for start in starts) else 1


def _pitch(window: Window, n: int) -> int:
    """Between the beginnings of rows of n in the whole."""
    return n if window.consecutive else window.pitch


def project(grads: list[Tensor], bases: list[Tensor], side: Side | None, dtype: torch.dtype) -> list[Tensor]:
    """See the reference."""
    if side not in ("left", "right") or dtype not in _TYPES or not _fits(grads, bases=bases):
        return reference.project(grads, bases, side, dtype)
    return _project_all(grads, bases, side, dtype, DOT[grads[0].dtype])


def _project_all(
    grads: Sequence[Tensor],
    bases: list[Tensor],
    side: Side | None,
    dtype: torch.dtype,
    dot: str,
    moments: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]] | None = None,
    betas: tuple[float, float] = (0.0, 0.0),
    eps: float = 0.0,
    grams: bool = False,
    finite: Tensor | None = None,
    tangent: tuple[Sequence[Tensor], Tensor] | None = None,
) -> list[Tensor]:
    """R in `dtype`, of the tangential part of G where W and its _lengths are given.

    With moments (exp_avgs, exp_avg_sqs, steps), N, and they advance.
    """
    (m, n), rank = grads[0].shape, bases[0].shape[-1]
    other = n if side == "left" else m
    bases = _operands(bases, dot)
    low = (rank, n) if side == "left" else (m, rank)
    out = torch.empty((len(grads), *low), dtype=dtype, device=grads[0].device).unbind()
    params, lengths = tangent or ((), None)
    steps = moments[2] if moments else ()
    table = _table(out, grads, *(moments[:2] if moments else ((), ())), bases, steps, (), _addresses(params))
    corrections = _advanced(table, len(out), *betas, finite) if moments else None
    shape = blocks("project", dot, _capability(grads[0].device))
    shape = shape._replace(stages=_TANGENT_STAGES) if tangent else shape
    _launch(
        _project,
        (triton.cdiv(other, shape.rows) * triton.cdiv(rank, shape.columns), len(out)),
        table,
        finite,
        *(corrections, lengths, m, n, rank, *_moment_scalars(*betas, eps)),
        OUT=_TYPES[dtype],
        G=_TYPES[grads[0].dtype],
        Q=_TYPES[bases[0].dtype],
        W=_TYPES[params[0].dtype] if tangent else None,
        ALIGN=table.align,
        DOT=dot,
        LEFT=side == "left",
        TANGENT=tangent is not None,
        ADAM=moments is not None,
        GRAMS=grams,
        ROWS=shape.rows,
        COLUMNS=shape.columns,
        DEPTH=shape.depth,
        SLICE=shape.slice,
        blocks=shape,
    )
    return list(out)


def adam_update_(
    lows: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    transform: str = "none",
    eps_inside: bool = False,
    finite: Tensor | None = None,
) -> list[Tensor]:
    """See the reference."""
    if not _fits(lows, exp_avgs, exp_avg_sqs, steps):
        return reference.adam_update_(
            lows, exp_avgs, exp_avg_sqs, steps, beta1, beta2, eps, transform, eps_inside, finite
        )
    return _updates(lows, exp_avgs, exp_avg_sqs, steps, None, beta1, beta2, eps, transform, eps_inside, finite)


def _updates(
    lows: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    corrections: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    transform: str,
    eps_inside: bool,
    finite: Tensor | None,
) -> list[Tensor]:
    """N; without corrections, the steps advance."""
    out = torch.empty((len(lows), *lows[0].shape), dtype=exp_avgs[0].dtype, device=lows[0].device).unbind()
    table = _table(out, lows, exp_avgs, exp_avg_sqs, (), steps)
    if corrections is None:
        corrections = _advanced(table, len(out), beta1, beta2, finite)
    _step_elements(
        *(table, finite, out, lows, corrections, 0.0, -1, _moment_scalars(beta1, beta2, eps), 0.0, 0.0, ALL),
        ADAM=True,
        GRAMS=transform == "grams",
        CAUTIOUS=transform == "cautious",
        EPS_INSIDE=eps_inside,
    )
    return list(out)


def _step_elements(
    table: _Table,
    finite: Tensor | None,
    out: Sequence[Tensor],
    source: Sequence[Tensor],
    corrections: Tensor | None,
    lr: float | Tensor,
    lr_mode: int,
    moments: tuple[float, float, float, float],
    weight_decay: float,
    scale: float,
    window: Window,
    seeds: Sequence[int] = (),
    **modes: bool,
) -> None:
    size = out[0].numel()
    names = ("ADAM", "APPLY", "SIGN", "GRAMS", "CAUTIOUS", "EPS_INSIDE")
    constants: dict[str, Any] = dict.fromkeys(names, False) | modes
    noise = _noise_mode(out, seeds, window.origin, *(() if window.consecutive else window[1:]))
    for kept, counts in _counting(constants["CAUTIOUS"], out):
        _launch(
            _elementwise,
            (triton.cdiv(size, _BLOCK), len(out)),
            table,
            finite,
            *(corrections, kept, lr, size, *moments, weight_decay, scale, *window),
            OUT=_TYPES[out[0].dtype],
            IN=_TYPES[source[0].dtype],
            ALIGN=table.align,
            LR=lr_mode,
            COUNT=counts,
            NOISE=noise,
            BLOCK=_BLOCK,
            **constants,
        )


def _counting(cautious: bool, out: Sequence[Tensor]) -> list[tuple[Tensor | None, bool]]:
    """What is kept of every tensor, and whether a launch is to count it: one that does comes before the step."""
    if not cautious:
        return [(None, False)]
    kept = torch.zeros(len(out), dtype=torch.int64, device=out[0].device)
    return [(kept, True), (kept, False)]


def apply_(
    params: list[Tensor],
    updates: list[Tensor],
    bases: list[Tensor],
    steps: list[Tensor],
    seeds: Sequence[int],
    lr: Tensor,
    weight_decay: float,
    scale: float,
    side: Side | None,
    sign: bool = False,
    window: Window = ALL,
    finite: Tensor | None = None,
) -> None:
    """See the reference."""
    if side == "both" or not _fits(params, updates, steps, bases=bases):
        reference.apply_(params, updates, bases, steps, seeds, lr, weight_decay, scale, side, sign, window, finite)
        return
    torch.autograd.graph.increment_version(params)  # as every in-place op of torch: a stale graph is refused
    if side is None:
        rate, mode = _learning_rate(lr)
        _step_elements(
            *(_table(params, updates, (), (), (), steps, seeds), finite, params, updates, None, rate, mode),
            *(_moment_scalars(0, 0, 0), weight_decay, scale, window, seeds),
            APPLY=True,
            SIGN=sign,
        )
        return
    _apply_all(params, updates, bases, steps, seeds, lr, weight_decay, scale, side, sign, window, finite)


def _apply_all(
    params: Sequence[Tensor],
    updates: Sequence[Tensor],
    bases: list[Tensor],
    steps: Sequence[Tensor],
    seeds: Sequence[int],
    lr: Tensor,
    weight_decay: float,
    scale: float,
    side: Side | None,
    sign: bool,
    window: Window,
    finite: Tensor | None,
    lengths: Tensor | None = None,
) -> None:
    """W; with `lengths`, its rows come to them: they are measured by a launch of their own before."""
    dot = DOT[params[0].dtype]
    bases = _operands(bases, dot)
    table = _table(params, updates, (), (), bases, steps, seeds)
    rate, mode = _learning_rate(lr)
    (m, n), rank = params[0].shape, bases[0].shape[-1]
    pitch = _pitch(window, n)
    shape = blocks("apply", dot, _capability(params[0].device))
    tiles = triton.cdiv(n, shape.columns)
    squares = None if lengths is None else lengths.new_empty(len(params), tiles, m)
    for measure in (False,) if lengths is None else (True, False):
        _launch(
            _apply,
            (triton.cdiv(m, shape.rows) * tiles, len(params)),
            table,
            finite,
            *(lengths, squares, rate, m, n, rank, weight_decay, scale, window.origin, pitch),
            W=_TYPES[params[0].dtype],
            IN=_TYPES[updates[0].dtype],
            Q=_TYPES[bases[0].dtype],
            ALIGN=table.align,
            LR=mode,
            DOT=dot,
            LEFT=side == "left",
            SIGN=sign,
            MEASURE=measure,
            NOISE=_noise_mode(params, seeds, n, window.origin, pitch),
            ROWS=shape.rows,
            COLUMNS=shape.columns,
            DEPTH=shape.depth,
            SLICE=shape.slice,
            blocks=shape,
        )


def write_(param: Tensor, value: Tensor, step: Tensor, seed: int | None, window: Window = ALL) -> None:
    """See the reference; the step stays on the device."""
    # W ← (1 - lr·λ) W - lr·value with lr = λ = -1 is W ← value.
    minus_one = torch.tensor(-1.0, dtype=torch.float64)
    apply_([param], [value], [], [step], () if seed is None else (seed,), minus_one, -1.0, 1.0, None, window=window)


def projected_adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    bases: list[Tensor],
    steps: list[Tensor],
    seeds: Sequence[int],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float,
    side: Side | None,
    transform: str,
    window: Window = ALL,
    finite: Tensor | None = None,
) -> None:
    """See the reference."""
    if side == "both" or not _fits(params, grads, exp_avgs, exp_avg_sqs, steps, bases=bases):
        reference.projected_adam_(
            *(params, grads, exp_avgs, exp_avg_sqs, bases, steps, seeds, lr),
            *(beta1, beta2, eps, weight_decay, scale, side, transform, window),
            finite=finite,
        )
        return
    grams = transform == "grams"
    if side is None:
        table = _table(params, grads, exp_avgs, exp_avg_sqs, (), steps, seeds)
        corrections = _advanced(table, len(params), beta1, beta2, finite)
        rate, mode = _learning_rate(lr)
        torch.autograd.graph.increment_version(params)
        _step_elements(
            *(table, finite, params, grads, corrections, rate, mode),
            *(_moment_scalars(beta1, beta2, eps), weight_decay, scale, window, seeds),
            ADAM=True,
            APPLY=True,
            GRAMS=grams,
            CAUTIOUS=transform == "cautious",
        )
        return
    if transform == "cautious":
        lows = project(grads, bases, side, exp_avgs[0].dtype)
        updates = adam_update_(lows, exp_avgs, exp_avg_sqs, steps, beta1, beta2, eps, transform, finite=finite)
        apply_(params, updates, bases, steps, seeds, lr, weight_decay, scale, side, False, window, finite)
        return
    dot = DOT[grads[0].dtype]
    low_type = _DOT_TYPES.get(dot, torch.float32)
    fused = bases[0].shape[-1] <= FUSED_RANK[dot] and params[0].shape[-1] % FUSED_MULTIPLE == 0
    workspace = (0 if fused else exp_avgs[0].numel()) + (bases[0].numel() if dot in _DOT_TYPES else 0)
    part = max(1, _WORKSPACE // max(1, workspace * low_type.itemsize))
    for at in (slice(start, start + part) for start in range(0, len(params), part)):
        rounded, own = _operands(bases[at], dot), None if finite is None else finite[at]
        if fused:
            _fused_adam_(
                *(params[at], grads[at], exp_avgs[at], exp_avg_sqs[at], rounded, steps[at], seeds[at], lr),
                *((beta1, beta2), eps, weight_decay, scale, side, grams, window, own),
            )
            continue
        updates = _project_all(
            *(grads[at], rounded, side, low_type, dot),
            *((exp_avgs[at], exp_avg_sqs[at], steps[at]), (beta1, beta2), eps, grams, own),
        )
        apply_(params[at], updates, rounded, steps[at], seeds[at], lr, weight_decay, scale, side, False, window, own)


def _fused_adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    bases: list[Tensor],
    steps: Sequence[Tensor],
    seeds: Sequence[int],
    lr: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: float,
    side: Side | None,
    grams: bool,
    window: Window,
    finite: Tensor | None,
) -> None:
    dot = DOT[grads[0].dtype]
    (m, n), rank = params[0].shape, bases[0].shape[-1]
    table = _table(params, grads, exp_avgs, exp_avg_sqs, bases, steps, seeds)
    corrections = _advanced(table, len(params), *betas, finite)
    rate, mode = _learning_rate(lr)
    shape, pitch = blocks("fused", dot, _capability(params[0].device)), _pitch(window, n)
    torch.autograd.graph.increment_version(params)
    _launch(
        _fused,
        (triton.cdiv(n if side == "left" else m, shape.rows), len(params)),
        table,
        *(finite, corrections, rate, m, n, rank, *_moment_scalars(*betas, eps), weight_decay, scale),
        *(window.origin, pitch),
        W=_TYPES[params[0].dtype],
        G=_TYPES[grads[0].dtype],
        Q=_TYPES[bases[0].dtype],
        ALIGN=table.align,
        LR=mode,
        DOT=dot,
        LEFT=side == "left",
        GRAMS=grams,
        NOISE=_noise_mode(params, seeds, n, window.origin, pitch),
        ROWS=shape.rows,
        DEPTH=shape.depth,
        SLICE=shape.slice,
        RANK=max(16, triton.next_power_of_2(rank)),
        blocks=shape,
    )


def weight_norm_adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    length_avgs: list[Tensor],
    length_avg_sqs: list[Tensor],
    bases: list[Tensor],
    steps: list[Tensor],
    seeds: Sequence[int],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float,
    side: Side | None,
    transform: str,
    finite: Tensor | None = None,
) -> None:
    """The whole step of rules.WeightNormAdam for a bucket, without a temporary as large as a matrix.

    G and W are read for the lengths and radial parts of rows, again for R of the tangential part, W once for the
    lengths it would come to and once to be written; back(N) is formed for both of these.
    """
    kind = grads[0].dtype if all(grad.dtype == grads[0].dtype for grad in grads) else torch.float32
    grads = [grad.to(kind).contiguous() for grad in grads]
    torch.autograd.graph.increment_version(params)
    between = sum(basis.numel() for basis in bases) // len(params) if side == "both" else 0
    part = max(1, _WORKSPACE // (4 * (2 * exp_avgs[0].numel() + between)))
    with reference.contiguous(params, exp_avgs, exp_avg_sqs) as own:
        for at in (slice(start, start + part) for start in range(0, len(params), part)):
            w, means, squares, g, k = (column[at] for column in (*own, grads, steps))
            lefts, rights = bases[: len(params)][at], bases[len(params) :][at]
            some, rates = None if finite is None else finite[at], lr[at] if lr.ndim else lr
            table = _table(w, g, length_avgs[at], length_avg_sqs[at], (), k)
            corrections = _advanced(table, len(w), beta1, beta2, some)
            lengths = torch.empty((len(w), 2, w[0].shape[0]), dtype=torch.float32, device=w[0].device)
            rate, mode = _learning_rate(rates)
            (m, n), wide = w[0].shape, torch.float32
            _launch(
                _lengths,
                (triton.cdiv(m, _LENGTH_BLOCKS.rows), len(w)),
                table,
                some,
                *(corrections, lengths, rate, m, n, *_moment_scalars(beta1, beta2, eps), weight_decay),
                W=_TYPES[w[0].dtype],
                G=_TYPES[kind],
                ALIGN=table.align,
                LR=mode,
                ROWS=_LENGTH_BLOCKS.rows,
                COLUMNS=_LENGTH_BLOCKS.columns,
                blocks=_LENGTH_BLOCKS,
            )
            first: Side | None = "left" if side == "both" else side
            lows = _project_all(g, lefts, first, wide, DOT[kind], finite=some, tangent=(w, lengths))
            if side == "both":
                lows = _project_all(lows, rights, "right", wide, DOT[wide], finite=some)
            updates = _updates(lows, means, squares, k, corrections, beta1, beta2, eps, transform, False, some)
            if side == "both":
                updates = _project_all(_operands(lefts, DOT[wide]), updates, "right", wide, DOT[wide], finite=some)
            outer, last = (rights, "right") if side == "both" else (lefts, side)
            _apply_all(w, updates, outer, k, seeds[at], rates, 0.0, scale, last, False, ALL, some, lengths)


def encode_(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    table: Tensor,
    axis: int,
    seed: int | None,
    step: Tensor,
    begin: int = 0,
) -> None:
    """See the reference, whose bits these are."""
    tensors = [reference.rows(tensor, axis) for tensor in (x, codes, scales)]
    count, length = tensors[0].shape
    shape = _coded_blocks(length)
    _start(
        _encode,
        (triton.cdiv(count, shape["ROWS"]), triton.cdiv(length, shape["BLOCK"])),
        *(*tensors, table, step, 0 if seed is None else seed, begin, count, length, *_strides(tensors)),
        LAST=len(table) - 2,
        TINY=_TINY,
        NOISE=0 if seed is None else _coded_noise(length, begin),
        PACKED=len(table) <= 16,
        **shape,
    )


def decode(codes: Tensor, scales: Tensor, table: Tensor, axis: int, length: int, dtype: torch.dtype) -> Tensor:
    """See the reference, whose bits these are."""
    whole = list(codes.shape)
    whole[axis] = length
    out = torch.empty(whole, dtype=dtype, device=codes.device)
    tensors = [reference.rows(tensor, axis) for tensor in (out, codes, scales)]
    count, shape = len(tensors[0]), _coded_blocks(length)
    _start(
        _decode,
        (triton.cdiv(count, shape["ROWS"]), triton.cdiv(length, shape["BLOCK"])),
        *(*tensors, table, count, length, *_strides(tensors)),
        PACKED=len(table) <= 16,
        **shape,
    )
    return out


def _strides(tensors: Sequence[Tensor]) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()]


def _coded_blocks(length: int) -> dict[str, Any]:
    """Rows and columns of a program: a whole block, and as many as fill it."""
    block = min(BLOCK, max(16, triton.next_power_of_2(length)))
    return {"ROWS": _CODED // block, "BLOCK": block}


def _coded_noise(length: int, begin: int) -> int:
    """See _noise."""
    return 8 if length % 8 == 0 and begin % 8 == 0 else 1


def coded_adam_(
    params: list[Tensor],
    grads: list[Tensor],
    codes: list[Tensor],
    scales: list[Tensor],
    tables: list[Tensor],
    streams: Sequence[int],
    axis: int,
    begin: int,
    steps: list[Tensor],
    seeds: Sequence[int],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float,
    transform: str,
    eps_inside: bool = False,
    finite: Tensor | None = None,
) -> None:
    """See the reference; Adam rounds otherwise in the last bit, so that a code in 10,000 is the one beside it."""
    own = (params, grads, codes, scales, tables, streams, axis, begin, steps)
    adam = (beta1, beta2, eps)
    if not _fits(params, grads, steps):
        reference.coded_adam_(*own, seeds, lr, *adam, weight_decay, scale, transform, eps_inside, finite)
        return
    torch.autograd.graph.increment_version(params)
    _step_coded(*own, *adam, transform, eps_inside, finite, seeds, lr, weight_decay, scale)


def coded_adam_update_(
    lows: list[Tensor],
    codes: list[Tensor],
    scales: list[Tensor],
    tables: list[Tensor],
    streams: Sequence[int],
    axis: int,
    begin: int,
    steps: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    transform: str = "none",
    eps_inside: bool = False,
    finite: Tensor | None = None,
) -> list[Tensor]:
    """N as coded_adam_ would apply it."""
    lows = [low.contiguous() for low in lows]
    out = torch.empty((len(lows), *lows[0].shape), dtype=torch.float32, device=lows[0].device).unbind()
    _step_coded(
        out, lows, codes, scales, tables, streams, axis, begin, steps, beta1, beta2, eps, transform, eps_inside, finite
    )
    return list(out)


def _step_coded(
    out: Sequence[Tensor],
    source: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    tables: Sequence[Tensor],
    streams: Sequence[int],
    axis: int,
    begin: int,
    steps: Sequence[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    transform: str,
    eps_inside: bool,
    finite: Tensor | None,
    seeds: Sequence[int] = (),
    lr: Tensor | None = None,
    weight_decay: float = 0.0,
    scale: float = 0.0,
) -> None:
    """W into `out` with a learning rate, without one N."""
    first, second = codes[: len(out)], codes[len(out) :]
    table = _table(out, source, first, second, (), steps, seeds, [*_addresses(scales), *streams])
    corrections = _advanced(table, len(out), beta1, beta2, finite)
    cautious = transform == "cautious"
    rate, mode = (0.0, -1) if lr is None else _learning_rate(lr)
    tensors = [reference.rows(tensor, axis) for tensor in (out[0], codes[0], scales[0])]
    (count, length), shape = tensors[0].shape, _coded_blocks(out[0].shape[axis])
    for kept, counts in _counting(cautious, out):
        _launch(
            _coded_adam,
            (triton.cdiv(count, shape["ROWS"]) * triton.cdiv(length, shape["BLOCK"]), len(out)),
            table,
            finite,
            *(corrections, kept, rate, *tables, begin, count, length, *_strides(tensors)),
            *(*_moment_scalars(beta1, beta2, eps), weight_decay, scale),
            OUT=_TYPES[out[0].dtype],
            IN=_TYPES[source[0].dtype],
            ALIGN=table.align,
            LR=mode,
            COUNT=counts,
            APPLY=lr is not None,
            GRAMS=transform == "grams",
            CAUTIOUS=cautious,
            EPS_INSIDE=eps_inside,
            NOISE=_coded_noise(length, begin),
            ROUND=bool(seeds) and out[0].dtype == torch.bfloat16,
            SIGNED_LAST=len(tables[0]) - 2,
            UNSIGNED_LAST=len(tables[1]) - 2,
            TINY=_TINY,
            PACKED=len(tables[0]) <= 16,
            num_warps=_CODED_WARPS,
            **shape,
        )
