"""The processes of a run: one alone, or as many as torchrun has started. Only this module knows how many they are.

Every rank makes the same steps on its part of every batch. Where one rank alone works, or may be refused something that
the others are not, all meet (`agreed`, `decide`, `in_turn`), so that they go on together or end together. A rank that
ends anywhere else leaves the others in a collective, which torchrun ends.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

import subspace_optim as so
from subspace_optim import distributed
from subspace_optim.pretrain.config import Failure, RunConfig, UserError

T = TypeVar("T")
_PATIENCE = timedelta(days=1)  # of ranks that wait while one reads the text; torchrun ends them if that one fails


class Ranks:
    """A run of one process, which has nothing to share."""

    number = 0
    size = 1
    sharded = False
    launcher: str | None = None

    @property
    def first(self) -> bool:
        """Whether this rank is the one that speaks and writes."""
        return self.number == 0

    def accept(self, config: RunConfig) -> RunConfig:
        """The options as this rank takes them, or a refusal of what the ranks cannot do."""
        return config

    def shard(self, config: RunConfig, plan: so.MemoryPlan) -> None:
        """Choose between copies and shards of the model.

        Args:
            config: The run.
            plan: The memory that a rank with a copy takes.
        """

    def place(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model on its device, as this rank holds it.

        Args:
            model: The same on every rank.
            device: Of this rank.
        """
        return model.to(device)

    def part(self, windows: Tensor) -> Tensor:
        """This rank's rows of a batch; all of them where they cannot be dealt out evenly."""
        return windows

    def average(self, optimizer: so.SubspaceOptimizer) -> None:
        """Average the gradients of all ranks, unless backward has done so."""

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks."""
        return value

    def latest(self, signals: list[int]) -> int:
        """The number of a signal that some rank has caught; 0 if none has."""
        return signals[0] if signals else 0

    def gathered(self, state: Any) -> Any:
        """A state with every sharded tensor whole on the first rank, as one process would have it."""
        return state

    def load(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Load whole weights into the model as this rank holds it."""
        model.load_state_dict(state)

    def decide(self, choose: Callable[[], T]) -> T:
        """What the first rank chooses."""
        return choose()

    def in_turn(self, work: Callable[[], T]) -> T:
        """Work whose result others find in a cache: the first rank, then one on each machine, then the rest."""
        return work()

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Raise a failure of any rank within the block on every rank."""
        yield


class Launched(Ranks):
    """One of the ranks that torchrun has started, with a process group for as long as the context lasts."""

    def __init__(self) -> None:
        self.number, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._local = int(os.environ["LOCAL_RANK"])
        self.launcher = f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', self.size)} -m subspace_optim"
        self._known: Failure | None = None

    def __enter__(self) -> Launched:
        if torch.cuda.is_available():
            torch.cuda.set_device(self._local % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        self._control = dist.new_group(backend="gloo", timeout=_PATIENCE)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:  # torchrun ends every rank as soon as one has ended with a code, so they end together
            dist.barrier(self._control)
            dist.destroy_process_group()
            del self._control  # joins its threads: one that frees its last message in Python's shutdown aborts it
        elif isinstance(error, Failure) and error is self._known and not self.first:
            raise SystemExit(error.exit_code)  # the first rank says why
        elif isinstance(error, RuntimeError) and ("gloo" in str(error) or isinstance(error, dist.DistError)):
            raise Failure(f"rank {self.number} of {self.size} has lost the others; one of them has ended") from error

    def accept(self, config: RunConfig) -> RunConfig:
        """The options with this rank's own GPU."""
        if config.batch_size % self.size:
            fitting = [str(n) for n in range(1, config.batch_size + 1) if config.batch_size % n == 0]
            raise UserError(
                f"--batch-size {config.batch_size}: cannot be dealt out evenly to {self.size} ranks; give a multiple "
                f"of {self.size}, or start torchrun with --nproc-per-node {', '.join(fitting[:-1])} or {fitting[-1]}"
            )
        if config.parallel == "fsdp" and config.layerwise == "linear":
            raise UserError(
                "--parallel fsdp: a layer computes with more of its weight than a rank keeps, so its backward cannot "
                "form R of a shard (--layerwise linear); use --layerwise hooks"
            )
        if not config.device.startswith("cuda"):
            return config
        if self._local >= torch.cuda.device_count():
            raise UserError(
                f"--device {config.device}: rank {self._local} of this machine has no GPU of its own; start torchrun "
                f"with --nproc-per-node {torch.cuda.device_count()} or less"
            )
        return replace(config, device=f"cuda:{self._local}")

    def shard(self, config: RunConfig, plan: so.MemoryPlan) -> None:
        """FSDP2 where it is asked for, or where a copy does not fit the free memory of every rank's GPU."""
        device = torch.device(config.device)
        full = device.type == "cuda" and plan.peak > torch.cuda.mem_get_info(device)[0]
        self.sharded = config.parallel == "fsdp" or (
            config.parallel == "auto" and config.layerwise != "linear" and any(self._meet(full))
        )

    def place(self, model: nn.Module, device: torch.device) -> nn.Module:
        """A copy, or shards of every decoder layer and of the rest."""
        if self.sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(device.type, (self.size,))
            for layer in model.get_submodule("model.layers").children():
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            return model
        model.to(device)
        for parameter in model.parameters():
            dist.broadcast(parameter.detach(), 0)
        return model

    def part(self, windows: Tensor) -> Tensor:
        """A block of rows."""
        return windows if len(windows) % self.size else windows.chunk(self.size)[self.number]

    def average(self, optimizer: so.SubspaceOptimizer) -> None:
        """Of copies: what the step needs no more than R of is projected first, so that R is what is sent."""
        if not self.sharded:
            groups = enumerate(optimizer.param_groups)
            optimizer.project_gradients((index, param) for index, group in groups for param in group["params"])
            so.average_gradients(optimizer)

    def sum(self, value: Tensor) -> Tensor:
        """In place."""
        dist.all_reduce(value)
        return value

    def latest(self, signals: list[int]) -> int:
        """The same on every rank, so that all stop after the same step."""
        number = torch.tensor(super().latest(signals))
        dist.all_reduce(number, dist.ReduceOp.MAX, self._control)
        return int(number)

    def gathered(self, state: Any) -> Any:
        """One tensor at a time, kept in the memory of the first rank's CPU."""
        if isinstance(state, Mapping):
            return {key: self.gathered(value) for key, value in state.items()}
        if isinstance(state, list):
            return [self.gathered(value) for value in state]
        if not distributed.is_sharded(state):
            return state
        tensor = distributed.whole(state.detach())
        return tensor.cpu() if self.first else None

    def load(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Every rank has read all of it, and keeps its part."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        if self.sharded:
            set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))
        else:
            model.load_state_dict(state)

    def decide(self, choose: Callable[[], T]) -> T:
        """Chosen once and sent to the others."""
        choice = None
        with self.agreed():
            if self.first:
                choice = choose()
        return self._meet(choice)[0]

    def in_turn(self, work: Callable[[], T]) -> T:
        """Three turns."""
        mine = 0 if self.first else 1 if self._local == 0 else 2
        for turn in range(3):
            with self.agreed():
                if turn == mine:
                    result = work()
        return result

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """All meet at the end of the block, or where one has failed at the next end of another."""
        try:
            yield
        except Failure as error:
            if error is not self._known:
                self._meet(error)
            raise
        self._meet(None)

    def _meet(self, said: Any) -> list[Any]:
        """What every rank says. It is the only way of meeting, so that ranks which fail early meet the others too."""
        heard: list[Any] = [None] * self.size
        dist.all_gather_object(heard, said, group=self._control)
        failure = next((one for one in heard if isinstance(one, Failure)), None)
        if failure is not None:
            self._known = failure
            raise failure
        return heard


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that this process is one of, by the environment that torchrun makes."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "LOCAL_RANK" not in os.environ:
        yield Ranks()
        return
    with Launched() as ranks:
        yield ranks
