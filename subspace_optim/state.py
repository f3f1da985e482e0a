"""What an optimizer holds: its groups, how each tensor is stepped, and the state of every tensor.

All of the engine but the step: tensors that cannot be stepped are refused, state is made, saved, loaded and told of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial, wraps
from itertools import compress
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from . import distributed, philox, storage
from .distributed import Axes
from .hyperparameters import canonical, check, plain
from .projectors import UNSET, Projector
from .rules import Rule
from .types import Plan, State, make_plan, scalar, stack_states, state_axes, unstack_state

P = ParamSpec("P")
T = TypeVar("T")
_GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, spread evenly whatever their number

_Layout = dict[str, tuple[tuple[int, ...] | None, torch.dtype | None]]  # of state tensors; an int has neither
_META = torch.device("meta")
LAYOUT_KEYS = ("rank", "proj_type", "batch_dims", "state_bits", "basis_bits", "rounding")  # of a group, for its plans
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Seat:
    """What a step needs to know of the parameter at a position, looked up anew only when something of it has changed.

    It holds no tensor: whoever lets go of one frees it.

    Attributes:
        position: in the optimizer.
        makings: what it follows from, beside the shape, the dtype and the device of the parameter.
        plan: how the parameter is stepped.
        shapes: of its state by key; None of an int.
        orders: the places of its matrices among all that the optimizer steps.
        streams: their random seeds.
    """

    position: int
    makings: tuple[Any, ...]
    plan: Plan
    shapes: dict[str, tuple[int, ...] | None]
    orders: list[int]
    streams: list[int]

    def fits(self, param: Tensor, makings: tuple[Any, ...]) -> bool:
        """Whether the plan is still that of this parameter."""
        plan = self.plan
        same = plan.shape == param.shape and plan.dtype == param.dtype and plan.device == param.device
        return same and self.makings == makings


@dataclass(slots=True)
class _Match:
    """A parameter and a state for it, beside what it needs of one."""

    name: str
    param: Tensor
    plan: Plan
    saved: State
    wanted: _Layout
    axes: dict[str, tuple[Axes, tuple[int, ...]]]


def in_no_mode(function: Callable[P, T]) -> Callable[P, T]:
    """Make the work of an optimizer the same in whatever modes the caller is.

    Autocast would round the products that bases come from; inference mode makes state that no later step may write.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode(False), torch.no_grad(), torch._C._DisableAutocast():
            return function(*args, **kwargs)

    return run


