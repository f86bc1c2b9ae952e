"""Compiles a kernel once, and runs it on as many threads as torch uses.

Every thread calls kernel(counter, items, *arguments). The kernel takes its thread number from counter[1] and
items from counter[0], so that threads share the work evenly, whatever else runs on the machine.

If torch has loaded GNU OpenMP (Linux), the kernel runs on torch's threads. They spin after torch's last
operation and would slow down other threads: a scan right after such an operation takes 5.9 ms on them, and
8.0 ms on other threads (2 cores). Elsewhere, and in a forked child, which has lost them, a thread pool is
used.
"""

import contextlib
import ctypes
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import njit

SMALL = 200_000  # elements of (b, d, l, n) below which one thread is faster than two

_called: set[tuple] = set()  # kernels and types that have run in this process
_waiting = threading.local()  # launches of the block of `together` that a thread is in
_pools: dict[int, ThreadPoolExecutor] = {}  # by process id
_openmp_process: int | None = None  # the process that started OpenMP's threads here
_SHARE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _find_openmp() -> Callable | None:
    """GOMP_parallel(function, data, threads, flags) of the OpenMP that torch has loaded."""
    try:
        return getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    except (OSError, TypeError):  # Windows
        return None


_openmp = _find_openmp()


_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
# For functions that only kernels call: compiled into the kernel, not callable from Python, not cached.
inner = njit(**(_OPTIONS | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}))


def compiled(function: Callable) -> Callable:
    """Compile for each type at the first call, and cache on disk if a folder is writable."""
    try:
        kernel = njit(**_OPTIONS, cache=True)(function)
        _forget_stale(Path(kernel.stats.cache_path), function)
    except (RuntimeError, OSError):  # numba found no folder for its cache, or stale code stays in it
        return njit(**_OPTIONS)(function)
    return kernel


def _forget_stale(cache: Path, function: Callable) -> None:
    """Delete cached code that is older than a source: numba compares it with the kernel's own file only."""
    own = Path(inspect.getfile(function))
    sources = [*Path(__file__).parent.glob("*.py"), *own.parent.glob("*.py")]
    newest = max(path.stat().st_mtime_ns for path in sources)
    for index in cache.glob(f"{own.stem}.{function.__qualname__}-*.nbi"):
        if index.stat().st_mtime_ns < newest:
            index.unlink()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Run the kernels of the block that name what they `keep` at its end, as one piece of work.

    A thread that finds no more work in one kernel goes on with the next. No kernel may read what another
    of them writes.
    """
    batch: list[tuple] = []
    _waiting.batch = batch
    try:
        yield
    finally:
        _waiting.batch = None
    if batch:
        _share([launch[:3] for launch in batch], max(launch[3] for launch in batch))


def run(
    kernel: Callable, items: int, work: int, *arguments: Any, types: tuple = (), keep: Any = None
) -> None:
    """Run a kernel over `items`; `work` is their size in elements of (b, d, l, n).

    types: what the arguments' types follow from, if the caller knows it: else they are looked at one by one.
    keep: what must live until the kernel has run, if it may run at the end of `together`.
    """
    key = (kernel, types) if types else (kernel, *map(_kind, arguments))
    if key not in _called:  # on one thread: otherwise each would compile
        _compile(kernel, arguments)
        _called.add(key)
    counter = np.zeros(2, np.int64)
    threads = min(torch.get_num_threads(), items) if work >= SMALL else 1
    if threads < 2:
        kernel(counter, items, *arguments)
        return
    batch = getattr(_waiting, "batch", None)
    if keep is not None and batch is not None:
        batch.append((kernel, (counter, items, *arguments), keep, threads))
    else:
        _share([(kernel, (counter, items, *arguments), keep)], threads)


def _share(launches: list[tuple], threads: int) -> None:
    """Run kernels, one after the other, on each of so many threads; they share the items."""
    failures: list[BaseException] = []

    def share(_: object = None) -> None:
        try:
            for kernel, arguments, _ in launches:
                kernel(*arguments)
        except BaseException as error:
            failures.append(error)

    _side_by_side(share, threads)
    if failures:
        raise failures[0]


def _kind(argument: object) -> Any:
    """The type for which numba compiles: dtype and dimensions of an array, type of anything else."""
    if isinstance(argument, np.ndarray):
        return argument.dtype, argument.ndim
    if isinstance(argument, tuple):
        return tuple(map(_kind, argument))
    return type(argument)


def _side_by_side(share: Callable, threads: int) -> None:
    """Call `share` on this thread and on threads - 1 others; return when all have returned."""
    global _openmp_process
    if _openmp is not None and _openmp_process in (None, os.getpid()):
        _openmp_process = os.getpid()
        _openmp(_SHARE(share), None, threads, 0)
        return
    pool = _pools.get(os.getpid())
    if pool is None or pool._max_workers < threads - 1:
        pool = _pools[os.getpid()] = ThreadPoolExecutor(threads - 1)
    others = [pool.submit(share) for _ in range(threads - 1)]
    share()
    for other in others:
        other.result()


def _compile(kernel: Callable, arguments: tuple) -> None:
    text = "projecta: compiling a CPU kernel, once for these types"
    note = threading.Timer(1.0, print, [text], {"file": sys.stderr})
    note.start()
    try:
        kernel(np.zeros(2, np.int64), 0, *arguments)
    finally:
        note.cancel()
