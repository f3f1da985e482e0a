"""The planned peak of a training step beside the measured one.

Exits with 1 where they part by more than 5 %, or a loss is not finite.

    python -m bench.plan [--device cpu] [--sizes 60m 130m] [--batch 1] [--seq 64]
    python -m bench.plan --device cuda --sizes 7b --fit 24GB     under a hard cap of the allocator, 20 steps

On a CPU the peak is that of torch's allocator events, on a GPU `max_memory_allocated`.
"""

import argparse
import gc
import math
import platform
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import subspace_optim as so
from subspace_optim.planner import bytes_of, causal_loss, enable_checkpointing
from subspace_optim.pretrain.machine import peak_bytes, storage_bytes
from subspace_optim.sizes import SIZES, llama_options

from .measures import RESULTS, kept, machine, why_not

BOUND = 0.05
CONTEXT = 512 << 20  # taken by the planner's margin, and by no tensor


def measured(size, settings, steps):
    """Bytes of tensors at the peak of `steps` steps as the settings of a plan have them, with their losses and time."""
    gc.collect()  # what a size before has left in cycles is no part of this one's peak
    device = torch.device(settings["device"])
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, settings["dtype"]))
    try:
        with device:
            model = LlamaForCausalLM(LlamaConfig(**llama_options(SIZES[size]))).train()
    finally:
        torch.set_default_dtype(default)
    if settings["checkpointing"]:
        enable_checkpointing(model)
    names = ("rank", "embedding_rank", "state_bits", "basis_bits")
    optimizer = so.create(model, settings["optimizer"], **{key: settings[key] for key in names if key in settings})
    if settings["layerwise"] != "off":
        so.project_in_backward(model, optimizer, linear=settings["layerwise"] == "linear", early=True)
    optimizer.allocate_state()

    losses = []

    def work():
        with device:
            for _ in range(steps):
                for _ in range(settings["accumulation"]):
                    loss = causal_loss(model, settings["batch"], settings["seq"])
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())

    begin = time.monotonic()
    if device.type == "cpu":
        peak = storage_bytes((*model.parameters(), *model.buffers())) + optimizer.state_bytes() + peak_bytes(work)
    else:
        torch.cuda.reset_peak_memory_stats()
        work()
        peak = torch.cuda.max_memory_allocated()
    return {"measured": peak, "seconds": time.monotonic() - begin, "losses": losses}


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.plan", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["60m", "130m"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--fit", help="take what the planner chooses for this size, and cap the allocator there")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)

    about, name, rows = machine(), platform.machine(), {}
    if options.device == "cuda":
        name = about["gpu"] = torch.cuda.get_device_name()
    what = (name, "plan", *options.sizes, *filter(None, [options.fit]))
    with kept(options.out, {"machine": about, "rows": rows}, *what):
        for size in options.sizes:
            rows[size] = attempted(size, options)
    return int(not all(map(holds, rows.values())))


def attempted(size, options):
    """A row, or why there is none: such as no room under the cap, which the planner should have foreseen."""
    try:
        return beside(size, options)
    except Exception as error:
        print(f"{size}: {why_not(error)}")
        return {"failed": why_not(error)}


def beside(size, options):
    """What was planned for a size and what was measured."""
    asked = {"batch": options.batch, "seq": options.seq, "accumulation": options.accumulation}
    plan = so.plan(size, gpu=options.fit, device=options.device, **asked)
    if not plan.fits:
        if plan.fitting is None:
            raise ValueError(plan.verdict())
        plan = plan.fitting
    if options.fit and options.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((bytes_of(options.fit) - CONTEXT) / total)
    found = measured(size, plan.settings, options.steps)
    peak = found["measured"]
    error = plan.allocated / peak - 1
    planned = f"planned {plan.allocated / 2**20:.1f} MiB, measured {peak / 2**20:.1f} MiB, {100 * error:+.1f} %"
    print(f"{size}: {planned}; {options.steps} steps in {found['seconds']:.1f} s, loss {found['losses'][-1]:.3f}")
    return {"plan": plan.to_dict(), "error": error} | found


def holds(row):
    """Whether a run took what was planned, and came to an end with losses that are numbers."""
    return "failed" not in row and abs(row["error"]) <= BOUND and math.isfinite(sum(row["losses"]))


if __name__ == "__main__":
    sys.exit(main())
