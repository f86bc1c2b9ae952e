"""Compiles a kernel once, and runs it on as many threads as torch uses.

A pool of our own, not numba's: its threading layers forbid fork or calls from two threads at once.
"""

import itertools
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit

SMALL = 200_000  # elements of (b, d, l, n) below which one thread is faster than two

_pools: dict[int, ThreadPoolExecutor] = {}  # by process: a forked child starts threads of its own
_called: set[tuple] = set()  # kernels and types that have run in this process


def compiled(function: Callable) -> Callable:
    """Compiled for each type when it is first called, and kept on disk where a folder can be written."""
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # numba found no folder for its cache
        return njit(nogil=True, error_model="numpy")(function)


def run(kernel: Callable, items: int, work: int, *arguments) -> None:
    """kernel(first, stop, *arguments) over all items; the caller's thread takes its share."""
    key = (kernel, *[(a.dtype, a.ndim) if isinstance(a, np.ndarray) else type(a) for a in arguments])
    if key not in _called:  # not in several threads: each would compile
        _compile(kernel, arguments)
        _called.add(key)
    threads = min(torch.get_num_threads(), items)
    if threads < 2 or work < SMALL:
        kernel(0, items, *arguments)
        return
    parts = min(items, 4 * threads)
    queue = itertools.count()

    def share() -> None:
        while (part := next(queue)) < parts:
            kernel(items * part // parts, items * (part + 1) // parts, *arguments)

    pool = _pools.get(os.getpid())
    if pool is None or pool._max_workers < threads - 1:
        pool = _pools[os.getpid()] = ThreadPoolExecutor(threads - 1)
    others = [pool.submit(share) for _ in range(threads - 1)]
    try:
        share()
    finally:
        for other in others:
            other.result()


def _compile(kernel: Callable, arguments: tuple) -> None:
    text = "projecta: compiling the CPU scan, once for these types"
    note = threading.Timer(1.0, print, [text], {"file": sys.stderr})
    note.start()
    try:
        kernel(0, 0, *arguments)
    finally:
        note.cancel()
