"""A step on a GPU beside torch's AdamW: time, launches, and the distance to what bandwidth and arithmetic allow.

Run `bench/gpu.sh`, or this alone: `python -m bench.gpu [--sizes 60m 1b] [--rounds 20]`. Arms take turns (A B A B) and
are timed by CUDA events; what is printed is medians, and ratios within the run. Nothing is timed before parity with
the reference holds.
"""

import argparse
import math
import statistics
import sys
from functools import partial
from importlib import import_module

import torch

import subspace_optim as so
from subspace_optim.kernels import reference, select
from subspace_optim.types import Hyper, Moments, Weights

from . import limits
from .arms import LR, MODELS, NEVER, built, peers
from .measures import RESULTS, kept, machine, why_not

GPU = torch.device("cuda")
RANKS = {"60m": (128, 256), "1b": (256, 512, 1024)}
FUSED = "torch fused, bf16 state"
PEERS_AT = "60m"  # beyond it the first refresh alone takes them minutes


def shapes(size):
    """The projected matrices: q, k, v, o, gate, up, down of every layer."""
    hidden, wide, layers, *_ = MODELS[size]
    return ([(hidden, hidden)] * 4 + [(wide, hidden)] * 2 + [(hidden, wide)]) * layers


def parity(backend):
    """Error of one step against the reference with the same bases, by dtype and rank, and whether all are small."""
    kernels, errors, holds = import_module(f"subspace_optim.kernels.{backend}"), {}, True
    for dtype, bound in ((torch.float32, 5e-6), (torch.bfloat16, 1e-2)):
        for rank in (128, 256, 300):
            ends = []
            for kernel in (kernels, reference):
                torch.manual_seed(0)
                lists = [[torch.randn(s, device=GPU).to(dtype)] for s in ((1024, 704), (1024, 704))]
                lists[0][0].mul_(0.01)
                # Some steps into a run: in the first one N is ±1, where a tiny R may have the other sign.
                lists += [[torch.randn(1024, rank, device=GPU) * 0.1], [torch.rand(1024, rank, device=GPU) + 0.1]]
                lists += [[torch.linalg.qr(torch.randn(704, rank, device=GPU))[0].contiguous()]]
                lists += [[torch.zeros((), device=GPU)]]
                params, grads, means, squares, bases, steps = lists
                hyper = Hyper(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
                kernel.projected_adam_(Weights(params, steps), grads, Moments(means, squares), bases, hyper, "right")
                ends.append([lists[i][0].double() for i in (0, 2, 3)])
            error = max((torch.dist(a, b) / b.norm()).item() for a, b in zip(*ends, strict=True))
            errors[f"{backend} {dtype} rank {rank}"] = error
            if not error < bound:
                holds = False
                print(f"parity fails: {backend}, {dtype}, rank {rank}: {error:.1e} is not below {bound:.0e}; not timed")
    return errors, holds


def attempted_parity(backend):
    """An error of one backend costs the other nothing."""
    try:
        return parity(backend)
    except Exception as error:
        print(f"parity fails: {backend}: {why_not(error)}; not timed")
        return {backend: why_not(error)}, False


def ceilings():
    """Of a device copy, and of a matrix product in bfloat16."""
    source = torch.randn(2**28, device=GPU)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=GPU).bfloat16() for _ in range(2))
    copy = timed({"copy": lambda: target.copy_(source)}, 20)["copy"]
    product = timed({"product": lambda: a @ b}, 20)["product"]
    return limits.Machine(2 * source.nbytes / copy * 1e3, 2 * 8192**3 / product * 1e3)


def timed(arms, rounds):
    """Median milliseconds of each arm; the arms take turns."""
    for step in arms.values():
        for _ in range(3):
            step()
    events = {name: [] for name in arms}
    for _ in range(rounds):
        for name, step in arms.items():
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            torch.cuda.synchronize()
            pair[0].record()
            step()
            pair[1].record()
            events[name].append(pair)
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}


def launches(step):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    there = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.is_user_annotation for event in there)  # torch marks a step of an optimizer there, too


def bare(optimizer):
    """The kernels of a step alone, as a CUDA graph: without the engine's look at the gradients."""
    calls = []
    for work in optimizer._collect():
        bucket = work.bucket
        bases = [basis for (basis,) in optimizer.projector.bases(bucket.plan, bucket.states)]
        hyper = Hyper(torch.tensor(LR, device=GPU), (0.9, 0.999), 1e-8, scale=work.group["scale"])
        arguments = (bucket.weights, bucket.grads, bucket.adam, bases, hyper, bucket.plan.side)
        calls.append((work.kernel.projected_adam_, arguments))

    @torch.no_grad()
    def step():
        for projected_adam_, arguments in calls:
            projected_adam_(*arguments)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def captured(optimizer):
    """A whole ordinary step as a CUDA graph: the engine's look at the gradients is in it."""
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph.replay


def begun(optimizer):
    """One step into its run: an ordinary step is next."""
    optimizer.step()
    return optimizer


