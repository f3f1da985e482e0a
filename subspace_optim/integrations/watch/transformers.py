"""The callback for transformers' Trainer: `Trainer(…, callbacks=[WatchCallback(JSONLines("figures.jsonl"))])`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from . import Sink, Watch


class WatchCallback(TrainerCallback):
    """Watches the Trainer's optimizer from the first step to the last.

    Args:
        *sinks: where the figures go; on the first process only.
        every: steps between two looks, ≥ 1.
    """

    def __init__(self, *sinks: Sink, every: int = 10) -> None:
        self._sinks, self._every = sinks, every

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to look."""
        self._watch = Watch(kwargs["optimizer"], *self._sinks, every=self._every, write=state.is_world_process_zero)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the sinks."""
        self._watch.close()
