"""Projectors: which subspace a gradient is seen in. Each is a frozen dataclass of hyperparameters and owns no tensor.

A projector says what it stores (`init`), renews the bases of a bucket's members (`refresh_`), hands them out
(`bases`) and may learn from every gradient (`advance_`). Both `refresh_` and `advance_` return changes of basis
c = Q_oldᵀ Q_new, by which the rule carries its moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import RLock
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from . import philox
from .distributed import WHOLE, Sharding
from .hyperparameters import are_betas, demand, is_number, is_whole
from .kernels import reference, select
from .types import Bases, Bucket, Change, Hyper, Moments, Plan, Side, State, Weights, change_of_basis, peak

_SHIFT = 1e-6  # relative to ‖GᵀGQ‖: above float32's rounding, below what a subspace iteration resolves
_PERIOD = 32  # rows of a cosine transform that share a phase: ten times fewer cosines than entries
_DRAWN = 2**23  # entries of random bases drawn at once on a GPU, with ten times as many bytes to work in
_switching = RLock()
_inside: set[object] = set()  # `exact_products`, by who has not left it
_found: list[str] = []  # there, by the first one
UNSET = -1  # state["age"] before the first refresh; afterwards the steps taken since the last one


@dataclass(frozen=True)
class Projector:
    """Base of all projectors.

    Args:
        rank: columns of the basis; a float in (0, 1) is a fraction of min(m, n); None leaves every tensor dense.
        update_proj_gap: steps between refreshes.
        proj_type: which dimension is compressed: std the smaller, reverse_std the larger, left m, right n, full both;
            local the one that is whole on every rank, so that an ordinary step sends no R (unsharded: as std).
    """

    rank: int | float | None = 128
    update_proj_gap: int = 200
    proj_type: str = "std"

    needs_gradient: ClassVar[bool] = True  # a refresh waits for a gradient that is not zero
    periodic: ClassVar[bool] = True  # refreshed every update_proj_gap steps, and so staggered
    learns: ClassVar[bool] = False  # from every gradient, in `advance_`
    whole_gradient: ClassVar[str] = ""  # why every step needs more of a gradient than R, if it does

    @property
    def orthonormal(self) -> bool:
        """Whether QᵀQ = I, so that project(back(R)) = R."""
        return True

    @property
    def keeps(self) -> str:
        """What its state says: a checkpoint of a projector that reads the same keys otherwise is refused."""
        return type(self).__name__

    def init(self, plan: Plan, seed: int) -> State:
        """State of one tensor, from shapes alone: zero bases, which project everything to zero."""
        bases = {
            key: torch.zeros(shape, dtype=plan.state_dtype, device=plan.device)
            for key, shape in zip(plan.basis_keys, plan.basis_shapes, strict=True)
        }
        return {"age": UNSET, **bases}

    def ordinary_steps(self, state: State, gap: int) -> float:
        """How many steps leave the basis to the kernels, before one that makes it anew; math.inf if none ever does."""
        return 0 if state["age"] == UNSET else max(0, gap - state["age"])

    def due(self, state: State, gap: int) -> bool:
        """Whether this step begins with a refresh."""
        return self.ordinary_steps(state, gap) == 0

    def refresh_(
        self, plan: Plan, states: Sequence[State], grads: Sequence[Tensor], seeds: Sequence[int]
    ) -> list[Change]:
        """Renew the bases from the gradients; returns the changes of basis. On LinAlgError nothing has changed."""
        raise NotImplementedError

    def bases(self, plan: Plan, states: Sequence[State]) -> list[Bases]:
        """The bases in force."""
        return [tuple(state[key] for key in plan.basis_keys) for state in states]

    def advance_(
        self, bucket: Bucket, lows: list[Tensor], lr_ratio: Tensor, kernel: Any
    ) -> tuple[Bucket, list[Change] | None]:
        """Learn from the gradients after the parameters have been written.

        Args:
            bucket: as the rule has stepped it; where its `finite` is given, the host does not wait for the device.
            lows: R of every member, which is used up; empty where there is none.
            lr_ratio: the learning rate over its peak, 0-d, where the learning rate is.
            kernel: a module with the functions of kernels/reference.py.

        Returns:
            The members whose bases have moved, and their changes of basis where the moments have to follow.
        """
        raise NotImplementedError

    def workspace(self, plan: Plan) -> int:
        """Bytes for each matrix that a whole step holds beside the state."""
        return 0


@dataclass(frozen=True)
class SVD(Projector):
    """The top singular subspace of the current gradient (GaLore).

    The default refresh takes a few subspace iterations Q ← orth(Gᵀ G Q) from the old basis, then rotates Q onto the
    singular vectors of G Q (Rayleigh–Ritz): Adam is not rotation-invariant, so the basis matters and not only its
    span. Always in float32 or wider.

    Args:
        rank: see Projector.
        update_proj_gap: see Projector.
        proj_type: see Projector.
        method: "subspace" iteration or "exact" SVD.
        iterations: of the subspace iteration; a cold start takes one more.

    Source: arXiv 2403.03507.
    """

    method: Literal["subspace", "exact"] = "subspace"
    iterations: int = 2

    def __post_init__(self) -> None:
        where = type(self).__name__
        demand(self.method in ("subspace", "exact"), where, "method", self.method, "one of subspace, exact")
        demand(is_whole(self.iterations) and self.iterations >= 1, where, "iterations", self.iterations, "an int ≥ 1")

    def refresh_(
        self, plan: Plan, states: Sequence[State], grads: Sequence[Tensor], seeds: Sequence[int]
    ) -> list[Change]:
        """Renew the bases; the signs of the new columns agree with the old ones."""
        if self.method == "exact":
            renewed = [self._exact(plan, g) for g in grads]
        else:
            columns = [
                self._iterate(plan, side, [_oriented(g, side) for g in grads], [s[key] for s in states], seeds, states)
                for side, key in zip(plan.sides, plan.basis_keys, strict=True)
            ]
            renewed = [tuple(bases) for bases in zip(*columns, strict=True)]
        return [_replace_(plan, state, bases) for state, bases in zip(states, renewed, strict=True)]

    @staticmethod
    def _exact(plan: Plan, grad: Tensor) -> Bases:
        """Of a sharded gradient every rank gathers the whole, one matrix at a time."""
        full = plan.sharding.gather(grad, (0, 1)).to(plan.state_dtype)
        like = full.new_empty(plan.rank, sum(full.shape))

        def factors() -> Tensor:
            u, _, vh = torch.linalg.svd(full, full_matrices=False)
            return torch.cat((u[:, : plan.rank].mT, vh[: plan.rank]), dim=1)

        found = torch.split_with_sizes(plan.sharding.once(like, factors).mT, list(full.shape))
        columns = dict(zip(("left", "right"), found, strict=True))
        return tuple(
            plan.sharding.own(columns[side].clone(memory_format=torch.contiguous_format), (_axis(side), None))
            for side in plan.sides
        )

    def _iterate(
        self,
        plan: Plan,
        side: Side,
        grads: list[Tensor],
        olds: list[Tensor],
        seeds: Sequence[int],
        states: Sequence[State],
    ) -> list[Tensor]:
        """Top right singular vectors (d, r) of every (k, d) gradient; every rank works on whole bases."""
        sharding, along, across = plan.sharding, _axis(side), 1 - _axis(side)  # d lies along the first, k the second
        axes = (None, along, None)
        cold = [i for i, state in enumerate(states) if state["age"] == UNSET]
        start = sharding.gather(torch.stack(olds), axes)
        _, d, r = start.shape
        if cold:
            start[cold] = torch.stack(random_bases([seeds[i] for i in cold], (d, r), plan.whole))
        # Gᵀ G squares the scale of G, which may itself be far from 1.
        least = torch.finfo(start.dtype).tiny  # the inverse of a smaller one would be infinite
        peaks = torch.stack([peak(g, start.dtype) for g in grads])
        inverse = 1 / sharding.max([peaks])[0].clamp_(min=least)

        def times(q: Tensor, members: Iterable[int]) -> list[Tensor]:
            here = sharding.own(q, axes)
            low = [(grads[i].to(x.dtype) @ x) * inverse[i] for i, x in zip(members, here, strict=True)]
            return sharding.sum(low, along)

        def improve(q: Tensor, members: Sequence[int]) -> Tensor:
            rows = zip(members, times(q, members), strict=True)
            (pulled,) = sharding.sum(
                [torch.stack([(grads[i].to(y.dtype).mT @ y) * inverse[i] for i, y in rows])], across
            )
            pulled = sharding.gather(pulled, axes)
            # The shift leaves the eigenvectors as they are, and directions that G does not see as they were; without
            # it rounding noise would choose them, and the momentum along them would be lost.
            shift = _SHIFT * torch.linalg.matrix_norm(pulled, keepdim=True)
            return _qr(sharding, pulled + shift * q)

        q, everyone = start.clone(), range(len(grads))
        if cold:
            q[cold] = improve(q[cold], cold)
        for _ in range(self.iterations):
            q = improve(q, everyone)
        low = torch.stack(times(q, everyone))
        (gram,) = sharding.sum([low.mT @ low], across)
        rotation = sharding.once(gram, lambda: torch.linalg.eigh(gram)[1])  # eigenvalues ascend
        q = q @ rotation.flip(-1)
        agreement = (start * q).sum(-2, keepdim=True)
        return list(sharding.own(torch.where(agreement < 0, -q, q), axes).unbind())


@dataclass(frozen=True)
class RandomProjection(Projector):
    """A random subspace, drawn anew every `update_proj_gap` steps (Flora). Only the seed is stored.

    Args:
        rank: see Projector.
        update_proj_gap: see Projector.
        proj_type: see Projector.
        kind: orthonormal columns (random ones of a discrete cosine transform, under random signs of the rows: E[Q Qᵀ] =
            I·r/d, arXiv 1011.1595); or gaussian or rademacher entries of variance 1/r, for which E[Q Qᵀ] = I.

    Source: arXiv 2402.03293.
    """

    update_proj_gap: int = 1000
    kind: Literal["orthonormal", "gaussian", "rademacher"] = "orthonormal"

    needs_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        kinds = ("orthonormal", "gaussian", "rademacher")
        demand(self.kind in kinds, type(self).__name__, "kind", self.kind, f"one of {', '.join(kinds)}")

    @property
    def orthonormal(self) -> bool:
        """Not of Gaussian or Rademacher entries."""
        return self.kind == "orthonormal"

    @property
    def keeps(self) -> str:
        """Seeds, of bases of its kind."""
        return f"RandomProjection(kind={self.kind!r})"

    def init(self, plan: Plan, seed: int) -> State:
        """The seed, in force from the start: step k redraws when k is a multiple of the gap."""
        return {"age": 1, "seed": seed}

    def refresh_(
        self, plan: Plan, states: Sequence[State], grads: Sequence[Tensor], seeds: Sequence[int]
    ) -> list[Change]:
        """Move every seed on."""
        olds = self.bases(plan, states)
        for state in states:
            state["seed"] = self.next_seed(state["seed"])
        return [change_of_basis(plan, old, new) for old, new in zip(olds, self.bases(plan, states), strict=True)]

    def workspace(self, plan: Plan) -> int:
        """The bases are not state."""
        return plan.state_dtype.itemsize * sum(math.prod(shape) for shape in plan.basis_shapes)

    def next_seed(self, seed: int) -> int:
        """The seed of the next basis."""
        return philox.mix(seed, 1)

    def bases(self, plan: Plan, states: Sequence[State]) -> list[Bases]:
        """Regenerate the bases from their seeds: every rank draws the whole and keeps its own part."""
        drawn = self.generate(plan.whole, [state["seed"] for state in states])
        return [
            tuple(plan.sharding.own(q, (_axis(side), None)) for q, side in zip(bases, plan.sides, strict=True))
            for bases in drawn
        ]

    def generate(self, plan: Plan, seeds: Sequence[int]) -> list[Bases]:
        """The bases of every seed, the same on every device."""
        columns = [
            self._draw([philox.mix(seed, 2 + i) for seed in seeds], shape, plan)
            for i, shape in enumerate(plan.basis_shapes)
        ]
        return list(zip(*columns, strict=True))

    def _draw(self, seeds: Sequence[int], shape: tuple[int, ...], plan: Plan) -> list[Tensor]:
        if self.kind == "orthonormal":
            return random_bases(seeds, shape, plan)
        draw = philox.signs if self.kind == "rademacher" else philox.normal
        return _drawn(lambda words: draw(words, shape).mul_(shape[-1] ** -0.5), math.prod(shape), seeds, shape, plan)


@contextmanager
def exact_products() -> Iterator[None]:
    """Matrix products of float32 in float32, whatever the process allows: TF32 or bfloat16 would ruin a basis.

    Threads may be inside at a time: the last one to leave restores what the first one found, and a Ctrl-C at any line
    does not keep it from that.
    """
    places = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    me = object()

    def leave() -> None:
        with _switching:
            _inside.discard(me)
            if not _inside:
                for place, precision in zip(places, _found):  # noqa: B905 - none were found by one that never entered
                    place.fp32_precision = precision
                _found.clear()

    try:
        try:
            with _switching:
                if not _inside:
                    _found[:] = [place.fp32_precision for place in places]
                _inside.add(me)
                for place in places:
                    place.fp32_precision = "ieee"
            yield
        finally:
            leave()
    finally:
        leave()  # for one that a Ctrl-C cut short


def random_bases(seeds: Sequence[int], shape: tuple[int, ...], plan: Plan) -> list[Tensor]:
    """Orthonormal (d, r): random columns of the discrete cosine transform, its rows under random signs, in float64.

    Ten times cheaper than to orthonormalise Gaussian columns, and as good a sketch (arXiv 0909.4061, 4.6).
    """
    d, r = shape

    def basis(words: Tensor) -> Tensor:
        words = words.flatten(1)
        columns = words[:, d : 2 * d].argsort(stable=True)[:, :r].double()
        return _cosines(columns, d).mul_(philox.signs(words, (d, 1)))

    return _drawn(basis, 2 * d, seeds, shape, plan)


def _drawn(
    make: Callable[[Tensor], Tensor], count: int, seeds: Sequence[int], shape: tuple[int, ...], plan: Plan
) -> list[Tensor]:
    """What `make` makes of `count` words of every seed: on a CPU a basis in the cache, on a GPU in few launches."""
    kernel = select.resolve("auto", plan)
    at_once = 1 if plan.device.type == "cpu" else max(1, _DRAWN // math.prod(shape))
    parts = (seeds[begin : begin + at_once] for begin in range(0, len(seeds), at_once))
    return [q for part in parts for q in make(kernel.words(part, count, plan.device)).to(plan.state_dtype).unbind()]


def _cosines(k: Tensor, d: int) -> Tensor:
    """Columns k (b, r) of the transform, cos((2i + 1)kπ/2d) of length 1: (b, d, r)."""
    odd = torch.arange(1, 2 * _PERIOD, 2, dtype=torch.float64, device=k.device)
    starts = torch.arange(0, 2 * d, 2 * _PERIOD, dtype=torch.float64, device=k.device)  # 2i + 1 = start + odd
    k = k.unsqueeze(1)
    (c, s), (c0, s0) = (
        (a.cos(), a.sin())
        for a in ((x.unsqueeze(1) * k).remainder_(4 * d) * (math.pi / (2 * d)) for x in (odd, starts))
    )
    rows = torch.mul(c0.unsqueeze(2), c.unsqueeze(1)).addcmul_(s0.unsqueeze(2), s.unsqueeze(1), value=-1).flatten(1, 2)
    return rows[:, :d].mul_((2 - (k == 0).double()).div_(d).sqrt_())


@dataclass(frozen=True)
class OnlinePCA(SVD):
    """A basis that descends the reconstruction error of every gradient (Online Subspace Descent).

    Starts at the singular subspace of the first gradient. After each step, with Ĝ = G/‖G‖ (m, n) and R̂ = ĜQ (m, r),
    Q takes an Adam step on ‖ĜQQᵀ - Ĝ‖²: its gradient 2[Q(R̂ᵀR̂) + ĜᵀR̂(QᵀQ - 2I)] needs no (m, n) temporary.

    Args:
        rank: see Projector.
        proj_type: see Projector.
        method: of the start, see SVD.
        iterations: of the start, see SVD.
        basis_lr: step size of the basis, times lr_t/lr_initial (at most 1). 0.005 is the paper's 5·lr at lr 0.001.
        basis_betas: of Adam on the basis.
        basis_weight_decay: decoupled, of the basis.
        orth_lambda: weight of the penalty ‖QᵀQ - I‖².
        retract_every: steps between re-orthonormalisations, which leave back(M) as it is; None for never. The host
            counts them by `age`, so that no device is waited for: those whose gradient taught nothing count as well.

    Source: arXiv 2408.12857.
    """

    basis_lr: float = 0.005
    basis_betas: tuple[float, float] = (0.9, 0.999)
    basis_weight_decay: float = 0.0
    orth_lambda: float = 0.0
    retract_every: int | None = None

    periodic: ClassVar[bool] = False
    learns: ClassVar[bool] = True
    whole_gradient: ClassVar[str] = "the basis of Online Subspace Descent learns from GᵀGQ at every step"

    def __post_init__(self) -> None:
        super().__post_init__()
        where, every = type(self).__name__, self.retract_every
        for key in ("basis_lr", "basis_weight_decay", "orth_lambda"):
            value = getattr(self, key)
            demand(is_number(value) and value >= 0, where, key, value, "a finite number ≥ 0")
        demand(are_betas(self.basis_betas), where, "basis_betas", self.basis_betas, "two numbers in [0, 1)")
        demand(every is None or (is_whole(every) and every >= 1), where, "retract_every", every, "an int ≥ 1 or None")

    @property
    def orthonormal(self) -> bool:
        """Only nearly."""
        return False

    def init(self, plan: Plan, seed: int) -> State:
        """The bases and Adam's moments on them."""
        state = super().init(plan, seed)
        moments = {f"{key}_{name}": torch.zeros_like(state[key]) for key in plan.basis_keys for name in _BASIS_MOMENTS}
        return state | {"basis_step": torch.zeros((), dtype=plan.state_dtype, device=plan.device)} | moments

    def ordinary_steps(self, state: State, gap: int) -> float:
        """Those before a retraction."""
        if state["age"] == UNSET:
            return 0
        return math.inf if self.retract_every is None else -state["age"] % self.retract_every

    def due(self, state: State, gap: int) -> bool:
        """Only once."""
        return bool(state["age"] == UNSET)

    def workspace(self, plan: Plan) -> int:
        """R is kept from the step to `advance_`, which makes four tensors of the size of a basis at a time."""
        longest = max(d for d, _ in plan.basis_shapes)
        return plan.state_dtype.itemsize * plan.rank * (sum(plan.matrix) + 3 * longest)

    def advance_(
        self, bucket: Bucket, lows: list[Tensor], lr_ratio: Tensor, kernel: Any
    ) -> tuple[Bucket, list[Change] | None]:
        """One Adam step on every basis, from the second gradient on; a zero gradient says nothing of the subspace."""
        plan = bucket.plan
        norms = list(torch._foreach_norm(bucket.grads, 2, dtype=plan.state_dtype))
        if plan.sharding.cuts():
            norms = [square.sqrt_() for square in plan.sharding.sum([norm.square_() for norm in norms])]
        says = torch.stack(norms) > 0
        if bucket.finite is None:  # the host has looked already
            pairs = zip(bucket.states, says.tolist(), strict=True)
            members = [i for i, (state, moves) in enumerate(pairs) if moves and state["age"] > 0]
            moved, norms, lows = bucket.part(members), [norms[i] for i in members], [lows[i] for i in members if lows]
        else:
            moved = replace(bucket, finite=says.logical_and_(bucket.finite))
        if len(moved):
            self._descend_(moved, norms, lows, self.basis_lr * lr_ratio, kernel)
        return moved, self._retract_(moved)

    def _descend_(self, bucket: Bucket, norms: list[Tensor], lows: list[Tensor], rate: Tensor, kernel: Any) -> None:
        plan, steps = bucket.plan, bucket.slot("basis_step")
        hyper = Hyper(rate, self.basis_betas, 1e-8, self.basis_weight_decay)
        for side, key in zip(plan.sides, plan.basis_keys, strict=True):
            bases, moments = bucket.slot(key), Moments(*(bucket.slot(f"{key}_{name}") for name in _BASIS_MOMENTS))
            own = lows if lows and plan.side != "both" else kernel.project(bucket.grads, bases, side, plan.state_dtype)
            slopes = self.slopes(bases, bucket.grads, own, norms, side, plan.sharding, kernel)
            counts = steps if key == plan.basis_keys[-1] else list(torch._foreach_add(steps, 0))  # which both share
            updates = kernel.adam_update_(slopes, moments, counts, hyper, finite=bucket.finite)
            kernel.apply_(Weights(bases, counts, finite=bucket.finite), updates, [], hyper, None)

    def _retract_(self, bucket: Bucket) -> list[Change] | None:
        """Orthonormal bases in the place of those that are due, which is no ordinary step."""
        due = [self.ordinary_steps(state, 0) == 0 for state in bucket.states]
        if not any(due):
            return None
        plan = bucket.plan
        return [
            _replace_(plan, state, _orthonormal(plan, state)) if retracts else _identity(plan)
            for state, retracts in zip(bucket.states, due, strict=True)
        ]

    def slopes(
        self,
        bases: list[Tensor],
        grads: list[Tensor],
        lows: list[Tensor],
        norms: list[Tensor],
        side: Side = "right",
        sharding: Sharding = WHOLE,
        kernel: Any = reference,
    ) -> list[Tensor]:
        """∇_Q of ‖ĜQQᵀ - Ĝ‖² + orth_lambda·‖QᵀQ - I‖² at Ĝ = grad/norm (left: its transpose), shape of its Q each.

        `lows` are the projections of the gradients, and may be overwritten; `kernel` multiplies with the gradients, and
        sums over their shards.
        """
        other: Side = "right" if side == "left" else "left"  # ĜᵀR̂ is a projection, too: by R̂ from the other side
        q, norm = _joined(bases), _joined(norms).unsqueeze(-1).unsqueeze(-1)
        units = _joined([_oriented(low, side) for low in lows]).div_(norm)
        pulled = kernel.project(grads, _apart(units), other, q.dtype)
        pulled = _joined([_oriented(low, other) for low in pulled]).div_(norm)
        excess, of_q = sharding.sum([q.mT @ q, q.mT @ pulled], _axis(side))  # QᵀQ and R̂ᵀR̂ = QᵀĜᵀR̂
        diagonal = excess.diagonal(dim1=-2, dim2=-1)
        diagonal.sub_(1)
        of_q.add_(excess, alpha=2 * self.orth_lambda)
        diagonal.sub_(1)
        return _apart((q @ of_q).add_(pulled @ excess).mul_(2))


