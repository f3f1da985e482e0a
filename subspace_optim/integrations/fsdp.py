"""FSDP2 on several groups of shards (HSDP): the all-reduce between the groups sends R in the place of G.

    mesh = init_device_mesh("cuda", (2, 8), mesh_dim_names=("replicas", "shards"))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["shards"])
    fully_shard(model, mesh=mesh["shards"])
    opt = so.GaLore(model.named_parameters(), rank=128)
    projected_allreduce(model, ProjectedState(opt, group=mesh["replicas"].get_group()))

The reduce-scatter within a group stays, of whole gradients. Between groups, commonly the slow link, a shard of rows
sends R = GQ of its rows. fully_shard on the whole mesh (torch's native HSDP) all-reduces G before it calls any hook, so
that nothing would be left to save.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import distributed
from .ddp import ProjectedState


def projected_allreduce(model: nn.Module, state: ProjectedState) -> None:
    """Average gradients between groups of shards, by R of projected tensors and G of the others.

    Every group starts from the same weights. p.grad is what `integrations.ddp.projected_allreduce_hook` would leave,
    and everything else stays as under fully_shard: micro-batches, set_requires_gradient_sync, clipping. Where the
    dimension that is cut is also the one that R sums over, shards sum R first, if that is less to send than their
    part of G; proj_type="local" avoids it.

    Args:
        model: sharded by fully_shard over the ranks of one group.
        state: of the optimizer made after that, with the group of the ranks that hold copies of one shard.

    Raises:
        TypeError: no module has been sharded by fully_shard.
        ValueError: the group holds other shards, or the optimizer was made of other parameters.
    """
    from torch.distributed.fsdp import FSDPModule

    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not modules:
        raise TypeError(f"projected_allreduce: no module of {type(model).__name__} is sharded; call fully_shard first")
    for name, param in model.named_parameters():
        if distributed.is_sharded(param):
            distributed.check_replicas(f"projected_allreduce: {name}", param, state.group)
    known = {param for group in state.opt.param_groups for param in group["params"]}
    if known.isdisjoint(model.parameters()):
        raise ValueError(
            f"projected_allreduce: {type(state.opt).__name__} has none of the model's parameters; make it after "
            "fully_shard, which replaces them"
        )
    for module in modules:
        module.set_all_reduce_hook(partial(_reduce, state, module))


def _reduce(state: ProjectedState, module: Any, gradients: Tensor) -> None:
    # torch hands over the shards of a module's gradients as one vector, and has no public name for what is where.
    held = [one for one in module._get_fsdp_state()._fsdp_param_group.fsdp_params if one.sharded_param.requires_grad]
    sizes = [one.padded_sharded_param_size.numel() for one in held]
    if sum(sizes) != gradients.numel():
        raise RuntimeError(
            f"projected_allreduce: some parameters of {type(module).__name__} had no gradient in this backward; call "
            "set_reduce_scatter_unused_params(True) on the model"
        )
    params = [one.sharded_param for one in held]
    shapes = [distributed.local(param).shape for param in params]
    pieces = zip(torch.split(gradients, sizes), shapes, strict=True)
    shards = [piece[: shape.numel()].view(shape) for piece, shape in pieces]
    works, finish = state.average(zip(params, shards, strict=True))
    for work in works:
        work.wait()
    finish()
