"""The `pretrain` command: from the options that were given to a trained model and its report."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from subspace_optim.integrations.watch import JSONLines, Page, Watch, read_lines
from subspace_optim.pretrain import checkpoint
from subspace_optim.pretrain.config import (
    FREE_ON_RESUME,
    RunConfig,
    UserError,
    check_values,
    flag,
    grow_to_fit,
    path_of,
    resolve,
    steps_of,
)
from subspace_optim.pretrain.display import Display, Muted, duration, size, table
from subspace_optim.pretrain.files import claim, storage_errors
from subspace_optim.pretrain.loop import Interrupted, Run, check_optimizer, introduce
from subspace_optim.pretrain.model import find_device
from subspace_optim.pretrain.planning import fit
from subspace_optim.pretrain.ranks import Ranks, joined
from subspace_optim.pretrain.report import CATEGORIES, draw_run, make_report, write_json
from subspace_optim.pretrain.sources import STDLIB, open_source

RUNS = Path("runs")
_FIGURES = ("figures.jsonl", "figures.html")
_OURS = (checkpoint.FOLDER, "report.json", "report.png", *_FIGURES)


def pretrain(given: Mapping[str, Any]) -> int:
    """Train a model as the command line says.

    Args:
        given: The options that were named, and nothing else.

    Returns:
        The exit code: 0, or 128 plus the number of the signal that stopped the run.

    Raises:
        UserError: An option cannot be used.
        Diverged: Training broke down.
    """
    began = time.perf_counter()
    with joined() as ranks, ExitStack() as held:
        return _pretrain(dict(given), ranks, began, held)


def _pretrain(options: dict[str, Any], ranks: Ranks, began: float, held: ExitStack) -> int:
    quiet, plain = options.pop("quiet", False), options.pop("plain", False)
    display = Display(quiet=quiet, plain=plain) if ranks.first else Muted()
    with ranks.agreed():
        run = _prepared(options, ranks, display, began, held)
    introduce(run)
    try:
        with _plain_words(run.config), _watched(run):
            run.train()
    except Interrupted as stop:
        display.result(f"stopped by {stop} after step {run.step}; everything is saved. Go on with:")
        display.result(f"  {ranks.launcher or program()} pretrain --resume {shlex.quote(str(run.folder))}")
        return stop.exit_code
    except BaseException:
        if run.step and any(checkpoint.checkpoints(run.folder)):
            display.warn(
                f"the run stops here; its last checkpoint goes on with --resume {shlex.quote(str(run.folder))}"
            )
        raise
    with ranks.agreed():
        if ranks.first:
            report = make_report(run)
            write_json(run.folder / "report.json", report)
            draw_run(run.folder / "report.png", report)
            _conclude(run, report)
    return 0


def _prepared(options: dict[str, Any], ranks: Ranks, display: Display, began: float, held: ExitStack) -> Run:
    """A run that is ready to train, with a folder of its own or from a checkpoint; `held` keeps others out of it."""
    out = path_of("--out", options.pop("out")) if "out" in options else None
    overwrite = options.pop("overwrite", False)
    if "fit" in options and ranks.size > 1:
        raise UserError(
            f"--fit {options['fit']}: is for one process; ask `subspace-optim plan --gpu {options['fit']}` with the "
            "--batch-size of one rank, and give the options that it names"
        )
    if "resume" in options:
        if "fit" in options:
            raise UserError(f"--fit {options['fit']}: cannot be given with --resume; a run goes on as it began")
        if overwrite:
            raise UserError("--overwrite: cannot be given with --resume; one starts again, the other goes on")
        named = options.pop("resume")
        if named and out is not None:
            raise UserError(f"--out {out}: cannot be given with --resume {named}; a run goes on in its own folder")
        folder = ranks.decide(lambda: path_of("--resume", named) if named else out or _latest_run())
        return _resumed(folder, options, ranks, display, began, held)
    config, folder = ranks.decide(lambda: _settled(options, out, overwrite, display, held))
    config = ranks.accept(config)
    check(config)
    with _plain_words(config):
        run = Run(config, folder, display, began, ranks)
    if overwrite and ranks.first:
        clear(folder)
    return run


def _settled(
    options: dict[str, Any], out: Path | None, overwrite: bool, display: Display, held: ExitStack
) -> tuple[RunConfig, Path]:
    """The options of a new run, and its folder."""
    config = resolve(_fitted(options, display) if "fit" in options else settle(options))
    if out is None:
        return config, _free_folder(config, held)
    _hold("--out", out, held)
    _check_folder(out, overwrite)
    return config, out


def _hold(option: str, folder: Path, held: ExitStack) -> None:
    """Two runs in one folder would remove each other's checkpoints."""
    if not _claimed(option, folder, held):
        raise UserError(f"{option} {folder}: another process is training in it; wait until it ends, or choose another")


