"""What the official codes share and we do otherwise: used by compat="official" alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..projectors import RandomProjection
from ..rules import Adam
from ..types import Bases, Plan

OFFICIAL_ADAM = Adam(decay_after=True, eps_inside=True)


def is_official(compat: str | None) -> bool:
    """Whether the official code is to be reproduced.

    Raises:
        ValueError: `compat` is neither None nor "official".
    """
    if compat not in (None, "official"):
        raise ValueError(f"compat={compat!r} must be None or 'official'")
    return compat == "official"


@dataclass(frozen=True)
class TorchStream(RandomProjection):
    """The seeds of flora_opt and apollo_torch, each the 15th integer of a torch generator with the one before.

    Both draw on the parameter's device, so that CPU and CUDA differ.
    """

    @property
    def keeps(self) -> str:
        """Seeds, of another generator."""
        return f"{super().keeps} of torch's generator"

    def next_seed(self, seed: int) -> int:
        """The seed of the next basis."""
        return int(integers(seed, 15)[-1])

    def generate(self, plan: Plan, seeds: Sequence[int]) -> list[Bases]:
        """The bases of every seed."""
        return [self.draw(plan, seed) for seed in seeds]

    def draw(self, plan: Plan, seed: int) -> Bases:
        """The bases of one seed."""
        raise NotImplementedError


def integers(seed: int, count: int) -> list[int]:
    """The first integers of torch's CPU generator with this seed, in [0, 2⁶³ - 1)."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(0, torch.iinfo(torch.int64).max, (count,), generator=generator, device="cpu").tolist()
