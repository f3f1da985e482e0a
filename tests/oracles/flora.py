"""Flora (2402.03293): Adafactor whose momentum is kept under a random projection, drawn anew every κ steps."""

import numpy as np

from .rules import FactoredSecondMoment, rms, transform
from .subspace import Basis


class FloraOracle:
    """`basis(G, k)` returns the Basis of step k = 1, 2, …, a new object at each refresh (k = κ, 2κ, …).

    Ours are orthonormal, so that the transfer down(up(C)) is C A_oldᵀA_new; the official ones are N(0, 1/r), see
    golden.py. Official code also has `scale_parameter=True`; nothing else differs.
    """

    def __init__(
        self, W0, *, lr, basis, betas=(0.9, 0.999), decay=0.8, clip=1.0, weight_decay=0.0, scale=1.0, transform="none",
        scale_parameter=False,
    ):  # fmt: skip
        self.W = np.array(W0, float)
        self.lr, self.beta1, self.clip = lr, betas[0], clip
        self.weight_decay, self.scale, self.transform = weight_decay, scale, transform
        self.scale_parameter = scale_parameter
        self.second = FactoredSecondMoment(decay)  # of the whole gradient, in its own space
        self.draw = basis
        self.basis: Basis | None = None
        self.C = 0.0
        self.k = 0

    def step(self, G, lr=None):
        self.k += 1
        b1, lr = self.beta1, self.lr if lr is None else lr
        old, self.basis = self.basis, self.draw(G, self.k)
        U = self.second.normalise(G)
        D = (1 - b1) * U
        if old is not None:  # only the history is compressed, and read back before it is transferred
            D += b1 * old.up(self.C)
            self.C = self.C if self.basis is old else self.basis.down(old.up(self.C))
        self.C = b1 * self.C + (1 - b1) * self.basis.down(U)
        D = transform(self.transform, D, G)
        lr *= max(1e-3, rms(self.W)) if self.scale_parameter else 1.0
        self.W *= 1 - lr * self.weight_decay
        self.W -= self.scale * lr * D / max(1.0, rms(D) / self.clip)
