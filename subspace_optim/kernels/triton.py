"""The steps of reference.py as Triton kernels: a whole bucket at a time, in two or three launches.

This is their host: what is launched, on which tables and in which blocks. The kernels are in triton_device.py.

Nothing here waits for the device, and a step can be captured in a CUDA graph. What these kernels do not cover is done
by the reference: float64, and tensors that are not contiguous. What the cautious transform keeps is counted by a launch
before the one that writes; projected, it steps in three pieces, as projections on both sides do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import philox
from ..philox import Window
from ..types import BLOCK, Hyper, Moments, Plan, Seeds, Side, Weights, scalar
from . import reference
from . import triton_device as kernels
from .reference import Codes, back, grad_max, lines_of, part_of, transform_

__all__ = [
    "adam_update_",
    "apply_",
    "back",
    "coded_adam_",
    "coded_adam_update_",
    "compressed_adafactor_",
    "decode_",
    "encode_",
    "grad_max",
    "line_norms",
    "linear_update_",
    "project",
    "projected_adam_",
    "transform_",
    "weight_norm_adam_",
    "words",
    "write_",
]


# How tl.dot multiplies, by dtype of the gradient (or, in apply_, of the parameter). tf32x3 is float32 to 1e-6; with
# 16-bit operands the basis and N are rounded as the gradient was, 0.2 % of an update's norm in bfloat16. "tf32x3" is
# valid for every dtype, at a sixth of the speed.
DOT = {torch.float32: "tf32x3", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Largest rank of fused: above it the accumulators leave the registers, as they do where rows are not aligned.
FUSED_RANK = {"tf32x3": 128, "tf32": 128, "bf16": 256, "fp16": 256}
FUSED_MULTIPLE = 8  # of which n must be a multiple

COMPENSATES = True  # what rounding takes from a parameter, in the place of its seed
_WORKSPACE = 2**27  # bytes of updates between project and apply: a larger bucket is stepped in parts
_BLOCK = 1024  # elements of a program of elementwise
_DRAWN = 256  # blocks of four words of a program of words
_CODED = 2048  # elements of a program of encode, decode and coded_adam
_CODED_WARPS = 8  # of coded_adam
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


_BEFORE_3_8 = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)

# (kernel, 16-bit operands, generation) → blocks; the column block of fused is the rank. 80 stands for every GPU with
# about 100 KB of shared memory, 90 for Hopper, 100 for data-centre Blackwell. tests/test_triton_aot.py compiles every
# row for six architectures and refuses spills, which is why one depends on the compiler.
BLOCKS = {
    ("fused", True, 80): Blocks(64, 0, 32, 16, 8, 2),
    ("fused", True, 90): Blocks(128 if _BEFORE_3_8 else 64, 0, 32, 16, 8, 2),
    ("fused", True, 100): Blocks(64, 0, 32, 16, 8, 2),
    ("fused", False, 80): Blocks(64, 0, 16, 32, 8, 2),
    ("fused", False, 90): Blocks(64, 0, 32, 32, 8, 2),
    ("fused", False, 100): Blocks(64, 0, 32, 32, 8, 2),
    ("project", True, 80): Blocks(128, 64, 32, 16, 8, 3),
    ("project", True, 90): Blocks(128, 128, 64, 32, 8, 3),
    ("project", True, 100): Blocks(128, 128, 64, 8, 8, 3),
    ("project", False, 80): Blocks(64, 64, 16, 16, 4, 3),
    ("project", False, 90): Blocks(64, 64, 32, 32, 4, 3),
    ("project", False, 100): Blocks(64, 64, 32, 32, 4, 3),
    ("apply", True, 80): Blocks(128, 64, 32, 32, 8, 3),
    ("apply", True, 90): Blocks(128, 128, 64, 32, 8, 3),
    ("apply", True, 100): Blocks(128, 128, 64, 32, 8, 3),
    ("apply", False, 80): Blocks(64, 64, 16, 32, 4, 3),
    ("apply", False, 90): Blocks(64, 64, 32, 32, 4, 3),
    ("apply", False, 100): Blocks(64, 64, 32, 32, 4, 3),
}


_LENGTH_BLOCKS = Blocks(16, 128, 0, 0, 4, 2)
_SQUARE_BLOCKS = Blocks(32, 128, 0, 0, 4, 1)
_KIND_STAGES = 2  # of project where a stage holds more than a tile of G


def supports(plan: Plan | None) -> str | None:
    """Why a CUDA tensor of this plan cannot be stepped here, or None; without a plan, whether any can."""
    if torch.version.hip is not None:
        return "not tried on ROCm"
    if plan is None:
        return None
    if _capability(plan.device) < 80:
        return "the GPU is older than compute capability 8.0"
    return None if plan.dtype in _TYPES else f"no kernel for {plan.dtype}"


def blocks(kernel: str, dot: str, capability: int) -> Blocks:
    """The program shape of a kernel on an architecture: 80, 86, 89, 90, 100, 120."""
    return BLOCKS[block_key(kernel, dot, capability)]


def block_key(kernel: str, dot: str, capability: int) -> tuple[str, bool, int]:
    """Where `BLOCKS` has that shape."""
    return kernel, dot in _DOT_TYPES, capability // 10 * 10 if 90 <= capability < 110 else 80


def _tile(shape: Blocks) -> dict[str, Any]:
    """Of a launch."""
    sizes = {"ROWS": shape.rows, "COLUMNS": shape.columns, "DEPTH": shape.depth, "SLICE": shape.slice}
    return sizes | {"blocks": shape}


@lru_cache
def _capability(device: torch.device) -> int:
    if device.type != "cuda":  # interpreted
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


class _Table(NamedTuple):
    """Addresses and seeds of a bucket, (rows, B) on the device; what all of those of large tensors are multiples of."""

    on_device: Tensor
    align: int


def _table(
    out: Sequence[Tensor],
    grads: Sequence[Tensor] = (),
    exp_avgs: Sequence[Tensor] = (),
    exp_avg_sqs: Sequence[Tensor] = (),
    bases: Sequence[Tensor] = (),
    steps: Sequence[Tensor] = (),
    seeds: Seeds = (),
    further: Sequence[int] = (),
) -> _Table:
    """The order of the rows is that of the arguments; a kernel reads only rows that its caller gave."""
    columns = (out, grads, exp_avgs, exp_avg_sqs, bases, steps)
    rows = [_addresses(column) or [0] * len(out) for column in columns]
    rests = reference.rests(seeds)
    values: tuple[Any, ...] = tuple(chain(*rows, _addresses(rests) or seeds or [0] * len(out), further))
    aligned = 7 if rests else 5
    device = out[0].device
    if device.type != "cuda":
        return _fill_table(values, len(out), aligned, device)
    if torch.cuda.is_current_stream_capturing():  # the graph writes its own table, and must find it at every replay
        return _fill_table(values, len(out), aligned, device)
    return _cached_table(values, len(out), aligned, device, torch.cuda.current_stream(device).cuda_stream)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


@lru_cache(maxsize=256)
def _cached_table(values: tuple[int, ...], count: int, aligned: int, device: torch.device, stream: int) -> _Table:
    """An unchanged bucket finds its table; the stream is a key because it orders the writing before the reading."""
    return _fill_table(values, count, aligned, device)


def _fill_table(values: tuple[int, ...], count: int, aligned: int, device: torch.device) -> _Table:
    table, large = philox.integers(values, device), [*values[: 5 * count], *values[6 * count : aligned * count]]
    return _Table(table, 16 if all(address % 16 == 0 for address in large) else 1)


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


def _operands(bases: Sequence[Tensor], dot: str) -> Sequence[Tensor]:
    """The bases, contiguous and as tl.dot takes them: every tile reads them again, and 16 bits cost L2 half as much."""
    dtype = _DOT_TYPES.get(dot, torch.float32)
    if not bases or (bases[0].dtype == dtype and all(basis.is_contiguous() for basis in bases)):
        return bases
    rounded = list(torch.empty((len(bases), *bases[0].shape), dtype=dtype, device=bases[0].device).unbind())
    torch._foreach_copy_(rounded, list(bases))
    return rounded


def _advanced(table: _Table, count: int, betas: tuple[float, float], finite: Tensor | None) -> Tensor:
    """Bias corrections (2, count) of the steps in the table, which advance by one."""
    corrections = torch.empty((2, count), dtype=torch.float32, device=table.on_device.device)
    logs = (math.log(beta) if beta > 0 else -math.inf for beta in betas)
    _launch(kernels.advance, (triton.cdiv(count, 128),), table, finite, corrections, count, *logs, BLOCK=128)
    return corrections


def _moment_scalars(hyper: Hyper) -> tuple[float, float, float, float]:
    beta1, beta2 = hyper.betas
    return 1 - beta1, beta2, 1 - beta2, max(hyper.eps, reference._EPS_FLOOR)


def _noise_mode(params: Sequence[Tensor], seeds: Seeds, *starts: int) -> int:
    """See _noise: 0 rounds to nearest; `starts` are where rows of whole blocks would have to begin."""
    if reference.rests(seeds):
        return -1
    if not seeds or params[0].dtype != torch.bfloat16:
        return 0
    return 8 if all(start % 8 == 0 for start in starts) else 1


def _pitch(window: Window, n: int) -> int:
    """Between the beginnings of rows of n in the whole."""
    return n if window.consecutive else window.pitch


def words(seeds: Sequence[int], count: int, device: torch.device) -> Tensor:
    """See the reference, whose bits these are."""
    blocks = triton.cdiv(count, 4)
    out = torch.empty((len(seeds), blocks, 4), dtype=torch.int64, device=device)
    grid = (triton.cdiv(blocks, _DRAWN), len(seeds))
    _start(kernels.words, grid, out, philox.integers(seeds, device), blocks, BLOCK=_DRAWN)
    return out


def line_norms(grads: list[Tensor], dim: int, dtype: torch.dtype) -> list[Tensor]:
    """See the reference; G is read once for all of the bucket."""
    if dtype != torch.float32 or not _fits(grads):
        return reference.line_norms(grads, dim, dtype)
    by_row, by_column = _squares(_table(grads, grads), grads, None)
    norms = by_row.sum(1).sqrt_().unsqueeze(-1) if dim == -1 else by_column.sum(1, keepdim=True).sqrt_()
    return list(norms.unbind())


def _squares(table: _Table, grads: Sequence[Tensor], finite: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums of squares of every G, of rows (count, tiles of columns, m), and of columns (count, tiles of rows, n)."""
    count, (m, n), shape = len(grads), grads[0].shape, _SQUARE_BLOCKS
    sizes = (triton.cdiv(n, shape.columns), m), (triton.cdiv(m, shape.rows), n)
    by_row, by_column = (torch.empty((count, *size), dtype=torch.float32, device=grads[0].device) for size in sizes)
    _launch(
        kernels.squares,
        (by_row.shape[1] * by_column.shape[1], count),
        table,
        finite,
        *(by_row, by_column, m, n),
        G=_TYPES[grads[0].dtype],
        ALIGN=table.align,
        ROWS=shape.rows,
        COLUMNS=shape.columns,
        blocks=shape,
    )
    return by_row, by_column


