"""What makes a step fit: the settings that save memory, the cheapest first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..allocation import BITS, matrix_plan
from .job import CHECKPOINTING, Job, open_groups
from .report import MemoryPlan, planned

LEAST_RANK = 8  # that a plan is shrunk to
# A rank of a sixteenth of the width, moments at 8 bits and bases at 4 take 1.8 % of the bytes of fp32 AdamW's state, if
# embeddings and head are projected too. Those have three times the rank within 2 %.
SMALL = 16
ENDS = 3


def _changed(job: Job, start: Job, changes: Mapping[str, Any]) -> Job:
    """The job with these settings; a smaller micro-batch is made up for by more of them."""
    fields = {key: value for key, value in changes.items() if key in ("checkpointing", "layerwise", "dtype", "batch")}
    options = {key: value for key, value in changes.items() if key not in fields}
    if "batch" in fields:
        fields["accumulation"] = -(-start.batch * start.accumulation // fields["batch"])
    return replace(job, **fields, options={**job.options, **options})


def _ladder(job: Job, plan: MemoryPlan, keep: frozenset[str]) -> Iterator[dict[str, Any]]:
    """Settings that save memory, the cheapest first: time, then rounding, then what the optimizer sees."""
    rungs: list[dict[str, Any]] = []
    if not job.checkpointing and any(hasattr(job.model, name) for name in CHECKPOINTING):
        rungs.append({"checkpointing": True})
    if job.batch > 1:
        rungs.append({"batch": 1})
    if job.layerwise == "off" and plan.projectable:
        rungs.append({"layerwise": "hooks"})
    bits = {key: job.options.get(key, 32) for key in BITS}
    if not job.choices:
        rungs += [{key: 8} for key, value in bits.items() if value > 8]
    rank = None if job.choices else plan.settings["rank"]
    if rank is not None:
        groups = (group for group in open_groups(job.model, job.options) if group["rank"] is not None)
        width = max(min(matrix_plan(group, p).matrix) for group in groups for _, p in group["params"])
        rank = min(round(rank * width) if isinstance(rank, float) else rank, max(LEAST_RANK, width // SMALL))
        least = {"state_bits": min(bits["state_bits"], 8), "basis_bits": 4}
        rungs.append({**least, "rank": rank, "embedding_rank": ENDS * rank})
    if plan.settings["dtype"] == "float32":
        rungs.append({"dtype": torch.bfloat16})
    while rank is not None and rank > LEAST_RANK:
        rank = max(LEAST_RANK, rank // 2)
        rungs.append({"rank": rank, "embedding_rank": ENDS * rank})
    left = ({key: value for key, value in rung.items() if key not in keep} for rung in rungs)
    return (rung for rung in left if rung)


def _together(rungs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """All of the settings, of one that is met again the later."""
    return {key: value for rung in rungs for key, value in rung.items()}


def fitted(start: Job, found: MemoryPlan, name: str, keep: frozenset[str]) -> MemoryPlan:
    """The plan with what makes it fit: down the ladder until it does, then back whatever was not needed."""
    capacity = found.capacity
    assert capacity is not None

    def attempt(changes: Mapping[str, Any]) -> MemoryPlan | None:
        plan = planned(_changed(start, start, changes), name, capacity, give_up=True)
        return plan if plan.fits else None

    changes: dict[str, Any] = {}
    fitting = None
    taken: list[dict[str, Any]] = []
    for rung in _ladder(start, found, keep):
        taken.append(rung)
        changes |= rung
        fitting = attempt(changes)
        if fitting is not None:
            break
    if fitting is None:
        last = planned(_changed(start, start, changes), name, capacity)
        return replace(found, least=min(found.peak, last.peak))
    for rung in taken[-2::-1]:
        rest = [other for other in taken if other is not rung]
        without = fitting if _together(rest) == _together(taken) else attempt(_together(rest))
        if without is not None:
            taken, fitting = rest, without
    changes = _together(taken)
    batch = changes.get("batch")
    while batch is not None and 2 * batch < start.batch:
        larger = attempt({**changes, "batch": 2 * batch})
        if larger is None:
            break
        batch, fitting = 2 * batch, larger
    return replace(found, fitting=fitting)
