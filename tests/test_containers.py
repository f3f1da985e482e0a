"""What wraps an optimizer: accelerate's switch of parameters, Lightning's closure, torchtitan's container."""

import pytest
import torch
import torch.distributed as dist
from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from training import FIVE, assert_same, noise, snapshot

import subspace_optim as so
from subspace_optim import distributed


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def made(name, model):
    return so.create(model, name, rank=3, lr=0.01, weight_decay=0.1, update_proj_gap=2, **extra(name))


def extra(name):
    return {"basis_lr": 0.05} if name == "osd" else {}


def loss(model, step):
    return (model(noise(step, (5, 6)).float()) - noise(step + 50, (5, 4)).float()).square().mean()


def train(model, opt, steps):
    for step in steps:
        loss(model, step).backward()
        opt.step()
        opt.zero_grad()


@pytest.fixture(scope="module")
def mesh():
    """One process of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", [*FIVE, "apollo"])
@pytest.mark.parametrize("sharded", [False, True])
def test_accelerate_may_replace_every_parameter_before_the_first_step(name, sharded, mesh):
    """FSDP2 in accelerate: dummies that know the address of what they stand for, then the sharded parameters."""
    model, plain = net(), net()
    opt, other = made(name, model), made(name, plain)
    addresses = {key: param.data_ptr() for key, param in model.named_parameters()}
    for group in opt.param_groups:
        for i, param in enumerate(group["params"]):
            dummy = torch.empty(1)
            dummy.data_ptr = param.data_ptr()
            group["params"][i] = dummy
    if sharded:
        fully_shard(model, mesh=mesh)
    else:
        model = net()
    new = dict(model.named_parameters())
    fsdp2_switch_optimizer_parameters(opt, {addresses[key]: param for key, param in new.items()})
    train(model, opt, range(4))
    train(plain, other, range(4))
    assert all(isinstance(param, DTensor) == sharded for param in new.values())
    for key, param in plain.named_parameters():
        whole = distributed.whole(new[key])
        # Bit for bit, but for rules whose sums over a sharded dimension have a path of their own: float32, of order 1.
        torch.testing.assert_close(whole, param, rtol=0, atol=1e-6 if sharded else 0)


def test_sharded_parameters_take_their_part_of_a_checkpoint(mesh):
    model, plain = net(), net()
    theirs = torch.optim.AdamW(plain.parameters())
    train(plain, theirs, range(3))
    names = [name for name, _ in plain.named_parameters()]
    fully_shard(model, mesh=mesh)
    opt, other = made("galore", model), made("galore", plain)
    for each in (opt, other):
        so.import_checkpoint(each, theirs.state_dict(), names=names)
    for param, twin in zip(model.parameters(), plain.parameters()):
        own, whole = opt.state[param], other.state[twin]
        assert isinstance(own["exp_avg"], DTensor)
        for key, value in whole.items():
            assert torch.equal(distributed.whole(own[key]), value) if key != "age" else own[key] == value


@pytest.mark.filterwarnings("ignore:::lightning.*", "ignore:::torch.utils.data.*")
def test_lightning_steps_as_a_plain_loop(capsys):
    """Its closure holds forward, backward and clipping; it is called once a step, with gradients enabled."""
    import lightning

    calls = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch, index):
            calls.append(torch.is_grad_enabled())
            return loss(self.net, int(batch))

        def configure_optimizers(self):
            return made("galore", self.net)

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    run = lightning.Trainer(max_epochs=1, accelerator="cpu", gradient_clip_val=0.5, accumulate_grad_batches=2, **quiet)
    module = Module()
    run.fit(module, torch.utils.data.DataLoader(torch.arange(8), batch_size=1))
    assert calls == [True] * 8
    assert type(run.optimizers[0]) is so.GaLore
    plain = net()
    opt = made("galore", plain)
    for step in range(0, 8, 2):
        for micro in (step, step + 1):
            (loss(plain, micro) / 2).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        opt.step()
        opt.zero_grad()
    assert_same(snapshot(dict(module.net.named_parameters())), snapshot(dict(plain.named_parameters())))


def titan_groups(model, rank=3):
    """As torchtitan makes them: tensors, their names beside them, and hints for torch's optimizers."""
    kinds = {True: {"rank": rank, "update_proj_gap": 2}, False: {}}
    return [
        {
            "params": [p for p in model.parameters() if (p.ndim == 2) == matrix],
            "param_names": [n for n, p in model.named_parameters() if (p.ndim == 2) == matrix],
            "fused": False,
            "foreach": True,
            "lr": 0.01,
            **keys,
        }
        for matrix, keys in kinds.items()
    ]


