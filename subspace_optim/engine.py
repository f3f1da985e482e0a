"""The engine: a torch optimizer that steps buckets of equal tensors through projector, rule and kernel.

One step, in six hops:
    1. step        the closure runs with gradients enabled, everything else without
    2. _collect    tensor → Plan → Bucket; everything that can be refused is refused here, before anything changes
    3. _refresh    on schedule steps only: new bases, and the moments carried into them
    4. rule.step_  picks state and hyperparameters for the kernel
    5. kernel      project, moments, transform, back-project, decay, one write of the parameter
    6. advance_    a projector that learns from every gradient does so
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from torch.optim import Optimizer

from . import distributed, philox, storage
from .distributed import Axes
from .hyperparameters import ABSENT, HINTS, KEYS, canonical, check, nearest
from .kernels import select
from .monitor import LayerReport, Monitor, Observer
from .projectors import UNSET, Projector, exact_products
from .rules import Adam, Kernel, Rule, flat
from .types import Bases, Bucket, Hyper, Plan, State, make_plan, stack_states, state_axes, unstack_state

GRAD_LIMIT = 1e15  # a larger |g| overflows float32 when squared and summed over a row: it counts as infinite
REFRESH_ELEMENTS = 2**24  # tensors of a bucket are refreshed together up to this size, which bounds the workspace
_GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, spread evenly whatever their number

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(slots=True)
class _Entry:
    """A parameter (of a sharded one, its shard) as its matrices (one, unless stacked), each with its own state."""

    param: Tensor
    matrices: list[Tensor]
    state: State
    members: list[State]

    @classmethod
    def of(cls, plan: Plan, param: Tensor, state: State) -> _Entry:
        """The entry of a parameter with this state."""
        shard = distributed.local(param)
        return cls(shard, plan.matrices(shard), state, _member_states(plan, state))

    def store(self) -> None:
        """Write back what the step could not reach in place: ints, parameters that have no view."""
        for key, column in self.state.items():
            if not isinstance(column, Tensor):
                self.state[key] = self.members[0][key]
            elif column.dtype == torch.int64:
                distributed.local(column).copy_(torch.tensor([member[key] for member in self.members]))
        if self.matrices and self.matrices[0].data_ptr() != self.param.data_ptr():
            self.param.copy_(torch.stack(self.matrices).view(self.param.shape))


@dataclass(slots=True)
class _Work:
    """One bucket to step, with all that it takes."""

    group: dict[str, Any]
    bucket: Bucket
    kernel: Kernel
    entries: list[_Entry]


@dataclass(slots=True)
class _Match:
    """A parameter and its state in a state dict, beside the state that it needs, whole and on the meta device."""

    name: str
    param: Tensor
    plan: Plan
    saved: State
    wanted: State
    axes: dict[str, tuple[Axes, tuple[int, ...]]]


class SubspaceOptimizer(Optimizer):
    """Any projector with any rule and transform, as a torch optimizer.

    R = project(G); N = transform(rule(R)); W ← (1 - lr·λ) W - lr·scale·back(N); a dense tensor takes an AdamW step.

    Args:
        params: tensors, (name, tensor) pairs or groups of them. A group may set every key of `KEYS` for itself. If any
            group names a `rank`, a group that does not is dense.
        projector: which subspace; None leaves every tensor dense.
        rule: what happens inside it.
        transform: none, grams (sign of the gradient, size of the update) or cautious (only where they agree).
        lr: learning rate ≥ 0, a float or a 0-d tensor.
        betas: decay rates of the moments, in [0, 1); the rule's own by default.
        eps: added to √V̂, ≥ 0.
        weight_decay: λ ≥ 0, decoupled.
        scale: α > 0, multiplies the update of projected tensors.
        moments: at a change of basis: rotate the first moment, keep it, or move both project_aware (LDAdam).
        batch_dims: leading dimensions that index separate matrices, as in stacked experts.
        dense_rule: the rule of tensors that are not projected.
        stagger: spread the refreshes of different tensors over the gap, so that no step pays for all of them.
        state_bits: of the moments: 32, 8 (dynamic map) or 4, in blocks that share a scale; vectors keep 32.
        basis_bits: of the bases: 32, 8 or 4, linear.
        rounding: of bfloat16 parameters: stochastic; kahan, which keeps what is lost in as many bytes more; or nearest,
            which loses small updates. float16 knows the last two. `stochastic_rounding=False` is "nearest".
        seed: of random bases, starting points and rounding.
        backend: auto, or a name listed by `subspace_optim.backends()`.
        **overrides: rank, update_proj_gap, proj_type of the projector; aliases alpha, kappa, projection_type.

    Raises:
        ValueError: a value is out of range, or an option is misspelt.

    Attributes:
        skipped_updates: how many updates of one tensor a gradient that was not finite has cost.
        last_grad_norm: what `clip_grad_norm_` last found; NaN before.
        lows: R of the tensors whose gradients were projected ahead of the coming step, one for each matrix.
        in_backward: whether `project_in_backward` is on, and how it renews bases.
    """

    observer = Observer()  # told of the work; not part of the state, and a copy begins with this one
    last_grad_norm: Tensor | float = math.nan
    in_backward: Literal["exact", "early"] | None = None

    def __init__(
        self,
        params: Iterable[Any],
        projector: Projector | None = None,
        rule: Rule | None = None,
        transform: str = "none",
        *,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        scale: float = 1.0,
        moments: str = "rotate",
        batch_dims: int = 0,
        dense_rule: Rule | None = None,
        stagger: bool = True,
        state_bits: int = 32,
        basis_bits: int = 32,
        rounding: str | None = None,
        seed: int = 0,
        backend: str = "auto",
        **overrides: Any,
    ) -> None:
        where = type(self).__name__
        self.projector = projector
        self.rule = Adam() if rule is None else rule
        self.dense_rule = Adam() if dense_rule is None else dense_rule
        self.stagger = stagger
        self.seed = seed
        self.backend = backend
        self.skipped_updates = 0
        self.lows: dict[Tensor, list[Tensor]] = {}
        if backend != "auto" and backend not in select.IMPLS:
            raise ValueError(f"{where}: backend={backend!r} must be one of auto, {', '.join(select.IMPLS)}")
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": self.rule.betas if betas is None else betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": projector.rank if projector else None,
            "update_proj_gap": projector.update_proj_gap if projector else 200,
            "scale": scale,
            "proj_type": projector.proj_type if projector else "std",
            "transform": transform,
            "moments": moments,
            "batch_dims": batch_dims,
            "state_bits": state_bits,
            "basis_bits": basis_bits,
            "rounding": "stochastic",
        }
        if rounding is not None:
            overrides = {"rounding": rounding, **overrides}
        for key, value in canonical(overrides, where).items():
            if key in HINTS:
                continue
            if key not in KEYS and key not in ABSENT:
                near = nearest(key, KEYS)
                raise TypeError(f"{where}: unexpected argument '{key}'" + (f"; did you mean '{near}'?" if near else ""))
            defaults[key] = value
        check(defaults, where)
        entries = [params] if isinstance(params, Tensor) else list(params)
        groups = [entry for entry in entries if isinstance(entry, dict)]
        if any("rank" in canonical(group, f"{where}: group {i}") for i, group in enumerate(groups)):
            defaults["rank"] = None
        super().__init__(params if isinstance(params, Tensor) else entries, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does; keys of ours that are missing take the constructor's values.

        Raises:
            ValueError: a value is out of range, or a key is misspelt.
            TypeError: a parameter is of a type that cannot be stepped.
        """
        where = f"{type(self).__name__}: group {len(self.param_groups)}"
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"{where}: {param_group!r} must be a dict with the key 'params'")
        group = canonical(param_group, where)
        check({**self.defaults, **group}, where)
        if group.get("rank") is not None and self.projector is None:
            raise ValueError(f"{where}: rank={group['rank']!r} needs a projector, and this optimizer has none")
        params = group["params"]
        if not isinstance(params, set):  # which torch refuses
            group["params"] = [params] if isinstance(params, Tensor) else list(params)
            taken = {id(param): _name(self.param_groups[g], i) for _, g, i, param in self._positions()}
            for i, entry in enumerate(group["params"]):
                name, param = entry if isinstance(entry, tuple) else (f"parameter {i}", entry)
                self._refuse_param(param, name, where, taken)
        super().add_param_group(group)

    @staticmethod
    def _refuse_param(param: Any, name: str, where: str, taken: dict[int, str]) -> None:
        if not isinstance(param, Tensor):
            raise TypeError(f"{where}: {name} is a {type(param).__name__}; give tensors or (name, tensor) pairs")
        name = f"{where}: {name} of shape {tuple(param.shape)}"
        if not (param.is_leaf or param.retains_grad):
            raise ValueError(f"{name} is a non-leaf Tensor, the result of a computation; give the parameter itself")
        if id(param) in taken:
            raise ValueError(f"{name} is {taken[id(param)]} as well; a tensor may appear once")
        taken[id(param)] = name
        if param.dtype not in _DTYPES:
            raise TypeError(f"{name} is {param.dtype}; optimizable are float32, float64, bfloat16 and float16")
        try:
            distributed.Layout.of(param)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None

    def _refuse_flattened(self) -> None:
        """Without this, wrappers that flatten weights would turn a projection into AdamW without a word."""
        params = [param for _, _, _, param in self._positions()]
        who = next(filter(None, map(distributed.flattened_by, params)), None)
        asked = any(group["rank"] is not None for group in self.param_groups)
        if who and asked and all(param.ndim < 2 for param in params):
            own = type(self).__name__
            raise ValueError(
                f"{own}: {who} has flattened every parameter, but a projection needs matrices. Shard with "
                "torch.distributed.fsdp.fully_shard (FSDP2), which keeps their shapes; or use DDP, with "
                f"torch.distributed.optim.ZeroRedundancyOptimizer(params, {own}, ...) to spread the state (ZeRO-1); "
                "FSDP1 keeps shapes under use_orig_params=True with ShardingStrategy.NO_SHARD alone"
            )

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step every parameter that has a gradient.

        A tensor whose gradient is NaN, infinite or beyond 1e15 stays as it is, with its state; `skipped_updates`
        counts them. Gradients are never written. What was projected ahead of the step is used up by it.

        Args:
            closure: computes the loss and its gradients; called once, with gradients enabled.

        Raises:
            TypeError: a gradient is sparse.
            ValueError: the rank or side of a group has been changed.
            RuntimeError: the backend that was asked for cannot step a tensor, or a tensor has both a gradient and one
                that was projected ahead. In all these cases nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.observer.begin()
        for work in self._collect():
            self._step_bucket(work)
        self.lows.clear()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch does, and forget what was projected ahead of the step."""
        super().zero_grad(set_to_none)
        self.lows.clear()

    @property
    def whole_gradient(self) -> str:
        """Why a step needs more of a gradient than R; empty where R is enough."""
        if self.projector is None:
            return "it projects nothing"
        return self.rule.whole_gradient or self.projector.whole_gradient

    def plan_of(self, index: int, param: Tensor) -> Plan:
        """How a tensor of the group with this index is stepped."""
        return _plan(param, self.param_groups[index])

    def name_of(self, param: Tensor) -> str:
        """What errors call a tensor of this optimizer."""
        return next(_name(self.param_groups[index], i) for _, index, i, own in self._positions() if own is param)

    def low_plan(self, index: int, param: Tensor) -> Plan | None:
        """The plan by which the gradient of a tensor may be projected ahead of the coming step.

        None where the step needs the whole gradient: the tensor is dense, its basis is due for renewal, or the method
        reads more than R.

        Args:
            index: of the tensor's group.
            param: the tensor.
        """
        plan, state = self.plan_of(index, param), self.state.get(param)
        if plan.side is None or not state or self.whole_gradient:
            return None
        if param in self.lows:  # what has begun to accumulate in a basis stays in it, and a renewal waits
            return plan
        assert self.projector is not None
        gap = self.param_groups[index]["update_proj_gap"]
        return None if any(self.projector.due(member, gap) for member in _member_states(plan, state)) else plan

    def bases(self, plan: Plan, param: Tensor) -> list[Bases]:
        """The bases in force of the matrices of a projected tensor."""
        assert self.projector is not None
        kernel = select.resolve(self.backend, plan)
        states = [storage.with_bases(plan, member, kernel) for member in _member_states(plan, self.state[param])]
        return self.projector.bases(plan, states)

    @torch.no_grad()
    def renew_early(self, index: int, param: Tensor) -> None:
        """Renew the bases of a projected tensor that are due in the coming step from the gradient that it has now.

        As in the step, one that is zero or not finite renews nothing.

        Args:
            index: of the tensor's group.
            param: the tensor.
        """
        group, plan, state = self.param_groups[index], self.plan_of(index, param), self.state[param]
        position = next(position for position, _, _, own in self._positions() if own is param)
        assert param.grad is not None
        grads, kernel = plan.matrices(param.grad), select.resolve(self.backend, plan)
        if not (kernel.grad_max(grads) <= GRAD_LIMIT).all():
            return
        if not state:
            state.update(self._init_state(plan, group, position))
        entry = _Entry(param, plan.matrices(param), state, _member_states(plan, state))
        bucket = Bucket(plan, group["rounding"] == "stochastic", entry.matrices, grads, entry.members)
        bucket.orders = [position + j for j in range(len(bucket))]
        bucket.streams = [self._stream(plan, position, j) for j in range(len(bucket))]
        for part in storage.parts(bucket):
            opened = storage.opened(part, kernel)
            self._refresh(group, opened, _hyper(group, plan), kernel)
            storage.close_(part, opened, kernel)
        entry.store()

    @torch.no_grad()
    def project_gradients(self, tensors: Iterable[tuple[int, Tensor]]) -> None:
        """R ← R + project(p.grad), and p.grad is freed, for all of the tensors of which the step needs no more than R.

        Args:
            tensors: (index of the group, tensor).
        """
        alike: dict[Plan, list[Tensor]] = {}
        for index, param in tensors:
            if param.grad is None or param.grad.layout != torch.strided:
                continue
            plan = self.low_plan(index, param)
            if plan is not None:
                alike.setdefault(plan, []).append(param)
        for plan, params in alike.items():
            kernel = select.resolve(self.backend, plan)
            grads = [g for param in params for g in self._grads(plan, param)]
            bases = flat([own for param in params for own in self.bases(plan, param)])
            lows = kernel.project(grads, bases, plan.side, plan.state_dtype)
            count = len(plan.members)
            for i, param in enumerate(params):
                self.add_low(param, lows[i * count : (i + 1) * count])
                param.grad = None

    def add_low(self, param: Tensor, lows: Sequence[Tensor]) -> None:
        """R ← R + low.

        Args:
            param: the tensor.
            lows: a projected gradient of each of its matrices; they are kept.
        """
        if param in self.lows:
            torch._foreach_add_(self.lows[param], list(lows))
        else:
            self.lows[param] = list(lows)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients down until their joint norm is at most `max_norm`; returns the norm they had.

        It is the norm of what the step sees: R of a projected tensor, G of a dense one and of one whose basis is due
        for renewal. So it does not depend on whether gradients are projected within backward. With an orthonormal
        basis ‖R‖ ≤ ‖G‖: it is at most the norm that torch.nn.utils.clip_grad_norm_ finds. Gradients of which the step
        needs no more than R are projected here and freed. A gradient that is not finite, which the step will skip,
        makes the returned norm so but does not scale the others.

        `last_grad_norm` keeps what was returned.

        Args:
            max_norm: > 0; math.inf only measures.

        Raises:
            ValueError: `max_norm` is out of range.
        """
        if not max_norm > 0:
            raise ValueError(f"clip_grad_norm_: max_norm={max_norm!r} must be > 0; math.inf only measures")
        everything = [(index, param) for _, index, _, param in self._positions()]
        self.project_gradients(everything)
        alike: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = {}
        squares: list[tuple[distributed.Sharding, list[int], Tensor]] = []  # of sharded tensors, on this rank
        for index, param in everything:  # in an order that all ranks share
            if param.grad is None and param not in self.lows:
                continue
            plan = self.plan_of(index, param)
            held = self.lows[param] if param in self.lows else [distributed.settled_grad(param)]
            for grad in held:
                alike.setdefault((grad.device, grad.dtype, plan.sharding.mesh is None), []).append(grad)
            if plan.sharding.mesh is not None:
                axes = plan.low_axes if param in self.lows else range(len(plan.matrix))
                own = [torch.linalg.vector_norm(grad, dtype=plan.state_dtype).double().square() for grad in held]
                cuts = plan.sharding.cuts(distributed.STACK, *axes)
                squares.append((plan.sharding, cuts, sum(own, torch.zeros((), device=plan.device).double())))
        device = next(iter(alike), (torch.device("cpu"),))[0]
        norms = [
            torch.stack(list(torch._foreach_norm(grads, 2, dtype=torch.promote_types(dtype, torch.float32))))
            for (_, dtype, here), grads in alike.items()
            if here
        ]
        norms += [square.sqrt().view(1) for square in distributed.together(dist.ReduceOp.SUM, squares)]
        joint = torch.cat([n.double().to(device) for n in norms]) if norms else torch.zeros(1)
        self.last_grad_norm = norm = torch.linalg.vector_norm(joint)
        usable = torch.linalg.vector_norm(torch.where(joint.isfinite(), joint, 0))
        if max_norm != math.inf:
            factor = (max_norm / (usable + 1e-6)).clamp(max=1)
            for (where, dtype, _), grads in alike.items():
                torch._foreach_mul_(grads, factor.to(where, dtype))
        return norm

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """GradScaler asks for it before it steps, and looks at p.grad alone."""
        if self.in_backward:
            raise RuntimeError(
                "GradScaler cannot unscale gradients that are projected within backward; train in bfloat16, which has "
                "no need of it, or leave project_in_backward out"
            )
        return False

    def _collect(self) -> list[_Work]:
        """Everything to step, grouped; refuses what cannot be stepped and creates missing state."""
        if not self.state:
            self._refuse_flattened()
        members: dict[tuple[int, Plan, bool], list[tuple[int, Tensor]]] = {}
        for position, index, i, param in self._positions():
            ahead = param in self.lows
            if (param.grad is None and not ahead) or param.numel() == 0:
                continue
            group = self.param_groups[index]
            if param.grad is not None and ahead:
                raise RuntimeError(
                    f"{_name(group, i)} has a gradient besides the one that was projected ahead of the step; something "
                    "else writes p.grad (DistributedDataParallel: leave it out, and call average_gradients), or a "
                    "backward has run since; zero_grad() clears both"
                )
            if param.grad is not None and param.grad.layout != torch.strided:
                raise TypeError(f"{_name(group, i)} has a {param.grad.layout} gradient; use a dense one (sparse=False)")
            plan, state = _plan(param, group), self.state.get(param)
            if state:
                self._check_state(_name(group, i), plan, group, state)
            members.setdefault((index, plan, ahead), []).append((position, param))
        kernels = {plan: select.resolve(self.backend, plan) for _, plan, _ in members}
        grads = {
            key: [grad for _, param in tensors for grad in self._grads(key[1], param)]
            for key, tensors in members.items()
        }
        peaks = distributed.together(
            dist.ReduceOp.MAX,
            [(plan.sharding, plan.sharding.cuts(), kernels[plan].grad_max(g)) for (_, plan, _), g in grads.items()],
        )
        works = []
        for key, largest in zip(members, peaks, strict=True):
            index, plan, ahead = key
            group = self.param_groups[index]
            bucket, entries = self._bucket(plan, ahead, group, members[key], grads[key], largest)
            if len(bucket):
                works.append(_Work(group, bucket, kernels[plan], entries))
        return works

    @staticmethod
    def _check_state(name: str, plan: Plan, group: dict[str, Any], state: State) -> None:
        why, (_, shape) = storage.mismatch(plan.whole, state), storage.kept_shape(plan.whole, "exp_avg")
        if why is None and state["exp_avg"].shape != shape:
            why = f"state of shape {tuple(state['exp_avg'].shape)}, but rank={group['rank']!r} and "
            why += f"proj_type={group['proj_type']!r} need {shape}"
        if why is not None:
            raise ValueError(f"{name} has {why}; keep what the run began with")

    def _grads(self, plan: Plan, param: Tensor) -> list[Tensor]:
        """What the step starts from: R of what was projected ahead of it, otherwise the gradient, by matrices."""
        return self.lows[param] if param.grad is None else plan.matrices(distributed.settled_grad(param))

    def _bucket(
        self,
        plan: Plan,
        ahead: bool,
        group: dict[str, Any],
        tensors: list[tuple[int, Tensor]],
        grads: list[Tensor],
        peaks: Tensor,
    ) -> tuple[Bucket, list[_Entry]]:
        """The matrices of a plan that take part in this step, and the parameters that they belong to."""
        measured = iter(zip(grads, peaks.tolist(), strict=True))
        bucket, entries = Bucket(plan, group["rounding"] == "stochastic", projected=ahead), []
        for position, param in tensors:
            state = self.state[param]
            fresh = not state
            if fresh:
                state.update(self._init_state(plan, group, position))
            entry = _Entry.of(plan, param, state)
            entries.append(entry)
            for j, matrix, member in zip(plan.members, entry.matrices, entry.members, strict=True):
                grad, largest = next(measured)
                # DCP materialises state by a step of zero gradients at lr 0: that must allocate, and count nothing.
                if fresh and largest == 0 and float(group["lr"]) == 0:
                    continue
                if not largest <= GRAD_LIMIT:
                    self.skipped_updates += 1
                    self.observer.skip(self._stream(plan, position, j))
                    continue
                bucket.params.append(matrix)
                bucket.grads.append(grad)
                bucket.states.append(member)
                bucket.orders.append(position + j)
                bucket.streams.append(self._stream(plan, position, j))
        return bucket, entries

    def _step_bucket(self, work: _Work) -> None:
        plan = work.bucket.plan
        hyper = _hyper(work.group, plan)
        workspace = self.projector.workspace(plan.whole) if plan.side and self.projector else 0
        for part in storage.parts(work.bucket, workspace):
            bucket = storage.opened(part, work.kernel)
            self._step_opened(work.group, bucket, hyper, work.kernel)
            storage.close_(part, bucket, work.kernel)
        for entry in work.entries:
            entry.store()

    def _step_opened(self, group: dict[str, Any], bucket: Bucket, hyper: Hyper, kernel: Kernel) -> None:
        plan = bucket.plan
        if plan.side is None:
            with self.observer.step(self.dense_rule, bucket, kernel):
                self.dense_rule.step_(bucket, hyper, kernel)
            return
        assert self.projector is not None
        self._refresh(group, bucket, hyper, kernel)
        lows, seen = [], bucket
        if self.projector.learns and not self.rule.whole_gradient:
            lows = kernel.project(bucket.grads, flat(bucket.bases), plan.side, plan.state_dtype)
            seen = replace(bucket, grads=lows, projected=True)
        with self.observer.step(self.rule, bucket, kernel):
            self.rule.step_(seen, hyper, kernel)
        changes = self.projector.advance_(plan, bucket.states, bucket.grads, lows, _lr_ratio(group))
        if changes is not None:
            self.rule.carry_(plan, bucket.states, changes, hyper)
        if self.projector.learns:
            storage.keep_bases_(bucket, kernel)
        for state in bucket.states:
            state["age"] += state["age"] != UNSET

    def _refresh(self, group: dict[str, Any], bucket: Bucket, hyper: Hyper, kernel: Kernel) -> None:
        """Set the bases of the bucket, new ones for the members that are due.

        A refresh that meets a zero gradient, or a factorisation that fails, waits for the next step: the member
        goes on with the basis it has, and one without a basis projects to zero.
        """
        plan, projector = bucket.plan, self.projector
        assert projector is not None
        gap = group["update_proj_gap"]
        due = [i for i, state in enumerate(bucket.states) if not bucket.projected and projector.due(state, gap)]
        bucket.bases = projector.bases(plan, bucket.states)
        if self.rule.looks_behind:
            stale = set(due)
            bucket.previous = [tuple(q.clone() for q in b) if i in stale else b for i, b in enumerate(bucket.bases)]
        at_once = max(1, REFRESH_ELEMENTS // math.prod(plan.whole.matrix))  # the same on every rank
        for chunk in (due[i : i + at_once] for i in range(0, len(due), at_once)):
            targets = dict(zip(chunk, self.rule.targets(bucket.part(chunk)), strict=True))
            if projector.needs_gradient:
                flags = torch.stack([target.any() for target in targets.values()]).double()
                seen = plan.sharding.max([flags])[0].tolist()
                targets = {i: target for (i, target), flag in zip(targets.items(), seen, strict=True) if flag}
            if not targets:
                continue
            part = bucket.part(list(targets))
            try:
                with self.observer.refresh(projector, part), exact_products():
                    changes = projector.refresh_(plan, part.states, list(targets.values()), part.streams)
            except LinAlgError:
                continue
            storage.settle_bases_(part, kernel)
            self.rule.carry_(plan, part.states, changes, hyper)
            for i, bases in zip(targets, projector.bases(plan, part.states), strict=True):
                state = bucket.states[i]
                state["age"] = self._offset(bucket.orders[i], group) if state["age"] == UNSET else 0
                bucket.bases[i] = bases

    def _init_state(self, plan: Plan, group: dict[str, Any], position: int) -> State:
        numbers = plan.members or [0]  # a rank without a matrix of the stack has state of its shape, and no elements
        members = [self._init_member(plan, group, position, j) for j in numbers]
        if plan.stack is None:
            state = members[0]
        else:
            state = {key: column[: plan.stack] for key, column in stack_states(members).items()}
        for key, (axes, shape) in self._axes(plan, group, position).items():
            state[key] = plan.sharding.spread(state[key], axes, shape)
        return state

    def _axes(self, plan: Plan, group: dict[str, Any], position: int) -> dict[str, tuple[Axes, tuple[int, ...]]]:
        """The state tensors that are DTensors: all of a sharded parameter's but the step count."""
        if plan.sharding.mesh is None:
            return {}
        axes = state_axes(plan, lambda other: self._init_member(other, group, position, 0))
        return {key: (carried, shape) for key, (carried, shape) in axes.items() if shape}

    def _init_member(self, plan: Plan, group: dict[str, Any], position: int, j: int) -> State:
        """State of one matrix, or of a dense tensor."""
        if plan.side is None:
            return storage.allocated(plan, self.dense_rule.init)
        member = storage.allocated(plan, partial(self._init_matrix, self._stream(plan, position, j)))
        if member["age"] != UNSET:
            member["age"] += self._offset(position + j, group)
        return member

    def allocate_state(self) -> None:
        """Create the state of every parameter now instead of at its first step, so that its memory is taken."""
        for position, index, _, param in self._positions():
            if param.requires_grad and param.numel() and not self.state[param]:
                group = self.param_groups[index]
                self.state[param].update(self._init_state(_plan(param, group), group, position))

    def _init_matrix(self, stream: int, plan: Plan) -> State:
        assert self.projector is not None
        return self.rule.init(plan) | self.projector.init(plan, stream)

    def _offset(self, order: int, group: dict[str, Any]) -> int:
        """How much earlier than a whole gap the first renewal comes."""
        if not (self.stagger and self.projector is not None and self.projector.periodic):
            return 0
        return int(order * _GOLDEN % 1 * group["update_proj_gap"])

    def _stream(self, plan: Plan, position: int, j: int) -> int:
        """The seed of the j-th matrix of the parameter at a position."""
        seed = self._seed(position)
        return seed if plan.stack is None else philox.mix(seed, j)

    def _seed(self, position: int) -> int:
        return philox.mix(self.seed, position)

    def _positions(self) -> Iterator[tuple[int, int, int, Tensor]]:
        """(position in the optimizer, group, position in the group, parameter): seeds follow the first."""
        position = 0
        for index, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                yield position, index, i, param
                position += 1

    def state_dict(self) -> dict[str, Any]:
        """As torch's; once there is state, every parameter that requires a gradient has some.

        torch.distributed.checkpoint reads into a fresh optimizer, for which it makes all state: what a checkpoint left
        out, because a parameter has not had a gradient yet, it would miss.
        """
        if self.state:
            self.allocate_state()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, as torch does, but keep the dtypes it was saved in and share no memory with it.

        Whole tensors go into sharded parameters, and sharded ones into whole parameters: every rank has to call it.

        Raises:
            ValueError: the state is of another optimizer, rank or model. Nothing has been changed then.
        """
        loaded: dict[str, Any] = {}

        def inspect(_: Optimizer, incoming: dict[str, Any]) -> None:
            for match in self._matched(incoming):
                self._check_loaded(match)
            loaded.update(incoming)

        def restore(_: Optimizer) -> None:
            for match in self._matched(loaded):
                for key, value in match.saved.items():
                    if isinstance(value, Tensor):
                        value = self._placed(match, key, value.detach())
                    self.state[match.param][key] = value

        # As hooks, so that hooks of the user's run before and after in the usual order.
        handles = (
            self.register_load_state_dict_pre_hook(inspect),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _matched(self, state_dict: dict[str, Any]) -> Iterator[_Match]:
        """The parameters that the state dict has state for."""
        groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in groups], [len(group["params"]) for group in self.param_groups]
        if sizes[0] != sizes[1]:
            return  # torch's own message says it
        for position, index, i, param in self._positions():
            saved = state_dict["state"].get(groups[index]["params"][i])
            if saved:
                group = {**self.defaults, **groups[index], "params": self.param_groups[index]["params"]}
                plan = _plan(param, group)
                wanted = self._init_state(replace(plan.whole, device=torch.device("meta")), group, position)
                axes = self._axes(plan, group, position)
                yield _Match(_name(self.param_groups[index], i), param, plan, saved, wanted, axes)

    def _check_loaded(self, match: _Match) -> None:
        if why := storage.mismatch(match.plan.whole, match.saved):
            raise ValueError(f"{match.name}: the checkpoint holds {why}; set that option as in the run that wrote it")
        if set(match.saved) != set(match.wanted):
            raise ValueError(
                f"{match.name}: the checkpoint holds {', '.join(sorted(match.saved))}, but {type(self).__name__} keeps "
                f"{', '.join(sorted(match.wanted))}; load it into the optimizer, with the rank and options, that wrote "
                "it"
            )
        for key, value in match.wanted.items():
            given, needed = _describe(match.saved[key]), _describe(value)
            if given != needed:
                raise ValueError(
                    f"{match.name}: the checkpoint's {key} is {given}, but a parameter of shape "
                    f"{tuple(match.param.shape)} needs {needed}; load it into the model and groups that wrote it"
                )

    @staticmethod
    def _placed(match: _Match, key: str, value: Tensor) -> Tensor:
        """A copy of a loaded tensor in its own dtype, where and as this parameter's is kept."""
        axes, _ = match.axes.get(key, (None, None))
        value = distributed.whole(value) if axes is None else match.plan.sharding.placed(value, axes)
        # Ints of stacked states are read at every step: on a GPU that would wait for it.
        here = value.dtype != torch.int64 or axes is not None
        device = match.param.device if here else torch.device("cpu")
        return value.to(device, match.wanted[key].dtype, copy=True, memory_format=torch.contiguous_format)

    def __getstate__(self) -> dict[str, Any]:
        own = ("projector", "rule", "dense_rule", "stagger", "seed", "backend")
        return {**super().__getstate__(), **{key: getattr(self, key) for key in (*own, "skipped_updates")}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lows = {}  # of other bases
        self.defaults.pop("differentiable", None)  # put there by torch; groups of a checkpoint have no such key
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def watch(self, every: int = 10) -> None:
        """Look at every n-th step from now on, for `report`.

        A look costs one more projection of every gradient, and for the time of the step 1 MiB a matrix. Steps in
        between cost nothing; a refresh is timed, for which a GPU is waited for. Of sharded parameters the figures are
        of the whole: then every rank has to watch.

        Args:
            every: steps between two looks, ≥ 1.

        Raises:
            ValueError: `every` is not a whole number ≥ 1.
        """
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"{type(self).__name__}.watch: every={every!r} must be a whole number of at least 1")
        self.observer = Monitor(every, self._members)

    def report(self) -> list[LayerReport]:
        """What has been seen of every matrix since `watch`: captured energy, overlap, size of the updates, refreshes.

        Raises:
            RuntimeError: `watch` has not been called.
        """
        if not isinstance(self.observer, Monitor):
            raise RuntimeError(f"{type(self).__name__}.report: call watch() before the steps that it is to tell of")
        return self.observer.report()

    def _members(self) -> Iterator[tuple[int, str, Plan]]:
        """(random stream, name, plan) of every matrix."""
        for position, index, i, param in self._positions():
            plan, name = _plan(param, self.param_groups[index]), _name(self.param_groups[index], i)
            for j in plan.members:
                yield self._stream(plan, position, j), name if plan.stack is None else f"{name}[{j}]", plan

    def state_bytes(self) -> int:
        """Memory held here by all state tensors, every storage counted once; of sharded ones, their shards."""
        values = (distributed.local(value) for state in self.state.values() for value in state.values())
        tensors = (value for value in values if isinstance(value, Tensor))
        return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())

    def summary(self) -> str:
        """A table of what is projected, what is dense, and why; one line for tensors that are treated alike."""
        rows: dict[tuple[str, str, str], list[str]] = {}
        for _, index, i, param in self._positions():
            plan = _plan(param, self.param_groups[index])
            how = f"{plan.side}, rank {plan.rank}" if plan.side else "dense"
            key = (how, "×".join(map(str, param.shape)) or "scalar", plan.reason if param.requires_grad else "frozen")
            rows.setdefault(key, []).append(_name(self.param_groups[index], i))
        lines = [
            (how, shape, str(len(names)), names[0] + (", …" if len(names) > 1 else ""), reason)
            for (how, shape, reason), names in sorted(rows.items(), key=lambda row: row[0][0] == "dense")
        ]
        lines.insert(0, ("step", "shape", "count", "tensors", "why dense"))
        widths = [max(len(line[column]) for line in lines) for column in range(5)]
        cells = ((cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)
        return "\n".join("  ".join(row).rstrip() for row in cells)

    def __repr__(self) -> str:
        parts = f"projector={self.projector}, rule={self.rule}"
        return f"{super().__repr__()}\n{parts}\n{self.summary()}"


def _plan(param: Tensor, group: dict[str, Any]) -> Plan:
    options = (group["rank"], group["proj_type"], group["batch_dims"])
    kept = (group["state_bits"], group["basis_bits"], group["rounding"])
    try:
        layout = distributed.Layout.of(param)
        return make_plan(tuple(param.shape), param.dtype, param.device, *options, *kept, layout)
    except ValueError as error:
        i = next(i for i, own in enumerate(group["params"]) if own is param)
        raise ValueError(f"{_name(group, i)} {error}") from None


def _hyper(group: dict[str, Any], plan: Plan) -> Hyper:
    lr = group["lr"]
    return Hyper(
        lr=lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64),
        betas=tuple(group["betas"]),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        scale=group["scale"] if plan.side else 1.0,
        transform=group["transform"],
        moments=group["moments"],
    )


def _member_states(plan: Plan, state: State) -> list[State]:
    """The states of the matrices of a tensor: tensors are the memory of the state's, ints of a stack are copies."""
    here = state if plan.sharding.mesh is None else {key: distributed.local(value) for key, value in state.items()}
    return [here] if plan.stack is None else unstack_state(here, plan.stack)


def _name(group: dict[str, Any], i: int) -> str:
    if "param_names" in group:
        return str(group["param_names"][i])
    return f"parameter {i} of shape {tuple(group['params'][i].shape)}"


def _describe(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"of type {type(value).__name__}"


def _lr_ratio(group: dict[str, Any]) -> float:
    """The learning rate over its peak, where a scheduler has told it."""
    lr = float(group["lr"])
    peak = max(float(group.get("initial_lr", lr)), float(group.get("max_lr", 0.0)))
    return lr / peak if peak > 0 else 0.0
