"""Sharded parameters on real ranks: the numbers do not depend on the sharding."""

import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import sharded
import torch
from sharded import CASES, MESHES, STEPS

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the ranks saved, by stage."""
    folder = tmp_path_factory.mktemp("sharded")
    script = str(Path(__file__).with_name("sharded.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={sharded.MOST}"]
    done = subprocess.run(
        [*command, script, str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return {stage: torch.load(folder / f"{stage}.pt") for stage in sharded.STAGES}


@lru_cache
def unsharded(name, side):
    params = sharded.net()
    sharded.train(params, sharded.build(name, params, side), range(STEPS))
    return sharded.whole(params)


def assert_close(ends, wanted):
    """Sums over shards are taken in another order: float64 rounding, after steps that amplify it."""
    torch.testing.assert_close(ends, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_sharded_is_unsharded(results, case):
    """Uneven and empty shards, stacks, all sides, two-dimensional meshes, across two refreshes of every tensor."""
    world, _, name, side = case
    assert_close(results[str(world)][case], unsharded(name, side))


def test_the_comparison_can_fail():
    other = sharded.net()
    sharded.train(other, sharded.build("galore", other), range(STEPS - 1))
    with pytest.raises(AssertionError):
        assert_close(sharded.whole(other), unsharded("galore", "std"))


def test_a_layout_of_every_kind_is_tried():
    layouts = {(world, layout) for world, meshes in MESHES.items() for _, layout in meshes.values()}
    assert {(3, (0,)), (3, (1,)), (3, (-1,)), (4, (None, 0)), (4, (0, 1))} <= layouts
