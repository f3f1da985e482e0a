"""The same numbers on a GPU as on the CPU, and state that lives where the parameter does."""

import pytest
import torch
from training import ALL_METHODS, build, net, set_gradients

import subspace_optim as so
from subspace_optim import philox

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
# flora_opt's stream is that of torch's generator on the parameter's device, which differs from the CPU's.
SAME_STREAM = [method for method in ALL_METHODS if method.id != "official_flora"]


def test_philox_gives_the_same_bits():
    counters = torch.arange(1000)
    assert torch.equal(philox.philox(7, counters), philox.philox(7, counters.cuda()).cpu())


def test_random_bases_are_the_same():
    """Drawn in float64, so that the devices' logarithms and cosines agree after rounding to float32."""
    plan = so.types.make_plan((96, 64), torch.float32, CPU, 16)
    there = so.types.make_plan((96, 64), torch.float32, GPU, 16)
    for kind in ("orthonormal", "gaussian", "rademacher"):
        projector = so.RandomProjection(16, kind=kind)
        (here,), (other,) = projector.generate(plan, 3), projector.generate(there, 3)
        torch.testing.assert_close(other.cpu(), here, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", SAME_STREAM, ids=str)
def test_ten_steps_agree_with_the_cpu(method):
    """float64, so that a different order of sums cannot turn a singular vector; across two refreshes."""
    here, there = net(torch.float64), net(torch.float64).to(GPU)
    opt, opt_there = build(method, here), build(method, there)
    for step in range(10):
        set_gradients(here, step)
        for name, param in there.items():
            param.grad = here[name].grad.to(GPU)
        opt.step()
        opt_there.step()
    for name in here:
        torch.testing.assert_close(
            there[name].cpu(), here[name], rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", so.OPTIMIZERS)
def test_state_lives_on_the_gpu_and_resumes_bit_for_bit(name, dtype, tmp_path):
    def start():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.Linear(48, 64)).to(GPU, dtype)
        rank = None if name == "grams" else 8
        return model, so.create(model, name, rank=rank, lr=1e-2, **({} if rank is None else {"update_proj_gap": 4}))

    def steps(model, opt, numbers):
        for number in numbers:
            x = torch.randn(32, 64, generator=torch.Generator().manual_seed(number)).to(GPU, dtype)
            model(x).square().mean().backward()
            opt.step()
            opt.zero_grad()

    model, opt = start()
    steps(model, opt, range(6))
    assert {v.device.type for s in opt.state.values() for v in s.values() if isinstance(v, torch.Tensor)} == {"cuda"}
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "checkpoint.pt")
    steps(model, opt, range(6, 10))

    again, opt_again = start()
    saved = torch.load(tmp_path / "checkpoint.pt")
    again.load_state_dict(saved["model"])
    opt_again.load_state_dict(saved["opt"])
    steps(again, opt_again, range(6, 10))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
