"""The page: plots and a table of a run's figures in one HTML file, without a network or a script from elsewhere."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ...monitor import LayerReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which colour-blind readers can tell apart.
INK = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
STYLE: dict[Any, Any] = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6}

_PLOTS = {
    "captured": (
        "Captured energy",
        "The share of the gradient that the subspace sees. A layer that stays low has too small a rank, or a basis "
        "that is renewed too seldom.",
    ),
    "overlap": (
        "Overlap at refreshes",
        "The share of the old subspace that a refresh keeps. Near 1, refreshes could be rarer; near 0, the gradient "
        "turns faster than the basis follows.",
    ),
    "update_ratio": (
        "Update over weight",
        "How far one step moves a matrix, relative to its size. About 10⁻³ is usual in long runs; a matrix far above "
        "the others is the first suspect when the loss jumps.",
    ),
}
_COLUMNS = {
    "name": "matrix",
    "shape": "shape",
    "rank": "rank",
    "captured": "captured",
    "captured_ema": "mean",
    "overlap": "overlap",
    "update_ratio": "update / weight",
    "refreshes": "refreshes",
    "refresh_seconds": "refresh s",
    "skipped": "skipped",
}
_FORMATS = {"captured": ".3f", "captured_ema": ".3f", "overlap": ".3f", "update_ratio": ".2e", "refresh_seconds": ".3f"}
_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 64rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin: 1.8rem 0 .2rem } p { margin: .2rem 0 .6rem; color: #555 }
svg { width: 100%; height: auto } .wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100% }
th, td { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap }
th { cursor: pointer; color: #555 } th:first-child, td:first-child { text-align: left }
"""
# A click on a column's head sorts by it, a second click the other way round; what has no value stays last.
_SCRIPT = """
document.querySelectorAll("th").forEach((head, column) => head.addEventListener("click", () => {
  const body = document.querySelector("tbody"), way = head.dataset.way = -(head.dataset.way || -1);
  const key = row => row.cells[column].dataset.value;
  const compare = (a, b) => column ? a - b : a.localeCompare(b, undefined, { numeric: true });
  [...body.rows].sort((a, b) => key(a) === "" ? 1 : key(b) === "" ? -1 : way * compare(key(a), key(b)))
    .forEach(row => body.append(row));
}));
"""


def write_page(path: str | Path, records: Sequence[tuple[int, Sequence[LayerReport]]], title: str) -> None:
    """Draw the figures of a run.

    Args:
        path: of the .html file.
        records: (step, report) of every look, in order; at least one.
        title: of the page.
    """
    step, layers = records[-1]
    seen = [layer for layer in layers if layer.step]
    projected = [layer for layer in seen if layer.side]
    refreshes, seconds = sum(x.refreshes for x in projected), sum(x.refresh_seconds for x in projected)
    summary = (
        f"Step {step}, {len(records)} looks. {len(projected)} matrices projected, {len(seen) - len(projected)} dense. "
        f"{refreshes} refreshes took {seconds:.2f} s. {sum(x.skipped for x in layers)} updates skipped."
    )
    sections = [
        f"<section><h2>{heading}</h2><p>{text}</p>{_plot(figure, records)}</section>"
        for figure, (heading, text) in _PLOTS.items()
        if any(getattr(layer, figure) is not None for _, report in records for layer in report)
    ]
    head = "".join(f"<th>{heading}</th>" for heading in _COLUMNS.values())
    rows = "".join(f"<tr>{''.join(_cell(layer, column) for column in _COLUMNS)}</tr>" for layer in seen)
    table = f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    Path(path).write_text(
        f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{_CSS}</style>"
        f'<link rel="icon" href="data:,">'  # or a browser that is given the page by a server asks for one
        f"<h1>{escape(title)}</h1><p>{summary}</p>{''.join(sections)}"
        f"<h2>Every matrix at the last look</h2><p>A click on a heading sorts.</p>{table}"
        f"<script>{_SCRIPT}</script></html>\n",
        encoding="utf-8",
    )


def _cell(layer: LayerReport, column: str) -> str:
    value = getattr(layer, column)
    if value is None or (column == "rank" and not layer.side):
        return '<td data-value="">–</td>'
    if column == "shape":
        return f'<td data-value="{layer.shape and layer.shape[0]}">{"×".join(map(str, layer.shape)) or "scalar"}</td>'
    return f'<td data-value="{escape(str(value))}">{escape(format(value, _FORMATS.get(column, "")))}</td>'


def _roles(layers: Sequence[LayerReport]) -> dict[str, list[str]]:
    """Names by what they have in common, the last word of a module; dense ones together, all if there are too many."""
    roles: dict[str, list[str]] = {}
    for layer in sorted(layers, key=lambda layer: layer.side is None):
        word = layer.name.partition("[")[0].removesuffix(".weight").rpartition(".")[2]
        roles.setdefault(word if layer.side else "dense", []).append(layer.name)
    return roles if len(roles) <= len(INK) else {"all": [layer.name for layer in layers]}


def _plot(figure: str, records: Sequence[tuple[int, Sequence[LayerReport]]]) -> str:
    """A thin line a matrix in the colour of its role, and a thick one through the median of each role."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[int, float]]] = {}
    for step, layers in records:
        for layer in layers:
            value = getattr(layer, figure)
            if value is not None and layer.step:
                lines.setdefault(layer.name, []).append((step, value))
    # Text stays text, ids are the same in every run, and no date makes two equal pages differ.
    with rc_context(STYLE | {"svg.fonttype": "none", "svg.hashsalt": figure}):
        drawing = Figure(figsize=(7.2, 2.4), layout="constrained")
        axes = drawing.subplots()
        for colour, (role, names) in zip(INK, _roles(records[-1][1]).items(), strict=False):
            _draw(axes, [lines[name] for name in names if name in lines], colour, role)
        axes.set_xlabel("step")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        if figure == "update_ratio":
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 1.02)
        svg = io.StringIO()
        drawing.savefig(svg, format="svg", metadata={"Date": None})
    return svg.getvalue()[svg.getvalue().index("<svg") :]


def _draw(axes: Axes, lines: Sequence[Sequence[tuple[int, float]]], colour: str, role: str) -> None:
    values: dict[int, list[float]] = {}
    for line in lines:
        axes.plot(*zip(*line, strict=True), color=colour, linewidth=0.5, alpha=0.35)
        for step, value in line:
            values.setdefault(step, []).append(value)
    if values:
        middle = [median(values[step]) for step in sorted(values)]
        axes.plot(sorted(values), middle, color=colour, linewidth=1.4, marker="o", markersize=2, label=role)
