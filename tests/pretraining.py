"""What the tests of `subspace-optim pretrain` share: a small real corpus, a tiny model, processes to kill."""

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from subspace_optim.cli import main
from subspace_optim.pretrain import checkpoint

ROOT = Path(__file__).parents[1]
MODEL = ["--hidden", "32", "--intermediate", "48", "--layers", "1", "--heads", "2", "--vocab-size", "400"]
BUDGET = ["--seq-len", "16", "--batch-size", "4", "--eval-tokens", "512", "--eval-every", "6", "--save-every", "4"]
PROJECTED = ["--rank", "4", "--update-proj-gap", "5"]


def write_corpus(folder: Path) -> Path:
    """The source of the standard library's email package: real text, 28 files or so."""
    source = Path(sysconfig.get_path("stdlib"), "email")
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__pycache__", "*.rst", "architecture*"))
    return folder


def micro(corpus: Path, out: Path, *more: object, projected: bool = True) -> list[str]:
    """The command line of a run of a second."""
    options = ["pretrain", "--data", str(corpus), "--out", str(out), "--plain", *MODEL, *BUDGET]
    return [*options, *(PROJECTED if projected else []), *map(str, more)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error::UserWarning"}


def start(arguments: list[str], **more: Any) -> subprocess.Popen[str]:
    """The command in a process of its own, as a person starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "subspace_optim", *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def killed_while(body: str, folder: Path, delays: tuple[float, ...]) -> None:
    """Run code again and again in a process of its own and kill each in the middle, after some delay.

    Args:
        body: Python, indented by four, that works on ``folder`` and never ends by itself.
        folder: Where it works.
        delays: Seconds from its start to its end.
    """
    script = f"""
import itertools, os, signal, sys, time
from pathlib import Path
import torch
from subspace_optim.pretrain import checkpoint
from subspace_optim.pretrain.files import new_directory, write_text
torch.set_num_threads(1)

def work(folder):
{body}

for delay in {delays!r}:
    child = os.fork()
    if child == 0:
        work(Path(sys.argv[1]))
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""
    subprocess.run([sys.executable, "-c", script, str(folder)], env=environment(), check=True)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"ended too early ({process.returncode}): {process.communicate()}")
        if time.monotonic() > end:
            process.kill()
            pytest.fail(f"nothing happened within {seconds} s: {process.communicate()}")
        time.sleep(0.005)


def steps_saved(run: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.checkpoints(run)]


def state_at(run: Path, step: int) -> dict[str, Any]:
    return checkpoint.load(run / checkpoint.FOLDER / f"step-{step:08d}")[0]


def assert_same_state(ours: Any, theirs: Any, where: str = "state") -> None:
    """Bit for bit, apart from the clock and the memory that the two runs happened to take."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours.keys() - {"seconds", "peak_and_baseline", "allocated"}:
            assert_same_state(ours[key], theirs[key], f"{where}[{key!r}]")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for index, (one, other) in enumerate(zip(ours, theirs)):
            assert_same_state(one, other, f"{where}[{index}]")
    elif isinstance(ours, torch.Tensor):
        if where == "state['curve']":  # its last two columns are seconds
            ours, theirs = ours[:, :4], theirs[:, :4]
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str) -> str:
    """The command ends with code 2 and one line on standard error that holds the words."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("subspace-optim: error: ") and error.count("\n") == 1, error
    for word in words:
        assert word in error, error
    return error
