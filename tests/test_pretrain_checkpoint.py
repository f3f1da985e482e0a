"""Checkpoints: whole or absent, checked before they are trusted, and a full disk costs a line, not the work."""

import errno
import json
import os
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from pretraining import assert_same_state, killed_while, micro, refused, state_at, steps_saved, write_corpus

from subspace_optim.cli import main
from subspace_optim.pretrain import checkpoint
from subspace_optim.pretrain.config import UserError, resolve
from subspace_optim.pretrain.files import no_room


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "email")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SUBSPACE_OPTIM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@contextmanager
def files_up_to(size):
    """A disk that is full beyond so many bytes a file: the kernel itself refuses the write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def state(step):
    return {"step": step, "model": {"w": torch.full((1000,), float(step))}}


def save(run, step, keep=2):
    return checkpoint.save(run, step, state(step), {"config": {"a": 1}}, keep)


def test_what_is_saved_comes_back_through_plain_torch_load(tmp_path):
    path = save(tmp_path, 7)
    loaded, facts = checkpoint.load(path)
    assert_same_state(loaded, state(7))
    assert_same_state(torch.load(path / "state.pt"), state(7))
    assert facts["step"] == 7 and facts["config"] == {"a": 1}


def test_the_last_ones_are_kept(tmp_path):
    for step in (0, 5, 10, 15):
        save(tmp_path, step, keep=3)
    assert steps_saved(tmp_path) == [15, 10, 5]


def test_going_back_replaces_what_came_later(tmp_path):
    for step in (0, 5, 10):
        save(tmp_path, step, keep=3)
    save(tmp_path, 7, keep=3)
    assert steps_saved(tmp_path) == [7, 5, 0]


@pytest.mark.parametrize("damage", ["truncate", "empty", "flip", "no meta", "half meta", "no state"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, damage):
    save(tmp_path, 5)
    newest = save(tmp_path, 10)
    file = newest / "state.pt"
    if damage == "truncate":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "empty":
        os.truncate(file, 0)
    elif damage == "flip":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "no meta":
        (newest / "meta.json").unlink()
    elif damage == "half meta":
        os.truncate(newest / "meta.json", 10)
    else:
        file.unlink()
    warnings = []
    path, loaded, _ = checkpoint.load_newest(tmp_path, warnings.append)
    assert path == tmp_path / checkpoint.FOLDER / "step-00000005" and loaded["step"] == 5
    assert len(warnings) == 1 and "step-00000010" in warnings[0] and "falling back" in warnings[0]
    with pytest.raises(UserError, match=r"step-00000010.* go on from .*--resume .*step-00000005$"):
        checkpoint.load_newest(newest, warnings.append)


def test_no_good_checkpoint_is_said(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.load_newest(tmp_path, lambda line: None)
    os.truncate(save(tmp_path, 5) / "state.pt", 3)
    with pytest.raises(UserError, match="none of its 1 checkpoints"):
        checkpoint.load_newest(tmp_path, lambda line: None)


_SAVER = """
    step = max((checkpoint.step_of(path) for path in checkpoint.checkpoints(folder)), default=0)
    while True:
        step += 1
        state = {"step": step, "model": {str(i): torch.full((20_000,), float(step)) for i in range(20)}}
        checkpoint.save(folder, step, state, {}, keep=2)
