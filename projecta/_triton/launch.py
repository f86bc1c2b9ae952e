"""Launches Triton kernels: compiled once for calls that differ in values only, then started directly."""

import functools
import inspect
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from projecta._calls import remembered, traits

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Sizes and strides: the compiled code is the same for all values (see `start_kernel`).
SIZES = [
    "d", "l", "n", "per_group", "tiles", "slabs", "chunk", "groups", "over", "count", "processors", "parts",
    "links", "blocks",
    *(f"{t}{a}" for t in ("u", "s", "z", "y", "g", "du", "ds", "dz", "dx", "B", "C", "x") for a in "bdl"),
    "Bg", "Bn", "Cg", "Cn", "per_B", "per_C",
]  # fmt: skip


def cannot_run() -> str:
    """Why Triton kernels cannot run here; "" when they can."""
    if INTERPRETED:
        return ""
    if torch.version.hip:
        return "the kernels contain instructions of NVIDIA's"
    return "" if torch.cuda.is_available() else "there is no CUDA device"


def kernel(function):
    return triton.jit(
        function, do_not_specialize=[name for name in SIZES if name in inspect.signature(function).parameters]
    )


# Tensors that kernels take with strides; all other tensors are contiguous.
_STRIDED = {
    "u", "delta", "z", "y", "x", "dt", "B", "C", "grad_y", "du", "ddelta", "dz", "gated", "dB", "dC", "dx",
    "state",
}  # fmt: skip

_known: dict[tuple, Any] = {}


def cached(make: Callable, tensors: Iterable[Tensor | None], *others) -> Any:
    """The cached result of `make()` for tensors that differ from these in values only."""
    return remembered(_known, (*others, *map(traits, tensors)), make)


def start_kernel(
    launches: dict, kernel, tensors: dict[str, Tensor | None], describe: Callable, name: Any = None
) -> None:
    """Launch a kernel. Its arguments are `tensors`, in its order, then numbers, then constants.

    The first launch calls `describe` for the grid, numbers by name, and constants and options by name. Later
    launches go straight to the compiled kernel. Triton's launcher would inspect every argument each time.
    """
    known, recording = launches.get(name or kernel), getattr(_thread, "recording", None)
    if known is None:
        if list(tensors) != kernel.arg_names[: len(tensors)]:
            raise AssertionError(f"{kernel} takes {kernel.arg_names} in this order; got {list(tensors)}")
        for argument, t in tensors.items():
            if t is not None and argument not in _STRIDED and not t.is_contiguous():
                raise AssertionError(f"{argument} must be contiguous; got strides {t.stride()} of {t.shape}")
        grid, sizes, options = describe()
        built = kernel[grid](**tensors, **sizes, **options)
        if built is not None:  # the interpreter builds nothing
            given = sizes | options
            rest = tuple(given[argument] for argument in kernel.arg_names[len(tensors) :])
            known = launches[name or kernel] = _launcher(built, (*grid, 1, 1)[:3]), rest
    else:
        run, rest = known
        # for a tensor, the launcher would also ask the driver whether it is on the GPU
        run(current_stream(), *(None if t is None else t.data_ptr() for t in tensors.values()), *rest)
    if recording is not None:
        recording.add(known, tensors.values())


def _launcher(built: Any, grid: tuple[int, ...]) -> Callable:
    """start(stream, *arguments) of a compiled kernel.

    Triton's own `built[grid]` first builds what a profiler's hooks may read, and calls them. This is left out
    where no hook is set.
    """
    if not isinstance(built, CompiledKernel):
        run = built[grid]
        return lambda stream, *arguments: run(*arguments)
    with_hooks, hooks = built[grid], knobs.runtime
    start, function, metadata = built.run, built.function, built.packed_metadata

    def launch(stream: int, *arguments: Any) -> None:
        if getattr(hooks.launch_enter_hook, "calls", None) or getattr(hooks.launch_exit_hook, "calls", None):
            with_hooks(*arguments)
        else:
            start(*grid, stream, function, metadata, None, None, None, *arguments)

    return launch


def current_stream() -> int:
    """The address of the CUDA stream that torch works on."""
    if INTERPRETED:
        return 0
    return driver.active.get_current_stream(driver.active.get_current_device())


_thread = threading.local()


