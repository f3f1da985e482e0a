"""What is run when nothing is said, and what is refused when something wrong is."""

import dataclasses
import json
import math

import pytest
import torch
from pretraining import refused

import subspace_optim as so
from subspace_optim.pretrain import command, config
from subspace_optim.pretrain.config import GIB, SIZES, UserError, resolve


def test_with_nothing_said_it_is_galore_on_tiny():
    run = resolve({})
    assert (run.model, run.optimizer, run.lr, run.scale, run.update_proj_gap) == ("tiny", "galore", 0.01, 0.1, 10)
    assert run.rank is not None and run.rank < run.hidden and run.device == "cpu"
    assert 300_000 < run.steps * run.tokens_per_step < 1_000_000


@pytest.mark.parametrize("name", list(SIZES))
def test_sizes_count_what_transformers_counts(name):
    from transformers import LlamaConfig, LlamaForCausalLM

    size = SIZES[name]
    published = LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_attention_heads=size.heads,
        num_hidden_layers=size.layers,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(published)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert config.parameter_count(size) == count
    named = {"tiny": 5e6, "9m": 9e6, "20m": 20e6, "60m": 58e6, "130m": 134e6, "350m": 368e6, "1b": 1.34e9, "7b": 6.74e9}
    assert count == pytest.approx(named[name], rel=0.06)


@pytest.mark.parametrize(
    ("name", "rank", "steps"),
    [
        ("60m", 128, 10_000),
        ("130m", 256, 20_000),
        ("350m", 256, 60_000),
        ("1b", 512, 100_000),
        ("7b", 1024, 150_000),
    ],
)
def test_published_sizes_have_the_published_budget(name, rank, steps):
    run = resolve({"model": name})
    assert (run.rank, run.steps, run.warmup) == (rank, steps, steps // 10)
    assert run.batch_size * run.accumulate == 512 and run.seq_len == 256 and run.vocab_size == 32_000
    assert (run.lr, run.update_proj_gap) == ((0.005, 500) if name == "7b" else (0.01, 200))


@pytest.mark.parametrize("name", ["adamw", *so.OPTIMIZERS, "svd+lion", "random+adam+cautious", "none+adam+grams"])
def test_every_optimizer_is_made_from_its_defaults(name):
    run = resolve({"optimizer": name, "hidden": 32, "intermediate": 48})
    model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.Linear(48, 32))
    optimizer = so.create(model, run.optimizer, **run.optimizer_options)
    assert optimizer.param_groups[0]["lr"] == run.lr
    assert config.optimizer_defaults(name, "tiny", 320).source


@pytest.mark.parametrize(
    ("name", "key"),
    [("online_subspace_descent", "osd"), ("AdamW", "adamw"), ("GaLore", "galore"), ("SVD+Lion", "svd+lion")],
)
def test_however_a_name_is_written_its_defaults_are_the_same(name, key):
    assert resolve({"optimizer": name}) == resolve({"optimizer": key})


@pytest.mark.parametrize("name", ["galore", "gradnormlorp", "svd+lion"])
@pytest.mark.parametrize(("steps", "gap"), [(1, 10), (160, 10), (1000, 31), (1_000_000, 200)])
def test_a_short_run_renews_its_bases_often(name, steps, gap):
    published = 250 if name == "gradnormlorp" and gap == 200 else gap
    assert resolve({"optimizer": name, "model": "60m", "steps": steps}).update_proj_gap == published
    assert resolve({"optimizer": name, "steps": steps, "update_proj_gap": 7}).update_proj_gap == 7
    assert resolve({"optimizer": "flora", "steps": steps}).update_proj_gap == 200


def test_what_is_said_is_kept():
    said = {"rank": 0.25, "lr": 0.5, "betas": (0.8, 0.9), "scale": 2.0, "update_proj_gap": 7, "clip": 0.0, "warmup": 3}
    run = resolve({**said, "seed": 5, "seq_len": 32, "batch_size": 3, "steps": 11})
    assert {key: getattr(run, key) for key in said} == said
    assert (run.seed, run.seq_len, run.batch_size, run.steps) == (5, 32, 3, 11)
    kept = {key: said[key] for key in ("rank", "lr", "betas", "scale", "update_proj_gap")}
    kept |= {"state_bits": 32, "basis_bits": 32, "rounding": "stochastic"}
    assert run.optimizer_options == {"weight_decay": 0.0, "seed": 5, **kept}


