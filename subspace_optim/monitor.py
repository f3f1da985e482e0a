"""Looking at a run: what each subspace captures and how far each step moves, matrix by matrix, while it trains."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .projectors import UNSET, Projector
from .rules import Kernel, Rule
from .types import Bases, Bucket, Plan, Side

_SAMPLE = 2**18  # elements of a matrix whose movement is measured: what must be kept over the step, 1 MiB in float32
_EMA = 0.9  # share of the past in the moving average of captured energy
_SHIFT = 1e-6  # relative, on QᵀQ: it changes the energy by that much, and a basis that lost a direction has a root


@dataclass(frozen=True, slots=True)
class LayerReport:
    """Figures of one matrix, as `SubspaceOptimizer.report` gives them; None is what has not been seen yet.

    Args:
        name: of the parameter, with the index of the matrix where it holds several.
        shape: (m, n) of what is stepped.
        side: of the projection; None is dense.
        rank: of the projection; 0 is dense.
        step: steps of the matrix when it was last looked at; 0 is never.
        captured: ‖GQ‖²/‖G‖² in [0, 1], with Q made orthonormal: the share of the gradient's energy inside the subspace.
            G is what the rule projects, for GradNormLoRP the tangential gradient.
        captured_ema: its moving average over the looks, decay 0.9.
        update_ratio: ‖ΔW‖/‖W‖ of one step, decay and rounding included, on evenly spaced rows of at most 2¹⁸ elements
            (of every shard).
        overlap: ‖Q_oldᵀQ_new‖²/r in [0, 1] of the last refresh: the share of the old subspace that the new one keeps.
        refreshes: since watching began, the first basis among them.
        refresh_seconds: spent in them.
        skipped: steps that a NaN, an infinity or a value beyond 1e15 in the gradient has cost.
    """

    name: str
    shape: tuple[int, ...]
    side: Side | None
    rank: int
    step: int = 0
    captured: float | None = None
    captured_ema: float | None = None
    update_ratio: float | None = None
    overlap: float | None = None
    refreshes: int = 0
    refresh_seconds: float = 0.0
    skipped: int = 0


class Observer:
    """What the engine tells of its work. This one does not listen, and is the default."""

    listens = False  # whether it has to be told of what no one else waits for
    looking = False  # whether the figures of the present step are measured

    def begin(self) -> None:
        """A step of the optimizer begins."""

    def skip(self, stream: int) -> None:
        """The matrix of this random stream takes no part in the step: its gradient is not finite."""

    def refresh(self, projector: Projector, bucket: Bucket) -> AbstractContextManager[None]:
        """Around the renewal of the bases of a bucket; an exception means that nothing was renewed."""
        return nullcontext()

    def step(self, rule: Rule, bucket: Bucket, kernel: Kernel) -> AbstractContextManager[None]:
        """Around the step of a bucket whose bases are set."""
        return nullcontext()


class Monitor(Observer):
    """Keeps a `LayerReport` of every matrix: refreshes always, the rest at every n-th step.

    Args:
        every: steps between two looks, ≥ 1; the first step is looked at.
        members: gives (random stream, name, plan) of every matrix.
    """

    listens = True

    def __init__(self, every: int, members: Callable[[], Iterable[tuple[int, str, Plan]]]) -> None:
        self.every = every
        self._members = members
        self._steps = 0
        self._layers: dict[int, LayerReport] = {}

    def report(self) -> list[LayerReport]:
        """Of every matrix, in the optimizer's order."""
        return [self._layer(stream) for stream in self._settle()]

    def begin(self) -> None:
        """Count steps, and look at every n-th."""
        self._settle()
        self.looking = self._steps % self.every == 0
        self._steps += 1

    def skip(self, stream: int) -> None:
        """Count it."""
        self._note(stream, skipped=self._layer(stream).skipped + 1)

    @contextmanager
    def refresh(self, projector: Projector, bucket: Bucket) -> Iterator[None]:
        """Time it, and compare the bases before and after."""
        plan = bucket.plan
        had_basis = [state["age"] != UNSET for state in bucket.states]
        before = [_orthonormal(plan, bases) for bases in projector.bases(plan, bucket.states)]
        begin = _now(plan)
        yield
        seconds = (_now(plan) - begin) / len(bucket)
        after = [_orthonormal(plan, bases) for bases in projector.bases(plan, bucket.states)]
        overlaps = torch.stack([_overlap(old, new) for old, new in zip(before, after, strict=True)]).tolist()
        for i, stream in enumerate(bucket.streams):
            layer = self._layer(stream)
            self._note(
                stream,
                overlap=overlaps[i] if had_basis[i] else layer.overlap,
                refreshes=layer.refreshes + 1,
                refresh_seconds=layer.refresh_seconds + seconds,
            )

    @contextmanager
    def step(self, rule: Rule, bucket: Bucket, kernel: Kernel) -> Iterator[None]:
        """Measure what the step projects before it and what it moved after it, with one wait for the device."""
        if not self.looking:
            yield
            return
        captured = self._captured(rule, bucket, kernel)
        before = [_sample(param).clone() for param in bucket.params]
        yield
        dtype = bucket.plan.state_dtype
        squares = torch.stack([_movement(p, w, dtype) for p, w in zip(bucket.params, before, strict=True)]).square_()
        moved = bucket.plan.sharding.sum([squares])[0].sqrt_()
        rows = torch.cat([captured, moved, torch.stack(bucket.slot("step")).to(dtype)[:, None]], 1)
        for stream, (inside, whole, change, weight, step) in zip(bucket.streams, rows.tolist(), strict=True):
            layer = self._layer(stream)
            share = _ratio(min(inside, whole), whole) if bucket.plan.side else None
            self._note(
                stream,
                step=int(step),
                captured=share,
                captured_ema=_average(layer.captured_ema, share),
                update_ratio=_ratio(change, weight),
            )

    @staticmethod
    def _captured(rule: Rule, bucket: Bucket, kernel: Kernel) -> Tensor:
        """(k, 2): energy inside the subspace and in all of every member; zeros when dense, or when only R was kept."""
        plan = bucket.plan
        if plan.side is None or bucket.projected:
            return torch.zeros(len(bucket), 2, dtype=plan.state_dtype, device=plan.device)
        rows = []
        for i, bases in enumerate(bucket.bases):
            (target,) = rule.targets(bucket.part([i]))  # one at a time: it may be as large as the gradient
            (low,) = kernel.project([target], list(bases), plan.side, plan.state_dtype)
            inside = torch.zeros_like(low) if bucket.states[i]["age"] == UNSET else _whitened(low, bases, plan)
            target = target.to(plan.state_dtype)
            norms = [plan.sharding.norm(x, a, (-2, -1)) for x, a in ((inside, plan.low_axes), (target, (0, 1)))]
            rows.append(torch.stack(norms).square_())
        return torch.stack(rows)

    def _settle(self) -> list[int]:
        """The streams of all matrices, which are those of other matrices once a group has been removed."""
        members = list(self._members())
        if any(s not in self._layers or self._layers[s].name != name for s, name, _ in members):
            known = {layer.name: layer for layer in self._layers.values()}
            self._layers = {
                s: known.get(name) or LayerReport(name, plan.whole.matrix, plan.side, plan.rank)
                for s, name, plan in members
            }
        return [stream for stream, _, _ in members]

    def _layer(self, stream: int) -> LayerReport:
        if stream not in self._layers:
            self._settle()
        return self._layers[stream]

    def _note(self, stream: int, **figures: float | None) -> None:
        self._layers[stream] = replace(self._layer(stream), **figures)  # type: ignore[arg-type]


