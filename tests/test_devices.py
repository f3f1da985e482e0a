"""Whole optimizers on tensors that say they are on a GPU: no step mixes devices, and the numbers are those of the CPU.

The reference steps here, refreshes and all; what the kernels of a GPU are handed is the business of test_waiting.py.
"""

import pretended
import pytest
import torch
from pretended import Elsewhere, Pretended
from training import ALL_METHODS, build, net, noise

import subspace_optim as so

# Those draw from torch's generator of the device, of which there is none here.
METHODS = [method for method in ALL_METHODS if method.id not in ("official_flora", "official_apollo")]


@pytest.fixture
def elsewhere(monkeypatch):
    """Under which device="cuda" makes such tensors."""
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with Elsewhere():
        yield


def moved(params):
    return torch.nn.ParameterDict({key: torch.nn.Parameter(Pretended(p.detach().clone())) for key, p in params.items()})


def set_gradients(here, there, step):
    for i, (key, param) in enumerate(here.items()):
        param.grad = noise(100 * step + i, param.shape).to(param.dtype)
        there[key].grad = Pretended(param.grad.clone())


def assert_alike(here, there):
    """A basis is orthonormalised by Cholesky's method on a GPU, and by Householder's here."""
    rough = next(iter(here.values())).dtype == torch.bfloat16
    for key, param in here.items():
        close = (param - there[key].host).abs() <= 1e-5 + 1e-4 * param.abs()
        assert close.all() or (rough and (~close).sum() <= 2 + 2e-3 * close.numel()), key


def stray(opt):
    """State that is on another device than its parameter, but for the numbers of stacks, which the host has."""
    tensors = ((key, x) for state in opt.state.values() for key, x in state.items() if isinstance(x, torch.Tensor))
    return {key for key, x in tensors if not x.is_cuda} - {"age", "seed"}


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_an_optimizer_keeps_to_its_device(method, elsewhere):
    """Refreshes, clipping, a gradient that is not finite, and a checkpoint of the CPU included."""
    here = net(torch.float32)
    there = moved(here)
    opt, other = build(method, here, backend="reference"), build(method, there, backend="reference")
    for step in range(4):
        set_gradients(here, there, step)
        if step == 1:
            here["tall"].grad[0, 0] = there["tall"].grad[0, 0] = torch.nan
        if step == 2:
            assert other.clip_grad_norm_(0.5).item() == pytest.approx(opt.clip_grad_norm_(0.5).item(), rel=1e-5)
        opt.step()
        other.step()
        assert_alike(here, there)
    assert opt.skipped_updates == other.skipped_updates
    other.load_state_dict(opt.state_dict())
    assert not stray(other)
    set_gradients(here, there, 4)
    opt.step()
    other.step()
    assert_alike(here, there)
    other.state_dict()


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize(
    "make", [so.GaLore, so.Flora, so.OnlineSubspaceDescent, so.GradNormLoRP], ids=lambda make: make.__name__
)
def test_weights_of_16_bits_and_what_is_watched(make, rounding, elsewhere):
    here = net(torch.bfloat16)
    there = moved(here)
    opt, other = (
        make(params.values(), lr=0.01, rank=2, rounding=rounding, backend="reference") for params in (here, there)
    )
    other.watch(every=1)
    for step in range(3):
        set_gradients(here, there, step)
        opt.step()
        other.step()
        assert_alike(here, there)
    assert len(other.report()) > 0
    assert not stray(other)


def test_mixed_devices_are_refused(elsewhere):
    """Without which the others would show nothing."""
    there = torch.ones(3, device="cuda")
    assert isinstance(there, Pretended) and there.device == pretended.GPU
    for wrong in (lambda: there + torch.ones(3), lambda: torch._foreach_add_([there], [torch.ones(3)])):
        with pytest.raises(AssertionError, match="beside one of the GPU"):
            wrong()
    assert (there * torch.tensor(2.0)).tolist() == [2.0] * 3
