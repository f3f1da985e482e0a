"""What an optimizer remembers: exactly its own bytes, all of it in the state dict, and bit for bit after a resume."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from training import ALL_METHODS, FIVE, GAP, RANK, assert_same, build, groups, net, noise, snapshot, train

import subspace_optim as so

SAVED, STOP = GAP + 1, 2 * GAP + 2  # every tensor is refreshed before the save and at least once after it
TYPES = (torch.float32, torch.bfloat16)
# One of each kind of state; the resume in a new process covers every method.
KINDS = ("galore", "galore_adafactor", "random_adam", "flora", "osd", "gradnormlorp", "official_gradnormlorp", "adamw")
KINDS += ("osd_4bit", "gradnormlorp_8bit")  # and of what is not kept in float32
CHECKPOINTS = pytest.mark.filterwarnings(
    # torch's checkpoint code: single process on purpose, and deprecations of its own.
    "ignore::UserWarning:torch.distributed.*",
    "ignore::FutureWarning:torch.distributed.*",
)
KEPT = {"age": torch.int64, "seed": torch.int64, "compensation": torch.bfloat16}
by_type = pytest.mark.parametrize("dtype", TYPES, ids=("float32", "bfloat16"))
by_method = pytest.mark.parametrize("method", ALL_METHODS, ids=str)
by_kind = pytest.mark.parametrize("method", [m for m in ALL_METHODS if str(m) in KINDS], ids=str)


def trained(method, dtype=torch.float32, steps=SAVED):
    params = net(dtype)
    opt = build(method, params)
    train(params, opt, range(steps))
    return params, opt


def twin_of(method, params):
    """Other parameters with the same values, and a fresh optimizer."""
    other = net(next(iter(params.values())).dtype)
    other.load_state_dict(params.state_dict())
    return other, build(method, other)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Checkpoints of every method and dtype, continued in one new process; and the runs that were not interrupted."""
    folder, straight = tmp_path_factory.mktemp("resume"), {}
    for method in ALL_METHODS:
        for dtype in TYPES:
            params, opt = trained(method, dtype)
            torch.save(
                {
                    "method": str(method),
                    "dtype": dtype,
                    "steps": list(range(SAVED, STOP)),
                    "weights": snapshot(params),
                    "optimizer": opt.state_dict(),
                },
                folder / f"{method}-{dtype}.ckpt",
            )
            train(params, opt, range(SAVED, STOP))
            straight[str(method), dtype] = snapshot(params)
    script = Path(__file__).with_name("resume.py")
    subprocess.run([sys.executable, str(script), str(folder)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return folder, straight


@by_type
@by_method
def test_a_new_process_continues_bit_for_bit(resumed, method, dtype):
    """D1, D4: through torch.save and the default torch.load, across a refresh of every tensor."""
    folder, straight = resumed
    assert_same(torch.load(folder / f"{method}-{dtype}.end"), straight[str(method), dtype])


@by_kind
def test_the_resume_test_can_fail(method):
    """The same continuation without the optimizer's state ends elsewhere."""
    params, opt = trained(method)
    other, fresh = twin_of(method, params)
    train(params, opt, range(SAVED, STOP))
    train(other, fresh, range(SAVED, STOP))
    assert any(not torch.equal(params[name], other[name]) for name in params)


@by_method
def test_state_dict_holds_tensors_ints_and_floats(method):
    """D1."""
    _, opt = trained(method)
    values = [value for state in opt.state_dict()["state"].values() for value in state.values()]
    assert len(values) > 0
    assert {type(value) for value in values} <= {torch.Tensor, int, float}


@CHECKPOINTS
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@by_type
@by_kind
def test_dcp_continues_bit_for_bit(tmp_path, method, dtype, flat):
    """D2, D3: saved with torch.distributed.checkpoint, loaded into a fresh optimizer, trained across a refresh."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    params, opt = trained(method, dtype)
    other, fresh = twin_of(method, params)
    dcp.save({"optimizer": get_optimizer_state_dict(params, opt, options=options)}, checkpoint_id=tmp_path)

    target = {"optimizer": get_optimizer_state_dict(other, fresh, options=options)}
    dcp.load(target, checkpoint_id=tmp_path)
    set_optimizer_state_dict(other, fresh, target["optimizer"], options=options)
    train(params, opt, range(SAVED, STOP))
    train(other, fresh, range(SAVED, STOP))
    assert_same(snapshot(other), snapshot(params))


@CHECKPOINTS
@by_method
def test_state_dict_before_the_first_step_changes_nothing(method):
    """D5: DCP allocates state by a step of zero gradients at lr 0."""
    params, other = net(), net()
    opt, untouched = build(method, params), build(method, other)
    get_optimizer_state_dict(params, opt)
    assert len(opt.state) == len(params)
    opt.load_state_dict(opt.state_dict())
    train(params, opt, range(STOP))
    train(other, untouched, range(STOP))
    assert_same(snapshot(params), snapshot(other))


@by_method
def test_float32_state_survives_the_load_into_bfloat16_parameters(method):
    """D13: torch's load_state_dict would cast it to the parameter's dtype."""
    params, opt = trained(method, torch.bfloat16)
    other, fresh = twin_of(method, params)
    fresh.load_state_dict(opt.state_dict())
    for name in params:
        saved, loaded = opt.state[params[name]], fresh.state[other[name]]
        assert saved.keys() == loaded.keys()
        for key, value in saved.items():
            if isinstance(value, torch.Tensor):
                assert loaded[key].dtype == value.dtype
                assert value.dtype == KEPT.get(key, (torch.float32, torch.uint8)[f"{key}_scale" in saved])
                assert torch.equal(loaded[key], value)
            else:
                assert type(loaded[key]) is type(value) and loaded[key] == value


@pytest.mark.parametrize("kind", [int, torch.float64, torch.int64], ids=str)
def test_step_counts_of_bases_that_were_ints_are_taken(kind):
    """As checkpoints had them before they moved to the device: an int, or int64 of a stack."""
    method = next(m for m in ALL_METHODS if str(m) == "osd")
    params, opt = trained(method)
    other, fresh = twin_of(method, params)
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        if "basis_step" in state:
            count = state["basis_step"]
            was = torch.int64 if kind is int else kind
            state["basis_step"] = int(count) if kind is int and count.ndim == 0 else count.to(was)
            assert count.dtype == torch.float32 and count.max() > 0
    fresh.load_state_dict(saved)
    train(params, opt, range(SAVED, STOP))
    train(other, fresh, range(SAVED, STOP))
    assert_same(snapshot(other), snapshot(params))
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(opt), tensors_of(fresh), strict=True))


def test_state_follows_the_parameters_into_another_precision():
    """A run in bfloat16 or float32 goes on in float64, whose state is float64."""
    for dtype in (torch.bfloat16, torch.float32):
        _, opt = trained(ALL_METHODS[0], dtype)
        wide = net(torch.float64)
        fresh = build(ALL_METHODS[0], wide)
        fresh.load_state_dict(opt.state_dict())
        assert {t.dtype for t in tensors_of(fresh) if t.is_floating_point()} == {torch.float64}
        train(wide, fresh, range(SAVED, STOP))


def tensors_of(opt):
    return [value for state in opt.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


@by_kind
def test_loaded_state_shares_no_memory_with_its_donor(method):
    params, opt = trained(method)
    other, fresh = twin_of(method, params)
    fresh.load_state_dict(opt.state_dict())
    before = [value.clone() for value in tensors_of(opt)]
    train(other, fresh, range(SAVED, STOP))
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(opt), before))
    assert not {t.data_ptr() for t in tensors_of(opt)} & {t.data_ptr() for t in tensors_of(fresh)}


@by_method
def test_every_state_tensor_holds_exactly_its_own_bytes(method):
    """D8: no view of a larger buffer, none shared; after refreshes and after a load."""
    params, opt = trained(method, steps=STOP)
    _, fresh = twin_of(method, params)
    fresh.load_state_dict(opt.state_dict())
    for owner in (opt, fresh):
        tensors = tensors_of(owner)
        assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors)
        assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
        assert owner.state_bytes() == sum(t.numel() * t.element_size() for t in tensors)


STEP_BYTES = 4
FLOATS = {
    "galore": lambda m, n, r: 2 * r * max(m, n) + r * min(m, n),
    "flora": lambda m, n, r: r * max(m, n) + m + n,
    "osd": lambda m, n, r: 2 * r * max(m, n) + 3 * r * min(m, n),
    "gradnormlorp": lambda m, n, r: 2 * r * max(m, n) + r * min(m, n) + 2 * m,
    "grams": lambda m, n, r: 2 * r * max(m, n) + r * min(m, n),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 64)], ids=str)
@pytest.mark.parametrize("name", FIVE)
def test_state_bytes_are_what_the_paper_says(name, shape, dtype):
    """D8, D19: 4(2rn + mr) bytes for GaLore, whatever the parameter's dtype; no copy of the weight anywhere."""
    param = torch.nn.Parameter(noise(0, shape).to(dtype))
    opt = FIVE[name]([param], lr=1e-3, rank=16, update_proj_gap=2)
    for step in range(4):
        param.grad = noise(1 + step, shape).to(dtype)
        opt.step()
    counts = 2 if name == "osd" else 1  # of the basis, too
    assert opt.state_bytes() == 4 * FLOATS[name](*shape, 16) + counts * STEP_BYTES


@by_type
@by_kind
def test_deepcopy_and_pickle_continue_alike(method, dtype):
    params, opt = trained(method, dtype)
    copied, opt_copied = copy.deepcopy((params, opt))
    pickled, opt_pickled = pickle.loads(pickle.dumps((params, opt)))
    train(params, opt, range(SAVED, STOP))
    for other, twin in ((copied, opt_copied), (pickled, opt_pickled)):
        assert all(other[name] is not params[name] for name in params)
        train(other, twin, range(SAVED, STOP))
        assert_same(snapshot(other), snapshot(params))
        assert repr(twin) == repr(opt)


@pytest.mark.parametrize("compat", [None, "official"])
@pytest.mark.parametrize("cls", FIVE.values(), ids=FIVE)
def test_a_copied_optimizer_starts_new_parameters_alike(cls, compat):
    """Seeds of parameters that come later survive a pickle too."""
    first, later = noise(0, (8, 6)).float(), noise(1, (8, 6)).float()
    ends = []
    for copied in (False, True):
        params = [torch.nn.Parameter(w.clone()) for w in (first, later)]
        opt = cls(params[:1], lr=0.1, rank=2, compat=compat)
        if copied:
            params, opt = pickle.loads(pickle.dumps((params, opt)))
        opt.add_param_group({"params": params[1:]})
        for step in range(3):
            for i, param in enumerate(params):
                param.grad = noise(10 * step + i, (8, 6)).float()
            opt.step()
        ends.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*ends))


