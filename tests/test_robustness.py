"""Bad gradients, odd tensors, strange strides: defined behaviour, finite weights, nothing half done."""

import copy
import math
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from cases import DENSE_METHODS, METHODS, OFFICIAL_METHODS, PROJ_TYPES
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
from subspace_optim import engine
from subspace_optim.engine import GRAD_LIMIT
from subspace_optim.projectors import UNSET, exact_products

NAN, INF = math.nan, math.inf
by_method = pytest.mark.parametrize("method", ALL_METHODS, ids=str)
by_projected = pytest.mark.parametrize("method", METHODS + OFFICIAL_METHODS, ids=str)
by_name = pytest.mark.parametrize("cls", FIVE.values(), ids=FIVE)


def finite(opt, params):
    tensors = [v for state in opt.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return all(bool(t.isfinite().all()) for t in [*params.values(), *tensors])


def one(cls, weight, **settings):
    """One matrix under one of the five."""
    param = torch.nn.Parameter(weight)
    return param, cls([("w", param)], **({"lr": 0.01, "rank": RANK} | settings))


def run(cls, gradients, shape=(12, 7), dtype=torch.float32, **settings):
    param, opt = one(cls, noise(0, shape).to(dtype), **settings)
    for grad in gradients:
        param.grad = grad.to(dtype)
        opt.step()
    return param, opt


# Gradients that say nothing


@pytest.mark.parametrize(
    ("when", "bad", "device"), [(0, NAN, False), (1, INF, False), (1, NAN, True), (GAP, -INF, False), (GAP, 1e20, True)]
)
@by_method
def test_a_bad_gradient_counts_as_none(method, when, bad, device, monkeypatch):
    """The weight and its state stay as they are, bit for bit; the others step; the run recovers at once.

    Only the basis grows older: its renewal comes when it would have come, wherever it is decided what is left alone.
    """
    monkeypatch.setattr(engine, "_waits", lambda peaks: device)
    ends = []
    for value in (bad, None):
        params = net()
        opt = build(method, params, backend="reference")  # a renewal may be decided by the host in one run alone
        for step in range(GAP + 3):
            set_gradients(params, step)
            if step == when and value is not None:
                params["tall"].grad[3, 2] = params["vector"].grad[1] = value
            elif step == when:
                params["tall"].grad = params["vector"].grad = None
            opt.step()
            if step == when and value is None:
                opt.allocate_state()
                if opt.state[params["tall"]].get("age", UNSET) != UNSET:
                    opt.state[params["tall"]]["age"] += 1
        ends.append(snapshot(params))
        assert opt.skipped_updates == (0 if value is None else 2)
    assert finite(opt, params)
    assert_same(*ends)


@pytest.mark.parametrize("bad", [0.0, 1e-30, NAN], ids=["zero", "tiny", "NaN"])
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("device", [False, True], ids=["host", "device"])
def test_a_gradient_that_says_nothing_teaches_no_basis(device, bits, bad, monkeypatch):
    """Nor its moments, their codes and their step count, whoever looks; those of the other matrix move."""
    monkeypatch.setattr(engine, "_waits", lambda peaks: device)
    params = [torch.nn.Parameter(noise(i, (12, 7)).float()) for i in range(2)]
    opt = so.OnlineSubspaceDescent(params, rank=RANK, basis_lr=0.1, state_bits=bits, basis_bits=bits)

    def learnt():
        found = [{k: v for k, v in opt.state[param].items() if k.startswith("basis")} for param in params]
        return copy.deepcopy(found)

    for step in range(4):
        for i, param in enumerate(params):
            param.grad = noise(10 * step + i, param.shape).float()
        if step == 3:
            params[0].grad.fill_(bad)
        before = learnt()
        opt.step()
    for old, new, moves in zip(before, learnt(), (False, True), strict=True):
        assert all(torch.equal(old[key], new[key]) != moves for key in old if "scale" not in key or not moves)
    assert [state["basis_step"] for state in learnt()] == [2, 3]
    assert finite(opt, net())


@by_method
def test_a_zero_gradient_on_step_one_only_decays(method):
    """D6, D7: no NaN, a defined step, and the basis waits for a gradient that says something."""
    params = net()
    opt, before = build(method, params), snapshot(params)
    group = opt.param_groups[0]
    for param in params.values():
        param.grad = torch.zeros_like(param)
    opt.step()
    for name, param in params.items():
        rule = opt.dense_rule if name == "vector" else opt.rule
        own = (-2, -1) if name == "experts" else tuple(range(param.ndim))  # each expert is a matrix of its own
        rms = before[name].square().mean(own, keepdim=True).sqrt()
        relative = rms if getattr(rule, "scale_parameter", False) else 1.0
        decay = 1 - relative * group["lr"] * group["weight_decay"]
        torch.testing.assert_close(param.detach(), before[name] * decay, rtol=1e-6, atol=0)
    assert finite(opt, params)


@pytest.mark.parametrize("zeros", [1, 5])
@by_method
def test_after_zero_gradients_the_first_real_step_is_of_the_usual_size(method, zeros):
    """D6: nothing is stuck; D5: nobody trains on an empty or identity basis.

    Of the usual size: Adam's bias correction makes a step after k zeros larger by at most √(1 + k/(1 - β₂ᵏ)…); a factor
    of 10 either way is far from the 1e-8 of a limiter that got stuck.
    """
    moved = []
    for quiet in (0, zeros):
        params = net()
        opt = build(method, params, weight_decay=0.0)
        for step in range(quiet + 1):
            set_gradients(params, 0)
            for param in params.values() if step < quiet else ():
                param.grad.zero_()
            before = snapshot(params)
            opt.step()
        moved.append({name: (params[name] - before[name]).norm().item() for name in params})
    for name, usual in moved[0].items():
        assert usual / 10 < moved[1][name] < usual * 10, name


def test_no_step_is_taken_on_an_unset_basis():
    """D5: the first gradient that is not zero sets the basis, whenever it comes."""
    gradients = [torch.zeros(12, 7)] * 3 + [noise(1, (12, 7))]
    late, opt = run(so.GaLore, gradients, svd="exact")
    basis = opt.state[late]["basis"]
    top = torch.linalg.svd(gradients[-1].float())[2][:RANK].mT
    torch.testing.assert_close((basis.mT @ top).abs(), torch.eye(RANK), rtol=0, atol=1e-5)  # fp32, up to sign
    assert opt.state[late]["step"] == 4


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-25, 1e10, GRAD_LIMIT / 10], ids=str)
@by_method
def test_any_size_of_gradient_leaves_finite_weights(method, size):
    params = net()
    opt = build(method, params)
    for step in range(2 * GAP):
        set_gradients(params, step)
        for param in params.values():
            param.grad.mul_(size)
        opt.step()
    assert opt.skipped_updates == 0
    assert finite(opt, params)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@by_name
