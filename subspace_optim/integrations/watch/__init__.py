"""Writing down what `optimizer.report()` tells, while a run goes on.

    with Watch(opt, JSONLines("figures.jsonl"), TensorBoard("runs/1"), Page("figures.html"), every=10):
        …  # any loop that calls opt.step()

`watch.transformers` and `watch.lightning` have the callback for each of these trainers.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from torch.optim import Optimizer

from ...engine import SubspaceOptimizer
from ...monitor import LayerReport
from .page import write_page

FIGURES = ("captured", "captured_ema", "update_ratio", "overlap", "refreshes", "refresh_seconds", "skipped")
Record = tuple[int, list[LayerReport]]  # steps done, and the report at that step


class Sink(Protocol):
    """Where figures go."""

    def write(self, step: int, layers: Sequence[LayerReport]) -> None:
        """Take the report of one look."""

    def close(self) -> None:
        """Finish; nothing is written after it."""


class JSONLines:
    """One line a look: {"step": …, "layers": [{"name": …, "captured": …}, …]}. A resumed run appends.

    Args:
        path: of the file; its folder is made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():  # a run that was killed may have left half a line
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)

    def write(self, step: int, layers: Sequence[LayerReport]) -> None:
        """Append a line."""
        line = json.dumps({"step": step, "layers": [asdict(layer) for layer in layers]}) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)

    def close(self) -> None:
        """Nothing is left open between looks."""


def read_lines(path: str | Path) -> list[Record]:
    """What `JSONLines` wrote; a run that was taken back to an earlier step replaces what it had written after it.

    Args:
        path: of the file. A last line that was cut off is left out, and with a warning any other that is damaged, as a
            full disk leaves them.
    """
    records: list[Record] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").split("\n")[:-1], 1):
        try:
            found = json.loads(line)
            step = int(found["step"])
            layers = [LayerReport(**layer | {"shape": tuple(layer["shape"])}) for layer in found["layers"]]
        except (ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{path}: line {number} is damaged and left out ({error})", stacklevel=2)
            continue
        while records and records[-1][0] >= step:
            records.pop()
        records.append((step, layers))
    return records


class TensorBoard:
    """Scalars `captured/LAYER`, `update_ratio/LAYER` … for TensorBoard, which must be installed.

    Args:
        folder: of the event files.
    """

    def __init__(self, folder: str | Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def write(self, step: int, layers: Sequence[LayerReport]) -> None:
        """Every figure that there is."""
        for tag, value in _scalars(layers):
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class WandB:
    """Scalars `subspace/captured/LAYER` … over `subspace/step`, for Weights & Biases, which must be installed.

    Args:
        **options: of `wandb.init`, where no run is active; an active run is used, and left open.
    """

    def __init__(self, **options: Any) -> None:
        import wandb

        self._own = wandb.run is None
        self._run = wandb.init(**options) if wandb.run is None else wandb.run
        # An axis of our own: the run's counter belongs to whoever logs the loss.
        self._run.define_metric("subspace/*", step_metric="subspace/step")

    def write(self, step: int, layers: Sequence[LayerReport]) -> None:
        """Every figure that there is."""
        self._run.log({"subspace/step": step} | {f"subspace/{tag}": value for tag, value in _scalars(layers)})

    def close(self) -> None:
        """Finish the run if it was begun here."""
        if self._own:
            self._run.finish()


class Page:
    """A page with plots and a table, in one file that opens offline. Written at the end; needs matplotlib.

    Args:
        path: of the .html file; its folder is made.
        title: of the page.
        earlier: what an interrupted run had seen, from `read_lines`.
    """

    def __init__(self, path: str | Path, title: str = "What the subspaces see", earlier: Iterable[Record] = ()) -> None:
        import matplotlib  # noqa: F401  # before the run rather than after it

        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.title = title
        self._records = list(earlier)

    def write(self, step: int, layers: Sequence[LayerReport]) -> None:
        """Keep it for the plots."""
        self._records.append((step, list(layers)))

    def close(self) -> None:
        """Draw what there is; nothing where there was no look."""
        if self._records:
            write_page(self.path, self._records, self.title)


class Watch:
    """Looks at every n-th step of an optimizer and hands the report to sinks, from now to `close`.

    A sink that fails (a full disk) costs a warning and its own figures, never the run.

    Args:
        optimizer: a `SubspaceOptimizer`, or what a trainer wrapped around one.
        *sinks: where the figures go.
        every: steps between two looks, ≥ 1.
        write: False on all ranks but one: every rank has to look, where looking takes collectives.

    Raises:
        TypeError: there is no `SubspaceOptimizer` in `optimizer`.
    """

    def __init__(self, optimizer: Any, *sinks: Sink, every: int = 10, write: bool = True) -> None:
        self.optimizer = unwrap(optimizer)
        self.optimizer.watch(every)
        self._sinks = list(sinks) if write else []
        self._hook = self.optimizer.register_step_post_hook(self._after)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.optimizer.observer.looking:
            layers = self.optimizer.report()
            self._tell("write", max(layer.step for layer in layers), layers)

    def _tell(self, method: str, *values: Any) -> None:
        for sink in list(self._sinks):
            try:
                getattr(sink, method)(*values)
            except OSError as error:  # noqa: PERF203
                self._sinks.remove(sink)
                warnings.warn(f"{type(sink).__name__} gets no more figures: {error}", stacklevel=2)

    def close(self) -> None:
        """Close the sinks; `optimizer.report()` still answers. A second call does nothing."""
        self._hook.remove()
        self._tell("close")
        self._sinks = []

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def unwrap(optimizer: Any) -> SubspaceOptimizer:
    """The `SubspaceOptimizer` itself, or the one inside of what a trainer made of it.

    Raises:
        TypeError: there is none.
    """
    found = optimizer
    while not isinstance(found, SubspaceOptimizer):
        found = getattr(found, "optimizer", None)
        if found is None:
            raise TypeError(f"there are figures of a SubspaceOptimizer only, and this is a {type(optimizer).__name__}")
    return found


def _scalars(layers: Iterable[LayerReport]) -> Iterator[tuple[str, float]]:
    for layer in layers:
        for figure in FIGURES:
            value = getattr(layer, figure)
            if value is not None:
                yield f"{figure}/{layer.name}", value
