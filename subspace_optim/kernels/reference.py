"""Every step the library takes, in torch ops over the lists of a bucket: the ground truth for all other kernels.

    line_norms    lengths of the rows or of the columns of G
    project       R = G Q            right      G (m, n)  Q (n, r)  R (m, r)
                  R = Pᵀ G           left       P (m, r)            R (r, n)
                  R = Pᵀ G Q         both                           R (r, r)
                  R = G              dense (no bases)
    adam_update_  M ← β₁M + (1-β₁)R,  V ← β₂V + (1-β₂)R²,  N = M̂ / (√V̂ + ε), then the transform
    linear_update_  N = a·M + b·R,  M ← c·M + d·R, then the transform
    apply_        W ← (1 - lr·λ) W - lr·scale·back(N),  back being the adjoint of project; or of a dense N times factors
    encode_       x ≈ scale·table[code] by blocks of x, and decode_ back: see storage.py
    words         random words, of which bases are drawn: those of philox.py
    coded_adam_   adam_update_ and apply_ of tensors that are not projected, chunk by chunk of moments kept as codes

Bases come flat: one a tensor, or all the left ones followed by all the right ones when the side is "both". What is
written comes as `Weights`, what Adam keeps as `Moments`, or `Codes` where it is quantised, and the numbers of a step as
`Hyper`. `finite` is as Weights have it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, compress, cycle
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..philox import Window, stochastic_round_, uniform
from ..philox import words as words
from ..types import BLOCK, Hyper, Moments, Seeds, Side, Weights, peak, scalar

T = TypeVar("T")

_CHUNK = 2**20  # elements coded at a time: about 40 bytes of workspace each
_EPS_FLOOR = 1e-19  # √ of the smallest normal float32: below it R² underflows, and M/√V with ε = 0 would be infinite


def grad_max(grads: list[Tensor]) -> Tensor:
    """The largest |g| of every gradient, as float64; NaN if it has one."""
    if grads[0].device.type == "cpu":
        return torch.stack([peak(grad, torch.float64) for grad in grads])
    return torch.stack(list(torch._foreach_norm(grads, math.inf))).double()


def line_norms(grads: list[Tensor], dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Lengths, in `dtype`, of the rows (dim -1) of every matrix, (m, 1), or of its columns (dim -2), (1, n)."""
    return [torch.linalg.vector_norm(grad, dim=dim, keepdim=True, dtype=dtype) for grad in grads]


def project(grads: list[Tensor], bases: Sequence[Tensor], side: Side | None, dtype: torch.dtype) -> list[Tensor]:
    """R for every G, in `dtype`; with no bases, G itself (not a copy where the dtype already fits)."""
    wide = [g.to(dtype) for g in grads]
    if side is None:
        return wide
    if side == "right":
        return [g @ q for g, q in zip(wide, bases, strict=True)]
    lefts, rights = bases[: len(grads)], bases[len(grads) :]
    lows = [p.mT @ g for g, p in zip(wide, lefts, strict=True)]
    return [r @ q for r, q in zip(lows, rights, strict=True)] if side == "both" else lows


def back(low: Tensor, bases: Sequence[Tensor], side: Side | None) -> Tensor:
    """The adjoint of project for one tensor: right R Qᵀ, left P R, both P R Qᵀ."""
    if side == "left":
        return bases[0] @ low
    if side == "right":
        return low @ bases[0].mT
    return bases[0] @ low @ bases[1].mT if side == "both" else low


def transform_(
    updates: list[Tensor], lows: list[Tensor], transform: str, shares: Sequence[Tensor] | None = None
) -> None:
    """Correct the direction of each update N by the gradient R it came from, in place.

    grams: sign(R)·|N|. cautious: N where N·R > 0, rescaled by the share of elements kept (at least 1e-3). `shares` are
    those of the whole tensors, of which these are parts.
    """
    for i, (n, r) in enumerate(zip(updates, lows, strict=True)) if transform != "none" else ():
        if transform == "grams":
            n.abs_().mul_(r.sign())
        else:
            mask = (n * r > 0).to(n.dtype)
            share = mask.mean() if shares is None else shares[i]
            n.mul_(mask.div_(share.clamp(min=1e-3)))


