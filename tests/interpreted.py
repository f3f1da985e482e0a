"""The Triton kernels beside the reference, under Triton's interpreter: run by test_triton.py in its own process.

Uninitialised memory is NaN here, and every tensor that a kernel may write lies between canaries.
"""

from dataclasses import replace
from functools import partial

import interpreter  # noqa: F401
import pytest
import torch
from buckets import (
    HYPER,
    PARTS,
    RATE,
    assert_averages_alike,
    assert_coded_alike,
    assert_coded_rows_alike,
    assert_codes_alike,
    assert_compensated_alike,
    assert_left_alone,
    assert_scaled_alike,
    assert_words_alike,
    bucket,
    coded_bucket,
    error,
    length_bucket,
    members,
    momentum_bucket,
    part_and_whole,
    some_unusable,
    step_coded,
    step_lengths,
    step_momenta,
    step_projected,
    twice,
    update_coded,
)
from training import ALL_METHODS, assert_same, build, net, train

import subspace_optim as so
from subspace_optim import engine, storage
from subspace_optim.kernels import reference, select
from subspace_optim.kernels import triton as kernels
from subspace_optim.types import Hyper, Moments, Weights

BITS16 = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _poisoned():
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def exact(monkeypatch):
    """float32 products for every dtype; the interpreter's float32 dot is exact float32."""
    monkeypatch.setattr(kernels, "DOT", dict.fromkeys(kernels.DOT, "tf32x3"))


@pytest.fixture
def fuse(monkeypatch):
    """Choose the path of projected_adam_: `_fused` (for odd rows too) up to this rank."""

    def choose(rank):
        monkeypatch.setattr(kernels, "FUSED_RANK", dict.fromkeys(kernels.FUSED_RANK, rank))
        monkeypatch.setattr(kernels, "FUSED_MULTIPLE", 1)

    return choose


@pytest.fixture(params=["fused", "two kernels"])
def path(request, fuse):
    fuse(256 if request.param == "fused" else 0)


def step_both(lists, side, transform="none", seeds=(), lr=RATE):
    mine, theirs, unharmed = twice(lists)
    for kernel, own in ((kernels, mine), (reference, theirs)):
        step_projected(kernel, own, side, transform, seeds, lr=lr)
    assert unharmed()
    return mine, theirs


SHAPES = [
    ((33, 17), 5, "right"),
    ((17, 33), 5, "left"),
    ((2, 9), 1, "left"),
    ((5, 2), 1, "right"),
    ((40, 24), 8, "left"),
    ((100, 40), 20, "right"),
    ((40, 100), 20, "left"),
    ((33, 17), 5, "both"),
    ((40, 24), 8, "both"),
    ((40, 100), 20, "both"),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_projected_adam_float32(shape, path):
    mine, theirs = step_both(
        bucket(*shape, torch.float32), shape[-1], {5: "grams", 8: "cautious"}.get(shape[1], "none")
    )
    for a, b in zip(mine, theirs):
        assert error(a, b) < 1e-6


@pytest.mark.parametrize("dtype", BITS16, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:5:2], ids=str)
def test_projected_adam_half_precision(shape, dtype, path):
    """With 16-bit operands: the moments to 0.5 %, W (rounded itself) to 1 %."""
    mine, theirs = step_both(bucket(*shape, dtype), shape[-1])
    for (a, b), bound in zip(zip(mine, theirs), (1e-2, 0, 5e-3, 5e-3, 0, 0)):
        assert error(a, b) <= bound


@pytest.mark.parametrize("side", ["right", "both"])
@pytest.mark.parametrize("dtype", BITS16, ids=str)
def test_projected_adam_half_precision_with_exact_products(dtype, side, path, exact):
    mine, theirs = step_both(bucket((40, 24), 8, side, dtype), side)
    for (a, b), bound in zip(zip(mine, theirs), (1e-3, 0, 1e-6, 1e-6, 0, 0)):  # W: a tie may round the other way
        assert error(a, b) <= bound


def test_rank_beyond_one_tile(fuse):
    fuse(64)
    for side in ("right", "left"):
        mine, theirs = step_both(bucket((150, 140), 70, side, torch.float32, count=1), side)
        for a, b in zip(mine, theirs):
            assert error(a, b) < 1e-6


