"""Arguments of projected_adam_ for the tests of GPU kernels, what surrounds them, and distances between results."""

from itertools import cycle

import torch

CANARY = 77.0


def guarded(tensor, pad):
    """A copy of it that lies between canaries, and those."""
    buffer = torch.full((tensor.numel() + 2 * pad,), CANARY, dtype=tensor.dtype, device=tensor.device)
    inner = buffer[pad:-pad].view(tensor.shape)
    inner.copy_(tensor)
    return inner, (buffer[:pad], buffer[-pad:])


def bucket(shape, rank, side, dtype, count=2, device="cpu"):
    """params, grads, exp_avgs, exp_avg_sqs, bases, steps; W is small beside an update, so that errors show."""
    torch.manual_seed(0)
    m, n = shape if side else (0, 0)
    low = {None: shape, "right": (m, rank), "left": (rank, n), "both": (rank, rank)}[side]
    sizes = {"left": (m,), "right": (n,), "both": (m, n), None: ()}[side]
    return (
        [torch.randn(shape, device=device).mul(0.01).to(dtype) for _ in range(count)],
        [torch.randn(shape, device=device).to(dtype) for _ in range(count)],
        [torch.randn(low, device=device) * 0.1 for _ in range(count)],
        [torch.rand(low, device=device) for _ in range(count)],
        [torch.linalg.qr(torch.randn(d, rank, device=device))[0].contiguous() for d in sizes for _ in range(count)],
        [torch.tensor(float(i), device=device) for i in range(count)],
    )


def twice(lists, pad=3):
    """Two copies of lists of tensors; the first between canaries, whose check is the third result.

    An odd pad leaves no address aligned; 16 leaves them all so.
    """
    pairs = [[guarded(t, pad) for t in column] for column in lists]
    canaries = [c for column in pairs for _, around in column for c in around]
    mine = [[t for t, _ in column] for column in pairs]
    return mine, [[t.clone() for t in column] for column in lists], lambda: all((c == CANARY).all() for c in canaries)


def error(a, b):
    """Largest relative Frobenius error over two lists; NaN is never close."""
    pairs = zip(a, b, strict=True)
    errors = [(torch.dist(x.double(), y.double()) / y.double().norm().clamp(min=1e-30)).item() for x, y in pairs]
    return torch.tensor([0.0, *errors]).max().item()  # which keeps a NaN


def some_unusable(lists):
    """Flags that say no of every third member from the second on; the gradients of those are NaN then."""
    flags = torch.arange(len(lists[0])) % 3 != 1
    for grad, flag in zip(lists[1], flags.tolist(), strict=True):
        if not flag:
            grad.fill_(torch.nan)
    return flags.to(lists[0][0].device)


def members(lists, flags):
    """Lists of what the flags say yes of, and of the others; a basis on each side is two lists in one."""
    wanted = flags.tolist()
    return [
        [[t for t, flag in zip(column, cycle(wanted)) if flag == which] for column in lists] for which in (True, False)
    ]
