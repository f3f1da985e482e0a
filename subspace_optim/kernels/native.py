"""The kernels of csrc/, with the signatures of reference.py; what they do not do better is the reference itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _ext, ops
from ..philox import ALL, Window
from ..types import TRANSFORMS, Plan, Side
from . import reference
from .reference import back, transform_, write_

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


def project(grads: list[Tensor], bases: list[Tensor], side: Side | None, dtype: torch.dtype) -> list[Tensor]:
    """R for every G; half-precision gradients are converted block by block."""
    if side is None:
        return reference.project(grads, bases, side, dtype)
    return _ops.project(grads, bases, ops.SIDES.index(side), dtype, _products())


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
    """R, M and V are read once, M, V and N written once."""
    if finite is not None:
        return reference.adam_update_(
            lows, exp_avgs, exp_avg_sqs, steps, beta1, beta2, eps, transform, eps_inside, finite
        )
    updates = [torch.empty_like(m) for m in exp_avgs]
    _ops.adam_update_(
        *(updates, lows, exp_avgs, exp_avg_sqs, steps, beta1, beta2, eps, TRANSFORMS.index(transform), eps_inside)
    )
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
    factors: Sequence[Tensor] = (),
) -> None:
    """Every W is read and written once."""
    if finite is not None:
        how = (seeds, lr, weight_decay, scale, side, sign, window, finite, factors)
        reference.apply_(params, updates, bases, steps, *how)
        return
    _ops.apply_(
        *(params, updates, bases, steps, seeds, lr, weight_decay, scale, ops.SIDES.index(side), sign, window),
        *(factors, _products()),
    )
    _written(params)


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
    """One matrix at a time, so that R lives in the cache."""
    if finite is not None:
        reference.projected_adam_(
            *(params, grads, exp_avgs, exp_avg_sqs, bases, steps, seeds, lr),
            *(beta1, beta2, eps, weight_decay, scale, side, transform, window),
            finite=finite,
        )
        return
    _ops.projected_adam_(
        *(params, grads, exp_avgs, exp_avg_sqs, bases, steps, seeds, lr, beta1, beta2, eps, weight_decay, scale),
        *(ops.SIDES.index(side), TRANSFORMS.index(transform), window, _products()),
    )
    _written(params)


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
    """The whole step of rules.WeightNormAdam, in blocks of rows: the tangential gradient never exists as a whole."""
    columns: list[Any] = [params, grads, exp_avgs, exp_avg_sqs, length_avgs, length_avg_sqs, bases, steps, seeds]
    if finite is not None:
        columns = reference.taken(finite, *columns)
    _ops.weight_norm_adam_(
        *(*columns, lr, beta1, beta2, eps, weight_decay, scale),
        *(ops.SIDES.index(side), TRANSFORMS.index(transform), _products()),
    )
    _written(params)


def compressed_adafactor_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    row_averages: list[Tensor],
    column_averages: list[Tensor],
    previous: list[Tensor],
    bases: list[Tensor],
    carried: list[bool],
    steps: list[Tensor],
    seeds: Sequence[int],
    lr: Tensor,
    beta1: float,
    decay_rate: float,
    clip_threshold: float,
    weight_decay: float,
    scale: float,
    side: Side | None,
    transform: str,
    finite: Tensor | None = None,
) -> None:
    """The whole step of rules.CompressedAdafactor, D in blocks of rows."""
    columns: list[Any] = [params, grads, exp_avgs, row_averages, column_averages, previous, bases, carried]
    columns += [steps, seeds]
    if finite is not None:
        columns, lr = reference.taken(finite, *columns), reference.taken_rates(finite, lr)
    _ops.compressed_adafactor_(
        *(*columns, lr, beta1, decay_rate, clip_threshold, weight_decay, scale),
        *(ops.SIDES.index(side), TRANSFORMS.index(transform), _products()),
    )
    _written(params)


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
    """Decoded, advanced, coded and applied a thousand elements at a time, in the cache."""
    if finite is not None:
        reference.coded_adam_(
            *(params, grads, codes, scales, tables, streams, axis, begin, steps, seeds, lr),
            *(beta1, beta2, eps, weight_decay, scale, transform, eps_inside, finite),
        )
        return
    _ops.coded_adam_(
        *(params, grads, codes, scales, tables, streams, axis, begin, steps, seeds, lr, beta1, beta2, eps),
        *(weight_decay, scale, TRANSFORMS.index(transform), eps_inside),
    )
    _written(params)


def decode_(xs: list[Tensor], codes: list[Tensor], scales: list[Tensor], table: Tensor, axis: int) -> None:
    """The bits of the reference, in one pass."""
    _ops.decode_(xs, codes, scales, table, axis)


def words(seeds: Sequence[int], count: int, device: torch.device) -> Tensor:
    """The words of philox.py, as the loops that round parameters make them."""
    out = torch.empty((len(seeds), (count + 3) // 4, 4), dtype=torch.int64, device=device)
    _ops.words_(out, list(seeds))
    return out


def _written(params: Iterable[Tensor]) -> None:
    """Tell autograd, as every in-place op of torch does, so that a stale graph is refused and not used."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(params)
