"""GradNormLoRP: the direction of every row in a subspace, its length learned beside it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..engine import SubspaceOptimizer
from ..projectors import SVD
from ..rules import Kernel, WeightNormAdam
from ..types import Bucket, Hyper, Plan, State
from .compat import OFFICIAL_ADAM, is_official


class GradNormLoRP(SubspaceOptimizer):
    """GradNormLoRP: GaLore on the direction of every row of W, and Adam on the rows' lengths.

    With ρ (m) the row norms, ĝ = rowsum(G ∘ W)/ρ, and Q the top right singular vectors of the tangential gradient:
        R = (G - diag(ĝ/ρ) W) Q                                     (m, r)
        N, n = Adam(R), Adam(ĝ)                                     (m, r), (m)
        W ← (ρ(1 - lr·λ) - lr·n) · rows of (W - lr·scale·N Qᵀ) at length 1
    Only the length decays. A zero row has no direction and takes the plain update. Other tensors take AdamW steps.
    State: GaLore's, and 2m floats.

    Args:
        params: see SubspaceOptimizer.
        lr: learning rate ≥ 0.
        betas: decay rates of the moments, in [0, 1).
        eps: ε; 1e-8, or 1e-6 under compat="official".
        weight_decay: λ ≥ 0, decoupled.
        rank: r, or a fraction of min(m, n); None is AdamW.
        update_proj_gap: steps between refreshes of Q.
        scale: α > 0.
        proj_type: std projects one side; "full" both, as in the paper.
        svd: refresh by warm-started "subspace" iteration or "exact" SVD.
        transform: none, grams or cautious.
        moments: at a refresh: rotate, keep or project_aware.
        compat: "official" reproduces the authors' LowRankWeightNormAdamW, its erased magnitudes and its copy of every
            weight included.
        **options: of SubspaceOptimizer.

    Raises:
        ValueError: a value is out of range, or an option is misspelt.

    Source: arXiv 2412.19616 (code at 66c8e76 read for its behaviour, not copied).
    Deviations: from the paper's code, not from the paper: magnitudes are really learned, the gradient of the
        direction is tangential, no weight is copied, dense tensors are not normalised.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
        weight_decay: float = 0.0,
        *,
        rank: int | float | None = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        svd: Literal["subspace", "exact"] = "subspace",
        transform: str = "none",
        moments: str = "rotate",
        compat: str | None = None,
        **options: Any,
    ) -> None:
        rule = WeightNormAdam()
        if is_official(compat):
            svd, moments, rule = "exact", "keep", _OfficialWeightNormAdam(eps_inside=True)
            options = {"stagger": False, "dense_rule": OFFICIAL_ADAM, **options}
            eps = 1e-6 if eps is None else eps
        super().__init__(
            params,
            SVD(rank, update_proj_gap, proj_type, svd),
            rule,
            transform,
            lr=lr,
            betas=betas,
            eps=1e-8 if eps is None else eps,
            weight_decay=weight_decay,
            scale=scale,
            moments=moments,
            **options,
        )


@dataclass(frozen=True)
class _OfficialWeightNormAdam(WeightNormAdam):
    """The published code: a copy v of W takes GaLore's steps, W = (‖v‖ + Δg)·v'/‖v'‖, and Δg is forgotten at once."""

    skips: ClassVar[bool] = False

    def init(self, plan: Plan) -> State:
        return super().init(plan) | {"direction": torch.zeros(plan.matrix, dtype=plan.state_dtype, device=plan.device)}

    def targets(self, bucket: Bucket) -> list[Tensor]:
        return bucket.grads

    def step_(self, bucket: Bucket, hyper: Hyper, kernel: Kernel) -> None:
        plan, lr = bucket.plan, float(hyper.lr)
        for i, (param, state) in enumerate(zip(bucket.params, bucket.states, strict=True)):
            v, grad = state["direction"], bucket.grads[i].to(plan.state_dtype)
            if state["step"] == 0:
                v.copy_(param)
            norm = plan.sharding.norm(v, (0, 1), (-1,), keepdim=True)
            low = kernel.project([grad], bucket.bases[i], plan.side, plan.state_dtype)
            (radial,) = plan.sharding.sum([(grad * v / norm).sum(-1)], 1)
            update, growth = self.adam_(state, low[0], radial, hyper, kernel)
            decay = 1 - lr * hyper.weight_decay
            v.sub_(kernel.back(update, bucket.bases[i], plan.side), alpha=lr * hyper.scale).mul_(decay)
            length = norm.sub(growth.unsqueeze(-1), alpha=lr).mul_(decay)
            stepped = length * v / plan.sharding.norm(v, (0, 1), (-1,), keepdim=True)
            kernel.write_(bucket.weights.part(slice(i, i + 1)), [stepped])
