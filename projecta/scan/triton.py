"""The scan on a GPU, in Triton: no compiler to install, the same source from a T4 to an H200.

Where b d fills the machine, time is a loop and a warp's lanes are states and channels. Where it does not,
there are two ways. Without gradients lanes lie along time: each scans 16 steps, a scan over the lanes joins
them, and the loop runs over the states; every exponential is computed once. With gradients time is cut into
chunks: a first pass works out the state that each chunk leaves from zero, the second starts from true ones.

Backward goes back in slabs of 8 steps, each from the state that forward saved, chunk by chunk in the same
way, and sums dB and dC over a program's channels, then over programs, in fixed order. `plan` is the table.

B and C reach most kernels in float32, laid out as they read them. Nothing waits for the device.
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
    """How a call is cut into programs."""

    times: bool  # lanes lie along time, not along states
    parts: int  # otherwise: chunks of time,
    chunk: int  # of so many slabs


def plan(
    b: int, d: int, l: int, n: int, groups: int, packed: bool, saves: bool, wide: bool, processors: int
) -> Plan:
    """The table: how many chunks of time fill the GPU's processors once, and whether lanes along time do better.

    `saves`: a backward pass will follow. `wide`: u is float32. Measured on an H100 (132 processors).
    """
    slabs = -(-l // SLAB)
    whole = Plan(False, 1, slabs)
    programs = b * groups * -(-(d // groups) * _lanes(n) // (32 * WARPS))
    fill = ROOM * processors // programs
    if packed or fill < 2:
        return whole
    parts = min(fill, PARTS, slabs // SHORTEST)
    if not saves and n <= 32:
        many = b * d >= FEW * processors or parts < 2
        if many and (not wide or slabs < LONG * fill):
            return Plan(True, 1, slabs)
        if wide and fill == 2:  # the way through half of the sequence twice costs what the second chunk gains
            return whole
    if parts < 2:
        return whole
    chunk = -(-slabs // (parts * 4)) * 4
    return Plan(False, -(-slabs // chunk), chunk)


ROOM = 3  # programs that a processor holds at a time
PARTS, SHORTEST = 64, 8  # chunks at most; slabs of a chunk at least
LONG = 40  # slabs of a chunk from which on chunks are better than lanes along time, if u is float32
FEW = 4  # channels per processor from which on lanes along time fill it
REGISTERS, MANY = 168, 128  # of a thread: 12 warps per processor, or 16
WARPS = 4  # of a program that reads B and C by way of shared memory


_compiled: dict[tuple, tuple] = {}


def _start(kernel, grid: tuple[int, ...], tensors: tuple[Tensor | None, ...], sizes: tuple, **options):
    """Launch a kernel, whose arguments are tensors, then numbers, then constants.

    Triton looks at every argument of every launch for what a kernel should be compiled for, which takes as
    long as a small scan. Ours depend on less: the constants, and the tensors' types and alignment.
    """
    if max(sizes) >= 2**31:  # passed in 64 bits, each for itself
        kernel[grid](*tensors, *sizes, **options)
        return
    key = (
        kernel.__name__, *options.values(),
        *(None if t is None else (t.dtype, t.device.index, t.data_ptr() % 16 == 0) for t in tensors),
    )  # fmt: skip
    found = _compiled.get(key)
    if found is None:
        built = kernel[grid](*tensors, *sizes, **options)
        if built is not None:  # the interpreter builds nothing
            constants = kernel.arg_names[len(tensors) + len(sizes) :]
            _compiled[key] = built, tuple(options[name] for name in constants)
        return
    built, values = found
    built[(*grid, 1, 1)[:3]](*tensors, *sizes, *values)


class _Layout:
    """Shapes and strides of one call, and what all its kernels take."""

    def __init__(self, inputs: Inputs, delta_softplus: bool, saves: bool):
        self.inputs = inputs
        u, _, A, B, C = inputs[:5]
        self.b, self.d, self.l = u.shape
        self.n = A.shape[1]
        self.g = B.shape[1] if B.dim() == 4 else C.shape[1] if C.dim() == 4 else 1
        self.bounds = None if inputs.cu_seqlens is None else inputs.cu_seqlens.contiguous()
        self.sequences = self.b if self.bounds is None else self.bounds.shape[0] - 1
        self.slabs = -(-self.l // SLAB)
        self.processors = _processors(u.device)
        self.plan = plan(
            self.sequences, self.d, self.l, self.n, self.g, self.bounds is not None, saves,
            u.element_size() == 4, self.processors,
        )  # fmt: skip
        self.padded = _padded(self.n)
        self.warps = WARPS if self.n <= 64 else 1  # of a program: their sums go through shared memory
        self.D, self.z, self.bias = _wide(inputs.D), inputs.z, _wide(inputs.delta_bias)
        self.flags = {
            "SOFTPLUS": delta_softplus, "STEADY_B": B.dim() == 2, "STEADY_C": C.dim() == 2
        }  # fmt: skip

    def launch(
        self, lanes: int, block: int, warps: int, parts: int, *tensors: Tensor | None, times: bool = False
    ):
        """Grid, sizes and options of a kernel that takes so many chunks of time in blocks of so many slabs."""
        per_group, width = self.d // self.g, 32 * warps // lanes
        tiles = -(-per_group // width)
        count = self.sequences * parts * self.g * tiles
        processors = min(self.processors, count)
        sizes = (
            self.d, self.l, self.n, per_group, tiles, self.slabs, self.plan.chunk, self.g, count, parts,
            processors,
        )  # fmt: skip
        few = count * warps <= 12 * self.processors
        steps = SLAB * block // lanes
        wide = self.wide(*tensors) and all(steps * t.element_size() >= 4 for t in tensors if t is not None)
        whole = self.bounds is None and self.l % (SLAB * block) == 0 and per_group % width == 0
        options = self.flags | {
            "LANES": lanes, "CHANNELS": 32 // lanes, "N": self.padded, "WIDE": wide, "WHOLE": whole,
            "num_warps": warps, "maxnreg": MANY if times and not few and self.inputs.u.element_size() < 4 else REGISTERS,
        }  # fmt: skip
        if not times:
            options["WARPS"] = warps
        if times:
            native = self.native()
            for name in ("LANES", "CHANNELS", "N"):
                del options[name]
            options |= {"NATIVE": native, "PIN": not native or not few or self.l > 2048}
        return (-(-count // processors) * processors,), sizes, options

    def wide(self, *tensors: Tensor | None) -> bool:
        """Whether all of them can be read 16 bytes at a time."""
        if self.l % 8 or self.bounds is not None:
            return False
        for t in tensors:
            if t is not None:
                *outer, along = t.stride()
                if along != 1 or t.data_ptr() % 16 or any(s % 8 for s in outer):
                    return False
        return True

    def unroll(self) -> int:
        """Slabs in a block: 16 bytes of an array for each lane, if the states leave room for the code."""
        return 1 if self.n > 32 else 8 // self.inputs.u.element_size()

    def native(self) -> bool:
        """Whether `forward_times` reads B and C best where they lie: in 16 bits, in whole words."""
        return all(t.dim() == 2 or (t.element_size() == 2 and self.wide(t)) for t in self.inputs[3:5])

    def where_they_lie(self) -> tuple[Tensor, Tensor]:
        """B and C; constant ones in float32."""
        B, C = self.inputs.B, self.inputs.C
        return (
            B.float().contiguous() if B.dim() == 2 else B,
            C.float().contiguous() if C.dim() == 2 else C,
        )

    def arranged(self, lanes: int = 0) -> tuple[Tensor, Tensor]:
        """B and C as `arrange` lays them; constant ones in float32."""
        B, C = self.inputs.B, self.inputs.C
        if lanes:
            slabs, rows, steps = -(-self.l // (16 * lanes)), self.n, 16 * lanes
        else:
            slabs, rows, steps = self.slabs, self.padded, SLAB
        size = self.b * self.g * slabs * rows * steps
        varying = [t.dim() == 4 for t in (B, C)]
        room = self.room(size * sum(varying))
        offset = size if lanes else rows * steps  # of C
        outs = [
            room[i * offset :] if varies else t.float().contiguous()
            for i, t, varies in zip((0, varying[0]), (B, C), varying, strict=True)
        ]
        if any(varying):
            none, block = (0, 0, 0, 1), 128
            of_B, of_C = (t.stride() if varies else none for t, varies in zip((B, C), varying, strict=True))
            blocks = -(-slabs * steps // block)
            _start(
                _kernels.arrange, (blocks * self.b * self.g, -(-rows // 16)),
                (B if varying[0] else None, C if varying[1] else None, *outs),
                (*of_B, *of_C, self.l, self.n, self.g, slabs, blocks),
                N=self.padded, LANES=lanes, BLOCK=block, UNIT=of_B[3] == of_C[3] == 1,
            )  # fmt: skip
        return outs[0], outs[1]

    def carried(self, parts: int) -> tuple[Tensor | None, Tensor | None]:
        """Room for what each chunk hands on: a state, and its sum of delta."""
        if parts == 1:
            return None, None
        return tuple(self.room(self.b * (parts - 1) * self.d * rows) for rows in (self.padded, 1))

    def room(self, size: int) -> Tensor:
        return self.inputs.u.new_empty(size, dtype=torch.float32)

    def kept(self, saved: Tensor) -> tuple[Tensor | None, Tensor | None, int]:
        """The parts of `saved`: states (row, n, channel), and the output before the gate; slabs in a row."""
        if not saved.numel():
            return None, None, 1
        u, ungated, states = self.inputs.u, None, saved
        if self.z is not None:
            size = saved.numel() - _words(u)
            states, ungated = saved[:size], saved[size:].view(u.dtype)[: u.numel()]
        rows = states.numel() // (self.padded * self.d)
        for every in (SLAB, 2 * SLAB, 4 * SLAB):  # where two choices save as many rows, they lie alike
            if rows == _rows_saved(u, self.bounds is not None, self.sequences, every):
                return states, ungated, every // SLAB
        raise AssertionError(rows)


def _lanes(n: int) -> int:
    """Lanes that share a channel's states."""
    return 4 if n <= 32 else 8


