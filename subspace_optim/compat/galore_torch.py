"""galore_torch's names: groups with `rank` are projected, with update_proj_gap, scale and proj_type; others are dense.

Constructors take the peer's arguments and defaults. The arithmetic is this package's; `compat="official"` gives the
peer's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..optimizers import GaLore
from ..rules import Adafactor

__all__ = ["GaLoreAdafactor", "GaLoreAdamW", "GaLoreAdamW8bit"]


class GaLoreAdamW(GaLore):
    """`GaLore` under galore_torch's name and defaults.

    Args:
        params: groups; one without `rank` is dense.
        lr: learning rate ≥ 0.
        betas: decay rates of the moments, in [0, 1).
        eps: ε.
        weight_decay: λ ≥ 0.
        correct_bias: True; there is no other mode here.
        no_deprecation_warning: no effect.
        **options: of `GaLore`.

    Raises:
        ValueError: a value is out of range or has no counterpart.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        no_deprecation_warning: bool = False,
        **options: Any,
    ) -> None:
        require_as_given("GaLoreAdamW", ("correct_bias", correct_bias, True))
        super().__init__(params, lr, betas, eps, weight_decay, **{"rank": None, **options})


class GaLoreAdamW8bit(GaLore):
    """`GaLore` with 8-bit moments under galore_torch's name; bitsandbytes is not needed.

    Args:
        params: groups; one without `rank` is dense.
        lr: learning rate ≥ 0.
        betas: decay rates of the moments, in [0, 1).
        eps: ε.
        weight_decay: λ ≥ 0. The peer's default is 0.01, for norms and biases too, and no trainer sets it.
        amsgrad: False; there is no other mode here.
        optim_bits: no effect; the moments have 8.
        args: None.
        min_8bit_size: no effect; vectors keep 32 bits.
        percentile_clipping: 100, which is none.
        block_wise: True.
        is_paged: no effect.
        **options: of `GaLore`.

    Raises:
        ValueError: a value is out of range or has no counterpart.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        require_as_given(
            "GaLoreAdamW8bit",
            ("amsgrad", amsgrad, False),
            ("args", args, None),
            ("percentile_clipping", percentile_clipping, 100),
            ("block_wise", block_wise, True),
        )
        super().__init__(params, lr, betas, eps, weight_decay, **{"rank": None, "state_bits": 8, **options})


class GaLoreAdafactor(GaLore):
    """`GaLore` with `Adafactor` inside and for dense tensors, under galore_torch's name and defaults.

    Args:
        params: groups; one without `rank` is dense.
        lr: learning rate ≥ 0; the peer's None is a relative step.
        eps: (1e-30, 1e-3); there are no others here.
        clip_threshold: largest root mean square of one update.
        decay_rate: c in β₂(k) = 1 - kᶜ, negative.
        beta1: of the momentum; None for none.
        weight_decay: λ ≥ 0.
        scale_parameter: multiply lr by max(1e-3, RMS(W)).
        relative_step: False; there is no other mode here.
        warmup_init: False; likewise.
        **options: of `GaLore`.

    Raises:
        ValueError: a value is out of range or has no counterpart.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        **options: Any,
    ) -> None:
        require_as_given(
            "GaLoreAdafactor",
            ("relative_step", relative_step, False),
            ("warmup_init", warmup_init, False),
            ("eps", tuple(eps), (1e-30, 1e-3)),
        )
        if lr is None:
            raise ValueError("GaLoreAdafactor: lr=None asks for a relative step, which is not here; give a number")
        rule = Adafactor(decay_rate=-decay_rate, clip_threshold=clip_threshold, scale_parameter=scale_parameter)
        own = {"rank": None, "rule": rule, "dense_rule": rule}
        super().__init__(params, lr, (beta1 or 0.0, 0.999), weight_decay=weight_decay, **{**own, **options})


def require_as_given(where: str, *options: tuple[str, Any, Any]) -> None:
    """Refuse every (name, value, the only value) that would be ignored."""
    for name, value, only in options:
        if value != only:
            raise ValueError(f"{where}: {name}={value!r} has no counterpart in subspace_optim; it must be {only!r}")
