"""An ordinary step on a GPU reads nothing back and moves nothing between devices: on fake tensors, without a GPU.

The engine and the host's side of the kernels are real; launches are noted and not made.
"""

import copy
import math
from functools import partial
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import subspace_optim as so
from subspace_optim import storage
from subspace_optim.kernels import cuda, select

GPU = torch.device("cuda", 0)
SHAPES = ((64, 48), (64, 48), (48, 64), (48,))


class NoCopies(TorchDispatchMode):
    """Refuses copies from a device to another: those from the host wait, and those to it do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "copy" in func.overloadpacket.__name__:
            devices = {x.device for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)}
            assert len(devices) == 1, f"{func} between {devices}"
        return out


class Ops(TorchDispatchMode):
    """Counts torch's operations on the GPU, but for views: each is a launch or a few.

    One on lists is as many as the tensors of the first where another list is not of their dtype, as it then takes them
    one at a time; a copy does not.
    """

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        moves = func.namespace != "prim" and not func.is_view
        there = moves and any(x.device == GPU for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor))
        lists = [[x for x in arg if isinstance(x, torch.Tensor)] for arg in args if isinstance(arg, list)]
        name, dtypes = func.overloadpacket.__name__, {x.dtype for own in lists for x in own}
        alone = name.startswith("_foreach") and "copy" not in name and len(dtypes) > 1
        self.count += there and (len(lists[0]) if alone else 1)
        return out


def address(tensor):
    """16-byte aligned, the same for a view of the whole, distinct otherwise."""
    return (tensor.untyped_storage()._cdata << 16) + 16 * tensor.storage_offset()


def sliced(tensor, key):
    """tensor[key] for slices; torch's own wants a driver."""
    for dim, part in enumerate(key if isinstance(key, tuple) else (key,)):
        tensor = torch.ops.aten.slice(tensor, dim, part.start, part.stop)
    return tensor


def listed(tensor):
    """Only the host's own numbers can be read, such as a learning rate."""
    assert tensor.device.type == "cpu", "the step reads a tensor on the GPU"
    return [1.0] * len(tensor)


