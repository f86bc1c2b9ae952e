"""How the Triton kernels read and write steps of a sequence: per-lane steps, words, slabs of 8 steps.

WIDE: arrays can be read in words (time contiguous, aligned, a multiple of 8); -1 if the scan goes from the
last step to the first. WHOLE: nothing needs a mask (whole blocks, whole tiles of channels, one sequence per
row). A reversed scan has negative strides along time. Scratch memory is in the order of the scan, so that its
own flag is WIDE * WIDE.
"""

import triton
import triton.language as tl

from projecta._triton.memory import (
    as_floats,
    barrier,
    load_rows,
    load_shared,
    load_words,
    read,
    store_shared,
    unpack_word,
)
from projecta._triton.warp import INTERPRETED, LOG2_E, constant, exp2, repeat, sigmoid, softplus

SLAB = 8  # steps that a kernel over states takes at a time; states are saved between slabs


STEPS = constant(SLAB)


@triton.jit
def program_index(count, processors):
    """Index of this program among `count`: those of one processor are neighbours, and share B and C."""
    i = tl.program_id(0)
    return i % processors * tl.cdiv(count, processors) + i // processors


@triton.jit
def split_program(chosen, groups, tiles, parts):
    """Tile, chunk of time, sequence and group of a program."""
    tile, part = chosen % (groups * tiles), chosen // (groups * tiles) % parts
    return tile, part, (chosen // (groups * tiles) // parts).to(tl.int64), tile // tiles


@triton.jit
def channel_of(tile, tiles, group, per_group, column, WIDTH: tl.constexpr):
    """Whether a lane has a channel, and the index of this channel, or of the group's last one."""
    own = (tile % tiles) * WIDTH + column
    return own < per_group, (group * per_group + tl.minimum(own, per_group - 1)).to(tl.int64)


@triton.jit
def sequence_of(bounds, sequence, l, slabs, EVERY: tl.constexpr):
    """Row, first step, end, and index of the first saved state of a sequence."""
    if bounds is None:
        return sequence, 0, l, sequence * tl.cdiv(slabs, EVERY)
    else:
        t_start, t_end = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
        return sequence * 0, t_start, t_end, sequence + t_start // (STEPS * EVERY)


@triton.jit
def own_rows(at, lane, n, factor, K: tl.constexpr, LANES: tl.constexpr):
    """The numbers of a lane's K states in a row of n, times a factor; zeros beyond n."""
    found = ()
    for j in tl.static_range(K):
        row_n = j * LANES + lane
        found = found + (tl.load(at + row_n, row_n < n, 0.0) * factor,)
    return found


@triton.jit
def own_rates(A, channel, lane, n, LOG_A: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr):
    """The rates A log2 e of a lane's K states; LOG_A: given as log(-A). Zeros beyond n."""
    found = ()
    for j in tl.static_range(K):
        row_n = j * LANES + lane
        found = found + (rate_of(tl.load(A + channel * n + row_n, row_n < n, 0.0), row_n < n, LOG_A),)
    return found


@triton.jit
def rate_of(value, inside, LOG_A: tl.constexpr):
    value = value.to(tl.float32)
    if LOG_A:
        value = tl.where(inside, -exp2(value * LOG2_E), 0.0)
    return value * LOG2_E


@triton.jit
def state_after_chunk(states, rates, carried, spans, at, channel, lane, d, real, LANES: tl.constexpr):
    """The states after a chunk of time, from its end state from zero and its sum of delta."""
    passed, then = tl.load(spans + at * d + channel), ()
    N: tl.constexpr = len(states) * LANES
    for j in tl.static_range(len(states)):
        gained = tl.load(carried + (at * N + j * LANES + lane) * d + channel, real, 0.0)
        then = then + (exp2(rates[j] * passed) * states[j] + gained,)
    return then


@triton.jit
def channel_numbers(at, channel, zero):
    """The number of a (d,) tensor for each lane's channel; zero without a tensor."""
    return zero if at is None else tl.load(at + channel).to(tl.float32)


@triton.jit
def added(total, values, COUNT: tl.constexpr):
    """total + the first COUNT values, in their order."""
    for i in tl.static_range(COUNT):
        total += values[i]
    return total


@triton.jit
def load_first_rows(
    at, buffer, index, slab, slabs, S: tl.constexpr, STRIDE: tl.constexpr, U: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """Load B and C of the first U slabs into shared memory."""
    coming = load_rows(at + slab.to(tl.int64) * STRIDE, index, slabs - slab, S, STRIDE, U, THREADS)
    store_shared(coming, buffer, index, U * S, THREADS)
    barrier(index)


@triton.jit
def lane_of(index, LANES: tl.constexpr):
    """For each thread: its lane of a channel, the channel, and the first thread of this channel.

    Threads 2 i and 2 i + 1 have the same states, so one read of shared memory serves both. The lanes of a
    channel are 2 threads apart, so that they read adjacent steps.
    """
    lane = index // 2 % LANES
    return lane, index % 2 + index // (2 * LANES) * 2, index - 2 * lane


@triton.jit
def read_three(
    at_s, at_u, at_z, t1, sl, ul, zl, l, WIDE: tl.constexpr, WHOLE: tl.constexpr, V: tl.constexpr
):  # fmt: skip
    """V steps of each lane of delta, u, and z if there is one."""
    z = () if at_z is None else read(at_z, t1, zl, l, WIDE, WHOLE, V)
    return read(at_s, t1, sl, l, WIDE, WHOLE, V), read(at_u, t1, ul, l, WIDE, WHOLE, V), z


@triton.jit
def eight_steps(at, row, shared, constant, STEADY: tl.constexpr):
    """A slab's 8 steps of a row of B or C: from shared memory, or in the interpreter from global memory."""
    if STEADY:
        return repeat(constant, STEPS)
    else:
        if INTERPRETED:
            where = at + row * STEPS
            found = load_words(where, 4, True) + load_words(where + 4, 4, True)
        else:
            found = load_shared(shared) + load_shared(shared + 16)
        tiles = ()
        for i in tl.static_range(STEPS):
            tiles = tiles + unpack_word(found[i], tl.float32)
        return tiles


@triton.jit
def own_steps(
    loaded_s, loaded_u, delta, u, bias, t1, t_start, t_end, SOFTPLUS: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Per-lane values of delta, then of delta u."""
    s, v = as_floats(loaded_s, delta, WIDE), as_floats(loaded_u, u, WIDE)
    steps, inputs = (), ()
    for i in tl.static_range(len(s)):
        step, value = s[i] + bias, v[i]
        if SOFTPLUS:
            step = softplus(step, u.dtype.element_ty == tl.float32)
        if not WHOLE:
            inside = (t1 + i >= t_start) & (t1 + i < t_end)
            step, value = tl.where(inside, step, 0.0), tl.where(inside, value, 0.0)
        steps, inputs = steps + (step,), inputs + (step * value,)
    return steps + inputs


@triton.jit
def own_outputs(sums, skip, loaded_u, loaded_z, u, z, WIDE: tl.constexpr):
    """Per-lane values of y before the gate, then after it."""
    v = as_floats(loaded_u, u, WIDE)
    raws, gated = (), ()
    if len(loaded_z) > 0:
        gate = as_floats(loaded_z, z, WIDE)
    for i in tl.static_range(len(v)):
        value = sums[i] + skip * v[i]
        raws = raws + (value,)
        if len(loaded_z) > 0:
            value = value * gate[i] * sigmoid(gate[i])
        gated = gated + (value,)
    return raws + gated
