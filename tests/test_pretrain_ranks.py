"""`torchrun … -m subspace_optim pretrain`: the run of one process, on as many ranks as there are."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pretraining import environment, micro, state_at, steps_saved, wait_for, write_corpus

from subspace_optim.cli import main
from subspace_optim.pretrain.config import UserError, resolve
from subspace_optim.pretrain.ranks import Launched

pytestmark = pytest.mark.distributed

STEPS = ("--steps", 12, "--keep", 9, "--batch-size", 12, "--eval-tokens", 16 * 29)  # 29 windows: 2 × 12 + 4 + 1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "email")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUBSPACE_OPTIM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """The run of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert main(micro(corpus, run, *STEPS)) == 0
    return state_at(run, 12)


def launch(ranks, arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.Popen(
        [*command, "-m", "subspace_optim", *map(str, arguments)],
        env=environment() | {"OMP_WAIT_POLICY": "PASSIVE"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, code=0):
    try:
        out, error = process.communicate(timeout=150)
    finally:
        process.kill()
    assert process.returncode == code, error
    return out, error


def assert_same_run(ours, theirs):
    """Losses, norms and evaluations: sums over ranks are taken in another order, and steps of Adam enlarge that."""
    assert len(ours["curve"]) == len(theirs["curve"])
    torch.testing.assert_close(ours["curve"][:, :4], theirs["curve"][:, :4], rtol=1e-3, atol=0)
    torch.testing.assert_close(ours["evaluations"], theirs["evaluations"], rtol=1e-4, atol=0)
    assert ours["position"] == theirs["position"]


@pytest.fixture(scope="module")
def shards(corpus, tmp_path_factory):
    """The folder of a finished run on two ranks with shards, and what it printed."""
    run = tmp_path_factory.mktemp("shards") / "run"
    return run, *finish(launch(2, micro(corpus, run, *STEPS, "--parallel", "fsdp")))


@pytest.fixture(scope="module")
def copies(shards, tmp_path_factory):
    """The folder of a run on three ranks with copies, which went on from a checkpoint of two ranks with shards."""
    run = tmp_path_factory.mktemp("copies") / "run"
    taken_back(shards[0], run, 4)
    return run, *finish(launch(3, ["pretrain", "--resume", run, "--plain", "--parallel", "ddp"]))


def taken_back(run, to, step):
    shutil.copytree(run / "checkpoints" / f"step-{step:08d}", to / "checkpoints" / f"step-{step:08d}")


@pytest.mark.parametrize(("name", "how"), [("shards", "2, shards of the model"), ("copies", "3, a copy of the model")])
def test_ranks_are_one_process(request, alone, name, how):
    run, out, error = request.getfixturevalue(name)
    assert_same_run(state_at(run, 12), alone)
    assert "warning" not in error and how in out
    assert out.count("step     12") == 1 and out.count("perplexity") == 1  # one rank speaks
    assert {path.name for path in run.iterdir()} == {".lock", "checkpoints", "report.json", "report.png"}


@pytest.mark.parametrize("name", ["shards", "copies"])
def test_a_checkpoint_of_ranks_is_that_of_one_process(request, alone, tmp_path, name):
    """The same whole and plain tensors, with which one process goes on."""
    run, _, _ = request.getfixturevalue(name)
    assert layout(state_at(run, 12)["model"]) == layout(alone["model"])
    assert layout(state_at(run, 12)["optimizer"]) == layout(alone["optimizer"])
    taken_back(run, tmp_path, 8)
    assert main(["pretrain", "--resume", str(tmp_path), "--quiet"]) == 0
    assert_same_run(state_at(tmp_path, 12), alone)


def layout(state):
    if isinstance(state, dict):
        return {key: layout(value) for key, value in state.items()}
    if isinstance(state, list):
        return [layout(value) for value in state]
    return (type(state), state.shape, state.dtype) if isinstance(state, torch.Tensor) else state


def ranks_of(process):
    """Process ids of the ranks, in the order of their start."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in children.split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in Linux's /proc")
def test_a_killed_rank_ends_the_run_and_costs_the_steps_since_the_checkpoint(corpus, tmp_path):
    run = tmp_path / "run"
    process = launch(2, micro(corpus, run, *STEPS, "--steps", 4000, "--warmup", 1))
    wait_for(lambda: max(steps_saved(run), default=0) >= 4, process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    _, error = finish(process, code=1)
    assert "rank 0 of 2 has lost the others" in error
    last = max(steps_saved(run))
    assert last < 4000
    assert main(["pretrain", "--resume", str(run), "--quiet", "--steps", str(last + 2)]) == 0
    assert len(state_at(run, last + 2)["curve"]) == last + 2


def test_an_interrupt_saves_and_ends_all_ranks(corpus, tmp_path):
    run = tmp_path / "run"
    options = ("--steps", 4000, "--save-every", 1000, "--parallel", "fsdp", "--layerwise", "hooks")
    process = launch(2, micro(corpus, run, *STEPS, *options))
    wait_for(lambda: steps_saved(run) == [0], process)
    process.send_signal(signal.SIGINT)
    out, _ = finish(process, code=1)
    step = max(steps_saved(run))
    assert f"stopped by SIGINT after step {step}" in out
    command = shlex.split(out.strip().splitlines()[-1])
    assert command[:3] == ["torchrun", "--nproc-per-node", "2"] and command[-2:] == ["--resume", str(run)]
    assert main(["pretrain", "--resume", str(run), "--quiet", "--steps", str(step + 2)]) == 0


def test_what_ranks_cannot_do_is_refused(monkeypatch):
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 3}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=r"--batch-size 8: .* to 3 ranks; .* multiple of 3, or .* 1, 2, 4 or 8"):
        Launched().accept(resolve({"batch_size": 8}))
    with pytest.raises(UserError, match=r"--parallel fsdp: .*use --layerwise hooks"):
        Launched().accept(resolve({"batch_size": 9, "parallel": "fsdp", "layerwise": "linear"}))
