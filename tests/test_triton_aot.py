"""Every Triton kernel compiled ahead of time, for six GPU generations, with no GPU: no spills, and it fits.

A kernel that spills or asks for more shared memory than the chip has is slow or does not start, and nothing else here
would notice: the interpreter knows neither.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed: its kernels are not compiled here")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET is set: there is nothing to compile"
)

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from subspace_optim.kernels import triton as kernels  # noqa: E402
from subspace_optim.kernels import triton_device as device  # noqa: E402
from subspace_optim.types import BLOCK  # noqa: E402

# Bytes of shared memory that a block may opt in to (NVIDIA's tables).
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
REGISTERS = 255  # more than that a thread cannot have: the rest is spilled
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

INTEGERS = ("size", "m", "n", "rank", "count", "columns", "pitch")
INTEGERS += ("width", "row_step", "column_step")
TYPES = {"table": "*i64", "finite": "*i1", "corrections": "*fp32", "lr": "fp32"} | dict.fromkeys(INTEGERS, "i32")
FLOATS = ("signed", "unsigned", "lengths", "numbers", "squares", "clips", "sums", "row_sums", "column_sums")
TYPES |= dict.fromkeys(("kept", "out", "seeds"), "*i64") | {"blocks": "i32", "tiles": "i32"}
TYPES |= dict.fromkeys(FLOATS, "*fp32")
STRIDES = tuple(f"{tensor}_{dim}" for tensor in ("x", "code", "scale") for dim in ("row", "column"))
TYPES |= {"values": "*fp32", "begin": "i64", "origin": "i64", "length": "i32"} | dict.fromkeys(STRIDES, "i32")
COMMON = {
    "ALIGN": 16,
    "LR": -1,
    "KIND": "whole",
    "AVERAGE": False,
    "TRANSFORM": "none",
    "MEASURE": False,
    "GRAMS": True,
    "CAUTIOUS": False,
    "COUNT": False,
    "SIGN": False,
    "EPS_INSIDE": False,
    "FACTORS": False,
    "ADAM": True,
    "APPLY": True,
}
OPERANDS = {"bf16": tl.bfloat16, "tf32x3": tl.float32}
WIDE_ACCESS = re.compile(r"ld\.global\S*\.v4|cp\.async\S* \[[^]]+\], \[[^]]+\], 0x10")  # 16 bytes
NARROW = ("words", "advance", "averages", "normalisers", "clip", "decode, packed True")  # few numbers, or half bytes
SAME_CODE = (86, 89)  # as for 80, but for the limits: the mirrored sides are not compiled again


def compiled(kernel, capability, folder, warps=4, stages=3, aligned=True, rows=False, **constants):
    """Registers, stack bytes, bytes of shared memory and PTX of a kernel.

    `aligned`: n is a multiple of 16; `rows`: numbers of rows are given.
    """
    names = kernel.arg_names
    constants |= {} if rows else dict.fromkeys(("lengths", "squares", "numbers"))
    constants = {name: value for name, value in constants.items() if name in names}
    multiples = {"table", "corrections", "size", "m", "n", "rank", "pitch"} - (set() if aligned else {"n", "pitch"})
    multiples |= {"x_row", "code_row", "length"}
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else TYPES.get(name, "fp32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in multiples if name in names},
    )
    options = {"num_warps": warps, "num_stages": stages}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
    registers, stack, local = map(
        int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout).groups()
    )
    return registers, stack + local, binary.metadata.shared, binary.asm["ptx"]


def variants(capability):
    """(name, kernel, its arguments): the widest tile of every kernel, for both precisions and sides."""
    yield "advance", device.advance, {"BLOCK": 128}
    yield "words", device.words, {"BLOCK": kernels._DRAWN}
    elements = {"OUT": tl.bfloat16, "IN": tl.bfloat16, "GRAMS": False, "CAUTIOUS": True}
    for noise in (8, 1, -1):
        what = elements | {"NOISE": noise, "BLOCK": kernels._BLOCK}
        yield f"elementwise, noise {noise}", device.elementwise, what
        yield f"elementwise, factors, noise {noise}", device.elementwise, what | {"ADAM": False, "FACTORS": True}
    yield "linear_update", device.linear_update, {"IN": tl.bfloat16, "TRANSFORM": "cautious", "BLOCK": kernels._BLOCK}
    if capability not in SAME_CODE:
        for packed in (False, True):  # by rows
            tile = {"PACKED": packed, "ROWS": kernels._CODED // BLOCK, "BLOCK": BLOCK, "NOISE": 8, "TINY": 1e-38}
            tile |= dict.fromkeys(("x_column", "code_column", "scale_column"), 1) | {"X": tl.float32}
            yield f"encode, packed {packed}", device.encode, tile | {"LAST": 254}
            yield f"decode, packed {packed}", device.decode, tile
        coded = elements | tile | {"SIGNED_LAST": 13, "UNSIGNED_LAST": 14, "ROUND": 8, "warps": kernels._CODED_WARPS}
        for counts in (False, True) if capability == 80 else (False,):
            yield f"coded_adam, counts {counts}", device.coded_adam, coded | {"COUNT": counts}
    lengths = kernels._LENGTH_BLOCKS
    tile = {"ROWS": lengths.rows, "COLUMNS": lengths.columns, "warps": lengths.warps, "stages": lengths.stages}
    yield "lengths", device.lengths, tile | {"W": tl.bfloat16, "G": tl.bfloat16, "rows": True}
    squares = kernels._SQUARE_BLOCKS
    tile = {"ROWS": squares.rows, "COLUMNS": squares.columns, "warps": squares.warps, "stages": squares.stages}
    yield "squares", device.squares, tile | {"G": tl.bfloat16}
    if capability not in SAME_CODE:
        yield "averages", device.averages, tile | {"BLOCK": kernels._BLOCK}
        yield "normalisers", device.normalisers, {"BLOCK": kernels._BLOCK, "rows": True}
        yield "clip", device.clip, {"BLOCK": kernels._BLOCK, "TRANSFORM": "cautious"}
    for dot, dtype in OPERANDS.items():
        types = dict.fromkeys(("W", "G", "Q", "IN", "OUT"), dtype) | {"DOT": dot, "NOISE": 8 if dot == "bf16" else 0}
        for name in ("fused", "project", "apply"):
            shape = kernels.blocks(name, dot, capability)
            tile = {"ROWS": shape.rows, "COLUMNS": shape.columns, "DEPTH": shape.depth, "SLICE": shape.slice}
            tile |= {"RANK": kernels.FUSED_RANK[dot], "warps": shape.warps, "stages": shape.stages}
            kernel = getattr(device, name)
            yield f"{name} {dot} right", kernel, types | tile | {"LEFT": False}
            if capability not in SAME_CODE:
                yield f"{name} {dot} left", kernel, types | tile | {"LEFT": True}
                if name != "project" and dot == "bf16" and capability <= 90:
                    yield f"{name} {dot} kahan", kernel, types | tile | {"LEFT": False, "NOISE": -1}
                rows = types | tile | dict.fromkeys(("IN", "OUT"), tl.float32) | {"ADAM": False, "rows": True}
                if name == "project":  # of GradNormLoRP, as what follows
                    rows |= {"KIND": "tangent", "stages": kernels._KIND_STAGES}
                if name != "fused":
                    yield f"{name} {dot} rows", kernel, rows | {"LEFT": name == "project" and dot == "bf16"}
                # of Flora
                momentum = types | tile | {"ADAM": False, "LEFT": dot == "bf16", "TRANSFORM": "cautious", "rows": True}
                if name == "project":
                    average = {"OUT": tl.float32, "KIND": "normalised", "AVERAGE": True, "stages": kernels._KIND_STAGES}
                    yield f"{name} {dot} average", kernel, momentum | average
                if name == "apply":
                    for measure in (False, True):
                        yield f"blend {dot}, measure {measure}", device.blend, momentum | {"MEASURE": measure}
                if name == "apply" and dot == "bf16":
                    yield f"{name} {dot} measure", kernel, rows | {"LEFT": False, "MEASURE": True}
                if name != "fused" and dot == "bf16" and capability <= 90:  # as of a 2048 × 5461 matrix
                    yield f"{name} {dot} left odd", kernel, types | tile | {"LEFT": True, "NOISE": 1, "aligned": False}


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_kernels_fit(capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for name, kernel, arguments in variants(capability):
        registers, spilled, shared, ptx = compiled(kernel, capability, tmp_path, **COMMON | arguments)
        what = f"{name} on sm_{capability} ({registers} registers)"
        assert registers <= REGISTERS, what
        assert spilled == 0, f"{what} spills {spilled} bytes"
        assert shared <= SHARED[capability], f"{what} needs {shared} of {SHARED[capability]} bytes of shared memory"
        assert name in NARROW or "odd" in name or WIDE_ACCESS.search(ptx), f"{what} makes no 16-byte access"
