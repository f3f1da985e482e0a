"""What is measured, and what of the machine goes into a record."""

import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import subspace_optim as so

from .arms import PACKAGES
from .limits import Machine

STREAM = 30_000_000  # elements at most: more than a cache holds; of a power of two all streams share its sets


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


def medians(steps, rounds, clock):
    return {name: statistics.median(taken) for name, taken in timed(steps, rounds, clock).items()}


def state_bytes(optimizer):
    """(sum over tensors, sum over the storages that are kept alive)."""

    def tensors(value):
        if isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value):
            for name in value.__tensor_flatten__()[0]:
                yield from tensors(getattr(value, name))
        elif isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            for v in value.values():
                yield from tensors(v)
        elif hasattr(value, "__dict__") and not isinstance(value, type):
            yield from tensors(vars(value))

    found = [t for state in optimizer.state.values() for t in tensors(dict(state))]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
    return sum(t.nbytes for t in found), sum(held.values())


def op_calls(step):
    """How many ops Python calls in a step, and graphs that torch compiled; what these call in turn does not count."""

    def is_op(event):
        return "::" in event.name or event.name.startswith("## Call CompiledFxGraph")

    def is_within(event):
        parent = event.cpu_parent
        return parent is not None and (is_op(parent) or is_within(parent))

    with profile(activities=[ProfilerActivity.CPU]) as record:
        step()
    return sum(is_op(event) and not is_within(event) for event in record.events())


class Ceiling(NamedTuple):
    """A piece of work that nothing does faster: how many of what, and the call that does it."""

    unit: str
    amount: float
    step: Callable[[], object]


def ceilings(projected, dense, rank):
    """Streams over memory and products in float32 by torch's BLAS, that take their turns with the arms."""
    count = min(STREAM, sum(p.numel() for p in projected + dense))
    weight = torch.nn.Parameter(torch.ones(count))
    weight.grad = torch.ones(count)
    adamw = torch.optim.AdamW([weight], fused=True)
    adamw.step()
    state = adamw.state[weight]
    left, right, out = torch.zeros(1024, 1024), torch.zeros(1024, 1024), torch.empty(1024, 1024)
    work = []
    for p in projected:
        g = p.detach().float().clone()
        g = g if len(g) >= g.shape[1] else g.mT
        work.append((g, torch.zeros(g.shape[1], rank), torch.zeros(len(g), rank)))

    def products():
        for g, q, low in work:
            torch.mm(g, q, out=low)
            g.addmm_(low, q.mT)

    return {
        "seven streams": Ceiling("bytes", 28 * count, adamw.step),
        "four streams": Ceiling(
            "bytes", 16 * count, lambda: weight.detach().addcmul_(state["exp_avg"], state["exp_avg_sq"])
        ),
        "products with G": Ceiling("flops", 4 * rank * sum(p.numel() for p in projected), products),
        "square product": Ceiling("flops", 2 * 1024**3, lambda: torch.mm(left, right, out=out)),
    }


def reached(able, median):
    """(the machine at its best, what it did a second by each ceiling)."""
    rates = {name: ceiling.amount / median[name] * 1e3 for name, ceiling in able.items()}

    def best(unit):
        return max(rate for name, rate in rates.items() if able[name].unit == unit)

    return Machine(best("bytes"), best("flops")), rates


RESULTS = Path(os.environ.get("OUT") or Path(__file__).parent / "results")


def written(folder, record, *names):
    """Write a record, named by day, commit and these names, and say where."""
    about = record["machine"]
    folder.mkdir(parents=True, exist_ok=True)
    words = (about["time"][:10], about["commit"], *names)
    path = folder / ("-".join(words).replace(" ", "-") + ".json")
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)
    return path


@contextmanager
def kept(folder, record, *names):
    """Write the record at the end, whatever ends it: an error, or a timeout's SIGTERM, leaves what there is by then."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        written(folder, record, *names)


def why_not(error):
    """An exception in a line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"


def machine():
    """What a record says of where it comes from; $COMMIT names the commit of a tree that was copied without git."""

    def git(*command):
        if shutil.which("git") is None:
            return ""
        return subprocess.run(
            ["git", *command], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
        ).stdout

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    commit = git("rev-parse", "--short", "HEAD").strip()
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "..").strip()
    return {
        "commit": commit or os.environ.get("COMMIT") or "unknown",
        "dirty": bool(changed) if commit else None,  # None: nobody knows
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu or platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "backends": so.backends(),
        "python": platform.python_version(),
        "versions": {d.name: d.version for d in distributions() if d.name in PACKAGES},
    }
