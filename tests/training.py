"""A mixture of parameters and an endless stream of gradients, the same numbers in every process."""

from collections.abc import Iterable

import torch
from cases import DENSE_METHODS, METHODS, OFFICIAL_METHODS, PROJECTED, SETTINGS, STORED_METHODS, Method
from torch import Tensor, nn

import subspace_optim as so

RANK = 2
GAP = PROJECTED["update_proj_gap"]
SHAPES = {
    "tall": (12, 7),
    "twin": (12, 7),
    "wide": (7, 12),
    "conv": (6, 3, 2, 2),
    "vector": (9,),
    "experts": (3, 8, 5),
}
ALL_METHODS = METHODS + OFFICIAL_METHODS + DENSE_METHODS + STORED_METHODS

# The five by name, each with what it stores for one (m, n) matrix, m ≥ n, at rank r, in floats (its docstring).
FIVE = {
    "galore": so.GaLore,
    "flora": so.Flora,
    "osd": so.OnlineSubspaceDescent,
    "gradnormlorp": so.GradNormLoRP,
    "grams": so.Grams,
}


def noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(dtype: torch.dtype = torch.float32, names: Iterable[str] = tuple(SHAPES)) -> nn.ParameterDict:
    """A module of parameters, by name."""
    return nn.ParameterDict(
        {name: nn.Parameter(noise(i, SHAPES[name]).to(dtype)) for i, name in enumerate(SHAPES) if name in names}
    )


def groups(params: nn.ParameterDict) -> list[dict]:
    """Named parameters; the stacked experts are a batch of matrices."""
    named = [(name, param) for name, param in params.items() if name != "experts"]
    experts = [("experts", params["experts"])] if "experts" in params else []
    return [{"params": named}] * bool(named) + [{"params": experts, "batch_dims": 1}] * bool(experts)


def build(method: Method, params: nn.ParameterDict, **settings) -> so.SubspaceOptimizer:
    base = SETTINGS if method in DENSE_METHODS else PROJECTED | {"rank": RANK}
    return method.optimizer(groups(params), **(base | method.settings | settings))


def set_gradients(params: nn.ParameterDict, step: int) -> None:
    for name, param in params.items():
        param.grad = noise(1000 * (step + 1) + list(SHAPES).index(name), SHAPES[name]).to(param.dtype)


def train(params: nn.ParameterDict, opt: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        set_gradients(params, step)
        opt.step()
        opt.zero_grad()


def snapshot(params: nn.ParameterDict) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in params.items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), f"{name}: {(a[name] - b[name]).abs().max()}"
