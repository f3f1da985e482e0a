"""Run by test_distributed.py under torchrun: real ranks step shards, and rank 0 saves where the whole weights end.

One launch runs every world size, one after the other, because starting a process costs more than all of its cases.
"""

import math
import os
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import PROJECTED, SETTINGS
from ranks import leave
from tiny_llama import llama
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from training import ALL_METHODS, noise
from training import FIVE as BY_NAME

import subspace_optim as so
from subspace_optim.integrations.ddp import ProjectedState
from subspace_optim.integrations.fsdp import projected_allreduce
from subspace_optim.projectors import exact_products

GAP, RANK, STEPS, MOST = 3, 2, 8, 4
LIMIT = 400  # seconds; ranks of a larger world wait for the smaller ones
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
    4: {"hybrid": ((2, 2), (None, 0)), "both": ((2, 2), (0, 1)), "stacks": ((4,), (-1,))},  # of three experts
}
CASES = [
    (world, mesh, name, side)
    for world, meshes in MESHES.items()
    for mesh in meshes
    for name in FIVE + (OTHERS if (world, mesh) in ((2, "rows"), (2, "columns")) else ())
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


# ---- models under torch's own wrappers -------------------------------------------------------------------------------


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 4)).double()


def batch(step, part=None, parts=1):
    x, y = noise(2 * step, (12, 8)), noise(2 * step + 1, (12, 4))
    return (x, y) if part is None else (x.chunk(parts)[part], y.chunk(parts)[part])


def fit(model, opt, steps, part=None, parts=1):
    for step in steps:
        x, y = batch(step, part, parts)
        (model(x) - y).square().mean().backward()
        opt.step()
        opt.zero_grad()
    return whole(dict(model.named_parameters()))


def optimizer(name, model, **settings):
    return BY_NAME[name](model.named_parameters(), lr=0.02, rank=2, update_proj_gap=2, **settings)


def fully_sharded(model, mesh=None):
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


PLAN = {"0": ColwiseParallel(), "2": RowwiseParallel()}


def wrapped(world):
    """Where the weights of a model end under FSDP2, tensor parallelism and both, for each of the five."""
    rank, ends = dist.get_rank(), {}
    for name in BY_NAME:
        if world == 4:
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
            model = fully_sharded(parallelize_module(mlp(), mesh["tensor"], PLAN), mesh["data"])
            kinds = {str(p) for param in model.parameters() for p in param.placements}
            ends["both", name] = fit(model, optimizer(name, model), range(4), mesh.get_local_rank("data"), 2)
            model = fully_sharded(parallelize_module(mlp(), mesh["tensor"], PLAN), mesh["data"])
            opt = optimizer(name, model, **CODED)
            ends["quantised", name] = fit(model, opt, range(4), mesh.get_local_rank("data"), 2)
            ends["kinds"] = kinds
            continue
        model = fully_sharded(mlp())
        ends["fsdp", name] = fit(model, optimizer(name, model), range(4), rank, world)
        if world == 2:
            model = parallelize_module(mlp(), init_device_mesh("cpu", (2,)), PLAN)
            ends["tensor", name] = fit(model, optimizer(name, model), range(4))
    return ends


def language_model(world):
    """A transformers LLaMA under FSDP2: the layers, then the rest; clipped by the joint norm."""
    model = llama().double()
    tokens = torch.randint(0, 32, (4, 8), generator=torch.Generator().manual_seed(1))
    if world:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        tokens = tokens.chunk(world)[dist.get_rank()]
    opt, norms = so.create(model, "galore", rank=4, lr=0.01, update_proj_gap=2), []
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        norms.append(float(opt.clip_grad_norm_(0.5)))
        opt.step()
        opt.zero_grad()
    return {"weights": whole(dict(model.named_parameters())), "norms": norms}


# ---- checkpoints that move -------------------------------------------------------------------------------------------

SAVED = 4
LATE = ("vector",)  # has no gradient before the checkpoint
MOVED = [(name, flat) for name in FIVE for flat in (False, True)]
CHAIN = {"2": "1", "3": "2", "4": "3", "2b": "3"}  # which stage goes on from whose checkpoint


