"""The multi-resolution scan against the full scan: forward, and forward and backward, by bands and length."""

import functools

import torch

from benchmarks import common

BANDS = {
    "half per 8": ((0.5, 1), (0.5, 8)),
    "half per 4": ((0.5, 1), (0.5, 4)),
    "five eighths per 8": ((0.375, 1), (0.625, 8)),
    "three quarters per 8": ((0.25, 1), (0.75, 8)),
}
CASES = ("full scan", "half per 8")
VERSION = common.version(__file__)


def _inputs(l: int, d: int) -> dict[str, torch.Tensor]:
    """`common.scan_inputs` with the initial step sizes of a Mamba layer: 0.1 to 0.001, sorted."""
    inputs = common.scan_inputs(1, d, l)
    steps = torch.logspace(-1, -3, d, device=common.device())
    inputs["delta_bias"] = steps + torch.log(-torch.expm1(-steps))
    return inputs


@functools.cache
def _scan(case: str, l: int, d: int, *, backward: bool):
    """A call of a scan, that has run once; checked against the reference in float64."""
    inputs, grad = _inputs(l, d), common.randn(1, d, l, seed=5)
    if case == "full scan":
        scan, options = common.require("projecta", "selective_scan"), {}
    else:
        common.require("projecta.mrss", "BANDS")  # older commits have another rule
        scan, options = common.require("projecta", "mrss_scan"), {"bands": BANDS[case]}

    def run(inputs, grad, **options):
        leaves = {name: t.requires_grad_(backward) for name, t in inputs.items()}
        with torch.set_grad_enabled(backward):
            y = scan(**leaves, delta_softplus=True, **options)
        return (y, *torch.autograd.grad(y, list(leaves.values()), grad)) if backward else (y,)

    call = functools.partial(run, inputs, grad, **options)
    got = call()
    if common.CHECKED:
        return call
    rows = common.channel_rows(d)  # the bands divide these four as they divide all channels
    truth = run(common.pick_channels(inputs), grad.cpu()[:, rows].double(), **options, backend="reference")
    common.check_close(
        case, got[0].detach().index_select(1, rows.to(common.device())), truth[0].detach(), 1e-4
    )
    if backward:
        found = got[1].index_select(1, rows.to(common.device()))
        common.check_close(f"{case} du", found, truth[1], 1e-4)
    return call


class _Case(common.Suite):
    """b = 1, d = 256, n = 16, float32, backend "auto"."""

    params = (CASES, common.PEAK_LENGTHS)
    param_names = ("case", "length")
    version = VERSION
    d = 256
    backward = False

    def setup(self, case, length):
        if isinstance(self, _Peak):
            common.return_freed_memory()
        _scan(case, length, self.d, backward=self.backward)


class _Peak:
    """Marks the suites that measure memory."""


class Mrss(_Case):
    def time_forward(self, case, length):
        _scan(case, length, self.d, backward=False)()


class MrssPeak(_Case, _Peak):
    params = (CASES, (8192,))

    def track_peak_forward(self, case, length):
        return common.peak_mib(_scan(case, length, self.d, backward=False))


class FullMrssGradPeak(_Case, _Peak):
    params = (CASES, (8192,))
    backward = True

    def setup(self, case, length):
        common.require_full()
        super().setup(case, length)

    def track_peak_forward_backward(self, case, length):
        return common.peak_mib(_scan(case, length, self.d, backward=True))


class MrssGrad(_Case):
    params = (CASES, (2048,))
    backward = True

    def time_forward_backward(self, case, length):
        _scan(case, length, self.d, backward=True)()


class _Long(_Case):
    """The width of mamba-130m, up to 65,536 steps."""

    params = (("full scan", *BANDS), common.LONG_LENGTHS)
    timeout = 1200
    d = 1536

    def setup(self, case, length):
        common.require_full()
        super().setup(case, length)


class FullMrss(_Long):
    def time_forward(self, case, length):
        _scan(case, length, self.d, backward=False)()


class FullMrssGrad(_Long):
    params = (("full scan", *BANDS), (2048, 8192))
    backward = True

    def time_forward_backward(self, case, length):
        _scan(case, length, self.d, backward=True)()


class FullMrssPeak(_Long, _Peak):
    def track_peak_forward(self, case, length):
        return common.peak_mib(_scan(case, length, self.d, backward=False))
