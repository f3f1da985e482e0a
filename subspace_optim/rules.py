"""Rules: what happens inside the subspace. Each is a frozen dataclass of hyperparameters; all state is in the bucket.

A rule says what it stores (`init`), how the stored moments follow a change of basis (`carry_`) and how it steps
(`step_`). Most need only `update_`: from the projected gradients R to the updates N.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .distributed import Axes
from .hyperparameters import demand, is_number
from .types import (
    Bases,
    Bucket,
    Change,
    Hyper,
    Moments,
    Plan,
    Side,
    State,
    Weights,
    change_of_basis,
    choose_,
    peak,
    scalar,
    spread,
    stacked,
)

Kernel = Any  # a module with the functions of kernels/reference.py
_AT_ONCE = 2**24  # elements that Adafactor normalises at once on a GPU
_NORM_FLOOR = 1e-19  # √ of the smallest normal float32: a smaller norm is computed as zero


@dataclass(frozen=True)
class Rule:
    """Base of all rules: project, `update_`, transform, apply.

    Args:
        decay_after: decay the new weight instead of the old one (the order of GaLore's official code).
    """

    decay_after: bool = False

    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)  # default of the group key
    looks_behind: ClassVar[bool] = False  # True: the rule moves its moments to the new basis by itself, within step_
    sign_after: ClassVar[bool] = False  # True: the sign is taken after the back-projection
    whole_gradient: ClassVar[str] = ""  # why a step needs more of a gradient than R, if it does
    takes_codes: ClassVar[bool] = False  # True: step_ hands the moments to functions of storage.Coding alone

    @property
    def skips(self) -> bool:
        """Whether step_ leaves alone what `bucket.finite` says no of, and reads nothing back."""
        return False

    @property
    def compensates(self) -> bool:
        """Whether step_ leaves parameters to its kernel alone, which may know what rounding has taken from them."""
        return True

    @property
    def keeps(self) -> str:
        """What the numbers of its state are: a checkpoint of a rule that keeps others is refused."""
        return type(self).__name__

    def init(self, plan: Plan) -> State:
        """Zero state for one tensor."""
        return {"step": _zeros(plan, ()), "exp_avg": _zeros(plan, plan.low_shape)}

    def carry_(self, plan: Plan, states: list[State], changes: list[Change], hyper: Hyper) -> None:
        """Express the moments in the new basis, given c = Q_oldᵀ Q_new: right M ← M c, left M ← cᵀ M."""
        if hyper.moments == "keep":
            return
        for state, change in zip(states, changes, strict=True):
            state["exp_avg"].copy_(carried(state["exp_avg"], change, plan.side))

    def targets(self, bucket: Bucket) -> list[Tensor]:
        """The gradients that a refresh of the basis looks at."""
        return bucket.grads

    def step_(self, bucket: Bucket, hyper: Hyper, kernel: Kernel) -> None:
        """Advance the moments and write the parameters."""
        updates = self.update_(bucket, self.project(bucket, kernel), hyper, kernel)
        self.apply_(bucket, updates, hyper, kernel)

    def project(self, bucket: Bucket, kernel: Kernel) -> list[Tensor]:
        """R of every member; where nothing is to be projected, the gradients as they are."""
        if bucket.projected or bucket.plan.side is None:
            return bucket.grads
        return kernel.project(bucket.grads, flat(bucket.bases), bucket.plan.side, bucket.plan.state_dtype)

    def update_(self, bucket: Bucket, lows: list[Tensor], hyper: Hyper, kernel: Kernel) -> list[Tensor]:
        """From R to N; `lows` may be the gradients themselves, in their own dtype, and must not be written."""
        raise NotImplementedError

    def apply_(
        self, bucket: Bucket, updates: list[Tensor], hyper: Hyper, kernel: Kernel, lr: Tensor | None = None
    ) -> None:
        """Write the parameters; `lr` replaces the group's, one a tensor."""
        own = replace(hyper, lr=hyper.lr if lr is None else lr, scale=self.scale(hyper))
        kernel.apply_(bucket.weights, updates, flat(bucket.bases), own, bucket.plan.side, self.sign_after)

    def scale(self, hyper: Hyper) -> float:
        """α; to decay the new weight instead of the old one is to shrink the update by (1 - lr·λ) as well."""
        return hyper.scale * (1 - float(hyper.lr) * hyper.weight_decay if self.decay_after else 1.0)


@dataclass(frozen=True)
class Adam(Rule):
    """Adam in the subspace: M ← β₁M + (1-β₁)R, V ← β₂V + (1-β₂)R², N = M̂/(√V̂ + ε). Dense, it is torch's AdamW.

    Args:
        eps_inside: add ε to √V before its bias correction, as the transformers AdamW of the official codes does.

    Source: arXiv 1412.6980.
    """

    eps_inside: bool = False

    takes_codes: ClassVar[bool] = True
    skips: ClassVar[bool] = True

    @property
    def keeps(self) -> str:
        """The same under whatever is made of it."""
        return "Adam"

    def init(self, plan: Plan) -> State:
        """Both moments in the low-rank shape."""
        return super().init(plan) | {"exp_avg_sq": _zeros(plan, plan.low_shape)}

    def carry_(self, plan: Plan, states: list[State], changes: list[Change], hyper: Hyper) -> None:
        """Rotate M and keep V, or (project_aware) move both by LDAdam's rule (arXiv 2410.16103)."""
        if hyper.moments == "project_aware":
            for state, change in zip(states, changes, strict=True):
                _carry_project_aware_(state, change, plan.side, hyper.betas)
        else:
            super().carry_(plan, states, changes, hyper)

    def step_(self, bucket: Bucket, hyper: Hyper, kernel: Kernel) -> None:
        """One fused call, unless R is there already, or the official place of ε or order of decay is asked for."""
        if bucket.projected or self.eps_inside or self.decay_after:
            super().step_(bucket, hyper, kernel)
            return
        bases = flat(bucket.bases)
        kernel.projected_adam_(bucket.weights, bucket.grads, bucket.adam, bases, hyper, bucket.plan.side)

    def update_(self, bucket: Bucket, lows: list[Tensor], hyper: Hyper, kernel: Kernel) -> list[Tensor]:
        """N = M̂/(√V̂ + ε)."""
        return kernel.adam_update_(lows, bucket.adam, bucket.slot("step"), hyper, self.eps_inside, bucket.finite)


@dataclass(frozen=True)
class Lion(Rule):
    """Lion: W moves by lr·sign(back(β₁M + (1-β₁)R)), then M ← β₂M + (1-β₂)R.

    The sign is taken after the back-projection, so that every weight moves by ±lr; `scale` has no effect.

    Source: arXiv 2302.06675.
    """

    betas: ClassVar[tuple[float, float]] = (0.9, 0.99)
    sign_after: ClassVar[bool] = True
    skips: ClassVar[bool] = True

    def update_(self, bucket: Bucket, lows: list[Tensor], hyper: Hyper, kernel: Kernel) -> list[Tensor]:
        """The interpolated moment; its sign is taken by apply_."""
        look, keep = ((beta, 1 - beta) for beta in hyper.betas)
        moments = (bucket.slot("exp_avg"), bucket.slot("step"))
        return kernel.linear_update_(lows, *moments, look, keep, hyper.transform, bucket.finite)

    def scale(self, hyper: Hyper) -> float:
        """The step is ±lr whatever α is."""
        return super().scale(replace(hyper, scale=1.0))


@dataclass(frozen=True)
class Momentum(Rule):
    """Heavy-ball momentum as torch.optim.SGD has it: M ← β₁M + R, N = M (or R + β₁M with nesterov).

    Args:
        nesterov: look ahead by one momentum step.
    """

    nesterov: bool = False

    skips: ClassVar[bool] = True

    def update_(self, bucket: Bucket, lows: list[Tensor], hyper: Hyper, kernel: Kernel) -> list[Tensor]:
        """N = M after it has advanced; to look ahead is R + β(βM + R)."""
        beta, moments = hyper.betas[0], (bucket.slot("exp_avg"), bucket.slot("step"))
        look = (beta * beta, 1 + beta) if self.nesterov else (beta, 1.0)
        return kernel.linear_update_(lows, *moments, look, (beta, 1.0), hyper.transform, bucket.finite)


@dataclass(frozen=True)
class Adafactor(Rule):
    """Adafactor in the subspace, with momentum: N = EMA(clip(R / √V̂)), V̂ from the row and column means of R².

    Args:
        decay_rate: c in β₂(k) = 1 - k⁻ᶜ, in (0, 1].
        clip_threshold: largest root mean square of one update.
        scale_parameter: multiply lr by max(1e-3, RMS(W)), Adafactor's relative step size.
        lr_inside: average lr·U instead of U, as GaLore's official code does.

    Source: arXiv 1804.04235.
    Deviations: lr stands outside the momentum, so that a schedule acts at once; lr_inside undoes it.
    """

    decay_rate: float = 0.8
    clip_threshold: float = 1.0
    scale_parameter: bool = False
    lr_inside: bool = False

    def __post_init__(self) -> None:
        where, decay, most = type(self).__name__, self.decay_rate, self.clip_threshold
        demand(is_number(decay) and 0 < decay <= 1, where, "decay_rate", decay, "a number in (0, 1]")
        demand(isinstance(most, Real) and most > 0, where, "clip_threshold", most, "a number > 0")

    @property
    def skips(self) -> bool:
        """Not where parameters are decayed beforehand."""
        return not self.lr_inside

    @property
    def compensates(self) -> bool:
        """Likewise."""
        return not self.lr_inside

    @property
    def keeps(self) -> str:
        """Steps, or updates that have yet to be multiplied by lr."""
        return f"Adafactor(lr_inside={self.lr_inside})"

    def init(self, plan: Plan) -> State:
        """Row and column means of the squared gradient; the whole square of a vector."""
        return super().init(plan) | self._init_squares(plan, plan.low_shape)

    def _init_squares(self, plan: Plan, shape: tuple[int, ...]) -> State:
        if len(shape) < 2:
            return {"exp_avg_sq": _zeros(plan, shape)}
        return {
            "exp_avg_sq_row": _zeros(plan, shape[:-1]),
            "exp_avg_sq_col": _zeros(plan, (*shape[:-2], shape[-1])),
        }

    def carry_(self, plan: Plan, states: list[State], changes: list[Change], hyper: Hyper) -> None:
        """Rotate M; under project_aware the statistics along a projected dimension move by c∘c."""
        super().carry_(plan, states, changes, hyper)
        if hyper.moments != "project_aware":
            return
        for state, change in zip(states, changes, strict=True):
            for side, c in zip(plan.sides, change, strict=True):
                square = state["exp_avg_sq_col" if side == "right" else "exp_avg_sq_row"]
                square.copy_(((c * c).mT @ square.unsqueeze(-1)).squeeze(-1))

    def step_(self, bucket: Bucket, hyper: Hyper, kernel: Kernel) -> None:
        """As the base, with Adafactor's relative step size."""
        rates, lows = self._rates(bucket, hyper), self.project(bucket, kernel)
        if self.lr_inside:
            decays = 1 - rates.double().expand(len(bucket)) * hyper.weight_decay
            torch._foreach_mul_(bucket.params, decays.tolist())
            updates = self.update_(bucket, lows, hyper, kernel, rates)
            self.apply_(bucket, updates, replace(hyper, weight_decay=0.0), kernel, lr=scalar(1))
        else:
            self.apply_(bucket, self.update_(bucket, lows, hyper, kernel), hyper, kernel, lr=rates)

    def update_(
        self, bucket: Bucket, lows: list[Tensor], hyper: Hyper, kernel: Kernel, rates: Tensor | None = None
    ) -> list[Tensor]:
        """N = EMA of the clipped, normalised R, each times its rate if there are any."""
        plan, share = bucket.plan, (hyper.betas[0], 1 - hyper.betas[0])
        moments, steps, updates = bucket.slot("exp_avg"), bucket.slot("step"), []
        for at in _batches(lows):
            finite = None if bucket.finite is None else bucket.finite[at]
            counts = torch.stack(steps[at]) + 1
            fresh = self._normalised_(plan, plan.low_axes, bucket.states[at], stacked(lows[at]), counts, finite)
            self._clip_(plan, fresh)
            if rates is not None:
                fresh.mul_(spread(rates.to(fresh).expand(len(bucket))[at], fresh.ndim - 1))
            directions = list(fresh.unbind())
            updates += kernel.linear_update_(directions, moments[at], steps[at], share, share, hyper.transform, finite)
        return updates

    def _normalised_(
        self, plan: Plan, axes: Axes, states: list[State], grads: Tensor, counts: Tensor, finite: Tensor | None
    ) -> Tensor:
        """R / √V̂ of a batch after advancing V; a new tensor.

        Args:
            plan: of the matrices.
            axes: of the matrix, that the dimensions of R carry.
            states: that hold V.
            grads: R, one matrix after another.
            counts: of the steps, this one included.
            finite: see Bucket; of what it says no of the result is zero.
        """
        grads, fresh = grads.to(plan.state_dtype), counts.double() ** -self.decay_rate  # 1 - β₂
        if finite is not None:
            grads, fresh = torch.where(spread(finite, grads.ndim - 1), grads, 0), torch.where(finite, fresh, 0)
        fresh = fresh.to(grads.dtype)
        square = grads.square().add_(1e-30)

        def advanced(key: str, values: Tensor) -> Tensor:
            kept = [state[key] for state in states]
            average = torch.stack(kept).lerp_(values, spread(fresh, values.ndim - 1))
            torch._foreach_copy_(kept, list(average.unbind()))
            return average

        if "exp_avg_sq" in states[0]:
            return advanced("exp_avg_sq", square).rsqrt_().mul_(grads)
        mean = plan.sharding.mean
        row = advanced("exp_avg_sq_row", mean(square, -1, axes[-1]))
        col = advanced("exp_avg_sq_col", mean(square, -2, axes[-2]))
        row_scale = (row / mean(row, -1, axes[-2]).unsqueeze(-1)).rsqrt_().unsqueeze(-1)
        return torch.mul(grads, row_scale, out=square).mul_(col.rsqrt_().unsqueeze(-2))

    def _clip_(self, plan: Plan, updates: Tensor) -> None:
        """Of a batch."""
        excess = plan.sharding.rms(list(updates.unbind()), updates.dtype) / self.clip_threshold
        updates.div_(spread(excess.clamp_(min=1), updates.ndim - 1))

    def _rates(self, bucket: Bucket, hyper: Hyper) -> Tensor:
        if not self.scale_parameter:
            return hyper.lr
        return bucket.plan.sharding.rms(bucket.params, bucket.plan.state_dtype).clamp_(min=1e-3).mul_(hyper.lr)


@dataclass(frozen=True)
class CompressedAdafactor(Adafactor):
    """Adafactor on the full gradient whose momentum is kept compressed (Flora).

    U = G / √V̂ (full rank); D = (1-β₁)U + β₁·back(C); C ← β₁C + (1-β₁)·project(U); W moves by lr·clip(D).
    Only history is compressed: the fresh part of the step stays full rank.

    Source: arXiv 2402.03293.
    """

    looks_behind: ClassVar[bool] = True
    whole_gradient: ClassVar[str] = "the fresh part of Flora's update, G/√V̂, has full rank"

    def init(self, plan: Plan) -> State:
        """The compressed momentum, and the factored square of the full gradient."""
        return Rule.init(self, plan) | self._init_squares(plan, plan.matrix)

    def carry_(self, plan: Plan, states: list[State], changes: list[Change], hyper: Hyper) -> None:
        """Nothing: D still reads the momentum in the old basis, so step_ moves it."""

    def step_(self, bucket: Bucket, hyper: Hyper, kernel: Kernel) -> None:
        """One matrix at a time, as U and D are as large as the parameter, unless the kernel has it as one function."""
        beta, plan = hyper.betas[0], bucket.plan
        own = replace(hyper, lr=self._rates(bucket, hyper), scale=self.scale(hyper))
        if plan.side is not None and hasattr(kernel, "compressed_adafactor_"):
            moves = [
                old is not new and hyper.moments != "keep"
                for old, new in zip(bucket.previous, bucket.bases, strict=True)
            ]
            kernel.compressed_adafactor_(
                *(bucket.weights, bucket.grads, *map(bucket.slot, ("exp_avg", "exp_avg_sq_row", "exp_avg_sq_col"))),
                *(flat(bucket.previous), flat(bucket.bases), moves, own, self.decay_rate, self.clip_threshold),
                plan.side,
            )
            return
        _count_(bucket)
        history = Hyper(scalar(-beta))  # D takes steps along back(C)
        axes, all_weights = tuple(range(len(plan.matrix))), bucket.weights
        for i, state in enumerate(bucket.states):
            weights = all_weights.part(slice(i, i + 1))
            finite, grad, moment = weights.finite, bucket.grads[i].to(plan.state_dtype), state["exp_avg"]
            old, new = (bucket.previous[i], bucket.bases[i]) if plan.side else ((), ())
            updates = self._normalised_(plan, axes, [state], grad.unsqueeze(0), state["step"].view(1), finite)
            update = updates[0]
            low = kernel.project([update], new, plan.side, plan.state_dtype)[0] * (1 - beta)
            update.mul_(1 - beta)
            kernel.apply_(Weights([update], weights.steps), [moment], list(old), history, plan.side)
            past = moment
            if old is not new and hyper.moments != "keep":
                past = carried(moment, change_of_basis(plan, old, new), plan.side)
            choose_(finite, [low.add_(past, alpha=beta)], [moment])
            kernel.transform_([update], [grad], hyper.transform)
            self._clip_(plan, updates)
            kernel.apply_(weights, [update], [], own.part(slice(i, i + 1)), None)


@dataclass(frozen=True)
class WeightNormAdam(Adam):
    """Adam on the directions of the rows of W, in the subspace, and on their norms ρ (GradNormLoRP).

    V = W/ρ by rows; ĝ = rowsum(G ∘ V); G_t = G - diag(ĝ)V (tangential); R = project(G_t); N, n = Adam(R), Adam(ĝ);
    W ← (ρ(1 - lr·λ) - lr·n) · rows of (W - lr·scale·back(N)) brought to length 1. A zero row has no direction: it
    takes the plain update.

    Source: arXiv 2412.19616.
    """

    whole_gradient: ClassVar[str] = "the row norms learn from rowsum(G ∘ W), which R does not hold"

    @property
    def compensates(self) -> bool:
        """Not where W is measured and turned."""
        return False

    def init(self, plan: Plan) -> State:
        """Adam's moments, and two more for the row norms."""
        state = super().init(plan)
        if plan.side is not None:
            rows = plan.matrix[:-1]
            state |= {"magnitude_exp_avg": _zeros(plan, rows), "magnitude_exp_avg_sq": _zeros(plan, rows)}
        return state

    def targets(self, bucket: Bucket) -> list[Tensor]:
        """The tangential gradients; zero where rounding is all that is left of a radial one."""
        tangents = [self._split(p, g, bucket.plan)[0] for p, g in zip(bucket.params, bucket.grads, strict=True)]
        peaks = torch.stack([peak(x, bucket.plan.state_dtype) for x in (*bucket.grads, *tangents)])
        largest, left = bucket.plan.sharding.max([peaks])[0].chunk(2)
        for tangent, kept in zip(tangents, left > 8 * torch.finfo(peaks.dtype).eps * largest, strict=True):
            tangent.mul_(kept)
        return tangents

    @staticmethod
    def _split(param: Tensor, grad: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
        """G_t (m, n), ĝ (m), ρ (m). The gradient of a zero row is tangential as a whole."""
        w, g = param.to(plan.state_dtype), grad.to(plan.state_dtype)
        norm = plan.sharding.norm(w, (0, 1), (-1,))
        divisor = torch.where(norm > 0, norm, 1)
        product = g * w
        radial = plan.sharding.sum([product.sum(-1)], 1)[0] / divisor
        return torch.addcmul(g, w, (radial / divisor).unsqueeze(-1), value=-1, out=product), radial, norm

    def step_(self, bucket: Bucket, hyper: Hyper, kernel: Kernel) -> None:
        """One matrix at a time, unless the kernel has it as one function; a dense bucket is plain Adam."""
        plan = bucket.plan
        if plan.side is None:
            super().step_(bucket, hyper, kernel)
            return
        if hasattr(kernel, "weight_norm_adam_"):
            lengths = Moments(bucket.slot("magnitude_exp_avg"), bucket.slot("magnitude_exp_avg_sq"))
            bases = flat(bucket.bases)
            kernel.weight_norm_adam_(bucket.weights, bucket.grads, bucket.adam, lengths, bases, hyper, plan.side)
            return
        plain, all_weights = replace(hyper, weight_decay=0.0), bucket.weights
        for i, (param, state) in enumerate(zip(bucket.params, bucket.states, strict=True)):
            weights = all_weights.part(slice(i, i + 1))
            tangent, radial, norm = self._split(param, bucket.grads[i], plan)
            low = kernel.project([tangent], bucket.bases[i], plan.side, plan.state_dtype)
            update, growth = self.adam_(state, low[0], radial, hyper, kernel, weights.finite)
            moved = tangent.copy_(param)
            kernel.apply_(Weights([moved], weights.steps), [update], bucket.bases[i], plain, plan.side)
            magnitude = norm.mul(1 - hyper.lr * hyper.weight_decay).sub_(growth * hyper.lr).clamp_(min=0)
            length = plan.sharding.norm(moved, (0, 1), (-1,))
            rescale = torch.where((norm > 0) & (length > 0), magnitude / length.clamp(min=1e-30), 1)
            kernel.write_(weights, [moved.mul_(rescale.unsqueeze(-1))])

    def adam_(
        self,
        state: State,
        low: Tensor,
        radial: Tensor,
        hyper: Hyper,
        kernel: Kernel,
        finite: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """N and n: Adam's updates of direction and length, which share one step count."""
        moments = Moments([state["exp_avg"]], [state["exp_avg_sq"]])
        lengths = Moments([state["magnitude_exp_avg"]], [state["magnitude_exp_avg_sq"]])
        same_step, plain = state["step"].clone(), replace(hyper, transform="none")
        (update,) = kernel.adam_update_([low], moments, [state["step"]], hyper, self.eps_inside, finite)
        (growth,) = kernel.adam_update_([radial], lengths, [same_step], plain, self.eps_inside, finite)
        return update, growth


@dataclass(frozen=True)
class Apollo(Adam):
    """APOLLO: the gradient itself, with every channel as long as Adam's step in the subspace would make it.

    N = Adam(R); s = ‖N‖/‖R‖ along the projected dimension: one factor for each row (right) or column (left);
    S = G ∘ s; S ← S / max(‖S‖/(growth·‖S_previous‖), 1); W ← (1 - lr·λ) W - lr·√scale·S. Nothing is projected back.

    Args:
        scale_type: "channel", or "tensor" for one factor a matrix (APOLLO-Mini). With both sides projected they agree.
        growth: largest ratio of ‖S‖ to that of the step before; None sets no limit.
        least_share: ‖R‖ counts as at least this part of √(r/d)·‖G‖, which a random orthonormal basis sees of G: a
            channel that the basis does not see would otherwise take an enormous step.

    Source: arXiv 2412.05270.
    Deviations: after a zero gradient the limiter goes by the step before it. The published one goes by the zero: its
        steps start again from 1e-8 and grow by 1% each.
    """

    whole_gradient: ClassVar[str] = "APOLLO's update is the gradient itself, rescaled"

    scale_type: Literal["channel", "tensor"] = "channel"
    growth: float | None = 1.01
    least_share: float = 0.5

    def __post_init__(self) -> None:
        where, most, least = type(self).__name__, self.growth, self.least_share
        demand(self.scale_type in ("channel", "tensor"), where, "scale_type", self.scale_type, "one of channel, tensor")
        demand(most is None or (isinstance(most, Real) and most > 0), where, "growth", most, "a number > 0 or None")
        demand(is_number(least) and least >= 0, where, "least_share", least, "a finite number ≥ 0")

    def init(self, plan: Plan) -> State:
        """Adam's moments, and ‖S‖ of the last step (0: there was none)."""
        return super().init(plan) | ({"update_norm": _zeros(plan, ())} if plan.side else {})

    def step_(self, bucket: Bucket, hyper: Hyper, kernel: Kernel) -> None:
        """‖S‖² = Σ s²‖g‖² over the channels g of G, so that S need not be; a dense bucket is plain Adam."""
        plan = bucket.plan
        if plan.side is None:
            super().step_(bucket, hyper, kernel)
            return
        lows = kernel.project(bucket.grads, flat(bucket.bases), plan.side, plan.state_dtype)
        updates = self.update_(bucket, lows, hyper, kernel)
        along = -2 if plan.side == "left" else -1
        columns = (updates, lows, bucket.grads)
        lines = [torch.stack(kernel.line_norms(column, along, plan.state_dtype)) for column in columns]
        channel = {"right": (-1,), "left": (-2,)}.get(plan.side, (-2, -1))
        dims = channel if self.scale_type == "channel" else (-2, -1)
        share = self.least_share * math.sqrt(math.prod(plan.whole.low_shape) / math.prod(plan.whole.matrix))
        axes: tuple[Axes, ...] = (plan.low_axes, plan.low_axes, (0, 1))
        norm = partial(plan.sharding.norm, keepdim=True)
        wanted, seen, whole = (norm(own, carried, dims) for own, carried in zip(lines, axes, strict=True))
        factors = wanted / torch.maximum(seen, whole * share).clamp_(min=_NORM_FLOOR)  # s of every matrix
        self._limit_(factors, norm(factors * lines[-1], axes[-1], (-2, -1)), bucket, hyper)
        own = replace(hyper, scale=self.scale(hyper))
        kernel.apply_(bucket.weights, bucket.grads, [], own, None, factors=factors.unbind())

    def _limit_(self, factors: Tensor, norms: Tensor, bucket: Bucket, hyper: Hyper) -> None:
        """Shorten every S, of the length in `norms`, to what the limit allows; both are (matrices, 1, 1) or wider."""
        if self.growth is None:
            return
        lasts = bucket.slot("update_norm")
        last = torch.stack(lasts).view_as(norms)
        if self.eps_inside:  # the official code corrects the bias after the limiter
            k = torch.stack(bucket.slot("step")).double().view_as(norms)
            norms = norms * ((1 - hyper.betas[0] ** k) / (1 - hyper.betas[1] ** k).sqrt()).to(norms)
        excess = torch.where(last > 0, norms / (self.growth * last), 1).clamp_(min=1)
        factors.div_(excess)
        stepped = norms > 0 if bucket.finite is None else (norms > 0) & bucket.finite.view_as(norms)
        torch._foreach_copy_(lasts, torch.where(stepped, norms / excess, last).flatten().unbind())

    def scale(self, hyper: Hyper) -> float:
        """√scale, as the official code takes it."""
        return super().scale(replace(hyper, scale=math.sqrt(hyper.scale)))


def flat(bases: list[Bases]) -> list[Tensor]:
    """Bases as the kernels take them: all the first ones, then all the second ones."""
    return [basis for column in zip(*bases, strict=True) for basis in column]


def _batches(tensors: list[Tensor]) -> Iterator[slice]:
    """Of tensors of a shape: on a CPU one at a time, as they are large beside what a call costs."""
    at_once = 1 if tensors[0].is_cpu else max(1, _AT_ONCE // max(1, tensors[0].numel()))
    return (slice(begin, begin + at_once) for begin in range(0, len(tensors), at_once))


def carried(moment: Tensor, change: Change, side: Side | None) -> Tensor:
    """A moment in the new basis: right M c, left cᵀ M, both c_leftᵀ M c_right."""
    if side in ("left", "both"):
        moment = change[0].mT @ moment
    return moment @ change[-1] if side in ("right", "both") else moment


def _carry_project_aware_(state: State, change: Change, side: Side | None, betas: tuple[float, float]) -> None:
    """LDAdam: V holds E[R²] = variance + mean²; only the mean rotates exactly, the variance mixes by c∘c."""
    m, v, k = state["exp_avg"], state["exp_avg_sq"], float(state["step"])
    if k == 0:
        return
    correction1, correction2 = 1 - betas[0] ** k, 1 - betas[1] ** k
    variance = v / correction2 - (m / correction1).square()
    m.copy_(carried(m, change, side))
    mixed = carried(variance, tuple(c.square() for c in change), side)
    v.copy_(mixed.add_((m / correction1).square()).mul_(correction2).abs_())


def _count_(bucket: Bucket) -> None:
    """Step counts advance, but those of what is left alone."""
    steps = bucket.slot("step")
    torch._foreach_add_(steps, 1 if bucket.finite is None else list(bucket.finite.to(steps[0].dtype).unbind()))


def _zeros(plan: Plan, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=plan.state_dtype, device=plan.device)