def materialise(opt):
    """torchtitan and DCP: one step of zero gradients at lr 0, where there is no state."""
    if opt.state:
        return
    for group in opt.param_groups:
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    rates = [group["lr"] for group in opt.param_groups]
    for group in opt.param_groups:
        group["lr"] = 0.0
    opt.step(closure=None)
    for group, rate in zip(opt.param_groups, rates):
        group["lr"] = rate
    opt.zero_grad(set_to_none=True)


def flattened(opt):
    """One key for each value: state.{name}.{key} and param_groups.{name}.{key}."""
    materialise(opt)
    state_dict, flat = opt.state_dict(), {}
    for group in state_dict["param_groups"]:
        for name, index in zip(group["param_names"], group["params"]):
            for key, value in state_dict["state"][index].items():
                assert isinstance(value, torch.Tensor | int | float), key
                flat[f"state.{name}.{key}"] = value.clone() if isinstance(value, torch.Tensor) else value
            for key, value in group.items():
                if key not in ("params", "param_names"):
                    flat[f"param_groups.{name}.{key}"] = value
    return flat


def load_flattened(opt, flat):
    """As torchtitan does it: every state and group key of the fresh optimizer must be in the checkpoint."""
    materialise(opt)
    state, groups, index = {}, [], 0
    for group in opt.param_groups:
        indices = []
        for name, param in zip(group["param_names"], group["params"]):
            state[index] = {key: flat[f"state.{name}.{key}"] for key in opt.state[param]}
            indices.append(index)
            index += 1
        first = group["param_names"][0]
        keys = [key for key in group if key not in ("params", "param_names")]
        groups.append({"params": indices, **{key: flat[f"param_groups.{first}.{key}"] for key in keys}})
    opt.load_state_dict({"state": state, "param_groups": groups})


@pytest.mark.parametrize("name", [*FIVE, "apollo"])
def test_torchtitans_flat_state_goes_on_bit_for_bit(name):
    model = net()
    before = snapshot(dict(model.named_parameters()))
    opt = so.OPTIMIZERS[name](titan_groups(model))
    flattened(opt)
    assert_same(snapshot(dict(model.named_parameters())), before)
    train(model, opt, range(3))
    flat, weights = flattened(opt), snapshot(dict(model.named_parameters()))
    train(model, opt, range(3, 6))

    resumed = net()
    resumed.load_state_dict(weights)
    fresh = so.OPTIMIZERS[name](titan_groups(resumed))
    load_flattened(fresh, flat)
    train(resumed, fresh, range(3, 6))
    assert_same(snapshot(dict(resumed.named_parameters())), snapshot(dict(model.named_parameters())))


@pytest.mark.filterwarnings("ignore")
def test_the_real_torchtitan_container():
    pytest.importorskip("torchtitan", reason="torchtitan is not installed; its contract is what the other tests follow")
    from torchtitan.components.optimizer import ParamGroupConfig

    from subspace_optim.integrations.torchtitan import SubspaceOptimizersContainer

    def container(model):
        projected = {"rank": 3, "update_proj_gap": 2, "lr": 0.01}
        return SubspaceOptimizersContainer.Config(
            implementation="foreach",
            param_groups=[
                ParamGroupConfig(pattern="0.weight", optimizer_name="galore", optimizer_kwargs=projected),
                ParamGroupConfig(pattern="weight", optimizer_name="flora", optimizer_kwargs=projected),
                ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 0.01}),
            ],
        ).build(model_parts=[model])

    model, resumed = net(), net()
    opts, fresh = container(model), container(resumed)
    assert [type(opt) for opt in opts] == [so.GaLore, so.Flora, torch.optim.AdamW]
    train(model, opts, range(3))
    resumed.load_state_dict(model.state_dict())
    saved = {key: v.clone() if isinstance(v, torch.Tensor) else v for key, v in opts.state_dict().items()}
    fresh.load_state_dict(saved)
    train(model, opts, range(3, 6))
    train(resumed, fresh, range(3, 6))
    assert_same(snapshot(dict(resumed.named_parameters())), snapshot(dict(model.named_parameters())))
