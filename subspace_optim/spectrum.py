"""What training did to a matrix: the spectrum of W - W₀, directions that W₀ did not have, and the change as a LoRA."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .groups import matching, patterns

_RESOLVED = 1e-7  # singular values below this share of the largest are lost in the Gram matrix, even in float64

Weights = nn.Module | Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class LayerSpectrum:
    """How one matrix changed, ΔW = W - W₀ with singular values s; all zero where it did not.

    Args:
        name: of the parameter.
        shape: (m, n); a convolution is (out, all others).
        change: ‖ΔW‖/‖W₀‖.
        r90: the fewest singular directions that hold 90 % of ‖ΔW‖².
        effective_rank: exp of the entropy of s²/Σs²: 1 for one direction, min(m, n) for a flat spectrum.
        stable_rank: Σs²/s₁².
        intruders: of the k leading left singular vectors of W, those with a cosine below `eps` to every one of W₀'s.
        intruder_share: of ‖ΔW‖² that lies along them.
        noise_floor: the largest cosine that a random direction would have. At or above `eps`, a direction that is not
            counted may still be new: the matrix is too small to tell.
    """

    name: str
    shape: tuple[int, int]
    change: float
    r90: int
    effective_rank: float
    stable_rank: float
    intruders: int
    intruder_share: float
    noise_floor: float


def spectral_report(
    model: Weights,
    reference: Weights,
    k: int = 10,
    eps: float = 0.5,
    *,
    target: str | Iterable[str] | None = None,
) -> list[LayerSpectrum]:
    """How every matrix of a model differs from what it was, in float64, one matrix at a time on its own device.

    Full fine-tuning spreads its change over many directions and has no intruders; a LoRA's change has its rank, and
    leading directions that the weights before it did not have, which go with forgetting.

    Args:
        model: the trained weights: a module, or tensors by name.
        reference: the weights before, likewise; a deep copy of the model or its state dict.
        k: leading directions of W that may be intruders, ≥ 1.
        eps: cosine below which a direction is new, in (0, 1).
        target: names to look at, as in `param_groups`; None: every floating-point tensor of two or more dimensions.

    Raises:
        ValueError: k or eps is out of range, a tensor is missing from the reference, has another shape, or is not
            finite.

    Source: arXiv 2410.21228 (intruder dimensions), 2405.09673 (rank of the change).
    """
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"spectral_report: k={k!r} must be a whole number of at least 1")
    if not 0 < eps < 1:
        raise ValueError(f"spectral_report: eps={eps!r} must be in (0, 1)")
    return [_spectrum(name, new, old, k, eps) for name, new, old in _pairs("spectral_report", model, reference, target)]


def _spectrum(name: str, new: Tensor, old: Tensor, k: int, eps: float) -> LayerSpectrum:
    change = new - old
    m, n = change.shape
    energy = torch.linalg.eigvalsh(_gram(change)).flip(0).clamp(min=0)
    total = float(energy.sum())
    floor = math.sqrt(2 * math.log(max(2, min(m, n))) / m)
    if total == 0:
        return LayerSpectrum(name, (m, n), 0.0, 0, 0.0, 0.0, 0, 0.0, floor)
    share = energy / total
    leading, known = _left(new)[:, :k], _left(old)
    cosines = (known.mT @ leading).abs().amax(0) if known.shape[1] else leading.new_zeros(leading.shape[1])
    intruders = leading[:, cosines < eps]
    return LayerSpectrum(
        name=name,
        shape=(m, n),
        change=float(torch.linalg.matrix_norm(change) / torch.linalg.matrix_norm(old)) if known.shape[1] else math.inf,
        r90=int((share.cumsum(0) < 0.9).sum()) + 1,
        effective_rank=math.exp(-float(torch.xlogy(share, share).sum())),
        stable_rank=total / float(energy[0]),
        intruders=intruders.shape[1],
        intruder_share=float((intruders.mT @ change).square().sum()) / total,
        noise_floor=floor,
    )


@dataclass(frozen=True)
class LoRA:
    """A change of weights as low-rank factors, ΔW ≈ B A by module name; from `export_lora`.

    Args:
        factors: (A, B) of every module in float32, (r, in) and (out, r), for y = x(W₀ + B A)ᵀ.
        kept: of every module, the share of ‖ΔW‖² that B A holds.
        left_out: parameters that changed but have no place in a LoRA: embeddings, norms, biases, convolutions.
        fan_in_fan_out: whether the modules keep their weights as (in, out), as GPT-2's do.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    kept: dict[str, float]
    left_out: list[str]
    fan_in_fan_out: bool


