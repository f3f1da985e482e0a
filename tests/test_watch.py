"""Figures of a run, written down: lines, TensorBoard, Weights & Biases, and a page that a real browser opens."""

import html
import json
import os
import re
import shutil
import subprocess

import pytest
import torch
from cases import METHODS
from tiny_llama import llama, rows
from torch import nn
from torch.utils.data import DataLoader
from training import build, net, set_gradients, train

import subspace_optim as so
from subspace_optim.integrations.watch import JSONLines, Page, TensorBoard, WandB, Watch, read_lines
from subspace_optim.integrations.watch.page import write_page

GALORE = METHODS[0]


def test_a_plain_loop_writes_lines_that_are_the_report(tmp_path):
    params = net()
    opt = build(GALORE, params)
    path = tmp_path / "run" / "figures.jsonl"
    with Watch(opt, JSONLines(path), every=2):
        train(params, opt, range(5))
    train(params, opt, range(2))  # closed: nothing more is written
    records = read_lines(path)
    assert [step for step, _ in records] == [1, 3, 5]
    assert all(type(row) is so.LayerReport for _, report in records for row in report)
    assert [row.name for row in records[0][1]] == [row.name for row in opt.report()]
    shapes = {row.name: row.shape for row in records[-1][1] if row.captured}
    assert shapes["tall"] == (12, 7) and shapes["conv"] == (6, 12)


def test_lines_outlive_a_kill_and_follow_a_run_that_was_taken_back(tmp_path):
    path = tmp_path / "figures.jsonl"
    params = net(names=["tall"])
    opt = build(GALORE, params)
    with Watch(opt, JSONLines(path), every=1):
        train(params, opt, range(2))
        torch.save(opt.state_dict(), tmp_path / "state.pt")
        train(params, opt, range(2, 4))
    with path.open("a") as file:
        file.write('{"step": 5, "lay')  # killed here
    assert [step for step, _ in read_lines(path)] == [1, 2, 3, 4]
    resumed = build(GALORE, params)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    with Watch(resumed, JSONLines(path), every=1):
        train(params, resumed, [2])
    assert [step for step, _ in read_lines(path)] == [1, 2, 3]
    assert len(path.read_text().splitlines()) == 5


@pytest.mark.parametrize(
    "damage", [b"{\n", b"[]\n", b"\xff\n", b'{"step": 5, "lay{"step": 6}\n', b'{"step": 5, "layers": [3]}\n']
)
def test_a_damaged_line_costs_a_warning_and_that_look(tmp_path, damage):
    path = tmp_path / "figures.jsonl"
    params = net(names=["tall"])
    opt = build(GALORE, params)
    for step in (0, 1):
        with Watch(opt, JSONLines(path), every=1):
            train(params, opt, [step])
        if step == 0:
            path.write_bytes(path.read_bytes() + damage)
    with pytest.warns(UserWarning, match="figures.jsonl: line 2 is damaged"):
        assert [step for step, _ in read_lines(path)] == [1, 2]


def test_a_full_disk_costs_a_warning_and_not_the_run(tmp_path):
    params = net(names=["tall"])
    opt = build(GALORE, params)
    lines, other = JSONLines(tmp_path / "a" / "x.jsonl"), JSONLines(tmp_path / "y.jsonl")
    shutil.rmtree(tmp_path / "a")
    with Watch(opt, lines, other, every=1):
        with pytest.warns(UserWarning, match="JSONLines gets no more figures: .*x.jsonl"):
            train(params, opt, [0])
        train(params, opt, [1])
    assert [step for step, _ in read_lines(other.path)] == [1, 2]


