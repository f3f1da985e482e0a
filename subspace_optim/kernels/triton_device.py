"""The Triton kernels that triton.py launches.

One launch covers all tensors of a bucket: it finds them in a table of addresses on the device, program_id(1) being the
tensor and program_id(0) the block within it.

    words        random words, of which bases are drawn
    advance      steps += 1 and their bias corrections, in float64
    elementwise  dense: moments, transform and the write of the parameter, in one pass; or a part of these
    linear_update   likewise of rules whose moment and N are linear in R
    fused        projected, small ranks (see FUSED_RANK): a program owns a row block of W (a column block, on the left)
                  with its rows of M and V; G is read once, W is read and written once
    project      larger ranks, first half: R tile by tile, in whose epilogue the moments advance
    apply        larger ranks, second half: back(N) tile by tile, in whose epilogue W is written
    lengths      GradNormLoRP: the lengths and radial parts of rows, and Adam on these; then project of the tangential
                  part, and apply twice, the first time for the lengths that rows would come to
    squares      Flora: sums of squares of G by rows and columns; `averages` advances V by them, and `normalisers` are
                  what the rows and columns of G are multiplied by to be U. `blend` makes D of U and the momentum: once
                  for the root mean square by which `clip` shortens the step, once to write W. At last project of U
    encode       scales, codes and their rounding in one pass; decode is its inverse
    coded_adam   dense, or R that is there already, on quantised moments: decoded, advanced, coded again and W or N
                  written in one pass
"""

import triton
import triton.language as tl


@triton.jit
def _at(table, row: tl.constexpr, dtype: tl.constexpr, ALIGN: tl.constexpr):
    """The pointer to this program's tensor in a row of the table."""
    address = tl.load(table + row * tl.num_programs(1) + tl.program_id(1))
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), ALIGN)  # on the address the hint would be lost


@triton.jit
def _rate(lr, LR: tl.constexpr):
    """The learning rate: a value (LR = -1), one on the device (0), or one a tensor (1)."""
    if LR < 0:
        return lr
    else:
        return tl.load(lr + LR * tl.program_id(1)).to(tl.float32)


