"""What torch, its schedulers and its users expect of any optimizer."""

import copy
import inspect
import io
import math
import warnings
from collections import UserList
from fractions import Fraction

import numpy
import pytest
import torch
from cases import METHODS, PROJECTED
from torch._dynamo.testing import CompileCounter
from torch.optim import lr_scheduler
from training import (
    ALL_METHODS,
    FIVE,
    GAP,
    RANK,
    assert_same,
    build,
    groups,
    net,
    noise,
    set_gradients,
    snapshot,
    train,
)

import subspace_optim as so
from subspace_optim.hyperparameters import ALIASES, KEYS

by_method = pytest.mark.parametrize("method", ALL_METHODS, ids=str)
by_name = pytest.mark.parametrize("cls", FIVE.values(), ids=FIVE)


def weight(shape=(12, 7), seed=0):
    return torch.nn.Parameter(noise(seed, shape).float())


# Without a rank


def adamw_pair(**settings):
    ours, theirs = net(), net()
    opt = so.GaLore(groups(ours), rank=None, **copy.deepcopy(settings))
    return (ours, opt), (theirs, torch.optim.AdamW(theirs.values(), **settings))


def assert_within_rounding(ours, theirs, steps):
    """A step rounds each weight (of size about 1) a few times: 1e-7 each, growing no faster than their number."""
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-7 * steps**0.5 + 1e-6)


@pytest.mark.parametrize(
    "settings", [{}, {"weight_decay": 0.1}, {"lr": 0.1, "betas": (0.5, 0.7), "eps": 1e-3}], ids=str
)
def test_without_a_rank_it_is_torchs_adamw(settings):
    """D11: decay comes before the update and is not scaled by it."""
    (ours, opt), (theirs, adamw) = adamw_pair(**{"lr": 1e-2, "weight_decay": 0.0} | settings)
    for step in range(300):
        train(ours, opt, [step])
        train(theirs, adamw, [step])
    assert_within_rounding(ours, theirs, 300)


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
def test_without_a_rank_it_is_torchs_adamw_under_a_schedule(tensor_lr):
    lr = torch.tensor(1e-2) if tensor_lr else 1e-2
    pairs = adamw_pair(lr=lr, weight_decay=0.1)
    schedules = [lr_scheduler.OneCycleLR(opt, max_lr=0.05, total_steps=200) for _, opt in pairs]
    for step in range(200):
        for (params, opt), schedule in zip(pairs, schedules):
            train(params, opt, [step])
            schedule.step()
    assert_within_rounding(pairs[0][0], pairs[1][0], 200)


def test_the_comparison_with_adamw_can_fail():
    """Decay after the update, as the official code has it, is told apart."""
    (ours, _), (theirs, adamw) = adamw_pair(lr=1e-2, weight_decay=0.1)
    opt = so.GaLore(groups(ours), lr=1e-2, weight_decay=0.1, rank=None, compat="official", eps=1e-8)
    train(ours, opt, range(5))
    train(theirs, adamw, range(5))
    with pytest.raises(AssertionError):
        assert_within_rounding(ours, theirs, 5)


def test_a_checkpoint_of_torchs_adamw_continues_under_rank_none():
    (ours, opt), (theirs, adamw) = adamw_pair(lr=1e-2, weight_decay=0.1)
    opt = so.SubspaceOptimizer(ours.values(), lr=1e-2, weight_decay=0.1)
    train(theirs, adamw, range(10))
    ours.load_state_dict(theirs.state_dict())
    opt.load_state_dict(adamw.state_dict())
    train(ours, opt, range(10, 20))
    train(theirs, adamw, range(10, 20))
    assert_within_rounding(ours, theirs, 10)


# Schedulers

SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda step: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [2, 4]),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, total_iters=3),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, total_iters=4),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.8),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, total_iters=4),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 4),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 2),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.001, 0.1, step_size_up=2),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=8),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.9)], [2]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.9)]
    ),
}
# torch's SequentialLR calls step(0) of its parts, which is deprecated in torch itself.
SEQUENTIAL = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")


