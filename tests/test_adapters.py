"""PEFT: the adapters of a real LLaMA are the parameters; what is frozen stays as it is."""

import peft
import pytest
import torch
from tiny_llama import llama, rows
from training import snapshot

import subspace_optim as so


def adapted(lora_rank=8, **options):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=lora_rank, target_modules="all-linear", **options)
    return peft.get_peft_model(llama(), config)


def learn(model, opt, steps=8):
    """One batch, again and again; the losses."""
    batch = {key: torch.stack([row[key] for row in rows(4)]) for key in ("input_ids", "labels")}
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def how(model, opt):
    """Adapter matrices by kind, with the rank of their groups' plans."""
    states = {name: opt.state[param] for name, param in model.named_parameters() if param in opt.state}
    kinds = {}
    for name, state in states.items():
        kind = next(k for k in ("lora_A", "lora_B", "magnitude") if k in name)
        kinds.setdefault(kind, set()).add("projected" if "age" in state else "dense")
    return kinds


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", ["galore", "gradnormlorp", "apollo"])
def test_adapters_train_in_the_subspace_that_is_worth_it(name, dora):
    """A (8, n) and B (m, 8) to rank 4; DoRA's magnitudes are vectors and so dense; B starts at zero."""
    model = adapted(use_dora=dora)
    before = snapshot(dict(model.named_parameters()))
    opt = so.create(model, name, rank=4, lr=0.02, weight_decay=0.1)
    losses = learn(model, opt)
    expected = {"lora_A": {"projected"}, "lora_B": {"projected"}} | ({"magnitude": {"dense"}} if dora else {})
    assert how(model, opt) == expected
    assert opt.skipped_updates == 0
    for key, param in model.named_parameters():
        assert torch.isfinite(param).all()
        assert torch.equal(param, before[key]) != param.requires_grad, key
    assert losses[-1] < losses[0] - 0.02


def test_adapters_that_are_as_small_as_the_rank_are_dense_and_the_summary_says_so():
    model = adapted(lora_rank=4)
    opt = so.create(model, "galore", rank=4)
    table = [line.split("  ") for line in opt.summary().splitlines()[1:]]
    assert all(line[0].startswith("dense") for line in table)
    assert "rank 4 ≥ min(4, 16)" in opt.summary()
    assert "rank 4 ≥ min(24, 4)" in opt.summary()
    learn(model, opt, steps=1)
    assert how(model, opt) == {"lora_A": {"dense"}, "lora_B": {"dense"}}


def test_one_kind_of_adapter_may_be_the_target():
    model = adapted()
    opt = so.create(model, "galore", rank=4, target="lora_B")
    projected = {name for group in opt.param_groups if group["rank"] for name in group["param_names"]}
    assert projected
    assert all("lora_B" in name for name in projected)


def test_whole_layers_beside_the_adapters_are_projected_too():
    """modules_to_save trains a copy of a layer in full; the head stays dense as everywhere."""
    model = adapted(modules_to_save=["down_proj"], exclude_modules=["down_proj"])
    opt = so.create(model, "galore", rank=4)
    projected = {name for group in opt.param_groups if group["rank"] for name in group["param_names"]}
    assert {name for name in projected if "lora" not in name} == {
        f"base_model.model.model.layers.{i}.mlp.down_proj.modules_to_save.default.weight" for i in range(2)
    }
