"""The kernels as torch ops: every schema, fake and default kernel. This page is the whole kernel API.

The default kernel of an op is the reference; csrc/ registers faster ones for the CPU under the same names. Bases come
flat, as in kernels/reference.py; `side` is an index into SIDES, `transform` one into TRANSFORMS, `window` the three
numbers of a Window, and `products` an index into PRODUCTS: a permission, of which the reference makes no use.

Defined by hand, because `torch.library.custom_op` would cost a step 80 µs a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from . import _ext
from .kernels import reference
from .philox import Window
from .types import TRANSFORMS, Hyper, Moments, Side, Weights

SIDES: tuple[Side | None, ...] = (None, "left", "right", "both")
PRODUCTS = ("exact", "own", "rounded")  # what may be multiplied in bfloat16: nothing, bfloat16 tensors, everything

_library = Library("subspace_optim", "DEF")  # type: ignore[no-untyped-call]


def _define(schema: str, default: Callable[..., Any] | None, fake: Callable[..., Any]) -> None:
    name = schema[: schema.index("(")]
    _library.define(schema)  # type: ignore[no-untyped-call]
    if default is not None:
        _library.impl(name, default, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"subspace_optim::{name}", fake, lib=_library)


def _fake_project(
    grads: list[Tensor], bases: list[Tensor], side: int, dtype: torch.dtype, products: int = 0
) -> list[Tensor]:
    lows = []
    for i, grad in enumerate(grads):
        (m, n), rank = grad.shape, bases[i].shape[1]
        low = (m, rank) if SIDES[side] == "right" else (rank, n if SIDES[side] == "left" else rank)
        lows.append(grad.new_empty(low, dtype=dtype))
    return lows


# A dense gradient is its own projection, which an op may not return: the side is never None here.
_define(
    "project(Tensor[] grads, Tensor[] bases, int side, ScalarType dtype, int products=0) -> Tensor[]",
    lambda grads, bases, side, dtype, products=0: reference.project(grads, bases, SIDES[side], dtype),
    _fake_project,
)


def _adam_update_(
    updates: list[Tensor],
    lows: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    transform: int,
    eps_inside: bool,
) -> None:
    hyper = Hyper(betas=(beta1, beta2), eps=eps, transform=TRANSFORMS[transform])
    found = reference.adam_update_(lows, Moments(exp_avgs, exp_avg_sqs), steps, hyper, eps_inside)
    torch._foreach_copy_(updates, found)


# The updates are an argument: an op that writes into lists and returns one as well cannot be compiled.
_define(
    "adam_update_(Tensor(a!)[] updates, Tensor[] lows, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] steps, float beta1, float beta2, float eps, int transform, bool eps_inside) -> ()",
    _adam_update_,
    lambda *_: None,
)


def _linear_update_(
    updates: list[Tensor],
    lows: list[Tensor],
    exp_avgs: list[Tensor],
    steps: list[Tensor],
    look_mean: float,
    look_low: float,
    keep_mean: float,
    keep_low: float,
    transform: int,
) -> None:
    look, keep = (look_mean, look_low), (keep_mean, keep_low)
    found = reference.linear_update_(lows, exp_avgs, steps, look, keep, TRANSFORMS[transform])
    torch._foreach_copy_(updates, found)


_define(
    "linear_update_(Tensor(a!)[] updates, Tensor[] lows, Tensor(b!)[] exp_avgs, Tensor(c!)[] steps, float look_mean, "
    "float look_low, float keep_mean, float keep_low, int transform) -> ()",
    _linear_update_,
    lambda *_: None,
)


def _apply_(
    params: list[Tensor],
    updates: list[Tensor],
    bases: list[Tensor],
    steps: list[Tensor],
    seeds: list[int],
    lr: Tensor,
    weight_decay: float,
    scale: float,
    side: int,
    sign: bool,
    window: list[int],
    factors: list[Tensor],
    products: int = 0,
) -> None:
    hyper = Hyper(lr, weight_decay=weight_decay, scale=scale)
    reference.apply_(Weights(params, steps, seeds, Window(*window)), updates, bases, hyper, SIDES[side], sign, factors)


_define(
    "apply_(Tensor(a!)[] params, Tensor[] updates, Tensor[] bases, Tensor[] steps, int[] seeds, Tensor lr, "
    "float weight_decay, float scale, int side, bool sign, int[] window, Tensor[] factors, int products=0) -> ()",
    _apply_,
    lambda *_: None,
)


def _projected_adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    bases: list[Tensor],
    steps: list[Tensor],
    seeds: list[int],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float,
    side: int,
    transform: int,
    window: list[int],
    products: int = 0,
) -> None:
    weights, moments = Weights(params, steps, seeds, Window(*window)), Moments(exp_avgs, exp_avg_sqs)
    hyper = Hyper(lr, (beta1, beta2), eps, weight_decay, scale, TRANSFORMS[transform])
    reference.projected_adam_(weights, grads, moments, bases, hyper, SIDES[side])


_define(
    "projected_adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor[] bases, Tensor(d!)[] steps, int[] seeds, Tensor lr, float beta1, float beta2, float eps, "
    "float weight_decay, float scale, int side, int transform, int[] window, int products=0) -> ()",
    _projected_adam_,
    lambda *_: None,
)

# The next two are without a default kernel: rules.WeightNormAdam and rules.CompressedAdafactor do the same in pieces
# where their module has no such function.
_define(
    "weight_norm_adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] length_avgs, Tensor(e!)[] length_avg_sqs, Tensor[] bases, Tensor(f!)[] steps, int[] seeds, "
    "Tensor lr, float beta1, float beta2, float eps, float weight_decay, float scale, int side, int transform, "
    "int products=0) -> ()",
    None,
    lambda *_: None,
)

_define(
    "compressed_adafactor_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] row_averages, "
    "Tensor(d!)[] column_averages, Tensor[] previous, Tensor[] bases, bool[] carried, Tensor(e!)[] steps, int[] seeds, "
    "Tensor lr, float beta1, float decay_rate, float clip_threshold, float weight_decay, float scale, int side, "
    "int transform, int products=0) -> ()",
    None,
    lambda *_: None,
)

_define(
    "grad_max(Tensor[] grads) -> Tensor",
    reference.grad_max,
    lambda grads: grads[0].new_empty(len(grads), dtype=torch.float64),
)

_define(
    "line_norms(Tensor[] grads, int dim, ScalarType dtype) -> Tensor[]",
    reference.line_norms,
    lambda grads, dim, dtype: [grad.new_empty(grad.sum(dim, keepdim=True).shape, dtype=dtype) for grad in grads],
)

# Without a default kernel: the reference, philox.words, returns them.
_define("words_(Tensor(a!) out, int[] seeds) -> ()", None, lambda *_: None)

_define(
    "encode_(Tensor[] xs, Tensor(a!)[] codes, Tensor(b!)[] scales, Tensor table, int axis, int[] seeds, "
    "Tensor[] steps, int begin) -> ()",
    reference.encode_,
    lambda *_: None,
)

_define(
    "decode_(Tensor(a!)[] xs, Tensor[] codes, Tensor[] scales, Tensor table, int axis) -> ()",
    reference.decode_,
    lambda *_: None,
)


def _coded_adam_(
    params: list[Tensor],
    grads: list[Tensor],
    codes: list[Tensor],
    scales: list[Tensor],
    tables: list[Tensor],
    streams: list[int],
    axis: int,
    begin: int,
    steps: list[Tensor],
    seeds: list[int],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float,
    transform: int,
    eps_inside: bool,
) -> None:
    kept = reference.Codes(codes, scales, tables, streams, axis, begin)
    hyper = Hyper(lr, (beta1, beta2), eps, weight_decay, scale, TRANSFORMS[transform])
    reference.coded_adam_(Weights(params, steps, seeds), grads, kept, hyper, eps_inside)


_define(
    "coded_adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] codes, Tensor(c!)[] scales, Tensor[] tables, "
    "int[] streams, int axis, int begin, Tensor(d!)[] steps, int[] seeds, Tensor lr, float beta1, float beta2, "
    "float eps, float weight_decay, float scale, int transform, bool eps_inside) -> ()",
    _coded_adam_,
    lambda *_: None,
)

_ext.load()
