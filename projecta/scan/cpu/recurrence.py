"""One step of the recurrence h = d h + x on two rows of states, forward and backward, real or complex.

A real state is one row of vectors. A complex state is two: its real and its imaginary part.
"""

import math

from projecta._cpu.simd import LOG2_E, cos_and_sin, exp2_product, exp2_product_safe, fma, load, splat
from projecta._cpu.threads import inner

RADIANS = 2 * math.pi * LOG2_E  # A's imaginary parts are in full turns, its real parts in powers of 2


@inner
def weight_of(B, varying, constant, steady):
    """B or C of a row of states: one number broadcast to all lanes if it varies in time (`steady` is None),
    else a vector."""
    if steady is None:
        return splat(B, varying)
    return load(B, constant)


@inner
def decay_of(s, A, A_next, clamp, rotate):
    """The decays 2^(s A) of two rows, or of one complex state. `clamp` is None if no exponent leaves the safe
    range, `rotate` if states are real."""
    if rotate is not None:
        size = exp2_product_safe(s, A)
        cos, sin = cos_and_sin(s * A_next)
        return size * cos, size * sin
    if clamp is None:
        return exp2_product(s, A), exp2_product(s, A_next)
    return exp2_product_safe(s, A), exp2_product_safe(s, A_next)


@inner
def step_rows(d, d_next, h, h_next, x, x_next, rotate):
    """d h + x of two rows."""
    if rotate is not None:
        x, x_next = x - d_next * h_next, fma(d_next, h, x_next)
        return fma(d, h, x), fma(d, h_next, x_next)
    return fma(d, h, x), fma(d_next, h_next, x_next)


@inner
def step_rows_back(d, d_next, g, g_next, rotate):
    """The conjugate of d, times g."""
    if rotate is not None:
        return fma(d, g, d_next * g_next), d * g_next - d_next * g
    return d * g, d_next * g_next


@inner
def match_rows(c, c_next, h, h_next, rotate):
    """c times the conjugate of h."""
    if rotate is not None:
        return fma(c, h, c_next * h_next), c_next * h - c * h_next
    return c * h, c_next * h_next


@inner
def to_radians(f, rotate):
    """The second row's part of the gradient of s, converted to the unit of the first row."""
    if rotate is not None:
        return f * RADIANS
    return f
