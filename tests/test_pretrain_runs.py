"""Whole runs: they learn, they repeat themselves bit for bit, and being killed, stopped and resumed changes nothing."""

import math
import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from pretraining import (
    assert_same_state,
    environment,
    micro,
    refused,
    start,
    state_at,
    steps_saved,
    wait_for,
    write_corpus,
)

from subspace_optim.cli import main
from subspace_optim.pretrain import checkpoint, loop
from subspace_optim.pretrain.command import settle
from subspace_optim.pretrain.config import Diverged, resolve
from subspace_optim.pretrain.display import Display
from subspace_optim.pretrain.files import claim
from subspace_optim.pretrain.loop import stop_signals

FIVE = ["galore", "flora", "osd", "gradnormlorp", "grams"]
CELLS = ["svd+lion", "random+adam+cautious", "none+adam+grams", "pca+momentum"]


def is_projected(name):
    return name not in ("adamw", "grams") and not name.startswith("none+")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "email")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SUBSPACE_OPTIM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def make_run(corpus, tmp_path, **more):
    options = {
        "data": [str(corpus)], "hidden": 32, "intermediate": 48, "layers": 1, "heads": 2, "vocab_size": 400,
        "seq_len": 16, "batch_size": 4, "eval_tokens": 512, "rank": 4, "update_proj_gap": 5, "steps": 12,
        "eval_every": 6, "save_every": 4, "device": "cpu", **more,
    }  # fmt: skip
    return loop.Run(resolve(settle(options)), tmp_path / "run", Display(quiet=True))


@pytest.mark.parametrize("name", ["adamw", *FIVE])
def test_the_loss_falls_under_every_optimizer(tmp_path, corpus, name):
    run = tmp_path / "run"
    projected = is_projected(name)
    budget = ("--steps", 60, "--eval-every", 60, "--lr", 0.01)
    arguments = micro(corpus, run, "--optimizer", name, *budget, projected=projected)
    assert main(arguments) == 0
    nll = state_at(run, 60)["evaluations"]
    first, last = (nll[:, 1] / nll[:, 2]).tolist()
    assert abs(first - math.log(400)) < 0.2
    assert last < first - 0.5


@pytest.mark.parametrize(
    ("name", "more"),
    [
        *((name, ()) for name in ("adamw", *FIVE, *CELLS)),
        ("galore", ("--dtype", "bfloat16")),
        ("galore", ("--accumulate", 2, "--gradient-checkpointing", "--weight-decay", 0.1)),
        ("flora", ("--dtype", "bfloat16")),
        ("galore", ("--layerwise", "hooks", "--accumulate", 2)),
        ("random+adam", ("--layerwise", "linear", "--gradient-checkpointing")),
    ],
    ids=str,
)
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, corpus, name, more):
    """From step 4 to 12 there is a refresh at 5 and at 10, an evaluation, a checkpoint."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    arguments = micro(
        corpus, whole, "--optimizer", name, "--steps", 12, "--keep", 9, *more, projected=is_projected(name)
    )
    assert main(arguments) == 0
    shutil.copytree(whole / "checkpoints" / "step-00000004", resumed / "checkpoints" / "step-00000004")
    assert main(["pretrain", "--resume", str(resumed), "--quiet"]) == 0
    assert_same_state(state_at(resumed, 12), state_at(whole, 12))


def test_a_run_is_the_same_layer_by_layer(tmp_path, corpus):
    """To rounding, with fewer bytes of gradients; and each may go on with the other's checkpoint."""
    runs = {}
    for mode in ("off", "hooks", "linear"):
        run = make_run(corpus, tmp_path / mode, layerwise=mode, clip=0.0)  # the norm is of R where the basis is new
        run.optimizer.stagger = False
        for _ in range(8):
            assert run.advance()
        runs[mode] = run.state()
    for mode in ("hooks", "linear"):
        assert runs[mode]["gradient_bytes"] < runs["off"]["gradient_bytes"]
        losses = (runs[name]["curve"][:, 1] for name in (mode, "off"))
        torch.testing.assert_close(*losses, rtol=1e-4, atol=0)  # float32, enlarged by eight steps of Adam
        again = make_run(corpus, tmp_path / f"{mode} again", layerwise="off")
        again.load(runs[mode], {"corpus": again.corpus.key})
        assert again.advance()