def test_what_is_no_optimizer_of_ours_is_refused():
    with pytest.raises(TypeError, match="of a SubspaceOptimizer only, and this is a SGD"):
        Watch(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    params = net()
    opt = build(GALORE, params)
    with Watch(opt, TensorBoard(tmp_path), every=2):
        train(params, opt, range(3))
    events = EventAccumulator(str(tmp_path)).Reload()
    found = events.Scalars("captured/tall")
    assert [event.step for event in found] == [1, 3]
    assert found[-1].value == pytest.approx({row.name: row for row in opt.report()}["tall"].captured)
    assert "update_ratio/vector" in events.Tags()["scalars"]
    assert "captured/vector" not in events.Tags()["scalars"]


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    logged = []
    params = net(names=["tall"])
    opt = build(GALORE, params)
    sink = WandB(project="test")
    monkeypatch.setattr(sink._run, "log", lambda values, log=sink._run.log: (logged.append(values), log(values)))
    with Watch(opt, sink, every=1):
        train(params, opt, range(2))
    assert wandb.run is None  # finished, as it was begun here
    assert [values["subspace/step"] for values in logged] == [1, 2]
    assert logged[-1]["subspace/captured/tall"] == opt.report()[0].captured
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_the_trainer_of_transformers(tmp_path):
    from transformers import Trainer, TrainingArguments

    from subspace_optim.integrations.watch.transformers import WatchCallback

    model = llama()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows(),
        optimizers=(so.create(model, "galore", rank=4, lr=0.01), None),
        callbacks=[WatchCallback(JSONLines(tmp_path / "figures.jsonl"), every=3)],
    )
    trainer.train()
    records = read_lines(tmp_path / "figures.jsonl")
    assert [step for step, _ in records] == [1, 4]  # updates, not micro-batches
    assert {row.name for row in records[-1][1] if row.captured} >= {"model.layers.0.self_attn.q_proj.weight"}


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # lightning uses what this torch deprecates
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_the_trainer_of_lightning(tmp_path):
    pytest.importorskip("lightning", reason="lightning is not installed")
    from lightning.pytorch import LightningModule, Trainer

    from subspace_optim.integrations.watch.lightning import WatchCallback

    class Net(LightningModule):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(12, 8)

        def training_step(self, batch, index):
            if index == 3:
                raise KeyboardInterrupt
            return self.linear(batch).square().mean()

        def configure_optimizers(self):
            return so.create(self, "galore", rank=2, lr=0.01)

    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(tmp_path),
        callbacks=[WatchCallback(JSONLines(tmp_path / "figures.jsonl"), Page(tmp_path / "page.html"), every=1)],
    )  # fmt: skip
    with pytest.raises(SystemExit):
        trainer.fit(Net(), DataLoader(torch.randn(16, 12), batch_size=2))
    assert [step for step, _ in read_lines(tmp_path / "figures.jsonl")] == [1, 2, 3]  # its closure runs inside step
    assert "linear.weight" in (tmp_path / "page.html").read_text()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a run with a layer that was never reached and one whose gradient was not finite."""
    path = tmp_path_factory.mktemp("page") / "figures.html"
    params = net()
    params["<b>idle"] = nn.Parameter(torch.zeros(4, 6))
    opt = build(GALORE, params)
    with Watch(opt, Page(path, "A run & its <figures>"), every=1):
        train_with_idle(params, opt)
    return path, opt.report()


def train_with_idle(params, opt):
    idle = params.pop("<b>idle")
    for step in range(9):
        set_gradients(params, step)
        if step == 4:
            params["wide"].grad[0, 0] = torch.nan
        if step == 8:
            idle.grad = torch.ones(4, 6)
        opt.step()


def test_the_page_is_whole_in_itself(page):
    path, _ = page
    text = path.read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?!#|data:)[^"'#\s>]+""", re.sub(r"xmlns\S*", "", text))
    assert "A run &amp; its &lt;figures&gt;" in text and "1 updates skipped" in text
    assert text.count("<svg") == 3


def test_a_page_can_be_drawn_from_lines(tmp_path):
    params = net()
    opt = build(GALORE, params)
    with Watch(opt, JSONLines(tmp_path / "f.jsonl"), Page(tmp_path / "a.html", "same"), every=1):
        train(params, opt, range(3))
    write_page(tmp_path / "b.html", read_lines(tmp_path / "f.jsonl"), "same")
    assert (tmp_path / "a.html").read_text() == (tmp_path / "b.html").read_text()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine; apt-get install chromium")
def test_a_browser_without_a_network_opens_the_page(page, tmp_path):
    """What the browser made of it: every plot is laid out, the table sorted by a click, and no error was logged."""
    path, report = page
    probe = """
    <script>
      const errors = []; addEventListener("error", e => errors.push(e.message));
      addEventListener("load", () => {
        const head = [...document.querySelectorAll("th")].findIndex(h => h.textContent === "captured");
        document.querySelectorAll("th")[head].click();
        const column = [...document.querySelectorAll("tbody tr")].map(r => r.cells[head].dataset.value);
        const plots = [...document.querySelectorAll("svg")].map(s => s.getBoundingClientRect().height);
        const lines = document.querySelectorAll("svg path").length;
        document.body.innerHTML = "<pre id=found>" + JSON.stringify({ errors, column, plots, lines }) + "</pre>";
      });
    </script>"""
    copy = tmp_path / "probed.html"
    copy.write_text(path.read_text().replace("<meta charset=utf-8>", "<meta charset=utf-8>" + probe))
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"),
        *("--dump-dom", copy.as_uri()),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"HOME": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, flags=re.DOTALL)[1]))
    assert found["errors"] == []
    assert len(found["plots"]) == 3 and all(height > 100 for height in found["plots"])
    assert found["lines"] > 20
    shown = [float(value) for value in found["column"] if value]
    assert shown == sorted(row.captured for row in report if row.captured is not None)
    assert found["column"][-1] == ""  # the dense vector