@pytest.mark.parametrize("name", ["adamw", "grams"])
def test_a_rate_of_their_own_for_embeddings_goes_with_the_rate_of_the_matrices(name):
    chosen = resolve({"optimizer": name})
    assert chosen.lr < resolve({"optimizer": "galore"}).lr <= chosen.dense_lr
    assert resolve({"optimizer": name, "lr": 0.002}).dense_lr is None
    assert resolve({"optimizer": name, "dense_lr": 0.005}).dense_lr == 0.005
    assert resolve({"optimizer": name, "model": "60m"}).dense_lr is None


def test_storage_is_passed_on():
    said = {"state_bits": 8, "basis_bits": 4, "rounding": "kahan"}
    assert said.items() <= resolve(said).optimizer_options.items()


def test_tokens_are_turned_into_steps():
    assert resolve({"tokens": 1025, "batch_size": 2, "seq_len": 64, "accumulate": 2}).steps == 5
    with pytest.raises(UserError, match="--steps"):
        resolve({"tokens": 1000, "steps": 2})


def test_a_model_is_read_from_json(tmp_path):
    dimensions = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 3}
    (tmp_path / "my.json").write_text(json.dumps({**dimensions, "vocab_size": 1000, "model_type": "llama"}))
    run = resolve({"model": str(tmp_path / "my.json")})
    assert (run.hidden, run.intermediate, run.heads, run.layers, run.vocab_size) == (64, 96, 4, 3, 1000)
    assert run.rank == 16


@pytest.mark.parametrize("name", ["galore", "adamw"])
def test_a_configuration_survives_json(name):
    run = resolve({"optimizer": name, "betas": (0.8, 0.9), "data": ("a", "b")})
    assert config.RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run
    older = {key: value for key, value in run.to_dict().items() if key not in config.BEFORE}
    assert config.RunConfig.from_dict(older) == dataclasses.replace(run, dense_lr=None)
    for other in ({**older, "flavour": 1}, {key: value for key, value in older.items() if key != "lr"}):
        with pytest.raises(UserError, match="do not fit this version"):
            config.RunConfig.from_dict(other)


