"""A step on a CPU beside torch's AdamW and the peers: time, refresh, state and peak bytes, and the machine's limit.

    python -m bench.run [--model 60m] [--dtype float32] [--arms galore grams] [--rounds 7] [--threads 1]

README.md beside this file says how it measures.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import distributions
from itertools import product
from pathlib import Path

import torch

import subspace_optim as so
from subspace_optim.pretrain.machine import peak_bytes

MODELS = {  # hidden, intermediate, layers, vocabulary, rank: LLaMA as GaLore has it
    "tiny": (64, 176, 2, 512, 16),
    "60m": (512, 1376, 8, 32000, 128),
    "130m": (768, 2048, 12, 32000, 256),
    "1b": (2048, 5461, 24, 32000, 512),
}
LR = 1e-4
NEVER = 10**9  # a gap that no run reaches
BASELINE = "torch AdamW fused"
PACKAGES = ("torch", "galore-torch", "apollo-torch", "pytorch_optimizer", "bitsandbytes")


@dataclass(frozen=True)
class Arm:
    """`make(projected, dense, rank)` builds the optimizer; ours have a `method` and are checked against float64."""

    make: Callable[..., torch.optim.Optimizer]
    method: str = ""


# ---- who takes part -------------------------------------------------------------------------------------------------


def ours(method, backend, projected, dense, rank, lr=LR, gap=NEVER, **options):
    groups = [{"params": projected, "rank": rank, "update_proj_gap": gap}, {"params": dense}]
    if method in ("adamw", "grams"):
        groups = projected + dense
    cls = {"adamw": so.SubspaceOptimizer, **so.OPTIMIZERS}[method]
    return cls(groups, lr=lr, backend=backend, **options)


def torch_adamw(projected, dense, rank, **how):
    return torch.optim.AdamW(projected + dense, lr=LR, **how)


def galore_torch(projected, dense, rank):
    from galore_torch import GaLoreAdamW

    group = {"params": projected, "rank": rank, "update_proj_gap": NEVER, "scale": 0.25, "proj_type": "std"}
    return GaLoreAdamW([{"params": dense}, group], lr=LR, no_deprecation_warning=True)


def apollo_torch(projected, dense, rank):
    from apollo_torch import APOLLOAdamW

    group = {"params": projected, "rank": rank, "update_proj_gap": NEVER, "scale": 1, "proj_type": "std"}
    group |= {"proj": "random", "scale_type": "channel"}
    return APOLLOAdamW([{"params": dense}, group], lr=LR, no_deprecation_warning=True)


def pytorch_optimizer(name, projected, dense, rank):
    import pytorch_optimizer as peer

    group = {"params": projected, "rank": rank, "update_proj_gap": NEVER, "scale": 0.25, "projection_type": "std"}
    groups = [{"params": dense}, group] if name == "GaLore" else projected + dense
    return getattr(peer, name)(groups, lr=LR)


METHODS = ("adamw", "grams", "galore", "osd", "flora", "gradnormlorp")


def arms(backends):
    known = {
        BASELINE: Arm(partial(torch_adamw, fused=True)),
        "torch AdamW foreach": Arm(partial(torch_adamw, foreach=True)),
    }
    for backend in backends:
        tag = "" if backend == "auto" else f" ({backend})"
        known |= {f"{method}{tag}": Arm(partial(ours, method, backend), method) for method in METHODS}
    for method, bits in product(("adamw", "galore"), (8, 4)):  # codes are not float64's numbers: without its parity
        known[f"{method} {bits}-bit"] = Arm(partial(ours, method, "auto", state_bits=bits))
    known |= {"peer galore-torch": Arm(galore_torch), "peer apollo-torch": Arm(apollo_torch)}
    return known | {
        f"peer pytorch_optimizer {name}": Arm(partial(pytorch_optimizer, name)) for name in ("GaLore", "Grams")
    }


# ---- what they step -------------------------------------------------------------------------------------------------


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


def timed(steps, rounds, clock):
    """Milliseconds of every round of every arm; the arms take turns."""
    for step in steps.values():
        step()
    taken = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = clock()
            step()
            taken[name].append((clock() - start) * 1e3)
    return taken


def state_bytes(optimizer):
    """(sum over tensors, sum over the storages that are kept alive)."""

    def tensors(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            for v in value.values():
                yield from tensors(v)
        elif hasattr(value, "__dict__") and not isinstance(value, type):
            yield from tensors(vars(value))

    found = [t for state in optimizer.state.values() for t in tensors(dict(state))]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
    return sum(t.nbytes for t in found), sum(held.values())


def refresh(optimizer, projected):
    """One step in which every basis is renewed."""
    for p in projected:
        optimizer.state[p]["age"] = NEVER
    optimizer.step()


def products(projected, rank, rounds, clock):
    """What no step does without, in float32 by torch's BLAS: milliseconds by method, and the rates this machine has."""

    def step():
        for g, q, low, _ in work:
            torch.mm(g, q, out=low)
            g.addmm_(low, q.mT)

    def basis():  # that of Online Subspace Descent learns from GᵀGQ
        for g, q, low, both in work:
            torch.mm(g.mT, low, out=both[:, rank:])
            torch.mm(both, (q.mT @ both).view(2 * rank, rank), out=q)

    def square():
        torch.mm(side, side, out=result)

    work = []
    for p in projected:
        (m, n), g = p.shape, p.detach().float().clone()
        d, low = min(m, n), torch.zeros((m, rank) if m >= n else (rank, n))
        turned = (g, low) if m >= n else (g.mT, low.mT)  # (k, d) and (k, r), of either side
        work.append((turned[0], torch.zeros(d, rank), turned[1], torch.zeros(d, 2 * rank)))
    side, result = torch.zeros(1024, 1024), torch.empty(1024, 1024)
    times = timed({"step": step, "basis": basis, "square": square}, rounds, clock)
    taken = {name: statistics.median(own) for name, own in times.items()}
    flops = {
        "products": 4 * rank * sum(p.numel() for p in projected) / taken["step"],
        "square": 2**31 / taken["square"],
    }
    alone = dict.fromkeys(METHODS, taken["step"]) | {"osd": taken["step"] + taken["basis"], "adamw": 0.0, "grams": 0.0}
    return alone, {name: rate / 1e6 for name, rate in flops.items()}


