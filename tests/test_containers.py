"""What wraps an optimizer: accelerate's switch of parameters, Lightning's closure, torchtitan's container."""

import pytest
import torch
import torch.distributed as dist
from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.optimizer import LRSchedulersContainer, ParamGroupConfig
from training import FIVE, assert_same, noise, snapshot

import subspace_optim as so
from subspace_optim import distributed
from subspace_optim.integrations.torchtitan import SubspaceOptimizersContainer


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


def titan_job(name, folder, mesh):
    """What torchtitan's Trainer makes: a sharded model, the container, and torchtitan's schedule and checkpoints."""
    model = fully_shard(net(), mesh=mesh)
    projected = {"rank": 3, "update_proj_gap": 2, "lr": 0.01, "weight_decay": 0.1} | extra(name)
    rest = {"lr": 0.01, "betas": (0.8, 0.9)}
    optimizers = SubspaceOptimizersContainer.Config(
        implementation="foreach",
        param_groups=[
            ParamGroupConfig(pattern="0.weight", optimizer_name=name, optimizer_kwargs=projected),
            ParamGroupConfig(pattern="weight", optimizer_name="apollo", optimizer_kwargs=projected),
            ParamGroupConfig(pattern="0.bias", optimizer_name=name, optimizer_kwargs=rest),
            ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs=rest),
        ],
    ).build(model_parts=[model])
    schedule = LRSchedulersContainer.Config(warmup_steps=3).build(optimizers=optimizers, training_steps=9)
    config = CheckpointManager.Config(enable=True, interval=4, keep_latest_k=0)
    parts = {"model_parts": [model], "optimizers": optimizers, "lr_schedulers": schedule, "states": {}}
    return model, optimizers, schedule, config.build(dataloader=None, sd_adapter=None, base_folder=folder, **parts)


@pytest.mark.parametrize("name", FIVE)
@pytest.mark.filterwarnings("ignore:To get the last learning rate:UserWarning:torch.*")  # torchtitan's call
def test_a_run_of_torchtitan_goes_on_bit_for_bit(name, mesh, tmp_path):
    """From its checkpoint on disk, into a run that has no state but what torchtitan makes by a step of zeros."""

    def run(job, steps):
        model, optimizers, schedule, checkpoints = job
        for step in steps:
            train(model, optimizers, [step])
            schedule.step()
            checkpoints.save(step)
        return snapshot(dict(model.named_parameters()))

    first, second = (titan_job(name, str(tmp_path), mesh) for _ in range(2))
    assert [type(opt) for opt in first[1]] == [so.OPTIMIZERS[name], so.APOLLO, torch.optim.AdamW]
    run(first, range(1, 5))
    assert second[3].load()
    wanted = run(first, range(5, 8))
    assert_same(run(second, range(5, 8)), wanted)


def test_torchtitan_refuses_a_name_that_nobody_has():
    config = SubspaceOptimizersContainer.Config(param_groups=[ParamGroupConfig(pattern=".*", optimizer_name="galor")])
    with pytest.raises(NotImplementedError, match="galor"):
        config.build(model_parts=[net()])
