"""Limits of this machine for the scan: memory bandwidth and arithmetic throughput."""

import functools
import time

import torch

from benchmarks import common

VERSION = common.version(__file__)


def _best(call, tries: int = 5) -> float:
    """Seconds of the fastest of `tries` calls, after one warm-up call."""
    call()
    seconds = []
    for _ in range(tries):
        common.synchronise()
        start = time.perf_counter()
        call()
        common.synchronise()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


class Bandwidth(common.Suite):
    """Bytes read and written by a copy of 256 MiB of float32, far more than the caches hold."""

    version = VERSION
    unit = "GB/s"

    def track_copy(self):
        source = torch.ones(2**26, device=common.device())
        target = torch.empty_like(source)
        return 2 * 2**28 / _best(functools.partial(target.copy_, source)) / 1e9


class Arithmetic(common.Suite):
    """A float32 matrix product, 2048 x 2048 x 2048. One multiply-add counts as one operation."""

    version = VERSION
    unit = "Gop/s"

    def track_product(self):
        a, b = (common.randn(2048, 2048, seed=seed) for seed in range(2))
        return 2048**3 / _best(functools.partial(torch.mm, a, b)) / 1e9
