"""What the official codes share and we do otherwise: used by compat="official" alone."""

from __future__ import annotations

from ..rules import Adam

OFFICIAL_ADAM = Adam(decay_after=True, eps_inside=True)


def is_official(compat: str | None) -> bool:
    """Whether the official code is to be reproduced.

    Raises:
        ValueError: `compat` is neither None nor "official".
    """
    if compat not in (None, "official"):
        raise ValueError(f"compat={compat!r} must be None or 'official'")
    return compat == "official"
