"""The peers' names and keys, in plain loops and in trainers that import them by name."""

import importlib
import sys
from functools import partial

import pytest
import torch
from golden import GOLDEN, STEPS, TOLERANCE, gradient, initial_weight, summary
from tiny_llama import arguments, llama, trainer, weights
from training import noise

import subspace_optim as so
from subspace_optim import compat
from subspace_optim.compat.apollo_torch import APOLLOAdamW
from subspace_optim.compat.galore_torch import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from subspace_optim.integrations.transformers import check_trainer

adafactor = partial(GaLoreAdafactor, relative_step=False, scale_parameter=False)
GALORE = {"rank": 2, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
CLASSES = {
    "galore": (GaLoreAdamW, GALORE),
    "galore_8bit": (GaLoreAdamW8bit, GALORE),
    "galore_adafactor": (partial(adafactor, beta1=0.9), GALORE),
    "apollo": (APOLLOAdamW, GALORE | {"proj": "random", "scale_type": "channel", "scale": 1.0}),
    "apollo_mini": (APOLLOAdamW, GALORE | {"proj": "random", "scale_type": "tensor", "rank": 1, "scale": 128.0}),
}


def groups(shape=(12, 7), **keys):
    """As the peers' READMEs make them: a group without `rank`, and one with."""
    regular, projected = (torch.nn.Parameter(noise(i, shape)) for i in range(2))
    return [{"params": [regular]}, {"params": [projected], **keys}]


@pytest.mark.parametrize("name", CLASSES)
def test_the_peers_groups(name):
    cls, keys = CLASSES[name]
    entries = groups(**keys)
    before = [group["params"][0].detach().clone() for group in entries]
    opt = cls(entries, lr=0.01)
    for step in range(5):
        for i, group in enumerate(opt.param_groups):
            group["params"][0].grad = noise(10 * step + i, (12, 7))
        opt.step()
    dense, projected = (opt.state[group["params"][0]] for group in opt.param_groups)
    assert "age" in projected
    assert "age" not in dense
    assert all(not torch.equal(old, group["params"][0]) for old, group in zip(before, opt.param_groups))
    assert {key: opt.param_groups[1][key] for key in keys} == keys
    fresh = cls(groups(**keys), lr=0.01)
    fresh.load_state_dict(opt.state_dict())
    assert fresh.param_groups[1]["rank"] == keys["rank"]


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)], ids=str)
@pytest.mark.parametrize("name", ["galore", "galore_adafactor", "apollo", "apollo_mini"])
def test_the_peers_numbers(name, shape):
    """compat="official" under the peers' names: the golden rows at their third step, which no SVD's signs touch."""
    cls, keys = CLASSES[name]
    param = torch.nn.Parameter(torch.tensor(initial_weight(shape)))
    opt = cls([{"params": [param], **keys}], lr=0.01, weight_decay=0.1, compat="official")
    for t in range(STEPS[0]):
        param.grad = torch.tensor(gradient(shape, t))
        opt.step()
    error = abs(summary(param.detach().double().numpy()) - torch.tensor(GOLDEN[name].values[shape, 3]).numpy()).max()
    assert error < TOLERANCE


FACTORY = {"galore": {"rank": 2, "update_proj_gap": 3, "scale": 2.0, "proj_type": "std"}}
FACTORY["apollo"] = FACTORY["galore"] | {"proj": "random", "scale_type": "channel", "scale_front": False}
RATES = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-8}


@pytest.mark.parametrize(
    ("cls", "keys", "options"),
    [
        (GaLoreAdamW, FACTORY["galore"], RATES),
        (GaLoreAdamW8bit, FACTORY["galore"], RATES | {"optim_bits": 8, "is_paged": False}),
        (GaLoreAdafactor, FACTORY["galore"], {"lr": 0.01, "scale_parameter": False, "relative_step": False}),
        (APOLLOAdamW, FACTORY["apollo"], RATES),
    ],
)
def test_llama_factorys_call(cls, keys, options):
    """Three groups, the first maybe empty, and what transformers gives for its `optim`."""
    dense, projected = (torch.nn.Parameter(noise(i, (12, 7))) for i in range(2))
    decayed = {"weight_decay": 0.1}
    entries = [
        {"params": [], "weight_decay": 0.0}, {"params": [dense], **decayed}, {"params": [projected], **decayed, **keys},
    ]  # fmt: skip
    opt = cls(entries, **options)
    for param in (dense, projected):
        param.grad = noise(5, (12, 7))
    opt.step()
    assert "age" in opt.state[projected]
    assert "age" not in opt.state[dense]
    assert [group["weight_decay"] for group in opt.param_groups] == [0.0, 0.1, 0.1]
    assert opt.param_groups[2]["betas"] == options.get("betas", (0.0, 0.999))


