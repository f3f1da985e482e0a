"""How much memory a training step will take: the step itself, run on tensors that have shapes and no memory.

The model's copy is made of fake tensors; forward, backward and the optimizer's step are the real ones. What is recorded
is when each storage is born and when it dies, in which phase and under which layer, so that the peak is where they
overlap most and there is no second formula for anything.
"""

from __future__ import annotations

import copy
import json
import math
import re
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import philox, storage
from .allocation import BITS, RANKS, Choice, choose, spectra_of
from .engine import REFRESH_ELEMENTS, SubspaceOptimizer
from .groups import param_groups
from .hyperparameters import nearest
from .kernels import reference, select
from .layerwise import project_in_backward
from .optimizers import create, projects, resolve
from .projectors import UNSET
from .sizes import SIZES, Size, llama_options

Loss = Callable[[nn.Module, int, int], Tensor]

CATEGORIES = ("weights", "gradients", "moments", "basis", "activations", "workspace", "margin")
CUDA_BLOCK = 512  # bytes that torch's CUDA allocator rounds every tensor up to
CUDA_WORKSPACE = 96 << 20  # cuBLAS keeps up to 32 MiB (Hopper), and the fused kernels take up to 64 at a time
CUDA_CONTEXT = 512 << 20  # what a process takes on a GPU before its first tensor: kernels of torch and cuBLAS
CHECKPOINTING = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # transformers 5, and before it
LAYERWISE = ("off", "hooks", "linear")
LEAST_RANK = 8  # that a plan is shrunk to
FRAGMENTATION = 0.05  # of what comes and goes; what stays is laid out once
_UNITS = {"": 1, "b": 1} | {f"{p}{u}": b**i for i, p in enumerate("kmgt", 1) for u, b in (("b", 1000), ("ib", 1024))}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([A-Za-z]*)\s*")


def bytes_of(size: int | float | str, name: str = "size") -> int:
    """Bytes that a size names.

    Args:
        size: a number of bytes, or a string such as "24GB" (24·10⁹) or "24GiB" (24·2³⁰).
        name: of the option, for the error.

    Raises:
        ValueError: it is no size above 0.
    """
    found = _SIZE.fullmatch(str(size))
    count = float(found[1]) * _UNITS.get(found[2].lower(), 0) if found else 0.0
    if not (isinstance(size, int | float | str) and 1 <= count < math.inf):
        raise ValueError(f"{name}={size!r} must be a number of bytes above 0, such as '24GB' or '22.5GiB'")
    return int(count)


# ---- the recording --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Storage:
    """One storage: what it is, and where it was born."""

    nbytes: int
    phase: str
    layer: str
    category: str


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the birth and the death of every storage that an op returns; a number that is asked for is 1.

    Args:
        block: bytes that a storage is rounded up to.
    """

    def __init__(self, block: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.block = block
        self.phase = "start"
        self.layers: list[str] = []  # the modules that are running, innermost last
        self.storages: list[_Storage] = []
        self.events: list[tuple[int, int, str]] = []  # (storage, ±1, phase)
        self._alive: dict[int, int] = {}  # address of the storage → its place in `storages`

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.note(leaf)
        return out

    def note(self, tensor: Tensor) -> _Storage:
        """The record of a tensor's storage, made if it is new."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._alive:
            number = self._alive[address] = len(self.storages)
            layer, forward = (self.layers[-1], True) if self.layers else (self.phase, self.phase == "forward")
            size = -(-storage.nbytes() // self.block) * self.block
            # What a module makes while backward runs is recomputed by checkpointing.
            self.storages.append(_Storage(size, self.phase, layer, "activations" if forward else "workspace"))
            self.events.append((number, 1, self.phase))
            weakref.finalize(storage, self._drop, address)
        return self.storages[self._alive[address]]

    def _drop(self, address: int) -> None:
        self.events.append((self._alive.pop(address), -1, self.phase))

    def mark(self, tensor: Tensor, category: str, layer: str) -> None:
        """Say what a tensor is."""
        record = self.note(tensor)
        record.category, record.layer = category, layer

    def keep(self, category: str) -> None:
        """What was born in this phase and outlives it is of this category."""
        for number in self._alive.values():
            if self.storages[number].phase == self.phase:
                self.storages[number].category = category

    def watch(self, model: nn.Module) -> None:
        """Follow which layer of the model is running."""
        for name in dict.fromkeys(_layer(name) for name, _ in model.named_parameters()):
            module = model.get_submodule(name)
            module.register_forward_pre_hook(lambda *_, name=name: self.layers.append(name))
            module.register_forward_hook(self._leave, always_call=True)

    def _leave(self, *_: Any) -> None:
        self.layers.pop()

    def peaks(self) -> tuple[dict[str, int], dict[tuple[str, str], int], str]:
        """(peak by phase, bytes at the peak by (category, layer), phase of the peak)."""
        now = most = 0
        at, phases = 0, dict[str, int]()
        for i, (number, sign, phase) in enumerate(self.events):
            now += sign * self.storages[number].nbytes
            phases[phase] = max(phases.get(phase, 0), now)
            if now > most:
                most, at = now, i
        held = Counter[tuple[str, str]]()
        for number, sign, _ in self.events[: at + 1]:
            storage = self.storages[number]
            held[storage.category, storage.layer] += sign * storage.nbytes
        return phases, {key: value for key, value in held.items() if value}, self.events[at][2]


def _as_list(tensor: Tensor) -> Any:
    """Of a fake tensor: ones, and for the ints of a stacked state "not yet set"."""
    value: Any = 1.0 if tensor.is_floating_point() else UNSET
    for length in reversed(tensor.shape):
        value = [value] * length
    return value


def _address(tensor: Tensor) -> int:
    """Of a fake tensor: what its views share, and nothing else does."""
    return tensor.untyped_storage()._cdata


def _layer(parameter: str) -> str:
    """The module that a parameter is accounted under: up to the first number in its name, or the module itself."""
    parts = parameter.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1] if numbers else parts[:-1])


