"""`subspace-optim plan`, and `pretrain --fit`: what is planned is what is run."""

import json

import pytest
from pretraining import MODEL, micro, refused, write_corpus

from subspace_optim.cli import main

PLAN = ["plan", *MODEL, "--seq", "16", "--batch", "4", "--rank", "4"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPACE_OPTIM_CACHE", str(tmp_path / "cache"))


def test_the_command_says_and_writes_the_plan(capsys, tmp_path):
    assert main([*PLAN, "--json", str(tmp_path / "plan.json")]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "plan.json").read_text())
    assert "4 × 16 tokens" in said and "lm_head" in said and "peak" in said
    assert found["settings"]["rank"] == 4 and found["bytes"]["weights"] > 4 * 2 * 400 * 32
    assert main([*PLAN, "--gpu", "24GB"]) == 0
    assert "fits: " in capsys.readouterr().out
    assert main([*PLAN, "--gpu", "0.6MB", "--device", "cpu"]) == 1
    assert "does not fit" in capsys.readouterr().out
    assert main([*PLAN[:-2], "--budget", "500kB"]) == 0
    assert "rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpu", "big"], ("gpu='big'", "24GB")),
        (["--budget", "1kB"], ("the least",)),
        (["--budget", "1MB", "--rank", "8"], ("--rank 8", "--budget")),
        (["--dtype", "float8"], ("--dtype", "float8")),
        (["--model", "60mm"], ("--model 60mm", "60m")),
        (["--batch", "0"], ("--batch-size 0",)),
        (["--optimizer", "galor"], ("galore",)),
        (["--json", "/nowhere/plan.json"], ("--json /nowhere/plan.json", "cannot be written")),
        (["--gpus", "24GB"], ("--gpu",)),
    ],
)
def test_a_bad_option_of_plan_is_one_line(capsys, options, words):
    refused(capsys, [*PLAN[:-2], *options], *words)


def test_a_run_is_made_to_fit_and_does(capsys, tmp_path):
    """The figure is what the run may take beside Python and torch; it forces checkpoints and small micro-batches."""
    corpus = write_corpus(tmp_path / "email")
    options = ["pretrain", "--data", str(corpus), "--out", str(tmp_path / "run"), "--plain", "--vocab-size", "2048"]
    options += ["--hidden", "64", "--intermediate", "160", "--layers", "2", "--heads", "2", "--rank", "16"]
    options += ["--seq-len", "64", "--eval-tokens", "512", "--steps", "3", "--dtype", "float32"]
    assert main([*options, "--fit", "0.01GB"]) == 0
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    config, plan = report["config"], report["plan"]
    assert plan["peak"] <= 10_000_000
    assert config["batch_size"] < 8 and config["batch_size"] * config["accumulate"] == 8
    assert config["rank"] == 16 and config["dtype"] == "float32", "what is given stays"
    assert "does not fit" in said and f"batch={config['batch_size']}" in said and "planned" in said
    assert "tensors at the peak of a step" in said
    assert report["steps"] == 3 and report["bytes"]["allocated"] == pytest.approx(plan["allocated"], rel=0.05)


def test_a_run_that_cannot_fit_names_the_least(capsys, tmp_path):
    corpus = write_corpus(tmp_path / "email")
    refused(capsys, micro(corpus, tmp_path / "run", "--fit", "100kB"), "--fit 100kB", "the least", "MiB")
    refused(capsys, micro(corpus, tmp_path / "run", "--fit", "much"), "much", "24GB")
    refused(capsys, ["pretrain", "--resume", str(tmp_path), "--fit", "1GB"], "--fit 1GB", "--resume")