def _claimed(option: str, folder: Path, held: ExitStack) -> bool:
    """Whether the folder is this process's from now on, as long as `held` lasts."""
    with storage_errors(option, folder, "choose a folder that can be written"):
        lock = claim(folder)
    if lock is not None:
        held.enter_context(lock)
    return lock is not None


@contextmanager
def _watched(run: Run) -> Iterator[None]:
    """Look at every `--watch`-th step; a run that goes on adds to what it had seen."""
    if not run.config.watch:
        yield
        return
    lines, page = (run.folder / name for name in _FIGURES)
    earlier = [record for record in read_lines(lines) if record[0] <= run.step] if lines.exists() else []
    sinks = JSONLines(lines), Page(page, f"{run.config.optimizer} on {run.config.model}", earlier)
    with Watch(run.optimizer, *sinks, every=run.config.watch, write=run.ranks.first):
        yield


def _fitted(options: dict[str, Any], display: Display) -> dict[str, Any]:
    """The options, with what makes the run fit into --fit."""
    capacity = options.pop("fit")
    settled, found = fit(settle({"model": "tiny", **options}), capacity)
    display.info(f"fit        {capacity}: {found.verdict()}")
    return settled


def check(config: RunConfig) -> None:
    """Refuse what can be refused before any text is read or any work is done.

    Args:
        config: The run.

    Raises:
        UserError: The data, the optimizer, the attention or one of their options is refused.
    """
    open_source(config.data, config.text_key)
    check_optimizer(config)


def settle(options: Mapping[str, Any]) -> dict[str, Any]:
    """Settle what depends on this machine: the device, the paths, and on a GPU the size of the default run.

    Args:
        options: The options that were named.

    Raises:
        UserError: The device is not here.
    """
    device = find_device(options.get("device", "auto"))
    settled = {**options, "device": str(device)}
    if "data" in options:
        settled["data"] = _absolute(options["data"])
    if device.type == "cuda" and "model" not in options:
        grown = grow_to_fit(torch.cuda.mem_get_info(device)[0])
        if "tokens" in options:
            grown.pop("steps", None)
        settled = {**grown, **settled}
    return settled


def _absolute(data: Iterable[str]) -> tuple[str, ...]:
    """Paths that still hold when the run is resumed from another folder."""
    return tuple(
        name if name.startswith("hf:") or name == STDLIB else str(path_of("--data", name).absolute()) for name in data
    )


def program() -> str:
    """How this program was called, so that a command we print can be pasted."""
    if Path(sys.argv[0]).name == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m subspace_optim"
    return shlex.quote(sys.argv[0])


def _resumed(
    named: Path, options: dict[str, Any], ranks: Ranks, display: Display, began: float, held: ExitStack
) -> Run:
    path, state, facts = checkpoint.load_newest(named, display.warn)
    folder = path.parent.parent
    ranks.decide(lambda: _hold("--resume", folder, held))
    config = ranks.accept(_same_run(_saved(path, facts), options, folder))
    if config.steps < state["step"]:
        raise UserError(f"--steps {config.steps}: the checkpoint in {folder} is at step {state['step']} already")
    with _plain_words(config):
        run = Run(config, folder, display, began, ranks)
    run.load(state, facts)
    display.info(f"resuming {folder} after step {run.step}")
    return run