def test_extreme_gradients_in_half_precision(cls, dtype):
    limits = torch.finfo(dtype)
    large = min(limits.max, GRAD_LIMIT / 2)
    gradients = [
        torch.full((12, 7), value, dtype=dtype) * noise(i, (12, 7)).sign().to(dtype)
        for i, value in enumerate((limits.tiny, large, limits.smallest_normal, 1.0, large))
    ]
    param, opt = run(cls, gradients, dtype=dtype, update_proj_gap=2)
    assert finite(opt, {"w": param})


@pytest.mark.parametrize("eps", [0.0, 1e-30])
@by_method
def test_no_eps_no_nan(method, eps):
    """Zero and vanishing gradients with ε = 0."""
    params = net()
    opt = build(method, params, eps=eps)
    for step in range(2 * GAP):
        set_gradients(params, step)
        for i, param in enumerate(params.values()):
            param.grad.mul_((0.0, 1e-25, 1e-12, 1.0)[(step + i) % 4])
            param.grad.view(-1)[0] = 0
        opt.step()
    assert finite(opt, params)


def test_adam_without_eps_is_adam_at_any_scale():
    """ε = 0: a gradient and its multiple give the same steps, down to where its square underflows."""
    ends = []
    for scale in (1.0, 2.0**-40):
        gradients = [noise(i, (12, 7)) * scale for i in range(1, 6)]
        ends.append(run(so.GaLore, gradients, eps=0.0, update_proj_gap=2)[0].detach())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)  # fp32 rounding through two refreshes


# Gradients of less than full rank, and factorisations that fail


