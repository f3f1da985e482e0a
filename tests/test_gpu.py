"""The same numbers on a GPU as on the CPU, and state that lives where the parameter does."""

import math
from functools import partial
from importlib import import_module

import pytest
import torch
from buckets import (
    assert_averages_alike,
    assert_coded_alike,
    assert_codes_alike,
    assert_compensated_alike,
    assert_scaled_alike,
    assert_words_alike,
    bucket,
    coded_bucket,
    error,
    length_bucket,
    momentum_bucket,
    step_coded,
    step_lengths,
    step_momenta,
    step_projected,
    twice,
    update_coded,
)
from training import ALL_METHODS, build, net, set_gradients

import subspace_optim as so
from subspace_optim import philox, storage
from subspace_optim.kernels import reference, select
from subspace_optim.types import Hyper, Weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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
        ((here,),), ((other,),) = projector.generate(plan, [3]), projector.generate(there, [3])
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


# ---- kernels/cuda.py and kernels/triton.py, beside the reference on the same device ---------------------------------


@pytest.fixture(params=["cuda", "triton"])
def kernels(request):
    why = select.IMPLS[request.param](None)
    if why is not None:
        pytest.skip(f"{request.param}: {why}")
    return import_module(f"subspace_optim.kernels.{request.param}")


def name_of(kernels):
    return kernels.__name__.rpartition(".")[2]


def test_auto_takes_the_first_backend_there_is(kernels):
    plan = so.types.make_plan((96, 64), torch.bfloat16, torch.device("cuda", 0), 16)
    first = next(name for name, reason in select.IMPLS.items() if reason(plan) is None)
    assert select.resolve("auto", plan).__name__.endswith(first)
    assert select.resolve(name_of(kernels), plan) is kernels


@pytest.mark.parametrize("method", SAME_STREAM, ids=str)
def test_optimizers_agree_with_the_reference(method, kernels):
    """float32, over ten steps: the first basis lasts, because an SVD turns its vectors by the last digit."""
    ends = []
    for backend in (name_of(kernels), "reference"):
        params = net(torch.float32).to(GPU)
        opt = build(method, params, backend=backend, update_proj_gap=100)
        for step in range(10):
            for (name, param), like in zip(params.items(), net(torch.float32).values(), strict=True):
                noise = torch.Generator().manual_seed(1000 * step + len(name))
                param.grad = torch.randn(like.shape, generator=noise).to(GPU)
            opt.step()
        ends.append(params)
    for name, param in ends[0].items():
        torch.testing.assert_close(param, ends[1][name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def step_both(kernels, lists, lr, side, transform="none", seeds=()):
    mine, theirs, unharmed = twice(lists, pad=16)
    for kernel, columns in ((kernels, mine), (reference, theirs)):
        step_projected(kernel, columns, side, transform, seeds, lr=lr)
    assert unharmed()
    return mine, theirs


# One tile, several, odd rows, ranks on both paths; LLaMA-1B's odd 2048 × 5461.
GPU_SHAPES = [
    ((33, 17), 5), ((512, 512), 128), ((1376, 512), 100), ((512, 1376), 256), ((2048, 5461), 256), ((700, 640), 300),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", ["right", "left", "both"])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_projected_adam(shape, side, dtype, kernels):
    """Products of float32 to 5e-6; of 16 bits 1 % of W and 0.5 % of the moments; the rate from host and device."""
    lists = bucket(*shape, side, dtype, 3, GPU)
    for lr in (torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.7, device=GPU)):
        for transform in ("none", "grams", "cautious"):
            mine, theirs = step_both(kernels, lists, lr, side, transform)
            bound = 5e-6 if dtype == torch.float32 else 5e-3
            assert max(error(mine[2], theirs[2]), error(mine[3], theirs[3])) < bound
            if transform == "none":  # otherwise the sign of a tiny R may differ
                assert error(mine[0], theirs[0]) < (4 if side == "both" else 2) * bound


@pytest.mark.parametrize("transform", ["none", "grams", "cautious"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 7), (33, 17), (32000, 64), (3, 5, 8)], ids=str)
def test_dense(shape, dtype, transform, kernels):
    lists = bucket(shape, 0, None, dtype, 3, GPU)
    mine, theirs = step_both(kernels, lists, torch.tensor(0.7), None, transform)
    assert error(mine[0], theirs[0]) < (1e-6 if dtype == torch.float32 else 2e-3)
    assert max(error(mine[2], theirs[2]), error(mine[3], theirs[3])) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grad_max(dtype, kernels):
    grads = [torch.randn(count, device=GPU).to(dtype) for count in (1, 7, 5000, 2**22)]
    for grad, value in zip(grads[1:], (math.nan, math.inf, 1e4), strict=True):
        grad[-1] = value
    torch.testing.assert_close(kernels.grad_max(grads), reference.grad_max(grads), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(13,), (3000,), (33, 17), (64, 512)], ids=str)
