"""The steps of reference.py, elementwise parts compiled by torch: for a CPU without csrc/, or to compare with.

    _step_    dense: moments, transform and the write of the parameter, in one pass
    _update_  projected: moments and transform, N
    _move_    projected: the write of back(N), in one pass with its rounding

Matrix products stay torch's, and where one of them ends in the parameter there is nothing to compile. What differs from
step to step comes in tensors and every tensor comes flat, so that one graph serves all shapes, numbers of tensors, step
counts, betas and learning rates; each combination of dtypes, transform and rounding has its own. What is left to the
reference: shards, tensors that are not contiguous, those of fewer than two elements (another graph to torch), a
planner's fake ones, and codes.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.dlpack import from_dlpack

from ..philox import ALL, stochastic_round_, words
from ..types import Hyper, Moments, Plan, Seeds, Side, Weights
from . import reference
from .reference import (
    back,
    coded_adam_,
    decode_,
    encode_,
    grad_max,
    line_norms,
    linear_update_,
    project,
    transform_,
    write_,
)

__all__ = [
    "adam_update_",
    "apply_",
    "back",
    "coded_adam_",
    "decode_",
    "encode_",
    "grad_max",
    "line_norms",
    "linear_update_",
    "project",
    "projected_adam_",
    "transform_",
    "words",
    "write_",
]


_GRAPHS = 64  # of one function; torch gives up after 8


def supports(plan: Plan | None) -> str | None:
    """Why torch cannot compile for this plan, or at all; None if it can."""
    if plan is not None and plan.device.type != "cpu":
        return f"it is for the CPU, and the parameter is on {plan.device.type}"
    return _missing()


def detail() -> str:
    """What is worth knowing of it where it runs."""
    return "by name alone: the first step compiles for tens of seconds"


@cache
def _missing() -> str | None:
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return f"{compiler} is not installed"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h is not installed"
    return None


# ---- what is compiled -----------------------------------------------------------------------------------------------


def _updated(
    low: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, adam: Tensor, transform: str, eps_inside: bool = False
) -> Tensor:
    beta1, beta2, eps, correction1, correction2 = adam.unbind()
    low = low.to(exp_avg.dtype)
    exp_avg.mul_(beta1).add_(low * (1 - beta1))
    exp_avg_sq.mul_(beta2).add_(low * low * (1 - beta2))
    root = exp_avg_sq.sqrt()
    divisor = (root + eps) / correction2 if eps_inside else root / correction2 + eps
    update = exp_avg / (divisor * correction1)
    transform_([update], [low], transform)
    return update


def _update_(out: Tensor, low: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, adam: Tensor, **how: Any) -> None:
    out.copy_(_updated(low, exp_avg, exp_avg_sq, adam, **how))


def _move_(param: Tensor, update: Tensor, rates: Tensor, step: Tensor, seed: Tensor | None, sign: bool = False) -> None:
    decay, factor = rates.unbind()
    moved = param.to(update.dtype) * decay + (update.sign() if sign else update) * factor
    if seed is not None and param.dtype == torch.bfloat16:
        stochastic_round_(param, moved, seed, step)
    else:
        param.copy_(moved)


def _step_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    adam: Tensor,
    rates: Tensor,
    step: Tensor,
    seed: Tensor | None,
    transform: str,
) -> None:
    _move_(param, _updated(grad, exp_avg, exp_avg_sq, adam, transform), rates, step, seed)


def _run(function: Callable[..., None], *columns: Iterable[Tensor | None], **how: Any) -> None:
    """Call it compiled, on flat tensors: a row of the columns at a time."""
    call = _compiled(function)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=_GRAPHS):
        for row in zip(*columns, strict=True):
            call(*(None if tensor is None else _flat(tensor) for tensor in row), **how)


def _flat(tensor: Tensor) -> Tensor:
    """The same memory without the base and the offset of a view, on which torch's graphs depend."""
    return from_dlpack(tensor.detach().view(-1))


@cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(function, dynamic=True, fullgraph=True)


# ---- the functions of reference.py ----------------------------------------------------------------------------------


def _fits(*columns: Sequence[Tensor]) -> bool:
    tensors = [tensor for column in columns for tensor in column]
    return all(type(t) in (Tensor, Parameter) and t.is_contiguous() and t.numel() > 1 for t in tensors)


def _rows(count: int, *columns: Tensor | float) -> Sequence[Tensor]:
    """The columns, one value or one a tensor, as a vector for each tensor."""
    wide = [torch.as_tensor(column, dtype=torch.float64, device="cpu").expand(count) for column in columns]
    return torch.stack(wide, dim=1).unbind()


def _adam(steps: list[Tensor], hyper: Hyper) -> Sequence[Tensor]:
    """The vectors of `_updated`; the steps advance."""
    torch._foreach_add_(steps, 1)
    (beta1, beta2), counts = hyper.betas, torch.stack(steps).double()
    eps = max(hyper.eps, reference._EPS_FLOOR)
    return _rows(len(steps), beta1, beta2, eps, 1 - beta1**counts, (1 - beta2**counts).sqrt())


def _rates(count: int, hyper: Hyper) -> Sequence[Tensor]:
    """The vectors of `_move_`."""
    lr = hyper.lr.double()
    return _rows(count, 1 - lr * hyper.weight_decay, -lr * hyper.scale)


def _seeds(count: int, seeds: Seeds) -> Sequence[Tensor | None]:
    return torch.tensor(seeds, device="cpu").unbind() if seeds else [None] * count


def adam_update_(
    lows: list[Tensor],
    moments: Moments,
    steps: list[Tensor],
    hyper: Hyper,
    eps_inside: bool = False,
    finite: Tensor | None = None,
) -> list[Tensor]:
    """See the reference."""
    if finite is not None or not _fits(lows, *moments):
        return reference.adam_update_(lows, moments, steps, hyper, eps_inside, finite)
    updates = [torch.empty_like(m) for m in moments.exp_avgs]
    adam = _adam(steps, hyper)
    _run(_update_, updates, lows, *moments, adam, transform=hyper.transform, eps_inside=eps_inside)
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
    """See the reference."""
    params, count = weights.params, len(weights.params)
    is_product = side is not None and params[0].dtype == updates[0].dtype and not sign
    if is_product or not _is_all(weights) or not _fits(params, updates):
        reference.apply_(weights, updates, bases, hyper, side, sign, factors)
        return
    moved = (
        update * factors[i] if factors else back(update, bases[i::count], side) for i, update in enumerate(updates)
    )
    _run(_move_, params, moved, _rates(count, hyper), weights.steps, _seeds(count, weights.seeds), sign=sign)
    torch.autograd.graph.increment_version(params)  # as every in-place op of torch: a stale graph is refused


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
    if side is not None or not _is_all(weights) or not _fits(params, grads, *moments):
        lows = project(grads, bases, side, moments.exp_avgs[0].dtype)
        updates = adam_update_(lows, moments, steps, hyper, finite=weights.finite)
        apply_(weights, updates, bases, hyper, side)
        return
    numbers = (_adam(steps, hyper), _rates(count, hyper), steps, _seeds(count, weights.seeds))
    _run(_step_, params, grads, *moments, *numbers, transform=hyper.transform)
    torch.autograd.graph.increment_version(params)


def _is_all(weights: Weights) -> bool:
    """Whether whole tensors step, all of them."""
    return weights.finite is None and weights.window == ALL
