"""Launches the Triton kernels: forward and backward passes of a call, one step, and prepared calls."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from projecta._calls import traits
from projecta._checks import fail
from projecta._operators import refuse_tangents, register
from projecta._triton.launch import (
    Recording,
    cached,
    narrow,
    new_buffer,
    processors_of,
    repeated,
    start_kernel,
)
from projecta.scan import reference
from projecta.scan._operator import Inputs, define
from projecta.scan.triton import backward, forward, pack_and_step
from projecta.scan.triton.layout import Layout, words_of
from projecta.scan.triton.plan import padded_states, rows_saved
from projecta.scan.triton.steps import SLAB


class Link(NamedTuple):
    """How a pass over a piece of a sequence gets a state from the piece before, and hands its own on.

    receive: writes the state before the piece, to where the pass reads it. send: takes the state after it.
    Going back they are the gradients of the state after the piece and of the one before. The state to send is
    known before the outputs are, unless the pass runs as one chunk of time.
    """

    receive: Callable[[], None]
    send: Callable[[Tensor], None]


def forward_pass(
    inputs: Inputs, delta_softplus: bool, y: Tensor, last_state: Tensor, saved: Tensor,
    with_output: bool = True, log_A: bool = False, reverse: bool = False, link: Link | None = None,
) -> None:  # fmt: skip
    """Write y, the last state and, unless it is empty, `saved`: states, and y before the gate if wanted.

    With `log_A`, A is log(-A). A, D and the bias may have any real type. `reverse`: from the last step on.
    link: the initial state arrives during the pass.
    """
    if not y.numel():
        last_state.copy_(inputs.initial_state) if inputs.initial_state is not None else last_state.zero_()
        return
    with torch.cuda.device_of(y):
        layout = cached(
            lambda: Layout(inputs, delta_softplus, saved, with_output, log_A, reverse),
            (*inputs, y), delta_softplus, saved.numel(), with_output, log_A, reverse, y.device,
        )  # fmt: skip
        if link is None or layout.plan.parts > 1:
            _launch_forward(layout, inputs, y, last_state, saved, link)
        else:
            link.receive()
            _launch_forward(layout, inputs, y, last_state, saved, None)
            link.send(last_state)


def _launch_forward(
    layout: Layout, inputs: Inputs, y: Tensor, last_state: Tensor, saved: Tensor, link: Link | None
) -> None:
    u, delta, A, B, C, D, z, bias, start, bounds = inputs
    D, bias = narrow(D), narrow(bias)

    def with_strides(described, **options):
        grid, sizes, found = described
        return grid, layout.strides(u=u, s=delta, z=z, y=y) | sizes, found | options

    if layout.plan.times:
        if layout.native:
            B, C = (t if t.dim() == 4 else t.float().contiguous() for t in (B, C))
        else:
            B, C = layout.arranged(B, C, 32)
        tensors = {
            "u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "bias": bias, "start": start,
            "y": y, "last": last_state,
        }  # fmt: skip

        def describe_times():
            grid, sizes, options = layout.along_time()
            sizes |= layout.weight_strides("bgn", B=B, C=C)
            return with_strides((grid, sizes, options), WIDE=layout.wide(layout.unroll, u, delta, z, y))

        start_kernel(layout.launches, forward.forward_times, tensors, describe_times)
        return
    B, C = layout.arranged(B, C)
    states, ungated = layout.kept(saved, u)
    parts, links = layout.plan.parts, layout.links(link)
    carried, spans = layout.carried(u, links)
    if bounds is not None:
        bounds = bounds.contiguous()
        if states is not None:
            states.zero_()  # rows that no sequence uses are the same at every call
    for ends in (True, False) if parts > 1 else (False,):

        def describe(ends=ends):
            described = layout.over_states(layout.unroll, links if ends else parts, links)
            wide = layout.wide(layout.unroll, u, delta, z, y)
            return with_strides(described, WIDE=wide, UNROLL=layout.unroll, EVERY=layout.every)

        written = (None, None, None, None) if ends else (z, y, states, ungated)
        tensors = {
            "u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": written[0], "bias": bias,
            "start": start, "bounds": bounds, "carried": carried, "spans": spans, "y": written[1],
            "last": last_state, "saved": written[2], "ungated": written[3],
        }  # fmt: skip
        start_kernel(layout.launches, forward.forward_states, tensors, describe, (ends, links))
        if ends and link is not None:
            link.receive()
            after = torch.empty_like(last_state)  # which the kernel below writes while this one is sent
            link.send(_fold(layout, carried, spans, A, start, after))


def _fold(
    layout: Layout, carried: Tensor | None, spans: Tensor | None, A: Tensor, start: Tensor | None, to: Tensor,
    back: bool = False,
) -> Tensor:  # fmt: skip
    """`to`, the state after all chunks of each sequence; or `back`, the gradient before them."""

    def describe():
        sizes = {"d": layout.d, "n": layout.n, "parts": layout.plan.parts}
        options = {
            "BACK": back, "LOG_A": layout.flags["LOG_A"], "N": layout.padded,
            "STATES": triton.next_power_of_2(layout.n), "BLOCK": 16, "num_warps": 1,
        }  # fmt: skip
        return (-(-layout.d // 16), layout.sequences), sizes, options

    tensors = {"carried": carried, "spans": spans, "A": A, "start": start, "to": to}
    start_kernel(layout.launches, pack_and_step.fold_chunks, tensors, describe)
    return to


def backward_pass(
    grad_y: Tensor, grad_last: Tensor | None, saved: Tensor, inputs: Inputs, delta_softplus: bool,
    grads: Inputs, gated: Tensor | None = None, log_A: bool = False, reverse: bool = False,
    link: Link | None = None,
) -> None:  # fmt: skip
    """Write the gradients; with `gated` (the output's shape) also y again, which `saved` then does not hold.

    The gradients of u, delta and z may take the place of grad_y, delta and z. link: `grad_last` arrives
    during the pass.
    """
    u = inputs.u
    if not u.numel():
        for grad in grads:
            if grad is not None:
                grad.zero_()
        if grads.initial_state is not None and grad_last is not None:
            grads.initial_state.copy_(grad_last)
        return
    with torch.cuda.device_of(u):
        layout = cached(
            lambda: Layout(inputs, delta_softplus, saved, gated is None, log_A, reverse),
            (*inputs, grad_y, grad_last, saved, gated, *grads), delta_softplus, log_A, reverse, u.device,
        )  # fmt: skip
        grad_last = None if grad_last is None else grad_last.contiguous()
        if link is None or layout.plan.parts > 1:
            _launch_backward(layout, inputs, grad_y, grad_last, saved, grads, gated, link)
        else:
            link.receive()
            _launch_backward(layout, inputs, grad_y, grad_last, saved, grads, gated, None)
            if grads.initial_state is not None:
                link.send(grads.initial_state)


def _launch_backward(
    layout: Layout, inputs: Inputs, grad_y: Tensor, grad_last: Tensor | None, saved: Tensor, grads: Inputs,
    gated: Tensor | None, link: Link | None,
) -> None:  # fmt: skip
    u, delta, A, B, C, D, z, bias, _, bounds = inputs
    D, bias = narrow(D), narrow(bias)
    parts, padded, slabs = layout.plan.parts, layout.padded, layout.slabs
    states, ungated = layout.kept(saved, u)
    arranged_B, arranged_C = layout.arranged(B, C)
    links = layout.links(link)
    carried, spans = layout.carried(u, links)

    def describe_carry():
        grid, sizes, options = layout.over_states(layout.unroll, links, links)
        sizes["parts"] = parts
        options |= {"WIDE": layout.wide(layout.unroll, delta, z, grad_y), "UNROLL": layout.unroll}
        return grid, layout.strides(s=delta, z=z, g=grad_y) | sizes, options

    if parts > 1:
        tensors = {
            "delta": delta, "A": A, "C": arranged_C, "z": z, "bias": bias, "grad_y": grad_y,
            "carried": carried, "spans": spans,
        }  # fmt: skip
        start_kernel(layout.launches, backward.carry, tensors, describe_carry, ("carry", links))
    grad_start = grads.initial_state
    if link is not None:
        link.receive()
        if grad_start is not None:
            link.send(_fold(layout, carried, spans, A, grad_last, grad_start, back=True))
            grad_start = None
    steady_B, steady_C = B.dim() == 2, C.dim() == 2
    over, width = layout.sequences * parts, 2 + padded * (1 + steady_B + steady_C)
    totals = new_buffer(u, over * layout.d * width)
    tiles = layout.tiles(layout.width)
    each_row = 0 if steady_B and steady_C else layout.b * layout.g * slabs * padded * 2 * SLAB
    sums = new_buffer(u, tiles * each_row)

    def describe():
        grid, sizes, options = layout.over_states(1, parts, links)
        wide = layout.wide(1, u, delta, z, grad_y, grads.u, grads.delta, grads.z, gated)
        strides = layout.strides(
            u=u, s=delta, z=z, g=grad_y, du=grads.u, ds=grads.delta, dz=grads.z, y=gated
        )  # fmt: skip
        return grid, strides | sizes, options | {"WIDE": wide, "EVERY": layout.every}

    bounds = None if bounds is None else bounds.contiguous()
    tensors = {
        "u": u, "delta": delta, "A": A, "B": arranged_B, "C": arranged_C, "D": D, "z": z, "bias": bias,
        "bounds": bounds, "grad_y": grad_y, "grad_last": grad_last, "saved": states, "ungated": ungated,
        "carried": carried, "spans": spans, "du": grads.u, "ddelta": grads.delta,
        "dz": grads.z, "gated": gated, "sums": sums, "totals": totals, "grad_start": grad_start,
    }  # fmt: skip
    start_kernel(layout.launches, backward.backward, tensors, describe, ("back", links))
    _reduce_sums(layout, A, sums, totals, grads)


def _reduce_sums(layout: Layout, A: Tensor, sums: Tensor, totals: Tensor, grads: Inputs) -> None:
    """Sum what the programs wrote, in fixed order, into the gradients of A, B, C, D and the bias."""
    padded, slabs, tiles = layout.padded, layout.slabs, layout.tiles(layout.width)
    steady_B, steady_C = layout.flags["STEADY_B"], layout.flags["STEADY_C"]
    over, width = layout.sequences * layout.plan.parts, 2 + padded * (1 + steady_B + steady_C)

    def describe_reduce_tiles():
        block = 128
        sizes = {"l": layout.l, "n": layout.n, "groups": layout.g, "tiles": tiles, "slabs": slabs}
        sizes["blocks"] = -(-slabs * padded * 2 * SLAB // block)
        grid = (sizes["blocks"] * layout.b * layout.g,)
        options = {"N": padded, "BLOCK": block, "num_warps": 1}
        return grid, layout.weight_strides(B=grads.B, C=grads.C) | sizes, options

    if sums.numel():
        tensors = {
            "sums": sums, "dB": None if steady_B else grads.B, "dC": None if steady_C else grads.C
        }  # fmt: skip
        start_kernel(layout.launches, pack_and_step.reduce_tiles, tensors, describe_reduce_tiles)
    dB, dC = (
        None if t.dim() == 4
        else t if t.is_contiguous()
        else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (grads.B, grads.C)
    )  # fmt: skip

    def describe_reduce_chunks():
        options = {
            "N": padded, "LOG_A": layout.flags["LOG_A"], "STEADY_B": steady_B,
            "STEADY_C": steady_C, "BLOCK": triton.next_power_of_2(width), "num_warps": 1,
        }  # fmt: skip
        return (layout.d,), {"d": layout.d, "n": layout.n, "over": over}, options

    tensors = {
        "totals": totals, "A": A, "dA": grads.A, "dD": grads.D, "dbias": grads.delta_bias, "dB": dB, "dC": dC
    }  # fmt: skip
    start_kernel(layout.launches, pack_and_step.reduce_chunks, tensors, describe_reduce_chunks)
    for grad, folded in ((grads.B, dB), (grads.C, dC)):
        if folded is not None and folded is not grad:
            grad.copy_(folded)


def saved_states(inputs: Inputs, sequences: int, every: int) -> int:
    """Numbers that the states of a call take, saved every so many steps."""
    u, n = inputs.u, inputs.A.shape[1]
    return rows_saved(u, inputs.cu_seqlens is not None, sequences, every) * padded_states(n) * u.shape[1]


def saved_shape(inputs: Inputs, sequences: int, every: int) -> tuple[int, ...]:
    output = 0 if inputs.z is None else words_of(inputs.u)
    return (saved_states(inputs, sequences, every) + output,)


def repeats(inputs: Inputs) -> bool:
    """Whether `Passes` takes calls like this one."""
    steps = inputs.delta, inputs.z
    wide = any(t is not None and t.dtype == torch.float64 for t in steps)
    return bool(inputs.u.numel()) and inputs.A.dtype == torch.float32 and not wide


class Passes:
    """The passes of all calls that differ in values only: the launches of the first, repeated."""

    def __init__(self, inputs: Inputs, delta_softplus: bool, reverse: bool):
        self.softplus, self.reverse = delta_softplus, reverse
        self.records: dict[Any, Recording] = {}

    def forward(self, inputs: Inputs, y: Tensor, last_state: Tensor, saved: Tensor) -> None:
        repeated(
            self.records, "forward", inputs[:9], (y, last_state, saved),
            lambda: forward_pass(inputs, self.softplus, y, last_state, saved, reverse=self.reverse),
        )  # fmt: skip

    def backward(
        self, grad_y: Tensor, grad_last: Tensor | None, saved: Tensor, inputs: Inputs, grads: Inputs
    ) -> None:
        grad_last = None if grad_last is None else grad_last.contiguous()
        repeated(
            self.records, (traits(grad_y), grad_last is None), (*inputs[:9], grad_y, grad_last),
            (saved, *grads[:9]),
            lambda: backward_pass(
                grad_y, grad_last, saved, inputs, self.softplus, grads, reverse=self.reverse
            ),
        )  # fmt: skip


_scan = define("scan_triton", forward_pass, backward_pass, saved_shape)
_scan_reversed = define(
    "scan_triton_reversed", partial(forward_pass, reverse=True), partial(backward_pass, reverse=True),
    saved_shape,
)  # fmt: skip


def _in_float32(scan: Callable) -> Callable:
    """As `reference.selective_scan`, in float32 with real A."""

    def run(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, save_every=SLAB
    ):  # fmt: skip
        _check_real("selective_scan", A)
        delta, z = (t.float() if t is not None and t.dtype == torch.float64 else t for t in (delta, z))
        return scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, save_every
        )  # fmt: skip

    return run


selective_scan, scan_reversed = _in_float32(_scan), _in_float32(_scan_reversed)


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
    own = state.resolve_neg().contiguous()
    call = _update_op if torch.compiler.is_compiling() else update_state
    y = call(own, x, dt, A.contiguous(), B, C, narrow(D), z, narrow(dt_bias), dt_softplus)
    if own is not state:
        state.copy_(own)
    return y


def update_state(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, bias: Tensor | None, softplus: bool, log_A: bool = False,
    dt_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y (b, d) of one step; state, A, D and bias are contiguous. With `log_A`, A is log(-A).

    With `dt_weight` (d, r), contiguous, dt is (b, r), and delta = dt_weight dt.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    b, d = x.shape
    n = A.shape[1]
    tensors = {
        "state": state, "x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "bias": bias,
        "dt_weight": dt_weight, "y": y,
    }  # fmt: skip
    rank = 0 if dt_weight is None else dt_weight.shape[1]

    def describe():
        # one warp has 16 channels; a processor holds 32 programs, so many channels take programs of 4 warps
        warps = 4 if b * d >= 16 * 32 * processors_of(x.device) else 1
        channels = 16 * warps
        tiles = -(-d // channels)
        strides = {"zb": 0, "zd": 0}
        for name, t, axes in (
            ("x", x, "bd"), ("s", dt, "bd"), ("z", z, "bd"), ("B", B, "bgn"), ("C", C, "bgn"),
        ):  # fmt: skip
            if t is not None:
                strides |= {name + axis: t.stride(i) for i, axis in enumerate(axes)}
        sizes = {"d": d, "n": n, "per_B": d // B.shape[1], "per_C": d // C.shape[1], "tiles": tiles}
        options = {
            "SOFTPLUS": softplus, "LOG_A": log_A, "CHANNELS": channels, "N": triton.next_power_of_2(n),
            "GROUPED": B.shape[1] > 1 or C.shape[1] > 1, "WHOLE": n == triton.next_power_of_2(n),
            "RANK": rank, "num_warps": warps,
        }  # fmt: skip
        return (b * tiles,), strides | sizes, options

    if y.numel():
        with torch.cuda.device_of(x):
            launches = cached(dict, tensors.values(), softplus, log_A, x.device)
            start_kernel(launches, pack_and_step.update_state, tensors, describe)
    return y


_update_op = register(
    "scan_update_triton", update_state,
    lambda state, x, *rest: torch.empty(x.shape, dtype=x.dtype, device=x.device), ["state"],
)  # fmt: skip