def project(grads: list[Tensor], bases: Sequence[Tensor], side: Side | None, dtype: torch.dtype) -> list[Tensor]:
    """See the reference."""
    if side is None or dtype not in _TYPES or not _fits(grads, bases=bases):
        return reference.project(grads, bases, side, dtype)
    dot = DOT[grads[0].dtype]
    if side == "both":
        lows = _project_all(grads, bases[: len(grads)], "left", torch.float32, dot)
        return _project_all(lows, bases[len(grads) :], "right", dtype, DOT[torch.float32])
    return _project_all(grads, bases, side, dtype, dot)


def _project_all(
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    side: Side | None,
    dtype: torch.dtype,
    dot: str,
    moments: Moments | None = None,
    steps: Sequence[Tensor] = (),
    hyper: Hyper | None = None,
    finite: Tensor | None = None,
    kind: str = "whole",
    numbers: Tensor | None = None,
    params: Sequence[Tensor] = (),
    average: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
) -> list[Tensor]:
    """R in `dtype`; of what another kind (see kernels._gradient) makes of G by its numbers and, tangential, by W.

    With moments and steps, N, and they advance. With an average (outputs, what they were), it advances by R.
    """
    (m, n), rank = grads[0].shape, bases[0].shape[-1]
    other = n if side == "left" else m
    bases = _operands(bases, dot)
    low = (rank, n) if side == "left" else (m, rank)
    hyper = hyper or Hyper()
    empty: Sequence[Tensor] = ()
    if average is None:
        out: Sequence[Tensor] = torch.empty((len(grads), *low), dtype=dtype, device=grads[0].device).unbind()
        past, squares = moments or (empty, empty)
    else:
        (out, past), squares = average, empty
    table = _table(out, grads, past, squares, bases, steps, (), _addresses(params))
    corrections = _advanced(table, len(out), hyper.betas, finite) if moments else None
    shape = blocks("project", dot, _capability(grads[0].device))
    shape = shape if kind == "whole" else shape._replace(stages=_KIND_STAGES)
    _launch(
        kernels.project,
        (triton.cdiv(other, shape.rows) * triton.cdiv(rank, shape.columns), len(out)),
        table,
        finite,
        *(corrections, numbers, m, n, rank, *_moment_scalars(hyper)),
        OUT=_TYPES[dtype],
        G=_TYPES[grads[0].dtype],
        Q=_TYPES[bases[0].dtype],
        W=_TYPES[params[0].dtype] if params else None,
        ALIGN=table.align,
        DOT=dot,
        LEFT=side == "left",
        KIND=kind,
        ADAM=moments is not None,
        AVERAGE=average is not None,
        GRAMS=hyper.transform == "grams",
        **_tile(shape),
    )
    return list(out)