_BASIS_MOMENTS = ("exp_avg", "exp_avg_sq")


def _oriented(grad: Tensor, side: Side) -> Tensor:
    """The view whose last dimension is the projected one."""
    return grad.mT if side == "left" else grad


def _joined(tensors: list[Tensor]) -> Tensor:
    """A batch in one tensor; a single one as it is, which costs no copy."""
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0]


def _apart(matrices: Tensor) -> list[Tensor]:
    """The inverse."""
    return list(matrices.unbind()) if matrices.ndim > 2 else [matrices]


def _axis(side: Side) -> int:
    """The axis of the matrix that a basis lies along."""
    return 0 if side == "left" else 1


def _replace_(plan: Plan, state: State, bases: Bases) -> Change:
    moved = change_of_basis(plan, tuple(state[key] for key in plan.basis_keys), bases)
    for key, basis in zip(plan.basis_keys, bases, strict=True):
        state[key].copy_(basis)
    return moved


def _identity(plan: Plan) -> Change:
    eye = torch.eye(plan.rank, dtype=plan.state_dtype, device=plan.device)
    return (eye,) * len(plan.basis_keys)


def _qr(sharding: Sharding, x: Tensor) -> Tensor:
    """Orthonormal columns of the same span. On a CPU Householder's QR takes half the time of Cholesky's."""

    def columns() -> Tensor:
        q = cholesky_qr(x) if x.is_cuda else None
        return torch.linalg.qr(x)[0] if q is None else q

    return sharding.once(x, columns)