class Recording:
    """The launches of a call, to be repeated for calls whose tensors differ in values and addresses only.

    Checks, layout and argument handling cost the processor several times the GPU's time for a small kernel;
    a repeated call is one allocation of scratch memory and the launches.

    Args:
        given: the caller's tensors, which may share memory. A kernel must get these very objects.
        made: outputs, each in memory of its own. A kernel may also get views of them.
    """

    def __init__(self, given: Iterable[Tensor | None], made: Iterable[Tensor | None]):
        self._given, self._made = list(given), list(made)
        self._slot_of = {id(t): i for i, t in enumerate(self._given) if t is not None}
        self._tensors = len(self._given) + len(self._made)
        self._buffers: list[tuple[Tensor, int]] = []  # scratch memory, and where it begins in the whole
        self._size = 0  # of the scratch memory, in floats
        self._views: dict[tuple[int, int], int] = {}  # (tensor, or -1 for scratch; bytes into it): slot
        self._steps: list[tuple[Callable, list[int], tuple]] = []
        # Whether `repeat` does what this call did. The two places of a tensor that is given twice cannot be
        # told apart, and a later call may give two tensors.
        self.complete = len(self._slot_of) == sum(t is not None for t in self._given)

    def __enter__(self) -> "Recording":
        _thread.recording = self
        return self

    def __exit__(self, *error: object) -> None:
        _thread.recording = None
        self.complete = self.complete and error[0] is None
        self._given, self._made, self._slot_of, self._buffers = [], [], {}, []

    def add_buffer(self, t: Tensor) -> None:
        self._buffers.append((t, self._size))
        self._size += -(-t.numel() // 64) * 64

    def add(self, known: tuple | None, tensors: Iterable[Tensor | None]) -> None:
        slots = [self._slot(t) for t in tensors]
        if known is None or None in slots:
            self.complete = False
        else:
            self._steps.append((known[0], slots, known[1]))  # type: ignore[arg-type]

    def _slot(self, t: Tensor | None) -> int | None:
        """Where `repeat` finds the address of a tensor; None if it is unknown."""
        if t is None:
            return self._tensors
        slot = self._slot_of.get(id(t))
        if slot is not None:
            return slot
        at = t.data_ptr()
        places = [(i + len(self._given), m, 0) for i, m in enumerate(self._made) if m is not None]
        places += [(-1, buffer, 4 * start) for buffer, start in self._buffers]
        for tensor, whole, start in places:
            offset, storage = at - whole.data_ptr(), whole.untyped_storage()
            if offset >= 0 and at < storage.data_ptr() + storage.nbytes():
                view = tensor, start + offset
                if view[1] == 0 and tensor >= 0:
                    return tensor
                return self._views.setdefault(view, self._tensors + 1 + len(self._views))
        return None

    def repeat(self, tensors: Iterable[Tensor | None], like: Tensor) -> None:
        """Launch the same kernels on other tensors: those of `given`, then those of `made`."""
        at: list[int | None] = [None if t is None else t.data_ptr() for t in tensors]
        at.append(None)
        if self._views:
            # alive until everything is launched
            scratch = like.new_empty(self._size, dtype=torch.float32) if self._size else None
            begin = 0 if scratch is None else scratch.data_ptr()
            at += [(begin if tensor < 0 else at[tensor]) + offset for tensor, offset in self._views]  # type: ignore[operator]
        stream = current_stream()
        for run, slots, rest in self._steps:
            run(stream, *[at[slot] for slot in slots], *rest)


def repeated(
    records: dict[Any, Recording], key: Any, given: Sequence[Tensor | None], made: Sequence[Tensor | None],
    launch: Callable[[], None],
) -> None:  # fmt: skip
    """Call `launch()`, or repeat what it launched at the last call with this key."""
    recording = records.get(key)
    if recording is not None:
        recording.repeat((*given, *made), next(t for t in (*made, *given) if t is not None))
        return
    with Recording(given, made) as recording:
        launch()
    if recording.complete:
        records[key] = recording


def new_buffer(like: Tensor, size: int) -> Tensor:
    """Scratch memory of so many float32 numbers."""
    buffer = like.new_empty(size, dtype=torch.float32)
    recording = getattr(_thread, "recording", None)
    if recording is not None:
        recording.add_buffer(buffer)
    return buffer


def narrow(t: Tensor | None) -> Tensor | None:
    """`t` contiguous, and not float64; no copy if it is already."""
    return None if t is None else (t.float() if t.dtype == torch.float64 else t).contiguous()


@functools.cache
def processors_of(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def ordered_strides(way: int, **tensors: Tensor | None) -> dict[str, int]:
    """Strides as kernels name them: `sb`, `sd`, `sl` of an array s (b, d, l); way -1: time runs backwards."""
    return {
        name + axis: 0 if t is None else t.stride(i) * (way if axis == "l" else 1)
        for name, t in tensors.items()
        for i, axis in enumerate("bdl")
    }