def adam_update_(
    lows: list[Tensor],
    moments: Moments,
    steps: list[Tensor],
    hyper: Hyper,
    eps_inside: bool = False,
    finite: Tensor | None = None,
) -> list[Tensor]:
    """See the reference."""
    if not _fits(lows, *moments, steps):
        return reference.adam_update_(lows, moments, steps, hyper, eps_inside, finite)
    return _updates(lows, moments, steps, hyper, eps_inside, finite)


def _updates(
    lows: Sequence[Tensor],
    moments: Moments,
    steps: Sequence[Tensor],
    hyper: Hyper,
    eps_inside: bool,
    finite: Tensor | None,
    corrections: Tensor | None = None,
) -> list[Tensor]:
    """N; without corrections, the steps advance."""
    out = torch.empty((len(lows), *lows[0].shape), dtype=moments.exp_avgs[0].dtype, device=lows[0].device).unbind()
    table = _table(out, lows, *moments, (), steps)
    if corrections is None:
        corrections = _advanced(table, len(out), hyper.betas, finite)
    _step_elements(table, Weights(list(out), [], finite=finite), lows, hyper, corrections, EPS_INSIDE=eps_inside)
    return list(out)


def linear_update_(
    lows: list[Tensor],
    exp_avgs: list[Tensor],
    steps: list[Tensor],
    look: tuple[float, float],
    keep: tuple[float, float],
    transform: str = "none",
    finite: Tensor | None = None,
) -> list[Tensor]:
    """See the reference."""
    if not _fits(lows, exp_avgs, steps):
        return reference.linear_update_(lows, exp_avgs, steps, look, keep, transform, finite)
    count, size = len(lows), lows[0].numel()
    out = torch.empty((count, *lows[0].shape), dtype=torch.float32, device=lows[0].device).unbind()
    table = _table(out, lows, exp_avgs, (), (), steps)
    _advanced(table, count, (0.0, 0.0), finite)
    for kept, counts in _counting(transform == "cautious", out):
        _launch(
            kernels.linear_update,
            (triton.cdiv(size, _BLOCK), count),
            table,
            finite,
            *(kept, size, *look, *keep),
            IN=_TYPES[lows[0].dtype],
            ALIGN=table.align,
            TRANSFORM=transform,
            COUNT=counts,
            BLOCK=_BLOCK,
        )
    return list(out)


