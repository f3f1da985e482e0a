"""Bad gradients, odd tensors, strange strides: defined behaviour, finite weights, nothing half done."""

import math

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
from subspace_optim.projectors import UNSET

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
    torch.set_float32_matmul_precision(precision)
    try:
        before = [place.fp32_precision for place in places]
        run(so.GaLore, [noise(0, (12, 7)).float()])
        assert [place.fp32_precision for place in places] == before
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert during == [["ieee", "ieee"]]


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


@pytest.mark.parametrize(("fault", "fresh"), [("sparse", True), ("sparse", False), ("rank", False)])
@by_name
def test_a_refused_step_changes_nothing(cls, fault, fresh):
    """What is wrong is in the last group; the first one must not have moved."""
    params = net(names=("tall", "vector", "experts"))
    opt = cls(groups(params), lr=0.1, rank=RANK)
    train(params, opt, range(0 if fresh else 2))
    set_gradients(params, 2)
    if fault == "sparse":
        params["experts"].grad = params["experts"].grad.to_sparse()
        error, message = TypeError, "experts has a torch.sparse_coo gradient; use a dense one"
    else:
        opt.param_groups[-1]["rank"] = 1
        error, message = ValueError, r"experts has state of shape .*rank=1"
    weights = snapshot(params)
    state = {param: {k: torch.as_tensor(v).clone() for k, v in kept.items()} for param, kept in opt.state.items()}
    with pytest.raises(error, match=message):
        opt.step()
    assert_same(snapshot(params), weights)
    assert set(opt.state) == set(state)
    for param, kept in state.items():
        assert all(torch.equal(torch.as_tensor(opt.state[param][k]), v) for k, v in kept.items())


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
