"""The step itself, run on tensors that have shapes and no memory.

The model's copy is made of fake tensors; forward, backward and the optimizer's step are the real ones. What is recorded
is when each storage is born and when it dies, in which phase and under which layer, so that the peak is where they
overlap most and there is no second formula for anything.

Of a list of layers that are alike, the first two and the last two are run:

    0 1 … 1 L-2 L-1    what the layers between them take and free is what layer 1 does, moved along

which holds where layers 1 and L-2 took and freed the same; where they did not, every layer is run.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from typing import Any, Literal, overload
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .. import philox, projectors, storage
from ..engine import REFRESH_ELEMENTS, SubspaceOptimizer, compensates
from ..kernels import native, reference, select
from ..layerwise import project_in_backward
from ..projectors import UNSET
from ..types import Bucket
from .job import Job, enable_checkpointing

CUDA_BLOCK = 512  # bytes that torch's CUDA allocator rounds every tensor up to
_ENDS = 2  # layers that are run at either end of a stack
_MIDDLE = (_ENDS - 1, _ENDS)  # positions, among what is run, between which others are left out


@dataclass(frozen=True, eq=False, slots=True)
class Stack:
    """A list of layers that are alike.

    Attributes:
        name: of the list.
        layers: the list.
        count: how many it holds.
    """

    name: str
    layers: nn.Module
    count: int

    @property
    def kept(self) -> tuple[int, ...]:
        """Numbers of the layers that are run."""
        return (*range(_ENDS), *range(self.count - _ENDS, self.count))

    @property
    def left_out(self) -> range:
        """Numbers of the others."""
        return range(_ENDS, self.count - _ENDS)

    def name_of(self, number: int) -> str:
        """Of the layer with this number."""
        return f"{self.name}.{number}".lstrip(".")

    @contextmanager
    def shortened(self) -> Iterator[None]:
        """For this time the list holds what is run, and no more."""
        whole = list(self.layers._modules.values())
        try:
            self._hold([whole[number] for number in self.kept])
            yield
        finally:
            self._hold(whole)

    def _hold(self, layers: Sequence[nn.Module | None]) -> None:
        self.layers._modules = {str(i): layer for i, layer in enumerate(layers)}


Place = tuple[Stack, int]  # a layer that is run, by its position among those
Names = Mapping[nn.Parameter, str]


@dataclass(slots=True)
class Storage:
    """One storage: what it is, and where it was born."""

    nbytes: int
    phase: str
    layer: str
    category: str


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the step.

    Attributes:
        phase: start, forward, backward or step; empty where what happens is no part of it.
        place: the layer that is at work, where it is one of a stack.
        begin: its first event.
    """

    phase: str
    place: Place | None
    begin: int


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the birth and the death of every storage that an op returns; a number that is asked for is 1.

    Args:
        block: bytes that a storage is rounded up to.
    """

    def __init__(self, block: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.block = block
        self.layers: list[str] = []  # the modules that are running, innermost last
        self.storages: list[Storage] = []
        self.events: list[tuple[int, int]] = []  # (storage, ±1)
        self.segments = [Segment("start", None, 0)]
        self._alive: dict[int, int] = {}  # address of the storage → its place in `storages`

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":  # where only a shape is asked for
                self.note(leaf)
        return out

    @property
    def phase(self) -> str:
        """The phase that the step is in."""
        return self.segments[-1].phase

    def begin(self, phase: str, place: Place | None = None) -> None:
        """Begin a segment, unless it is the one that is running."""
        if (phase, place) != (self.phase, self.segments[-1].place):
            self.segments.append(Segment(phase, place, len(self.events)))

    def note(self, tensor: Tensor) -> Storage:
        """The record of a tensor's storage, made if it is new."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._alive:
            number = self._alive[address] = len(self.storages)
            layer, forward = (self.layers[-1], True) if self.layers else (self.phase, self.phase == "forward")
            size = -(-storage.nbytes() // self.block) * self.block
            # What a module makes while backward runs is recomputed by checkpointing.
            self.storages.append(Storage(size, self.phase, layer, "activations" if forward else "workspace"))
            self.events.append((number, 1))
            weakref.finalize(storage, self._drop, address)
        return self.storages[self._alive[address]]

    def _drop(self, address: int) -> None:
        self.events.append((self._alive.pop(address), -1))

    def mark(self, tensor: Tensor, category: str, layer: str) -> None:
        """Say what a tensor is."""
        record = self.note(tensor)
        record.category, record.layer = category, layer

    def keep(self, category: str) -> None:
        """What was born in this phase and outlives it is of this category."""
        for number in self._alive.values():
            if self.storages[number].phase == self.phase:
                self.storages[number].category = category

    @property
    def held(self) -> int:
        """Bytes that are alive."""
        return sum(self.storages[number].nbytes for number in self._alive.values())

    def watch(self, model: nn.Module, stacks: Iterable[Stack]) -> None:
        """Follow which layer of the model is running, forward and, of a stack, backward."""
        for name in dict.fromkeys(layer_of(name) for name, _ in model.named_parameters()):
            module = model.get_submodule(name)
            module.register_forward_pre_hook(lambda *_, name=name: self.layers.append(name))
            module.register_forward_hook(self._out, always_call=True)
        for stack in stacks:
            for i, number in enumerate(stack.kept):
                layer = model.get_submodule(stack.name_of(number))
                layer.register_forward_pre_hook(lambda *_, place=(stack, i): self._enter(place))
                layer.register_forward_hook(lambda _, __, out, place=(stack, i): self._leave(out, place))

    def _out(self, *_: Any) -> None:
        self.layers.pop()

    def _enter(self, place: Place) -> None:
        if self.phase == "forward":
            self.begin("forward", place)

    def _leave(self, out: Any, place: Place) -> None:
        for leaf in tree_leaves(out) if self.phase == "forward" else ():
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(lambda _: self.begin("backward", place))  # type: ignore[no-untyped-call]

    def stretches(self) -> list[tuple[Segment, list[tuple[int, str, str]]]]:
        """Every segment, with the (±bytes, category, layer) of its events."""
        ends = [segment.begin for segment in self.segments[1:]] + [len(self.events)]
        found = []
        for segment, end in zip(self.segments, ends, strict=True):
            events = ((self.storages[n], sign) for n, sign in self.events[segment.begin : end])
            found.append((segment, [(sign * s.nbytes, s.category, s.layer) for s, sign in events]))
        return found


def layer_of(parameter: str) -> str:
    """The module that a parameter is accounted under: up to the first number in its name, or the module itself."""
    parts = parameter.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1] if numbers else parts[:-1])


