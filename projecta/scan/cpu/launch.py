"""Launches the CPU kernels: forward and backward passes of a call, in pieces of time if that is faster."""

from functools import partial

import torch
from torch import Tensor

from projecta._cpu.memory import in_large_pages
from projecta.scan import reference
from projecta.scan._operator import Inputs, define
from projecta.scan.cpu import backward, forward
from projecta.scan.cpu.layout import Layout, Weights, saved_shape

REVERSE_COSTS = 3  # the backward pass has so many times the arithmetic of the forward pass


def repeats(inputs: Inputs) -> bool:
    """Whether `Passes` takes calls like this one."""
    return bool(inputs.u.numel())


class Passes:
    """The passes of all calls that differ in values only. Packed sequences' bounds are such values, too."""

    def __init__(self, inputs: Inputs, delta_softplus: bool, reverse: bool = False):
        self.layout = Layout(inputs, delta_softplus, reverse)

    def forward(self, inputs: Inputs, y: Tensor, last_state: Tensor, saved: Tensor) -> None:
        """Write y, the last state and, unless it is empty, `saved`."""
        layout, start = self.layout, inputs.initial_state
        in_large_pages(y, saved)
        weights = layout.weights(inputs)
        if layout.pieces == 1:
            _forward_run(layout, inputs, weights, y, start, last_state, saved, None)
            return
        # First pass: `gained`, the end state of each piece from zero. The second pass has the true starts.
        gained, spans = layout.per_piece(inputs.A.shape)
        _forward_run(layout, inputs, weights, y, None, gained.flatten(0, 1), None, spans)
        state = torch.zeros_like(last_state) if start is None else start
        decays, starts = torch.exp(spans[..., None] * inputs.A), torch.empty_like(gained)
        for i in range(layout.pieces):
            starts[:, i] = state
            state = decays[:, i] * state + gained[:, i]
        _forward_run(
            layout, inputs, weights, y, starts.flatten(0, 1), gained.flatten(0, 1), saved, None
        )  # fmt: skip
        last_state.copy_(gained[:, -1])

    def backward(
        self, grad_y: Tensor, grad_last: Tensor | None, saved: Tensor, inputs: Inputs, grads: Inputs
    ) -> None:
        """Write the gradients of `inputs`; `grad_last` is None for zeros."""
        layout = self.layout
        in_large_pages(*grads)
        weights = layout.weights(inputs)
        if layout.pieces == 1:
            _backward_run(
                layout, inputs, weights, grad_y, grad_last, saved, grads, grads.initial_state, None
            )  # fmt: skip
            return
        # The same in reverse. First pass: `sent`, the gradient at the start of each piece alone.
        sent, spans = layout.per_piece(inputs.A.shape)
        _backward_run(
            layout, inputs, weights, grad_y, None, saved, grads, sent.flatten(0, 1), spans
        )  # fmt: skip
        decays, ends = torch.exp(spans[..., None] * inputs.A).conj(), torch.empty_like(sent)
        grad = torch.zeros_like(sent[:, 0]) if grad_last is None else grad_last
        for i in reversed(range(layout.pieces)):
            ends[:, i] = grad
            grad = decays[:, i] * grad + sent[:, i]
        _backward_run(layout, inputs, weights, grad_y, ends.flatten(0, 1), saved, grads, None, None)
        if grads.initial_state is not None:
            grads.initial_state.copy_(grad)


def _forward_run(
    layout: Layout, inputs: Inputs, weights: Weights, y: Tensor, start: Tensor | None, last: Tensor,
    saved: Tensor | None, spans: Tensor | None,
) -> None:  # fmt: skip
    u, delta, z = inputs.u, inputs.delta, inputs.z
    start = None if start is None else start.contiguous()
    places = layout.places(u, delta, u if z is None else z, y)
    places += addresses(*weights, spans, start, last, saved)
    keep = (weights, start) if layout.pieces == 1 else None
    layout.run(forward.forward, layout.sequences * layout.blocks, y, places, layout.size, keep)