def _step_elements(
    table: _Table,
    weights: Weights,
    source: Sequence[Tensor],
    hyper: Hyper,
    corrections: Tensor | None = None,
    lines: tuple[int, int, int] = (1, 0, 0),
    **modes: bool,
) -> None:
    """N of R with corrections, otherwise `source` is N; W where it is to be APPLYed, otherwise N in its place.

    `lines`: elements of a row, and how far apart the factors of the FACTORS of rows, and of columns, are.
    """
    out, window, adam = weights.params, weights.window, corrections is not None
    constants: dict[str, Any] = dict.fromkeys(("APPLY", "SIGN", "EPS_INSIDE", "FACTORS"), False) | modes
    size, (rate, mode) = out[0].numel(), _learning_rate(hyper.lr) if constants["APPLY"] else (0.0, -1)
    cautious = adam and hyper.transform == "cautious"
    noise = _noise_mode(out, weights.seeds, window.origin, *(() if window.consecutive else window[1:]))
    for kept, counts in _counting(cautious, out):
        _launch(
            kernels.elementwise,
            (triton.cdiv(size, _BLOCK), len(out)),
            table,
            weights.finite,
            *(corrections, kept, rate, size, *_moment_scalars(hyper), hyper.weight_decay, hyper.scale, *window, *lines),
            OUT=_TYPES[out[0].dtype],
            IN=_TYPES[source[0].dtype],
            ALIGN=table.align,
            LR=mode,
            ADAM=adam,
            GRAMS=adam and hyper.transform == "grams",
            CAUTIOUS=cautious,
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
    weights: Weights,
    updates: list[Tensor],
    bases: Sequence[Tensor],
    hyper: Hyper,
    side: Side | None,
    sign: bool = False,
    factors: Sequence[Tensor] = (),
) -> None:
    """See the reference."""
    params, steps, seeds, _, finite = weights
    if not _fits(params, updates, steps, reference.rests(seeds), factors, bases=bases):
        reference.apply_(weights, updates, bases, hyper, side, sign, factors)
        return
    torch.autograd.graph.increment_version(params)  # as every in-place op of torch: a stale graph is refused
    if side is None:
        table = _table(params, updates, (), (), (), steps, seeds, _addresses(factors))
        lines, modes = lines_of(factors, params[0]), {"SIGN": sign, "FACTORS": len(factors) > 0}
        _step_elements(table, weights, updates, hyper, None, lines, APPLY=True, **modes)
        return
    if side == "both":
        updates, bases, side = _left(updates, bases[: len(params)], finite), bases[len(params) :], "right"
    _apply_all(weights, updates, bases, hyper, side, sign)


def _left(updates: Sequence[Tensor], bases: Sequence[Tensor], finite: Tensor | None) -> list[Tensor]:
    """P N in float32, the first half of back(N) on both sides."""
    dot = DOT[torch.float32]
    return _project_all(_operands(bases, dot), updates, "right", torch.float32, dot, finite=finite)