# ---- the simulated step ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """A training step whose memory is asked for."""

    model: nn.Module
    optimizer: str
    options: Mapping[str, Any]  # of create
    batch: int
    seq: int
    accumulation: int
    dtype: torch.dtype | None
    checkpointing: bool
    layerwise: str
    device: str
    loss: Loss

    choices: Mapping[str, Choice] | None = None

    def make(self, model: nn.Module) -> SubspaceOptimizer:
        """The optimizer of the step."""
        if self.choices is None:
            return create(model, self.optimizer, **self.options)
        groups = _chosen_groups(_groups(model, self.options), self.choices)
        return _from_groups(self.optimizer, groups, self.options)


_OF_GROUPS = ("rank", "target", "exclude", "weight_decay")


def _groups(model: nn.Module, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups of a model whose ranks and bits are still open: any rank that projects."""
    return param_groups(model, 1, **{key: options[key] for key in _OF_GROUPS[1:] if key in options})


def _chosen_groups(groups: Iterable[dict[str, Any]], choices: Mapping[str, Choice]) -> list[dict[str, Any]]:
    """The groups, split by what was chosen for their members."""
    split: dict[Any, dict[str, Any]] = {}
    for index, group in enumerate(groups):
        for name, param in group["params"]:
            options = choices[name].options if name in choices else {}
            entry = split.setdefault((index, *options.items()), {**group, **options, "params": []})
            entry["params"].append((name, param))
    return list(split.values())


def _from_groups(name: str, groups: list[dict[str, Any]], options: Mapping[str, Any]) -> SubspaceOptimizer:
    cls, fixed = resolve(name)
    own = {key: value for key, value in options.items() if key not in _OF_GROUPS}
    return cls(groups, **{"lr": 1e-3, **fixed, **own})


def causal_loss(model: nn.Module, batch: int, seq: int) -> Tensor:
    """The cross-entropy of next-token prediction, in float32, as language models are trained.

    Args:
        model: takes `input_ids` and returns logits, or an object that holds them.
        batch: sequences.
        seq: tokens of each.
    """
    ids = torch.zeros(batch, seq + 1, dtype=torch.long)
    output = model(input_ids=ids[:, :-1])
    logits = getattr(output, "logits", output).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def enable_checkpointing(model: nn.Module) -> None:
    """Have a transformers model recompute the activations of every layer in its backward pass.

    Raises:
        ValueError: it does not know how.
    """
    for name in CHECKPOINTING:
        if hasattr(model, name):
            getattr(model, name)({"use_reentrant": False})
            return
    raise ValueError(
        f"checkpointing=True: {type(model).__name__} is no transformers model, so it must checkpoint by itself "
        "(torch.utils.checkpoint in its forward); leave checkpointing out"
    )


def _twin(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy of the model on fake tensors of the CPU, ties and hooks as they were."""

    def fake(tensor: Tensor) -> Tensor:
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind, device="cpu")
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): fake(tensor) for tensor in tensors})


