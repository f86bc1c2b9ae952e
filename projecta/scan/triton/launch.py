"""Launches the Triton kernels: forward and backward passes of a call, one step, and prepared calls."""

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from projecta._checks import fail
from projecta.scan import reference
from projecta.scan._operator import Inputs, define, refuse_tangents
from projecta.scan.triton import backward, forward, pack_and_step, replay
from projecta.scan.triton.layout import (
    Layout,
    as_float32,
    new_room,
    recall,
    row_strides,
    start_kernel,
    strides_of,
    words_of,
)
from projecta.scan.triton.plan import padded_states, rows_saved
from projecta.scan.triton.steps import SLAB


def _forward_pass(inputs: Inputs, delta_softplus: bool, y: Tensor, last_state: Tensor, saved: Tensor) -> None:
    if not y.numel():
        last_state.copy_(inputs.initial_state) if inputs.initial_state is not None else last_state.zero_()
        return
    with torch.cuda.device_of(y):
        _launch_forward(_layout(inputs, delta_softplus, saved), inputs, y, last_state, saved)


def _layout(inputs: Inputs, delta_softplus: bool, saved: Tensor) -> Layout:
    return recall(
        lambda: Layout(inputs, delta_softplus, saved), inputs, delta_softplus, saved.numel(), inputs.u.device
    )


_POINTERS = (
    "u", "delta", "A", "B", "C", "D", "z", "bias", "start", "y", "last", "none", "rows_B", "rows_C",
    "carried", "spans",
)  # fmt: skip


def prepare(given: Inputs, canonical: Inputs, delta_softplus: bool) -> replay.Launch | None:
    """The launches of a call that has just run without gradients, for others that differ in values only.

    None if it made copies of what was given in other types or places.
    """
    u, _, A, B, C = canonical[:5]
    as_given = given.A is A and given.initial_state is canonical.initial_state
    narrow = (given.D, given.delta_bias, *(t for t in (B, C) if t.dim() == 2))
    if not u.numel() or not as_given or any(t is not None and as_float32(t) is not t for t in narrow):
        return None
    layout = _layout(canonical, delta_softplus, A.new_empty(0))
    if not layout.launches:  # the interpreter compiles nothing
        return None
    times, parts = layout.plan.times, layout.plan.parts
    varying, of_B, of_C = (B.dim() == 4, C.dim() == 4), "B", "C"
    steps: list[tuple[Callable, list[int], tuple]] = []
    floats, offsets = 0, [0, 0]  # of the room for B and C as rows, then for what chunks hand on

    def follow(kernel, *places):
        run, rest = layout.launches[kernel]
        steps.append((run, [_POINTERS.index(place) for place in places], rest))

    if any(varying) and not (times and layout.native):
        floats, (offsets[0], offsets[1]) = layout.rooms(varying, 32 if times else 0)
        of_B, of_C = ("rows_B" if varying[0] else "B"), ("rows_C" if varying[1] else "C")
        sources = "B" if varying[0] else "none", "C" if varying[1] else "none"
        follow(pack_and_step.pack_weights, *sources, of_B, of_C)
    head = "u", "delta", "A", of_B, of_C, "D"
    if times:
        follow(forward.forward_times, *head, "z", "bias", "start", "y", "last")
    else:
        handed = ("none", "none")
        if parts > 1:
            handed, between = ("carried", "spans"), layout.b * (parts - 1) * layout.d
            offsets += [floats, floats + between * layout.padded]
            floats += between * (layout.padded + 1)
            follow("ends", *head, "none", "bias", "start", "none", *handed, "none", "last", "none", "none")
        follow("states", *head, "z", "bias", "start", "none", *handed, "y", "last", "none", "none")
    shape = (layout.b, *A.shape)

    def launch(u: Tensor, A: Tensor, places: list[int | None]) -> tuple[Tensor, Tensor]:
        y, last_state = torch.empty_like(u), A.new_empty(shape)
        places += (y.data_ptr(), last_state.data_ptr(), None)
        if floats:
            room = A.new_empty(floats)  # alive until everything is launched
            start = room.data_ptr()
            places += [start + 4 * offset for offset in offsets]
        for run, slots, rest in steps:
            run(*[places[slot] for slot in slots], *rest)
        return y, last_state

    return launch


