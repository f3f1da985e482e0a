"""GaLore: Adam in the top singular subspace of the gradient."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from ..engine import SubspaceOptimizer
from ..projectors import SVD
from ..rules import Adafactor, Adam, Rule
from .compat import OFFICIAL_ADAM, is_official


class GaLore(SubspaceOptimizer):
    """GaLore: Adam in the top singular subspace of the gradient.

    For W, G (m, n) with m ≥ n, Q (n, r) the top right singular vectors of G, renewed every `update_proj_gap` steps:
        R = G Q                                        (m, r)
        M ← β₁M + (1-β₁)R;  V ← β₂V + (1-β₂)R²         (m, r)
        N = M̂ / (√V̂ + ε)
        W ← (1 - lr·λ) W - lr·scale·N Qᵀ
    For m < n the same on the left. Other tensors take AdamW steps. State: r(2·max(m, n) + min(m, n)) floats.

    Args:
        params: see SubspaceOptimizer.
        lr: learning rate ≥ 0. The paper pretrains with 0.01 (7B: 0.005).
        betas: decay rates of the moments, in [0, 1).
        eps: ε; 1e-8, or 1e-6 under compat="official".
        weight_decay: λ ≥ 0, decoupled.
        rank: r, or a fraction of min(m, n); None is AdamW.
        update_proj_gap: steps between refreshes of Q.
        scale: α > 0.
        proj_type: which dimension is compressed: std the smaller, reverse_std the larger, left m, right n, full both;
            local the one that is whole on every rank, so that an ordinary step sends no R (unsharded: as std).
        svd: refresh by warm-started "subspace" iteration or "exact" SVD.
        rule: what happens in the subspace; Adam by default.
        transform: none, grams or cautious.
        moments: at a refresh: rotate, keep or project_aware.
        compat: "official" reproduces galore_torch.
        **options: of SubspaceOptimizer.

    Raises:
        ValueError: a value is out of range, or an option is misspelt.

    Source: arXiv 2403.03507 (github.com/jiaweizzhao/GaLore 2cc66f8).
    Deviations: the first moment follows a change of basis, decay precedes the update, ε stands where torch has it,
        refreshes are approximate and staggered; compat="official" undoes all of these. Moments are float32 under
        parameters of half precision, always.
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
        svd: Literal["subspace", "exact"] = "subspace",
        rule: Rule | None = None,
        transform: str = "none",
        moments: str = "rotate",
        compat: str | None = None,
        **options: Any,
    ) -> None:
        rule = Adam() if rule is None else rule
        if is_official(compat):
            svd, moments = "exact", "keep"
            rule = OFFICIAL_ADAM if isinstance(rule, Adam) else rule
            rule = replace(rule, lr_inside=True) if isinstance(rule, Adafactor) else rule
            dense_rule = rule if isinstance(rule, Adafactor) else OFFICIAL_ADAM
            options = {"stagger": False, "dense_rule": dense_rule, **options}
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
