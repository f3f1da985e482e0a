"""Gradients projected within backward give the steps of gradients that were not, and are never there at full size."""

import copy
import gc
import io
import math
import os
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import layerwise_ranks
import pytest
import torch
from cases import METHODS, STORED_METHODS
from torch import nn
from torch.utils.checkpoint import checkpoint
from training import SHAPES, assert_same, build, net, noise, snapshot
from transformers import LlamaConfig, LlamaForCausalLM

import subspace_optim as so
from subspace_optim.integrations.ddp import ProjectedState
from subspace_optim.pretrain.machine import peak_bytes

STEPS, PARTS = 50, 4
SERVED = [method for method in METHODS + STORED_METHODS if not build(method, net()).whole_gradient]
REFUSED = [method for method in METHODS if method not in SERVED]
MODES = {"hooks": False, "linear": True}
by_mode = pytest.mark.parametrize("linear", MODES.values(), ids=MODES)


def mlp(dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    layers = nn.Linear(8, 14, bias=bias), nn.Tanh(), nn.Linear(14, 10, bias=bias), nn.Tanh(), nn.Linear(10, 4)
    return nn.Sequential(*layers).to(dtype)


def galore(model, **settings):
    return so.GaLore(
        model.named_parameters(), **{"lr": 0.01, "rank": 2, "update_proj_gap": 5, "stagger": False} | settings
    )


def backward(model, seed, parts=1):
    dtype = next(model.parameters()).dtype
    x, y = noise(seed, (2, 6, 8)).to(dtype), noise(seed + 1, (2, 6, 4)).to(dtype)
    loss = (model(x) - y).square().mean() / parts
    loss.backward()
    return loss


def settle(model, opt, steps=9):
    """As many steps; after 9 of a gap of 5 the coming one renews no basis."""
    for step in range(steps):
        backward(model, step)
        opt.step()
        opt.zero_grad()


def weights(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


# Equal to the ordinary path


@pytest.mark.parametrize("method", SERVED, ids=str)
def test_hooks_step_as_without_them(method):
    """Micro-batches, clipped and scheduled, for stacks, convolutions and vectors, on every method."""
    ends, norms, steps = [], [], 20
    for served in (False, True):
        params = net(torch.float64)
        opt = build(method, params)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
        if served:
            so.project_in_backward(params, opt)
        free = 0
        for step in range(steps):
            for part in range(PARTS):
                gradients = {name: noise(1000 * step + 10 * part + i, SHAPES[name]) for i, name in enumerate(params)}
                sum((params[name] * g / PARTS).sum() for name, g in gradients.items()).backward()
            free += sum(param.grad is None for param in params.values())
            norms.append(float(opt.clip_grad_norm_(5.0)))
            opt.step()
            schedule.step()
            opt.zero_grad()
        assert free == 0 if not served else free > steps
        ends.append(snapshot(params))
    assert min(norms) > 5.0
    assert norms[steps:] == pytest.approx(norms[:steps], rel=1e-9)
    for name in ends[0]:
        # float64, but the sign of a zero moment is rounding's in Lion, and Adam enlarges small differences.
        torch.testing.assert_close(ends[1][name], ends[0][name], rtol=0, atol=1e-8)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
@by_mode
def test_it_is_the_ordinary_path_to_rounding(linear, proj_type):
    ends, norms = [], []
    for served in (False, True):
        model = mlp()
        opt = galore(model, proj_type=proj_type, stagger=True)
        handle = so.project_in_backward(model, opt, linear=linear) if served else None
        for step in range(STEPS):
            for part in range(PARTS):
                backward(model, 10 * step + 2 * part, PARTS)
            norms.append(float(opt.clip_grad_norm_(0.1)))
            assert opt.last_grad_norm == norms[-1]
            opt.step()
            opt.zero_grad()
        ends.append(weights(model))
    assert sorted(handle.linear + handle.hooked) == ["0.weight", "2.weight", "4.weight"]
    assert bool(handle.linear) == linear
    assert min(norms) > 0.1
    assert norms[STEPS:] == pytest.approx(norms[:STEPS], rel=1e-9)
    for name in ends[0]:
        torch.testing.assert_close(ends[1][name], ends[0][name], rtol=0, atol=1e-10)
        assert not torch.equal(ends[0][name], weights(mlp())[name])


@by_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision(linear, dtype):
    """R of every micro-batch against that of the whole gradient: within what the dtype rounds."""
    model, exact = mlp(dtype), mlp(dtype).double()
    opt = galore(model)
    so.project_in_backward(model, opt, linear=linear)
    settle(model, opt)
    exact.load_state_dict(model.state_dict())
    for part in range(PARTS):
        backward(model, 100 + part, PARTS)
        backward(exact, 100 + part, PARTS)
    assert len(opt.lows) == 3
    for param, twin in zip(model.parameters(), exact.parameters()):
        if param in opt.lows:
            (low,), basis, plan = opt.lows[param], opt.state[param]["basis"].double(), opt.plan_of(0, param)
            expected = twin.grad @ basis if plan.side == "right" else basis.mT @ twin.grad
            assert low.dtype == torch.float32
            # Activations, D, Q and R are each rounded: a few units of the dtype, whose errors add up as random ones.
            error = (low - expected).norm() / expected.norm()
            assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_a_real_llama(checkpointing):
    """transformers' own, with gradient checkpointing: the basis is the same at the recomputation."""

    def make():
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=16, use_cache=False, **shape))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train(), so.create(model, "galore", rank=4, lr=0.01, update_proj_gap=4)

    ends = []
    for mode in (None, False, True):
        model, opt = make()
        handle = None if mode is None else so.project_in_backward(model, opt, linear=mode)
        for step in range(10):
            for part in range(2):
                tokens = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(2 * step + part))
                (model(input_ids=tokens, labels=tokens).loss / 2).backward()
            opt.clip_grad_norm_(1.0)
            opt.step()
            opt.zero_grad()
        ends.append(weights(model))
        assert mode is None or len(handle.linear if mode else handle.hooked) == 2 * 7
    for name in ends[0]:
        # float32 weights of about 0.02 moved by 0.0025 a step; Adam enlarges the rounding of small gradients.
        torch.testing.assert_close(ends[1][name], ends[0][name], rtol=0, atol=2e-5)
        torch.testing.assert_close(ends[2][name], ends[0][name], rtol=0, atol=2e-5)


