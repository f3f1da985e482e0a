"""The training step whose memory is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..allocation import Choice
from ..engine import SubspaceOptimizer
from ..groups import param_groups
from ..optimizers import create, resolve

Loss = Callable[[nn.Module, int, int], Tensor]

CHECKPOINTING = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # transformers 5, and before it
LAYERWISE = ("off", "hooks", "linear")


@dataclass(frozen=True)
class Job:
    """A training step whose memory is asked for."""

    model: nn.Module
    optimizer: str
    options: Mapping[str, Any]  # of create
    batch: int
    seq: int
    accumulation: int
    dtype: torch.dtype | None
    checkpointing: bool
    layerwise: str
    device: str
    loss: Loss

    choices: Mapping[str, Choice] | None = None

    def make(self, model: nn.Module) -> SubspaceOptimizer:
        """The optimizer of the step."""
        if self.choices is None:
            return create(model, self.optimizer, **self.options)
        groups = chosen_groups(open_groups(model, self.options), self.choices)
        return from_groups(self.optimizer, groups, self.options)


_OF_GROUPS = ("rank", "target", "exclude", "embedding_rank", "weight_decay")


def open_groups(model: nn.Module, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups of a model whose ranks and bits are still open: any rank that projects."""
    return param_groups(model, 1, **{key: options[key] for key in _OF_GROUPS[1:] if key in options})


def chosen_groups(groups: Iterable[dict[str, Any]], choices: Mapping[str, Choice]) -> list[dict[str, Any]]:
    """The groups, split by what was chosen for their members."""
    split: dict[Any, dict[str, Any]] = {}
    for index, group in enumerate(groups):
        for name, param in group["params"]:
            options = choices[name].options if name in choices else {}
            entry = split.setdefault((index, *options.items()), {**group, **options, "params": []})
            entry["params"].append((name, param))
    return list(split.values())


def from_groups(name: str, groups: list[dict[str, Any]], options: Mapping[str, Any]) -> SubspaceOptimizer:
    """The optimizer of this name, of these groups."""
    cls, fixed = resolve(name)
    own = {key: value for key, value in options.items() if key not in _OF_GROUPS}
    return cls(groups, **{"lr": 1e-3, **fixed, **own})


def causal_loss(model: nn.Module, batch: int, seq: int) -> Tensor:
    """The cross-entropy of next-token prediction, in float32, as language models are trained.

    Args:
        model: takes `input_ids` and returns logits, or an object that holds them.
        batch: sequences.
        seq: tokens of each.
    """
    ids = torch.zeros(batch, seq + 1, dtype=torch.long, device=next(model.parameters()).device)
    output = model(input_ids=ids[:, :-1])
    logits = getattr(output, "logits", output).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def enable_checkpointing(model: nn.Module) -> None:
    """Have a transformers model recompute the activations of every layer in its backward pass.

    Raises:
        ValueError: it does not know how.
    """
    for name in CHECKPOINTING:
        if hasattr(model, name):
            getattr(model, name)({"use_reentrant": False})
            return
    raise ValueError(
        f"checkpointing=True: {type(model).__name__} is no transformers model, so it must checkpoint by itself "
        "(torch.utils.checkpoint in its forward); leave checkpointing out"
    )
