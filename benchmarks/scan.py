"""The selective scan: forward, forward and backward, and the step, by backend and length."""

import functools
import importlib
import statistics

import torch

from benchmarks import common

BACKENDS = ("vectorised", "cpu", "triton")
STEPS = 64
OPERATIONS = {"forward": 13, "backward": 21}  # vector operations per token, 16 channels and state
VERSION = common.version(__file__)


@functools.cache
def _scan(backend: str, l: int, d: int, *, backward: bool):
    """A call of the scan, that has run once; checked against the reference in float64."""
    common.require_backend(backend)
    selective_scan = common.require("projecta", "selective_scan")
    inputs = common.scan_inputs(1, d, l)
    grad = common.randn(1, d, l, seed=5)

    def run(inputs, grad, backend):
        leaves = {name: t.requires_grad_(backward) for name, t in inputs.items()}
        with torch.set_grad_enabled(backward):
            y = selective_scan(**leaves, delta_softplus=True, backend=backend)
        return (y, *torch.autograd.grad(y, list(leaves.values()), grad)) if backward else (y,)

    call = functools.partial(run, inputs, grad, backend)
    got = call()
    if common.CHECKED:
        return call
    rows = common.channel_rows(d)
    picked = common.pick_channels(inputs)
    truth = run(picked, grad.cpu()[:, rows].double(), "reference")
    for name, g, t in zip(("y", *(f"d{name}" for name in inputs)), got, truth, strict=False):
        if name not in ("dB", "dC"):  # sums over all channels: the tests check them
            axis = 0 if name in ("dA", "dD", "ddelta_bias") else 1
            common.check_close(
                f"{backend} {name}", g.detach().index_select(axis, rows.to(g.device)), t.detach(), 1e-4
            )
    return call


@functools.cache
def _steps(backend: str, d: int):
    """A call that decodes STEPS tokens one by one, checked against the scan."""
    common.require_backend(backend)
    selective_scan = common.require("projecta", "selective_scan")
    step = common.require("projecta", "selective_state_update")
    inputs = common.scan_inputs(1, d, STEPS)
    per_step = [
        {name: inputs[name][..., t].contiguous() for name in ("u", "delta", "B", "C", "z")}
        for t in range(STEPS)
    ]
    A, D, bias = inputs["A"], inputs["D"], inputs["delta_bias"]

    @torch.inference_mode()
    def run():
        state = torch.zeros(1, *A.shape, device=A.device)
        return [
            step(
                state, now["u"], now["delta"], A, now["B"], now["C"], D, now["z"], bias, True, backend=backend
            )
            for now in per_step
        ]

    truth = selective_scan(**inputs, delta_softplus=True, backend="reference")
    common.check_close(f"{backend} step", torch.stack(run(), -1), truth, 1e-4)
    return run


class _Forward(common.Suite):
    """b = 1, d = 256, n = 16, float32, with z, D, delta_bias and softplus."""

    params = (BACKENDS, common.LENGTHS)
    param_names = ("backend", "length")
    version = VERSION
    d = 256


class Scan(_Forward):
    def setup(self, backend, length):
        _scan(backend, length, self.d, backward=False)

    def time_forward(self, backend, length):
        _scan(backend, length, self.d, backward=False)()


class ScanReference(Scan):
    """A loop over time, as a user without a kernel would write it: at a short length only."""

    params = (("reference",), (512,))


class ScanGrad(_Forward):
    """All eight gradients."""

    def setup(self, backend, length):
        _scan(backend, length, self.d, backward=True)

    def time_forward_backward(self, backend, length):
        _scan(backend, length, self.d, backward=True)()


class ScanGradReference(ScanGrad):
    params = (("reference",), (512,))


class ScanPeak(_Forward):
    params = (BACKENDS, (8192,))

    def setup(self, backend, length):
        common.return_freed_memory()
        _scan(backend, length, self.d, backward=False)

    def track_peak_forward(self, backend, length):
        return common.peak_mib(_scan(backend, length, self.d, backward=False))


class ScanGradPeak(_Forward):
    params = (("cpu", "triton"), common.PEAK_LENGTHS)

    def setup(self, backend, length):
        common.return_freed_memory()
        _scan(backend, length, self.d, backward=True)

    def track_peak_forward_backward(self, backend, length):
        return common.peak_mib(_scan(backend, length, self.d, backward=True))


class FullScanGradPeak(ScanGradPeak):
    params = (("vectorised",), common.PEAK_LENGTHS)

    def setup(self, backend, length):
        common.require_full()
        super().setup(backend, length)


class ScanBound(common.Suite):
    """Calculated lower bound of the memory of any backend, at the sizes of the peak suites."""

    params = (common.PEAK_LENGTHS,)
    param_names = ("length",)
    version = VERSION
    d = 256

    def track_peak_forward(self, length):
        """The output."""
        return self.d * length * 4 / 2**20

    def track_peak_forward_backward(self, length):
        """The output and the gradients of u, delta, z (b, d, l) and B, C (b, n, l)."""
        return (4 * self.d + 2 * 16) * length * 4 / 2**20


