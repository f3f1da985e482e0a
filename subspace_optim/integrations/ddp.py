"""DistributedDataParallel: a communication hook that sends R in the place of G.

    model = DistributedDataParallel(net)
    model.register_comm_hook(ProjectedState(opt), projected_allreduce_hook)

mean(Gₖ) Q = mean(GₖQ), and all ranks have the same Q, so nothing that the optimizer sees is lost.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future, collect_all

from ..engine import SubspaceOptimizer
from ..kernels.reference import back
from ..kernels.select import resolve
from ..rules import flat
from ..state import in_no_mode
from ..storage import Codec
from ..types import Bases, Plan


@dataclass(slots=True)
class _Member:
    """A projected tensor of a bucket."""

    param: Tensor
    grad: Tensor
    plan: Plan
    bases: list[Bases]
    lows: list[Tensor]


class ProjectedState:
    """What `projected_allreduce_hook`, or the one of `integrations.fsdp`, keeps on one rank.

    A message is R (m, r) of every projected tensor, G of all others and of those whose basis the coming step renews.
    With `bits` it holds codes of R and a scale for each block of at most 256 in a row:
        C = code(R + E);  E ← (R + E) - decode(C);  mean over ranks of decode(C)
    E, the error feedback, stays on its rank; a renewal of the basis sends it along with G.

    Args:
        opt: the optimizer of this rank, over the parameters of the module that is wrapped.
        bits: of an element of R in a message: None sends it as it is (float32), 8 or 4 as codes.
        error_feedback: add what the last message lost to the next one; `state_dict` keeps it.
        group: the process group of DistributedDataParallel (the default one if that was given none), or of the ranks
            that hold copies of one shard.

    Attributes:
        bytes_sent: by this rank so far, as the length of its messages.
        bytes_whole: what whole gradients would have been.

    Raises:
        ValueError: `bits` does not exist, or the method needs whole gradients.
        RuntimeError: gradients are projected within backward already.

    Source: arXiv 1901.09847 (error feedback).
    """

    def __init__(
        self,
        opt: SubspaceOptimizer,
        bits: Literal[8, 4] | None = None,
        error_feedback: bool = True,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if bits not in (None, 8, 4):
            raise ValueError(f"ProjectedState: bits={bits!r} must be None, 8 or 4")
        if opt.whole_gradient:
            raise ValueError(f"{type(opt).__name__} cannot step from projected gradients: {opt.whole_gradient}")
        if opt.in_backward:
            raise RuntimeError("ProjectedState: project_in_backward is on, which goes with average_gradients")
        self.opt, self.bits, self.error_feedback, self.group = opt, bits, error_feedback, group
        self.bytes_sent = self.bytes_whole = 0
        self._errors: dict[Tensor, list[Tensor]] = {}
        self._params = [param for group in opt.param_groups for param in group["params"]]

    @in_no_mode
    def average(self, gradients: Iterable[tuple[Tensor, Tensor]]) -> tuple[list[dist.Work], Callable[[], None]]:
        """Begin to average gradients over the ranks, in place; of a projected one is left what projects to the mean R.

        Args:
            gradients: (parameter, what is here of its gradient).

        Returns:
            What is under way, and what remains to be done when it has ended.
        """
        whole: list[Tensor] = []
        members: list[_Member] = []
        for param, grad in gradients:
            self.bytes_whole += grad.nbytes
            index = self.opt.index_of(param)
            plan = None if index is None else self.opt.low_plan(index, param)
            if plan is not None and plan.members and _smaller(plan):
                bases, kernel = self.opt.bases(plan, [param]), resolve(self.opt.backend, plan)
                lows = kernel.project(plan.matrices(grad), flat(bases), plan.side, plan.state_dtype)
                members.append(_Member(param, grad, plan, bases, lows))
                continue
            if index is not None and param in self._errors:  # seen in the basis that the coming step renews
                plan = self.opt.plan_of(index, param)
                bases = self.opt.bases(plan, [param])
                grad.add_(self._seen(_Member(param, grad, plan, bases, self._errors.pop(param))))
            whole.append(grad)
        ranks = dist.get_world_size(self.group)
        lows = [low for member in members for low in member.lows]
        sums = [torch.cat([t.flatten() for t in some]).div_(ranks) for some in (whole, lows * (not self.bits)) if some]
        works = [dist.all_reduce(total, group=self.group, async_op=True) for total in sums]
        sent = list(sums)
        received: list[Tensor] = []
        if self.bits and lows:
            sent.append(self._encoded(members))
            received = [torch.empty_like(sent[-1]) for _ in range(ranks)]
            works.append(dist.all_gather(received, sent[-1], group=self.group, async_op=True))
        self.bytes_sent += sum(message.nbytes for message in sent)

        @in_no_mode
        def finish() -> None:
            if whole:
                torch._foreach_copy_(whole, _parts(sums[0], whole))
            if lows:
                torch._foreach_copy_(lows, self._decoded(received, lows) if self.bits else _parts(sums[-1], lows))
                for member in members:
                    member.grad.copy_(self._seen(member))

        return works, finish

    def state_dict(self) -> dict[str, Any]:
        """The error feedback of this rank, by the places of the tensors in the optimizer; tensors and ints only.

        Every rank has its own, to be saved and loaded beside the optimizer's state.
        """
        return {"errors": {i: list(self._errors[p]) for i, p in enumerate(self._params) if p in self._errors}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with the error feedback that a rank has saved; nothing is shared with it.

        The mean over ranks is what counts. With another number of ranks, leave it out: what one message has lost is
        lost then.

        Args:
            state_dict: from `state_dict` of the same rank.

        Raises:
            ValueError: it is of another optimizer or another shard. Nothing has been changed then.
        """
        errors = {}
        for i, lows in state_dict["errors"].items():
            param = self._params[i] if i < len(self._params) else None
            index = None if param is None else self.opt.index_of(param)
            plan = None if param is None or index is None else self.opt.plan_of(index, param)
            found = [tuple(low.shape) for low in lows]
            if param is None or plan is None or found != [plan.low_shape] * len(plan.members):
                what = "this optimizer does not have" if param is None else f"is {self.opt.name_of(param)} here"
                raise ValueError(
                    f"ProjectedState: the error feedback of tensor {i}, which {what}, has the shapes {found}; load it "
                    "on the rank, and for the optimizer, that saved it, or leave it out"
                )
            errors[param] = [low.to(plan.device, plan.state_dtype, copy=True) for low in lows]
        self._errors = errors

    def _seen(self, member: _Member) -> Tensor:
        """The gradient in the span of the bases that projects to the member's R."""
        plan, matrices = member.plan, []
        assert self.opt.projector is not None
        for low, bases in zip(member.lows, member.bases, strict=True):
            if not self.opt.projector.orthonormal or plan.basis_bits < 32:
                for side, basis in zip(plan.sides, bases, strict=True):
                    (gram,) = plan.sharding.sum([basis.mT @ basis], 0 if side == "left" else 1)
                    inverse = torch.linalg.pinv(gram, hermitian=True)
                    low = inverse @ low if side == "left" else low @ inverse
            matrices.append(back(low, bases, plan.side))
        return torch.stack(matrices).view(member.grad.shape)

    def _encoded(self, members: list[_Member]) -> Tensor:
        """The message of all members, as bytes: of each R its codes, then its scales."""
        pieces = []
        for member in members:
            if self.error_feedback and member.param in self._errors:
                torch._foreach_add_(member.lows, self._errors[member.param])
            first = member.lows[0]
            codec = self._codec(first)
            codes, scales = (
                [torch.empty(shape, dtype=dtype, device=first.device) for _ in member.lows]
                for shape, dtype in zip(codec.shapes(first.shape), (torch.uint8, torch.float32), strict=True)
            )
            codec.encode_(member.lows, codes, scales)
            if self.error_feedback:
                sent = codec.decode(codes, scales, first.dtype)
                left = (low - part for low, part in zip(member.lows, sent, strict=True))
                self._errors[member.param] = [torch.nan_to_num(error, 0.0, 0.0, 0.0) for error in left]
            for low, code, scale in zip(member.lows, codes, scales, strict=True):
                scale.masked_fill_(~low.isfinite().all(), math.nan)  # a bad gradient is bad on every rank
                pieces += [code.flatten(), scale.flatten().view(torch.uint8)]
        return torch.cat(pieces)

    def _decoded(self, received: Iterable[Tensor], lows: list[Tensor]) -> list[Tensor]:
        """The means over ranks of what their messages hold."""
        totals = [torch.zeros_like(low) for low in lows]
        for message in received:
            at = 0
            for total in totals:
                codec = self._codec(total)
                codes, scales = (math.prod(shape) for shape in codec.shapes(total.shape))
                code, scale = message[at : at + codes], message[at + codes : at + codes + 4 * scales].clone()
                shapes = codec.shapes(total.shape)
                scale = scale.view(torch.float32).view(shapes[1])
                total += codec.decode([code.view(shapes[0])], [scale], total.dtype)[0]
                at += codes + 4 * scales
        torch._foreach_div_(totals, dist.get_world_size(self.group))
        return totals

    def _codec(self, low: Tensor) -> Codec:
        assert self.bits
        return Codec("linear", self.bits, -1, low.shape[-1])