def test_every_scheduler_of_torch_is_in_the_table():
    classes = {
        name
        for name, cls in vars(lr_scheduler).items()
        if inspect.isclass(cls) and issubclass(cls, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert classes - {"LRScheduler"} == set(SCHEDULERS)


@SEQUENTIAL
@pytest.mark.parametrize("name", SCHEDULERS)
@by_name
def test_every_scheduler_with_float_and_tensor_lr(cls, name):
    """The rates are those that torch's AdamW is given, and a tensor steps as the float it holds."""
    ends, rates = [], []
    for kind in ("torch", "float", "tensor"):
        params = net(names=("tall", "vector"))
        lr = torch.tensor(0.05, dtype=torch.float64) if kind == "tensor" else 0.05
        settings = {"lr": lr, "weight_decay": 0.1}
        opt = (
            torch.optim.AdamW(params.values(), **settings)
            if kind == "torch"
            else cls(groups(params), rank=RANK, **settings)
        )
        schedule = SCHEDULERS[name](opt)
        seen = []
        for step in range(6):
            train(params, opt, [step])
            seen.append(float(opt.param_groups[0]["lr"]))
            schedule.step(1.0) if name == "ReduceLROnPlateau" else schedule.step()
        assert isinstance(opt.param_groups[0]["lr"], torch.Tensor) == (kind == "tensor")
        ends.append(snapshot(params))
        rates.append(seen)
    assert rates[1] == rates[0]
    assert rates[2] == pytest.approx(rates[0])
    for key in ends[1]:
        torch.testing.assert_close(ends[1][key], ends[2][key], rtol=1e-5, atol=1e-6)  # rates differ by rounding
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ends[1]["tall"], noise(list(net()).index("tall"), (12, 7)).float())


@by_name
def test_a_rate_may_be_a_tensor_of_one_element_in_any_shape(cls):
    ends = []
    for shape in ((), (1,), (1, 1)):
        params = net()
        opt = cls(groups(params), lr=torch.full(shape, 0.05), rank=RANK, backend="reference")
        train(params, opt, range(2))
        ends.append(snapshot(params))
    assert_same(ends[0], ends[1])
    assert_same(ends[0], ends[2])


@by_method
def test_the_lr_of_a_step_is_the_groups_lr(method):
    """Setting the group's lr by hand is what every loop may do; a scheduler does no more."""
    ends = []
    for lrs in ((0.05, 0.02), (0.05, 0.05)):
        params = net()
        opt = build(method, params, lr=lrs[0])
        train(params, opt, [0])
        for group in opt.param_groups:
            group["lr"] = lrs[1]
        train(params, opt, [1])
        ends.append(snapshot(params))
    assert all(not torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# step, closure, zero_grad


@by_method
def test_closures_get_gradients_and_run_once(method):
    """D17."""
    params, other = net(names=("tall", "vector")), net(names=("tall", "vector"))
    opt, straight = build(method, params), build(method, other)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = sum((param**2).sum() for param in params.values())
        loss.backward()
        return loss

    for _ in range(2):
        loss = opt.step(closure)
        straight.zero_grad()
        expected = sum((param**2).sum() for param in other.values())
        expected.backward()
        straight.step()
        assert loss == expected
    assert calls == [True, True]
    assert_same(snapshot(params), snapshot(other))


def test_closures_get_gradients_under_no_grad_and_leave_the_mode_alone():
    param = weight()
    opt = so.GaLore([param], rank=RANK)

    def closure():
        loss = param.sum()
        loss.backward()
        return loss

    with torch.no_grad():
        opt.step(closure)
        assert not torch.is_grad_enabled()
    assert param.grad is not None


def test_a_compiled_step_is_no_graph_for_every_number_it_branches_on():
    """And what a closure calls stays compiled."""
    graphs = CompileCounter()
    params, other = net(names=("tall", "vector")), net(names=("tall", "vector"))
    opt, straight = (so.GaLore(groups(p), lr=0.1, rank=RANK, update_proj_gap=2) for p in (params, other))
    step = torch.compile(opt.step, backend=graphs)
    for i in range(4):
        set_gradients(params, i)
        step()
    train(other, straight, range(4))
    assert_same(snapshot(params), snapshot(other))
    assert graphs.frame_count == 0

    loss = torch.compile(lambda: (params["tall"] ** 2).sum(), backend=graphs)
    opt.step(lambda: loss().backward())
    assert graphs.frame_count == 1


def test_step_without_closure_returns_none():
    param = weight()
    opt = so.GaLore([param], rank=RANK)
    assert opt.step() is None
    assert not opt.state


@by_name
def test_zero_grad(cls):
    """D18."""
    param = weight()
    opt = cls([param], rank=RANK)
    param.grad = torch.ones_like(param)
    held = param.grad
    opt.zero_grad(set_to_none=False)
    assert param.grad is held and not held.any()
    opt.zero_grad()
    assert param.grad is None


# Groups and parameters


@pytest.mark.parametrize("form", ["generator", "list", "tensor_in_group", "groups", "named", "named_groups"])
@by_name
def test_parameters_come_in_every_form_that_torch_takes(cls, form):
    """D18."""
    params = [weight(), weight((9,), 1)]
    named = list(zip(("a", "b"), params))
    given = {
        "generator": (p for p in params),
        "list": params,
        "tensor_in_group": [{"params": p} for p in params],
        "groups": [{"params": params[:1]}, {"params": iter(params[1:]), "lr": 0.5}],
        "named": iter(named),
        "named_groups": [{"params": named[:1]}, {"params": named[1:]}],
    }[form]
    opt = cls(given, lr=0.1, rank=RANK)
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    assert len(opt.state) == 2
    assert not torch.equal(params[0], weight()) and not torch.equal(params[1], weight((9,), 1))
    if form.startswith("named"):
        assert [name for group in opt.param_groups for name in group["param_names"]] == ["a", "b"]
        assert "a" in opt.summary()


def test_a_single_tensor_is_refused_in_torchs_words():
    with pytest.raises(TypeError, match="params argument given to the optimizer should be an iterable"):
        so.GaLore(weight(), rank=RANK)


def test_an_empty_list_is_refused_in_torchs_words():
    with pytest.raises(ValueError, match="empty parameter list"):
        so.GaLore([], rank=RANK)


def test_add_param_group_leaves_the_given_dict_and_the_other_groups_alone():
    opt = so.GaLore([weight()], lr=0.1, rank=RANK)
    given = {"params": [weight((5, 8), 1)], "lr": 0.5, "alpha": 2.0}
    opt.add_param_group(given)
    assert list(given) == ["params", "lr", "alpha"]
    first, second = opt.param_groups
    assert (first["lr"], first["scale"], second["lr"], second["scale"]) == (0.1, 0.25, 0.5, 2.0)
    assert set(first) == set(second)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("lr", 0.5), ("betas", (0.5, 0.6)), ("eps", 0.5), ("weight_decay", 0.5), ("rank", 3), ("scale", 2.0)],
        *[("update_proj_gap", 1), ("proj_type", "left"), ("transform", "grams"), ("moments", "keep")],
    ],
)
def test_a_group_key_is_the_constructors_key(key, value):
    """D16: nothing that a group says is silently ignored."""
    ends = []
    for in_group, in_constructor in (({key: value}, {}), ({}, {key: value}), ({}, {})):
        params = net(names=("tall",))
        usual = {"lr": 0.1, "rank": RANK, "update_proj_gap": 2}
        opt = so.GaLore(
            [{"params": list(params.values()), "rank": RANK} | in_group], **usual | in_constructor, stagger=False
        )
        if key == "rank":
            opt.param_groups[0]["rank"] = value if in_group or in_constructor else RANK
        train(params, opt, range(6))
        ends.append(params["tall"])
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_every_own_key_is_in_every_group():
    """torchtitan and DCP need every key of a group in the checkpoint."""
    for cls in FIVE.values():
        opt = cls([{"params": [weight()]}, {"params": [weight((9,), 1)], "rank": None}])
        assert all(set(KEYS) <= set(group) for group in opt.param_groups)
        opt.load_state_dict(opt.state_dict())
        assert {frozenset(group) for group in opt.param_groups} == {frozenset((*KEYS, "params"))}


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases(alias):
    value = {"scale": 0.5, "proj_type": "left", "update_proj_gap": 7, "rank": 0.5}[ALIASES[alias]]
    opt = so.GaLore([{"params": [weight()], alias: value}], rank=RANK)
    assert opt.param_groups[0][ALIASES[alias]] == value
    assert alias not in opt.param_groups[0]


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.Adam])
def test_the_groups_of_torchs_optimizers_are_groups(cls):
    theirs = cls([weight()], lr=0.5)
    opt = so.GaLore(theirs.param_groups, rank=RANK)
    assert opt.param_groups[0]["lr"] == 0.5 and opt.param_groups[0]["rank"] == RANK
    so.GaLore([weight()], **{key: value for key, value in theirs.defaults.items() if key != "params"}, rank=RANK)


