"""What a plan says: bytes by category, layer and phase, whether they fit, and the settings that they are of."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..allocation import Choice
from .job import Job, chosen_groups, open_groups
from .tracing import trace

CATEGORIES = ("weights", "gradients", "moments", "basis", "activations", "workspace", "margin")
CUDA_WORKSPACE = 96 << 20  # cuBLAS keeps up to 32 MiB (Hopper), and the fused kernels take up to 64 at a time
CUDA_CONTEXT = 512 << 20  # what a process takes on a GPU before its first tensor: kernels of torch and cuBLAS
FRAGMENTATION = 0.05  # of what comes and goes; what stays is laid out once
_UNITS = {"": 1, "b": 1} | {f"{p}{u}": b**i for i, p in enumerate("kmgt", 1) for u, b in (("b", 1000), ("ib", 1024))}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([A-Za-z]*)\s*")


def bytes_of(size: int | float | str, name: str = "size") -> int:
    """Bytes that a size names.

    Args:
        size: a number of bytes, or a string such as "24GB" (24·10⁹) or "24GiB" (24·2³⁰).
        name: of the option, for the error.

    Raises:
        ValueError: it is no size above 0.
    """
    found = _SIZE.fullmatch(str(size))
    count = float(found[1]) * _UNITS.get(found[2].lower(), 0) if found else 0.0
    if not (isinstance(size, int | float | str) and 1 <= count < math.inf):
        raise ValueError(f"{name}={size!r} must be a number of bytes above 0, such as '24GB' or '22.5GiB'")
    return int(count)


@dataclass(frozen=True)
class MemoryPlan:
    """What a training step takes, before anything is allocated. Made by `plan`.

    Args:
        settings: what was planned: model, optimizer, rank, dtype, batch, seq, accumulation, checkpointing, device and
            the options of the optimizer.
        parameters: of the model.
        bytes: at the peak, by category: weights, gradients, moments, basis, activations, workspace, margin.
        layers: the same by layer, margin left out; what no layer owns stands under the phase that made it.
        phases: the peak of each phase, without margin: start, forward, backward, step.
        phase: the one that holds the peak.
        projectable: whether `project_in_backward` serves the optimizer.
        ranks: of the matrices of every layer; 0 where one is dense.
        capacity: bytes it is to fit into; None where none was given.
        fitting: where it does not fit, the plan after the cheapest changes that make it fit; None if none do.
        least: where nothing makes it fit, the bytes of the smallest plan that was found.
        choices: rank and bits by matrix, where a budget was given.
    """

    settings: Mapping[str, Any]
    parameters: int
    bytes: Mapping[str, int]
    layers: Mapping[str, Mapping[str, int]]
    phases: Mapping[str, int]
    phase: str
    projectable: bool
    ranks: Mapping[str, tuple[int, ...]]
    capacity: int | None = None
    fitting: MemoryPlan | None = None
    least: int | None = None
    choices: Mapping[str, Choice] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes that it takes, margin included."""
        return sum(self.bytes.values())

    @property
    def allocated(self) -> int:
        """Bytes of tensors at the peak, as an allocator counts them."""
        return self.peak - self.bytes["margin"]

    @property
    def fits(self) -> bool:
        """Whether it fits into the capacity; always, where none was given."""
        return self.capacity is None or self.peak <= self.capacity

    @property
    def changes(self) -> dict[str, Any]:
        """The settings that `fitting` changes, cheapest first."""
        if self.fitting is None:
            return {}
        return {key: value for key, value in self.fitting.settings.items() if value != self.settings.get(key)}

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The model's parameters in groups with the ranks and bits that the budget chose, for the planned optimizer.

        Raises:
            ValueError: the plan has no choices, or they are of another model.
        """
        groups = open_groups(model, self.settings)
        names = {name for group in groups for name, param in group["params"] if param.ndim >= 2}
        if not self.choices or names != set(self.choices):
            raise ValueError(
                "this plan was made without budget=, so no rank was chosen"
                if not self.choices
                else f"the plan is of another model: {sorted(names ^ set(self.choices))[0]} is not in both"
            )
        return chosen_groups(groups, self.choices)

    def verdict(self) -> str:
        """Whether it fits, and if not what to change."""
        if self.capacity is None:
            return f"peak {words(self.peak)}, in the {self.phase} phase"
        room = f"{words(self.peak)} of {words(self.capacity)}"
        if self.fits:
            return f"fits: {room}, {words(self.capacity - self.peak)} to spare"
        if self.fitting is None:
            return f"does not fit: {room}; no change here makes it fit, the least is {words(self.least or self.peak)}"
        changes = ", ".join(f"{key}={value}" for key, value in self.changes.items())
        return f"does not fit: {room}; it does with {changes}: {words(self.fitting.peak)}"

    def table(self) -> str:
        """Bytes by layer and category, how its matrices are stepped, layers of a stack added up, and the verdict."""
        used = [category for category in CATEGORIES if any(row.get(category) for row in self.layers.values())]
        rows: dict[str, Counter[str]] = defaultdict(Counter)
        counts: Counter[str] = Counter()
        ranks: dict[str, set[int]] = defaultdict(set)
        for layer, held in self.layers.items():
            label = re.sub(r"\d+$", "*", layer)
            rows[label].update(held)
            counts[label] += 1
            ranks[label].update(self.ranks.get(layer, ()))
        unit, scale = ("GiB", 2**30) if self.peak >= 2**32 else ("MiB", 2**20)

        def cell(count: int) -> str:
            return f"{count / scale:.2f}"

        lines = [(unit, *used, "total", "matrices")]
        for label, held in rows.items():
            name = f"{counts[label]} × {label}" if counts[label] > 1 else label
            lines.append((name, *(cell(held[c]) for c in used), cell(sum(held.values())), _stepped(ranks[label])))
        if self.bytes["margin"]:
            lines.append(("margin", *("" for _ in used), cell(self.bytes["margin"]), ""))
        lines.append(("peak", *(cell(self.bytes[c]) for c in used), cell(self.peak), ""))
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        cells = ((line[0].ljust(widths[0]), *map(str.rjust, line[1:-1], widths[1:-1]), line[-1]) for line in lines)
        text = ["  ".join(row).rstrip() for row in cells]
        if self.choices:
            taken = Counter(", ".join(f"{k} {v}" for k, v in c.options.items()) for c in self.choices.values())
            text += ["", *(f"{count} matrices: {options}" for options, count in taken.most_common())]
        return "\n".join([*text, self.verdict()])

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain values, as JSON has them."""
        plain = asdict(self)
        plain["fitting"] = None if self.fitting is None else self.fitting.to_dict()
        plain["settings"] = {key: _plain(value) for key, value in self.settings.items()}
        return plain | {"peak": self.peak, "allocated": self.allocated, "fits": self.fits, "changes": self.changes}

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")


