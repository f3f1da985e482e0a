"""Looking at a run: the figures are those of the definition, and looking changes nothing."""

import copy
import math

import pytest
import torch
from cases import METHODS
from training import ALL_METHODS, GAP, RANK, SHAPES, assert_same, build, net, noise, set_gradients, snapshot, train

import subspace_optim as so
from subspace_optim import monitor

MATRICES = ("tall", "twin", "wide", "conv", "experts[0]", "experts[1]", "experts[2]")


def method(name):
    return next(m for m in ALL_METHODS if m.id == name)


def figures(opt):
    return {row.name: row for row in opt.report()}


def share(grad, basis, side):
    """‖G Q‖²/‖G‖² on an orthonormal basis of the span, by the definition."""
    q = torch.linalg.qr(basis)[0]
    low = q.mT @ grad if side == "left" else grad @ q
    return float((low.norm() / grad.norm()) ** 2)


@pytest.mark.parametrize("case", ALL_METHODS, ids=str)
def test_looking_changes_nothing(case):
    """Weights and state bit for bit, under every rule and projector, across refreshes."""
    plain, watched = net(), net()
    a, b = build(case, plain), build(case, watched)
    b.watch(every=2)
    for params, opt in ((plain, a), (watched, b)):
        train(params, opt, range(2 * GAP + 1))
    assert_same(snapshot(plain), snapshot(watched))
    assert a.state_dict()["param_groups"] == b.state_dict()["param_groups"]
    for key, state in a.state_dict()["state"].items():
        other = b.state_dict()["state"][key]
        assert state.keys() == other.keys()
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(other[k])) for k, v in state.items())


@pytest.mark.parametrize("case", METHODS, ids=str)
def test_every_projected_matrix_has_its_figures(case):
    params = net()
    opt = build(case, params)
    opt.watch(every=1)
    train(params, opt, range(GAP + 2))
    rows = figures(opt)
    assert set(rows) == {*MATRICES, "vector"}
    for name in MATRICES:
        row = rows[name]
        assert row.side in ("left", "right") and row.rank == RANK and row.step == GAP + 2
        assert 0 < row.captured <= 1 and 0 < row.captured_ema <= 1
        assert row.update_ratio > 0 and row.skipped == 0
        assert row.overlap is None or 0 <= row.overlap <= 1
    assert rows["vector"].captured is None and rows["vector"].update_ratio > 0 and rows["vector"].refreshes == 0


@pytest.mark.parametrize("name", ["galore", "osd", "gaussian_adam"])
def test_captured_energy_and_update_ratio_are_those_of_the_definition(name):
    """The bases of the last two are not orthonormal."""
    params = net(torch.float64, ["tall", "twin", "wide", "vector"])
    opt = build(method(name), params)
    opt.watch(every=1)
    plans = {key: so.types.make_plan(SHAPES[key], torch.float64, torch.device("cpu"), RANK) for key in ("tall", "wide")}

    def bases():
        return {key: opt.projector.bases(plan, [opt.state[params[key]]])[0][0].clone() for key, plan in plans.items()}

    means = {}
    train(params, opt, [0])
    for step in range(1, 2 * GAP):
        before, old = snapshot(params), bases()
        means |= {key: figures(opt)[key].captured_ema for key in plans}
        set_gradients(params, step)
        opt.step()
        rows = figures(opt)
        for key, basis in (old if name == "osd" else bases()).items():  # online, a basis moves after the step
            expected = share(params[key].grad, basis, plans[key].side)
            assert rows[key].captured == pytest.approx(expected, rel=1e-5)  # 1e-6 keeps a root of QᵀQ
            assert rows[key].captured_ema == pytest.approx(0.9 * means[key] + 0.1 * rows[key].captured)
        for key, row in rows.items():
            moved = (params[key].detach() - before[key]).norm() / before[key].norm()
            assert row.update_ratio == pytest.approx(float(moved), rel=1e-9)


def test_a_gradient_inside_the_subspace_is_captured_whole_and_one_outside_not_at_all():
    param = torch.nn.Parameter(noise(0, (12, 7)))
    opt = so.GaLore([("w", param)], lr=0.1, rank=2)
    opt.watch(every=1)
    param.grad = noise(1, (12, 2)) @ noise(2, (2, 7))
    opt.step()
    assert figures(opt)["w"].captured == pytest.approx(1, abs=1e-5)
    q = opt.state[param]["basis"]
    outside = noise(3, (12, 7))
    param.grad = outside - outside @ q @ q.mT
    opt.step()
    assert figures(opt)["w"].captured == pytest.approx(0, abs=1e-9)
    param.grad = torch.zeros_like(param)
    opt.step()
    assert figures(opt)["w"].captured is None and figures(opt)["w"].captured_ema == pytest.approx(0.9, abs=1e-5)


