"""The only tables: parametrised tests take their rows from here, so a new optimizer or shape is one row."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from oracles.adamw import AdamWOracle
from oracles.apollo import ApolloOracle
from oracles.flora import FloraOracle
from oracles.galore import GaLoreOracle
from oracles.gradnormlorp import GradNormLoRPOracle, OfficialGradNormLoRPOracle
from oracles.grams import GramsOracle
from oracles.online_subspace_descent import OnlineSubspaceDescentOracle
from oracles.rules import Adafactor, Lion, Momentum

import subspace_optim as so

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Shape:
    """A tensor that is projected to `rank` on every side, or dense where `rank` is None."""

    id: str
    shape: tuple[int, ...]
    rank: int | None = None
    batch_dims: int = 0

    def __str__(self) -> str:
        return self.id

    def settings(self) -> dict[str, int | None]:
        return {"rank": self.rank, "batch_dims": self.batch_dims}

    def matrices(self, x):
        """The same elements as a list of what is stepped for itself: matrices (m, n), or a dense tensor."""
        if self.rank is None:
            return [x]
        return list(x.reshape(-1, self.shape[self.batch_dims], math.prod(self.shape[self.batch_dims + 1 :])))


SHAPES = (
    Shape("tall", (12, 7), 3),
    Shape("wide", (7, 12), 3),
    Shape("square", (8, 8), 3),
    Shape("odd", (13, 5), 2),
    Shape("rank_1", (6, 9), 1),
    Shape("nearly_full", (9, 5), 4),
    Shape("two_rows", (2, 11), 1),
    Shape("conv", (6, 3, 2, 2), 3),
    Shape("experts", (3, 8, 5), 2, batch_dims=1),
)
DENSE_SHAPES = tuple(Shape(f"dense{s}", s) for s in ((), (7,), (1, 9), (2, 2), (6, 4), (3, 2, 2)))


@dataclass(frozen=True)
class Method:
    """An optimizer of the package beside its oracle.

    `optimizer(params, **settings)`, and `oracle(W0, basis=shared, **settings)` for one matrix, where `shared` gives
    the Basis that the package has in force. `settings` go to both; what concerns one alone is bound by `partial`.
    """

    id: str
    optimizer: Callable[..., so.SubspaceOptimizer]
    oracle: Callable[..., Any]
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.id


def without(oracle, *keys):
    """An oracle that has no use for some settings."""
    return lambda W0, **settings: oracle(W0, **{key: s for key, s in settings.items() if key not in keys})


# A large ε shows where it stands; short memories soon forget the start; everything is decayed and scaled.
SETTINGS = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
PROJECTED = SETTINGS | {"update_proj_gap": 4, "scale": 0.5}

grid = partial(partial, so.SubspaceOptimizer)
flora = without(FloraOracle, "eps", "update_proj_gap", "proj_type")
apollo = without(ApolloOracle, "update_proj_gap", "proj_type")

METHODS = (
    Method("galore", so.GaLore, GaLoreOracle),
    Method("galore_exact", partial(so.GaLore, svd="exact"), GaLoreOracle),
    Method("galore_keep", so.GaLore, GaLoreOracle, {"moments": "keep"}),
    Method("galore_project_aware", so.GaLore, GaLoreOracle, {"moments": "project_aware"}),
    Method("galore_grams", so.GaLore, GaLoreOracle, {"transform": "grams"}),
    Method("galore_cautious", so.GaLore, GaLoreOracle, {"transform": "cautious"}),
    Method("galore_lion", partial(so.GaLore, rule=so.Lion()), partial(GaLoreOracle, rule=Lion)),
    Method("galore_momentum", partial(so.GaLore, rule=so.Momentum()), partial(GaLoreOracle, rule=Momentum)),
    Method("galore_adafactor", partial(so.GaLore, rule=so.Adafactor()), partial(GaLoreOracle, rule=Adafactor)),
    Method(
        "adafactor_project_aware",
        partial(so.GaLore, rule=so.Adafactor()),
        partial(GaLoreOracle, rule=Adafactor),
        {"moments": "project_aware"},
    ),
    Method("random_adam", grid(projector=so.RandomProjection()), GaLoreOracle),
    Method("gaussian_adam", grid(projector=so.RandomProjection(kind="gaussian")), GaLoreOracle),
    Method(
        "rademacher_lion",
        grid(projector=so.RandomProjection(kind="rademacher"), rule=so.Lion()),
        partial(GaLoreOracle, rule=Lion),
        {"transform": "cautious"},
    ),
    Method("flora", so.Flora, flora),
    Method("flora_gaussian", partial(so.Flora, kind="gaussian"), flora),
    Method("flora_relative", so.Flora, flora, {"scale_parameter": True}),
    Method("flora_grams", so.Flora, flora, {"transform": "grams"}),
    Method("osd", so.OnlineSubspaceDescent, OnlineSubspaceDescentOracle, {"basis_lr": 0.05}),
    Method(
        "osd_lion",
        partial(so.OnlineSubspaceDescent, rule=so.Lion()),
        partial(OnlineSubspaceDescentOracle, rule=Lion),
        {"basis_lr": 0.05, "transform": "cautious"},
    ),
    Method("gradnormlorp", so.GradNormLoRP, GradNormLoRPOracle),
    Method("gradnormlorp_grams", so.GradNormLoRP, GradNormLoRPOracle, {"transform": "grams"}),
    Method("gradnormlorp_project_aware", so.GradNormLoRP, GradNormLoRPOracle, {"moments": "project_aware"}),
    Method("apollo", so.APOLLO, apollo),
    Method("apollo_mini", so.APOLLO, apollo, {"scale_type": "tensor", "scale": 128.0}),
    Method("grams_projected", so.Grams, partial(GaLoreOracle, transform="grams")),
)

official = {"compat": "official"}
OFFICIAL_METHODS = (
    Method("official_galore", partial(so.GaLore, **official), partial(GaLoreOracle, official=True)),
    Method(
        "official_galore_adafactor",
        partial(so.GaLore, rule=so.Adafactor(), **official),
        partial(GaLoreOracle, rule=partial(Adafactor, official=True), official=True, decay_after=False),
    ),
    Method(
        "official_osd",
        partial(so.OnlineSubspaceDescent, **official),
        partial(OnlineSubspaceDescentOracle, official=True),
    ),
    Method(
        "official_osd_lion",
        partial(so.OnlineSubspaceDescent, rule=so.Lion(), **official),
        partial(OnlineSubspaceDescentOracle, rule=Lion, official=True),
    ),
    Method("official_flora", partial(so.Flora, **official), partial(flora, scale_parameter=True)),
    Method("official_apollo", partial(so.APOLLO, **official), partial(apollo, official=True)),
    Method("official_gradnormlorp", partial(so.GradNormLoRP, **official), OfficialGradNormLoRPOracle),
)

DENSE_METHODS = (
    Method("adamw", so.SubspaceOptimizer, AdamWOracle),
    Method("adamw_grams", so.SubspaceOptimizer, AdamWOracle, {"transform": "grams"}),
    Method("adamw_cautious", so.SubspaceOptimizer, AdamWOracle, {"transform": "cautious"}),
    Method("grams", so.Grams, GramsOracle),
    Method("official_grams", partial(so.Grams, **official), partial(GramsOracle, official=True)),
)

# Coded state and compensated parameters have no oracle of their own: they follow the one of what they store.
STORED_METHODS = (
    Method("galore_8bit", so.GaLore, GaLoreOracle, {"state_bits": 8, "basis_bits": 8}),
    Method("osd_4bit", so.OnlineSubspaceDescent, OnlineSubspaceDescentOracle, {"state_bits": 4, "basis_bits": 4}),
    Method("flora_4bit", so.Flora, flora, {"state_bits": 4, "rounding": "kahan"}),
    Method("gradnormlorp_8bit", so.GradNormLoRP, GradNormLoRPOracle, {"state_bits": 8, "rounding": "kahan"}),
)