def export_lora(model: nn.Module, reference: Weights, rank: int, *, target: str | Iterable[str] | None = None) -> LoRA:
    """The change of every linear layer as the best LoRA of a rank, by truncated SVD; a change of that rank is exact.

    `subspace_optim.integrations.peft.save_adapter` writes it as a folder that `peft` loads.

    Args:
        model: the trained model.
        reference: the weights before: a module, or tensors by name.
        rank: of the factors, ≥ 1.
        target: names of the layers, as in `param_groups`; None: every linear layer that changed.

    Raises:
        ValueError: rank is out of range, a tensor is missing from the reference, has another shape, or is not finite.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"export_lora: rank={rank!r} must be a whole number of at least 1")
    linear, transposed = _linear(model)
    factors, kept = {}, {}
    for name, new, old in _pairs("export_lora", model, reference, target):
        change = new - old
        if name in linear and bool(change.any()):
            module = name.rpartition(".")[0]
            factors[module], kept[module] = _factors(change.mT if transposed else change, rank)
    done = {f"{module}.weight" for module in factors}
    before = _tensors(reference)
    left_out = [
        name
        for name, param in model.named_parameters()
        if name not in done and name in before and not torch.equal(param, before[name].to(param))
    ]
    return LoRA(factors, kept, left_out, transposed)


def _factors(change: Tensor, rank: int) -> tuple[tuple[Tensor, Tensor], float]:
    """(A, B) with the singular values shared between them, zero beyond min(m, n); and the energy kept."""
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    m, n = change.shape
    root, r = s[:rank].sqrt(), min(rank, m, n)
    a, b = change.new_zeros(rank, n), change.new_zeros(m, rank)
    a[:r], b[:, :r] = root[:, None] * vh[:r], u[:, :r] * root
    return (a.float(), b.float()), float(s[:rank].square().sum() / s.square().sum())


def _linear(model: nn.Module) -> tuple[set[str], bool]:
    """Weights of linear layers that are not an embedding's as well, and whether they are kept as (in, out)."""
    modules = dict(model.named_modules())
    embeddings = {id(module.weight) for module in modules.values() if isinstance(module, nn.Embedding)}
    # transformers' Conv1D (GPT-2) is a linear layer with a transposed weight; a model uses the one or the other.
    transposed = any(type(module).__name__ == "Conv1D" for module in modules.values())
    return {
        f"{name}.weight".lstrip(".")
        for name, module in modules.items()
        if (type(module).__name__ == "Conv1D" if transposed else isinstance(module, nn.Linear))
        and id(module.weight) not in embeddings
    }, transposed


def _pairs(
    where: str, model: Weights, reference: Weights, target: str | Iterable[str] | None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, W, W₀) of every matrix, as (m, n) in float64."""
    new, old = _tensors(model), _tensors(reference)
    matrices = [name for name, tensor in new.items() if tensor.ndim >= 2 and tensor.is_floating_point()]
    wanted = patterns(target, "target")
    chosen = set(matrices) if wanted is None else matching(wanted, matrices, "target")
    for name in (name for name in matrices if name in chosen):
        if name not in old:
            raise ValueError(f"{where}: the reference has no {name!r}; give the weights of the same model, or a target")
        if new[name].shape != old[name].shape:
            shapes = f"{tuple(new[name].shape)}, but {tuple(old[name].shape)} in the reference"
            raise ValueError(f"{where}: {name} is {shapes}; give the weights of the same model, or a target")
    for name in (name for name in matrices if name in chosen and new[name].numel()):
        pair = [tensor[name].detach().to(new[name].device, torch.float64).flatten(1) for tensor in (new, old)]
        if not all(bool(matrix.isfinite().all()) for matrix in pair):
            raise ValueError(f"{where}: {name} holds a NaN or an infinity; give weights of a run that went well")
        yield name, pair[0], pair[1]


def _tensors(weights: Weights) -> Mapping[str, Tensor]:
    return dict(weights.named_parameters()) if isinstance(weights, nn.Module) else weights


def _gram(matrix: Tensor) -> Tensor:
    """The smaller of W Wᵀ and Wᵀ W."""
    m, n = matrix.shape
    return matrix @ matrix.mT if m <= n else matrix.mT @ matrix


def _left(matrix: Tensor) -> Tensor:
    """Left singular vectors (m, q) of the singular values that are resolved, the largest first.

    By the eigenvectors of the smaller Gram matrix, in float64: several times faster than an SVD.
    """
    m, n = matrix.shape
    values, vectors = torch.linalg.eigh(_gram(matrix))
    s = values.flip(0).clamp(min=0).sqrt()
    resolved = s > _RESOLVED * s[0]
    vectors, s = vectors.flip(1)[:, resolved], s[resolved]
    return vectors if m <= n else (matrix @ vectors) / s
