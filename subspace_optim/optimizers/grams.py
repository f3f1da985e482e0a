"""Grams: the size of Adam's update with the sign of the gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..engine import SubspaceOptimizer
from ..projectors import SVD, Projector
from ..rules import Adam
from .compat import is_official


class Grams(SubspaceOptimizer):
    """Grams: the size of Adam's update with the sign of the gradient, so that a step never ascends.

        M ← β₁M + (1-β₁)G;  V ← β₂V + (1-β₂)G²;  N = |M̂| / (√V̂ + ε)
        W ← (1 - lr·λ) W - lr·sign(G)·N
    With a `rank` the same inside the subspace, sign(R)·N, which keeps ⟨G, update⟩ ≥ 0 exactly.

    Args:
        params: see SubspaceOptimizer.
        lr: learning rate ≥ 0.
        betas: decay rates of the moments, in [0, 1).
        eps: ε; 1e-8, or 1e-6 under compat="official".
        weight_decay: λ ≥ 0, decoupled.
        rank: None for dense, as published; otherwise project as well.
        projector: of the projected tensors; SVD(rank) by default.
        scale: α > 0 of the projected tensors.
        compat: "official" reproduces the authors' code.
        **options: of SubspaceOptimizer.

    Raises:
        ValueError: a value is out of range, or an option is misspelt.

    Source: arXiv 2412.17107 (github.com/Gunale0926/Grams f91a375).
    Deviations: ε stands where torch has it (compat="official" undoes it); the gradient is not overwritten.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
        weight_decay: float = 0.0,
        *,
        rank: int | float | None = None,
        projector: Projector | None = None,
        scale: float = 1.0,
        compat: str | None = None,
        **options: Any,
    ) -> None:
        official = is_official(compat)
        rule = Adam(eps_inside=official)
        super().__init__(
            params,
            SVD(rank) if projector is None else projector,
            rule,
            "grams",
            lr=lr,
            betas=betas,
            eps=(1e-6 if official else 1e-8) if eps is None else eps,
            weight_decay=weight_decay,
            scale=scale,
            **{"dense_rule": rule, **options},
        )