def moved(folder, stage, source, mesh=None, layout=(), flats=(False, True)):
    """Load, save again for other worlds, and train to the end."""
    ends = {}
    for name, flat in MOVED:
        if flat not in flats:
            continue
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        params = net(mesh, layout)
        opt = build(name, params)
        if source is None:
            train(params, opt, range(SAVED), LATE)
        else:
            with torch.no_grad():
                for param in params.values():
                    param.zero_()
            state = {
                "model": get_model_state_dict(params),
                "optimizer": get_optimizer_state_dict(params, opt, options=options),
            }
            dcp.load(state, checkpoint_id=f"{folder}/{source}-{name}-{flat}")
            set_model_state_dict(params, state["model"])
            set_optimizer_state_dict(params, opt, state["optimizer"], options=options)
        state = {
            "model": get_model_state_dict(params),
            "optimizer": get_optimizer_state_dict(params, opt, options=options),
        }
        dcp.save(state, checkpoint_id=f"{folder}/{stage}-{name}-{flat}")
        train(params, opt, range(SAVED, STEPS))
        ends[name, flat] = whole(params)
    return ends


def exchanged(mesh, layout):
    """Plain state dicts: a whole one into shards, and a sharded one into whole parameters."""
    ends = {}
    for name in FIVE:
        plain, shards = net(), net(mesh, layout)
        opt, sharded_opt = build(name, plain), build(name, shards)
        train(plain, opt, range(SAVED))
        with torch.no_grad():
            for key, param in shards.items():
                param.copy_(distribute_tensor(plain[key].detach(), mesh, param.placements, src_data_rank=None))
        sharded_opt.load_state_dict(opt.state_dict())
        train(shards, sharded_opt, range(SAVED, STEPS - 2))
        other = nn.ParameterDict({key: nn.Parameter(value) for key, value in whole(shards).items()})
        whole_opt = build(name, other)
        whole_opt.load_state_dict(sharded_opt.state_dict())
        train(other, whole_opt, range(STEPS - 2, STEPS))
        ends[name] = whole(other)
    return ends


# ---- figures ---------------------------------------------------------------------------------------------------------


def watched(mesh=None, layout=()):
    """What every method reports; one gradient is not finite, on one rank."""
    seen = {}
    for name in FIVE:
        params = net(mesh, layout)
        opt = build(name, params)
        opt.watch(every=2)
        train(params, opt, range(STEPS))
        grad = noise(0, SHAPES["wide"])
        grad[-1, -1] = torch.nan
        if mesh is not None:
            grad = distribute_tensor(grad, mesh, params["wide"].placements, src_data_rank=None)
        params["wide"].grad = grad
        opt.step()
        seen[name] = [replace(layer, refresh_seconds=0.0) for layer in opt.report()]
    return seen


# ---- what is sent, what is kept, what is refused ---------------------------------------------------------------------

TRAFFIC = [("rows", "right"), ("rows", "left"), ("columns", "right"), ("columns", "left"), ("rows", "local")]


def traffic(meshes):
    """Collectives of one ordinary step of three matrices of one shape."""
    counts = {}
    for name in ("galore", "grams_projected", "galore_lion"):
        for layout, side in TRAFFIC:
            mesh, dim = meshes[layout], 0 if layout == "rows" else 1
            params = nn.ParameterDict(
                {
                    str(i): nn.Parameter(distribute_tensor(noise(i, (6, 8)), mesh, [Shard(dim)], src_data_rank=None))
                    for i in range(3)
                }
            )
            opt = METHODS[name].optimizer(params.values(), lr=0.1, rank=2, proj_type=side, update_proj_gap=100)
            for _ in range(2):
                with CommDebugMode() as seen:
                    for i, param in enumerate(params.values()):
                        param.grad = distribute_tensor(noise(9 + i, (6, 8)), mesh, [Shard(dim)], src_data_rank=None)
                    opt.step()
            counts[name, layout, side] = {str(op): n for op, n in seen.get_comm_counts().items()}
    return counts


