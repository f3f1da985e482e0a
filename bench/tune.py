"""Which block shapes of the Triton kernels are fastest on this GPU, beginning with those in use.

    python -m bench.tune [--kernels fused project apply] [--seconds 300]

One field of a shape at a time moves to a neighbouring choice for as long as that helps. A shape that does not compile,
or whose result is not that of the shape in use, is written down with the reason and not taken. Nothing is changed: put
what wins into `BLOCKS` of kernels/triton.py, where tests/test_triton_aot.py holds it to the gate on spills.
"""

import argparse
import math
import sys
import time

import torch

from subspace_optim.kernels import select
from subspace_optim.types import Hyper, Moments, Weights

from .gpu import GPU, shapes, timed
from .measures import RESULTS, kept, machine, why_not

CHOICES = {
    "rows": (16, 32, 64, 128, 256),
    "columns": (32, 64, 128, 256),
    "depth": (16, 32, 64, 128),
    "slice": (8, 16, 32, 64),
    "warps": (4, 8, 16),
    "stages": (1, 2, 3, 4, 5),
}
RANKS = {("fused", True): 256, ("fused", False): 128, ("project", True): 512, ("project", False): 256}
RANKS |= {("apply", half): RANKS["project", half] for half in (True, False)}
BOUNDS = {True: 1e-2, False: 1e-5}  # ‖difference‖ of two results over ‖either‖: sums in another order
ROUNDS = 10


def neighbours(shape):
    """The shapes that differ in one field by one place in its list of choices; a field that is 0 is not used."""
    for field, choices in CHOICES.items():
        value = getattr(shape, field)
        if value in choices:
            at = choices.index(value)
            for other in choices[max(0, at - 1) : at] + choices[at + 1 : at + 2]:
                yield shape._replace(**{field: other})


def descended(start, measure, until):
    """The fastest shape, and (milliseconds or why not) of every one that was tried until this time."""
    tried = {start: measure(start)}
    best = start
    moved = True
    while moved:
        moved = False
        for shape in neighbours(best):
            if shape in tried:
                continue
            if time.monotonic() > until:
                return best, tried
            tried[shape] = measure(shape)
            if isinstance(tried[shape], float) and tried[shape] < tried[best]:
                best, moved = shape, True
                break
    return best, tried


def problem(kernels, name, half):
    """A call of one kernel on the matrices of one layer of a 1B model, and what it writes."""
    dtype, rank = (torch.bfloat16, RANKS[name, half]) if half else (torch.float32, RANKS[name, half])
    torch.manual_seed(0)
    (m, n) = max(shapes("1b"), key=math.prod)
    params, grads = ([torch.randn(m, n, device=GPU).to(dtype) for _ in range(8)] for _ in range(2))
    bases = [torch.linalg.qr(torch.randn(n, rank, device=GPU))[0].contiguous() for _ in params]
    lows = [torch.randn(m, rank, device=GPU) for _ in params]
    squares = [torch.rand(m, rank, device=GPU) + 0.1 for _ in params]
    steps = [torch.ones((), device=GPU) for _ in params]
    weights, hyper = Weights(params, steps), Hyper(torch.tensor(1e-2, dtype=torch.float64), (0.9, 0.999), 1e-8)

    def call():
        if name == "project":
            return kernels.project(grads, bases, "right", torch.float32)
        if name == "apply":
            kernels.apply_(weights, lows, bases, hyper, "right")
        else:
            kernels.projected_adam_(weights, grads, Moments(lows, squares), bases, hyper, "right")
        return params

    kept = [[t.clone() for t in tensors] for tensors in (params, lows, squares, steps)]

    def result():
        """Of one call on what there was at first."""
        for tensors, before in zip((params, lows, squares, steps), kept, strict=True):
            torch._foreach_copy_(tensors, before)
        moved = [out.double() for out in call()]
        if name != "project":
            moved = [out - before.double() for out, before in zip(moved, kept[0], strict=True)]
        return torch.stack(moved)

    return call, result


def tuned(kernels, key, until):
    """The fastest shape of a kernel, and all that was tried."""
    name, half, _ = key
    start = kernels.BLOCKS[key]
    try:
        call, result = problem(kernels, name, half)
        expected = result()
    except Exception as error:  # the next kernel may do better
        return start, {start: why_not(error)}

    def measure(shape):
        kernels.BLOCKS[key] = shape
        try:
            error = (torch.dist(result(), expected) / expected.norm()).item()
            if not error < BOUNDS[half]:
                return f"differs by {error:.1e}"
            return timed({"call": call}, ROUNDS)["call"]
        except Exception as refused:  # the compiler's, or the driver's: one shape less
            return why_not(refused)
        finally:
            kernels.BLOCKS[key] = start

    return descended(start, measure, until)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--kernels", nargs="+", default=["fused", "project", "apply"])
    parser.add_argument("--seconds", type=float, default=300, help="for all of them together")
    options = parser.parse_args(arguments)
    why = select.IMPLS["triton"](None)
    if why is not None:
        sys.exit(f"triton: {why}")
    from subspace_optim.kernels import triton as kernels

    capability = kernels._capability(GPU)
    keys = [kernels.block_key(name, dot, capability) for dot in ("bf16", "tf32x3") for name in options.kernels]
    begin, record, gpu = time.monotonic(), {}, torch.cuda.get_device_name()
    with kept(RESULTS, {"machine": machine() | {"gpu": gpu}, "tried": record}, gpu, "tune"):
        for i, key in enumerate(keys, 1):
            best, tried = tuned(kernels, key, begin + options.seconds * i / len(keys))
            start = next(iter(tried))
            print(f"{key}, {len(tried)} tried: {tried[start]} ms {start}")
            print(f"    fastest: {tried[best]} ms {best}")
            record[str(key)] = [[shape._asdict(), took] for shape, took in tried.items()]


if __name__ == "__main__":
    main()
