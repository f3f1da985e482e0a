"""The peers' class names and keys, for code that imports them by name: nothing here is used unless asked for.

from subspace_optim.compat.galore_torch import GaLoreAdamW      # instead of: from galore_torch import GaLoreAdamW

import subspace_optim.compat                                    # or, for a trainer that does the import itself
subspace_optim.compat.install()
"""

from __future__ import annotations

import sys
from typing import Any

from . import apollo_torch, galore_torch

MODULES = {"galore_torch": galore_torch, "apollo_torch": apollo_torch}


def install(*names: str) -> None:
    """Make `import galore_torch` and `import apollo_torch` find this package's classes, in this process.

    Trainers that import the peers by name (transformers' `optim="galore_adamw"`, LLaMA-Factory's `use_galore`) then
    train with this package. Call it before the trainer is made.

    Args:
        *names: galore_torch, apollo_torch; both by default.

    Raises:
        ValueError: a name is neither.
        ImportError: the peer itself has been imported already.
    """
    for name in names:
        if name not in MODULES:
            raise ValueError(f"install: '{name}' must be one of {', '.join(MODULES)}")
    for name in names or MODULES:
        there = sys.modules.get(name)
        if there is not None and there is not MODULES[name]:
            raise ImportError(f"{name} is already imported from {there.__file__}; call install() before that")
    for name in names or MODULES:
        sys.modules[name] = MODULES[name]
        # transformers asks once whether a package is there, and remembers the answer.
        asked: Any = getattr(sys.modules.get("transformers.utils.import_utils"), f"is_{name}_available", None)
        if hasattr(asked, "cache_clear"):
            asked.cache_clear()
