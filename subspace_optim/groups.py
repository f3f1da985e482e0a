"""From a model to parameter groups: linear layers and experts projected; embeddings, head and norms dense."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

_HEAD = re.compile(r"(.*\.)?(lm_head|head|classifier|score|embed_out|output_projection)")
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)


def param_groups(
    model: nn.Module,
    rank: int | float | None = 128,
    *,
    target: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    embedding_rank: int | float | None = None,
    dense_lr: float | Tensor | None = None,
    weight_decay: float = 0.0,
    **options: Any,
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into groups for any optimizer of this package.

    Projected are the weights of linear layers, torch's attention among them, and stacked experts (3-D, of what is
    called so), but not the output head, nor a weight tied to an embedding. All else is dense. Vectors (norms, biases)
    are never decayed. Frozen parameters are left out, tied ones appear once.

    Args:
        model: any module.
        rank: of the projected groups; a float in (0, 1) is a fraction of the smaller dimension; None: all dense.
        target: what to project instead: substrings or regular expressions (matched in full) of module or parameter
            names; None or "all-linear" is the default choice. A target may name any tensor of two or more dimensions;
            stacked experts (3-D, not a convolution) are stepped as a batch of matrices.
        exclude: names to leave dense, in the same form.
        embedding_rank: of embeddings and the output head, which are dense without it. Their scale is 1: they step as
            far as the dense tensors do.
        dense_lr: learning rate of what is not the weight of a layer: embeddings, head, vectors; by default that of
            the optimizer. With rank=None as well, where all is dense.
        weight_decay: of every matrix.
        **options: further keys of the projected groups: update_proj_gap, scale, proj_type, …

    Raises:
        TypeError: `model` is not a module.
        ValueError: a pattern matches no trainable tensor, or there is nothing to project.
    """
    if rank is None and embedding_rank is not None:
        raise ValueError(f"embedding_rank={embedding_rank!r} has no meaning where rank=None leaves all dense")
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups needs a torch.nn.Module to read layer names from, not {type(model).__name__}")
    owners = _owners(model)
    matrices = {name: p for name, (_, _, p) in owners.items() if p.ndim >= 2 and not name.endswith("bias")}
    targets, excludes = patterns(target, "target"), patterns(exclude, "exclude")
    if targets is None or targets == ["all-linear"]:
        chosen = _linear(model, owners) | _experts(owners)
    else:
        chosen = matching(targets, matrices, "target")
    excluded = matching(excludes, matrices, "exclude") if excludes else set()
    chosen -= excluded
    layers: set[str] = set()  # which have the optimizer's learning rate though they are dense
    if rank is None:
        layers, chosen = set() if dense_lr is None else chosen, set()
    elif not chosen:
        raise ValueError(f"rank={rank!r}, but {type(model).__name__} has no layer to project; name some with target=…")
    stacked = {name for name in chosen if matrices[name].ndim == 3 and not isinstance(owners[name][1], _CONVOLUTIONS)}

    def group(names: Iterable[str], **keys: Any) -> dict[str, Any]:
        return {"params": [(name, owners[name][2]) for name in names], **keys}

    ends = _ends(model, owners) & set(matrices) - chosen - excluded if embedding_rank is not None else set()
    dense = [name for name in owners if name not in chosen | ends]
    rate = {} if dense_lr is None else {"lr": dense_lr}
    own = {**options, "rank": embedding_rank, "scale": 1.0, "weight_decay": weight_decay, **rate}
    groups = [
        group((n for n in owners if n in chosen - stacked), rank=rank, weight_decay=weight_decay, **options),
        group((n for n in owners if n in stacked), rank=rank, weight_decay=weight_decay, batch_dims=1, **options),
        group((n for n in owners if n in ends), **own),
        group((n for n in dense if n in layers), rank=None, weight_decay=weight_decay),
        group((n for n in dense if n in set(matrices) - layers), rank=None, weight_decay=weight_decay, **rate),
        group((n for n in dense if n not in matrices), rank=None, weight_decay=0.0, **rate),
    ]
    return [entry for entry in groups if entry["params"]]


def _owners(model: nn.Module) -> dict[str, tuple[str, nn.Module, Tensor]]:
    """Trainable parameters by name, each once: (name of the owning module, the module, the tensor)."""
    seen: set[int] = set()
    owners = {}
    for module_name, module in model.named_modules():
        for own_name, param in module.named_parameters(recurse=False):
            if param.requires_grad and id(param) not in seen:
                seen.add(id(param))
                owners[f"{module_name}.{own_name}".lstrip(".")] = (module_name, module, param)
    return owners


def _linear(model: nn.Module, owners: dict[str, tuple[str, nn.Module, Tensor]]) -> set[str]:
    """The weights of linear layers that are neither the head nor tied to an embedding."""
    # transformers' Conv1D (GPT-2) is a linear layer with a transposed weight.
    linear = {
        name
        for name, (_, module, param) in owners.items()
        if (isinstance(module, nn.Linear | nn.MultiheadAttention) or type(module).__name__ == "Conv1D")
        and param.ndim == 2
    }
    return linear - _ends(model, owners)


def _ends(model: nn.Module, owners: dict[str, tuple[str, nn.Module, Tensor]]) -> set[str]:
    """The matrices of embeddings and of the head."""
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    ids = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} | {id(getattr(head, "weight", None))}
    return {
        name
        for name, (module_name, _, param) in owners.items()
        if param.ndim == 2 and (id(param) in ids or _HEAD.fullmatch(module_name))
    }


def _experts(owners: dict[str, tuple[str, nn.Module, Tensor]]) -> set[str]:
    """Stacks of matrices that are called experts, as in transformers' and torchtitan's mixtures."""
    return {
        name
        for name, (_, module, param) in owners.items()
        if param.ndim == 3
        and not isinstance(module, _CONVOLUTIONS)
        and "expert" in f"{name} {type(module).__name__}".lower()
    }


def patterns(given: str | Iterable[str] | None, option: str) -> list[str] | None:
    """One name or several, as a list; None where nothing is named.

    Raises:
        TypeError: they are no strings.
    """
    if given is None:
        return None
    found = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    if not all(isinstance(pattern, str) for pattern in found):
        raise TypeError(f"{option}={given!r} must be part of a name, or a regular expression, as a string, or several")
    return found


def matching(wanted: list[str], names: Iterable[str], option: str) -> set[str]:
    """The names that contain one of the patterns, or that match it in full, with or without their last part.

    Raises:
        ValueError: one of them is not a regular expression, or matches nothing.
    """
    names, found = list(names), set()
    for pattern in wanted:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{option}={pattern!r} is not a regular expression: {error}") from None
        hits = {
            name
            for name in names
            if pattern in name or regex.fullmatch(name) or regex.fullmatch(name.rpartition(".")[0])
        }
        if not hits:
            words = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
            near = difflib.get_close_matches(pattern, words, n=1, cutoff=0.5) or words[:6]
            raise ValueError(
                f"{option}={pattern!r} matches no trainable tensor of two or more dimensions; "
                f"names here contain {', '.join(near)}"
            )
        found |= hits
    return found