def _apply_all(
    weights: Weights,
    updates: Sequence[Tensor],
    bases: Sequence[Tensor],
    hyper: Hyper,
    side: Side | None,
    sign: bool = False,
    lengths: Tensor | None = None,
) -> None:
    """W; with `lengths`, its rows come to them: they are measured by a launch of their own before."""
    params, steps, seeds, window, finite = weights
    dot = DOT[params[0].dtype]
    bases = _operands(bases, dot)
    table = _table(params, updates, (), (), bases, steps, seeds)
    rate, mode = _learning_rate(hyper.lr)
    (m, n), rank = params[0].shape, bases[0].shape[-1]
    pitch = _pitch(window, n)
    shape = blocks("apply", dot, _capability(params[0].device))
    tiles = triton.cdiv(n, shape.columns)
    squares = None if lengths is None else lengths.new_empty(len(params), tiles, m)
    for measure in (False,) if lengths is None else (True, False):
        _launch(
            kernels.apply,
            (triton.cdiv(m, shape.rows) * tiles, len(params)),
            table,
            finite,
            *(lengths, squares, rate, m, n, rank, hyper.weight_decay, hyper.scale, window.origin, pitch),
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
            **_tile(shape),
        )


def write_(weights: Weights, values: list[Tensor]) -> None:
    """See the reference; the steps stay on the device."""
    # W ← (1 - lr·λ) W - lr·value with lr = λ = -1 is W ← value.
    apply_(weights, values, [], Hyper(scalar(-1), weight_decay=-1.0), None)


