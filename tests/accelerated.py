"""Run by test_frameworks.py under torchrun: accelerate's FSDP2 from `prepare` to `load_state`, on CPU ranks."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from ranks import leave
from tiny_llama import llama, rows
from torch.distributed.tensor import DTensor

import subspace_optim as so

STEPS, SAVED, RANKS = 6, 3, 2
NAMES = ("galore", "flora")


def optimizer(name, model):
    return so.create(model, name, rank=4, lr=0.01, weight_decay=0.1, update_proj_gap=2)


def loss(model, step, part=0, parts=1):
    tokens = torch.stack([row["input_ids"] for row in rows()[8 * step : 8 * step + 8]]).chunk(parts)[part]
    return model(input_ids=tokens, labels=tokens).loss


def accelerated():
    """accelerate 1.15 takes an FSDP plugin up on accelerators alone, and on CPUs stays at DDP: so it is told again."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.fsdp_plugin = plugin
    for state in (PartialState(), accelerator.state):
        state.distributed_type = DistributedType.FSDP
    return accelerator


def run(accelerator, name, folder, steps, resume=False):
    model = llama()
    model, opt = accelerator.prepare(model, optimizer(name, model))
    if resume:
        accelerator.load_state(str(folder))
    for step in steps:
        if step == SAVED and not resume:
            accelerator.save_state(str(folder))
        accelerator.backward(loss(model, step, accelerator.process_index, RANKS))
        opt.step()
        opt.zero_grad()
    assert all(isinstance(param, DTensor) for group in opt.param_groups for param in group["params"])
    ends = {key: param.detach().full_tensor() for key, param in model.named_parameters()}
    accelerator.free_memory()
    return ends


def main(folder):
    accelerator, ends = accelerated(), {}
    for name in NAMES:
        ends[name] = run(accelerator, name, folder / name, range(STEPS))
        ends[name, "resumed"] = run(accelerator, name, folder / name, range(SAVED, STEPS), resume=True)
    if accelerator.is_main_process:
        torch.save(ends, folder / "ends.pt")
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
