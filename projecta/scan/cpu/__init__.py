"""The scan on the CPU in numba: as fast as the vector units allow, without a compiler to install.

A vector holds as many channels as it has lanes; one loop over time advances four rows of their states at
once, in registers. A real state is one row; a complex state is two, its real and its imaginary part. Channels
of a group are taken in blocks of that many lanes. Blocks and sequences are the parallel work: threads run the
kernels without the interpreter's lock. Results do not depend on the number of threads.

Tiles of `TILE` steps are read from the caller's memory, whatever its strides and type, and turned so that a
step is a vector; so are A, D and the states. The decay is 2^(delta A log2 e); where no exponent of a tile
leaves the safe range, the clamps are left out.

The backward pass takes superblocks of several blocks. From the states that the forward pass saved every
`CHUNK` steps it forms the states of a chunk again, then goes through the chunk in reverse. Gradients of B and
C are summed over the channels of a superblock in vectors, lane by lane at last, and over superblocks in their
order.
"""

from projecta.scan.cpu.launch import selective_scan, selective_state_update


def unavailable() -> str:
    """Why this backend cannot run; "" when it can."""
    return ""


__all__ = ["selective_scan", "selective_state_update", "unavailable"]
