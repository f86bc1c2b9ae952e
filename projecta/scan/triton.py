"""The scan on a GPU, in Triton: no compiler to install, the same source from a T4 to an H200.

Where b d fills the machine, time is a loop and a warp's lanes are states and channels. Where it does not,
lanes lie along time in forward: each scans 16 steps, a scan over the lanes joins them, and the loop runs over
the states; every exponential is computed once. Backward goes back in slabs of 8 steps, each from the state
that forward saved, and sums dB and dC over a warp's channels, then over warps, in fixed order; long sequences
of few channels are cut into chunks, whose gradients of the state a first pass works out. `plan` is the table.

B and C reach the kernels in float32, laid out as they read them. Nothing waits for the device.
"""

import functools
import os
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from projecta._checks import fail
from projecta.scan import _kernels, reference
from projecta.scan._kernels import SLAB
from projecta.scan._operator import Inputs, define


class Plan(NamedTuple):
    """Which kernels take a call, and how a warp's lanes are used."""

    times: bool  # forward: lanes lie along time, not along states
    lanes: int  # forward: lanes of states, or of time
    each: int  # forward: channels of a lane
    registers: int | None  # forward: at most
    back_lanes: int
    back_each: int
    back_registers: int | None
    parts: int  # backward: chunks of time


def plan(b: int, d: int, l: int, n: int, groups: int, packed: bool, processors: int) -> Plan:
    """The table of kernels, by the warps that a shape gives to each of the GPU's processors (H100: 132)."""
    lanes = _lanes(n)
    warps = b * groups * -(-(d // groups) * lanes // 32) / processors
    if packed:
        return Plan(False, lanes, 1, 168, lanes, 1, 168, 1)
    if warps >= MANY and n <= 32:
        return Plan(False, lanes, 2, 168, lanes, 2, None, 1)
    if warps >= FEW:
        return Plan(False, lanes, 1, 168, lanes, 1, 168, 1)
    parts = max(1, min(-(-FULL // max(warps, 1e-3)), 16, -(-l // SLAB) // 8))
    times = n <= 32
    return Plan(times, 32 if times else lanes, 1, 168, lanes, 1, None, int(parts))


FEW, MANY, FULL = 8, 24, 40  # warps per processor


class _Layout:
    """Shapes and strides of one call, and what all its kernels take."""

    def __init__(self, inputs: Inputs, delta_softplus: bool):
        self.inputs = inputs
        u, _, A, B, C = inputs[:5]
        self.b, self.d, self.l = u.shape
        self.n = A.shape[1]
        self.g = B.shape[1] if B.dim() == 4 else C.shape[1] if C.dim() == 4 else 1
        self.bounds = inputs.cu_seqlens
        self.sequences = self.b if self.bounds is None else self.bounds.shape[0] - 1
        self.slabs = -(-self.l // SLAB)
        self.plan = plan(
            self.sequences, self.d, self.l, self.n, self.g, self.bounds is not None, _processors(u.device)
        )
        self.padded = _padded(self.n)
        self.D, self.z, self.bias = _wide(inputs.D), inputs.z, _wide(inputs.delta_bias)
        self.flags = {
            "SOFTPLUS": delta_softplus, "STEADY_B": B.dim() == 2, "STEADY_C": C.dim() == 2
        }  # fmt: skip

    def tiles(self, lanes: int, each: int) -> int:
        """Tiles of channels in a group."""
        return -(-(self.d // self.g) * lanes // (32 * each))

    def align(self, *tensors: Tensor | None) -> int:
        """8 if every stride over rows, channels and states is a multiple of it, else 1."""
        strides = [s for t in tensors if t is not None for s in t.stride()[:-1]]
        return 8 if self.l % 8 == 0 and all(s % 8 == 0 for s in strides) else 1

    def packs(self, lanes: int, *tensors: Tensor | None) -> bool:
        """Whether a lane's two steps are one integer in all of them."""
        return lanes == 4 and self.l % 8 == 0 and all(
            t.element_size() == 2 and t.stride(-1) == 1 and all(s % 2 == 0 for s in t.stride()[:-1])
            and t.data_ptr() % 4 == 0 for t in tensors if t is not None
        )  # fmt: skip

    def arranged(self, lanes: int = 0) -> tuple[Tensor, Tensor]:
        """B and C as `arrange` lays them; constant ones in float32."""
        B, C = self.inputs.B, self.inputs.C
        if lanes:
            slabs, rows, steps = -(-self.l // (16 * lanes)), self.n, 16 * lanes
        else:
            slabs, rows, steps = self.slabs, self.padded, SLAB
        size = self.b * self.g * slabs * rows * steps
        outs = [
            t.float().contiguous() if t.dim() == 2 else t.new_empty(size, dtype=torch.float32) for t in (B, C)
        ]
        if B.dim() == 4 or C.dim() == 4:
            none, block = (0, 0, 0, 0), 128
            _kernels.arrange[(-(-slabs * steps // block), self.b * self.g, -(-rows // 16))](
                B if B.dim() == 4 else None, C if C.dim() == 4 else None, *outs,
                *(B.stride() if B.dim() == 4 else none), *(C.stride() if C.dim() == 4 else none),
                self.l, self.n, self.g, slabs, N=self.padded, LANES=lanes, BLOCK=block,
            )  # fmt: skip
        return outs[0], outs[1]

    @property
    def kept_strides(self) -> tuple[int, int, int]:
        """Of the saved states over slabs, states, channels: what the forward kernel writes lies together."""
        if self.plan.times:
            places = self.b * self.slabs if self.bounds is None else self.slabs + self.sequences
            return 1, places, self.padded * places
        return self.padded * self.d, self.d, 1

    def kept(self, saved: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The parts of `saved`: states, and the output before the gate."""
        if not saved.numel():
            return None, None
        u = self.inputs.u
        if self.z is None:
            return saved, None
        size = -(-u.numel() * u.element_size() // 4)
        return saved[: saved.numel() - size], saved[saved.numel() - size :].view(u.dtype)


def _lanes(n: int) -> int:
    """Lanes that share a channel's states."""
    return 4 if n <= 32 else 8


def _padded(n: int) -> int:
    return -(-n // _lanes(n)) * _lanes(n)


def _wide(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.float32).contiguous()


@functools.cache
def _processors(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def _strides(t: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if t is None else t.stride()


def _forward_pass(inputs: Inputs, delta_softplus: bool, y: Tensor, last_state: Tensor, saved: Tensor) -> None:
    layout = _Layout(inputs, delta_softplus)
    if not y.numel():
        last_state.copy_(inputs.initial_state) if inputs.initial_state is not None else last_state.zero_()
        return
    u, delta, A, B, C = inputs[:5]
    plan, z = layout.plan, layout.z
    states, ungated = layout.kept(saved)
    tiles = layout.tiles(plan.lanes, plan.each)
    grid = (layout.g * tiles, layout.sequences)
    head = (layout.D, z, layout.bias, inputs.initial_state, layout.bounds, y, last_state, states, ungated)
    strides = (*u.stride(), *delta.stride(), *_strides(z), *y.stride(), *layout.kept_strides)
    sizes = (layout.d, layout.l, layout.n, layout.d // layout.g, tiles, layout.slabs)
    options = {"LANES": plan.lanes, "CHANNELS": 32 // plan.lanes, "EACH": plan.each, "N": layout.padded}
    if plan.times:
        B, C = layout.arranged(plan.lanes)
        vector = 16 // max(t.element_size() for t in (u, delta, u if z is None else z))
        _kernels.forward_times[grid](
            u, delta, A, B, C, *head, *strides, *sizes, **layout.flags, **options,
            WHOLE=layout.l % (16 * plan.lanes) == 0, ALIGN=layout.align(u, delta, z, y), V=vector,
            num_warps=1, maxnreg=plan.registers,
        )  # fmt: skip
        return
    B, C = layout.arranged()
    _kernels.forward_states[grid](
        u, delta, A, B, C, *head, *strides, *sizes, **layout.flags, **options,
        WHOLE=layout.l % SLAB == 0, ALIGN=layout.align(u, delta, z, y),
        PACK=layout.packs(plan.lanes, u, delta, z, y), num_warps=1, maxnreg=plan.registers,
    )  # fmt: skip


def _backward_pass(
    grad_y: Tensor, grad_last: Tensor, saved: Tensor, inputs: Inputs, delta_softplus: bool, grads: Inputs
) -> None:
    layout, u = _Layout(inputs, delta_softplus), inputs.u
    if not u.numel():
        for grad in grads:
            if grad is not None:
                grad.zero_()
        if grads.initial_state is not None:
            grads.initial_state.copy_(grad_last)
        return
    delta, A, B, C = inputs[1:5]
    plan, z = layout.plan, layout.z
    states, ungated = layout.kept(saved)
    lanes, each, parts = plan.back_lanes, plan.back_each, plan.parts
    tiles, chunk = layout.tiles(lanes, each), -(-layout.slabs // plan.parts)
    arranged_B, arranged_C = layout.arranged()
    sizes = (layout.d, layout.l, layout.n, layout.d // layout.g, tiles, layout.slabs, chunk)
    grid = (layout.g * tiles, layout.sequences, parts)
    options = layout.flags | {
        "LANES": lanes, "CHANNELS": 32 // lanes, "EACH": each, "N": layout.padded,
        "WHOLE": layout.l % SLAB == 0, "num_warps": 1,
        "ALIGN": layout.align(u, delta, z, grad_y, grads.u, grads.delta, grads.z),
    }  # fmt: skip

    def room(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=torch.float32)

    steady_B, steady_C = B.dim() == 2, C.dim() == 2
    carried = spans = None
    if parts > 1:
        carried, spans = room(layout.b * parts * layout.padded * layout.d), room(layout.b * parts * layout.d)
        _kernels.carry[grid](
            delta, A, arranged_C, z, layout.bias, grad_y, carried, spans,
            *delta.stride(), *_strides(z), *grad_y.stride(), *sizes,
            **{name: value for name, value in options.items() if name != "STEADY_B"},
        )  # fmt: skip
    over, width = layout.sequences * parts, 2 + layout.padded * (1 + steady_B + steady_C)
    totals = room(over * layout.d * width)
    each_row = 0 if steady_B and steady_C else layout.b * layout.g * layout.slabs * layout.padded * 2 * SLAB
    sums = room(tiles * each_row)
    _kernels.backward[grid](
        u, delta, A, arranged_B, arranged_C, layout.D, z, layout.bias, layout.bounds, grad_y,
        grad_last.contiguous(), states, ungated, carried, spans, grads.u, grads.delta, grads.z, sums, totals,
        grads.initial_state, *u.stride(), *delta.stride(), *_strides(z), *grad_y.stride(),
        *grads.u.stride(), *grads.u.stride(), *grads.delta.stride(), *_strides(grads.z),
        *layout.kept_strides, *sizes,  # y lies as u's gradient
        PACK=layout.packs(lanes, u, delta, z, grad_y, ungated, grads.u), maxnreg=plan.back_registers,
        **options,
    )  # fmt: skip
    if each_row:
        block, none = 128, (0, 0, 0, 0)
        _kernels.finish[(-(-layout.slabs * layout.padded * 2 * SLAB // block), layout.b * layout.g)](
            sums, None if steady_B else grads.B, None if steady_C else grads.C,
            *(none if steady_B else grads.B.stride()), *(none if steady_C else grads.C.stride()),
            layout.l, layout.n, layout.g, tiles, layout.slabs, N=layout.padded, BLOCK=block, num_warps=1,
        )  # fmt: skip
    dB, dC = (
        torch.empty_like(t, memory_format=torch.contiguous_format) if t.dim() == 2 else None
        for t in (grads.B, grads.C)
    )
    _kernels.fold[(layout.d,)](
        totals, grads.A, grads.D, grads.delta_bias, dB, dC,
        layout.d, layout.n, over, N=layout.padded, STEADY_B=steady_B, STEADY_C=steady_C,
        BLOCK=triton.next_power_of_2(width), num_warps=1,
    )  # fmt: skip
    for grad, folded in ((grads.B, dB), (grads.C, dC)):
        if folded is not None:
            grad.copy_(folded)


def _saved_shape(inputs: Inputs, sequences: int) -> tuple[int, ...]:
    u, n = inputs.u, inputs.A.shape[1]
    b, d, l = u.shape
    slabs = b * -(-l // SLAB) if inputs.cu_seqlens is None else -(-l // SLAB) + sequences
    ungated = 0 if inputs.z is None else -(-u.numel() * u.element_size() // 4)
    return (slabs * _padded(n) * d + ungated,)


_scan = define("scan_triton", _forward_pass, _backward_pass, _saved_shape)


def selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens):
    """As `reference.selective_scan`, in float32 with real A."""
    _check_real("selective_scan", A)
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens)


def _check_real(function: str, A: Tensor) -> None:
    if A.dtype != torch.float32:  # float64 if u is
        fail(
            function, "A", "be real, and u not float64, for backend 'triton'", A.dtype,
            "Take backend='vectorised'.", TypeError,
        )  # fmt: skip


def selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    """As `reference.selective_state_update`, in float32 with real A. Not differentiable."""
    _check_real("selective_state_update", A)
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (state, x, dt, A, B, C, D, z, dt_bias)
    ):
        return reference.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    b, d = x.shape
    n = A.shape[1]
    channels, own = 16, state.contiguous()
    if y.numel():
        _kernels.step[(-(-d // channels), b)](
            own, x, dt, A.contiguous(), B, C, _wide(D), z, _wide(dt_bias), y,
            *x.stride(), *dt.stride(), *((0, 0) if z is None else z.stride()), *B.stride(), *C.stride(),
            d, n, d // B.shape[1], d // C.shape[1], SOFTPLUS=dt_softplus,
            CHANNELS=channels, N=triton.next_power_of_2(n), num_warps=1,
        )  # fmt: skip
    if own is not state:
        state.copy_(own)
    return y


def unavailable() -> str:
    """Why this backend cannot run; "" when it can."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if torch.version.hip:
        return "the kernels hold instructions of NVIDIA's"
    return "" if torch.cuda.is_available() else "there is no CUDA device"
