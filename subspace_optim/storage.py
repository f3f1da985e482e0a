"""How a state tensor is kept: as it is, or as codes of 8 or 4 bits in blocks that share a scale.

x ≈ scale·table[code], with scale the largest |x| of the block and one of three tables of values in [-1, 1]:

    signed    first moments    0 and ±v, v from decades: each decade (10⁻ᵉ⁻¹, 10⁻ᵉ] has half the steps of the one above
    unsigned  second moments   the decades, with one more step and no 0: V = 0 beside M ≠ 0 would step to infinity
    linear    bases            -1 to 1 in equal steps

A block is up to 256 elements along the rank, (m, r) by rows and (r, n) by columns, or along the last dimension of a
dense tensor: no sharding of the rows of a parameter cuts one. Codes lie under the key of the tensor, in uint8 and at 4
bits two to a byte along the blocks; scales lie in float32 under `<key>_scale`. Vectors stay as they are.

Adam's moments are decoded, advanced and coded again in one pass of a kernel (`Coding`). What other rules and a change
of basis need is opened, as many matrices at a time as fit in OPEN_BYTES, on a CPU in WORK_BYTES.

Sources: arXiv 2110.02861 (dynamic map, blocks), arXiv 2309.01507 (4 bits; no zero in the second moment).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Any, Literal
from zlib import crc32

import torch
from torch import Tensor

from . import philox
from .kernels import reference
from .types import BITS, BLOCK, Bucket, Hyper, Moments, Plan, Side, State, Weights, choose_, stacked

Kind = Literal["signed", "unsigned", "linear"]
MOMENTS = ("exp_avg", "exp_avg_sq")  # of what is stepped; those of a basis are named after it

OPEN_BYTES = 2**26  # decoded at a time, unless a single matrix takes more
WORK_BYTES = 2**20  # the same on a CPU: a call costs little there, and what fits the cache is stepped faster


@lru_cache(maxsize=16)
def values(kind: Kind, bits: int) -> tuple[float, ...]:
    """The table of a code, ascending; at most 2^bits values."""
    if kind == "linear":
        most = 2 ** (bits - 1) - 1
        return tuple(i / most for i in range(-most, most + 1))
    decades = range(bits - (kind == "signed"))
    steps = [2 ** (len(decades) - 1 - e) for e in decades]
    grid = sorted(10.0**-e * (0.1 + 0.9 * (i + 1) / n) for e, n in zip(decades, steps, strict=True) for i in range(n))
    return (10.0 ** -len(decades), *grid) if kind == "unsigned" else (*(-v for v in reversed(grid)), 0.0, *grid)


def _table(kind: Kind, bits: int, like: Tensor) -> Tensor:
    """The values where the codes are; a planner's fake tensors are not cached, for they end with their mode."""
    make = _cached_table if type(like) is Tensor else _cached_table.__wrapped__
    return make(kind, bits, like.device)


@lru_cache(maxsize=64)
def _cached_table(kind: Kind, bits: int, device: torch.device) -> Tensor:
    return torch.tensor(values(kind, bits), dtype=torch.float32, device=device)


