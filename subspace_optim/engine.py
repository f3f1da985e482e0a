"""The engine: a torch optimizer that steps buckets of equal tensors through projector, rule and kernel.

One step, in six hops:
    1. step        the closure runs with gradients enabled, everything else without
    2. _collect    tensor → Plan → Bucket; everything that can be refused is refused here, before anything changes
    3. _refresh    on schedule steps only: new bases, and the moments carried into them
    4. rule.step_  picks state and hyperparameters for the kernel
    5. kernel      project, moments, transform, back-project, decay, one write of the parameter
    6. advance_    a projector that learns from every gradient does so
What is held between steps (groups, state, checkpoints) is in state.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from . import distributed, storage
from .hyperparameters import FIXED, HINTS, KEYS, canonical, check, demand, is_whole, nearest, plain
from .kernels import select
from .monitor import LayerReport, Monitor, Observer
from .projectors import UNSET, Projector, exact_products
from .rules import Adam, Kernel, Rule, flat
from .state import (
    DTYPES,
    Seat,
    StatefulOptimizer,
    follows,
    in_no_mode,
    member_states,
    name_in,
    not_dense,
    not_optimizable,
    plan_for,
)
from .types import Bases, Bucket, Hyper, Plan, State, scalar

GRAD_LIMIT = 1e15  # a larger |g| overflows float32 when squared and summed over a row: it counts as infinite
REFRESH_ELEMENTS = 2**24  # tensors of a bucket are refreshed together up to this size, which bounds the workspace

# In a compiled training step this runs as it is, as bookkeeping of torch's own optimizers does: what it decides changes
# from step to step, and its kernels are compiled already.
_in_eager = torch._disable_dynamo  # type: ignore[attr-defined]


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
        return cls(shard, plan.matrices(shard), state, member_states(plan, state))

    def store(self) -> None:
        """Write back what the step could not reach in place: ints, parameters that have no view."""
        apart = not self.members or self.members[0] is not self.state
        for key, column in self.state.items() if apart else ():
            if not isinstance(column, Tensor):
                self.state[key] = self.members[0][key]
            elif column.dtype == torch.int64:
                distributed.local(column).copy_(torch.tensor([member[key] for member in self.members], device="cpu"))
        if self.matrices and self.matrices[0].data_ptr() != self.param.data_ptr():
            self.param.copy_(torch.stack(self.matrices).view(self.param.shape))


@dataclass(slots=True)
class _Work:
    """One bucket to step, with all that it takes."""

    group: dict[str, Any]
    bucket: Bucket
    kernel: Kernel
    entries: list[_Entry]


class SubspaceOptimizer(StatefulOptimizer):
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
        TypeError: the projector or a rule is none, or a parameter is of a type that cannot be stepped.

    Attributes:
        skipped_updates: how many updates of one tensor a gradient that was not finite has cost; a GPU is waited for.
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
        if not isinstance(projector, Projector | None):
            raise TypeError(f"{where}: projector={projector!r} must be a projector, such as SVD(rank=128), or None")
        for key, value in (("rule", self.rule), ("dense_rule", self.dense_rule)):
            if not isinstance(value, Rule):
                raise TypeError(f"{where}: {key}={value!r} must be a rule, such as Adam()")
        self.stagger, self.seed = stagger, plain(seed)
        demand(isinstance(stagger, bool), where, "stagger", stagger, "True or False")
        demand(is_whole(self.seed), where, "seed", seed, "an int")
        self.backend = backend
        self._skips, self._seats, self._places = {}, {}, {}
        self.lows: dict[Tensor, list[Tensor]] = {}
        if backend not in ("auto", *select.IMPLS):
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
            if key not in KEYS and key not in FIXED:
                near = nearest(key, KEYS)
                raise TypeError(f"{where}: unexpected argument '{key}'" + (f"; did you mean '{near}'?" if near else ""))
            defaults[key] = value
        defaults = {key: plain(value) for key, value in defaults.items()}
        check(defaults, where)
        entries = [params] if isinstance(params, Tensor) else list(params)
        groups = [entry for entry in entries if isinstance(entry, dict)]
        if any("rank" in canonical(group, f"{where}: group {i}") for i, group in enumerate(groups)):
            defaults["rank"] = None
        super().__init__(params if isinstance(params, Tensor) else entries, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step every parameter that has a gradient.

        A tensor whose gradient is NaN, infinite or beyond 1e15 stays as it is, with its state but for its `age`;
        `skipped_updates` counts them. Gradients are never written. What was projected ahead of the step is used up.

        An ordinary step of Adam's family on a GPU, in which no basis is renewed, waits for nothing.

        Args:
            closure: computes the loss and its gradients; called once, with gradients enabled.

        Raises:
            TypeError: a gradient is sparse, or of a type that cannot be stepped.
            ValueError: an option of a group is gone or out of range by now, or its rank or side is another than before.
            RuntimeError: the backend that was asked for cannot step a tensor; or a tensor has both a gradient and one
                that was projected ahead, or none because it is projected for another optimizer. In all these cases
                nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @_in_eager  # and not the closure, as trainers call a compiled model in one
    @in_no_mode
    def _step(self) -> None:
        self.observer.begin()
        works = self._collect()
        while works:
            self._step_bucket(works.pop(0))  # whose bases may be drawn for this step alone, and go with it
        self.lows.clear()

    @property
    def ordinary_steps(self) -> float:
        """How many of the coming steps neither renew nor re-orthonormalise a basis; math.inf if none ever will.

        Tensors that have neither a basis nor a gradient yet are left out, unless no tensor has a basis.
        """
        left = [math.inf]
        for _, index, _, param in self._positions():
            group, plan, state = self.param_groups[index], self.plan_of(index, param), self.state.get(param)
            if plan.side is None:
                continue
            assert self.projector is not None
            begins = param.grad is not None or param in self.lows or not self.state
            left += [
                self.projector.ordinary_steps(member, group["update_proj_gap"])
                for member in (member_states(plan, state) if state else [{"age": UNSET}])
                if begins or member["age"] != UNSET
            ]
        return min(left)

    def replayed(self, steps: int = 1) -> None:
        """Count steps that replays of a CUDA graph have taken, so that refreshes come when they are due.

        A replay repeats what the device did: weights, moments and step counts advance, but not the ages of the bases,
        which are ints of the host. Capture and replay `step` while there are `ordinary_steps`, and call it for others.

        Args:
            steps: ≥ 0, how many.

        Raises:
            ValueError: they are more than the `ordinary_steps`: one of them should have renewed a basis.
        """
        if not (is_whole(steps) and 0 <= steps <= self.ordinary_steps):
            raise ValueError(
                f"{type(self).__name__}.replayed: steps={steps!r} must be an int of at least 0 and at most "
                f"ordinary_steps, {self.ordinary_steps}; call step() where that is 0, which renews bases"
            )
        for state in self.state.values():
            if "age" in state:
                age = distributed.local(state["age"])
                if isinstance(age, Tensor):
                    age += steps
                else:
                    state["age"] += int(steps)

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

    def low_plan(self, index: int, param: Tensor) -> Plan | None:
        """The plan by which the gradient of a tensor may be projected ahead of the coming step.

        None where the step needs the whole gradient: the tensor is dense, its basis is due for renewal, its state has
        yet to follow it to another device or precision, or the method reads more than R.

        Args:
            index: of the tensor's group.
            param: the tensor.
        """
        plan, state = self.plan_of(index, param), self.state.get(param)
        if plan.side is None or not state or self.whole_gradient or not follows(plan, state):
            return None
        if param in self.lows:  # what has begun to accumulate in a basis stays in it, and a renewal waits
            return plan
        assert self.projector is not None
        gap = self.param_groups[index]["update_proj_gap"]
        return None if any(self.projector.due(member, gap) for member in member_states(plan, state)) else plan

    def bases(self, plan: Plan, params: Iterable[Tensor], kernel: Kernel | None = None) -> list[Bases]:
        """The bases in force of the matrices of tensors of a plan; `kernel` decodes them, if it is known already."""
        assert self.projector is not None
        kernel = kernel or select.resolve(self.backend, plan)
        states = [member for param in params for member in member_states(plan, self.state[param])]
        return self.projector.bases(plan, storage.with_bases(plan, states, kernel))

    @in_no_mode
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
        grads, kernel = self._grads(plan, param), select.resolve(self.backend, plan)
        (largest,) = plan.sharding.max([kernel.grad_max(grads)])
        if not (largest <= GRAD_LIMIT).all():
            return
        if not state:
            state.update(self._init_state(plan, group, position))
        entry = _Entry.of(plan, param, state)
        bucket = Bucket(plan, group["rounding"] == "stochastic", entry.matrices, grads, entry.members)
        bucket.orders = [position + j for j in plan.members]
        bucket.streams = [self._stream(plan, position, j) for j in plan.members]
        for part in storage.parts(bucket, self.rule.takes_codes):
            opened = storage.opened(part, kernel, self.rule.takes_codes)
            self._refresh(group, opened, _hyper(group, plan), kernel)
            storage.close_(part, opened, kernel)
        entry.store()

    @in_no_mode
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
            bases = flat(self.bases(plan, params, kernel))
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

    @_in_eager
    @in_no_mode
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
            TypeError: a gradient is sparse.
        """
        one = isinstance(max_norm, Real) or (isinstance(max_norm, Tensor) and max_norm.numel() == 1)
        demand(
            one and bool(max_norm > 0),
            "clip_grad_norm_",
            "max_norm",
            max_norm,
            "one number > 0; math.inf only measures",
        )
        everything = [(index, param) for _, index, _, param in self._positions()]
        self.project_gradients(everything)
        alike: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = {}
        squares: list[tuple[distributed.Sharding, list[int], Tensor]] = []  # of sharded tensors, on this rank
        for index, param in everything:  # in an order that all ranks share
            if param.grad is None and param not in self.lows:
                continue
            if param.grad is not None and param.grad.layout != torch.strided:
                raise not_dense(self.name_of(param), param.grad.layout)
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
        joint = torch.cat([n.double().to(device) for n in norms]) if norms else torch.zeros(1, device=device)
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
        for index, group in enumerate(self.param_groups):
            self._check_group(group, f"group {index}")
        options = [self._options(group) for group in self.param_groups]
        taking: dict[tuple[int, Plan, bool], list[tuple[Seat, Tensor]]] = {}
        for position, index, i, param in self._positions():
            ahead = bool(self.lows) and param in self.lows
            grad = param.grad
            group = self.param_groups[index]
            if (grad is None and not ahead) or param.numel() == 0:
                hooks = param._post_accumulate_grad_hooks or {}
                if any(getattr(hook, "serves", lambda: None)() not in (None, self) for hook in hooks.values()):
                    raise RuntimeError(
                        f"{name_in(group, i)} is projected within backward for another optimizer, and has no gradient "
                        "here; remove() the handle that project_in_backward returned"
                    )
                continue
            if grad is not None and ahead:
                raise RuntimeError(
                    f"{name_in(group, i)} has a gradient besides the one that was projected ahead of the step; "
                    "something else writes p.grad (DistributedDataParallel: leave it out, and call average_gradients), "
                    "or a backward has run since; zero_grad() clears both"
                )
            if grad is not None and grad.layout != torch.strided:
                raise not_dense(name_in(group, i), grad.layout)
            if param.dtype not in DTYPES:
                raise not_optimizable(f"{name_in(group, i)} is", param.dtype)
            if grad is not None and grad.dtype not in DTYPES:
                raise not_optimizable(f"{name_in(group, i)} has a gradient of", grad.dtype)
            seat = self._seat(position, param, group, options[index])
            if self.state.get(param):
                self._check_state(position, index, i, param, seat)
            taking.setdefault((index, seat.plan, ahead), []).append((seat, param))
        kernels = {plan: select.resolve(self.backend, plan) for _, plan, _ in taking}
        grads = {
            key: [grad for _, param in tensors for grad in self._grads(key[1], param)]
            for key, tensors in taking.items()
        }
        peaks = distributed.together(
            dist.ReduceOp.MAX,
            [(plan.sharding, plan.sharding.cuts(), kernels[plan].grad_max(g)) for (_, plan, _), g in grads.items()],
        )
        works = []
        for key, largest in zip(taking, peaks, strict=True):
            index, plan, ahead = key
            group = self.param_groups[index]
            bucket, entries = self._bucket(plan, ahead, group, taking[key], grads[key], largest)
            works.append(_Work(group, bucket, kernels[plan], entries))
        skipping: dict[torch.device, list[Tensor]] = {}
        for work in works:
            if work.bucket.finite is not None:
                skipping.setdefault(work.bucket.plan.device, []).append(work.bucket.finite)
        for device, flags in skipping.items():
            self._skips[device] += torch.cat(flags).logical_not_().sum()
        return works

    def _grads(self, plan: Plan, param: Tensor) -> list[Tensor]:
        """What the step starts from: R of what was projected ahead of it, otherwise the gradient, by matrices."""
        return self.lows[param] if param.grad is None else plan.matrices(distributed.settled_grad(param))

    def _bucket(
        self,
        plan: Plan,
        ahead: bool,
        group: dict[str, Any],
        tensors: list[tuple[Seat, Tensor]],
        grads: list[Tensor],
        peaks: Tensor,
    ) -> tuple[Bucket, list[_Entry]]:
        """The matrices of a plan that take part in this step, and the parameters that they belong to."""
        bucket, entries = Bucket(plan, group["rounding"] == "stochastic", grads=grads, projected=ahead), []
        fresh: list[bool] = []
        for seat, param in tensors:
            state = self.state[param]
            fresh += [not state] * len(seat.orders)
            if not state:
                state.update(self._init_state(plan, group, seat.position))
            entry = _Entry.of(plan, param, state)
            entries.append(entry)
            bucket.params += entry.matrices
            bucket.states += entry.members
            bucket.orders += seat.orders
            bucket.streams += seat.streams
        if plan.device not in self._skips:
            self._skips[plan.device] = torch.zeros((), dtype=torch.int64, device=plan.device)
        if _waits(peaks) and not any(fresh) and self._is_ordinary(bucket, group):
            bucket.finite = peaks <= GRAD_LIMIT
            return bucket, entries
        taken = []
        for i, largest in enumerate(peaks.tolist()):
            # DCP materialises state by a step of zero gradients at lr 0: that must allocate, and count nothing.
            if fresh[i] and largest == 0 and float(group["lr"]) == 0:
                continue
            if largest <= GRAD_LIMIT:
                taken.append(i)
            else:
                self._skips[plan.device] += 1
                self.observer.skip(bucket.streams[i])
                _grow_older(bucket.states[i])
        return bucket if len(taken) == len(bucket) else bucket.part(taken), entries

    def _is_ordinary(self, bucket: Bucket, group: dict[str, Any]) -> bool:
        """Whether the kernel alone decides what it leaves as it is: nothing else in the step depends on it."""
        plan = bucket.plan
        rule = self.rule if plan.side else self.dense_rule
        if not rule.skips or self.observer.listens or not storage.steps_in_place(plan, rule.takes_codes):
            return False
        return plan.side is None or self._keeps_bases(bucket, group)

    def _keeps_bases(self, bucket: Bucket, group: dict[str, Any]) -> bool:
        """Whether this step makes no basis anew."""
        projector, gap = self.projector, group["update_proj_gap"]
        assert projector is not None
        return bucket.projected or all(projector.ordinary_steps(state, gap) > 0 for state in bucket.states)

    def _due(self, bucket: Bucket, group: dict[str, Any]) -> list[int]:
        """The members whose bases this step renews."""
        projector, gap = self.projector, group["update_proj_gap"]
        assert projector is not None
        return [i for i, state in enumerate(bucket.states) if not bucket.projected and projector.due(state, gap)]

    def _step_bucket(self, work: _Work) -> None:
        plan = work.bucket.plan
        hyper = _hyper(work.group, plan)
        workspace = self.projector.workspace(plan.whole) if plan.side and self.projector else 0
        rule = self.rule if plan.side else self.dense_rule
        alone = compensates(rule, work.kernel) and not self.observer.listens
        for part in storage.parts(work.bucket, rule.takes_codes, workspace, alone):
            bucket = storage.opened(part, work.kernel, rule.takes_codes, alone)
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
        if self.projector.learns:
            moved, changes = self.projector.advance_(bucket, lows, _lr_ratio(group), kernel)
            if changes is not None:
                self.rule.carry_(plan, moved.states, changes, hyper)
            storage.keep_bases_(moved, kernel)
        for state in bucket.states:
            _grow_older(state)

    def _refresh(self, group: dict[str, Any], bucket: Bucket, hyper: Hyper, kernel: Kernel) -> None:
        """Set the bases of the bucket, new ones for the members that are due.

        A refresh that meets a zero gradient, or a factorisation that fails, waits for the next step: the member
        goes on with the basis it has, and one without a basis projects to zero.
        """
        plan, projector = bucket.plan, self.projector
        assert projector is not None
        due = self._due(bucket, group)
        bucket.bases = projector.bases(plan, bucket.states)
        if not self._keeps_bases(bucket, group):
            storage.decode_moments_(bucket, kernel)
        if self.rule.looks_behind:
            stale = set(due)
            bucket.previous = [tuple(q.clone() for q in b) if i in stale else b for i, b in enumerate(bucket.bases)]
        at_once = max(1, REFRESH_ELEMENTS // math.prod(plan.whole.matrix))  # the same on every rank
        for chunk in (due[i : i + at_once] for i in range(0, len(due), at_once)):
            targets = dict(zip(chunk, self.rule.targets(bucket.part(chunk)), strict=True))
            if projector.needs_gradient:
                (peaks,) = plan.sharding.max([kernel.grad_max(list(targets.values()))])
                targets = {i: t for (i, t), peak in zip(targets.items(), peaks.tolist(), strict=True) if peak != 0}
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
        if not is_whole(every) or every < 1:
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
            plan, name = plan_for(param, self.param_groups[index]), name_in(self.param_groups[index], i)
            for j in plan.members:
                yield self._stream(plan, position, j), name if plan.stack is None else f"{name}[{j}]", plan


def compensates(rule: Rule, kernel: Kernel) -> bool:
    """Whether the kernel alone knows what rounding takes from a parameter (Kahan), of which no wide copy is made."""
    return rule.compensates and hasattr(kernel, "COMPENSATES")


def _hyper(group: dict[str, Any], plan: Plan) -> Hyper:
    return Hyper(
        lr=_number(group["lr"]),
        betas=tuple(group["betas"]),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        scale=group["scale"] if plan.side else 1.0,
        transform=group["transform"],
        moments=group["moments"],
    )


def _waits(tensor: Tensor) -> bool:
    """Whether to read its numbers is to wait for a device."""
    return tensor.device.type != "cpu"


def _grow_older(state: State) -> None:
    """Refreshes come by the steps of the optimizer, whether a gradient in between was finite or not."""
    if state.get("age", UNSET) != UNSET:
        state["age"] += 1


def _number(value: float | Tensor) -> Tensor:
    """0-d, where it is."""
    return value.reshape(()) if isinstance(value, Tensor) else scalar(value)


def _lr_ratio(group: dict[str, Any]) -> Tensor:
    """The learning rate over its peak, where a scheduler has told it; at most 1, as not all of them do."""
    lr = _number(group["lr"]).double()
    peak = torch.maximum(_number(group.get("initial_lr", lr)), _number(group.get("max_lr", 0.0)))
    return (lr / peak).nan_to_num_(nan=0.0).clamp_(max=1)