@pytest.mark.parametrize("true_rank", [1, RANK, RANK + 1])
@by_projected
def test_rank_deficient_gradients(method, true_rank):
    params = net(names=("tall", "wide"))
    opt = build(method, params)
    for step in range(2 * GAP + 1):
        for i, param in enumerate(params.values()):
            m, n = param.shape
            param.grad = (noise(step + i, (m, true_rank)) @ noise(step + i + 50, (true_rank, n))).float()
        opt.step()
    assert finite(opt, params)


@pytest.mark.parametrize("svd", ["subspace", "exact"])
def test_a_basis_is_orthonormal_after_a_rank_deficient_refresh(svd):
    gradients = [torch.ones(12, 7) * (i + 1) for i in range(5)]
    param, opt = run(so.GaLore, gradients, svd=svd, rank=3, update_proj_gap=2, stagger=False)
    basis = opt.state[param]["basis"]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_refresh_multiplies_in_float32_whatever_the_process_allows(monkeypatch, precision, fails):
    """TF32 or bfloat16 products inside the refresh change the update by more than its size (rank-deficient layers)."""
    places = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    during = []
    whole = so.SVD.refresh_

    def refresh_(self, *arguments):
        during.append([place.fp32_precision for place in places])
        if fails:
            raise torch.linalg.LinAlgError
        return whole(self, *arguments)

    monkeypatch.setattr(so.SVD, "refresh_", refresh_)
    as_found = [place.fp32_precision for place in places]
    torch.set_float32_matmul_precision(precision)
    try:
        before = [place.fp32_precision for place in places]
        run(so.GaLore, [noise(0, (12, 7)).float()])
        assert [place.fp32_precision for place in places] == before
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
        for place, found in zip(places, as_found, strict=True):
            place.fp32_precision = found
    assert during == [["ieee", "ieee"]]


def test_refreshes_of_several_threads_leave_the_precision_as_it_was():
    """Of two optimizers: one is in a refresh while the other begins or ends one."""
    place = torch.backends.mkldnn.matmul
    found, place.fp32_precision = place.fp32_precision, "bf16"
    try:
        first, second = exact_products(), exact_products()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        during = place.fp32_precision
        second.__exit__(None, None, None)
        assert (during, place.fp32_precision) == ("ieee", "bf16")
    finally:
        place.fp32_precision = found


def test_opposite_gradients_span_the_same_subspace():
    """D15: nothing here depends on the sign of a singular vector."""
    grad = noise(1, (12, 7))
    ends = [run(so.GaLore, [grad, sign * grad, grad], update_proj_gap=1, lr=0.0)[1] for sign in (1, -1)]
    q, p = (next(iter(opt.state.values()))["basis"] for opt in ends)
    torch.testing.assert_close(q @ q.mT, p @ p.mT, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("svd", "broken"), [("subspace", "eigh"), ("subspace", "qr"), ("exact", "svd")])
@pytest.mark.parametrize("when", [0, 2])
def test_a_failed_factorisation_is_deferred(monkeypatch, svd, broken, when):
    """GaLore#26: never raised; the step is taken on the basis at hand, and the next one tries again."""
    param, opt = one(so.GaLore, noise(0, (12, 7)).float(), svd=svd, update_proj_gap=2, stagger=False)

    def step(i):
        param.grad = noise(i + 1, (12, 7)).float()
        before = param.detach().clone(), opt.state[param]["basis"].clone() if opt.state[param] else torch.zeros(7, RANK)
        opt.step()
        return before, (param.detach().clone(), opt.state[param]["basis"].clone())

    for i in range(when):
        step(i)
    with monkeypatch.context() as patch:

        def fail(*args, **kwargs):
            raise torch.linalg.LinAlgError("did not converge")

        patch.setattr(torch.linalg, broken, fail)
        (weight, basis), (stepped, kept) = step(when)
    assert torch.equal(kept, basis)
    assert torch.equal(stepped, weight) == (when == 0)  # without a basis there is no step
    (_, basis), (_, renewed) = step(when + 1)
    assert not torch.equal(renewed, basis)
    assert finite(opt, {"w": param})


# Tensors that come and go


@by_projected
def test_rank_larger_than_the_matrix_is_dense(method):
    """And so is a rank of exactly min(m, n): there is nothing to save."""
    params = net(names=("tall", "wide", "vector"))
    opt = build(method, params, rank=7)
    assert opt.summary().count("rank 7 ≥ min(") == 2
    train(params, opt, range(3))
    assert finite(opt, params)
    assert all(opt.state[p]["exp_avg"].shape == p.shape for p in params.values() if "exp_avg" in opt.state[p])