def test_weight_decay_as_a_penalty_is_refused():
    """As torch's Adam has it, unlike its AdamW."""
    theirs = torch.optim.Adam([weight()], weight_decay=0.1)
    message = "decoupled_weight_decay=False must be True"
    with pytest.raises(ValueError, match=message):
        so.GaLore(theirs.param_groups, rank=RANK)
    with pytest.raises(ValueError, match=message):
        so.SubspaceOptimizer([weight()]).load_state_dict(theirs.state_dict())


def test_keys_of_frameworks_pass():
    foreign = {
        "fused": None,
        "foreach": False,
        "initial_lr": 0.1,
        "dim": 2,
        "names": ["w"],
        "lr_scale": 1.0,
        "name": "decoder",
        "peft_type": "lora",
        "is_expert_group": False,
        "capturable": False,
    }
    opt = so.GaLore([{"params": [weight()]} | foreign], rank=RANK)
    assert foreign.items() <= opt.param_groups[0].items()


# Errors

MISSPELT = {
    "rnak": "rank",
    "ranks": "rank",
    "update_proj_gaps": "update_proj_gap",
    "update_project_gap": "update_proj_gap",
    "proj_typ": "proj_type",
    "projtype": "proj_type",
    "weight_decy": "weight_decay",
    "weightdecay": "weight_decay",
    "beta": "betas",
    "scales": "scale",
    "transfrom": "transform",
}


