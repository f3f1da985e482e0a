"""From a model to groups: which layers are projected, what is decayed, and what is refused."""

import re

import pytest
import torch
from torch import nn
from training import FIVE, noise
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import subspace_optim as so
from subspace_optim.optimizers import PROJECTORS, RULES
from subspace_optim.types import TRANSFORMS

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama(**settings):
    config = LlamaConfig(
        **{
            "vocab_size": 50,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 16,
        }
        | settings
    )
    return LlamaForCausalLM(config)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2))


def names(groups, projected):
    return {name for group in groups if (group["rank"] is not None) == projected for name, _ in group["params"]}


def last(name):
    return name.split(".")[-2] if name.endswith((".weight", ".bias")) else name


def decays(groups):
    return {name: group["weight_decay"] for group in groups for name, _ in group["params"]}


class Experts(nn.Module):
    """A mixture of experts with stacked weights, as in transformers' Mixtral."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.gate_up = nn.Parameter(noise(0, (3, 8, 12)).float())
        self.conv = nn.Conv1d(8, 10, 3)
        self.norm = nn.LayerNorm(8)


# What is projected


def test_llama():
    model = llama()
    groups = so.param_groups(model, rank=4, weight_decay=0.1)
    assert {last(name) for name in names(groups, True)} == set(LINEAR)
    assert len(names(groups, True)) == 2 * len(LINEAR)
    dense = {"embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm"}
    assert {last(name) for name in names(groups, False)} == dense
    for name, param in model.named_parameters():
        assert decays(groups)[name] == (0.1 if param.ndim > 1 else 0)


def test_every_trainable_tensor_is_in_exactly_one_group():
    for model in (llama(), llama(tie_word_embeddings=True), gpt2(), Experts()):
        listed = [param for group in so.param_groups(model, rank=2) for _, param in group["params"]]
        assert len(listed) == len({id(param) for param in listed})
        assert {id(param) for param in listed} == {id(param) for param in model.parameters()}


def test_gpt2():
    """transformers' Conv1D is a linear layer; biases are not decayed."""
    model = gpt2()
    groups = so.param_groups(model, rank=4, weight_decay=0.1)
    assert {name.split("h.0.")[1] for name in names(groups, True)} == {
        *("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"),
    }
    assert {n.rsplit(".")[-1] for n, decay in decays(groups).items() if decay} == {"weight"}
    assert decays(groups)["transformer.wpe.weight"] == 0.1
    assert decays(groups)["transformer.h.0.ln_1.weight"] == 0


def test_tied_embeddings_are_dense_and_appear_once():
    model = llama(tie_word_embeddings=True)
    groups = so.param_groups(model, rank=4)
    assert "model.embed_tokens.weight" in names(groups, False)
    assert "lm_head.weight" not in names(groups, False) | names(groups, True)

    tied = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False))
    tied[2].weight = tied[0].weight
    assert names(so.param_groups(tied, rank=2), True) == {"1.weight"}

    output_first = nn.ModuleDict({"out": nn.Linear(8, 20), "body": nn.Linear(8, 8), "tokens": nn.Embedding(20, 8)})
    output_first["tokens"].weight = output_first["out"].weight
    assert names(so.param_groups(output_first, rank=2), True) == {"body.weight"}


@pytest.mark.parametrize("name", ["lm_head", "head", "classifier", "score", "embed_out"])
def test_a_head_is_dense_by_name(name):
    model = nn.ModuleDict({"body": nn.Linear(8, 6), name: nn.Linear(6, 8)})
    assert names(so.param_groups(model, rank=2), True) == {"body.weight"}


def test_frozen_parameters_are_left_out():
    model = llama()
    model.model.layers[0].requires_grad_(False)
    groups = so.param_groups(model, rank=4)
    listed = names(groups, True) | names(groups, False)
    assert not any(name.startswith("model.layers.0.") for name in listed)
    assert {last(name) for name in names(groups, True)} == set(LINEAR)


def test_rank_none_is_dense_everywhere():
    groups = so.param_groups(llama(), rank=None, weight_decay=0.1)
    assert not names(groups, True)
    assert {group["weight_decay"] for group in groups} == {0.1, 0.0}