def _kernels(device: str) -> Any:
    """On a GPU kernels are fused, as the ops of ops.py are in a simulation, whatever this machine has."""
    return mock.patch.dict(select.IMPLS, {"native": lambda plan: None} if device == "cuda" else {})


def _mark_state(recorder: _Recorder, model: nn.Module, optimizer: SubspaceOptimizer) -> None:
    for name, param in model.named_parameters():
        for key, value in optimizer.state.get(param, {}).items():
            if isinstance(value, Tensor):
                recorder.mark(value, "basis" if key.startswith("basis") else "moments", _layer(name))


def _set_ages(optimizer: SubspaceOptimizer) -> None:
    """As on the first step, where bases are renewed part by part: one part of each shape, the largest matrix cold."""
    aged = {param: state for param, state in optimizer.state.items() if isinstance(state.get("age"), int)}
    coldest = max(aged, key=torch.numel, default=None)
    part: Counter[Any] = Counter()
    for param, state in aged.items():
        state["age"] = UNSET if param is coldest else 10**9 if part[param.shape] < REFRESH_ELEMENTS else 0
        part[param.shape] += param.numel()


def _set_aside(optimizer: SubspaceOptimizer) -> list[Any]:
    """The gradients of what is decoded after the first part of its bucket: each part takes what the first one took."""
    aside: list[Any] = []
    seen: Counter[Any] = Counter()
    for index, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            plan = optimizer.plan_of(index, param)
            rule = optimizer.rule if plan.side else optimizer.dense_rule
            opens = 0 if storage.is_plain(plan) else storage.open_bytes(plan, rule.takes_codes)
            if seen[index, plan] * opens >= storage.OPEN_BYTES:
                aside += [param.grad, optimizer.lows.pop(param, None)]
                param.grad = None
            seen[index, plan] += plan.stack or 1
    return aside


def _seen_before(recorder: _Recorder, rounds: Callable[..., Any]) -> Callable[..., Any]:
    """Philox's ten rounds are 160 ops: a call of a size that has been met takes at once what the first one took."""
    met: dict[Any, tuple[int, Any]] = {}

    def take(seed: Any, *words: Any) -> Any:
        if not isinstance(words[0], Tensor):
            return rounds(seed, *words)
        key = words[0].shape, getattr(seed, "shape", ())
        if key not in met:
            begin = len(recorder.events)
            out = rounds(seed, *words)
            sizes = (sign * recorder.storages[number].nbytes for number, sign, _ in recorder.events[begin:])
            kept = 4 * out[0].nbytes
            met[key] = max(accumulate(sizes), default=0) - kept, out[0].shape
            return out
        workspace, shape = met[key]
        out = tuple(torch.empty(shape, dtype=torch.int64) for _ in range(4))
        torch.empty(max(0, workspace), dtype=torch.uint8)
        return out

    return take


def _first_chunk(chunks: Callable[[Tensor, int], Iterable[slice]]) -> Callable[[Tensor, int], Iterable[slice]]:
    """Tensors are coded chunk by chunk, of which each takes what the first took."""
    return lambda x, axis: islice(chunks(x, axis), 1)


@dataclass(frozen=True)
class _Result:
    """What a simulation found."""

    parameters: int
    rank: int | float | None
    held: dict[tuple[str, str], int]  # at the peak, by (category, layer)
    phases: dict[str, int]  # peak of each
    phase: str  # of the peak
    projectable: bool  # whether gradients may be projected within backward