@pytest.mark.parametrize("gib", [1, 3, 6, 8, 11, 16, 24, 40, 80, 141])
def test_the_default_grows_with_the_memory_and_fits(gib):
    grown = config.grow_to_fit(gib * GIB)
    run = resolve({**grown, "device": "cuda:0"})
    assert run.model == grown["model"] and run.device == "cuda:0"
    if run.model != "tiny":
        assert config.training_bytes(SIZES[run.model], run.batch_size) <= gib * GIB * 2 / 3
        assert run.batch_size * run.accumulate == 64
    order = list(SIZES)
    smaller = config.grow_to_fit(gib * GIB // 2)
    assert order.index(smaller["model"]) <= order.index(run.model)


def test_growth_spans_the_family():
    assert [config.grow_to_fit(gib * GIB)["model"] for gib in (1, 5, 8, 16, 80)] == [
        "tiny",
        "20m",
        "60m",
        "130m",
        "350m",
    ]


def test_only_the_default_grows_and_what_is_said_stays(monkeypatch):
    monkeypatch.setattr(command, "find_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * GIB, 80 * GIB))
    assert resolve(command.settle({"model": "20m"})).batch_size == SIZES["20m"].batch_size
    grown = resolve(command.settle({"batch_size": 4, "tokens": 4 * 256 * 10}))
    assert (grown.model, grown.device, grown.batch_size) == ("350m", "cuda:0", 4)
    assert grown.steps * grown.tokens_per_step >= 4 * 256 * 10 > (grown.steps - 1) * grown.tokens_per_step


REFUSED = [
    (["--rank", "0"], "--rank 0", "from 1 up"),
    (["--rank", "-3"], "--rank -3", "from 1 up"),
    (["--rank", "1.5"], "--rank 1.5", "fraction"),
    (["--rank", "256"], "--rank 256", "lower rank"),
    (["--rank", "many"], "--rank", "many"),
    (["--embedding-rank", "256"], "--embedding-rank 256", "lower rank"),
    (["--seq-len", "1000000000"], "--seq-len 1000000000", "at most 1048576"),
    (["--optimizer", "galor"], "--optimizer galor", "galore"),
    (["--optimizer", "svd+lyon"], "--optimizer svd+lyon", "lion"),
    (["--optimizer", "adamw", "--rank", "4"], "--rank 4", "adamw", "leave"),
    (["--optimizer", "none+adam", "--scale", "4"], "--scale 4", "none+adam"),
    (["--model", "60mm"], "--model 60mm", "60m"),
    (["--model", "missing.json"], "--model missing.json", "No such file"),
    (["--lr", "0"], "--lr 0", "above 0"),
    (["--state-bits", "16"], "--state-bits", "32, 8, 4"),
    (["--rounding", "up"], "--rounding", "kahan"),
    (["--lr", "nan"], "--lr nan", "above 0"),
    (["--lr", "1e300"], "--lr 1e+300", "at most"),
    (["--vocab-size", "9" * 20], "--vocab-size 9999", "below 2**63"),
    (["--data", "x" * 5000], "xxx: File name too long"),
    (["--lr", "fast"], "--lr", "fast"),
    (["--scale", "-1"], "--scale -1", "above 0"),
    (["--dense-lr", "0"], "--dense-lr 0", "above 0"),
    (["--betas", "0.9", "1"], "--betas 1", "below 1"),
    (["--weight-decay", "-1"], "--weight-decay -1", "0 or more"),
    (["--clip", "inf"], "--clip inf", "0 or more"),
    (["--steps", "0"], "--steps 0", "at least 1"),
    (["--batch-size", "-2"], "--batch-size -2", "at least 1"),
    (["--tokens", "5", "--steps", "5"], "--tokens 5", "--steps 5"),
    (["--warmup", "900"], "--warmup 900", "320 steps"),
    (["--min-lr-ratio", "2"], "--min-lr-ratio 2", "between 0 and 1"),
    (["--vocab-size", "100"], "--vocab-size 100", "at least 257"),
    (["--heads", "7"], "--heads 7", "--hidden 256"),
    (["--hidden", "12", "--heads", "4", "--rank", "2"], "--heads 4", "even"),
    (["--seed", "-1"], "--seed -1", "0 or more"),
    (["--seed", str(2**63)], "--seed 9223372036854775808", "below 2**63"),
    (["--out", ""], "--out: is empty", "leave --out out"),
    (["--data", ""], "--data: is empty", "name a path"),
    (["--out", "~no-such-user/out"], "--out ~no-such-user/out", "no such home"),
    (["--update-proj-gap", "0"], "--update-proj-gap 0", "at least 1"),
    (["--device", "tpu"], "--device tpu", "cuda"),
    (["--layerwise", "hook"], "--layerwise", "'hook'"),
    (["--layerwise", "hooks", "--optimizer", "flora"], "--layerwise hooks", "has full rank", "leave --layerwise out"),
    (["--layerwise", "linear", "--optimizer", "adamw"], "--layerwise linear", "projects nothing"),
    (["--device", "banana"], "--device banana", "cuda"),
    (["--device", "cuda:99"], "--device cuda:99", "GPU"),
    (["--dtype", "float16"], "--dtype", "float16", "bfloat16"),
    (["--data", "hf:a", "hf:b"], "--data hf:a hf:b", "alone"),
    (["--data", "hf:"], "--data hf:", "allenai/c4"),
]


@pytest.mark.parametrize(
    ("options", "words"), [(row[0], row[1:]) for row in REFUSED], ids=lambda row: " ".join(row)[:40]
)
def test_a_bad_option_is_one_line_that_names_it(capsys, tmp_path, monkeypatch, options, words):
    monkeypatch.setenv("SUBSPACE_OPTIM_CACHE", str(tmp_path / "cache"))
    refused(capsys, ["pretrain", "--out", str(tmp_path / "out"), *options], *words)
    assert not (tmp_path / "cache").exists(), "refused before any text is read"


def test_attention_that_is_not_installed_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPACE_OPTIM_CACHE", str(tmp_path / "cache"))
    arguments = ["pretrain", "--out", str(tmp_path / "out"), "--attention", "flash_attention_2"]
    refused(capsys, arguments, "--attention flash_attention_2", "use --attention sdpa")


_LLAMA = '{"hidden": 64, "intermediate": 96, "heads": 4, "layers": 3, '


@pytest.mark.parametrize(
    "content",
    [
        "[", "[]", "[" * 100_000, '{"hidden_size": 64}', '{"hidden_size": "x"}', _LLAMA + '"num_key_value_heads": 2}',
        _LLAMA + '"tie_word_embeddings": true}', _LLAMA + '"model_type": "qwen2"}',
    ],
)  # fmt: skip
def test_a_bad_model_file_is_refused(tmp_path, content):
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(UserError, match="--model"):
        resolve({"model": str(tmp_path / "m.json")})


def test_infinity_is_no_learning_rate():
    with pytest.raises(UserError, match="--lr inf"):
        resolve({"lr": math.inf})
