"""Tiles of the CPU kernels: load steps and states from a tensor's memory into vectors, and store them back.

A tile is `TILE` steps of as many channels as a vector has lanes. `read` transposes memory of any strides and
dtype, so that each step is one vector; `write` is the inverse.

numba compiles a function again for each literal number that it is called with, but once for all np.int64.
"""

import numpy as np

from projecta._cpu.shuffles import transpose, transpose_past_cache
from projecta._cpu.simd import (
    BYTES,
    address,
    array_at,
    get,
    lanes,
    largest_magnitude,
    load,
    put,
    store,
    zero,
)
from projecta._cpu.threads import inner

TILE = 64  # steps that are read and transposed together


SKEW = 5  # vectors between tiles: stores and loads 4 KiB apart would wait for each other


@inner
def aligned(like, vectors):
    """Memory of so many vectors, that are cache lines."""
    width = lanes(like)
    whole = np.empty((vectors + 1) * width, like.dtype)
    return whole[-address(whole, 0) % BYTES // whole.itemsize :]


@inner
def optional(address, like):
    """The array at an address; empty if the address is 0."""
    return array_at(address, 1 if address else 0, like)


@inner
def read_vectors(source, base, channel_stride, step_stride, channels, steps, tile, at):
    """Load channels x steps of the caller's memory into vectors at tile[at:]; other lanes are 0."""
    width = lanes(tile)
    done = 0
    if channels == width and channel_stride == 1:
        done = steps
        for t in range(steps):
            store(tile, at + t * width, load(source, base + t * step_stride))
    elif channels == width and step_stride == 1:
        done = steps // width * width
        for t in range(0, done, width):
            transpose(source, base + t, channel_stride, tile, at + t * width, width)
    elif channels == width and step_stride == -1:
        done = steps // width * width
        for t in range(0, done, width):
            last = at + (t + width - 1) * width
            transpose(source, base - t - width + 1, channel_stride, tile, last, -width)
    for t in range(done, steps):
        first = at + t * width
        store(tile, first, zero(tile))
        for c in range(channels):
            put(tile, first + c, get(source, base + c * channel_stride + t * step_stride))


@inner
def write_vectors(target, base, channel_stride, step_stride, channels, steps, tile, at):
    """The inverse of `read_vectors`."""
    width = lanes(tile)
    done = 0
    if channels == width and channel_stride == 1:
        done = steps
        for t in range(steps):
            store(target, base + t * step_stride, load(tile, at + t * width))
    elif channels == width and (step_stride == 1 or step_stride == -1):
        done = steps // width * width
        size, back = target.itemsize, step_stride == -1
        start, row = base - width + 1 if back else base, -width if back else width
        first = at + (width - 1) * width if back else at
        lines = address(target, start) % BYTES == 0 and size * channel_stride % BYTES == 0
        if lines and size * width == BYTES:
            for t in range(0, done, width):
                here = start + t * step_stride
                transpose_past_cache(tile, first + t * width, row, target, here, channel_stride)
        else:
            for t in range(0, done, width):
                here = start + t * step_stride
                transpose(tile, first + t * width, row, target, here, channel_stride)
    for t in range(done, steps):
        for c in range(channels):
            put(target, base + c * channel_stride + t * step_stride, get(tile, at + t * width + c))


@inner
def read(source, strides, row, channel, channels, first, steps, tile, at):
    """Load steps of some channels of a (b, d, l) tensor into vectors at tile[at:]; other lanes are 0."""
    base = row * strides[0] + channel * strides[1] + first * strides[2]
    read_vectors(source, base, strides[1], strides[2], channels, steps, tile, np.int64(at))


@inner
def write(target, strides, row, channel, channels, first, steps, tile, at):
    """The inverse of `read`."""
    base = row * strides[0] + channel * strides[1] + first * strides[2]
    write_vectors(target, base, strides[1], strides[2], channels, steps, tile, np.int64(at))


@inner
def write_steps(target, base, step_stride, channels, steps, tile):
    """Write vectors of adjacent channels, one for each step."""
    write_vectors(target, base, np.int64(1), step_stride, channels, steps, tile, np.int64(0))


@inner
def write_rows(target, base, channels, rows, tile, at):
    """Write `rows` vectors from tile[at:] as `rows` adjacent numbers per channel."""
    write_vectors(target, base, rows, np.int64(1), channels, rows, tile, np.int64(at))


@inner
def write_channels(target, base, channels, tile, at):
    """Write the vector at tile[at:] as one number per channel."""
    for c in range(channels):
        put(target, base + c, get(tile, at + c))


@inner
def look_ahead(ahead, source, strides, row, channel, first):
    """Write base, stride, shift and mask of the 64 cache lines of a tile of a (b, d, l) tensor to `ahead`."""
    base = row * strides[0] + channel * strides[1] + first * strides[2]
    channel_stride, step_stride, size = strides[1], strides[2], source.itemsize
    if step_stride == -1:
        base, step_stride = base - TILE + 1, 1
    contiguous = step_stride == 1
    per_row = TILE * size // BYTES if contiguous else 1
    ahead[0] = address(source, base)
    ahead[1] = size * (channel_stride if contiguous else step_stride)
    ahead[2] = 0 if per_row == 1 else 1 if per_row == 2 else 2 if per_row == 4 else 3
    ahead[3] = per_row - 1


@inner
def clear_vectors(tile, at, count):
    """Set `count` vectors from tile[at] on to zero."""
    for q in range(count):
        store(tile, at + q * lanes(tile), zero(tile))


@inner
def fetch_rows(source, base, channels, rows, padded, scale, scale_next, tile, at):
    """Load `rows` adjacent numbers per channel into vectors at tile[at:], padded with zero vectors.

    Even rows are multiplied by `scale`, odd rows by `scale_next`.
    """
    width = lanes(tile)
    read_vectors(source, base, rows, np.int64(1), channels, rows, tile, np.int64(at))
    for q in range(0, rows, 2):
        store(tile, at + q * width, load(tile, at + q * width) * scale)
    for q in range(1, rows, 2):
        store(tile, at + q * width, load(tile, at + q * width) * scale_next)
    clear_vectors(tile, at + rows * width, padded - rows)


@inner
def fetch_channels(source, base, channels, tile, at):
    """Load one number per channel into the vector at tile[at:]; other lanes are 0."""
    store(tile, at, zero(tile))
    for c in range(channels):
        put(tile, at + c, get(source, base + c))


@inner
def limits_of(rates, at, n):
    """Step sizes below which no exponent of a block leaves the safe range; NaN if a rate is NaN."""
    largest = zero(rates)
    for q in range(at, at + n * lanes(rates), lanes(rates)):
        largest = largest_magnitude(load(rates, q), largest)
    return (126.0 if rates.itemsize == 4 else 1022.0) / largest
