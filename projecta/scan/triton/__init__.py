"""The scan on a GPU, in Triton: no compiler to install, the same source from a T4 to an H200.

Where b d fills the machine, time is a loop and a warp's lanes are states and channels. Where it does not,
there are two ways. Without gradients lanes lie along time: each scans 16 steps, a scan over the lanes joins
them, and the loop runs over the states; every exponential is computed once. With gradients time is cut into
chunks: a first pass works out the state that each chunk leaves from zero, the second starts from true ones.

Backward goes back in slabs of 8 steps, each from the state that forward saved, chunk by chunk in the same
way, and sums dB and dC over a program's channels, then over programs, in fixed order. `plan` is the table.

B and C reach most kernels in float32, laid out as they read them. Nothing waits for the device.
"""

import os

import torch

from projecta.scan.triton import replay
from projecta.scan.triton.launch import prepare, selective_scan, selective_state_update


def unavailable() -> str:
    """Why this backend cannot run; "" when it can."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if torch.version.hip:
        return "the kernels hold instructions of NVIDIA's"
    return "" if torch.cuda.is_available() else "there is no CUDA device"


__all__ = ["prepare", "replay", "selective_scan", "selective_state_update", "unavailable"]
