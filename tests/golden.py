"""Golden vectors: what the authors' own code computed (ALGORITHMS.md section 8b), as data.

Each row holds W[0, 0], W[-1, -1] and ‖W‖_F after 3 and after 5 steps on the gradients below, for a 6x4 and a 4x6
matrix. They were printed with six decimals (±5e-7) from fp32 runs (about 1e-7), hence TOLERANCE.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

TOLERANCE = 1e-6
STEPS = (3, 5)
SETTINGS = {"lr": 0.01, "weight_decay": 0.1}
PROJECTION = {"rank": 2, "update_proj_gap": 3, "scale": 0.25}


@dataclass(frozen=True)
class Golden:
    """`gauge_steps`: the steps that depend on the signs which an SVD gave to the vectors of the refresh at t = 3."""

    id: str
    values: dict[tuple[tuple[int, int], int], tuple[float, float, float]]
    settings: dict[str, Any] = field(default_factory=dict)
    gauge_steps: tuple[int, ...] = ()


def row(id: str, tall_3, tall_5, wide_3, wide_5, settings: dict[str, Any], gauge_steps: tuple[int, ...] = ()) -> Golden:
    keys = (((6, 4), 3), ((6, 4), 5), ((4, 6), 3), ((4, 6), 5))
    return Golden(id, dict(zip(keys, (tall_3, tall_5, wide_3, wide_5))), SETTINGS | settings, gauge_steps)


# fmt: off
GOLDEN = {golden.id: golden for golden in (
    row("galore",
        (+0.095279, -0.037161, 0.342704), (+0.096192, -0.038722, 0.343213),
        (+0.090855, +0.021954, 0.340515), (+0.091052, +0.021352, 0.338655),
        PROJECTION, gauge_steps=(5,)),
    row("galore_adafactor",
        (+0.097339, -0.035933, 0.341281), (+0.097483, -0.036399, 0.340932),
        (+0.096919, +0.021597, 0.338845), (+0.096745, +0.021316, 0.337959),
        PROJECTION, gauge_steps=(5,)),
    row("osd",
        (+0.095310, -0.037113, 0.342772), (+0.095078, -0.037628, 0.342309),
        (+0.090977, +0.021777, 0.340499), (+0.090793, +0.019468, 0.341017),
        PROJECTION | {"update_proj_gap": 20}),
    row("osd_lion",
        (+0.087733, -0.025303, 0.344573), (+0.087548, -0.025243, 0.335149),
        (+0.087753, +0.031772, 0.357269), (+0.087567, +0.011738, 0.361599),
        PROJECTION | {"update_proj_gap": 20}),
    row("flora",
        (+0.096406, -0.035794, 0.342559), (+0.095423, -0.035547, 0.343966),
        (+0.096737, +0.021189, 0.339505), (+0.096565, +0.015947, 0.341619),
        {"lr": 0.05, "rank": 2, "update_proj_gap": 3, "seed": 0, "scale_parameter": True}),
    row("lrwn",
        (+0.095978, -0.035816, 0.348373), (+0.095553, -0.035832, 0.344207),
        (+0.091137, +0.022820, 0.347857), (+0.090850, +0.021855, 0.340986),
        PROJECTION, gauge_steps=(5,)),
    row("grams",
        (+0.080077, -0.039193, 0.342830), (+0.080656, -0.040786, 0.346462),
        (+0.080077, -0.004597, 0.355321), (+0.080656, -0.021750, 0.362788),
        {}),
    row("apollo",
        (+0.071226, -0.025376, 0.396101), (+0.070458, -0.027758, 0.388571),
        (+0.059322, +0.010559, 0.358696), (+0.064932, +0.004723, 0.357914),
        PROJECTION | {"scale": 1.0}),
    row("apollo_mini",
        (-0.135961, -0.198565, 0.904520), (-0.128024, -0.234942, 0.896787),
        (-0.027834, -0.136220, 0.732480), (-0.013539, -0.190843, 0.755163),
        PROJECTION | {"rank": 1, "scale": 128.0, "scale_type": "tensor"}),
)}
# fmt: on


def initial_weight(shape: tuple[int, int]) -> np.ndarray:
    i, j = np.indices(shape)
    return (0.1 * np.cos(1.3 * i * j + i - 0.5 * j + 0.2)).astype(np.float32)


def gradient(shape: tuple[int, int], t: int) -> np.ndarray:
    i, j = np.indices(shape)
    return np.sin(0.7 * (t + 1) * (i + 1) * (j + 2) + i - 2 * j).astype(np.float32)


def summary(W: np.ndarray) -> tuple[float, float, float]:
    return W[0, 0], W[-1, -1], np.linalg.norm(W)


def apollo_official_bases(shape: tuple[int, int], rank: int, index: int = 0) -> Iterator[np.ndarray]:
    """The (d, r) projections that official APOLLO draws for parameter `index`, first to last.

    Facts of apollo-torch 1.0.3 on CPU, checked by the golden rows. Parameter i, counted over all groups, starts from
    the seed i + 1; the draw is randn in fp32 of shape (m, r) for the left (m < n) and (r, n) for the right, divided by
    √r; at a refresh the seed becomes the 15th integer of its own generator.
    """
    m, n = shape
    seed = index + 1
    while True:
        generator = torch.Generator().manual_seed(seed)
        A = torch.randn((m, rank), generator=generator) if m < n else torch.randn((rank, n), generator=generator).T
        yield (A / rank**0.5).double().numpy()
        seed = _integers(seed, 15)[-1]


def _integers(seed: int, count: int) -> list[int]:
    return torch.randint(0, 2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def flora_official_bases(shape: tuple[int, int], rank: int, seed: int, index: int = 0) -> Iterator[np.ndarray]:
    """The (d, r) projections A that official Flora draws for parameter `index`, first to last.

    Facts of flora-opt f329bbc on CPU, checked by the golden row. Every draw is from a fresh torch CPU generator seeded
    with the seed in hand; integers are uniform int64 in [0, 2^63 - 1):
      parameter i, counted over all groups, starts from seed + i + 1;
      a seed splits into its first two integers (left, right): a wide matrix (m < n) uses the left, others the right;
      the draw is randn in fp32, of shape (r, m) for the left and (n, r) for the right, divided by √r;
      at a refresh the seed becomes the 15th integer of its own generator.
    """
    m, n = shape
    seed += index + 1
    while True:
        left, right = _integers(seed, 2)
        if m < n:
            A = torch.randn((rank, m), generator=torch.Generator().manual_seed(left)).T
        else:
            A = torch.randn((n, rank), generator=torch.Generator().manual_seed(right))
        yield (A / rank**0.5).double().numpy()
        seed = _integers(seed, 15)[-1]
