"""What makes a step fit: the settings that save memory, the cheapest first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..allocation import BITS
from .job import CHECKPOINTING, Job
from .report import MemoryPlan, planned

LEAST_RANK = 8  # that a plan is shrunk to


def _changed(job: Job, start: Job, changes: Mapping[str, Any]) -> Job:
    """The job with these settings; a smaller micro-batch is made up for by more of them."""
    fields = {key: value for key, value in changes.items() if key in ("checkpointing", "layerwise", "dtype", "batch")}
    options = {key: value for key, value in changes.items() if key not in fields}
    if "batch" in fields:
        fields["accumulation"] = -(-start.batch * start.accumulation // fields["batch"])
    return replace(job, **fields, options={**job.options, **options})


def _ladder(job: Job, plan: MemoryPlan, keep: frozenset[str]) -> Iterator[tuple[str, Any]]:
    """Settings that save memory, the cheapest first: time, then rounding, then what the optimizer sees."""
    rungs: list[tuple[str, Any]] = []
    if not job.checkpointing and any(hasattr(job.model, name) for name in CHECKPOINTING):
        rungs.append(("checkpointing", True))
    if job.batch > 1:
        rungs.append(("batch", 1))
    if job.layerwise == "off" and plan.projectable:
        rungs.append(("layerwise", "hooks"))
    rungs += [(key, bits) for key, values in BITS.items() for bits in values if bits < job.options.get(key, 32)]
    if plan.settings["dtype"] == "float32":
        rungs.append(("dtype", torch.bfloat16))
    rank = plan.settings["rank"]
    while isinstance(rank, int) and rank > LEAST_RANK and not job.choices:
        rank = max(LEAST_RANK, rank // 2)
        rungs.append(("rank", rank))
    return (rung for rung in rungs if rung[0] not in keep)


def fitted(start: Job, found: MemoryPlan, name: str, keep: frozenset[str]) -> MemoryPlan:
    """The plan with what makes it fit: down the ladder until it does, then back whatever was not needed."""
    capacity = found.capacity
    assert capacity is not None

    def attempt(changes: Mapping[str, Any]) -> MemoryPlan | None:
        plan = planned(_changed(start, start, changes), name, capacity, give_up=True)
        return plan if plan.fits else None

    changes: dict[str, Any] = {}
    fitting = None
    for setting, value in _ladder(start, found, keep):
        changes[setting] = value
        fitting = attempt(changes)
        if fitting is not None:
            break
    if fitting is None:
        last = planned(_changed(start, start, changes), name, capacity)
        return replace(found, least=min(found.peak, last.peak))
    for setting in list(changes)[-2::-1]:
        without = attempt({key: value for key, value in changes.items() if key != setting})
        if without is not None:
            del changes[setting]
            fitting = without
    batch = changes.get("batch")
    while batch is not None and 2 * batch < start.batch:
        larger = attempt({**changes, "batch": 2 * batch})
        if larger is None:
            break
        batch, fitting = 2 * batch, larger
    return replace(found, fitting=fitting)