def galore(params, **settings):
    return so.GaLore(groups(params), lr=0.05, **({"rank": RANK, "update_proj_gap": GAP} | settings))


def other_shape(params, opt):
    wrong = net()
    wrong["tall"] = torch.nn.Parameter(noise(0, (10, 7)).float())
    opt = galore(wrong)
    for param in wrong.values():
        param.grad = torch.ones_like(param)
    opt.step()
    return opt.state_dict()


def other_optimizer(params, opt):
    opt = so.OnlineSubspaceDescent(groups(params), rank=RANK)
    train(params, opt, range(1))
    return opt.state_dict()


def torch_adamw(params, opt):
    groups = [{"params": [p for name, p in params.items() if name != "experts"]}, {"params": [params["experts"]]}]
    opt = torch.optim.AdamW(groups)
    train(params, opt, range(1))
    return opt.state_dict()


def edited(change):
    def wrong(params, opt):
        state_dict = copy.deepcopy(opt.state_dict())
        change(state_dict["state"])
        return state_dict

    return wrong


def whole_file(params, opt):
    return {"model": {}, "optimizer": opt.state_dict()}


def of_json(params, opt):
    state_dict = opt.state_dict()
    return {**state_dict, "state": {str(number): state for number, state in state_dict["state"].items()}}


