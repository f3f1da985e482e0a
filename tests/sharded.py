"""Run by test_distributed.py under torchrun: real ranks step shards, and rank 0 saves where the whole weights end.

One launch runs every world size, one after the other, because starting a process costs more than all of its cases.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from cases import PROJECTED, SETTINGS
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from training import ALL_METHODS, noise

GAP, RANK, STEPS, MOST = 3, 2, 8, 4
SHAPES = {
    "tall": (12, 7),
    "wide": (4, 9),  # of three ranks the last has none of the rows
    "conv": (6, 3, 2, 2),
    "vector": (5,),
    "experts": (3, 8, 5),
}
METHODS = {str(method): method for method in ALL_METHODS}
FIVE = ("galore", "flora", "osd", "gradnormlorp", "grams_projected")
OTHERS = (
    *("galore_exact", "galore_project_aware", "galore_cautious", "galore_lion", "galore_adafactor", "apollo"),
    *("gaussian_adam", "flora_relative", "osd_lion", "official_gradnormlorp", "adamw_cautious"),
)


def cut(dim, name):
    """The dimension along which a tensor is cut when matrices are cut along `dim` (0 rows, 1 columns, -1 stacks)."""
    if name == "vector":
        return 0 if dim == 0 else None
    if name == "experts":
        return dim + 1
    return 0 if name == "conv" and dim == 1 else max(dim, 0)


def placements(layout, name):
    """Of a tensor, one a mesh dimension; a layout names what each mesh dimension cuts."""
    dims = [None if dim is None else cut(dim, name) for dim in layout]
    return [Replicate() if dim is None or dim in dims[:i] else Shard(dim) for i, dim in enumerate(dims)]


# Mesh shape and layout, by world size.
MESHES = {
    2: {"rows": ((2,), (0,)), "columns": ((2,), (1,)), "stacks": ((2,), (-1,)), "copies": ((2,), (None,))},
    3: {"rows": ((3,), (0,)), "columns": ((3,), (1,)), "stacks": ((3,), (-1,))},
    4: {"hybrid": ((2, 2), (None, 0)), "both": ((2, 2), (0, 1))},
}
CASES = [
    (world, mesh, name, side)
    for world, meshes in MESHES.items()
    for mesh in meshes
    for name in (FIVE if world > 2 else FIVE + OTHERS)
    for side in (("std", "full", "reverse_std") if name == "galore" else ("std",))
]


def build(name, params, side="std", **settings):
    method = METHODS[name]
    projected = PROJECTED | {"rank": RANK, "update_proj_gap": GAP, "proj_type": side}
    base = SETTINGS if name.startswith("adamw") else projected
    plain = [(key, param) for key, param in params.items() if key != "experts"]
    groups = [{"params": plain}, {"params": [("experts", params["experts"])], "batch_dims": 1}]
    return method.optimizer(groups, **(base | method.settings | settings))


def net(mesh=None, layout=(), dtype=torch.float64):
    """The same parameters on every rank, or their shards."""
    params = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        value = noise(i, shape).to(dtype)
        if mesh is not None:
            value = distribute_tensor(value, mesh, placements(layout, name), src_data_rank=None)
        params[name] = nn.Parameter(value)
    return nn.ParameterDict(params)


def train(params, opt, steps, without=()):
    for step in steps:
        for i, (name, param) in enumerate(params.items()):
            grad = noise(100 * (step + 1) + i, SHAPES[name]).to(param.dtype)
            if hasattr(param, "placements"):
                grad = distribute_tensor(grad, param.device_mesh, param.placements, src_data_rank=None)
            param.grad = None if name in without else grad
        opt.step()
        opt.zero_grad()


def whole(params):
    return {
        name: param.detach().full_tensor() if hasattr(param, "placements") else param.detach().clone()
        for name, param in params.items()
    }


def equivalences(world, meshes):
    ends = {}
    for case in CASES:
        if case[0] != world:
            continue
        _, mesh, name, side = case
        params = net(meshes[mesh], MESHES[world][mesh][1])
        opt = build(name, params, side)
        train(params, opt, range(STEPS))
        ends[case] = whole(params)
    return ends


STAGES = {"2": (2, equivalences), "3": (3, equivalences), "4": (4, equivalences)}


def main(folder):
    rank = int(os.environ["RANK"])
    for stage, (world, run) in STAGES.items():
        if rank >= world:
            continue
        store = f"file://{folder}/store-{stage}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=100))
        meshes = {name: init_device_mesh("cpu", shape) for name, (shape, _) in MESHES[world].items()}
        results = run(world, meshes)
        if rank == 0:
            torch.save(results, folder / f"{stage}.pt")
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
