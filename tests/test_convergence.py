"""Every optimizer learns toy problems, measured against AdamW in the same run."""

from functools import partial

import pytest
import torch
from cases import METHODS
from torch import nn
from training import FIVE, build, net, noise, set_gradients, snapshot

import subspace_optim as so

STEPS, RANK = 160, 4
LRS = (0.3, 0.1, 0.03)
RULES = {"lion": so.Lion(), "adafactor": so.Adafactor()}
OPTIMIZERS = FIVE | {name: partial(so.GaLore, rule=rule) for name, rule in RULES.items()}
OPTIMIZERS["osd"] = partial(so.OnlineSubspaceDescent, basis_lr=0.05)


class Problem:
    """A loss over parameters; its minimum is 0."""

    def __init__(self):
        self.params = nn.ParameterList(nn.Parameter(w.float()) for w in self.start())


class Quadratic(Problem):
    """½ Σ hᵢ(W - W*)², conditioned 1:100, with a distance of rank 4 to go."""

    def start(self):
        return [torch.zeros(24, 16)]

    def loss(self):
        target = (noise(1, (24, 4)) @ noise(2, (4, 16))).float()
        curvature = torch.logspace(-2, 0, 24).unsqueeze(1)
        return (curvature * (self.params[0] - target).square()).sum() / 2


class LeastSquares(Problem):
    """‖XW - Y‖² where some W fits exactly."""

    def start(self):
        return [torch.zeros(16, 24)]

    def loss(self):
        x, truth = noise(1, (64, 16)).float(), (noise(2, (16, 4)) @ noise(3, (4, 24))).float()
        return (x @ (self.params[0] - truth)).square().mean()


class Factorisation(Problem):
    """‖ABᵀ - M‖² with M of rank 4: not convex."""

    def start(self):
        return [noise(1, (24, 8)) / 3, noise(2, (16, 8)) / 3]

    def loss(self):
        target = (noise(3, (24, 4)) @ noise(4, (4, 16))).float()
        return (self.params[0] @ self.params[1].T - target).square().mean()


class Perceptron(Problem):
    """A small network that learns another one."""

    def start(self):
        return [noise(1, (8, 32)) / 3, torch.zeros(32), noise(2, (32, 16)) / 6, torch.zeros(16)]

    def loss(self):
        x = noise(3, (128, 8)).float()
        truth = torch.tanh(x @ noise(4, (8, 12)).float() / 3) @ noise(5, (12, 16)).float() / 4
        w1, b1, w2, b2 = self.params
        return (torch.tanh(x @ w1 + b1) @ w2 + b2 - truth).square().mean()


PROBLEMS = (Quadratic, LeastSquares, Factorisation, Perceptron)


def solve(problem, make, lr, steps):
    """The loss before and after, under a cosine schedule, as everybody trains."""
    task = problem()
    opt = make(list(task.params), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    start = task.loss().item()
    for _ in range(steps):
        opt.zero_grad()
        task.loss().backward()
        opt.step()
        schedule.step()
    return start, task.loss().item()


def best(problem, make, steps=STEPS):
    """What is left of the loss at the best learning rate: each optimizer has its own scale."""
    runs = [solve(problem, make, lr, steps) for lr in LRS]
    return min(end / start for start, end in runs)


@pytest.fixture(scope="module")
def adamw():
    """What AdamW leaves of each loss in a fifth of the steps: the yardstick of this very run."""
    return {
        p: best(p, lambda params, lr: torch.optim.AdamW(params, lr, weight_decay=0.0), STEPS // 5) for p in PROBLEMS
    }


def projected(make, **settings):
    return lambda params, lr: make(params, lr=lr, rank=RANK, scale=1.0, **{"update_proj_gap": 10} | settings)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_quarter_of_the_rank_takes_at_most_five_times_the_steps_of_adamw(adamw, name, problem):
    assert best(problem, projected(OPTIMIZERS[name])) <= adamw[problem]


def test_the_criterion_can_fail(adamw):
    """In a random subspace that is never left, three quarters of the way remain."""
    left = best(
        Quadratic, projected(partial(so.SubspaceOptimizer, projector=so.RandomProjection()), update_proj_gap=10**6)
    )
    assert left > 10 * adamw[Quadratic]


@pytest.mark.parametrize(("bits", "share"), [(8, 0.01), (4, 0.2)])
def test_coded_state_learns_what_float32_does(bits, share):
    """The mean loss of the last quarter of the steps, a 40th of the first: 0.2 % apart at 8 bits, 9 % at 4."""
    ends = []
    for stored in (32, bits):
        task = Perceptron()
        settings = {"rank": RANK, "scale": 1.0, "update_proj_gap": 10, "state_bits": stored, "basis_bits": stored}
        opt = so.GaLore(task.params, lr=0.01, **settings)
        losses = []
        for _ in range(STEPS):
            opt.zero_grad()
            loss = task.loss()
            loss.backward()
            opt.step()
            losses.append(loss.item())
        ends.append(sum(losses[-STEPS // 4 :]) / (STEPS // 4))
        assert ends[-1] < losses[0] / 30
    assert ends[1] == pytest.approx(ends[0], rel=share)
    assert ends[1] != ends[0]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_first_step_descends(method):
    """⟨G, ΔW⟩ < 0 for every tensor."""
    params = net()
    opt = build(method, params, weight_decay=0.0)
    before = snapshot(params)
    set_gradients(params, 0)
    grads = {name: param.grad for name, param in params.items()}
    opt.step()
    for name, grad in grads.items():
        assert (grad * (params[name] - before[name])).sum() < 0, name


@pytest.mark.parametrize("rank", [None, 2])
def test_grams_never_steps_uphill(rank):
    """⟨G, ΔW⟩ ≤ 0 at every step whatever gradients come, to the rounding of the weights; momentum does go uphill."""
    uphill = dict.fromkeys((so.Grams, so.GaLore), 0)
    for cls in uphill:
        params = net(names=("tall", "wide", "conv", "vector"))
        opt = cls(params.values(), lr=0.1, rank=rank, update_proj_gap=5)
        for step in range(30):
            before = snapshot(params)
            set_gradients(params, step)
            opt.step()
            for name, param in params.items():
                slope = (param.grad.double() * (param - before[name]).double()).sum()
                rounding = 2**-23 * (param.grad.abs() * param.abs().clamp(min=1)).sum()
                uphill[cls] += bool(slope > rounding)
    assert uphill[so.Grams] == 0 < uphill[so.GaLore]