@by_mode
def test_autocast(linear):
    """As autocast does it: bfloat16 products, float32 weights, gradients in the dtype of what they belong to."""
    found = []
    for served in (False, True):
        model = mlp(torch.float32)
        opt = galore(model, rank=3)
        settle(model, opt, 1)
        if served:
            so.project_in_backward(model, opt, linear=linear)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = noise(7, (6, 8)).float().requires_grad_()
            out = model(x)
        (out.float() - noise(8, (6, 4))).square().sum().backward()
        norm = float(opt.clip_grad_norm_(math.inf))
        found.append((out, x.grad, model[0].bias.grad, norm))
    for ours, theirs in zip(found[1][:3], found[0][:3]):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert found[1][3] == pytest.approx(found[0][3], rel=1e-2)  # bfloat16


# What is computed and kept


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", [(8,), (6, 8), (2, 6, 8), (0, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_but_the_weights_gradient_is_bitwise_as_before(shape, bias, dtype):
    model = mlp(dtype, bias)
    opt = galore(model)
    settle(model, opt)
    x = noise(3, shape).to(dtype)

    def run():
        inner = x.clone().requires_grad_()
        out = model(inner)
        out.backward(noise(4, tuple(out.shape)).to(dtype))
        vectors = [param.grad for param in model.parameters() if param.ndim == 1]
        opt.zero_grad()
        return [out, inner.grad, *vectors]

    before = run()
    with so.project_in_backward(model, opt, linear=True):
        during = run()
    assert all(torch.equal(a, b) for a, b in zip(before, during, strict=True))


def test_gradients_and_inputs_are_not_kept():
    """Of the allocator: what forward and backward add at their peak. Of autograd: what it saves besides parameters."""
    torch.manual_seed(0)
    width, rank, tokens = 64, 4, 8
    layers = [nn.Linear(width, width, bias=False) for _ in range(8)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.Softsign())))
    opt = so.GaLore(model.named_parameters(), rank=rank, update_proj_gap=10**6, proj_type="right", stagger=False)
    x = torch.randn(tokens, width)

    def run():
        model(x).square().sum().backward()

    run()
    opt.step()
    opt.zero_grad()
    peaks, saved = {}, {}
    for mode in (None, False, True):
        handle = None if mode is None else so.project_in_backward(model, opt, linear=mode)
        run()  # what is allocated once
        opt.zero_grad()
        peaks[mode] = peak_bytes(run)
        held = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        assert held == (8 * width * width * 4 if mode is None else 0)
        assert [low.shape for lows in opt.lows.values() for low in lows] == [(width, rank)] * (0 if mode is None else 8)
        opt.zero_grad()
        seen = {}

        def pack(tensor, seen=seen):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(x)
        saved[mode] = sum(seen[at] for at in seen.keys() - {p.untyped_storage().data_ptr() for p in model.parameters()})
        del out
        opt.zero_grad()
        if handle:
            handle.remove()
    one, activations = width * width * 4, 2 * 8 * tokens * width * 4
    assert peaks[None] > 8 * one
    assert peaks[False] < activations + 2 * one  # the gradient at hand, and a temporary
    assert peaks[True] < peaks[False] - one
    # Of each layer xQ in the place of x; Softsign keeps its own input, which is another tensor.
    assert saved[False] == saved[None]
    assert saved[None] - saved[True] == 8 * tokens * (width - rank) * 4