@pytest.fixture(params=["cuda", "triton"])
def launches(request, monkeypatch):
    """Names of the kernels launched on fake tensors of "cuda", by this backend."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed: its launches are not seen here")
    kernels, seen = import_module(f"subspace_optim.kernels.{request.param}"), []

    def launch(kernel, *_, **__):
        seen.append(getattr(kernel, "__name__", kernel))

    monkeypatch.setattr(kernels, "_start" if request.param == "triton" else "_launch", launch)
    monkeypatch.setattr(cuda, "load", lambda: SimpleNamespace(sso_scalars_bytes=lambda: 40))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    if request.param == "triton":
        monkeypatch.setattr(kernels, "_capability", lambda device: 90)
    monkeypatch.setattr(select, "_resolve", lambda backend, plan: kernels)
    monkeypatch.setattr(storage, "_table", lambda kind, bits, like: like.new_empty(2**bits).float())  # as after a step
    monkeypatch.setattr(FakeTensor, "data_ptr", address, raising=False)
    monkeypatch.setattr(FakeTensor, "__getitem__", sliced, raising=False)
    monkeypatch.setattr(FakeTensor, "tolist", listed, raising=False)
    return seen


def started(make, shapes=SHAPES):
    """An optimizer between two refreshes, on fake tensors, with a gradient for each."""
    params = [torch.nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device=GPU)) for shape in shapes]
    opt = make(params)
    opt.allocate_state()
    for param in params:
        if "age" in opt.state[param]:
            opt.state[param]["age"] = 0
        param.grad = torch.empty_like(param)
    opt._skips[params[0].device] = torch.zeros((), dtype=torch.int64, device=GPU)
    return params, opt


OPTIMIZERS = {
    "galore": lambda params, **options: so.GaLore(params, rank=8, **options),
    "galore_grams": lambda params, **options: so.GaLore(params, rank=8, transform="grams", **options),
    "adamw": lambda params, **options: so.SubspaceOptimizer(params, **options),
    "galore_8bit": lambda params, **options: so.GaLore(params, rank=8, state_bits=8, basis_bits=4, **options),
    "galore_4bit_cautious": lambda params, **options: so.GaLore(
        params, rank=8, state_bits=4, transform="cautious", **options
    ),
    "flora": lambda params, **options: so.Flora(params, rank=8, **options),
    "flora_relative_cautious": lambda params, **options: so.Flora(
        params, rank=8, scale_parameter=True, transform="cautious", **options
    ),
    "gradnormlorp": lambda params, **options: so.GradNormLoRP(params, rank=8, **options),
    "galore_lion": lambda params, **options: so.GaLore(params, rank=8, rule=so.Lion(), **options),
    "galore_momentum": lambda params, **options: so.GaLore(params, rank=8, rule=so.Momentum(), **options),
    "galore_adafactor": lambda params, **options: so.GaLore(params, rank=8, rule=so.Adafactor(), **options),
    "osd": lambda params, **options: so.OnlineSubspaceDescent(params, rank=8, **options),
    "osd_full": lambda params, **options: so.OnlineSubspaceDescent(params, rank=8, proj_type="full", **options),
    "osd_8bit": lambda params, **options: so.OnlineSubspaceDescent(
        params, rank=8, state_bits=8, basis_bits=8, **options
    ),
    "osd_lion": lambda params, **options: so.OnlineSubspaceDescent(params, rank=8, rule=so.Lion(), **options),
    "osd_adafactor": lambda params, **options: so.OnlineSubspaceDescent(params, rank=8, rule=so.Adafactor(), **options),
    "apollo": lambda params, **options: so.APOLLO(params, rank=8, **options),
    "lion": lambda params, **options: so.SubspaceOptimizer(params, dense_rule=so.Lion(), **options),
    "adafactor": lambda params, **options: so.SubspaceOptimizer(params, dense_rule=so.Adafactor(), **options),
    "galore_full": lambda params, **options: so.GaLore(params, rank=8, proj_type="full", **options),
    "galore_kahan": lambda params, **options: so.GaLore(params, rank=8, rounding="kahan", **options),
    "gradnormlorp_kahan": lambda params, **options: so.GradNormLoRP(params, rank=8, rounding="kahan", **options),
    "gradnormlorp_8bit": lambda params, **options: so.GradNormLoRP(params, rank=8, state_bits=8, **options),
    "adamw_8bit": lambda params, **options: so.SubspaceOptimizer(params, state_bits=8, **options),
    "random_adam": lambda params, **options: so.SubspaceOptimizer(params, so.RandomProjection(8), **options),
    "gaussian_adam": lambda params, **options: so.SubspaceOptimizer(
        params, so.RandomProjection(8, kind="gaussian"), **options
    ),
}
WHOLE = ("gradnormlorp", "flora", "apollo", "osd", "adamw", "lion", "adafactor")  # which need more of a gradient than R


@pytest.mark.parametrize("layerwise", [False, True], ids=["gradients", "R"])
@pytest.mark.parametrize("rate", ["number", "tensor"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_ordinary_step_waits_for_nothing(name, rate, layerwise, launches):
    with FakeTensorMode():
        lr = 0.1 if rate == "number" else torch.tensor(0.1, device=GPU)
        params, opt = started(lambda params: OPTIMIZERS[name](params, lr=lr, weight_decay=0.1))
        with NoCopies():
            if layerwise:
                opt.project_gradients([(0, param) for param in params])
                assert len(opt.lows) == (0 if name.startswith(WHOLE) else 3)
            opt.clip_grad_norm_(1.0)
            opt.step()
        assert launches
        assert all(opt.state[param]["age"] == 1 for param in params if "age" in opt.state[param])


@pytest.mark.parametrize("layerwise", [False, True], ids=["gradients", "R"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_launches_do_not_grow_with_the_bucket(name, layerwise, launches):
    """Two of a shape are the least that are batched."""
    counts = []
    for times in (2, 8):
        with FakeTensorMode():
            params, opt = started(OPTIMIZERS[name], SHAPES * times)
            launches.clear()
            with Ops() as ops:
                if layerwise:
                    opt.project_gradients([(0, param) for param in params])
                opt.step()
            counts.append((len(launches), ops.count))
    assert counts[0] == counts[1] and launches


def test_steps_that_wait_are_found_out(launches):
    """A step with a refresh does, one with a retraction, and one that is watched."""
    for name, options, wait in (
        ("galore", {}, lambda opt, param: opt.state[param].update(age=10**9)),
        ("galore", {}, lambda opt, param: opt.watch()),
        ("osd", {"retract_every": 10}, lambda opt, param: opt.state[param].update(age=10)),
    ):
        with FakeTensorMode():
            params, opt = started(partial(OPTIMIZERS[name], **options))
            wait(opt, params[0])
            with NoCopies(), pytest.raises((DataDependentOutputException, AssertionError)):
                opt.step()


# ---- replays of a CUDA graph, which move no ages --------------------------------------------------------------------


def stepped(opt, params, count):
    for _ in range(count):
        for param in params:
            param.grad = torch.ones_like(param)
        opt.step()


def ages(opt):
    return [torch.as_tensor(state["age"]).tolist() for state in opt.state.values() if "age" in state]


@pytest.mark.parametrize("stagger", [False, True])
def test_replays_are_counted_until_a_basis_is_due(stagger):
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(8, 6)), torch.nn.Parameter(torch.ones(6))]},
        {"params": [torch.nn.Parameter(torch.ones(3, 8, 6))], "batch_dims": 1},
    ]
    params = [param for group in groups for param in group["params"]]
    opt = so.GaLore(groups, rank=2, update_proj_gap=7, stagger=stagger)
    assert opt.ordinary_steps == 0
    stepped(opt, params, 1)
    left = opt.ordinary_steps
    assert left == 7 - max(torch.cat([torch.as_tensor(age).view(-1) for age in ages(opt)]))
    before = ages(opt)
    twin = copy.deepcopy(opt)
    twin_params = [param for group in twin.param_groups for param in group["params"]]
    stepped(twin, twin_params, left)
    opt.replayed(left)
    assert ages(opt) == ages(twin) != before
    assert opt.ordinary_steps == 0
    for steps in (1, -1, 0.0, None):
        with pytest.raises(
            ValueError, match=rf"replayed: steps={steps} must be an int of .* at most ordinary_steps, 0"
        ):
            opt.replayed(steps)
    stepped(opt, params, 1)
    assert opt.ordinary_steps > 0


@pytest.mark.parametrize(
    "make", [so.SubspaceOptimizer, partial(so.OnlineSubspaceDescent, rank=2)], ids=["adamw", "osd"]
)
def test_what_is_never_renewed_can_be_replayed_for_ever(make):
    weight = torch.nn.Parameter(torch.ones(8, 6))
    opt = make([weight])
    stepped(opt, [weight], 1)
    assert opt.ordinary_steps == math.inf
    opt.replayed(10**9)


def test_a_retraction_is_no_ordinary_step():
    """Whatever the gradients were: the host counts steps."""
    weight = torch.nn.Parameter(torch.ones(8, 6))
    opt = so.OnlineSubspaceDescent([weight], rank=2, basis_lr=0.1, retract_every=3)
    orthonormal, left = [], []
    for step in range(8):
        left.append(opt.ordinary_steps)
        weight.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)) * (step != 5)
        opt.step()
        basis = opt.state[weight]["basis"]
        orthonormal.append(torch.allclose(basis.mT @ basis, torch.eye(2), atol=1e-6))
    assert left == [0, 2, 1, 0, 2, 1, 0, 2]  # the first sets the basis
    assert orthonormal == [step % 3 == 0 for step in range(8)]
    assert opt.state[weight]["basis_step"] == 6
    assert opt.ordinary_steps == 1
    opt.replayed()
    assert opt.ordinary_steps == 0