def test_rounds_with_the_same_bits(shape, kernels):
    torch.manual_seed(0)
    value, step = torch.randn(shape, device=GPU), torch.tensor(70000.0, device=GPU)
    mine, theirs = (torch.zeros(shape, dtype=torch.bfloat16, device=GPU) for _ in range(2))
    for kernel, own in ((kernels, mine), (reference, theirs)):
        kernel.write_(Weights([own], [step], [2**62 + 12345]), [value.clone()])
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("side", "transform"), [("right", "none"), ("left", "grams"), ("left", "none"), ("both", "cautious")]
)
def test_rows_are_stepped_by_direction_and_length(side, transform, kernels):
    """As test_projected_adam; a tangential gradient is rounded once more than a gradient."""
    for shape, rank in GPU_SHAPES[:3:2]:
        for dtype in DTYPES[:2]:
            mine, theirs, unharmed = twice(length_bucket(shape, rank, side, dtype, 3, GPU), pad=16)
            for kernel, lists in ((kernels, mine), (reference, theirs)):
                step_lengths(kernel, lists, side, transform)
            bound = 1e-5 if dtype == torch.float32 else 1e-2
            assert max(error(a, b) for a, b in zip(mine[2:6], theirs[2:6], strict=True)) < bound
            if transform == "none":
                assert error(mine[0], theirs[0]) < 4 * bound
            assert unharmed()


@pytest.mark.parametrize(
    ("side", "transform"), [("right", "none"), ("left", "grams"), ("left", "none"), ("both", "cautious")]
)
def test_whole_gradients_beside_a_compressed_momentum(side, transform, kernels):
    """As test_projected_adam; float16 is multiplied as float32."""
    for shape, rank in GPU_SHAPES[:3:2]:
        for dtype in DTYPES:
            mine, theirs, unharmed = twice(momentum_bucket(shape, rank, side, dtype, 3, GPU), pad=16)
            for kernel, lists in ((kernels, mine), (reference, theirs)):
                step_momenta(kernel, lists, side, transform)
            assert error(mine[2], theirs[2]) < (5e-3 if dtype == torch.bfloat16 else 5e-6)
            assert max(error(a, b) for a, b in zip(mine[3:5], theirs[3:5], strict=True)) < 5e-6
            if transform == "none":  # W itself is rounded
                bounds = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
                assert error(mine[0], theirs[0]) < bounds[dtype]
            assert unharmed()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_averages(dtype, kernels):
    assert_averages_alike(kernels, dtype, device=GPU)


def test_words(kernels):
    assert_words_alike(kernels, device=GPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lines_are_measured_and_scaled(dtype, kernels):
    assert_scaled_alike(kernels, dtype, device=GPU)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_what_rounding_takes_is_given_back(dtype, kernels):
    """Where no product is rounded."""
    assert_compensated_alike(kernels, dtype, "dense", "coded", "momenta", device=GPU)


CODED_SHAPES = [((9, 300), -1), ((1000, 64), -1), ((256, 5461), -2)]  # few: each is a compilation of Triton's


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("shape", "axis"), CODED_SHAPES, ids=str)
def test_codes_with_the_bits_of_the_reference(shape, axis, bits, kernels):
    torch.manual_seed(0)
    codec = storage.Codec("signed", bits, axis, shape[axis])
    for seeds, begin in (((), 0), ((2**62 + 1, 7, 8), 13)):
        assert_codes_alike(kernels, codec, shape, seeds, begin, device=GPU)