def test_forward_is_unchanged_where_nothing_is_learned():
    model = mlp()
    opt = galore(model)
    settle(model, opt)
    x = noise(5, (3, 8))
    with torch.no_grad():
        before = model(x)
    with so.project_in_backward(model, opt, linear=True):
        with torch.no_grad():
            assert torch.equal(model(x), before)
        assert torch.equal(model.eval()(x), before)
        assert not opt.lows
        inner = x.clone().requires_grad_()
        torch.autograd.grad(model(inner).sum(), inner)  # asks for no gradient of a weight
        assert not opt.lows
        for param in model.parameters():
            param.requires_grad_(False)
        model(inner).sum().backward()
        assert not opt.lows


# One optimizer with torch's manners


@by_mode
def test_two_micro_batches_are_one_step(linear):
    model = mlp()
    opt = galore(model)
    so.project_in_backward(model, opt, linear=linear)
    settle(model, opt)
    counts = [int(state["step"]) for state in opt.state.values()]
    backward(model, 0)
    first = {param: lows[0].clone() for param, lows in opt.lows.items()}
    backward(model, 0)
    assert len(first) == 3
    for param, lows in opt.lows.items():
        torch.testing.assert_close(lows[0], 2 * first[param])
    opt.step()
    assert [int(state["step"]) for state in opt.state.values()] == [count + 1 for count in counts]
    assert not opt.lows
    model.zero_grad()
    before = weights(model)
    opt.step()
    assert_same(weights(model), before)


@pytest.mark.parametrize("whose", ["model", "optimizer"])
@by_mode
def test_zero_grad_forgets(linear, whose):
    model, twin = mlp(), mlp()
    for parts in (model, twin):
        opt = galore(parts)
        so.project_in_backward(parts, opt, linear=linear)
        settle(parts, opt)
        if parts is model:
            backward(parts, 50)
            assert opt.lows
            (opt if whose == "optimizer" else model).zero_grad()
            assert not opt.lows and all(param.grad is None for param in model.parameters())
        backward(parts, 60)
        opt.step()
    assert_same(weights(model), weights(twin))


@by_mode
def test_a_bad_gradient_costs_one_step_of_one_tensor(linear):
    model = mlp()
    opt = galore(model)
    so.project_in_backward(model, opt, linear=linear)
    settle(model, opt)
    before, counts = weights(model), {p: int(s["step"]) for p, s in opt.state.items()}
    backward(model, 0)
    opt.lows[model[2].weight][0][0, 0] = torch.nan
    assert opt.clip_grad_norm_(1e-3).isnan()
    others = [low for param, lows in opt.lows.items() if param is not model[2].weight for low in lows]
    rest = [*others, *(p.grad for p in model.parameters() if p.grad is not None)]
    assert float(nn.utils.get_total_norm(rest)) == pytest.approx(1e-3, rel=1e-2)
    opt.step()
    assert opt.skipped_updates == 1
    for name, param in model.named_parameters():
        moved = name != "2.weight"
        assert torch.equal(param, before[name]) != moved
        assert int(opt.state[param]["step"]) == counts[param] + moved
    x = noise(0, (6, 8)).index_fill_(0, torch.tensor([2]), torch.inf)
    model(x).sum().backward()
    opt.step()
    assert opt.skipped_updates > 1
    assert all(param.isfinite().all() for param in model.parameters())