def test_workspace_is_bounded(fuse, monkeypatch):
    """A bucket whose updates do not fit is stepped in parts, and no tensor twice."""
    fuse(0)
    monkeypatch.setattr(kernels, "_WORKSPACE", 2 * 33 * 5 * 4)
    mine, theirs = step_both(bucket((33, 17), 5, "right", torch.float32, count=5), "right", seeds=range(5))
    for a, b in zip(mine, theirs):
        assert error(a, b) < 1e-6


@pytest.mark.parametrize("transform", ["none", "grams", "cautious"])
@pytest.mark.parametrize("dtype", kernels.DOT, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (33, 17), (2, 700), (3, 2, 5)], ids=str)
def test_dense(shape, dtype, transform):
    mine, theirs = step_both(bucket(shape, None, None, dtype, count=3), None, transform)
    for (a, b), bound in zip(zip(mine, theirs), (1e-6 if dtype == torch.float32 else 2e-3, 0, 1e-6, 1e-6, 0, 0)):
        assert error(a, b) <= bound


def test_first_steps_and_zero_gradients():
    """The usual betas at k = 1, where 1 - β₂ᵏ has few digits in float32; a zero gradient moves nothing."""
    params, grads, *state, steps = bucket((6, 4), None, None, torch.float32)
    state = [[torch.zeros_like(t) for t in column] for column in state[:2]] + [[]]
    grads[1].zero_()
    mine, theirs, _ = twice((params, grads, *state, [torch.zeros(()) for _ in steps]))
    for _ in range(3):
        for kernel, own in ((kernels, mine), (reference, theirs)):
            step_projected(kernel, own, None, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, scale=1.0)
    assert error(mine[0], theirs[0]) < 1e-6
    assert torch.equal(mine[0][1], params[1])


@pytest.mark.parametrize("lr", [torch.tensor([0.5, 0.25]), torch.tensor([0.5, 0.25], dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("shape", [((33, 17), 5, "right"), ((17, 33), 5, "left"), ((7,), None, None)], ids=str)
def test_apply_with_a_rate_for_each_tensor_and_signs(shape, lr):
    side = shape[-1]
    params, _, updates, _, bases, steps = bucket(*shape, torch.float32)
    for sign in (False, True):
        mine, theirs, unharmed = twice((params, updates, bases, steps))
        for kernel, (w, n, q, k) in ((kernels, mine), (reference, theirs)):
            kernel.apply_(Weights(w, k), n, q, replace(HYPER, lr=lr), side, sign)
        assert error(mine[0], theirs[0]) < 1e-6
        assert unharmed()


@pytest.mark.parametrize("shape", [((33, 17), 5, "right"), ((17, 33), 5, "left"), ((7,), None, None)], ids=str)
def test_what_is_not_finite_is_left_alone(shape, path, monkeypatch):
    """By the device, step count included; the others get the bits of their own call."""
    monkeypatch.setattr(kernels, "_WORKSPACE", 2 * 33 * 5 * 4)
    lists, side = bucket(*shape, torch.bfloat16, count=4), shape[-1]
    seeds, flags = [5, 6, 7, 8], some_unusable(lists)
    mine, before, unharmed = twice(lists)
    alone = members(before, flags)[0]
    step_projected(kernels, mine, side, "grams", seeds, finite=flags)
    step_projected(kernels, alone, side, "grams", members([seeds], flags)[0][0])
    stepped, left = members(mine, flags)
    for own, expected in ((stepped, alone), (left, members(lists, flags)[1])):
        torch.testing.assert_close(own, expected, rtol=0, atol=0, equal_nan=True)
    assert unharmed()


@pytest.mark.parametrize("eps_inside", [False, True])
@pytest.mark.parametrize("transform", ["none", "grams", "cautious"])
def test_adam_update(transform, eps_inside):
    _, lows, means, squares, _, steps = bucket((33, 17), None, None, torch.float32)
    mine, theirs, unharmed = twice((lows, means, squares, steps))
    out, expected = (
        kernel.adam_update_(r, Moments(m, v), k, replace(HYPER, transform=transform), eps_inside)
        for kernel, (r, m, v, k) in ((kernels, mine), (reference, theirs))
    )
    for a, b in zip((out, *mine), (expected, *theirs)):
        assert error(a, b) < 1e-6
    assert unharmed()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_averages(dtype):
    assert_averages_alike(kernels, dtype)


def test_words():
    assert_words_alike(kernels)


@pytest.mark.parametrize("shape", [*SHAPES[:5], SHAPES[-1]], ids=str)
def test_project(shape):
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 5e-3)):
        _, grads, _, _, bases, _ = bucket(*shape, dtype)
        lows = kernels.project(grads, bases, shape[-1], torch.float32)
        assert error(lows, reference.project(grads, bases, shape[-1], torch.float32)) < bound


# ---- GradNormLoRP's whole step --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "transform"), [("right", "none"), ("left", "grams"), ("right", "cautious"), ("both", "cautious")]
)
def test_rows_are_stepped_by_direction_and_length(side, transform, monkeypatch):
    monkeypatch.setattr(kernels, "_WORKSPACE", 4000)  # in parts
    for shape, rank in (((33, 17), 5), ((40, 100), 20)):
        lists = length_bucket(shape, rank, side, torch.float32, count=3)
        mine, theirs, unharmed = twice(lists)
        step_lengths(kernels, mine, side, transform, lr=torch.tensor(0.7))
        step_lengths(reference, theirs, side, transform)
        for a, b in zip(mine, theirs):
            assert error(a, b) < 4e-6  # sums over rows that cancel
        assert unharmed()


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_in_half_precision_are_rounded_alike(side, exact):
    mine, theirs, unharmed = twice(length_bucket((40, 72), 8, side, torch.bfloat16), pad=16)
    for kernel, lists in ((kernels, mine), (reference, theirs)):
        step_lengths(kernel, lists, side, "none", SEEDS)
    for a, b in zip(mine[2:], theirs[2:]):
        assert error(a, b) < 4e-6
    for a, b in zip(mine[0], theirs[0]):
        assert (a != b).sum() <= 2 + 1e-3 * a.numel()
    assert unharmed()


