"""APOLLO: the gradient itself, as long as Adam in a random subspace would make it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..engine import SubspaceOptimizer
from ..hyperparameters import demand
from ..projectors import SVD, Projector, RandomProjection
from ..rules import Apollo
from ..types import Bases, Plan, State
from .compat import OFFICIAL_ADAM, TorchStream, is_official


class APOLLO(SubspaceOptimizer):
    """APOLLO: the gradient itself, every channel as long as Adam's step in a random subspace would make it.

    For W, G (m, n) with m ≥ n, Q (n, r) Gaussian of variance 1/r, regenerated from a seed, drawn anew every
    `update_proj_gap` steps:
        R = G Q; N = Adam(R)                                        (m, r)
        S = diag(‖N_i‖ / ‖R_i‖) G, held to ‖S‖ ≤ growth·‖S_previous‖   (m, n)
        W ← (1 - lr·λ) W - lr·√scale·S
    For m < n the same on the left, by columns. Other tensors take AdamW steps. State: 2r·max(m, n) floats, one more and
    a seed. APOLLO-Mini is rank=1, scale_type="tensor", scale=128.

    Args:
        params: see SubspaceOptimizer.
        lr: learning rate ≥ 0. The paper pretrains with 0.01.
        betas: decay rates of the moments, in [0, 1).
        eps: ε; 1e-8, or 1e-6 under compat="official".
        weight_decay: λ ≥ 0, decoupled.
        rank: r, or a fraction of min(m, n); None is AdamW.
        update_proj_gap: steps between draws.
        scale: α > 0, of which the square root multiplies the step.
        proj_type: which dimension is compressed, see GaLore.
        proj: the basis: "random", or "svd" for the top singular vectors of G, which are stored: r·min(m, n) floats.
        scale_type: one factor for each "channel", or one for the whole "tensor".
        growth: see the rule `Apollo`.
        transform: none, grams or cautious.
        moments: at a new draw: keep, rotate or project_aware. Only their norms are read, which "keep" preserves.
        compat: "official" reproduces apollo_torch, on the same stream of random numbers.
        **options: of SubspaceOptimizer.

    Raises:
        ValueError: a value is out of range, or an option is misspelt.

    Source: arXiv 2412.05270 (github.com/zhuhanqing/APOLLO 76b3472, run for its numbers, not copied).
    Deviations: a zero gradient does not stop the run (see `Apollo`), decay precedes the update, ε stands where torch
        has it, the limiter sees bias-corrected steps; compat="official" undoes all but the first.
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
        scale: float = 1.0,
        proj_type: str = "std",
        proj: Literal["random", "svd"] = "random",
        scale_type: Literal["channel", "tensor"] = "channel",
        growth: float | None = 1.01,
        transform: str = "none",
        moments: str = "keep",
        compat: str | None = None,
        **options: Any,
    ) -> None:
        demand(proj in ("random", "svd"), "APOLLO", "proj", proj, "one of random, svd")
        official = is_official(compat)
        rule = Apollo(scale_type=scale_type, growth=growth)
        if official:
            rule = Apollo(True, True, scale_type, growth, least_share=0.0)
            options = {"dense_rule": OFFICIAL_ADAM, "stagger": False, **options}
            eps = 1e-6 if eps is None else eps
        projector: Projector
        if proj == "svd":
            projector = SVD(rank, update_proj_gap, proj_type, "exact" if official else "subspace")
        else:
            kind = _OfficialRandomProjection if official else RandomProjection
            projector = kind(rank, update_proj_gap, proj_type, "gaussian")
        super().__init__(
            params,
            projector,
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

    def _seed(self, position: int) -> int:
        if isinstance(self.projector, _OfficialRandomProjection):
            return self.seed + position + 1  # apollo_torch counts parameters from one
        return super()._seed(position)


@dataclass(frozen=True)
class _OfficialRandomProjection(TorchStream):
    """apollo_torch's draws: the first for step 1, the next for step 1 + gap."""

    def init(self, plan: Plan, seed: int) -> State:
        return {"age": 0, "seed": seed}

    def draw(self, plan: Plan, seed: int) -> Bases:
        bases = []
        for shape, side in zip(plan.basis_shapes, plan.sides, strict=True):
            generator = torch.Generator(plan.device).manual_seed(seed)
            drawn = shape if side == "left" else shape[::-1]
            sample = torch.randn(drawn, generator=generator, dtype=torch.float32, device=plan.device) / plan.rank**0.5
            bases.append((sample if side == "left" else sample.T).to(plan.state_dtype))
        return tuple(bases)