def adam_update_(
    lows: list[Tensor],
    moments: Moments,
    steps: list[Tensor],
    hyper: Hyper,
    eps_inside: bool = False,
    finite: Tensor | None = None,
) -> list[Tensor]:
    """Advance the moments by R and return the update N, which means nothing where `finite` says no.

    R may have any of the dtypes of gradients. `eps_inside` adds ε to √V before the bias correction (the
    transformers-AdamW form of the papers' official code) instead of after it (torch).
    """
    if finite is not None:
        updates = [torch.zeros_like(m) for m in moments.exp_avgs]
        r, m, v, k, out = taken(finite, lows, *moments, steps, updates)
        if out:
            torch._foreach_copy_(out, adam_update_(r, Moments(m, v), k, hyper, eps_inside))
        return updates
    (exp_avgs, exp_avg_sqs), (beta1, beta2) = moments, hyper.betas
    lows = [low.to(m.dtype) for low, m in zip(lows, exp_avgs, strict=True)]
    torch._foreach_add_(steps, 1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, lows, lows, 1 - beta2)
    torch._foreach_lerp_(exp_avgs, lows, 1 - beta1)  # after V: an interrupt in between makes the next step no larger
    eps = max(hyper.eps, _EPS_FLOOR)
    counts = torch.stack(steps).tolist()
    corrections1 = [1 - beta1**k for k in counts]
    corrections2 = [(1 - beta2**k) ** 0.5 for k in counts]
    updates = list(torch._foreach_sqrt(exp_avg_sqs))
    if eps_inside:
        torch._foreach_add_(updates, eps)
        torch._foreach_div_(updates, corrections2)
    else:
        torch._foreach_div_(updates, corrections2)
        torch._foreach_add_(updates, eps)
    torch._foreach_mul_(updates, corrections1)
    for update, average in zip(updates, exp_avgs, strict=True):
        torch.div(average, update, out=update)
    transform_(updates, lows, hyper.transform)
    return updates


def linear_update_(
    lows: list[Tensor],
    exp_avgs: list[Tensor],
    steps: list[Tensor],
    look: tuple[float, float],
    keep: tuple[float, float],
    transform: str = "none",
    finite: Tensor | None = None,
) -> list[Tensor]:
    """Return N = a·M + b·R, a and b being `look`, and advance M ← c·M + d·R by those of `keep`, and the step counts.

    R may have any of the dtypes of gradients; N is as for adam_update_.
    """
    if finite is not None:
        updates = [torch.zeros_like(m) for m in exp_avgs]
        r, m, k, out = taken(finite, lows, exp_avgs, steps, updates)
        if out:
            torch._foreach_copy_(out, linear_update_(r, m, k, look, keep, transform))
        return updates
    lows = [low.to(m.dtype) for low, m in zip(lows, exp_avgs, strict=True)]
    torch._foreach_add_(steps, 1)
    updates = list(torch._foreach_mul(exp_avgs, look[0]))
    torch._foreach_add_(updates, lows, alpha=look[1])
    torch._foreach_mul_(exp_avgs, keep[0])
    torch._foreach_add_(exp_avgs, lows, alpha=keep[1])
    transform_(updates, lows, transform)
    return updates


def apply_(
    weights: Weights,
    updates: list[Tensor],
    bases: Sequence[Tensor],
    hyper: Hyper,
    side: Side | None,
    sign: bool = False,
    factors: Sequence[Tensor] = (),
) -> None:
    """Write every parameter once: W ← (1 - lr·λ) W - lr·scale·back(N).

    Args:
        weights: W.
        updates: N, in the low-rank space; with factors of any of the dtypes of gradients.
        bases: flat, as for `project`.
        hyper: lr, λ and scale.
        side: of the plan.
        sign: take the sign after the back-projection (Lion).
        factors: what the rows (m, 1), the columns (1, n) or all (1, 1) of every dense N are multiplied by.
    """
    weights, hyper, updates, bases, factors = only_finite(weights, hyper, updates, bases, factors)
    params = weights.params
    rates = hyper.lr.double().expand(len(params)).tolist()
    lefts, rights = bases[: len(params)], bases[len(params) :]
    for i, (param, update, rate) in enumerate(zip(params, updates, rates, strict=True)):
        own = () if side is None else (lefts[i], rights[i]) if side == "both" else (lefts[i],)
        decay, factor = 1 - rate * hyper.weight_decay, -rate * hyper.scale
        if own and param.dtype == update.dtype and not sign:
            if decay != 1:
                param.mul_(decay)
            _add_back_(param, update, own, side, factor)
            continue
        moved = update * factors[i] if factors else back(update, own, side)
        how = (weights.steps[i], weights.seed(i), weights.window)
        _move_(param, moved.sign() if sign else moved, decay, factor, *how)


