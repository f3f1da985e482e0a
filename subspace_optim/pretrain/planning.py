"""The memory of a run, before it starts: the `plan` command, the plan that `pretrain` prints, and `--fit`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import subspace_optim as so
from subspace_optim.pretrain.config import RunConfig, UserError, flag, path_of, resolve
from subspace_optim.pretrain.display import count, size, write
from subspace_optim.pretrain.files import storage_errors
from subspace_optim.pretrain.model import DTYPES, build_model, summed_loss

# Names of the planner's settings, and of the run's.
SETTINGS = {
    "dtype": "dtype",
    "checkpointing": "gradient_checkpointing",
    "batch": "batch_size",
    "accumulation": "accumulate",
    "layerwise": "layerwise",
    "rank": "rank",
    "embedding_rank": "embedding_rank",
    "state_bits": "state_bits",
    "basis_bits": "basis_bits",
}
CHOSEN = ("rank", "state_bits", "basis_bits")  # by --budget


def plan_run(
    config: RunConfig, vocab_size: int | None = None, *, capacity: int | str | None = None, **more: Any
) -> so.MemoryPlan:
    """The plan of a run.

    Args:
        config: The run.
        vocab_size: Of the tokenizer, where it is known already.
        capacity: What it is to fit into.
        **more: Of ``so.plan``.

    Raises:
        UserError: An option is refused.
    """

    def loss(model: nn.Module, batch: int, seq: int) -> Tensor:
        return summed_loss(model, torch.zeros(batch, seq + 1, dtype=torch.long))

    options = config.optimizer_options
    if more.get("budget") is not None:
        options = {key: value for key, value in options.items() if key not in CHOSEN}
    # Flash attention keeps for the backward pass what sdpa does, and has no kernel for tensors without memory.
    attention = "sdpa" if config.attention == "flash_attention_2" else config.attention
    bare = replace(config, gradient_checkpointing=False, attention=attention)
    with torch.device("meta"):
        model = build_model(bare, vocab_size or config.vocab_size, 0)
    try:
        return so.plan(
            model,
            config.optimizer,
            batch=config.batch_size,
            seq=config.seq_len,
            accumulation=config.accumulate,
            dtype=DTYPES[config.dtype],
            checkpointing=config.gradient_checkpointing,
            layerwise=config.layerwise,
            gpu=capacity,
            device=torch.device(config.device).type,
            loss=loss,
            **options,
            **more,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"--model {config.model}, --optimizer {config.optimizer}: {error}") from error


def fit(given: Mapping[str, Any], capacity: str) -> tuple[dict[str, Any], so.MemoryPlan]:
    """Options with which a run fits into so much memory: those that were given, and what the planner changed.

    Args:
        given: The options that were named, which stay as they are.
        capacity: What it is to fit into, such as 24GB.

    Raises:
        UserError: Nothing that may be changed makes it fit; the message names the least that was found.
    """
    keep = [ours for ours, theirs in SETTINGS.items() if theirs in given]
    if "batch_size" in given or "accumulate" in given:
        keep += ["batch", "accumulation"]
    found = plan_run(resolve(given), capacity=capacity, keep=keep)
    if found.fits:
        return dict(given), found
    if found.fitting is None:
        least = size(found.least or found.peak)
        raise UserError(
            f"--fit {capacity}: the least that --model {given.get('model', 'tiny')} can do with is {least}; "
            "leave more options to the planner, or choose a smaller --model"
        )
    changes = {SETTINGS[key]: value for key, value in found.changes.items()}
    return {**given, **changes}, found


def plan(given: Mapping[str, Any]) -> int:
    """The ``plan`` command.

    Args:
        given: The options that were named, and nothing else.

    Returns:
        The exit code: 0 if it fits, 1 if it does not.

    Raises:
        UserError: An option cannot be used.
    """
    options = dict(given)
    path = path_of("--json", options.pop("json")) if "json" in options else None
    capacity, budget = options.pop("gpu", None), options.pop("budget", None)
    options.setdefault("device", "cpu" if capacity is None else "cuda")
    for key in CHOSEN if budget is not None else ():
        if key in given:
            raise UserError(f"{flag(key)} {given[key]}: --budget {budget} chooses it for every matrix; give one")
    config = resolve(options)
    found = plan_run(config, capacity=capacity, budget=budget)
    write(
        f"{config.model}: {count(found.parameters)} parameters, {config.dtype}, {config.device}, {config.optimizer}; "
        f"{config.accumulate} micro-batches of {config.batch_size} × {config.seq_len} tokens in an update"
    )
    write(found.table())
    if path is not None:
        with storage_errors("--json", path, "choose a file that can be written"):
            found.save(path)
    return 0 if found.fits else 1
