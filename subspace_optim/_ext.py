"""Finds and loads the native library, and remembers why it could not."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch


@cache
def load() -> str | None:
    """Register the kernels of csrc/ with torch; returns None, or the reason why they are not there."""
    found = sorted(Path(__file__).parent.glob("_C*.so"))
    if not found:
        return "not built: no C++ compiler or no torch headers at install; SSO_BUILD=native makes pip install say which"
    try:
        torch.ops.load_library(found[0])  # type: ignore[no-untyped-call]
        isa()
    except (OSError, RuntimeError, AttributeError) as error:
        return f"{found[0].name} does not load: {str(error).splitlines()[0]}"
    return None


def isa() -> str:
    """The instruction set that the native kernels chose: base, avx2 or avx512; SSO_ISA forces it.

    "_bf16" behind it: the CPU multiplies bfloat16 faster than float32.
    """
    return torch.ops.subspace_optim.isa()
