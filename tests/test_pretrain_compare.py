"""Several optimizers side by side: same data, same start, each in its own process; what is finished is kept."""

import json
import signal

import pytest
from pretraining import BUDGET, MODEL, PROJECTED, refused, start, state_at, steps_saved, wait_for, write_corpus

from subspace_optim.cli import main
from subspace_optim.pretrain import checkpoint, compare


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "email")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SUBSPACE_OPTIM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def arguments(corpus, out, *more):
    options = ["--data", str(corpus), "--out", str(out), "--plain", *MODEL, *BUDGET, *PROJECTED, *map(str, more)]
    return ["compare", "adamw", "galore", *options]


@pytest.mark.slow
def test_optimizers_are_set_side_by_side_and_finished_runs_are_kept(tmp_path, corpus, capfd):
    out = tmp_path / "out"
    assert main(arguments(corpus, out, "--steps", 6)) == 0
    shown = capfd.readouterr().out
    assert "optimizer  perplexity  state MiB  peak MiB  step ms  tokens/s" in shown
    found = json.loads((out / "compare.json").read_text())["runs"]
    assert list(found) == ["adamw", "galore"]
    assert found["adamw"]["corpus"] == found["galore"]["corpus"]
    first = {name: state_at(out / name, 0)["evaluations"] if 0 in steps_saved(out / name) else None for name in found}
    assert found["adamw"]["curve"]["validation"][0] == found["galore"]["curve"]["validation"][0], first
    assert found["adamw"]["config"]["rank"] is None and found["galore"]["config"]["rank"] == 4
    assert found["galore"]["bytes"]["optimizer_state"] < found["adamw"]["bytes"]["optimizer_state"]
    assert found["adamw"]["bytes"]["peak"] != found["galore"]["bytes"]["peak"]
    assert (out / "compare.png").stat().st_size > 10_000

    (out / "galore" / "report.json").unlink()
    before = {name: (out / name / "report.json").stat().st_mtime_ns for name in ["adamw"]}
    assert main(arguments(corpus, out, "--steps", 6)) == 0
    shown = capfd.readouterr().out
    assert "adamw: finished before, kept" in shown and "resuming" in shown and "after step 6" in shown
    assert (out / "adamw" / "report.json").stat().st_mtime_ns == before["adamw"]
    again = json.loads((out / "compare.json").read_text())["runs"]
    assert again["adamw"] == found["adamw"] and again["galore"]["final"] == found["galore"]["final"]

    assert main(arguments(corpus, out, "--steps", 7)) == 2
    assert "holds a run of adamw with other options" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_comparison_says_how_to_go_on(tmp_path, corpus, number):
    out = tmp_path / "out"
    process = start(arguments(corpus, out, "--steps", 5000, "--save-every", 1000), start_new_session=True)
    wait_for(lambda: steps_saved(out / "adamw") == [0], process)
    if number == signal.SIGINT:
        import os

        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    shown, error = process.communicate(timeout=120)
    assert process.returncode == 128 + number, (shown, error)
    assert "the comparison stops in adamw" in shown and "compare adamw galore" in shown.splitlines()[-1]
    assert "Traceback" not in error
    assert checkpoint.load_newest(out / "adamw", pytest.fail)[1]["step"] == steps_saved(out / "adamw")[0]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--rank", 0), ("--rank 0",)),
        (("--optimizers",), ("unrecognized",)),
        (("--data", "missing"), ("--data", "missing")),
    ],
)
def test_mistakes_are_found_before_the_first_run(tmp_path, corpus, capfd, more, words):
    assert main(arguments(corpus, tmp_path / "out", *more)) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error


def test_names_are_checked_first(tmp_path, corpus, capsys):
    refused(capsys, ["compare", "adamw", "galoer", "--out", str(tmp_path / "out")], "galoer", "galore")
    refused(capsys, ["compare", "osd", "online_subspace_descent", "--out", str(tmp_path / "out")], "osd", "twice")
    assert not (tmp_path / "out").exists()


def test_options_of_projections_are_kept_from_the_dense_ones():
    given = {"rank": 4, "embedding_rank": 4, "layerwise": "hooks", "lr": 0.1}
    assert compare._options_of({"optimizer": "adamw"}, given) == {"optimizer": "adamw", "lr": 0.1}
    assert compare._options_of({"optimizer": "svd+adam"}, given) == {"optimizer": "svd+adam", **given}


def test_a_run_may_have_options_of_its_own(tmp_path, corpus):
    """One optimizer at several rates; what all have does not reach where a run says otherwise."""
    out, names = tmp_path / "out", ["adamw,lr=0.002", "galore,scale=0.2,seed=3", "galore,betas=0.8:0.9"]
    common = ["--data", str(corpus), "--out", str(out), "--quiet", *MODEL, *BUDGET, *PROJECTED, "--steps", "2"]
    assert main(["compare", *names, *common, "--seed", "1"]) == 0
    found = json.loads((out / "compare.json").read_text())["runs"]
    assert list(found) == names
    one, two, three = (report["config"] for report in found.values())
    assert (one["optimizer"], one["lr"], one["rank"], one["seed"]) == ("adamw", 0.002, None, 1)
    assert (two["optimizer"], two["scale"], two["seed"]) == ("galore", 0.2, 3)
    assert (three["scale"], three["betas"], three["seed"]) == (0.1, [0.8, 0.9], 1)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adamw,lr", ("'lr'", "lr=0.001")),
        ("adamw,lr=fast", ("adamw,lr=fast", "--lr", "fast")),
        ("adamw,layers=3", ("adamw,layers=3", "--layers", "its optimizer, and seed")),
        ("adamw,scale=2", ("scale",)),
        ("galore,betas=0.9", ("--betas",)),
        ("galoer,lr=1", ("galoer", "galore")),
    ],
)
def test_options_of_its_own_are_checked_first(tmp_path, capsys, name, words):
    refused(capsys, ["compare", "adamw", name, "--out", str(tmp_path / "out")], *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["{}", '{"config": 3}', '{"config": {"lr": 1}}'])
def test_a_report_of_another_shape_is_of_another_run(tmp_path, corpus, capfd, content):
    (tmp_path / "out" / "adamw").mkdir(parents=True)
    (tmp_path / "out" / "adamw" / "report.json").write_text(content)
    assert main(arguments(corpus, tmp_path / "out")) == 2
    assert "holds a run of adamw with other options" in capfd.readouterr().err


def test_a_comparison_does_not_move_into_a_run(tmp_path, corpus, capfd):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("{}")
    assert main(arguments(corpus, tmp_path / "out")) == 2
    assert "holds a run of pretrain" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.json"]
