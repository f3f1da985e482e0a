"""A step on a CPU beside torch's AdamW and the peers: time, refresh, state and peak bytes, and the machine's limit.

    python -m bench.run [--model 60m] [--dtype float32] [--arms galore grams] [--rounds 7] [--threads 1]

README.md beside this file says how it measures.
"""

import argparse
import platform
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from subspace_optim.pretrain.machine import peak_bytes

from . import limits
from .arms import BASELINE, MODELS, arms, built, ours, refresh
from .measures import RESULTS, Ceiling, ceilings, machine, medians, op_calls, reached, state_bytes, timed, written

GAPS = (200, 20)  # steps between refreshes: the papers', and what `pretrain` takes at its small sizes

# ---- what is stepped ------------------------------------------------------------------------------------------------


def parameters(model, dtype, once=False):
    """(projected, dense, rank); `once`: one of every shape, and a small vocabulary."""
    hidden, wide, layers, vocabulary, rank = MODELS[model]
    if once:
        layers, vocabulary = 1, 1000
    shapes = (
        [(hidden, hidden)] * (1 if once else 4) + [(wide, hidden)] * (1 if once else 2) + [(hidden, wide)]
    ) * layers
    norms = [(hidden,)] * (2 * layers + 1)
    rng = torch.Generator().manual_seed(0)

    def make(shape):
        p = torch.nn.Parameter((torch.randn(shape, generator=rng) * 0.02).to(dtype))
        p.grad = (torch.randn(shape, generator=rng) * 1e-3).to(dtype)
        return p

    return [make(s) for s in shapes], [make(s) for s in ((vocabulary, hidden), (vocabulary, hidden), *norms)], rank


# ---- parity ---------------------------------------------------------------------------------------------------------


def parity(arm, model, dtype):
    """Relative error of what three steps write, against the reference in float64 from the same state.

    Every step has another gradient: Adam on a constant one is the sign of it, which no rounding leaves alone near 0.
    """
    projected, dense, rank = parameters(model, dtype, once=True)
    optimizer = arm.make(projected, dense, rank, lr=0.1)
    optimizer.step()  # sets the bases
    exact = [[torch.nn.Parameter(p.detach().double()) for p in tensors] for tensors in (projected, dense)]
    twin = ours(arm.method, "reference", *exact, rank, lr=0.1)
    pairs = list(zip(projected + dense, exact[0] + exact[1], strict=True))
    for p, q in pairs:
        state = optimizer.state[p].items()
        twin.state[q] = {
            k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in state
        }
    rng = torch.Generator().manual_seed(1)
    for _ in range(3):
        for p, q in pairs:
            p.grad = (torch.randn(p.shape, generator=rng) * 1e-3).to(dtype)
            q.grad = p.grad.double()
        optimizer.step()
        twin.step()
    return max(float((p.detach().double() - q.detach()).norm() / q.detach().norm()) for p, q in pairs)


# A bfloat16 weight is off by the roundings of three steps, each of at most 2⁻⁸ and in the mean a third of that.
BOUNDS = {torch.float32: 5e-6, torch.bfloat16: 8e-3}

# ---- measures -------------------------------------------------------------------------------------------------------


def row(optimizer, step_ms, projected, clock):
    """What is measured of one arm alone."""
    logical, held = state_bytes(optimizer)
    found = {"state_bytes": logical, "held_bytes": held}
    found |= {"peak_bytes": peak_bytes(optimizer.step), "op_calls": op_calls(optimizer.step)}
    renew = refresh(optimizer, projected)
    if renew is not None:
        found["refresh_ms"] = medians({"": renew}, 3, clock)[""] - step_ms
        found["amortised_ms"] = {gap: step_ms + found["refresh_ms"] / gap for gap in GAPS}
    return found


