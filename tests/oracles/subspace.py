"""Maps between a matrix and its subspace, and moments carried between subspaces (ALGORITHMS.md sections 0 and 9)."""

from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Basis(NamedTuple):
    """Two bases of columns; an absent one is the identity, so `Basis()` leaves a matrix as it is."""

    P: Array | None = None  # (m, r)
    Q: Array | None = None  # (n, r)

    def down(self, X: Array) -> Array:  # R = Pᵀ X Q
        X = X if self.P is None else self.P.T @ X
        return X if self.Q is None else X @ self.Q

    def up(self, R: Array) -> Array:  # P R Qᵀ
        R = R if self.P is None else self.P @ R
        return R if self.Q is None else R @ self.Q.T

    def change(self, new: "Basis") -> "Basis":  # c = B_oldᵀ B_new on each side: (r, r)
        return Basis(
            None if self.P is None else self.P.T @ new.P,
            None if self.Q is None else self.Q.T @ new.Q,
        )

    def squared(self) -> "Basis":
        return Basis(None if self.P is None else self.P**2, None if self.Q is None else self.Q**2)


def side_of(shape: tuple[int, int], proj_type: str) -> str:
    """`std` compresses the smaller dimension, and a square matrix on the right."""
    m, n = shape
    smaller, larger = ("right", "left") if m >= n else ("left", "right")
    return {"std": smaller, "reverse_std": larger, "left": "left", "right": "right", "full": "both"}[proj_type]


def svd_basis(G: Array, side: str, rank: int) -> Basis:
    """The leading singular vectors of G."""
    U, _, Vh = np.linalg.svd(G, full_matrices=False)
    return Basis(U[:, :rank] if side != "right" else None, Vh[:rank].T if side != "left" else None)


def carry(M: Array, V: Array, c: Basis, moments: str, corrections: tuple[float, float]) -> tuple[Array, Array]:
    """Moments of the old subspace read in the new one; `corrections` = 1 - β^k for the k updates they have seen."""
    if moments == "keep":
        return M, V
    M_new = c.down(M)  # right: M c, left: cᵀ M, both: c_Lᵀ M c_R
    if moments == "rotate":
        return M_new, V
    assert moments == "project_aware", moments
    # LDAdam (2410.16103): V/c2 - (M/c1)² is a variance and goes through c∘c, as a diagonal covariance does.
    c1, c2 = corrections
    variance = V / c2 - (M / c1) ** 2
    return M_new, abs(c.squared().down(variance) + (M_new / c1) ** 2) * c2
