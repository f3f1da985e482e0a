"""The native kernels against the reference, against float64, and against themselves on every instruction set.

Run as a script it prints a digest of what the kernels computed, for comparison between processes.
"""

import hashlib
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace

import pytest
import torch
from buckets import PARTS, assert_averages_alike, assert_scaled_alike, assert_words_alike, part_and_whole
from cases import METHODS

import subspace_optim as so
from subspace_optim import _ext, ops, philox
from subspace_optim.kernels import native, reference
from subspace_optim.pretrain.machine import peak_bytes
from subspace_optim.projectors import exact_products
from subspace_optim.rules import CompressedAdafactor, WeightNormAdam
from subspace_optim.types import TRANSFORMS, Bucket, Hyper, Moments, Plan, Weights

pytestmark = pytest.mark.skipif(_ext.load() is not None, reason=f"native kernels: {_ext.load()}")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DENSE = ((), (1,), (0,), (7,), (1025,), (3, 5, 7), (129, 257))
EMPTY = (((0, 9), 2), ((9, 0), 2))  # shards of which a rank has nothing
MATRICES = (((1, 2), 1), ((37, 53), 3), ((53, 37), 5), ((300, 700), 9))  # the last in several blocks and chunks
SIDES = ("left", "right", "both")
CASES = [(shape, 0, None) for shape in DENSE] + [(shape, rank, side) for shape, rank in MATRICES for side in SIDES]


@pytest.fixture(autouse=True)
def _exact():
    """What is compared to the last bits multiplies as the reference does; test_products.py has the other ways."""
    with exact_products():
        yield


@dataclass
class Lists:
    """Arguments of projected_adam_, of two tensors that are some steps into a run."""

    params: list
    grads: list
    exp_avgs: list
    exp_avg_sqs: list
    bases: list
    steps: list
    seeds: list = field(default_factory=lambda: [2**62 + 1, 7])
    lr: torch.Tensor = field(default_factory=lambda: torch.tensor(1e-2, dtype=torch.float64))
    side: str | None = None
    transform: str = "none"

    SLOTS = ("params", "exp_avgs", "exp_avg_sqs", "steps")

    @classmethod
    def random(cls, shape, rank, side, dtype, grad_dtype=None, count=2):
        rng = torch.Generator().manual_seed(math.prod(shape) + rank)
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def normal(shape, dtype=wide):
            return [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for _ in range(count)]

        low, bases = shape, []
        if side:
            m, n = shape
            left, right = normal((m, rank)), normal((n, rank))
            bases = {"left": left, "right": right, "both": left + right}[side]
            low = {"left": (rank, n), "right": (m, rank), "both": (rank, rank)}[side]
        squares = [v.square() for v in normal(low)]
        steps = [torch.tensor(5.0 + i, dtype=wide) for i in range(count)]
        seeds = [2**62 + 1 + i for i in range(count)]
        return cls(
            normal(shape, dtype),
            normal(shape, grad_dtype or dtype),
            normal(low),
            squares,
            bases,
            steps,
            seeds,
            side=side,
        )

    def stepped(self, kernel, transform="none", eps=1e-8):
        """The lists after one step; this one stays as it is."""
        own = {name: [t.clone(memory_format=torch.preserve_format) for t in getattr(self, name)] for name in self.SLOTS}
        hyper = replace(self.hyper, eps=eps, transform=transform)
        moments = Moments(own["exp_avgs"], own["exp_avg_sqs"])
        kernel.projected_adam_(self.weights(**own), self.grads, moments, self.bases, hyper, self.side)
        return own

    def weights(self, params=None, steps=None, **_):
        """As kernels take them: these in the place of the lists'."""
        return Weights(params or self.params, steps or self.steps, self.seeds)

    @property
    def moments(self):
        return Moments(self.exp_avgs, self.exp_avg_sqs)

    @property
    def hyper(self):
        return Hyper(self.lr, (0.9, 0.99), 1e-8, 0.1, 0.5, self.transform)

    def averages(self, *dims):
        """A vector along each of these dimensions of every parameter."""
        return [[torch.ones(p.shape[dim], dtype=self.exp_avgs[0].dtype) for p in self.params] for dim in dims]

    def step_lengths(self):
        lengths = Moments(*self.averages(0, 0))
        native.weight_norm_adam_(self.weights(), self.grads, self.moments, lengths, self.bases, self.hyper, self.side)

    def step_momenta(self, bases, carried):
        averages = (self.exp_avgs, *self.averages(0, 1))
        native.compressed_adafactor_(
            *(self.weights(), self.grads, *averages, self.bases, bases, carried, self.hyper, 0.8, 1.0, self.side)
        )

    def in_float64(self):
        def wide(tensors):
            return [t.double() for t in tensors]

        own = [wide(getattr(self, name)) for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "bases", "steps")]
        return Lists(*own, self.seeds, self.lr, self.side)


