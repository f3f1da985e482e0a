"""Gradients that never exist at full size: projected within backward, accumulated in the subspace.

Two strengths, and one step that is the engine's in both:
    hooks    backward makes G of one tensor, which becomes R at once:  R ← R + project(G), and G is freed
    linear   backward of a linear layer y = xWᵀ, with D = dL/dy, makes R itself:
             right  R = Dᵀ(xQ), xQ (tokens, r) kept in the place of x (tokens, n)
             left   R = (DP)ᵀx
             both   R = (DP)ᵀ(xQ)
           under tensor parallelism on what a rank has of x, W and D, R being summed where it sums over their cut
A tensor whose basis is due for renewal in the coming step keeps its whole gradient for that step.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear as dense_linear

from .distributed import CONTRACTED, check_replicas, is_cut_once, is_sharded, linear_over_shards, settled_grad
from .engine import SubspaceOptimizer
from .state import not_dense
from .types import Plan, Side

_MESSAGE_BYTES = 2**25  # from about this size on, a larger message is no faster


class ProjectedBackward:
    """What `project_in_backward` has put in place; a context manager that removes it at the end.

    Args:
        opt: the optimizer that is served.

    Attributes:
        hooked: names of the tensors whose gradients are projected as soon as they exist.
        linear: names of the weights whose gradients never exist.
    """

    def __init__(self, opt: SubspaceOptimizer) -> None:
        self.opt = opt
        self.hooked: list[str] = []
        self.linear: list[str] = []
        self._undo: list[Callable[[], None]] = []

    def remove(self) -> None:
        """Leave the model and the optimizer as they were. What has been accumulated stays for the coming step."""
        _undo(self._undo)
        self.opt.in_backward = None

    def __enter__(self) -> ProjectedBackward:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(linear={self.linear}, hooked={self.hooked})"


def project_in_backward(
    model: nn.Module | Iterable[Tensor], opt: SubspaceOptimizer, *, linear: bool = False, early: bool = False
) -> ProjectedBackward:
    """Project every gradient within backward, so that no more than R is kept of it.

    All else stays as it is: one optimizer with real schedulers, any number of backwards before a step, zero_grad.
    Weights and moments equal those of the ordinary step to rounding. A tensor whose basis is due for renewal in the
    coming step (in the first: every tensor) keeps its whole gradient in p.grad for that step. Dense tensors keep
    theirs always.

    Clip by `opt.clip_grad_norm_`: torch.nn.utils.clip_grad_norm_ cannot see R. On several ranks leave
    DistributedDataParallel out and call `average_gradients` before the step. Under fully_shard the gradient of a shard
    is projected as soon as it has been reduced, and nothing more is to be called.

    Args:
        model: a module, or tensors; those that the optimizer projects are served, the others left alone.
        opt: the optimizer.
        linear: let the backward of every nn.Linear form R itself: its weight's G never exists, and where the input
            dimension is projected (side right) xQ is kept for backward in the place of x. Other modules, and layers
            whose `forward` somebody has replaced, are served by hooks. Layers served so break the graph of
            torch.compile.
        early: renew a basis that is due as soon as the first gradient exists, so that no whole gradient outlives its
            layer, not even in the first step. With one micro-batch a step nothing else changes; with more, the basis
            comes from the first one. Not for several ranks, whose gradients differ until they are averaged.

    Returns:
        A handle with `remove()`, also a context manager.

    Raises:
        TypeError: an argument is of a type that cannot be served; with linear=True also weights that are sharded
            otherwise than by tensor parallelism alone.
        ValueError: the method needs whole gradients at every step (Flora, Online Subspace Descent, GradNormLoRP,
            APOLLO), or the optimizer projects none of the tensors.
        RuntimeError: the optimizer is served already, or a tensor has a post-accumulate hook.

    Source: arXiv 2403.03507.
    Deviations: the official code steps every layer within backward, which rules out accumulation, clipping by a
        global norm and a step that can be skipped; here backward only projects.
    """
    if not isinstance(opt, SubspaceOptimizer):
        raise TypeError(f"project_in_backward needs an optimizer of this package, not {type(opt).__name__}")
    if opt.in_backward:
        raise RuntimeError("project_in_backward is on for this optimizer already; remove() its handle first")
    if opt.whole_gradient:
        raise ValueError(f"{type(opt).__name__} cannot step from projected gradients: {opt.whole_gradient}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError(
            "project_in_backward serves the module itself, not DistributedDataParallel, whose buckets hold every "
            "gradient; call average_gradients before the step in its place"
        )
    if linear and not isinstance(model, nn.Module):
        raise TypeError(f"linear=True needs a torch.nn.Module to find the layers in, not {type(model).__name__}")
    named: Iterable[tuple[str, Tensor]] = (
        model.named_parameters()
        if isinstance(model, nn.Module)
        else ((f"tensor {i} of shape {tuple(p.shape)}", p) for i, p in enumerate(model))
    )
    groups = {param: index for index, group in enumerate(opt.param_groups) for param in group["params"]}
    chosen = {p: name for name, p in named if p in groups and p.requires_grad and opt.plan_of(groups[p], p).side}
    if any(param._post_accumulate_grad_hooks for param in chosen):
        gc.collect()  # the hooks of an optimizer that nobody holds any more go with it
    for param, name in chosen.items():
        if param._post_accumulate_grad_hooks:
            raise RuntimeError(
                f"{name} has a post-accumulate hook already, which would find no gradient; remove it: where it is of "
                "another optimizer, by remove() of what project_in_backward returned"
            )
    if not chosen:
        raise ValueError("the optimizer projects none of these tensors, so there is nothing to serve")

    layers: list[Any] = []  # an attribute that replaces a method has no type
    module: Any
    managed = _fully_sharded(model) if linear and isinstance(model, nn.Module) else set()
    for module in model.modules() if linear and isinstance(model, nn.Module) else ():
        if getattr(module.forward, "__func__", None) is nn.Linear.forward and module.weight in chosen:
            if module.weight in managed:
                raise TypeError(
                    f"linear=True: {chosen[module.weight]} is sharded by fully_shard, whose layer computes with more "
                    "than is kept here of it; leave linear out, and its gradient is projected once it has been reduced"
                )
            if is_sharded(module.weight) and not is_cut_once(module.weight):
                raise TypeError(
                    f"linear=True: {chosen[module.weight]} has the placements {module.weight.placements}; leave linear "
                    "out, which serves what one mesh dimension cuts, as parallelize_module does"
                )
            layers.append(module)

    handle = ProjectedBackward(opt)
    replaced: set[Tensor] = set()
    for layer in layers:
        layer.forward = _Linear(layer, opt)
        handle._undo.append(partial(delattr, layer, "forward"))
        replaced.add(layer.weight)
    if isinstance(model, nn.Module):
        module = model
        module.zero_grad = _ZeroGrad(model, opt)
        handle._undo.append(partial(delattr, model, "zero_grad"))
    for param, name in chosen.items():
        # A replaced weight has one as well: for its whole gradients, and for other uses of it.
        hook = _Hook(opt, name, early)
        handle._undo.append(param.register_post_accumulate_grad_hook(hook).remove)  # type: ignore[no-untyped-call]
        (handle.linear if param in replaced else handle.hooked).append(name)
    weakref.finalize(opt, _undo, handle._undo).atexit = False
    opt.in_backward = "early" if early else "exact"
    return handle


def _undo(steps: list[Callable[[], None]]) -> None:
    while steps:
        steps.pop()()


def _fully_sharded(model: nn.Module) -> set[Tensor]:
    """The parameters that fully_shard has replaced."""
    if not any(map(is_sharded, model.parameters())):
        return set()
    from torch.distributed.fsdp import FSDPModule

    return {param for module in model.modules() if isinstance(module, FSDPModule) for param in module.parameters()}


class _Hook:
    """Projects the gradient of one tensor as soon as it exists.

    The optimizer is held weakly: the collector does not see what hooks of tensors hold, and would never free it.
    """

    def __init__(self, opt: SubspaceOptimizer, name: str, early: bool) -> None:
        self.serves, self.name, self.early = weakref.ref(opt), name, early

    def __call__(self, param: Tensor) -> None:
        if len(param._post_accumulate_grad_hooks) > 1:
            raise RuntimeError(
                f"{self.name} has a second post-accumulate hook, which would find no gradient; remove it"
            )
        opt = self.serves()
        index = None if opt is None else opt.index_of(param)
        if opt is None or index is None:
            return
        if self.early and param.grad is not None and opt.low_plan(index, param) is None:
            opt.renew_early(index, param)
        opt.project_gradients([(index, param)])


@torch.no_grad()
def average_gradients(opt: SubspaceOptimizer, group: dist.ProcessGroup | None = None) -> None:
    """Average over ranks what the coming step starts from: R of what was projected ahead, p.grad of everything else.

    mean(Gₖ) Q = mean(GₖQ), and all ranks have the same Q: exact, and r columns are sent in the place of n.
    Call it on every rank after the last backward and before `clip_grad_norm_` and `step`; start from the same weights
    (broadcast them, or load the same checkpoint). A tensor without a gradient on some ranks counts as zero there.

    Args:
        opt: the optimizer of this rank.
        group: of ranks; all by default. Of sharded parameters, the ranks that hold copies of one shard.

    Raises:
        RuntimeError: there is no process group, or ranks differ in their bases or in what they projected.
        ValueError: the group holds other shards of a parameter.
        TypeError: a gradient is sparse.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("average_gradients needs torch.distributed; call torch.distributed.init_process_group first")
    if opt.in_backward == "early" and opt.projector is not None and opt.projector.needs_gradient:
        raise RuntimeError("average_gradients: with early=True every rank has bases of its own gradients; leave it out")
    params = [(index, p) for index, g in enumerate(opt.param_groups) for p in g["params"] if p.requires_grad]
    for _, param in params:
        if is_sharded(param):
            check_replicas(f"average_gradients: {opt.name_of(param)}", param, group)
    device = params[0][1].device if params else torch.device("cpu")
    mine = [
        (p in opt.lows, p.grad is not None, p.grad is not None and p.grad.layout != torch.strided) for _, p in params
    ]
    held = torch.tensor(mine, dtype=torch.int32, device=device)
    dist.all_reduce(held, group=group)
    for (_, param), (ahead, whole, sparse) in zip(params, held.tolist(), strict=True):
        if ahead and whole:
            raise RuntimeError(
                f"{opt.name_of(param)} was projected ahead on some ranks only; their states differ: "
                "start from the same weights and checkpoint, and let every rank call backward and step alike"
            )
        if sparse:  # on any rank: the others would wait for that one
            raise not_dense(opt.name_of(param), "sparse")
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for (index, param), (ahead, whole, _) in zip(params, held.tolist(), strict=True):
        if ahead and param not in opt.lows:
            plan = opt.plan_of(index, param)
            low = torch.zeros(plan.low_shape, dtype=plan.state_dtype, device=plan.device)
            opt.add_low(param, [low.clone() for _ in plan.members])
        elif whole and param.grad is None:
            param.grad = torch.zeros_like(param)
        for tensor in opt.lows.get(param, ()) if ahead else [settled_grad(param)] * bool(whole):
            alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for tensors in alike.values():
        for part in _parts(tensors):
            flat = torch.cat([tensor.flatten() for tensor in part]).div_(dist.get_world_size(group))
            dist.all_reduce(flat, group=group)
            for tensor, mean in zip(part, torch.split(flat, [tensor.numel() for tensor in part]), strict=True):
                tensor.copy_(mean.view_as(tensor))