@pytest.mark.parametrize("wrong", MISSPELT)
def test_a_misspelt_key_names_the_right_one(wrong):
    message = f"{wrong}'.* did you mean '{MISSPELT[wrong]}'"
    with pytest.raises(ValueError, match=message):
        so.GaLore([{"params": [weight()], wrong: 1}])
    with pytest.raises((ValueError, TypeError), match=message):
        so.GaLore([weight()], **{wrong: 1})


def test_two_names_of_one_option_are_refused():
    with pytest.raises(ValueError, match="'alpha' and 'scale' are two names of one option; keep 'scale'"):
        so.GaLore([{"params": [weight()], "scale": 1.0, "alpha": 2.0}], rank=RANK)


BAD_VALUES = {
    "lr": [-1.0, float("nan"), float("inf"), "fast", None, torch.ones(2), torch.tensor(1j)],
    "betas": [(0.9,), (0.9, 1.0), (-0.1, 0.9), 0.9, "no"],
    "eps": [-1e-8, float("nan"), "tiny"],
    "weight_decay": [-0.1, float("inf"), "none"],
    "rank": [0, -1, 1.5, 0.0, float("nan"), "16", True],
    "update_proj_gap": [0, -5, 2.5, "10", 2**63],
    "scale": [0.0, -1.0, float("nan")],
    "proj_type": ["both", "", None],
    "transform": ["gram", None],
    "moments": ["rotated", None],
    "batch_dims": [-1, 0.5],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in BAD_VALUES.items() for v in values], ids=str)
def test_a_bad_value_names_the_option_the_value_and_the_mend(key, value):
    opt = so.GaLore([("w", weight())], rank=RANK)
    for make in (
        lambda: so.GaLore([weight()], **{key: value}),
        lambda: so.GaLore([{"params": [weight()], key: value}]),
        lambda: opt.add_param_group({"params": [("v", weight((4, 5), 2))], key: value}),
    ):
        with pytest.raises(ValueError, match=r"GaLore: .*must be ") as caught:
            make()
        assert f"{key}={value!r}" in str(caught.value)
    assert len(opt.param_groups) == 1