def test_the_norm_is_of_what_the_step_sees():
    model = mlp()
    opt = galore(model, stagger=False)
    assert math.isnan(opt.last_grad_norm)
    assert opt.clip_grad_norm_(1.0) == 0
    backward(model, 0)
    full = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert opt.clip_grad_norm_(math.inf) == pytest.approx(float(full))  # every basis is due
    assert all(param.grad is not None for param in model.parameters())
    opt.step()
    opt.zero_grad()
    backward(model, 1)
    squares = [p.grad.square().sum() for p in model.parameters() if p.ndim == 1]
    for param in model.parameters():
        if param.ndim == 2:
            basis, plan = opt.state[param]["basis"], opt.plan_of(0, param)
            squares.append((param.grad @ basis if plan.side == "right" else basis.mT @ param.grad).square().sum())
    expected = float(sum(squares)) ** 0.5
    assert float(opt.clip_grad_norm_(expected / 2)) == pytest.approx(expected)
    assert float(opt.clip_grad_norm_(math.inf)) == pytest.approx(expected / 2, rel=1e-5)
    assert all((param.grad is None) == (param.ndim == 2) for param in model.parameters())


@pytest.mark.parametrize("method", REFUSED, ids=str)
def test_clipping_works_where_whole_gradients_are_needed(method):
    params = net(torch.float64)
    opt = build(method, params)
    for param in params.values():
        param.grad = torch.ones_like(param)
    opt.step()
    full = math.sqrt(sum(param.numel() for param in params.values()))
    assert float(opt.clip_grad_norm_(1.0)) == pytest.approx(full)
    assert float(nn.utils.get_total_norm([p.grad for p in params.values()])) == pytest.approx(1.0, rel=1e-5)
    assert not opt.lows


@pytest.mark.parametrize("norm", [0.0, -1.0, math.nan, torch.ones(2), "1"])
def test_a_bad_norm_is_refused(norm):
    with pytest.raises(ValueError, match=r"max_norm=.* must be one number > 0; math.inf only measures"):
        galore(mlp()).clip_grad_norm_(norm)


@by_mode
def test_a_resumed_run_goes_on_bit_for_bit(linear):
    """What is accumulated belongs to no checkpoint, and is dropped by loading one."""
    model = mlp()
    opt = galore(model)
    so.project_in_backward(model, opt, linear=linear)
    settle(model, opt, 7)
    saved = copy.deepcopy([model.state_dict(), opt.state_dict()])
    assert "lows" not in saved[1]
    settle(model, opt, 6)
    fresh = mlp()
    again = galore(fresh)
    so.project_in_backward(fresh, again, linear=linear)
    settle(fresh, again, 2)
    backward(fresh, 9)
    fresh.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert not again.lows and again.in_backward
    fresh.zero_grad()
    settle(fresh, again, 6)
    assert_same(weights(fresh), weights(model))


@by_mode
def test_a_model_may_be_cast_in_the_middle(linear):
    """The step brings its state along; until then no gradient is projected by the old one."""
    ends = []
    for served in (True, False):
        model = mlp(torch.float32)
        opt = galore(model)
        if served:
            so.project_in_backward(model, opt, linear=linear)
        settle(model, opt, 2)
        model.double()
        settle(model, opt, 2)
        assert {state["step"].dtype for state in opt.state.values()} == {torch.float64}
        ends.append(weights(model))
    for name in ends[0]:  # of two steps in float32, whose Adam divides by √V
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-4, atol=1e-5)


def test_the_handle_leaves_everything_as_it_was():
    model = mlp()
    opt = galore(model)
    keys = {name: set(vars(module)) for name, module in model.named_modules()}
    with so.project_in_backward(model, opt, linear=True) as handle:
        assert opt.in_backward
        assert all(type(module) is nn.Linear for module in model if hasattr(module, "weight"))
        assert list(model.state_dict()) == list(mlp().state_dict())
        assert "2.weight" in repr(handle)
        settle(model, opt)
        backward(model, 0)
        assert model[0].weight.grad is None
    assert not opt.in_backward
    assert {name: set(vars(module)) for name, module in model.named_modules()} == keys
    opt.step()  # from what has been accumulated
    opt.zero_grad()
    backward(model, 1)
    assert all(param.grad is not None for param in model.parameters())
    handle.remove()


@by_mode
def test_groups_may_be_removed_and_reordered(linear):
    """Each tensor is served as the group says that it is in by now; what is in none keeps its gradient."""
    ends = []
    for served in (False, True):
        model = mlp()
        first, middle, last = (model[i].weight for i in (0, 2, 4))
        changes = ({}, {"rank": 3}, {"lr": 0.02})
        shared = {"rank": 2, "update_proj_gap": 7}
        opt = so.GaLore(
            [{"params": [weight], **shared, **own} for weight, own in zip((last, first, middle), changes)],
            lr=0.01,
            stagger=False,
        )
        if served:
            so.project_in_backward(model, opt, linear=linear)
        settle(model, opt, 3)
        opt.param_groups.pop(0)
        opt.param_groups.reverse()
        model.zero_grad()
        backward(model, 3)
        assert [weight.grad is None for weight in (first, middle, last)] == [served, served, False]
        opt.step()
        ends.append(weights(model))
    plain, projected = ends
    for name, weight in plain.items():
        torch.testing.assert_close(projected[name], weight)


