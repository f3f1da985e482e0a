"""The nouns: how a tensor is seen (`Plan`), what is stored for it (`State`), what steps together (`Bucket`).

Letters, everywhere in this package: a matrix is (m, n), r is the rank, d the projected dimension (n on the right,
m on the left), and a basis is always (d, r), its columns spanning the subspace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from .distributed import STACK, WHOLE, Axes, Layout, Sharding, fold
from .philox import ALL, Window

Side = Literal["left", "right", "both"]
T = TypeVar("T")
State = dict[str, Any]  # tensors and ints only, so that torch.load and DCP take it as it is
Bases = tuple[Tensor, ...]  # one basis, or (left, right) when the side is "both"
Seeds = Sequence[int | Tensor]  # as kernels round by: see Weights.seeds
Change = tuple[Tensor, ...]  # per basis, (r, r): Q_oldᵀ Q_new

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full", "local")
MOMENTS = ("rotate", "keep", "project_aware")
TRANSFORMS = ("none", "grams", "cautious")
BITS = (32, 8, 4)
BLOCK = 256  # elements of a coded tensor that share a scale
ROUNDINGS = ("stochastic", "nearest", "kahan")

_MANY = 2**20  # a tensor with an element for every block of 256 grows by it, too


@dataclass(frozen=True, slots=True)
class Plan:
    """How one tensor is stepped: derived from its shape and its group, never saved.

    Attributes:
        shape: the tensor as the user made it.
        matrix: what is stepped, (m, n); `shape` itself when dense. Of a sharded tensor, what is here of it.
        stack: how many such matrices the tensor holds along its leading dimensions; None when it is one.
        side: right: R = G Q; left: R = Pᵀ G; both: R = Pᵀ G Q; None: dense, R = G.
        rank: columns of the basis; 0 when dense.
        dtype: of the parameter.
        device: of the parameter.
        reason: why the tensor is dense; empty when it is projected.
        state_bits: of every element of the moments: 32, 8 or 4.
        basis_bits: of every element of the bases.
        compensated: whether the state holds what rounding takes from the parameter (Kahan).
        sharding: how it is spread over a device mesh.
    """

    shape: tuple[int, ...]
    matrix: tuple[int, ...]
    stack: int | None
    side: Side | None
    rank: int
    dtype: torch.dtype
    device: torch.device
    reason: str = ""
    state_bits: int = 32
    basis_bits: int = 32
    compensated: bool = False
    sharding: Sharding = WHOLE

    def __hash__(self) -> int:
        """Of what mostly tells plans apart: a step looks them up several times for every tensor."""
        return hash((self.shape, self.side, self.rank, self.dtype))

    @property
    def whole(self) -> Plan:
        """The plan of the same tensor if it were not sharded."""
        if self.sharding.mesh is None:
            return self
        return replace(self, matrix=self.sharding.matrix, stack=self.sharding.stack, sharding=WHOLE)

    @property
    def members(self) -> Sequence[int]:
        """The numbers of the matrices that are here, in their stack."""
        return self.sharding.members if self.sharding.cuts(STACK) else range(1 if self.stack is None else self.stack)

    @property
    def low_axes(self) -> Axes:
        """Which axis of the matrix every dimension of the projected gradient carries; None for r."""
        if self.side is None:
            return tuple(range(len(self.matrix)))
        return (0 if self.side == "right" else None, 1 if self.side == "left" else None)

    def axes(self, key: str) -> Axes:
        """Which axis of the matrix every dimension of a moment or a basis (and of its moments) carries."""
        for name, side in zip(self.basis_keys, self.sides, strict=True):
            if key.startswith(name):
                return (0 if side == "left" else 1, None)
        return self.low_axes

    @property
    def low_shape(self) -> tuple[int, ...]:
        """Shape of the projected gradient and of every moment."""
        if self.side is None:
            return self.matrix
        m, n = self.matrix
        return {"right": (m, self.rank), "left": (self.rank, n), "both": (self.rank, self.rank)}[self.side]

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
        """(d, r) of each basis, in the order of `sides`."""
        return tuple((self.matrix[0 if side == "left" else 1], self.rank) for side in self.sides)

    @property
    def state_dtype(self) -> torch.dtype:
        """Moments and bases are float32 whatever the parameter is: a bfloat16 EMA with β₂ = 0.999 never decays."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def matrices(self, tensor: Tensor) -> list[Tensor]:
        """The tensor as what is stepped: the same memory where strides allow it, otherwise copies."""
        if self.side is None or tensor.shape == self.matrix:
            return [tensor]
        return list(tensor.reshape(1 if self.stack is None else self.stack, *self.matrix).unbind())