BAD_PARTS = {
    "projector='svd' must be a projector, such as": lambda p: so.SubspaceOptimizer(p, "svd"),
    "must be a projector, such as SVD.rank=128.": lambda p: so.SubspaceOptimizer(p, so.SVD),
    "rule=<class .*Lion'> must be a rule, such as Adam..": lambda p: so.GaLore(p, rule=so.Lion),
    "dense_rule='adam' must be a rule": lambda p: so.GaLore(p, dense_rule="adam"),
    "seed=None must be an int": lambda p: so.GaLore(p, seed=None),
    "seed=0.5 must be an int": lambda p: so.Flora(p, seed=0.5),
    "stagger='no' must be True or False": lambda p: so.GaLore(p, stagger="no"),
    "method='exakt' must be one of subspace, exact": lambda p: so.GaLore(p, svd="exakt"),
    "iterations=0 must be an int ≥ 1": lambda p: so.SubspaceOptimizer(p, so.SVD(iterations=0)),
    "kind='normal' must be one of orthonormal, gaussian, rademacher": lambda p: so.Flora(p, kind="normal"),
    "basis_lr=-0.1 must be a finite number ≥ 0": lambda p: so.OnlineSubspaceDescent(p, basis_lr=-0.1),
    "basis_betas=0.9 must be two numbers": lambda p: so.SubspaceOptimizer(p, so.OnlinePCA(basis_betas=0.9)),
    "retract_every=0 must be an int ≥ 1 or None": lambda p: so.SubspaceOptimizer(p, so.OnlinePCA(retract_every=0)),
    "decay_rate=-0.8 must be a number in": lambda p: so.Flora(p, decay_rate=-0.8),
    "clip_threshold=0 must be a number > 0": lambda p: so.SubspaceOptimizer(p, None, so.Adafactor(clip_threshold=0)),
    "proj='rnd' must be one of random, svd": lambda p: so.APOLLO(p, proj="rnd"),
    "scale_type='row' must be one of channel, tensor": lambda p: so.APOLLO(p, scale_type="row"),
    "growth=0 must be a number > 0 or None": lambda p: so.APOLLO(p, growth=0),
    "max_norm=None must be one number > 0": lambda p: so.GaLore(p).clip_grad_norm_(None),
}


@pytest.mark.parametrize("message", BAD_PARTS)
def test_a_bad_part_names_the_option_the_value_and_the_mend(message):
    with pytest.raises((ValueError, TypeError), match=message):
        BAD_PARTS[message]([weight()])


BAD_PARAMS = {
    "float8": (
        lambda: parameter_of(torch.float8_e4m3fn),
        TypeError,
        "is torch.float8_e4m3fn; optimizable are torch.fl",
    ),
    "complex": (lambda: parameter_of(torch.complex64), TypeError, "is torch.complex64; optimizable are torch.float32"),
    "sparse": (
        lambda: torch.zeros(3, 4).to_sparse().requires_grad_(),
        TypeError,
        "is torch.sparse_coo; .* dense tensors",
    ),
    "expanded": (
        lambda: torch.zeros(1, 4).expand(3, 4).requires_grad_(),
        ValueError,
        "is expanded, so that its elements share memory; give clone.. of it",
    ),
    "lazy": (lambda: torch.nn.LazyLinear(4).weight, ValueError, "has no shape yet; run its lazy module once before"),
    "non_leaf": (lambda: weight() * 2, ValueError, "is a non-leaf Tensor.*give the parameter itself"),
    "not_a_tensor": (lambda: "weights", TypeError, "is a str; give tensors"),
    "taken": (lambda: SHARED, ValueError, "of shape .12, 7. is first as well; a tensor may appear once"),
}
SHARED = weight()


def parameter_of(dtype):
    return torch.nn.Parameter(torch.zeros(3, 4).to(dtype))


