"""The scan on a GPU, in Triton: no compiler to install, the same source from a T4 to an H200.

If b d fills the GPU, a warp's lanes hold states and channels, and the warp loops over time. Otherwise there
are two variants. Without gradients the lanes run along time: each scans 16 steps, a scan over the lanes joins
them, and the warp loops over states; every exponential is computed once. With gradients time is cut into
chunks: a first pass computes each chunk's end state from zero, the second starts from the true states.

The backward pass goes back in slabs of 8 steps, each from a state that the forward pass saved, in the same
chunks. It sums dB and dC over a program's channels, then over programs, in a fixed order. `plan` chooses.

Most kernels read B and C from packed float32 buffers. Nothing waits for the device.
"""

from projecta._triton.launch import cannot_run as unavailable
from projecta.scan.triton.launch import (
    Passes,
    repeats,
    saved_shape,
    scan_reversed,
    selective_scan,
    selective_state_update,
)

__all__ = [
    "Passes", "repeats", "saved_shape", "scan_reversed", "selective_scan", "selective_state_update",
    "unavailable",
]  # fmt: skip