def half_precision(mesh, layout):
    """bfloat16: weights and state on every rank, to see that copies agree."""
    ends = {}
    for name in FIVE:
        params = net(mesh, layout, torch.bfloat16)
        opt = build(name, params)
        train(params, opt, range(STEPS))
        held = {
            key: [param, *(v for v in opt.state[param].values() if isinstance(v, DTensor))]
            for key, param in params.items()
        }
        ends[name] = {key: [(t.placements, t.to_local().clone()) for t in tensors] for key, tensors in held.items()}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, ends)
    return everyone


ROUNDED = {2: ("rows", "columns", "stacks"), 3: ("rows", "columns"), 4: ("both",)}  # world size, meshes


def rounded(name, mesh=None, layout=()):
    """Where bfloat16 weights end, a refresh in between; products of bfloat16 would round each shard's share of R."""
    params = net(mesh, layout, torch.bfloat16)
    with exact_products():
        train(params, build(name, params), range(GAP + 2))
    return whole(params)


def all_rounded(meshes):
    """By mesh and method."""
    world = dist.get_world_size()
    return {(key, name): rounded(name, meshes[key], MESHES[world][key][1]) for key in ROUNDED[world] for name in FIVE}


def rounded_tables(mesh=None, cuts=(), **settings):
    """Dense ones."""
    return stepped_tables(torch.bfloat16, mesh, dict.fromkeys(TABLES, cuts), **settings)


def all_rounded_tables(meshes):
    """Cut along every dimension, and twice along the first; by how they are cut and the bits of the state."""
    if "rows" not in meshes:
        strided = (_StridedShard(0, split_factor=2), Shard(0))
        return {("strided", bits): rounded_tables(meshes["both"], strided, state_bits=bits) for bits in (32, 8)}
    cuts = [(0, 32), (0, 8), (1, 32), (-1, 32)]
    return {(dim, bits): rounded_tables(meshes["rows"], (Shard(dim),), state_bits=bits) for dim, bits in cuts}


CODED = {"state_bits": 8, "basis_bits": 8}
QUANTISED = {2: ("rows", "columns"), 3: ("rows", "columns", "stacks"), 4: ("both",)}  # world size, meshes
TABLES = {"table": (9, 5), "odd": (10, 3, 7)}  # dense; the second is cut along its middle


def quantised(name, mesh=None, layout=()):
    params = net(mesh, layout)
    train(params, build(name, params, **CODED), range(STEPS))
    return whole(params)


def stepped_tables(dtype, mesh, cuts, **settings):
    """Where dense weights end that are cut in these ways, or not at all."""

    def own(value, key):
        value = value.to(dtype)
        return value if mesh is None else distribute_tensor(value, mesh, cuts[key], src_data_rank=None)

    params = {key: nn.Parameter(own(noise(i, shape), key)) for i, (key, shape) in enumerate(TABLES.items())}
    opt = so.SubspaceOptimizer(list(params.items()), lr=0.1, **settings)
    for step in range(STEPS):
        for i, (key, param) in enumerate(params.items()):
            param.grad = own(noise(10 * step + i, TABLES[key]), key)
        opt.step()
    return whole(params)


def quantised_tables(mesh=None):
    """Under cautious AdamW; the shards of the odd one are no consecutive rows of it."""
    cuts = {key: [Shard(len(shape) - 2)] for key, shape in TABLES.items()}
    return stepped_tables(torch.float64, mesh, cuts, state_bits=8, transform="cautious")


def all_quantised(meshes):
    """By mesh and method."""
    world = dist.get_world_size()
    ends = {
        (key, name): quantised(name, meshes[key], MESHES[world][key][1]) for key in QUANTISED[world] for name in FIVE
    }
    return ends | ({("rows", "tables"): quantised_tables(meshes["rows"])} if "rows" in meshes else {})


def layouts_of_state(mesh):
    """Of the state of a (12, 7) weight, by side and cut: placements, whole shapes, bytes held here."""
    found = {}
    for side in ("left", "right", "full"):
        for dim in (0, 1):
            param = nn.Parameter(distribute_tensor(noise(0, (12, 7)), mesh, [Shard(dim)], src_data_rank=None))
            opt = so.GaLore([param], rank=2, proj_type=side)
            param.grad = distribute_tensor(noise(1, (12, 7)), mesh, [Shard(dim)], src_data_rank=None)
            opt.step()
            found[side, dim] = (
                {
                    key: (tuple(map(str, value.placements)), tuple(value.shape))
                    for key, value in opt.state[param].items()
                    if isinstance(value, DTensor)
                },
                opt.state_bytes(),
            )
    return found


