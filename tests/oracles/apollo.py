"""APOLLO (2412.05270): the raw gradient, its channels as long as Adam's steps in a random subspace."""

import numpy as np

from .rules import Adam, transform
from .subspace import Basis


class ApolloOracle:
    """`basis(G, t)` returns the Basis that step t uses, a new object at each draw.

    Official: the limiter sees steps that are not yet corrected for bias, decay comes after, and ‖R‖ has no floor. Its
    1e-8 beside norms is left out: it shows in gradients as small as that alone. `growth=None` is its disable_nl.
    """

    def __init__(
        self, W0, *, lr, basis, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, scale=1.0, scale_type="channel",
        growth=1.01, moments="keep", transform="none", official=False,
    ):  # fmt: skip
        self.W = np.array(W0, float)
        self.lr, self.weight_decay, self.scale, self.moments = lr, weight_decay, scale, moments
        self.scale_type, self.growth, self.transform, self.official = scale_type, growth, transform, official
        self.rule = Adam(betas, eps, hf=official)
        self.choose_basis, self.basis = basis, None
        self.previous = 0.0
        self.t = 0

    def norm(self, X):
        left, right = self.basis
        along = 0 if right is None else 1 if left is None else None
        return np.linalg.norm(X, axis=along if self.scale_type == "channel" else None, keepdims=True)

    def step(self, G, lr=None):
        lr = self.lr if lr is None else lr
        old: Basis | None = self.basis
        self.basis = self.choose_basis(G, self.t)
        if old is not None and self.basis is not old:
            self.rule.carry(old.change(self.basis), self.moments)
        R = self.basis.down(G)
        N = transform(self.transform, self.rule.step(R, 1.0), R)
        seen = self.norm(R)
        if not self.official:  # a random orthonormal basis sees √(r/d) of G, and half of that is the least that counts
            seen = np.maximum(seen, 0.5 * np.sqrt(R.size / G.size) * self.norm(G))
        S = G * (self.norm(N) / np.where(seen > 0, seen, 1))
        c1, c2 = self.rule.corrections()
        length = np.linalg.norm(S) * (c1 / np.sqrt(c2) if self.official else 1.0)
        if self.growth is not None:
            if self.previous > 0:
                excess = max(length / (self.growth * self.previous), 1.0)
                S, length = S / excess, length / excess
            if length > 0:
                self.previous = length
        if not self.official:
            self.W *= 1 - lr * self.weight_decay
        self.W -= lr * np.sqrt(self.scale) * S
        if self.official:
            self.W *= 1 - lr * self.weight_decay
        self.t += 1
