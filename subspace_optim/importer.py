"""Reading the optimizer state of other packages: moments, step counts and bases become ours, and training goes on."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import distributed, storage
from .engine import SubspaceOptimizer
from .projectors import UNSET, Projector
from .rules import Adam, Apollo, carried
from .state import name_in, plan_for
from .types import Bases, Plan, State, stack_states, unstack_state

SOURCES = ("auto", "galore_torch", "bitsandbytes", "torch")
_NESTED = "__bnb_optimizer_quant_state__"  # where bitsandbytes ≥ 0.46 hides its tensors from FSDP
_BLOCKS = (256, 2048)  # elements to a scale, in bitsandbytes ≥ 0.44 and before
_PROJECTOR = "galore_torch.galore_projector.GaLoreProjector"


class _Projector:
    """Stands in for galore_torch's class when a checkpoint is read: attributes, and no code."""


def import_checkpoint(
    optimizer: SubspaceOptimizer,
    checkpoint: str | PathLike[str] | Mapping[str, Any],
    source: str = "auto",
    *,
    names: Sequence[str] | None = None,
    weights_only: bool = True,
) -> None:
    """Continue from the optimizer state of another package: its moments, step counts and, from galore_torch, bases.

    What is projected here and was dense there starts in the singular subspace of its first moment M (a random
    projection: in its own basis): M is projected and V follows as V (Q∘Q), as the variances of independent entries
    would. Hyperparameters stay the optimizer's own. Tensors without state there have none here. Sharded parameters
    take their part of what every rank reads.

    Args:
        optimizer: over the same parameters, whose rules keep Adam's moments. Its state, if any, is replaced.
        checkpoint: a file written by torch.save, or a state dict. Parameters are matched by name where both sides have
            names, and otherwise by place: then its groups must be as long as the optimizer's.
        source: galore_torch (GaLoreAdamW, GaLoreAdamW8bit), bitsandbytes (Adam, AdamW, with 8 or 32 bits), torch (Adam,
            AdamW), or auto to tell them by their keys.
        names: of the checkpoint's parameters, group after group, where it has none. For an optimizer that was made over
            model.parameters(): [name for name, _ in model.named_parameters()].
        weights_only: as of torch.load. galore_torch pickles a Python object, so its files need False; even then only
            the fields of that one class are read, and no code of the file's runs.

    Raises:
        ValueError: the checkpoint does not fit the optimizer, is of another source, or needs `weights_only=False`.
            Nothing has been changed then.
    """
    if source not in SOURCES:
        raise ValueError(f"import_checkpoint: source={source!r} must be one of {', '.join(SOURCES)}")
    theirs = checkpoint if isinstance(checkpoint, Mapping) else _read(checkpoint, weights_only)
    if not (isinstance(theirs, Mapping) and {"state", "param_groups"} <= set(theirs)):
        what = f"has {', '.join(map(str, list(theirs)[:6]))}" if isinstance(theirs, Mapping) else f"is {type(theirs)}"
        raise ValueError(
            f"import_checkpoint: an optimizer's state dict has 'state' and 'param_groups', and this {what}; give the "
            "part that is the optimizer's"
        )
    states = {index: {**state.get(_NESTED, {}), **state} for index, state in theirs["state"].items()}
    found = _source(states)
    if source not in ("auto", found):
        raise ValueError(f"import_checkpoint: source='{source}', but the checkpoint is of {found}")
    ours = optimizer.state_dict()
    own = [index for group in ours["param_groups"] for index in group["params"]]
    taken = {}
    for (position, g, i, param), index, their_index in zip(
        optimizer._positions(), own, _order(optimizer, theirs["param_groups"], names), strict=True
    ):
        group = optimizer.param_groups[g]
        if states.get(their_index):
            name, plan = f"import_checkpoint: {name_in(group, i)}", plan_for(param, group).whole
            kept = optimizer._init_state(plan, group, position)
            members = unstack_state(kept, plan.stack) if plan.stack else [kept]
            rule = optimizer.rule if plan.side else optimizer.dense_rule
            if type(rule) not in (Adam, Apollo):
                raise ValueError(f"{name}: {type(rule).__name__} does not keep Adam's moments")
            for j, (member, given) in enumerate(zip(members, _moments(name, plan, states[their_index]), strict=True)):
                _fill_(plan, member, given, optimizer.projector, optimizer._offset(position + j, group))
            taken[index] = stack_states(members) if plan.stack else members[0]
    optimizer.load_state_dict({**ours, "state": taken})


