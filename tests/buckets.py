"""Arguments of the steps for the tests of GPU kernels, what surrounds them, and distances between results."""

from dataclasses import replace
from itertools import cycle

import torch

from subspace_optim import storage
from subspace_optim.kernels import reference
from subspace_optim.philox import ALL, Window
from subspace_optim.rules import CompressedAdafactor, WeightNormAdam
from subspace_optim.types import TRANSFORMS, Bucket, Hyper, Moments, Plan, Weights

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


RATE = torch.tensor(0.7, dtype=torch.float64)
HYPER = Hyper(RATE, (0.8, 0.95), 1e-3, 0.1, 0.5, "none", "rotate")


def step_projected(kernel, lists, side, transform="none", seeds=(), window=ALL, finite=None, **changed):
    """One step of projected_adam_, of the lists of `bucket`; `changed` numbers of HYPER."""
    params, grads, means, squares, bases, steps = lists
    weights, moments = Weights(params, steps, seeds, window, finite), Moments(means, squares)
    kernel.projected_adam_(weights, grads, moments, bases, replace(HYPER, transform=transform, **changed), side)


def coded_bucket(shape, axis, bits, dtype, count=2, device="cpu"):
    """params, grads, codes, scales, steps; some are zero, and so are all of a block."""
    params, grads, means, squares, _, steps = bucket(shape, None, None, dtype, count, device)
    for mean, square in zip(means, squares):
        mean[0], square[0], mean[1] = 0, 0, mean[1] * 1e-42
    codes, scales = [], []
    for kind, moments in (("signed", means), ("unsigned", squares)):
        codec = storage.Codec(kind, bits, axis, shape[axis])
        for x in moments:
            pair = [torch.zeros(s, dtype=t, device=device) for s, t in zip(codec.shapes(shape), (torch.uint8, x.dtype))]
            codec.encode_([x], *([own] for own in pair))
            codes.append(pair[0])
            scales.append(pair[1])
    return params, grads, codes, scales, steps


def step_coded(kernel, lists, axis, bits, transform="none", seeds=(), begin=0, eps_inside=False, finite=None, lr=RATE):
    """One step of coded_adam_."""
    params, grads, codes, scales, steps = lists
    device = params[0].device
    tables = [torch.tensor(storage.values(kind, bits), device=device) for kind in ("signed", "unsigned")]
    streams = [2**40 + 7 * i for i in range(len(codes))]
    kept = reference.Codes(codes, scales, tables, streams, axis, begin)
    hyper = replace(HYPER, lr=lr, transform=transform)
    kernel.coded_adam_(Weights(params, steps, seeds, finite=finite), grads, kept, hyper, eps_inside)


