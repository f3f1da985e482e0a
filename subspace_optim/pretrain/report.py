"""What a run leaves behind: report.json for programs, report.png for people."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspace_optim.integrations.watch.page import INK, STYLE
from subspace_optim.pretrain import machine
from subspace_optim.pretrain.display import MIB, count
from subspace_optim.pretrain.files import storage_errors, write_text
from subspace_optim.pretrain.loop import Run, perplexity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POINTS = 500
CATEGORIES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "activations_and_workspace": "activations and workspace",
}
_FILL = ("#4477AA", "#AACCEE", "#CC6677", "#DDDDDD")


def make_report(run: Run) -> dict[str, Any]:
    """Everything worth knowing about a finished run, in plain values.

    Args:
        run: A run that has been trained and evaluated.
    """
    step, nll, tokens = run.evaluations[-1]
    per_step = run.config.tokens_per_step
    pace = [row[4] for row in run.curve]
    return {
        "config": run.config.to_dict(),
        "ranks": run.ranks.size,
        "sharded": run.ranks.sharded,
        "corpus": {
            "key": run.corpus.key,
            "vocab_size": run.corpus.vocab_size,
            "train_tokens": run.corpus.tokens["train"],
            "validation_tokens": run.corpus.tokens["validation"],
        },
        "parameters": sum(parameter.numel() for parameter in run.parameters),
        "optimizer": run.optimizer.summary(),
        "final": {
            "step": int(step),
            "loss": nll / tokens,
            "perplexity": perplexity(nll, tokens),
            "tokens": int(tokens),
        },
        "steps": run.step,
        "tokens": run.step * per_step,
        "skipped_steps": run.skipped,
        "speed": {
            "step_ms": 1e3 * statistics.median(pace),
            "optimizer_ms": 1e3 * statistics.median(row[5] for row in run.curve),
            "tokens_per_second": per_step / statistics.median(pace),
        },
        "seconds": {**run.watch.seconds, "total": sum(run.watch.seconds.values())},
        "bytes": memory_by_category(run),
        "plan": run.plan.to_dict(),
        "curve": {
            "train": thinned(run.curve, per_step),
            "validation": [
                {
                    "step": int(step),
                    "tokens": int(step) * per_step,
                    "loss": nll / tokens,
                    "perplexity": perplexity(nll, tokens),
                }
                for step, nll, tokens in run.evaluations
            ],
        },
        "versions": machine.versions(),
        "machine": machine.describe(run.device),
    }


def memory_by_category(run: Run) -> dict[str, Any]:
    """Bytes of the first step at its peak on this rank, and of all that the process or the GPU held at its own.

    Args:
        run: A run that has been trained.
    """
    counted = {
        "weights": machine.storage_bytes(run.model.parameters()),
        "gradients": run.gradient_bytes,
        "optimizer_state": run.optimizer.state_bytes(),
    }
    peak, baseline = run.peak_and_baseline()
    return {
        **counted,
        "activations_and_workspace": max(0, run.allocated - sum(counted.values())),
        "allocated": run.allocated,
        "before_the_model": baseline,
        "peak": peak,
        "peak_is": run.memory.kind,
    }


def thinned(curve: Sequence[Sequence[float]], per_step: int) -> list[dict[str, float | None]]:
    """The training curve in at most a few hundred points, each the mean of the steps up to it.

    Args:
        curve: Step, loss, learning rate, gradient norm, seconds … of every step.
        per_step: Tokens of a step.
    """
    edges = sorted({round(i * len(curve) / _POINTS) for i in range(_POINTS + 1)})
    points = []
    for begin, end in pairwise(edges):
        rows = curve[begin:end]
        points.append(
            {
                "step": int(rows[-1][0]),
                "tokens": int(rows[-1][0]) * per_step,
                "loss": _mean([row[1] for row in rows]),
                "lr": rows[-1][2],
                "grad_norm": _mean([row[3] for row in rows]),
            }
        )
    return points


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else None


_MEND = "free some space and resume; the checkpoints are safe"


def write_json(path: Path, value: Mapping[str, Any], option: str = "--out", mend: str = _MEND) -> None:
    """Write a report in one move; what is not finite becomes null, as JSON has no word for it.

    Args:
        path: The file.
        value: Plain values.
        option: What names it.
        mend: What the person can do where it cannot be written.
    """
    with storage_errors(option, path, mend):
        write_text(path, json.dumps(_finite(value), indent=1) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw_run(path: Path, report: Mapping[str, Any]) -> None:
    """Draw the loss over tokens and the memory by category of one run.

    Args:
        path: The picture.
        report: What ``make_report`` gave.
    """
    with _figure(path, height=3.0) as (left, right):
        _draw_run(left, right, report)


def _draw_run(left: Axes, right: Axes, report: Mapping[str, Any]) -> None:
    train = [point for point in report["curve"]["train"] if point["loss"] is not None]
    left.plot(
        [point["tokens"] for point in train],
        [point["loss"] for point in train],
        color=INK[5],
        linewidth=0.8,
        label="training",
    )
    held_out = report["curve"]["validation"]
    left.plot(
        [point["tokens"] for point in held_out],
        [point["loss"] for point in held_out],
        color=INK[0],
        linewidth=1.4,
        marker="o",
        markersize=3,
        label=f"held out (final perplexity {report['final']['perplexity']:.1f})",
    )
    _loss_axis(left)
    sizes = [report["bytes"][key] / MIB for key in CATEGORIES]
    bars = right.barh(
        [text.replace(" and ", "\nand ") for text in CATEGORIES.values()], sizes, color=INK[0], height=0.55
    )
    right.bar_label(bars, [f"{value:,.1f}" for value in sizes], padding=3)
    right.invert_yaxis()
    right.margins(x=0.18)
    _memory_axis(right)


def draw_comparison(path: Path, reports: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the held-out loss over tokens and the memory by category of several runs.

    Args:
        path: The picture.
        reports: A report by label, in the order to show them.
    """
    with _figure(path, height=max(3.0, 1.2 + 0.34 * len(reports))) as (left, right):
        _draw_comparison(left, right, reports)


