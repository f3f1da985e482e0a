"""Which rank and bits each matrix gets under one budget of bytes for the whole optimizer state.

    minimise  Σ_l w_l · (energy lost at rank r + error of the bits)   subject to   Σ_l bytes_l ≤ B, one option a matrix

by integer programming, as LQ-LoRA (arXiv 2311.12023) does for the bits of weights. Matrices of equal shape, weight and
spectrum are one integer variable an option, which leaves the solver no symmetry to search through.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from . import philox, storage
from .engine import SubspaceOptimizer
from .types import BLOCK, Plan, make_plan

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
ROLES = {"q_proj": 0.5, "k_proj": 0.5}  # low-rank changes of q and k matter least (UniPano)
DECAY = 2.0  # of a gradient's energies s_k² ∝ k^-DECAY where none is measured; 60M at r = 128 loses 0.1 to 1 % so

BITS: dict[str, tuple[int, ...]] = {"state_bits": (32, 8), "basis_bits": (32, 8, 4)}
_KINDS: tuple[tuple[str, storage.Kind], ...] = (
    ("state_bits", "signed"),
    ("state_bits", "unsigned"),
    ("basis_bits", "linear"),
)

Group = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """How one matrix is stepped.

    Attributes:
        options: keys of its group: rank (None: dense), state_bits, basis_bits.
        nbytes: of its optimizer state.
        lost: share of the gradient's energy outside the subspace, plus the error of the bits.
    """

    options: Mapping[str, Any]
    nbytes: int
    lost: float


def choose(
    groups: Sequence[Group],
    make: Callable[[list[Group]], SubspaceOptimizer],
    budget: int,
    *,
    spectra: Mapping[str, Tensor] | None = None,
    roles: Mapping[str, float] | None = None,
    ranks: Sequence[int] = RANKS,
    bits: Mapping[str, Sequence[int]] = BITS,
) -> dict[str, Choice]:
    """A choice for every matrix; vectors count against the budget as they are.

    Args:
        groups: of `param_groups`; the matrices of those without a rank stay dense, and only their bits are chosen.
        make: from groups to the optimizer whose state is counted.
        budget: bytes of all optimizer state.
        spectra: singular values of a gradient by the name of its matrix; without them s_k² ∝ 1/k² is assumed.
        roles: weight of the matrices whose name contains a word; 1 for others. Every weight is times m·n.
        ranks: to choose from; dense is always one of the options.
        bits: values to choose from, of state_bits and of basis_bits.

    Raises:
        ValueError: the budget is below the least that the model can do with, which the message names.
    """
    fixed = 0
    members: dict[Any, list[str]] = defaultdict(list)
    tables: dict[Any, list[Choice]] = {}
    weights: dict[Any, float] = {}
    for group in groups:
        dense = group["rank"] is None
        for name, param in group["params"]:
            if param.ndim < 2:
                fixed += _state_bytes(make, {**group, "params": [param]})
                continue
            role = next((w for word, w in (ROLES if roles is None else roles).items() if word in name), 1.0)
            spectrum = None if spectra is None or dense else spectra[name]
            own = "" if spectrum is None else name
            key = (*param.shape, param.dtype, dense, group.get("batch_dims", 0), role, own)
            members[key].append(name)
            if key not in tables:
                tables[key] = _options(group, param, make, spectrum, () if dense else ranks, bits)
                weights[key] = role * param.numel()
    keys = list(members)
    least = fixed + sum(len(members[k]) * min(choice.nbytes for choice in tables[k]) for k in keys)
    if budget < least:
        raise ValueError(
            f"budget={budget}: the least that this model's optimizer state can take is {least} bytes "
            f"({least / 2**20:.1f} MiB)"
        )
    total = sum(weights[k] * len(members[k]) for k in keys)
    costs = [[weights[k] / total * choice.lost for choice in tables[k]] for k in keys]
    sizes = [[choice.nbytes for choice in tables[k]] for k in keys]
    taken = solve(costs, sizes, [len(members[k]) for k in keys], budget - fixed)
    chosen = {}
    for key, counts in zip(keys, taken, strict=True):
        names = iter(members[key])
        for choice, count in zip(tables[key], counts, strict=True):
            chosen.update({next(names): choice for _ in range(count)})
    return chosen


def solve(
    costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], counts: Sequence[int], budget: int
) -> list[list[int]]:
    """How many of the `counts[i]` members of class i take each of its options, at least total cost.

    Args:
        costs: of one member under each option.
        sizes: bytes of the same.
        counts: members of each class.
        budget: for the bytes of all; at least the sum of the least ones.

    Raises:
        ImportError: scipy is not installed.
    """
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as error:
        raise ImportError("a budget needs scipy: pip install 'subspace-optim[plan]'") from error

    flat_costs, flat_sizes = (np.array([v for row in table for v in row], dtype=float) for table in (costs, sizes))
    owner = np.repeat(np.arange(len(costs)), [len(row) for row in costs])
    one_each = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    unit = max(1.0, float(flat_sizes.max()))  # the solver's tolerances are absolute
    scale = max(float(flat_costs.max()), 1e-300)
    found = milp(
        flat_costs / scale,
        constraints=[
            LinearConstraint(one_each, counts, counts),
            LinearConstraint(flat_sizes[None] / unit, ub=budget / unit),
        ],
        integrality=np.ones(len(owner)),
        bounds=Bounds(0, np.repeat(counts, [len(row) for row in costs])),
        options={"mip_rel_gap": 1e-6, "time_limit": 60},
    )
    if found.x is None:
        raise RuntimeError(f"scipy.optimize.milp found no allocation: {found.message}")
    whole = iter(np.rint(found.x).astype(int).tolist())
    return [[next(whole) for _ in row] for row in costs]


def _options(
    group: Group,
    param: Tensor,
    make: Callable[[list[Group]], SubspaceOptimizer],
    spectrum: Tensor | None,
    ranks: Sequence[int],
    bits: Mapping[str, Sequence[int]],
) -> list[Choice]:
    """What one matrix could be given; a dense matrix has no basis, so its bits do not matter."""
    smaller = min(matrix_plan(group, param).matrix)
    lost = energy_lost(spectrum, smaller)
    options = []
    for rank, *values in product((None, *(r for r in ranks if r < smaller)), *bits.values()):
        keys: dict[str, Any] = {"rank": rank, **dict(zip(bits, values, strict=True))}
        if rank is None and keys.pop("basis_bits", None) not in (None, bits["basis_bits"][0]):
            continue
        nbytes = _state_bytes(make, {**group, **keys, "params": [param]})
        error = sum(coding_error(kind, keys[key]) for key, kind in _KINDS if key in keys)
        options.append(Choice(keys, nbytes, lost[rank or smaller] + error))
    return options


@lru_cache(maxsize=16)
def coding_error(kind: storage.Kind, bits: int) -> float:
    """Share of the energy of normally distributed numbers (unsigned: of their squares) that a code of `bits` loses."""
    if bits == 32:
        return 0.0
    x = philox.normal(philox.words([0], 64 * BLOCK, torch.device("cpu")), (64, BLOCK))[0].float()
    x = x.square() if kind == "unsigned" else x
    codec = storage.Codec(kind, bits, -1, BLOCK)
    codes, scales = codec.shapes(x.shape)
    kept = [torch.zeros(codes, dtype=torch.uint8, device=x.device)], [torch.zeros(scales, device=x.device)]
    codec.encode_([x], *kept)
    (found,) = codec.decode(*kept, x.dtype)
    return float((found - x).square().sum() / x.square().sum())


def matrix_plan(group: Group, param: Tensor) -> Plan:
    """How the parameter is seen when it is projected at all."""
    return make_plan(tuple(param.shape), param.dtype, param.device, 1, batch_dims=group.get("batch_dims", 0))


def energy_lost(spectrum: Tensor | None, dimension: int) -> list[float]:
    """Share of a gradient's energy outside its leading r singular directions, for r = 0 … dimension.

    Args:
        spectrum: its singular values; None assumes s_k² ∝ k^-2.
        dimension: the smaller one.
    """
    if spectrum is None:
        energy = torch.arange(1, dimension + 1, dtype=torch.float64, device="cpu") ** -DECAY
    else:
        energy = spectrum.double().sort(descending=True).values.square()
    inside = torch.cat((energy.new_zeros(1), energy.cumsum(0))) / energy.sum().clamp(min=1e-300)
    return [*(1 - inside[:-1]).clamp(min=0).tolist(), 0.0]


def _state_bytes(make: Callable[[list[Group]], SubspaceOptimizer], group: Group) -> int:
    """Bytes of the state that the optimizer itself makes for a group, on tensors without memory."""
    params = [nn.Parameter(torch.empty_like(p, device="meta")) for p in group["params"]]
    optimizer = make([{**group, "params": params}])
    optimizer.allocate_state()
    return optimizer.state_bytes()


def spectra_of(model: nn.Module, groups: Iterable[Group], probe: Callable[[nn.Module], Any]) -> dict[str, Tensor]:
    """Singular values of the gradients that a probe leaves behind, which are then cleared.

    Args:
        model: with weights.
        groups: whose projected matrices are looked at.
        probe: runs forward and backward on a few batches.

    Raises:
        ValueError: a matrix got no gradient, or one that is zero or not finite.
    """
    model.zero_grad(set_to_none=True)
    probe(model)
    found = {}
    for group in groups:
        for name, param in group["params"] if group["rank"] is not None else ():
            grad = param.grad
            if grad is None or not bool(grad.isfinite().all()) or not bool(grad.any()):
                raise ValueError(
                    f"probe: it left no finite gradient other than 0 on {name}; run a few batches backward"
                )
            matrices = matrix_plan(group, param).matrices(grad.float())
            found[name] = torch.stack([torch.linalg.svdvals(g).square() for g in matrices]).mean(0).sqrt()
    model.zero_grad(set_to_none=True)
    return found
