"""The kernels of any module for the shards of a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..distributed import CONTRACTED, Sharding
from ..philox import ALL, stochastic_round_
from ..types import Hyper, Moments, Side, Weights
from .reference import Codes, coded_updates


class Sharded:
    """The kernels of a module for the shards of a tensor: the same functions, with the reductions that shards need."""

    def __init__(self, kernel: Any, sharding: Sharding) -> None:
        self._kernel, self._sharding = kernel, sharding
        # These work on every element, or every row of the low-rank space, by itself.
        self.back, self.encode_, self.decode_ = kernel.back, kernel.encode_, kernel.decode_
        self.line_norms = kernel.line_norms  # of the parts of lines that are here

    def grad_max(self, grads: list[Tensor]) -> Tensor:
        """Of this rank's shards, with NaN as ∞, since a MAX over ranks may drop NaN: the engine reduces all buckets."""
        if grads and grads[0].numel():
            return self._kernel.grad_max(grads).nan_to_num_(math.inf, math.inf)
        return torch.zeros(len(grads), dtype=torch.float64, device=self._sharding.mesh.device_type)

    def project(
        self, grads: list[Tensor], bases: Sequence[Tensor], side: Side | None, dtype: torch.dtype
    ) -> list[Tensor]:
        """R, summed over the shards of the contracted dimension: one collective for all of the list."""
        lows = self._kernel.project(grads, bases, side, dtype)
        return self._sharding.sum(lows, *CONTRACTED[side]) if side else lows

    def transform_(self, updates: list[Tensor], lows: list[Tensor], transform: str) -> None:
        """As the reference; the share of elements that "cautious" keeps is that of the whole tensor."""
        if transform != "cautious":
            self._kernel.transform_(updates, lows, transform)
            return
        masks = [(n * r > 0).to(n.dtype) for n, r in zip(updates, lows, strict=True)]
        self._kernel.transform_(updates, lows, transform, self._sharding.means(masks))

    def adam_update_(
        self,
        lows: list[Tensor],
        moments: Moments,
        steps: list[Tensor],
        hyper: Hyper,
        eps_inside: bool = False,
        finite: Tensor | None = None,
    ) -> list[Tensor]:
        """As the reference."""
        plain = replace(hyper, transform="none")
        updates = self._kernel.adam_update_(lows, moments, steps, plain, eps_inside, finite)
        self.transform_(updates, lows, hyper.transform)
        return updates

    def linear_update_(
        self,
        lows: list[Tensor],
        exp_avgs: list[Tensor],
        steps: list[Tensor],
        look: tuple[float, float],
        keep: tuple[float, float],
        transform: str = "none",
        finite: Tensor | None = None,
    ) -> list[Tensor]:
        """As the reference."""
        updates = self._kernel.linear_update_(lows, exp_avgs, steps, look, keep, "none", finite)
        self.transform_(updates, lows, transform)
        return updates

    @contextmanager
    def _rounded(self, weights: Weights) -> Iterator[Weights]:
        """The weights as a kernel takes them, to be rounded by the random bits of the whole tensors.

        Shards that are no window lend float32 copies, which are rounded afterwards.
        """
        params = weights.params
        rounds = bool(weights.seeds) and params[0].dtype == torch.bfloat16
        window = self._sharding.window(tuple(params[0].shape)) if rounds else ALL
        if window is not None:
            yield weights._replace(window=window)
            return
        wide = [param.float() for param in params]
        yield weights._replace(params=wide, seeds=())
        elements = self._sharding.elements().to(params[0].device)
        for param, value, seed, step in zip(params, wide, weights.seeds, weights.steps, strict=True):
            stochastic_round_(param, value, seed, step, elements)

    def apply_(self, weights: Weights, *how: Any, **options: Any) -> None:
        """As the reference."""
        with self._rounded(weights) as own:
            self._kernel.apply_(own, *how, **options)

    def write_(self, weights: Weights, values: list[Tensor]) -> None:
        """As the reference."""
        with self._rounded(weights) as own:
            self._kernel.write_(own, values)

    def projected_adam_(
        self,
        weights: Weights,
        grads: list[Tensor],
        moments: Moments,
        bases: Sequence[Tensor],
        hyper: Hyper,
        side: Side | None,
    ) -> None:
        """The fused kernel where nothing is to be reduced, otherwise its three pieces."""
        reduced = side is not None and self._sharding.cuts(*CONTRACTED[side])
        if not reduced and hyper.transform != "cautious":
            with self._rounded(weights) as own:
                self._kernel.projected_adam_(own, grads, moments, bases, hyper, side)
            return
        lows = self.project(grads, bases, side, moments.exp_avgs[0].dtype)
        updates = self.adam_update_(lows, moments, weights.steps, hyper, finite=weights.finite)
        self.apply_(weights, updates, bases, hyper, side)

    def coded_adam_(
        self, weights: Weights, grads: list[Tensor], codes: Codes, hyper: Hyper, eps_inside: bool = False
    ) -> None:
        """As the reference; "cautious" takes N of the whole shard, as the share that it keeps is found in between."""
        if hyper.transform != "cautious":
            self._kernel.coded_adam_(weights, grads, codes, hyper, eps_inside)
            return
        plain = replace(hyper, transform="none")
        updates = coded_updates(self._kernel, grads, codes, weights.steps, plain, eps_inside, weights.finite)
        self.transform_(updates, grads, hyper.transform)
        self.apply_(weights, updates, [], hyper, None)