@by_method
def test_a_rank_on_vectors_and_scalars_is_no_error(method):
    """D10: flat parameters (FSDP1, DeepSpeed) and 0-d ones."""
    params = [torch.nn.Parameter(noise(i, shape).float()) for i, shape in enumerate([(9,), (), (1,)])]
    opt = method.optimizer(params, **(method.settings | ({} if method in DENSE_METHODS else {"rank": RANK})))
    for param in params:
        param.grad = torch.ones_like(param)
    before = [p.detach().clone() for p in params]
    opt.step()
    assert all(not torch.equal(p, b) for p, b in zip(params, before))


@by_name
def test_empty_tensors(cls):
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in [(0,), (0, 4), (4, 0), (0, 2, 3)]]
    weight = torch.nn.Parameter(noise(0, (8, 6)).float())
    opt = cls([*params, weight], lr=0.1, rank=2)
    for param in (*params, weight):
        param.grad = torch.ones_like(param)
    opt.step()
    opt.load_state_dict(opt.state_dict())
    opt.step()
    assert opt.skipped_updates == 0
    assert "it is empty" in opt.summary()
    assert not torch.equal(weight, noise(0, (8, 6)).float())


@by_method
def test_steps_without_a_gradient_do_not_count(method):
    """An expert without tokens: as if those steps had not been taken with it."""
    params, other = net(), net()
    opt, straight = build(method, params), build(method, other)
    for step in range(GAP + 3):
        set_gradients(params, step)
        if step % 2:
            params["tall"].grad = params["conv"].grad = None
        opt.step()
    for step in range(0, GAP + 3, 2):
        set_gradients(other, step)
        straight.step()
    for name in ("tall", "conv"):
        assert torch.equal(params[name], other[name])


@by_name
def test_frozen_parameters_stay(cls):
    params = net()
    params["tall"].requires_grad_(False)
    opt = cls(groups(params), lr=0.1, rank=RANK, weight_decay=0.1)
    before = snapshot(params)
    for name, param in params.items():
        param.grad = torch.ones_like(param) if name != "tall" else None
    opt.step()
    changed = {name for name in params if not torch.equal(params[name], before[name])}
    assert changed == set(params) - {"tall"}
    assert params["tall"] not in opt.state
    assert "frozen" in opt.summary()


@by_method
def test_a_parameter_added_later_steps_as_one_from_the_start(method):
    """Seeds follow the position, so only the step at which it joined differs."""
    params, other = net(names=("tall", "wide")), net(names=("tall", "wide"))
    straight = build(method, other)
    opt = build(method, params)
    late = torch.nn.Parameter(noise(9, (10, 6)).float())
    train(params, opt, range(3))
    opt.add_param_group({"params": [("late", late)]})
    for step in range(3, 6):
        set_gradients(params, step)
        late.grad = noise(step, (10, 6)).float()
        opt.step()
    train(other, straight, range(6))
    assert_same(snapshot(params), snapshot(other))
    assert not torch.equal(late, noise(9, (10, 6)).float())
    assert opt.state[late]["step"] == 3


# Strides


def channels_last(x):
    """Convolutions channels-last, matrices transposed."""
    if x.ndim == 4:
        return x.to(memory_format=torch.channels_last)
    return x.mT.contiguous().mT if x.ndim >= 2 else strided(x)


def strided(x):
    wide = x.new_zeros(*x.shape, 2)
    wide[..., 0] = x
    return wide[..., 0]


@pytest.mark.parametrize(("layout", "dtype"), [(channels_last, torch.float32), (strided, torch.bfloat16)])
@by_method
def test_strides_of_parameters_and_gradients_do_not_matter(method, layout, dtype):
    """Same weights as with contiguous tensors; p.data_ptr(), strides and p.grad stay as they are."""
    straight = net(dtype)
    params = torch.nn.ParameterDict({name: torch.nn.Parameter(layout(p.data)) for name, p in straight.items()})
    assert not all(p.is_contiguous() for p in params.values())
    opt, usual = build(method, params), build(method, straight)
    where = [(p.data_ptr(), p.stride()) for p in params.values()]
    for step in range(GAP + 2):
        set_gradients(params, step)
        for param in params.values():
            param.grad = layout(param.grad)
        grads = {name: (p.grad, p.grad.clone()) for name, p in params.items()}
        opt.step()
        assert all(params[name].grad is grad and torch.equal(grad, kept) for name, (grad, kept) in grads.items())
    train(straight, usual, range(GAP + 2))
    assert where == [(p.data_ptr(), p.stride()) for p in params.values()]
    # The same sums in another order: fp32 rounding; in bf16 that may flip a rounding, one unit in the last place.
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-6}
    for name in params:
        torch.testing.assert_close(params[name], straight[name], **tolerance)