def test_strided_rows_are_stepped_in_their_places():
    mine, theirs, _ = twice(length_bucket((12, 9), 3, "right", torch.float32))
    mine[0] = [torch.empty(9, 12).T.copy_(p) for p in mine[0]]
    for kernel, lists in ((kernels, mine), (reference, theirs)):
        step_lengths(kernel, lists, "right")
    assert error(mine[0], theirs[0]) < 4e-6


@pytest.mark.parametrize("side", ["right", "both"])
def test_rows_of_what_is_not_finite_are_left_alone(side):
    """By the whole step, and by the pieces of a kernel that has none."""
    lists = length_bucket((9, 14), 3, side, torch.bfloat16, count=4)

    def step(kernel, own, flags):
        step_lengths(kernel, own, side, "cautious", (5, 6, 7, 8), flags)

    assert error(*assert_left_alone(lists, step, kernels, reference)) < 2e-2


@pytest.mark.parametrize(
    ("side", "bits", "transform"), [("right", 8, "none"), ("left", 4, "cautious"), ("both", 8, "grams")]
)
def test_rows_are_stepped_on_codes(side, bits, transform, monkeypatch):
    monkeypatch.setattr(kernels, "_WORKSPACE", 4000)  # in parts
    assert_coded_rows_alike(kernels, side, bits, transform)


# ---- Flora's whole step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "transform"), [("right", "none"), ("left", "grams"), ("right", "cautious"), ("both", "cautious")]
)
def test_whole_gradients_beside_a_compressed_momentum(side, transform, monkeypatch):
    monkeypatch.setattr(kernels, "_WORKSPACE", 4000)  # in parts
    for shape, rank, rates in (((33, 17), 5, RATE), ((20, 140), 9, torch.tensor([0.5, 0.7, 0.2]))):
        mine, theirs, unharmed = twice(momentum_bucket(shape, rank, side, torch.float32, count=3))
        step_momenta(kernels, mine, side, transform, lr=rates)
        theirs = [[t.double() for t in column] for column in theirs]
        step_momenta(reference, theirs, side, transform, lr=rates)
        for a, b in zip(mine, theirs):
            assert error(a, b) < 2e-6
        assert unharmed()


