"""`import_checkpoint`: from files laid out as the peers write them, and from the peers themselves where installed."""

import copy
import os
import sys
import types
from functools import partial

import numpy as np
import pytest
import torch
from cases import PROJ_TYPES
from oracles.galore import GaLoreOracle
from oracles.subspace import Basis
from training import FIVE, noise, snapshot

import subspace_optim as so
from subspace_optim import storage
from subspace_optim.state import plan_for

SETTINGS = {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.1}
GALORE = {"rank": 3, "update_proj_gap": 4, "scale": 0.5}
BEFORE, AFTER = 6, 8  # refreshes come before steps 1, 5 and 9
SHAPES = {"tall": (12, 7), "wide": (7, 12)}


def matrices(shape, dtype=torch.float64):
    """A dense matrix and one to project."""
    return [torch.nn.Parameter(noise(i, shape).to(dtype)) for i in range(2)]


def gradients(shape, step, dtype=torch.float64):
    return [noise(100 + 10 * step + i, shape).to(dtype) for i in range(2)]


def groups(params, **keys):
    return [{"params": params[:1]}, {"params": params[1:], **keys}]


def train(opt, params, steps):
    for step in steps:
        for param, grad in zip(params, gradients(params[0].shape, step, params[0].dtype)):
            param.grad = grad
        opt.step()


class GaLoreProjector:
    """The fields of galore_torch's, to be pickled under its name."""

    def __init__(self, **fields):
        self.__dict__.update({"verbose": False, **fields})


