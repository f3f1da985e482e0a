"""Flora (2402.03293): Adafactor whose momentum is kept under a random projection, drawn anew every κ steps."""

import numpy as np

from .rules import FactoredSecondMoment, rms, transform
from .subspace import Basis


class FloraOracle:
    """`bases` yields the first Basis, then one for each refresh (k = κ, 2κ, …).

    Ours are orthonormal, so that the transfer down(up(C)) is C A_oldᵀA_new; the official ones are N(0, 1/r), see
    golden.py. Official code also has `scale_parameter=True`; nothing else differs.
    """

    def __init__(
        self, W0, *, lr, bases, beta1=0.9, kappa=1000, decay=0.8, clip=1.0, weight_decay=0.0, scale=1.0,
        transform="none", scale_parameter=False,
    ):  # fmt: skip
        self.W = np.array(W0, float)
        self.lr, self.beta1, self.kappa, self.clip = lr, beta1, kappa, clip
        self.weight_decay, self.scale, self.transform = weight_decay, scale, transform
        self.scale_parameter = scale_parameter
        self.second = FactoredSecondMoment(decay)  # of the whole gradient, in its own space
        self.bases = iter(bases)
        self.basis: Basis = next(self.bases)
        self.C = self.basis.down(np.zeros_like(self.W))
        self.k = 0

    def step(self, G, lr=None):
        self.k += 1
        b1, lr = self.beta1, self.lr if lr is None else lr
        U = self.second.normalise(G)
        D = (1 - b1) * U + b1 * self.basis.up(self.C)  # only the history is compressed
        D = transform(self.transform, D, G)
        if self.k % self.kappa == 0:
            new = next(self.bases)
            self.C, self.basis = new.down(self.basis.up(self.C)), new
        self.C = b1 * self.C + (1 - b1) * self.basis.down(U)
        lr *= max(1e-3, rms(self.W)) if self.scale_parameter else 1.0
        self.W *= 1 - lr * self.weight_decay
        self.W -= self.scale * lr * D / max(1.0, rms(D) / self.clip)
