"""Matrix products in bfloat16, which native kernels use where a CPU is fast at them: permitted, bounded, refused.

Run as a script it prints what it found, for a process in which the CPU counts as fast at them.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from test_kernels import Lists, distance

from subspace_optim import _ext
from subspace_optim.kernels import native, reference
from subspace_optim.projectors import OnlinePCA
from subspace_optim.types import Hyper, Weights

SIDES = ("left", "right", "both")
DTYPES = (torch.float32, torch.bfloat16)
SHAPE, RANK = (300, 700), 9  # in several blocks, the last of them shorter
# G, the bases, R, N and back(N) are each rounded to nearest: by at most 2^-9 of an element, about 1.6e-3 of the norm.
BOUND = 1e-2

pytestmark = pytest.mark.skipif(_ext.load() is not None, reason=f"native kernels: {_ext.load()}")


def errors(side, dtype):
    """Of R, of the first moments, and of what float32 weights move by."""
    lists = Lists.random(SHAPE, RANK, side, dtype)
    lists.seeds, lists.params = [], [torch.zeros_like(p) for p in lists.params]
    lists.bases = [q / q.norm(dim=0) for q in lists.bases]  # so that R is as large as G, and N more than its sign
    lists.exp_avg_sqs = [v + 1 for v in lists.exp_avg_sqs]  # near 0 they would magnify any error
    lows = [k.project(lists.grads, lists.bases, side, torch.float32) for k in (native, reference)]
    steps = [lists.stepped(k) for k in (native, reference)]
    found = {"project": distance(*lows), "moment": distance(*(step["exp_avgs"] for step in steps))}
    if dtype == torch.float32:
        found["step"] = distance(*(step["params"] for step in steps))
        written = []
        for kernel in (native, reference):
            params = [p.clone() for p in lists.params]
            kernel.apply_(Weights(params, lists.steps), lists.exp_avgs, lists.bases, Hyper(lists.lr), side)
            written.append(params)
        found["apply"] = distance(*written)
    return found


def whole_steps(side, dtype):
    """Of the first moments after GradNormLoRP's and Flora's steps, with rounded products and without."""
    found = {}
    steps = {
        "weight_norm_adam_": Lists.step_lengths,
        "compressed_adafactor_": lambda lists: lists.step_momenta(lists.bases, [True, False]),
    }
    for name, step in steps.items():
        moments = []
        for precision in ("bf16", "ieee"):
            torch.backends.mkldnn.matmul.fp32_precision = precision
            lists = Lists.random(SHAPE, RANK, side, dtype)
            lists.seeds = []
            step(lists)
            moments.append(lists.exp_avgs)
        found[name] = distance(*moments)
    return found


def pulled(dtype):
    """Of the slope that Online Subspace Descent learns its basis by."""
    rng = torch.Generator().manual_seed(0)
    grad = torch.randn(SHAPE, generator=rng).to(dtype)
    basis = torch.linalg.qr(torch.randn(SHAPE[1], RANK, generator=rng))[0]
    norm, found = torch.linalg.vector_norm(grad.float()), []
    for kernel in (native, reference):
        lows = kernel.project([grad], [basis], "right", torch.float32)
        found.append(OnlinePCA(RANK).slopes([basis], [grad], lows, [norm], kernel=kernel))
    return distance(*found)


def survey():
    found = {}
    for precision in ("none", "bf16", "ieee"):
        for dtype in DTYPES:
            for side in SIDES:
                torch.backends.mkldnn.matmul.fp32_precision = precision
                found[f"{precision} {dtype} {side}"] = errors(side, dtype)
            found[f"{precision} {dtype} slope"] = {"slope": pulled(dtype)}
    for dtype in DTYPES:
        for side in SIDES:
            found[f"whole steps {dtype} {side}"] = whole_steps(side, dtype)
    return found


def surveyed(isa):
    done = subprocess.run(
        [sys.executable, __file__], env={**os.environ, "SSO_ISA": isa}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def fast():
    return surveyed("base_bf16")


@pytest.fixture(scope="module")
def slow():
    return surveyed("base")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*SIDES, "slope"])
def test_where_they_are_permitted_they_round_a_little(case, dtype, fast):
    for precision in ("none", "bf16"):
        permitted = precision == "bf16" or dtype == torch.bfloat16
        for name, error in fast[f"{precision} {dtype} {case}"].items():
            assert 1e-4 < error < BOUND if permitted else error < 1e-6, (precision, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", SIDES)
def test_whole_steps_round_as_little(side, dtype, fast):
    for name, error in fast[f"whole steps {dtype} {side}"].items():
        assert 1e-4 < error < BOUND, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*SIDES, "slope"])
def test_where_they_are_refused_they_are_exact(case, dtype, fast):
    assert all(error < 1e-6 for error in fast[f"ieee {dtype} {case}"].values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*SIDES, "slope"])
def test_a_cpu_that_is_not_fast_at_them_is_exact(case, dtype, slow):
    assert all(error < 1e-6 for error in slow[f"none {dtype} {case}"].values())


if __name__ == "__main__":
    print(json.dumps(survey()))  # noqa: T201
