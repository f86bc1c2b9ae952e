"""B and C as the kernels of `cpu` read them, the states of a step side by side; and the gradients of both.

The caller's memory has any strides, also negative ones, and any type that kernels read. A tile of steps is
one work item.
"""

import numpy as np

from projecta._cpu.simd import array_at, claim, fence, lanes, load, store
from projecta._cpu.threads import compiled, inner
from projecta.scan.cpu.tiles import TILE, read_vectors, write_vectors


@inner
def _place(sizes, strides, item):
    """Row of (b, g), first step, steps, and the place of the first number in the caller's memory."""
    row, first = item // sizes[4], item % sizes[4] * TILE
    base = row // sizes[0] * strides[0] + row % sizes[0] * strides[1] + first * strides[3]
    return row, first, min(TILE, sizes[1] - first), base


@compiled
def pack(counter, items, sizes, kind, real, places):
    """(b, g, n, l) to (b, g, l, padded n).

    sizes: g, l, n, padded n, tiles of a row. places: address and strides of the source, of type `kind`, and
    address of the target, of type `real`.
    """
    source, strides, target = array_at(places[0], 1, kind), places[1:5], array_at(places[5], 1, real)
    rows, padded, state = sizes[2], sizes[3], strides[2]
    width = lanes(target)
    tile = np.empty(TILE * width, target.dtype)
    item = claim(counter)
    while item < items:
        row, first, steps, base = _place(sizes, strides, item)
        for q in range(0, padded, width):
            to, held = (row * sizes[1] + first) * padded + q, min(width, padded - q)
            read_vectors(
                source, base + q * state, state, strides[3], min(width, rows - q), steps, tile, np.int64(0)
            )
            for t in range(steps):
                if held == width:
                    store(target, to + t * padded, load(tile, t * width))
                else:
                    for c in range(held):
                        target[to + t * padded + c] = tile[t * width + c]
        item = claim(counter)


@compiled
def unpack(counter, items, sizes, kind, real, places):
    """The sum over the parts (b, g, parts, l, padded n) as (b, g, n, l).

    sizes: as for `pack`, and the number of parts. places: of the target and of the parts, as for `pack`.
    """
    target, strides, parts = array_at(places[0], 1, kind), places[1:5], array_at(places[5], 1, real)
    rows, padded, state, count = sizes[2], sizes[3], strides[2], sizes[5]
    width, each = lanes(parts), sizes[1] * padded
    tile = np.empty(TILE * width, parts.dtype)
    item = claim(counter)
    while item < items:
        row, first, steps, base = _place(sizes, strides, item)
        for q in range(0, rows, width):
            at, held = row * count * each + first * padded + q, min(width, rows - q)
            for t in range(steps):
                if held == width:
                    total = load(parts, at + t * padded)
                    for i in range(1, count):
                        total = total + load(parts, at + t * padded + i * each)
                    store(tile, t * width, total)
                else:
                    for c in range(held):
                        number = parts[at + t * padded + c]
                        for i in range(1, count):
                            number += parts[at + t * padded + i * each + c]
                        tile[t * width + c] = number
            write_vectors(target, base + q * state, state, strides[3], held, steps, tile, np.int64(0))
        item = claim(counter)
    fence()
