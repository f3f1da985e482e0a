"""The Triton kernels against the reference, without a GPU: tests/interpreted.py in a process of its own.

Whether a kernel is interpreted is decided once, when it is decorated, hence the process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels are not interpreted here")


@pytest.mark.slow
def test_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    # numpy warns where a kernel computes what it then masks, which on a GPU is silent
    command += ["-W", "ignore::RuntimeWarning:triton", str(Path(__file__).with_name("interpreted.py"))]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
