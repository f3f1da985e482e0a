"""APOLLO's limiter and its scale, where the published code loses a run."""

import itertools

import pytest
import torch
from training import noise

import subspace_optim as so
from subspace_optim.pretrain.machine import peak_bytes


def steps(param, opt, grads):
    """The length of each step."""
    lengths = []
    for grad in grads:
        before, param.grad = param.detach().clone(), grad
        opt.step()
        lengths.append(float((param.detach() - before).norm()))
    return lengths


def made(**settings):
    param = torch.nn.Parameter(noise(0, (12, 7)))
    return param, so.APOLLO([param], lr=0.1, rank=3, **settings)


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("compat", [None, "official"])
def test_a_zero_gradient_does_not_hold_the_run_back(scale_type, compat):
    """PEERS.md, D6: in apollo_torch a zero first gradient costs 1,852 steps."""
    zero, grads = torch.zeros(12, 7, dtype=torch.float64), [noise(i, (12, 7)) for i in range(1, 4)]
    settings = {"scale_type": scale_type, "compat": compat}
    usual = steps(*made(**settings), grads)
    late = steps(*made(**settings), [zero, *grads])
    between = steps(*made(**settings), [grads[0], zero, *grads[1:]])
    assert late[0] == between[1] == 0
    for length in (*late[1:], *between[2:]):
        assert 0.3 * usual[0] < length < 3 * usual[0]


def test_a_step_grows_by_one_percent_at_most():
    grads = [(10.0**i) * noise(i, (12, 7)) for i in range(6)]
    lengths = steps(*made(), grads)
    for before, after in itertools.pairwise(lengths):
        assert after <= 1.01 * before * (1 + 1e-9)
    free = steps(*made(growth=None), grads)
    assert max(b / a for a, b in itertools.pairwise(free)) > 1.02


def test_a_channel_that_the_basis_does_not_see_takes_no_enormous_step():
    """The rows of a block that the top singular vectors leave out; unguarded, ‖R_i‖ is rounding and the step 1e8."""
    grad = torch.zeros(12, 7, dtype=torch.float64)
    grad[:8, :4] = noise(1, (8, 4))
    grad[8:, 4:] = 1e-3 * noise(2, (4, 3))
    param, opt = made(proj="svd")
    before = param.detach().clone()
    param.grad = grad
    opt.step()
    moved = (param.detach() - before).norm(dim=1)
    # Adam's own steps are lr an element; a channel may be twice as long.
    assert moved[8:].max() <= 2 * 0.1 * 7**0.5
    assert moved[:8].min() > 0.01


def test_scaling_the_gradients_changes_nothing():
    grads = [noise(i, (12, 7)) for i in range(3)]
    plain, tiny = (steps(*made(eps=0.0), [factor * grad for grad in grads]) for factor in (1, 1e-12))
    assert plain == pytest.approx(tiny, rel=1e-6)


def test_bases_that_are_drawn_do_not_outlive_their_matrices():
    """Six matrices, each of a shape of its own: a step holds hardly more than a step of one."""
    peaks, basis = [], 512 * 64 * 4
    for count in (1, 6):
        params = [torch.nn.Parameter(torch.ones(1024 + 8 * i, 512)) for i in range(count)]
        opt = so.APOLLO(params, rank=64)
        for param in params:
            param.grad = torch.ones_like(param)
        opt.step()
        peaks.append(peak_bytes(opt.step))
    assert basis < peaks[1] < peaks[0] + basis