def _parts(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of which each but the last is as large as a message should be."""
    part: list[Tensor] = []
    for tensor in tensors:
        part.append(tensor)
        if sum(t.nbytes for t in part) >= _MESSAGE_BYTES:
            yield part
            part = []
    if part:
        yield part


class _ZeroGrad:
    """`zero_grad` of the model, which loops call in the place of the optimizer's: R is forgotten along with p.grad."""

    def __init__(self, module: nn.Module, opt: SubspaceOptimizer) -> None:
        self.module, self.serves = module, weakref.ref(opt)

    def __reduce__(self) -> tuple[Any, ...]:
        """As of `_Linear`."""
        return getattr, (self.module, "zero_grad")

    def __call__(self, set_to_none: bool = True) -> None:
        type(self.module).zero_grad(self.module, set_to_none)
        lows = getattr(self.serves(), "lows", {})
        for param in self.module.parameters():
            lows.pop(param, None)


class _Linear:
    """The forward of one linear layer: as it was, but for what autograd keeps and makes of the weight."""

    def __init__(self, module: nn.Linear, opt: SubspaceOptimizer) -> None:
        self.module, self.serves = module, weakref.ref(opt)
        self.weight = module.weight
        self._run = torch.compiler.disable(self._projected)  # type: ignore[no-untyped-call]

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the module, or one from a file, is a plain one."""
        return getattr, (self.module, "forward")  # which has none of its own yet

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(x)

    def _projected(self, x: Tensor) -> Tensor:
        weight, bias = self.module.weight, self.module.bias
        served = weight is self.weight and weight.requires_grad and weight.grad is None and torch.is_grad_enabled()
        opt = self.serves() if served else None
        index = None if opt is None else opt.index_of(weight)
        plan = None if opt is None or index is None else opt.low_plan(index, weight)
        if opt is None or plan is None:
            return dense_linear(x, weight, bias)
        # Autocast would keep its copy of the weight, made without a graph, for whoever else uses the weight.
        shift: Tensor | None = bias
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # which autocast leaves as it is
            x = x.to(torch.get_autocast_dtype(device))
            shift = None if bias is None else bias.to(x.dtype)
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            rest = (_stand_in(opt, weight, plan), partial(_basis, opt, weight, plan), plan)
            apply: Callable[..., Tensor] = _ProjectedLinear.apply
            if is_sharded(weight):
                y = linear_over_shards(lambda own, shard: apply(own, shard, None, *rest), x, weight.detach())
                return y if shift is None else y + shift
            return apply(x, weight.detach(), shift, *rest)


def _stand_in(opt: SubspaceOptimizer, weight: Tensor, plan: Plan) -> Tensor:
    """A leaf of R's shape and no memory, whose gradient is R; autograd sums it over calls and hands it over."""

    def receive(leaf: Tensor) -> None:
        assert leaf.grad is not None
        opt.add_low(weight, [leaf.grad])
        leaf.grad = None

    leaf = torch.zeros((), dtype=plan.state_dtype, device=plan.device).expand(plan.low_shape).requires_grad_()
    leaf.register_post_accumulate_grad_hook(receive)  # type: ignore[no-untyped-call]
    return leaf


def _basis(opt: SubspaceOptimizer, weight: Tensor, plan: Plan, side: Side, dtype: torch.dtype) -> Tensor:
    """P (left) or Q (right)."""
    return opt.bases(plan, [weight])[0][plan.sides.index(side)].to(dtype)


class _ProjectedLinear(torch.autograd.Function):
    """y = xWᵀ + b, with R as the gradient of a stand-in and none for W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stand_in: Tensor,
        basis: Callable[..., Tensor],
        plan: Plan,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        kept = rows if plan.side == "left" else rows @ basis("right", x.dtype)
        ctx.save_for_backward(kept, weight)
        ctx.basis, ctx.plan = basis, plan
        return dense_linear(x, weight.to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            rows = grad.reshape(-1, grad.shape[-1])
            inner = None
            if ctx.needs_input_grad[0]:
                inner = (rows @ weight.to(grad.dtype)).view(*grad.shape[:-1], weight.shape[1])
            outer = rows.sum(0) if ctx.needs_input_grad[2] else None
            if ctx.plan.side != "right":
                rows = rows @ ctx.basis("left", grad.dtype)
            (low,) = ctx.plan.sharding.sum([rows.mT @ kept], *CONTRACTED[ctx.plan.side])
        return inner, None, outer, low, None, None
