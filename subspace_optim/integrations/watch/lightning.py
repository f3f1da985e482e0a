"""The callback for Lightning's Trainer: `Trainer(callbacks=[WatchCallback(JSONLines("figures.jsonl"))])`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from . import Sink, Watch


class WatchCallback(Callback):
    """Watches the Trainer's first optimizer from the first step to the last, or to the exception that ends it.

    Args:
        *sinks: where the figures go; on the first process only.
        every: steps between two looks, ≥ 1.
    """

    def __init__(self, *sinks: Sink, every: int = 10) -> None:
        self._sinks, self._every = sinks, every
        self._watch: Watch | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to look."""
        self._watch = Watch(trainer.optimizers[0], *self._sinks, every=self._every, write=trainer.is_global_zero)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the sinks."""
        if self._watch:  # an exception may come before the first step
            self._watch.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the sinks."""
        if self._watch:  # an exception may come before the first step
            self._watch.close()