@dataclass(frozen=True, slots=True)
class Codec:
    """How one state tensor is coded.

    Attributes:
        kind: signed, unsigned or linear.
        bits: 8 or 4.
        axis: the dimension that blocks run along: -1, or -2 of a matrix.
        length: of that dimension.
    """

    kind: Kind
    bits: int
    axis: int
    length: int

    def shapes(self, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the codes (uint8) and of the scales (float32) of a tensor."""

        def along(count: int) -> tuple[int, ...]:
            out = list(shape)
            out[self.axis] = count
            return tuple(out)

        return along(-(-self.length * self.bits // 8)), along(-(-self.length // BLOCK))

    def decode(
        self, codes: list[Tensor], scales: list[Tensor], dtype: torch.dtype, kernel: Any = reference
    ) -> list[Tensor]:
        """The tensors."""
        shape = list(codes[0].shape)
        shape[self.axis] = self.length
        xs = _room(codes, shape, dtype)
        self.decode_(xs, codes, scales, kernel)
        return xs

    def decode_(self, xs: list[Tensor], codes: list[Tensor], scales: list[Tensor], kernel: Any = reference) -> None:
        """Write the tensors into `xs`."""
        kernel.decode_(xs, codes, scales, _table(self.kind, self.bits, codes[0]), self.axis)

    def encode_(
        self,
        xs: list[Tensor],
        codes: list[Tensor],
        scales: list[Tensor],
        seeds: Sequence[int] = (),
        steps: Sequence[Tensor] = (),
        kernel: Any = reference,
        begin: int = 0,
    ) -> None:
        """Write codes and scales: to nearest, or stochastically by the streams (seed, step) from `begin` on."""
        kernel.encode_(xs, codes, scales, _table(self.kind, self.bits, codes[0]), self.axis, seeds, steps, begin)


def nbytes(shape: Sequence[int], bits: int, axis: int = -1) -> int:
    """Bytes that a float32 state tensor takes at these bits, scales included.

    Args:
        shape: of the tensor.
        bits: 32, 8 or 4.
        axis: that blocks run along: -1, or -2 for moments (r, n) of the left side.
    """
    codec = _codec("signed", bits, tuple(shape), axis)
    if codec is None:
        return 4 * math.prod(shape)
    codes, scales = codec.shapes(shape)
    return math.prod(codes) + 4 * math.prod(scales)


def _codec(kind: Kind, bits: int, shape: tuple[int, ...], axis: int = -1) -> Codec | None:
    """None where the tensor stays as it is: a vector, or one element a block, which no code makes smaller."""
    if bits == 32 or len(shape) < 2 or shape[axis] < 2:
        return None
    return Codec(kind, bits, axis, shape[axis])


@lru_cache(maxsize=4096)
def codecs(plan: Plan) -> dict[str, Codec]:
    """By state key, those tensors of one matrix that are coded, where the state has them."""
    along = -2 if plan.side == "left" else -1
    found = {  # in the order of writing: an interrupt between V and M makes no step larger
        "exp_avg_sq": _codec("unsigned", plan.state_bits, plan.low_shape, along),
        "exp_avg": _codec("signed", plan.state_bits, plan.low_shape, along),
    }
    for key, shape in zip(plan.basis_keys, plan.basis_shapes, strict=True):
        found[key] = _codec("linear", plan.basis_bits, shape)
        found[f"{key}_exp_avg_sq"] = _codec("unsigned", plan.state_bits, shape)
        found[f"{key}_exp_avg"] = _codec("signed", plan.state_bits, shape)
    return {key: codec for key, codec in found.items() if codec}


def is_plain(plan: Plan) -> bool:
    """Whether the state is stepped as it is kept."""
    return not codecs(plan) and not plan.compensated


def allocated(plan: Plan, init: Callable[[Plan], State]) -> State:
    """The zero state that `init` makes, as it is kept; the decoded one never exists."""
    if is_plain(plan):
        return init(plan)
    out: State = {}
    for key, value in init(replace(plan, device=torch.device("meta"))).items():
        if codec := codecs(plan).get(key):
            codes, scales = codec.shapes(value.shape)
            out[key] = torch.zeros(codes, dtype=torch.uint8, device=plan.device)
            out[f"{key}_scale"] = torch.zeros(scales, dtype=torch.float32, device=plan.device)
        else:
            out[key] = torch.zeros_like(value, device=plan.device) if isinstance(value, Tensor) else value
    if plan.compensated:
        out["compensation"] = torch.zeros(plan.matrix, dtype=plan.dtype, device=plan.device)
    return out


def mismatch(plan: Plan, state: State) -> str | None:
    """What a state keeps otherwise than the options of its group say, in words."""
    for key in ("exp_avg", *plan.basis_keys):
        kept, wanted = state.get(key), kept_shape(plan, key)
        if not isinstance(kept, Tensor) or (kept.dtype == torch.uint8, tuple(kept.shape)) == wanted:
            continue
        option = "state_bits" if key == "exp_avg" else "basis_bits"
        for bits in BITS:
            other: dict[str, Any] = {option: bits}
            if (kept.dtype == torch.uint8, tuple(kept.shape)) == kept_shape(replace(plan, **other), key):
                return f"{key} at {bits} bits, but {option}={getattr(plan, option)}"
    if plan.compensated and "compensation" not in state:
        return "no compensation, but rounding='kahan'"
    return "a compensation, but not rounding='kahan'" if "compensation" in state and not plan.compensated else None


@lru_cache(maxsize=4096)
def kept_shape(plan: Plan, key: str) -> tuple[bool, tuple[int, ...]]:
    """Whether the first moment or a basis is kept as codes, and the shape it then has for the whole parameter."""
    shape = dict(zip(plan.basis_keys, plan.basis_shapes, strict=True)).get(key, plan.low_shape)
    codec = codecs(plan).get(key)
    return codec is not None, (() if plan.stack is None else (plan.stack,)) + (
        codec.shapes(shape)[0] if codec else shape
    )


@dataclass(frozen=True, slots=True)
class Coded:
    """A moment as it is kept, for the functions of `Coding`.

    Attributes:
        codec: of the codes.
        codes: uint8.
        scales: float32.
        seed: of their rounding.
        begin: where they begin in its stream.
    """

    codec: Codec
    codes: Tensor
    scales: Tensor
    seed: int
    begin: int

    @property
    def table(self) -> Tensor:
        """The values of the codes."""
        return _table(self.codec.kind, self.codec.bits, self.codes)


def decoded(moments: Sequence[Coded], kernel: Any, dtype: torch.dtype) -> list[Tensor]:
    """The moments, of one codec."""
    codes, scales = [moment.codes for moment in moments], [moment.scales for moment in moments]
    return moments[0].codec.decode(codes, scales, dtype, kernel)


def _room(like: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """As many tensors of a shape, where those are, with nothing in them yet."""
    return list(like[0].new_empty((len(like), *shape), dtype=dtype).unbind())


class Coding:
    """The kernels of a module: the same functions, of which Adam's take moments that are `Coded`, too."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        if hasattr(kernel, "weight_norm_adam_"):
            self.weight_norm_adam_ = self._weight_norm_adam_

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def adam_update_(
        self,
        lows: list[Tensor],
        moments: Any,
        steps: list[Tensor],
        hyper: Hyper,
        eps_inside: bool = False,
        finite: Tensor | None = None,
    ) -> list[Tensor]:
        """As the reference; N of a kernel that cannot return it is where a step of -1 takes a zero."""
        codes = _codes(moments)
        if codes is None:
            return self._kernel.adam_update_(lows, moments, steps, hyper, eps_inside, finite)
        if hasattr(self._kernel, "coded_adam_update_"):
            return self._kernel.coded_adam_update_(lows, codes, steps, hyper, eps_inside, finite)
        return reference.coded_updates(self._kernel, lows, codes, steps, hyper, eps_inside, finite)

    def _weight_norm_adam_(self, weights: Weights, grads: list[Tensor], moments: Any, *how: Any) -> None:
        """As native, which finds the moments decoded; the kernels of a GPU take the codes."""
        codes = _codes(moments)
        if codes is None or hasattr(self._kernel, "coded_adam_update_"):
            self._kernel.weight_norm_adam_(weights, grads, codes or moments, *how)
            return
        steps, finite = weights.steps, weights.finite
        first, second = (decoded(own, self._kernel, steps[0].dtype) for own in moments)
        self._kernel.weight_norm_adam_(weights, grads, Moments(first, second), *how)
        columns: list[Any] = [list(chain(*moments)), first + second, steps * 2]
        for own, x, step in zip(*(columns if finite is None else reference.taken(finite, *columns)), strict=True):
            own.codec.encode_([x], [own.codes], [own.scales], [own.seed], [step], self._kernel, own.begin)

    def projected_adam_(
        self,
        weights: Weights,
        grads: list[Tensor],
        moments: Any,
        bases: Sequence[Tensor],
        hyper: Hyper,
        side: Side | None,
    ) -> None:
        """As the reference; nothing of the size of a tensor that is not projected is decoded."""
        codes = _codes(moments)
        if codes is None:
            self._kernel.projected_adam_(weights, grads, moments, bases, hyper, side)
        elif side is None:
            self._kernel.coded_adam_(weights, grads, codes, hyper)
        else:
            lows = self._kernel.project(grads, bases, side, weights.steps[0].dtype)
            updates = self.adam_update_(lows, moments, weights.steps, hyper, finite=weights.finite)
            self._kernel.apply_(weights, updates, bases, hyper, side)


def _codes(moments: Any) -> reference.Codes | None:
    """Moments as coded_adam_ takes them, where they are `Coded`."""
    first, second, every = moments.exp_avgs[0], moments.exp_avg_sqs[0], list(chain(*moments))
    if not isinstance(first, Coded):
        return None
    return reference.Codes(
        [moment.codes for moment in every],
        [moment.scales for moment in every],
        [first.table, second.table],
        [moment.seed for moment in every],
        first.codec.axis,
        first.begin,
    )


class Opened(dict[str, Any]):
    """A state as rules and projectors see it: what `kept` holds as codes is decoded, all else is shared."""

    __slots__ = ("kept",)

    def __init__(self, kept: State) -> None:
        super().__init__(kept)
        self.kept = kept


def _open(plan: Plan, states: Sequence[State], keys: Iterable[str], kernel: Any) -> list[State]:
    """The states, of one plan and alike, with these keys decoded where they are kept as codes."""
    out: list[State] = [Opened(state) for state in states]
    for key, codec in codecs(plan).items() if out else ():
        if key in out[0] and key in keys:
            codes, scales = [state[key] for state in out], [state.pop(f"{key}_scale") for state in out]
            for state, x in zip(out, codec.decode(codes, scales, plan.state_dtype, kernel), strict=True):
                state[key] = x
    return out


def with_bases(plan: Plan, states: Sequence[State], kernel: Any) -> Sequence[State]:
    """States whose bases alone are decoded."""
    return states if is_plain(plan) else _open(plan, states, plan.basis_keys, kernel)


def parts(bucket: Bucket, takes_codes: bool, workspace: int = 0, compensates: bool = False) -> Iterator[Bucket]:
    """The bucket in parts that may be opened and stepped one after another: as it is where none needs memory.

    Args:
        bucket: as it is kept.
        takes_codes: of its rule.
        workspace: bytes that stepping one matrix takes beside what is opened.
        compensates: of its rule and its kernel.
    """
    each = open_bytes(bucket.plan.whole, takes_codes, compensates) + workspace  # the same on every rank
    most = WORK_BYTES if bucket.plan.device.type == "cpu" else OPEN_BYTES
    at_once = max(1, most // each) if each else max(1, len(bucket))
    for begin in range(0, len(bucket), at_once):
        members = range(begin, min(begin + at_once, len(bucket)))
        yield bucket if len(members) == len(bucket) else bucket.part(list(members))


def open_bytes(plan: Plan, takes_codes: bool, compensates: bool) -> int:
    """What stepping one matrix decodes: its moments, its bases, and its parameter if that is compensated.

    A rule that takes codes needs moments decoded when they change their basis, and has R and N of their size otherwise.

    Args:
        plan: of the matrix.
        takes_codes: of its rule.
        compensates: of its rule and its kernel.
    """
    coded = codecs(plan)
    shapes = [plan.low_shape] * (2 * ("exp_avg" in coded and (plan.side is not None or not takes_codes)))
    shapes += [shape for key, shape in zip(plan.basis_keys, plan.basis_shapes, strict=True) if key in coded]
    shapes += [plan.matrix] * (plan.compensated and not compensates)
    return plan.state_dtype.itemsize * sum(map(math.prod, shapes))


def opened(bucket: Bucket, kernel: Any, takes_codes: bool, compensates: bool = False) -> Bucket:
    """The bucket as rules see it: states decoded, compensated parameters in float32.

    Args:
        bucket: as it is kept.
        kernel: that decodes.
        takes_codes: leave moments as they are kept, for a rule that hands them to its kernel.
        compensates: leave parameters as they are kept, likewise.
    """
    plan = bucket.plan
    if is_plain(plan):
        return bucket
    left = _begins(plan) if takes_codes else {}
    out = replace(bucket, states=_open(plan, bucket.states, codecs(plan).keys() - left, kernel))
    for state, stream in zip(out.states, bucket.streams, strict=True):
        for key, begin in left.items():
            state[key] = Coded(codecs(plan)[key], state[key], state.pop(f"{key}_scale"), _seed(stream, key), begin)
    if plan.compensated and not compensates:
        wide, rests = stacked(bucket.params).float(), stacked(bucket.slot("compensation"))
        out.params = list(wide.add_(rests.float()).unbind())
    return out


def _begins(plan: Plan) -> dict[str, int]:
    """Where those moments begin that a kernel can step as codes: none of shards that are no consecutive rows."""
    coded = {key: codec for key, codec in codecs(plan).items() if key in MOMENTS}
    runs = {key: _runs(plan, key, codec, plan.low_shape) for key, codec in coded.items()}
    if any(len(own) != 1 for own in runs.values()):
        return {}
    return {key: runs[key][0][0] * codec.length for key, codec in coded.items()}


def steps_in_place(plan: Plan, takes_codes: bool) -> bool:
    """Whether the kernel of a rule, which takes codes or not, writes all that is written of a matrix in a step."""
    moments = codecs(plan).keys() & set(MOMENTS)
    return moments == (_begins(plan) if takes_codes else {}).keys()


def decode_moments_(bucket: Bucket, kernel: Any) -> None:
    """Of an opened bucket, before they change their basis."""
    for key in MOMENTS:
        if isinstance(bucket.states[0].get(key), Coded):
            wide = decoded(bucket.slot(key), kernel, bucket.plan.state_dtype)  # type: ignore[arg-type]
            for state, x in zip(bucket.states, wide, strict=True):
                state[key] = x


def close_(bucket: Bucket, stepped: Bucket, kernel: Any) -> None:
    """Write back what has been opened, but for the bases and their moments."""
    plan = bucket.plan
    if is_plain(plan):
        return
    _keep_(stepped, kernel, MOMENTS[::-1])  # an interrupt between V and M makes no step larger
    for kept, state in zip(bucket.states, stepped.states, strict=True):
        kept.update({key: value for key, value in state.items() if isinstance(value, int)})
    if stepped.params is not bucket.params:
        choose_(bucket.finite, stepped.params, bucket.params)
        taken = stacked(stepped.params).sub_(stacked(bucket.params).float())
        choose_(bucket.finite, list(taken.unbind()), bucket.slot("compensation"))


def settle_bases_(bucket: Bucket, kernel: Any) -> None:
    """Make new bases what their codes say, so that R and W see the very basis that is kept; rounds to nearest."""
    for _, codec, xs, codes, scales in _coded(bucket, bucket.plan.basis_keys):
        codec.encode_(xs, codes, scales, kernel=kernel)
        codec.decode_(xs, codes, scales, kernel)


def keep_bases_(bucket: Bucket, kernel: Any) -> None:
    """Write back bases that have moved a little, and their moments; to nearest, they would stay where they are."""
    _keep_(bucket, kernel, [key for key in codecs(bucket.plan) if key not in MOMENTS])


def _keep_(bucket: Bucket, kernel: Any, keys: Iterable[str]) -> None:
    """Rounded as the whole tensor would be: its shards take their places in one stream."""
    for key, codec, xs, *kept in _coded(bucket, keys):
        codes, scales = kept if bucket.finite is None else (_room(own, own[0].shape, own[0].dtype) for own in kept)
        seeds, steps = [_seed(stream, key) for stream in bucket.streams], bucket.slot("step")
        runs = _runs(bucket.plan, key, codec, xs[0].shape)
        if len(runs) == 1:
            codec.encode_(xs, codes, scales, seeds, steps, kernel, runs[0][0] * codec.length)
        else:
            rows, at = [[reference.rows(x, codec.axis) for x in column] for column in (xs, codes, scales)], 0
            for begin, count in runs:
                x, code, scale = ([tensor[at : at + count] for tensor in column] for column in rows)
                replace(codec, axis=-1).encode_(x, code, scale, seeds, steps, begin=begin * codec.length)
                at += count
        if bucket.finite is not None:
            for own, fresh in zip(kept, (codes, scales), strict=True):
                choose_(bucket.finite, fresh, own)


def _seed(stream: int, key: str) -> int:
    return philox.mix(stream, crc32(key.encode()))


def _runs(plan: Plan, key: str, codec: Codec, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Which rows of blocks of the whole tensor are here, as (begin, count) of consecutive ones."""
    sizes, axes = list(shape), list(plan.axes(key))
    del sizes[codec.axis], axes[codec.axis]
    return plan.sharding.runs(tuple(sizes), tuple(axes))


def _coded(
    bucket: Bucket, keys: Iterable[str]
) -> Iterator[tuple[str, Codec, list[Tensor], list[Tensor], list[Tensor]]]:
    """Those of the keys that are coded and that the bucket has decoded: these tensors, their codes and scales."""
    coded = codecs(bucket.plan)
    for key in keys if bucket.states else ():
        if key in coded and isinstance(bucket.states[0].get(key), Tensor):
            kept = [state.kept for state in bucket.states if isinstance(state, Opened)]
            codes, scales = [own[key] for own in kept], [own[f"{key}_scale"] for own in kept]
            yield key, coded[key], bucket.slot(key), codes, scales