def distance(a, b):
    """Relative, in the Frobenius norm; the largest of the list."""
    pairs = [(x.double(), y.double()) for x, y in zip(a, b) if x.numel()]
    return max((float((x - y).norm() / y.norm().clamp(min=1e-300)) for x, y in pairs), default=0.0)


def assert_same_step(lists, transform="none"):
    dtype = lists.params[0].dtype
    got, want = lists.stepped(native, transform), lists.stepped(reference, transform)
    assert got["steps"] == want["steps"]
    rounding = 1e-14 if dtype == torch.float64 else 1e-6
    for slot in ("exp_avgs", "exp_avg_sqs"):
        assert distance(got[slot], want[slot]) < rounding
    if dtype in (torch.float32, torch.float64):
        assert distance(got["params"], want["params"]) < rounding
        return
    # The same noise: only where the float32 values differ in their last bit may the rounded ones.
    for a, b in zip(got["params"], want["params"]):
        assert (a != b).sum() <= 1 + 1e-4 * a.numel()
        torch.testing.assert_close(a, b, rtol=2**-7 if dtype == torch.bfloat16 else 2**-10, atol=1e-7)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "rank", "side"), CASES, ids=str)
def test_step_is_the_reference(shape, rank, side, dtype, transform):
    assert_same_step(Lists.random(shape, rank, side, dtype), transform)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("shape", "rank", "side"), CASES, ids=str)