def test_options_go_to_the_projected_groups():
    groups = so.param_groups(llama(), rank=0.25, update_proj_gap=7, proj_type="right")
    projected, *dense = groups
    assert (projected["rank"], projected["update_proj_gap"], projected["proj_type"]) == (0.25, 7, "right")
    assert all(group["rank"] is None and "update_proj_gap" not in group for group in dense)


# Patterns, as in transformers' optim_target_modules


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("all-linear", LINEAR),
        (["all-linear"], LINEAR),
        (["q_proj", "v_proj"], ("q_proj", "v_proj")),
        (["attn", "mlp"], LINEAR),
        ("mlp", ("gate_proj", "up_proj", "down_proj")),
        (r".*\.(q|k)_proj", ("q_proj", "k_proj")),
        ([r".*layers\.1\..*up_proj\.weight"], ("up_proj",)),
        ("lm_head", ("lm_head",)),
    ],
    ids=str,
)
def test_target(target, expected):
    assert {last(name) for name in names(so.param_groups(llama(), rank=4, target=target), True)} == set(expected)


def test_a_regular_expression_must_match_the_whole_name():
    groups = so.param_groups(llama(), rank=4, target=r"model\.layers\.1\..*")
    assert all(name.startswith("model.layers.1.") for name in names(groups, True))


def test_exclude():
    groups = so.param_groups(llama(), rank=4, exclude=["k_proj", r".*layers\.0\.mlp\..*"])
    assert "model.layers.1.self_attn.k_proj.weight" in names(groups, False)
    assert "model.layers.0.mlp.up_proj.weight" in names(groups, False)
    assert "model.layers.1.mlp.up_proj.weight" in names(groups, True)


def test_experts_of_a_mixture_are_projected_unasked():
    """They are most of its parameters: dense without a word, they would take AdamW's memory."""
    config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MixtralForCausalLM(
        MixtralConfig(**config, vocab_size=32, num_key_value_heads=2, num_local_experts=4, pad_token_id=None)
    )
    groups = so.param_groups(model, rank=4, weight_decay=0.1)
    prefix = "model.layers.0.mlp.experts"
    stacked = next(group for group in groups if group.get("batch_dims"))
    assert {name for name, _ in stacked["params"]} == {f"{prefix}.gate_up_proj", f"{prefix}.down_proj"}
    assert "model.layers.0.mlp.gate.weight" in names(groups, False)  # the router

    model = Experts()
    model.bias = nn.Parameter(torch.zeros(3, 12))
    model.position = nn.Parameter(torch.zeros(2, 5, 12))
    groups = so.param_groups(nn.ModuleDict({"experts": model.conv, "mixture": model}), rank=2, weight_decay=0.1)
    assert {"mixture.gate_up", "mixture.router.weight"} <= names(groups, True)
    assert {"experts.weight", "mixture.bias"} <= names(groups, False)
    assert decays(groups)["mixture.bias"] == 0  # one of every expert


def test_the_projections_of_torchs_attention_are_linear_layers():
    """Two thirds of its weights lie in one tensor that no nn.Linear owns."""
    groups = so.param_groups(nn.TransformerEncoderLayer(8, 2, 16), rank=2)
    assert {name for name in names(groups, True) if "attn" in name} == {
        *("self_attn.in_proj_weight", "self_attn.out_proj.weight"),
    }
    groups = so.param_groups(nn.MultiheadAttention(8, 2, kdim=6, vdim=6, add_bias_kv=True), rank=2, weight_decay=0.1)
    assert names(groups, True) == {*(f"{k}_proj_weight" for k in "qkv"), "out_proj.weight"}
    assert {"in_proj_bias", "bias_k", "bias_v"} <= names(groups, False)


def test_stacked_experts_are_a_batch_and_convolutions_are_not():
    model = Experts()
    groups = so.param_groups(model, rank=2, target=["gate_up", "conv"])
    assert {name: group.get("batch_dims", 0) for group in groups for name, _ in group["params"] if group["rank"]} == {
        "gate_up": 1,
        "conv.weight": 0,
    }
    opt = so.GaLore(groups, lr=0.1)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    opt.step()
    assert opt.state[model.gate_up]["basis"].shape == (3, 8, 2)
    assert opt.state[model.conv.weight]["basis"].shape == (10, 2)