@lru_cache(maxsize=4096)
def make_plan(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    rank: int | float | None,
    proj_type: str = "std",
    batch_dims: int = 0,
    state_bits: int = 32,
    basis_bits: int = 32,
    rounding: str = "stochastic",
    layout: Layout | None = None,
) -> Plan:
    """Decide how a tensor of this shape is stepped.

    Args:
        shape: of the parameter.
        dtype: of the parameter.
        device: of the parameter.
        rank: columns of the basis; a float in (0, 1) is a fraction of min(m, n); None is dense.
        proj_type: which dimension is compressed: std the smaller, reverse_std the larger, left m, right n, full both;
            local the one that is not sharded, so that R needs no collective, or as std where that does not tell.
        batch_dims: leading dimensions that index separate matrices (stacked experts) instead of belonging to one.
            Each is stepped for itself, as if it were a parameter.
        state_bits: of the moments: 32, 8 or 4.
        basis_bits: of the bases.
        rounding: of 16-bit parameters, one of ROUNDINGS.
        layout: of a DTensor. Only "local" chooses by it: otherwise the numbers do not depend on the sharding.

    Raises:
        ValueError: the shards are not blocks of the matrices, or cut blocks of quantised state.
    """
    kept = (state_bits, basis_bits, rounding == "kahan" and dtype.itemsize == 2)

    def made(side: Side | None, columns: int, reason: str = "") -> Plan:
        batch = None if side is None else batch_dims
        sharding = WHOLE if layout is None else layout.sharding(shape, batch)
        if side is None and state_bits != 32 and len(shape) > 1 and sharding.cuts(len(shape) - 1):
            raise ValueError(
                f"is cut along its last dimension, and blocks of state_bits={state_bits} run along it; shard it along "
                "another dimension, or give it a group with state_bits=32"
            )
        matrix, stack = fold(shape if layout is None else layout.shape, batch)
        return Plan(shape, matrix, stack, side, columns, dtype, device, reason, *kept, sharding)

    dense = partial(made, None, 0)
    if rank is None:
        return dense("rank=None in its group")
    if len(shape) - batch_dims < 2:
        return dense(f"{len(shape)}-D" if batch_dims == 0 else f"{len(shape)}-D with batch_dims={batch_dims}")
    if math.prod(shape) == 0:
        return dense("it is empty")
    (m, n), _ = fold(shape, batch_dims)
    columns = max(1, round(rank * min(m, n))) if isinstance(rank, float) else rank
    if columns >= min(m, n):
        return dense(f"rank {columns} ≥ min({m}, {n})")
    if proj_type == "full":
        return made("both", columns)
    if proj_type in ("left", "right"):
        return made("left" if proj_type == "left" else "right", columns)
    if proj_type == "local" and layout is not None:
        cuts = [bool(layout.sharding(shape, batch_dims).cuts(axis)) for axis in (0, 1)]
        if cuts[0] != cuts[1]:
            return made("right" if cuts[0] else "left", columns)
    return made("right" if (m >= n) == (proj_type != "reverse_std") else "left", columns)


