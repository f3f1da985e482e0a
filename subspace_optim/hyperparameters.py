"""The keys of a parameter group: their spellings, aliases and ranges, checked before anything is changed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Number, Real
from typing import Any

from torch import Tensor

from .types import BITS, MOMENTS, PROJ_TYPES, ROUNDINGS, TRANSFORMS

ALIASES = {
    "alpha": "scale",
    "projection_type": "proj_type",
    "kappa": "update_proj_gap",
    "rank_fraction": "rank",
}
KEYS = (
    *("lr", "betas", "eps", "weight_decay"),
    *("rank", "update_proj_gap", "scale", "proj_type", "transform", "moments", "batch_dims"),
    *("state_bits", "basis_bits", "rounding"),
)
# Keys that torch, schedulers and frameworks put into groups; "lr_scale" is timm's.
FOREIGN = {"params", "param_names", "names", "dim", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}
FOREIGN |= {"lr_scale", "name"}
HINTS = {"fused", "foreach", "capturable"}  # of speed alone: torch's optimizers take them, the numbers are the same
# What would change the numbers: torch's optimizers have it in their groups, and only this value passes.
FIXED = {"maximize": False, "amsgrad": False, "differentiable": False, "decoupled_weight_decay": True}
FOREIGN |= HINTS | FIXED.keys()
_UNDERSHOOT = -1e-9  # a schedule that ends at 0 may miss it by rounding


def canonical(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Resolve aliases and refuse misspelt keys of ours; keys that resemble none of ours are somebody else's and pass.

    Args:
        options: a parameter group, or keyword arguments.
        where: what to call it in an error.

    Raises:
        ValueError: a key is misspelt, or an alias contradicts its target.
    """
    out: dict[str, Any] = {}
    for key, value in options.items():
        name = ALIASES.get(key, key)
        if name == "stochastic_rounding":
            name, value = "rounding", "stochastic" if value else "nearest"
        if name in out and name in KEYS:
            raise ValueError(f"{where}: '{key}' and '{name}' are two names of one option; keep '{name}'")
        if name not in KEYS and name not in FOREIGN:
            near = nearest(name, (*KEYS, *ALIASES))
            if near:
                raise ValueError(f"{where}: unknown option '{key}'; did you mean '{near}'?")
        out[name] = plain(value)
    return out


def plain(value: Any) -> Any:
    """Numpy's numbers and fractions as Python's, Hydra's lists as tuples, as the default `torch.load` wants."""
    if isinstance(value, Sequence) and not isinstance(value, str | list):
        return tuple(map(plain, value))
    if isinstance(value, Number) and hasattr(value, "item"):
        value = value.item()
    return float(value) if isinstance(value, Real) and not isinstance(value, int | float) else value


def demand(ok: bool, where: str, key: str, value: object, wanted: str) -> None:
    """Refuse an option that is out of range.

    Raises:
        ValueError: names the option, the value and what would do.
    """
    if not ok:
        raise ValueError(f"{where}: {key}={value!r} must be {wanted}")


def nearest(word: str, known: tuple[str, ...]) -> str | None:
    """The known word that `word` was probably meant to be."""
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.7)), None)


def check(group: Mapping[str, Any], where: str) -> None:
    """Refuse values out of range.

    Args:
        group: with every key of KEYS.
        where: what to call it in an error.

    Raises:
        ValueError: names the option, the value and what would do.
    """

    def need(ok: bool, key: str, wanted: str) -> None:
        demand(ok, where, key, group[key], wanted)

    gone = [key for key in KEYS if key not in group]
    if gone:
        raise ValueError(f"{where} has no {', '.join(gone)} any more; every option stays in its group, so set it again")

    lr, rank = group["lr"], group["rank"]
    if isinstance(lr, Tensor):
        need(lr.numel() == 1 and not lr.is_complex(), "lr", "a float or a real tensor of one element")
        lr = float(lr) if lr.device.type == "cpu" else 0.0  # a GPU is not waited for
    need(is_number(lr) and lr >= _UNDERSHOOT, "lr", "a finite number ≥ 0")
    need(are_betas(group["betas"]), "betas", "two numbers in [0, 1)")
    for key in ("eps", "weight_decay"):
        need(is_number(group[key]) and group[key] >= 0, key, "a finite number ≥ 0")
    need(is_number(group["scale"]) and group["scale"] > 0, "scale", "a finite number > 0")
    whole = is_whole(rank) and rank >= 1
    need(
        rank is None or whole or (isinstance(rank, float) and 0 < rank < 1),
        "rank",
        "an int ≥ 1, a float in (0, 1) as a fraction of the smaller dimension, or None for dense AdamW",
    )
    for key, least in (("update_proj_gap", 1), ("batch_dims", 0)):
        need(is_whole(group[key]) and least <= group[key] < 2**63, key, f"an int ≥ {least}, below 2**63")
    for key in FIXED.keys() & set(group):
        coupled = key == "decoupled_weight_decay" and group["weight_decay"] == 0  # of torch's Adam, and without effect
        need(coupled or bool(group[key]) == FIXED[key], key, f"{FIXED[key]}; this optimizer has no other mode")
    for key in ("state_bits", "basis_bits"):
        need(is_whole(group[key]) and group[key] in BITS, key, "32, 8 or 4")
    words = {"proj_type": PROJ_TYPES, "transform": TRANSFORMS, "moments": MOMENTS, "rounding": ROUNDINGS}
    for key, values in words.items():
        need(group[key] in values, key, f"one of {', '.join(values)}")


def are_betas(value: object) -> bool:
    """Whether it is two decay rates."""
    return isinstance(value, tuple | list) and len(value) == 2 and all(is_number(b) and 0 <= b < 1 for b in value)


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object) -> bool:
    """Whether it is an integer."""
    return isinstance(value, Integral) and not isinstance(value, bool)