def _backward_run(
    layout: Layout, inputs: Inputs, weights: Weights, grad_y: Tensor, grad_last: Tensor | None,
    saved: Tensor, grads: Inputs, grad_start: Tensor | None, spans: Tensor | None,
) -> None:  # fmt: skip
    u, delta, A, B, C, _, z = inputs[:7]
    s, d, rows = layout.sequences, A.shape[0], layout.rows

    def sums(grad: Tensor | None, *shape: int) -> Tensor:
        return sums_for(grad, layout.real, s, *shape)

    def parts(t: Tensor) -> Tensor | None:
        size = layout.b * layout.supers * layout.l * layout.padded
        return torch.empty(size, dtype=layout.real, device="cpu") if t.dim() == 4 else None

    dA, dD, dbias = sums(grads.A, d, rows), sums(grads.D, d), sums(grads.delta_bias, d)
    dB, dC = (sums(grad, d, rows) if grad.dim() == 2 else None for grad in (grads.B, grads.C))
    parts_B, parts_C = parts(B), parts(C)
    grad_last = None if grad_last is None else grad_last.contiguous()
    places = layout.places(u, delta, u if z is None else z, grad_y)
    places += layout.places(grads.u, grads.delta, grads.u if z is None else grads.z)  # type: ignore[arg-type]
    places += addresses(*weights, spans, grad_last, saved, grad_start, dA, dD, dbias, dB, dC)
    places += addresses(parts_B, parts_C)
    layout.run(backward.backward, s * layout.supers, grad_y, places, layout.size * REVERSE_COSTS)
    for grad, each, conjugate in (
        (grads.A, dA, False), (grads.D, dD, False), (grads.delta_bias, dbias, False), (grads.B, dB, False),
        (grads.C, dC, True),
    ):  # fmt: skip
        if grad is not None and each is not None and each is not grad:
            total = each.sum(0)
            grad.copy_(layout.gradient(total, conjugate) if total.dim() == 2 else total)
    for grad, part, conjugate in ((grads.B, parts_B, False), (grads.C, parts_C, True)):
        if part is not None:
            layout.unpack(part, grad, conjugate)


def sums_for(grad: Tensor | None, real: torch.dtype, sequences: int, *shape: int) -> Tensor:
    """Memory for sums over each sequence: the gradient itself if there is one sequence."""
    if sequences == 1 and grad is not None and grad.dtype == real and grad.is_contiguous():
        return grad
    return torch.empty(sequences, *shape, dtype=real, device="cpu")


def addresses(*tensors: Tensor | None) -> list[int]:
    """Addresses of contiguous tensors; 0 for None and for an empty one."""
    for t in tensors:
        if t is not None and not t.is_contiguous():
            raise AssertionError(f"a kernel needs contiguous memory; got strides {t.stride()} of {t.shape}")
    return [0 if t is None else t.data_ptr() for t in tensors]


def forward_pass(
    inputs: Inputs, delta_softplus: bool, y: Tensor, last_state: Tensor, saved: Tensor, reverse: bool = False
) -> None:
    Passes(inputs, delta_softplus, reverse).forward(inputs, y, last_state, saved)


def backward_pass(
    grad_y: Tensor, grad_last: Tensor | None, saved: Tensor, inputs: Inputs, delta_softplus: bool,
    grads: Inputs, reverse: bool = False,
) -> None:  # fmt: skip
    Passes(inputs, delta_softplus, reverse).backward(grad_y, grad_last, saved, inputs, grads)


selective_scan = define("scan_cpu", forward_pass, backward_pass, saved_shape)
scan_reversed = define(
    "scan_cpu_reversed",
    partial(forward_pass, reverse=True),
    partial(backward_pass, reverse=True),
    saved_shape,
)


selective_state_update = reference.selective_state_update  # few operations on all states: no slower