def _launch_forward(layout: Layout, inputs: Inputs, y: Tensor, last_state: Tensor, saved: Tensor) -> None:
    u, delta, A, B, C, D, z, bias, start, bounds = inputs
    D, bias = as_float32(D), as_float32(bias)

    def with_strides(described, *more, **options):
        grid, sizes, found = described
        head = (*u.stride(), *delta.stride(), *strides_of(z), *y.stride(), *more)
        return grid, (*head, *sizes), found | options

    if layout.plan.times:
        if layout.native:
            B, C = (t if t.dim() == 4 else t.float().contiguous() for t in (B, C))
        else:
            B, C = layout.arranged(B, C, 32)
        start_kernel(
            layout.launches, forward.forward_times, (u, delta, A, B, C, D, z, bias, start, y, last_state),
            lambda: with_strides(
                layout.along_time(), *row_strides(B), *row_strides(C), WIDE=layout.words(u, delta, z, y)
            ),
        )  # fmt: skip
        return
    B, C = layout.arranged(B, C)
    states, ungated = layout.kept(saved, u, z)
    carried, spans = layout.carried(u)
    if bounds is not None:
        bounds = bounds.contiguous()
        if states is not None:
            states.zero_()  # a row that no sequence needs is the same at every call
    parts = layout.plan.parts
    for ends in (True, False) if parts > 1 else (False,):

        def describe(ends=ends):
            described = layout.over_states(layout.unroll, parts - ends)
            wide = described[2]["WIDE"] and layout.words(u, delta, z, y)
            return with_strides(described, WIDE=wide, UNROLL=layout.unroll, EVERY=layout.every)

        start_kernel(
            layout.launches, forward.forward_states,
            (u, delta, A, B, C, D, None if ends else z, bias, start, bounds, carried, spans,
             None if ends else y, last_state, None if ends else states, None if ends else ungated),
            describe, "ends" if ends else "states",
        )  # fmt: skip


def _backward_pass(
    grad_y: Tensor, grad_last: Tensor, saved: Tensor, inputs: Inputs, delta_softplus: bool, grads: Inputs
) -> None:
    u = inputs.u
    if not u.numel():
        for grad in grads:
            if grad is not None:
                grad.zero_()
        if grads.initial_state is not None:
            grads.initial_state.copy_(grad_last)
        return
    with torch.cuda.device_of(u):
        layout = recall(
            lambda: Layout(inputs, delta_softplus, saved),
            (*inputs, grad_y, grad_last, saved),
            delta_softplus,
            u.device,
        )
        _launch_backward(layout, inputs, grad_y, grad_last, saved, grads)


