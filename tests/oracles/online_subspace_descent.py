"""Online Subspace Descent (2408.12857): GaLore whose basis follows the gradient by online PCA instead of by SVD."""

import numpy as np

from .galore import GaLoreOracle
from .rules import Adam
from .subspace import Basis, side_of, svd_basis


def pca_gradient(Ghat, Q):
    """∇_Q of ‖Ĝ Q Qᵀ - Ĝ‖²: 2 [Q R̂ᵀR̂ - Aᵀ + Aᵀ(QᵀQ - I)] with R̂ = Ĝ Q (m, r) and A = R̂ᵀĜ (r, n)."""
    Rhat = Ghat @ Q
    A = Rhat.T @ Ghat
    return 2 * (Q @ (Rhat.T @ Rhat) - A.T + A.T @ (Q.T @ Q - np.eye(Q.shape[1])))


class OnlinePCA:
    """Adam on one basis B (d, r), fed with gradients (·, d) of unit norm."""

    def __init__(self, B, basis_lr, weight_decay=0.0):
        self.B, self.basis_lr, self.weight_decay = np.array(B, float), basis_lr, weight_decay
        self.rule = Adam()

    def step(self, G, lr_ratio):
        if (norm := np.linalg.norm(G)) == 0:
            return
        lr = self.basis_lr * lr_ratio
        gradient = pca_gradient(G / norm, self.B)
        self.B = self.B * (1 - lr * self.weight_decay) - self.rule.step(gradient, lr)


class OnlineSubspaceDescentOracle(GaLoreOracle):
    """`basis(G, 0)` replaces the singular Basis of the first gradient; as it drifts, moments are kept as they are.

    Official: AdamW on the basis with lr = (1/T) lr_t / lr_0 and decay 0.01.
    """

    def __init__(
        self, W0, *, lr, rank=None, basis_lr=5e-3, update_proj_gap=200, proj_type="std", basis=None,
        official=False, **settings,
    ):  # fmt: skip
        settings |= {"lr": lr, "moments": "keep", "official": official}
        super().__init__(W0, basis=lambda G, t: self.basis, **settings)
        self.first_basis = basis or (lambda G, t: svd_basis(G, side_of(self.W.shape, proj_type), rank))
        self.pca = {"basis_lr": 1 / update_proj_gap, "weight_decay": 0.01} if official else {"basis_lr": basis_lr}

    def step(self, G, lr=None):
        if self.t == 0:
            self.basis = self.first_basis(G, 0)
            self.online = [None if B is None else OnlinePCA(B, **self.pca) for B in self.basis]
        super().step(G, lr)
        if self.t > 1:  # the singular basis of the first gradient is already optimal for it
            ratio = 1.0 if lr is None else lr / self.lr
            for online, X in zip(self.online, (G.T, G)):
                if online is not None:
                    online.step(X, ratio)
        self.basis = Basis(*(None if online is None else online.B for online in self.online))