@pytest.mark.parametrize(("bits", "transform"), [(8, "none"), (4, "cautious")])
@pytest.mark.parametrize(("shape", "axis"), CODED_SHAPES, ids=str)
def test_steps_on_codes(shape, axis, bits, transform, kernels):
    for dtype, seeds in ((torch.float32, ()), (torch.bfloat16, (5, 6, 7))):
        mine, theirs, unharmed = twice(coded_bucket(shape, axis, bits, dtype, 3, GPU), pad=16)
        for kernel, lists in ((kernels, mine), (reference, theirs)):
            step_coded(kernel, lists, axis, bits, transform, seeds)
        assert_coded_alike(mine, theirs)
        assert unharmed()
    mine, theirs, unharmed = twice(coded_bucket(shape, axis, bits, torch.float32, 3, GPU))
    updates, expected = (
        update_coded(k, lists, axis, bits, transform) for k, lists in ((kernels, mine), (reference, theirs))
    )
    assert error(updates, expected) < 1e-5
    assert unharmed()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("shape", [(64, 96), (33, 17), (200, 330)], ids=str)
def test_rounds_tiles_with_the_same_bits(shape, side, kernels, monkeypatch):
    """The bases are columns of the identity, so that back(N) is N's own numbers and zeros, with every product."""
    if hasattr(kernels, "DOT"):
        monkeypatch.setattr(kernels, "DOT", dict.fromkeys(kernels.DOT, "tf32x3"))
    torch.manual_seed(0)
    m, n = shape
    params = [torch.randn(shape, device=GPU).bfloat16() for _ in range(2)]
    low = (m, 8) if side == "right" else (8, n)
    updates = [torch.randn(low, device=GPU).bfloat16().float() for _ in range(2)]  # one term of any product holds each
    bases = [torch.eye(n if side == "right" else m, device=GPU)[:, :8].contiguous() for _ in range(2)]
    steps = [torch.tensor(float(i), device=GPU) for i in range(2)]
    mine, theirs = ([p.clone() for p in params] for _ in range(2))
    for kernel, own in ((kernels, mine), (reference, theirs)):
        kernel.apply_(Weights(own, steps, (2**62 + 1, 7)), updates, bases, Hyper(), side)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", ["right", "left"])
def test_products_of_whole_numbers_are_exact(side, dtype, kernels):
    """Every layout of an operand in registers, without a tolerance that could hide one."""
    torch.manual_seed(0)
    for (m, n), rank in GPU_SHAPES:
        grads = [torch.randint(-9, 10, (m, n), device=GPU).to(dtype) for _ in range(2)]
        bases = [torch.randint(-9, 10, (n if side == "right" else m, rank), device=GPU).float() for _ in range(2)]
        lows = kernels.project(grads, bases, side, torch.float32)
        exact = reference.project(grads, [basis.double() for basis in bases], side, torch.float64)
        assert all(torch.equal(low.double(), wanted) for low, wanted in zip(lows, exact, strict=True))


@pytest.mark.parametrize("rank", [64, 300])
def test_step_is_captured_and_waits_for_nothing(rank, kernels):
    """Replays of a CUDA graph take the steps that calls would, the step counts and a changed rate included."""
    lr = torch.tensor(0.7, device=GPU)
    mine, theirs = (bucket((512, 400), rank, "right", torch.bfloat16, 3, GPU) for _ in range(2))
    step = partial(step_projected, kernels, side="right", seeds=(5, 6, 7), lr=lr)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for lists in (mine, theirs):  # compiles
            step(lists)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(mine)
    for _ in range(3):
        graph.replay()
        step(theirs)
        lr.mul_(0.5)
    for a, b in zip(mine, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)


KINDS = {
    "": {},
    "8bit": {"state_bits": 8},
    "kahan": {"rounding": "kahan"},
    "lion": {"rule": so.Lion()},
    "adafactor": {"rule": so.Adafactor()},
}
CAPTURED = ("galore", "galore_8bit", "galore_kahan", "galore_lion", "galore_adafactor", "flora", "apollo")
CAPTURED += ("osd", "osd_8bit", "osd_lion", "gradnormlorp", "gradnormlorp_8bit", "grams", "adamw", "adamw_8bit")


