"""The training loop: from a resolved configuration to a trained model, its checkpoints and its report."""

from __future__ import annotations

import math
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import subspace_optim as so
from subspace_optim.pretrain import checkpoint, machine
from subspace_optim.pretrain.config import Diverged, RunConfig, UserError, optimizer_defaults
from subspace_optim.pretrain.data import Batches, Corpus, prepare
from subspace_optim.pretrain.display import Display, count, duration, size
from subspace_optim.pretrain.model import DTYPES, build_model, compiled, evaluate, summed_loss
from subspace_optim.pretrain.planning import plan_run
from subspace_optim.pretrain.ranks import Ranks

SKIPS_IN_A_ROW = 20
_STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_CURVE = ("step", "loss", "lr", "grad_norm", "step_seconds", "optimizer_seconds")


class Interrupted(Exception):
    """A signal asked the run to stop, and it stopped after a step with all of its work saved."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def make_optimizer(model: nn.Module, config: RunConfig, *, early: bool = True) -> so.SubspaceOptimizer:
    """The optimizer of a run, projecting within backward if ``--layerwise`` was given.

    Args:
        model: The model.
        config: The run.
        early: Renew bases within backward, which ranks with copies of the model cannot.

    Raises:
        UserError: The name or one of the options is refused.
    """
    try:
        optimizer = so.create(model, config.optimizer, **config.optimizer_options)
    except (ValueError, TypeError) as error:
        raise UserError(f"--optimizer {config.optimizer}: {error}") from error
    if config.layerwise != "off":
        try:
            so.project_in_backward(model, optimizer, linear=config.layerwise == "linear", early=early)
        except ValueError as error:
            raise UserError(f"--layerwise {config.layerwise}: {error}; leave --layerwise out") from error
    return optimizer


def check_optimizer(config: RunConfig) -> None:
    """Refuse a bad optimizer before any text is read, on a model without storage.

    Args:
        config: The run.

    Raises:
        UserError: The optimizer, the attention or one of their options is refused.
    """
    with torch.device("meta"):
        model = build_model(config, vocab_size=512, end_id=0)
    make_optimizer(model, config)


def lr_factor(update: int, steps: int, warmup: int, min_ratio: float) -> float:
    """Linear warm-up, then a cosine down to ``min_ratio``; the first update already moves.

    Args:
        update: Updates made so far.
        steps: Updates of the whole run.
        warmup: Updates until the full learning rate.
        min_ratio: Where the cosine ends, as a fraction of the full learning rate.
    """
    if update < warmup:
        return (update + 1) / warmup
    progress = min(1.0, (update + 1 - warmup) / max(1, steps - warmup))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


@contextmanager
def stop_signals(pass_on: Callable[[int], None] | None = None, *, again: bool = True) -> Iterator[list[int]]:
    """Collect the first Ctrl-C, SIGTERM or SIGHUP instead of dying of it; a second one has its usual effect.

    What the process was told to ignore (SIGHUP by nohup, Ctrl-C by a shell that put it in the background) stays so.

    Args:
        pass_on: Told of a SIGTERM, which unlike Ctrl-C in a terminal does not reach a child process by itself.
        again: False to collect further ones too, an error's way out included: a launcher passes on what the terminal
            has sent already, and ends every rank 0.1 s after the first has ended, which would silence the others.

    Yields:
        A list that holds the signal's number once it came.
    """
    caught: list[int] = []
    before = {number: signal.getsignal(number) for number in _STOPPING}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if pass_on is not None and number == signal.SIGTERM:
            pass_on(number)
        if again:
            restore()

    for number in before:
        signal.signal(number, catch)
    try:
        yield caught
    except BaseException:
        if again:
            restore()
        raise
    restore()


class Run:
    """One run: everything that a checkpoint holds, and the means to go on from it."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        display: Display,
        began: float | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config
        self.folder = folder
        self.display = display
        self.ranks = ranks or Ranks()
        self.device = torch.device(config.device)
        self.watch = machine.Stopwatch(self.device)
        if began is not None:
            self.watch.add("start", time.perf_counter() - began)
        with self.watch.phase("corpus"):
            self.corpus: Corpus = self.ranks.in_turn(lambda: prepare(config, display.info))
            train = self.corpus.windows("train", config.seq_len)
            held_out = self.corpus.windows("validation", config.seq_len)
            self.batches = Batches(train, config.batch_size, config.seed)
            chosen = held_out.spread(config.eval_tokens)
            here = config.batch_size // self.ranks.size
            even = len(chosen) - len(chosen) % self.ranks.size
            at_once = [chosen[i : min(i + config.batch_size, even)] for i in range(0, even, config.batch_size)]
            at_once += [chosen[i : i + here] for i in range(even, len(chosen), here)]
            self.validation = [held_out.read(indices) for indices in at_once]
        with self.watch.phase("plan"):
            self.plan = plan_run(replace(config, batch_size=here), self.corpus.vocab_size)
            self.ranks.shard(config, self.plan)
        with self.watch.phase("model"):
            self.memory = machine.MemoryMeter(self.device)
            if self.device.type == "cuda":
                torch.set_float32_matmul_precision("high")
            model = build_model(config, self.corpus.vocab_size, self.corpus.end_id)
            self.model = self.ranks.place(model.to(DTYPES[config.dtype]), self.device)
            self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.forward = compiled(self.model, config)
            self.optimizer = make_optimizer(self.model, config, early=self.ranks.size == 1 or self.ranks.sharded)
            self.scheduler = LambdaLR(
                self.optimizer, lambda update: lr_factor(update, config.steps, config.warmup, config.min_lr_ratio)
            )
        self.step = 0
        self.skipped = 0
        self.curve: list[list[float]] = []
        self.evaluations: list[list[float]] = []
        self.gradient_bytes = 0
        self.peak_before = (0, 0)
        self.allocated = 0  # bytes of tensors at the peak of the first step that moved the weights

    def state(self) -> dict[str, Any]:
        """All that is needed to go on bit for bit, in types that ``torch.load`` accepts by default."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "position": {"epoch": self.batches.epoch, "cursor": self.batches.cursor},
            "random": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            },
            "curve": torch.tensor(self.curve, dtype=torch.float64),
            "evaluations": torch.tensor(self.evaluations, dtype=torch.float64),
            "skipped": self.skipped,
            "ranks": self.ranks.size,
            "threads": torch.get_num_threads(),
            "seconds": dict(self.watch.seconds),
            "gradient_bytes": self.gradient_bytes,
            "peak_and_baseline": list(self.peak_and_baseline()),
            "allocated": self.allocated,
        }

    def peak_and_baseline(self) -> tuple[int, int]:
        """The most memory that any session of this run took, and what that session took before there was a model."""
        return max(self.peak_before, (self.memory.peak(), self.memory.baseline))

    def load(self, state: dict[str, Any], facts: dict[str, Any]) -> None:
        """Go back to a checkpoint.

        Args:
            state: What ``state`` gave.
            facts: What was saved beside it.

        Raises:
            UserError: It belongs to another model, optimizer or corpus.
        """
        if facts["corpus"] != self.corpus.key:
            raise UserError(
                f"--resume {self.folder}: the text has changed since the checkpoint was written; "
                "bring it back as it was, or start a new run in another --out"
            )
        try:
            self.ranks.load(self.model, state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--resume {self.folder}: the checkpoint is of another model or optimizer ({error})"
            ) from error
        self.step = state["step"]
        self.batches.epoch, self.batches.cursor = state["position"]["epoch"], state["position"]["cursor"]
        torch.set_rng_state(state["random"]["cpu"])
        if state["ranks"] == self.ranks.size:
            torch.set_num_threads(state["threads"])  # sums depend on how they are split
        if self.device.type == "cuda" and state["random"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
        self.curve = state["curve"].tolist()
        self.evaluations = state["evaluations"].tolist()
        self.skipped = state["skipped"]
        self.gradient_bytes = state["gradient_bytes"]
        self.peak_before = tuple(state["peak_and_baseline"])
        self.allocated = state["allocated"]
        for phase, seconds in state["seconds"].items():
            self.watch.add(phase, seconds)

    def save(self) -> None:
        """Write a checkpoint of the present step.

        Raises:
            UserError: It cannot be written.
        """
        with self.watch.phase("checkpoints"):
            facts = {"config": self.config.to_dict(), "corpus": self.corpus.key}
            state = self.ranks.gathered(self.state())
            with self.ranks.agreed():
                if self.ranks.first:
                    checkpoint.save(self.folder, self.step, state, facts, self.config.keep)

    def evaluate(self) -> float:
        """Measure the loss on the held-out tokens and note it.

        Returns:
            Nats per token.

        Raises:
            Diverged: It is not finite, and so the weights are not.
        """
        with self.watch.phase("evaluation"):
            self.model.eval()
            nll, tokens = evaluate(self.forward, self.validation, self.device, self.ranks)
            self.model.train()
        if not math.isfinite(nll):
            with self.ranks.agreed():
                raise Diverged(f"the held-out loss is not finite after step {self.step}; try a lower --lr")
        self.evaluations.append([self.step, nll, tokens])
        return nll / tokens

    def advance(self) -> bool:
        """Make one update; the first one is looked at for the memory that it takes.

        Returns:
            Whether the weights moved: a step whose loss or gradient is not finite is skipped.
        """
        if self.allocated:
            return self._advance()
        self.optimizer.allocate_state()  # as every other step finds it
        there = machine.storage_bytes((*self.model.parameters(), *self.model.buffers())) + self.optimizer.state_bytes()
        moved, allocated = self.memory.tensors(there, self._advance)
        self.allocated = allocated if moved else 0
        return moved

    def _advance(self) -> bool:
        before = dict(self.watch.seconds)
        begin = time.perf_counter()
        total = torch.zeros((), device=self.device)
        for _ in range(self.config.accumulate):
            with self.watch.phase("batches"):
                windows = self.ranks.part(self.batches.next()).to(self.device)
            with self.watch.phase("forward and backward"):
                nll = summed_loss(self.forward, windows)
                # The ranks' gradients are averaged, and the loss is the mean over the tokens of all.
                (nll * self.ranks.size / self.config.tokens_per_step).backward()  # type: ignore[no-untyped-call]
                total += nll.detach()
        with self.watch.phase("optimizer"):
            held = (*(p.grad for p in self.parameters), *(r for lows in self.optimizer.lows.values() for r in lows))
            self.gradient_bytes = self.gradient_bytes or machine.storage_bytes(held)
            self.ranks.average(self.optimizer)
            norm = self.optimizer.clip_grad_norm_(self.config.clip or math.inf).item()
            loss = self.ranks.sum(total).item() / self.config.tokens_per_step
            lr = self.optimizer.param_groups[0]["lr"]
            moved = math.isfinite(loss) and math.isfinite(norm)
            if moved:
                self.optimizer.step()
                self.scheduler.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.skipped += not moved
        spent = self.watch.seconds["optimizer"] - before.get("optimizer", 0.0)
        self.curve.append([self.step, loss, float(lr), norm, time.perf_counter() - begin, spent])
        return moved

    def train(self) -> None:
        """Train to the last step, evaluating and saving on the way.

        Raises:
            Interrupted: A signal came; all work is saved.
            Diverged: Too many steps in a row were skipped.
            UserError: A checkpoint could not be written.
        """
        config = self.config
        saved = self.step if self.step else None
        moved = (math.isfinite(loss) and math.isfinite(norm) for _, loss, _, norm, *_ in reversed(self.curve))
        skips = next((number for number, whether in enumerate(moved) if whether), len(self.curve))
        self.display.start(config.steps, self.step)
        try:
            with stop_signals(again=self.ranks.size == 1) as stop:
                while True:
                    if number := self.ranks.latest(stop):
                        if saved != self.step:
                            self.save()
                        raise Interrupted(number)
                    last = self.step == config.steps
                    evaluated = bool(self.evaluations) and self.evaluations[-1][0] == self.step
                    evaluates = not evaluated and (last or self.step % config.eval_every == 0)
                    if evaluates:
                        self.evaluate()
                    self._show(line=evaluates or self.step % max(1, config.steps // 20) == 0)
                    if saved != self.step and (last or self.step % config.save_every == 0):
                        self._save_or_go_on(last)
                        saved = self.step
                    if last:
                        return
                    skips = 0 if self.advance() else skips + 1
                    if self.step == 1:
                        with self.ranks.agreed():
                            self._check_room()
                    if skips == SKIPS_IN_A_ROW:
                        with self.ranks.agreed():
                            raise Diverged(
                                f"the loss or its gradient was not finite in the last {skips} steps; the weights are "
                                f"those of step {self.step - skips}; try a lower --lr or --clip"
                            )
        finally:
            self.display.stop()

    def _check_room(self) -> None:
        """Refuse to go on where the checkpoints will not fit, now that their size is known and little is lost."""
        shards = self.ranks.size if self.ranks.sharded else 1
        size_of_one = shards * (machine.storage_bytes(self.model.parameters()) + self.optimizer.state_bytes())
        needed = size_of_one * (self.config.keep + 1)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"--out {self.folder}: has {size(free)} free and its checkpoints will take up to {size(needed)}; "
                "free some space, lower --keep, or choose another --out"
            )

    def _save_or_go_on(self, last: bool) -> None:
        """A full disk in the middle of a run costs a warning, not the work since the last checkpoint."""
        try:
            self.save()
        except UserError as error:
            if last or self.step == 0:
                raise
            self.display.warn(f"{error}; training goes on and tries again at the next checkpoint")

    def _show(self, *, line: bool) -> None:
        recent = self.curve[-20:]
        shown = {}
        if recent:
            losses = [row[1] for row in recent if math.isfinite(row[1])]
            shown["loss"] = f"{statistics.fmean(losses):.3f}" if losses else "not finite"
        if self.evaluations:
            _, nll, tokens = self.evaluations[-1]
            shown["ppl"] = f"{perplexity(nll, tokens):.1f}"
        if recent:
            pace = statistics.fmean(row[4] for row in recent)
            shown["tokens/s"] = count(self.config.tokens_per_step / pace)
            shown["memory"] = size(self.memory.now())
            shown["left"] = duration(self._seconds_left(pace))
        if self.skipped:
            shown["skipped"] = str(self.skipped)
        self.display.step(self.step, shown, line=line)

    def _seconds_left(self, pace: float) -> float:
        steps = self.config.steps - self.step
        evaluations = math.ceil(steps / self.config.eval_every)
        spent = self.watch.seconds.get("evaluation", 0.0) / max(1, len(self.evaluations))
        return steps * pace + evaluations * spent


def perplexity(nll: float, tokens: float) -> float:
    """The exponential of the mean negative log likelihood per token; infinite where that overflows.

    Args:
        nll: Summed over the tokens, in nats.
        tokens: How many.
    """
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf


def introduce(run: Run) -> None:
    """Say what is about to be trained, on what, and by which optimizer.

    Args:
        run: A run that is ready to train.
    """
    config, corpus, say = run.config, run.corpus, run.display.info
    parameters = sum(parameter.numel() for parameter in run.parameters)
    say(
        f"model      {config.model}: LLaMA of {count(parameters)} parameters, depth {config.layers}, "
        f"width {config.hidden}, {config.dtype} on {run.device}"
    )
    if run.ranks.size > 1:
        how = "shards of the model (FSDP2)" if run.ranks.sharded else "a copy of the model each"
        say(
            f"ranks      {run.ranks.size}, {how}, {config.batch_size // run.ranks.size} sequences of a micro-batch each"
        )
    text = " ".join(config.data) or "the Python standard library"
    say(
        f"data       {text}: {count(corpus.tokens['train'])} tokens to train on, "
        f"{count(corpus.tokens['validation'])} held out, vocabulary {corpus.vocab_size}"
    )
    defaults = optimizer_defaults(config.optimizer, config.model, config.steps)
    source = f" ({defaults.source})" if config.lr == defaults.lr else ""
    dense = "" if config.dense_lr is None else f", {config.dense_lr:g} for embeddings, head and vectors"
    say(f"optimizer  {config.optimizer}, lr {config.lr:g}{dense}{source}")
    for line in run.optimizer.summary().splitlines():
        say(f"           {line}")
    memory = "unsharded" if run.ranks.sharded else "memory"
    for number, line in enumerate(run.plan.table().splitlines()):
        say(f"{'' if number else memory:11}{line}")
    say(
        f"budget     {config.steps} steps of {count(config.tokens_per_step)} tokens = "
        f"{count(config.steps * config.tokens_per_step)} tokens; results in {run.folder}"
    )
