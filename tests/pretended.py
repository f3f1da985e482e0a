"""Tensors that say they are on a GPU and keep their numbers on the CPU: what mixes devices raises, as it would there.

`Elsewhere` is the mode under which torch makes such tensors for device="cuda". What only a driver can do, launching
kernels and autograd's threads, is not part of it.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
BETWEEN = {getattr(torch.ops.aten, name) for name in ("copy_", "_to_copy", "_foreach_copy_", "index", "index_put_")}


class Pretended(torch.Tensor):
    """Of the CPU tensor `host`."""

    @staticmethod
    def __new__(cls, host):
        how = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, host.shape, device=GPU, **how)

    def __init__(self, host):
        self.host = host

    def __repr__(self):
        return f"Pretended({self.host!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatched(func, args, kwargs or {})

    # torch's own of these ask the driver for the device.

    def __getitem__(self, key):
        return Pretended(self.host[tree_map(host_of, key)])

    def __setitem__(self, key, value):
        self.host[tree_map(host_of, key)] = host_of(value)

    def copy_(self, other, non_blocking=False):
        self.host.copy_(host_of(other))
        return self

    def contiguous(self):
        return self if self.host.is_contiguous() else Pretended(self.host.contiguous())

    def tolist(self):
        return self.host.tolist()

    def __bool__(self):
        return bool(self.host)

    def __float__(self):
        return float(self.host)

    def __int__(self):
        return int(self.host)


def host_of(x):
    """The tensor that a pretended one has; anything else as it is."""
    return x.host if isinstance(x, Pretended) else x


class Elsewhere(TorchDispatchMode):
    """torch.empty(…, device="cuda") and what else makes tensors; torch.tensor moves there what it has made here."""

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatched(func, args, kwargs or {})


def dispatched(func, args, kwargs):
    """What func does to the CPU's numbers, where its result would be."""
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [x for x in given if isinstance(x, Pretended)]
    asked = kwargs.get("device")
    if there and func.overloadpacket not in BETWEEN:
        strangers = [x for x in given if not isinstance(x, Pretended) and x.ndim > 0]
        assert not strangers, f"{func} takes a tensor of the CPU beside one of the GPU"
        lists = [arg for arg in args if isinstance(arg, list) and arg and isinstance(arg[0], torch.Tensor)]
        assert all(len({x.device for x in own}) == 1 for own in lists), f"{func} of a list on two devices"
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    own_args, own_kwargs = tree_map(host_of, (args, kwargs))
    out = func(*own_args, **own_kwargs)
    stays = there if asked is None else torch.device(asked).type == "cuda"
    if not stays:
        return out
    out = tree_map(lambda x: Pretended(x) if isinstance(x, torch.Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if there else out