@pytest.mark.parametrize("name", CAPTURED)
def test_a_whole_step_is_captured_and_waits_for_nothing(name, kernels):
    """Between two refreshes: replays are eager steps, bad gradients, counts and a changed rate included."""
    ends = []
    for replays in (False, True):
        params = net(torch.bfloat16).to(GPU)
        lr = torch.tensor(0.1, device=GPU)
        options = {"lr": lr, "weight_decay": 0.1, "backend": name_of(kernels)}
        method, _, kind = name.partition("_")
        options |= KINDS[kind]
        if method == "adamw":
            opt = so.SubspaceOptimizer(params.values(), **options)
        else:
            options |= {"rank": 2, "update_proj_gap": 6, "stagger": False}
            opt = so.OPTIMIZERS[method](params.values(), **options)
        for param in params.values():
            param.grad = torch.empty_like(param)

        def new_gradients(step, params=params):
            for i, param in enumerate(params.values()):
                noise = torch.Generator().manual_seed(100 * step + i)
                param.grad.copy_(torch.randn(param.shape, generator=noise))
            if step % 4 == 3:
                next(iter(params.values())).grad.view(-1)[0] = math.nan

        def ordinary(opt=opt):
            torch.cuda.set_sync_debug_mode("error")
            try:
                opt.clip_grad_norm_(1.0)
                opt.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")

        graph = None
        for step in range(20):
            new_gradients(step)
            if step < 2 or not opt.ordinary_steps:
                opt.clip_grad_norm_(1.0)
                opt.step()
                graph = None if name == "flora" else graph  # which has captured the seed of its bases
            elif not replays:
                ordinary()
            elif graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    ordinary()
                graph.replay()  # what has been captured has not run; its ages have been counted
            else:
                graph.replay()
                opt.replayed()
            lr.mul_(0.9)
        ends.append((params, opt))
    (eager, one), (replayed, other) = ends
    assert one.skipped_updates == other.skipped_updates == 5
    for name_, param in eager.items():
        assert torch.equal(param, replayed[name_]), name_
        assert one.state[param]["step"] == other.state[replayed[name_]]["step"]


def launched(call):
    """Names of what a call launches where Triton's table of addresses is already there."""
    for _ in range(3):
        call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    there = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [event.name for event in there if not event.is_user_annotation]


@pytest.mark.parametrize(("rank", "most"), [(64, 4), (300, 5)])
def test_launches_do_not_grow_with_the_bucket(rank, most, kernels):
    """Bases to 16 bits, step counts, one fused kernel or two."""
    for count in (2, 24):
        lists = bucket((512, 400), rank, "right", torch.bfloat16, count, GPU)
        names = launched(partial(step_projected, kernels, lists, "right", seeds=range(count)))
        assert len(names) <= most, names


def test_bases_of_a_bucket_are_decoded_in_one_launch(kernels):
    codec = storage.Codec("linear", 4, -1, 300)
    codes, scales = codec.shapes((512, 300))
    for count in (2, 24):
        kept = [torch.zeros(codes, dtype=torch.uint8, device=GPU)] * count, [torch.ones(scales, device=GPU)] * count
        xs = [torch.empty(512, 300, device=GPU) for _ in range(count)]
        names = launched(lambda xs=xs, kept=kept: codec.decode_(xs, *kept, kernels))
        assert len(names) == 1, names


def test_launches_of_bases_that_learn_do_not_grow_with_the_bucket(kernels):
    """Not twice as many for twelve times the tensors: torch's operations on lists take a few more for more elements."""
    counts = []
    for count in (2, 24):
        params = [torch.nn.Parameter(torch.randn(512, 400, device=GPU).bfloat16()) for _ in range(count)]
        opt = so.OnlineSubspaceDescent(params, rank=64, backend=name_of(kernels))
        for param in params:
            param.grad = torch.randn_like(param)
        counts.append(len(launched(opt.step)))
    assert counts[1] < 2 * counts[0], counts
