"""The benchmarks run, count what they say they count, and give no figure of an arm whose numbers are wrong.

In CI on tiny shapes: native and reference; compiled has tests/test_compiled.py, where its graphs are compiled once.
"""

import json
import math
import os
import signal
import subprocess
import time
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import Mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from subspace_optim import cli
from subspace_optim.kernels import native, reference

ROOT = Path(__file__).parents[1]
TINY = ["--model", "tiny", "--rounds", "1", "--backends", "auto", "reference"]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    names = ("arms", "gpu", "limits", "measures", "plan", "run", "tune")
    return SimpleNamespace(**{name: import_module(f"bench.{name}") for name in names})


def ran(bench, out, *arguments):
    """(exit status, the record)."""
    status = bench.run.main([*TINY, "--out", str(out), *arguments])
    return status, json.loads(next(out.glob("*.json")).read_text())


def test_one_command_measures_everything_that_is_there(bench, tmp_path, capsys):
    status, record = ran(bench, tmp_path, "--gap", "4")
    printed = capsys.readouterr().out
    assert status == 0
    assert record["machine"]["commit"] and record["machine"]["versions"]["torch"]
    assert record["gap"]["p99_ms"] >= record["gap"]["p50_ms"] > 0
    for name in bench.arms.arms(["auto", "reference"]):
        if f"{name}: left out" in printed:  # a peer that is not installed
            assert name.startswith("peer")
            continue
        row = record["arms"][name]
        assert f"\n{name} " in printed
        assert row["op_calls"] > 0 and row["step_ms"] > 0 and row["of_limit"] > 0
        assert ("parity" in row) == (name.split()[0] in bench.arms.METHODS and "-bit" not in name)
    galore = record["arms"]["galore"]
    assert galore["amortised_ms"]["200"] == pytest.approx(galore["step_ms"] + galore["refresh_ms"] / 200)
    assert galore["flops_ms"] > 0 and record["arms"]["grams"]["flops_ms"] == 0
    assert "torch AdamW fused" in next(tmp_path.glob("*.svg")).read_text()


def test_the_command_line_hands_its_options_on(bench, tmp_path, monkeypatch, capsys):
    assert cli.main(["bench", "run", *TINY, "--arms", "adamw", "--gap", "0", "--out", str(tmp_path)]) == 0
    assert "adamw" in json.loads(next(tmp_path.glob("*.json")).read_text())["arms"]
    monkeypatch.setattr(cli, "_SOURCE", tmp_path)  # as where a wheel was installed
    assert cli.main(["bench"]) == 2
    assert "bench: the benchmarks are not part of an installed package" in capsys.readouterr().err


def test_an_arm_that_is_wrong_gets_no_figure(bench, tmp_path, capsys, monkeypatch):
    right = bench.arms.ours

    def wrong(method, backend, *setting, lr=bench.arms.LR, **options):
        # A learning rate that is off by 1 %, of an Adam step of 0.1, is 1e-3 beside a weight of 1.
        return right(
            method, backend, *setting, lr=1.01 * lr if (method, backend) == ("grams", "auto") else lr, **options
        )

    monkeypatch.setattr(bench.arms, "ours", wrong)
    status, record = ran(bench, tmp_path, "--arms", "grams", "--gap", "0")
    printed = capsys.readouterr().out
    assert status == 1
    assert "grams: parity fails" in printed
    assert "\ngrams  " not in printed and "grams" not in record["arms"]
    assert record["parity_failed"]["grams"] > 1e-4
    assert "\ngrams (reference)  " in printed and record["arms"]["grams (reference)"]["ratio"] > 0


def of_addmm(_, a, b, **options):
    """FLOPs, by shapes: torch counts them where it is not in place."""
    return 2 * a[0] * a[1] * b[1]


@pytest.mark.parametrize("method", ["adamw", "grams", "galore", "osd", "flora", "gradnormlorp"])
def test_what_is_counted_is_what_the_reference_does(bench, method):
    """Its FLOPs by torch's own counter; its bytes by its state: read, and written unless it is a kept basis."""
    projected, dense, rank = setting = bench.run.parameters("tiny", torch.float32)
    optimizer = bench.arms.ours(method, "reference", *setting)
    optimizer.step()
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: of_addmm}) as counter:
        optimizer.step()
    shapes = [[p.shape for p in tensors] for tensors in (projected, dense)]
    counted = bench.limits.work(method, *shapes, rank, 4)
    tensors = [(key, t) for s in optimizer.state.values() for key, t in s.items() if isinstance(t, torch.Tensor)]
    kept = sum(t.nbytes for key, t in tensors if key == "basis" and method != "osd")
    changed = sum(t.nbytes for _, t in tensors if t.ndim) - kept
    assert counter.get_total_flops() == counted.flops
    assert counted.bytes == sum(3 * p.nbytes for p in projected + dense) + 2 * changed + kept


