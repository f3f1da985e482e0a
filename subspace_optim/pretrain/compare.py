"""The `compare` command: the same model, data and seed under several optimizers, side by side."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from subspace_optim.optimizers import projects
from subspace_optim.pretrain import checkpoint
from subspace_optim.pretrain.command import RUNS, check, clear, holds_run, program, read_report, settle
from subspace_optim.pretrain.config import RunConfig, UserError, flag, path_of, resolve
from subspace_optim.pretrain.display import MIB, Display, table
from subspace_optim.pretrain.loop import stop_signals
from subspace_optim.pretrain.report import draw_comparison, write_json

_SWITCHES = ("gradient_checkpointing", "compile", "quiet", "plain")
_OF_PROJECTIONS = ("rank", "embedding_rank", "update_proj_gap", "scale", "layerwise")


def compare(given: Mapping[str, Any]) -> int:
    """Train under each optimizer, in a process of its own so that peak memory is its own, and compare.

    Args:
        given: The options that were named, and nothing else; "optimizers" are runs, each a label and its own options.

    Returns:
        The exit code: 0, or that of the run that did not finish.

    Raises:
        UserError: An option cannot be used, or the folder holds a comparison of other runs.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("compare: starts its runs one after another, in one process each; call it without torchrun")
    options = dict(given)
    named = options.pop("optimizers")
    display = Display(quiet=options.get("quiet", False), plain=options.get("plain", False))
    out = path_of("--out", options.pop("out", f"{RUNS}/compare-{Path(options.get('model', 'tiny')).stem}"))
    overwrite = options.pop("overwrite", False)
    labels = [label for label, _ in named]
    again = next((label for label in labels if labels.count(label) > 1), None)
    if again is not None:
        raise UserError(f"compare {again}: is named twice")

    shown: dict[str, Any] = {key: options.pop(key) for key in ("quiet", "plain") if key in options}
    options = settle(options)
    runs = {label: _options_of(own, options) for label, own in named}
    configs = {label: resolve(run) for label, run in runs.items()}
    for config in configs.values():
        check(config)
    if holds_run(out):
        raise UserError(
            f"--out {out}: holds a run of pretrain, and a comparison is a folder of runs; choose another --out"
        )
    for label, config in configs.items():
        if holds_run(out / label) and not _belongs(out / label, config):
            if not overwrite:
                raise UserError(
                    f"--out {out}: holds a run of {label} with other options; start again with --overwrite, "
                    "or choose another --out"
                )
            clear(out / label)

    reports = {}
    for label, run in runs.items():
        report = read_report(out / label)
        if report is None:
            display.info(f"── {label} ──")
            code = _train(out / label, {**run, **shown})
            if code != 0:
                _explain(code, label, display)
                return code
            report = read_report(out / label)
        else:
            display.info(f"── {label}: finished before, kept ──")
        if report is None:
            raise UserError(f"--out {out / label}: its report.json cannot be read; start again with --overwrite")
        reports[label] = report
    _conclude(out, reports, display)
    return 0


def _options_of(own: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of one run: those of projections are kept from the dense ones; its own go before those of all."""
    left_out = () if projects(own["optimizer"]) else _OF_PROJECTIONS
    return {key: value for key, value in options.items() if key not in left_out} | dict(own)


def _belongs(folder: Path, config: RunConfig) -> bool:
    report = read_report(folder)
    found = map(checkpoint.facts_of, checkpoint.checkpoints(folder)) if report is None else [report]
    try:
        return all(facts is None or RunConfig.from_dict(facts.get("config")) == config for facts in found)
    except UserError:
        return False


def _train(folder: Path, options: Mapping[str, Any]) -> int:
    command = [sys.executable, "-m", "subspace_optim", "pretrain"]
    if any(checkpoint.checkpoints(folder)):
        command += ["--resume", str(folder)]
        options = {key: options[key] for key in ("quiet", "plain") if key in options}
    else:
        command += ["--out", str(folder), "--overwrite"]
    for key, value in options.items():
        command.append(flag(key))
        if key not in _SWITCHES:
            command += map(str, value if isinstance(value, list | tuple) else [value])
    # A Ctrl-C in the terminal reaches the run too: it saves and ends, and we end after it. A SIGTERM reaches only us.
    with subprocess.Popen(command) as process, stop_signals(pass_on=process.send_signal):
        code = process.wait()
    return code if code >= 0 else 128 - code


def _explain(code: int, name: str, display: Display) -> None:
    command = " ".join([program(), *map(shlex.quote, sys.argv[1:])])
    display.result(f"the comparison stops in {name} (exit code {code}); what is finished is kept by the same command:")
    display.result(f"  {command}")


def _conclude(out: Path, reports: Mapping[str, Mapping[str, Any]], display: Display) -> None:
    header = ("optimizer", "perplexity", "state MiB", "peak MiB", "step ms", "tokens/s")
    rows = [
        (
            name,
            f"{report['final']['perplexity'] or float('inf'):.2f}",
            f"{report['bytes']['optimizer_state'] / MIB:.1f}",
            f"{report['bytes']['peak'] / MIB:.0f}",
            f"{report['speed']['step_ms']:.0f}",
            f"{report['speed']['tokens_per_second']:.0f}",
        )
        for name, report in reports.items()
    ]
    write_json(out / "compare.json", {"runs": reports})
    draw_comparison(out / "compare.png", reports)
    display.result("")
    display.result(table(header, rows))
    display.result(f"see {out / 'compare.json'} and compare.png")