def test_copies_are_plain():
    """A deep copy (an average of weights) or a pickled model has a forward of its own, and no optimizer in it."""
    model = mlp()
    opt = galore(model)
    settle(model, opt)
    with so.project_in_backward(model, opt, linear=True):
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        for twin in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
            before = model[0].weight.detach().clone()
            backward(twin, 0)
            assert all(param.grad is not None for param in twin.parameters())
            assert not opt.lows
            twin.zero_grad()
            assert all(param.grad is None for param in twin.parameters())
            with torch.no_grad():
                twin[0].weight.add_(1)
            assert torch.equal(model[0].weight, before)
            assert not torch.equal(twin(noise(1, (3, 8))), model(noise(1, (3, 8))))
        other = copy.deepcopy(opt)
        assert not other.in_backward and not other.lows


def test_a_watched_run_says_what_it_can():
    """Of a gradient that never existed nobody knows which part was captured."""
    model = mlp()
    opt = galore(model)
    so.project_in_backward(model, opt)
    opt.watch(every=1)
    settle(model, opt, 1)
    first = {layer.name: layer.captured for layer in opt.report()}
    settle(model, opt, 1)
    for layer in opt.report():
        assert layer.captured is None
        assert layer.step == 2 and layer.update_ratio > 0
    assert 0 < first["2.weight"] <= 1


@pytest.mark.parametrize("method", SERVED, ids=str)
def test_early_renewals_are_those_of_the_step(method):
    """With one micro-batch a step: nothing but rounding differs, and no whole gradient is left, not even at first."""
    ends = []
    for early in (False, True):
        params = net(torch.float64)
        opt = build(method, params)
        so.project_in_backward(params, opt, early=early)
        for step in range(12):
            gradients = {name: noise(1000 * step + i, SHAPES[name]) for i, name in enumerate(params)}
            sum((params[name] * g).sum() for name, g in gradients.items()).backward()
            if early:
                assert [name for name, param in params.items() if param.grad is not None] == ["vector"]
            opt.step()
            opt.zero_grad()
        ends.append(snapshot(params))
    for name in ends[0]:
        # As above; but an early renewal rounds the moments that it moves to their codes once more.
        atol = 1e-8 if opt.param_groups[0]["state_bits"] == 32 else 1e-2
        torch.testing.assert_close(ends[1][name], ends[0][name], rtol=0, atol=atol)


@pytest.mark.parametrize("bits", [8, 4])
@by_mode
def test_quantised_state(linear, bits):
    """Bases that are kept as codes are what R is seen in; moments differ by at most what their codes do."""
    ends = []
    for early in (None, False, True):
        model = mlp(torch.float32)
        opt = galore(model, state_bits=bits, basis_bits=bits)
        if early is not None:
            so.project_in_backward(model, opt, linear=linear, early=early)
        settle(model, opt, 4)
        ends.append(weights(model))
        settle(model, opt, 4)
    for name in ends[0]:
        # Four steps of 0.01·0.25; a moment that rounds to the neighbouring code changes one by a part of it.
        torch.testing.assert_close(ends[1][name], ends[0][name], rtol=0, atol=1e-3)
        torch.testing.assert_close(ends[2][name], ends[0][name], rtol=0, atol=1e-3)


@by_mode
def test_early_renewals_wait_for_a_gradient_that_says_something(linear):
    """Zero, then not finite, then one that is: nothing is counted twice, and no basis comes of the first two."""
    model = mlp()
    opt = galore(model)
    so.project_in_backward(model, opt, linear=linear, early=True)
    (model(noise(0, (6, 8))) * 0).sum().backward()
    assert all(param.grad is not None for param in model.parameters())
    opt.step()
    opt.zero_grad()
    (model(noise(0, (6, 8))) * torch.inf).sum().backward()
    opt.step()
    opt.zero_grad()
    assert opt.skipped_updates == 6
    assert {state["age"] for state in opt.state.values() if "age" in state} == {-1}
    backward(model, 0)
    assert len(opt.lows) == 3
    opt.step()
    assert {state["age"] for state in opt.state.values() if "age" in state} == {1}


# Models that are not a chain of layers