EDITS = {
    "last_tensor": lambda state: state[5].update(basis=torch.zeros(3, 5, 1)),
    "missing": lambda state: state[3].pop("exp_avg_sq"),
    "not_a_tensor": lambda state: state[0].update(exp_avg="zeros"),
    "not_an_int": lambda state: state[0].update(age="old"),
    "not_finite": lambda state: state[5]["exp_avg"][1, 0, 0].fill_(torch.nan),
}
WRONG = {
    "other_shape": (other_shape, "tall: .*exp_avg is a tensor of shape .10, 2., .*needs a tensor of shape .12, 2."),
    "other_optimizer": (other_optimizer, "conv: the checkpoint holds .*basis_exp_avg, .*but GaLore keeps "),
    "torch_adamw": (torch_adamw, "conv: the checkpoint holds exp_avg, .*but GaLore keeps age, .*that wrote it"),
    "last_tensor": (edited(EDITS["last_tensor"]), "experts: .*basis is .*3, 5, 1., .*needs .*3, 5, 2"),
    "missing": (edited(EDITS["missing"]), "vector: the checkpoint holds exp_avg, step, but GaLore keeps .*exp_avg_sq"),
    "not_a_tensor": (edited(EDITS["not_a_tensor"]), "conv: .*exp_avg is of type str, .*needs a tensor"),
    "whole_file": (whole_file, "a dict of 'state' and 'param_groups'; this holds model, optimizer"),
    "of_json": (of_json, "has state under '0', which is in none of its groups' params; .*make ints of them again"),
    "not_finite": (edited(EDITS["not_finite"]), "experts: the checkpoint's exp_avg is not finite; take an earlier"),
    "not_an_int": (edited(EDITS["not_an_int"]), "conv: .*age is of type str, .*needs of type int"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_checkpoint_is_refused_before_anything_changes(name):
    params = net()
    opt = galore(params)
    train(params, opt, range(SAVED))
    make, message = WRONG[name]
    wrong = make(net(), opt)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(wrong)
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i, state in before["state"].items():
        assert state.keys() == after["state"][i].keys()
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(after["state"][i][k])) for k, v in state.items())


