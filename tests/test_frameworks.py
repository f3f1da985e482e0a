"""The real thing: transformers' Trainer, accelerate, and DDP on two ranks."""

import os
import subprocess
import sys
from pathlib import Path

import accelerated
import ddp
import pytest
import tiny_llama
import torch
from accelerate import Accelerator
from tiny_llama import HALF, STEPS, arguments, llama, rows, weights
from torch import nn
from torch.utils.data import DataLoader
from training import FIVE, assert_same, noise
from transformers import Trainer

import subspace_optim as so

KWARGS = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "rank": 4, "update_proj_gap": 2}


def trainer(folder, cls=so.GaLore, kwargs=KWARGS, **settings):
    return tiny_llama.trainer(arguments(folder, **settings), (cls, dict(kwargs)))


@pytest.mark.parametrize("name", FIVE)
def test_trainer_resumes_bit_for_bit(tmp_path, name):
    """Across a refresh and a scheduler; the class and the groups are what was asked for (D20, ms-swift#10143)."""
    straight = trainer(tmp_path / "straight", FIVE[name])
    straight.train()
    opt = straight.optimizer.optimizer
    assert type(opt) is FIVE[name]
    vectors = {p.ndim < 2: group["weight_decay"] for group in opt.param_groups for p in group["params"]}
    assert vectors == {False: 0.1, True: 0.0}
    for group in opt.param_groups:
        assert (group["betas"], group["eps"], group["rank"]) == (KWARGS["betas"], KWARGS["eps"], KWARGS["rank"])
        assert group["lr"] == straight.lr_scheduler.get_last_lr()[0] < group["initial_lr"] == KWARGS["lr"]
    assert sum("age" in state for state in opt.state.values()) == 2 * 7 + 2  # linear layers, embedding and head

    resumed = trainer(tmp_path / "resumed", FIVE[name])
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{HALF}"))
    assert resumed.state.global_step == STEPS
    assert_same(weights(resumed.model), weights(straight.model))
    start = weights(llama())
    assert all(not torch.equal(param, start[name]) for name, param in weights(straight.model).items())


def test_trainer_learns_and_accumulates_gradients(tmp_path):
    """Two micro-batches of two give the step of one batch of four, to rounding."""
    whole = trainer(tmp_path / "whole")
    parts = trainer(tmp_path / "parts", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    whole.train()
    parts.train()
    assert parts.state.global_step == STEPS
    for name, param in weights(parts.model).items():
        # Weights of about 0.02 moved by about 0.01 a step; Adam's first steps enlarge the rounding of small gradients.
        torch.testing.assert_close(param, weights(whole.model)[name], rtol=0, atol=2e-4)
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_trainer_takes_the_groups_of_param_groups(tmp_path):
    run = trainer(tmp_path)
    groups = so.param_groups(run.model, rank=4, weight_decay=0.2)
    run.optimizer_cls_and_kwargs = (so.GaLore, {"params": groups, "lr": 0.01})
    run.train()
    opt = run.optimizer.optimizer
    assert sum("age" in state for state in opt.state.values()) == 2 * 7
    assert {group["weight_decay"] for group in opt.param_groups} == {0.2, 0.0}


def test_trainer_takes_an_optimizer_made_by_create(tmp_path):
    model = llama()
    opt = so.create(model, "osd", rank=4, lr=0.01)
    run = trainer(tmp_path)
    made = Trainer(model=model, args=run.args, train_dataset=rows(), optimizers=(opt, None))
    made.train()
    assert made.optimizer.optimizer is opt
    assert all(not torch.equal(param, weights(llama())[name]) for name, param in weights(model).items())


@pytest.mark.parametrize("name", FIVE)
def test_accelerate(tmp_path, name):
    """prepare, accumulate, clip and step give the weights of a plain loop; save_state and load_state resume it."""

    def parts():
        model = ddp.model(torch.float32)
        opt = ddp.optimizer(name, model)
        data = [(noise(i, (8,)).float(), noise(50 + i, (4,)).float()) for i in range(32)]
        return model, opt, DataLoader(data, batch_size=4)

    plain, opt, loader = parts()
    for i, (x, y) in enumerate(loader):
        ((plain(x) - y).square().mean() / 2).backward()
        if i % 2:
            nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            opt.step()
            opt.zero_grad()

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)

    def train(model, opt, batches):
        for x, y in batches:
            with accelerator.accumulate(model):
                accelerator.backward((model(x) - y).square().mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                opt.zero_grad()

    model, opt, loader = accelerator.prepare(*parts())
    assert type(opt.optimizer) is FIVE[name]
    batches = list(loader)
    train(model, opt, batches[:4])
    accelerator.save_state(tmp_path)
    train(model, opt, batches[4:])
    assert_same(weights(model), weights(plain))
    train(model, opt, batches[:4])  # somewhere else
    accelerator.load_state(tmp_path)
    train(model, opt, batches[4:])
    assert_same(weights(model), weights(plain))


def launch(script, folder):
    """Run a script on two real ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(Path(script.__file__)), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two real ranks saved."""
    folder = tmp_path_factory.mktemp("ddp")
    launch(ddp, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.distributed
def test_accelerate_shards_trains_saves_and_resumes(tmp_path):
    """FSDP2 by `prepare`, which replaces every parameter of the optimizer, and its own save_state and load_state."""
    launch(accelerated, tmp_path)
    ends = torch.load(tmp_path / "ends.pt")
    for name in accelerated.NAMES:
        model = llama()
        opt = accelerated.optimizer(name, model)
        for step in range(accelerated.STEPS):
            accelerated.loss(model, step).backward()
            opt.step()
            opt.zero_grad()
        torch.testing.assert_close(ends[name], weights(model), rtol=0, atol=1e-6)  # float32: sums in another order
        assert_same(ends[name, "resumed"], ends[name])


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "dtype"), ddp.CELLS, ids=str)
def test_ddp_on_two_ranks_is_one_process_with_the_whole_batch(ranks, name, dtype):
    """Bit for bit: halving a loss and halving its gradients are both exact."""
    net = ddp.model(dtype)
    opt = ddp.optimizer(name, net)
    for step in range(ddp.STEPS):
        opt.zero_grad()
        for rank in range(ddp.RANKS):
            (ddp.loss(net, step, rank, dtype) / ddp.RANKS).backward()
        opt.step()
    for saved in ranks:
        assert_same(saved["ends"][f"{name}-{dtype}"], net.state_dict())