class Shared(nn.Module):
    """One layer called three times, and its weight used by other means too."""

    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)
        self.out = nn.Linear(8, 4)
        self.reentrant = reentrant

    def forward(self, x):
        x = x.clone().requires_grad_()
        for _ in range(3):
            layer = self.layer if self.reentrant is None else partial(
                checkpoint, self.layer, use_reentrant=self.reentrant
            )  # fmt: skip
            x = torch.tanh(layer(x))
        return self.out(x @ self.layer.weight)


@by_mode
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpoint", "reentrant"])
def test_a_weight_that_is_used_often(linear, reentrant):
    ends = []
    for served in (False, True):
        model = Shared(reentrant).double()
        opt = galore(model, rank=3)
        if served:
            so.project_in_backward(model, opt, linear=linear)
        for step in range(12):
            for part in range(2):
                backward(model, 10 * step + part)
            opt.clip_grad_norm_(1.0)
            opt.step()
            opt.zero_grad()
        ends.append(weights(model))
    for name in ends[0]:
        torch.testing.assert_close(ends[1][name], ends[0][name], rtol=0, atol=1e-10)


@by_mode
def test_parameters_of_nobody_are_left_alone(linear):
    """Frozen, or another optimizer's; and a weight that was exchanged after the handle was made."""
    model = mlp()
    model[0].weight.requires_grad_(False)
    opt = so.GaLore([("w", model[2].weight)], rank=2, update_proj_gap=100, stagger=False)
    handle = so.project_in_backward(model, opt, linear=linear)
    assert handle.linear + handle.hooked == ["2.weight"]
    for _ in range(2):
        backward(model, 0)
        assert model[0].weight.grad is None and model[4].weight.grad is not None
        opt.step()
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    backward(model, 0)
    assert model[2].weight.grad is not None and not opt.lows


@by_mode
def test_a_renewal_waits_for_what_has_begun_to_accumulate(linear):
    """The gap is shortened between two micro-batches: they stay in one basis, and the step after renews it."""
    model = mlp()
    opt = galore(model, update_proj_gap=100, stagger=False)
    so.project_in_backward(model, opt, linear=linear)
    settle(model, opt, 3)
    backward(model, 0)
    opt.param_groups[0]["update_proj_gap"] = 1
    backward(model, 1)
    assert all((param.grad is None) == (param.ndim == 2) for param in model.parameters())
    bases = [state["basis"].clone() for state in opt.state.values() if "basis" in state]
    opt.step()
    opt.zero_grad()
    assert all(torch.equal(a, b["basis"]) for a, b in zip(bases, (s for s in opt.state.values() if "basis" in s)))
    backward(model, 2)
    assert all(param.grad is not None for param in model.parameters())
    opt.step()
    assert not any(torch.equal(a, b["basis"]) for a, b in zip(bases, (s for s in opt.state.values() if "basis" in s)))


@by_mode
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own looking
def test_compiled_models(linear):
    ends = []
    for served in (False, True):
        model = mlp(torch.float32)
        opt = galore(model)
        if served:
            so.project_in_backward(model, opt, linear=linear)
        forward = torch.compile(model, backend="aot_eager")
        for step in range(7):
            (forward(noise(step, (6, 8)).float()) - 1).square().mean().backward()
            opt.step()
            opt.zero_grad()
        ends.append(weights(model))
    for name in ends[0]:
        torch.testing.assert_close(ends[1][name], ends[0][name], rtol=0, atol=1e-5)


# Refusals


@pytest.mark.parametrize("method", REFUSED, ids=str)
def test_what_needs_whole_gradients_is_refused_with_the_reason(method):
    params = net()
    with pytest.raises(
        ValueError, match=r"cannot step from projected gradients: (the fresh part|the basis|the row|APOLLO)"
    ):
        so.project_in_backward(params, build(method, params))


def test_served_and_refused_are_as_documented():
    assert {str(method).partition("_")[0] for method in REFUSED} == {"apollo", "flora", "osd", "gradnormlorp"}
    assert len(SERVED) > 10


def test_refusals():
    model = mlp()
    opt = galore(model)
    hook = model[2].weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(RuntimeError, match=r"2.weight has a post-accumulate hook already"):
        so.project_in_backward(model, opt)
    hook.remove()
    assert not opt.in_backward and not model[0].weight._post_accumulate_grad_hooks
    with pytest.raises(TypeError, match="an optimizer of this package, not AdamW"):
        so.project_in_backward(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="projects none of these tensors"):
        so.project_in_backward(mlp(), opt)
    with pytest.raises(ValueError, match="it projects nothing"):
        so.project_in_backward(model, so.SubspaceOptimizer(model.parameters()))
    with pytest.raises(TypeError, match=r"needs a torch.nn.Module to find the layers in, not list"):
        so.project_in_backward(list(model.parameters()), opt, linear=True)
    so.project_in_backward(list(model.parameters()), opt)
    with pytest.raises(RuntimeError, match="is on for this optimizer already"):
        so.project_in_backward(model, opt)


