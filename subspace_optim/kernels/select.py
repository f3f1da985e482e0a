"""Which implementation of the kernels runs, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from ..types import Plan
from . import reference

# name → (the module, or None; why it cannot step a plan, or None). "auto" takes the first that can.
IMPLS: dict[str, tuple[ModuleType, Callable[[Plan | None], str | None]]] = {
    "reference": (reference, lambda plan: None),
}


def available() -> dict[str, str]:
    """Every kernel backend by name: "available", or the reason why it is not."""
    return {name: reason(None) or "available" for name, (_, reason) in IMPLS.items()}


def resolve(backend: str, plan: Plan) -> ModuleType:
    """The module that steps this plan.

    Args:
        backend: "auto", or a name of IMPLS.
        plan: of the bucket.

    Raises:
        ValueError: the backend does not exist.
        RuntimeError: an explicit choice cannot step this plan; "auto" falls through to the next one instead.
    """
    if backend == "auto":
        return next(module for module, reason in IMPLS.values() if reason(plan) is None)
    if backend not in IMPLS:
        raise ValueError(f"backend='{backend}' does not exist; choose one of auto, {', '.join(IMPLS)}")
    module, reason = IMPLS[backend]
    why = reason(plan)
    if why is not None:
        raise RuntimeError(f"backend='{backend}' is not available: {why}; backend='auto' would fall back")
    return module
