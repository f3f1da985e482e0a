"""Sharded parameters on real ranks: the numbers do not depend on the sharding."""

import math
import os
import re
import subprocess
import sys
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from unittest.mock import Mock

import pytest
import sharded
import torch
import torch.distributed as dist
from sharded import CASES, MESHES, STEPS
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from training import FIVE

import subspace_optim as so
from subspace_optim import distributed
from subspace_optim.distributed import Layout
from subspace_optim.kernels.sharded import Sharded
from subspace_optim.types import Hyper, Moments, Weights

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the ranks found, by stage; and the folder of their checkpoints."""
    folder = tmp_path_factory.mktemp("sharded")
    script = str(Path(__file__).with_name("sharded.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={sharded.MOST}"]
    done = subprocess.run(
        [*command, script, str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=2 * sharded.LIMIT,
    )
    assert done.returncode == 0, done.stderr
    # Only our own run has written these: placements are no tensors.
    found = {stage: torch.load(folder / f"{stage}.pt", weights_only=False) for stage in sharded.STAGES}
    return found | {"folder": folder}


@lru_cache
def unsharded(name, side="std"):
    params = sharded.net()
    sharded.train(params, sharded.build(name, params, side), range(STEPS))
    return sharded.whole(params)


def assert_close(ends, wanted):
    """Sums over shards are taken in another order: float64 rounding, after steps that amplify it."""
    torch.testing.assert_close(ends, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_sharded_is_unsharded(results, case):
    """Uneven and empty shards, stacks, all sides, two-dimensional meshes, across two refreshes of every tensor."""
    world, _, name, side = case
    assert_close(results[str(world)]["equal"][case], unsharded(name, side))


def test_the_comparison_can_fail():
    other = sharded.net()
    sharded.train(other, sharded.build("galore", other), range(STEPS - 1))
    with pytest.raises(AssertionError):
        assert_close(sharded.whole(other), unsharded("galore"))


def test_a_layout_of_every_kind_is_tried():
    layouts = {(world, layout) for world, meshes in MESHES.items() for _, layout in meshes.values()}
    assert {(3, (0,)), (3, (1,)), (3, (-1,)), (4, (None, 0)), (4, (0, 1))} <= layouts


@pytest.mark.parametrize("name", FIVE)
@pytest.mark.parametrize("stage", ["2", "3", "4"])
def test_models_under_torchs_wrappers(results, stage, name):
    """fully_shard, parallelize_module, and one over the other, with a part of the batch each, are one process."""
    model = sharded.mlp()
    wanted = sharded.fit(model, sharded.optimizer(name, model), range(4))
    ends = {kind[0]: end for kind, end in results[stage]["wrapped"].items() if kind[1] == name}
    assert set(ends) == {"2": {"fsdp", "tensor"}, "3": {"fsdp"}, "4": {"both", "quantised"}}[stage]
    if "quantised" in ends:
        model = sharded.mlp()
        coded = sharded.fit(model, sharded.optimizer(name, model, **sharded.CODED), range(4))
        assert_close_in_float32(ends.pop("quantised"), coded)
    for end in ends.values():
        assert_close(end, wanted)


def test_fsdp_over_tensor_parallelism_cuts_one_dimension_twice(results):
    """torch's strided shards, which a state tensor has to take over."""
    assert any(kind.startswith("_S") for kind in results["4"]["wrapped"]["kinds"])


def test_a_llama_under_fsdp_clipped_by_the_joint_norm(results):
    assert_close(results["2"]["llama"], sharded.language_model(0))


@pytest.mark.parametrize(("name", "flat"), sharded.MOVED, ids=str)
@pytest.mark.parametrize("stage", sharded.CHAIN)
def test_a_checkpoint_moves_between_world_sizes(results, stage, name, flat):
    """1 → 2 ranks, 2 → 3, 3 → 2 and 3 → 4, across refreshes; one parameter has had no gradient before the save."""
    assert_close(results[stage]["moved"][name, flat], interrupted(name))


@lru_cache
def interrupted(name):
    params = sharded.net()
    opt = sharded.build(name, params)
    sharded.train(params, opt, range(sharded.SAVED), sharded.LATE)
    sharded.train(params, opt, range(sharded.SAVED, STEPS))
    return sharded.whole(params)


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed.*", "ignore::FutureWarning:torch.distributed.*")
@pytest.mark.parametrize("stage", ["2", "3"])
def test_a_checkpoint_of_several_ranks_continues_on_one(results, tmp_path, stage):
    for name in sharded.FIVE:
        (tmp_path / f"{stage}-{name}-False").symlink_to(results["folder"] / f"{stage}-{name}-False")
    for (name, _), end in sharded.moved(tmp_path, "1", stage, flats=(False,)).items():
        assert_close(end, interrupted(name))