def test_step_in_float64(shape, rank, side, transform):
    lists = Lists.random(shape, rank, side, torch.float32)
    got, exact = lists.stepped(native, transform), lists.in_float64().stepped(reference, transform)
    assert distance(got["params"], exact["params"]) < 1e-6


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
def test_gradients_of_another_type(dtype, grad_dtype, side):
    assert_same_step(Lists.random((37, 53), 3, side, dtype, grad_dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", [None, *SIDES])
@pytest.mark.parametrize("name", ["params", "grads", "exp_avgs", "bases"])
def test_strides(name, side, dtype):
    lists = Lists.random((37, 53), 3, side, dtype)
    strided = [t.mT.contiguous().mT for t in getattr(lists, name)]
    assert_same_step(Lists(**{**vars(lists), name: strided}))


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_rounding_to_nearest(side):
    lists = Lists.random((37, 53), 3, side, torch.bfloat16)
    lists.seeds = []
    assert_same_step(lists)


def test_rates_of_each_tensor():
    lists = Lists.random((37, 53), 3, "left", torch.float32)
    got, want = ([p.clone() for p in lists.params] for _ in range(2))
    rates = torch.tensor([1e-2, 3e-1])
    for kernel, params in ((native, got), (reference, want)):
        weights = Weights(params, lists.steps)
        kernel.apply_(weights, lists.exp_avgs, lists.bases, replace(lists.hyper, lr=rates), "left")
    assert distance(got, want) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", [None, *SIDES])
def test_signs(side, dtype):
    lists = Lists.random((37, 53), 3, side, dtype)
    got, want = ([p.clone() for p in lists.params] for _ in range(2))
    for kernel, params in ((native, got), (reference, want)):
        kernel.apply_(lists.weights(params), lists.exp_avgs, lists.bases, lists.hyper, side, True)
    assert sum(int((a != b).sum()) for a, b in zip(got, want)) <= (2 if dtype == torch.bfloat16 else 10**9)
    torch.testing.assert_close(got, want, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("eps_inside", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_update(transform, eps_inside):
    lists = Lists.random((129, 257), 0, None, torch.float32)
    results = []
    for kernel in (native, reference):
        *pair, steps = ([t.clone() for t in getattr(lists, name)] for name in ("exp_avgs", "exp_avg_sqs", "steps"))
        hyper = replace(lists.hyper, eps=1e-2, transform=transform)
        updates = kernel.adam_update_(lists.grads, Moments(*pair), steps, hyper, eps_inside)
        results.append([*updates, *pair[0], *pair[1]])
    assert distance(*results) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_averages(dtype):
    assert_averages_alike(native, dtype)


def test_words():
    assert_words_alike(native)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", SIDES)
def test_projection(side, dtype):
    lists = Lists.random((300, 700), 9, side, dtype)
    wide = lists.bases[0].dtype
    got, want = (k.project(lists.grads, lists.bases, side, wide) for k in (native, reference))
    assert distance(got, want) < (1e-14 if wide == torch.float64 else 1e-6)


# ---- whole steps of rules --------------------------------------------------------------------------------------------


def stepped_by(rule, lists, kernel, transform="none", zero_row=False, redrawn=False):
    """The bucket after one step of the rule; its second member has a new basis if `redrawn`."""
    (m, n), rank = lists.params[0].shape, lists.bases[0].shape[1]
    plan = Plan((m, n), (m, n), None, lists.side, rank, lists.params[0].dtype, torch.device("cpu"))
    rng = torch.Generator().manual_seed(1)
    bucket = Bucket(plan, bool(lists.seeds), grads=lists.grads, streams=lists.seeds)
    for i, param in enumerate(lists.params):
        bucket.params.append(param.clone(memory_format=torch.preserve_format))
        if zero_row:
            bucket.params[i][m // 2] = 0
        state = {key: torch.randn(t.shape, generator=rng).to(t.dtype).square() for key, t in rule.init(plan).items()}
        given = {"exp_avg": lists.exp_avgs, "exp_avg_sq": lists.exp_avg_sqs, "step": lists.steps}
        state |= {k: v[i].clone(memory_format=torch.preserve_format) for k, v in given.items() if k in state}
        bucket.states.append(state)
        bucket.previous.append(tuple(lists.bases[i :: len(lists.params)]))
        bucket.bases.append(tuple(q.flip(0) for q in bucket.previous[i]) if redrawn and i else bucket.previous[i])
    rule.step_(bucket, Hyper(lists.lr, (0.9, 0.99), 1e-8, 0.1, 0.5, transform, "rotate"), kernel)
    return bucket


def assert_same_rule(rule, lists, **how):
    got, want = (stepped_by(rule, lists, kernel, **how) for kernel in (native, reference))
    dtype = lists.params[0].dtype
    rounding = 1e-13 if dtype == torch.float64 else 4e-6  # two sums of up to 1500 terms, which may cancel
    for key in want.states[0]:
        assert distance(got.slot(key), want.slot(key)) < rounding
    if dtype in (torch.float32, torch.float64):
        assert distance(got.params, want.params) < rounding
        return
    for a, b in zip(got.params, want.params):  # the same noise; float32 sums of order 100 that cancel differ by 1e-5
        assert (a != b).sum() <= 2 + 1e-3 * a.numel()
        torch.testing.assert_close(a, b, rtol=2**-7 if dtype == torch.bfloat16 else 2**-10, atol=1e-4)


RULES = (WeightNormAdam(), CompressedAdafactor(), CompressedAdafactor(scale_parameter=True, clip_threshold=0.1))
every_rule = pytest.mark.parametrize("rule", RULES, ids=["rows", "compressed", "compressed_relative"])


@every_rule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("shape", "rank"), [*MATRICES, ((5, 1500), 2)], ids=str)
def test_whole_steps_are_those_of_the_rule(shape, rank, side, dtype, rule):
    assert_same_rule(rule, Lists.random(shape, rank, side, dtype))


@every_rule
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("side", SIDES)
def test_whole_steps_with_transforms_zero_rows_and_new_bases(side, transform, rule):
    lists = Lists.random((37, 53), 3, side, torch.float32)
    assert_same_rule(rule, lists, transform=transform, zero_row=True, redrawn=isinstance(rule, CompressedAdafactor))


@every_rule
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["params", "grads", "exp_avgs", "bases"])
def test_whole_steps_with_strides(name, side, rule):
    lists = Lists.random((37, 53), 3, side, torch.bfloat16)
    strided = [t.mT.contiguous().mT for t in getattr(lists, name)]
    assert_same_rule(rule, Lists(**{**vars(lists), name: strided}))


@every_rule
@pytest.mark.parametrize("side", SIDES)
def test_what_one_matrix_leaves_in_scratch_does_not_reach_the_next_whole_step(side, rule):
    lists = Lists.random((300, 700), 9, side, torch.bfloat16)
    alone = stepped_by(rule, lists, native).params[1]
    lists.grads[0].fill_(math.nan)
    assert torch.equal(stepped_by(rule, lists, native).params[1], alone)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("clip", [0.1, 1.0])
def test_a_norm_is_known_before_what_it_is_of(clip, side):
    """With orthonormal bases, Flora's, ‖back(C)‖ is ‖C‖; otherwise (above) it is not."""
    lists = Lists.random((300, 700), 9, side, torch.float32)
    lists.bases = [torch.linalg.qr(q)[0] for q in lists.bases]
    assert_same_rule(CompressedAdafactor(clip_threshold=clip), lists)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", SIDES)
def test_whole_steps_make_no_copy_of_a_matrix(side, dtype, transform):
    """Of 8 MiB in float32: two blocks of at most 512 KiB, and tensors of the size of R and the bases, at rank 4."""
    lists = Lists.random((4096, 512), 4, side, dtype, count=1)
    lists.transform, most = transform, 2**20 + 2**19
    assert peak_bytes(lists.step_lengths) < most
    assert peak_bytes(lambda: lists.step_momenta(lists.bases, [False])) < most
    assert peak_bytes(lambda: lists.step_momenta([q.clone() for q in lists.bases], [True])) < most


# ---- what is not a number, or hardly one ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lines_are_measured_and_scaled(dtype):
    """Several blocks of rows, and what is not contiguous, besides."""
    assert_scaled_alike(native, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for shape in ((300, 1100), (1100, 300)):
        lists = Lists.random(shape, 0, None, dtype)
        grads = [grad.mT.contiguous().mT for grad in lists.grads]
        for dim in (-1, -2):
            factors = native.line_norms(grads, dim, wide)
            assert distance(factors, reference.line_norms(lists.grads, dim, wide)) < 1e-6
            params = [[p.mT.clone().mT for p in lists.params], [p.clone() for p in lists.params]]
            for kernel, own, g in ((native, params[0], grads), (reference, params[1], lists.grads)):
                kernel.apply_(lists.weights(own), g, [], lists.hyper, None, factors=factors)
            assert distance(*params) < (2e-4 if dtype.itemsize == 2 else 1e-6)
            assert distance(params[0], lists.params) > 1e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 7, 1024, 70_001])
def test_grad_max(count, dtype):
    rng = torch.Generator().manual_seed(count)
    grads = [torch.randn(count, generator=rng).to(dtype) for _ in range(5)]
    for grad, value in zip(grads[1:], (math.inf, -math.inf, math.nan, 0.0)):
        grad[count // 2] = value
    grads.append(torch.full((count,), -math.nan, dtype=dtype))
    grads.append(torch.full((3, count), 5.0, dtype=dtype).T)
    torch.testing.assert_close(native.grad_max(grads), reference.grad_max(grads), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-30, 1e-20, 1e12])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_gradients_of_extreme_size(scale, eps):
    lists = Lists.random((129, 257), 0, None, torch.float32)
    for name in ("grads", "exp_avgs", "exp_avg_sqs"):
        power = 2 if name == "exp_avg_sqs" else 1
        setattr(lists, name, [(t.double() * float(scale) ** power).float() for t in getattr(lists, name)])
    got, want = (lists.stepped(kernel, eps=eps)["params"] for kernel in (native, reference))
    assert all(p.isfinite().all() for p in got)
    assert distance(got, want) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", SIDES)
def test_what_one_tensor_leaves_in_scratch_does_not_reach_the_next(side, dtype):
    lists = Lists.random((300, 700), 9, side, dtype)
    alone = lists.stepped(native)["params"][1]
    lists.grads[0].fill_(math.nan)
    assert torch.equal(lists.stepped(native)["params"][1], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_is_read_and_rounded_as_torch_does(dtype):
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = halves[halves.isfinite()]
    wide = finite.float()
    # Between neighbours, on ties, and one bit to either side of them.
    near = [wide * (1 + 2.0**-k) for k in (8, 9, 11, 12)]
    near += [torch.nextafter(x, torch.tensor(side)) for x in near for side in (-math.inf, math.inf)]
    between = torch.cat([wide, *near])
    between = torch.cat([between, torch.tensor([math.inf, -math.inf, 65519.99, 65520.0, 1e-8, 3e38, math.nan])])
    param = torch.full_like(between, -0.0, dtype=dtype)  # the one that adds nothing to zeros of either sign
    native.apply_(Weights([param], [torch.tensor(1.0)]), [between], [], Hyper(torch.tensor(-1.0)), None)
    assert torch.equal(param[:-1].view(torch.int16), between[:-1].to(dtype).view(torch.int16))
    assert param[-1].isnan()


def test_stochastic_rounding_has_the_bits_of_philox():
    for count in (1, 7, 8, 9, 1023, 1024, 1025, 5000):
        value = torch.randn(count, generator=torch.Generator().manual_seed(count))
        got, want = torch.zeros(count, dtype=torch.bfloat16), torch.zeros(count, dtype=torch.bfloat16)
        for seed, step in ((0, 0), (2**63 - 1, 1), (12345678901234567, 2**24)):
            got.zero_()
            weights = Weights([got], [torch.tensor(float(step))], [seed])
            native.apply_(weights, [value], [], Hyper(torch.tensor(-1.0)), None)
            philox.stochastic_round_(want, value.clone(), seed, step)
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("shape", "rank"), EMPTY, ids=str)
def test_empty_matrices(shape, rank, side, dtype):
    assert_same_step(Lists.random(shape, rank, side, dtype))


@pytest.mark.parametrize("kernel", [native, reference], ids=["native", "reference"])
@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize("side", [None, "right", "left"])
def test_parts_are_rounded_as_the_whole(side, part, kernel):
    mine, wanted = part_and_whole(kernel, side, *part)
    assert all(map(torch.equal, mine, wanted))


# ---- threads and instruction sets -----------------------------------------------------------------------------------


def digest():
    """Of everything that does not pass through BLAS."""
    found = hashlib.sha256()
    for dtype in DTYPES:
        for shape in ((7,), (1025,), (129, 257), (100_003,)):
            for transform in TRANSFORMS:
                stepped = Lists.random(shape, 0, None, dtype, count=1).stepped(native, transform)
                for name in ("params", "exp_avgs", "exp_avg_sqs"):
                    found.update(stepped[name][0].view(torch.uint8).numpy().tobytes())
        lists = Lists.random((40, 1030), 2, "right", dtype, count=1)
        lists.step_lengths()
        lists.step_momenta(lists.bases, [False])
        found.update(lists.params[0].view(torch.uint8).numpy().tobytes())
        for bits in (8, 4):
            param = torch.nn.Parameter(Lists.random((129, 257), 0, None, dtype).params[0])
            optimizer = so.SubspaceOptimizer([param], state_bits=bits, transform="cautious", backend="native")
            param.grad = param.detach().clone()
            optimizer.step()
            for tensor in (param.detach(), *optimizer.state[param].values()):
                found.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def in_process(**env):
    command = [sys.executable, __file__]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture(scope="module")
def here():
    return in_process(OMP_NUM_THREADS="1")


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_instruction_sets_give_the_same_bits(isa, here):
    reason = subprocess.run(
        [sys.executable, "-c", "from subspace_optim import _ext; print(_ext.load())"],
        env={**os.environ, "SSO_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    if reason != "None":
        pytest.skip(reason)
    assert in_process(OMP_NUM_THREADS="1", SSO_ISA=isa) == [isa, here[1]]


def test_threads_give_the_same_bits(here):
    assert in_process(OMP_NUM_THREADS="2") == here


# ---- as ops ---------------------------------------------------------------------------------------------------------


def arguments(name, lists, transform="none"):
    side, kind = ops.SIDES.index(lists.side), TRANSFORMS.index(transform)
    wide = lists.exp_avgs[0].dtype
    return {
        "grad_max": (lists.grads,),
        "project": (lists.grads, lists.bases, side, wide),
        "adam_update_": (
            *([m.clone() for m in lists.exp_avgs], [m.clone() for m in lists.exp_avgs], lists.exp_avgs),
            *(lists.exp_avg_sqs, lists.steps, 0.9, 0.99, 1e-8, kind, False),
        ),
        "linear_update_": (
            *([m.clone() for m in lists.exp_avgs], [m.clone() for m in lists.exp_avgs], lists.exp_avgs),
            *(lists.steps, 0.9, -0.25, 0.8, 1.0, kind),
        ),
        "apply_": (
            *(lists.params, lists.exp_avgs, lists.bases, lists.steps, lists.seeds, lists.lr, 0.1, 0.5, side),
            *(False, philox.ALL, []),
        ),
        "line_norms": (lists.grads, -2, wide),
        "weight_norm_adam_": (
            *(lists.params, lists.grads, lists.exp_avgs, lists.exp_avg_sqs, *lists.averages(0, 0), lists.bases),
            *(lists.steps, lists.seeds, lists.lr, 0.9, 0.99, 1e-8, 0.1, 0.5, side, kind),
        ),
        "compressed_adafactor_": (
            *(lists.params, lists.grads, lists.exp_avgs, *lists.averages(0, 1)),
            *(lists.bases, [b.clone() for b in lists.bases], [False, True], lists.steps, lists.seeds, lists.lr),
            *(0.9, 0.8, 1.0, 0.1, 0.5, side, kind),
        ),
        "projected_adam_": (
            *(lists.params, lists.grads, lists.exp_avgs, lists.exp_avg_sqs, lists.bases, lists.steps, lists.seeds),
            *(lists.lr, 0.9, 0.99, 1e-8, 0.1, 0.5, side, kind, philox.ALL),
        ),
    }[name]


OF_MATRICES = ("line_norms", "weight_norm_adam_", "compressed_adafactor_")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "side"),
    [
        (name, side)
        for name in ("grad_max", "project", "adam_update_", "linear_update_", "apply_", "projected_adam_", *OF_MATRICES)
        for side in (None, *SIDES)
        if side or name not in ("project", *OF_MATRICES)
    ],
)
def test_opcheck(name, side, dtype):
    lists = Lists.random((5, 7), 3, side, dtype)
    torch.library.opcheck(getattr(torch.ops.subspace_optim, name).default, arguments(name, lists))


@pytest.mark.parametrize("side", [None, "left"])
def test_compiles_into_one_graph(side):
    lists = Lists.random((37, 53), 3, side, torch.float32)
    want = lists.stepped(native)["params"]
    given = arguments("projected_adam_", lists)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(params, grads, exp_avgs, exp_avg_sqs, bases, steps, lr):
        torch.ops.subspace_optim.projected_adam_(
            *(params, grads, exp_avgs, exp_avg_sqs, bases, steps, given[6], lr), *given[8:]
        )

    step(*given[:6], lists.lr)
    assert all(torch.equal(a, b) for a, b in zip(lists.params, want))


def test_where_native_is_not_the_reference_is():
    kernel = torch.ops.subspace_optim.projected_adam_.default
    lists = Lists.random((37, 53), 3, "left", torch.float32)
    want = lists.stepped(reference)["params"]
    default = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    kernel.redispatch(default, *arguments("projected_adam_", lists))
    assert all(torch.equal(a, b) for a, b in zip(lists.params, want))


def test_autograd_sees_the_write():
    weight = torch.nn.Parameter(torch.ones(3))
    loss = (weight * weight).sum()
    optimizer = so.SubspaceOptimizer([weight], backend="native")
    weight.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- the optimizers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_optimizers(method, dtype):
    results = []
    for backend in ("native", "reference"):
        rng = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s, generator=rng).to(dtype)) for s in ((24, 40), (40, 24), (24,))]
        groups = [{"params": params[:2]}, {"params": params[2:]}]
        optimizer = method.optimizer(groups, lr=1e-2, weight_decay=0.1, backend=backend, **method.settings)
        for _ in range(20):
            for p in params:
                p.grad = torch.randn(p.shape, generator=rng).to(dtype)
            optimizer.step()
        results.append([p.detach().clone() for p in params])
    if dtype == torch.float32:
        assert distance(*results) < 1e-5
    else:
        assert sum(float((a != b).float().mean()) for a, b in zip(*results)) / 3 < 0.02


if __name__ == "__main__":
    with exact_products():
        print(_ext.isa(), digest())  # noqa: T201