def _stepped(ranks: set[int]) -> str:
    projected = sorted(ranks - {0})
    span = [f"rank {' to '.join(map(str, dict.fromkeys((projected[0], projected[-1]))))}"] if projected else []
    return ", ".join(["dense"] * (0 in ranks) + span)


def words(count: int) -> str:
    """A size, to read."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | None) else str(value)


def planned(job: Job, name: str, capacity: int | None, give_up: bool = False) -> MemoryPlan:
    """The plan of a step.

    Args:
        job: the step.
        name: of the model.
        capacity: bytes it is to fit into.
        give_up: where it cannot fit for what is there before the step, plan no more than that.
    """
    fixed = (CUDA_CONTEXT + CUDA_WORKSPACE) * (job.device == "cuda")
    result = trace(job, capacity - fixed if give_up and capacity is not None else math.inf)
    layers: dict[str, dict[str, int]] = defaultdict(dict)
    held = dict.fromkeys(CATEGORIES, 0)
    for (category, layer), count in result.held.items():
        held[category] += count
        layers[layer][category] = count
    if job.device == "cuda":
        moving = held["gradients"] + held["activations"] + held["workspace"]
        held["margin"] = fixed + int(FRAGMENTATION * moving)
    dtype = next(iter(job.model.parameters())).dtype if job.dtype is None else job.dtype
    settings = {
        "model": name,
        "optimizer": job.optimizer,
        **{key: value for key, value in job.options.items() if key not in ("rank", "lr")},
        "dtype": str(dtype).removeprefix("torch."),
        "seq": job.seq,
        "device": job.device,
        "checkpointing": job.checkpointing,
        "layerwise": job.layerwise,
        "batch": job.batch,
        "accumulation": job.accumulation,
        "rank": result.rank,
    }
    return MemoryPlan(
        *(settings, result.parameters, held, dict(layers), result.phases, result.phase, result.projectable),
        ranks=result.ranks,
        capacity=capacity,
        choices=job.choices or {},
    )