# ---- layers that are alike ------------------------------------------------------------------------------------------


def stacks_of(model: nn.Module, optimizer: SubspaceOptimizer) -> list[Stack]:
    """The lists of layers that are alike and that the optimizer treats alike.

    Args:
        model: whose lists are looked for.
        optimizer: of its parameters.
    """
    plans = {p: (i, optimizer.plan_of(i, p)) for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    found: list[Stack] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or any(part.isdigit() for part in name.split(".")):
            continue
        layers = list(module.children())
        if len(layers) > 2 * _ENDS and all(
            _alike(layers[0], layer, i)
            and [plans.get(p) for p in layers[0].parameters()] == [plans.get(p) for p in layer.parameters()]
            and all(owners[id(p)] == 1 for p in layer.parameters())
            for i, layer in enumerate(layers)
        ):
            found.append(Stack(name, module, len(layers)))
    return found


def _alike(first: nn.Module, other: nn.Module, number: int) -> bool:
    """Whether a layer is like the first of its list: the same modules, shapes and settings, its number apart."""
    pairs = list(zip(first.named_modules(), other.named_modules(), strict=False))
    if len(pairs) != sum(1 for _ in first.modules()) or len(pairs) != sum(1 for _ in other.modules()):
        return False
    return all(
        (name, type(a), _shapes(a), a._buffers.keys()) == (same, type(b), _shapes(b), b._buffers.keys())
        and all(value == vars(b).get(key) or (value, vars(b).get(key)) == (0, number) for key, value in _settings(a))
        for (name, a), (same, b) in pairs
    )


def _shapes(module: nn.Module) -> list[Any]:
    tensors = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    return [(name, t.shape, t.stride(), t.dtype, t.requires_grad) for name, t in tensors]


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in vars(module).items() if isinstance(value, int | float | str | None))


Delta = tuple[str, int, str, str]  # (phase, ±bytes, category, layer)