def write_(weights: Weights, values: list[Tensor]) -> None:
    """Round values into the parameters, once, as apply_ does. `values` are overwritten."""
    weights, _, values = only_finite(weights, Hyper(), values)
    for i, (param, value) in enumerate(zip(weights.params, values, strict=True)):
        _round_(param, value, weights.steps[i], weights.seed(i), weights.window)


def _round_(param: Tensor, value: Tensor, step: Tensor, seed: int | Tensor | None, window: Window) -> None:
    if isinstance(seed, Tensor):
        param.copy_(value)
        seed.copy_(value.sub_(param))
    elif seed is not None and param.dtype == torch.bfloat16:
        stochastic_round_(param, value, seed, int(step), window.elements(param.numel(), param.device))
    else:
        param.copy_(value)


def _move_(
    param: Tensor, update: Tensor, decay: float, factor: float, step: Tensor, seed: int | Tensor | None, window: Window
) -> None:
    """W ← decay·W + factor·U."""
    wide = param if param.dtype == update.dtype else param.to(update.dtype, copy=True)
    if isinstance(seed, Tensor):
        wide.add_(seed)
    if decay != 1:
        wide.mul_(decay)
    wide.add_(update, alpha=factor)
    if wide is not param:
        _round_(param, wide, step, seed, window)


def _add_back_(param: Tensor, update: Tensor, bases: Sequence[Tensor], side: Side | None, factor: float) -> None:
    """W += factor·back(N) without an (m, n) temporary."""
    a, b = (update, bases[0].mT) if side == "right" else (bases[0], update)
    if side == "both":
        a, b = bases[0] @ update, bases[1].mT
    param.addmm_(a, b, alpha=factor)


def projected_adam_(
    weights: Weights,
    grads: list[Tensor],
    moments: Moments,
    bases: Sequence[Tensor],
    hyper: Hyper,
    side: Side | None,
) -> None:
    """The whole step of projected Adam: project, update, apply. With no bases this is AdamW."""
    lows = project(grads, bases, side, moments.exp_avgs[0].dtype)
    updates = adam_update_(lows, moments, weights.steps, hyper, finite=weights.finite)
    apply_(weights, updates, bases, hyper, side)


def taken(finite: Tensor, *columns: Sequence[Any]) -> list[list[Any]]:
    """What the columns (empty, one or two a tensor) hold of the tensors that are stepped; the device is waited for."""
    taken = finite.tolist()
    return [list(compress(column, cycle(taken))) for column in columns]


def rests(seeds: Seeds) -> list[Tensor]:
    """Those that are tensors (Kahan)."""
    return [seed for seed in seeds if isinstance(seed, Tensor)]


def lines_of(factors: Sequence[Tensor], matrix: Tensor) -> tuple[int, int, int]:
    """As kernels find a factor: elements of a row, and how far apart the factors of two rows, or columns, are."""
    if not factors:
        return 1, 0, 0
    rows, columns = factors[0].shape
    return matrix.shape[-1], int(rows > 1), int(columns > 1)


def only_finite(weights: Weights, hyper: Hyper, *columns: Sequence[Any]) -> list[Any]:
    """The weights that are stepped, and their part of `hyper` and of the columns; the device is waited for."""
    if weights.finite is None:
        return [weights, hyper, *columns]
    params, steps, seeds, *rest = taken(weights.finite, weights.params, weights.steps, weights.seeds, *columns)
    lr = hyper.lr[weights.finite.to(hyper.lr.device)] if hyper.lr.ndim else hyper.lr
    return [Weights(params, steps, seeds, weights.window), replace(hyper, lr=lr), *rest]


def part_of(column: Sequence[T], count: int, at: slice) -> list[T]:
    """What a column, of one or two entries a tensor, all first ones before the second ones, has for some tensors."""
    return [*column[:count][at], *column[count:][at]]