@dataclass(frozen=True, slots=True)
class _Moments:
    """What a peer keeps for one matrix. With bases (as ours are), it is of the low shape, and `age` their steps."""

    step: float
    exp_avg: Tensor
    exp_avg_sq: Tensor
    bases: Bases = ()
    age: int = UNSET


def _read(path: str | PathLike[str], weights_only: bool) -> Mapping[str, Any]:
    allowed: list[Any] = [] if weights_only else [(_Projector, _PROJECTOR)]
    with Path(path).open("rb") as file:
        try:
            with torch.serialization.safe_globals(allowed):
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if weights_only and _PROJECTOR in str(error):
                raise ValueError(
                    f"import_checkpoint: {path} holds galore_torch's projector as a pickled object; pass "
                    "weights_only=False to have its fields read (no other class is, and no code runs)"
                ) from None
            raise
        except Exception as error:  # of whatever kind the bytes lead to
            what = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"import_checkpoint: {path} is no file of torch.save, or a part of one ({what})"
            ) from error


def _source(states: Mapping[Any, State]) -> str:
    """What wrote these states. galore_torch's dense ones look like torch's or bitsandbytes'."""
    keys = {str(key) for state in states.values() for key in state}
    marks = {"galore_torch": "projector", "bitsandbytes": "state1", "torch": "exp_avg_sq"}
    for source, mark in marks.items():
        if mark in keys:
            return source
    raise ValueError(
        f"import_checkpoint: states of {', '.join(sorted(keys)) or 'nothing'} are of none of {', '.join(marks)}"
    )


def _order(optimizer: SubspaceOptimizer, groups: list[dict[str, Any]], names: Sequence[str] | None) -> list[Any]:
    """The checkpoint's index for each of the optimizer's parameters."""
    own = optimizer.param_groups
    indices = [index for group in groups for index in group["params"]]
    if names is None and all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
    if names is not None and len(names) != len(indices):
        raise ValueError(f"import_checkpoint: names has {len(names)} entries for {len(indices)} parameters")
    if names is not None and all("param_names" in group for group in own):
        theirs = dict(zip(names, indices, strict=True))
        wanted = [str(name) for group in own for name in group["param_names"]]
        if set(wanted) != set(theirs):
            raise ValueError(
                f"import_checkpoint: the checkpoint has {len(theirs)} parameters and the optimizer {len(wanted)}; only "
                f"one of them has {', '.join(sorted(set(theirs) ^ set(wanted))[:5])}"
            )
        return [theirs[name] for name in wanted]
    lengths, needed = ([len(group["params"]) for group in entries] for entries in (groups, own))
    if lengths != needed:
        raise ValueError(
            f"import_checkpoint: the checkpoint's groups have {lengths} parameters and the optimizer's {needed}; give "
            "it the groups of the run that wrote it, in their order, or named parameters and `names`"
        )
    return indices