@pytest.mark.parametrize("name", BAD_PARAMS)
def test_a_bad_parameter_is_named(name):
    make, error, message = BAD_PARAMS[name]
    opt = so.GaLore([("first", SHARED)], rank=RANK)
    with pytest.raises(error, match=f"group 1: second .*{message}"):
        opt.add_param_group({"params": [("good", weight()), ("second", make())]})
    assert len(opt.param_groups) == 1
    if name != "taken":
        with pytest.raises(error, match=f"group 0: parameter 1 .*{message}"):
            so.GaLore([weight(), make()], rank=RANK)


def test_a_sparse_gradient_is_named_where_it_is_clipped():
    opt = so.GaLore([("w", weight())], rank=RANK)
    opt.param_groups[0]["params"][0].grad = torch.zeros(12, 7).to_sparse()
    with pytest.raises(TypeError, match=r"w has a torch.sparse_coo gradient; use a dense one \(sparse=False\)"):
        opt.clip_grad_norm_(1.0)


def test_a_bad_group_is_refused():
    opt = so.GaLore([weight()], rank=RANK)
    for wrong in ([weight()], {"lr": 1.0}):
        with pytest.raises(TypeError, match="must be a dict with the key 'params'"):
            opt.add_param_group(wrong)
    with pytest.raises(ValueError, match="group 0: rank=4 needs a projector, and this optimizer has none"):
        so.SubspaceOptimizer([{"params": [weight()], "rank": 4}])
    with pytest.raises(TypeError, match="ordered collections"):
        opt.add_param_group({"params": {weight()}})


@pytest.mark.parametrize("cls", [*FIVE.values(), so.SubspaceOptimizer])
def test_a_backend_that_does_not_exist_is_refused(cls):
    for wrong in ("metal", ["native"]):
        with pytest.raises(ValueError, match=r"backend=.* must be one of auto, cuda, .*reference"):
            cls([weight()], backend=wrong)


@by_name
def test_compat_takes_only_official(cls):
    with pytest.raises(ValueError, match="compat='offical' must be None or 'official'"):
        cls([weight()], compat="offical")


def test_no_schedule_drives_the_basis_faster_than_its_rate():
    """CyclicLR begins at its lowest rate, which a peak that is 1000 times as high would multiply."""
    bases = []
    for begun_at in (0.1, 1e-4):
        params = net(names=("tall",))
        opt = so.OnlineSubspaceDescent(params.values(), lr=0.1, rank=RANK)
        opt.param_groups[0]["initial_lr"] = begun_at
        train(params, opt, range(4))
        bases.append(opt.state[params["tall"]]["basis"])
    assert torch.equal(*bases)


def test_numpy_numbers_are_numbers():
    """And leave none of their own in a checkpoint, which the default torch.load would refuse."""
    options = {"rank": numpy.int64(2), "lr": numpy.float32(0.1), "betas": (numpy.float64(0.5), numpy.float32(0.5))}
    params = net(names=("tall",))
    opt = so.GaLore(params.values(), **options, weight_decay=numpy.float16(0), scale=Fraction(1, 4))
    for lambda_lr in (lambda _: numpy.float64(0.5), lambda _: numpy.float32(0.5)):
        schedule = lr_scheduler.LambdaLR(opt, lambda_lr)
        train(params, opt, range(2))
        schedule.step()
        assert isinstance(opt.param_groups[0]["lr"], numpy.floating)
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        opt.load_state_dict(torch.load(file))
        assert type(opt.param_groups[0]["lr"]) is type(opt.param_groups[0]["scale"]) is float


@pytest.mark.parametrize("wrong", [None, [], "checkpoint.pt"])
def test_what_is_no_state_dict_is_refused(wrong):
    opt = so.GaLore([weight()], rank=RANK)
    with pytest.raises(TypeError, match=f"load_state_dict needs what state_dict.. .*, not {type(wrong).__name__}"):
        opt.load_state_dict(wrong)


def test_a_list_of_hydras_is_a_list():
    """OmegaConf's is a sequence and no list, and the default torch.load would refuse it."""
    opt = so.GaLore([{"params": [weight()], "betas": UserList([0.5, 0.9])}], betas=UserList([0.8, 0.9]), rank=RANK)
    assert opt.defaults["betas"] == (0.8, 0.9)
    assert opt.state_dict()["param_groups"][0]["betas"] == (0.5, 0.9)