def unfolded(recorder: Recorder, stacks: Sequence[Stack]) -> list[Delta] | None:
    """What the whole step takes and frees, in its order; None where the layers of a stack differ after all.

    Args:
        recorder: of a step that ran the ends of the stacks alone.
        stacks: they.
    """
    positions = {stack: {stack.name_of(n): i for i, n in enumerate(stack.kept)} for stack in stacks}
    visits: dict[Stack, list[tuple[int, list[Any]]]] = {stack: [] for stack in stacks}
    out: list[Delta] = []
    for segment, events in recorder.stretches():
        own, at = segment.place or (None, 0)
        for stack, places in positions.items() if segment.phase in ("forward", "backward") else ():
            near = range(at - 1, at + 2) if stack is own else ()
            far = [(places[e[2]], *e) for e in events if places.get(e[2]) in _MIDDLE and places[e[2]] not in near]
            if not far:
                continue
            # What the layers left out do where another is at work is known only if it is to leave, one like the other.
            first, second = ([e[1:3] for e in far if e[0] == place] for place in _MIDDLE)
            if first != second or any(size > 0 for size, *_ in events):
                return None
            out += (
                (segment.phase, *e[1:3], f"{stack.name}.{n}") for e in far if e[0] == _MIDDLE[0] for n in stack.left_out
            )
        if own is None:
            out += ((segment.phase, *event) for event in events if segment.phase)
            continue
        offsets = [positions[own][layer] - at if layer in positions[own] else layer for *_, layer in events]
        numbers = [own.kept[at]]
        if at == _MIDDLE[0]:
            numbers += own.left_out
            numbers.sort(reverse=visits[own][-1:] != [] and visits[own][-1][0] > at)
        visits[own].append((at, [(*event[:2], offset) for event, offset in zip(events, offsets, strict=True)]))
        out += (
            (segment.phase, size, category, own.name_of(number + off) if off in (-1, 0, 1) else layer)
            for number in numbers
            for (size, category, layer), off in zip(events, offsets, strict=True)
        )
    for seen in visits.values():
        for begin in range(0, len(seen), 2 * _ENDS):
            run = seen[begin : begin + 2 * _ENDS]
            order = [at for at, _ in run]
            if sorted(order) not in (order, order[::-1]) or len(set(order)) != 2 * _ENDS or run[1][1] != run[2][1]:
                return None
    return out


