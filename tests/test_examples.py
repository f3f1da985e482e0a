"""The examples of the documentation run as they are."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "subspace_optim" / "docs" / "examples").glob("*.py"))


@pytest.mark.filterwarnings("ignore")  # what frameworks say of their own defaults
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert "rank 8" in capsys.readouterr().out


@pytest.mark.distributed
def test_several_gpus_on_two_ranks_goes_on_from_one(tmp_path, monkeypatch, capsys):
    (path,) = (path for path in EXAMPLES if path.stem == "several_gpus")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    assert "after 20 steps" in capsys.readouterr().out
    assert "after 40 steps" in done.stdout and "rank 0 of 2" in done.stdout
