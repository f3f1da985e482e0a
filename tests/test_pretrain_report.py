"""The report: numbers that can be checked against the run, and pictures that can be looked at."""

import json
import math
import struct

import pytest
from pretraining import micro, state_at, write_corpus

from subspace_optim.cli import main
from subspace_optim.integrations.watch import read_lines
from subspace_optim.pretrain import report
from subspace_optim.pretrain.display import Display, count, duration, size, table


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    base = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUBSPACE_OPTIM_CACHE", str(base / "cache"))
        corpus = write_corpus(base / "email")
        assert main(micro(corpus, base / "run", "--steps", 12)) == 0
    return base / "run"


def png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def test_the_report_holds_what_happened(finished):
    found = json.loads((finished / "report.json").read_text())
    state = state_at(finished, 12)
    step, nll, tokens = state["evaluations"][-1].tolist()
    assert (step, tokens) == (12, 512)
    assert found["final"] == {
        "step": 12,
        "loss": nll / tokens,
        "perplexity": pytest.approx(math.exp(nll / tokens)),
        "tokens": 512,
    }
    assert found["tokens"] == 12 * 4 * 16 and found["skipped_steps"] == 0
    assert [point["step"] for point in found["curve"]["validation"]] == [0, 6, 12]
    assert [point["loss"] for point in found["curve"]["train"]] == pytest.approx(state["curve"][:, 1].tolist())
    assert found["config"]["rank"] == 4 and found["corpus"]["vocab_size"] == 400
    assert found["versions"]["torch"] and found["machine"]["cores"] and "rank 4" in found["optimizer"]


def test_bytes_are_those_of_the_tensors(finished):
    found = json.loads((finished / "report.json").read_text())["bytes"]
    state = state_at(finished, 12)
    weights = sum(tensor.nbytes for tensor in state["model"].values())
    assert found["weights"] == found["gradients"] == weights
    tensors = [value for entry in state["optimizer"]["state"].values() for value in entry.values()]
    counted = sum(value.nbytes for value in tensors if hasattr(value, "nbytes"))
    assert found["optimizer_state"] == counted
    assert sum(found[key] for key in report.CATEGORIES) == found["allocated"]
    assert found["peak"] > found["before_the_model"] > 0


def test_what_was_planned_is_beside_what_a_step_took(finished):
    """Within 5 %, which the planner promises: tensors on both sides, and neither libraries nor the interpreter."""
    found = json.loads((finished / "report.json").read_text())
    assert found["bytes"]["allocated"] == pytest.approx(found["plan"]["allocated"], rel=0.05)
    assert state_at(finished, 12)["allocated"] == found["bytes"]["allocated"]


def test_seconds_by_phase_add_up(finished):
    found = json.loads((finished / "report.json").read_text())
    seconds = dict(found["seconds"])
    total = seconds.pop("total")
    assert total == pytest.approx(sum(seconds.values()))
    assert {"corpus", "forward and backward", "optimizer", "evaluation", "checkpoints"} <= seconds.keys()
    assert all(value > 0 for value in seconds.values())
    assert 0 < found["speed"]["optimizer_ms"] < found["speed"]["step_ms"]


def test_the_picture_is_there(finished):
    assert png_size(finished / "report.png") == (1440, 600)


def test_a_comparison_is_drawn(finished, tmp_path):
    one = json.loads((finished / "report.json").read_text())
    report.draw_comparison(tmp_path / "c.png", {f"run {number}": one for number in range(10)})
    assert png_size(tmp_path / "c.png")[0] == 1440


def test_a_long_curve_is_thinned_to_means():
    curve = [[step, float(step), 0.1, 1.0, 0.0, 0.0] for step in range(1, 5001)]
    points = report.thinned(curve, 10)
    assert len(points) == 500 and points[-1]["step"] == 5000 and points[-1]["tokens"] == 50_000
    assert points[0]["loss"] == pytest.approx(5.5)
    curve[0][1] = math.nan
    assert report.thinned(curve, 10)[0]["loss"] == pytest.approx(6.0)
    assert report.thinned([[1, math.nan, 0.1, 1.0, 0.0, 0.0]], 10)[0]["loss"] is None
    assert report.thinned([], 10) == []


def test_json_has_no_word_for_infinity(tmp_path):
    report.write_json(tmp_path / "r.json", {"a": math.inf, "b": [math.nan, 1.0], "c": {"d": (2,)}})
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": None, "b": [None, 1.0], "c": {"d": [2]}}


def test_numbers_are_said_in_few_digits():
    assert [count(n) for n in (7, 12_300, 4e6, 1.3e9)] == ["7", "12.3k", "4.0M", "1.3B"]
    assert [size(n) for n in (1 << 20, 3 << 30)] == ["1.0 MiB", "3.00 GiB"]
    assert [duration(s) for s in (42.4, 185, 7800)] == ["42 s", "3 min 05 s", "2 h 10 min"]


def test_a_table_aligns_numbers_to_the_right():
    lines = table(("name", "ms"), [("a", "5"), ("long", "12.5")]).splitlines()
    assert lines == ["name    ms", "────  ────", "a        5", "long  12.5"]


def test_a_terminal_gets_the_live_panel(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    display = Display()
    display.start(10, 2)
    display.step(3, {"loss": "4.2", "left": "3 s"}, line=True)
    display.info("a line [between]")
    display.stop()
    shown = capsys.readouterr().out
    assert "4.2" in shown and "step 3 of 10" in shown and "a line [between]" in shown
    plain = Display(plain=True)
    plain.start(10, 0)
    plain.step(3, {"loss": "4.2"}, line=True)
    plain.step(4, {"loss": "4.1"}, line=False)
    assert capsys.readouterr().out == "step      3  loss 4.2\n"


def test_a_watched_run_goes_on_with_its_figures(tmp_path, monkeypatch):
    """The steps of the first part and those after it are on one page; what was not watched leaves no file."""
    monkeypatch.setenv("SUBSPACE_OPTIM_CACHE", str(tmp_path / "cache"))
    corpus = write_corpus(tmp_path / "email")
    assert main(micro(corpus, tmp_path / "run", "--steps", 8, "--watch", 3)) == 0
    assert main(["pretrain", "--resume", str(tmp_path / "run"), "--steps", "12", "--plain"]) == 0
    records = read_lines(tmp_path / "run" / "figures.jsonl")
    assert [step for step, _ in records] == [1, 4, 7, 9, 12]
    assert any(layer.captured for layer in records[-1][1])
    page = (tmp_path / "run" / "figures.html").read_text()
    assert "Step 12, 5 looks" in page and "galore on tiny" in page
    assert main(micro(corpus, tmp_path / "run", "--steps", 4, "--overwrite")) == 0
    assert not list((tmp_path / "run").glob("figures.*"))