@pytest.mark.parametrize("side", ["right", "left"])
def test_momenta_in_half_precision(side, exact):
    for dtype in BITS16:
        mine, theirs, unharmed = twice(momentum_bucket((40, 72), 8, side, dtype), pad=16)
        for kernel, lists in ((kernels, mine), (reference, theirs)):
            step_momenta(kernel, lists, side, "none", SEEDS)
        for a, b in zip(mine[2:], theirs[2:]):
            assert error(a, b) < 2e-6
        for a, b in zip(mine[0], theirs[0]):  # rounded by the same bits, of a value that may differ in its last one
            assert (a != b).sum() <= 2 + 1e-3 * a.numel()
        assert unharmed()


@pytest.mark.parametrize("side", ["right", "both"])
def test_momenta_of_what_is_not_finite_are_left_alone(side):
    """Likewise, with a rate for each."""
    lists, rates = momentum_bucket((9, 14), 3, side, torch.bfloat16, count=4), torch.tensor([0.1, 0.2, 0.3, 0.4])

    def step(kernel, own, flags):
        step_momenta(kernel, own, side, "cautious", (5, 6, 7, 8), flags, rates)

    assert error(*assert_left_alone(lists, step, kernels, reference)) < 2e-2


# ---- stochastic rounding: the same bits as the reference, where the value before rounding is the same ---------------

SEEDS = (2**62 + 12345, 7)


def rounded_both(params, updates, bases, steps, side):
    mine, theirs, unharmed = twice((params, updates, bases, steps))
    for kernel, (w, n, q, k) in ((kernels, mine), (reference, theirs)):
        kernel.apply_(Weights(w, k, SEEDS), n, q, Hyper(), side)
    assert unharmed()
    return mine[0], theirs[0]


@pytest.mark.parametrize("shape", [(1,), (13,), (3000,), (33, 17), (4, 64)], ids=str)
def test_rounding_bits_dense(shape):
    params = [torch.randn(shape).bfloat16() for _ in SEEDS]
    updates = [torch.randn(shape) for _ in SEEDS]
    mine, theirs = rounded_both(params, updates, [], [torch.tensor(3.0), torch.tensor(70000.0)], None)
    for a, b, before in zip(mine, theirs, params):
        assert torch.equal(a, b)
        assert not torch.equal(a, before)


