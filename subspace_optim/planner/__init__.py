"""How much memory a training step will take: the step itself, run on tensors that have shapes and no memory.

job       the step that is asked for
tracing   it is run, and the birth and the death of every storage noted
report    what is held at the peak, by category and layer
fitting   settings that make it fit
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import nn

from ..allocation import BITS, RANKS, Choice, choose, spectra_of
from ..hyperparameters import nearest
from ..optimizers import projects
from ..sizes import SIZES, Size, llama_options
from .fitting import fitted
from .job import LAYERWISE, Job, Loss, causal_loss, enable_checkpointing, from_groups, open_groups
from .report import CATEGORIES, MemoryPlan, bytes_of, planned

__all__ = ["CATEGORIES", "MemoryPlan", "bytes_of", "causal_loss", "enable_checkpointing", "plan"]


def plan(
    model: nn.Module | str | Any,
    optimizer: str = "galore",
    *,
    batch: int = 1,
    seq: int | None = None,
    accumulation: int = 1,
    dtype: torch.dtype | str | None = None,
    checkpointing: bool = False,
    layerwise: str = "off",
    gpu: int | float | str | None = None,
    device: str | None = None,
    keep: Iterable[str] = (),
    budget: int | float | str | None = None,
    probe: Callable[[nn.Module], Any] | None = None,
    ranks: Iterable[int] | None = None,
    roles: Mapping[str, float] | None = None,
    loss: Loss | None = None,
    **options: Any,
) -> MemoryPlan:
    """Predict the peak memory of a training step, and say what makes it fit.

    The step is run on tensors without memory: exact for the tensors that torch allocates, not for what libraries
    allocate behind its back. On a GPU the margin stands for those: 0.5 GiB of CUDA context, 96 MiB of workspaces and
    5 % of what comes and goes, which the allocator fragments; every tensor is rounded up to 512 bytes.

    Args:
        model: a module, which is not touched; the name of a LLaMA size (60m, 130m, 350m, 1b, 7b …) or a config of
            transformers, both of which need transformers.
        optimizer: a name that `create` takes.
        batch: sequences in a micro-batch.
        seq: tokens in a sequence; by default what the named size is trained with, or 1024.
        accumulation: micro-batches in an update.
        dtype: of weights and gradients, such as "bfloat16"; by default the model's.
        checkpointing: recompute the activations of every layer of a transformers model.
        layerwise: project gradients within backward: off, hooks or linear, by `project_in_backward(early=True)`.
        gpu: what it is to fit into, such as "24GB" (24·10⁹ bytes).
        device: where it will run, "cuda" or "cpu"; by default cuda if gpu is given.
        keep: settings that may not be changed to make it fit.
        budget: for the optimizer state, such as "2GiB": choose rank and bits of every matrix by integer programming
            (needs scipy), at the least loss Σ w·(energy lost); see `MemoryPlan.param_groups`.
        probe: with a budget: runs a few batches forward and backward on the model, whose gradients' singular values
            then say what a rank loses; by default the energies fall off as 1/k².
        ranks: with a budget: to choose from; 8 to 1024 in powers of two by default.
        roles: with a budget: weights of matrices by a part of their name; q_proj and k_proj count half by default.
        loss: from the model, batch and seq to the loss; by default that of a causal language model.
        **options: of `create`: rank, proj_type, …

    Raises:
        TypeError: the model is neither of these.
        ValueError: an option is out of range, or the budget is below the least possible, which is named.
        ImportError: transformers or scipy is needed and missing.
    """
    for name, value in (("batch", batch), ("seq", seq), ("accumulation", accumulation)):
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise ValueError(f"{name}={value!r} must be an int ≥ 1")
    device = ("cpu" if gpu is None else "cuda") if device is None else device
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r} must be cpu or cuda")
    if layerwise not in LAYERWISE:
        raise ValueError(f"layerwise={layerwise!r} must be one of {', '.join(LAYERWISE)}")
    capacity = None if gpu is None else bytes_of(gpu, "gpu")
    if isinstance(model, str):
        size = _size(model)
        seq = seq or size.seq_len
        if budget is None and projects(optimizer):
            options.setdefault("rank", size.rank)
    job = Job(
        *(_module(model), optimizer, {"lr": 1e-3, **options}, batch, seq or 1024, accumulation, _dtype(dtype)),
        *(checkpointing, layerwise, device, loss or causal_loss),
    )
    if budget is not None:
        if not (projects(optimizer) or optimizer == "grams"):
            raise ValueError(f"budget={budget!r} chooses ranks, and '{optimizer}' projects nothing; leave it out")
        given = [key for key in ("rank", *BITS) if key in options]
        if given:
            raise ValueError(f"budget={budget!r} chooses {', '.join(given)} itself; leave {given[0]} out")
        job = replace(job, choices=_choices(job, bytes_of(budget, "budget"), probe, ranks, roles))
    name = model if isinstance(model, str) else type(job.model).__name__
    found = planned(job, name, capacity)
    return found if found.fits else fitted(job, found, name, frozenset(keep))


def _size(name: str) -> Size:
    if name not in SIZES:
        near = nearest(name, tuple(SIZES))
        raise ValueError(
            f"model={name!r} must be one of {', '.join(SIZES)}" + (f"; did you mean {near}?" if near else "")
        )
    return SIZES[name]


def _module(model: Any) -> nn.Module:
    """The module itself, or one without memory."""
    if isinstance(model, nn.Module):
        return model
    if not isinstance(model, str) and not hasattr(model, "model_type"):
        raise TypeError(f"model must be a module, a size or a config of transformers, not {type(model).__name__}")
    try:
        transformers = import_module("transformers")
    except ImportError as error:
        raise ImportError("a size or a config needs transformers: pip install 'subspace-optim[cli]'") from error
    config = transformers.LlamaConfig(**llama_options(_size(model))) if isinstance(model, str) else model
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config).train()


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype={dtype!r} must be a floating-point type such as 'float32' or 'bfloat16'")
    return found


def _choices(
    job: Job,
    budget: int,
    probe: Callable[[nn.Module], Any] | None,
    ranks: Iterable[int] | None,
    roles: Mapping[str, float] | None,
) -> dict[str, Choice]:
    groups = open_groups(job.model, job.options)
    spectra = None if probe is None else spectra_of(job.model, groups, probe)
    if job.dtype is not None:  # the state of a tensor can depend on its dtype, and never on its values
        groups = [
            {**g, "params": [(n, torch.empty_like(p, dtype=job.dtype, device="meta")) for n, p in g["params"]]}
            for g in groups
        ]
    return choose(
        groups,
        lambda groups: from_groups(job.optimizer, groups, job.options),
        budget,
        spectra=spectra,
        roles=roles,
        ranks=RANKS if ranks is None else tuple(ranks),
    )
