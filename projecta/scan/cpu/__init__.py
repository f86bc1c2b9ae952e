"""The scan on the CPU, in numba: it uses full vectors and needs no compiler to install.

A block is as many channels of a group as a vector has lanes. One loop over time advances four rows of a
block's states at once, in registers. A real state is one row; a complex state is two rows, its real and its
imaginary part. Blocks and sequences are the parallel work: threads run the kernels without the interpreter's
lock. Results do not depend on the number of threads.

Tiles of `TILE` steps are read from memory of any strides and type and transposed, so that each step is one
vector. A, D and the states are transposed too. The decay is 2^(delta A log2 e). If no exponent of a tile
leaves the safe range, the kernel omits the clamps.

The backward pass works on superblocks of several blocks. It recomputes the states of a chunk from those that
the forward pass saved every `CHUNK` steps, then goes through the chunk in reverse. Gradients of B and C are
summed over the channels of a superblock in vectors, then over lanes, then over superblocks in a fixed order.
"""

from projecta.scan.cpu.launch import (
    Passes,
    repeats,
    saved_shape,
    scan_reversed,
    selective_scan,
    selective_state_update,
)


def unavailable() -> str:
    """Why this backend cannot run; "" when it can."""
    return ""


__all__ = [
    "Passes", "repeats", "saved_shape", "scan_reversed", "selective_scan", "selective_state_update",
    "unavailable",
]  # fmt: skip