def _launch_backward(
    layout: Layout, inputs: Inputs, grad_y: Tensor, grad_last: Tensor, saved: Tensor, grads: Inputs
) -> None:
    u, delta, A, B, C, D, z, bias, _, bounds = inputs
    D, bias = as_float32(D), as_float32(bias)
    parts, padded, slabs = layout.plan.parts, layout.padded, layout.slabs
    states, ungated = layout.kept(saved, u, z)
    arranged_B, arranged_C = layout.arranged(B, C)
    carried, spans = layout.carried(u)

    def describe_carry():
        grid, sizes, options = layout.over_states(layout.unroll, parts - 1)
        options["WIDE"] &= layout.words(delta, z, grad_y)
        strides = (*delta.stride(), *strides_of(z), *grad_y.stride())
        return grid, (*strides, *sizes), options | {"UNROLL": layout.unroll}

    if parts > 1:
        start_kernel(
            layout.launches, backward.carry, (delta, A, arranged_C, z, bias, grad_y, carried, spans),
            describe_carry,
        )  # fmt: skip
    steady_B, steady_C = B.dim() == 2, C.dim() == 2
    over, width = layout.sequences * parts, 2 + padded * (1 + steady_B + steady_C)
    totals = new_room(u, over * layout.d * width)
    tiles = layout.tiles(layout.width)
    each_row = 0 if steady_B and steady_C else layout.b * layout.g * slabs * padded * 2 * SLAB
    sums = new_room(u, tiles * each_row)

    def describe():
        grid, sizes, options = layout.over_states(1, parts)
        options["WIDE"] &= layout.words(u, delta, z, grad_y, grads.u, grads.delta, grads.z)
        strides = (
            *u.stride(), *delta.stride(), *strides_of(z), *grad_y.stride(),
            *grads.u.stride(), *grads.delta.stride(), *strides_of(grads.z),
        )  # fmt: skip
        return grid, (*strides, *sizes), options | {"EVERY": layout.every}

    start_kernel(
        layout.launches, backward.backward,
        (u, delta, A, arranged_B, arranged_C, D, z, bias,
         None if bounds is None else bounds.contiguous(), grad_y, grad_last.contiguous(), states,
         ungated, carried, spans, grads.u, grads.delta, grads.z, sums, totals, grads.initial_state),
        describe,
    )  # fmt: skip

    def describe_finish():
        block, none = 128, (0, 0, 0, 0)
        blocks = -(-slabs * padded * 2 * SLAB // block)
        strides = (
            *(none if steady_B else grads.B.stride()), *(none if steady_C else grads.C.stride())
        )  # fmt: skip
        sizes = (*strides, layout.l, layout.n, layout.g, tiles, slabs, blocks)
        return (blocks * layout.b * layout.g,), sizes, {"N": padded, "BLOCK": block, "num_warps": 1}

    if each_row:
        start_kernel(
            layout.launches, pack_and_step.reduce_tiles,
            (sums, None if steady_B else grads.B, None if steady_C else grads.C), describe_finish,
        )  # fmt: skip
    dB, dC = (
        torch.empty_like(t, memory_format=torch.contiguous_format) if t.dim() == 2 else None
        for t in (grads.B, grads.C)
    )

    def describe_fold():
        options = {
            "N": padded, "STEADY_B": steady_B, "STEADY_C": steady_C, "BLOCK": triton.next_power_of_2(width),
            "num_warps": 1,
        }  # fmt: skip
        return (layout.d,), (layout.d, layout.n, over), options

    start_kernel(
        layout.launches,
        pack_and_step.reduce_chunks,
        (totals, grads.A, grads.D, grads.delta_bias, dB, dC),
        describe_fold,
    )
    for grad, folded in ((grads.B, dB), (grads.C, dC)):
        if folded is not None:
            grad.copy_(folded)


def _saved_shape(inputs: Inputs, sequences: int, every: int) -> tuple[int, ...]:
    u, n = inputs.u, inputs.A.shape[1]
    rows = rows_saved(u, inputs.cu_seqlens is not None, sequences, every)
    return (rows * padded_states(n) * u.shape[1] + (0 if inputs.z is None else words_of(u)),)


_scan = define("scan_triton", _forward_pass, _backward_pass, _saved_shape)


def selective_scan(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, save_every=SLAB
):  # fmt: skip
    """As `reference.selective_scan`, in float32 with real A."""
    _check_real("selective_scan", A)
    delta, z = (t.float() if t is not None and t.dtype == torch.float64 else t for t in (delta, z))
    return _scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, save_every
    )  # fmt: skip


def _check_real(function: str, A: Tensor) -> None:
    if A.dtype != torch.float32:  # float64 if u is
        fail(
            function, "A", "be real, and u not float64, for backend 'triton'", A.dtype,
            "Take backend='vectorised'.", TypeError,
        )  # fmt: skip


def selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    """As `reference.selective_state_update`, in float32 with real A. Not differentiable."""
    _check_real("selective_state_update", A)
    given = state, x, dt, A, B, C, D, z, dt_bias
    refuse_tangents("selective_state_update", given, "triton")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        return reference.selective_state_update(*given, dt_softplus)
    x, dt, A, B, C, D, z, dt_bias = (None if t is None else t.resolve_neg() for t in given[1:])
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    b, d = x.shape
    n = A.shape[1]
    own = state.resolve_neg().contiguous()
    tensors = own, x, dt, A.contiguous(), B, C, as_float32(D), z, as_float32(dt_bias), y

    def describe():
        channels = 16
        tiles = -(-d // channels)
        strides = (
            *x.stride(), *dt.stride(), *((0, 0) if z is None else z.stride()), *B.stride(), *C.stride()
        )  # fmt: skip
        options = {
            "SOFTPLUS": dt_softplus, "CHANNELS": channels, "N": triton.next_power_of_2(n), "num_warps": 1
        }  # fmt: skip
        return (b * tiles,), (*strides, d, n, d // B.shape[1], d // C.shape[1], tiles), options

    if y.numel():
        with torch.cuda.device_of(x):
            start_kernel(
                recall(dict, tensors, dt_softplus, x.device), pack_and_step.update_state, tensors, describe
            )
    if own is not state:
        state.copy_(own)
    return y