# ---- the simulated step ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """What a simulation found.

    Attributes:
        parameters: of the model.
        rank: of the projected matrices; of their first group where a budget chose.
        held: bytes at the peak, by (category, layer).
        phases: the peak of each.
        phase: of the peak.
        projectable: whether gradients may be projected within backward.
        ranks: of the matrices of every layer; 0 where one is dense.
    """

    parameters: int
    rank: int | float | None
    held: dict[tuple[str, str], int]
    phases: dict[str, int]
    phase: str
    projectable: bool
    ranks: dict[str, tuple[int, ...]]


def trace(job: Job, limit: float = math.inf) -> Trace:
    """Run a step.

    Args:
        job: the step.
        limit: where more bytes than these are there before the step, it is not run.
    """
    return _run(job, limit, fold=True) or _run(job, limit, fold=False)


@overload
def _run(job: Job, limit: float, fold: Literal[False]) -> Trace: ...
@overload
def _run(job: Job, limit: float, fold: bool) -> Trace | None: ...
def _run(job: Job, limit: float, fold: bool) -> Trace | None:
    """None where it was to fold layers that differ."""
    recorder = Recorder(CUDA_BLOCK if job.device == "cuda" else 1)
    with ExitStack() as stack:
        for context in (
            FakeTensorMode(allow_non_fake_inputs=True),
            mock.patch.multiple(FakeTensor, create=True, tolist=_as_list, data_ptr=_address),
            *_kernels(job.device),
            mock.patch.object(reference, "_chunks", _first_chunk(reference._chunks)),
            *_shortcuts(recorder),
        ):
            stack.enter_context(context)
        model = _twin(job.model, job.dtype)
        if job.checkpointing:
            enable_checkpointing(model)
        names = {param: name for name, param in model.named_parameters()}
        stacks: list[Stack] = []
        with recorder:
            for name, tensor in chain(model.named_parameters(), model.named_buffers()):
                recorder.mark(tensor, "weights", layer_of(name))
            optimizer = job.make(model)
            optimizer.allocate_state()
            _mark_state(recorder, names, optimizer)
            if recorder.held <= limit:
                if fold:
                    stacks = stacks_of(model, optimizer)
                if job.layerwise == "off":
                    _set_ages(optimizer)
                else:
                    project_in_backward(model, optimizer, linear=job.layerwise == "linear", early=True)
                recorder.watch(model, stacks)
                with ExitStack() as short:
                    for one in stacks:
                        short.enter_context(one.shortened())
                    for _ in range(min(job.accumulation, 2)):  # the second meets the gradients of the first
                        _pass(recorder, job, model, optimizer, names)
                recorder.begin("")
                _stand_in(recorder, stacks, optimizer, names)
                recorder.begin("step")
                aside = _set_aside(optimizer)
                optimizer.step()
                del aside
        deltas = unfolded(recorder, stacks)
        # Of the first group: those of embeddings and head come behind it.
        rank = next((group["rank"] for group in optimizer.param_groups if group["rank"] is not None), None)
        parameters = sum(p.numel() for p in model.parameters())
        found = None if deltas is None else _peak(deltas)
        projectable = not optimizer.whole_gradient
        found_ranks = _ranks(optimizer, names)
    return None if found is None else Trace(parameters, rank, *found, projectable, found_ranks)


def _ranks(optimizer: SubspaceOptimizer, names: Names) -> dict[str, tuple[int, ...]]:
    found: dict[str, set[int]] = defaultdict(set)
    for index, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            if param.ndim >= 2:
                found[layer_of(names[param])].add(optimizer.plan_of(index, param).rank)
    return {layer: tuple(sorted(ranks)) for layer, ranks in found.items()}


def _pass(recorder: Recorder, job: Job, model: nn.Module, optimizer: SubspaceOptimizer, names: Names) -> None:
    """One micro-batch."""
    recorder.begin("forward")
    loss = job.loss(model, job.batch, job.seq)
    recorder.begin("backward")
    loss.backward()  # type: ignore[no-untyped-call]
    recorder.begin("backward")
    del loss
    recorder.keep("gradients")
    _mark_gradients(recorder, optimizer, names)


def _peak(deltas: Sequence[Delta]) -> tuple[dict[tuple[str, str], int], dict[str, int], str]:
    """(bytes at the peak by (category, layer), peak by phase, phase of the peak)."""
    now = most = at = 0
    phases: dict[str, int] = {}
    for i, (phase, size, _, _) in enumerate(deltas):
        now += size
        phases[phase] = max(phases.get(phase, 0), now)
        if now > most:
            most, at = now, i
    held = Counter[tuple[str, str]]()
    for _, size, category, layer in deltas[: at + 1]:
        held[category, layer] += size
    return {key: value for key, value in held.items() if value}, phases, deltas[at][0]


def _twin(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy of the model on fake tensors of the CPU, ties and hooks as they were."""

    def fake(tensor: Tensor) -> Tensor:
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind, device="cpu")
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    held = tree_leaves([vars(module) for module in model.modules()])  # with what is neither weight nor buffer
    return copy.deepcopy(model, {id(x): fake(x) for x in held if isinstance(x, Tensor)})


def _kernels(device: str) -> Iterator[Any]:
    """On a GPU kernels are fused, as the ops of ops.py are in a simulation, whatever this machine has.

    They round as they write, too: neither a seed nor what rounding has taken (Kahan) costs them memory. A bucket is
    stepped in parts as large as those that are decoded.
    """
    if device == "cuda":
        yield mock.patch.dict(select.IMPLS, {"native": lambda plan: None})
        yield mock.patch.object(native, "COMPENSATES", True, create=True)
        yield mock.patch.object(Bucket, "seeds", ())
        yield mock.patch.object(storage, "WORK_BYTES", storage.OPEN_BYTES)


def _shortcuts(recorder: Recorder) -> Iterator[Any]:
    """Functions of many ops, which take the same for arguments of the same shape."""
    for module, name, key_of in (
        (philox, "_rounds", _key_of_rounds),
        (projectors, "random_bases", lambda seeds, shape, *_: (len(seeds), shape)),
        (storage, "allocated", lambda plan, _: plan),
    ):
        yield mock.patch.object(module, name, _seen_before(recorder, getattr(module, name), key_of))


