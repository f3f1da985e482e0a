"""The CUDA kernels beside the reference, without a GPU: csrc/cuda compiled by g++ under tests/emulator/cuda.h.

Uninitialised memory is NaN here, and every tensor that a kernel may write lies between canaries.
"""

import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import emulated
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
from training import ALL_METHODS, build, net, set_gradients, train

from subspace_optim import _ext, engine, philox, storage
from subspace_optim.kernels import cuda as kernels
from subspace_optim.kernels import native, reference, select
from subspace_optim.types import TRANSFORMS, Hyper, Moments, Weights, make_plan

pytestmark = pytest.mark.skipif(emulated.MISSING is not None, reason=str(emulated.MISSING))

SEEDS = (2**62 + 12345, 7)
SIDES = ("right", "left", "both")
# Less than a tile, tiles and their edges; more than one tile of lines, of columns, and (130) of float32's fused rank.
SHAPES = [((2, 9), 1), ((33, 17), 3), ((72, 64), 8), ((70, 270), 64), ((150, 140), 130)]
SANITIZED = "SSO_EMULATOR_FLAGS" in os.environ
if SANITIZED:  # which takes 20 times as long
    SHAPES = [((2, 9), 1), ((33, 17), 3), ((70, 270), 5)]
PADS = (3, 16)  # no address aligned, or all


@pytest.fixture(scope="module")
def library():
    return emulated.library(*os.environ.get("SSO_EMULATOR_FLAGS", "").split())


@pytest.fixture(scope="module")
def tensor_cores():
    return emulated.library(emulated.TF32X3)


@pytest.fixture(autouse=True)
def _emulated(library, monkeypatch):
    monkeypatch.setattr(kernels, "load", lambda: library)
    library.emulator_order(emulated.RANDOM)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def two_halves(monkeypatch):
    """What `fused` would take goes through `project` and `apply`."""
    monkeypatch.setattr(kernels, "FUSED_RANK", dict.fromkeys(kernels.TYPES, 0))


def whole(*shape):
    return torch.randint(-9, 10, shape).float()


def columns(d, rank):
    """Of the identity, some negative: products with them are exact in every type."""
    return torch.eye(d)[:, torch.randperm(d)[:rank]].contiguous() * torch.randint(0, 2, (rank,)).mul(2).sub(1)


def step_both(lists, side, transform="none", seeds=(), lr=RATE, pad=3):
    """After one step: of the kernels, and of the reference in float64 if the parameters are float32."""
    mine, theirs, unharmed = twice(lists, pad)
    step_projected(kernels, mine, side, transform, seeds, lr=lr)
    assert unharmed()
    if lists[0][0].dtype == torch.float32:
        theirs = [[t.double() for t in column] for column in theirs]
    step_projected(reference, theirs, side, transform, seeds, lr=lr)
    return mine, theirs


def assert_close(mine, theirs, *bounds):
    """Parameters, first and second moments within these; gradients, bases and steps as they must be."""
    for a, b, bound in zip(mine, theirs, (bounds[0], 0, *bounds[1:], 0, 0), strict=True):
        assert error(a, b) <= bound


# ---- products: whole numbers, of which every sum is exact in whatever order and precision ---------------------------


@pytest.mark.parametrize("order", [emulated.BACKWARD, emulated.RANDOM])
@pytest.mark.parametrize("dtype", kernels.TYPES, ids=str)
@pytest.mark.parametrize("side", SIDES)
def test_projections_are_exact(side, dtype, order, library):
    library.emulator_order(order)
    for shape, rank in SHAPES:
        m, n = shape
        sizes = {"right": (n,), "left": (m,), "both": (m, n)}[side]
        grads = [whole(*shape).to(dtype) for _ in SEEDS]
        bases = [whole(d, rank) if side != "both" else columns(d, rank) for d in sizes for _ in SEEDS]
        (grads, bases), given, unharmed = twice((grads, bases), PADS[order % 2])
        lows = kernels.project(grads, bases, side, torch.float32)
        assert all(map(torch.equal, lows, reference.project(*given, side, torch.float32)))
        assert unharmed()