def cholesky_qr(x: Tensor) -> Tensor | None:
    """Orthonormal columns by CholeskyQR, twice: products and triangular solves alone, which a GPU is fast at.

    XᵀX = LLᵀ, Q = X L⁻ᵀ. The first time in float64, because the condition number is squared.

    Args:
        x: a batch of (d, r).

    Returns:
        The batch of Q; None where columns are dependent to rounding, and Householder's QR has to do.
    """

    def divided(q: Tensor, gram: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(torch.linalg.cholesky_ex(gram)[0].mT, q, upper=True, left=False)

    wide = x.double()
    q = divided(wide, wide.mT @ wide).to(x.dtype)
    gram = q.mT @ q
    error = (gram - torch.eye(gram.shape[-1], dtype=x.dtype, device=x.device)).abs().amax()
    return divided(q, gram) if error < 0.1 else None  # nor is NaN, where a factorisation failed


def _orthonormal(plan: Plan, state: State) -> Bases:
    """The nearest-sign QR factors: QR with a positive diagonal, so that a basis close to orthonormal hardly moves."""
    bases = []
    for side, key in zip(plan.sides, plan.basis_keys, strict=True):
        old = plan.sharding.gather(state[key], (_axis(side), None))
        new = _qr(plan.sharding, old)
        flipped = (old.mT @ new).diagonal() < 0  # the diagonal of Rᵀ
        bases.append(plan.sharding.own(torch.where(flipped, -new, new), (_axis(side), None)))
    return tuple(bases)
