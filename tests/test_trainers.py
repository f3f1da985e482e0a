"""The factory of `integrations.transformers` in a real Trainer; what a Trainer drops is said before it trains."""

import pytest
import torch
from tiny_llama import HALF, STEPS, arguments, llama, trainer, weights
from training import assert_same

import subspace_optim as so
from subspace_optim.integrations.transformers import (
    SubspaceFactory,
    check_trainer,
    parse_optim_args,
    trainer_options,
)

ADAM = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}


def made(folder, settings=None, **options):
    args = arguments(folder, **ADAM, **settings or {})
    options = {"training_args": args, **options}
    made = trainer(args, (SubspaceFactory, options))
    options["model"] = made.model  # which transformers 4 needs
    return made


def test_a_run_of_the_factory_resumes_bit_for_bit(tmp_path):
    """Accumulation, clipping, a schedule and a refresh between; groups are decay × low-rank as they should be."""
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_grad_norm": 0.5}
    options = {"rank": 4, "update_proj_gap": 2}
    straight = made(tmp_path / "straight", settings, **options)
    straight.train()
    opt = straight.optimizer.optimizer
    assert type(opt) is so.GaLore
    kinds = {
        (group["rank"], param.ndim): (group["weight_decay"], group["betas"], group["eps"], group["initial_lr"])
        for group in opt.param_groups
        for param in group["params"]
    }
    same = (0.8, 0.95), 1e-6, 0.01
    assert kinds == {(4, 2): (0.1, *same), (None, 2): (0.1, *same), (None, 1): (0.0, *same)}
    assert sum("age" in state for state in opt.state.values()) == 2 * 7  # the linear layers; embedding and head dense
    assert {float(state["step"]) for state in opt.state.values()} == {STEPS}  # not one for each micro-batch
    assert opt.param_groups[0]["lr"] == straight.lr_scheduler.get_last_lr()[0] < 0.01

    resumed = made(tmp_path / "resumed", settings, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{HALF}"))
    assert resumed.state.global_step == STEPS
    assert_same(weights(resumed.model), weights(straight.model))
    start = weights(llama())
    assert all(not torch.equal(param, start[name]) for name, param in weights(straight.model).items())


@pytest.mark.parametrize(
    ("target", "count"),
    [
        ("all-linear", 14),
        ("all_linear", 14),
        (["q_proj", "mlp"], 2 * 4),
        (r".*\.[01]\.self_attn\.[kv]_proj", 4),
        (["embed_tokens"], 1),
    ],
)
def test_targets_come_from_the_arguments_or_the_options(tmp_path, target, count):
    for settings, options in (({"optim_target_modules": target}, {}), ({}, {"optim_target_modules": target})):
        opt = check_trainer(made(tmp_path, settings, rank=4, **options))
        assert sum(len(group["params"]) for group in opt.param_groups if group["rank"]) == count


def test_optim_args_come_from_the_arguments_or_the_options(tmp_path):
    text = "name=osd, rank=5, scale=0.10, weight_decay=0.3"
    for settings, options in (({"optim_args": text}, {"rank": 3}), ({}, {"optim_args": text, "rank": 3})):
        run = made(tmp_path, settings, **options)
        opt = run.create_optimizer()
        assert type(opt) is so.OnlineSubspaceDescent
        first = opt.param_groups[0]
        assert (first["rank"], first["scale"], first["weight_decay"]) == (3, 0.1, 0.3)
        with pytest.raises(ValueError, match=r"weight_decay=0.1 \(the optimizer has 0.0, 0.3\)"):
            check_trainer(run)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (None, {}),
        ("", {}),
        ("rank=64, update_proj_gap=100, scale=0.10", {"rank": 64, "update_proj_gap": 100, "scale": 0.1}),
        ("rank=0.25,betas=(0.9, 0.95),svd=exact", {"rank": 0.25, "betas": (0.9, 0.95), "svd": "exact"}),
        ("stagger=false, rank=None,", {"stagger": False, "rank": None}),
        ({"rank": "64", "scale": 0.1}, {"rank": 64, "scale": 0.1}),
    ],
)
def test_optim_args_are_read(text, options):
    assert parse_optim_args(text) == options


@pytest.mark.parametrize("text", ["rank", "rank=", "=4", "rank 4", "rank=4, rank=5", "a-b=1"])
def test_optim_args_that_cannot_be_read_are_refused(text):
    with pytest.raises(ValueError, match=r"optim_args=.*(must be name=value|twice)"):
        parse_optim_args(text)


def test_both_signatures_make_the_same_optimizer(tmp_path):
    """transformers: factory()(model, **options); axolotl: factory()(model, training_args, **options)."""
    args = arguments(tmp_path, **ADAM)
    options = {"rank": 4, "name": "flora"}
    one = SubspaceFactory()(llama(), training_args=args, **options)
    two = SubspaceFactory()(llama(), args, **options)
    three = SubspaceFactory()(llama(), None, **options, **trainer_options(args))
    assert type(one) is so.Flora
    for other in (two, three):
        assert type(other) is so.Flora
        assert repr(other) == repr(one)


@pytest.mark.parametrize("field", ["embedding_lr", "embedding_lr_scale", "loraplus_lr_ratio", "lr_groups"])
def test_axolotls_learning_rates_of_modules_are_not_dropped(tmp_path, field):
    args = arguments(tmp_path, **ADAM)
    setattr(args, field, None)
    SubspaceFactory()(llama(), args, rank=4)
    setattr(args, field, 0.1)
    with pytest.raises(ValueError, match=f"SubspaceFactory: {field} would have been ignored; leave it out"):
        SubspaceFactory()(llama(), args, rank=4)


def test_transformers_4_calls_the_class(tmp_path):
    """With the model, where that is among the options, and otherwise with groups of parameters."""
    args, model = arguments(tmp_path, **ADAM), llama()
    one, two = SubspaceFactory(model, training_args=args, rank=4), SubspaceFactory()(model, args, rank=4)
    assert type(one) is so.GaLore and one.param_groups == two.param_groups
    with pytest.raises(TypeError, match=r'handed groups of parameters.* needs the model; add "model": model'):
        SubspaceFactory([{"params": list(model.parameters())}], training_args=args)


def test_settings_that_would_be_dropped_are_an_error(tmp_path):
    options = {"rank": 4, "lr": 0.01}
    run = trainer(arguments(tmp_path), (SubspaceFactory, options))
    options["model"] = run.model
    with pytest.raises(ValueError, match=r"so adam_beta1, adam_beta2, adam_epsilon, weight_decay would have been"):
        run.train()
    run = trainer(arguments(tmp_path), (so.GaLore, {"rank": 4, "weight_decay": 0.0}))
    with pytest.raises(ValueError, match=r"learning_rate=0.01 \(the optimizer has 0.001\); make"):
        check_trainer(run)
    args = arguments(tmp_path, **ADAM)
    assert type(check_trainer(trainer(args, (so.GaLore, {"rank": 4} | trainer_options(args))))) is so.GaLore


def test_a_trainer_that_falls_back_to_adamw_is_found(tmp_path):
    with pytest.raises(TypeError, match="would train with AdamW"):
        check_trainer(trainer(arguments(tmp_path)))


def test_misspelt_options_are_refused_with_the_right_one():
    settings = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    with pytest.raises(ValueError, match="did you mean 'update_proj_gap'"):
        SubspaceFactory()(llama(), update_project_gap=5, **settings)
    with pytest.raises(ValueError, match="unknown optimizer 'galor'; did you mean 'galore'"):
        SubspaceFactory()(llama(), name="galor", **settings)
