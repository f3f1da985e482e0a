"""Repairs bfloat16 in Triton's interpreter (3.6 to 3.9), which keeps it as bare uint16.

As shipped, it multiplies the bit patterns in tl.dot and truncates where hardware rounds to nearest even; upstream calls
bfloat16 unsupported (triton issue 11584). Import this before a kernel runs.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast, _dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot


def widened(handle):
    """A bfloat16 handle as float32; any other as it is."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((np.ascontiguousarray(handle.data).astype(np.uint32) << 16).view(np.float32), tl.float32)


def rounded(values):
    """float32 to the bit patterns of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def cast(self, handle, target):
    source, target_type = handle.dtype.scalar, target.scalar
    if (source, target_type) == (tl.float32, tl.bfloat16):
        return TensorHandle(rounded(handle.data), target_type)
    if (source, target_type) == (tl.bfloat16, tl.float32):
        return widened(handle)
    return _cast(self, handle, target)


def dot(self, a, b, accumulator, *options):
    return _dot(self, widened(a), widened(b), accumulator, *options)


InterpreterBuilder.cast_impl = InterpreterBuilder.create_fp_ext = InterpreterBuilder.create_fp_trunc = cast
InterpreterBuilder.create_dot = dot