@pytest.mark.parametrize("name", ["galore", "flora", "galore_exact"])
def test_refreshes_are_counted_timed_and_compared(name):
    """Of every step, looked at or not: `every` is larger than the run."""
    params = net(torch.float64)
    opt = build(method(name), params, stagger=False)
    opt.watch(every=1000)
    bases = []
    plan = so.types.make_plan((12, 7), torch.float64, torch.device("cpu"), RANK)
    for step in range(2 * GAP + 1):
        train(params, opt, [step])
        bases.append(opt.projector.bases(plan, [opt.state[params["tall"]]])[0][0].clone())
    row = figures(opt)["tall"]
    first = 0 if name == "flora" else 1  # a random basis is in force from the start
    assert row.refreshes == 2 + first and row.refresh_seconds > 0
    old = next(basis for basis in reversed(bases) if not torch.equal(basis, bases[-1]))
    assert row.overlap == pytest.approx(float((old.mT @ bases[-1]).square().sum()) / RANK, rel=1e-6)
    assert row.step == 1  # the only look


def test_a_refresh_that_fails_is_not_counted(monkeypatch):
    params = net(names=["tall"])
    opt = build(method("galore"), params, stagger=False)
    opt.watch(every=1)
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", lambda _: (_ for _ in ()).throw(torch.linalg.LinAlgError("no")))
        train(params, opt, [0])
    row = figures(opt)["tall"]
    assert row.refreshes == 0 and row.captured == 0 and row.update_ratio > 0  # no basis yet: only decay moves it
    train(params, opt, [1])
    assert figures(opt)["tall"].refreshes == 1 and figures(opt)["tall"].captured > 0


def test_skipped_updates_are_counted_by_matrix():
    params = net()
    opt = build(method("galore"), params)
    opt.watch(every=1)
    set_gradients(params, 0)
    params["wide"].grad[0, 0] = math.nan
    params["experts"].grad[1] = math.inf
    opt.step()
    assert {name for name, row in figures(opt).items() if row.skipped} == {"wide", "experts[1]"}
    assert figures(opt)["wide"] == so.LayerReport("wide", (7, 12), "left", RANK, skipped=1)
    assert opt.skipped_updates == 2


def test_looks_come_at_every_nth_step_of_the_optimizer():
    params = net(names=["tall"])
    opt = build(method("galore"), params)
    opt.watch(every=3)
    seen = []
    for step in range(8):
        train(params, opt, [step])
        seen.append(figures(opt)["tall"].step)
    assert seen == [1, 1, 1, 4, 4, 4, 7, 7]


def test_a_large_matrix_is_measured_on_evenly_spaced_rows(monkeypatch):
    monkeypatch.setattr(monitor, "_SAMPLE", 20)
    params = net(torch.float64, names=["tall", "vector"])
    opt = build(method("galore"), params)
    opt.watch(every=1)
    before = params["tall"].detach()[::5].clone()  # 84 elements: every fifth row
    train(params, opt, [0])
    moved = float((params["tall"].detach()[::5] - before).norm() / before.norm())
    assert figures(opt)["tall"].update_ratio == pytest.approx(moved, rel=1e-9)


def test_the_monitor_is_not_part_of_the_state():
    params = net()
    opt = build(method("galore"), params)
    opt.watch()
    train(params, opt, range(2))
    saved = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(saved)
    assert figures(opt)["tall"].refreshes == 1
    with pytest.raises(RuntimeError, match=r"call watch\(\) before"):
        copy.deepcopy(opt).report()


def test_a_group_added_later_is_seen_too():
    params = net(names=["tall"])
    opt = build(method("galore"), params)
    opt.watch(every=1)
    train(params, opt, [0])
    late = torch.nn.Parameter(noise(9, (8, 6)))
    opt.add_param_group({"params": [("late", late)]})
    late.grad = noise(10, (8, 6))
    opt.step()
    assert figures(opt)["late"].step == 1 and figures(opt)["tall"].step == 1


def test_figures_stay_with_their_matrix_when_a_group_is_removed():
    params = net(names=["tall", "wide", "twin"])
    opt = so.GaLore([{"params": [(name, param)]} for name, param in params.items()], rank=2, update_proj_gap=2)
    opt.watch(every=1)
    train(params, opt, range(3))
    before = figures(opt)
    opt.param_groups.pop(1)
    after = figures(opt)
    gone = list(params)[1]
    assert after == {name: layer for name, layer in before.items() if name != gone}
    train(params, opt, [3])
    assert figures(opt).keys() == after.keys()
    assert all(figures(opt)[name].step == 4 and figures(opt)[name].shape == before[name].shape for name in after)


@pytest.mark.parametrize("every", [0, -1, 2.5, "10", True])
def test_a_bad_interval_is_refused(every):
    opt = build(method("galore"), net())
    with pytest.raises(ValueError, match=r"GaLore\.watch: every=.* must be a whole number of at least 1"):
        opt.watch(every)