def arms(size, params, backends):
    """Every arm by name: what makes a call that takes one step, its method and rank, and the bits of its moments."""

    def torchs(**how):
        return lambda: torch.optim.AdamW(params, lr=LR, **how).step

    yield FUSED, torchs(fused=True), "adamw", 0, None
    yield "torch foreach, bf16 state", torchs(foreach=True), "adamw", 0, None
    for backend in backends:
        dense = partial(so.SubspaceOptimizer, params, lr=LR, backend=backend)
        yield f"ours dense, fp32 state, {backend}", lambda make=dense: make().step, "adamw", 0, 32
    for rank in RANKS[size]:
        projector = so.RandomProjection(rank, update_proj_gap=NEVER)  # an ordinary step: never a refresh but the first
        for backend in (*backends, "reference"):
            make, what = (
                partial(so.SubspaceOptimizer, params, projector, lr=LR, backend=backend),
                f"rank {rank} {backend}",
            )
            yield what, lambda make=make: begun(make()).step, "galore", rank, 32
            if backend != "reference":
                yield f"{what}, graph of its kernels", lambda make=make: bare(begun(make())), "galore", rank, 32
    rank, backend = RANKS[size][0], backends[0]
    common, what = {"lr": LR, "backend": backend}, f"rank {rank} {backend}"
    rows = partial(so.GradNormLoRP, params, rank=rank, update_proj_gap=NEVER, stagger=False, **common)
    yield f"{what}, GradNormLoRP", lambda: begun(rows()).step, "gradnormlorp", rank, 32
    learns = partial(so.OnlineSubspaceDescent, params, rank=rank, **common)
    yield f"{what}, OnlineSubspaceDescent", lambda: begun(learns()).step, "osd", rank, 32
    yield f"{what}, OnlineSubspaceDescent, graph of a step", lambda: captured(begun(learns())), "osd", rank, 32
    for bits in (32, 8):  # with kept bases, as GaLore has them
        svd = so.SVD(rank, update_proj_gap=NEVER)
        make = partial(so.SubspaceOptimizer, params, svd, state_bits=bits, stagger=False, **common)
        yield f"{what}, SVD, {bits} bits", lambda make=make: begun(make()).step, "galore", rank, bits
        yield (
            f"{what}, SVD, {bits} bits, graph of a step",
            lambda make=make: captured(begun(make())),
            "galore",
            rank,
            bits,
        )
    if size == PEERS_AT:
        others = peers()
        for name, opt in built(others, (params, [], rank)):
            yield name, lambda opt=opt: opt.step, others[name].method, rank, others[name].bits


def measure(size, backends, rounds, able):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, device=GPU).mul_(0.02).bfloat16()) for s in shapes(size)]
    for param in params:
        param.grad = torch.randn(param.shape, device=GPU).mul_(1e-3).bfloat16()
    steps, counted, rows = {}, {}, []
    for name, make, method, rank, bits in arms(size, params, backends):
        try:
            steps[name] = make()
        except Exception as error:  # what works is timed all the same
            rows.append({"size": size, "arm": name, "failed": why_not(error)})
            continue
        counted[name] = limits.work(method, shapes(size), [], rank, 2, bits)
    medians = timed(steps, rounds)
    for name, median in medians.items():
        row = {"size": size, "arm": name, "ms": median, "launches": launches(steps[name])}
        row["to_fused"] = median / medians[FUSED]
        row["to_dense_fp32"] = median / medians.get(f"ours dense, fp32 state, {backends[0]}", math.nan)
        row |= able.milliseconds(counted[name])
        row["to_limit"] = median / max(row["bytes_ms"], row["flops_ms"])
        rows.append(row)
    return rows


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=list(RANKS), choices=RANKS)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    reasons = {name: select.IMPLS[name](None) for name in ("cuda", "triton")}
    checked = {name: attempted_parity(name) for name, why in reasons.items() if why is None}
    backends = [name for name, (_, holds) in checked.items() if holds]
    for name, why in reasons.items():
        print(f"{name}: {why or ('parity holds' if name in backends else 'parity fails')}")
    if not backends:
        sys.exit("no backend to time")
    able = ceilings()
    print(f"copy {able.bandwidth / 1e12:.2f} TB/s, bf16 product {able.rate / 1e12:.0f} TFLOP/s")
    rows, gpu = [], torch.cuda.get_device_name()
    record = {
        "machine": machine() | {"gpu": gpu},
        "limit": able._asdict(),
        "parity": {what: error for errors, _ in checked.values() for what, error in errors.items()},
        "rows": rows,
    }
    with kept(RESULTS, record, gpu):
        print(f"{'size':5}{'arm':44}{'ms':>9}{'/fused':>8}{'/dense':>8}{'/limit':>8}{'launches':>9}")
        for size in options.sizes:
            for row in measure(size, backends, options.rounds, able):
                rows.append(row)
                print(line_of(row))
    if len(backends) < len(checked) or any("failed" in row for row in rows):
        sys.exit(1)


def line_of(row):
    """A row of the table."""
    begin = f"{row['size']:5}{row['arm']:44}"
    if "failed" in row:
        return f"{begin} {row['failed']}"
    ratios = "".join(f"{row[key]:8.2f}" for key in ("to_fused", "to_dense_fp32", "to_limit"))
    return f"{begin}{row['ms']:9.3f}{ratios}{row['launches']:9}"


if __name__ == "__main__":
    main()
