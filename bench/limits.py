"""How far a step is from the limit: what it must move and multiply at the least, by what the machine can.

Counted from shapes alone: every tensor is read once, what changes is written once, and of the arithmetic the products
with G and with the basis. What a method does beyond that (a second look at G, temporaries) is distance to the limit.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from subspace_optim.types import BLOCK

Shapes = Iterable[torch.Size | tuple[int, ...]]
DENSE = ("adamw", "grams")


class Work(NamedTuple):
    bytes: float
    flops: float


class Machine(NamedTuple):
    """Measured: bytes and FLOPs a second."""

    bandwidth: float
    rate: float

    def milliseconds(self, work: Work) -> dict[str, float]:
        """The bytes over the bandwidth and the FLOPs over the rate, for a record."""
        return {"bytes_ms": work.bytes / self.bandwidth * 1e3, "flops_ms": work.flops / self.rate * 1e3}


def work(method: str, projected: Shapes, dense: Shapes, rank: int, itemsize: int, bits: int | None = 32) -> Work:
    """Of an ordinary step.

    Args:
        method: by the name that create() has for it.
        projected: shapes of matrices.
        dense: shapes of what Adam steps.
        rank: of the bases.
        itemsize: bytes of an element of parameters and gradients.
        bits: of an element of the moments, blocks with a scale below 16; None: the state has the parameters' type.
    """
    basis = itemsize if bits is None else 4
    moment = basis if bits is None else bits / 8 + (4 / BLOCK if bits < 16 else 0)
    moved = flops = 0.0
    for name, shapes in ((method, projected), ("adamw", dense)):
        for shape in shapes:
            count = torch.Size(shape).numel()
            moments, bases, products = (2 * count, 0, 0) if name in DENSE else _projected(name, *shape, rank)
            moved += 3 * itemsize * count + 2 * moment * moments + basis * bases  # W in and out, G in
            flops += products
    return Work(moved, flops)


def _projected(method: str, m: int, n: int, r: int) -> tuple[int, int, int]:
    """Elements of the moments, elements of the basis that are moved, and FLOPs, of one matrix."""
    long, short = r * max(m, n), r * min(m, n)
    both = 4 * m * n * r  # R = G Q and N Qᵀ
    return {
        "galore": (2 * long, short, both),
        "gradnormlorp": (2 * long + 2 * m, short, both),
        "flora": (long + m + n, 0, both),  # the basis is drawn
        "apollo": (2 * long, 0, both // 2),  # which projects nothing back
        # The basis and its two moments change; Gᵀ(GQ), and two products of (d, r) with (r, 2r).
        "osd": (2 * long + 2 * short, 2 * short, both + 2 * m * n * r + 8 * r * short),
    }[method]