@pytest.mark.parametrize("order", [emulated.BACKWARD, emulated.RANDOM])
@pytest.mark.parametrize("dtype", kernels.TYPES, ids=str)
@pytest.mark.parametrize("side", SIDES)
def test_back_projections_are_exact_and_round_alike(side, dtype, order, library):
    library.emulator_order(order)
    for shape, rank in SHAPES:
        m, n = shape
        sizes, low = {
            "right": ((n,), (m, rank)),
            "left": ((m,), (rank, n)),
            "both": ((m, n), (rank, rank)),
        }[side]
        params = [torch.randn(shape).to(dtype) for _ in SEEDS]
        updates = [whole(*low) for _ in SEEDS]
        bases = [whole(d, rank) if side != "both" else columns(d, rank) for d in sizes for _ in SEEDS]
        steps = [torch.tensor(3.0), torch.tensor(70000.0)]
        rests = [(param * 2.0**-10).to(dtype) for param in params]
        for seeds in ((), SEEDS, rests)[: 2 if dtype == torch.float32 else 3]:
            mine, theirs, unharmed = twice((params, updates, bases, steps, rests), PADS[order % 2])
            for kernel, (w, n, q, k, own) in ((kernels, mine), (reference, theirs)):
                weights = Weights(w, k, own if seeds is rests else seeds)
                kernel.apply_(weights, n, q, Hyper(torch.tensor(2.0**-9)), side, dtype == torch.float16)
            assert all(map(torch.equal, mine[0] + mine[4], theirs[0] + theirs[4]))
            assert unharmed()


def test_float32_products_on_tensor_cores(tensor_cores, monkeypatch):
    """As three products of 11 bits: 1e-6, as Triton's tf32x3."""
    monkeypatch.setattr(kernels, "load", lambda: tensor_cores)
    for side in ("right", "left"):
        for shape, rank in SHAPES[1:]:
            mine, theirs = step_both(bucket(shape, rank, side, torch.float32, count=1), side)
            assert_close(mine, theirs, 1e-6, 1e-6, 1e-6)


# ---- the step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("transform", "pad"), [*zip(TRANSFORMS, (3, 16, 3))])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("shape", "rank"), SHAPES, ids=str)
def test_projected_adam(shape, rank, side, transform, pad):
    mine, theirs = step_both(bucket(shape, rank, side, torch.float32), side, transform, pad=pad)
    assert_close(mine, theirs, 1e-6, 1e-6, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("shape", "rank"), SHAPES[1:], ids=str)
def test_projected_adam_half_precision(shape, rank, side, dtype):
    """With 16-bit operands: the moments to 0.5 %, W (rounded itself) to 1 %; two roundings more on both sides."""
    mine, theirs = step_both(bucket(shape, rank, side, dtype), side)
    assert_close(mine, theirs, 2e-2 if side == "both" else 1e-2, 5e-3, 5e-3)