def _saved(path: Path, facts: Mapping[str, Any]) -> RunConfig:
    """The options that a checkpoint was made with."""
    try:
        if not isinstance(facts.get("corpus"), str):
            raise UserError("it does not name the corpus")
        return RunConfig.from_dict(facts.get("config"))
    except UserError as error:
        raise UserError(
            f"{path / 'meta.json'}: {error}; if it was changed, bring it back as it was, or {checkpoint.way_on(path)}"
        ) from error


def _same_run(saved: RunConfig, options: dict[str, Any], folder: Path) -> RunConfig:
    """The saved configuration with the options that may change; any other difference is refused."""
    check_values(options)
    if "tokens" in options:
        options["steps"] = steps_of(options, saved.tokens_per_step)
        del options["tokens"]
    if "data" in options:
        options["data"] = _absolute(options["data"])
    options["device"] = str(find_device(options.get("device", saved.device)))
    for name, value in options.items():
        was = getattr(saved, name)
        if name not in FREE_ON_RESUME and value != was:
            raise UserError(
                f"{flag(name)} {value}: the checkpoint in {folder} was made with {was}; "
                f"leave {flag(name)} out to go on with that run, or start another in its own --out"
            )
    return replace(saved, **options)


def _latest_run() -> Path:
    runs = [path.parent for path in RUNS.glob(f"*/{checkpoint.FOLDER}")]
    if not runs:
        raise UserError(f"--resume: there is no run in {RUNS.absolute()}; name its folder: --resume DIR")
    return max(runs, key=lambda path: (path / checkpoint.FOLDER).stat().st_mtime)


def _free_folder(config: RunConfig, held: ExitStack) -> Path:
    name = f"{Path(config.model).stem}-{config.optimizer}"
    candidates = [RUNS / name, *(RUNS / f"{name}-{number}" for number in range(2, 10_000))]
    return next(folder for folder in candidates if not holds_run(folder) and _claimed("--out", folder, held))


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run or what is left of one."""
    return any((folder / name).exists() for name in _OURS)


def _check_folder(folder: Path, overwrite: bool) -> None:
    if holds_run(folder) and not overwrite:
        raise UserError(
            f"--out {folder}: holds another run; go on with it by --resume {folder}, replace it by --overwrite, "
            "or choose another --out"
        )
    with storage_errors("--out", folder, "choose a folder that can be written"):
        probe = folder / ".probe"
        probe.write_bytes(b"1")
        probe.unlink()


def clear(folder: Path) -> None:
    """Remove a run, and nothing else that its folder holds.

    Args:
        folder: The directory of the run.
    """
    for name in _OURS:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _plain_words(config: RunConfig) -> Iterator[None]:
    """Say in one line what PyTorch raises where there is too little memory or no compiler."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise UserError(
                f"--batch-size {config.batch_size}: {config.device} ran out of memory; give a smaller --batch-size "
                "and a larger --accumulate, --gradient-checkpointing, or a smaller --model"
            ) from error
        if config.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"--compile: the model cannot be compiled here ({reason}); leave --compile out") from error
        raise


def _conclude(run: Run, report: Mapping[str, Any]) -> None:
    final, memory, speed = report["final"], report["bytes"], report["speed"]
    say = run.display.info
    say("")
    rows = [(text, size(memory[key])) for key, text in CATEGORIES.items()]
    rows += [
        ("tensors at the peak of a step", size(memory["allocated"])),
        ("planned" + ", unsharded" * run.ranks.sharded, size(report["plan"]["allocated"])),
        (f"peak of the run ({memory['peak_is']})", size(memory["peak"])),
    ]
    say(table(("memory", "size"), rows))
    say("")
    say(
        f"{duration(report['seconds']['total'])} in all; a step took {speed['step_ms']:.0f} ms, "
        f"{speed['optimizer_ms']:.0f} of them in the optimizer"
    )
    if report["skipped_steps"]:
        say(f"{report['skipped_steps']} steps were skipped because the loss or its gradient was not finite")
    run.display.result(
        f"perplexity {final['perplexity']:.2f} on {final['tokens']} held-out tokens after {report['tokens']} training "
        f"tokens; see {run.folder / 'report.json'}, report.png{' and figures.html' * bool(run.config.watch)}"
    )


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report of a finished run, or None if there is none that can be read.

    Args:
        folder: The directory of the run.
    """
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) else None
