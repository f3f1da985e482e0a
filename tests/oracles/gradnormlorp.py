"""GradNormLoRP (2412.19616): weight-normalised rows, W = ρ V̂; GaLore on the direction, Adam on the magnitudes."""

import numpy as np

from .galore import GaLoreOracle
from .rules import Adam


def normalised(W):
    """Row norms ρ (m, 1) and V̂ = W/ρ, where a zero row stays zero."""
    rho = np.linalg.norm(W, axis=1, keepdims=True)
    return rho, np.divide(W, rho, out=np.zeros_like(W), where=rho > 0)


class GradNormLoRPOracle(GaLoreOracle):
    """The paper's method: learned magnitudes, a gradient tangential to the sphere, decay on the magnitudes only."""

    def __init__(self, W0, *, betas=(0.9, 0.999), eps=1e-8, **settings):
        super().__init__(W0, betas=betas, eps=eps, **settings)
        self.magnitude_rule = Adam(betas, eps)

    def step(self, G, lr=None):
        lr = self.lr if lr is None else lr
        rho, Vhat = normalised(self.W)
        g = (G * Vhat).sum(1, keepdims=True)  # (m, 1)
        moved = self.W - self.update(G - g * Vhat, lr)
        rho_new = rho * (1 - lr * self.weight_decay) - self.magnitude_rule.step(g, lr)
        self.W = np.where(rho > 0, np.maximum(rho_new, 0) * normalised(moved)[1], moved)
        self.t += 1


class OfficialGradNormLoRPOracle(GaLoreOracle):
    """`LowRankWeightNormAdamW`: GaLore on a whole copy v of W; the magnitudes are reset to ‖v‖ before every step."""

    def __init__(self, W0, *, betas=(0.9, 0.999), eps=1e-6, **settings):
        super().__init__(W0, betas=betas, eps=eps, official=True, **settings)
        self.magnitude_rule = Adam(betas, eps, hf=True)
        self.v = self.W.copy()

    def step(self, G, lr=None):
        lr = self.lr if lr is None else lr
        rho, vhat = normalised(self.v)
        decay = 1 - lr * self.weight_decay
        self.v = decay * (self.v - self.update(G, lr))
        rho = decay * (rho - self.magnitude_rule.step((G * vhat).sum(1, keepdims=True), lr))
        self.W = rho * normalised(self.v)[1]
        self.t += 1