"""


def test_a_kill_at_any_instant_leaves_a_good_checkpoint(tmp_path):
    save(tmp_path, 0)
    warnings, reached = [], []
    for round_ in range(3):
        killed_while(_SAVER, tmp_path, tuple(0.03 + 0.0031 * number + 0.001 * round_ for number in range(12)))
        _, loaded, _ = checkpoint.load_newest(tmp_path, warnings.append)
        assert all((tensor == loaded["step"]).all() for tensor in loaded["model"].values())
        reached.append(loaded["step"])
    assert warnings == []
    assert reached == sorted(set(reached)) and reached[0] > 0
    save(tmp_path, reached[-1] + 1, keep=2)  # removes what kills between a save and its tidying have left
    assert len(steps_saved(tmp_path)) == 2
    assert not list((tmp_path / checkpoint.FOLDER).glob(".partial-*"))


def test_a_checkpoint_that_a_person_keeps_under_a_name_stays(tmp_path):
    """And takes no place of those that --keep counts."""
    save(tmp_path, 5)
    kept = tmp_path / checkpoint.FOLDER / "step-00000005-best"
    shutil.copytree(kept.with_name("step-00000005"), kept)
    for step in (6, 7, 8):
        save(tmp_path, step, keep=2)
    assert steps_saved(tmp_path) == [8, 7] and (kept / "state.pt").exists()
    assert checkpoint.load_newest(tmp_path, pytest.fail)[1]["step"] == 8
    assert checkpoint.load_newest(kept, pytest.fail)[1]["step"] == 5


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    save(tmp_path, 5)
    with files_up_to(2000), pytest.raises(UserError, match=r"--out .*no room to write .*earlier checkpoints are safe"):
        save(tmp_path, 10)
    assert steps_saved(tmp_path) == [5]
    assert checkpoint.load_newest(tmp_path, pytest.fail)[1]["step"] == 5
    assert [path.name for path in (tmp_path / checkpoint.FOLDER).iterdir()] == ["step-00000005"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_at_the_very_end_of_writing(tmp_path, monkeypatch, number):
    save(tmp_path, 5)

    def full(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no room to write"):
        save(tmp_path, 10)
    assert steps_saved(tmp_path) == [5]


def test_no_room_is_seen_through_wrappers():
    wrapped = RuntimeError("a library's own words")
    wrapped.__cause__ = OSError(errno.ENOSPC, "full")
    assert no_room(wrapped)
    assert not no_room(OSError(errno.EACCES, "no"))


def test_a_disk_too_small_for_a_checkpoint_is_found_before_training(tmp_path, capsys, corpus):
    main(micro(corpus, tmp_path / "warm", "--steps", 1))  # fills the cache, which is not what is tested
    capsys.readouterr()
    with files_up_to(20_000):
        error = refused(capsys, micro(corpus, tmp_path / "out", "--steps", 8), "--out", "no room")
    assert "free some space" in error
    assert steps_saved(tmp_path / "out") == []


def test_too_little_room_for_all_the_checkpoints_is_found_after_one_step(tmp_path, capsys, corpus, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=400_000))
    refused_run = micro(corpus, tmp_path / "out", "--steps", 8)
    assert main(refused_run) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--out" in error and "0.4 MiB free" in error and "--keep" in error
    assert steps_saved(tmp_path / "out") == [0]
    assert main(micro(corpus, tmp_path / "other", "--steps", 8, "--keep", 1, "--hidden", 16, "--quiet")) == 0


def test_a_disk_that_fills_up_in_the_middle_costs_a_warning_until_the_end(tmp_path, capsys, corpus):
    arguments = micro(corpus, tmp_path / "out", "--steps", 10, "--keep", 1)
    assert main(micro(corpus, tmp_path / "warm", "--steps", 10, "--keep", 9)) == 0
    sizes = {step: _size(tmp_path / "warm", step) for step in (0, 4)}
    assert sizes[0] < sizes[4]
    capsys.readouterr()
    with files_up_to(sizes[0] + (sizes[4] - sizes[0]) // 2):
        assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in error[:2]] == ["warning", "warning"]
    assert "training goes on" in error[0] and "no room" in error[-1] and error[-1].startswith("subspace-optim: error:")
    assert steps_saved(tmp_path / "out") == [0]
    assert main(["pretrain", "--resume", str(tmp_path / "out"), "--plain"]) == 0
    assert_same_state(state_at(tmp_path / "out", 10)["model"], state_at(tmp_path / "warm", 10)["model"])


def _size(run, step):
    return (run / checkpoint.FOLDER / f"step-{step:08d}" / "state.pt").stat().st_size


def test_a_cache_that_cannot_be_written_is_refused(tmp_path, capsys, corpus, monkeypatch):
    monkeypatch.setenv("SUBSPACE_OPTIM_CACHE", str(tmp_path / "cache"))
    with files_up_to(1000):
        refused(capsys, micro(corpus, tmp_path / "out"), "the cache", "no room", "SUBSPACE_OPTIM_CACHE")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_checkpoint_of_another_model_is_refused(tmp_path, capsys, corpus):
    run = tmp_path / "run"
    assert main(micro(corpus, run, "--steps", 4)) == 0
    capsys.readouterr()
    refused(capsys, ["pretrain", "--resume", str(run), "--model", "60m"], "--model 60m", "tiny", "--out")
    refused(capsys, ["pretrain", "--resume", str(run), "--hidden", "64"], "--hidden 64", "32")
    refused(capsys, ["pretrain", "--resume", str(run), "--optimizer", "flora"], "--optimizer flora", "galore")
    refused(capsys, ["pretrain", "--resume", str(run), "--steps", "2"], "--steps 2", "step 4 already")
    refused(capsys, ["pretrain", "--resume", str(run), "--steps", "9", "--tokens", "9"], "--tokens 9: --steps 9")
    refused(capsys, ["pretrain", "--resume", str(run), "--out", str(tmp_path / "b")], "--out", "--resume", "own folder")
    refused(capsys, ["pretrain", "--resume", str(run), "--overwrite"], "--overwrite", "--resume")
    refused(capsys, ["pretrain", "--resume", str(tmp_path / "none")], "--resume", "holds no checkpoint")
    assert steps_saved(run) == [4, 0]

    path = run / checkpoint.FOLDER / "step-00000004"
    saved, facts = checkpoint.load(path)
    saved["model"] = {name: tensor[:1] for name, tensor in saved["model"].items()}
    facts = {"config": facts["config"], "corpus": facts["corpus"]}
    checkpoint.save(run, 4, saved, facts, keep=2)
    refused(capsys, ["pretrain", "--resume", str(run)], "--resume", "another model")

    facts["config"] = {**facts["config"], "from_the_future": 1}
    checkpoint.save(run, 4, saved, facts, keep=2)
    refused(capsys, ["pretrain", "--resume", str(run)], "from_the_future", "version")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda facts: facts.pop("config"), "no options"),
        (lambda facts: facts.pop("corpus"), "corpus"),
        (lambda facts: facts.update(config=[1]), "no options"),
        (lambda facts: facts["config"].pop("lr"), "(lr)"),
        (lambda facts: facts["config"].update(lr="0.01"), "--lr '0.01'"),
        (lambda facts: facts["config"].update(data=[3]), "--data [3]"),
        (lambda facts: facts["config"].update(betas=[0.9]), "--betas [0.9]"),
        (lambda facts: facts["config"].update(steps=0), "--steps 0"),
        (lambda facts: facts["config"].update(dtype="float99"), "--dtype float99"),
        (lambda facts: facts["config"].update(heads=3), "--heads 3"),
    ],
)  # fmt: skip
def test_facts_of_another_shape_are_one_line_and_name_the_checkpoint_before(tmp_path, capsys, damage, words):
    """What lies beside the checksummed state can be edited, and stay JSON."""
    facts = {"config": resolve({}).to_dict(), "corpus": "key"}
    for step in (4, 8):
        newest = checkpoint.save(tmp_path / "a run", step, state(step), facts, keep=2)
    facts = json.loads((newest / "meta.json").read_text())
    damage(facts)
    (newest / "meta.json").write_text(json.dumps(facts))
    error = refused(capsys, ["pretrain", "--resume", str(tmp_path / "a run")], str(newest / "meta.json"), words)
    assert error.endswith(f"--resume '{newest.with_name('step-00000004')}'\n")
    shutil.rmtree(newest.with_name("step-00000004"))
    assert "--overwrite" in refused(capsys, ["pretrain", "--resume", str(tmp_path / "a run")], words)


def test_a_checkpoint_is_found_from_within_and_goes_on_only_in_a_run(tmp_path, capsys, monkeypatch):
    """Its run is the folder above, however it was named; a copy of it elsewhere has none to write to."""
    path = save(tmp_path / "run", 5)
    monkeypatch.chdir(path)
    for name in (".", "../step-00000005"):
        assert checkpoint.load_newest(Path(name), pytest.fail)[0] == path
    copy = shutil.copytree(path, tmp_path / "copy" / path.name)
    refused(capsys, ["pretrain", "--resume", str(copy)], f"--resume {copy}: is a checkpoint outside of a run")
    assert [path.name for path in (tmp_path / "copy").iterdir()] == [path.name]


def test_text_that_changed_since_the_checkpoint_is_refused(tmp_path, capsys):
    corpus = write_corpus(tmp_path / "email")
    assert main(micro(corpus, tmp_path / "run", "--steps", 2)) == 0
    with (corpus / "message.py").open("a") as file:
        file.write("# changed\n")
    capsys.readouterr()
    refused(capsys, ["pretrain", "--resume", str(tmp_path / "run")], "--resume", "text has changed")


def test_a_run_goes_on_with_its_text_in_another_place(tmp_path, capsys):
    corpus = write_corpus(tmp_path / "email")
    assert main(micro(corpus, tmp_path / "run", "--steps", 2)) == 0
    corpus.rename(tmp_path / "moved")
    go_on = ["pretrain", "--resume", str(tmp_path / "run"), "--steps", "3", "--plain"]
    capsys.readouterr()
    refused(capsys, go_on, f"--data {corpus}: no such file or folder")
    assert main([*go_on, "--data", str(tmp_path / "moved")]) == 0


def test_a_truncated_newest_checkpoint_costs_a_warning(tmp_path, capsys, corpus):
    assert main(micro(corpus, tmp_path / "one", "--steps", 10, "--keep", 9)) == 0
    whole = state_at(tmp_path / "one", 10)
    newest = tmp_path / "one" / checkpoint.FOLDER / "step-00000010" / "state.pt"
    os.truncate(newest, newest.stat().st_size - 1)
    capsys.readouterr()
    assert main(["pretrain", "--resume", str(tmp_path / "one"), "--plain"]) == 0
    shown = capsys.readouterr()
    assert "warning" in shown.err and "falling back" in shown.err and "after step 8" in shown.out
    assert_same_state(state_at(tmp_path / "one", 10), whole)
    assert json.loads((tmp_path / "one" / "report.json").read_text())["final"]["step"] == 10