@triton.jit
def _within(width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets within a tile of a matrix with rows of `width`."""
    return tl.arange(0, ROWS)[:, None] * width + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _tile(pointer, i, j, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to the tile at (i, j): 64 bits for its corner, as a large embedding needs, 32 within it."""
    return pointer + tl.cast(i, tl.int64) * width + j + _within(width, ROWS, COLUMNS)


@triton.jit
def _inside(i, j, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return (i + tl.arange(0, ROWS) < height)[:, None] & (j + tl.arange(0, COLUMNS) < width)[None, :]


@triton.jit
def _load(pointer, i, j, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile at (i, j) of a matrix, zero beyond its edges."""
    inside = _inside(i, j, height, width, ROWS, COLUMNS)
    return tl.load(_tile(pointer, i, j, width, ROWS, COLUMNS), mask=inside, other=0.0)


@triton.jit
def _gradient(g, w, numbers, i, j, m, n, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile at (i, j) of G.

    KIND: "tangent", the part along which the length of no row of W changes; "normalised", U, by its normalisers.
    """
    grad = _load(g, i, j, m, n, ROWS, COLUMNS)
    if KIND == "tangent":
        along = _row_numbers(numbers, 0, i, m, ROWS, 0.0)
        grad = grad.to(tl.float32) - _load(w, i, j, m, n, ROWS, COLUMNS).to(tl.float32) * along[:, None]
    elif KIND == "normalised":
        row, column = i + tl.arange(0, ROWS), j + tl.arange(0, COLUMNS)
        own = numbers + tl.program_id(1).to(tl.int64) * (m + n)
        by_row = tl.load(own + row, mask=row < m, other=0.0)
        by_column = tl.load(own + m + column, mask=column < n, other=0.0)
        grad = grad.to(tl.float32) * by_row[:, None] * by_column[None, :]
    return grad


@triton.jit
def _row_numbers(numbers, which: tl.constexpr, i, m, ROWS: tl.constexpr, other: tl.constexpr):
    """Of the rows from i on of this program's tensor, from one of the two lists of m."""
    row = i + tl.arange(0, ROWS)
    first = (2 * tl.program_id(1) + which).to(tl.int64) * m
    return tl.load(numbers + first + row, mask=row < m, other=other)


@triton.jit
def _operand(x, DOT: tl.constexpr):
    if DOT == "bf16":
        return x.to(tl.bfloat16)
    elif DOT == "fp16":
        return x.to(tl.float16)
    else:
        return x.to(tl.float32)


@triton.jit
def _dot(a, b, accumulator, DOT: tl.constexpr):
    if DOT == "bf16" or DOT == "fp16":
        return tl.dot(_operand(a, DOT), _operand(b, DOT), accumulator)
    else:
        return tl.dot(_operand(a, DOT), _operand(b, DOT), accumulator, input_precision=DOT)


@triton.jit
def _adam(g, mean, square, corrections, alpha1, beta2, alpha2, eps, GRAMS: tl.constexpr, EPS_INSIDE: tl.constexpr):
    """N and both moments, advanced by g."""
    first = tl.load(corrections + tl.program_id(1))
    second = tl.load(corrections + tl.num_programs(1) + tl.program_id(1))
    mean += alpha1 * (g - mean)
    square = beta2 * square + alpha2 * g * g
    root = tl.sqrt_rn(square)  # the approximate root flushes the smallest V to zero
    if EPS_INSIDE:
        root = tl.div_rn(root + eps, second)
    else:
        root = tl.div_rn(root, second) + eps
    update = tl.div_rn(mean, root * first)
    if GRAMS:
        update = _grams(update, g)
    return update, mean, square


@triton.jit
def _grams(update, low):
    """sign(R)·|N|."""
    size = tl.abs(update)
    return tl.where(low > 0, size, tl.where(low < 0, -size, 0.0))


@triton.jit
def _count(agrees, kept):
    """Adds those of a program to what this program's tensor keeps; whole numbers, so that no order matters."""
    tl.atomic_add(kept + tl.program_id(1), tl.sum(agrees.to(tl.int64)))


@triton.jit
def _cautious(update, agrees, kept, size):
    """N where it agrees with R, by the share of the `size` elements of which that is so, at least 1e-3."""
    share = tl.div_rn(tl.load(kept + tl.program_id(1)).to(tl.float32), size)
    return tl.where(agrees, update, 0.0) * tl.div_rn(1.0, tl.maximum(share, 1e-3))


@triton.jit
def _half_words(seed, step, block):
    """16 random bits for 8 elements a block, as philox.stochastic_round_ deals them out: (..., k) → (..., 8 k)."""
    drawn = _words(seed, block, step, 0)
    return tl.interleave(drawn & 0xFFFF, drawn >> 16)


@triton.jit
def _words(seed, block, step, stream: tl.constexpr):
    """Of the counters (block, step, 0, stream): (..., k) → (..., 4 k)."""
    zero = block * 0
    w0, w1, w2, w3 = tl.philox(seed, block, zero + step.to(tl.uint32), zero, zero + stream)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def words(out, seeds, blocks, BLOCK: tl.constexpr):
    """Of the seed that is this program's, those of its BLOCK blocks of four."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    block = (first + tl.arange(0, BLOCK)).to(tl.uint32)
    drawn = _words(tl.load(seeds + tl.program_id(1)), block, block * 0, 1)
    at = 4 * first + tl.arange(0, 4 * BLOCK)
    own = out + tl.program_id(1).to(tl.int64) * 4 * blocks
    tl.store(own + at, drawn.to(tl.int64), mask=at < 4 * blocks)


@triton.jit
def _noise(table, corner, pitch, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NOISE: tl.constexpr):
    """Rounding noise of a tile whose corner is element `corner` of a tensor with rows of `pitch`.

    NOISE = 8: rows hold whole blocks of 8 elements, which share one call of Philox. NOISE = 1: each element makes its
    own, and takes the half-word that is its. Elsewhere 0 is to nearest, and so is -1, where what
    rounding takes is in the place of a seed.
    """
    seed, step = _seed_and_step(table)
    return _half_words_of_tile(seed, step, corner, pitch, ROWS, COLUMNS, NOISE)


@triton.jit
def _half_words_of_tile(seed, step, corner, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NOISE: tl.constexpr):
    first = (corner >> 3).to(tl.uint32)
    if NOISE == 8:
        return _half_words(seed, step, first + _within(n // 8, ROWS, COLUMNS // 8).to(tl.uint32))
    else:
        element = (corner & 7).to(tl.int32) + _within(n, ROWS, COLUMNS)
        return _half_word(seed, step, first + (element >> 3).to(tl.uint32), element & 7)


@triton.jit
def _half_word(seed, step, block, at):
    """16 random bits for each element: number `at` of the block of 8 that is its."""
    zero = block * 0
    w0, w1, w2, w3 = tl.philox(seed, block, zero + step.to(tl.uint32), zero, zero)
    word = at >> 1
    word = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    return tl.where((at & 1) == 0, word & 0xFFFF, word >> 16)


@triton.jit
def _seed_and_step(table):
    step = tl.load(_at(table, 5, tl.float32, 4)).to(tl.int32)
    return tl.load(table + 6 * tl.num_programs(1) + tl.program_id(1)), step


@triton.jit
def _round(value, noise):
    """Stochastically to bfloat16, still as float32: the 16 bits that will be dropped decide by chance."""
    return ((value.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _lost(value, TYPE: tl.constexpr):
    """What rounding takes from it."""
    return (value - value.to(TYPE).to(tl.float32)).to(TYPE)


@triton.jit
def _left_alone(finite):
    """Whether this program's tensor stays as it is; `finite` is None where none does."""
    if finite is None:
        return False
    else:
        return tl.load(finite + tl.program_id(1)) == 0


@triton.jit
def advance(table, finite, corrections, count, log_beta1, log_beta2, BLOCK: tl.constexpr):
    """Steps advance; corrections (2, count): 1 - β₁ᵏ and √(1 - β₂ᵏ), in float64 because the difference cancels."""
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = b < count
    if finite is not None:
        here &= tl.load(finite + b, mask=here, other=0) != 0
    step = tl.load(table + 5 * count + b, mask=here, other=0).to(tl.pointer_type(tl.float32))
    k = tl.load(step, mask=here, other=0.0) + 1
    tl.store(step, k, mask=here)
    k = k.to(tl.float64)
    tl.store(corrections + b, (1 - tl.exp(k * log_beta1)).to(tl.float32), mask=here)
    tl.store(corrections + count + b, tl.sqrt(1 - tl.exp(k * log_beta2)).to(tl.float32), mask=here)


@triton.jit
def elementwise(
    table,
    finite,
    corrections,
    kept,
    lr,
    size,
    alpha1,
    beta2,
    alpha2,
    eps,
    weight_decay,
    scale,
    origin,
    columns,
    pitch,
    width,
    row_step,
    column_step,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    ALIGN: tl.constexpr,
    LR: tl.constexpr,
    ADAM: tl.constexpr,
    COUNT: tl.constexpr,
    APPLY: tl.constexpr,
    SIGN: tl.constexpr,
    FACTORS: tl.constexpr,
    GRAMS: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    EPS_INSIDE: tl.constexpr,
    NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The input is G where ADAM, otherwise N; the output is W where APPLY, otherwise N. NOISE: see _noise.

    COUNT: only of what cautious keeps, which is not known before all are seen; nothing is written. FACTORS: N is
    multiplied by those of its row of `width` and of its column, which are so many steps apart.
    """
    if _left_alone(finite):
        return
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = start + tl.arange(0, BLOCK)
    inside = i < size
    out = _at(table, 0, OUT, ALIGN) + i
    low = tl.load(_at(table, 1, IN, ALIGN) + i, mask=inside, other=0.0).to(tl.float32)
    update = low
    if ADAM:
        mean_at = _at(table, 2, tl.float32, ALIGN) + i
        square_at = _at(table, 3, tl.float32, ALIGN) + i
        mean = tl.load(mean_at, mask=inside, other=0.0)
        square = tl.load(square_at, mask=inside, other=0.0)
        update, mean, square = _adam(low, mean, square, corrections, alpha1, beta2, alpha2, eps, GRAMS, EPS_INSIDE)
        if COUNT:
            _count(update * low > 0, kept)
            return
        if CAUTIOUS:
            update = _cautious(update, update * low > 0, kept, tl.cast(size, tl.float32))
        tl.store(mean_at, mean, mask=inside)
        tl.store(square_at, square, mask=inside)
    if APPLY:
        if SIGN:
            update = _sign(update)
        if FACTORS:
            own = i // width * row_step + i % width * column_step
            update *= tl.load(_at(table, 7, tl.float32, 4) + own, mask=inside, other=0.0)
        rate, weight = _rate(lr, LR), tl.load(out, mask=inside).to(tl.float32)
        if NOISE < 0:
            rest = _at(table, 6, OUT, ALIGN) + i
            weight += tl.load(rest, mask=inside).to(tl.float32)
        update = (1 - rate * weight_decay) * weight - rate * scale * update
        if NOISE < 0:
            tl.store(rest, _lost(update, OUT), mask=inside)
        elif NOISE > 0:
            seed, step = _seed_and_step(table)
            at = start + tl.arange(0, BLOCK // NOISE) * NOISE
            number = origin + at // columns * pitch + at % columns
            block = (number >> 3).to(tl.uint32)
            half = _half_words(seed, step, block) if NOISE == 8 else _half_word(seed, step, block, number & 7)
            update = _round(update, half)
    tl.store(out, update.to(OUT), mask=inside)


@triton.jit
def linear_update(
    table,
    finite,
    kept,
    size,
    look_mean,
    look_low,
    keep_mean,
    keep_low,
    IN: tl.constexpr,
    ALIGN: tl.constexpr,
    TRANSFORM: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """N and M, each a combination of M and R. COUNT: see elementwise."""
    if _left_alone(finite):
        return
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    mean_at = _at(table, 2, tl.float32, ALIGN) + i
    mean = tl.load(mean_at, mask=inside, other=0.0)
    low = tl.load(_at(table, 1, IN, ALIGN) + i, mask=inside, other=0.0).to(tl.float32)
    update = look_mean * mean + look_low * low
    if COUNT:
        _count(update * low > 0, kept)
        return
    if TRANSFORM == "grams":
        update = _grams(update, low)
    elif TRANSFORM == "cautious":
        update = _cautious(update, update * low > 0, kept, tl.cast(size, tl.float32))
    tl.store(_at(table, 0, tl.float32, ALIGN) + i, update, mask=inside)
    tl.store(mean_at, keep_mean * mean + keep_low * low, mask=inside)


@triton.jit
def _accumulate(
    g,
    q,
    o,
    r,
    m,
    n,
    rank,
    LEFT: tl.constexpr,
    DOT: tl.constexpr,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    DEPTH: tl.constexpr,
    w,
    numbers,
    KIND: tl.constexpr,
):
    """G Q for ROWS rows of G from o (left: Qᵀ G for as many columns) and RANK columns of Q from r."""
    if LEFT:
        low = tl.zeros((RANK, ROWS), tl.float32)
        for d in range(0, m, DEPTH):
            basis = _load(q, d, r, m, rank, DEPTH, RANK)  # (DEPTH, RANK)
            grad = _gradient(g, w, numbers, d, o, m, n, KIND, DEPTH, ROWS)  # (DEPTH, ROWS)
            low = _dot(tl.trans(basis), grad, low, DOT)  # (RANK, ROWS)
    else:
        low = tl.zeros((ROWS, RANK), tl.float32)
        for d in range(0, n, DEPTH):
            basis = _load(q, d, r, n, rank, DEPTH, RANK)  # (DEPTH, RANK)
            grad = _gradient(g, w, numbers, o, d, m, n, KIND, ROWS, DEPTH)  # (ROWS, DEPTH)
            low = _dot(grad, basis, low, DOT)  # (ROWS, RANK)
    return low


@triton.jit
def _advance_tile(
    table,
    corrections,
    low,
    i,
    j,
    height,
    width,
    alpha1,
    beta2,
    alpha2,
    eps,
    ALIGN: tl.constexpr,
    GRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICE: tl.constexpr,
):
    """N of a tile of R, at (i, j); its moments advance.

    SLICE columns at a time, because a tile of R and of both moments together do not fit into the registers.
    """
    if COLUMNS > SLICE:
        HALF: tl.constexpr = COLUMNS // 2
        a, b = tl.split(tl.permute(tl.reshape(low, (ROWS, 2, HALF)), (0, 2, 1)))
        a = _advance_tile(
            *(table, corrections, a, i, j, height, width, alpha1, beta2, alpha2, eps),
            *(ALIGN, GRAMS, ROWS, HALF, SLICE),
        )
        b = _advance_tile(
            *(table, corrections, b, i, j + HALF, height, width, alpha1, beta2, alpha2, eps),
            *(ALIGN, GRAMS, ROWS, HALF, SLICE),
        )
        return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (ROWS, COLUMNS))
    else:
        inside = _inside(i, j, height, width, ROWS, COLUMNS)
        mean_at = _tile(_at(table, 2, tl.float32, ALIGN), i, j, width, ROWS, COLUMNS)
        square_at = _tile(_at(table, 3, tl.float32, ALIGN), i, j, width, ROWS, COLUMNS)
        mean = tl.load(mean_at, mask=inside, other=0.0)
        square = tl.load(square_at, mask=inside, other=0.0)
        update, mean, square = _adam(low, mean, square, corrections, alpha1, beta2, alpha2, eps, GRAMS, False)
        tl.store(mean_at, mean, mask=inside)
        tl.store(square_at, square, mask=inside)
        return update


@triton.jit
def _write(
    table,
    w,
    step,
    rate,
    weight_decay,
    scale,
    i,
    j,
    m,
    n,
    origin,
    pitch,
    ALIGN: tl.constexpr,
    SIGN: tl.constexpr,
    NOISE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICE: tl.constexpr,
    factor=None,
):
    """W ← (1 - lr·λ) W - lr·scale·step on the tile at (i, j); its rows times their factors if there are any.

    W begins at element `origin` of a tensor with rows of `pitch`, which is rounded as a whole.
    """
    if COLUMNS > SLICE:
        HALF: tl.constexpr = COLUMNS // 2
        a, b = tl.split(tl.permute(tl.reshape(step, (ROWS, 2, HALF)), (0, 2, 1)))
        same = (rate, weight_decay, scale, i)
        _write(table, w, a, *same, j, m, n, origin, pitch, ALIGN, SIGN, NOISE, ROWS, HALF, SLICE, factor)
        _write(table, w, b, *same, j + HALF, m, n, origin, pitch, ALIGN, SIGN, NOISE, ROWS, HALF, SLICE, factor)
    else:
        inside = _inside(i, j, m, n, ROWS, COLUMNS)
        at = _tile(w, i, j, n, ROWS, COLUMNS)
        if SIGN:
            step = _sign(step)
        value = tl.load(at, mask=inside).to(tl.float32)
        if NOISE < 0:
            rest = _tile(_at(table, 6, w.dtype.element_ty, ALIGN), i, j, n, ROWS, COLUMNS)
            value += tl.load(rest, mask=inside).to(tl.float32)
        value = (1 - rate * weight_decay) * value - rate * scale * step
        if factor is not None:
            value *= factor[:, None]
        if NOISE < 0:
            tl.store(rest, _lost(value, w.dtype.element_ty), mask=inside)
        elif NOISE > 0:
            corner = origin + tl.cast(i, tl.int64) * pitch + j
            value = _round(value, _noise(table, corner, pitch, ROWS, COLUMNS, NOISE))
        tl.store(at, value.to(w.dtype.element_ty), mask=inside)


@triton.jit
def _squares(w, step, rate, scale, i, j, m, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLICE: tl.constexpr):
    """Of the rows of W - lr·scale·step on the tile at (i, j), the sums of squares."""
    if COLUMNS > SLICE:
        HALF: tl.constexpr = COLUMNS // 2
        a, b = tl.split(tl.permute(tl.reshape(step, (ROWS, 2, HALF)), (0, 2, 1)))
        sums = _squares(w, a, rate, scale, i, j, m, n, ROWS, HALF, SLICE)
        return sums + _squares(w, b, rate, scale, i, j + HALF, m, n, ROWS, HALF, SLICE)
    else:
        moved = _load(w, i, j, m, n, ROWS, COLUMNS).to(tl.float32) - rate * scale * step
        return tl.sum(tl.where(_inside(i, j, m, n, ROWS, COLUMNS), moved * moved, 0.0), 1)


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def fused(
    table,
    finite,
    corrections,
    lr,
    m,
    n,
    rank,
    alpha1,
    beta2,
    alpha2,
    eps,
    weight_decay,
    scale,
    origin,
    pitch,
    W: tl.constexpr,
    G: tl.constexpr,
    Q: tl.constexpr,
    ALIGN: tl.constexpr,
    LR: tl.constexpr,
    DOT: tl.constexpr,
    LEFT: tl.constexpr,
    GRAMS: tl.constexpr,
    NOISE: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    SLICE: tl.constexpr,
    RANK: tl.constexpr,
):
    """A row block of W (a column block, on the left) with its rows of M and V; RANK: all columns of the basis."""
    if _left_alone(finite):
        return
    w = _at(table, 0, W, ALIGN)
    g = _at(table, 1, G, ALIGN)
    q = _at(table, 4, Q, ALIGN)
    o = tl.program_id(0) * ROWS
    low = _accumulate(g, q, o, 0, m, n, rank, LEFT, DOT, ROWS, RANK, DEPTH, None, None, "whole")
    rate = _rate(lr, LR)
    if LEFT:
        update = _advance_tile(
            *(table, corrections, low, 0, o, rank, n, alpha1, beta2, alpha2, eps),
            *(ALIGN, GRAMS, RANK, ROWS, SLICE),
        )
        update = _operand(update, DOT)  # (RANK, ROWS)
        for d in range(0, m, DEPTH):
            basis = _load(q, d, 0, m, rank, DEPTH, RANK)
            step = _dot(basis, update, tl.zeros((DEPTH, ROWS), tl.float32), DOT)  # (DEPTH, ROWS)
            same = (table, w, step, rate, weight_decay, scale)
            _write(*same, d, o, m, n, origin, pitch, ALIGN, False, NOISE, DEPTH, ROWS, ROWS)
    else:
        update = _advance_tile(
            *(table, corrections, low, o, 0, m, rank, alpha1, beta2, alpha2, eps),
            *(ALIGN, GRAMS, ROWS, RANK, SLICE),
        )
        update = _operand(update, DOT)  # (ROWS, RANK)
        for d in range(0, n, DEPTH):
            basis = _load(q, d, 0, n, rank, DEPTH, RANK)
            step = _dot(update, tl.trans(basis), tl.zeros((ROWS, DEPTH), tl.float32), DOT)  # (ROWS, DEPTH)
            same = (table, w, step, rate, weight_decay, scale)
            _write(*same, o, d, m, n, origin, pitch, ALIGN, False, NOISE, ROWS, DEPTH, DEPTH)


@triton.jit
def lengths(
    table,
    finite,
    corrections,
    lengths,
    lr,
    m,
    n,
    alpha1,
    beta2,
    alpha2,
    eps,
    weight_decay,
    W: tl.constexpr,
    G: tl.constexpr,
    ALIGN: tl.constexpr,
    LR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of ROWS rows: what of W is in G, and the length they come to by Adam's step of it, or -1 if they are zero."""
    if _left_alone(finite):
        return
    i = tl.program_id(0) * ROWS
    w, g = _at(table, 0, W, ALIGN), _at(table, 1, G, ALIGN)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for j in range(0, n, COLUMNS):
        weight = _load(w, i, j, m, n, ROWS, COLUMNS).to(tl.float32)
        squares += weight * weight
        products += weight * _load(g, i, j, m, n, ROWS, COLUMNS).to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(squares, 1))
    divisor = tl.where(norm > 0, norm, 1.0)
    radial = tl.div_rn(tl.sum(products, 1), divisor)
    row = i + tl.arange(0, ROWS)
    mean_at, square_at = _at(table, 2, tl.float32, 4) + row, _at(table, 3, tl.float32, 4) + row
    mean = tl.load(mean_at, mask=row < m, other=0.0)
    square = tl.load(square_at, mask=row < m, other=0.0)
    growth, mean, square = _adam(radial, mean, square, corrections, alpha1, beta2, alpha2, eps, False, False)
    tl.store(mean_at, mean, mask=row < m)
    tl.store(square_at, square, mask=row < m)
    rate = _rate(lr, LR)
    aim = tl.maximum(norm * (1 - rate * weight_decay) - rate * growth, 0.0)
    at = lengths + (2 * tl.program_id(1)).to(tl.int64) * m + row
    tl.store(at, tl.div_rn(radial, divisor), mask=row < m)
    tl.store(at + m, tl.where(norm > 0, aim, -1.0), mask=row < m)


@triton.jit
def project(
    table,
    finite,
    corrections,
    numbers,
    m,
    n,
    rank,
    alpha1,
    beta2,
    alpha2,
    eps,
    OUT: tl.constexpr,
    G: tl.constexpr,
    Q: tl.constexpr,
    W: tl.constexpr,
    ALIGN: tl.constexpr,
    DOT: tl.constexpr,
    LEFT: tl.constexpr,
    KIND: tl.constexpr,
    ADAM: tl.constexpr,
    AVERAGE: tl.constexpr,
    GRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SLICE: tl.constexpr,
):
    """R of every tensor to the output, see _gradient for KIND; or where ADAM its N.

    AVERAGE: the first moment advances by R, to the output.
    """
    if _left_alone(finite):
        return
    tiles = tl.cdiv(rank, COLUMNS)
    o = tl.program_id(0) // tiles * ROWS
    r = tl.program_id(0) % tiles * COLUMNS
    g = _at(table, 1, G, ALIGN)
    q = _at(table, 4, Q, ALIGN)
    w = _at(table, 7, W, ALIGN) if KIND == "tangent" else None
    low = _accumulate(g, q, o, r, m, n, rank, LEFT, DOT, ROWS, COLUMNS, DEPTH, w, numbers, KIND)
    out = _at(table, 0, OUT, ALIGN)
    if LEFT:
        if ADAM:
            low = _advance_tile(
                *(table, corrections, low, r, o, rank, n, alpha1, beta2, alpha2, eps),
                *(ALIGN, GRAMS, COLUMNS, ROWS, SLICE),
            )
        if AVERAGE:
            past = _load(_at(table, 2, tl.float32, ALIGN), r, o, rank, n, COLUMNS, ROWS)
            low = past + alpha1 * (low - past)
        inside = _inside(r, o, rank, n, COLUMNS, ROWS)
        tl.store(_tile(out, r, o, n, COLUMNS, ROWS), low.to(OUT), mask=inside)
    else:
        if ADAM:
            low = _advance_tile(
                *(table, corrections, low, o, r, m, rank, alpha1, beta2, alpha2, eps),
                *(ALIGN, GRAMS, ROWS, COLUMNS, SLICE),
            )
        if AVERAGE:
            past = _load(_at(table, 2, tl.float32, ALIGN), o, r, m, rank, ROWS, COLUMNS)
            low = past + alpha1 * (low - past)
        inside = _inside(o, r, m, rank, ROWS, COLUMNS)
        tl.store(_tile(out, o, r, rank, ROWS, COLUMNS), low.to(OUT), mask=inside)


@triton.jit
def _back(
    update,
    q,
    i,
    j,
    m,
    n,
    rank,
    LEFT: tl.constexpr,
    DOT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The tile at (i, j) of back(N)."""
    step = tl.zeros((ROWS, COLUMNS), tl.float32)
    for r in range(0, rank, DEPTH):
        if LEFT:
            basis = _load(q, i, r, m, rank, ROWS, DEPTH)  # (ROWS, DEPTH)
            step = _dot(basis, _load(update, r, j, rank, n, DEPTH, COLUMNS), step, DOT)  # (ROWS, COLUMNS)
        else:
            basis = _load(q, j, r, n, rank, COLUMNS, DEPTH)  # (COLUMNS, DEPTH)
            step = _dot(_load(update, i, r, m, rank, ROWS, DEPTH), tl.trans(basis), step, DOT)  # (ROWS, COLUMNS)
    return step


@triton.jit
def apply(
    table,
    finite,
    lengths,
    squares,
    lr,
    m,
    n,
    rank,
    weight_decay,
    scale,
    origin,
    pitch,
    W: tl.constexpr,
    IN: tl.constexpr,
    Q: tl.constexpr,
    ALIGN: tl.constexpr,
    LR: tl.constexpr,
    DOT: tl.constexpr,
    LEFT: tl.constexpr,
    SIGN: tl.constexpr,
    MEASURE: tl.constexpr,
    NOISE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SLICE: tl.constexpr,
):
    """W, its rows brought to the lengths of lengths if there are any.

    MEASURE: only the sums of squares of each row on this tile, to `squares` (tensor, tile of columns, row), by which
    the launch after it knows how long they would be.
    """
    if _left_alone(finite):
        return
    tiles = tl.cdiv(n, COLUMNS)
    i = tl.program_id(0) // tiles * ROWS
    j = tl.program_id(0) % tiles * COLUMNS
    update, q = _at(table, 1, IN, ALIGN), _at(table, 4, Q, ALIGN)
    step = _back(update, q, i, j, m, n, rank, LEFT, DOT, ROWS, COLUMNS, DEPTH)
    w = _at(table, 0, W, ALIGN)
    rate = _rate(lr, LR)
    factor = None
    if lengths is not None:
        row = i + tl.arange(0, ROWS)
        own = squares + tl.program_id(1).to(tl.int64) * tiles * m + row
        if MEASURE:
            here = own + tl.program_id(0) % tiles * m
            tl.store(here, _squares(w, step, rate, scale, i, j, m, n, ROWS, COLUMNS, SLICE), mask=row < m)
            return
        sums = tl.zeros((ROWS,), tl.float32)
        for tile in range(tiles):
            sums += tl.load(own + tile * m, mask=row < m, other=0.0)
        length, aim = tl.sqrt_rn(sums), _row_numbers(lengths, 1, i, m, ROWS, -1.0)
        factor = tl.where((aim >= 0) & (length > 0), tl.div_rn(aim, tl.where(length > 0, length, 1.0)), 1.0)
    same = (table, w, step, rate, weight_decay, scale)
    _write(*same, i, j, m, n, origin, pitch, ALIGN, SIGN, NOISE, ROWS, COLUMNS, SLICE, factor)


@triton.jit
def squares(
    table,
    finite,
    row_sums,
    column_sums,
    m,
    n,
    G: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of a tile of G, sums of squares: by rows (tensor, tile of columns, row), and by columns."""
    if _left_alone(finite):
        return
    across = tl.cdiv(n, COLUMNS)
    i, j = tl.program_id(0) // across, tl.program_id(0) % across
    grad = _load(_at(table, 1, G, ALIGN), i * ROWS, j * COLUMNS, m, n, ROWS, COLUMNS).to(tl.float32)
    row, column = i * ROWS + tl.arange(0, ROWS), j * COLUMNS + tl.arange(0, COLUMNS)
    tensor = tl.program_id(1).to(tl.int64)
    tl.store(row_sums + (tensor * across + j) * m + row, tl.sum(grad * grad, 1), mask=row < m)
    tl.store(column_sums + (tensor * tl.cdiv(m, ROWS) + i) * n + column, tl.sum(grad * grad, 0), mask=column < n)


@triton.jit
def averages(
    table,
    finite,
    row_sums,
    column_sums,
    m,
    n,
    decay,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Those of squares by rows and by columns advance, by the sums that `squares` has found in tiles."""
    if _left_alone(finite):
        return
    step = tl.load(_at(table, 5, tl.float32, 4)).to(tl.float64)
    fresh = tl.exp(-decay * tl.log(step)).to(tl.float32)  # 1 - β₂
    _average(_at(table, 3, tl.float32, 4), row_sums, tl.cdiv(n, COLUMNS), m, n, fresh, BLOCK)
    _average(_at(table, 7, tl.float32, 4), column_sums, tl.cdiv(m, ROWS), n, m, fresh, BLOCK)


@triton.jit
def _average(kept, sums, tiles, length, elements, fresh, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = sums + tl.program_id(1).to(tl.int64) * tiles * length + at
    total = tl.zeros((BLOCK,), tl.float32)
    for tile in range(tiles):
        total += tl.load(own + tile * length, mask=at < length, other=0.0)
    past = tl.load(kept + at, mask=at < length, other=0.0)
    mean = tl.div_rn(total, tl.cast(elements, tl.float32)) + 1e-30
    tl.store(kept + at, past + fresh * (mean - past), mask=at < length)


@triton.jit
def normalisers(table, finite, numbers, m, n, BLOCK: tl.constexpr):
    """What makes G to U: of every row, then of every column."""
    if _left_alone(finite):
        return
    rows, columns = _at(table, 3, tl.float32, 4), _at(table, 7, tl.float32, 4)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, m, BLOCK):
        row = first + tl.arange(0, BLOCK)
        total += tl.load(rows + row, mask=row < m, other=0.0)
    root = tl.sqrt_rn(tl.div_rn(tl.sum(total, 0), tl.cast(m, tl.float32)))
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = numbers + tl.program_id(1).to(tl.int64) * (m + n) + at
    tl.store(own, tl.div_rn(root, tl.sqrt_rn(tl.load(rows + at, mask=at < m, other=1.0))), mask=at < m)
    tl.store(own + m, tl.div_rn(1.0, tl.sqrt_rn(tl.load(columns + at, mask=at < n, other=1.0))), mask=at < n)


@triton.jit
def _blended(
    g,
    numbers,
    step,
    i,
    j,
    m,
    n,
    beta1,
    TRANSFORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICE: tl.constexpr,
):
    """D of the tile at (i, j), of which `step` is the history; SLICE columns at a time, as _advance_tile."""
    if COLUMNS > SLICE:
        HALF: tl.constexpr = COLUMNS // 2
        a, b = tl.split(tl.permute(tl.reshape(step, (ROWS, 2, HALF)), (0, 2, 1)))
        a = _blended(g, numbers, a, i, j, m, n, beta1, TRANSFORM, ROWS, HALF, SLICE)
        b = _blended(g, numbers, b, i, j + HALF, m, n, beta1, TRANSFORM, ROWS, HALF, SLICE)
        return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (ROWS, COLUMNS))
    else:
        fresh = _gradient(g, None, numbers, i, j, m, n, "normalised", ROWS, COLUMNS)
        step = beta1 * step + (1 - beta1) * fresh
        if TRANSFORM == "grams":  # U has the sign of G
            step = tl.abs(step) * _sign(fresh)
        elif TRANSFORM == "cautious":
            step = tl.where((step > 0) & (fresh > 0) | (step < 0) & (fresh < 0), step, 0.0)
        return step


@triton.jit
def _sum(tile):
    """(1,): for sm_100 Triton cannot compile the sum of a vector that comes from a product."""
    return tl.sum(tl.sum(tile, 1)[:, None], 0)


@triton.jit
def blend(
    table,
    finite,
    numbers,
    sums,
    kept,
    clips,
    lr,
    m,
    n,
    rank,
    beta1,
    weight_decay,
    scale,
    W: tl.constexpr,
    G: tl.constexpr,
    Q: tl.constexpr,
    ALIGN: tl.constexpr,
    LR: tl.constexpr,
    DOT: tl.constexpr,
    LEFT: tl.constexpr,
    TRANSFORM: tl.constexpr,
    MEASURE: tl.constexpr,
    NOISE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SLICE: tl.constexpr,
):
    """W takes a step along D, times that of `clips`.

    MEASURE: only the sum of the squares of D on this tile, to `sums` (tensor, tile), and how many `kept` are not 0.
    """
    if _left_alone(finite):
        return
    tiles = tl.cdiv(n, COLUMNS)
    i = tl.program_id(0) // tiles * ROWS
    j = tl.program_id(0) % tiles * COLUMNS
    momentum, q = _at(table, 2, tl.float32, ALIGN), _at(table, 4, Q, ALIGN)
    step = _back(momentum, q, i, j, m, n, rank, LEFT, DOT, ROWS, COLUMNS, DEPTH)
    step = _blended(_at(table, 1, G, ALIGN), numbers, step, i, j, m, n, beta1, TRANSFORM, ROWS, COLUMNS, SLICE)
    if MEASURE:
        tile, one = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0), tl.arange(0, 1)
        tl.store(sums + tile + one, _sum(step * step))
        if TRANSFORM == "cautious":
            tl.atomic_add(kept + tl.program_id(1) + one, _sum((step != 0).to(tl.int32)).to(tl.int64))
        return
    scale *= tl.load(clips + tl.program_id(1))
    same = (table, _at(table, 0, W, ALIGN), step, _rate(lr, LR), weight_decay, scale)
    _write(*same, i, j, m, n, 0, n, ALIGN, False, NOISE, ROWS, COLUMNS, SLICE)


@triton.jit
def clip(sums, finite, kept, clips, m, n, tiles, threshold, TRANSFORM: tl.constexpr, BLOCK: tl.constexpr):
    """What D is multiplied by, to have a root mean square of at most the threshold; cautious makes up for what is 0."""
    if _left_alone(finite):
        return
    own = sums + tl.program_id(1).to(tl.int64) * tiles
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, tiles, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        total += tl.load(own + tile, mask=tile < tiles, other=0.0).to(tl.float64)
    size = tl.cast(m, tl.float64) * n
    longer = 1.0
    if TRANSFORM == "cautious":
        share = tl.load(kept + tl.program_id(1)).to(tl.float64) / size
        longer = 1.0 / tl.maximum(share, 1e-3)
    length = longer * tl.sqrt(tl.sum(total, 0) / size)
    tl.store(clips + tl.program_id(1), (longer / tl.maximum(length / threshold, 1.0)).to(tl.float32))


@triton.jit
def _coded_tile(i, j, count, length, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows, columns, and which are there, of the j-th block of the i-th ROWS rows of (count, length)."""
    row = tl.cast(i, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = j * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, column, (row < count) & (column < length)


@triton.jit
def _decoded(
    codes,
    scales,
    values,
    i,
    j,
    count,
    length,
    code_row,
    code_column,
    scale_row,
    scale_column,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The numbers of a tile that are kept as codes."""
    row, column, inside = _coded_tile(i, j, count, length, ROWS, BLOCK)
    at = column // 2 if PACKED else column
    code = tl.load(codes + row * code_row + at * code_column, mask=inside, other=0).to(tl.int32)
    if PACKED:
        code = (code >> (column % 2 * 4)) & 15
    scale = tl.load(scales + row * scale_row + j * scale_column, mask=row < count, other=0.0)
    return tl.load(values + code) * scale


@triton.jit
def _keep(
    value,
    codes,
    scales,
    values,
    seed,
    step,
    begin,
    i,
    j,
    count,
    length,
    code_row,
    code_column,
    scale_row,
    scale_column,
    LAST: tl.constexpr,
    TINY: tl.constexpr,
    NOISE: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Codes and scales of a tile, which is zero beyond its edges; LAST: of the gaps between values."""
    row, column, inside = _coded_tile(i, j, count, length, ROWS, BLOCK)
    scale = tl.max(tl.abs(value), 1)[:, None]
    scale = tl.where(scale >= TINY, scale, 0.0)
    tl.store(scales + row * scale_row + j * scale_column, scale, mask=row < count)
    unit = tl.where(scale > 0, tl.div_rn(value, tl.where(scale > 0, scale, 1.0)), 0.0)
    low = tl.zeros((ROWS, BLOCK), tl.int32)  # the last value of the table that is not above it
    for bit in tl.static_range(8):
        next = low + (128 >> bit)
        there = next <= LAST
        low = tl.where(there & (tl.load(values + next, mask=there, other=0.0) <= unit), next, low)
    lower = tl.load(values + low)
    gap = tl.load(values + low + 1) - lower
    odds = 0.5
    if NOISE > 0:
        half = _half_words_of_tile(seed, step, begin + _first(i, j, length, ROWS, BLOCK), length, ROWS, BLOCK, NOISE)
        odds = (half.to(tl.float32) + 0.5) * (1.0 / 65536)
    code = tl.where(inside, low + (unit - lower > odds * gap).to(tl.int32), 0)
    if PACKED:
        first, second = tl.split(tl.reshape(code, (ROWS, BLOCK // 2, 2)))
        code = first | (second << 4)
        column = j * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        inside = (row < count) & (column < (length + 1) // 2)
    tl.store(codes + row * code_row + column * code_column, code.to(tl.uint8), mask=inside)


@triton.jit
def _first(i, j, length, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of a tile, the place of its first element where blocks' dimension is the last."""
    return tl.cast(i, tl.int64) * ROWS * length + j * BLOCK


@triton.jit
def encode(
    table,
    values,
    count,
    length,
    x_row,
    x_column,
    code_row,
    code_column,
    scale_row,
    scale_column,
    begin,
    X: tl.constexpr,
    ALIGN: tl.constexpr,
    LAST: tl.constexpr,
    TINY: tl.constexpr,
    NOISE: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of each of ROWS rows of x (count, length). NOISE = 0 is to nearest."""
    blocks = tl.cdiv(length, BLOCK)
    i, j = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row, column, inside = _coded_tile(i, j, count, length, ROWS, BLOCK)
    x = _at(table, 0, X, ALIGN) + row * x_row + column * x_column
    value = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    seed, step = 0, 0
    if NOISE > 0:
        seed, step = _seed_and_step(table)
    _keep(
        *(value, _at(table, 1, tl.uint8, ALIGN), _at(table, 7, tl.float32, 4), values, seed, step, begin),
        *(i, j, count, length, code_row, code_column, scale_row, scale_column),
        *(LAST, TINY, NOISE, PACKED, ROWS, BLOCK),
    )


@triton.jit
def decode(
    table,
    values,
    count,
    length,
    x_row,
    x_column,
    code_row,
    code_column,
    scale_row,
    scale_column,
    X: tl.constexpr,
    ALIGN: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The inverse of encode."""
    blocks = tl.cdiv(length, BLOCK)
    i, j = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row, column, inside = _coded_tile(i, j, count, length, ROWS, BLOCK)
    value = _decoded(
        *(_at(table, 1, tl.uint8, ALIGN), _at(table, 7, tl.float32, 4), values, i, j, count, length),
        *(code_row, code_column, scale_row, scale_column, PACKED, ROWS, BLOCK),
    )
    x = _at(table, 0, X, ALIGN) + row * x_row + column * x_column
    tl.store(x, value.to(X), mask=inside)


@triton.jit
def coded_adam(
    table,
    finite,
    corrections,
    kept,
    lr,
    signed,
    unsigned,
    begin,
    count,
    length,
    x_row,
    x_column,
    code_row,
    code_column,
    scale_row,
    scale_column,
    alpha1,
    beta2,
    alpha2,
    eps,
    weight_decay,
    scale,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    ALIGN: tl.constexpr,
    LR: tl.constexpr,
    COUNT: tl.constexpr,
    APPLY: tl.constexpr,
    GRAMS: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    EPS_INSIDE: tl.constexpr,
    NOISE: tl.constexpr,
    ROUND: tl.constexpr,
    SIGNED_LAST: tl.constexpr,
    UNSIGNED_LAST: tl.constexpr,
    TINY: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of each of ROWS rows of a tensor: decoded, advanced, coded again; W written where APPLY, otherwise N."""
    if _left_alone(finite):
        return
    blocks = tl.cdiv(length, BLOCK)
    i, j = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row, column, inside = _coded_tile(i, j, count, length, ROWS, BLOCK)
    x = row * x_row + column * x_column
    low = tl.load(_at(table, 1, IN, ALIGN) + x, mask=inside, other=0.0).to(tl.float32)
    mean_codes, mean_scales = _at(table, 2, tl.uint8, ALIGN), _at(table, 7, tl.float32, 4)
    square_codes, square_scales = _at(table, 3, tl.uint8, ALIGN), _at(table, 8, tl.float32, 4)
    mean = _decoded(
        *(mean_codes, mean_scales, signed, i, j, count, length, code_row, code_column, scale_row, scale_column),
        *(PACKED, ROWS, BLOCK),
    )
    square = _decoded(
        *(square_codes, square_scales, unsigned, i, j, count, length, code_row, code_column, scale_row, scale_column),
        *(PACKED, ROWS, BLOCK),
    )
    update, mean, square = _adam(low, mean, square, corrections, alpha1, beta2, alpha2, eps, GRAMS, EPS_INSIDE)
    if COUNT:
        _count(update * low > 0, kept)
        return
    if CAUTIOUS:
        update = _cautious(update, update * low > 0, kept, tl.cast(count, tl.float32) * length)
    seed, step = _seed_and_step(table)
    of_mean = tl.load(table + 9 * tl.num_programs(1) + tl.program_id(1))
    of_square = tl.load(table + 10 * tl.num_programs(1) + tl.program_id(1))
    _keep(
        *(tl.where(inside, mean, 0.0), mean_codes, mean_scales, signed, of_mean, step, begin, i, j, count, length),
        *(code_row, code_column, scale_row, scale_column, SIGNED_LAST, TINY, NOISE, PACKED, ROWS, BLOCK),
    )
    _keep(
        *(tl.where(inside, square, 0.0), square_codes, square_scales, unsigned, of_square, step, begin),
        *(i, j, count, length, code_row, code_column, scale_row, scale_column),
        *(UNSIGNED_LAST, TINY, NOISE, PACKED, ROWS, BLOCK),
    )
    out = _at(table, 0, OUT, ALIGN) + x
    if APPLY:
        rate, weight = _rate(lr, LR), tl.load(out, mask=inside).to(tl.float32)
        if ROUND < 0:
            rest = _at(table, 6, OUT, ALIGN) + x
            weight += tl.load(rest, mask=inside).to(tl.float32)
        update = (1 - rate * weight_decay) * weight - rate * scale * update
        if ROUND < 0:
            tl.store(rest, _lost(update, OUT), mask=inside)
        elif ROUND > 0:
            corner = begin + _first(i, j, length, ROWS, BLOCK)  # W begins where its moments do
            update = _round(update, _half_words_of_tile(seed, step, corner, length, ROWS, BLOCK, NOISE))
    tl.store(out, update.to(OUT), mask=inside)