def test_a_record_names_its_commit_where_git_is_not(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.measures.shutil, "which", lambda name: None)
    assert bench.measures.machine()["commit"] == "unknown" and bench.measures.machine()["dirty"] is None
    monkeypatch.setenv("COMMIT", "abc1234")
    about = bench.measures.machine()
    path = bench.measures.written(tmp_path / "new", {"machine": about}, "NVIDIA H200", "60m")
    assert path.name == f"{about['time'][:10]}-abc1234-NVIDIA-H200-60m.json"
    assert json.loads(path.read_text())["machine"] == about


def test_bytes_of_dense_adamw(bench):
    """28 an element in float32, 22 in bfloat16 with float32 state and 14 without; 8 bits with a scale for 256."""
    for itemsize, bits, each in ((4, 32, 28), (2, 32, 22), (2, None, 14), (4, 8, 12 + 4 * (1 + 4 / 256))):
        assert bench.limits.work("adamw", [], [(10, 100)], 0, itemsize, bits).bytes == 1000 * each


def gpu_script(folder, *parts, failing="no call", seconds=0):
    """Run bench/gpu.sh where every program writes down its call, and those with `failing` in it exit with 3."""
    tools = folder / "tools"
    tools.mkdir(parents=True)
    for name in ("python3", "nvcc", "nvidia-smi", "compute-sanitizer"):
        (tools / name).write_text(f'#!/bin/sh\ncase "$*" in *"{failing}"*) exit 3;; esac\necho "{name} $*"\n')
        (tools / name).chmod(0o755)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "OUT": str(folder), "SECONDS": str(seconds)}
    command = ["bash", str(ROOT / "bench/gpu.sh"), *parts]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_script_for_gpus_does_all_of_it_in_one_command(tmp_path):
    done = gpu_script(tmp_path)
    parts = [line for line in done.stdout.splitlines() if line.startswith("== ") and "exit" not in line]
    assert done.returncode == 0 and parts == ["== build", "== tests", "== memcheck", "== racecheck", "== benchmark"]
    log = (tmp_path / "gpu.log").read_text()
    for call in (
        "build_ext --inplace",
        "tests/test_gpu.py -n 8",
        "--tool memcheck",
        "--tool racecheck",
        "-m bench.gpu",
    ):
        assert call in log


def test_the_script_for_gpus_goes_on_after_a_failure_and_says_so(tmp_path):
    done = gpu_script(tmp_path / "all", failing="tool memcheck")
    assert done.returncode == 1 and "== memcheck: exit 3" in done.stdout and "== benchmark: exit 0" in done.stdout
    memory = gpu_script(tmp_path / "memory", "memory", failing="20GB")
    assert memory.returncode == 1 and memory.stdout.count("bench.plan") == 3 and "7b in 20GB: exit 3" in memory.stdout
    wrong = gpu_script(tmp_path / "wrong", "memry")
    assert wrong.returncode == 2 and "memry" in wrong.stderr and not (tmp_path / "wrong" / "gpu.log").exists()


def test_the_script_for_gpus_ends_in_time(tmp_path):
    """A machine is lent for 10 minutes a command, which the limits of single parts may add up to."""
    late = gpu_script(tmp_path / "late", seconds=600)
    assert late.returncode == 1 and late.stdout.count("no time is left; ask for it alone") == 5
    assert (tmp_path / "late" / "gpu.log").read_text().count("no time is left") == 5


@pytest.mark.parametrize("end", ["an error", "a timeout"])
def test_what_was_measured_is_kept_whatever_ends_it(bench, tmp_path, end):
    record = {"machine": bench.measures.machine(), "rows": []}

    def work():
        with bench.measures.kept(tmp_path, record, "gpu"):
            record["rows"].append(1)
            if end == "an error":
                raise ValueError
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises((ValueError, SystemExit)):
        work()
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["rows"] == [1]


def test_an_arm_that_fails_costs_no_other(bench, monkeypatch):
    monkeypatch.setattr(bench.gpu, "GPU", torch.device("cpu"))
    monkeypatch.setattr(bench.gpu, "launches", lambda step: 1)
    monkeypatch.setattr(bench.gpu, "timed", lambda steps, rounds: dict.fromkeys(steps, 1.0))
    monkeypatch.setattr(bench.gpu, "captured", Mock(side_effect=RuntimeError("capture\nmore")))
    monkeypatch.setattr(bench.gpu, "bare", lambda optimizer: optimizer.step)
    monkeypatch.setitem(bench.gpu.RANKS, "tiny", (8,))
    rows = bench.gpu.measure("tiny", ["auto"], 1, bench.limits.Machine(1e9, 1e9))
    failed = [row for row in rows if "failed" in row]
    assert len(failed) == 3 and {row["failed"] for row in failed} == {"RuntimeError: capture"}
    assert sum("ms" in row for row in rows) > 6
    assert all(bench.gpu.line_of(row).startswith("tiny ") for row in rows)


