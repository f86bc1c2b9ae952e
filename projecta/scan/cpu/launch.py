"""Launches the CPU kernels: forward and backward passes of a call, in pieces of time if that is faster."""

from functools import partial

import torch
from torch import Tensor

from projecta._cpu.memory import flat, in_large_pages
from projecta._cpu.threads import run
from projecta.scan import reference
from projecta.scan._operator import Inputs, define
from projecta.scan.cpu import backward, forward
from projecta.scan.cpu.layout import Layout, saved_shape


def forward_pass(
    inputs: Inputs, delta_softplus: bool, y: Tensor, last_state: Tensor, saved: Tensor, reverse: bool = False
) -> None:
    layout, start, none = Layout(inputs, delta_softplus, reverse=reverse), inputs.initial_state, saved[:0]
    in_large_pages(y, saved)
    if layout.pieces == 1:
        _forward_run(layout, y, start, last_state, saved, none)
        return
    # First pass: `gained`, the end state of each piece from zero. The second pass has the true start states.
    gained, spans = layout.per_piece(inputs.A.shape)
    _forward_run(layout, y, None, gained.flatten(0, 1), none, spans)
    state = torch.zeros_like(last_state) if start is None else start
    decays, starts = torch.exp(spans[..., None] * inputs.A), torch.empty_like(gained)
    for i in range(layout.pieces):
        starts[:, i] = state
        state = decays[:, i] * state + gained[:, i]
    _forward_run(layout, y, starts.flatten(0, 1), gained.flatten(0, 1), saved, none)
    last_state.copy_(gained[:, -1])


def _forward_run(
    layout: Layout, y: Tensor, start: Tensor | None, last: Tensor, saved: Tensor, spans: Tensor,
) -> None:  # fmt: skip
    work, steps, weights = layout.arguments(y, forward.forward_workspace.py_func(layout.padded))
    none = saved[:0]
    states = forward.States(
        flat(spans), flat(none if start is None else start.contiguous()), flat(last), flat(saved)
    )
    items = layout.sequences * layout.blocks
    run(
        forward.forward, items, layout.work, work, steps, weights, states, *layout.kinds,
        types=(*layout.types, y.dtype),
    )  # fmt: skip


def backward_pass(
    grad_y: Tensor, grad_last: Tensor, saved: Tensor, inputs: Inputs, delta_softplus: bool, grads: Inputs,
    reverse: bool = False,
) -> None:  # fmt: skip
    layout, none = Layout(inputs, delta_softplus, reverse=reverse), saved[:0]
    in_large_pages(*grads)
    if layout.pieces == 1:
        _backward_run(layout, grad_y, grad_last, saved, grads, grads.initial_state, none)
        return
    # The same in reverse. First pass: `sent`, the gradient at the start of each piece alone.
    sent, spans = layout.per_piece(inputs.A.shape)
    alone = torch.zeros_like(sent).flatten(0, 1)
    _backward_run(layout, grad_y, alone, saved, grads, sent.flatten(0, 1), spans)
    decays, ends, grad = torch.exp(spans[..., None] * inputs.A).conj(), torch.empty_like(sent), grad_last
    for i in reversed(range(layout.pieces)):
        ends[:, i] = grad
        grad = decays[:, i] * grad + sent[:, i]
    _backward_run(layout, grad_y, ends.flatten(0, 1), saved, grads, None, none)
    if grads.initial_state is not None:
        grads.initial_state.copy_(grad)


def _backward_run(
    layout: Layout, grad_y: Tensor, grad_last: Tensor, saved: Tensor, grads: Inputs,
    grad_start: Tensor | None, spans: Tensor,
) -> None:  # fmt: skip
    inputs, s, d = layout.inputs, layout.sequences, layout.inputs.A.shape[0]

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=layout.real)

    dA, dD, dbias = empty(s, d, layout.rows), empty(s, d), empty(s, d)
    constant = [empty(s if t.dim() == 2 else 0, d, layout.rows) for t in (inputs.B, inputs.C)]
    sums = [
        empty(layout.b * layout.supers * layout.l * layout.padded if t.dim() == 4 else 0)
        for t in (inputs.B, inputs.C)
    ]
    vectors = backward.backward_workspace.py_func(layout.padded, int(layout.sizes[6]))
    work, steps, weights = layout.arguments(grad_y, vectors)
    none = saved[:0]
    states = backward.States(
        flat(spans),
        flat(grad_last.contiguous()),
        flat(saved),
        flat(none if grad_start is None else grad_start),
    )
    along = grads.u, grads.delta, grads.u if grads.z is None else grads.z
    outputs = backward.Grads(*(part for t in along for part in layout.steps(t)))
    totals = backward.Sums(*map(flat, (dA, dD, dbias, *constant, *sums)))
    run(
        backward.backward, s * layout.supers, layout.work, work, steps, weights, states, outputs, totals,
        *layout.kinds, types=(*layout.types, grad_y.dtype),
    )  # fmt: skip
    grads.A.copy_(layout.gradient(dA.sum(0)))
    for grad, each in ((grads.D, dD), (grads.delta_bias, dbias)):
        if grad is not None:
            grad.copy_(each.sum(0))
    for grad, each, parts, conjugate in (
        (grads.B, constant[0], totals.B, False), (grads.C, constant[1], totals.C, True),
    ):  # fmt: skip
        if grad.dim() == 2:
            grad.copy_(layout.gradient(each.sum(0), conjugate))
        else:
            layout.unpack(parts, grad, conjugate)


selective_scan = define("scan_cpu", forward_pass, backward_pass, saved_shape)
scan_reversed = define(
    "scan_cpu_reversed",
    partial(forward_pass, reverse=True),
    partial(backward_pass, reverse=True),
    saved_shape,
)


selective_state_update = reference.selective_state_update  # few operations on all states: no slower
