"""GaLore (2403.03507): an optimizer that lives in the leading singular subspace of the gradient."""

from functools import partial

import numpy as np

from .rules import Adam, Lion, transform
from .subspace import Basis, side_of, svd_basis


class GaLoreOracle:
    """`basis(G, t)` replaces the SVD: it returns the Basis that step t uses, a new object at each refresh.

    `rule(betas)` replaces Adam; without `betas` it has its own. `decay_after` is the official
    order, except in its Adafactor.
    """

    def __init__(
        self, W0, *, lr, rank=None, betas=None, eps=1e-8, weight_decay=0.0, update_proj_gap=200, scale=1.0,
        proj_type="std", moments="rotate", transform="none", rule=None, basis=None, official=False, decay_after=None,
    ):  # fmt: skip
        self.W = np.array(W0, float)
        self.lr, self.weight_decay, self.scale = lr, weight_decay, scale
        self.moments, self.transform = "keep" if official else moments, transform
        self.decay_after = official if decay_after is None else decay_after
        rule = rule or partial(Adam, eps=eps, hf=official)
        self.rule = rule(betas) if betas else rule()
        side, T = side_of(self.W.shape, proj_type), update_proj_gap
        self.choose_basis = basis or (lambda G, t: svd_basis(G, side, rank) if t % T == 0 else self.basis)
        self.basis: Basis | None = None
        self.t = 0

    M = property(lambda self: self.rule.M)
    V = property(lambda self: self.rule.V)

    def step(self, G, lr=None):
        lr = self.lr if lr is None else lr
        update = self.update(G, lr)
        if not self.decay_after:
            self.W *= 1 - lr * self.weight_decay
        self.W -= update
        if self.decay_after:
            self.W *= 1 - lr * self.weight_decay
        self.t += 1

    def update(self, G, lr):
        """What is subtracted from W: scale * up(D)."""
        old, self.basis = self.basis, self.choose_basis(G, self.t)
        if old is not None and self.basis is not old:
            self.rule.carry(old.change(self.basis), self.moments)
        R = self.basis.down(G)
        U = self.basis.up(transform(self.transform, self.rule.step(R, lr), R))
        return lr * np.sign(U) if isinstance(self.rule, Lion) else self.scale * U