@by_mode
def test_an_optimizer_that_is_let_go_of_serves_no_more(linear):
    """Nor does it keep the model: hooks of tensors are out of the collector's sight."""
    model = mlp()
    opt = galore(model)
    so.project_in_backward(model, opt, linear=linear)
    settle(model, opt, 2)
    opt.cycle = opt  # as schedulers make one
    opt = galore(model)
    so.project_in_backward(model, opt, linear=linear)
    settle(model, opt, 2)
    seen = [weakref.ref(opt), weakref.ref(model[0].weight)]
    del model, opt
    gc.collect()
    assert [ref() for ref in seen] == [None, None]


@by_mode
def test_a_step_without_gradients_that_another_optimizer_takes_is_refused(linear):
    model = mlp()
    first, second = galore(model), galore(model)
    handle = so.project_in_backward(model, first, linear=linear)
    settle(model, first)
    before = weights(model)
    backward(model, 0)
    with pytest.raises(RuntimeError, match=r"0.weight is projected within backward for another optimizer.* remove\(\)"):
        second.step()
    assert_same(weights(model), before)
    handle.remove()
    settle(model, second, 1)
    assert len(second.state) == len(before)


def test_a_later_hook_is_refused_in_the_first_backward():
    model = mlp()
    opt = galore(model)
    so.project_in_backward(model, opt)
    model[2].weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(RuntimeError, match=r"2.weight has a second post-accumulate hook"):
        backward(model, 0)


def test_grad_scaler_is_refused():
    model = mlp(torch.float32)
    opt = galore(model)
    scaler = torch.amp.GradScaler("cpu")
    before = weights(model)
    with so.project_in_backward(model, opt):
        scaler.scale(backward(model, 0).detach())
        with pytest.raises(RuntimeError, match=r"GradScaler cannot unscale .* train in bfloat16"):
            scaler.step(opt)
    assert_same(weights(model), before)


@by_mode
def test_somebody_elses_gradient_is_refused(linear):
    model = mlp()
    opt = galore(model)
    handle = so.project_in_backward(model, opt, linear=linear)
    settle(model, opt)
    backward(model, 0)
    handle.remove()
    backward(model, 1)
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"0.weight has a gradient besides .*zero_grad\(\) clears both"):
        opt.step()
    assert_same(weights(model), before)
    opt.zero_grad()
    backward(model, 1)
    opt.step()


# Several ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two real ranks saved."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(Path(layerwise_ranks.__file__)), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.distributed
@by_mode
def test_averaged_ranks_are_one_process_with_the_whole_batch(ranks, linear):
    """Micro-batches, clipping and an expert that only one rank uses; the norm is the same on all ranks."""
    model, norms = layerwise_ranks.alone(linear)
    for saved in ranks:
        found = saved[f"averaged {linear}"]
        assert found["norms"] == pytest.approx(norms, rel=1e-9)
        for name, param in weights(model).items():
            torch.testing.assert_close(found["weights"][name], param, rtol=0, atol=1e-10)  # float64
    assert ranks[0][f"averaged {linear}"]["norms"] == ranks[1][f"averaged {linear}"]["norms"]


@pytest.mark.distributed
def test_data_parallel_wrappers_are_refused(ranks):
    for saved in ranks:
        assert "serves the module itself, not DistributedDataParallel" in saved["wrapped"]
        assert "has a gradient besides the one that was projected ahead" in saved["wrapped later"]
        assert "every rank has bases of its own gradients" in saved["early"]
        assert "0.weight was projected ahead on some ranks only" in saved["apart"]
        assert saved["sparse"] == "weight has a sparse gradient; use a dense one (sparse=False)"


