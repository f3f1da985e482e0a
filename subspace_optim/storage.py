"""How a state tensor is kept: as it is, or as codes of 8 or 4 bits in blocks that share a scale.

x ≈ scale·table[code], with scale the largest |x| of the block and one of three tables of values in [-1, 1]:

    signed    first moments    0 and ±v, v from decades: each decade (10⁻ᵉ⁻¹, 10⁻ᵉ] has half the steps of the one above
    unsigned  second moments   the decades, with one more step and no 0: V = 0 beside M ≠ 0 would step to infinity
    linear    bases            -1 to 1 in equal steps

A block is up to 256 elements along the rank, (m, r) by rows and (r, n) by columns, or along the last dimension of a
dense tensor: no sharding of the rows of a parameter cuts one. Codes lie under the key of the tensor, in uint8 and at 4
bits two to a byte along the blocks; scales lie in float32 under `<key>_scale`. Vectors stay as they are.

Sources: arXiv 2110.02861 (dynamic map, blocks), arXiv 2309.01507 (4 bits; no zero in the second moment).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal
from zlib import crc32

import torch
from torch import Tensor

from . import philox
from .kernels import reference
from .types import BITS, BLOCK, Bucket, Plan, State

Kind = Literal["signed", "unsigned", "linear"]

OPEN_BYTES = 2**26  # decoded at a time, unless a single matrix takes more
WORK_BYTES = 2**20  # the same on a CPU where nothing is decoded: a call costs little there


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

    def decode(self, codes: Tensor, scales: Tensor, dtype: torch.dtype, kernel: Any = reference) -> Tensor:
        """The tensor."""
        return kernel.decode(codes, scales, _table(self.kind, self.bits, codes), self.axis, self.length, dtype)

    def encode_(
        self,
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        seed: int | None = None,
        step: Tensor | None = None,
        kernel: Any = reference,
        begin: int = 0,
    ) -> None:
        """Write the codes and scales of x: to nearest, or stochastically by the stream (seed, step) from `begin` on."""
        table = _table(self.kind, self.bits, codes)
        kernel.encode_(x, codes, scales, table, self.axis, seed, table[0] if step is None else step, begin)


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
    found = {
        "exp_avg": _codec("signed", plan.state_bits, plan.low_shape, along),
        "exp_avg_sq": _codec("unsigned", plan.state_bits, plan.low_shape, along),
    }
    for key, shape in zip(plan.basis_keys, plan.basis_shapes, strict=True):
        found[key] = _codec("linear", plan.basis_bits, shape)
        found[f"{key}_exp_avg"] = _codec("signed", plan.state_bits, shape)
        found[f"{key}_exp_avg_sq"] = _codec("unsigned", plan.state_bits, shape)
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


class Opened(dict[str, Any]):
    """A state as rules and projectors see it: what `kept` holds as codes is decoded, all else is shared."""

    __slots__ = ("kept",)

    def __init__(self, plan: Plan, kept: State, keys: Iterable[str], kernel: Any) -> None:
        super().__init__(kept)
        self.kept = kept
        for key, codec in codecs(plan).items():
            if key in kept and key in keys:
                self[key] = codec.decode(kept[key], self.pop(f"{key}_scale"), plan.state_dtype, kernel)


def with_bases(plan: Plan, state: State, kernel: Any) -> State:
    """A state whose bases alone are decoded."""
    return state if is_plain(plan) else Opened(plan, state, plan.basis_keys, kernel)


def parts(bucket: Bucket, workspace: int = 0) -> Iterator[Bucket]:
    """The bucket in parts that may be opened and stepped one after another: as it is where none needs memory.

    Args:
        bucket: as it is kept.
        workspace: bytes that stepping one matrix takes beside what is opened.
    """
    each = (0 if is_plain(bucket.plan) else open_bytes(bucket.plan.whole)) + workspace  # the same on every rank
    most = WORK_BYTES if is_plain(bucket.plan) and bucket.plan.device.type == "cpu" else OPEN_BYTES
    at_once = max(1, most // each) if each else len(bucket)
    if at_once >= len(bucket):
        yield bucket
        return
    for begin in range(0, len(bucket), at_once):
        yield bucket.part(list(range(begin, min(begin + at_once, len(bucket)))))


def open_bytes(plan: Plan) -> int:
    """What stepping one matrix decodes: its moments, its bases, and its parameter if that is compensated."""
    coded = codecs(plan)
    shapes = [plan.low_shape] * (2 * ("exp_avg" in coded))
    shapes += [shape for key, shape in zip(plan.basis_keys, plan.basis_shapes, strict=True) if key in coded]
    shapes += [plan.matrix] * plan.compensated
    return plan.state_dtype.itemsize * sum(map(math.prod, shapes))


def opened(bucket: Bucket, kernel: Any) -> Bucket:
    """The bucket as rules see it: states decoded, compensated parameters in float32."""
    plan = bucket.plan
    if is_plain(plan):
        return bucket
    out = replace(bucket, states=[Opened(plan, state, codecs(plan), kernel) for state in bucket.states])
    if plan.compensated:
        out.params = [p.float().add_(c) for p, c in zip(bucket.params, bucket.slot("compensation"), strict=True)]
    return out


def close_(bucket: Bucket, stepped: Bucket, kernel: Any) -> None:
    """Write back what has been opened, but for the bases."""
    plan = bucket.plan
    if is_plain(plan):
        return
    _keep_(stepped, kernel, [key for key in codecs(plan) if key not in plan.basis_keys])
    for kept, state in zip(bucket.states, stepped.states, strict=True):
        kept.update({key: value for key, value in state.items() if not isinstance(value, Tensor)})
    if plan.compensated:
        for param, wide, rest in zip(bucket.params, stepped.params, bucket.slot("compensation"), strict=True):
            param.copy_(wide)
            rest.copy_(wide.sub_(param))


def settle_bases_(bucket: Bucket, kernel: Any) -> None:
    """Make new bases what their codes say, so that R and W see the very basis that is kept; rounds to nearest."""
    for codec, key, _, state in _coded(bucket, bucket.plan.basis_keys):
        codes, scales = state.kept[key], state.kept[f"{key}_scale"]
        codec.encode_(state[key], codes, scales, kernel=kernel)
        state[key].copy_(codec.decode(codes, scales, state[key].dtype, kernel))


def keep_bases_(bucket: Bucket, kernel: Any) -> None:
    """Write back bases that have moved a little; rounds stochastically, or they would stay where they are."""
    _keep_(bucket, kernel, bucket.plan.basis_keys)


def _keep_(bucket: Bucket, kernel: Any, keys: Iterable[str]) -> None:
    """Rounded as the whole tensor would be: its shards take their places in one stream."""
    for codec, key, stream, state in _coded(bucket, keys):
        tensors, seed = (
            (state[key], state.kept[key], state.kept[f"{key}_scale"]),
            philox.mix(stream, crc32(key.encode())),
        )
        runs = _runs(bucket.plan, key, codec, state[key])
        if len(runs) == 1:
            codec.encode_(*tensors, seed, state["step"], kernel, runs[0][0] * codec.length)
            continue
        rows, at = [reference.rows(x, codec.axis) for x in tensors], 0
        for begin, count in runs:
            x, codes, scales = (tensor[at : at + count] for tensor in rows)
            replace(codec, axis=-1).encode_(x, codes, scales, seed, state["step"], begin=begin * codec.length)
            at += count


def _runs(plan: Plan, key: str, codec: Codec, x: Tensor) -> tuple[tuple[int, int], ...]:
    """Which rows of blocks of the whole tensor are here, as (begin, count) of consecutive ones."""
    shape, axes = list(x.shape), list(plan.axes(key))
    del shape[codec.axis], axes[codec.axis]
    return plan.sharding.runs(tuple(shape), tuple(axes))


def _coded(bucket: Bucket, keys: Iterable[str]) -> Iterator[tuple[Codec, str, int, Opened]]:
    """Those of the keys that are coded, for every member that has them, with its stream."""
    coded = codecs(bucket.plan)
    for key in keys:
        for state, stream in zip(bucket.states, bucket.streams, strict=True) if key in coded else ():
            if key in state:
                assert isinstance(state, Opened)
                yield coded[key], key, stream, state