@by_method
def test_expanded_gradients(method):
    """A gradient of one element seen many times, as sum().backward() gives."""
    ends = []
    for expanded in (True, False):
        params = net()
        opt = build(method, params)
        for step in range(3):
            for param in params.values():
                grad = torch.tensor(0.5 + step).expand(param.shape)
                param.grad = grad if expanded else grad.clone()
            opt.step()
        ends.append(snapshot(params))
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-5, atol=1e-6)


@by_method
def test_gradients_are_never_written_and_parameters_never_moved(method):
    """D19, for contiguous tensors, across a refresh."""
    params = net()
    opt = build(method, params)
    where = [p.data_ptr() for p in params.values()]
    for step in range(GAP + 2):
        set_gradients(params, step)
        grads = {name: (p.grad, p.grad.clone()) for name, p in params.items()}
        opt.step()
        assert all(params[name].grad is grad and torch.equal(grad, kept) for name, (grad, kept) in grads.items())
    assert where == [p.data_ptr() for p in params.values()]


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (6, 3, 2, 2)], ids=str)
@by_name
def test_every_side_of_every_shape(cls, shape, proj_type):
    """D9, D21: also for convolutions, which are stepped as out × rest, to the bit, and refreshed."""
    gradients = [noise(i + 1, shape) for i in range(5)]
    settings = {"proj_type": proj_type, "update_proj_gap": 2} if cls is not so.Grams else {}
    param, opt = run(cls, gradients, shape, **settings)
    flat = [g.reshape(shape[0], -1) for g in gradients]
    matrix, other = one(cls, noise(0, shape).float().reshape(shape[0], -1), **settings)
    for grad in flat:
        matrix.grad = grad.float()
        other.step()
    assert torch.equal(param.reshape(shape[0], -1), matrix)
    assert not torch.equal(param, noise(0, shape).float())
    assert finite(opt, {"w": param})


# Nothing by halves


FAULTS = {
    "sparse": (TypeError, "experts has a torch.sparse_coo gradient; use a dense one"),
    "complex": (TypeError, "experts has a gradient of torch.complex64; optimizable are"),
    "rank": (ValueError, r"experts has exp_avg of shape .*rank=1"),
}


@pytest.mark.parametrize(
    ("fault", "fresh"), [(f, fresh) for f in FAULTS for fresh in (True, False) if (f, fresh) != ("rank", True)]
)
@by_name
def test_a_refused_step_changes_nothing(cls, fault, fresh):
    """What is wrong is in the last group; the first one must not have moved."""
    params = net(names=("tall", "vector", "experts"))
    opt = cls(groups(params), lr=0.1, rank=RANK)
    train(params, opt, range(0 if fresh else 2))
    set_gradients(params, 2)
    wrong = params["experts"]
    if fault == "sparse":
        wrong.grad = wrong.grad.to_sparse()
    elif fault == "complex":
        wrong.grad, wrong.grad_dtype = None, torch.complex64
        wrong.grad = torch.ones_like(wrong, dtype=torch.complex64)
    else:
        opt.param_groups[-1]["rank"] = 1
    error, message = FAULTS[fault]
    weights = snapshot(params)
    state = {param: {k: torch.as_tensor(v).clone() for k, v in kept.items()} for param, kept in opt.state.items()}
    with pytest.raises(error, match=message):
        opt.step()
    assert_same(snapshot(params), weights)
    assert set(opt.state) == set(state)
    for param, kept in state.items():
        assert all(torch.equal(torch.as_tensor(opt.state[param][k]), v) for k, v in kept.items())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("lr", NAN), ("lr", INF), ("lr", -0.1), ("lr", "fast"), ("lr", torch.tensor(NAN)), ("betas", (1.0, 1.0))],
        *[("betas", (0.9,)), ("eps", -1.0), ("weight_decay", NAN), ("update_proj_gap", "10"), ("scale", NAN)],
        *[("transform", "gram"), ("moments", "rotated"), ("rounding", "up"), ("proj_type", "both"), ("state_bits", 7)],
    ],
    ids=str,
)
@by_name
def test_an_option_that_went_wrong_on_the_way_is_refused_before_anything_changes(cls, key, value):
    """By a schedule, or by hand: a learning rate of NaN would cost the run."""
    params = net(names=("tall", "vector", "experts"))
    opt = cls(groups(params), lr=0.1, rank=RANK)
    train(params, opt, range(1))
    weights = snapshot(params)
    right, opt.param_groups[-1][key] = opt.param_groups[-1][key], value
    with pytest.raises(ValueError, match=f"group 1: {key}=.* must be "):
        train(params, opt, range(1, 2))
    assert_same(snapshot(params), weights)
    opt.param_groups[-1][key] = right
    train(params, opt, range(1, 2))
    assert all((state["step"] == 2).all() for state in opt.state.values())