@pytest.mark.distributed
@pytest.mark.parametrize("key", layerwise_ranks.HOOKED)
def test_a_hook_that_sends_r_steps_as_plain_ddp(ranks, key):
    """With accumulation and refreshes, on bases of every kind; dense gradients are averaged as before."""
    for saved in ranks:
        plain, hooked = saved[f"hooked {key}"]
        for name, weight in plain["weights"].items():
            # float64, but float32 in the moments' and bases' codes, whose rounding tiny differences may turn.
            torch.testing.assert_close(hooked["weights"][name], weight, rtol=0, atol=1e-9 if key != "codes" else 1e-4)
        sent, whole = hooked["sent"]
        assert 0 < sent < whole
        for name, grad in plain["grads"].items():
            if key == "orthonormal" and (basis := plain["bases"][name]) is None:
                assert torch.allclose(hooked["grads"][name], grad, rtol=1e-9)
            elif key == "orthonormal" and not torch.allclose(hooked["grads"][name], grad):
                q = hooked["bases"][name]
                right = q.shape[0] == grad.shape[1]
                assert (q.mT @ q - torch.eye(3)).abs().max() < 1e-9
                lows = [g @ basis if right else basis.mT @ g for g in (hooked["grads"][name], grad)]
                torch.testing.assert_close(*lows, rtol=0, atol=1e-9)
    assert_same(*(saved[f"hooked {key}"][1]["weights"] for saved in ranks))


@pytest.mark.distributed
def test_coded_messages(ranks):
    """Their length is exact; error feedback keeps what sixteen messages lost to about what one did."""
    dense, elements, rows = 4 * 32, 32 * 8, 32
    lengths = {None: dense + 4 * elements, 8: dense + elements + 4 * rows, 4: dense + elements // 2 + 4 * rows}
    for saved in ranks:
        error, sent = saved["coded None True"]
        assert sent == lengths[None] and error < 1e-6  # float32
        for bits in (8, 4):
            without, with_feedback = saved[f"coded {bits} False"], saved[f"coded {bits} True"]
            assert without[1] == with_feedback[1] == lengths[bits]
            # The same gradient rounds the same way each time, so that without feedback every message loses alike.
            assert with_feedback[0] < without[0] / 4
            assert without[0] < 2 ** (1 - bits)


@pytest.mark.distributed
def test_a_resumed_run_goes_on_with_the_error_feedback(ranks):
    for saved in ranks:
        straight, resumed, without = saved["resumed"]
        assert_same(resumed, straight)
        assert not torch.equal(without["0.weight"], straight["0.weight"])


def test_error_feedback_of_another_optimizer_is_refused():
    state = ProjectedState(galore(mlp()), bits=8)
    with pytest.raises(ValueError, match="tensor 99, which this optimizer does not have"):
        state.load_state_dict({"errors": {99: [torch.zeros(2, 2)]}})
    with pytest.raises(ValueError, match=r"tensor 0, which is 0.weight here, has the shapes \[\(2, 2\)\]"):
        state.load_state_dict({"errors": {0: [torch.zeros(2, 2)]}})
    assert state.state_dict() == {"errors": {}}


@pytest.mark.distributed
def test_a_bad_gradient_of_one_rank_is_skipped_by_all(ranks):
    for saved in ranks:
        skipped, found = saved["bad"]
        assert skipped == 2  # weight and bias, once
        assert all(tensor.isfinite().all() for tensor in found.values())
    assert_same(*(saved["bad"][1] for saved in ranks))


def test_what_the_hook_cannot_do_is_refused():
    opt = galore(mlp())
    with pytest.raises(ValueError, match="bits=2 must be None, 8 or 4"):
        ProjectedState(opt, bits=2)
    with pytest.raises(ValueError, match="Flora cannot step from projected gradients: the fresh part"):
        ProjectedState(so.Flora(mlp().parameters(), rank=2))
    model = mlp()
    opt = galore(model)
    so.project_in_backward(model, opt)
    with pytest.raises(RuntimeError, match="project_in_backward is on"):
        ProjectedState(opt)


def test_averaging_needs_ranks():
    with pytest.raises(RuntimeError, match=r"average_gradients needs torch.distributed"):
        so.average_gradients(galore(mlp()))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_does_not_scale_the_others(bad):
    """The step will skip it; a factor of NaN or 0 would take the step of every other tensor as well."""
    params = [torch.nn.Parameter(torch.ones(8, 6)) for _ in range(3)]
    opt = so.GaLore(params, rank=2, lr=0.1)
    for param in params:
        param.grad = torch.full_like(param, 2.0)
    params[1].grad[3, 4] = bad
    norm = opt.clip_grad_norm_(1.0)
    assert not norm.isfinite() and opt.last_grad_norm is norm
    joint = torch.stack([params[i].grad for i in (0, 2)]).norm()
    torch.testing.assert_close(joint, torch.tensor(1.0), rtol=1e-5, atol=0)
    opt.step()
    assert opt.skipped_updates == 1
    assert torch.equal(params[1], torch.ones(8, 6)) and not torch.equal(params[0], torch.ones(8, 6))
