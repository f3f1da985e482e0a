"""The nouns: how a tensor is seen (`Plan`), what is stored for it (`State`), what steps together (`Bucket`).

Letters, everywhere in this package: a matrix is (m, n), r is the rank, d the projected dimension (n on the right,
m on the left), and a basis is always (d, r), its columns spanning the subspace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

Side = Literal["left", "right", "both"]
State = dict[str, Any]  # tensors and ints only, so that torch.load and DCP take it as it is
Bases = tuple[Tensor, ...]  # one basis, or (left, right) when the side is "both"
Change = tuple[Tensor, ...]  # per basis, (r, r): Q_oldᵀ Q_new

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
MOMENTS = ("rotate", "keep", "project_aware")
TRANSFORMS = ("none", "grams", "cautious")


@dataclass(frozen=True, slots=True)
class Plan:
    """How one tensor is stepped: derived from its shape and its group, never saved.

    Attributes:
        shape: the tensor as the user made it.
        matrix: the same elements as (m, n), or (b, m, n) for a batch of matrices; `shape` itself when dense.
        side: right: R = G Q; left: R = Pᵀ G; both: R = Pᵀ G Q; None: dense, R = G.
        rank: columns of the basis; 0 when dense.
        dtype: of the parameter.
        device: of the parameter.
        reason: why the tensor is dense; empty when it is projected.
    """

    shape: tuple[int, ...]
    matrix: tuple[int, ...]
    side: Side | None
    rank: int
    dtype: torch.dtype
    device: torch.device
    reason: str = ""

    @property
    def low_shape(self) -> tuple[int, ...]:
        """Shape of the projected gradient and of every moment."""
        if self.side is None:
            return self.matrix
        *batch, m, n = self.matrix
        low = {"right": (m, self.rank), "left": (self.rank, n), "both": (self.rank, self.rank)}[self.side]
        return (*batch, *low)

    @property
    def sides(self) -> tuple[Side, ...]:
        """The one-sided projections that make up `side`, in the order of their bases."""
        if self.side is None:
            return ()
        return ("left", "right") if self.side == "both" else (self.side,)

    @property
    def basis_keys(self) -> tuple[str, ...]:
        """State keys of the bases, in the order of `sides`."""
        return ("basis_left", "basis_right") if self.side == "both" else ("basis",) * (self.side is not None)

    @property
    def basis_shapes(self) -> tuple[tuple[int, ...], ...]:
        """(d, r) of each basis, in the order of `sides`, with the batch in front."""
        *batch, m, n = self.matrix if self.side else (0, 0)
        return tuple((*batch, m if side == "left" else n, self.rank) for side in self.sides)

    @property
    def state_dtype(self) -> torch.dtype:
        """Moments and bases are float32 whatever the parameter is: a bfloat16 EMA with β₂ = 0.999 never decays."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def view(self, tensor: Tensor) -> Tensor:
        """The tensor in the shape of `matrix`: the same memory where strides allow it, otherwise a copy."""
        return tensor if self.side is None else tensor.reshape(self.matrix)


@lru_cache(maxsize=4096)
def make_plan(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    rank: int | float | None,
    proj_type: str = "std",
    batch_dims: int = 0,
) -> Plan:
    """Decide how a tensor of this shape is stepped.

    Args:
        shape: of the parameter.
        dtype: of the parameter.
        device: of the parameter.
        rank: columns of the basis; a float in (0, 1) is a fraction of min(m, n); None is dense.
        proj_type: which dimension is compressed: std the smaller, reverse_std the larger, left m, right n, full both.
        batch_dims: leading dimensions that index separate matrices (stacked experts) instead of belonging to one.
    """

    def dense(reason: str) -> Plan:
        return Plan(shape, shape, None, 0, dtype, device, reason)

    if rank is None:
        return dense("its group has no rank")
    if len(shape) - batch_dims < 2:
        return dense(f"{len(shape)}-D" if batch_dims == 0 else f"{len(shape)}-D with batch_dims={batch_dims}")
    if math.prod(shape) == 0:
        return dense("it is empty")
    m, n = shape[batch_dims], math.prod(shape[batch_dims + 1 :])
    matrix = (math.prod(shape[:batch_dims]), m, n) if batch_dims else (m, n)
    columns = max(1, round(rank * min(m, n))) if isinstance(rank, float) else rank
    if columns >= min(m, n):
        return dense(f"rank {columns} ≥ min({m}, {n})")
    side: Side
    if proj_type == "full":
        side = "both"
    elif proj_type in ("left", "right"):
        side = "left" if proj_type == "left" else "right"
    else:
        side = "right" if (m >= n) == (proj_type == "std") else "left"
    return Plan(shape, matrix, side, columns, dtype, device)


@dataclass(frozen=True, slots=True)
class Hyper:
    """The hyperparameters of one group at one step."""

    lr: Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    scale: float
    transform: str
    moments: str


@dataclass(slots=True)
class Bucket:
    """Tensors that share a plan and hyperparameters, as parallel lists: one kernel call steps them all.

    Attributes:
        plan: the plan they share.
        params: seen as `plan.matrix`.
        grads: seen as `plan.matrix`; never written.
        states: one dict a tensor.
        seeds: of the stochastic rounding, one a tensor; empty rounds to nearest.
        bases: in force for this step; empty when dense.
        previous: the bases that the moments are still expressed in, for a rule that `looks_behind`.
    """

    plan: Plan
    params: list[Tensor]
    grads: list[Tensor]
    states: list[State]
    seeds: list[int]
    bases: list[Bases] = field(default_factory=list)
    previous: list[Bases] = field(default_factory=list)

    def slot(self, key: str) -> list[Tensor]:
        """One state tensor of every member."""
        return [state[key] for state in self.states]

    def __len__(self) -> int:
        return len(self.params)