def projected_adam_(
    weights: Weights,
    grads: list[Tensor],
    moments: Moments,
    bases: Sequence[Tensor],
    hyper: Hyper,
    side: Side | None,
) -> None:
    """See the reference."""
    params, steps, seeds, _, finite = weights
    if not _fits(params, grads, *moments, steps, reference.rests(seeds), bases=bases):
        reference.projected_adam_(weights, grads, moments, bases, hyper, side)
        return
    if side is None:
        table = _table(params, grads, *moments, (), steps, seeds)
        corrections = _advanced(table, len(params), hyper.betas, finite)
        torch.autograd.graph.increment_version(params)
        _step_elements(table, weights, grads, hyper, corrections, APPLY=True)
        return
    if hyper.transform == "cautious" or side == "both":
        lows = project(grads, bases, side, moments.exp_avgs[0].dtype)
        apply_(weights, adam_update_(lows, moments, steps, hyper, finite=finite), bases, hyper, side)
        return
    dot = DOT[grads[0].dtype]
    low_type = _DOT_TYPES.get(dot, torch.float32)
    fused = bases[0].shape[-1] <= FUSED_RANK[dot] and params[0].shape[-1] % FUSED_MULTIPLE == 0
    workspace = (0 if fused else moments.exp_avgs[0].numel()) + (bases[0].numel() if dot in _DOT_TYPES else 0)
    part = max(1, _WORKSPACE // max(1, workspace * low_type.itemsize))
    for at in (slice(start, start + part) for start in range(0, len(params), part)):
        some, rounded, own = weights.part(at), _operands(bases[at], dot), hyper.part(at)
        if fused:
            _fused_adam_(some, grads[at], moments.part(at), rounded, own, side)
            continue
        how = (moments.part(at), some.steps, own, some.finite)
        apply_(some, _project_all(grads[at], rounded, side, low_type, dot, *how), rounded, own, side)


def _fused_adam_(
    weights: Weights,
    grads: Sequence[Tensor],
    moments: Moments,
    bases: Sequence[Tensor],
    hyper: Hyper,
    side: Side | None,
) -> None:
    params, steps, seeds, window, finite = weights
    dot = DOT[grads[0].dtype]
    (m, n), rank = params[0].shape, bases[0].shape[-1]
    table = _table(params, grads, *moments, bases, steps, seeds)
    corrections = _advanced(table, len(params), hyper.betas, finite)
    rate, mode = _learning_rate(hyper.lr)
    shape, pitch = blocks("fused", dot, _capability(params[0].device)), _pitch(window, n)
    torch.autograd.graph.increment_version(params)
    _launch(
        kernels.fused,
        (triton.cdiv(n if side == "left" else m, shape.rows), len(params)),
        table,
        *(finite, corrections, rate, m, n, rank, *_moment_scalars(hyper), hyper.weight_decay, hyper.scale),
        *(window.origin, pitch),
        W=_TYPES[params[0].dtype],
        G=_TYPES[grads[0].dtype],
        Q=_TYPES[bases[0].dtype],
        ALIGN=table.align,
        LR=mode,
        DOT=dot,
        LEFT=side == "left",
        GRAMS=hyper.transform == "grams",
        NOISE=_noise_mode(params, seeds, n, window.origin, pitch),
        ROWS=shape.rows,
        DEPTH=shape.depth,
        SLICE=shape.slice,
        RANK=max(16, triton.next_power_of_2(rank)),
        blocks=shape,
    )


def weight_norm_adam_(
    weights: Weights,
    grads: list[Tensor],
    moments: Moments | Codes,
    lengths: Moments,
    bases: Sequence[Tensor],
    hyper: Hyper,
    side: Side | None,
) -> None:
    """The whole step of rules.WeightNormAdam for a bucket, without a temporary as large as a matrix.

    G and W are read for the lengths and radial parts of rows, again for R of the tangential part, W once for the
    lengths it would come to and once to be written; back(N) is formed for both of these.
    """
    params, coded = weights.params, isinstance(moments, Codes)
    kind = grads[0].dtype if all(grad.dtype == grads[0].dtype for grad in grads) else torch.float32
    grads = [grad.to(kind).contiguous() for grad in grads]
    torch.autograd.graph.increment_version(params)
    count, (m, n) = len(params), params[0].shape
    between = sum(basis.numel() for basis in bases) // count if side == "both" else 0
    part = max(1, _WORKSPACE // (4 * (2 * max(m, n) * bases[0].shape[-1] + between)))
    with reference.contiguous(params, *(() if coded else moments)) as (w, *own):
        whole, kept = weights._replace(params=w), moments if coded else Moments(*own)
        for at in (slice(start, start + part) for start in range(0, count, part)):
            _weight_norm_part_(
                *(whole.part(at), grads[at], kept.part(at), lengths.part(at), bases[:count][at], bases[count:][at]),
                *(hyper.part(at), side),
            )


def _weight_norm_part_(
    weights: Weights,
    grads: Sequence[Tensor],
    moments: Moments | Codes,
    lengths: Moments,
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    hyper: Hyper,
    side: Side | None,
) -> None:
    """`lefts` are all bases where there is one a matrix."""
    params, steps, finite = weights.params, weights.steps, weights.finite
    (m, n), kind, wide = params[0].shape, grads[0].dtype, torch.float32
    table = _table(params, grads, *lengths, (), steps)
    corrections = _advanced(table, len(params), hyper.betas, finite)
    numbers = torch.empty((len(params), 2, m), dtype=wide, device=params[0].device)
    rate, mode = _learning_rate(hyper.lr)
    _launch(
        kernels.lengths,
        (triton.cdiv(m, _LENGTH_BLOCKS.rows), len(params)),
        table,
        finite,
        *(corrections, numbers, rate, m, n, *_moment_scalars(hyper), hyper.weight_decay),
        W=_TYPES[params[0].dtype],
        G=_TYPES[kind],
        ALIGN=table.align,
        LR=mode,
        ROWS=_LENGTH_BLOCKS.rows,
        COLUMNS=_LENGTH_BLOCKS.columns,
        blocks=_LENGTH_BLOCKS,
    )
    first: Side | None = "left" if side == "both" else side
    tangent: dict[str, Any] = {"kind": "tangent", "numbers": numbers, "params": params}
    lows = _project_all(grads, lefts, first, wide, DOT[kind], finite=finite, **tangent)
    if side == "both":
        lows = _project_all(lows, rights, "right", wide, DOT[wide], finite=finite)
    if isinstance(moments, Codes):
        updates = coded_adam_update_(lows, moments, steps, hyper, False, finite, corrections)
    else:
        updates = _updates(lows, moments, steps, hyper, False, finite, corrections)
    if side == "both":
        updates, lefts, side = _left(updates, lefts, finite), rights, "right"
    _apply_all(weights, updates, lefts, replace(hyper, weight_decay=0.0), side, lengths=numbers)


def compressed_adafactor_(
    weights: Weights,
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    row_averages: list[Tensor],
    column_averages: list[Tensor],
    previous: Sequence[Tensor],
    bases: Sequence[Tensor],
    carried: list[bool],
    hyper: Hyper,
    decay_rate: float,
    clip_threshold: float,
    side: Side | None,
) -> None:
    """The whole step of rules.CompressedAdafactor for a bucket, without a temporary as large as a matrix.

    G is read for the sums of squares of its rows and columns, for the length of D, for the write of W and for the
    projection of U; back(momentum) is formed for both of the middle ones.
    """
    params, beta1 = weights.params, hyper.betas[0]
    count, (m, n) = len(params), params[0].shape
    kind = grads[0].dtype if all(grad.dtype == grads[0].dtype for grad in grads) else torch.float32
    grads = [grad.to(kind).contiguous() for grad in grads]
    torch.autograd.graph.increment_version(params)
    between = sum(basis.numel() for basis in bases) // count if side == "both" else 0
    sums = m * triton.cdiv(n, _SQUARE_BLOCKS.columns) + n * triton.cdiv(m, _SQUARE_BLOCKS.rows)
    part = max(1, _WORKSPACE // (4 * (between + sums)))
    with reference.contiguous(params, exp_avgs, row_averages, column_averages) as (w, *own):
        whole = weights._replace(params=w)
        for at in (slice(start, start + part) for start in range(0, count, part)):
            some, (momenta, rows, columns, g) = whole.part(at), (column[at] for column in (*own, grads))
            old, new = (part_of(q, count, at) for q in (previous, bases))
            numbers = _normalisers(g, rows, columns, some.steps, decay_rate, some.finite)
            _blend(some, g, momenta, old, numbers, hyper.part(at), clip_threshold, side)
            past = reference.moved(momenta, old, new, side, carried[at], project)
            how: dict[str, Any] = {"hyper": Hyper(betas=(beta1, 0.0)), "finite": some.finite}
            update: dict[str, Any] = {"kind": "normalised", "numbers": numbers}
            if side == "both":
                lefts, dot = new[: len(g)], _normalised_dot(kind)
                g = _project_all(g, lefts, "left", torch.float32, dot, finite=some.finite, **update)
                new, update, kind = new[len(g) :], {}, torch.float32
            last: Side | None = "right" if side == "both" else side
            _project_all(g, new, last, torch.float32, _normalised_dot(kind), average=(momenta, past), **how, **update)


def _normalised_dot(kind: torch.dtype) -> str:
    """How products of U and its average multiply: no bound of theirs is float16's."""
    return DOT[torch.float32 if kind == torch.float16 else kind]


def _normalisers(
    grads: Sequence[Tensor],
    row_averages: Sequence[Tensor],
    column_averages: Sequence[Tensor],
    steps: Sequence[Tensor],
    decay_rate: float,
    finite: Tensor | None,
) -> Tensor:
    """What the rows and columns of every G are multiplied by to be U, (count, m + n); steps and averages advance."""
    count, (m, n), shape = len(grads), grads[0].shape, _SQUARE_BLOCKS
    table = _table(grads, grads, (), row_averages, (), steps, (), _addresses(column_averages))
    _advanced(table, count, (0.0, 0.0), finite)
    sums = _squares(table, grads, finite)
    numbers = torch.empty((count, m + n), dtype=torch.float32, device=grads[0].device)
    lines = (triton.cdiv(max(m, n), _BLOCK), count)
    tile: dict[str, Any] = {"ROWS": shape.rows, "COLUMNS": shape.columns}
    _launch(kernels.averages, lines, table, finite, *sums, m, n, decay_rate, **tile, BLOCK=_BLOCK)
    _launch(kernels.normalisers, lines, table, finite, numbers, m, n, BLOCK=_BLOCK)
    return numbers


def _blend(
    weights: Weights,
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    bases: Sequence[Tensor],
    numbers: Tensor,
    hyper: Hyper,
    threshold: float,
    side: Side | None,
) -> None:
    """W takes its step along D."""
    params, steps, seeds, _, finite = weights
    dot, count, (m, n), device = _normalised_dot(params[0].dtype), len(params), params[0].shape, params[0].device
    if side == "both":
        momenta, bases, side = _left(momenta, bases[:count], finite), bases[count:], "right"
    bases = _operands(bases, dot)
    table = _table(params, grads, momenta, (), bases, steps, seeds)
    shape = blocks("apply", dot, _capability(device))
    tiles = triton.cdiv(m, shape.rows) * triton.cdiv(n, shape.columns)
    squares, clips = (torch.empty((count, size), dtype=torch.float32, device=device) for size in (tiles, 1))
    kept = torch.zeros(count, dtype=torch.int64, device=device)
    rate, mode = _learning_rate(hyper.lr)
    rates = (hyper.betas[0], hyper.weight_decay, hyper.scale)
    for measure in (True, False):
        _launch(
            kernels.blend,
            (tiles, count),
            table,
            finite,
            *(numbers, squares, kept, clips, rate, m, n, bases[0].shape[-1], *rates),
            W=_TYPES[params[0].dtype],
            G=_TYPES[grads[0].dtype],
            Q=_TYPES[bases[0].dtype],
            ALIGN=table.align,
            LR=mode,
            DOT=dot,
            LEFT=side == "left",
            TRANSFORM=hyper.transform,
            MEASURE=measure,
            NOISE=_noise_mode(params, seeds, n),
            **_tile(shape),
        )
        if measure:
            own = (squares, finite, kept, clips, m, n, tiles, threshold)
            _start(kernels.clip, (1, count), *own, TRANSFORM=hyper.transform, BLOCK=_BLOCK)


def encode_(
    xs: list[Tensor],
    codes: list[Tensor],
    scales: list[Tensor],
    table: Tensor,
    axis: int,
    seeds: Sequence[int],
    steps: list[Tensor],
    begin: int = 0,
) -> None:
    """See the reference, whose bits these are."""
    xs = [(x if x.dtype in _TYPES else x.float()).contiguous() for x in xs]
    counts = [step.float() for step in steps]
    _start_codes(
        *(kernels.encode, xs, codes, scales, table, axis, seeds, counts),
        begin=begin,
        LAST=len(table) - 2,
        TINY=_TINY,
        NOISE=_coded_noise(xs[0].shape[axis], begin) if seeds else 0,
    )


def decode_(xs: list[Tensor], codes: list[Tensor], scales: list[Tensor], table: Tensor, axis: int) -> None:
    """See the reference, whose bits these are."""
    if xs[0].dtype not in _TYPES:
        reference.decode_(xs, codes, scales, table, axis)
        return
    _start_codes(kernels.decode, xs, codes, scales, table, axis)


def _start_codes(
    kernel,
    xs: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    values: Tensor,
    axis: int,
    seeds: Seeds = (),
    steps: Sequence[Tensor] = (),
    **how: Any,
) -> None:
    table = _table(xs, codes, steps=steps, seeds=seeds, further=_addresses(scales))
    tensors = [reference.rows(tensor, axis) for tensor in (xs[0], codes[0], scales[0])]
    (count, length), shape = tensors[0].shape, _coded_blocks(xs[0].shape[axis])
    _start(
        kernel,
        (triton.cdiv(count, shape["ROWS"]) * triton.cdiv(length, shape["BLOCK"]), len(xs)),
        *(table.on_device, values, count, length, *_strides(tensors)),
        X=_TYPES[xs[0].dtype],
        ALIGN=table.align,
        PACKED=len(values) <= 16,
        **how,
        **shape,
    )


def _strides(tensors: Sequence[Tensor]) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()]


def _coded_blocks(length: int) -> dict[str, Any]:
    """Rows and columns of a program: a whole block, and as many as fill it."""
    block = min(BLOCK, max(16, triton.next_power_of_2(length)))
    return {"ROWS": _CODED // block, "BLOCK": block}


def _coded_noise(length: int, begin: int) -> int:
    """See _noise."""
    return 8 if length % 8 == 0 and begin % 8 == 0 else 1


def coded_adam_(weights: Weights, grads: list[Tensor], codes: Codes, hyper: Hyper, eps_inside: bool = False) -> None:
    """See the reference; Adam rounds otherwise in the last bit, so that a code in 10,000 is the one beside it."""
    if not _fits(weights.params, grads, weights.steps, reference.rests(weights.seeds)):
        reference.coded_adam_(weights, grads, codes, hyper, eps_inside)
        return
    torch.autograd.graph.increment_version(weights.params)
    _step_coded(weights, grads, codes, hyper, eps_inside, write=True)


def coded_adam_update_(
    lows: list[Tensor],
    codes: Codes,
    steps: list[Tensor],
    hyper: Hyper,
    eps_inside: bool = False,
    finite: Tensor | None = None,
    corrections: Tensor | None = None,
) -> list[Tensor]:
    """N as coded_adam_ would apply it; without corrections, the steps advance."""
    lows = [low.contiguous() for low in lows]
    out = list(torch.empty((len(lows), *lows[0].shape), dtype=torch.float32, device=lows[0].device).unbind())
    _step_coded(Weights(out, steps, finite=finite), lows, codes, hyper, eps_inside, corrections)
    return out


def _step_coded(
    weights: Weights,
    source: Sequence[Tensor],
    codes: Codes,
    hyper: Hyper,
    eps_inside: bool,
    corrections: Tensor | None = None,
    write: bool = False,
) -> None:
    """W where it is to be written, otherwise N in its place; without corrections, the steps advance."""
    out, steps, seeds, _, finite = weights
    first, second = codes.codes[: len(out)], codes.codes[len(out) :]
    table = _table(out, source, first, second, (), steps, seeds, [*_addresses(codes.scales), *codes.streams])
    if corrections is None:
        corrections = _advanced(table, len(out), hyper.betas, finite)
    cautious, tables = hyper.transform == "cautious", codes.tables
    rate, mode = _learning_rate(hyper.lr) if write else (0.0, -1)
    tensors = [reference.rows(tensor, codes.axis) for tensor in (out[0], codes.codes[0], codes.scales[0])]
    (count, length), shape = tensors[0].shape, _coded_blocks(out[0].shape[codes.axis])
    for kept, counts in _counting(cautious, out):
        _launch(
            kernels.coded_adam,
            (triton.cdiv(count, shape["ROWS"]) * triton.cdiv(length, shape["BLOCK"]), len(out)),
            table,
            finite,
            *(corrections, kept, rate, *tables, codes.begin, count, length, *_strides(tensors)),
            *(*_moment_scalars(hyper), hyper.weight_decay, hyper.scale),
            OUT=_TYPES[out[0].dtype],
            IN=_TYPES[source[0].dtype],
            ALIGN=table.align,
            LR=mode,
            COUNT=counts,
            APPLY=write,
            GRAMS=hyper.transform == "grams",
            CAUTIOUS=cautious,
            EPS_INSIDE=eps_inside,
            NOISE=_coded_noise(length, codes.begin),
            ROUND=_noise_mode(out, seeds),
            SIGNED_LAST=len(tables[0]) - 2,
            UNSIGNED_LAST=len(tables[1]) - 2,
            TINY=_TINY,
            PACKED=len(tables[0]) <= 16,
            num_warps=_CODED_WARPS,
            **shape,
        )
