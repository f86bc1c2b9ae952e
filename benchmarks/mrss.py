"""The multi-resolution scan against the full scan: forward, and forward and backward, by theta and length."""

import functools

import torch

from benchmarks import common

THETAS = {"compound, every token": 1e-9, "theta 0.1": 0.1, "theta 0.5": 0.5}
CASES = ("full scan", "theta 0.5")
VERSION = common.version(__file__)


def _inputs(l: int, d: int) -> dict[str, torch.Tensor]:
    """`common.scan_inputs` with the initial step sizes of a Mamba layer: 0.001 to 0.1, sorted."""
    inputs = common.scan_inputs(1, d, l)
    steps = torch.logspace(-3, -1, d, device=common.device())
    inputs["delta_bias"] = steps + torch.log(-torch.expm1(-steps))
    return inputs


@functools.cache
def _scan(case: str, l: int, d: int, *, backward: bool):
    """A call of a scan, checked against the reference in float64."""
    inputs, grad = _inputs(l, d), common.randn(1, d, l, seed=5)
    if case == "full scan":
        scan, options = common.require("projecta", "selective_scan"), {}
    else:
        scan, choose = (common.require("projecta.mrss", name) for name in ("mrss_scan", "choose_periods"))
        steps = torch.nn.functional.softplus(inputs["delta"] + inputs["delta_bias"][:, None])
        try:
            table = choose(
                inputs["A"], theta=THETAS[case], step=steps.square().mean((0, 2)).sqrt(), vector=(16, 4)
            )
        except TypeError as error:
            common.skip(f"this commit's choose_periods takes no step sizes ({error})")
        options = {"periods": table}

    def run(inputs, grad, **options):
        leaves = {name: t.requires_grad_(backward) for name, t in inputs.items()}
        with torch.set_grad_enabled(backward):
            y = scan(**leaves, delta_softplus=True, **options)
        return (y, *torch.autograd.grad(y, list(leaves.values()), grad)) if backward else (y,)

    rows = common.channel_rows(d)
    few = {name: t.cpu()[rows] for name, t in options.items()}
    truth = run(common.pick_channels(inputs), grad.cpu()[:, rows].double(), **few, backend="reference")
    got = run(inputs, grad, **options)
    common.check_close(
        case, got[0].detach().index_select(1, rows.to(common.device())), truth[0].detach(), 1e-4
    )
    if backward:
        found = got[1].index_select(1, rows.to(common.device()))
        common.check_close(f"{case} du", found, truth[1], 1e-4)
    return functools.partial(run, inputs, grad, **options)


class _Case(common.Suite):
    """b = 1, d = 256, n = 16, float32, compound decay, backend "auto"."""

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


class MrssGrad(_Case):
    params = (CASES, (2048,))
    backward = True

    def time_forward_backward(self, case, length):
        _scan(case, length, self.d, backward=True)()


class _Long(_Case):
    """The width of mamba-130m, up to 65,536 steps."""

    params = (("full scan", *THETAS), common.LONG_LENGTHS)
    timeout = 1200
    d = 1536

    def setup(self, case, length):
        common.require_full()
        super().setup(case, length)


class FullMrss(_Long):
    def time_forward(self, case, length):
        _scan(case, length, self.d, backward=False)()


class FullMrssPeak(_Long, _Peak):
    def track_peak_forward(self, case, length):
        return common.peak_mib(_scan(case, length, self.d, backward=False))