class Codes(NamedTuple):
    """Moments that are kept as codes, the first ones of all tensors before the second ones.

    Attributes:
        codes: see encode_, as all else.
        scales: of the codes.
        tables: values of the codes, of the first ones and of the second ones.
        streams: seeds of their rounding.
        axis: that blocks run along.
        begin: where they begin in their stream.
    """

    codes: Sequence[Tensor]
    scales: Sequence[Tensor]
    tables: Sequence[Tensor]
    streams: Sequence[int]
    axis: int
    begin: int

    def part(self, at: slice) -> Codes:
        """Those of some tensors."""
        count = len(self.codes) // 2
        codes, scales = (part_of(column, count, at) for column in (self.codes, self.scales))
        return self._replace(codes=codes, scales=scales, streams=part_of(self.streams, count, at))


def moved(
    moments: Sequence[Tensor],
    previous: Sequence[Tensor],
    bases: Sequence[Tensor],
    side: Side | None,
    carried: Sequence[bool],
    project: Callable[..., list[Tensor]],
) -> list[Tensor]:
    """The moments, those to be carried in their new bases: right M c, left cᵀ M, c being Q_oldᵀ Q_new.

    `project` is that of a kernel, which takes all of a list at once.
    """
    out, which = list(moments), [i for i, moves in enumerate(carried) if moves]
    sides = ((0, "left"), (len(out), "right")) if side == "both" else ((0, side),)
    for begin, one in sides if which else ():
        old, new = ([column[begin + i] for i in which] for column in (previous, bases))
        changes = project(new, old, "left", new[0].dtype)
        for i, x in zip(which, project([out[i] for i in which], changes, one, new[0].dtype), strict=True):
            out[i] = x
    return out


@contextmanager
def contiguous(*columns: Sequence[Tensor]) -> Iterator[list[list[Tensor]]]:
    """The columns as kernels address them; what is not contiguous is a copy, which is copied back at the end."""
    copies = [[tensor.contiguous() for tensor in column] for column in columns]
    yield copies
    for tensor, copied in zip(chain(*columns), chain(*copies), strict=True):
        if copied is not tensor:
            tensor.copy_(copied)


def coded_adam_(weights: Weights, grads: list[Tensor], codes: Codes, hyper: Hyper, eps_inside: bool = False) -> None:
    """The whole step of Adam without a projection, on moments that are kept as codes: no more than a chunk is decoded.

    W begins in its whole where its moments do. A module may have `coded_adam_update_` beside it, which returns N as
    adam_update_ does, and whose weight_norm_adam_ takes `Codes`, too.
    """
    columns = (codes.codes, codes.scales, codes.streams)
    weights, hyper, grads, code_of, scale_of, streams = only_finite(weights, hyper, grads, *columns)
    params, axis, tables = weights.params, codes.axis, codes.tables
    rates = hyper.lr.double().expand(len(params)).tolist()
    for i, (param, grad, rate) in enumerate(zip(params, grads, rates, strict=True)):
        whole, step, seed = param.contiguous(), weights.steps[i], weights.seed(i)
        wide, lows, length = rows(whole, axis), rows(grad.contiguous(), axis), param.shape[axis]
        kept = [(rows(code_of[j], axis), rows(scale_of[j], axis), streams[j]) for j in (i, len(params) + i)]
        how = (step.clone(), hyper, eps_inside)
        step.add_(1)
        agreeing = torch.zeros((), dtype=torch.int64, device=param.device)
        for at in _chunks(whole, axis) if hyper.transform == "cautious" else ():  # which sees all before it writes any
            update, low, _ = _advanced(lows, kept, tables, at, *how)
            agreeing += (update * low > 0).sum()
        for at in _chunks(whole, axis):
            update, low, moments = _advanced(lows, kept, tables, at, *how)
            transform_([update], [low], hyper.transform, [agreeing.to(low.dtype) / param.numel()])
            first = codes.begin + at.start * length
            for x, (code, unit, stream), table in reversed([*zip(moments, kept, tables, strict=True)]):  # V before M
                encode_([x], [code[at]], [unit[at]], table, -1, [stream], [step], first)
            own = rows(seed, axis)[at] if isinstance(seed, Tensor) else seed
            _move_(wide[at], update, 1 - rate * hyper.weight_decay, -rate * hyper.scale, step, own, Window(first))
        if whole is not param:
            param.copy_(whole)


def coded_updates(
    kernel: Any,
    lows: list[Tensor],
    codes: Codes,
    steps: list[Tensor],
    hyper: Hyper,
    eps_inside: bool = False,
    finite: Tensor | None = None,
) -> list[Tensor]:
    """N of a kernel that writes parameters alone: what a step of -1 adds to zero."""
    updates = [torch.zeros(low.shape, dtype=steps[0].dtype, device=low.device) for low in lows]
    minus = replace(hyper, lr=scalar(-1), weight_decay=0.0, scale=1.0)
    kernel.coded_adam_(Weights(updates, steps, finite=finite), lows, codes, minus, eps_inside)
    return updates