def projected_allreduce_hook(state: ProjectedState, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
    """For `DistributedDataParallel.register_comm_hook`: average R of projected tensors and G of the others.

    p.grad is then the back-projected mean of R, and the step projects it again: exact to rounding, whatever the
    trainer does with p.grad in between (clipping, logging). With bases that are not orthonormal (Gaussian, Rademacher,
    quantised) it is R(QᵀQ)⁻¹Qᵀ, which projects to R as well.

    Args:
        state: made for this rank's optimizer.
        bucket: of gradients, from DistributedDataParallel.
    """
    works, finish = state.average(zip(bucket.parameters(), bucket.gradients(), strict=True))

    def end(done: Future[Any]) -> Tensor:
        done.wait()
        finish()
        return bucket.buffer()

    return collect_all([work.get_future() for work in works]).then(end)


def _smaller(plan: Plan) -> bool:
    """Whether R is less to send than what is here of G: where its sum is over shards, each of them has all of R."""
    summed = [axis for axis in (0, 1) if axis not in plan.low_axes]
    shards = math.prod(plan.sharding.mesh.size(i) for i in plan.sharding.cuts(*summed))
    return shards * math.prod(plan.whole.low_shape) < math.prod(plan.whole.matrix)


def _parts(total: Tensor, like: list[Tensor]) -> list[Tensor]:
    pieces = torch.split(total, [tensor.numel() for tensor in like])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]
