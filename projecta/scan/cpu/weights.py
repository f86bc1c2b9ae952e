"""B and C for the kernels of `cpu`, the states of a step side by side, and their gradients back by state.

The caller's memory has any strides, also negative ones, and any type that kernels read. A tile of steps is
one work item.
"""

from projecta._cpu.simd import claim, fence, get, lanes, load, put, store, transpose
from projecta._cpu.threads import compiled, inner
from projecta.scan.cpu.tiles import TILE


@inner
def _place(sizes, strides, item):
    """Row of (b, g), first step, steps, and the place of the first number in the caller's memory."""
    row, first = item // sizes[4], item % sizes[4] * TILE
    base = row // sizes[0] * strides[0] + row % sizes[0] * strides[1] + first * strides[3]
    return row, first, min(TILE, sizes[1] - first), base


@compiled
def pack(counter, items, sizes, source, strides, target):
    """(b, g, n, l) with `strides` to (b, g, l, padded n). sizes: g, l, n, padded n, tiles of a row."""
    rows, padded, state, step = sizes[2], sizes[3], strides[2], strides[3]
    width = lanes(target)
    item = claim(counter)
    while item < items:
        row, first, steps, base = _place(sizes, strides, item)
        to = (row * sizes[1] + first) * padded
        for q in range(0, rows, width):
            here, there, done = base + q * state, to + q, 0
            if rows - q >= width and state == 1:
                done = steps
                for t in range(steps):
                    store(target, there + t * padded, load(source, here + t * step))
            elif rows - q >= width and step == 1:
                done = steps // width * width
                for t in range(0, done, width):
                    transpose(source, here + t, state, target, there + t * padded, padded)
            elif rows - q >= width and step == -1:
                done = steps // width * width
                for t in range(0, done, width):
                    last = there + (t + width - 1) * padded
                    transpose(source, here - t - width + 1, state, target, last, -padded)
            for t in range(done, steps):
                for c in range(min(width, rows - q)):
                    put(target, there + t * padded + c, get(source, here + c * state + t * step))
        for t in range(steps):
            for c in range(rows, padded):
                target[to + t * padded + c] = 0
        item = claim(counter)
    fence()


@compiled
def unpack(counter, items, sizes, parts, target, strides):
    """The sum over the parts (b, g, parts, l, padded n) as (b, g, n, l) with `strides`.

    sizes: as for `pack`, and the number of parts. The first part is overwritten.
    """
    l, rows, padded, state, step = sizes[1], sizes[2], sizes[3], strides[2], strides[3]
    width = lanes(parts)
    item = claim(counter)
    while item < items:
        row, first, steps, base = _place(sizes, strides, item)
        to, whole = (row * sizes[5] * l + first) * padded, steps * padded // width * width
        for at in range(to, to + whole, width):
            total = load(parts, at)
            for i in range(1, sizes[5]):
                total = total + load(parts, at + i * l * padded)
            store(parts, at, total)
        for at in range(to + whole, to + steps * padded):
            for i in range(1, sizes[5]):
                parts[at] += parts[at + i * l * padded]
        for q in range(0, rows, width):
            here, there, done = to + q, base + q * state, 0
            if rows - q >= width and state == 1:
                done = steps
                for t in range(steps):
                    store(target, there + t * step, load(parts, here + t * padded))
            elif rows - q >= width and step == 1:
                done = steps // width * width
                for t in range(0, done, width):
                    transpose(parts, here + t * padded, padded, target, there + t, state)
            elif rows - q >= width and step == -1:
                done = steps // width * width
                for t in range(0, done, width):
                    last = here + (t + width - 1) * padded
                    transpose(parts, last, -padded, target, there - t - width + 1, state)
            for t in range(done, steps):
                for c in range(min(width, rows - q)):
                    put(target, there + c * state + t * step, get(parts, here + t * padded + c))
        item = claim(counter)
    fence()