def _as_list(tensor: Tensor) -> Any:
    """Of a fake tensor: ones, and for the ints of a stacked state "not yet set"."""
    value: Any = 1.0 if tensor.is_floating_point() else UNSET
    for length in reversed(tensor.shape):
        value = [value] * length
    return value


def _address(tensor: Tensor) -> int:
    """Of a fake tensor: what its views share, and nothing else does."""
    return tensor.untyped_storage()._cdata


def _mark_state(recorder: Recorder, names: Names, optimizer: SubspaceOptimizer) -> None:
    for param, name in names.items():
        for key, value in optimizer.state.get(param, {}).items():
            if isinstance(value, Tensor):
                recorder.mark(value, "basis" if key.startswith("basis") else "moments", layer_of(name))


def _mark_gradients(recorder: Recorder, optimizer: SubspaceOptimizer, names: Names) -> None:
    for param, name in names.items():
        for grad in (param.grad, *optimizer.lows.get(param, ())):
            if grad is not None:
                recorder.mark(grad, "gradients", layer_of(name))


def _stand_in(recorder: Recorder, stacks: Iterable[Stack], optimizer: SubspaceOptimizer, names: Names) -> None:
    """What the layers that were not run would have left for the step: what their like has left."""
    for stack in stacks:
        layers = list(stack.layers.children())
        for like, *others in zip(*(layers[i].parameters() for i in (_ENDS - 1, *stack.left_out)), strict=True):
            for param in others:
                if like.grad is not None:
                    param.grad = torch.empty_like(like.grad)
                if like in optimizer.lows:
                    optimizer.lows[param] = [torch.empty_like(low) for low in optimizer.lows[like]]
                if optimizer.in_backward and "age" in optimizer.state[like]:
                    optimizer.state[param]["age"] = optimizer.state[like]["age"]
    _mark_gradients(recorder, optimizer, names)


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
            alone = compensates(rule, select.resolve(optimizer.backend, plan))
            opens = storage.open_bytes(plan, rule.takes_codes, alone)
            if seen[index, plan] * opens >= storage.WORK_BYTES:
                aside += [param.grad, optimizer.lows.pop(param, None)]
                param.grad = None
            seen[index, plan] += plan.stack or 1
    return aside


def _seen_before(
    recorder: Recorder, function: Callable[..., Any], key_of: Callable[..., Hashable | None]
) -> Callable[..., Any]:
    """The function, of which a call like one that has been met takes at once what that one took, and gives its like.

    Args:
        recorder: of the step.
        function: makes tensors and changes none.
        key_of: of its arguments: what the shapes of its results follow from, None where it is to be called.
    """
    met: dict[Hashable, tuple[int, Any]] = {}

    def empty(like: Any) -> Any:
        return torch.empty(like.shape, dtype=like.dtype, device=like.device) if isinstance(like, _Like) else like

    def take(*arguments: Any) -> Any:
        key = key_of(*arguments)
        if key is None:
            return function(*arguments)
        if key not in met:
            begin = len(recorder.events)
            out = function(*arguments)
            sizes = (sign * recorder.storages[number].nbytes for number, sign in recorder.events[begin:])
            kept = sum(leaf.nbytes for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
            met[key] = max(0, max(accumulate(sizes), default=0) - kept), tree_map(_Like.of, out)
            return out
        workspace, likes = met[key]
        out = tree_map(empty, likes)
        torch.empty(workspace, dtype=torch.uint8, device="cpu")
        return out

    return take


@dataclass(frozen=True, slots=True)
class _Like:
    """What an empty tensor is made from."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: Any) -> Any:
        return cls(value.shape, value.dtype, value.device) if isinstance(value, Tensor) else value


def _key_of_rounds(seed: Any, *words: Any) -> Hashable | None:
    """Philox's ten rounds are 160 ops, and its words as many as the first of them."""
    return (words[0].shape, getattr(seed, "shape", ())) if isinstance(words[0], Tensor) else None


def _first_chunk(chunks: Callable[[Tensor, int], Iterable[slice]]) -> Callable[[Tensor, int], Iterable[slice]]:
    """Tensors are coded chunk by chunk, of which each takes what the first took."""
    return lambda x, axis: islice(chunks(x, axis), 1)