def _moments(name: str, plan: Plan, state: State) -> list[_Moments]:
    """Of every matrix of a tensor."""
    keys = ("state1", "state2") if "state1" in state else ("exp_avg", "exp_avg_sq")
    if not {"step", *keys} <= set(state) or "max_exp_avg_sq" in state:
        raise ValueError(f"{name} has {', '.join(sorted(state))} in the checkpoint: not what AdamW keeps")
    step = float(state["step"])
    first, second = (_decoded(name, state, key) for key in keys)
    if not (0 <= step < math.inf and first.isfinite().all() and second.isfinite().all() and (second >= 0).all()):
        raise ValueError(f"{name} has a moment in the checkpoint that is not finite, or a negative square or step")
    projector = state.get("projector")
    shape = plan.shape if projector is None else plan.low_shape
    if tuple(first.shape) != shape or (projector is not None and plan.side is None):
        raise ValueError(
            f"{name} has moments of shape {tuple(first.shape)} in the checkpoint, and {shape} here; use the model, and "
            "for galore_torch the rank and proj_type, of the run that wrote it"
        )
    if projector is None:
        return [_Moments(step, m, v) for m, v in zip(plan.matrices(first), plan.matrices(second), strict=True)]
    gap = int(projector.update_proj_gap)  # its bases are set before the steps 1, 1 + gap, 1 + 2·gap, …
    return [_Moments(step, first, second, _bases(name, plan, projector.ortho_matrix), (int(step) - 1) % gap + 1)]


def _bases(name: str, plan: Plan, theirs: Any) -> Bases:
    """galore_torch keeps P (m, r) on the left and Qᵀ (r, n) on the right; on both sides a list of them."""
    factors = theirs if isinstance(theirs, list | tuple) else [theirs]
    bases = tuple(f if side == "left" else f.mT for f, side in zip(factors, plan.sides, strict=False))
    if [tuple(basis.shape) for basis in bases] != list(plan.basis_shapes):
        raise ValueError(
            f"{name} has projections of shape {', '.join(str(tuple(f.shape)) for f in factors)} in the checkpoint, "
            f"which is not proj_type of the {plan.side} side and rank {plan.rank}; use those of the run that wrote it"
        )
    return bases


def _decoded(name: str, state: State, key: str) -> Tensor:
    """A moment; bitsandbytes' codes look up a table, in blocks with a scale each."""
    value = distributed.whole(state[key])
    if value.dtype != torch.uint8:
        return value
    number = key[-1]
    table, scales = state.get(f"qmap{number}"), state.get(f"absmax{number}")
    block = next((b for b in _BLOCKS if scales is not None and -(-value.numel() // b) == scales.numel()), None)
    if table is None or scales is None or block is None:
        raise ValueError(f"{name} has 8-bit moments without blocks of {_BLOCKS[0]} or {_BLOCKS[1]} elements")
    spread = scales.repeat_interleave(block)[: value.numel()]
    return (table[value.flatten().long()] * spread).view(value.shape)


def _fill_(plan: Plan, state: State, given: _Moments, projector: Projector | None, offset: int) -> None:
    """Write what a peer kept into a fresh state of ours."""
    first, second = (x.to(plan.device, plan.state_dtype) for x in (given.exp_avg, given.exp_avg_sq))
    bases, age = given.bases, given.age
    if plan.side is not None and not bases:
        assert projector is not None
        if projector.needs_gradient:
            if not first.any():
                return  # there is no subspace to start in
            u, _, vh = torch.linalg.svd(first, full_matrices=False)
            bases = tuple(u[:, : plan.rank] if side == "left" else vh[: plan.rank].mT for side in plan.sides)
            age = offset
        own = bases or projector.bases(plan, [state])[0]
        first, second = carried(first, own, plan.side), carried(second, tuple(q.square() for q in own), plan.side)
    values = {"step": torch.tensor(given.step, device="cpu"), "exp_avg": first, "exp_avg_sq": second}
    values |= dict(zip(plan.basis_keys, bases, strict=True)) if bases else {}
    coded = storage.codecs(plan)
    for key, value in values.items():
        if key in coded:
            coded[key].encode_([value.contiguous()], [state[key]], [state[f"{key}_scale"]])
        else:
            state[key].copy_(value)
    if bases:
        state["age"] = age