def refusals(meshes):
    """The message of every mistake, by what it was."""
    said = {}

    def attempt(what, action):
        try:
            action()
        except Exception as error:
            said[what] = f"{type(error).__name__}: {error}"

    flat = FullyShardedDataParallel(mlp(), device_id=torch.device("cpu"))
    opt = so.GaLore(flat.parameters(), rank=2)
    flat(batch(0)[0]).sum().backward()
    attempt("flat", opt.step)

    mesh = meshes["rows"]
    conv = nn.Parameter(distribute_tensor(noise(0, (6, 3, 2, 2)), mesh, [Shard(1)], src_data_rank=None))
    conv.grad = torch.zeros_like(conv)
    attempt("cut", so.GaLore([("conv", conv)], rank=2).step)
    table = nn.Parameter(distribute_tensor(noise(0, (6, 8)), mesh, [Shard(1)], src_data_rank=None))
    table.grad = torch.zeros_like(table)
    sharded = fully_sharded(mlp())
    opt = optimizer("galore", sharded)
    attempt("linear", lambda: so.project_in_backward(sharded, opt, linear=True))
    copies = distribute_module(mlp(), mesh)
    attempt("copies", lambda: so.project_in_backward(copies, optimizer("galore", copies), linear=True))
    attempt("average", lambda: so.average_gradients(opt))
    attempt("blocks", so.GaLore([("table", table)], rank=None, state_bits=8).step)

    rows = nn.Parameter(distribute_tensor(noise(0, (8, 6)), mesh, [Shard(0)], src_data_rank=None))
    rows.grad = rows.detach().clone()
    opt = so.GaLore([("rows", rows)], rank=2)
    opt.step()
    if dist.get_rank() == 1:  # and rank 0 says it
        opt.state[rows]["exp_avg"].to_local().fill_(math.nan)
    attempt("broken", lambda: opt.load_state_dict(opt.state_dict()))
    return said


# ---- groups of shards that average R between them --------------------------------------------------------------------

REPLICAS = {
    "std": {},
    "local": {"proj_type": "local"},
    "full": {"proj_type": "full"},
    "gaussian": {"projector": so.RandomProjection(kind="gaussian")},
}


def replicated(grid, hooked, dtype=torch.float64, bits=None, **settings):
    """A model on two groups of two shards, with torch's all-reduce between them or ours."""
    model = fully_sharded(mlp().to(dtype), grid["shards"] if hooked else grid)
    cls = so.SubspaceOptimizer if "projector" in settings else so.GaLore
    opt = cls(model.named_parameters(), **{"lr": 0.02, "rank": 2, "update_proj_gap": 3} | settings)
    state = ProjectedState(opt, bits, group=grid["replicas"].get_group())
    if hooked:
        projected_allreduce(model, state)
    return model, opt, state


def replicas(grid):
    """Where the weights end, and the bytes that every step sends, by settings; accumulated and clipped."""
    ends, rank = {}, dist.get_rank()
    for key, settings in REPLICAS.items():
        for hooked in (False, True):
            model, opt, state = replicated(grid, hooked, **settings)
            sent = []
            for step in range(7):
                for part in range(2):
                    model.set_requires_gradient_sync(part == 1 or step % 2 == 0)  # reduced once, or twice
                    x, y = batch(2 * step + part, rank, 4)
                    (model(x) - y).square().mean().backward()
                opt.clip_grad_norm_(0.5)
                before, state.bytes_sent, state.bytes_whole = (state.bytes_sent, state.bytes_whole), 0, 0
                sent.append(before)
                opt.step()
                opt.zero_grad()
            ends[key, hooked] = whole(dict(model.named_parameters())), sent
    return ends