# Errors


@pytest.mark.parametrize("option", ["target", "exclude"])
def test_a_pattern_that_matches_nothing_names_what_there_is(option):
    with pytest.raises(ValueError, match=f"{option}='q_prj' matches no trainable tensor.*q_proj"):
        so.param_groups(llama(), rank=4, **{option: ["q_prj"]})


def test_a_pattern_that_only_matches_frozen_or_flat_tensors_matches_nothing():
    model = llama()
    model.lm_head.requires_grad_(False)
    for pattern in ("lm_head", "input_layernorm"):
        with pytest.raises(ValueError, match=f"target='{pattern}' matches no trainable tensor of two or more"):
            so.param_groups(model, rank=4, target=pattern)


def test_an_invalid_pattern_is_named():
    with pytest.raises(ValueError, match=r"target='\(q_proj' is not a regular expression"):
        so.param_groups(llama(), rank=4, target="(q_proj")


def test_nothing_to_project_is_an_error():
    with pytest.raises(ValueError, match=r"rank=4, but Embedding has no layer to project; name some with target="):
        so.param_groups(nn.Embedding(5, 3), rank=4)


def test_parameters_instead_of_a_model():
    with pytest.raises(TypeError, match=r"needs a torch.nn.Module to read layer names from, not generator"):
        so.param_groups(llama().parameters())


# create

CELLS = ["+".join((p, r) if t == "none" else (p, r, t)) for p in PROJECTORS for r in RULES for t in TRANSFORMS]


