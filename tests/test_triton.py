"""The Triton kernels against the reference, without a GPU: tests/interpreted.py in a process of its own.

Whether a kernel is interpreted is decided once, when it is decorated, hence the process.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels are not interpreted here")

from subspace_optim.kernels import triton_device


@pytest.mark.slow
def test_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    # numpy warns where a kernel computes what it then masks, which on a GPU is silent
    command += ["-W", "ignore::RuntimeWarning:triton", str(Path(__file__).with_name("interpreted.py"))]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


# Present in triton 3.6, which torch 2.11 brings; CI has a newer one. Look there before you add a name.
# fmt: off
IN_TRITON_3_6 = {
    "abs", "arange", "atomic_add", "bfloat16", "cast", "cdiv", "constexpr", "div_rn", "dot", "exp", "float16",
    "float32", "float64", "int32", "int64", "interleave", "join", "load", "log", "max", "maximum", "minimum",
    "multiple_of", "num_programs", "permute", "philox", "pointer_type", "program_id", "reshape", "split", "sqrt",
    "sqrt_rn", "static_range", "store", "sum", "trans", "uint32", "uint8", "where", "zeros",
}
# fmt: on


def test_kernels_ask_for_nothing_that_the_oldest_triton_has_not():
    """Nor for a string as the default of an argument, which 3.6 does not take for a constant."""
    tree = ast.parse(Path(triton_device.__file__).read_text())
    defaults = [d for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for d in node.args.defaults]
    assert not [d for d in defaults if isinstance(d, ast.Constant) and isinstance(d.value, str)]
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    used = {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == "tl"}
    assert used and not used - IN_TRITON_3_6