def stack_states(states: list[State]) -> State:
    """The states of the matrices of one tensor as one state, with a leading dimension; ints become int64 tensors."""
    first = states[0]
    columns = {key: [state[key] for state in states] for key in first}
    ints = partial(torch.tensor, device="cpu")
    return {key: torch.stack(c) if isinstance(first[key], Tensor) else ints(c) for key, c in columns.items()}


def state_axes(plan: Plan, init: Callable[[Plan], State]) -> dict[str, tuple[Axes, tuple[int, ...]]]:
    """Which axis of the matrix every dimension of every state tensor carries, and the tensor's whole shape.

    A dimension carries the axis that it grows with.

    Args:
        plan: of the tensor.
        init: the state of one of its matrices, from shapes alone.
    """
    stack, whole = plan.whole.stack, replace(plan.whole, device=torch.device("meta"))

    def shapes(matrix: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        state = init(replace(whole, matrix=matrix))
        keep = (key for key in state if stack is not None or isinstance(state[key], Tensor))
        return {key: tuple(state[key].shape) if isinstance(state[key], Tensor) else () for key in keep}

    own = shapes(whole.matrix)
    axes: dict[str, list[int | None]] = {key: [None] * len(shape) for key, shape in own.items()}
    for axis, size in enumerate(whole.matrix):
        for key, shape in shapes((*whole.matrix[:axis], size + _MANY, *whole.matrix[axis + 1 :])).items():
            for dim, (before, after) in enumerate(zip(own[key], shape, strict=True)):
                if before != after:
                    axes[key][dim] = axis
    lead: tuple[Axes, tuple[int, ...]] = ((), ()) if stack is None else ((STACK,), (stack,))
    return {key: (lead[0] + tuple(axes[key]), lead[1] + own[key]) for key in own}


def unstack_state(state: State, count: int) -> list[State]:
    """The inverse of `stack_states`: tensors are views, ints are copies."""
    columns = {key: v.tolist() if v.dtype == torch.int64 else v.unbind() for key, v in state.items()}
    return [{key: column[j] for key, column in columns.items()} for j in range(count)]


def change_of_basis(plan: Plan, old: Bases, new: Bases) -> Change:
    """The change of basis c = Q_oldᵀ Q_new, per basis."""
    axes = (0 if side == "left" else 1 for side in plan.sides)
    return tuple(plan.sharding.sum([a.mT @ b], axis)[0] for a, b, axis in zip(old, new, axes, strict=True))


def choose_(finite: Tensor | None, new: list[Tensor], old: list[Tensor]) -> None:
    """Copy new tensors, all of a shape, into those old ones that are not to stay as they are: in few launches."""
    if finite is not None:
        new = list(torch.where(spread(finite, new[0].ndim), stacked(new), stacked(old)).unbind())
    torch._foreach_copy_(old, new)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """A batch of tensors of a shape; one alone is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def spread(numbers: Tensor, ndim: int) -> Tensor:
    """One number a tensor, as it meets a batch of tensors of so many dimensions."""
    return numbers.view(-1, *[1] * ndim)


def scalar(value: float) -> Tensor:
    """A number as kernels take it: on the host, whatever the default device is."""
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def peak(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest |x|, of no elements zero; NaN if there is one. On a CPU the infinity norm takes 20 times as long."""
    return torch.maximum(x.amax(), -x.amin()).to(dtype) if x.numel() else x.new_zeros((), dtype=dtype)


@dataclass(frozen=True, slots=True)
class Hyper:
    """The hyperparameters of one group at one step; the defaults are of W ← W - N.

    Attributes:
        lr: 0-d, or one a tensor.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: λ, decoupled.
        scale: α.
        transform: of N, one of TRANSFORMS.
        moments: what a change of basis does to them, one of MOMENTS.
    """

    lr: Tensor = field(default_factory=partial(scalar, 1))
    betas: tuple[float, float] = (0.0, 0.0)
    eps: float = 0.0
    weight_decay: float = 0.0
    scale: float = 1.0
    transform: str = "none"
    moments: str = "keep"

    def part(self, at: slice) -> Hyper:
        """That of some tensors."""
        return replace(self, lr=self.lr[at]) if self.lr.ndim else self


class Moments(NamedTuple):
    """What Adam keeps of tensors, in parallel lists: its averages of R and of R²."""

    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]

    def part(self, at: slice) -> Moments:
        """Those of some."""
        return Moments(self.exp_avgs[at], self.exp_avg_sqs[at])


