"""The oracles against the numbers of the authors' code, so that parity with an oracle is parity with the papers."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from golden import (
    GOLDEN,
    STEPS,
    TOLERANCE,
    apollo_official_bases,
    flora_official_bases,
    gradient,
    initial_weight,
    summary,
)  # fmt: skip
from oracles.adamw import AdamWOracle
from oracles.apollo import ApolloOracle
from oracles.flora import FloraOracle
from oracles.galore import GaLoreOracle
from oracles.gradnormlorp import GradNormLoRPOracle, OfficialGradNormLoRPOracle, normalised
from oracles.grams import GramsOracle
from oracles.online_subspace_descent import OnlineSubspaceDescentOracle, pca_gradient
from oracles.rules import Adafactor, Lion, Momentum
from oracles.subspace import Basis, carry, side_of, svd_basis

SHAPES = ((6, 4), (4, 6))


def flipped_at_refresh(signs, rank, gap):
    """The singular basis, its vectors flipped by `signs` at every refresh but the first."""
    current = None

    def basis(G, t):
        nonlocal current
        if t % gap == 0:
            s = np.array(signs) if t else np.ones(rank)
            P, Q = svd_basis(G, side_of(G.shape, "std"), rank)
            current = Basis(None if P is None else P * s, None if Q is None else Q * s)
        return current

    return basis


def official(name, W0, settings, signs):
    settings = dict(settings)
    if name == "flora":
        gap = settings.pop("update_proj_gap")
        draws = flora_official_bases(W0.shape, settings.pop("rank"), settings.pop("seed"))
        bases = [Basis(A, None) if W0.shape[0] < W0.shape[1] else Basis(None, A) for A in itertools.islice(draws, 2)]
        return FloraOracle(W0, basis=lambda G, k: bases[k // gap], **settings)
    if name.startswith("apollo"):
        gap = settings.pop("update_proj_gap")
        draws = apollo_official_bases(W0.shape, settings.pop("rank"))
        bases = [Basis(A, None) if W0.shape[0] < W0.shape[1] else Basis(None, A) for A in itertools.islice(draws, 2)]
        return ApolloOracle(W0, eps=1e-6, basis=lambda G, t: bases[t // gap], official=True, **settings)
    if name == "grams":
        return GramsOracle(W0, eps=1e-6, official=True, **settings)
    if name == "osd":
        return OnlineSubspaceDescentOracle(W0, eps=1e-6, official=True, **settings)
    if name == "osd_lion":
        return OnlineSubspaceDescentOracle(W0, rule=Lion, official=True, **settings)
    basis = flipped_at_refresh(signs, settings["rank"], settings["update_proj_gap"])
    if name == "lrwn":
        return OfficialGradNormLoRPOracle(W0, basis=basis, **settings)
    if name == "galore":
        return GaLoreOracle(W0, eps=1e-6, basis=basis, official=True, **settings)
    rule = partial(Adafactor, official=True)
    return GaLoreOracle(W0, rule=rule, basis=basis, official=True, decay_after=False, **settings)


def trajectory(name, shape, signs):
    oracle = official(name, initial_weight(shape), GOLDEN[name].settings, signs)
    after = {}
    for t in range(max(STEPS)):
        oracle.step(gradient(shape, t).astype(float))
        after[t + 1] = summary(oracle.W)
    return after


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name, shape):
    golden = GOLDEN[name]
    gauges = list(itertools.product((1, -1), repeat=2)) if golden.gauge_steps else [(1, 1)]
    runs = [trajectory(name, shape, signs) for signs in gauges]
    for k in STEPS:
        errors = [abs(np.subtract(run[k], golden.values[shape, k])).max() for run in runs]
        some_or_all = min if k in golden.gauge_steps else max
        assert some_or_all(errors) < TOLERANCE, (k, errors)


def test_adamw_is_torchs():
    rng = np.random.default_rng(0)
    W0 = rng.standard_normal((5, 3))
    settings = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1}
    oracle = AdamWOracle(W0, **settings)
    p = torch.tensor(W0, requires_grad=True)
    theirs = torch.optim.AdamW([p], **settings)
    for _ in range(20):
        G = rng.standard_normal(W0.shape)
        oracle.step(G)
        p.grad = torch.tensor(G)
        theirs.step()
    np.testing.assert_allclose(oracle.W, p.detach().numpy(), rtol=0, atol=1e-14)  # rounding of 20 float64 steps


def test_pca_gradient_is_the_derivative_of_the_reconstruction_loss():
    rng = np.random.default_rng(0)
    G, Q, direction = (rng.standard_normal(shape) for shape in ((6, 5), (5, 2), (5, 2)))

    def loss(Q):
        return np.linalg.norm(G @ Q @ Q.T - G) ** 2

    h = 1e-5  # the error of a central difference, h² f''' + 1e-16 f / h, is about 1e-9 of the slope
    slope = (loss(Q + h * direction) - loss(Q - h * direction)) / (2 * h)
    assert (pca_gradient(G, Q) * direction).sum() == pytest.approx(slope, rel=1e-7)


@pytest.mark.parametrize("proj_type", ["right", "left", "full"])
def test_a_rotation_of_the_basis_moves_no_momentum(proj_type):
    """In a subspace that stays, `rotate` and `project_aware` change coordinates only: up(M) is what it was."""
    rng = np.random.default_rng(0)
    old = svd_basis(rng.standard_normal((7, 5)), side_of((7, 5), proj_type), 3)
    rotation = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    new = Basis(*(None if B is None else B @ rotation for B in old))
    M = rng.standard_normal(old.down(np.zeros((7, 5))).shape)
    V = M**2 + 0.1
    for moments in ("rotate", "project_aware"):
        carried, _ = carry(M, V, old.change(new), moments, (0.3, 0.2))
        np.testing.assert_allclose(new.up(carried), old.up(M), atol=1e-13)
        np.testing.assert_allclose(carry(M, V, old.change(old), moments, (0.3, 0.2)), (M, V), atol=1e-13)


def test_momentum_carried_at_full_rank_is_dense_momentum():
    """ALGORITHMS.md section 9: 4e-15 under `rotate` for any schedule, 2.9 under `keep`."""
    rng = np.random.default_rng(0)
    W0 = rng.standard_normal((6, 4))
    settings = {"lr": 0.1, "rank": 4, "update_proj_gap": 2}
    rotate, keep = (GaLoreOracle(W0, rule=Momentum, moments=moments, **settings) for moments in ("rotate", "keep"))
    W, M = W0.copy(), 0.0
    for _ in range(12):
        G = rng.standard_normal(W0.shape)
        M = 0.9 * M + G
        W -= 0.1 * M
        rotate.step(G)
        keep.step(G)
    assert abs(rotate.W - W).max() < 1e-13
    assert abs(keep.W - W).max() > 0.1


def test_radial_gradients_move_only_the_magnitudes_and_add_up():
    """ALGORITHMS.md section 4: 50 steps of lr 0.01 move each norm by 0.5; the official code moves it by 0.01."""
    W0 = np.random.default_rng(0).standard_normal((4, 3))
    ours = GradNormLoRPOracle(W0, lr=0.01, rank=2, update_proj_gap=10)
    for _ in range(50):
        ours.step(-normalised(ours.W)[1])
    grown = np.linalg.norm(ours.W, axis=1) - np.linalg.norm(W0, axis=1)
    np.testing.assert_allclose(grown, 0.5, atol=1e-6)
