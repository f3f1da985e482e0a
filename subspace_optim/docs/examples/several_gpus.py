"""FSDP2 on any number of ranks: `torchrun --nproc-per-node 2 several_gpus.py`; alone, it is one rank.

A checkpoint written on N ranks goes on on M: call it again with another --nproc-per-node.
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh

import subspace_optim as so

device = "cuda" if torch.cuda.is_available() else "cpu"
if "RANK" in os.environ:  # torchrun says who we are
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
else:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
agreement = dist.new_group(backend="gloo")  # for what ranks say of a checkpoint
rank, world = dist.get_rank(), dist.get_world_size()
if device == "cuda":
    torch.cuda.set_device(rank % torch.cuda.device_count())

torch.manual_seed(0)  # every rank begins with the same weights
model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32)).to(device)
fully_shard(model, mesh=init_device_mesh(device, (world,)))
opt = so.create(model, "galore", rank=8, lr=1e-2, update_proj_gap=5)  # after sharding, as any optimizer

folder = Path("checkpoint")
if folder.exists():
    weights, state = get_state_dict(model, opt)
    dcp.load({"model": weights, "opt": state}, checkpoint_id=folder, process_group=agreement)
    set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=state)

for step in range(20):
    batch = torch.randn(12, 32, generator=torch.Generator().manual_seed(step)).to(device)
    part = batch.tensor_split(world)[rank]
    loss = torch.nn.functional.mse_loss(model(part), part)
    loss.backward()  # FSDP2 averages the gradients and leaves each rank its shard
    opt.step()
    opt.zero_grad()

weights, state = get_state_dict(model, opt)
writer = dcp.FileSystemWriter(folder, overwrite=True)
dcp.save({"model": weights, "opt": state}, storage_writer=writer, process_group=agreement)
if rank == 0:
    steps = int(state["state"]["0.weight"]["step"])
    print(
        f"{opt.summary()}\nloss {loss.item():.4f} after {steps} steps; {opt.state_bytes()} bytes on rank 0 of {world}"
    )
dist.destroy_process_group()
del agreement  # ends its threads here: one that frees its last message while Python shuts down aborts the process
