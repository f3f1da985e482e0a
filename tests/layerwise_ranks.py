"""Run by test_layerwise.py under torchrun: every rank sees its part of the batch and saves where its weights end."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import leave
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import noise

import subspace_optim as so
from subspace_optim.integrations.ddp import ProjectedState, projected_allreduce_hook

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


HOOKED = {
    "orthonormal": {},
    "full": {"proj_type": "full"},
    "gaussian": {"projector": so.RandomProjection(kind="gaussian")},
    "codes": {"basis_bits": 8},
}


def hooked(rank, with_hook, settings):
    """DDP with gradient accumulation, clipped by torch: with the hook or without."""
    net = Experts(*list(model())[:2], nn.Tanh(), nn.Linear(10, 4).double())
    cls = so.SubspaceOptimizer if "projector" in settings else so.GaLore
    opt = cls(net.named_parameters(), lr=0.02, rank=3, update_proj_gap=4, **settings)
    parallel = DistributedDataParallel(net)
    state = ProjectedState(opt)
    if with_hook:
        parallel.register_comm_hook(state, projected_allreduce_hook)
    grads = {}
    for step in range(STEPS):
        with parallel.no_sync():
            backward(parallel, step, 0, rank)
        backward(parallel, step, 1, rank)
        if step == STEPS - 1:
            grads = {name: param.grad.clone() for name, param in net.named_parameters()}
        opt.step()
        opt.zero_grad()
    bases = {name: opt.state[p].get("basis") for name, p in net.named_parameters()}
    return {"weights": net.state_dict(), "grads": grads, "bases": bases, "sent": (state.bytes_sent, state.bytes_whole)}


def coded(rank, bits, feedback):
    """What 16 equal gradients come to, relative to what was meant, once the bases are set; and bytes of one message."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 32))
    opt = so.GaLore(net.named_parameters(), lr=0.0, rank=8, update_proj_gap=1000)
    parallel = DistributedDataParallel(net)
    state = ProjectedState(opt, bits, error_feedback=feedback)
    parallel.register_comm_hook(state, projected_allreduce_hook)
    total, x = torch.zeros(32, 24), noise(rank, (40, 24)).float()
    steps = 16
    for step in range(steps + 1):
        before = state.bytes_sent
        (parallel(x) * noise(7 + rank, (40, 32)).float()).sum().backward()
        if step == 0:
            basis_gradient = net[0].weight.grad.clone()
        else:
            total += net[0].weight.grad
        opt.step()
        opt.zero_grad()
    basis = opt.state[net[0].weight]["basis"]
    meant = steps * basis_gradient @ basis
    return float((total @ basis - meant).norm() / meant.norm()), state.bytes_sent - before


def coded_half(rank, steps, saved=None, feedback=True):
    """Some steps with 8-bit messages, from a checkpoint of this rank or from the start."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 7))
    opt = optimizer(net, update_proj_gap=5)
    parallel = DistributedDataParallel(net)
    state = ProjectedState(opt, bits=8)
    parallel.register_comm_hook(state, projected_allreduce_hook)
    if saved:
        net.load_state_dict(saved["weights"])
        opt.load_state_dict(saved["optimizer"])
        if feedback:
            state.load_state_dict(saved["messages"])
    for step in steps:
        (parallel(noise(step, (RANKS, 6, 8))[rank].float()) * noise(50, (6, 7)).float()).sum().backward()
        opt.step()
        opt.zero_grad()
    return {"weights": net.state_dict(), "optimizer": opt.state_dict(), "messages": state.state_dict()}


def resumed(rank, folder):
    """The run, the same in two halves, and without the error feedback in the second."""
    path = folder / f"half-{rank}.pt"
    torch.save(coded_half(rank, range(4)), path)
    halves = [coded_half(rank, range(4, 12), torch.load(path), feedback) for feedback in (True, False)]
    return [run["weights"] for run in (coded_half(rank, range(12)), *halves)]


def bad(rank):
    """A gradient that is not finite on one rank is skipped on both, and leaves no error behind."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12))
    opt = optimizer(net, stagger=False, update_proj_gap=100)
    parallel = DistributedDataParallel(net)
    parallel.register_comm_hook(ProjectedState(opt, bits=8), projected_allreduce_hook)
    for step in range(3):
        x = torch.full((3, 8), torch.nan if step == 1 and rank == 1 else 1.0)
        parallel(x).square().sum().backward()
        opt.step()
        opt.zero_grad()
    return opt.skipped_updates, net.state_dict()


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


def sparse(rank):
    """One rank's gradient is sparse, which all of them say."""
    net = nn.Embedding(40, 12, sparse=rank == 1)
    opt = so.GaLore(net.named_parameters(), rank=4)
    net(torch.arange(3)).sum().backward()
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
    found |= {f"hooked {key}": [hooked(rank, on, s) for on in (False, True)] for key, s in HOOKED.items()}
    found |= {f"coded {bits} {feedback}": coded(rank, bits, feedback) for bits in (8, 4) for feedback in (False, True)}
    found["coded None True"] = coded(rank, None, True)
    found["bad"] = bad(rank)
    found["resumed"] = resumed(rank, folder)
    found["early"] = message(RuntimeError, early)
    found["apart"] = message(RuntimeError, lambda: apart(rank))
    found["sparse"] = message(TypeError, lambda: sparse(rank))
    torch.save(found, folder / f"{rank}.pt")
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
