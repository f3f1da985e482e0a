"""kernels/compiled.py beside the reference, with few graphs: each takes seconds to compile."""

import pytest
import torch
from buckets import bucket, error, step_projected, twice
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode

import subspace_optim as so
from subspace_optim.kernels import compiled, reference, select

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*script_method. is deprecated:DeprecationWarning"),  # torch's own, on import
]

SHAPES = {None: ((40, 56), (1001,)), "left": ((40, 56),), "right": ((56, 40), (31, 33)), "both": ((40, 56),)}
CASES = [(side, shape) for side, shapes in SHAPES.items() for shape in shapes]
SEEDS = (2**62 + 1, 7, 9)


@pytest.fixture
def kernels():
    why = compiled.supports(None)
    if why is not None:
        pytest.skip(f"compiled: {why}")
    return compiled


def step_both(kernels, lists, side, transform="none", lr=0.01, beta1=0.8, seeds=SEEDS, finite=None):
    mine, theirs, unharmed = twice(lists)
    for kernel, columns in ((kernels, mine), (reference, theirs)):
        numbers = {"lr": torch.tensor(lr, dtype=torch.float64), "betas": (beta1, 0.95)}
        step_projected(kernel, columns, side, transform, seeds[: len(lists[0])], finite=finite, **numbers)
    assert unharmed()
    return mine, theirs


def assert_same(mine, theirs):
    for got, want in zip(mine[2:], theirs[2:], strict=True):  # moments, bases, steps
        assert error(got, want) < 1e-6
    if mine[0][0].dtype == torch.float32:
        assert error(mine[0], theirs[0]) < 1e-6
    for a, b in zip(mine[0], theirs[0], strict=True):  # the same noise: a last bit of float32 seldom turns a rounding
        assert (a != b).sum() <= 1 + 1e-3 * a.numel() or a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("side", "shape"), CASES, ids=str)
def test_step_is_the_reference(kernels, side, shape, dtype):
    assert_same(*step_both(kernels, bucket(shape, 4, side, dtype), side))


@pytest.mark.parametrize("transform", ["grams", "cautious"])
def test_transforms(kernels, transform):
    assert_same(*step_both(kernels, bucket((40, 56), 4, "left", torch.float32), "left", transform))


def test_one_graph_serves_shapes_counts_rates_and_betas(kernels):
    def step(shape, side, **changed):
        assert_same(
            *step_both(kernels, bucket(shape, 4, side, torch.float32, changed.pop("count", 2)), side, **changed)
        )

    step((40, 56), None)
    step((40, 56), "left")
    before = counters["stats"]["unique_graphs"]
    step((64, 30), None, count=3, lr=0.02)
    step((5, 3, 7), None, count=1, beta1=0.7)
    step((64, 30), "right", count=3, lr=0.02, beta1=0.7)
    assert counters["stats"]["unique_graphs"] == before


def test_what_torch_would_compile_again_is_the_references(kernels):
    step_both(kernels, bucket((40, 56), 4, "left", torch.float32), "left")
    before = counters["stats"]["unique_graphs"]
    for shape in ((), (1,), (0,)):
        assert_same(*step_both(kernels, bucket(shape, 0, None, torch.float32), None))
    lists = bucket((40, 56), 0, None, torch.float32)
    flags = torch.tensor([True, False])
    assert_same(*step_both(kernels, lists, None, finite=flags))
    strided = [[t.mT.contiguous().mT for t in lists[0]], *lists[1:]]
    ours, theirs = ([[t.clone() for t in column] for column in strided] for _ in range(2))
    for kernel, columns in ((kernels, ours), (reference, theirs)):
        step_projected(kernel, columns, None, seeds=SEEDS[:2])
    assert not ours[0][0].is_contiguous()
    assert_same(ours, theirs)
    assert counters["stats"]["unique_graphs"] == before


def test_optimizer_by_name(kernels):
    """bfloat16: a projected matrix, experts (views of one tensor) and a vector, in the graphs of the other tests."""
    ends = []
    for backend in ("compiled", "reference"):
        rng = torch.Generator().manual_seed(0)
        shapes = ((24, 40), (3, 40, 24), (24,))
        params = [torch.nn.Parameter(torch.randn(s, generator=rng).bfloat16()) for s in shapes]
        groups = [
            {"params": params[:1]},
            {"params": params[1:2], "batch_dims": 1},
            {"params": params[2:], "rank": None},
        ]
        optimizer = so.GaLore(groups, rank=4, lr=1e-2, backend=backend, update_proj_gap=3)
        for _ in range(5):
            for p in params:
                p.grad = torch.randn(p.shape, generator=rng).bfloat16()
            optimizer.step()
        ends.append(params)
    # Two refreshes amplify the last bits of float32, each of which may turn a stochastic rounding.
    assert sum(float((a != b).float().mean()) for a, b in zip(*ends, strict=True)) / 3 < 0.02


def test_fake_tensors_are_not_handed_to_compiled_code():
    """They have no address, and to read one would be the end of a planner's process."""
    with FakeTensorMode():
        assert not compiled._fits([torch.zeros(4, 4)])
    assert compiled._fits([torch.zeros(4, 4)])


def test_autograd_sees_the_write(kernels):
    weight = torch.nn.Parameter(torch.ones(3))
    loss = (weight * weight).sum()
    weight.grad = torch.ones(3)
    so.SubspaceOptimizer([weight], backend="compiled").step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_it_says_why_not_and_is_never_chosen_by_itself(monkeypatch):
    plan = so.types.make_plan((40, 56), torch.float32, torch.device("cpu"), 4)
    assert select.resolve("auto", plan) is not compiled
    elsewhere = so.types.make_plan((40, 56), torch.float32, torch.device("meta"), 4)
    assert compiled.supports(elsewhere) == "it is for the CPU, and the parameter is on meta"
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(compiled, "_missing", compiled._missing.__wrapped__)
    with pytest.raises(RuntimeError, match="no-such-compiler is not installed"):
        select.resolve("compiled", plan)
