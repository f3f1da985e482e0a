"""Sharded tensors: a DTensor is stepped as its local shard, and what its ranks must agree on is reduced or broadcast.

A step needs no collective where the dimension that R = G Q contracts is whole on every rank, and otherwise one
all-reduce of the R of a bucket. Factorisations are never trusted to agree across ranks: one rank's result is broadcast.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from .philox import ALL, Window

STACK = -1  # the axis along which the matrices of a stack lie; rows are axis 0, columns axis 1
Axes = tuple[int | None, ...]  # which axis of the matrix every dimension of a tensor carries; None for one of its own
CONTRACTED: dict[Any, tuple[int, ...]] = {None: (), "left": (0,), "right": (1,), "both": (0, 1)}  # axes, by side


def is_sharded(value: Any) -> bool:
    """Whether it is a DTensor; asked in this way, torch.distributed.tensor is imported by those alone who use it."""
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def local(value: Any) -> Any:
    """The shard of a DTensor; anything else as it is."""
    return value.to_local() if is_sharded(value) else value


def whole(value: Any) -> Any:
    """All of a DTensor, gathered; anything else as it is."""
    return value.full_tensor() if is_sharded(value) else value


def settled_grad(param: Tensor) -> Tensor:
    """The shard of p.grad. Where it is left as partial sums (tensor parallelism, replicated weights), it is reduced."""
    grad: Any = param.grad
    if is_sharded(param) and grad.placements != (placements := param.placements):  # type: ignore[attr-defined]
        param.grad = grad = grad.redistribute(placements=placements)
    return local(grad)


def is_cut_once(weight: Any) -> bool:
    """Whether a DTensor is one of a linear layer under tensor parallelism alone: cut along one of its dimensions."""
    return [str(placement) for placement in weight.placements] in (["S(0)"], ["S(1)"])


def linear_over_shards(product: Callable[[Tensor, Tensor], Tensor], x: Any, weight: Any) -> Any:
    """The DTensor y = xWᵀ from the products of shards.

    Of rows of W (ColwiseParallel) a rank makes columns of y from all of x; of columns (RowwiseParallel) it makes a
    partial sum from its columns of x.

    Args:
        product: of what is here of x and of W; its x has a gradient.
        x: the input.
        weight: W, which `is_cut_once`.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    columns = Shard(x.ndim - 1)
    by_rows = weight.placements[0].dim == 0
    taken, grad, made = (Replicate(), Partial(), columns) if by_rows else (columns, columns, Partial())
    own = x.redistribute(placements=[taken]).to_local(grad_placements=[grad])
    shape = torch.Size((*x.shape[:-1], weight.shape[0]))
    return DTensor.from_local(
        *(product(own, weight.to_local()), weight.device_mesh, [made]),
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


def flattened_by(tensor: Tensor) -> str | None:
    """Who has made one vector of many weights, where that can be told."""
    if getattr(tensor, "_is_flat_param", False) or getattr(tensor, "_fsdp_flattened", False):
        return "FSDP1"
    return "DeepSpeed's ZeRO" if hasattr(tensor, "ds_id") or "deepspeed" in sys.modules else None


def check_replicas(name: str, tensor: Tensor, group: Any) -> None:
    """Make sure that a process group holds copies of this rank's shard, and no other shards.

    Raises:
        ValueError: it holds other ranks of the mesh of the DTensor.
    """
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    others = set(mesh.mesh.flatten().tolist()) & set(dist.get_process_group_ranks(group)) - {dist.get_rank()}
    if others:
        raise ValueError(
            f"{name} lies on {mesh}, and the group holds ranks {sorted(others)} of it, which have other shards, or "
            "copies that are averaged already; of a mesh with the dimensions replicas and shards give fully_shard "
            "mesh['shards'] alone, and here mesh['replicas'].get_group()"
        )


@dataclass(frozen=True)
class Layout:
    """Where the shards of a DTensor are.

    Attributes:
        mesh: the DeviceMesh.
        placements: one a mesh dimension.
        shape: of the shard on this rank.
    """

    mesh: Any
    placements: tuple[Any, ...]
    shape: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> Layout | None:
        """The layout of a DTensor; None of any other tensor.

        Raises:
            ValueError: it lies on a mesh that cannot communicate, or in partial sums.
        """
        if not is_sharded(tensor):
            return None
        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
        if not dist.is_initialized():
            raise ValueError("is a DTensor, but there is no process group; call torch.distributed.init_process_group")
        if mesh.get_coordinate() is None:
            raise ValueError(f"lies on {mesh}, of which rank {dist.get_rank()} is no part; leave it out on this rank")
        if any(placement.is_partial() for placement in placements):
            raise ValueError(f"has the placements {placements}; redistribute it to Shard or Replicate")
        return Layout(mesh, tuple(placements), tuple(local(tensor).shape))

    def sharding(self, shape: tuple[int, ...], batch_dims: int | None) -> Sharding:
        """What it means for the matrices of a tensor.

        Args:
            shape: of the whole tensor.
            batch_dims: its leading dimensions that index matrices, the next being the rows and the rest the columns;
                None where it is stepped as it is.

        Raises:
            ValueError: the shards are not blocks of matrices, rows or columns.
        """
        axes: list[int | None] = []
        cut = [getattr(placement, "dim", None) for placement in self.placements]
        for dim in cut:
            if dim is None or batch_dims is None:
                axes.append(dim)
                continue
            first = 0 if dim < batch_dims else min(dim, batch_dims + 1)
            last = batch_dims if dim < batch_dims else dim + 1 if dim == batch_dims else len(shape)
            parts = math.prod(self.mesh.size(i) for i, other in enumerate(cut) if other == dim)
            if math.prod(shape[first:dim]) > 1 or (math.prod(shape[dim + 1 : last]) > 1 and shape[dim] % parts):
                raise ValueError(
                    f"is cut along dimension {dim} into {parts} parts, which are no blocks of rows or columns of its "
                    f"matrices; shard it along dimension {batch_dims}"
                )
            axes.append(STACK if dim < batch_dims else int(dim > batch_dims))
        return Sharding(self.mesh, self.placements, tuple(axes), *fold(shape, batch_dims))


def fold(shape: tuple[int, ...], batch_dims: int | None) -> tuple[tuple[int, ...], int | None]:
    """A tensor's shape as that of its matrices, (m, n), and how many they are; None where it is one, or no matrix."""
    if batch_dims is None:
        return shape, None
    m, n = shape[batch_dims], math.prod(shape[batch_dims + 1 :])
    return (m, n), math.prod(shape[:batch_dims]) if batch_dims else None


@dataclass(frozen=True)
class Sharding:
    """How the matrices of a tensor are spread over a device mesh, and the collectives that this takes.

    Where nothing is spread (`WHOLE`), every method is the identity. Along STACK ranks hold different matrices, which
    have nothing to agree on.

    Attributes:
        mesh: the DeviceMesh; None where there is none.
        placements: of the parameter.
        axes: which axis of the matrix every mesh dimension cuts; None where it holds copies.
        matrix: the whole matrix, (m, n); of a dense tensor its shape.
        stack: how many matrices there are on all ranks; None for one.
    """

    mesh: Any = None
    placements: tuple[Any, ...] = ()
    axes: Axes = ()
    matrix: tuple[int, ...] = ()
    stack: int | None = None

    def cuts(self, *axes: int | None) -> list[int]:
        """The mesh dimensions over which any of these axes is cut; without axes: any but the stack."""
        wanted = set(axes or range(len(self.matrix))) - {None}
        return [i for i, axis in enumerate(self.axes) if axis in wanted and self.mesh.size(i) > 1]

    def runs(self, shape: tuple[int, ...], axes: Axes) -> tuple[tuple[int, int], ...]:
        """Which elements of the whole this rank's part of a tensor holds, as (begin, count) of consecutive ones.

        Args:
            shape: of the part.
            axes: what its dimensions carry.
        """
        return _runs(self, shape, axes) if self.cuts(*axes) else ((0, math.prod(shape)),)

    def window(self, shape: tuple[int, ...]) -> Window | None:
        """Which elements of a whole matrix this rank holds.

        None where they are no block of consecutive rows and columns: none at all, or those of a tensor with more than
        two dimensions that is cut along the last.

        Args:
            shape: of the part.
        """
        if not self.cuts():
            return ALL
        rows, columns = (self.runs(shape[axes], tuple(range(len(shape)))[axes]) for axes in (slice(1), slice(1, None)))
        if len(rows) != 1 or len(columns) != 1:
            return None
        pitch = math.prod(self.matrix[1:])
        return Window(rows[0][0] * pitch + columns[0][0], columns[0][1], pitch)

    def elements(self) -> Tensor:
        """The numbers of all elements of a whole matrix that this rank holds."""
        numbers = torch.zeros((), dtype=torch.int64, device="cpu")
        for axis, size in enumerate(self.matrix):
            numbers = numbers.unsqueeze(-1) * size + self.own(torch.arange(size, device="cpu"), (axis,)).cpu()
        return numbers.flatten()

    # Reductions. Arguments may be overwritten.

    def sum(self, tensors: list[Tensor], *axes: int | None) -> list[Tensor]:
        """The sums of partial sums over the cuts of these axes, in one collective a mesh dimension."""
        return _reduced(tensors, self.mesh, self.cuts(*axes), dist.ReduceOp.SUM)

    def max(self, tensors: list[Tensor], *axes: int | None) -> list[Tensor]:
        """Likewise the largest."""
        return _reduced(tensors, self.mesh, self.cuts(*axes), dist.ReduceOp.MAX)

    def mean(self, tensor: Tensor, dim: int, axis: int | None) -> Tensor:
        """The mean over a dimension that carries an axis."""
        if not self.cuts(axis) or axis is None:
            return tensor.mean(dim)
        return self.sum([tensor.sum(dim)], axis)[0].div_(self.matrix[axis])

    def means(self, tensors: list[Tensor]) -> list[Tensor]:
        """The mean of all elements of every tensor, whichever axes they carry: of copies the mean is the same."""
        if not self.cuts():
            return [tensor.mean() for tensor in tensors]
        counted = [torch.stack((tensor.sum(), tensor.new_tensor(tensor.numel()))).double() for tensor in tensors]
        return [(total / count).to(tensors[0].dtype) for total, count in self.sum(counted)]

    def rms(self, tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
        """The roots of the mean squares of tensors of a shape, in `dtype`."""
        norms, count = torch.stack(list(torch._foreach_norm(tensors, 2, dtype=dtype))), tensors[0].numel()
        if not self.cuts():
            return norms.mul_(max(count, 1) ** -0.5)
        squares, counts = self.sum([torch.stack((norms.square(), torch.full_like(norms, count))).double()])[0]
        return (squares / counts).sqrt_().to(dtype)

    def norm(self, tensor: Tensor, axes: Axes, dims: tuple[int, ...], keepdim: bool = False) -> Tensor:
        """The Euclidean norm along the dimensions `dims` of a tensor whose dimensions carry `axes`."""
        norm = torch.linalg.vector_norm(tensor, dim=dims, keepdim=keepdim)
        along = [axes[dim] for dim in dims]
        return self.sum([norm.square_()], *along)[0].sqrt_() if self.cuts(*along) else norm

    # The whole of a tensor, and this rank's part of it.

    def spread(self, tensor: Tensor, axes: Axes, shape: Sequence[int] | None = None) -> Any:
        """A local tensor as a DTensor.

        Args:
            tensor: this rank's part.
            axes: what its dimensions carry.
            shape: of the whole; by default as `matrix` and `stack` have it.
        """
        from torch.distributed.tensor import DTensor

        if shape is None:
            shape = self._whole(tensor.shape, axes)
        stride = torch.empty(tuple(shape), device="meta").stride()
        return DTensor.from_local(
            *(tensor, self.mesh, self._placements(axes)), run_check=False, shape=torch.Size(shape), stride=stride
        )

    def gather(self, tensor: Tensor, axes: Axes) -> Tensor:
        """The whole of a tensor, on every rank."""
        return self.spread(tensor, axes).full_tensor() if self.cuts(*axes) else tensor

    def own(self, tensor: Tensor, axes: Axes) -> Tensor:
        """This rank's part of a tensor that every rank has."""
        return self.distribute(tensor, axes).to_local() if self.cuts(*axes) else tensor

    def distribute(self, tensor: Tensor, axes: Axes) -> Any:
        """A tensor that every rank has as a DTensor, without communication."""
        from torch.distributed.tensor import distribute_tensor

        parts = distribute_tensor(tensor.detach(), self.mesh, self._placements(axes), src_data_rank=None)
        return self.spread(parts.to_local().clone(memory_format=torch.contiguous_format), axes, tensor.shape)

    def placed(self, tensor: Tensor, axes: Axes) -> Any:
        """A whole tensor, or a DTensor that is laid out in any way, as a DTensor laid out as this one's state is."""
        if is_sharded(tensor):
            placements = self._placements(axes)
            if tensor.device_mesh == self.mesh and tensor.placements == placements:  # type: ignore[attr-defined]
                return tensor
        return self.distribute(whole(tensor), axes)

    @cached_property
    def members(self) -> list[int]:
        """Which matrices of the stack are here."""
        return self.own(torch.arange(self.stack or 0, device="cpu"), (STACK,)).tolist()

    def once(self, like: Tensor, function: Callable[[], Tensor]) -> Tensor:
        """What a factorisation gives on the first rank, on every rank.

        Args:
            like: of the shape and dtype of the result.
            function: the factorisation.

        Raises:
            LinAlgError: it failed on the first rank; then on every rank.
        """
        peers = [i for i, axis in enumerate(self.axes) if axis != STACK and self.mesh.size(i) > 1]
        if not peers:
            return function()
        try:
            result = function().contiguous()
        except LinAlgError:
            result = torch.full_like(like, math.nan, memory_format=torch.contiguous_format)
        for i in peers:
            dist.broadcast(result, group=self.mesh.get_group(i), group_src=0)
        if not bool(result.isfinite().all()):
            raise LinAlgError("the factorisation failed")
        return result

    def _whole(self, shape: Sequence[int], axes: Axes) -> list[int]:
        def size(own: int, axis: int | None) -> int:
            return own if axis is None else (self.stack or 0) if axis == STACK else self.matrix[axis]

        return [size(own, axis) for own, axis in zip(shape, axes, strict=True)]

    def _placements(self, axes: Axes) -> tuple[Any, ...]:
        """Of a tensor whose dimensions carry these axes."""
        from torch.distributed.tensor import Replicate

        return tuple(
            Replicate() if axis is None or axis not in axes else _along(placement, axes.index(axis))
            for placement, axis in zip(self.placements, self.axes, strict=True)
        )


WHOLE = Sharding()


@lru_cache(maxsize=4096)
def _runs(sharding: Sharding, shape: tuple[int, ...], axes: Axes) -> tuple[tuple[int, int], ...]:
    whole = sharding._whole(shape, axes)
    numbers = sharding.own(torch.arange(math.prod(whole), device="cpu").view(whole), axes).flatten().cpu()
    ends = (numbers.diff() != 1).nonzero().flatten() + 1
    return tuple((int(run[0]), len(run)) for run in numbers.tensor_split(ends) if len(run))


def _along(placement: Any, dim: int) -> Any:
    """The same cut along another dimension of the same size."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    if isinstance(placement, _StridedShard):  # FSDP over tensor parallelism on one dimension
        return _StridedShard(dim, split_factor=placement.split_factor)
    return Shard(dim)


def together(op: Any, parts: Sequence[tuple[Sharding, list[int], Tensor]]) -> list[Tensor]:
    """Tensors of many parameters reduced in one collective for all that are cut alike.

    Args:
        op: of torch.distributed.
        parts: (sharding, the mesh dimensions to reduce over, tensor), in an order that all ranks share.
    """
    alike: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    for index, (sharding, cuts, _) in enumerate(parts):
        alike.setdefault((sharding.mesh, tuple(cuts)), []).append(index)
    results = [tensor for _, _, tensor in parts]
    for (mesh, cuts_), members in alike.items():
        for i, tensor in zip(members, _reduced([results[i] for i in members], mesh, cuts_, op), strict=True):
            results[i] = tensor
    return results


def _reduced(tensors: list[Tensor], mesh: Any, cuts: Sequence[int], op: Any) -> list[Tensor]:
    if not cuts:
        return tensors
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    for i in cuts:
        dist.all_reduce(flat, op, mesh.get_group(i))
    parts = torch.split_with_sizes(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
