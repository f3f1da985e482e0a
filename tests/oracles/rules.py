"""What happens inside the subspace: R (a gradient seen in it) and lr in, the step D out, so that W -= scale * up(D)."""

import numpy as np

from .subspace import Array, Basis, carry


class Adam:
    """M ← β1 M + (1-β1) R;  V ← β2 V + (1-β2) R²;  D = lr M̂ / (√V̂ + ε)."""

    def __init__(self, betas=(0.9, 0.999), eps=1e-8, hf=False):
        self.betas, self.eps, self.hf = betas, eps, hf
        self.M, self.V, self.k = 0.0, 0.0, 0

    def corrections(self) -> tuple[float, float]:
        return 1 - self.betas[0] ** self.k, 1 - self.betas[1] ** self.k

    def carry(self, c: Basis, moments: str) -> None:
        self.M, self.V = carry(self.M, self.V, c, moments, self.corrections())

    def step(self, R: Array, lr: float) -> Array:
        b1, b2 = self.betas
        self.k += 1
        self.M = b1 * self.M + (1 - b1) * R
        self.V = b2 * self.V + (1 - b2) * R**2
        c1, c2 = self.corrections()
        if self.hf:  # the old Hugging Face AdamW, behind every GaLore-derived repository: ε is not bias-corrected
            return lr * np.sqrt(c2) / c1 * self.M / (np.sqrt(self.V) + self.eps)
        return lr * (self.M / c1) / (np.sqrt(self.V / c2) + self.eps)


class Lion:
    """D = β1 M + (1-β1) R;  M ← β2 M + (1-β2) R;  W -= lr sign(up(D)), whatever the scale."""

    def __init__(self, betas=(0.9, 0.99)):
        self.betas = betas
        self.M = 0.0

    def carry(self, c: Basis, moments: str) -> None:
        self.M = self.M if moments == "keep" else c.down(self.M)

    def step(self, R: Array, lr: float) -> Array:
        b1, b2 = self.betas
        u = b1 * self.M + (1 - b1) * R
        self.M = b2 * self.M + (1 - b2) * R
        return u


class Momentum:
    """M ← β M + R;  D = lr M  (torch.optim.SGD's)."""

    def __init__(self, betas=(0.9, 0.999)):
        self.beta = betas[0]
        self.M = 0.0

    carry = Lion.carry

    def step(self, R: Array, lr: float) -> Array:
        self.M = self.beta * self.M + R
        return lr * self.M


def rms(X: Array) -> float:
    return np.sqrt(np.mean(X**2))


class FactoredSecondMoment:
    """Adafactor (1804.04235): V ≈ row ⊗ col / mean(row), with β2 = 1 - k^(-decay); the whole V of a vector."""

    def __init__(self, decay=0.8, eps=1e-30):
        self.decay, self.eps = decay, eps
        self.row, self.col, self.V, self.k = 0.0, 0.0, 0.0, 0

    def normalise(self, X: Array) -> Array:  # X / √V
        self.k += 1
        b2 = 1 - self.k**-self.decay
        if X.ndim < 2:
            self.V = b2 * self.V + (1 - b2) * (X**2 + self.eps)
            return X / np.sqrt(self.V)
        self.row = b2 * self.row + (1 - b2) * (X**2 + self.eps).mean(-1)
        self.col = b2 * self.col + (1 - b2) * (X**2 + self.eps).mean(-2)
        return X / np.sqrt(np.outer(self.row, self.col) / self.row.mean())


class Adafactor:
    """U = R/√V clipped to RMS 1;  M ← β1 M + (1-β1) U;  D = lr M.  Official: M ← β1 M + (1-β1) lr U;  D = M."""

    def __init__(self, betas=(0.9, 0.999), decay=0.8, clip=1.0, official=False):
        self.beta1, self.clip, self.official = betas[0], clip, official
        self.second, self.M = FactoredSecondMoment(decay), 0.0

    def carry(self, c: Basis, moments: str) -> None:
        self.M = self.M if moments == "keep" else c.down(self.M)
        if moments == "project_aware":  # only a projected dimension changes coordinates
            rows, columns = c.squared()
            self.second.row = self.second.row if rows is None else rows.T @ self.second.row
            self.second.col = self.second.col if columns is None else columns.T @ self.second.col

    def step(self, R: Array, lr: float) -> Array:
        U = self.second.normalise(R)
        U /= max(1.0, rms(U) / self.clip)
        inside, outside = (lr, 1.0) if self.official else (1.0, lr)
        self.M = self.beta1 * self.M + (1 - self.beta1) * inside * U
        return outside * self.M


def transform(name: str, D: Array, R: Array) -> Array:
    """The step made to agree in sign with the gradient."""
    if name == "grams":
        return np.sign(R) * abs(D)
    if name == "cautious":  # 2411.16085
        agree = D * R > 0
        return D * agree / max(agree.mean(), 1e-3)
    assert name == "none", name
    return D
