"""The convolution on a GPU, in Triton.

A lane takes V = 8 consecutive steps of one channel and the few steps before them. Where time is contiguous
the lanes of a warp lie along time, and memory is read 16 bytes at a time; elsewhere they lie along channels,
so that a (b, l, d) tensor is read as it is stored. The kernels move little more than their tensors: the
backward pass computes the convolution before the activation again instead of reading it.

The gradients of weight and bias are summed over lanes, then over programs in fixed order.
"""

from typing import Any

import torch
from torch import Tensor

from projecta._calls import traits
from projecta._operators import refuse_tangents, register
from projecta._triton.launch import (
    Recording,
    cached,
    cannot_run,
    new_buffer,
    ordered_strides,
    processors_of,
    repeated,
    start_kernel,
)
from projecta.conv import reference
from projecta.conv._operator import Grads, Inputs, define
from projecta.conv.triton.kernels import (
    STEPS,
    convolve,
    convolve_backward,
    convolve_backward_start,
    convolve_step,
    sum_totals,
)

unavailable = cannot_run
WARPS = 4


class _Layout:
    """How a call is cut into programs, and the launches that it has compiled."""

    def __init__(self, inputs: Inputs, silu: bool, reverse: bool, *others: Tensor):
        x, weight, _, _, bounds = inputs
        self.way = -1 if reverse else 1  # through memory
        b, self.d, self.l = x.shape
        self.sequences = b if bounds is None else len(bounds) - 1
        tensors = (x, *others)
        time = all(t.stride(2) == 1 or self.l == 1 for t in tensors) and self.l > 1
        wide = time and bounds is None and self.l % STEPS == 0 and all(
            t.data_ptr() % 16 == 0 and t.stride(0) % STEPS == 0 and t.stride(1) % STEPS == 0 for t in tensors
        )  # fmt: skip
        threads = 32 * WARPS
        block = STEPS * 32 if time else STEPS
        self.tiles = -(-self.d // (WARPS if time else threads))
        blocks = -(-self.l // block)
        least = 1 if time else 8  # the steps before a chunk are read twice
        wanted = 8 * processors_of(x.device) // (self.sequences * self.tiles) + 1
        self.parts = max(1, min(wanted, blocks // least))
        each = -(-blocks // self.parts)
        self.parts = max(1, -(-blocks // each)) + (bounds is not None)  # a sequence may begin within a block
        self.chunk = each * block
        self.options = {
            "WIDTH": weight.shape[1], "SILU": silu, "TIME": time, "WIDE": self.way * wide,
            "WHOLE": bounds is None and self.l % block == 0, "THREADS": threads, "num_warps": WARPS,
        }  # fmt: skip
        self.launches: dict = {}

    def sizes(self, **tensors: Tensor) -> dict[str, int]:
        """The sizes of a kernel, and its strides in the order in which it goes through time."""
        cut = {"d": self.d, "l": self.l, "tiles": self.tiles, "parts": self.parts, "chunk": self.chunk}
        return self.strides(**tensors) | cut

    def strides(self, **tensors: Tensor) -> dict[str, int]:
        return ordered_strides(self.way, **tensors)

    @property
    def grid(self) -> tuple[int]:
        return (self.tiles * self.parts * self.sequences,)


def forward_pass(inputs: Inputs, silu: bool, y: Tensor, reverse: bool = False) -> None:
    """Write the convolution of `inputs` to y."""
    x, weight, bias, start, bounds = inputs
    layout = cached(
        lambda: _Layout(inputs, silu, reverse, y), (*inputs, y), silu, reverse, x.device, "conv"
    )  # fmt: skip
    tensors = {
        "x": x, "weight": weight.contiguous(), "bias": bias, "start": start, "bounds": bounds, "y": y
    }  # fmt: skip
    with torch.cuda.device_of(x):
        start_kernel(
            layout.launches, convolve, tensors,
            lambda: (layout.grid, layout.sizes(x=x, y=y), layout.options),
        )  # fmt: skip


def backward_pass(
    grad_y: Tensor, inputs: Inputs, silu: bool, grads: Grads, reverse: bool = False
) -> None:  # fmt: skip
    """Write the gradients of `inputs` to `grads`."""
    x, weight, bias, start, bounds = inputs
    layout = cached(
        lambda: _Layout(inputs, silu, reverse, grad_y, grads.x),
        (*inputs, grad_y, grads.x), silu, reverse, x.device, "conv back",
    )  # fmt: skip
    width = weight.shape[1]
    totals = new_buffer(x, layout.sequences * layout.parts * layout.d * (width + 1))
    tensors = {
        "grad_y": grad_y, "x": x, "weight": weight.contiguous(), "bias": bias, "start": start,
        "bounds": bounds, "dx": grads.x, "totals": totals,
    }  # fmt: skip
    sums = {"totals": totals, "dweight": grads.weight, "dbias": grads.bias}

    def describe_sums():
        grid = (-(-layout.d * (width + 1) // 128),)
        over = layout.sequences * layout.parts
        return grid, {"d": layout.d, "over": over}, {"WIDTH": width, "BLOCK": 128, "num_warps": 4}

    with torch.cuda.device_of(x):
        start_kernel(
            layout.launches, convolve_backward, tensors,
            lambda: (layout.grid, layout.sizes(g=grad_y, x=x, dx=grads.x), layout.options),
        )  # fmt: skip
        start_kernel(layout.launches, sum_totals, sums, describe_sums)
        if grads.start is not None and width > 1:
            _write_start_gradient(layout, grad_y, inputs, silu, grads.start)


def _write_start_gradient(
    layout: _Layout, grad_y: Tensor, inputs: Inputs, silu: bool, dstart: Tensor
) -> None:
    x, weight, bias, start, bounds = inputs
    tensors = {
        "grad_y": grad_y, "x": x, "weight": weight.contiguous(), "bias": bias, "start": start,
        "bounds": bounds, "dstart": dstart,
    }  # fmt: skip

    def describe():
        tiles = -(-layout.d // 128)
        sizes = layout.strides(g=grad_y, x=x) | {"d": layout.d, "l": layout.l, "tiles": tiles}
        options = {"WIDTH": weight.shape[1], "SILU": silu, "BLOCK": 128, "num_warps": 4}
        return (tiles * layout.sequences,), sizes, options

    start_kernel(layout.launches, convolve_backward_start, tensors, describe)


class Passes:
    """The passes of all calls that differ in values only: the launches of the first, repeated."""

    def __init__(self, inputs: Inputs, silu: bool, reverse: bool):
        self.silu, self.reverse = silu, reverse
        self.records: dict[Any, Recording] = {}

    def forward(self, inputs: Inputs, y: Tensor) -> None:
        repeated(
            self.records, "forward", inputs[:4], (y,),
            lambda: forward_pass(inputs, self.silu, y, self.reverse),
        )  # fmt: skip

    def backward(self, grad_y: Tensor, inputs: Inputs, grads: Grads) -> None:
        repeated(
            self.records, traits(grad_y), (*inputs[:4], grad_y), grads,
            lambda: backward_pass(grad_y, inputs, self.silu, grads, self.reverse),
        )  # fmt: skip


causal_conv = define("conv_triton", forward_pass, backward_pass)


def causal_conv_update(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """As `reference.causal_conv_update`; not differentiable."""
    given = x, state, weight, bias
    refuse_tangents("causal_conv_update", given, "triton")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        return reference.causal_conv_update(x, state, weight, bias, silu)
    call = _update_op if torch.compiler.is_compiling() else update
    return call(x, state, weight.contiguous(), bias, silu)


def update(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """y (b, d) of one step; weight is contiguous."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    b, d = x.shape
    if not y.numel():
        return y

    def describe():
        block = 128
        strides = {"xb": x.stride(0), "xd": x.stride(1), "yb": y.stride(0), "yd": y.stride(1)}
        strides |= {f"s{axis}": state.stride(i) for i, axis in enumerate("bdl")}
        tiles = -(-d // block)
        options = {
            "WIDTH": weight.shape[1], "SILU": silu, "BLOCK": block, "KEPT": state.shape[2], "num_warps": 4
        }  # fmt: skip
        return (tiles * b,), strides | {"d": d, "tiles": tiles}, options

    tensors = {"x": x, "weight": weight, "bias": bias, "state": state, "y": y}
    with torch.cuda.device_of(x):
        start_kernel(
            cached(dict, tensors.values(), silu, x.device, "conv step"), convolve_step, tensors, describe
        )
    return y


_update_op = register(
    "conv_update_triton",
    update,
    lambda x, *rest: torch.empty(x.shape, dtype=x.dtype, device=x.device),
    ["state"],
)
