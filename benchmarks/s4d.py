"""S4D, the baseline without selection: convolution and recurrence, by length."""

import functools

import torch

from benchmarks import common

MODES = ("convolution", "recurrence")
VERSION = common.version(__file__)


@functools.cache
def _scan(mode: str, l: int, d: int):
    """A call of the scan. A few channels are checked against the reference recurrence in float64."""
    s4d_scan, s4d_rates = (common.require("projecta.s4d", name) for name in ("s4d_scan", "s4d_rates"))
    backend = "cpu" if common.device().type == "cpu" else "vectorised"  # the scan's backend, with complex A
    arguments = {
        "u": common.randn(1, d, l, seed=0),
        "delta": torch.logspace(-3, -1, d, device=common.device()),
        "A": s4d_rates(16, device=common.device()).repeat(d, 1),
        "C": torch.complex(common.randn(d, 16, seed=1), common.randn(d, 16, seed=2)),
        "D": torch.ones(d, device=common.device()),
    }
    run = torch.inference_mode()(functools.partial(s4d_scan, **arguments, mode=mode, backend=backend))
    got = run()
    if common.CHECKED:
        return run
    rows = common.channel_rows(d)
    picked = {
        name: t.cpu()
        .index_select(1 if name == "u" else 0, rows)
        .to(torch.complex128 if t.is_complex() else torch.float64)
        for name, t in arguments.items()
    }
    truth = s4d_scan(**picked, mode="recurrence", backend="reference")
    common.check_close(f"S4D {mode}", got.cpu().index_select(1, rows), truth, 1e-4)
    return run


class _Forward(common.Suite):
    """b = 1, d = 256, 16 states (of conjugate pairs), float32, S4D-Lin, zero-order hold."""

    params = (MODES, common.LENGTHS)
    param_names = ("mode", "length")
    version = VERSION
    d = 256


class S4d(_Forward):
    def setup(self, mode, length):
        _scan(mode, length, self.d)

    def time_forward(self, mode, length):
        _scan(mode, length, self.d)()


class S4dPeak(_Forward):
    params = (MODES, (8192,))

    def setup(self, mode, length):
        common.return_freed_memory()
        _scan(mode, length, self.d)

    def track_peak_forward(self, mode, length):
        return common.peak_mib(_scan(mode, length, self.d))
