"""The kernels of csrc/, with the signatures of reference.py; what they do not do better is the reference itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _ext, ops
from ..types import TRANSFORMS, Hyper, Moments, Plan, Side, Weights
from . import reference
from .reference import Codes, back, transform_, write_

__all__ = [
    "adam_update_",
    "apply_",
    "back",
    "coded_adam_",
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


_ops = torch.ops.subspace_optim


def supports(plan: Plan | None) -> str | None:
    """Why these kernels cannot step the plan, or at all; None if they can."""
    if plan is not None and plan.device.type != "cpu":
        return f"they are for the CPU, and the parameter is on {plan.device.type}"
    return _ext.load()


def detail() -> str:
    """What is worth knowing of them where they run."""
    return _ext.isa()


def _products() -> int:
    """What the process allows the products of a step, on CPUs that multiply bfloat16 faster than float32.

    torch says it of its own: "bf16" also rounds what is float32, "ieee" rounds nothing, and where nothing was said
    bfloat16 gradients and parameters are multiplied as they are.
    """
    allowed = {"bf16": "rounded", "none": "own"}
    precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return ops.PRODUCTS.index(allowed.get(precision, "exact"))


def grad_max(grads: list[Tensor]) -> Tensor:
    """The largest |g| of every gradient, as float64; NaN if it has one."""
    return _ops.grad_max(grads)


def line_norms(grads: list[Tensor], dim: int, dtype: torch.dtype) -> list[Tensor]:
    """One pass, without a copy of half-precision gradients."""
    return _ops.line_norms(grads, dim, dtype)


def project(grads: list[Tensor], bases: Sequence[Tensor], side: Side | None, dtype: torch.dtype) -> list[Tensor]:
    """R for every G; half-precision gradients are converted block by block."""
    if side is None:
        return reference.project(grads, bases, side, dtype)
    return _ops.project(grads, bases, ops.SIDES.index(side), dtype, _products())


def adam_update_(
    lows: list[Tensor],
    moments: Moments,
    steps: list[Tensor],
    hyper: Hyper,
    eps_inside: bool = False,
    finite: Tensor | None = None,
) -> list[Tensor]:
    """R, M and V are read once, M, V and N written once."""
    if finite is not None:
        return reference.adam_update_(lows, moments, steps, hyper, eps_inside, finite)
    updates = [torch.empty_like(m) for m in moments.exp_avgs]
    _ops.adam_update_(updates, lows, *moments, steps, *hyper.betas, hyper.eps, _transform(hyper), eps_inside)
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
    """R and M are read once, M and N written once."""
    if finite is not None:
        return reference.linear_update_(lows, exp_avgs, steps, look, keep, transform, finite)
    updates = [torch.empty_like(m) for m in exp_avgs]
    _ops.linear_update_(updates, lows, exp_avgs, steps, *look, *keep, TRANSFORMS.index(transform))
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
    """Every W is read and written once."""
    if weights.finite is not None:
        reference.apply_(weights, updates, bases, hyper, side, sign, factors)
        return
    _ops.apply_(
        *(weights.params, updates, bases, weights.steps, weights.seeds, hyper.lr, hyper.weight_decay, hyper.scale),
        *(ops.SIDES.index(side), sign, weights.window, factors, _products()),
    )
    _written(weights)


def projected_adam_(
    weights: Weights,
    grads: list[Tensor],
    moments: Moments,
    bases: Sequence[Tensor],
    hyper: Hyper,
    side: Side | None,
) -> None:
    """One matrix at a time, so that R lives in the cache."""
    if weights.finite is not None:
        reference.projected_adam_(weights, grads, moments, bases, hyper, side)
        return
    _ops.projected_adam_(
        *(weights.params, grads, *moments, bases, weights.steps, weights.seeds, *_numbers(hyper)),
        *(ops.SIDES.index(side), _transform(hyper), weights.window, _products()),
    )
    _written(weights)


def weight_norm_adam_(
    weights: Weights,
    grads: list[Tensor],
    moments: Moments,
    lengths: Moments,
    bases: Sequence[Tensor],
    hyper: Hyper,
    side: Side | None,
) -> None:
    """The whole step of rules.WeightNormAdam, in blocks of rows: the tangential gradient never exists as a whole."""
    weights, hyper, *columns = reference.only_finite(weights, hyper, grads, *moments, *lengths, bases)
    _ops.weight_norm_adam_(
        *(weights.params, *columns, weights.steps, weights.seeds, *_numbers(hyper)),
        *(ops.SIDES.index(side), _transform(hyper), _products()),
    )
    _written(weights)


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
    """The whole step of rules.CompressedAdafactor, D in blocks of rows."""
    columns = (grads, exp_avgs, row_averages, column_averages, previous, bases, carried)
    weights, hyper, *own = reference.only_finite(weights, hyper, *columns)
    _ops.compressed_adafactor_(
        *(weights.params, *own, weights.steps, weights.seeds, hyper.lr, hyper.betas[0], decay_rate, clip_threshold),
        *(hyper.weight_decay, hyper.scale, ops.SIDES.index(side), _transform(hyper), _products()),
    )
    _written(weights)


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
    """The bits of the reference, in one pass."""
    _ops.encode_(xs, codes, scales, table, axis, seeds, steps, begin)


def coded_adam_(weights: Weights, grads: list[Tensor], codes: Codes, hyper: Hyper, eps_inside: bool = False) -> None:
    """Decoded, advanced, coded and applied a thousand elements at a time, in the cache."""
    if weights.finite is not None:
        reference.coded_adam_(weights, grads, codes, hyper, eps_inside)
        return
    _ops.coded_adam_(
        *(weights.params, grads, *codes, weights.steps, weights.seeds, *_numbers(hyper)),
        *(_transform(hyper), eps_inside),
    )
    _written(weights)


def decode_(xs: list[Tensor], codes: list[Tensor], scales: list[Tensor], table: Tensor, axis: int) -> None:
    """The bits of the reference, in one pass."""
    _ops.decode_(xs, codes, scales, table, axis)


def words(seeds: Sequence[int], count: int, device: torch.device) -> Tensor:
    """The words of philox.py, as the loops that round parameters make them."""
    out = torch.empty((len(seeds), (count + 3) // 4, 4), dtype=torch.int64, device=device)
    _ops.words_(out, list(seeds))
    return out


def _numbers(hyper: Hyper) -> tuple[Any, ...]:
    """As ops take them."""
    return (hyper.lr, *hyper.betas, hyper.eps, hyper.weight_decay, hyper.scale)


def _transform(hyper: Hyper) -> int:
    return TRANSFORMS.index(hyper.transform)


def _written(weights: Weights) -> None:
    """Tell autograd, as every in-place op of torch does, so that a stale graph is refused and not used."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(weights.params)