def built(chosen, setting):
    """The optimizers of the arms that are installed here."""
    for name, arm in chosen.items():
        try:
            yield name, arm.make(*setting)
        except (ImportError, TypeError, ValueError) as error:  # noqa: PERF203
            print(f"{name}: left out ({type(error).__name__}: {str(error).splitlines()[0]})")


def measure(chosen, errors, options):
    """All numbers of the record."""
    clock = time.process_time if options.threads == 1 else time.perf_counter
    projected, dense, rank = setting = parameters(options.model, getattr(torch, options.dtype))
    optimizers = dict(built(chosen, setting))
    taken = timed({name: optimizer.step for name, optimizer in optimizers.items()}, options.rounds, clock)
    median = {name: statistics.median(times) for name, times in taken.items()}
    rows = {}
    for name, optimizer in optimizers.items():
        logical, held = state_bytes(optimizer)
        rows[name] = {"step_ms": median[name], "ratio": median[name] / median[BASELINE], "times_ms": taken[name]}
        rows[name] |= {"state_bytes": logical, "held_bytes": held, "peak_bytes": peak_bytes(optimizer.step)}
        if name in errors:
            rows[name]["parity"] = errors[name]
        if (
            name in errors
            and getattr(optimizer.projector, "periodic", False)
            and "basis" in optimizer.state[projected[0]]
        ):
            again = timed({"": partial(refresh, optimizer, projected)}, 3, clock)[""]
            rows[name]["refresh_ms"] = statistics.median(again) - median[name]
    alone, rates = products(projected, rank, options.rounds, clock)
    share = sum(p.numel() for p in dense) / sum(p.numel() for p in projected + dense)
    for name in rows.keys() & errors.keys():  # the dense tensors at the speed of fused AdamW
        method = chosen[name].method
        limit = alone[method] / median[BASELINE] + (share if alone[method] else 1.0)
        rows[name] |= {"limit_ratio": limit, "of_limit": rows[name]["ratio"] / limit}
    limit = {"products_ms": alone["galore"], "gflops": rates}
    gap = {}
    if options.gap and "galore" in optimizers:
        del optimizers, optimizer
        optimizer = ours("galore", "auto", *setting, gap=options.gap)
        steps = sorted(timed({"": optimizer.step}, options.gap, clock)[""])
        gap = {"steps": options.gap, "p50_ms": steps[len(steps) // 2], "p99_ms": steps[int(len(steps) * 0.99)]}
    return {"rank": rank, "arms": rows, "limit": limit, "gap": gap}


# ---- the report -----------------------------------------------------------------------------------------------------


def machine():
    def git(*command):
        return subprocess.run(
            ["git", *command], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
        ).stdout

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    return {
        "commit": git("rev-parse", "--short", "HEAD").strip(),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no", "--", "..").strip()),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu or platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "backends": so.backends(),
        "python": platform.python_version(),
        "versions": {d.name: d.version for d in distributions() if d.name in PACKAGES},
    }


def report(record):
    """The table, fastest first."""
    options, limit, gap = record["options"], record["limit"], record["gap"]
    print(f"\n{options['model']}, {options['dtype']}, rank {record['rank']}, {options['threads']} thread(s)")
    print(record["machine"]["cpu"], record["machine"]["backends"])
    heads = ("step ms", "× fused", "× limit", "refresh ms", "state MiB", "held MiB", "peak MiB", "parity")
    print(f"{'':34}" + "".join(f"{head:>12}" for head in heads))
    for name, row in sorted(record["arms"].items(), key=lambda item: item[1]["ratio"]):
        cells = [
            f"{row['step_ms']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['of_limit']:.2f}" if "of_limit" in row else "",
            f"{row['refresh_ms']:.0f}" if "refresh_ms" in row else "",
        ]
        cells += [f"{row[key] / 2**20:.2f}" for key in ("state_bytes", "held_bytes", "peak_bytes")]
        cells.append(f"{row['parity']:.0e}" if "parity" in row else "")
        print(f"{name:34}" + "".join(f"{cell:>12}" for cell in cells))
    print(
        f"exact float32 products of a projected step: {limit['products_ms']:.0f} ms alone, at "
        f"{limit['gflops']['products']:.0f} GFLOP/s, where a product of 1024² matrices runs at "
        f"{limit['gflops']['square']:.0f}"
    )
    if gap:
        print(f"galore over a gap of {gap['steps']} steps: p50 {gap['p50_ms']:.0f} ms, p99 {gap['p99_ms']:.0f} ms")


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="60m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--arms", nargs="*", default=[""], help="only arms whose name contains one of these, and the baseline"
    )
    parser.add_argument("--backends", nargs="*", default=["auto"], help="of ours: auto, native, reference …")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="1 measures CPU time; more measure the wall clock")
    parser.add_argument("--gap", type=int, default=200, help="steps of the p50/p99 run of galore; 0 leaves it out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    known = arms(options.backends)
    chosen = {name: known[name] for name in known if name == BASELINE or any(part in name for part in options.arms)}
    errors = {name: parity(arm, options.model, dtype) for name, arm in chosen.items() if arm.method}
    failed = {name: error for name, error in errors.items() if not error < BOUNDS[dtype]}
    for name, error in failed.items():
        print(f"{name}: parity fails ({error:.1e}, bound {BOUNDS[dtype]:.0e}); it is not timed")
        del chosen[name]

    said = {key: value for key, value in vars(options).items() if key != "out"}
    record = {"options": said, "machine": machine(), "parity_failed": failed}
    record |= measure(chosen, errors, options)
    report(record)
    about = record["machine"]
    name = f"{about['time'][:10]}-{about['commit']}-{platform.machine()}-{options.model}-{options.dtype}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / name).write_text(json.dumps(record, indent=1) + "\n")
    print(options.out / name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