@pytest.mark.parametrize("name", ["adamw", *so.OPTIMIZERS, "online_subspace_descent", "GaLore", *CELLS])
def test_create_makes_every_optimizer_and_every_cell_and_it_learns(name):
    """One step along the gradient of a least-squares loss lowers it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))
    x, y = noise(1, (32, 8)).float(), noise(2, (32, 4)).float()
    rank = {} if name in ("adamw", "grams") or name.startswith("none") else {"rank": 2}
    opt = so.create(model, name, lr=1e-3, weight_decay=0.1, **rank)
    losses = []
    for _ in range(3):
        loss = (model(x) - y).square().mean()
        losses.append(loss.item())
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert losses[2] < losses[1] < losses[0]
    projected = [state for state in opt.state.values() if "age" in state]
    assert len(projected) == (2 if rank else 0)


@pytest.mark.parametrize("name", FIVE)
def test_create_makes_the_class_of_the_name_and_no_decay_on_vectors(name):
    opt = so.create(llama(), name, rank=4, lr=0.3, weight_decay=0.1, seed=5)
    assert type(opt) is FIVE[name] and opt.seed == 5
    assert {group["lr"] for group in opt.param_groups} == {0.3}
    for group in opt.param_groups:
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] > 0}


def test_create_refuses():
    model = llama()
    for name, message in {
        "galor": "unknown optimizer 'galor'; did you mean 'galore'",
        "muon": "unknown optimizer 'muon'; choose one of adamw, galore, ",
        "svd+sgd": r"unknown rule 'sgd' in 'svd\+sgd'; choose one of adam, ",
        "qr+adam": r"unknown projector 'qr' in 'qr\+adam'; choose one of none, svd",
        "svd+adam+shy": "unknown transform 'shy' .*choose one of none, grams, cautious",
        "svd+adam+grams+x": "unknown optimizer",
    }.items():
        with pytest.raises(ValueError, match=message):
            so.create(model, name)
    with pytest.raises(TypeError, match=r"name=<class .*GaLore'> must be a string, one of adamw, galore"):
        so.create(model, so.GaLore)
    for wrong in (3, [torch.nn.Linear], re.compile("proj")):
        with pytest.raises(TypeError, match=r"exclude=.* must be part of a name, or a regular expression, as a string"):
            so.create(model, "galore", exclude=wrong)
    with pytest.raises(ValueError, match="rank=4 has no meaning for 'adamw', which projects nothing; leave it out"):
        so.create(model, "adamw", rank=4)
    with pytest.raises(ValueError, match="unknown option 'update_proj_gp'; did you mean 'update_proj_gap'"):
        so.create(model, "galore", rank=4, update_proj_gp=3)


# What it says of itself


def test_summary_lists_what_is_projected_what_is_dense_and_why():
    model = llama()
    opt = so.create(model, "galore", rank=4)
    table = opt.summary().splitlines()
    assert table[0].split() == ["step", "shape", "count", "tensors", "why", "dense"]
    rows = "\n".join(table)
    for line in (
        r"right, rank 4 +24×16 +4 +model.layers.0.mlp.gate_proj.weight, …\n",
        r"left, rank 4 +8×16 +4 +model.layers.0.self_attn.k_proj.weight, …\n",
        r"dense +50×16 +2 +model.embed_tokens.weight, … +rank=None in its group",
    ):
        assert re.search(line, rows + "\n"), rows
    counts = [int(re.split(r"\s{2,}", row)[2]) for row in table[1:]]
    assert sum(counts) == len(list(model.parameters()))


def test_summary_gives_every_reason():
    shapes = {"vector": (9,), "scalar": (), "small": (3, 3), "empty": (0, 4), "wide": (4, 9), "frozen": (8, 8)}
    params = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    params["frozen"].requires_grad_(False)
    opt = so.GaLore(params.items(), rank=3)
    rows = {name: line for line in opt.summary().splitlines() for name in shapes if f" {name} " in f"{line} "}
    assert rows["vector"].endswith("1-D")
    assert rows["scalar"].endswith("0-D")
    assert rows["small"].endswith("rank 3 ≥ min(3, 3)")
    assert rows["empty"].endswith("it is empty")
    assert rows["frozen"].endswith("frozen")
    assert rows["wide"].startswith("left, rank 3")


def test_repr_holds_the_groups_the_parts_and_the_summary():
    opt = so.GaLore([("w", nn.Parameter(torch.zeros(8, 6)))], rank=3, lr=0.125)
    text = repr(opt)
    assert text.startswith("GaLore (")
    for part in ("lr: 0.125", "rank: 3", "projector=SVD(rank=3", "rule=Adam(", opt.summary()):
        assert part in text


def test_a_tensor_without_a_name_is_called_by_its_place_and_shape():
    assert "parameter 0 of shape (8, 6)" in so.GaLore([nn.Parameter(torch.zeros(8, 6))], rank=3).summary()


def test_embeddings_and_head_take_a_rank_of_their_own():
    """As far a step as the dense tensors'; what is excluded stays dense, and tied weights appear once."""
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    groups = so.param_groups(model, 4, embedding_rank=8, scale=0.25, weight_decay=0.1)
    own = [group for group in groups if group["rank"] == 8]
    assert [name for name, _ in own[0]["params"]] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert len(own) == 1 and own[0]["scale"] == 1 and own[0]["weight_decay"] == 0.1
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    groups = so.param_groups(model, 4, embedding_rank=8, exclude="embed_tokens")
    assert [name for group in groups if group["rank"] == 8 for name, _ in group["params"]] == ["lm_head.weight"]
    opt = so.create(model, "galore", rank=4, embedding_rank=8)
    assert [opt.plan_of(i, g["params"][0]).rank for i, g in enumerate(opt.param_groups)] == [4, 8, 0]
    with pytest.raises(ValueError, match="embedding_rank=8"):
        so.create(model, "adamw", embedding_rank=8)


@pytest.mark.parametrize("name", ["galore", "adamw"])
def test_what_is_no_layer_takes_a_learning_rate_of_its_own(name):
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    rank = {} if name == "adamw" else {"rank": 4}
    opt = so.create(model, name, lr=0.25, dense_lr=0.5, **rank)
    rates = {key: group["lr"] for group in opt.param_groups for key in group["param_names"]}
    assert rates == {key: 0.25 if "_proj" in key else 0.5 for key, _ in model.named_parameters()}
    assert len(so.create(model, "adamw").param_groups) == 2  # as it was: matrices and vectors
    ends = so.create(model, "galore", lr=0.25, dense_lr=0.5, rank=4, embedding_rank=8).param_groups[1]
    assert ends["rank"] == 8 and ends["lr"] == 0.5
    with pytest.raises(ValueError, match=r"lr=-1.*≥ 0"):
        so.create(model, name, dense_lr=-1.0)