def _padded(n: int) -> int:
    return -(-n // _lanes(n)) * _lanes(n)


def _words(u: Tensor) -> int:
    """Room for u, counted in float32, aligned for loads of 16 bytes."""
    return -(-u.numel() * u.element_size() // 16) * 4


def _wide(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.float32).contiguous()


@functools.cache
def _processors(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def _strides(t: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if t is None else t.stride()


def _rows(t: Tensor) -> tuple[int, ...]:
    """Strides of B or C (b, g, n, l) over all but time."""
    return t.stride()[:3] if t.dim() == 4 else (0, 0, 0)


def _forward_pass(inputs: Inputs, delta_softplus: bool, y: Tensor, last_state: Tensor, saved: Tensor) -> None:
    if not y.numel():
        last_state.copy_(inputs.initial_state) if inputs.initial_state is not None else last_state.zero_()
        return
    with torch.cuda.device_of(y):
        _launch_forward(_Layout(inputs, delta_softplus, saved.numel() > 0), y, last_state, saved)


def _launch_forward(layout: _Layout, y: Tensor, last_state: Tensor, saved: Tensor) -> None:
    inputs = layout.inputs
    u, delta, A = inputs[:3]
    z, start = layout.z, inputs.initial_state
    head = (*u.stride(), *delta.stride(), *_strides(z), *y.stride())
    if layout.plan.times:
        grid, sizes, options = layout.launch(32, 64, 1, 1, u, delta, z, y, times=True)
        B, C = layout.where_they_lie() if options["NATIVE"] else layout.arranged(32)
        _start(
            _kernels.forward_times, grid, (u, delta, A, B, C, layout.D, z, layout.bias, start, y, last_state),
            (*head, *_rows(B), *_rows(C), *sizes), **options,
        )  # fmt: skip
        return
    B, C = layout.arranged()
    states, ungated, every = layout.kept(saved)
    if states is not None and layout.bounds is not None:
        states.zero_()  # a row that no sequence needs is the same at every call
    lanes, parts = _lanes(layout.n), layout.plan.parts
    carried, spans = layout.carried(parts)
    unroll = layout.unroll()
    for ends in (True, False) if parts > 1 else (False,):
        grid, sizes, options = layout.launch(lanes, unroll, layout.warps, parts - ends, u, delta, z, y)
        _start(
            _kernels.forward_states, grid,
            (u, delta, A, B, C, layout.D, None if ends else z, layout.bias, start, layout.bounds, carried,
             spans, None if ends else y, last_state, None if ends else states, None if ends else ungated),
            (*head, *sizes), UNROLL=unroll, EVERY=every, **options,
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
        _launch_backward(_Layout(inputs, delta_softplus, True), grad_y, grad_last, saved, grads)


def _launch_backward(
    layout: _Layout, grad_y: Tensor, grad_last: Tensor, saved: Tensor, grads: Inputs
) -> None:
    inputs = layout.inputs
    u, delta, A, B, C = inputs[:5]
    z, lanes, parts = layout.z, _lanes(layout.n), layout.plan.parts
    states, ungated, every = layout.kept(saved)
    arranged_B, arranged_C = layout.arranged()
    carried, spans = layout.carried(parts)
    if parts > 1:
        unroll = layout.unroll()
        grid, sizes, options = layout.launch(lanes, unroll, layout.warps, parts - 1, delta, z, grad_y)
        _start(
            _kernels.carry, grid, (delta, A, arranged_C, z, layout.bias, grad_y, carried, spans),
            (*delta.stride(), *_strides(z), *grad_y.stride(), *sizes), UNROLL=unroll, **options,
        )  # fmt: skip
    steady_B, steady_C = B.dim() == 2, C.dim() == 2
    over, width = layout.sequences * parts, 2 + layout.padded * (1 + steady_B + steady_C)
    totals = layout.room(over * layout.d * width)
    grid, sizes, options = layout.launch(
        lanes, 1, layout.warps, parts, u, delta, z, grad_y, grads.u, grads.delta, grads.z
    )
    tiles = sizes[4]
    each_row = 0 if steady_B and steady_C else layout.b * layout.g * layout.slabs * layout.padded * 2 * SLAB
    sums = layout.room(tiles * each_row)
    _start(
        _kernels.backward, grid,
        (u, delta, A, arranged_B, arranged_C, layout.D, z, layout.bias, layout.bounds, grad_y,
         grad_last.contiguous(), states, ungated, carried, spans, grads.u, grads.delta, grads.z, sums, totals,
         grads.initial_state),
        (*u.stride(), *delta.stride(), *_strides(z), *grad_y.stride(),
         *grads.u.stride(), *grads.delta.stride(), *_strides(grads.z), *sizes),
        EVERY=every, **options,
    )  # fmt: skip
    if each_row:
        block, none = 128, (0, 0, 0, 0)
        blocks = -(-layout.slabs * layout.padded * 2 * SLAB // block)
        _start(
            _kernels.finish, (blocks * layout.b * layout.g,),
            (sums, None if steady_B else grads.B, None if steady_C else grads.C),
            (*(none if steady_B else grads.B.stride()), *(none if steady_C else grads.C.stride()),
             layout.l, layout.n, layout.g, tiles, layout.slabs, blocks),
            N=layout.padded, BLOCK=block, num_warps=1,
        )  # fmt: skip
    dB, dC = (
        torch.empty_like(t, memory_format=torch.contiguous_format) if t.dim() == 2 else None
        for t in (grads.B, grads.C)
    )
    _start(
        _kernels.fold, (layout.d,), (totals, grads.A, grads.D, grads.delta_bias, dB, dC),
        (layout.d, layout.n, over), N=layout.padded, STEADY_B=steady_B, STEADY_C=steady_C,
        BLOCK=triton.next_power_of_2(width), num_warps=1,
    )  # fmt: skip
    for grad, folded in ((grads.B, dB), (grads.C, dC)):
        if folded is not None:
            grad.copy_(folded)


def _rows_saved(u: Tensor, packed: bool, sequences: int, every: int) -> int:
    """How many states of a channel are saved, if every so many steps; a packed sequence begins a row."""
    return u.shape[2] // every + sequences if packed else u.shape[0] * -(-u.shape[2] // every)


def _saved_shape(inputs: Inputs, sequences: int, every: int) -> tuple[int, ...]:
    u, n = inputs.u, inputs.A.shape[1]
    rows = _rows_saved(u, inputs.cu_seqlens is not None, sequences, every)
    return (rows * _padded(n) * u.shape[1] + (0 if inputs.z is None else _words(u)),)


_scan = define("scan_triton", _forward_pass, _backward_pass, _saved_shape)


def selective_scan(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, save_every=SLAB
):  # fmt: skip
    """As `reference.selective_scan`, in float32 with real A."""
    _check_real("selective_scan", A)
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
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (state, x, dt, A, B, C, D, z, dt_bias)
    ):
        return reference.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    b, d = x.shape
    n = A.shape[1]
    channels, own = 16, state.contiguous()
    tiles = -(-d // channels)
    if y.numel():
        with torch.cuda.device_of(x):
            _start(
                _kernels.step, (b * tiles,),
                (own, x, dt, A.contiguous(), B, C, _wide(D), z, _wide(dt_bias), y),
                (*x.stride(), *dt.stride(), *((0, 0) if z is None else z.stride()), *B.stride(), *C.stride(),
                 d, n, d // B.shape[1], d // C.shape[1], tiles),
                SOFTPLUS=dt_softplus, CHANNELS=channels, N=triton.next_power_of_2(n), num_warps=1,
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