def _draw_comparison(left: Axes, right: Axes, reports: Mapping[str, Mapping[str, Any]]) -> None:
    for index, (label, report) in enumerate(reports.items()):
        points = report["curve"]["validation"]
        left.plot(
            [point["tokens"] for point in points],
            [point["loss"] for point in points],
            color=INK[index % len(INK)],
            linestyle="-" if index < len(INK) else "--",
            linewidth=1.2,
            marker="o",
            markersize=2.5,
            label=label,
        )
    _loss_axis(left)
    left.set_ylabel("held-out loss (nats per token)")
    filled = [0.0] * len(reports)
    for (key, text), colour in zip(CATEGORIES.items(), _FILL, strict=True):
        sizes = [report["bytes"][key] / MIB for report in reports.values()]
        right.barh(list(reports), sizes, left=filled, color=colour, height=0.62, label=text)
        filled = [done + more for done, more in zip(filled, sizes, strict=True)]
    right.invert_yaxis()
    _memory_axis(right)
    right.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, columnspacing=1.2, handlelength=1.2
    )


@contextmanager
def _figure(path: Path, height: float) -> Iterator[tuple[Axes, Axes]]:
    # Figure() rather than pyplot: no global state, no display, and nothing to close.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, height), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        yield left, right
        with storage_errors("--out", path, _MEND):
            figure.savefig(path, dpi=200)


def _loss_axis(axes: Axes) -> None:
    axes.set_xlabel("training tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(lambda value, _: count(value).replace(".0", ""))
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlim(left=0)
    axes.legend(frameon=False, loc="upper right")


def _memory_axis(axes: Axes) -> None:
    axes.set_xlabel("memory (MiB)")
    axes.tick_params(axis="y", length=0)