def test_a_group_of_a_checkpoint_is_checked_as_any_other():
    params = net(names=("tall", "vector"))
    opt = so.GaLore(groups(params), rank=RANK)
    train(params, opt, range(1))
    saved = opt.state_dict()
    for key, value in (("lr", math.nan), ("rank", -3), ("update_proj_gap", "ten"), ("transform", "gram")):
        wrong = copy.deepcopy(saved)
        wrong["param_groups"][0][key] = value
        with pytest.raises(ValueError, match=f"group 0 of the checkpoint: {key}={value!r} must be "):
            opt.load_state_dict(wrong)
    assert opt.state_dict()["param_groups"] == saved["param_groups"]


@pytest.mark.parametrize("split", [False, True])
def test_a_checkpoint_in_another_order_is_refused_where_names_tell(split):
    """Torch goes by the order: the state of two equal matrices would change places without a word."""
    params = net(names=("tall", "twin"))

    def optimizer(*names):
        named = [(name, params[name]) for name in names]
        return so.GaLore([{"params": [pair]} for pair in named] if split else named, rank=RANK)

    opt = optimizer("tall", "twin")
    train(params, opt, range(1))
    other = optimizer("twin", "tall")
    with pytest.raises(ValueError, match="the checkpoint has tall in the place of twin; give the parameters in the "):
        other.load_state_dict(opt.state_dict())
    assert not other.state
    renamed = so.GaLore([(f"module.{name}", params[name]) for name in ("tall", "twin")], rank=RANK)
    if not split:
        renamed.load_state_dict(opt.state_dict())  # a wrapper's prefix says nothing of the order


# Hooks


def test_state_dict_hooks_run_before_and_after_in_torchs_order():
    params = net(names=("tall", "vector"))
    opt = so.GaLore(groups(params), rank=RANK)
    train(params, opt, range(2))
    seen = []

    def saved(opt, state_dict):
        seen.append("saved")
        return {**state_dict, "extra": 1}

    opt.register_state_dict_pre_hook(lambda opt: seen.append("saving"))
    opt.register_state_dict_post_hook(saved)
    state_dict = opt.state_dict()
    assert seen == ["saving", "saved"] and state_dict["extra"] == 1

    fresh = so.GaLore(groups(net(names=("tall", "vector"))), rank=RANK)

    def loading(opt, state_dict):
        """A hook may replace what is loaded."""
        seen.append("loading")
        changed = copy.deepcopy(state_dict)
        for state in changed["state"].values():
            state["step"] += 7
        return changed

    def loaded(opt):
        seen.append({int(state["step"]) for state in opt.state.values()})

    fresh.register_load_state_dict_pre_hook(loading)
    fresh.register_load_state_dict_post_hook(loaded)
    fresh.load_state_dict(state_dict)
    assert seen == ["saving", "saved", "loading", {9}]
    assert len(fresh._optimizer_load_state_dict_pre_hooks) == len(fresh._optimizer_load_state_dict_post_hooks) == 1


def test_the_engines_own_hooks_are_gone_after_a_refused_load():
    params = net(names=("tall",))
    opt = so.GaLore(groups(params), rank=RANK)
    train(params, opt, range(1))
    wrong = opt.state_dict()
    wrong["state"] = {0: {"exp_avg": torch.zeros(3)}}
    with pytest.raises(ValueError):
        opt.load_state_dict(wrong)
    assert not opt._optimizer_load_state_dict_pre_hooks and not opt._optimizer_load_state_dict_post_hooks


@by_name
def test_step_hooks(cls):
    param = weight()
    opt = cls([param], lr=0.1, rank=RANK)
    param.grad = torch.ones_like(param)
    seen = []
    opt.register_step_pre_hook(lambda opt, args, kwargs: seen.append(param.detach().clone()))
    opt.register_step_post_hook(lambda opt, args, kwargs: seen.append(param.detach().clone()))
    opt.step()
    assert torch.equal(seen[0], weight()) and torch.equal(seen[1], param)
    assert not torch.equal(*seen)


