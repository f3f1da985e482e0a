"""Run by test_frameworks.py under torchrun: every rank sees its part of the batch and saves where its weights end."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import leave
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import FIVE, noise

STEPS, RANKS = 5, 2
CELLS = [(name, dtype) for name in FIVE for dtype in (torch.float32, torch.bfloat16)]


def model(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def optimizer(name, net):
    return FIVE[name](net.named_parameters(), lr=0.02, rank=2, update_proj_gap=2)


def loss(net, step, rank, dtype):
    """Of one rank's part of the batch."""
    x, y = noise(2 * step, (RANKS, 6, 8))[rank].to(dtype), noise(2 * step + 1, (RANKS, 6, 4))[rank].to(dtype)
    return (net(x) - y).square().mean()


def main(folder):
    dist.init_process_group("gloo")
    rank, ends = dist.get_rank(), {}
    for name, dtype in CELLS:
        net = model(dtype)
        parallel, opt = DistributedDataParallel(net), optimizer(name, net)
        for step in range(STEPS):
            opt.zero_grad()
            loss(parallel, step, rank, dtype).backward()
            opt.step()
        ends[f"{name}-{dtype}"] = net.state_dict()
    torch.save({"ends": ends}, folder / f"{rank}.pt")
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