def test_the_seed_decides_everything(tmp_path, corpus):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert main(micro(corpus, tmp_path / out, "--steps", 6, "--seed", seed, "--quiet")) == 0
    a, b, c = (state_at(tmp_path / out, 6) for out in "abc")
    assert_same_state(a, b)
    assert not torch.equal(a["model"]["lm_head.weight"], c["model"]["lm_head.weight"])


@pytest.mark.slow
def test_kill_minus_nine_and_resume_is_as_if_nothing_had_happened(tmp_path, corpus):
    steps = ("--steps", 60, "--save-every", 3)
    assert main(micro(corpus, tmp_path / "whole", *steps, "--quiet")) == 0
    killed = tmp_path / "killed"
    process = start(micro(corpus, killed, *steps))
    wait_for(lambda: max(steps_saved(killed), default=0) >= 6, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and max(steps_saved(killed)) < 60
    finished = subprocess.run(
        [sys.executable, "-m", "subspace_optim", "pretrain", "--resume", str(killed)],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert "warning" not in finished.stderr
    assert_same_state(state_at(killed, 60), state_at(tmp_path / "whole", 60))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_prints_the_command_that_resumes(tmp_path, corpus, number):
    stopped = tmp_path / "with space"
    process = start(micro(corpus, stopped, "--steps", 4000, "--save-every", 1000))
    wait_for(lambda: steps_saved(stopped) == [0], process)
    process.send_signal(number)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert error == ""
    step = steps_saved(stopped)[0]
    assert f"stopped by {signal.Signals(number).name} after step {step}" in out
    assert 0 < step < 4000 or steps_saved(stopped) == [0]
    command = shlex.split(out.strip().splitlines()[-1])
    assert command[-2:] == ["--resume", str(stopped)]
    if number != signal.SIGINT:
        return
    finished = subprocess.run(
        [*command, "--steps", str(step + 2), "--quiet"], env=environment(), capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("perplexity") and steps_saved(stopped)[0] == step + 2


def test_a_signal_that_is_ignored_stays_so():
    """nohup asks for that, and a shell that puts a job into the background."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as caught:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGTERM] and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_launcher_does_not_silence_the_error_of_a_rank():
    """torchrun ends all ranks as soon as it sees that one has ended; another may be about to say what it met."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with pytest.raises(RuntimeError, match="lost"), stop_signals(again=False) as caught:
            raise RuntimeError("lost")
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_run_goes_on_where_its_output_cannot(tmp_path, corpus, monkeypatch):
    """A full disk under a log of it; a reader or a terminal that is gone is an OSError as well."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main(micro(corpus, tmp_path / "run", "--steps", 2)) == 0
    assert steps_saved(tmp_path / "run")[0] == 2 and (tmp_path / "run" / "report.json").exists()


def test_a_stop_between_steps_resumes_bit_for_bit(tmp_path, corpus):
    """The signal comes in the middle of a step; that step is finished, saved, and nothing after it."""
    whole = make_run(corpus, tmp_path / "whole", steps=8)
    whole.train()
    stopped = make_run(corpus, tmp_path / "stopped", steps=8)
    advance = stopped.advance

    def interrupted():
        if stopped.step == 5:
            signal.raise_signal(signal.SIGINT)
        return advance()

    stopped.advance = interrupted
    with pytest.raises(loop.Interrupted, match="SIGINT") as caught:
        stopped.train()
    assert caught.value.exit_code == 130 and stopped.step == 6
    assert steps_saved(stopped.folder) == [6, 4]
    resumed = make_run(corpus, tmp_path / "stopped", steps=8)
    resumed.load(*checkpoint.load(stopped.folder / "checkpoints" / "step-00000006"))
    resumed.train()
    assert_same_state(resumed.state(), whole.state())


def test_perplexity_is_over_tokens(tmp_path, corpus):
    """Brute force: every held-out window alone, in double precision, through log-softmax and gather."""
    run = make_run(corpus, tmp_path, batch_size=7)  # 32 windows: the last batch is smaller
    ours = run.evaluate()
    model = run.model.double().eval()
    windows = torch.cat(run.validation)
    assert len(windows) == 32 and len(run.validation) == 5
    nll = 0.0
    for window in windows:
        with torch.no_grad():
            logits = model(input_ids=window[None, :-1]).logits[0]
        nll -= logits.log_softmax(-1).gather(1, window[1:, None]).sum().item()
    assert ours == pytest.approx(nll / (32 * 16), rel=1e-6)
    assert loop.perplexity(*run.evaluations[-1][1:]) == pytest.approx(math.exp(nll / 512), rel=1e-5)
    assert loop.perplexity(1e9, 1) == math.inf


def test_the_evaluation_leaves_no_trace(tmp_path, corpus):
    once, often = make_run(corpus, tmp_path / "a", eval_every=12), make_run(corpus, tmp_path / "b", eval_every=1)
    once.train()
    often.train()
    assert len(once.evaluations) == 2 and len(often.evaluations) == 13
    assert_same_state(often.state()["model"], once.state()["model"])


def test_accumulated_batches_are_one_batch(tmp_path, corpus):
    one = make_run(corpus, tmp_path / "a", batch_size=8)
    two = make_run(corpus, tmp_path / "b", batch_size=2, accumulate=4)
    for _ in range(3):
        one.advance()
        two.advance()
    for left, right in zip(one.curve, two.curve):
        assert left[:4] == pytest.approx(right[:4], rel=1e-4)


def test_the_schedule_warms_up_and_ends_at_the_ratio():
    factors = [loop.lr_factor(update, 100, 10, 0.1) for update in range(101)]
    assert factors[0] == 0.1 and factors[9] == 1.0 and factors[99] == pytest.approx(0.1) == factors[100]
    assert factors[:10] == sorted(set(factors[:10]))
    assert factors[9:100] == sorted(set(factors[9:100]), reverse=True)
    middle = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 46 / 90))
    assert factors[55] == pytest.approx(middle)


def test_the_optimizer_follows_the_schedule_from_its_first_update(tmp_path, corpus):
    run = make_run(corpus, tmp_path, steps=10, warmup=2, lr=0.01)
    before = run.model.state_dict()["lm_head.weight"].clone()
    run.advance()
    assert not torch.equal(run.model.state_dict()["lm_head.weight"], before)
    for _ in range(9):
        run.advance()
    assert [row[2] for row in run.curve] == pytest.approx([0.01 * loop.lr_factor(i, 10, 2, 0.1) for i in range(10)])


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, corpus):
    run = make_run(corpus, tmp_path, steps=4)
    run.advance()
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    weight = run.model.get_parameter("lm_head.weight")
    hook = weight.register_hook(lambda gradient: gradient * math.nan)
    assert run.advance() is False
    assert run.skipped == 1 and run.step == 2
    assert_same_state(dict(run.model.state_dict()), before)
    hook.remove()
    assert run.advance() is True
    assert all(tensor.isfinite().all() for tensor in run.model.state_dict().values())


def test_many_such_steps_in_a_row_end_the_run(tmp_path, corpus):
    run = make_run(corpus, tmp_path, steps=100)
    run.model.get_parameter("lm_head.weight").register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(Diverged, match=r"last 20 steps; the weights are those of step 0; try a lower --lr"):
        run.train()
    assert run.skipped == 20
    assert all(tensor.isfinite().all() for tensor in run.model.state_dict().values())


def test_such_steps_are_counted_on_where_the_run_goes_on(tmp_path, corpus):
    """Or a run that breaks down again after each checkpoint comes to its end, with the weights of its beginning."""

    def broken():
        run = make_run(corpus, tmp_path, steps=30, save_every=8)
        run.model.get_parameter("lm_head.weight").register_hook(lambda gradient: gradient * math.inf)
        return run

    with pytest.raises(Diverged, match="last 20 steps"):
        broken().train()
    resumed = broken()
    resumed.load(*checkpoint.load(resumed.folder / "checkpoints" / "step-00000016"))
    with pytest.raises(Diverged, match="last 20 steps; the weights are those of step 0"):
        resumed.train()
    assert resumed.step == 20


def test_weights_that_are_not_finite_are_not_saved(tmp_path, corpus):
    run = make_run(corpus, tmp_path, steps=2)
    advance = run.advance

    def broken():
        moved = advance()
        with torch.no_grad():
            run.model.get_parameter("lm_head.weight").mul_(math.nan)
        return moved

    run.advance = broken
    with pytest.raises(Diverged, match="held-out loss is not finite after step 2"):
        run.train()
    assert steps_saved(run.folder) == [0]


def test_divergence_is_one_line_and_exit_code_1(tmp_path, corpus, capsys, monkeypatch):
    monkeypatch.setattr(
        loop, "summed_loss", lambda forward, windows: forward(input_ids=windows).logits.sum() * math.nan
    )
    assert main(micro(corpus, tmp_path / "run", "--steps", 30)) == 1
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("subspace-optim: error:") and "--lr" in error[-1]


def test_an_output_folder_is_not_overwritten_by_accident(tmp_path, corpus, capsys, monkeypatch):
    run = tmp_path / "run"
    arguments = micro(corpus, run, "--steps", 2, "--quiet")
    assert main(arguments) == 0
    (run / "notes.txt").write_text("mine")
    before = state_at(run, 2)
    refused(capsys, arguments, f"--out {run}", "--resume", "--overwrite")
    refused(capsys, [*arguments, "--overwrite", "--data", str(tmp_path / "none")], "no such file")
    assert_same_state(state_at(run, 2), before)
    assert main([*arguments, "--overwrite", "--seed", "1"]) == 0
    assert (run / "notes.txt").read_text() == "mine"
    assert not torch.equal(state_at(run, 2)["model"]["lm_head.weight"], before["model"]["lm_head.weight"])
    (tmp_path / "file").write_text("x")
    refused(capsys, micro(corpus, tmp_path / "file" / "run"), "--out", "cannot be written")


def test_two_runs_do_not_share_a_folder(tmp_path, corpus, capsys, monkeypatch):
    """Until the first checkpoint nothing else tells that another one has begun in it."""
    monkeypatch.chdir(tmp_path)
    with claim(tmp_path / "runs" / "tiny-galore"), claim(tmp_path / "out"):
        refused(capsys, micro(corpus, tmp_path / "out", "--steps", 1), "--out", "another process is training in it")
        unnamed = [word for word in micro(corpus, "out", "--steps", 1) if word not in ("--out", "out")]
        assert main(unnamed) == 0
        assert (tmp_path / "runs" / "tiny-galore-2" / "report.json").exists()
    assert main(micro(corpus, tmp_path / "out", "--steps", 1)) == 0
    with claim(tmp_path / "out"):
        refused(capsys, ["pretrain", "--resume", "out", "--steps", "2"], "--resume out: another process is training")
    assert main(["pretrain", "--resume", "out", "--steps", "2", "--plain"]) == 0


def test_runs_without_a_name_get_folders_of_their_own_and_resume_finds_the_latest(
    tmp_path, corpus, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    refused(capsys, ["pretrain", "--resume"], "--resume", "runs")
    arguments = micro(corpus, tmp_path, "--steps", 2, "--quiet")
    where = arguments.index("--out")
    arguments = arguments[:where] + arguments[where + 2 :]
    assert main(arguments) == 0 and main(arguments) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["tiny-galore", "tiny-galore-2"]
    assert main(["pretrain", "--resume", "--steps", "3", "--quiet"]) == 0
    assert steps_saved(tmp_path / "runs" / "tiny-galore") == [2, 0]
    assert steps_saved(tmp_path / "runs" / "tiny-galore-2") == [3, 2]