class FullScanLimit(common.Suite):
    """Time of a scan divided by its arithmetic limit; backend "cpu", float32.

    The limit is the time of the vector operations at the measured speed of a core. Forward takes 13 per
    token, channel and state: the exponential 10, update and read-out 3. Backward takes 21: the states again
    13, the gradients 8.
    """

    params = (("forward", "backward"), (1, 8), (64, 768, 1536, 5120), (64, 512, 2048, 16384), (16, 64))
    param_names = ("pass", "batch", "d", "length", "n")
    version = VERSION
    unit = "times the limit"
    timeout = 600

    def setup(self, kind, batch, d, length, n):
        common.require_full()
        if batch * d * length > 2**26:
            common.skip("more than 2^26 elements: twelve tensors of them do not fit a small machine")

    def track_over_limit(self, kind, batch, d, length, n):
        inputs = common.scan_inputs(batch, d, length, n)
        seconds = {"forward": [], "backward": []}
        leaves = {name: t.requires_grad_(kind == "backward") for name, t in inputs.items()}
        grad = common.randn(batch, d, length, seed=5)
        selective_scan = common.require("projecta", "selective_scan")
        for _ in range(7):
            start = common.Suite.timer()
            y = selective_scan(**leaves, delta_softplus=True, backend="cpu")
            seconds["forward"].append(common.Suite.timer() - start)
            if kind == "backward":
                start = common.Suite.timer()
                torch.autograd.grad(y, list(leaves.values()), grad)
                seconds["backward"].append(common.Suite.timer() - start)
        operations = batch * d * length * n / 16 * OPERATIONS[kind]
        limit = operations * _seconds_per_vector_operation() / torch.get_num_threads()
        return statistics.median(seconds[kind]) / limit


@functools.cache
def _seconds_per_vector_operation() -> float:
    """16 float32 lanes on one core: twelve independent chains of fused multiply-adds, best of five runs."""
    numba = importlib.import_module("numba")
    load, store, fma = (
        common.require("projecta._cpu.simd", name, formerly="projecta.scan.cpu.simd")
        for name in ("load", "store", "fma")
    )
    width = 16

    @numba.njit
    def chains(tile, rounds):
        x = load(tile, 0)
        a, b, c, d, e, f = (x, x, x, x, x, x)
        g, h, i, j, k, l = (x, x, x, x, x, x)
        for _ in range(rounds):
            a, b, c, d = fma(a, x, a), fma(b, x, b), fma(c, x, c), fma(d, x, d)
            e, f, g, h = fma(e, x, e), fma(f, x, f), fma(g, x, g), fma(h, x, h)
            i, j, k, l = fma(i, x, i), fma(j, x, j), fma(k, x, k), fma(l, x, l)
        store(tile, width, a + b + c + d + e + f + g + h + i + j + k + l)

    tile, rounds, best = torch.zeros(2 * width).numpy(), 3_000_000, float("inf")
    chains(tile, 1)
    for _ in range(5):
        start = common.Suite.timer()
        chains(tile, rounds)
        best = min(best, common.Suite.timer() - start)
    return best / (12 * rounds)


class Step(common.Suite):
    """Decoding 64 tokens, one call of `selective_state_update` each, d = 1536."""

    params = (BACKENDS,)
    param_names = ("backend",)
    version = VERSION

    def setup(self, backend):
        _steps(backend, 1536)

    def time_64_steps(self, backend):
        _steps(backend, 1536)()


class _Long(common.Suite):
    """The width of mamba-130m, up to 65,536 steps."""

    params = (("vectorised", "cpu", "triton"), common.LONG_LENGTHS)
    param_names = ("backend", "length")
    version = VERSION
    timeout = 1200
    d = 1536


class FullScanReference(_Forward):
    """The loop over time at longer sequences."""

    params = (("reference",), common.PEAK_LENGTHS)

    def setup(self, backend, length):
        common.require_full()
        _scan(backend, length, self.d, backward=True)
        _scan(backend, length, self.d, backward=False)

    def time_forward(self, backend, length):
        _scan(backend, length, self.d, backward=False)()

    def time_forward_backward(self, backend, length):
        _scan(backend, length, self.d, backward=True)()


class FullScan(_Long):
    def setup(self, backend, length):
        common.require_full()
        _scan(backend, length, self.d, backward=False)

    def time_forward(self, backend, length):
        _scan(backend, length, self.d, backward=False)()


class FullScanPeak(_Long):
    def setup(self, backend, length):
        common.require_full()
        common.return_freed_memory()
        _scan(backend, length, self.d, backward=False)

    def track_peak_forward(self, backend, length):
        return common.peak_mib(_scan(backend, length, self.d, backward=False))