@pytest.fixture
def galore_file(tmp_path, monkeypatch):
    """A function that saves a state dict whose projectors are pickled as galore_torch's are."""
    for name in ("galore_torch", "galore_torch.galore_projector"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(GaLoreProjector, "__module__", "galore_torch.galore_projector")
    monkeypatch.setattr(sys.modules["galore_torch.galore_projector"], "GaLoreProjector", GaLoreProjector, raising=False)

    def save(state_dict):
        path = tmp_path / "optimizer.pt"
        torch.save(state_dict, path)
        for name in ("galore_torch", "galore_torch.galore_projector"):
            monkeypatch.setitem(sys.modules, name, None)  # not installed where it is read
        return path

    return save


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_galore_goes_on_as_its_oracle(galore_file, shape, proj_type):
    """Until the next refresh, whose singular vectors have signs of their own."""
    params = matrices(shape)
    arrays = [p.detach().numpy() for p in params]
    keys = GALORE | {"proj_type": proj_type}
    whole = Basis()
    oracles = [
        GaLoreOracle(arrays[0], basis=lambda G, t: whole, eps=1e-6, official=True, **SETTINGS),
        GaLoreOracle(arrays[1], eps=1e-6, official=True, **SETTINGS, **keys),
    ]
    for step in range(BEFORE):
        for oracle, grad in zip(oracles, gradients(shape, step)):
            oracle.step(grad.numpy())
    tensor = partial(torch.tensor, dtype=torch.float64)
    basis = oracles[1].basis
    factors = [tensor(f) for f in (basis.P, None if basis.Q is None else basis.Q.T) if f is not None]
    projector = GaLoreProjector(ortho_matrix=factors if len(factors) > 1 else factors[0], **keys)
    states = {i: {"step": o.t, "exp_avg": tensor(o.M), "exp_avg_sq": tensor(o.V)} for i, o in enumerate(oracles)}
    states[1]["projector"] = projector
    path = galore_file({"state": states, "param_groups": [{"params": [0]}, {"params": [1], **keys}]})

    with torch.no_grad():
        for param, oracle in zip(params, oracles):
            param.copy_(tensor(oracle.W))
    opt = so.GaLore(groups(params, **keys), **SETTINGS, compat="official")
    with pytest.raises(ValueError, match="pass weights_only=False"):
        so.import_checkpoint(opt, path)
    assert not opt.state
    so.import_checkpoint(opt, path, weights_only=False)
    assert opt.state[params[1]]["age"] == BEFORE - GALORE["update_proj_gap"]
    for step in range(BEFORE, AFTER):
        train(opt, params, [step])
        for param, oracle, grad in zip(params, oracles, gradients(shape, step)):
            oracle.step(grad.numpy())
            np.testing.assert_allclose(param.detach().numpy(), oracle.W, rtol=0, atol=1e-13)  # of order 1 in float64
    refreshed = opt.state[params[1]]["age"]
    train(opt, params, [AFTER])
    assert (refreshed, opt.state[params[1]]["age"]) == (4, 1)


def peer(name):
    return pytest.importorskip(name, reason=f"{name} is not installed; files of its layout are read in the other tests")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_real_galore_torch(tmp_path, shape):
    cls = peer("galore_torch").GaLoreAdamW
    keys = GALORE | {"proj_type": "std"}
    params = matrices(shape, torch.float32)
    theirs = cls(groups(params, **keys), **SETTINGS, no_deprecation_warning=True)
    train(theirs, params, range(BEFORE))
    torch.save(theirs.state_dict(), tmp_path / "optimizer.pt")
    twins = copy.deepcopy(params)
    opt = so.GaLore(groups(twins, **keys), **SETTINGS, compat="official")
    so.import_checkpoint(opt, tmp_path / "optimizer.pt", source="galore_torch", weights_only=False)
    direct = so.GaLore(groups(matrices(shape), **keys), **SETTINGS)
    so.import_checkpoint(direct, theirs.state_dict())
    assert direct.state[direct.param_groups[1]["params"][0]]["age"] == 2
    train(theirs, params, range(BEFORE, AFTER))
    train(opt, twins, range(BEFORE, AFTER))
    for param, twin in zip(params, twins):
        torch.testing.assert_close(twin, param, rtol=0, atol=1e-6)  # float32, of order 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [8, 32])
def test_the_real_bitsandbytes(bits):
    """Dequantised as bitsandbytes does it: its own next step is in 8 bits again, hence the tolerance."""
    bnb = peer("bitsandbytes")
    params = [torch.nn.Parameter(noise(i, (64, 80)).float()) for i in range(2)]
    theirs = bnb.optim.AdamW(params, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, optim_bits=bits)
    train(theirs, params, range(BEFORE))
    twins = copy.deepcopy(params)
    opt = so.SubspaceOptimizer(twins, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)
    so.import_checkpoint(opt, theirs.state_dict(), source="bitsandbytes")
    train(theirs, params, [BEFORE])
    train(opt, twins, [BEFORE])
    for param, twin in zip(params, twins):
        assert (twin - param).abs().max() < (2e-5 if bits == 32 else 2e-4)


def dynamic_map(signed):
    """bitsandbytes' table of 256 values: linear fractions in each of seven decades, and 0 and 1."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2**decade * (1 if signed else 2) + 1)
        middles = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*middles, *(-middles if signed else ())]
    return torch.tensor(sorted(values), dtype=torch.float32)


def blockwise(x, signed, block=256):
    """(codes, table, scales) of a tensor, as bitsandbytes keeps them."""
    table = dynamic_map(signed)
    padded = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % block)).view(-1, block)
    scales = padded.abs().amax(1)
    unit = (padded / scales.unsqueeze(1)).flatten()[: x.numel()]
    codes = (unit.unsqueeze(1) - table).abs().argmin(1).to(torch.uint8).view(x.shape)
    return codes, table, scales


def adamw(params, steps):
    opt = torch.optim.AdamW([{"params": [param]} for param in params], **SETTINGS)
    train(opt, params, steps)
    return opt


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", [256, 2048])
def test_bitsandbytes_goes_on_from_its_codes(tmp_path, block, nested):
    """Exactly as torch's AdamW goes on from the decoded moments; small tensors are in 32 bits."""
    params = [torch.nn.Parameter(noise(i, shape).float()) for i, shape in enumerate([(80, 63), (7, 5)])]
    for param in params:
        param.grad = noise(9, param.shape).float()
    theirs = torch.optim.AdamW(params, **SETTINGS)
    theirs.step()
    assert len(dynamic_map(True)) == len(dynamic_map(False)) == 256
    states = {}
    for i, param in enumerate(params):
        state = theirs.state[param]
        quantised = {"state1": state["exp_avg"], "state2": state["exp_avg_sq"]}
        if i == 0:
            for number, key in (("1", "exp_avg"), ("2", "exp_avg_sq")):
                codes, table, scales = blockwise(state[key], key == "exp_avg", block)
                quantised |= {f"state{number}": codes, f"qmap{number}": table, f"absmax{number}": scales}
                spread = scales.repeat_interleave(block)[: codes.numel()].view(codes.shape)
                error = (table[codes.long()] * spread - state[key]).abs()
                assert (error <= 0.1 * spread).all()  # the codes mean what they should
                state[key].copy_(table[codes.long()] * spread)
        states[i] = {"step": 1, **({"__bnb_optimizer_quant_state__": quantised} if nested else quantised)}
    torch.save({"state": states, "param_groups": [{"params": [0, 1]}]}, tmp_path / "optimizer.pt")
    twins = copy.deepcopy(params)
    opt = so.SubspaceOptimizer(twins, **SETTINGS)
    so.import_checkpoint(opt, tmp_path / "optimizer.pt")
    for step in range(3):
        for a, b in zip(params, twins):
            a.grad = noise(20 + step, a.shape).float()
            b.grad = a.grad.clone()
        theirs.step()
        opt.step()
    for param, twin in zip(params, twins):
        torch.testing.assert_close(twin, param, rtol=0, atol=1e-6)  # float32, of order 1


def test_torchs_adamw_goes_on_dense():
    params = matrices((12, 7))
    theirs = adamw(params, range(BEFORE))
    twins = copy.deepcopy(params)
    opt = so.SubspaceOptimizer(groups(twins), **SETTINGS)
    so.import_checkpoint(opt, theirs.state_dict(), source="torch")
    train(theirs, params, range(BEFORE, AFTER))
    train(opt, twins, range(BEFORE, AFTER))
    for param, twin in zip(params, twins):
        torch.testing.assert_close(twin, param, rtol=0, atol=1e-14)
    assert opt.param_groups[0]["lr"] == SETTINGS["lr"]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_dense_moments_start_in_the_subspace_of_the_first(shape, proj_type):
    """back(M) is the best approximation of the moment on its side; V is the variance of independent entries."""
    params = matrices(shape)
    theirs = adamw(params, range(BEFORE))
    moment, square = (theirs.state[params[1]][key] for key in ("exp_avg", "exp_avg_sq"))
    opt = so.GaLore(groups(params, **GALORE, proj_type=proj_type), **SETTINGS)
    so.import_checkpoint(opt, theirs.state_dict())
    state = opt.state[params[1]]
    u, s, vh = torch.linalg.svd(moment)
    best = (u[:, :3] * s[:3]) @ vh[:3]
    right, left = state.get("basis_right", state.get("basis")), state.get("basis_left", state.get("basis"))
    side = {"full": "both"}.get(proj_type) or opt.summary().splitlines()[1].split(",")[0]
    if side == "right":
        back, wanted = state["exp_avg"] @ right.mT, square @ right**2
    elif side == "left":
        back, wanted = left @ state["exp_avg"], (left**2).mT @ square
    else:
        back, wanted = left @ state["exp_avg"] @ right.mT, (left**2).mT @ square @ right**2
    torch.testing.assert_close(back, best, rtol=0, atol=1e-13)
    torch.testing.assert_close(state["exp_avg_sq"], wanted, rtol=0, atol=1e-13)
    assert float(state["step"]) == BEFORE
    assert 0 <= state["age"] < GALORE["update_proj_gap"]
    before = snapshot(dict(enumerate(params)))
    train(opt, params, range(BEFORE, AFTER))
    assert all(not torch.equal(before[i], param) for i, param in enumerate(params))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_moments_and_bases_are_stored_in_the_bits_of_their_group(shape):
    """Within the coarsest steps of 8 bits, relative to the largest element: 1/64 of a moment, 1/254 of a basis."""
    params = matrices(shape, torch.float32)
    theirs = adamw(params, range(BEFORE))
    plain, coded = (
        so.GaLore(groups(params, **GALORE), **SETTINGS, **options)
        for options in ({}, {"state_bits": 8, "basis_bits": 8})
    )
    for opt in (plain, coded):
        so.import_checkpoint(opt, theirs.state_dict())
    for param, group in zip(params, coded.param_groups):
        codecs = storage.codecs(plan_for(param, group))
        assert codecs
        for key, codec in codecs.items():
            if key in coded.state[param]:
                kept, scales = coded.state[param][key], coded.state[param][f"{key}_scale"]
                wanted = plain.state[param][key]
                error = (codec.decode([kept], [scales], torch.float32)[0] - wanted).abs().max()
                assert 0 < error <= wanted.abs().max() / 64, key
    train(coded, params, [BEFORE])


def test_random_bases_and_stacks_take_dense_moments():
    experts = torch.nn.Parameter(noise(0, (3, 8, 5)))
    theirs = torch.optim.AdamW([experts], **SETTINGS)
    for step in range(3):
        experts.grad = noise(step, (3, 8, 5))
        theirs.step()
    for opt in (
        so.SubspaceOptimizer([experts], so.RandomProjection(2), batch_dims=1),
        so.GaLore([experts], rank=2, batch_dims=1),
        so.APOLLO([experts], rank=2, batch_dims=1),
    ):
        so.import_checkpoint(opt, theirs.state_dict())
        state = opt.state[experts]
        assert state["exp_avg"].shape == (3, 8, 2)
        for j in range(3):
            basis = state["basis"][j] if "basis" in state else None
            if basis is not None:
                expected = theirs.state[experts]["exp_avg"][j] @ basis
                torch.testing.assert_close(state["exp_avg"][j], expected, rtol=0, atol=1e-13)
        opt.step()


def test_parameters_are_matched_by_name_where_both_have_names():
    (a, b), (c, d) = matrices((12, 7)), matrices((12, 7))
    theirs = torch.optim.AdamW([("first", a), ("second", b)], **SETTINGS)
    train(theirs, [a, b], range(2))
    opt = so.SubspaceOptimizer([{"params": [("second", d)]}, {"params": [("first", c)]}], **SETTINGS)
    so.import_checkpoint(opt, theirs.state_dict())
    assert torch.equal(opt.state[c]["exp_avg"], theirs.state[a]["exp_avg"])
    assert torch.equal(opt.state[d]["exp_avg"], theirs.state[b]["exp_avg"])
    other = so.SubspaceOptimizer([("first", torch.nn.Parameter(torch.ones(2, 2)))])
    with pytest.raises(ValueError, match="has 2 parameters and the optimizer 1; only one of them has second"):
        so.import_checkpoint(other, theirs.state_dict())


def test_names_lead_from_a_plain_adamw_to_groups_in_another_order():
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Embedding(5, 6), torch.nn.Linear(8, 6))
    theirs = torch.optim.AdamW(model.parameters())
    for i, param in enumerate(model.parameters()):
        param.grad = noise(i, param.shape).float()
    theirs.step()
    opt = so.create(model, "galore", rank=3)
    so.import_checkpoint(opt, theirs.state_dict(), names=[name for name, _ in model.named_parameters()])
    for param in model.parameters():
        moment = theirs.state[param]["exp_avg"]
        if opt.state[param]["exp_avg"].shape == moment.shape:
            assert torch.equal(opt.state[param]["exp_avg"], moment)
    assert sum("age" in state for state in opt.state.values()) == 2


