"""apollo_torch's names: groups with `rank` take APOLLO steps; others are dense.

Group keys: rank, update_proj_gap, scale, proj_type, and proj and scale_type, which all groups share. `scale_front` is
taken and has no effect: the limiter looks at ratios, in which a constant factor cancels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..optimizers import APOLLO
from ..projectors import SVD
from ..rules import Apollo
from .galore_torch import require_as_given

__all__ = ["APOLLOAdamW"]

_SHARED = {"proj": "random", "scale_type": "channel"}


class APOLLOAdamW(APOLLO):
    """`APOLLO` under apollo_torch's name and defaults; `compat="official"` gives its own arithmetic.

    Args:
        params: groups; one without `rank` is dense.
        lr: learning rate ≥ 0.
        betas: decay rates of the moments, in [0, 1).
        eps: ε.
        weight_decay: λ ≥ 0.
        correct_bias: True; there is no other mode here.
        scale_front: no effect.
        disable_nl: do not limit the growth of steps.
        no_deprecation_warning: no effect.
        **options: of `APOLLO`.

    Raises:
        ValueError: a value is out of range or has no counterpart, or groups differ in proj or scale_type.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        scale_front: bool = False,
        disable_nl: bool = False,
        no_deprecation_warning: bool = True,
        **options: Any,
    ) -> None:
        require_as_given("APOLLOAdamW", ("correct_bias", correct_bias, True))
        entries = [params] if isinstance(params, Tensor) else list(params)
        own: dict[str, Any] = {"rank": None, "growth": None if disable_nl else 1.01, **options}
        for key, default in _SHARED.items():
            given = (group[key] for group in entries if isinstance(group, dict) and key in group)
            own.setdefault(key, next(given, default))
        super().__init__(entries, lr, betas, eps, weight_decay, **own)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the base; a group must agree with the others in proj and scale_type."""
        assert isinstance(self.rule, Apollo)
        own = {"proj": "svd" if isinstance(self.projector, SVD) else "random", "scale_type": self.rule.scale_type}
        for key, value in own.items():
            if param_group.get(key, value) != value:
                raise ValueError(
                    f"APOLLOAdamW: group {len(self.param_groups)} has {key}={param_group[key]!r} and another "
                    f"{value!r}; make one optimizer for each"
                )
        super().add_param_group(param_group)