@pytest.mark.parametrize("key", ["lr", "scale", "rank"])
def test_an_option_that_is_gone_is_missed_before_anything_changes(key):
    """The constructor's value in its place might be another one than the run has had."""
    params = net(names=("tall", "vector", "experts"))
    opt = so.GaLore(groups(params), lr=0.1, rank=RANK)
    weights = snapshot(params)
    del opt.param_groups[-1][key]
    with pytest.raises(ValueError, match=f"GaLore: group 1 has no {key} any more; .* set it again"):
        train(params, opt, range(1))
    assert_same(snapshot(params), weights)


def test_a_schedule_that_ends_a_rounding_below_zero_goes_on():
    params = net(names=("tall",))
    opt = so.GaLore(groups(params), lr=0.1, rank=RANK)
    schedule = torch.optim.lr_scheduler.LinearLR(opt, start_factor=0.1, end_factor=0.0, total_iters=10)
    for step in range(12):
        train(params, opt, [step])
        schedule.step()
    assert -1e-15 < opt.param_groups[0]["lr"] < 0


@pytest.mark.parametrize("shape", [(12, 9), (12, 20), (14, 7), (84,)], ids=str)
@by_name
def test_a_weight_of_another_shape_is_refused_before_anything_changes(cls, shape):
    """`p.data = ...` keeps the parameter and its state; of (12, 9) the moments would even fit."""
    params = net(names=("twin", "tall"))
    opt = cls([{"params": [(name, params[name])]} for name in ("twin", "tall")], lr=0.1, rank=RANK)
    train(params, opt, range(2))
    params["tall"].grad = None
    params["tall"].data = noise(1, shape).float()
    params["tall"].grad = params["tall"].data.clone()
    params["twin"].grad = noise(2, (12, 7)).float()
    weights = snapshot(params)
    with pytest.raises(ValueError, match=r"tall has exp_avg|tall has basis|tall has exp_avg_sq_col"):
        opt.step()
    assert_same(snapshot(params), weights)