def test_a_tensor_without_a_moment_waits_for_its_first_gradient():
    params = matrices((12, 7))
    params[1].grad = torch.zeros(12, 7, dtype=torch.float64)
    theirs = torch.optim.AdamW(params, **SETTINGS)
    theirs.step()  # the first has no gradient at all, the second a zero one
    opt = so.GaLore(params, rank=3)
    so.import_checkpoint(opt, theirs.state_dict())
    assert params[0] not in opt.state
    assert opt.state[params[1]]["age"] == -1


@pytest.mark.parametrize(
    ("change", "options", "match"),
    [
        ({}, {"source": "bnb"}, "source='bnb' must be one of auto, galore_torch, bitsandbytes, torch"),
        ({}, {"source": "galore_torch"}, "source='galore_torch', but the checkpoint is of torch"),
        ({"param_groups": [{"params": [0, 1]}]}, {}, r"groups have \[2\] parameters and the optimizer's \[1, 1\]"),
        ({}, {"names": ["a"]}, "names has 1 entries for 2 parameters"),
        ({"model": {}, "state": None}, {}, "'state' and 'param_groups', and this has param_groups, model"),
        ({"state": {0: {"momentum_buffer": torch.ones(12, 7)}}}, {}, "states of momentum_buffer are of none of"),
        ({"state": {}}, {}, "states of nothing are of none of"),
        ({"state": {0: {"exp_avg_sq": torch.ones(12, 7), "step": 1}}}, {}, "not what AdamW keeps"),
        (
            {"state": {1: {"exp_avg": torch.ones(3, 3), "exp_avg_sq": torch.ones(3, 3), "step": 1}}},
            {},
            r"parameter 0 of shape \(12, 7\) has moments of shape \(3, 3\) in the checkpoint, and \(12, 7\) here",
        ),
        (
            {"state": {0: {"exp_avg": torch.full((12, 7), torch.nan), "exp_avg_sq": torch.ones(12, 7), "step": 1}}},
            {},
            r"parameter 0 of shape \(12, 7\) has a moment in the checkpoint that is not finite",
        ),
        (
            {"state": {0: {"exp_avg": torch.ones(12, 7), "exp_avg_sq": -torch.ones(12, 7), "step": 1}}},
            {},
            "negative sq",
        ),
        (
            {"state": {0: {"state1": torch.ones(12, 7).byte(), "state2": torch.ones(12, 7).byte(), "step": 1}}},
            {},
            "8-bit moments without blocks of 256 or 2048",
        ),
        (
            {
                "state": {
                    0: {
                        "exp_avg": torch.ones(12, 2),
                        "exp_avg_sq": torch.ones(12, 2),
                        "step": 1,
                        "projector": GaLoreProjector(ortho_matrix=torch.ones(2, 7), update_proj_gap=4),
                    }
                }
            },
            {},
            r"moments of shape \(12, 2\) in the checkpoint, and \(12, 3\) here; use the model",
        ),
        (
            {
                "state": {
                    0: {
                        "exp_avg": torch.ones(12, 3),
                        "exp_avg_sq": torch.ones(12, 3),
                        "step": 1,
                        "projector": GaLoreProjector(ortho_matrix=torch.ones(12, 3), update_proj_gap=4),
                    }
                }
            },
            {},
            r"projections of shape \(12, 3\) in the checkpoint, which is not proj_type of the right side and rank 3",
        ),
    ],
)
def test_what_does_not_fit_changes_nothing(change, options, match):
    params = matrices((12, 7), torch.float32)
    theirs = adamw(params, range(2))
    opt = so.GaLore([{"params": [param]} for param in params], rank=3)
    train(opt, params, range(3))
    before, weights = copy.deepcopy(opt.state_dict()), snapshot(dict(enumerate(params)))
    foreign = {key: value for key, value in (theirs.state_dict() | change).items() if value is not None}
    with pytest.raises(ValueError, match=match):
        so.import_checkpoint(opt, foreign, **options)
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after["state"][i][key]))
    assert all(torch.equal(param, weights[i]) for i, param in enumerate(params))


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    opt = so.GaLore(matrices((12, 7)))
    file = tmp_path / "optimizer.pt"
    torch.save(opt.state_dict(), file)
    for content in (b"", b"hello", file.read_bytes()[:300]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"optimizer\.pt is no file of torch.save, or a part of one"):
            so.import_checkpoint(opt, file)
    torch.save(torch.zeros(3), file)
    with pytest.raises(ValueError, match="has 'state' and 'param_groups', and this is <class 'torch"):
        so.import_checkpoint(opt, file)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        so.import_checkpoint(opt, tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["flora", "gradnormlorp"])
def test_rules_that_keep_other_moments_say_so(name):
    params = matrices((12, 7))
    theirs = adamw(params, range(2))
    opt = FIVE[name]([{"params": [param]} for param in params], rank=3)
    with pytest.raises(ValueError, match="does not keep Adam's moments"):
        so.import_checkpoint(opt, theirs.state_dict())
    assert not opt.state


class Evil:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_no_code_of_a_file_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state": {0: {"projector": Evil()}}, "param_groups": []}, "optimizer.pt")
    for weights_only in (True, False):
        with pytest.raises(Exception, match=r"(posix|nt)\.system"):
            so.import_checkpoint(so.GaLore(matrices((12, 7))), "optimizer.pt", weights_only=weights_only)
    assert not (tmp_path / "harmed").exists()