def test_a_plain_list_of_parameters_is_dense():
    for cls in (GaLoreAdamW, APOLLOAdamW):
        opt = cls([torch.nn.Parameter(torch.ones(300, 200))])
        assert opt.param_groups[0]["rank"] is None
        assert (opt.defaults["eps"], opt.defaults["weight_decay"]) == (1e-6, 0.0)


def test_what_has_no_counterpart_is_refused():
    params = [torch.nn.Parameter(torch.ones(3, 3))]
    for make, match in (
        (partial(GaLoreAdamW, correct_bias=False), "correct_bias=False has no counterpart"),
        (partial(APOLLOAdamW, correct_bias=False), "correct_bias=False has no counterpart"),
        (partial(GaLoreAdamW8bit, percentile_clipping=95), "percentile_clipping=95 has no counterpart"),
        (GaLoreAdafactor, "relative_step=True has no counterpart"),
        (partial(GaLoreAdafactor, relative_step=False), "lr=None asks for a relative step"),
        (partial(GaLoreAdamW, update_proj_gapp=3), "did you mean 'update_proj_gap'"),
    ):
        with pytest.raises(ValueError, match=match):
            make(params)


def test_apollo_groups_share_projector_and_scale_type():
    mixed = [*groups(rank=2, proj="svd"), *groups(rank=2, proj="random")]
    with pytest.raises(ValueError, match="group 3 has proj='random' and another 'svd'"):
        APOLLOAdamW(mixed)
    opt = APOLLOAdamW(groups(rank=2, scale_type="tensor", scale_front=True))
    with pytest.raises(ValueError, match="group 2 has scale_type='channel' and another 'tensor'"):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(4, 4))], "scale_type": "channel"})
    assert opt.rule.scale_type == "tensor"
    assert opt.param_groups[1]["scale_front"]
    assert APOLLOAdamW(groups(rank=2), disable_nl=True).rule.growth is None


@pytest.fixture
def clean(monkeypatch):
    """Neither peer is imported, before or after."""
    utils = importlib.import_module("transformers.utils.import_utils")
    for name in compat.MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    yield
    monkeypatch.undo()
    for name in compat.MODULES:
        getattr(utils, f"is_{name}_available").cache_clear()


HF = {
    "galore_adamw": (GaLoreAdamW, "rank=4, update_proj_gap=2, scale=0.10"),
    "galore_adamw_8bit": (GaLoreAdamW8bit, "rank=4, update_proj_gap=2"),
    "galore_adafactor": (GaLoreAdafactor, "rank=4"),
    "apollo_adamw": (APOLLOAdamW, "rank=1, scale_type=tensor, scale=128"),
}


@pytest.mark.parametrize("optim", HF)
def test_transformers_finds_them_by_name(clean, tmp_path, optim):
    cls, optim_args = HF[optim]
    compat.install()
    run = trainer(
        arguments(tmp_path, optim=optim, optim_args=optim_args, optim_target_modules=["self_attn", "mlp"], max_steps=3)
    )
    run.train()
    opt = run.optimizer.optimizer
    assert type(opt) is cls
    assert sum("age" in state for state in opt.state.values()) == 2 * 7
    assert opt.param_groups[1]["rank"] == int(optim_args[5])
    assert all(not torch.equal(param, weights(llama())[name]) for name, param in weights(run.model).items())


def test_what_transformers_drops_is_said(clean, tmp_path):
    """PEERS.md, D20: its GaLore handler ignores weight_decay, betas and eps."""
    compat.install("galore_torch")
    settings = {"optim": "galore_adamw", "optim_target_modules": "all-linear", "optim_args": "rank=4"}
    run = trainer(arguments(tmp_path, adam_beta1=0.8, **settings))
    with pytest.raises(ValueError, match=r"adam_beta1 and adam_beta2=\(0.8, 0.999\).*adam_epsilon.*weight_decay=0.1"):
        check_trainer(run)


def test_layerwise_hooks_step_every_parameter_by_itself(clean, tmp_path):
    """One optimizer a parameter, as transformers' and LLaMA-Factory's layerwise modes make them."""
    compat.install("galore_torch")
    settings = {"optim": "galore_adamw_layerwise", "optim_target_modules": ["mlp"], "optim_args": "rank=4"}
    run = trainer(arguments(tmp_path, max_steps=2, max_grad_norm=0.0, **settings))
    run.train()
    assert all(not torch.equal(param, weights(llama())[name]) for name, param in weights(run.model).items())


def test_install_refuses_what_it_cannot_do(clean, monkeypatch):
    with pytest.raises(ValueError, match="'galore' must be one of galore_torch, apollo_torch"):
        compat.install("galore")
    monkeypatch.setitem(sys.modules, "apollo_torch", so)
    with pytest.raises(ImportError, match="apollo_torch is already imported from"):
        compat.install()
    assert sys.modules["galore_torch"] is None
