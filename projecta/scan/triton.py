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
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from projecta._checks import fail
from projecta.scan import _kernels, _repeat, reference
from projecta.scan._kernels import SLAB
from projecta.scan._operator import Inputs, define, refuse_tangents


class Plan(NamedTuple):
    """How a call is cut into programs."""

    times: bool  # lanes lie along time, not along states
    parts: int  # otherwise: chunks of time,
    chunk: int  # of so many slabs


def plan(
    b: int, d: int, l: int, n: int, groups: int, packed: bool, saves: bool, wide: bool, processors: int
) -> Plan:
    """The table: how many chunks of time fill the GPU's processors once; whether lanes along time do better.

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


# What kernels take with its strides; everything else that they get the address of is contiguous.
_STRIDED = {"u", "delta", "z", "y", "x", "dt", "B", "C", "grad_y", "du", "ddelta", "dz", "dB", "dC"}

_known: dict[tuple, Any] = {}


def _recall(make: Callable, tensors: Iterable[Tensor | None], *others) -> Any:
    """What `make()` gave for tensors that differed from these in their values only."""
    key = (
        *others, *(None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16) for t in tensors)
    )  # fmt: skip
    found = _known.get(key)
    if found is None:
        if len(_known) >= 4096:  # lengths that never come again
            _known.clear()
        found = _known[key] = make()
    return found


def _start(
    launches: dict, kernel, tensors: tuple[Tensor | None, ...], describe: Callable, name: str = ""
) -> None:
    """Launch a kernel, whose arguments are tensors, then numbers, then constants.

    `describe` gives grid, numbers and constants, once: a second launch goes straight to what the first
    compiled. Triton would look at every argument of every launch for what to compile.
    """
    known = launches.get(name or kernel)
    if known is None:
        for argument, t in zip(kernel.arg_names, tensors, strict=False):
            if t is not None and argument not in _STRIDED and not t.is_contiguous():
                raise AssertionError(f"{argument} must be contiguous; got strides {t.stride()} of {t.shape}")
        grid, sizes, options = describe()
        built = kernel[grid](*tensors, *sizes, **options)
        if built is not None:  # the interpreter builds nothing
            constants = kernel.arg_names[len(tensors) + len(sizes) :]
            rest = (*sizes, *(options[constant] for constant in constants))
            launches[name or kernel] = built[(*grid, 1, 1)[:3]], rest
    else:
        run, rest = (
            known  # a tensor would be asked for its address, and the driver whether it lies on the GPU
        )
        run(*(None if t is None else t.data_ptr() for t in tensors), *rest)


class _Layout:
    """What calls have in common whose tensors are alike but for their values: sizes, a plan, its launches."""

    def __init__(self, inputs: Inputs, delta_softplus: bool, saved: Tensor):
        u, _, A, B, C = inputs[:5]
        self.b, self.d, self.l = u.shape
        self.n = A.shape[1]
        self.g = B.shape[1] if B.dim() == 4 else C.shape[1] if C.dim() == 4 else 1
        self.packed = inputs.cu_seqlens is not None
        self.sequences = self.b if inputs.cu_seqlens is None else inputs.cu_seqlens.shape[0] - 1
        self.slabs = -(-self.l // SLAB)
        self.processors = _processors(u.device)
        self.size = u.element_size()
        self.least = min(t.element_size() for t in (u, inputs.delta, inputs.z) if t is not None)
        self.plan = plan(
            self.sequences, self.d, self.l, self.n, self.g, self.packed, saved.numel() > 0, self.size == 4,
            self.processors,
        )  # fmt: skip
        self.padded = _padded(self.n)
        self.lanes = _lanes(self.n)
        self.warps = WARPS if self.n <= 64 else 1  # of a program: their sums go through shared memory
        self.width = 32 * self.warps // self.lanes  # its channels
        # slabs in a block of the loops over time: 16 bytes of an array for each lane
        self.unroll = 1 if self.n > 32 else 8 // self.size
        self.flags = {"SOFTPLUS": delta_softplus, "STEADY_B": B.dim() == 2, "STEADY_C": C.dim() == 2}
        # `forward_times` reads B and C best where they lie if they are 16 bits and whole words
        self.native = all(t.dim() == 2 or (t.element_size() == 2 and self.words(t)) for t in (B, C))
        self.states = saved.numel()  # floats of the saved states; then comes the output before the gate
        if self.states and inputs.z is not None:
            self.states -= _words(u)
        rows = self.states // (self.padded * self.d)
        for self.every in (1, 2, 4):  # slabs between saved states; two choices of as many rows lie alike
            if not self.states or rows == _rows_saved(u, self.packed, self.sequences, SLAB * self.every):
                break
        else:
            fail("scan_triton", "every", "be 8, 16 or 32", f"{rows} rows of states")
        self.launches: dict = {}

    def along_time(self) -> tuple:
        """Grid, sizes and options of the kernel whose lanes lie along time."""
        grid, sizes = self.cut(1, 1)
        few = sizes[8] <= 12 * self.processors
        options = self.flags | {
            "WIDE": True, "WHOLE": not self.packed and self.l % (2 * SLAB * 32) == 0, "NATIVE": self.native,
            "PIN": not self.native or not few or self.l > 2048, "num_warps": 1,
            "maxnreg": REGISTERS if few or self.size == 4 else MANY,
        }  # fmt: skip
        return grid, sizes, options

    def over_states(self, block: int, parts: int) -> tuple:
        """The same of a kernel that takes so many chunks of time in blocks of so many slabs."""
        grid, sizes = self.cut(self.width, parts)
        whole = not self.packed and self.l % (SLAB * block) == 0 and self.d // self.g % self.width == 0
        options = self.flags | {
            "LANES": self.lanes, "CHANNELS": 32 // self.lanes, "N": self.padded, "WARPS": self.warps,
            "WIDE": SLAB * block // self.lanes * self.least >= 4, "WHOLE": whole, "num_warps": self.warps,
            "maxnreg": REGISTERS,
        }  # fmt: skip
        return grid, sizes, options

    def cut(self, width: int, parts: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Grid and sizes of programs of so many channels, and so many chunks of time."""
        per_group, tiles = self.d // self.g, self.tiles(width)
        count = self.sequences * parts * self.g * tiles
        processors = min(self.processors, count)
        sizes = (
            self.d, self.l, self.n, per_group, tiles, self.slabs, self.plan.chunk, self.g, count, parts,
            processors,
        )  # fmt: skip
        return (-(-count // processors) * processors,), sizes

    def tiles(self, width: int) -> int:
        """Programs of so many channels that share a group."""
        return -(-(self.d // self.g) // width)

    def words(self, *tensors: Tensor | None) -> bool:
        """Whether all of them can be read 16 bytes at a time."""
        if self.l % 8 or self.packed:
            return False
        for t in tensors:
            if t is not None:
                *outer, along = t.stride()
                if along != 1 or t.data_ptr() % 16 or any(s % 8 for s in outer):
                    return False
        return True

    def rooms(self, varying: tuple[bool, bool], lanes: int) -> tuple[int, tuple[int, int]]:
        """Floats that B and C take as `arrange` lays them, if they vary, and where each begins."""
        slabs, rows, steps = self.rows_of(lanes)
        size = self.b * self.g * slabs * rows * steps
        offset = size if lanes else rows * steps  # of C: behind B, or row by row
        return size * sum(varying), (0, varying[0] * offset)

    def rows_of(self, lanes: int) -> tuple[int, int, int]:
        """Slabs of rows of steps that `arrange` makes, for so many lanes along time or none."""
        return (-(-self.l // (16 * lanes)), self.n, 16 * lanes) if lanes else (self.slabs, self.padded, SLAB)

    def arranged(self, B: Tensor, C: Tensor, lanes: int = 0) -> tuple[Tensor, Tensor]:
        """B and C as `arrange` lays them; constant ones in float32."""
        slabs, rows, steps = self.rows_of(lanes)
        varying = B.dim() == 4, C.dim() == 4
        size, offsets = self.rooms(varying, lanes)
        room = _room(B, size)
        outs = [
            room[offset:] if varies else t.float().contiguous()
            for offset, t, varies in zip(offsets, (B, C), varying, strict=True)
        ]

        def describe():
            none, block = (0, 0, 0, 1), 128
            of_B, of_C = (t.stride() if varies else none for t, varies in zip((B, C), varying, strict=True))
            blocks = -(-slabs * steps // block)
            return (
                (blocks * self.b * self.g, -(-rows // 16)),
                (*of_B, *of_C, self.l, self.n, self.g, slabs, blocks),
                {"N": self.padded, "LANES": lanes, "BLOCK": block, "UNIT": of_B[3] == of_C[3] == 1},
            )

        if any(varying):
            tensors = (B if varying[0] else None, C if varying[1] else None, *outs)
            _start(self.launches, _kernels.arrange, tensors, describe)
        return outs[0], outs[1]

    def carried(self, u: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Room for what each chunk hands on: a state, and its sum of delta."""
        if self.plan.parts == 1:
            return None, None
        size = self.b * (self.plan.parts - 1) * self.d
        return _room(u, size * self.padded), _room(u, size)

    def kept(self, saved: Tensor, u: Tensor, z: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The parts of `saved`: states (row, n, channel), and the output before the gate."""
        if not self.states:
            return None, None
        if z is None:
            return saved, None
        return saved[: self.states], saved[self.states :].view(u.dtype)[: u.numel()]


def _room(like: Tensor, size: int) -> Tensor:
    return like.new_empty(size, dtype=torch.float32)


def _lanes(n: int) -> int:
    """Lanes that share a channel's states."""
    return 4 if n <= 32 else 8


def _padded(n: int) -> int:
    return -(-n // _lanes(n)) * _lanes(n)


def _words(u: Tensor) -> int:
    """Room for u, counted in float32, aligned for loads of 16 bytes."""
    return -(-u.numel() * u.element_size() // 16) * 4


def _wide(t: Tensor | None) -> Tensor | None:
    """In float32, as it lies if it can."""
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
        _launch_forward(_layout(inputs, delta_softplus, saved), inputs, y, last_state, saved)


def _layout(inputs: Inputs, delta_softplus: bool, saved: Tensor) -> _Layout:
    return _recall(
        lambda: _Layout(inputs, delta_softplus, saved), inputs, delta_softplus, saved.numel(), inputs.u.device
    )


_PLACES = (
    "u", "delta", "A", "B", "C", "D", "z", "bias", "start", "y", "last", "none", "rows_B", "rows_C",
    "carried", "spans",
)  # fmt: skip


def repeat(given: Inputs, canonical: Inputs, delta_softplus: bool) -> _repeat.Launch | None:
    """The launches of a call that has just run without gradients, for others that differ in values only.

    None if it made copies of what was given in other types or places.
    """
    u, _, A, B, C = canonical[:5]
    as_given = given.A is A and given.initial_state is canonical.initial_state
    narrow = (given.D, given.delta_bias, *(t for t in (B, C) if t.dim() == 2))
    if not u.numel() or not as_given or any(t is not None and _wide(t) is not t for t in narrow):
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
        steps.append((run, [_PLACES.index(place) for place in places], rest))

    if any(varying) and not (times and layout.native):
        floats, (offsets[0], offsets[1]) = layout.rooms(varying, 32 if times else 0)
        of_B, of_C = ("rows_B" if varying[0] else "B"), ("rows_C" if varying[1] else "C")
        follow(
            _kernels.arrange, "B" if varying[0] else "none", "C" if varying[1] else "none", of_B, of_C
        )  # fmt: skip
    head = "u", "delta", "A", of_B, of_C, "D"
    if times:
        follow(_kernels.forward_times, *head, "z", "bias", "start", "y", "last")
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


def _launch_forward(layout: _Layout, inputs: Inputs, y: Tensor, last_state: Tensor, saved: Tensor) -> None:
    u, delta, A, B, C, D, z, bias, start, bounds = inputs
    D, bias = _wide(D), _wide(bias)

    def with_strides(described, *more, **options):
        grid, sizes, found = described
        head = (*u.stride(), *delta.stride(), *_strides(z), *y.stride(), *more)
        return grid, (*head, *sizes), found | options

    if layout.plan.times:
        if layout.native:
            B, C = (t if t.dim() == 4 else t.float().contiguous() for t in (B, C))
        else:
            B, C = layout.arranged(B, C, 32)
        _start(
            layout.launches, _kernels.forward_times, (u, delta, A, B, C, D, z, bias, start, y, last_state),
            lambda: with_strides(
                layout.along_time(), *_rows(B), *_rows(C), WIDE=layout.words(u, delta, z, y)
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

        _start(
            layout.launches, _kernels.forward_states,
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
        layout = _recall(
            lambda: _Layout(inputs, delta_softplus, saved),
            (*inputs, grad_y, grad_last, saved),
            delta_softplus,
            u.device,
        )
        _launch_backward(layout, inputs, grad_y, grad_last, saved, grads)


def _launch_backward(
    layout: _Layout, inputs: Inputs, grad_y: Tensor, grad_last: Tensor, saved: Tensor, grads: Inputs
) -> None:
    u, delta, A, B, C, D, z, bias, _, bounds = inputs
    D, bias = _wide(D), _wide(bias)
    parts, padded, slabs = layout.plan.parts, layout.padded, layout.slabs
    states, ungated = layout.kept(saved, u, z)
    arranged_B, arranged_C = layout.arranged(B, C)
    carried, spans = layout.carried(u)

    def describe_carry():
        grid, sizes, options = layout.over_states(layout.unroll, parts - 1)
        options["WIDE"] &= layout.words(delta, z, grad_y)
        strides = (*delta.stride(), *_strides(z), *grad_y.stride())
        return grid, (*strides, *sizes), options | {"UNROLL": layout.unroll}

    if parts > 1:
        _start(
            layout.launches, _kernels.carry, (delta, A, arranged_C, z, bias, grad_y, carried, spans),
            describe_carry,
        )  # fmt: skip
    steady_B, steady_C = B.dim() == 2, C.dim() == 2
    over, width = layout.sequences * parts, 2 + padded * (1 + steady_B + steady_C)
    totals = _room(u, over * layout.d * width)
    tiles = layout.tiles(layout.width)
    each_row = 0 if steady_B and steady_C else layout.b * layout.g * slabs * padded * 2 * SLAB
    sums = _room(u, tiles * each_row)

    def describe():
        grid, sizes, options = layout.over_states(1, parts)
        options["WIDE"] &= layout.words(u, delta, z, grad_y, grads.u, grads.delta, grads.z)
        strides = (
            *u.stride(), *delta.stride(), *_strides(z), *grad_y.stride(),
            *grads.u.stride(), *grads.delta.stride(), *_strides(grads.z),
        )  # fmt: skip
        return grid, (*strides, *sizes), options | {"EVERY": layout.every}

    _start(
        layout.launches, _kernels.backward,
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
        _start(
            layout.launches, _kernels.finish,
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

    _start(
        layout.launches, _kernels.fold, (totals, grads.A, grads.D, grads.delta_bias, dB, dC), describe_fold
    )
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
    tensors = own, x, dt, A.contiguous(), B, C, _wide(D), z, _wide(dt_bias), y

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
            _start(_recall(dict, tensors, dt_softplus, x.device), _kernels.step, tensors, describe)
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