def _simulate(job: _Job, step: bool = True) -> _Result:
    """Run a step, or only allocate what is there before it."""
    recorder = _Recorder(CUDA_BLOCK if job.device == "cuda" else 1)
    with ExitStack() as stack:
        for context in (
            FakeTensorMode(allow_non_fake_inputs=True),
            mock.patch.multiple(FakeTensor, create=True, tolist=_as_list, data_ptr=_address),
            _kernels(job.device),
            mock.patch.object(reference, "_chunks", _first_chunk(reference._chunks)),
            mock.patch.object(philox, "_rounds", _seen_before(recorder, philox._rounds)),
        ):
            stack.enter_context(context)
        model = _twin(job.model, job.dtype)
        if job.checkpointing:
            enable_checkpointing(model)
        recorder.watch(model)
        with recorder:
            for name, tensor in chain(model.named_parameters(), model.named_buffers()):
                recorder.mark(tensor, "weights", _layer(name))
            optimizer = job.make(model)
            optimizer.allocate_state()
            _set_ages(optimizer)
            _mark_state(recorder, model, optimizer)
            if job.layerwise != "off":
                project_in_backward(model, optimizer, linear=job.layerwise == "linear", early=True)
            for _ in range(min(job.accumulation, 2) if step else 0):  # the second meets the gradients of the first
                recorder.phase = "forward"
                loss = job.loss(model, job.batch, job.seq)
                recorder.phase = "backward"
                loss.backward()  # type: ignore[no-untyped-call]
                del loss
                recorder.keep("gradients")
                for name, param in model.named_parameters():
                    for grad in (param.grad, *optimizer.lows.get(param, ())):
                        if grad is not None:
                            recorder.mark(grad, "gradients", _layer(name))
            recorder.phase = "step"
            aside = _set_aside(optimizer)
            optimizer.step()
            del aside
        ranks = [group["rank"] for group in optimizer.param_groups if group["rank"] is not None]
        phases, held, phase = recorder.peaks()
        parameters = sum(p.numel() for p in model.parameters())
        return _Result(parameters, max(ranks, default=None), held, phases, phase, not optimizer.whole_gradient)


