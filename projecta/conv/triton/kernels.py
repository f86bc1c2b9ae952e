"""The kernels of the Triton convolution: forward, backward, sums over programs, one step."""

import triton
import triton.language as tl

from projecta._triton.launch import kernel
from projecta._triton.memory import first_step, load_one, load_words, reversed_tiles, unpack_word, write
from projecta._triton.warp import WARP, all_reduce, constant, sigmoid

STEPS = 8  # of a lane
V = constant(STEPS)


@triton.jit
def _words(at, t, element: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr):
    """COUNT steps from t on, in float32, by loads of up to 16 bytes; WIDE is as in `read`."""
    PER: tl.constexpr = 32 // element.primitive_bitwidth
    WORDS: tl.constexpr = COUNT // PER
    EACH: tl.constexpr = WORDS if WORDS < 4 else 4
    found = ()
    first = at + t if WIDE > 0 else at - (t + (COUNT - 1))
    for i in tl.static_range(WORDS // EACH):
        words = load_words(first + i * EACH * PER, EACH, True)
        for k in tl.static_range(EACH):
            found = found + unpack_word(words[k], element)
    return reversed_tiles(found) if WIDE < 0 else found


@triton.jit
def _window(
    at, stride, start, start_step, t1, t_start, t_end, real, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    WIDE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A lane's V steps from t1 on, the BEFORE steps before them and the AFTER steps after them.

    Steps before t_start are those of `start`, or 0; steps from t_end on are 0.
    """
    element: tl.constexpr = at.dtype.element_ty
    found = ()
    if WIDE:
        NEAR: tl.constexpr = 2 if BEFORE <= 2 else 4 if BEFORE <= 4 else 8
        NEXT: tl.constexpr = 2 if AFTER <= 2 else 4 if AFTER <= 4 else 8
        if BEFORE > 0:
            before = tl.minimum(tl.maximum(t1 - NEAR, 0), t_end - NEAR)  # within the row for idle lanes, too
            found = found + _words(at, before, element, NEAR, WIDE)[NEAR - BEFORE :]
        found = found + _words(at, tl.minimum(t1, t_end - V), element, V, WIDE)
        if AFTER > 0:
            found = found + _words(at, tl.minimum(t1 + V, t_end - NEXT), element, NEXT, WIDE)[:AFTER]
    else:
        for i in tl.static_range(BEFORE + V + AFTER):
            t = t1 + (i - BEFORE)
            found = found + (load_one(at + t.to(tl.int64) * stride, real & (t >= t_start) & (t < t_end)),)
    values = ()
    for i in tl.static_range(BEFORE + V + AFTER):
        t, value = t1 + (i - BEFORE), found[i]
        if i < BEFORE or not WHOLE:
            value = tl.where(t >= t_start, value, 0.0)
        if i >= BEFORE + V or not WHOLE:
            value = tl.where(t < t_end, value, 0.0)
        if start is not None and i < (BEFORE if WHOLE else BEFORE + V):
            place = t - t_start + start_step
            value += load_one(start + place, real & (t < t_start) & (place >= 0))
        values = values + (value,)
    return values


@triton.jit
def _taps(at, channel, WIDTH: tl.constexpr):
    """The weights of each lane's channel."""
    found = ()
    for j in tl.static_range(WIDTH):
        found = found + (tl.load(at + channel * WIDTH + j).to(tl.float32),)
    return found


@triton.jit
def _convolve(window, taps, bias, i: tl.constexpr):
    """bias + the sum over j of taps[j] window[i + j]."""
    total = bias
    for j in tl.static_range(len(taps)):
        total = taps[j] * window[i + j] + total
    return total


@triton.jit
def _place(bounds, tiles, parts, chunk, d, l, TIME: tl.constexpr, THREADS: tl.constexpr):
    """Row, sequence, its bounds, this program's steps, and each lane's channel and first step."""
    chosen = tl.program_id(0)
    tile, part, sequence = chosen % tiles, chosen // tiles % parts, (chosen // tiles // parts).to(tl.int64)
    row, t_start, t_end = sequence, 0, l
    if bounds is not None:
        row, t_start, t_end = sequence * 0, tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    index = tl.arange(0, THREADS)
    if TIME:
        channel, ahead = tile * (THREADS // WARP) + index // WARP, index % WARP * V
    else:
        channel, ahead = tile * THREADS + index, index * 0
    first = t_start // V * V + part * chunk
    last = tl.minimum(first + chunk, t_end)
    real = channel < d
    return (
        row,
        sequence,
        part,
        t_start,
        t_end,
        first,
        last,
        real,
        tl.minimum(channel, d - 1).to(tl.int64),
        ahead,
    )


@triton.jit
def _bias(bias, channel):
    return tl.zeros(channel.shape, tl.float32) if bias is None else tl.load(bias + channel).to(tl.float32)


@kernel
def convolve(
    x, weight, bias, start, bounds, y, xb, xd, xl, yb, yd, yl, d, l, tiles, parts, chunk,
    WIDTH: tl.constexpr, SILU: tl.constexpr, TIME: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """A program: `chunk` steps of a sequence and THREADS / 32 channels (TIME), or THREADS channels."""
    BLOCK: tl.constexpr = V * (WARP if TIME else 1)
    row, sequence, _, t_start, t_end, first, last, real, channel, ahead = _place(
        bounds, tiles, parts, chunk, d, l, TIME, THREADS
    )
    taps, own_bias = _taps(weight, channel, WIDTH), _bias(bias, channel)
    at_x, at_start = x + row * xb + channel * xd + first_step(xl, l), None
    at_y = y + row * yb + channel * yd + first_step(yl, l)
    if start is not None:
        at_start = start + (sequence * d + channel) * (WIDTH - 1)
    for block in range(first, last, BLOCK):
        t1 = block + ahead
        window = _window(at_x, xl, at_start, WIDTH - 1, t1, t_start, t_end, real, WIDTH - 1, 0, WIDE, WHOLE)
        outputs = ()
        for i in tl.static_range(V):
            value = _convolve(window, taps, own_bias, i)
            outputs = outputs + (value * sigmoid(value) if SILU else value,)
        write(at_y, t1, yl, outputs, t_start, t_end, real, WIDE, WHOLE, V)


@kernel
def convolve_backward(
    grad_y, x, weight, bias, start, bounds, dx, totals, gb, gd, gl, xb, xd, xl, dxb, dxd, dxl, d, l, tiles,
    parts, chunk, WIDTH: tl.constexpr, SILU: tl.constexpr, TIME: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Programs as in `convolve`: dx, and `totals` (program's steps, d, WIDTH + 1) for dweight and dbias."""
    BLOCK: tl.constexpr = V * (WARP if TIME else 1)
    row, sequence, part, t_start, t_end, first, last, real, channel, ahead = _place(
        bounds, tiles, parts, chunk, d, l, TIME, THREADS
    )
    taps, own_bias = _taps(weight, channel, WIDTH), _bias(bias, channel)
    at_x, at_start = x + row * xb + channel * xd + first_step(xl, l), None
    at_g = grad_y + row * gb + channel * gd + first_step(gl, l)
    at_dx = dx + row * dxb + channel * dxd + first_step(dxl, l)
    if start is not None:
        at_start = start + (sequence * d + channel) * (WIDTH - 1)
    sums = ()
    for _ in tl.static_range(WIDTH + 1):
        sums = sums + (tl.zeros((THREADS,), tl.float32),)
    for block in range(first, last, BLOCK):
        t1 = block + ahead
        window = _window(
            at_x, xl, at_start, WIDTH - 1, t1, t_start, t_end, real, WIDTH - 1, WIDTH - 1, WIDE, WHOLE
        )
        grads = _window(at_g, gl, None, 0, t1, t_start, t_end, real, 0, WIDTH - 1, WIDE, WHOLE)
        inner = ()  # gradients before the activation, of the lane's steps and those after them
        for i in tl.static_range(V + WIDTH - 1):
            grad = grads[i]
            if SILU:
                value = _convolve(window, taps, own_bias, i)
                open = sigmoid(value)
                grad = grad * (open * (1.0 + value * (1.0 - open)))
            inner = inner + (grad,)
        outputs, new = (), ()
        for i in tl.static_range(V):
            value = taps[0] * inner[i + WIDTH - 1]
            for j in tl.static_range(1, WIDTH):
                value = taps[j] * inner[i + WIDTH - 1 - j] + value
            outputs = outputs + (value,)
        for j in tl.static_range(WIDTH):
            total = sums[j]
            for i in tl.static_range(V):
                total = inner[i] * window[i + j] + total
            new = new + (total,)
        total = sums[WIDTH]
        for i in tl.static_range(V):
            total = total + inner[i]
        sums = new + (total,)
        write(at_dx, t1, dxl, outputs, t_start, t_end, real, WIDE, WHOLE, V)
    index = tl.arange(0, THREADS)
    to, only = totals + ((sequence * parts + part) * d + channel) * (WIDTH + 1), real
    if TIME:
        only = real & (index % WARP == 0)
    for j in tl.static_range(WIDTH + 1):
        total = all_reduce(sums[j], index, 1, WARP) if TIME else sums[j]
        tl.store(to + j, total, only)


@kernel
def convolve_backward_start(
    grad_y, x, weight, bias, start, bounds, dstart, gb, gd, gl, xb, xd, xl, d, l, tiles, WIDTH: tl.constexpr,
    SILU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK channels of a sequence's `start`, on which its first WIDTH - 1 outputs depend."""
    sequence = (tl.program_id(0) // tiles).to(tl.int64)
    channel = (tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    real, channel = channel < d, tl.minimum(channel, d - 1)
    row, t_start, t_end = sequence, 0, l
    if bounds is not None:
        row, t_start, t_end = sequence * 0, tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    taps, own_bias = _taps(weight, channel, WIDTH), _bias(bias, channel)
    at_x = x + row * xb + channel * xd + first_step(xl, l)
    at_g = grad_y + row * gb + channel * gd + first_step(gl, l)
    place = (sequence * d + channel) * (WIDTH - 1)
    window, inner = (), ()
    for i in tl.static_range(WIDTH - 1):
        window = window + (tl.load(start + place + i).to(tl.float32),)
    for i in tl.static_range(WIDTH - 1):
        window = window + (load_one(at_x + (t_start + i) * xl, real & (t_start + i < t_end)),)
    for i in tl.static_range(WIDTH - 1):  # gradients before the activation
        grad = load_one(at_g + (t_start + i) * gl, real & (t_start + i < t_end))
        if SILU:
            value = _convolve(window, taps, own_bias, i)
            open = sigmoid(value)
            grad = grad * (open * (1.0 + value * (1.0 - open)))
        inner = inner + (grad,)
    for j in tl.static_range(WIDTH - 1):  # column j meets tap j - i at step i
        total = taps[j] * inner[0]
        for i in tl.static_range(1, j + 1):
            total = taps[j - i] * inner[i] + total
        tl.store(dstart + place + j, total.to(dstart.dtype.element_ty), real)


@kernel
def sum_totals(totals, dweight, dbias, d, over, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Sum `totals` over programs, in their order, into dweight (d, WIDTH) and dbias (d,)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here, total = at < d * (WIDTH + 1), tl.zeros((BLOCK,), tl.float32)
    for i in range(over):
        total += tl.load(totals + i * (tl.cast(d, tl.int64) * (WIDTH + 1)) + at, here, 0.0)
    channel, j = at // (WIDTH + 1), at % (WIDTH + 1)
    tl.store(dweight + channel * WIDTH + j, total.to(dweight.dtype.element_ty), here & (j < WIDTH))
    if dbias is not None:
        tl.store(dbias + channel, total.to(dbias.dtype.element_ty), here & (j == WIDTH))


@kernel
def convolve_step(
    x, weight, bias, state, y, xb, xd, sb, sd, sl, yb, yd, d, tiles, WIDTH: tl.constexpr,
    SILU: tl.constexpr, BLOCK: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """One step of BLOCK channels of a row; the state's KEPT columns move up by one."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    channel = (tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    real = channel < d
    now = tl.load(x + row * xb + channel * xd, real, 0.0)
    total = now.to(tl.float32) * tl.load(weight + channel * WIDTH + (WIDTH - 1), real, 0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + channel, real, 0.0).to(tl.float32)
    at = state + row * sb + channel * sd
    for j in tl.static_range(KEPT):  # column j moves to j - 1
        column = tl.load(at + j * sl, real, 0.0)
        if j + WIDTH - 1 >= KEPT:
            tap = tl.load(weight + channel * WIDTH + (j + WIDTH - 1 - KEPT), real, 0.0)
            total = column.to(tl.float32) * tap.to(tl.float32) + total
        if j > 0:
            tl.store(at + (j - 1) * sl, column, real)
    if KEPT > 0:
        tl.store(at + (KEPT - 1) * sl, now.to(state.dtype.element_ty), real)
    out = total * sigmoid(total) if SILU else total
    tl.store(y + row * yb + channel * yd, out.to(y.dtype.element_ty), real)