@pytest.mark.parametrize("transform", ["none", "grams"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("dtype", kernels.TYPES, ids=str)
def test_one_pass_and_two_halves_give_the_same_bits(side, transform, dtype, request):
    """However they are rounded: with what was taken before, too."""
    lists = [bucket(shape, rank, side, dtype) for shape, rank in SHAPES[:4]]

    def ends():
        for own in lists:
            for rests in ([], [(w * 2.0**-10).to(dtype) for w in own[0]])[: 1 if dtype == torch.float32 else 2]:
                (*mine, rests), _, unharmed = twice((*own, rests), 16)
                step_projected(kernels, mine, side, transform, rests or SEEDS)
                assert unharmed()
                yield [*mine, rests]

    one = list(ends())
    request.getfixturevalue("two_halves")
    for first, second in zip(one, ends(), strict=True):
        assert all(torch.equal(a, b) for pair in zip(first, second) for a, b in zip(*pair))


def test_orders_of_threads_give_the_same_bits(library, two_halves):
    for dtype in kernels.TYPES:
        ends = []
        for order in (emulated.FORWARD, emulated.BACKWARD, emulated.RANDOM):
            library.emulator_order(order)
            ends.append(step_both(bucket((70, 140), 65, "left", dtype), "left", "cautious", SEEDS)[0])
        for other in ends[1:]:
            assert all(torch.equal(a, b) for pair in zip(ends[0], other) for a, b in zip(*pair))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", kernels.TYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (7,), (33, 17), (2, 4100), (3, 2, 5)], ids=str)
def test_dense(shape, dtype, transform):
    """The bits of the CPU kernels, where those have been built; 16-bit W near those of the reference anyway."""
    lists = bucket(shape, None, None, dtype, count=3)
    seeds = (*SEEDS, 8)
    for pad in PADS:
        mine, theirs = step_both(lists, None, transform, seeds, pad=pad)
        assert_close(mine, theirs, 1e-6 if dtype == torch.float32 else 4e-3, 1e-6, 1e-6)
        if _ext.load() is None:
            _, own, _ = twice(lists)
            step_projected(native, own, None, transform, seeds)
            assert all(torch.equal(a, b) for pair in zip(mine, own) for a, b in zip(*pair))


@pytest.mark.parametrize("lr", [torch.tensor([0.5, 0.25]), torch.tensor(0.5), torch.tensor(0.5).double()], ids=str)
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("side", [None, *SIDES])
def test_rates_and_signs(side, on_device, lr, monkeypatch):
    monkeypatch.setattr(kernels, "_on_device", lambda tensor: on_device)
    params, _, updates, _, bases, steps = bucket((33, 17), 3, side, torch.float32)
    for sign in (False, True):
        mine, theirs, unharmed = twice((params, updates, bases, steps))
        for kernel, (w, n, q, k) in ((kernels, mine), (reference, theirs)):
            kernel.apply_(Weights(w, k), n, q, replace(HYPER, lr=lr), side, sign)
        assert error(mine[0], theirs[0]) < 1e-6
        assert unharmed()


@pytest.mark.parametrize("eps_inside", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", kernels.TYPES, ids=str)
def test_adam_update(dtype, transform, eps_inside):
    _, lows, means, squares, _, steps = bucket((33, 17), None, None, dtype)
    mine, theirs, unharmed = twice((lows, means, squares, steps))
    out, expected = (
        kernel.adam_update_(r, Moments(m, v), k, replace(HYPER, transform=transform), eps_inside)
        for kernel, (r, m, v, k) in ((kernels, mine), (reference, theirs))
    )
    assert error(out, expected) < 1e-6
    for a, b in zip(mine[1:3], theirs[1:3]):
        assert error(a, b) < 1e-6
    assert unharmed()


@pytest.mark.parametrize("dtype", kernels.TYPES, ids=str)
def test_averages(dtype):
    assert_averages_alike(kernels, dtype)


def test_words():
    assert_words_alike(kernels)


def test_first_steps_and_zero_gradients():
    """The usual betas at k = 1, where 1 - β₂ᵏ has few digits in float32; a zero gradient moves nothing."""
    params, grads, *_ = bucket((6, 4), None, None, torch.float32)
    grads[1].zero_()
    zeros = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    mine, theirs, _ = twice((params, grads, *zeros, [], [torch.zeros(()) for _ in params]))
    for _ in range(3):
        for kernel, own in ((kernels, mine), (reference, theirs)):
            step_projected(kernel, own, None, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, scale=1.0)
    assert error(mine[0], theirs[0]) < 1e-6
    assert torch.equal(mine[0][1], params[1])


@pytest.mark.parametrize("side", [None, "right", "both"])
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
def test_gradients_of_another_type(dtype, grad_dtype, side):
    lists = list(bucket((33, 17), 3, side, dtype))
    lists[1] = [grad.to(grad_dtype) for grad in lists[1]]
    mine, theirs, unharmed = twice(lists)
    for kernel, own in ((kernels, mine), (reference, theirs)):
        step_projected(kernel, own, side)
    assert_close(mine, theirs, 1e-2, 5e-3, 5e-3)
    assert unharmed()


@pytest.mark.parametrize("side", [None, "right", "both"])
def test_more_tensors_than_a_launch_holds(side, monkeypatch):
    """And than the workspace does: a bucket is stepped in parts, no tensor twice, each with its own rate and seed."""
    monkeypatch.setattr(kernels, "_WORKSPACE", 66 * 5 * 21 * 4)
    lists = bucket((9, 5), 2, side, torch.float32 if side else torch.bfloat16, count=130)
    mine, theirs = step_both(lists, side, seeds=range(130), lr=torch.linspace(0.1, 0.9, 130))
    assert_close(mine, theirs, 1e-6 if side else 4e-3, 1e-6, 1e-6)


# ---- what is not a number, or hardly one; rounding ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", kernels.TYPES, ids=str)
@pytest.mark.parametrize("count", [1, 7, 5000])
def test_grad_max(count, dtype):
    grads = [torch.randn(count).to(dtype) for _ in range(5)]
    for grad, value in zip(grads[1:], (math.inf, -math.inf, math.nan, 0.0)):
        grad[count // 2] = value
    grads.append(torch.full((count,), -math.nan, dtype=dtype))
    grads.append(torch.full((3, count), 5.0, dtype=dtype).T)
    grads += [torch.tensor(float(i), dtype=dtype) for i in range(70)]
    torch.testing.assert_close(kernels.grad_max(grads), reference.grad_max(grads), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("path", ["fused", "halves", "pieces"])
@pytest.mark.parametrize("transform", ["grams", "cautious"])
@pytest.mark.parametrize("side", [None, *SIDES])
def test_what_is_not_finite_is_left_alone(side, transform, path, request):
    """By the device, step count included, in every launch of a bucket; the others get the bits of their own call."""
    if path == "halves":
        request.getfixturevalue("two_halves")
    lists = bucket((9, 5), 2, side, torch.bfloat16 if path == "fused" else torch.float32, count=70)
    seeds, flags = list(range(70)), some_unusable(lists)
    mine, before, unharmed = twice(lists)
    own_seeds = members([seeds], flags)[0][0]
    for own, numbers, finite in ((mine, seeds, flags), (alone := members(before, flags)[0], own_seeds, None)):
        if path == "pieces":
            lows = kernels.project(own[1], own[4], side, torch.float32)
            hyper = replace(HYPER, transform=transform)
            updates = kernels.adam_update_(lows, Moments(*own[2:4]), own[5], hyper, finite=finite)
            kernels.apply_(Weights(own[0], own[5], numbers, finite=finite), updates, own[4], hyper, side)
        else:
            step_projected(kernels, own, side, transform, numbers, finite=finite)
    stepped, left = members(mine, flags)
    for own, expected in ((stepped, alone), (left, members(lists, flags)[1])):
        torch.testing.assert_close(own, expected, rtol=0, atol=0, equal_nan=True)
    assert unharmed()


@pytest.mark.parametrize("side", [None, "right", "left"])
def test_what_is_not_finite_stays_in_its_line(side):
    lists = bucket((40, 70), 5, side, torch.bfloat16)
    lists[1][0][3, 4] = math.nan
    mine, theirs = step_both(lists, side)
    for a, b in zip(mine[0], theirs[0]):
        assert torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-20, 1e12])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_gradients_of_extreme_size(scale, eps):
    params, grads, means, squares, bases, steps = bucket((33, 17), None, None, torch.float32)
    lists = [params, *([[(t * s).float() for t in column] for column, s in (
        (grads, scale), (means, scale), (squares, scale**2))]), bases, steps]  # fmt: skip
    mine, theirs, _ = twice(lists)
    for kernel, own in ((kernels, mine), (reference, theirs)):
        step_projected(kernel, own, None, betas=(0.9, 0.99), eps=eps)
    assert all(p.isfinite().all() for p in mine[0])
    assert error(mine[0], theirs[0]) < 1e-6


def test_stochastic_rounding_has_the_bits_of_philox():
    for shape in ((1,), (7,), (8,), (33, 17), (3000,)):
        value = torch.randn(shape)
        for seed, count in ((0, 0), (2**63 - 1, 1), (12345678901234567, 2**24)):
            got, want = (torch.zeros(shape, dtype=torch.bfloat16) for _ in range(2))
            kernels.write_(Weights([got], [torch.tensor(float(count))], [seed]), [value])
            philox.stochastic_round_(want, value.clone(), seed, count)
            assert torch.equal(got, want)


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize("side", [None, "right", "left"])
def test_parts_are_rounded_as_the_whole(side, part, halves, request):
    if halves:
        request.getfixturevalue("two_halves")
    mine, wanted = part_and_whole(kernels, side, *part)
    assert all(map(torch.equal, mine, wanted))


@pytest.mark.parametrize("dtype", kernels.TYPES, ids=str)
def test_lines_are_measured_and_scaled(dtype):
    assert_scaled_alike(kernels, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_rounding_takes_is_given_back(dtype):
    """Where no product is rounded; elsewhere see test_back_projections and what `fused` and its halves share."""
    assert_compensated_alike(kernels, dtype, "dense", "coded", "momenta")


@pytest.mark.parametrize("dtype", kernels.TYPES, ids=str)
def test_write_to_nearest(dtype):
    value, mine = torch.randn(33, 17), torch.full((33, 17), 3.0, dtype=dtype)
    kernels.write_(Weights([mine], [torch.tensor(5.0)]), [value])
    assert torch.equal(mine, value.to(dtype))


# ---- GradNormLoRP's whole step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [emulated.BACKWARD, emulated.RANDOM])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("side", SIDES)
def test_rows_are_stepped_by_direction_and_length(side, transform, order, library, monkeypatch):
    library.emulator_order(order)
    monkeypatch.setattr(kernels, "_WORKSPACE", 2**14)  # in parts
    for shape, rank in SHAPES[1:4]:
        mine, theirs, unharmed = twice(length_bucket(shape, rank, side, torch.float32, 3), PADS[order % 2])
        step_lengths(kernels, mine, side, transform, lr=torch.tensor(0.7))
        assert unharmed()
        theirs = [[t.double() for t in column] for column in theirs]
        step_lengths(reference, theirs, side, transform)
        for a, b in zip(mine, theirs):
            assert error(a, b) < 4e-6  # sums over rows that cancel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("side", SIDES)
def test_rows_in_half_precision(side, dtype):
    """The tangential gradient, basis and N are rounded as the gradient was."""
    mine, theirs, unharmed = twice(length_bucket((70, 130), 9, side, dtype), 16)
    for kernel, lists in ((kernels, mine), (reference, theirs)):
        step_lengths(kernel, lists, side, seeds=SEEDS)
    assert max(error(a, b) for a, b in zip(mine[2:6], theirs[2:6])) < 1e-2
    assert error(mine[0], theirs[0]) < 1e-2
    assert unharmed()


@pytest.mark.parametrize("side", SIDES)
def test_rows_of_what_is_not_finite_are_left_alone(side):
    """By the whole step, in every launch of a bucket, and by the pieces of a kernel that has none."""
    lists = length_bucket((9, 14), 3, side, torch.bfloat16, count=70)

    def step(kernel, own, flags):
        step_lengths(kernel, own, side, "cautious", range(70), flags)

    assert_left_alone(lists, step, kernels, reference)


def test_strided_rows_are_stepped_in_their_places():
    mine, theirs, _ = twice(length_bucket((12, 9), 3, "right", torch.float32))
    mine[0] = [torch.empty(9, 12).T.copy_(p) for p in mine[0]]
    for kernel, lists in ((kernels, mine), (reference, theirs)):
        step_lengths(kernel, lists, "right")
    assert error(mine[0], theirs[0]) < 4e-6


@pytest.mark.parametrize(
    ("side", "bits", "transform"), [("right", 8, "none"), ("left", 4, "cautious"), ("both", 8, "grams")]
)
def test_rows_are_stepped_on_codes(side, bits, transform, monkeypatch):
    monkeypatch.setattr(kernels, "_WORKSPACE", 4000)  # in parts
    assert_coded_rows_alike(kernels, side, bits, transform)


# ---- Flora's whole step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [emulated.BACKWARD, emulated.RANDOM])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("side", SIDES)
def test_whole_gradients_beside_a_compressed_momentum(side, transform, order, library, monkeypatch):
    library.emulator_order(order)
    monkeypatch.setattr(kernels, "_WORKSPACE", 2**14)  # in parts
    for (shape, rank), rates in zip(SHAPES[1:4], (RATE, torch.tensor(0.7), torch.tensor([0.5, 0.7, 0.2]))):
        mine, theirs, unharmed = twice(momentum_bucket(shape, rank, side, torch.float32, 3), PADS[order % 2])
        step_momenta(kernels, mine, side, transform, lr=rates)
        assert unharmed()
        theirs = [[t.double() for t in column] for column in theirs]
        step_momenta(reference, theirs, side, transform, lr=rates)
        for a, b in zip(mine, theirs):
            assert error(a, b) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("side", SIDES)
def test_momenta_in_half_precision(side, dtype):
    """U, basis and momentum are rounded to bfloat16 where the gradient was; to float16 they are not."""
    mine, theirs, unharmed = twice(momentum_bucket((70, 130), 9, side, dtype), 16)
    for kernel, lists in ((kernels, mine), (reference, theirs)):
        step_momenta(kernel, lists, side, seeds=SEEDS)
    assert error(mine[2], theirs[2]) < (5e-3 if dtype == torch.bfloat16 else 2e-6)
    assert max(error(a, b) for a, b in zip(mine[3:5], theirs[3:5])) < 2e-6
    assert error(mine[0], theirs[0]) < (5e-3 if dtype == torch.bfloat16 else 1e-4)
    assert unharmed()


def test_momenta_are_rounded_with_the_bits_of_philox():
    """Without a history, D is U: what is left to differ is its last bit, by which one W in 1000 is the next one."""
    lists = momentum_bucket((70, 130), 9, "right", torch.bfloat16)
    mine, theirs, _ = twice(lists, 16)
    for kernel, own in ((kernels, mine), (reference, theirs)):
        own[2] = [m.zero_() for m in own[2]]
        step_momenta(kernel, own, "right", seeds=SEEDS)
    for a, b in zip(mine[0], theirs[0]):
        assert (a != b).sum() <= 1e-3 * a.numel()


@pytest.mark.parametrize("side", SIDES)
def test_momenta_of_what_is_not_finite_are_left_alone(side):
    """Likewise."""
    lists = momentum_bucket((9, 14), 3, side, torch.bfloat16, count=70)

    def step(kernel, own, flags):
        step_momenta(kernel, own, side, "cautious", range(70), flags)

    assert_left_alone(lists, step, kernels, reference)


# ---- moments in codes: encode_ and decode_ with the bits of the reference --------------------------------------------

CODED_SHAPES = [((5, 7), -1), ((9, 300), -1), ((3, 5, 24), -1), ((300, 11), -2), ((24, 70), -2)]


@pytest.mark.parametrize("order", [emulated.FORWARD, emulated.BACKWARD, emulated.RANDOM])
@pytest.mark.parametrize(("kind", "bits"), [("signed", 8), ("unsigned", 4), ("linear", 8)])
def test_codes(kind, bits, order, library):
    library.emulator_order(order)
    for i, (shape, axis) in enumerate(CODED_SHAPES):
        seeds, begin = [((), 0), ((2**62 + 5, 7, 8), 0), ((7, 2**40, 9), 13)][i % 3]
        dtype = torch.bfloat16 if i % 2 else torch.float64
        codec = storage.Codec(kind, bits, axis, shape[axis])
        assert_codes_alike(kernels, codec, shape, seeds, begin, dtype, PADS[i % 2])


@pytest.mark.parametrize(("shape", "axis"), CODED_SHAPES, ids=str)
@pytest.mark.parametrize(("bits", "transform"), [(8, "none"), (4, "grams"), (8, "cautious")])
def test_a_step_on_codes(shape, axis, bits, transform, library):
    alternatives = (
        (torch.float32, (), 0, 3, emulated.FORWARD),
        (torch.bfloat16, SEEDS, shape[axis], 16, emulated.BACKWARD),
    )
    for dtype, seeds, begin, pad, order in alternatives:
        library.emulator_order(order)
        mine, theirs, unharmed = twice(coded_bucket(shape, axis, bits, dtype), pad)
        for kernel, lists in ((kernels, mine), (reference, theirs)):
            step_coded(kernel, lists, axis, bits, transform, seeds, begin, eps_inside=bool(begin))
        assert_coded_alike(mine, theirs)
        assert unharmed()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("shape", "axis"), CODED_SHAPES[1::2], ids=str)
def test_an_update_on_codes(shape, axis, transform):
    mine, theirs, unharmed = twice(coded_bucket(shape, axis, 4, torch.float32))
    updates, expected = (update_coded(*each, axis, 4, transform) for each in ((kernels, mine), (reference, theirs)))
    assert error(updates, expected) < 1e-6
    assert_coded_alike(mine, theirs)
    assert unharmed()


@pytest.mark.parametrize("transform", ["grams", "cautious"])
def test_what_is_not_finite_is_left_alone_on_codes(transform):
    """In both launches of a bucket, a rate for each tensor."""
    count = 54  # more than a launch takes
    lists = coded_bucket((9, 20), -1, 8, torch.bfloat16, count)
    flags, rates = some_unusable(lists), torch.linspace(0.1, 0.9, count)
    mine, theirs, unharmed = twice(lists)
    for kernel, own in ((kernels, mine), (reference, theirs)):
        step_coded(kernel, own, -1, 8, transform, range(count), finite=flags, lr=rates)
    mine[1] = theirs[1] = []
    assert_coded_alike(mine, theirs)
    assert unharmed()
    left = [members(each, flags)[1] for each in (mine, lists)]
    assert all(torch.equal(x, y) for k in (0, 2, 3, 4) for x, y in zip(left[0][k], left[1][k], strict=True))


# ---- what is left to the reference, and whole optimizers ------------------------------------------------------------


@pytest.mark.parametrize("which", ["float64", "strided"])
def test_left_to_the_reference(which):
    lists = [*bucket((12, 9), 3, "right", torch.float32)]
    if which == "float64":
        lists = [[t.double() for t in column] for column in lists]
    mine, theirs, _ = twice(lists)
    if which == "strided":
        mine[0] = [torch.empty(9, 12).T.copy_(p) for p in mine[0]]
    for kernel, own in ((kernels, mine), (reference, theirs)):
        step_projected(kernel, own, "right")
    assert_close(mine, theirs, 1e-6, 1e-6, 1e-6)


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
    for name in ("project", "adam_update_", "linear_update_", "apply_", "projected_adam_"):
        allowed = getattr(reference, name) if name == "project" else None  # of a dense gradient, it is the reference's
        monkeypatch.setattr(reference, name, partial(refuse_projected, allowed))
    train(mine, opt, range(3))
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-5)


UNREAD = ("galore", "galore_momentum", "galore_adafactor", "rademacher_lion", "random_adam", "flora", "gradnormlorp")
UNREAD += ("osd", "osd_lion", "apollo", "apollo_mini", "official_apollo", "adamw")


@pytest.mark.parametrize("method", [m for m in ALL_METHODS if m.id in UNREAD], ids=str)
def test_an_optimizer_leaves_it_to_the_device_what_is_skipped(method, monkeypatch):
    """As if the host had known: weights, step counts, ages and the number of skips."""
    ends = []
    options = {} if method.id == "adamw" else {"update_proj_gap": 100, "stagger": False}
    for device in (False, True):
        if device:
            monkeypatch.setattr(select, "resolve", lambda backend, plan: kernels)
            monkeypatch.setattr(engine, "_waits", lambda peaks: True)
        params = net()
        opt = build(method, params, backend="reference", **options)
        for step in range(4):
            set_gradients(params, step)
            if step == 2:
                params["tall"].grad[0, 0] = params["vector"].grad[3] = math.nan
            opt.step()
        assert opt.skipped_updates == 2
        ends.append((params, [[state["step"], state.get("age", 0)] for state in opt.state.values()]))
    for name, param in ends[0][0].items():
        torch.testing.assert_close(ends[1][0][name], param, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ends[1][1], ends[0][1], rtol=0, atol=0)


# ---- the library, and the emulator itself ---------------------------------------------------------------------------


def test_every_backend_says_why_it_is_not_there(monkeypatch, tmp_path):
    monkeypatch.undo()
    assert "cuda" in select.available()
    for content, reason in ((None, "SSO_BUILD_CUDA=1"), (b"no library", "does not load")):
        if content is not None:
            (tmp_path / "_cuda.so").write_bytes(content)
        monkeypatch.setattr(kernels, "__file__", str(tmp_path / "kernels" / "cuda.py"))
        assert reason in kernels.load.__wrapped__()


def test_types_without_kernels_are_refused(monkeypatch):
    monkeypatch.setattr(kernels, "_refusal", lambda device: None)
    for dtype, why in ((torch.float64, "no kernel for torch.float64"), (torch.bfloat16, None)):
        assert kernels.supports(make_plan((8, 8), dtype, torch.device("cuda"), 2)) == why


def test_errors_of_the_library_are_raised():
    with pytest.raises(RuntimeError, match="CUDA error 1: invalid configuration of a launch"):
        kernels._check(1)


@pytest.mark.skipif(SANITIZED, reason="this is the run under the sanitizers")
@pytest.mark.slow
def test_under_sanitizers():
    """Every read and write of global and shared memory, by AddressSanitizer; arithmetic and alignment, by UBSan."""
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(map(os.path.isabs, found)):
        pytest.skip("g++ has no sanitizers here")
    environment = {
        **os.environ,
        "SSO_EMULATOR_FLAGS": " ".join(emulated.SANITIZERS),
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    chosen = "(exact and 32-2) or (exact and bfloat16-2) or (bits and bfloat16-left) or (grad_max and 7)"
    command += ["-k", f"{chosen} or (step_on_codes and cautious and (300 or 5-7)) or in_half or given_back"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
