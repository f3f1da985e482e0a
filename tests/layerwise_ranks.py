"""Run by test_layerwise.py under torchrun: every rank sees its part of the batch and saves where its weights end."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import noise

import subspace_optim as so

STEPS, RANKS, PARTS = 12, 2, 2


class Experts(nn.Sequential):
    """The last layer but one is skipped by odd inputs: a rank may have no gradient for it."""

    def forward(self, x, odd):
        for i, layer in enumerate(self):
            if not (odd and i == 2):
                x = torch.tanh(layer(x))
        return x


def model():
    torch.manual_seed(0)
    return Experts(nn.Linear(8, 12), nn.Linear(12, 10), nn.Linear(10, 10), nn.Linear(10, 4)).double()


def optimizer(net, **settings):
    return so.GaLore(net.named_parameters(), **{"lr": 0.02, "rank": 3, "update_proj_gap": 4} | settings)


def backward(net, step, part, rank):
    seed = 10 * step + part
    x, y = noise(2 * seed, (RANKS, 6, 8))[rank], noise(2 * seed + 1, (RANKS, 6, 4))[rank]
    ((net(x, odd=rank == 1) - y).square().mean() / PARTS).backward()


def alone(linear):
    """One process that sees what all ranks see."""
    net = model()
    opt, norms = optimizer(net), []
    so.project_in_backward(net, opt, linear=linear)
    for step in range(STEPS):
        for part in range(PARTS):
            for rank in range(RANKS):
                backward(net, step, part, rank)
        for param in net.parameters():
            for grad in (*opt.lows.get(param, ()), *([] if param.grad is None else [param.grad])):
                grad.div_(RANKS)
        norms.append(float(opt.clip_grad_norm_(0.05)))
        opt.step()
        opt.zero_grad()
    return net, norms


def averaged(linear, rank):
    net = model()
    opt, norms = optimizer(net), []
    so.project_in_backward(net, opt, linear=linear)
    for step in range(STEPS):
        for part in range(PARTS):
            backward(net, step, part, rank)
        so.average_gradients(opt)
        norms.append(float(opt.clip_grad_norm_(0.05)))
        opt.step()
        opt.zero_grad()
    return {"weights": net.state_dict(), "norms": norms}


def message(error, run):
    try:
        run()
    except error as caught:
        return str(caught)
    return "not refused"


def wrapped_later():
    """Hooks first, then DDP, whose reducer writes a gradient of zeros where the hook has freed one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4))
    opt = optimizer(net, stagger=False)
    so.project_in_backward(net, opt)
    parallel = DistributedDataParallel(net)
    for _ in range(2):
        parallel(torch.ones(3, 8)).sum().backward()
        opt.step()
        opt.zero_grad()


def apart(rank):
    """One rank has been restarted: its first step needs whole gradients."""
    net = nn.Sequential(nn.Linear(8, 12))
    opt = optimizer(net)
    so.project_in_backward(net, opt)
    for step in range(2 if rank == 0 else 1):
        net(torch.ones(3, 8)).sum().backward()
        if rank == 0 and step == 0:
            opt.step()
            opt.zero_grad()
    so.average_gradients(opt)


def early():
    net = model()
    opt = optimizer(net)
    so.project_in_backward(net, opt, early=True)
    so.average_gradients(opt)


def main(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    found = {f"averaged {linear}": averaged(linear, rank) for linear in (False, True)}
    net = nn.Sequential(nn.Linear(8, 12))
    found["wrapped"] = message(TypeError, lambda: so.project_in_backward(DistributedDataParallel(net), optimizer(net)))
    found["wrapped later"] = message(RuntimeError, wrapped_later)
    found["early"] = message(RuntimeError, early)
    found["apart"] = message(RuntimeError, lambda: apart(rank))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
