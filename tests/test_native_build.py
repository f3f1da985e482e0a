"""The native library is there where it can be built; where it cannot, everything works without it and says so."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import subspace_optim as so
from subspace_optim import _ext

ROOT = Path(__file__).parents[1]


def python(*command, **env):
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(os.environ.get("SSO_BUILD") == "off", reason="SSO_BUILD=off")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_built_where_there_is_a_compiler():
    assert so.backends()["native"] == f"available ({_ext.isa()})"


@pytest.mark.parametrize(("content", "reason"), [(None, "not built"), (b"no library", "does not load")])
def test_without_a_library(tmp_path, monkeypatch, content, reason):
    if content is not None:
        (tmp_path / "_C.abi3.so").write_bytes(content)
    monkeypatch.setattr(_ext, "__file__", str(tmp_path / "_ext.py"))
    assert reason in _ext.load.__wrapped__()


STEP = """
import torch, subspace_optim as so
w = torch.nn.Parameter(torch.ones(8, 9)); w.grad = torch.ones(8, 9)
so.GaLore([w], rank=2, backend={backend!r}).step()
print(so.backends()["native"], float(w.sum()) < 72)
"""


def test_auto_falls_back_and_says_why():
    done = python("-c", STEP.format(backend="auto"), SSO_ISA="none")
    assert "SSO_ISA=none is not one of base, avx2, avx512" in done.stdout
    assert done.stdout.endswith("True\n")


def test_an_explicit_choice_that_is_not_there_is_refused():
    done = python("-c", STEP.format(backend="native"), SSO_ISA="none")
    assert done.returncode == 1
    assert "backend='native' is not available: _C" in done.stderr


def build(out, **env):
    pytest.importorskip("setuptools", minversion="77")
    command = ["-c", "import setuptools; setuptools.setup()", "build_ext", f"--build-lib={out}", f"--build-temp={out}"]
    done = python(*command, **env)
    return done.returncode, done.stdout + done.stderr, list(out.rglob("*.so"))


NO_COMPILER = {"CC": "false", "CXX": "false"}
NO_HEADERS = {"SSO_TORCH_DIR": "/nowhere"}


@pytest.mark.parametrize("missing", [NO_COMPILER, NO_HEADERS], ids=["compiler", "headers"])
def test_what_is_missing_is_reported_but_stops_only_native(tmp_path, missing):
    status, output, libraries = build(tmp_path, SSO_BUILD="auto", **missing)
    assert (status, libraries) == (0, [])
    assert "native kernels are not built" in output
    status, output, libraries = build(tmp_path, SSO_BUILD="native", **missing)
    assert status != 0
    assert "SSO_BUILD=native: " in output


def test_off_builds_nothing(tmp_path):
    assert build(tmp_path, SSO_BUILD="off")[::2] == (0, [])


def test_unknown_mode_is_refused(tmp_path):
    status, output, _ = build(tmp_path, SSO_BUILD="maybe")
    assert status != 0
    assert "SSO_BUILD='maybe' must be one of auto, native, off" in output


@pytest.mark.parametrize(("value", "message"), [("1", "no nvcc in PATH"), ("yes", "must be 0 or 1")])
def test_cuda_is_built_or_refused(tmp_path, value, message):
    status, output, libraries = build(
        tmp_path, SSO_BUILD="off", SSO_BUILD_CUDA=value, PATH=str(tmp_path), CUDA_HOME=str(tmp_path)
    )
    assert (status, libraries) == (1, [])
    assert message in output
