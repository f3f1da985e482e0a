"""Who takes part: our methods on every backend, torch's AdamW, and the peers that are installed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch

import subspace_optim as so
from subspace_optim import _ext
from subspace_optim.kernels import select

MODELS = {  # hidden, intermediate, layers, vocabulary, rank: LLaMA as GaLore has it
    "tiny": (64, 176, 2, 512, 16),
    "60m": (512, 1376, 8, 32000, 128),
    "130m": (768, 2048, 12, 32000, 256),
    "1b": (2048, 5461, 24, 32000, 512),
}
METHODS = ("adamw", "grams", "galore", "osd", "flora", "gradnormlorp", "apollo")
LR = 1e-4
NEVER = 10**9  # a gap that no run reaches
BASELINE = "torch AdamW fused"
PACKAGES = ("torch", "triton", "galore-torch", "apollo-torch", "pytorch_optimizer", "bitsandbytes", "torchao")


@dataclass(frozen=True)
class Arm:
    """`make(projected, dense, rank)` builds the optimizer.

    Attributes:
        method: what it computes, for limits.py.
        checked: whether it is ours and float64 has its numbers.
        bits: of its moments, for limits.py.
        bound: of its error, where that is not the one of the dtype.
    """

    make: Callable[..., torch.optim.Optimizer]
    method: str
    checked: bool = False
    bits: int | None = None
    bound: float | None = None


def arms(backends):
    """Every arm by name; "auto" goes without saying."""
    known = {
        BASELINE: Arm(partial(torch_adamw, fused=True), "adamw"),
        "torch AdamW foreach": Arm(partial(torch_adamw, foreach=True), "adamw"),
    }
    for backend in backends:
        why = None if backend == "auto" else select.IMPLS[backend](None)
        if why is not None:
            print(f"{backend}: left out ({why})")
            continue
        tag = "" if backend == "auto" else f" ({backend})"
        known |= {f"{method}{tag}": Arm(partial(ours, method, backend), method, True, 32) for method in METHODS}
    for method, bits in product(("adamw", "galore"), (8, 4)):  # codes are not float64's numbers: without its parity
        known[f"{method} {bits}-bit"] = Arm(partial(ours, method, "auto", state_bits=bits), method, bits=bits)
    if _ext.load() is None and _ext.isa().endswith("_bf16"):  # tests/test_products.py has this bound
        for method in ("galore", "gradnormlorp", "flora", "osd"):
            known[f"{method} bf16 products"] = Arm(partial(rounded, method), method, True, 32, bound=1e-2)
    return known | peers()


def ours(method, backend, projected, dense, rank, lr=LR, gap=NEVER, **options):
    groups = [{"params": projected, "rank": rank, "update_proj_gap": gap}, {"params": dense}]
    if method in ("adamw", "grams"):
        groups = projected + dense
    cls = {"adamw": so.SubspaceOptimizer, **so.OPTIMIZERS}[method]
    return cls(groups, lr=lr, backend=backend, **options)


def rounded(method, *setting, **options):
    """Ours, in a process that allows products of float32 to be rounded (`set_float32_matmul_precision("medium")`)."""
    optimizer, place = ours(method, "auto", *setting, **options), torch.backends.mkldnn.matmul
    step = optimizer.step

    def allowed():
        place.fp32_precision = "bf16"
        step()
        place.fp32_precision = "none"

    optimizer.step = allowed
    return optimizer


def torch_adamw(projected, dense, rank, **how):
    return torch.optim.AdamW(projected + dense, lr=LR, **how)


# ---- peers ----------------------------------------------------------------------------------------------------------


def peers():
    known = {
        "galore-torch": Arm(galore_torch, "galore"),
        "apollo-torch": Arm(apollo_torch, "apollo"),
        "pytorch_optimizer GaLore": Arm(partial(pytorch_optimizer, "GaLore"), "galore"),
        "pytorch_optimizer Grams": Arm(partial(pytorch_optimizer, "Grams"), "grams"),
        "bitsandbytes AdamW8bit": Arm(bitsandbytes, "adamw", bits=8),
        "torchao AdamW8bit": Arm(partial(torchao, "AdamW8bit"), "adamw", bits=8),
        "torchao AdamW4bit": Arm(partial(torchao, "AdamW4bit"), "adamw", bits=4),
    }
    return {f"peer {name}": arm for name, arm in known.items()}


def galore_torch(projected, dense, rank):
    from galore_torch import GaLoreAdamW

    group = {"params": projected, "rank": rank, "update_proj_gap": NEVER, "scale": 0.25, "proj_type": "std"}
    return GaLoreAdamW([{"params": dense}, group], lr=LR, no_deprecation_warning=True)


def apollo_torch(projected, dense, rank):
    from apollo_torch import APOLLOAdamW

    group = {"params": projected, "rank": rank, "update_proj_gap": NEVER, "scale": 1, "proj_type": "std"}
    group |= {"proj": "random", "scale_type": "channel"}
    return APOLLOAdamW([{"params": dense}, group], lr=LR, no_deprecation_warning=True)


def pytorch_optimizer(name, projected, dense, rank):
    import pytorch_optimizer as peer

    group = {"params": projected, "rank": rank, "update_proj_gap": NEVER, "scale": 0.25, "projection_type": "std"}
    groups = [{"params": dense}, group] if name == "GaLore" else projected + dense
    return getattr(peer, name)(groups, lr=LR)


def bitsandbytes(projected, dense, rank):
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(projected + dense, lr=LR)


def torchao(name, projected, dense, rank):
    from torchao import optim as peer

    return getattr(peer, name)(projected + dense, lr=LR)


def built(chosen, setting) -> Iterator[tuple[str, torch.optim.Optimizer]]:
    """The optimizers of the arms that work here, one step into their run: bases are set."""
    for name, arm in chosen.items():
        try:
            optimizer = arm.make(*setting)
            optimizer.step()
        except Exception as error:
            if not name.startswith("peer"):
                raise
            print(f"{name}: left out ({type(error).__name__}: {str(error).splitlines()[0]})")
            continue
        yield name, optimizer


def refresh(optimizer, projected) -> Callable[[], object] | None:
    """A step in which every basis is renewed, from now on in every step of a peer's; None without a basis to renew."""
    states = [optimizer.state[p] for p in projected]
    if hasattr(states[0].get("projector"), "update_proj_gap"):
        for state in states:
            state["projector"].update_proj_gap = 1
        return optimizer.step
    if "basis" not in states[0] or not optimizer.projector.periodic:
        return None

    def step():
        for state in states:
            state["age"] = NEVER
        optimizer.step()

    return step