@pytest.mark.parametrize("name", sharded.FIVE)
def test_plain_state_dicts_go_from_whole_to_sharded_and_back(results, name):
    assert_close(results["2"]["exchanged"][name], unsharded(name))


@pytest.mark.parametrize("name", ["galore", "grams_projected", "galore_lion"])
def test_what_an_ordinary_step_sends(results, name):
    """One reduction of a few numbers, by which all ranks skip alike; and one of R where its sum is cut."""
    for layout, side in sharded.TRAFFIC:
        summed = (layout, side) in (("rows", "left"), ("columns", "right"))
        assert results["2"]["traffic"][name, layout, side] == {"c10d.allreduce_": 1 + summed}


def test_state_follows_the_parameter(results):
    """Cut along the dimension that it shares with the parameter, copied elsewhere; whole shapes, bytes of the shard."""
    whole = {"left": (2, 7), "right": (12, 2), "full": (2, 2)}
    carried = {"left": 1, "right": 0, "full": None}
    for (side, dim), (state, held) in results["2"]["state"].items():
        moment = f"S({dim})" if carried[side] == dim else "R"
        assert state["exp_avg"] == state["exp_avg_sq"] == ((moment,), whole[side])
        bases = {"left": {"basis": 0}, "right": {"basis": 1}, "full": {"basis_left": 0, "basis_right": 1}}[side]
        for key, axis in bases.items():
            assert state[key] == (("S(0)" if axis == dim else "R",), ((12, 7)[axis], 2))
        part = {(0, 12): 6, (1, 7): 4}  # rank 0's share of rows and columns
        rows = {axis: part[axis, size] if axis == dim else size for axis, size in enumerate((12, 7))}
        low = {"left": 2 * rows[1], "right": 2 * rows[0], "full": 4}[side]
        assert held == 8 * (1 + 2 * low + sum(2 * rows[axis] for axis in bases.values()))


@pytest.mark.parametrize("name", sharded.FIVE)
def test_copies_of_bfloat16_shards_agree(results, name):
    """Rows cut in two, each half on two ranks: weights and state of the copies are equal to the bit, and finite."""
    ranks = [everything[name] for everything in results["4"]["half"]]
    for one, other in ((0, 2), (1, 3)):
        for key, held in ranks[one].items():
            assert len(held) > 1
            for (_, a), (_, b) in zip(held, ranks[other][key]):
                assert torch.equal(a, b) and a.isfinite().all()
    assert not torch.equal(ranks[0]["tall"][0][1], ranks[1]["tall"][0][1])


@pytest.mark.parametrize("name", sharded.FIVE)
def test_bfloat16_shards_are_rounded_as_the_whole(results, name):
    """By the same random bits, across a refresh.

    A sum that a shard takes in another order differs in float32 by 1e-6, and by that over 2⁻⁸, its chance to be rounded
    to the other neighbour: 5 steps of the 120 elements of a tensor come to 0.2 that differ. Other bits differ in most.
    Neighbours of weights below 4 are 2⁻⁶ apart.
    """
    for world, meshes in sharded.ROUNDED.items():
        found = {mesh: end for (mesh, method), end in results[str(world)]["rounded"].items() if method == name}
        assert set(found) == set(meshes)
        for end in found.values():
            for key, wanted in rounded(name).items():
                assert (end[key] != wanted).sum() <= 3, key
                torch.testing.assert_close(end[key], wanted, rtol=0, atol=2**-6)


@lru_cache
def rounded(name):
    return sharded.rounded(name)


@pytest.mark.parametrize("world", sharded.ROUNDED)
def test_dense_bfloat16_shards_are_the_whole_to_the_bit(results, world):
    """Nothing is summed. Some ranks have none of a tensor, or many pieces of it."""
    found = results[str(world)]["tables"]
    assert {bits for _, bits in found} == {32, 8}
    for (_, bits), end in found.items():
        torch.testing.assert_close(end, sharded.rounded_tables(state_bits=bits), rtol=0, atol=0)


