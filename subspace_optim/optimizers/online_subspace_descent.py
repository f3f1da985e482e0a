"""Online Subspace Descent: Adam in a subspace that learns from every gradient."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..engine import SubspaceOptimizer
from ..projectors import OnlinePCA
from ..rules import Adam, Rule
from .compat import OFFICIAL_ADAM, is_official


class OnlineSubspaceDescent(SubspaceOptimizer):
    """Online Subspace Descent: GaLore's step, in a basis that follows the gradient by online PCA instead of refreshes.

    After the weights have moved by N Qᵀ, with Ĝ = G/‖G‖ (m, n):
        Q ← Q - basis_lr·(lr_t/lr_peak)·Adam(∇_Q ‖ĜQQᵀ - Ĝ‖²)       (n, r)
    Q starts at the singular subspace of the first gradient. State: r(2·max(m, n) + 3·min(m, n)) floats.

    Args:
        params: see SubspaceOptimizer.
        lr: learning rate ≥ 0. The paper recommends 0.001 for 350M and 1B.
        betas: decay rates of the moments, in [0, 1).
        eps: ε; 1e-8, or 1e-6 under compat="official".
        weight_decay: λ ≥ 0, decoupled, of the weights.
        rank: r, or a fraction of min(m, n); None is AdamW.
        update_proj_gap: T of the official code, which sets basis_lr = 1/T; of no effect otherwise.
        scale: α > 0.
        proj_type: which dimension is compressed, see GaLore.
        basis_lr: step size of the basis at the peak of the schedule. 0.005 is the paper's 5·lr at its lr of 0.001.
        orth_lambda: weight of ‖QᵀQ - I‖² in the basis' loss.
        retract_every: steps between re-orthonormalisations of Q; None for never.
        rule: what happens in the subspace; Adam by default.
        transform: none, grams or cautious.
        compat: "official" reproduces the authors' code.
        **options: of SubspaceOptimizer.

    Raises:
        ValueError: a value is out of range, or an option is misspelt.

    Source: arXiv 2408.12857 (github.com/kyleliang919/Online-Subspace-Descent e694775).
    Deviations: the basis is not decayed, and its rate does not depend on T; a zero gradient leaves it as it is (the
        official code divides by zero). compat="official" undoes the first two.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        weight_decay: float = 0.0,
        *,
        rank: int | float | None = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        basis_lr: float = 0.005,
        orth_lambda: float = 0.0,
        retract_every: int | None = None,
        rule: Rule | None = None,
        transform: str = "none",
        compat: str | None = None,
        **options: Any,
    ) -> None:
        rule = Adam() if rule is None else rule
        projector = OnlinePCA(
            rank, update_proj_gap, proj_type, basis_lr=basis_lr, orth_lambda=orth_lambda, retract_every=retract_every
        )
        if is_official(compat):
            projector = OnlinePCA(
                rank, update_proj_gap, proj_type, "exact", basis_lr=1 / update_proj_gap, basis_weight_decay=0.01
            )
            rule = OFFICIAL_ADAM if isinstance(rule, Adam) else replace(rule, decay_after=True)
            options = {"dense_rule": OFFICIAL_ADAM, "moments": "keep", **options}
            eps = 1e-6 if eps is None else eps
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
            **options,
        )
