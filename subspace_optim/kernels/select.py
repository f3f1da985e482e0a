"""Which implementation of the kernels runs, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from ..storage import Coding, codecs
from ..types import Plan
from . import compiled, native
from .sharded import Sharded


def _on_gpu(name: str, plan: Plan | None) -> str | None:
    """What the module's `supports` says; it is imported only where it could run."""
    if plan is not None and plan.device.type != "cuda":
        return f"it is for CUDA, and the parameter is on {plan.device.type}"
    if not torch.cuda.is_available():
        return "this machine has no CUDA device"
    if name == "triton" and find_spec("triton") is None:
        return "triton is not installed"
    return _module(name).supports(plan)


# module → why it cannot step a plan (without one: any), or None. "auto" takes the first that can.
IMPLS: dict[str, Callable[[Plan | None], str | None]] = {
    "cuda": partial(_on_gpu, "cuda"),
    "triton": partial(_on_gpu, "triton"),
    "native": native.supports,
    "reference": lambda plan: None,
    "compiled": compiled.supports,  # after the one that always can: never "auto", as its first step takes so long
}


def _module(name: str) -> ModuleType:
    return import_module(f".{name}", __package__)


def available() -> dict[str, str]:
    """Every kernel backend by name: "available", with what is worth knowing of it, or the reason why it is not."""
    return {name: reason(None) or f"available{_detail(_module(name))}" for name, reason in IMPLS.items()}


def _detail(module: ModuleType) -> str:
    return f" ({module.detail()})" if hasattr(module, "detail") else ""


def resolve(backend: str, plan: Plan) -> Any:
    """The module that steps this plan, with the reductions that its shards need, on moments as they are kept.

    Args:
        backend: "auto", or a name of IMPLS.
        plan: of the bucket.

    Raises:
        ValueError: the backend does not exist.
        RuntimeError: an explicit choice cannot step this plan; "auto" falls through to the next one instead.
    """
    kernel: Any = _resolve(backend, plan)
    if plan.sharding.axes:
        kernel = Sharded(kernel, plan.sharding)
    return Coding(kernel) if codecs(plan) else kernel


def _resolve(backend: str, plan: Plan) -> ModuleType:
    if backend == "auto":
        return _module(next(name for name, reason in IMPLS.items() if reason(plan) is None))
    if backend not in IMPLS:
        raise ValueError(f"backend='{backend}' does not exist; choose one of auto, {', '.join(IMPLS)}")
    why = IMPLS[backend](plan)
    if why is not None:
        raise RuntimeError(f"backend='{backend}' is not available: {why}; backend='auto' would fall back")
    return _module(backend)