def measure(chosen, errors, options):
    """All numbers of the record."""
    clock = time.process_time if options.threads == 1 else time.perf_counter
    dtype = getattr(torch, options.dtype)
    projected, dense, rank = setting = parameters(options.model, dtype)
    shapes = [[p.shape for p in tensors] for tensors in (projected, dense)]
    optimizers = dict(built(chosen, setting))
    least = {n: limits.work(chosen[n].method, *shapes, rank, dtype.itemsize, chosen[n].bits) for n in optimizers}
    # The baseline is a stream, too: what it reaches, the machine can.
    able = ceilings(*setting) | {BASELINE: Ceiling("bytes", least[BASELINE].bytes, optimizers[BASELINE].step)}
    taken = timed({name: each.step for name, each in (optimizers | able).items()}, options.rounds, clock)
    median = {name: statistics.median(times) for name, times in taken.items()}
    best, rates = reached(able, median)
    rows = {}
    for name, optimizer in optimizers.items():
        parts = best.milliseconds(least[name])
        rows[name] = {"step_ms": median[name], "ratio": median[name] / median[BASELINE], "times_ms": taken[name]}
        rows[name] |= parts | {"of_limit": median[name] / sum(parts.values())}
        rows[name] |= row(optimizer, median[name], projected, clock)
        if name in errors:
            rows[name]["parity"] = errors[name]
    gap = {}
    if options.gap and "galore" in optimizers:
        del optimizers, optimizer, able
        optimizer = ours("galore", "auto", *setting, gap=options.gap)
        steps = sorted(timed({"": optimizer.step}, options.gap, clock)[""])
        gap = {"steps": options.gap, "p50_ms": steps[len(steps) // 2], "p99_ms": steps[int(len(steps) * 0.99)]}
    return {"rank": rank, "arms": rows, "limit": best._asdict() | {"measured": rates}, "gap": gap}


# ---- the report -----------------------------------------------------------------------------------------------------


COLUMNS = {
    "step ms": lambda row: f"{row['step_ms']:.1f}",
    "× fused": lambda row: f"{row['ratio']:.2f}",
    "× limit": lambda row: f"{row['of_limit']:.2f}",
    "refresh ms": lambda row: f"{row['refresh_ms']:.0f}",
    **{f"gap {gap} ms": lambda row, gap=gap: f"{row['amortised_ms'][gap]:.1f}" for gap in GAPS},
    "op calls": lambda row: str(row["op_calls"]),
    **{f"{what} MiB": lambda row, key=f"{what}_bytes": f"{row[key] / 2**20:.2f}" for what in ("state", "held", "peak")},
    "parity": lambda row: f"{row['parity']:.0e}",
}


def report(record):
    """The table, fastest first."""
    options, limit, gap = record["options"], record["limit"], record["gap"]
    print(f"\n{options['model']}, {options['dtype']}, rank {record['rank']}, {options['threads']} thread(s)")
    print(record["machine"]["cpu"], record["machine"]["backends"])
    print(f"{'':32}" + "".join(f"{head:>12}" for head in COLUMNS))

    def cell(column, row):
        try:
            return column(row)
        except KeyError:  # not measured: it has no refresh, or no parity
            return ""

    for name, row in sorted(record["arms"].items(), key=lambda item: item[1]["ratio"]):
        print(f"{name:32}" + "".join(f"{cell(column, row):>12}" for column in COLUMNS.values()))
    measured = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in limit["measured"].items())
    print(f"limit: {limit['bandwidth'] / 1e9:.1f} GB/s and {limit['rate'] / 1e9:.0f} GFLOP/s, the best of: {measured}")
    if gap:
        print(f"galore over a gap of {gap['steps']} steps: p50 {gap['p50_ms']:.0f} ms, p99 {gap['p99_ms']:.0f} ms")


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="60m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--arms", nargs="*", default=[""], help="only arms whose name contains one of these, and the baseline"
    )
    parser.add_argument("--backends", nargs="*", default=["auto", "compiled", "reference"], help="of ours")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="1 measures CPU time; more measure the wall clock")
    parser.add_argument("--gap", type=int, default=200, help="steps of the p50/p99 run of galore; 0 leaves it out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    known = arms(options.backends)
    chosen = {name: known[name] for name in known if name == BASELINE or any(part in name for part in options.arms)}
    errors = {name: parity(arm, options.model, dtype) for name, arm in chosen.items() if arm.checked}
    bounds = {name: known[name].bound or BOUNDS[dtype] for name in errors}
    failed = {name: error for name, error in errors.items() if not error < bounds[name]}
    for name, error in failed.items():
        print(f"{name}: parity fails ({error:.1e}, bound {bounds[name]:.0e}); it is not timed")
        del chosen[name]

    said = {key: value for key, value in vars(options).items() if key != "out"}
    record = {"options": said, "machine": machine(), "parity_failed": failed}
    record |= measure(chosen, errors, options)
    report(record)
    path = written(options.out, record, platform.machine(), options.model, options.dtype)
    if find_spec("matplotlib") is None:
        print("no figure: matplotlib is not installed (pip install 'subspace-optim[cli]')")
    else:
        from .figure import draw

        print(draw(record, path.with_suffix(".svg")))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