def _advanced(
    grads: Tensor,
    kept: Sequence[tuple[Tensor, Tensor, int]],
    tables: Sequence[Tensor],
    at: slice,
    step: Tensor,
    hyper: Hyper,
    eps_inside: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """N and R of some rows, and their moments after the step."""
    low = grads[at].to(step.dtype)
    moments = [low.new_empty(low.shape) for _ in tables]
    for x, (code, unit, _), table in zip(moments, kept, tables, strict=True):
        decode_([x], [code[at]], [unit[at]], table, -1)
    first, second = moments
    plain = replace(hyper, transform="none")
    (update,) = adam_update_([low], Moments([first], [second]), [step.clone()], plain, eps_inside)
    return update, low, moments


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
    """Write the codes and scales of tensors of one shape, rounded so that the expectation is exact, or to nearest.

    Args:
        xs: any dtype; coded in float32.
        codes: uint8, the shape of x, or half as many along `axis` where the table has at most 16 values.
        scales: float32, one for every block.
        table: ascending values in [-1, 1].
        axis: that blocks run along: -1, or -2 of a matrix.
        seeds: element i of x, the blocks' dimension last, uses half-word begin + i of the stream (seed, step); empty
            rounds to nearest.
        steps: 0-d, one for every seed.
        begin: where each x begins in a tensor of which it is a part.
    """
    gaps = table.diff()
    for i, (x, code_of, scale_of) in enumerate(zip(xs, codes, scales, strict=True)):
        length = x.shape[axis]
        for at in _chunks(x, axis):
            wide = rows(x, axis)[at].float().contiguous()
            spare = -length % BLOCK if length > BLOCK else 0
            blocks = torch.nn.functional.pad(wide, (0, spare)).view(len(wide), -1, min(BLOCK, length))
            scale = blocks.abs().amax(-1)
            scale = torch.where(scale >= torch.finfo(torch.float32).tiny, scale, 0)  # what is smaller has no inverse
            divisor = torch.where(scale > 0, scale, math.inf).unsqueeze(-1)
            unit = (blocks / divisor).flatten(1)[:, :length].contiguous()
            low = torch.bucketize(unit, table[1:-1], out_int32=True, right=True)
            odds: float | Tensor = 0.5
            if seeds:
                first = begin + at.start * length
                odds = uniform(seeds[i], steps[i], first, unit.numel(), x.device).view_as(unit)
            code = low.add(unit - table[low] > odds * gaps[low]).to(torch.uint8)
            if len(table) <= 16:
                pairs = torch.nn.functional.pad(code, (0, length % 2)).view(len(code), -1, 2)
                code = pairs[..., 0] | pairs[..., 1] << 4
            rows(code_of, axis)[at] = code
            rows(scale_of, axis)[at] = scale


def decode_(xs: list[Tensor], codes: list[Tensor], scales: list[Tensor], table: Tensor, axis: int) -> None:
    """Write the tensors that were coded into `xs`, contiguous and of one shape."""
    for x, code_of, scale_of in zip(xs, codes, scales, strict=True):
        length = x.shape[axis]
        for at in _chunks(x, axis):
            code, scale = rows(code_of, axis)[at], rows(scale_of, axis)[at]
            if len(table) <= 16:
                code = torch.stack((code & 15, code >> 4), -1).flatten(-2)[:, :length]
            if scale.shape[1] > 1:
                scale = scale.repeat_interleave(BLOCK, dim=1)[:, :length]
            rows(x, axis)[at] = table[code.int()].mul_(scale)


def rows(x: Tensor, axis: int) -> Tensor:
    """The view (k, length) in whose rows blocks lie, of a tensor, its codes or its scales."""
    return x.mT if axis == -2 else x.view(-1, x.shape[-1])


def _chunks(x: Tensor, axis: int) -> Iterator[slice]:
    length = x.shape[axis]
    count = x.numel() // length
    step = max(8, _CHUNK // length // 8 * 8)  # multiples of 8 elements begin with a new block of random words
    return (slice(begin, min(begin + step, count)) for begin in range(0, count, step))
