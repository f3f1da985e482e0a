"""torchtitan: its container of optimizers, with this package's beside its own. Importing this needs torchtitan.

optimizer = SubspaceOptimizersContainer.Config(
implementation="for-loop",
param_groups=[
ParamGroupConfig(pattern="attention|feed_forward", optimizer_name="galore", optimizer_kwargs={"rank": 256, …}),
ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-3}),
],
)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer

from ..optimizers import OPTIMIZERS


class SubspaceOptimizersContainer(OptimizersContainer):  # type: ignore[misc]  # torchtitan is Any where it is absent
    """torchtitan's OptimizersContainer, in whose groups `optimizer_name` may also be galore, flora, osd, … ."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):  # type: ignore[misc]
        """As torchtitan's."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        return OPTIMIZERS[name] if name in OPTIMIZERS else OptimizersContainer._resolve_optimizer_factory(name)