def accumulated(model, opt, part=0, parts=1, average=lambda opt: None):
    """Two micro-batches a step, clipped; where the weights end, and how many elements every step starts from."""
    held = []
    for step in range(7):
        for half in range(2):
            x, y = batch(2 * step + half, part, parts)
            ((model(x) - y).square().mean() / 2).backward()
        tensors = [p.grad for p in model.parameters() if p.grad is not None]
        tensors += [low for lows in opt.lows.values() for low in lows]
        held.append(sum(t.to_local().numel() if isinstance(t, DTensor) else t.numel() for t in tensors))
        average(opt)
        opt.clip_grad_norm_(0.5)
        opt.step()
        opt.zero_grad()
    return whole(dict(model.named_parameters())), held


def in_backward(early, wrap=lambda model: model, **arguments):
    model = wrap(mlp())
    opt = so.GaLore(model.named_parameters(), lr=0.02, rank=2, update_proj_gap=3)
    so.project_in_backward(model, opt, early=early)
    return accumulated(model, opt, **arguments)


def over_tensors(model):
    return parallelize_module(model, init_device_mesh("cpu", (2,)), PLAN)


def linear_in_backward(side, wrap=lambda model: model):
    """Where weights end whose layers form R, and how many gradients of the first two there have been."""
    model, formed = wrap(mlp()), []
    opt = so.GaLore(model.named_parameters(), lr=0.02, rank=2, update_proj_gap=3, proj_type=side)
    so.project_in_backward(model, opt, linear=True)
    for layer in (model[0], model[2]):
        layer.weight.register_hook(formed.append)
    return accumulated(model, opt)[0], len(formed)


LINEAR = ("std", "right", "left", "full")


def shards_in_backward():
    """Gradients of shards projected as soon as there are any, under FSDP2 and tensor parallelism."""
    rank, ends = dist.get_rank(), {}
    for early in (False, True):
        ends["fsdp", early] = in_backward(early, fully_sharded, part=rank, parts=2)
        ends["tensor", early] = in_backward(early, over_tensors)
    return ends | {("linear", side): linear_in_backward(side, over_tensors) for side in LINEAR}


def replicas_in_backward(grid):
    group = grid["replicas"].get_group()
    part = {"part": dist.get_rank(), "parts": 4}
    return in_backward(
        False,
        lambda model: fully_sharded(model, grid["shards"]),
        average=lambda o: so.average_gradients(o, group),
        **part,
    )


def replicas_over_tensors(shape):
    """Groups of shards under tensor parallelism that average R; where the weights end, bytes sent and of whole ones."""
    grid = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards", "tensor"))
    model = fully_sharded(parallelize_module(mlp(), grid["tensor"], PLAN), grid["shards"])
    opt = so.GaLore(model.named_parameters(), lr=0.02, rank=2, update_proj_gap=3)
    state = ProjectedState(opt, group=grid["replicas"].get_group())
    projected_allreduce(model, state)
    part = grid.get_local_rank("replicas") * shape[1] + grid.get_local_rank("shards")
    ends, _ = accumulated(model, opt, part, shape[0] * shape[1])
    return ends, state.bytes_sent, state.bytes_whole


def coded_replicas(grid, bits):
    """What 16 equal gradients come to, relative to what was meant, once bases are set."""
    torch.manual_seed(0)
    model, opt, _ = replicated(grid, True, torch.float32, bits, lr=0.0, update_proj_gap=100)
    weight, totals, steps = model[2].weight, 0, 16
    for step in range(steps + 1):
        x, y = batch(0, dist.get_rank(), 4)
        (model(x.float()) - y.float()).square().mean().backward()
        grad = weight.grad.full_tensor()
        if step == 0:
            meant = grad
        else:
            totals = totals + grad
        opt.step()
        opt.zero_grad()
    basis = opt.state[weight]["basis"].full_tensor()
    return float((basis.mT @ (totals - steps * meant)).norm() / (basis.mT @ meant).norm()) / steps


