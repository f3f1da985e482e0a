"""Builds csrc/cuda/library.cu with g++ and tests/emulator/cuda.h: the CUDA kernels on a CPU."""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from subspace_optim.kernels import cuda

ROOT = Path(__file__).parents[1]
SOURCE, HEADER = ROOT / "csrc/cuda/library.cu", ROOT / "tests/emulator/cuda.h"
# No contraction: as nvcc has it and the CPU kernels. Words are read as what they are not, as on a GPU.
FLAGS = ("-std=c++20", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-fvisibility=hidden")
FLAGS += ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
SANITIZERS = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TF32X3 = "-DSSO_TF32X3"  # float32 products as the A100, H100 and B200 make them
FORWARD, BACKWARD, RANDOM = range(3)  # orders in which the threads of a block run

MISSING = (
    "g++ is not installed: the CUDA kernels are not emulated here"
    if shutil.which("g++") is None
    else f"the emulator's fibers are for x86-64, and this is {platform.machine()}"
    if platform.machine() != "x86_64"
    else None
)


def library(*flags):
    """The emulated library; built once for these sources and flags, however many processes ask."""
    sources = [*sorted((ROOT / "csrc/cuda").iterdir()), ROOT / "csrc/core.h", HEADER]
    key = hashlib.sha256(repr((FLAGS, flags)).encode() + b"".join(s.read_bytes() for s in sources)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"subspace-optim-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    built = folder / f"{key}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            unfinished = built.with_suffix(".unfinished")
            command = ["g++", "-x", "c++", *FLAGS, *flags, "-include", HEADER, "-shared", SOURCE, "-o", unfinished]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            unfinished.rename(built)
    return cuda.bind(built)
