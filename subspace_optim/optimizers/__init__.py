"""The optimizers by paper name, and `create`, which makes any of them, or any cell of the grid, from a model."""

from __future__ import annotations

import difflib
from typing import Any

from torch import Tensor, nn

from ..engine import SubspaceOptimizer
from ..groups import param_groups
from ..projectors import SVD, OnlinePCA, Projector, RandomProjection
from ..rules import Adafactor, Adam, Lion, Momentum, Rule
from ..types import TRANSFORMS
from .apollo import APOLLO
from .flora import Flora
from .galore import GaLore
from .gradnormlorp import GradNormLoRP
from .grams import Grams
from .online_subspace_descent import OnlineSubspaceDescent

__all__ = ["APOLLO", "OPTIMIZERS", "Flora", "GaLore", "GradNormLoRP", "Grams", "OnlineSubspaceDescent", "create"]

OPTIMIZERS: dict[str, type[SubspaceOptimizer]] = {
    "galore": GaLore,
    "flora": Flora,
    "osd": OnlineSubspaceDescent,
    "gradnormlorp": GradNormLoRP,
    "grams": Grams,
    "apollo": APOLLO,
}
LONG_NAMES = {"online_subspace_descent": "osd"}
PROJECTORS: dict[str, type[Projector] | None] = {
    "none": None,
    "svd": SVD,
    "random": RandomProjection,
    "pca": OnlinePCA,
}
RULES: dict[str, type[Rule]] = {"adam": Adam, "adafactor": Adafactor, "lion": Lion, "momentum": Momentum}
_DEFAULT_RANK = 128


def create(
    model: nn.Module,
    name: str,
    *,
    lr: float | Tensor = 1e-3,
    weight_decay: float = 0.0,
    rank: int | float | str | None = "default",
    target: Any = None,
    exclude: Any = None,
    embedding_rank: int | float | None = None,
    dense_lr: float | Tensor | None = None,
    **options: Any,
) -> SubspaceOptimizer:
    """Make an optimizer for a model, with its parameters in the right groups.

    Args:
        model: any module; see `param_groups` for what is projected.
        name: adamw; galore, flora, osd, gradnormlorp, grams, apollo; or a cell of the grid
            `projector+rule[+transform]`, such as svd+lion or random+adam+cautious. Projectors: none, svd, random, pca.
            Rules: adam, adafactor, lion, momentum. Transforms: none, grams, cautious.
        lr: learning rate ≥ 0.
        weight_decay: λ ≥ 0 of matrices; vectors are never decayed.
        rank: by default 128, and None (dense) for adamw, grams and the projector none.
        target: see `param_groups`.
        exclude: see `param_groups`.
        embedding_rank: see `param_groups`.
        dense_lr: see `param_groups`.
        **options: of the optimizer.

    Raises:
        ValueError: the name or an option does not exist, or a value is out of range.
    """
    key = key_of(name)
    cls, fixed = resolve(name)
    dense = not projects(name)
    if rank == "default":
        rank = None if dense else _DEFAULT_RANK
    if rank is not None and dense and key != "grams":
        raise ValueError(f"rank={rank!r} has no meaning for '{name}', which projects nothing; leave it out")
    chosen = {"target": target, "exclude": exclude, "embedding_rank": embedding_rank, "dense_lr": dense_lr}
    groups = param_groups(model, rank, weight_decay=weight_decay, **chosen)  # type: ignore[arg-type]
    return cls(groups, lr=lr, weight_decay=weight_decay, **fixed, **options)


def resolve(name: str) -> tuple[type[SubspaceOptimizer], dict[str, Any]]:
    """The class behind a name that `create` takes, and the arguments that make it this optimizer.

    Args:
        name: see `create`.

    Raises:
        ValueError: there is no such optimizer.
    """
    key = key_of(name)
    if key in OPTIMIZERS:
        return OPTIMIZERS[key], {}
    if key == "adamw":
        return SubspaceOptimizer, {}
    parts = key.split("+")
    tables: tuple[tuple[str, ...], ...] = (tuple(PROJECTORS), tuple(RULES), TRANSFORMS)
    if not 2 <= len(parts) <= 3:
        known = ("adamw", *OPTIMIZERS, *LONG_NAMES)
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(known)}"
        raise ValueError(f"unknown optimizer '{key}'; {hint} (or projector+rule[+transform], such as svd+lion)")
    for part, table, what in zip(parts, tables, ("projector", "rule", "transform"), strict=False):
        if part not in table:
            raise ValueError(f"unknown {what} '{part}' in '{key}'; choose one of {', '.join(table)}")
    projector = PROJECTORS[parts[0]]
    rule = RULES[parts[1]]()
    return SubspaceOptimizer, {
        "projector": projector() if projector else None,
        "rule": rule,
        "dense_rule": rule if projector is None else None,
        "transform": parts[2] if len(parts) == 3 else "none",
    }


def projects(name: str) -> bool:
    """Whether the optimizer of this name projects where no rank is given."""
    return key_of(name) not in ("adamw", "grams") and not key_of(name).startswith("none+")


def key_of(name: str) -> str:
    """A name that `create` takes, in the one spelling that tables have."""
    if not isinstance(name, str):
        raise TypeError(f"name={name!r} must be a string, one of adamw, {', '.join(OPTIMIZERS)} or projector+rule")
    return LONG_NAMES.get(name.lower(), name.lower())