def unlike_replicas(grid):
    """What groups of shards are refused, by what was wrong."""
    said = {}

    def attempt(what, action):
        try:
            action()
        except Exception as error:
            said[what] = f"{type(error).__name__}: {error}"

    group = grid["replicas"].get_group()
    model, opt, _ = replicated(grid, False)
    attempt("native", lambda: projected_allreduce(model, ProjectedState(opt, group=group)))
    model, opt, _ = replicated(grid, True)
    attempt("everyone", lambda: projected_allreduce(model, ProjectedState(opt)))
    attempt("whole", lambda: projected_allreduce(mlp(), ProjectedState(opt, group=group)))
    plain = mlp()
    state = ProjectedState(so.GaLore(plain.parameters(), rank=2), group=group)
    attempt("before", lambda: projected_allreduce(fully_sharded(plain, grid["shards"]), state))
    idle = mlp()
    idle.idle = nn.Parameter(torch.ones(2).double())
    fully_shard(idle, mesh=grid["shards"])
    projected_allreduce(idle, ProjectedState(optimizer("galore", idle), group=group))
    attempt("unused", idle(batch(0)[0]).sum().backward)
    return said


# Seeds and staggering go by the place of a tensor in its optimizer, which is another one here.
ZERO = {"lr": 0.02, "rank": 2, "update_proj_gap": 2, "svd": "exact", "stagger": False}


def zero_redundancy():
    """The recipe of the flat refusal: whole parameters, each stepped on one rank."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # its import warns, which pytest makes an error

    model = mlp()
    opt = ZeroRedundancyOptimizer(model.parameters(), so.GaLore, **ZERO)
    return fit(model, opt, range(4)), len(opt.optim.param_groups[0]["params"])


def second_world(folder, meshes):
    rows, layout = meshes["rows"], (0,)
    return {
        "equal": equivalences(2, meshes),
        "wrapped": wrapped(2),
        "llama": language_model(2),
        "moved": moved(folder, "2", CHAIN["2"], rows, layout),
        "exchanged": exchanged(rows, layout),
        "traffic": traffic(meshes),
        "backward": shards_in_backward(),
        "watched": {key: watched(meshes[key], layout) for key, layout in (("rows", (0,)), ("columns", (1,)))},
        "quantised": all_quantised(meshes),
        "rounded": all_rounded(meshes),
        "tables": all_rounded_tables(meshes),
        "state": layouts_of_state(rows),
        "refusals": refusals(meshes),
        "zero": zero_redundancy(),
    }


def third_world(folder, meshes):
    return {
        "equal": equivalences(3, meshes),
        "wrapped": wrapped(3),
        "watched": {"rows": watched(meshes["rows"], (0,))},
        "quantised": all_quantised(meshes),
        "rounded": all_rounded(meshes),
        "tables": all_rounded_tables(meshes),
        "moved": moved(folder, "3", CHAIN["3"], meshes["columns"], (1,)),
    }


def fourth_world(folder, meshes):
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    return {
        "replicas": replicas(grid),
        "replicas over tensors": replicas_over_tensors((2, 1, 2)),
        "backward": {"replicas": replicas_in_backward(grid)},
        "coded replicas": {bits: coded_replicas(grid, bits) for bits in (None, 8, 4)},
        "unlike replicas": unlike_replicas(grid),
        "equal": equivalences(4, meshes),
        "wrapped": wrapped(4),
        "quantised": all_quantised(meshes),
        "rounded": all_rounded(meshes),
        "tables": all_rounded_tables(meshes),
        "half": half_precision(meshes["hybrid"], (None, 0)),
        "moved": moved(folder, "4", CHAIN["4"], meshes["both"], (0, 1)),
    }


def second_again(folder, meshes):
    return {"moved": moved(folder, "2b", CHAIN["2b"], meshes["rows"], (0,))}


STAGES = {"2": (2, second_world), "3": (3, third_world), "4": (4, fourth_world), "2b": (2, second_again)}


def main(folder):
    rank = int(os.environ["RANK"])
    if rank == 0:
        moved(folder, "1", None)
    for stage, (world, run) in STAGES.items():
        if rank >= world:
            continue
        store = f"file://{folder}/store-{stage}"
        dist.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=LIMIT)
        )
        meshes = {name: init_device_mesh("cpu", shape) for name, (shape, _) in MESHES[world].items()}
        results = run(folder, meshes)
        if rank == 0:
            torch.save(results, folder / f"{stage}.pt")
        leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