def test_a_run_that_does_not_fit_is_a_row(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.plan, "measured", Mock(side_effect=torch.OutOfMemoryError("out of memory")))
    assert bench.plan.main(["--sizes", "tiny", "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["rows"] == {"tiny": {"failed": "OutOfMemoryError: out of memory"}}


def test_the_benchmark_for_gpus_needs_one(bench, capsys):
    with pytest.raises(SystemExit, match="0"):
        bench.gpu.main(["--help"])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no backend to time"):
            bench.gpu.main([])
        assert "this machine has no CUDA device" in capsys.readouterr().out


def test_arms_of_the_gpu_step_on_a_cpu(bench, monkeypatch):
    """But for what only a GPU has: events, what a graph replays and the count of launches."""
    monkeypatch.setattr(bench.gpu, "GPU", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", nullcontext)
    monkeypatch.setattr(bench.gpu, "launches", lambda step: step())
    monkeypatch.setattr(bench.gpu, "timed", lambda steps, rounds: dict.fromkeys(steps, 1.0))
    monkeypatch.setitem(bench.gpu.RANKS, "tiny", (8,))
    rows = bench.gpu.measure("tiny", ["auto"], 1, bench.limits.Machine(1e9, 1e9))
    assert {"rank 8 auto", "rank 8 auto, SVD, 8 bits", "ours dense, fp32 state, auto"} <= {row["arm"] for row in rows}
    assert all(row["to_limit"] == 1 / max(row["bytes_ms"], row["flops_ms"]) for row in rows)
    errors, holds = bench.gpu.parity("native" if native.supports(None) is None else "reference")
    assert len(errors) == 6 and holds
    assert bench.gpu.attempted_parity("nowhere")[1] is False


class Shape(NamedTuple):
    """As a Blocks of the Triton kernels."""

    rows: int = 64
    columns: int = 0
    depth: int = 32
    slice: int = 16
    warps: int = 8
    stages: int = 2


def test_the_tuner_finds_the_valley_it_begins_in(bench):
    def measure(shape):
        if shape.stages > 3:
            return "out of shared memory"
        return abs(shape.rows - 256) + abs(shape.depth - 64) + 8.0 - shape.stages

    best, tried = bench.tune.descended(Shape(), measure, math.inf)
    assert best == Shape(rows=256, depth=64, stages=3)
    assert tried[best._replace(stages=4)] == "out of shared memory"
    assert all(shape.columns == 0 for shape in tried)
    assert bench.tune.descended(Shape(), measure, -math.inf) == (Shape(), {Shape(): measure(Shape())})


@pytest.mark.parametrize("name", ["fused", "project", "apply"])
def test_the_tuner_takes_no_shape_that_is_wrong(bench, monkeypatch, name):
    """The reference stands in for the kernels: one shape is refused, one gives other numbers, all take as long."""
    key = (name, False, 90)
    blocks = {key: Shape()}

    def shaped(kernel):
        def call(first, *arguments):
            if blocks[key].stages == 3:
                raise RuntimeError("out of resource: shared memory\nmore")
            out = kernel(first, *arguments)
            for tensor in (out or first.params) if blocks[key].depth == 64 else ():
                tensor.mul_(1.01)
            return out

        return call

    names = ("project", "apply_", "projected_adam_")
    kernels = SimpleNamespace(BLOCKS=blocks, **{each: shaped(getattr(reference, each)) for each in names})
    monkeypatch.setattr(bench.tune, "GPU", torch.device("cpu"))
    monkeypatch.setattr(bench.tune, "shapes", lambda size: [(40, 24), (24, 24)])
    monkeypatch.setitem(bench.tune.RANKS, (name, False), 8)
    monkeypatch.setattr(bench.tune, "timed", lambda arms, rounds: {"call": float(blocks[key].rows)})
    best, tried = bench.tune.tuned(kernels, key, math.inf)
    assert best.rows == 16 and blocks == {key: Shape()}
    assert tried[Shape(rows=16, stages=3)] == "RuntimeError: out of resource: shared memory"
    assert tried[Shape(rows=16, depth=64)].startswith("differs by ")