@pytest.fixture(params=range(4))
def one_of_four(request):
    """This process as a rank of a group that does not exist."""
    distributed._runs.cache_clear()  # a process has one rank
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=4)
    yield init_device_mesh("cpu", (2, 2))
    dist.destroy_process_group()


@pytest.mark.parametrize("shape", [(16, 24), (7, 9), (2, 24), (6, 5, 4)], ids=str)
@pytest.mark.parametrize("dims", [(0, 0), (0, 1), (1, 1), (0, None)], ids=str)
def test_a_window_names_the_elements_of_a_shard(one_of_four, shape, dims):
    numbers = torch.arange(math.prod(shape)).view(shape)
    cuts = [Replicate() if dim is None else Shard(dim) for dim in dims]
    shard = distribute_tensor(numbers, one_of_four, cuts, src_data_rank=None)
    own = shard.to_local()
    sharding = Layout.of(shard).sharding(shape, None)
    assert torch.equal(sharding.elements(), own.flatten())
    window = sharding.window(tuple(own.shape))
    if not own.numel():
        assert window is None
        return
    first = window.elements(own.numel(), own.device)
    assert torch.equal(torch.arange(own.numel()) + first if window.consecutive else first, own.flatten())


@pytest.mark.parametrize(("dim", "side"), [(0, "right"), (1, "left"), (0, None), (1, None)])
def test_shards_are_stepped_by_the_fused_kernel(one_of_four, dim, side):
    """As they are, in one call, and where a block of random words begins if rows of the whole begin with one."""
    zeros, cuts = torch.zeros(32, 64, dtype=torch.bfloat16), [Shard(dim), Replicate()]
    param = distribute_tensor(zeros, one_of_four, cuts, src_data_rank=None)
    sharding = Layout.of(param).sharding((32, 64), 0)
    calls, own = Mock(), param.to_local()
    grads, means, squares, bases, steps = ([torch.zeros(())] for _ in range(5))
    weights, moments = Weights([own], steps, [7]), Moments(means, squares)
    Sharded(calls, sharding).projected_adam_(weights, grads, moments, bases, Hyper(), side)
    ((name, (given, *_), _),) = calls.method_calls
    assert name == "projected_adam_" and given.params[0] is own and given.seeds == [7]
    assert given.window == sharding.window(tuple(own.shape)) and given.window.origin % 8 == 0


def assert_close_in_float32(ends, wanted):
    """Codes are cut from float64 sums rounded to float32, of which a scale may differ in the last bit, by 1e-7.

    A code would differ where a number lies within 1e-7 of the border between two, and then move weights by 1e-4.
    """
    torch.testing.assert_close(ends, wanted, rtol=1e-6, atol=1e-6)


def test_quantised_state_is_that_of_the_whole(results):
    """8-bit blocks are never cut, and the elements of shards are rounded by the random numbers of the whole tensor."""
    for world, meshes in sharded.QUANTISED.items():
        found = results[str(world)]["quantised"]
        assert set(found) >= {(mesh, name) for mesh in meshes for name in sharded.FIVE}
        for (_, name), end in found.items():
            assert_close_in_float32(end, quantised(name))
    assert ("rows", "tables") in results["2"]["quantised"] and ("rows", "tables") in results["3"]["quantised"]


@lru_cache
def quantised(name):
    return sharded.quantised_tables() if name == "tables" else sharded.quantised(name)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("kind", ["fsdp", "tensor"])
def test_gradients_of_shards_are_projected_within_backward(results, kind, early):
    """As in one process; what a step starts from is R of the shards, and whole gradients where bases are due."""
    ends, held = results["2"]["backward"][kind, early]
    assert_close(ends, sharded.in_backward(early)[0] if early else in_one_process())
    if kind == "fsdp":  # of six, four and two rows; R of the last two layers is of all rows
        assert max(held) == (62 if early else 122) and min(held) == 6 * 2 + 2 * 12 + 2 * 7 + 12


@pytest.mark.parametrize("side", sharded.LINEAR)
def test_linear_layers_over_tensor_parallelism_form_r_alone(results, side):
    """Rows and columns of W, on every side; whole gradients exist where a basis is due, as in one process."""
    ends, formed = results["2"]["backward"]["linear", side]
    wanted, whole = sharded.linear_in_backward(side)
    assert_close(ends, wanted)
    assert formed == whole < 2 * 14


def test_groups_of_shards_average_what_was_projected_within_backward(results):
    ends, _ = results["4"]["backward"]["replicas"]
    assert_close(ends, in_one_process())


