"""The steps of reference.py as CUDA kernels of csrc/cuda: a whole bucket at a time, in two or three launches.

    prepare   step counts advance; bias corrections, decay and learning rate of each tensor, in float64 on the device
    dense     moments, transform and the write of the parameter, in one pass; or a part of these
    linear_update   likewise of rules whose moment and N are linear in R
    fused     projected, ranks up to FUSED_RANK: G is read once, W read and written once, R and N never reach memory
    project   larger ranks, first half: R, in whose epilogue the moments advance
    apply     larger ranks, second half: back(N), in whose epilogue W is written
    lengths   GradNormLoRP: lengths and radial parts of rows, and Adam on these; then project_tangents, and apply twice,
              the first time for the lengths that rows would come to, which make their factors
    blend     Flora: D = (1-β₁)U + β₁back(M), once for its root mean square and once to write W; `normalisers` before it
              are what makes G to U, and `project_normalised` after it averages M
    coded     dense, or R that is there already, on moments kept as codes: decoded, advanced, coded again and W or N
              written in one pass; encode, and decode, its inverse

Up to sixty-four tensors share a launch. Nothing here waits for the device, and a step can be captured in a CUDA graph.

Products are of float32 with float32 accuracy, and of 16-bit gradients on the matrix units with basis and N rounded as
the gradient was (0.2 % of an update's norm in bfloat16). Projections on both sides are made of two such products, the
second in float32; cautious always takes the two halves, because its scale is known only between them. What is left to
the reference: float64, and tensors that are not contiguous or not alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import CDLL, Array, c_char_p, c_double, c_int, c_int64, c_uint64, c_void_p
from dataclasses import replace
from functools import cache, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..philox import ALL, Window
from ..types import TRANSFORMS, Hyper, Moments, Plan, Seeds, Side, Weights, scalar
from . import reference
from .reference import Codes, back, lines_of, part_of, transform_

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


TYPES = (torch.float32, torch.bfloat16, torch.float16)  # the order of Type in csrc/cuda/elements.cuh
FUSED_RANK = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}  # N fits beside the operands in 99 KiB

COMPENSATES = True  # what rounding takes from a parameter, in the place of its seed
_SLICE, _COLUMNS = 64, 256  # kSlice, which is also kLines, and kColumns of csrc/cuda/product.cuh
_SUMS = (64, 256)  # rows and columns of a tile of square_sums (csrc/cuda/momentum.cuh)
_WORKSPACE = 2**27  # bytes of updates and rounded bases: a larger bucket is stepped in parts
_LETTERS = {"i": c_int, "l": c_int64, "u": c_uint64, "d": c_double, "p": c_void_p}
_FUNCTIONS = {  # csrc/cuda/library.cu; the last argument of those with a `p` there is the stream
    "usable": "",
    "scalars_bytes": "",
    "shared_bytes": "ii",
    "prepare": "lpppiipidddiddpp",
    "grad_max": "lppipp",
    "words": "lplpp",
    "dense": "lpliiiiiiddiliilllliipp",
    "linear_update": "lpliddddipp",
    "rescale": "lplpp",
    "project": "lpiiiiiiiddipp",
    "apply": "lpiiiiiliilllpppp",
    "fused": "lpiiiiiddiilllpp",
    "lengths": "lpiiiddpppp",
    "project_tangents": "lpiiiiippp",
    "factors": "lppiip",
    "square_sums": "lpiiipppp",
    "normalisers": "lpiiidppppp",
    "blend": "lpiiiiidiidpppp",
    "project_normalised": "lpiiiiipdpp",
    "encode": "lplliiipiilp",
    "decode": "lplliiipip",
    "coded": "lplliipipiliiiiddilipp",
}


def bind(path: Path) -> CDLL:
    """The library at this path, its functions declared."""
    library = CDLL(str(path))
    for name, letters in _FUNCTIONS.items():
        getattr(library, f"sso_{name}").argtypes = [_LETTERS[letter] for letter in letters]
    library.sso_error.argtypes, library.sso_error.restype = [c_int], c_char_p
    return library


@cache
def load() -> CDLL | str:
    """The library that csrc/build.py built, or the reason why it is not there."""
    found = sorted(Path(__file__).parents[1].glob("_cuda*.so"))
    if not found:
        return "not built: SSO_BUILD_CUDA=1 makes pip install compile it with nvcc"
    try:
        return bind(found[0])
    except (OSError, AttributeError) as error:
        return f"{found[0].name} does not load: {error}"


def supports(plan: Plan | None) -> str | None:
    """Why a CUDA tensor of this plan cannot be stepped here, or None; without a plan, whether any can."""
    library = load()
    if isinstance(library, str):
        return library
    if torch.version.hip is not None:
        return "not tried on ROCm"
    why = _refusal(torch.device("cuda", torch.cuda.current_device()) if plan is None else plan.device)
    if why is None and plan is not None and plan.dtype not in TYPES:
        return f"no kernel for {plan.dtype}"
    return why


@lru_cache
def _refusal(device: torch.device) -> str | None:
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    try:
        with torch.cuda.device(device):
            _check(_library().sso_usable())
    except RuntimeError as error:
        return str(error)
    return None


def _library() -> CDLL:
    library = load()
    assert not isinstance(library, str), library
    return library


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"CUDA error {code}: {_library().sso_error(code).decode()}")


def _launch(name: str, device: torch.device, *arguments: Any) -> None:
    function = getattr(_library(), f"sso_{name}")
    with torch.cuda.device(device if device.type == "cuda" else -1):  # -1: no change
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        _check(function(*arguments, stream))


# ---- what the library is given --------------------------------------------------------------------------------------


def _table(
    out: Sequence[Tensor],
    inputs: Sequence[Tensor],
    moments: tuple[Sequence[Tensor], Sequence[Tensor]] = ((), ()),
    bases: Sequence[Tensor] = (),
    seeds: Seeds = (),
) -> Array[c_uint64]:
    columns = (out, inputs, *moments, bases)
    return _numbers(*(_addresses(column) or [0] * len(out) for column in columns), _numbered(seeds, len(out)))


def _how(hyper: Hyper) -> tuple[float, float, int]:
    """β₁, β₂ and the transform."""
    return *hyper.betas, TRANSFORMS.index(hyper.transform)


def _numbers(*rows: Sequence[int]) -> Array[c_uint64]:
    values = tuple(chain(*rows))
    return (c_uint64 * len(values))(*values)


def _numbered(seeds: Seeds, count: int) -> Sequence[Any]:
    """As tables have them: addresses of what rounding took, seeds, or zeros."""
    return _addresses(reference.rests(seeds)) or seeds or [0] * count


def _rounding(seeds: Seeds) -> int:
    """Rounding of csrc/cuda/elements.cuh."""
    return 2 if reference.rests(seeds) else int(len(seeds) > 0)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _prepared(weights: Weights, hyper: Hyper, advance: bool = False, eps_inside: bool = False) -> Tensor:
    """Scalars (csrc/cuda/elements.cuh) of each tensor; the steps may advance."""
    steps, flags = weights.steps, None if weights.finite is None else weights.finite.contiguous()
    count, device, lr = len(steps), steps[0].device, hyper.lr
    scalars = torch.empty(count * _library().sso_scalars_bytes(), dtype=torch.uint8, device=device)
    addresses = _numbers(_addresses(steps))
    rate = lr if lr.dtype in (torch.float32, torch.float64) else lr.double()
    rates: Array[c_double] | None = None
    where: tuple[int | None, bool, int] = (None, False, 0)
    if _on_device(rate):
        rate = rate.contiguous()
        where = (rate.data_ptr(), rate.dtype == torch.float64, rate.ndim)
    else:
        rates = (c_double * count)(*rate.double().expand(count).tolist())
    _launch(
        *("prepare", device, count, addresses, rates, *where, None if flags is None else flags.data_ptr()),
        *(advance, *hyper.betas, hyper.eps, eps_inside, hyper.weight_decay, hyper.scale, scalars.data_ptr()),
    )
    return scalars


def _some(scalars: Tensor, count: int, at: slice) -> Tensor:
    """Those of some of `count` tensors."""
    each = len(scalars) // count
    return scalars[at.start * each : at.stop * each]


def _on_device(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _fits(*columns: Sequence[Tensor], bases: Sequence[Tensor] = ()) -> bool:
    """Whether the kernels can address these: contiguous, and alike in each column."""
    return all(
        (tensor.is_contiguous() or column is bases)  # which _operands sees to
        and tensor.dtype == column[0].dtype
        and tensor.dtype in TYPES
        and (tensor.shape == column[0].shape or column is bases)
        for column in (*columns, bases)
        for tensor in column
    )


def _deals(window: Window, side: Side | None) -> bool:
    """Whether the kernels can give each element its random bits: eight at a time, of one row of the window."""
    return side is not None or window.consecutive or window.columns % 8 == 0


def _operands(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """As the products take them: contiguous, in the type of the gradient."""
    if all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in tensors):
        return tensors
    shape = (len(tensors), *tensors[0].shape)
    rounded = torch.empty(shape, dtype=dtype, device=tensors[0].device).unbind()
    torch._foreach_copy_(list(rounded), list(tensors))
    return rounded


def _halves(bases: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The left and the right bases of projections on both sides."""
    return bases[: len(bases) // 2], bases[len(bases) // 2 :]


def _geometry(matrix: Tensor, basis: Tensor, side: Side | None) -> tuple[int, int, int, int]:
    """left, lines, depth, rank: the lines of a matrix (m, n) are its rows, or columns on the left."""
    m, n = matrix.shape
    return (1, n, m, basis.shape[-1]) if side == "left" else (0, m, n, basis.shape[-1])


# ---- the halves of a step -------------------------------------------------------------------------------------------


def _low(
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    side: Side,
    dtype: torch.dtype,
    moments: Moments | None = None,
    hyper: Hyper | None = None,
    scalars: Tensor | None = None,
) -> Sequence[Tensor]:
    """R of every G, or with moments N: they advance. In float32 or, unless on both sides, in the type of G."""
    if side == "both":
        lefts, rights = _halves(bases)
        return _low(_low(grads, lefts, "left", torch.float32), rights, "right", dtype, moments, hyper, scalars)
    kind = grads[0].dtype
    bases = _operands(bases, kind)
    left, lines, depth, rank = _geometry(grads[0], bases[0], side)
    shape = (rank, lines) if left else (lines, rank)
    out = torch.empty((len(grads), *shape), dtype=dtype, device=grads[0].device).unbind()
    table = _table(out, grads, moments or ((), ()), bases)
    _launch(
        *("project", grads[0].device, len(out), table, left, lines, depth, rank, TYPES.index(kind)),
        *(dtype == torch.float32, scalars is not None, *_how(hyper or Hyper())),
        None if scalars is None else scalars.data_ptr(),
    )
    return out


def _write(
    weights: Weights,
    updates: Sequence[Tensor],
    bases: Sequence[Tensor],
    side: Side | None,
    scalars: Tensor,
    sign: bool = False,
    counted: int = 0,
    aims: Tensor | None = None,
    factors: Sequence[Tensor] = (),
) -> None:
    """W of every back(N).

    `counted`: elements of N, where cautious has counted what it kept; `aims`: lengths that rows are brought to, which
    become their factors.
    """
    params, _, seeds, window, _ = weights
    kind, device, count = params[0].dtype, params[0].device, len(params)
    if side is None:
        _launch(
            *("dense", device, count, _table(params, updates, bases=factors, seeds=seeds), params[0].numel()),
            *(TYPES.index(updates[0].dtype), TYPES.index(kind), False, False, False, True, *_how(Hyper())),
            *(counted, sign, _rounding(seeds), *window, *lines_of(factors, params[0]), scalars.data_ptr()),
        )
        return
    if side == "both":
        lefts, rights = _halves(bases)
        float32 = torch.float32
        wide = _low(_operands(lefts, float32), _operands(updates, float32), "right", float32)  # P N
        _write(weights, wide, rights, "right", scalars, sign, counted, aims)
        return
    updates, bases = _operands(updates, kind), _operands(bases, kind)
    table = _table(params, updates, bases=bases, seeds=seeds)
    fixed = (
        *(count, table, *_geometry(params[0], bases[0], side), TYPES.index(kind)),
        *(counted, sign, _rounding(seeds), *window),
    )
    if aims is None:
        _launch("apply", device, *fixed, None, None, scalars.data_ptr())
        return
    m, n = params[0].shape
    squares = aims.new_empty(count, -(-n // _SLICE), m)
    _launch("apply", device, *fixed, squares.data_ptr(), None, scalars.data_ptr())
    _launch("factors", device, count, squares.data_ptr(), aims.data_ptr(), n, m)
    _launch("apply", device, *fixed, None, aims.data_ptr(), scalars.data_ptr())


# ---- the functions of reference.py ----------------------------------------------------------------------------------


def grad_max(grads: list[Tensor]) -> Tensor:
    """See the reference; the result is on the device."""
    if any(grad.dtype != grads[0].dtype or grad.dtype not in TYPES for grad in grads):
        return reference.grad_max(grads)
    count, device = len(grads), grads[0].device
    dense = [grad.contiguous() for grad in grads]
    out = torch.zeros(count, dtype=torch.float64, device=device)
    addresses = _numbers(_addresses(dense))
    sizes = (c_int64 * count)(*(grad.numel() for grad in dense))
    _launch("grad_max", device, count, addresses, sizes, TYPES.index(grads[0].dtype), out.data_ptr())
    return out


def words(seeds: Sequence[int], count: int, device: torch.device) -> Tensor:
    """See the reference, whose bits these are."""
    out = torch.empty((len(seeds), (count + 3) // 4, 4), dtype=torch.int64, device=device)
    _launch("words", device, len(seeds), _numbers(seeds), out.shape[1], out.data_ptr())
    return out


def line_norms(grads: list[Tensor], dim: int, dtype: torch.dtype) -> list[Tensor]:
    """See the reference; G is read once for all of the bucket."""
    if dtype != torch.float32 or not _fits(grads):
        return reference.line_norms(grads, dim, dtype)
    (m, n), by_row, by_column = grads[0].shape, *_square_sums(grads)
    where = (_table(grads, grads), m, n, TYPES.index(grads[0].dtype))
    _launch("square_sums", grads[0].device, len(grads), *where, by_row.data_ptr(), by_column.data_ptr(), None)
    norms = by_row.sum(1).sqrt_().unsqueeze(-1) if dim == -1 else by_column.sum(1, keepdim=True).sqrt_()
    return list(norms.unbind())


def _square_sums(grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Room for sums of squares: of rows (count, tiles of columns, m), and of columns (count, tiles of rows, n)."""
    (m, n), count, device = grads[0].shape, len(grads), grads[0].device
    down, across = (-(-size // tile) for size, tile in zip((m, n), _SUMS, strict=True))
    by_row, by_column = (
        torch.empty((count, *size), dtype=torch.float32, device=device) for size in ((across, m), (down, n))
    )
    return by_row, by_column


def project(grads: list[Tensor], bases: Sequence[Tensor], side: Side | None, dtype: torch.dtype) -> list[Tensor]:
    """See the reference."""
    if side is None or dtype != torch.float32 or not _fits(grads, bases=bases):
        return reference.project(grads, bases, side, dtype)
    return list(_low(grads, bases, side, dtype))


def adam_update_(
    lows: list[Tensor],
    moments: Moments,
    steps: list[Tensor],
    hyper: Hyper,
    eps_inside: bool = False,
    finite: Tensor | None = None,
) -> list[Tensor]:
    """See the reference."""
    if not _fits(lows, *moments, steps) or not _are_float32(*moments, steps):
        return reference.adam_update_(lows, moments, steps, hyper, eps_inside, finite)
    scalars = _prepared(Weights([], steps, finite=finite), hyper, True, eps_inside)
    return _updates(lows, moments, hyper, scalars)


def _updates(lows: Sequence[Tensor], moments: Moments, hyper: Hyper, scalars: Tensor) -> list[Tensor]:
    """N; the moments advance."""
    kind = TYPES.index(lows[0].dtype)
    modes = (kind, 0, True, True, True, False, *_how(hyper), 0, False, False, *ALL, *lines_of((), lows[0]))
    return _elements("dense", lows, moments, hyper.transform, modes, scalars)


def _elements(
    name: str,
    lows: Sequence[Tensor],
    moments: tuple[Sequence[Tensor], Sequence[Tensor]],
    transform: str,
    modes: Sequence[Any],
    scalars: Tensor,
) -> list[Tensor]:
    """N of every R by a kernel that goes element by element; cautious scales it in a launch of its own."""
    out = torch.empty((len(lows), *lows[0].shape), dtype=torch.float32, device=lows[0].device).unbind()
    where, size = (lows[0].device, len(lows), _table(out, lows, moments)), lows[0].numel()
    _launch(name, *where, size, *modes, scalars.data_ptr())
    if transform == "cautious":
        _launch("rescale", *where, size, scalars.data_ptr())
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
    if not _fits(lows, exp_avgs, steps) or not _are_float32(exp_avgs, steps):
        return reference.linear_update_(lows, exp_avgs, steps, look, keep, transform, finite)
    scalars = _prepared(Weights([], steps, finite=finite), Hyper(), True)
    modes = (TYPES.index(lows[0].dtype), *look, *keep, TRANSFORMS.index(transform))
    return _elements("linear_update", lows, (exp_avgs, ()), transform, modes, scalars)


def _are_float32(*columns: Sequence[Tensor]) -> bool:
    return all(column[0].dtype == torch.float32 for column in columns)


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
    fits = _fits(weights.params, updates, weights.steps, reference.rests(weights.seeds), factors, bases=bases)
    if not fits or not _are_float32(weights.steps) or not _deals(weights.window, side):
        reference.apply_(weights, updates, bases, hyper, side, sign, factors)
        return
    torch.autograd.graph.increment_version(weights.params)  # as every in-place op of torch: a stale graph is refused
    _write(weights, updates, bases, side, _prepared(weights, hyper), sign, factors=factors)


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
    params, steps, count = weights.params, weights.steps, len(weights.params)
    fits = _fits(params, grads, *moments, steps, reference.rests(weights.seeds), bases=bases)
    if not fits or not _deals(weights.window, side) or not _are_float32(*moments, steps):
        reference.projected_adam_(weights, grads, moments, bases, hyper, side)
        return
    torch.autograd.graph.increment_version(params)
    scalars = _prepared(weights, hyper, True)
    for at in _parts(params, moments.exp_avgs[0].numel(), bases):
        own = part_of(bases, count, at)
        _step(weights.part(at), grads[at], moments.part(at), own, hyper, _some(scalars, count, at), side)


def _parts(params: Sequence[Tensor], low: int, bases: Sequence[Tensor]) -> list[slice]:
    """Of a bucket: what each needs for a while, rounded bases and an update of `low` elements, is bounded."""
    count = len(params)
    elements = low + sum(basis.numel() for basis in bases) // count if bases else 0
    size = max(1, _WORKSPACE // max(1, elements * 4))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _step(
    weights: Weights,
    grads: Sequence[Tensor],
    moments: Moments,
    bases: Sequence[Tensor],
    hyper: Hyper,
    scalars: Tensor,
    side: Side | None,
) -> None:
    params, _, seeds, window, _ = weights
    kind, device, count = params[0].dtype, params[0].device, len(params)
    cautious = hyper.transform == "cautious"
    counted = moments.exp_avgs[0].numel() if cautious else 0
    if side is None:
        table = _table(params, grads, moments, seeds=seeds)
        types = (TYPES.index(grads[0].dtype), TYPES.index(kind))
        for advance in (True, False) if cautious else (True,):  # cautious: moments and count, then the write
            write = not (cautious and advance)
            _launch(
                *("dense", device, count, table, params[0].numel(), *types, True, advance, False, write),
                *(*_how(hyper), counted if write else 0, False, _rounding(seeds), *window),
                *(*lines_of((), params[0]), scalars.data_ptr()),
            )
    elif side == "both" or cautious or grads[0].dtype != kind or bases[0].shape[-1] > FUSED_RANK[kind]:
        same = side != "both" and grads[0].dtype == kind
        bases, low = (_operands(bases, kind), kind) if same else (bases, torch.float32)
        updates = _low(grads, bases, side, low, moments, hyper, scalars)
        _write(weights, updates, bases, side, scalars, counted=counted)
    else:
        bases = _operands(bases, kind)
        _launch(
            *("fused", device, count, _table(params, grads, moments, bases, seeds)),
            *(*_geometry(params[0], bases[0], side), TYPES.index(kind), *_how(hyper), _rounding(seeds)),
            *(*window, scalars.data_ptr()),
        )


# ---- directions and lengths of rows ---------------------------------------------------------------------------------


def weight_norm_adam_(
    weights: Weights,
    grads: list[Tensor],
    moments: Moments | Codes,
    lengths: Moments,
    bases: Sequence[Tensor],
    hyper: Hyper,
    side: Side,
) -> None:
    """The whole step of rules.WeightNormAdam for a bucket, without a temporary as large as a matrix.

    G and W are read for the lengths and radial parts of rows, again for R of the tangential part, W once for the
    lengths it would come to and once to be written; back(N) is formed for both of these. Gradients of another type than
    W, and what is not contiguous, are copied.
    """
    params, coded = weights.params, isinstance(moments, Codes)
    kind, (m, n), device, count = params[0].dtype, params[0].shape, params[0].device, len(params)
    grads = list(_operands(grads, kind))
    torch.autograd.graph.increment_version(params)
    advanced = _prepared(weights, replace(hyper, scale=1.0), True)
    undecayed = _prepared(weights, replace(hyper, weight_decay=0.0))
    with reference.contiguous(params, *(() if coded else moments)) as (w, *own):
        whole, kept = weights._replace(params=w), moments if coded else Moments(*own)
        for at in _parts(params, max(m, n) * bases[0].shape[-1], bases):
            some, g, adam = whole.part(at), grads[at], kept.part(at)
            first, last = (_some(scalars, count, at) for scalars in (advanced, undecayed))
            along, aims = torch.empty((2, len(g), m), dtype=torch.float32, device=device)
            _launch(
                *("lengths", device, len(g), _table(some.params, g, lengths.part(at)), m, n, TYPES.index(kind)),
                *(*hyper.betas, along.data_ptr(), aims.data_ptr(), first.data_ptr()),
            )
            lefts, rights = bases[:count][at], bases[count:][at]
            lows = _low_tangents(g, some.params, along, lefts, "left" if side == "both" else side, first)
            if side == "both":
                lows = _low(lows, rights, "right", torch.float32)
            if isinstance(adam, Codes):
                updates = _coded_updates(lows, adam, hyper, first)
            else:
                updates = _updates(lows, adam, hyper, first)
            _write(some, updates, [*lefts, *rights], side, last, aims=aims)


def _low_tangents(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    along: Tensor,
    bases: Sequence[Tensor],
    side: Side,
    scalars: Tensor,
) -> Sequence[Tensor]:
    """R in float32 of every G - diag(along) W."""
    kind, device = grads[0].dtype, grads[0].device
    bases = _operands(bases, kind)
    left, lines, depth, rank = _geometry(grads[0], bases[0], side)
    out = torch.empty((len(grads), *((rank, lines) if left else (lines, rank))), dtype=torch.float32, device=device)
    table = _table(out.unbind(), grads, (params, ()), bases)  # W where moments would be
    _launch(
        *("project_tangents", device, len(grads), table, left, lines, depth, rank, TYPES.index(kind)),
        *(along.data_ptr(), scalars.data_ptr()),
    )
    return out.unbind()


# ---- whole gradients beside a compressed momentum -------------------------------------------------------------------


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
    side: Side,
) -> None:
    """The whole step of rules.CompressedAdafactor for a bucket, without a temporary as large as a matrix.

    G is read for the sums of squares of its rows and columns, for the length of D, for the write of W and for the
    projection of U; back(M) is formed for both of the middle ones. Gradients of another type than W, and what is not
    contiguous, are copied.
    """
    params, count, fresh = weights.params, len(weights.params), 1 - hyper.betas[0]
    grads = list(_operands(grads, params[0].dtype))
    torch.autograd.graph.increment_version(params)
    scalars = _prepared(weights, replace(hyper, betas=(0.0, 0.0), eps=0.0), True)
    with reference.contiguous(params, exp_avgs, row_averages, column_averages) as (w, *own):
        whole = weights._replace(params=w)
        for at in _parts(params, exp_avgs[0].numel(), bases):
            some, (momenta, rows, columns, g) = whole.part(at), (column[at] for column in (*own, grads))
            old, new = (part_of(q, count, at) for q in (previous, bases))
            part = _some(scalars, count, at)
            numbers = _normalisers(g, rows, columns, decay_rate, part)
            _blend(some, g, momenta, old, side, numbers, part, hyper, clip_threshold)
            past = reference.moved(momenta, old, new, side, carried[at], project)
            if side == "both":
                lefts, rights = _halves(new)
                low = (len(g), lefts[0].shape[1], g[0].shape[1])
                lows = torch.empty(low, dtype=torch.float32, device=g[0].device).unbind()
                _low_normalised(lows, g, lefts, "left", numbers, part)
                _low_normalised(momenta, lows, rights, "right", None, part, past, fresh)
            else:
                _low_normalised(momenta, g, new, side, numbers, part, past, fresh)


def _operand(kind: torch.dtype) -> torch.dtype:
    """Operand of csrc/cuda/momentum.cuh."""
    return torch.bfloat16 if kind == torch.bfloat16 else torch.float32


def _normalisers(
    grads: Sequence[Tensor],
    row_averages: Sequence[Tensor],
    column_averages: Sequence[Tensor],
    decay_rate: float,
    scalars: Tensor,
) -> Tensor:
    """What the rows and columns of every G are multiplied by to be U, (count, m + n); the averages advance."""
    count, (m, n), device = len(grads), grads[0].shape, grads[0].device
    by_row, by_column = _square_sums(grads)
    numbers = torch.empty((count, m + n), dtype=torch.float32, device=device)
    table = _table(grads, grads, (row_averages, column_averages))
    _launch(
        *("normalisers", device, count, table, m, n, TYPES.index(grads[0].dtype), decay_rate),
        *(by_row.data_ptr(), by_column.data_ptr(), numbers.data_ptr(), scalars.data_ptr()),
    )
    return numbers


def _blend(
    weights: Weights,
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    bases: Sequence[Tensor],
    side: Side,
    numbers: Tensor,
    scalars: Tensor,
    hyper: Hyper,
    threshold: float,
) -> None:
    """W takes its step along D."""
    params, seeds = weights.params, weights.seeds
    kind, device, count = params[0].dtype, params[0].device, len(params)
    if side == "both":
        lefts, bases = _halves(bases)
        momenta, side = _low(_operands(lefts, torch.float32), momenta, "right", torch.float32), "right"  # P M
    momenta, bases = _operands(momenta, _operand(kind)), _operands(bases, _operand(kind))
    table = _table(params, momenta, (grads, ()), bases, seeds)
    left, lines, depth, rank = _geometry(params[0], bases[0], side)
    tiles = -(-lines // _SLICE) * -(-depth // _COLUMNS)
    sums = torch.empty((count, tiles), dtype=torch.float32, device=device)
    _launch(
        *("blend", device, count, table, left, lines, depth, rank, TYPES.index(kind), hyper.betas[0]),
        *(TRANSFORMS.index(hyper.transform), _rounding(seeds), threshold),
        *(numbers.data_ptr(), sums.data_ptr(), scalars.data_ptr()),
    )


def _low_normalised(
    out: Sequence[Tensor],
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    side: Side,
    numbers: Tensor | None,
    scalars: Tensor,
    past: Sequence[Tensor] = (),
    share: float = 1.0,
) -> None:
    """R of U, or of G where there are no numbers, to `out`; averaged with the past by this share."""
    kind, device = grads[0].dtype, grads[0].device
    bases = _operands(bases, _operand(kind))
    _launch(
        *("project_normalised", device, len(out), _table(out, grads, ((), past), bases)),
        *(*_geometry(grads[0], bases[0], side), TYPES.index(kind), None if numbers is None else numbers.data_ptr()),
        *(share, scalars.data_ptr()),
    )


# ---- moments in codes -----------------------------------------------------------------------------------------------


def _layout(like: Tensor, table: Tensor, axis: int) -> tuple[int, int, bool, bool]:
    """rows, length, columns, packed: how blocks lie in a tensor."""
    return like.numel() // like.shape[axis], like.shape[axis], axis == -2, len(table) <= 16


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
    xs = [(x if x.dtype in TYPES else x.float()).contiguous() for x in xs]
    counts, zeros = [step.float() for step in steps], [0] * len(xs)
    numbers = _numbers(*map(_addresses, (xs, codes, scales)), _addresses(counts) or zeros, seeds or zeros)
    _launch(
        *("encode", xs[0].device, len(xs), numbers, *_layout(xs[0], table, axis), TYPES.index(xs[0].dtype)),
        *(table.data_ptr(), len(table), bool(seeds), begin),
    )


def decode_(xs: list[Tensor], codes: list[Tensor], scales: list[Tensor], table: Tensor, axis: int) -> None:
    """See the reference, whose bits these are."""
    if xs[0].dtype not in TYPES:
        reference.decode_(xs, codes, scales, table, axis)
        return
    numbers = _numbers(*map(_addresses, (xs, codes, scales)))
    _launch(
        *("decode", xs[0].device, len(xs), numbers, *_layout(xs[0], table, axis), TYPES.index(xs[0].dtype)),
        *(table.data_ptr(), len(table)),
    )


def coded_adam_(weights: Weights, grads: list[Tensor], codes: Codes, hyper: Hyper, eps_inside: bool = False) -> None:
    """See the reference; Adam rounds otherwise in the last bit, so that a code in 10,000 is the one beside it."""
    fits = _fits(weights.params, grads, weights.steps, reference.rests(weights.seeds))
    if not fits or not _are_float32(weights.steps):
        reference.coded_adam_(weights, grads, codes, hyper, eps_inside)
        return
    torch.autograd.graph.increment_version(weights.params)
    scalars = _prepared(weights, hyper, True, eps_inside)
    _step_coded(weights.params, grads, codes, hyper, scalars, weights.seeds, write=True)


def coded_adam_update_(
    lows: list[Tensor],
    codes: Codes,
    steps: list[Tensor],
    hyper: Hyper,
    eps_inside: bool = False,
    finite: Tensor | None = None,
) -> list[Tensor]:
    """N as coded_adam_ would apply it."""
    scalars = _prepared(Weights([], steps, finite=finite), hyper, True, eps_inside)
    return _coded_updates(lows, codes, hyper, scalars)


def _coded_updates(lows: Sequence[Tensor], codes: Codes, hyper: Hyper, scalars: Tensor) -> list[Tensor]:
    """N; the steps have advanced."""
    lows = [low.contiguous() for low in lows]
    out = torch.empty((len(lows), *lows[0].shape), dtype=torch.float32, device=lows[0].device).unbind()
    _step_coded(out, lows, codes, hyper, scalars)
    return list(out)


def _step_coded(
    out: Sequence[Tensor],
    source: Sequence[Tensor],
    codes: Codes,
    hyper: Hyper,
    scalars: Tensor,
    seeds: Seeds = (),
    write: bool = False,
) -> None:
    """W into `out` where it is to be written, otherwise N; cautious counts in a launch of its own."""
    count, tables = len(out), codes.tables
    rows = map(_addresses, (out, source, codes.codes, codes.scales))
    numbers = _numbers(*rows, _numbered(seeds, count), codes.streams)
    kinds = (TYPES.index(source[0].dtype), TYPES.index(out[0].dtype))
    first, second = ((table.data_ptr(), len(table)) for table in tables)
    layout, cautious = _layout(out[0], tables[0], codes.axis), hyper.transform == "cautious"
    for counts in (True, False) if cautious else (False,):
        _launch(
            *("coded", out[0].device, count, numbers, *layout, *first, *second, codes.begin, *kinds, counts, write),
            *(*_how(hyper), out[0].numel() if cautious else 0, _rounding(seeds), scalars.data_ptr()),
        )
