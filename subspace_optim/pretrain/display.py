"""What a person sees: plain lines, tables, and a live panel where there is a terminal. The only place that writes."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Concatenate, ParamSpec

if TYPE_CHECKING:
    from rich.live import Live
    from rich.progress import Progress, TaskID

GIB = 1 << 30
MIB = 1 << 20
P = ParamSpec("P")


def begin_output() -> None:
    """From now on a stream that was closed leads nowhere, and what the encoding lacks becomes a question mark."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def end_output() -> None:
    """What could not be written must not raise again when the interpreter ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write(line: str = "") -> None:
    """Write one line to standard output."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def complain(kind: str, message: str) -> None:
    """Write one line to standard error, led by the program's name.

    Args:
        kind: "error" or "warning".
        message: What is wrong, where, and how to mend it; line breaks are folded away.
    """
    with suppress(OSError):  # there is no one left to tell
        sys.stderr.write(f"subspace-optim: {kind}: {' '.join(message.split())}\n")
        sys.stderr.flush()


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out rows under a header: the first column to the left, numbers to the right.

    Args:
        header: Names of the columns.
        rows: One string per column.
    """
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    numeric = [
        all(line[column][:1].isdigit() or line[column] in ("", "–") for line in lines[1:])
        for column in range(len(header))
    ]

    def text(line: list[str]) -> str:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([text(lines[0]), "  ".join("─" * width for width in widths), *map(text, lines[1:])])


def count(number: float) -> str:
    """A number of things in three digits: 950, 12.3k, 4.0M, 1.3B."""
    for unit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.1f}{suffix}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """A number of bytes as MiB or GiB."""
    return f"{number / GIB:.2f} GiB" if number >= GIB else f"{number / MIB:.1f} MiB"


def duration(seconds: float) -> str:
    """A span of time: 42 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _unheeded(show: Callable[Concatenate[Display, P], None]) -> Callable[Concatenate[Display, P], None]:
    """A run goes on where its output cannot: the disk is full, the reader or the terminal gone."""

    @wraps(show)
    def shown(self: Display, /, *args: P.args, **kwargs: P.kwargs) -> None:
        with suppress(OSError):
            show(self, *args, **kwargs)

    return shown


class Display:
    """Shows a run as it goes: a live panel on a terminal, otherwise a line now and then."""

    def __init__(self, *, quiet: bool = False, plain: bool = False) -> None:
        self.quiet = quiet
        self._rich = sys.stdout.isatty() and not plain and not quiet
        self._live: Live | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    @_unheeded
    def info(self, line: str) -> None:
        """Say what is going on, unless asked to be quiet."""
        if self.quiet:
            return
        if self._live is not None:
            self._live.console.print(line, highlight=False, markup=False)
        else:
            write(line)

    @_unheeded
    def result(self, line: str) -> None:
        """Say what came out, quiet or not."""
        write(line)

    def warn(self, line: str) -> None:
        """Say on standard error what went wrong but was dealt with."""
        complain("warning", line)

    @_unheeded
    def start(self, steps: int, done: int) -> None:
        """Open the live panel for the training loop.

        Args:
            steps: Steps of the whole run.
            done: Steps that a resumed run has behind it.
        """
        if not self._rich:
            return
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        self._progress = Progress(
            TextColumn("step {task.completed:.0f} of {task.total:.0f}"),
            BarColumn(None),
            TaskProgressColumn(),
            expand=True,
        )
        self._task = self._progress.add_task("", total=steps, completed=done)
        self._live = Live(self._progress, refresh_per_second=4)
        self._live.start()

    @_unheeded
    def step(self, step: int, shown: Mapping[str, str], *, line: bool) -> None:
        """Show where the run stands.

        Args:
            step: Steps done.
            shown: Labels and values, in the order to show them.
            line: Whether this step deserves a line where there is no live panel.
        """
        if self._live is not None and self._progress is not None and self._task is not None:
            from rich.console import Group
            from rich.panel import Panel
            from rich.table import Table

            grid = Table.grid(expand=True)
            for label in shown:
                grid.add_column(label, justify="center")
            grid.add_row(*(f"[dim]{label}[/]" for label in shown))
            grid.add_row(*(f"[bold]{value}[/]" for value in shown.values()))
            self._progress.update(self._task, completed=step)
            self._live.update(Panel(Group(grid, self._progress), title="subspace-optim pretrain", border_style="dim"))
        elif line and not self.quiet:
            write(f"step {step:>6}  " + "  ".join(f"{label} {value}" for label, value in shown.items()))

    @_unheeded
    def stop(self) -> None:
        """Close the live panel and leave its last state on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None


class Muted(Display):
    """Shows nothing: of several ranks, one speaks."""

    def __init__(self) -> None:
        super().__init__(quiet=True)

    def result(self, line: str) -> None:
        """Left to the first rank."""

    def warn(self, line: str) -> None:
        """Left to the first rank."""
