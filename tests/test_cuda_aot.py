"""The CUDA library as `SSO_BUILD_CUDA=1 pip install` builds it, with no GPU: no spills on six generations, and it fits.

A kernel that spills or asks for more shared memory than the chip has is slow or does not start, and the emulator would
not notice.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from subspace_optim.kernels import cuda

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: the CUDA kernels are not compiled here")

# Bytes of shared memory that a block may opt in to (NVIDIA's tables).
SHARED = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376}
# project, project_tangents, apply, fused, blend, project_normalised of every side and type; prepare, draw, absmax,
# dense, linear_update, rescale; lengths, factors; square_sums, averages, normalisers, clip; encode, decode, coded
KERNELS = 6 * 2 * 3 + 6 + 2 + 4 + 3
REGISTERS = 128  # of 65536: two blocks of 256 threads on a multiprocessor, so that one multiplies while one waits
COMPILED = re.compile(
    r"Compiling entry function '(\S+)' for '(sm_\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The library, and what ptxas says of its kernels."""
    pytest.importorskip("setuptools", minversion="77")
    out = tmp_path_factory.mktemp("cuda")
    command = ["-c", "import setuptools; setuptools.setup()", "build_ext", f"--build-lib={out}", f"--build-temp={out}"]
    environment = {"SSO_BUILD": "off", "SSO_BUILD_CUDA": "1", "NVCC_APPEND_FLAGS": "-Xptxas=-v"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out / "subspace_optim/_cuda.so", COMPILED.findall(done.stdout + done.stderr)


@pytest.mark.slow
def test_kernels_fit(built):
    path, kernels = built
    assert sorted(architecture for _, architecture, *_ in kernels) == sorted([*SHARED] * KERNELS)
    for name, architecture, stack, stores, loads, registers in kernels:
        what = f"{name} on {architecture} ({registers} registers)"
        assert (stack, stores, loads) == ("0", "0", "0"), f"{what} spills"
        assert int(registers) <= REGISTERS, what
    library = cuda.bind(path)
    asked = max(library.sso_shared_bytes(cuda.TYPES.index(dtype), rank) for dtype, rank in cuda.FUSED_RANK.items())
    for architecture, limit in SHARED.items():
        assert asked <= limit, f"{asked} bytes of shared memory on {architecture}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here; tests/test_gpu.py runs the library on it")
def test_loads_and_says_that_there_is_no_gpu(built):
    library = cuda.bind(built[0])
    code = library.sso_usable()
    assert code != 0
    assert re.search("driver|device", library.sso_error(code).decode())