# ---- the plan -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryPlan:
    """What a training step takes, before anything is allocated. Made by `plan`.

    Args:
        settings: what was planned: model, optimizer, rank, dtype, batch, seq, accumulation, checkpointing, device and
            the options of the optimizer.
        parameters: of the model.
        bytes: at the peak, by category: weights, gradients, moments, basis, activations, workspace, margin.
        layers: the same by layer, margin left out; what no layer owns stands under the phase that made it.
        phases: the peak of each phase, without margin: start, forward, backward, step.
        phase: the one that holds the peak.
        projectable: whether `project_in_backward` serves the optimizer.
        capacity: bytes it is to fit into; None where none was given.
        fitting: where it does not fit, the plan after the cheapest changes that make it fit; None if none do.
        least: where nothing makes it fit, the bytes of the smallest plan that was found.
        choices: rank and bits by matrix, where a budget was given.
    """

    settings: Mapping[str, Any]
    parameters: int
    bytes: Mapping[str, int]
    layers: Mapping[str, Mapping[str, int]]
    phases: Mapping[str, int]
    phase: str
    projectable: bool
    capacity: int | None = None
    fitting: MemoryPlan | None = None
    least: int | None = None
    choices: Mapping[str, Choice] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes that it takes, margin included."""
        return sum(self.bytes.values())

    @property
    def allocated(self) -> int:
        """Bytes of tensors at the peak, as an allocator counts them."""
        return self.peak - self.bytes["margin"]

    @property
    def fits(self) -> bool:
        """Whether it fits into the capacity; always, where none was given."""
        return self.capacity is None or self.peak <= self.capacity

    @property
    def changes(self) -> dict[str, Any]:
        """The settings that `fitting` changes, cheapest first."""
        if self.fitting is None:
            return {}
        return {key: value for key, value in self.fitting.settings.items() if value != self.settings.get(key)}

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The model's parameters in groups with the ranks and bits that the budget chose, for the planned optimizer.

        Raises:
            ValueError: the plan has no choices, or they are of another model.
        """
        groups = _groups(model, self.settings)
        names = {name for group in groups for name, param in group["params"] if param.ndim >= 2}
        if not self.choices or names != set(self.choices):
            raise ValueError(
                "this plan was made without budget=, so no rank was chosen"
                if not self.choices
                else f"the plan is of another model: {sorted(names ^ set(self.choices))[0]} is not in both"
            )
        return _chosen_groups(groups, self.choices)

    def verdict(self) -> str:
        """Whether it fits, and if not what to change."""
        if self.capacity is None:
            return f"peak {_words(self.peak)}, in the {self.phase} phase"
        room = f"{_words(self.peak)} of {_words(self.capacity)}"
        if self.fits:
            return f"fits: {room}, {_words(self.capacity - self.peak)} to spare"
        if self.fitting is None:
            return f"does not fit: {room}; no change here makes it fit, the least is {_words(self.least or self.peak)}"
        changes = ", ".join(f"{key}={value}" for key, value in self.changes.items())
        return f"does not fit: {room}; it does with {changes}: {_words(self.fitting.peak)}"

    def table(self) -> str:
        """Bytes by layer and category, layers of a stack added up, and the verdict."""
        used = [category for category in CATEGORIES if any(row.get(category) for row in self.layers.values())]
        rows: dict[str, Counter[str]] = defaultdict(Counter)
        counts: Counter[str] = Counter()
        for layer, held in self.layers.items():
            label = re.sub(r"\d+$", "*", layer)
            rows[label].update(held)
            counts[label] += 1
        unit, scale = ("GiB", 2**30) if self.peak >= 2**32 else ("MiB", 2**20)

        def cell(count: int) -> str:
            return f"{count / scale:.2f}"

        lines = [(unit, *used, "total")]
        for label, held in rows.items():
            name = f"{counts[label]} × {label}" if counts[label] > 1 else label
            lines.append((name, *(cell(held[c]) for c in used), cell(sum(held.values()))))
        if self.bytes["margin"]:
            lines.append(("margin", *("" for _ in used), cell(self.bytes["margin"])))
        lines.append(("peak", *(cell(self.bytes[c]) for c in used), cell(self.peak)))
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        text = ["  ".join((line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:]))).rstrip() for line in lines]
        if self.choices:
            taken = Counter(", ".join(f"{k} {v}" for k, v in c.options.items()) for c in self.choices.values())
            text += ["", *(f"{count} matrices: {options}" for options, count in taken.most_common())]
        return "\n".join([*text, self.verdict()])

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain values, as JSON has them."""
        plain = asdict(self)
        plain["fitting"] = None if self.fitting is None else self.fitting.to_dict()
        plain["settings"] = {key: _plain(value) for key, value in self.settings.items()}
        return plain | {"peak": self.peak, "allocated": self.allocated, "fits": self.fits, "changes": self.changes}

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")


def _words(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | None) else str(value)


def plan(
    model: nn.Module | str | Any,
    optimizer: str = "galore",
    *,
    batch: int = 1,
    seq: int | None = None,
    accumulation: int = 1,
    dtype: torch.dtype | str | None = None,
    checkpointing: bool = False,
    layerwise: str = "off",
    gpu: int | float | str | None = None,
    device: str | None = None,
    keep: Iterable[str] = (),
    budget: int | float | str | None = None,
    probe: Callable[[nn.Module], Any] | None = None,
    ranks: Iterable[int] | None = None,
    roles: Mapping[str, float] | None = None,
    loss: Loss | None = None,
    **options: Any,
) -> MemoryPlan:
    """Predict the peak memory of a training step, and say what makes it fit.

    The step is run on tensors without memory: exact for the tensors that torch allocates, not for what libraries
    allocate behind its back. On a GPU the margin stands for those: 0.5 GiB of CUDA context, 96 MiB of workspaces and
    5 % of what comes and goes, which the allocator fragments; every tensor is rounded up to 512 bytes.

    Args:
        model: a module, which is not touched; the name of a LLaMA size (60m, 130m, 350m, 1b, 7b …) or a config of
            transformers, both of which need transformers.
        optimizer: a name that `create` takes.
        batch: sequences in a micro-batch.
        seq: tokens in a sequence; by default what the named size is trained with, or 1024.
        accumulation: micro-batches in an update.
        dtype: of weights and gradients, such as "bfloat16"; by default the model's.
        checkpointing: recompute the activations of every layer of a transformers model.
        layerwise: project gradients within backward: off, hooks or linear, by `project_in_backward(early=True)`.
        gpu: what it is to fit into, such as "24GB" (24·10⁹ bytes).
        device: where it will run, "cuda" or "cpu"; by default cuda if gpu is given.
        keep: settings that may not be changed to make it fit.
        budget: for the optimizer state, such as "2GiB": choose rank and bits of every matrix by integer programming
            (needs scipy), at the least loss Σ w·(energy lost); see `MemoryPlan.param_groups`.
        probe: with a budget: runs a few batches forward and backward on the model, whose gradients' singular values
            then say what a rank loses; by default the energies fall off as 1/k².
        ranks: with a budget: to choose from; 8 to 1024 in powers of two by default.
        roles: with a budget: weights of matrices by a part of their name; q_proj and k_proj count half by default.
        loss: from the model, batch and seq to the loss; by default that of a causal language model.
        **options: of `create`: rank, proj_type, …

    Raises:
        TypeError: the model is neither of these.
        ValueError: an option is out of range, or the budget is below the least possible, which is named.
        ImportError: transformers or scipy is needed and missing.
    """
    for name, value in (("batch", batch), ("seq", seq), ("accumulation", accumulation)):
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise ValueError(f"{name}={value!r} must be an int ≥ 1")
    device = ("cpu" if gpu is None else "cuda") if device is None else device
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r} must be cpu or cuda")
    if layerwise not in LAYERWISE:
        raise ValueError(f"layerwise={layerwise!r} must be one of {', '.join(LAYERWISE)}")
    capacity = None if gpu is None else bytes_of(gpu, "gpu")
    if isinstance(model, str):
        size = _size(model)
        seq = seq or size.seq_len
        if budget is None and projects(optimizer):
            options.setdefault("rank", size.rank)
    job = _Job(
        *(_module(model), optimizer, {"lr": 1e-3, **options}, batch, seq or 1024, accumulation, _dtype(dtype)),
        *(checkpointing, layerwise, device, loss or causal_loss),
    )
    if budget is not None:
        given = [key for key in ("rank", *BITS) if key in options]
        if given:
            raise ValueError(f"budget={budget!r} chooses {', '.join(given)} itself; leave {given[0]} out")
        job = replace(job, choices=_choices(job, bytes_of(budget, "budget"), probe, ranks, roles))
    name = model if isinstance(model, str) else type(job.model).__name__
    found = _plan(job, name, capacity)
    return found if found.fits else _fitted(job, found, name, frozenset(keep))


def _size(name: str) -> Size:
    if name not in SIZES:
        near = nearest(name, tuple(SIZES))
        raise ValueError(
            f"model={name!r} must be one of {', '.join(SIZES)}" + (f"; did you mean {near}?" if near else "")
        )
    return SIZES[name]


def _module(model: Any) -> nn.Module:
    """The module itself, or one without memory."""
    if isinstance(model, nn.Module):
        return model
    if not isinstance(model, str) and not hasattr(model, "model_type"):
        raise TypeError(f"model must be a module, a size or a config of transformers, not {type(model).__name__}")
    try:
        transformers = import_module("transformers")
    except ImportError as error:
        raise ImportError("a size or a config needs transformers: pip install 'subspace-optim[cli]'") from error
    config = transformers.LlamaConfig(**llama_options(_size(model))) if isinstance(model, str) else model
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config).train()


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype={dtype!r} must be a floating-point type such as 'float32' or 'bfloat16'")
    return found


def _choices(
    job: _Job,
    budget: int,
    probe: Callable[[nn.Module], Any] | None,
    ranks: Iterable[int] | None,
    roles: Mapping[str, float] | None,
) -> dict[str, Choice]:
    groups = _groups(job.model, job.options)
    spectra = None if probe is None else spectra_of(job.model, groups, probe)
    if job.dtype is not None:  # the state of a tensor can depend on its dtype, and never on its values
        groups = [
            {**g, "params": [(n, torch.empty_like(p, dtype=job.dtype, device="meta")) for n, p in g["params"]]}
            for g in groups
        ]
    return choose(
        groups,
        lambda groups: _from_groups(job.optimizer, groups, job.options),
        budget,
        spectra=spectra,
        roles=roles,
        ranks=RANKS if ranks is None else tuple(ranks),
    )


def _plan(job: _Job, name: str, capacity: int | None) -> MemoryPlan:
    result = _simulate(job)
    layers: dict[str, dict[str, int]] = defaultdict(dict)
    held = dict.fromkeys(CATEGORIES, 0)
    for (category, layer), count in result.held.items():
        held[category] += count
        layers[layer][category] = count
    if job.device == "cuda":
        moving = held["gradients"] + held["activations"] + held["workspace"]
        held["margin"] = CUDA_CONTEXT + CUDA_WORKSPACE + int(FRAGMENTATION * moving)
    dtype = next(iter(job.model.parameters())).dtype if job.dtype is None else job.dtype
    settings = {
        "model": name,
        "optimizer": job.optimizer,
        **{key: value for key, value in job.options.items() if key not in ("rank", "lr")},
        "dtype": str(dtype).removeprefix("torch."),
        "seq": job.seq,
        "device": job.device,
        "checkpointing": job.checkpointing,
        "layerwise": job.layerwise,
        "batch": job.batch,
        "accumulation": job.accumulation,
        "rank": result.rank,
    }
    return MemoryPlan(
        *(settings, result.parameters, held, dict(layers), result.phases, result.phase, result.projectable, capacity),
        choices=job.choices or {},
    )


# ---- what makes it fit ----------------------------------------------------------------------------------------------


def _changed(job: _Job, start: _Job, changes: Mapping[str, Any]) -> _Job:
    """The job with these settings; a smaller micro-batch is made up for by more of them."""
    fields = {key: value for key, value in changes.items() if key in ("checkpointing", "layerwise", "dtype", "batch")}
    options = {key: value for key, value in changes.items() if key not in fields}
    if "batch" in fields:
        fields["accumulation"] = -(-start.batch * start.accumulation // fields["batch"])
    return replace(job, **fields, options={**job.options, **options})


def _ladder(job: _Job, plan: MemoryPlan, keep: frozenset[str]) -> Iterator[tuple[str, Any]]:
    """Settings that save memory, the cheapest first: time, then rounding, then what the optimizer sees."""
    rungs: list[tuple[str, Any]] = []
    if not job.checkpointing and any(hasattr(job.model, name) for name in CHECKPOINTING):
        rungs.append(("checkpointing", True))
    if job.batch > 1:
        rungs.append(("batch", 1))
    if job.layerwise == "off" and plan.projectable:
        rungs.append(("layerwise", "hooks"))
    rungs += [(key, bits) for key, values in BITS.items() for bits in values if bits < job.options.get(key, 32)]
    if plan.settings["dtype"] == "float32":
        rungs.append(("dtype", torch.bfloat16))
    rank = plan.settings["rank"]
    while isinstance(rank, int) and rank > LEAST_RANK and not job.choices:
        rank = max(LEAST_RANK, rank // 2)
        rungs.append(("rank", rank))
    return (rung for rung in rungs if rung[0] not in keep)


def _fitted(start: _Job, found: MemoryPlan, name: str, keep: frozenset[str]) -> MemoryPlan:
    """The plan with what makes it fit: down the ladder until it does, then back whatever was not needed."""
    capacity = found.capacity
    assert capacity is not None
    least = found.peak
    before: dict[Any, int] = {}  # bytes before the first step, which bound a plan from below and cost no simulation

    def attempt(changes: Mapping[str, Any]) -> MemoryPlan | None:
        nonlocal least
        job = _changed(start, start, changes)
        key = job.dtype, job.layerwise, *sorted(job.options.items(), key=str)
        if key not in before:
            held = Counter[str]()
            for (category, _), count in _simulate(job, step=False).held.items():
                held[category] += count
            # A gradient for each weight, unless they are projected at once.
            before[key] = sum(held.values()) + held["weights"] * (job.layerwise == "off")
            before[key] += (CUDA_CONTEXT + CUDA_WORKSPACE) * (job.device == "cuda")
        if before[key] > capacity:
            least = min(least, before[key])
            return None
        plan = _plan(job, name, capacity)
        least = min(least, plan.peak)
        return plan if plan.fits else None

    changes: dict[str, Any] = {}
    fitting = None
    for setting, value in _ladder(start, found, keep):
        changes[setting] = value
        fitting = attempt(changes)
        if fitting is not None:
            break
    if fitting is None:
        return replace(found, least=least)
    for setting in list(changes)[-2::-1]:
        without = attempt({key: value for key, value in changes.items() if key != setting})
        if without is not None:
            del changes[setting]
            fitting = without
    batch = changes.get("batch")
    while batch is not None and 2 * batch < start.batch:
        larger = attempt({**changes, "batch": 2 * batch})
        if larger is None:
            break
        batch, fitting = 2 * batch, larger
    return replace(found, fitting=fitting)