def _ratio(part: float, whole: float) -> float | None:
    """None where there is none: nothing to divide by, or weights that are not finite."""
    return part / whole if whole > 0 and math.isfinite(part / whole) else None


def _average(past: float | None, value: float | None) -> float | None:
    if past is None or value is None:
        return past if value is None else value
    return _EMA * past + (1 - _EMA) * value


def _now(plan: Plan) -> float:
    if plan.device.type == "cuda":
        torch.cuda.synchronize(plan.device)
    return time.perf_counter()


def _sample(param: Tensor) -> Tensor:
    """Evenly spaced rows, at most `_SAMPLE` elements of them; at least one."""
    return param[:: max(1, math.ceil(param.numel() / _SAMPLE))] if param.ndim else param


def _movement(param: Tensor, before: Tensor, dtype: torch.dtype) -> Tensor:
    """(‖ΔW‖, ‖W‖) of the sample."""
    change = _sample(param).to(dtype) - before.to(dtype)
    return _norms(change, before, dtype=dtype)


def _norms(*tensors: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(x, dtype=dtype) for x in tensors])


def _orthonormal(plan: Plan, bases: Bases) -> Bases:
    """Of sharded bases, the whole."""
    axes = (0 if side == "left" else 1 for side in plan.sides)
    wholes = (plan.sharding.gather(basis, (axis, None)) for basis, axis in zip(bases, axes, strict=True))
    return tuple(torch.linalg.qr(basis)[0] for basis in wholes)


def _overlap(old: Bases, new: Bases) -> Tensor:
    shares = [(a.mT @ b).square().sum() / a.shape[1] for a, b in zip(old, new, strict=True)]
    return torch.stack(shares).mean().clamp(max=1)


def _whitened(low: Tensor, bases: Bases, plan: Plan) -> Tensor:
    """R as an orthonormal basis of the same subspace would give it, up to a rotation: R L⁻ᵀ with QᵀQ = L Lᵀ."""
    for side, basis in zip(plan.sides, bases, strict=True):
        (gram,) = plan.sharding.sum([basis.mT @ basis], 0 if side == "left" else 1)
        gram.diagonal().add_(_SHIFT * gram.diagonal().mean())
        root, _ = torch.linalg.cholesky_ex(gram)
        low = torch.linalg.solve_triangular(root, low if side == "left" else low.mT, upper=False)
        low = low if side == "left" else low.mT
    return low
