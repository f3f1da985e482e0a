"""Flora: Adafactor whose momentum is kept in a random subspace that is drawn anew every so often."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..engine import SubspaceOptimizer
from ..projectors import RandomProjection
from ..rules import CompressedAdafactor
from ..types import Bases, Plan
from .compat import TorchStream, integers, is_official


class Flora(SubspaceOptimizer):
    """Flora: Adafactor whose momentum is kept in a random subspace that is drawn anew every so often.

    For W, G (m, n) with m ≥ n, A (n, r) orthonormal, regenerated from a seed:
        U = G / √V̂, V̂ from the row and column means of G²          (m, n)
        D = (1-β₁)U + β₁·C Aᵀ                                      (m, n)
        C ← β₁C + (1-β₁)U A                                        (m, r)
        W ← (1 - lr·λ) W - lr·scale·D / max(1, RMS(D))
    Every `update_proj_gap` steps A' is drawn and C ← C AᵀA' before its update. For m < n the same on the left. Other
    tensors take AdamW steps. State: r·max(m, n) + m + n floats and a seed.

    Args:
        params: see SubspaceOptimizer.
        lr: learning rate ≥ 0.
        betas: β₁ of the momentum, in [0, 1); the second is AdamW's, for dense tensors.
        eps: of the dense tensors' AdamW.
        weight_decay: λ ≥ 0, decoupled.
        rank: r, or a fraction of min(m, n); None is AdamW.
        update_proj_gap: κ, steps between draws.
        scale: α > 0.
        proj_type: which dimension is compressed, see GaLore.
        kind: orthonormal, gaussian or rademacher. The latter two inflate the momentum by √((d+r+1)/r) at every draw.
        decay_rate: c in β₂(k) = 1 - k⁻ᶜ.
        clip_threshold: largest root mean square of D.
        scale_parameter: multiply lr by max(1e-3, RMS(W)).
        compat: "official" reproduces flora_opt's torch optimizer with `beta1` set.
        **options: of SubspaceOptimizer.

    Raises:
        ValueError: a value is out of range, or an option is misspelt.

    Source: arXiv 2402.03293 (github.com/BorealisAI/flora-opt f329bbc, read for its numbers, not copied).
    Deviations: orthonormal bases, between which the momentum can only shrink (Gaussian ones diverge for a small gap);
        no relative step size, so that one lr suits dense tensors too; dense tensors take AdamW steps.
        compat="official" undoes all of these.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | float | None = 128,
        update_proj_gap: int = 1000,
        scale: float = 1.0,
        proj_type: str = "std",
        kind: Literal["orthonormal", "gaussian", "rademacher"] = "orthonormal",
        decay_rate: float = 0.8,
        clip_threshold: float = 1.0,
        scale_parameter: bool = False,
        compat: str | None = None,
        **options: Any,
    ) -> None:
        projector = RandomProjection(rank, update_proj_gap, proj_type, kind)
        rule = CompressedAdafactor(
            decay_rate=decay_rate, clip_threshold=clip_threshold, scale_parameter=scale_parameter
        )
        if is_official(compat):
            projector = _OfficialRandomProjection(rank, update_proj_gap, proj_type, "gaussian")
            rule = CompressedAdafactor(decay_rate=decay_rate, clip_threshold=clip_threshold, scale_parameter=True)
            options = {"dense_rule": rule, "stagger": False, **options}
        super().__init__(
            params,
            projector,
            rule,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            scale=scale,
            **options,
        )

    def _seed(self, position: int) -> int:
        if isinstance(self.projector, _OfficialRandomProjection):
            return self.seed + position + 1  # flora_opt counts parameters from one
        return super()._seed(position)


@dataclass(frozen=True)
class _OfficialRandomProjection(TorchStream):
    """flora_opt's draws: a seed splits into one for each side."""

    def draw(self, plan: Plan, seed: int) -> Bases:
        bases = []
        for shape, side in zip(plan.basis_shapes, plan.sides, strict=True):
            generator = torch.Generator(plan.device).manual_seed(integers(seed, 2)[0 if side == "left" else 1])
            drawn = shape[::-1] if side == "left" else shape
            sample = torch.randn(drawn, generator=generator, dtype=torch.float32, device=plan.device) / plan.rank**0.5
            bases.append((sample.T if side == "left" else sample).to(plan.state_dtype))
        return tuple(bases)