@pytest.mark.parametrize("shape", [((33, 17), 5), ((40, 24), 16), ((9, 11), 4), ((100, 136), 3)], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_rounding_bits_projected(shape, side, exact):
    """The bases are columns of the identity, so that back(N) is N's own numbers and zeros."""
    shape, rank = shape
    m, n = shape
    d, low = (m, (rank, n)) if side == "left" else (n, (m, rank))
    params = [torch.randn(shape).bfloat16() for _ in SEEDS]
    updates = [torch.randn(low) for _ in SEEDS]
    bases = [torch.eye(d)[:, torch.randperm(d)[:rank]].contiguous() for _ in SEEDS]
    mine, theirs = rounded_both(params, updates, bases, [torch.tensor(3.0), torch.tensor(70000.0)], side)
    for a, b in zip(mine, theirs):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [((33, 17), 5), ((80, 40), 16), ((9, 11), 4)], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_rounding_bits_of_both_paths_agree(shape, side, exact, fuse):
    """Whole numbers in G and columns of the identity as bases make all sums exact, whatever their order."""
    shape, rank = shape
    m, n = shape
    d = m if side == "left" else n
    lists = list(bucket(shape, rank, side, torch.bfloat16))
    lists[1] = [torch.randint(-9, 10, shape).bfloat16() for _ in SEEDS]
    lists[4] = [torch.eye(d)[:, :rank].contiguous() for _ in SEEDS]
    results = []
    for largest in (256, 0):
        fuse(largest)
        mine, _, unharmed = twice(lists)
        step_projected(kernels, mine, side, seeds=SEEDS)
        assert unharmed()
        results.append(mine[0])
    for fused, two in zip(*results):
        assert torch.equal(fused, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lines_are_measured_and_scaled(dtype):
    assert_scaled_alike(kernels, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_rounding_takes_is_given_back(dtype, path, exact):
    assert_compensated_alike(kernels, dtype, "dense", "coded", "right", "left", "both", "momenta")


@pytest.mark.parametrize("part", PARTS[:4], ids=str)
@pytest.mark.parametrize("side", [None, "right", "left"])
def test_parts_are_rounded_as_the_whole(side, part, path):
    mine, wanted = part_and_whole(kernels, side, *part)
    assert all(map(torch.equal, mine, wanted))


@pytest.mark.parametrize("dtype", kernels.DOT, ids=str)
@pytest.mark.parametrize("seed", [None, 2**40 + 1])
def test_write(dtype, seed):
    value, seeds = torch.randn(33, 17), () if seed is None else (seed,)
    mine, theirs = (torch.full((33, 17), 3.0, dtype=dtype) for _ in range(2))
    for kernel, own in ((kernels, mine), (reference, theirs)):
        kernel.write_(Weights([own], [torch.tensor(5.0)], seeds), [value.clone()])
    assert torch.equal(mine, theirs)


# ---- quantised state: the same bits as the reference ----------------------------------------------------------------


@pytest.mark.parametrize(("seeds", "begin"), [((), 0), ((2**62 + 12345, 7, 8), 0), ((7, 8, 9), 40), ((7, 8, 9), 13)])
@pytest.mark.parametrize(("shape", "axis"), [((5, 7), -1), ((9, 260), -1), ((3, 5, 24), -1), ((264, 11), -2)], ids=str)
@pytest.mark.parametrize(("kind", "bits"), [("signed", 8), ("unsigned", 4), ("linear", 8), ("linear", 4)])
def test_codes(kind, bits, shape, axis, seeds, begin):
    assert_codes_alike(kernels, storage.Codec(kind, bits, axis, shape[axis]), shape, seeds, begin)


CODED_SHAPES = [((5, 7), -1), ((7, 260), -1), ((3, 5, 24), -1), ((260, 5), -2), ((24, 70), -2)]


@pytest.mark.parametrize(("bits", "transform"), [(8, "none"), (4, "grams"), (4, "cautious")])
@pytest.mark.parametrize(("shape", "axis"), CODED_SHAPES, ids=str)
def test_a_step_on_codes(shape, axis, bits, transform):
    for dtype, seeds, begin in ((torch.float32, (), 0), (torch.bfloat16, SEEDS, shape[axis])):
        mine, theirs, unharmed = twice(coded_bucket(shape, axis, bits, dtype), pad=16)
        for kernel, lists in ((kernels, mine), (reference, theirs)):
            step_coded(kernel, lists, axis, bits, transform, seeds, begin, eps_inside=bool(begin))
        assert_coded_alike(mine, theirs)
        assert unharmed()


@pytest.mark.parametrize("transform", ["none", "grams", "cautious"])
@pytest.mark.parametrize(("shape", "axis"), CODED_SHAPES[1::2], ids=str)
def test_an_update_on_codes(shape, axis, transform):
    mine, theirs, unharmed = twice(coded_bucket(shape, axis, 4, torch.float32))
    updates, expected = (update_coded(*each, axis, 4, transform) for each in ((kernels, mine), (reference, theirs)))
    assert error(updates, expected) < 1e-6
    assert_coded_alike(mine, theirs)
    assert unharmed()


@pytest.mark.parametrize("transform", ["grams", "cautious"])
def test_what_is_not_finite_is_left_alone_on_codes(transform):
    lists = coded_bucket((9, 20), -1, 8, torch.bfloat16, count=4)
    flags = some_unusable(lists)
    mine, before, unharmed = twice(lists)
    step_coded(kernels, mine, -1, 8, transform, (5, 6, 7, 8), finite=flags, lr=torch.tensor([0.1, 0.2, 0.3, 0.4]))
    step_coded(reference, before, -1, 8, transform, (5, 6, 7, 8), finite=flags, lr=torch.tensor([0.1, 0.2, 0.3, 0.4]))
    mine[1] = before[1] = []
    assert_coded_alike(mine, before)
    assert unharmed()
    left = [members(each, flags)[1] for each in (mine, lists)]
    assert all(torch.equal(x, y) for k in (0, 2, 3, 4) for x, y in zip(left[0][k], left[1][k], strict=True))


# ---- what the kernels leave to the reference, and whole optimizers ---------------------------------------------------


@pytest.mark.parametrize("transform", ["none", "cautious"])
def test_left_to_the_reference(transform):
    lists = [[t.double() for t in column] for column in bucket((12, 9), 3, "right", torch.float32)]
    mine, theirs = step_both(lists, "right", transform)
    for a, b in zip(mine, theirs):
        for x, y in zip(a, b):
            assert torch.equal(x, y)


def test_strided_tensors_are_left_to_the_reference():
    mine, theirs, _ = twice(bucket((12, 9), 3, "right", torch.float32))
    mine[0] = [torch.empty(9, 12).T.copy_(p) for p in mine[0]]
    for kernel, lists in ((kernels, mine), (reference, theirs)):
        step_projected(kernel, lists, "right")
    assert error(mine[0], theirs[0]) < 1e-6


def test_a_stale_graph_is_refused():
    lists = bucket((12, 9), 3, "right", torch.float32)
    weight = lists[0][0].requires_grad_()
    loss = (weight * weight).sum()
    with torch.no_grad():
        step_projected(kernels, lists, "right")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def refuse_projected(allowed, *arguments):
    """In place of a function of the reference: the kernels should have done it themselves."""
    if allowed is None or arguments[2] is not None:
        raise AssertionError("left to the reference")
    return allowed(*arguments)


WHOLE = ("galore", "galore_grams", "galore_lion", "galore_adafactor", "flora", "osd", "gradnormlorp", "adamw_cautious")


@pytest.mark.parametrize("method", [m for m in ALL_METHODS if m.id in WHOLE], ids=str)
def test_three_steps_of_an_optimizer(method, monkeypatch):
    mine, theirs = net(), net()
    opt, other = build(method, mine), build(method, theirs, backend="reference")
    train(theirs, other, range(3))
    monkeypatch.setattr(select, "resolve", lambda backend, plan: kernels)
    for name in (
        "project",
        "adam_update_",
        "linear_update_",
        "apply_",
        "projected_adam_",
    ):  # of a dense gradient, project is the reference's
        allowed = getattr(reference, name) if name == "project" else None
        monkeypatch.setattr(reference, name, partial(refuse_projected, allowed))
    train(mine, opt, range(3))
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_an_optimizer_on_codes_leaves_it_to_the_device_what_is_skipped(monkeypatch):
    """As if the host had known: to what one code more or less is of a step, and step counts exactly."""
    ends = []
    for device in (False, True):
        if device:
            monkeypatch.setattr(select, "_resolve", lambda backend, plan: kernels)
            monkeypatch.setattr(engine, "_waits", lambda peaks: True)
            monkeypatch.setattr(reference, "taken", lambda *_: pytest.fail("left to the reference"))
        params = net(names=("tall", "wide", "vector"))
        params["table"] = torch.nn.Parameter(torch.ones(9, 40))
        groups = [{"params": list(params.values())[:3]}, {"params": [params["table"]], "rank": None}]
        opt = so.GaLore(groups, rank=2, lr=0.01, state_bits=8, update_proj_gap=100, stagger=False, backend="reference")
        for step in range(4):
            for i, param in enumerate(params.values()):
                param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(10 * step + i))
            if step == 2:
                params["tall"].grad[0, 0] = params["table"].grad[3] = torch.nan
            opt.step()
        assert opt.skipped_updates == 2
        ends.append((params, [state["step"] for state in opt.state.values()]))
    for name, param in ends[0][0].items():
        torch.testing.assert_close(ends[1][0][name], param, rtol=1e-3, atol=1e-4)
    assert ends[0][1] == ends[1][1]


def test_a_run_is_the_same_twice():
    ends = []
    for _ in range(2):
        torch.manual_seed(1)
        lists = bucket((33, 17), 5, "right", torch.bfloat16)
        step_projected(kernels, lists, "right", seeds=SEEDS)
        ends.append({str(i): p for i, p in enumerate(lists[0])})
    assert_same(*ends)
