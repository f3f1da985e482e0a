"""Counter-based random numbers: the same seed and counter give the same bits on every device, with no state to keep.

Philox-4x32-10 (Salmon et al., SC 2011), the generator of cuRAND and of `triton.language.rand`, in int64 tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUNDING, _BASIS = 0, 1  # streams: the last counter word
_Word = TypeVar("_Word", int, Tensor)


class Window(NamedTuple):
    """Which elements of a whole tensor a part of it holds: i is number origin + i // columns · pitch + i % columns."""

    origin: int = 0
    columns: int = 1
    pitch: int = 1

    @property
    def consecutive(self) -> bool:
        """Whether they are one run."""
        return self.columns == self.pitch

    def elements(self, count: int, device: torch.device) -> int | Tensor:
        """The first where they are consecutive, otherwise all."""
        if self.consecutive:
            return self.origin
        i = torch.arange(count, device=device)
        return self.origin + i // self.columns * self.pitch + i % self.columns


ALL = Window()


def philox(seed: int | Tensor, c0: Tensor, c1: int | Tensor = 0, c2: int = 0, c3: int = 0) -> Tensor:
    """Four 32-bit words for every counter (c0[i], c1, c2, c3): int64 in [0, 2³²), shape (4, len(c0)).

    A tensor of seeds (count, 1) gives (4, count, len(c0)); a word that is a 0-d tensor is not waited for.
    """
    words = (c.to(c0).expand_as(c0) if isinstance(c, Tensor) else torch.full_like(c0, c) for c in (c1, c2, c3))
    return torch.stack(_rounds(seed, c0, *words))


@lru_cache(maxsize=2**16)
def mix(seed: int, stream: int) -> int:
    """A 63-bit seed for a numbered stream of `seed`: neighbouring numbers give unrelated seeds."""
    low, high, _, _ = _rounds(seed, stream & _MASK, stream >> 32, 0, 0)
    return (high << 32 | low) & 0x7FFFFFFFFFFFFFFF


def _rounds(seed: Any, x0: _Word, x1: _Word, x2: _Word, x3: _Word) -> tuple[_Word, _Word, _Word, _Word]:
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        p0, p2 = x0 * 0xD2511F53, x2 * 0xCD9E8D57  # in int64 products wrap; the low 64 bits are what Philox wants
        x0, x1, x2, x3 = (p2 >> 32) & _MASK ^ x1 ^ k0, p2 & _MASK, (p0 >> 32) & _MASK ^ x3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return x0, x1, x2, x3


def words(seeds: Sequence[int], count: int, device: torch.device) -> Tensor:
    """At least `count` 32-bit words of every seed by blocks of four, int64, (len(seeds), blocks, 4)."""
    counters = torch.arange((count + 3) // 4, device=device)
    return philox(integers(seeds, device).unsqueeze(-1), counters, 0, 0, _BASIS).movedim(0, -1)


def normal(words: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers of every seed's words, float64 (Box–Muller), so that float32 hides the devices' libm."""
    middles = words.double().add_(0.5)
    radius = middles.narrow(-1, 0, 2).mul(2.0**-32).log_().mul_(-2).sqrt_()
    angle = middles.narrow(-1, 2, 2).mul(2 * math.pi * 2.0**-32)
    return _cut(torch.cat((angle.cos().mul_(radius), angle.sin_().mul_(radius)), dim=-1), shape)


def signs(words: Tensor, shape: tuple[int, ...]) -> Tensor:
    """±1 of every seed's words with equal chance, in float64."""
    return _cut((words & 1).mul_(2).sub_(1), shape).double()


def _cut(blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
    """As many numbers of every seed's blocks as the shape has."""
    return blocks.flatten(1)[:, : math.prod(shape)].reshape(len(blocks), *shape)


def integers(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 on a device, which is not waited for: the numbers travel in launches, there is no host buffer to keep."""
    if device.type == "cpu":
        return torch.tensor(values, device=device)
    out = torch.zeros(len(values), dtype=torch.int64, device=device)
    torch._foreach_add_(list(out.unbind()), list(values))
    return out


def uniform(seed: int, step: int | Tensor, begin: int, count: int, device: torch.device) -> Tensor:
    """Numbers in (0, 1) for the elements from `begin` on: the middles of 2¹⁶ equal parts."""
    return _halves(seed, step, begin, count, device).float().add_(0.5).mul_(2.0**-16)


def _halves(seed: int | Tensor, step: int | Tensor, elements: int | Tensor, count: int, device: torch.device) -> Tensor:
    """Half-words of the stream (seed, step), int64, low halves first; element i uses half-word i.

    They are those of `count` elements from one on, or of all that are given.
    """
    if isinstance(elements, Tensor):
        words = philox(seed, elements >> 3, step, 0, _ROUNDING).gather(0, (elements >> 1 & 3).unsqueeze(0))[0]
        return words >> 16 * (elements & 1) & 0xFFFF
    begin = elements
    first, last = begin // 8, (begin + count + 7) // 8
    words = philox(seed, torch.arange(first, last, device=device), step, 0, _ROUNDING).T.reshape(-1)
    return torch.stack((words & 0xFFFF, words >> 16), dim=1).view(-1)[begin - 8 * first :][:count]


def stochastic_round_(
    out: Tensor, value: Tensor, seed: int | Tensor, step: int | Tensor, elements: int | Tensor = 0
) -> None:
    """Write float32 `value` into bfloat16 `out`, up or down with the odds that make the expectation exact.

    Element i uses half-word i of the stream (seed, step): 16 random bits are added below the 16 bits that are kept.

    Args:
        out: bfloat16, any strides.
        value: float32, the shape of `out`; overwritten.
        seed: of the tensor; 0-d where it is a tensor.
        step: of the tensor, so that every step rounds afresh.
        elements: where `out` begins in the tensor of which it is a part, or which of its elements these are.
    """
    value = value.contiguous()
    bits = value.view(torch.int32).view(-1)
    bits.add_(_halves(seed, step, elements, value.numel(), value.device).to(torch.int32)).bitwise_and_(-65536)
    out.copy_(value)