class Weights(NamedTuple):
    """Parameters as kernels write them, each once a step, in parallel lists.

    Attributes:
        params: W, written in place.
        steps: 0-d, their step counts: with `seeds`, the counters of the rounding.
        seeds: one a tensor rounds bfloat16 stochastically; none rounds to nearest; a tensor for each is what rounding
            has taken from it so far (Kahan).
        window: which elements of whole tensors these are, which are rounded as the whole.
        finite: on the device, a bool for every one, if given: one that it says no of stays as it is, with its moments
            and its step count. So a kernel can skip what the host need not wait to know of.
    """

    params: list[Tensor]
    steps: list[Tensor]
    seeds: Seeds = ()
    window: Window = ALL
    finite: Tensor | None = None

    def seed(self, i: int) -> int | Tensor | None:
        """Of one of them."""
        return self.seeds[i] if self.seeds else None

    def part(self, at: slice) -> Weights:
        """Some of them."""
        finite = None if self.finite is None else self.finite[at]
        return Weights(self.params[at], self.steps[at], self.seeds[at], self.window, finite)


@dataclass(slots=True)
class Bucket:
    """Matrices (dense: tensors) that share plan and hyperparameters, as parallel lists: one kernel call steps them all.

    Attributes:
        plan: the plan they share.
        rounding: whether bfloat16 is rounded stochastically.
        params: of shape `plan.matrix`.
        grads: of shape `plan.matrix`, or R of shape `plan.low_shape` where they were projected ahead; never written.
        states: one dict each.
        orders: their places among all that the optimizer steps, by which refreshes are staggered.
        streams: their random seeds.
        bases: in force for this step; empty when dense.
        previous: the bases that the moments are still expressed in, for a rule that `looks_behind`.
        projected: whether `grads` were projected ahead of the step.
        finite: on the device, a bool for every member: one that it says no of stays as it is. None: all take part.
    """

    plan: Plan
    rounding: bool
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    orders: list[int] = field(default_factory=list)
    streams: list[int] = field(default_factory=list)
    bases: list[Bases] = field(default_factory=list)
    previous: list[Bases] = field(default_factory=list)
    projected: bool = False
    finite: Tensor | None = None

    def slot(self, key: str) -> list[Tensor]:
        """One state tensor of every member."""
        return [state[key] for state in self.states]

    @property
    def seeds(self) -> Seeds:
        """What kernels round by: see Weights."""
        if self.plan.compensated and self.params[0].dtype == self.plan.dtype:
            return self.slot("compensation")
        return self.streams if self.rounding else []

    @property
    def weights(self) -> Weights:
        """The parameters as kernels write them."""
        return Weights(self.params, self.slot("step"), self.seeds, finite=self.finite)

    @property
    def adam(self) -> Moments:
        """The moments of Adam."""
        return Moments(self.slot("exp_avg"), self.slot("exp_avg_sq"))

    def part(self, members: list[int]) -> Bucket:
        """The bucket of some members, before their bases are known."""

        def pick(values: list[T]) -> list[T]:
            return [values[i] for i in members]

        lists = (pick(self.params), pick(self.grads), pick(self.states), pick(self.orders), pick(self.streams))
        finite = None if self.finite is None else torch.stack([self.finite[i] for i in members])
        return Bucket(self.plan, self.rounding, *lists, projected=self.projected, finite=finite)

    def __len__(self) -> int:
        return len(self.params)
