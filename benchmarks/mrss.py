"""The multi-resolution scan: forward, by update periods and length."""

import functools

import torch

from benchmarks import common

PERIODS = {  # of the 16 states, fastest last
    "every 1": [1] * 16,
    "every 1-8": [1, 2, 4, 8] * 4,
    "every 16": [16] * 16,
}
VERSION = common.version(__file__)


@functools.cache
def _scan(periods: str, l: int, d: int):
    """A call of the scan, checked against the reference in float64."""
    mrss_scan = common.require("projecta", "mrss_scan")
    inputs = common.scan_inputs(1, d, l)

    @torch.inference_mode()
    def run(inputs, backend):
        return mrss_scan(
            **inputs, delta_softplus=True, periods=PERIODS[periods], decay="compound", backend=backend
        )

    truth = run(common.pick_channels(inputs), "reference")
    got = run(inputs, "vectorised").index_select(1, common.channel_rows(d).to(common.device()))
    common.check_close(f"periods {periods}", got, truth, 1e-4)
    return functools.partial(run, inputs, "vectorised")


class _Forward(common.Suite):
    """b = 1, d = 256, n = 16, float32, compound decay, backend "vectorised", inputs as in `scan`."""

    params = (tuple(PERIODS), common.LENGTHS)
    param_names = ("periods", "length")
    version = VERSION
    d = 256


class Mrss(_Forward):
    def setup(self, periods, length):
        _scan(periods, length, self.d)

    def time_forward(self, periods, length):
        _scan(periods, length, self.d)()


class MrssPeak(_Forward):
    def setup(self, periods, length):
        common.return_freed_memory()
        _scan(periods, length, self.d)

    def track_peak_forward(self, periods, length):
        return common.peak_mib(_scan(periods, length, self.d))


class _Long(common.Suite):
    """At the width of mamba-130m, to 65,536 steps."""

    params = (tuple(PERIODS), common.LONG_LENGTHS)
    param_names = ("periods", "length")
    version = VERSION
    timeout = 1200
    d = 1536


class FullMrss(_Long):
    def setup(self, periods, length):
        common.require_full()
        _scan(periods, length, self.d)

    def time_forward(self, periods, length):
        _scan(periods, length, self.d)()


class FullMrssPeak(_Long):
    def setup(self, periods, length):
        common.require_full()
        common.return_freed_memory()
        _scan(periods, length, self.d)

    def track_peak_forward(self, periods, length):
        return common.peak_mib(_scan(periods, length, self.d))
