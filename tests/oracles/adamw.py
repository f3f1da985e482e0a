"""AdamW (1711.05101) with decoupled decay before the update, as torch.optim.AdamW."""

import numpy as np

from .rules import Adam, transform


class AdamWOracle:
    def __init__(self, W0, *, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, transform="none", official=False):
        self.W, self.lr, self.weight_decay, self.transform = np.array(W0, float), lr, weight_decay, transform
        self.rule = Adam(betas, eps, hf=official)

    M = property(lambda self: self.rule.M)
    V = property(lambda self: self.rule.V)

    def step(self, G, lr=None):
        lr = self.lr if lr is None else lr
        self.W *= 1 - lr * self.weight_decay
        self.W -= transform(self.transform, self.rule.step(G, lr), G)