class Interrupt:
    """A Ctrl-C when a given line of the package is reached; counts lines otherwise."""

    def __init__(self, at):
        self.at, self.lines = at, 0

    def __call__(self, frame, event, argument):
        if "subspace_optim" not in frame.f_code.co_filename:
            return None
        self.lines += event == "line"
        if event == "line" and self.lines == self.at:
            raise KeyboardInterrupt
        return self

    def during(self, call):
        """Whether there was none: how often a line is reached depends on what has been cached."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            call()
        except KeyboardInterrupt:
            return False
        finally:
            sys.settrace(before)
        return True


@pytest.mark.parametrize(("started", "bits"), [(False, 32), (True, 8)])
@by_name
def test_ctrl_c_within_a_step_costs_no_more_than_the_step(cls, started, bits):
    """At any line of ours: the run goes on from the weights and the state as they are."""

    def before_a_step():
        params = net(torch.bfloat16, names=("tall", "conv", "vector", "experts"))
        opt = cls(groups(params), lr=0.01, rank=RANK, update_proj_gap=2, stagger=False, state_bits=bits)
        train(params, opt, range(2 * started))
        set_gradients(params, 2)
        return params, opt

    whole, interrupted = Interrupt(0), 0
    assert whole.during(before_a_step()[1].step)
    for at in range(1, whole.lines, whole.lines // 8):
        params, opt = before_a_step()
        interrupted += not Interrupt(at).during(opt.step)
        before = snapshot(params)
        train(params, opt, range(3, 5))
        assert finite(opt, params)
        # Two steps of about lr an element; a half-taken one before them makes them larger by less than √10.
        moved = max(float((params[name].detach() - before[name]).abs().max()) for name in params)
        assert 1e-4 < moved < 2 * 0.01 * 10
    assert interrupted


def test_ctrl_c_in_a_refresh_leaves_the_precision_as_it_was():
    """One that outlived it would change the products of a later step, and with them what a resume ends at."""
    place = torch.backends.mkldnn.matmul
    found, place.fp32_precision = place.fp32_precision, "bf16"

    def refresh():
        with exact_products():
            assert place.fp32_precision == "ieee"

    try:
        left = []
        while not Interrupt(1 + len(left)).during(refresh):
            left.append(place.fp32_precision)
        assert len(left) > 10
        assert set(left) == {"bf16"}
    finally:
        place.fp32_precision = found


@pytest.mark.parametrize("bits", [32, 8])
def test_ctrl_c_between_two_moments_makes_no_step_larger(bits):
    """An M that has seen a gradient which V has not would step by their ratio: here by 600 times lr."""

    def before_a_step():
        params = net(names=("tall",))
        opt = so.SubspaceOptimizer(params.values(), lr=0.01, state_bits=bits, backend="reference")
        params["tall"].grad = torch.ones(12, 7)
        return params["tall"], opt

    whole = Interrupt(0)
    assert whole.during(before_a_step()[1].step)
    for at in range(1, whole.lines, 1 if bits == 32 else 5):  # to code a moment takes many lines
        param, opt = before_a_step()
        Interrupt(at).during(opt.step)
        before = param.detach().clone()
        param.grad = torch.full((12, 7), 1e-3)
        opt.step()
        assert (param.detach() - before).abs().max() < 2 * 0.01, f"line {at}"


def test_ctrl_c_within_a_load_leaves_state_that_can_be_stepped():
    """Torch's own load casts moments to the dtype of the parameters; nobody may ever meet those."""

    def trained():
        params = net(torch.bfloat16)
        opt = so.GaLore(groups(params), lr=0.01, rank=RANK)
        train(params, opt, range(2))
        return params, opt

    saved = trained()[1].state_dict()
    _, opt = trained()
    whole = Interrupt(0)
    assert whole.during(partial(opt.load_state_dict, saved))
    interrupted = 0
    for at in range(1, whole.lines, whole.lines // 30):
        params, opt = trained()
        interrupted += not Interrupt(at).during(partial(opt.load_state_dict, saved))
        train(params, opt, range(2, 3))
        kept = [t.dtype for state in opt.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        assert set(kept) == {torch.float32, torch.int64}  # the latter: how old the bases of the experts are
    assert interrupted


# Tensors that change under the optimizer


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@by_method
def test_a_model_that_is_cast_in_the_middle_goes_on(method, dtype):
    """`model.to(dtype)` keeps the parameters; float64 ones take float64 state along, and bring it back."""
    params = net()
    opt = build(method, params, rounding="nearest")  # with kahan, what is kept depends on the dtype: see test_storage
    train(params, opt, range(GAP))
    steps = opt.state[params["tall"]]["step"].clone()
    for there in (dtype, torch.float32):
        params.to(there)
        train(params, opt, range(GAP, GAP + 2))
        assert finite(opt, params)
        for param in params.values():
            wide = torch.float64 if there == torch.float64 else torch.float32
            assert opt.state[param]["step"].dtype == wide
    assert opt.state[params["tall"]]["step"] == steps + 4


def test_state_that_is_cast_is_the_same_state():
    """To float64 and back between two steps is no step at all."""
    ends = []
    for cast in (False, True):
        params = net()
        opt = so.GaLore(groups(params), lr=0.1, rank=RANK, update_proj_gap=2)
        train(params, opt, range(2))
        before = snapshot(params)
        if cast:
            params.double()
        for param in params.values():
            param.grad = torch.full_like(param, NAN)  # looked at, and not stepped; the bases grow older
        opt.step()
        assert {state["step"].dtype for state in opt.state.values()} == {torch.float64 if cast else torch.float32}
        params.float()
        assert_same(snapshot(params), before)
        train(params, opt, range(2, 5))
        ends.append(snapshot(params))
    assert_same(*ends)


def test_parameters_may_be_appended_to_a_group():
    """As to any list; of a group with names they have none."""
    params = net(names=("tall", "vector"))
    opt = so.GaLore(groups(params), lr=0.1, rank=RANK)
    train(params, opt, range(1))
    late = torch.nn.Parameter(torch.zeros(4))
    opt.param_groups[0]["params"].append(late)
    late.grad = torch.ones(4)
    opt.step()
    torch.testing.assert_close(late.detach(), torch.full((4,), -0.1))
    opt.load_state_dict(opt.state_dict())
    assert "parameter 2 of shape (4,)" in opt.summary()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@by_name
def test_the_default_dtype_does_not_matter(cls, dtype):
    ends = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            params = net()
            opt = cls(groups(params), lr=0.1, rank=RANK, update_proj_gap=GAP)
            train(params, opt, range(GAP + 2))
            opt.load_state_dict(opt.state_dict())
            train(params, opt, range(2))
        finally:
            torch.set_default_dtype(torch.float32)
        ends.append(snapshot(params))
    assert_same(*ends)


MODES = {"autocast": partial(torch.autocast, "cpu", torch.bfloat16), "inference_mode": torch.inference_mode}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@by_name
def test_the_mode_of_the_caller_does_not_matter(cls, backend, mode):
    """A loop that lies in autocast as a whole; state that is made, or loaded, in inference mode."""
    ends = []
    for inside in (nullcontext, mode):
        params = net(names=("tall", "vector", "experts"))
        opt = cls(groups(params), lr=0.1, rank=RANK, backend=backend)
        for step in range(2):
            set_gradients(params, step)
            with inside():
                opt.clip_grad_norm_(1.0)
                opt.step()
            opt.zero_grad()
        twin = cls(groups(params), lr=0.1, rank=RANK, backend=backend)
        with inside():
            twin.load_state_dict(opt.state_dict())
        train(params, twin, range(2, 4))
        ends.append(snapshot(params))
    assert_same(*ends)


@by_method
def test_the_default_device_does_not_matter(method):
    """Of a script that says torch.set_default_device("cuda"); meta finds every tensor that would go there."""
    ends = []
    for default in ("cpu", "meta"):
        params = net()
        opt = build(method, params)
        for step in range(GAP + 2):
            set_gradients(params, step)
            with torch.device(default):
                opt.clip_grad_norm_(10.0)
                opt.step()
                opt.load_state_dict(opt.state_dict())
        ends.append(snapshot(params))
    assert_same(*ends)


@by_name
def test_quantised_weights_may_lie_beside_what_is_trained(cls):
    """Frozen, as under QLoRA; `model.parameters()` holds them all."""
    params = net(names=("tall", "vector"))
    frozen = [torch.nn.Parameter(torch.ones(8, 6).to(d), requires_grad=False) for d in (torch.uint8, torch.float8_e5m2)]
    opt = cls([*params.values(), *frozen], lr=0.1, rank=RANK)
    train(params, opt, range(2))
    opt.load_state_dict(opt.state_dict())
    assert len(opt.state) == 2
    assert "2      parameter 2 of shape (8, 6), …  frozen" in opt.summary()
    params["tall"].data = params["tall"].data.to(torch.complex64)
    params["tall"].grad = torch.ones_like(params["tall"])
    with pytest.raises(TypeError, match=r"parameter 0 .* is torch.complex64; optimizable are "):
        opt.step()


@by_method
def test_lr_zero_moves_nothing(method):
    """The first step of a warm-up: weights stay to the bit, moments move."""
    params = net()
    opt, before = build(method, params, lr=0.0), snapshot(params)
    train(params, opt, range(3))
    if "gradnormlorp" in str(method):  # it rebuilds a row from its length and direction
        for name in params:
            torch.testing.assert_close(params[name].detach(), before[name], rtol=1e-5, atol=1e-6)
    else:
        assert_same(snapshot(params), before)
    assert all((state["step"] == 3).all() for state in opt.state.values())