def update_coded(kernel, lists, axis, bits, transform="none", begin=0):
    """N of one step on codes; the reference has it as what a step of -1 adds to zero."""
    _, lows, codes, scales, steps = lists
    codec = [storage.Codec(kind, bits, axis, lows[0].shape[axis]) for kind in ("signed", "unsigned")]
    moments = [
        storage.Coded(codec[i // len(lows)], *pair, 2**40 + 7 * i, begin) for i, pair in enumerate(zip(codes, scales))
    ]
    pair = Moments(moments[: len(lows)], moments[len(lows) :])
    return storage.Coding(kernel).adam_update_(lows, pair, steps, replace(HYPER, transform=transform))


def assert_codes_alike(kernel, codec, shape, seeds, begin, dtype=torch.float32, pad=16, device="cpu"):
    """encode_ and decode_ of a list, with the bits of the reference; seeds: three, or none."""
    xs = [torch.randn(shape, device=device) * torch.logspace(-20, 3, shape[-1], device=device) for _ in range(3)]
    for x in xs:
        x[0] = 0
        x[1].mul_(1e-42)
    xs = [(x.abs() if codec.kind == "unsigned" else x).to(dtype) for x in xs]
    steps = [torch.tensor(70000.0 + i, device=device) for i in range(len(seeds))]
    codes, scales = codec.shapes(shape)
    code, scale = torch.full(codes, 77, dtype=torch.uint8, device=device), torch.zeros(scales, device=device)
    mine, theirs, unharmed = twice([[code] * 3, [scale] * 3], pad)
    for each, kept in ((kernel, mine), (reference, theirs)):
        codec.encode_(xs, *kept, seeds, steps, each, begin)
    assert all(torch.equal(a, b) for pair in zip(mine, theirs) for a, b in zip(*pair))
    assert unharmed()
    for wide in (torch.float32, torch.bfloat16, torch.float64):
        (mine,), (wanted,), unharmed = twice([[x.to(wide) for x in xs]], pad)
        for each, given in ((kernel, mine), (reference, wanted)):
            codec.decode_(given, *theirs, each)
        assert all(map(torch.equal, mine, wanted))
        assert unharmed()


def assert_coded_alike(mine, theirs):
    """Adam may differ in its last bit, by which one code in 10,000 is the next one, and one bfloat16 in 1000."""
    for (slot, column), others in zip(zip(("params", "grads", "codes", "scales", "steps"), mine), theirs):
        for x, y in zip(column, others, strict=True):
            few = {"codes": 1 + 1e-4 * x.numel(), "params": x.numel() * (1e-3 if x.itemsize == 2 else 1)}.get(slot, 0)
            assert slot == "scales" or (x != y).sum() <= few + 1, slot
            if slot != "codes":
                rough = slot == "params" and x.itemsize == 2
                torch.testing.assert_close(x, y, rtol=8e-3 if rough else 2e-6, atol=1e-6)


def length_bucket(shape, rank, side, dtype, count=2, device="cpu"):
    """params, grads, both moments, those of the row lengths, bases, steps; one row is zero."""
    params, grads, means, squares, bases, steps = bucket(shape, rank, side, dtype, count, device)
    params[-1][shape[0] // 2] = 0
    of_lengths = [[torch.rand(shape[0], device=device) * 0.1 for _ in range(count)] for _ in range(2)]
    return params, grads, means, squares, *of_lengths, bases, steps


def step_lengths(kernel, lists, side, transform="none", seeds=(), finite=None, lr=RATE):
    """One step of WeightNormAdam: in one call if the kernel has it, otherwise in pieces."""
    *slots, bases, steps = lists
    count, (params, grads, *moments) = len(steps), slots
    plan = Plan(*[tuple(params[0].shape)] * 2, None, side, bases[0].shape[1], params[0].dtype, params[0].device)
    keys = ("exp_avg", "exp_avg_sq", "magnitude_exp_avg", "magnitude_exp_avg_sq", "step")
    states = [dict(zip(keys, own)) for own in zip(*moments, steps)]
    given = Bucket(plan, bool(seeds), params, grads, states, streams=list(seeds), finite=finite)
    given.bases = [tuple(bases[i::count]) for i in range(count)]
    WeightNormAdam().step_(given, replace(HYPER, lr=lr, transform=transform), kernel)


def momentum_bucket(shape, rank, side, dtype, count=2, device="cpu"):
    """params, grads, momenta, averages of squares by rows and columns, old and new bases, steps; a row of G is zero.

    The last matrix changes its basis.
    """
    params, grads, momenta, _, old, steps = bucket(shape, rank, side, dtype, count, device)
    grads[0][shape[0] // 2] = 0
    averages = [[torch.rand(size, device=device) for _ in range(count)] for size in shape]
    steps = [step + 1 for step in steps]
    new = [b if i % count < count - 1 else b.flip(0).contiguous() for i, b in enumerate(old)]
    return params, grads, momenta, *averages, old, new, steps


def step_momenta(kernel, lists, side, transform="none", seeds=(), finite=None, lr=RATE, clip=0.3, rests=()):
    """One step of CompressedAdafactor: in one call if the kernel has it, otherwise in pieces."""
    *slots, old, new, steps = lists
    count, (params, grads, *averages) = len(steps), slots
    plan = Plan(*[tuple(params[0].shape)] * 2, None, side, old[0].shape[1], params[0].dtype, params[0].device)
    plan = replace(plan, compensated=len(rests) > 0)
    keys = ("exp_avg", "exp_avg_sq_row", "exp_avg_sq_col", "step", "compensation")
    states = [dict(zip(keys, own)) for own in zip(*averages, steps, rests or steps)]
    given = Bucket(plan, bool(seeds), params, grads, states, streams=list(seeds), finite=finite)
    given.previous = [tuple(old[i::count]) for i in range(count)]
    given.bases = [*given.previous[:-1], tuple(new[count - 1 :: count])]
    CompressedAdafactor(clip_threshold=clip).step_(given, replace(HYPER, lr=lr, transform=transform), kernel)


def step_coded_lengths(kernel, lists, side, bits, transform="none", seeds=(), finite=None):
    """One step of WeightNormAdam on moments as codes, which are those of `lists` before; returns the moments after."""
    params, grads, means, squares, *lengths, bases, steps = lists
    axis, kept = -2 if side == "left" else -1, []
    for kind, column in (("signed", means), ("unsigned", squares)):
        codec, coded = storage.Codec(kind, bits, axis, column[0].shape[axis]), []
        for i, x in enumerate(column):
            shapes = zip(codec.shapes(x.shape), (torch.uint8, x.dtype))
            codes, scales = (torch.zeros(s, dtype=t, device=x.device) for s, t in shapes)
            codec.encode_([x], [codes], [scales])
            coded.append(storage.Coded(codec, codes, scales, 2**40 + i, 0))
        kept.append(coded)
    step_lengths(storage.Coding(kernel), (params, grads, *kept, *lengths, bases, steps), side, transform, seeds, finite)
    return [x for column in kept for x in storage.decoded(column, reference, torch.float32)]


def compensated(kernel, what, dtype, device="cpu"):
    """W and the sum of it and of what rounding has taken, after a step that has taken and given back.

    Products are exact: G is of whole numbers, and a basis is columns of the identity.
    """
    shape, side = (24, 40), {"right": "right", "left": "left", "both": "both", "momenta": "right"}.get(what)
    lists = {
        "coded": lambda: coded_bucket(shape, -1, 8, dtype, device=device),
        "momenta": lambda: momentum_bucket(shape, 3, side, dtype, device=device),
    }.get(what, lambda: bucket(shape, 3, side, dtype, device=device))()
    lists = [list(column) for column in lists]
    lists[0], lists[1] = [w * 100 for w in lists[0]], [g.mul(4).round() for g in lists[1]]
    rests = [(w.float() * 2.0**-10).to(dtype) for w in lists[0]]
    if what == "coded":
        step_coded(kernel, lists, -1, 8, seeds=rests)
    elif what == "momenta":
        lists[2] = [m.zero_() for m in lists[2]]
        step_momenta(kernel, lists, side, rests=rests)
    else:
        lists[4] = [torch.eye(len(b), device=device)[:, :3].contiguous() for b in lists[4]]
        step_projected(kernel, lists, side, seeds=rests)
    return lists[0], [w.float() + rest for w, rest in zip(lists[0], rests)]


def assert_compensated_alike(kernel, dtype, *whats, device="cpu"):
    """W and the rest have 16 bits; of W alone, one in 500 may be the next one where the sum is between two."""
    for what in whats:
        mine, theirs = (compensated(each, what, dtype, device) for each in (kernel, reference))
        assert error(mine[1], theirs[1]) < 2e-5, what
        assert error(mine[0], mine[1]) > 5e-5, what
        assert sum((a != b).sum() for a, b in zip(mine[0], theirs[0])) <= 0.002 * 2 * 24 * 40, what


def assert_averages_alike(kernel, dtype, device="cpu"):
    """N, M and step counts after linear_update_, of gradients of this dtype; what is not finite is left alone."""
    look, keep = (0.9, -0.25), (0.8, 1.0)
    for shape in ((), (0,), (7,), (33, 17), (2, 1500)):
        _, lows, means, *_, steps = bucket(shape, None, None, dtype, count=3, device=device)
        means = [mean.to(torch.promote_types(dtype, torch.float32)) for mean in means]
        for transform in TRANSFORMS:

            def step(each, own, flags, transform=transform):
                return each.linear_update_(own[1], own[0], own[2], look, keep, transform, flags)

            mine, theirs, unharmed = twice((means, lows, steps))
            updates, wanted = step(kernel, mine, None), step(reference, theirs, None)
            for own, others in zip((updates, *mine), (wanted, *theirs), strict=True):
                assert error(own, others) < 1e-6
            assert unharmed()
            left = assert_left_alone((means, [low.clone() for low in lows], steps), step, kernel, reference)
            assert error(*left) < 1e-6


def assert_words_alike(kernel, device="cpu"):
    """Of more seeds than a launch of CUDA's holds, some of 63 bits; of no word, and of more than a block of threads."""
    seeds, device = [2**63 - 1 - 10**17 * i for i in range(70)], torch.device(device)
    for count in (0, 1, 3, 1024, 5000):
        drawn, wanted = (each.words(seeds, count, device) for each in (kernel, reference))
        assert torch.equal(drawn, wanted)


LINES = [((1, 9), 1), ((33, 17), 0), ((70, 270), 1), ((24, 40), 0), ((24, 40), None)]  # shapes; what factors are one of


def assert_scaled_alike(kernel, dtype, device="cpu"):
    """Lengths of rows and columns, and W moved by G times a factor for each: rounded, compensated, some left alone.

    A product of three rounds in an order of its own: bfloat16 and float16 may be the next number in one of 500.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    close = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 2e-4)
    for (shape, dim), rate in zip(
        LINES, (RATE, torch.tensor([0.5, 0.7, 0.2]), RATE, RATE, torch.tensor(0.7)), strict=True
    ):
        params, grads, *_, steps = bucket(shape, None, None, dtype, count=3, device=device)
        for along in (-1, -2):
            lengths = [each.line_norms(grads, along, wide) for each in (kernel, reference)]
            assert [x.shape for x in lengths[0]] == [x.shape for x in lengths[1]]
            assert error(*lengths) < (1e-14 if wide == torch.float64 else 1e-6)
        sizes = [1 if dim is None or dim != axis else size for axis, size in enumerate(shape)]
        factors = [torch.randn(sizes, device=device, dtype=wide) for _ in grads]
        rests = [(param * 2.0**-10).to(dtype) for param in params]
        flags = some_unusable((params, grads))
        for seeds in ((), (2**62 + 1, 7, 8), rests)[: 3 if dtype.itemsize == 2 else 1]:
            mine, theirs, unharmed = twice((params, grads, factors, steps, rests))
            for each, (w, g, f, k, own) in ((kernel, mine), (reference, theirs)):
                given = own if seeds is rests else seeds
                each.apply_(Weights(w, k, given, finite=flags), g, [], replace(HYPER, lr=rate), None, factors=f)
            assert unharmed()
            assert error(mine[0], theirs[0]) < close
            assert error(mine[0], params) > 1e-2
            assert torch.equal(mine[0][1], params[1]), "what its flag says no of moved"


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


def assert_left_alone(lists, step, *kernels):
    """By `step(kernel, lists, flags)` of every kernel, what flags say no of; returns the other parameters of each."""
    flags, ends = some_unusable(lists), []
    for kernel in kernels:
        own, _, unharmed = twice(lists)
        step(kernel, own, flags)
        stepped, left = members(own, flags)
        assert not any(x.isnan().any() for column in stepped for x in column)
        torch.testing.assert_close(left, members(lists, flags)[1], rtol=0, atol=0, equal_nan=True)
        assert unharmed()
        ends.append(stepped[0])
    return ends


def assert_coded_rows_alike(kernel, side, bits, transform):
    """A code in 5000 may be the next one, since Adam rounds otherwise in its last bit."""
    lists = length_bucket((24, 33), 9, side, torch.float32, count=3)
    flags = some_unusable(lists)
    mine, theirs, unharmed = twice(lists)
    moments, expected = (
        step_coded_lengths(each, own, side, bits, transform, (), flags)
        for each, own in ((kernel, mine), (reference, theirs))
    )
    assert unharmed()
    for column, others in zip((moments, *mine), (expected, *theirs), strict=True):
        few = 1 + sum(x.numel() for x in column) // 5000 if column is moments else 0
        assert sum((~torch.isclose(x, y, 4e-6, 1e-6, equal_nan=True)).sum() for x, y in zip(column, others)) <= few


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


# Of bfloat16: a matrix, and the rows and columns of it that are a part: as shards lie, and where no block of random
# words begins.
PARTS = (
    ((24, 40), (8, 16), (0, 40)),
    ((24, 40), (0, 24), (16, 32)),
    ((24, 40), (5, 20), (7, 20)),
    ((9, 13), (4, 7), (0, 13)),
    ((3, 1100), (1, 3), (72, 1100)),
)


def part_and_whole(kernel, side, shape, rows, columns):
    """W of a part after steps as its window, and that part of W after the same steps of the whole.

    Every product is exact: G is of whole numbers, and a basis is columns of the identity. R is not asked for where a
    sum over a part would be another than that over the whole.
    """
    rows, columns = slice(*rows), slice(*columns)
    params, grads, means, squares, _, steps = bucket(shape, 3, side, torch.bfloat16)
    params, grads = [param * 1000 for param in params], [grad.mul(4).round() for grad in grads]
    d = {None: 0, "right": shape[1], "left": shape[0]}[side]
    bases = [torch.eye(d)[:, torch.randperm(d)[:3]] for _ in params if side]
    low = {None: (rows, columns), "right": rows, "left": (slice(None), columns)}[side]
    across = {None: (), "right": columns, "left": rows}[side]
    ends = []
    for window in (ALL, Window(rows.start * shape[1] + columns.start, columns.stop - columns.start, shape[1])):

        def own(tensors, at, window=window):
            return [(t if window is ALL else t[at]).clone(memory_format=torch.contiguous_format) for t in tensors]

        w, lows, q, counts = own(params, (rows, columns)), own(means, low), own(bases, across), own(steps, ())
        seeds, lr = [2**62 + 12345, 7], torch.tensor(0.7)
        kernel.apply_(Weights(w, counts, seeds, window), lows, q, replace(HYPER, lr=lr), side)
        if side is None or across == slice(0, d):
            lists = (w, own(grads, (rows, columns)), lows, own(squares, low), q, counts)
            step_projected(kernel, lists, side, seeds=seeds, window=window, lr=lr)
        kernel.write_(Weights(w[1:], counts[1:], [5], window), [w[1].float() * 1.001])
        ends.append([x[rows, columns] if window is ALL else x for x in w])
    return ends