class StatefulOptimizer(Optimizer):
    """The groups and the state of a `SubspaceOptimizer`, which adds the step.

    Attributes:
        projector: which subspace; None leaves every tensor dense.
        rule: what happens inside it.
        dense_rule: the rule of tensors that are not projected.
        stagger: whether the refreshes of different tensors are spread over the gap.
        seed: of random bases, starting points and rounding.
        backend: auto, or the name of one.
        lows: R of the tensors whose gradients were projected ahead of the coming step, one for each matrix.
    """

    projector: Projector | None
    rule: Rule
    dense_rule: Rule
    stagger: bool
    seed: int
    backend: str
    lows: dict[Tensor, list[Tensor]]
    _skips: dict[torch.device, Tensor]  # counted where the parameters are
    _seats: dict[int, Seat]  # by the id of the parameter, which another one may have had before it
    _places: dict[int, tuple[int, int]]  # likewise: where in the groups it was found last

    @property
    def skipped_updates(self) -> int:
        """How many updates of one tensor a gradient that was not finite has cost; a GPU is waited for."""
        return sum(int(count) for count in self._skips.values())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does; keys of ours that are missing take the constructor's values.

        Raises:
            ValueError: a value is out of range, or a key is misspelt.
            TypeError: a parameter is of a type that cannot be stepped.
        """
        where = f"{type(self).__name__}: group {len(self.param_groups)}"
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"{where} must be a dict with the key 'params', and is a {type(param_group).__name__}")
        group = canonical(param_group, where)
        self._check_group({**self.defaults, **group}, f"group {len(self.param_groups)}")
        params = group["params"]
        if not isinstance(params, set):  # which torch refuses
            group["params"] = [params] if isinstance(params, Tensor) else list(params)
            taken = {id(param): name_in(self.param_groups[g], i) for _, g, i, param in self._positions()}
            for i, entry in enumerate(group["params"]):
                name, param = entry if isinstance(entry, tuple) else (f"parameter {i}", entry)
                self._refuse_param(param, name, where, taken)
        super().add_param_group(group)

    def _check_group(self, group: dict[str, Any], which: str) -> None:
        where = f"{type(self).__name__}: {which}"
        check(group, where)
        if group["rank"] is not None and self.projector is None:
            raise ValueError(f"{where}: rank={group['rank']!r} needs a projector, and this optimizer has none")

    @staticmethod
    def _refuse_param(param: Any, name: str, where: str, taken: dict[int, str]) -> None:
        if not isinstance(param, Tensor):
            raise TypeError(f"{where}: {name} is a {type(param).__name__}; give tensors or (name, tensor) pairs")
        if is_lazy(param):
            raise ValueError(f"{where}: {name} has no shape yet; run its lazy module once before")
        name = f"{where}: {name} of shape {tuple(param.shape)}"
        if not (param.is_leaf or param.retains_grad):
            raise ValueError(f"{name} is a non-leaf Tensor, the result of a computation; give the parameter itself")
        if id(param) in taken:
            raise ValueError(f"{name} is {taken[id(param)]} as well; a tensor may appear once")
        taken[id(param)] = name
        if param.dtype not in DTYPES and param.requires_grad:  # quantised weights are frozen
            raise not_optimizable(f"{name} is", param.dtype)
        if param.layout != torch.strided and param.requires_grad:
            raise TypeError(f"{name} is {param.layout}; optimizable are dense tensors")
        if param.requires_grad and any(
            n > 1 and not stride for n, stride in zip(param.shape, param.stride(), strict=True)
        ):
            raise ValueError(f"{name} is expanded, so that its elements share memory; give clone() of it")
        try:
            distributed.Layout.of(param)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None

    def _refuse_flattened(self) -> None:
        """Without this, wrappers that flatten weights would turn a projection into AdamW without a word."""
        params = [param for _, _, _, param in self._positions()]
        who = next(filter(None, map(distributed.flattened_by, params)), None)
        asked = any(group["rank"] is not None for group in self.param_groups)
        if who and asked and all(param.ndim < 2 for param in params):
            own = type(self).__name__
            raise ValueError(
                f"{own}: {who} has flattened every parameter, but a projection needs matrices. Shard with "
                "torch.distributed.fsdp.fully_shard (FSDP2), which keeps their shapes; or use DDP, with "
                f"torch.distributed.optim.ZeroRedundancyOptimizer(params, {own}, ...) to spread the state (ZeRO-1); "
                "FSDP1 keeps shapes under use_orig_params=True with ShardingStrategy.NO_SHARD alone"
            )

    def plan_of(self, index: int, param: Tensor) -> Plan:
        """How a tensor of the group with this index is stepped."""
        seat, group = self._seats.get(id(param)), self.param_groups[index]
        if seat is not None and seat.fits(param, self._makings(param, self._options(group))):
            return seat.plan
        return plan_for(param, group)

    def index_of(self, param: Tensor) -> int | None:
        """The index of the group that a tensor is in by now; None where it is in none."""
        groups, (index, i) = self.param_groups, self._places.get(id(param), (0, 0))
        if index < len(groups) and i < len(groups[index]["params"]) and groups[index]["params"][i] is param:
            return index
        self._places = {id(own): (index, i) for _, index, i, own in self._positions()}
        return self._places.get(id(param), (None, None))[0]

    def name_of(self, param: Tensor) -> str:
        """What errors call a tensor of this optimizer."""
        return next(name_in(self.param_groups[index], i) for _, index, i, own in self._positions() if own is param)

    def _options(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """All that the seats of a group follow from, but for the parameters themselves."""
        return (*(group[key] for key in LAYOUT_KEYS), self.projector, self.rule, self.dense_rule, self.seed)

    @staticmethod
    def _makings(param: Tensor, options: tuple[Any, ...]) -> tuple[Any, ...]:
        return (options, distributed.Layout.of(param)) if distributed.is_sharded(param) else (options, None)

    def _seat(self, position: int, param: Tensor, group: dict[str, Any], options: tuple[Any, ...]) -> Seat:
        """The seat of a parameter of a group with these `_options`."""
        makings, seat = self._makings(param, options), self._seats.get(id(param))
        if seat is None or seat.position != position or not seat.fits(param, makings):
            plan = plan_for(param, group)
            shapes = {key: shape for key, (shape, _) in self._wanted(plan).items()}
            orders = [position + j for j in plan.members]
            streams = [self._stream(plan, position, j) for j in plan.members]
            seat = self._seats[id(param)] = Seat(position, makings, plan, shapes, orders, streams)
        return seat

    def _check_state(self, position: int, index: int, i: int, param: Tensor, seat: Seat) -> None:
        """Refuse state that is not of this plan; bring it along where the parameter has been moved or cast."""
        group, state, shapes, plan = self.param_groups[index], self.state[param], seat.shapes, seat.plan
        own = {key: getattr(value, "shape", None) for key, value in state.items()}
        wrong = own != shapes and {key for key in shapes.keys() | own.keys() if own.get(key) != shapes.get(key)}
        if wrong:
            why = storage.mismatch(plan.whole, state)
            if why is None:
                key = "exp_avg" if "exp_avg" in wrong else min(wrong)
                why = f"{key} of shape {_shape(state.get(key))}, but rank={group['rank']!r} and "
                why += f"proj_type={group['proj_type']!r} need {shapes.get(key)}"
            raise ValueError(f"{name_in(group, i)} has {why}; keep what the run began with")
        if not follows(plan, state):
            state.update(self._adopted(self._match(position, index, i, param, group, state)))

    def _init_state(self, plan: Plan, group: dict[str, Any], position: int) -> State:
        numbers = plan.members or [0]  # a rank without a matrix of the stack has state of its shape, and no elements
        members = [self._init_member(plan, group, position, j) for j in numbers]
        if plan.stack is None:
            state = members[0]
        else:
            state = {key: column[: plan.stack] for key, column in stack_states(members).items()}
        for key, (axes, shape) in self._axes(plan, group, position).items():
            state[key] = plan.sharding.spread(state[key], axes, shape)
        return state

    def _wanted(self, plan: Plan) -> _Layout:
        return _layout(plan.whole, self.dense_rule if plan.side is None else self.rule, self.projector)

    def _axes(self, plan: Plan, group: dict[str, Any], position: int) -> dict[str, tuple[Axes, tuple[int, ...]]]:
        """The state tensors that are DTensors: all of a sharded parameter's but the step count."""
        if plan.sharding.mesh is None:
            return {}
        axes = state_axes(plan, lambda other: self._init_member(other, group, position, 0))
        return {key: (carried, shape) for key, (carried, shape) in axes.items() if shape}

    def _init_member(self, plan: Plan, group: dict[str, Any], position: int, j: int) -> State:
        """State of one matrix, or of a dense tensor."""
        if plan.side is None:
            return storage.allocated(plan, self.dense_rule.init)
        member = storage.allocated(plan, partial(self._init_matrix, self._stream(plan, position, j)))
        if member["age"] != UNSET:
            member["age"] += self._offset(position + j, group)
        return member

    @in_no_mode
    def allocate_state(self) -> None:
        """Create the state of every parameter now instead of at its first step, so that its memory is taken."""
        for position, index, _, param in self._positions():
            if param.requires_grad and param.numel() and not self.state[param]:
                group = self.param_groups[index]
                self.state[param].update(self._init_state(plan_for(param, group), group, position))

    def _init_matrix(self, stream: int, plan: Plan) -> State:
        assert self.projector is not None
        return self.rule.init(plan) | self.projector.init(plan, stream)

    def _offset(self, order: int, group: dict[str, Any]) -> int:
        """How much earlier than a whole gap the first renewal comes."""
        if not (self.stagger and self.projector is not None and self.projector.periodic):
            return 0
        return int(order * _GOLDEN % 1 * group["update_proj_gap"])

    def _stream(self, plan: Plan, position: int, j: int) -> int:
        """The seed of the j-th matrix of the parameter at a position."""
        seed = self._seed(position)
        return seed if plan.stack is None else philox.mix(seed, j)

    def _seed(self, position: int) -> int:
        return philox.mix(self.seed, position)

    def _positions(self) -> Iterator[tuple[int, int, int, Tensor]]:
        """(position in the optimizer, group, position in the group, parameter): seeds follow the first."""
        position = 0
        for index, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                yield position, index, i, param
                position += 1

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the `method` by which the state is to be read: a load compares it.

        Once there is state, every parameter that requires a gradient has some: torch.distributed.checkpoint reads into
        a fresh optimizer, for which it makes all state, and would miss what a checkpoint left out because a parameter
        has not had a gradient yet. Its helpers (get_optimizer_state_dict) leave the method out. What has left the
        groups is kept here, and not saved.
        """
        if self.state:
            self.allocate_state()
        strays = {param: self.state.pop(param) for param in self.state.keys() - {p for *_, p in self._positions()}}
        try:
            saved = super().state_dict()  # which knows no number for them
        finally:
            self.state.update(strays)
        groups = [{key: plain(value) for key, value in group.items()} for group in saved["param_groups"]]
        return {**saved, "param_groups": groups, "method": self._method()}  # schedulers write what functions return

    def _method(self) -> dict[str, str]:
        """What may read state of the same keys and shapes in another way."""
        parts = {"projector": self.projector, "rule": self.rule, "dense_rule": self.dense_rule}
        return {name: part.keeps for name, part in parts.items() if part is not None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, as torch does, but keep the dtypes it was saved in and share no memory with it.

        Whole tensors go into sharded parameters, and sharded ones into whole parameters: every rank has to call it.

        Raises:
            ValueError: the state is of another optimizer, rule, rank or model, or of no parameter; or its parameters,
                by their names, come in another order; or an option of a group is out of range. Nothing has been changed
                then.
            TypeError: it is no dict.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(
                "load_state_dict needs what state_dict() of an optimizer gave, a dict of 'state' and 'param_groups', "
                f"not {type(state_dict).__name__}"
            )
        states: dict[Tensor, State] = {}

        def inspect(_: Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
            self._check_keys(incoming)
            for index, group in enumerate(incoming["param_groups"]):
                self._check_group({**self.defaults, **group}, f"group {index} of the checkpoint")
            matches = list(self._matched(incoming))
            self._check_order(incoming["param_groups"])
            for match in matches:
                self._check_loaded(match)
                self._check_method(match, incoming.get("method", {}))
            self._check_finite(matches)
            states.update((match.param, self._adopted(match)) for match in matches)
            return {**incoming, "state": {}}  # torch would cast it to the dtype of the parameters

        def restore(_: Optimizer) -> None:
            self.state.update(states)

        # As hooks, so that hooks of the user's run before and after in the usual order.
        handles = (
            self.register_load_state_dict_pre_hook(inspect),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _matched(self, state_dict: dict[str, Any]) -> Iterator[_Match]:
        """The parameters that the state dict has state for."""
        groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in groups], [len(group["params"]) for group in self.param_groups]
        if sizes[0] != sizes[1]:
            return  # torch's own message says it
        for position, index, i, param in self._positions():
            saved = state_dict["state"].get(groups[index]["params"][i])
            if saved:
                group = {**self.defaults, **groups[index], "params": self.param_groups[index]["params"]}
                yield self._match(position, index, i, param, group, saved)

    def _match(self, position: int, index: int, i: int, param: Tensor, group: dict[str, Any], state: State) -> _Match:
        plan = plan_for(param, group)
        axes, wanted = self._axes(plan, group, position), self._wanted(plan)
        counts = {key for key, (shape, _) in wanted.items() if shape == ()}  # `basis_step` once was an int
        saved = {k: scalar(v) if k in counts and isinstance(v, int) else v for k, v in state.items()}
        return _Match(name_in(self.param_groups[index], i), param, plan, saved, wanted, axes)

    @staticmethod
    def _check_keys(state_dict: dict[str, Any]) -> None:
        """Refuse what is no state dict of an optimizer, and state that would be left out without a word."""
        if not {"state", "param_groups"} <= set(state_dict):
            raise ValueError(
                "load_state_dict needs what state_dict() of an optimizer gave, a dict of 'state' and 'param_groups'; "
                f"this holds {', '.join(map(str, list(state_dict)[:5]))}"
            )
        numbers = {number for group in state_dict["param_groups"] for number in group["params"]}
        left = [key for key in state_dict["state"] if key not in numbers]
        if left:
            raise ValueError(
                f"the checkpoint has state under {left[0]!r}, which is in none of its groups' params; JSON turns the "
                "numbers into strings: make ints of them again, or remove what belongs to no parameter"
            )

    def _check_order(self, groups: list[dict[str, Any]]) -> None:
        """Refuse parameters whose names tell of another order: state goes by the order alone, as in torch."""
        saved = [str(name) for group in groups for name in group.get("param_names", ())]
        names = [str(name) for group in self.param_groups for name in group.get("param_names", ())]
        if saved != names and sorted(saved) == sorted(names):
            there, here = next(pair for pair in zip(saved, names, strict=True) if pair[0] != pair[1])
            raise ValueError(
                f"the checkpoint has {there} in the place of {here}; give the parameters in the order of the run that "
                "wrote it"
            )

    def _check_loaded(self, match: _Match) -> None:
        if why := storage.mismatch(match.plan.whole, match.saved):
            raise ValueError(f"{match.name}: the checkpoint holds {why}; set that option as in the run that wrote it")
        if set(match.saved) != set(match.wanted):
            raise ValueError(
                f"{match.name}: the checkpoint holds {', '.join(sorted(match.saved))}, but {type(self).__name__} keeps "
                f"{', '.join(sorted(match.wanted))}; load it into the optimizer, with the rank and options, that wrote "
                "it"
            )
        for key, (shape, _) in match.wanted.items():
            given, needed = _describe(match.saved[key]), "of type int" if shape is None else _described(shape)
            if given != needed:
                raise ValueError(
                    f"{match.name}: the checkpoint's {key} is {given}, but a parameter of shape "
                    f"{tuple(match.param.shape)} needs {needed}; load it into the model and groups that wrote it"
                )

    @staticmethod
    def _check_finite(matches: list[_Match]) -> None:
        """Refuse state with NaN or infinity; what one rank has of it is refused by all, who would wait for that one."""
        keys = [[key for key, (shape, _) in match.wanted.items() if shape is not None] for match in matches]
        parts = []
        for match, own in zip(matches, keys, strict=True):
            mesh = match.plan.sharding.mesh
            broken = [not bool(distributed.local(match.saved[key]).isfinite().all()) for key in own]
            flags = torch.tensor(broken, dtype=torch.int32, device="cpu" if mesh is None else mesh.device_type)
            parts.append((match.plan.sharding, [] if mesh is None else list(range(mesh.ndim)), flags))
        for match, own, flags in zip(matches, keys, distributed.together(dist.ReduceOp.MAX, parts), strict=True):
            key = next(compress(own, flags.tolist()), None)
            if key is not None:
                raise ValueError(f"{match.name}: the checkpoint's {key} is not finite; take an earlier checkpoint")

    def _check_method(self, match: _Match, saved: dict[str, str]) -> None:
        """Refuse state that would be read otherwise than it was written; older checkpoints do not tell."""
        own = self._method()
        for part in ("dense_rule",) if match.plan.side is None else ("projector", "rule"):
            if saved.get(part, own[part]) != own[part]:
                raise ValueError(
                    f"{match.name}: the checkpoint is of the {part} {saved[part]}, whose state {own[part]} would "
                    f"misread; load it into an optimizer with that {part}"
                )

    @classmethod
    @in_no_mode
    def _adopted(cls, match: _Match) -> State:
        """The state in question in its own dtypes, where and as this parameter's is kept; it shares no memory."""
        return {
            key: cls._placed(match, key, value.detach()) if isinstance(value, Tensor) else value
            for key, value in match.saved.items()
        }

    @staticmethod
    def _placed(match: _Match, key: str, value: Tensor) -> Tensor:
        axes, _ = match.axes.get(key, (None, None))
        value = distributed.whole(value) if axes is None else match.plan.sharding.placed(value, axes)
        # Ints of stacked states are read at every step: on a GPU that would wait for it.
        dtype = match.wanted[key][1]
        here = dtype != torch.int64 or axes is not None
        device = match.param.device if here else torch.device("cpu")
        return value.to(device, dtype, copy=True, memory_format=torch.contiguous_format)

    def __getstate__(self) -> dict[str, Any]:
        own = ("projector", "rule", "dense_rule", "stagger", "seed", "backend")
        return {**super().__getstate__(), **{key: getattr(self, key) for key in (*own, "_skips")}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lows = {}  # of other bases
        self._seats, self._places = {}, {}
        self.defaults.pop("differentiable", None)  # put there by torch; groups of a checkpoint have no such key
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def state_bytes(self) -> int:
        """Memory held here by all state tensors, every storage counted once; of sharded ones, their shards."""
        values = (distributed.local(value) for state in self.state.values() for value in state.values())
        tensors = (value for value in values if isinstance(value, Tensor))
        return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())

    def summary(self) -> str:
        """A table of what is projected, what is dense, and why; one line for tensors that are treated alike."""
        rows: dict[tuple[str, str, str], list[str]] = {}
        for _, index, i, param in self._positions():
            plan = plan_for(param, self.param_groups[index])
            how = f"{plan.side}, rank {plan.rank}" if plan.side else "dense"
            key = (how, "×".join(map(str, param.shape)) or "scalar", plan.reason if param.requires_grad else "frozen")
            rows.setdefault(key, []).append(name_in(self.param_groups[index], i))
        lines = [
            (how, shape, str(len(names)), names[0] + (", …" if len(names) > 1 else ""), reason)
            for (how, shape, reason), names in sorted(rows.items(), key=lambda row: row[0][0] == "dense")
        ]
        lines.insert(0, ("step", "shape", "count", "tensors", "why dense"))
        widths = [max(len(line[column]) for line in lines) for column in range(5)]
        cells = ((cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)
        return "\n".join("  ".join(row).rstrip() for row in cells)

    def __repr__(self) -> str:
        parts = f"projector={self.projector}, rule={self.rule}"
        return f"{super().__repr__()}\n{parts}\n{self.summary()}"


def plan_for(param: Tensor, group: dict[str, Any]) -> Plan:
    """How a tensor of the group is stepped."""
    options = (group[key] for key in LAYOUT_KEYS)
    try:
        return make_plan(tuple(param.shape), param.dtype, param.device, *options, distributed.Layout.of(param))
    except ValueError as error:
        i = next(i for i, own in enumerate(group["params"]) if own is param)
        raise ValueError(f"{name_in(group, i)} {error}") from None


def follows(plan: Plan, state: State) -> bool:
    """Whether a state is where its tensor is, and in its precision: the tensor may have been moved or cast."""
    step: Tensor = state["step"]
    return step.dtype == plan.state_dtype and step.device == plan.device


def member_states(plan: Plan, state: State) -> list[State]:
    """The states of the matrices of a tensor: tensors are the memory of the state's, ints of a stack are copies."""
    here = state if plan.sharding.mesh is None else {key: distributed.local(value) for key, value in state.items()}
    return [here] if plan.stack is None else unstack_state(here, plan.stack)


def name_in(group: dict[str, Any], i: int) -> str:
    """What errors call the tensor at a position in the group."""
    if i < len(group.get("param_names", ())):  # a list of parameters may be added to, as lists may
        return str(group["param_names"][i])
    return f"parameter {i} of shape {tuple(group['params'][i].shape)}"


def not_optimizable(what: str, dtype: torch.dtype) -> TypeError:
    """What is raised for a tensor of another type than those that can be stepped."""
    return TypeError(f"{what} {dtype}; optimizable are {', '.join(map(str, DTYPES))}")


def not_dense(name: str, layout: object) -> TypeError:
    """What is raised for a sparse gradient."""
    return TypeError(f"{name} has a {layout} gradient; use a dense one (sparse=False)")


@lru_cache(maxsize=4096)
def _layout(plan: Plan, rule: Rule, projector: Projector | None) -> _Layout:
    """Of the state of a whole parameter."""
    bases = projector.init(replace(plan, device=_META), 0) if plan.side and projector else {}
    member = storage.allocated(replace(plan, device=_META), lambda own: rule.init(own) | bases)
    state = member if plan.stack is None else stack_states([member] * plan.stack)
    return {key: (_shape(value), value.dtype if isinstance(value, Tensor) else None) for key, value in state.items()}


def _shape(value: object) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _describe(value: object) -> str:
    shape = _shape(value)
    return f"of type {type(value).__name__}" if shape is None else _described(shape)


def _described(shape: tuple[int, ...]) -> str:
    return f"a tensor of shape {shape}"