ALIKE = {  # in keys and shapes
    "rule": (so.Lion(), so.Momentum(), "the rule Lion, whose state Momentum would misread"),
    "lr_inside": (so.Adafactor(), so.Adafactor(lr_inside=True), "lr_inside=False.*lr_inside=True"),
    "dense": (so.Adam(), so.Adafactor(), "vector: the checkpoint is of the dense_rule Adam,.* Adafactor"),
    "kind": (so.RandomProjection(2), so.RandomProjection(2, kind="gaussian"), "kind='orthonormal'.*kind='gaussian'"),
    "draws": (
        so.RandomProjection(2, kind="gaussian"),
        so.Flora(net().parameters(), rank=2, compat="official").projector,
        "the projector RandomProjection.kind='gaussian'., whose .*torch's generator would misread",
    ),
}


@pytest.mark.parametrize("part", ALIKE)
def test_state_that_would_be_misread_is_refused(part):
    """And taken where an older checkpoint does not tell."""
    theirs, ours, message = ALIKE[part]
    option = {"dense": "dense_rule", "kind": "projector", "draws": "projector"}.get(part, "rule")
    params = net(names=("vector",) if part == "dense" else ("tall", "vector"))
    opts = [
        so.SubspaceOptimizer(groups(params), **{"projector": so.SVD(rank=2), option: own}) for own in (theirs, ours)
    ]
    for opt in opts:
        train(params, opt, range(2))
    saved, before = opts[0].state_dict(), copy.deepcopy(opts[1].state_dict())
    with pytest.raises(ValueError, match=message):
        opts[1].load_state_dict(saved)
    for number, state in opts[1].state_dict()["state"].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(before["state"][number][k])) for k, v in state.items()
        )
    del saved["method"]
    opts[1].load_state_dict(saved)


def test_what_changes_no_meaning_loads():
    """A dense run does not read its rule, nor a new basis the one that was iterated otherwise."""
    params = net()
    opt = so.GaLore(groups(params), rank=RANK, rule=so.Adam())
    train(params, opt, range(1))
    so.GaLore(groups(net()), rank=RANK, compat="official").load_state_dict(opt.state_dict())
    opt = so.SubspaceOptimizer(groups(params), rule=so.Lion())
    train(params, opt, range(1))
    so.SubspaceOptimizer(groups(net()), rule=so.Momentum()).load_state_dict(opt.state_dict())


def test_a_checkpoint_with_other_groups_is_refused_in_torchs_words():
    params = net()
    opt = galore(params)
    lesser = galore(net(names=("tall", "wide", "experts")))
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        opt.load_state_dict(lesser.state_dict())


def test_a_run_that_has_removed_a_group_can_be_saved():
    """The state of what has left stays with the optimizer, should it come back."""
    params = net(names=("tall", "vector", "experts"))
    opt = galore(params)
    train(params, opt, range(2))
    removed = opt.param_groups.pop()
    before = {key: torch.as_tensor(value).clone() for key, value in opt.state[params["experts"]].items()}
    saved = opt.state_dict()
    assert list(saved["state"]) == [0, 1]
    fresh = galore(net(names=("tall", "vector")))
    fresh.load_state_dict(saved)
    opt.add_param_group(removed)
    assert all(torch.equal(torch.as_tensor(opt.state[params["experts"]][key]), value) for key, value in before.items())
    assert list(opt.state_dict()["state"]) == [0, 1, 2]


def test_groups_come_from_the_checkpoint():
    """As in torch: hyperparameters that were saved win, and state of another rank comes with its rank."""
    params = net()
    opt = galore(params, weight_decay=0.3)
    train(params, opt, range(SAVED))
    other = net()
    other.load_state_dict(params.state_dict())
    fresh = galore(other, rank=3, weight_decay=0.0)
    fresh.load_state_dict(opt.state_dict())
    assert [group["rank"] for group in fresh.param_groups] == [RANK, RANK]
    train(params, opt, range(SAVED, STOP))
    train(other, fresh, range(SAVED, STOP))
    assert_same(snapshot(other), snapshot(params))


def test_keys_that_an_older_checkpoint_lacks_take_the_constructors_values():
    params = net()
    opt = galore(params)
    train(params, opt, range(SAVED))
    saved = opt.state_dict()
    for group in saved["param_groups"]:
        del group["moments"]
    fresh = galore(net(), moments="keep")
    fresh.load_state_dict(saved)
    assert {group["moments"] for group in fresh.param_groups} == {"keep"}