@by_name
def test_overridden_methods_keep_torchs_signatures(cls):
    """DCP passes state_dict by keyword (a crash of dion's)."""
    for name, method in inspect.getmembers(torch.optim.Optimizer, inspect.isfunction):
        own = inspect.signature(getattr(cls, name))
        if name == "__init__" or getattr(cls, name) is method:
            continue
        theirs = inspect.signature(method)
        assert [(p.name, p.kind) for p in own.parameters.values()] == [
            (p.name, p.kind) for p in theirs.parameters.values()
        ], name


def test_constructors_begin_as_torchs_adamw_does():
    """lr, betas, eps, weight_decay may be given by position."""
    positional = ["params", "lr", "betas", "eps", "weight_decay"]
    assert list(inspect.signature(torch.optim.AdamW).parameters)[:5] == positional
    for cls in FIVE.values():
        assert list(inspect.signature(cls).parameters)[:5] == positional


@by_name
def test_grad_scaler(cls):
    """Scaled gradients step as plain ones; an overflow skips the step and lowers the scale."""
    params, other = net(names=("tall", "vector")), net(names=("tall", "vector"))
    opt, straight = (cls(groups(p), lr=0.1, rank=RANK) for p in (params, other))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        set_gradients(params, step)
        set_gradients(other, step)
        scaler.scale(torch.zeros(()))  # makes the scale, as scaling a loss does
        for param in params.values():
            param.grad.mul_(scaler.get_scale())
        if step == 1:
            params["tall"].grad[0, 0] = torch.inf
        else:
            straight.step()
        scaler.step(opt)
        scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert opt.skipped_updates == 0
    assert_same(snapshot(params), snapshot(other))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_nothing_warns(method):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params = net()
        opt = build(method, params)
        schedule = lr_scheduler.CosineAnnealingLR(opt, 4)
        for step in range(GAP + 1):
            train(params, opt, [step])
            schedule.step()
        opt.load_state_dict(opt.state_dict())
        repr(opt)


def test_projected_settings_are_read_per_group():
    """Two groups of one optimizer, each with its own rank, gap and scale, are two optimizers."""
    settings = [PROJECTED | {"rank": 2}, PROJECTED | {"rank": 3, "update_proj_gap": 2, "scale": 2.0, "lr": 0.01}]
    together = [weight((12, 7), 0), weight((9, 5), 1)]
    alone = [weight((12, 7), 0), weight((9, 5), 1)]
    common = {"stagger": False, "svd": "exact"}  # what else differs is the seed of the start of an iteration
    opt = so.GaLore([{"params": [p]} | s for p, s in zip(together, settings)], **common)
    apart = [so.GaLore([p], **s, **common) for p, s in zip(alone, settings)]
    for step in range(6):
        for i, param in enumerate((*together, *alone)):
            param.grad = noise(step * 10 + i % 2, tuple(param.shape)).float()
        opt.step()
        for one in apart:
            one.step()
    assert all(torch.equal(a, b) for a, b in zip(together, alone))


@pytest.mark.parametrize("cls", [so.GaLore, so.GradNormLoRP])
def test_a_compiled_training_step_is_the_eager_one(cls):
    """torch.compile over backward, clipping and step, across refreshes; and over opt.step alone."""
    ends = []
    for compiled in (False, True):
        model = torch.nn.Sequential(torch.nn.Linear(7, 12), torch.nn.Tanh(), torch.nn.Linear(12, 5))
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(noise(i, p.shape).float() / 4)
        opt = cls(model.parameters(), rank=RANK, update_proj_gap=2, lr=1e-2)

        def whole(x, model=model, opt=opt):
            model(x).square().mean().backward()
            opt.clip_grad_norm_(0.1)
            opt.step()
            opt.zero_grad()

        run, step = whole, opt.step
        if compiled:
            run, step = (torch.compile(f, backend="aot_eager") for f in (whole, opt.step))
        for i in range(3):
            run(noise(i, (4, 7)).float())
        model(noise(9, (4, 7)).float()).square().mean().backward()
        step()
        ends.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends))