@lru_cache
def in_one_process():
    model = sharded.mlp()
    opt = so.GaLore(model.named_parameters(), lr=0.02, rank=2, update_proj_gap=3)
    return sharded.accumulated(model, opt)[0]


@pytest.mark.parametrize("name", sharded.FIVE)
@pytest.mark.parametrize(("stage", "key"), [("2", "rows"), ("2", "columns"), ("3", "rows")])
def test_figures_of_shards_are_those_of_the_whole(results, stage, key, name):
    found, wanted = results[stage]["watched"][key][name], figures()[name]
    for one, other in zip(found, wanted, strict=True):
        for (key, a), b in zip(asdict(one).items(), asdict(other).values()):
            assert a == (pytest.approx(b, rel=1e-9) if isinstance(b, float) else b), f"{key} of {one.name}"
    assert {layer.skipped for layer in found if layer.name == "wide"} == {1}


@lru_cache
def figures():
    return sharded.watched()


@pytest.mark.parametrize("key", sharded.REPLICAS)
def test_groups_of_shards_that_average_r_step_as_torchs_hsdp(results, key):
    (wanted, _), (ends, _) = (results["4"]["replicas"][key, hooked] for hooked in (False, True))
    assert_close(ends, wanted)


def test_what_groups_of_shards_send_each_other(results):
    """R (6, 2) of six rows, R (2, 12) that the shards have summed, G (2, 7), which is less than R, twelve biases."""
    whole, ordinary = 8 * (6 * 8 + 4 * 12 + 2 * 7 + 12), 8 * (6 * 2 + 2 * 12 + 2 * 7 + 12)
    _, sent = results["4"]["replicas"]["std", True]
    assert sent[0] == (2 * whole, 2 * whole)  # the first bases need whole gradients; two micro-batches are sent
    assert sent[1] == (ordinary, whole)


def test_groups_of_shards_average_r_over_tensor_parallelism(results):
    """Weights are cut by both; R of a tensor that tensor parallelism cuts is summed over it before it is sent."""
    ends, sent, whole = results["4"]["replicas over tensors"]
    assert_close(ends, in_one_process())
    assert sent < whole


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_coded_messages_between_groups_of_shards(results, bits):
    """Error feedback: sixteen messages lose about what one does. float32; a code is off by half a step at most."""
    assert results["4"]["coded replicas"][bits] < (1e-5 if bits is None else 2 ** (1 - bits) / 8)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("native", r"ValueError: projected_allreduce: 0.weight lies on .*ranks \[2\].*mesh\['shards'\] alone"),
        ("everyone", r"ValueError: projected_allreduce: 0.weight lies on .*ranks \[1\] of it"),
        ("whole", "TypeError: projected_allreduce: no module of Sequential is sharded; call fully_shard first"),
        ("before", "ValueError: projected_allreduce: GaLore has none of the model's parameters; make it after"),
        ("unused", r"RuntimeError: .*FSDPSequential had no gradient .*set_reduce_scatter_unused_params\(True\)"),
    ],
)
def test_groups_of_shards_are_refused_with_the_mend(results, what, message):
    assert re.match(message, results["4"]["unlike replicas"][what])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("flat", "GaLore: FSDP1 has flattened every parameter.*fully_shard.*ZeroRedundancyOptimizer.*use_orig_params"),
        ("cut", "conv is cut along dimension 1 into 2 parts.*shard it along dimension 0"),
        ("linear", "linear=True: 0.weight is sharded by fully_shard, .* leave linear out"),
        ("copies", r"linear=True: 0.weight has the placements \(Replicate\(\),\); leave linear out"),
        ("average", r"average_gradients: 0.weight lies on .* holds ranks \[1\] of it"),
        ("blocks", "table is cut along its last dimension.*state_bits=8.*state_bits=32"),
        ("broken", "rows: the checkpoint's exp_avg is not finite; take an earlier checkpoint"),
    ],
)
def test_what_cannot_be_stepped_is_refused_with_the_mend(results, what, message):
    assert re.match(f"(ValueError|TypeError): {message}", results["2"]["refusals"][what])


def test_the_recipe_of_the_refusal_works(results):
    """ZeroRedundancyOptimizer leaves each rank half of the six tensors, whole, and no numbers change."""
    ends, held = results["2"]["zero"]
    model = sharded.mlp()
    assert held == 3
    assert_close(ends, sharded.fit(model, so.GaLore(model.parameters(), **sharded.ZERO), range(4)))
