"""The Mamba block as a whole, and small calls of its parts, whose time is mostly Python's.

"eager" is a plain call, "captured" the replay of a CUDA graph (on a GPU only).
"""

import functools

import torch

from benchmarks import common

WIDTH = 256  # d_model; d_inner is twice that
MODES = ("eager", "captured")
VERSION = common.version(__file__)


def _backend() -> str:
    return "triton" if common.device().type == "cuda" else "cpu"


@functools.cache
@torch.inference_mode(False)  # training needs normal tensors, even if the first call is in inference mode
def _block(double: bool = False):
    """A block with random weights from a fixed seed; `double`: its float64 copy on the reference backend."""
    block_type = common.require("projecta", "MambaBlock")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = block_type(WIDTH, backend=_backend())
    if double:
        block.backend = "reference"
        return block.double()
    return block.to(common.device())


def _call(what: str, block, x: torch.Tensor, grad: torch.Tensor, state):
    """Run one pass; return its result first."""
    if what == "step":
        with torch.inference_mode():
            return (block.step(x[:, 0], state),)
    if what == "forward":
        with torch.no_grad():
            return (block(x),)
    leaves = [x.requires_grad_(), *block.parameters()]
    y = block(x)
    return (y, *torch.autograd.grad(y, leaves, grad))


@functools.cache
def _run(what: str, mode: str, l: int):
    """A call of a pass, checked against the float64 block."""
    if mode == "captured" and common.device().type != "cuda":
        common.skip("there is no CUDA graph on a CPU")
    x, grad = common.randn(1, l, WIDTH, seed=0), common.randn(1, l, WIDTH, seed=1)
    block = _block()
    run = functools.partial(_call, what, block, x, grad, block.initial_state(1))
    if not common.CHECKED:
        _check(what, block, x, grad)
    run()  # compiles what this length needs
    return _captured(run) if mode == "captured" else run


def _check(what: str, block, x: torch.Tensor, grad: torch.Tensor) -> None:
    """Compare a pass over the first tokens with that of the float64 block."""
    truth, l = _block(double=True), x.shape[1]
    short = min(l, 32)  # the block is causal; gradients are checked on the first tokens
    got = _call(what, block, x[:, :short].clone(), grad[:, :short], block.initial_state(1))
    wide = [t[:, :short].detach().cpu().double() for t in (x, grad)]
    wanted = _call(what, truth, *wide, truth.initial_state(1))
    for i, (g, t) in enumerate(zip(got, wanted, strict=True)):
        common.check_close(f"{what} result {i}", g.detach(), t.detach(), 1e-4)


def _captured(run):
    """The replay of a CUDA graph of `run`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()  # the graph's outputs live as long as the call

    def replay():
        graph.replay()
        return kept

    return replay


@functools.cache
def _small(name: str, l: int, backward: bool):
    """A call of the scan (b 1, d 64, n 16) or the convolution (b 1, d 64, k 4)."""
    if name == "scan":
        selective_scan, inputs = common.require("projecta", "selective_scan"), common.scan_inputs(1, 64, l)

        def call(inputs, **options):
            return selective_scan(**inputs, delta_softplus=True, **options)
    else:
        causal_conv = common.require("projecta", "causal_conv")
        inputs = {
            "x": common.randn(1, 64, l, seed=0), "weight": common.randn(64, 4, seed=1),
            "bias": common.randn(64, seed=2),
        }  # fmt: skip

        def call(inputs, **options):
            return causal_conv(**inputs, **options)

    grad = common.randn(1, 64, l, seed=5)

    def run(inputs, grad, backend):
        leaves = {key: t.requires_grad_(backward) for key, t in inputs.items()}
        with torch.set_grad_enabled(backward):
            y = call(leaves, backend=backend)
        return (y, *torch.autograd.grad(y, list(leaves.values()), grad)) if backward else (y,)

    wide = {key: t.detach().cpu().double() for key, t in inputs.items()}
    truth = run(wide, grad.cpu().double(), "reference")
    for i, (g, t) in enumerate(zip(run(inputs, grad, _backend()), truth, strict=True)):
        common.check_close(f"{name} result {i}", g.detach(), t.detach(), 1e-4)
    return functools.partial(run, inputs, grad, _backend())


class _Suite(common.Suite):
    """One layer of width 256, batch 1, float32."""

    params = (MODES, (512,))
    param_names = ("mode", "length")
    version = VERSION


class Block(_Suite):
    def setup(self, mode, length):
        _run("forward", mode, length)

    def time_forward(self, mode, length):
        _run("forward", mode, length)()


class BlockGrad(_Suite):
    """The gradients of the input and of every weight."""

    def setup(self, mode, length):
        _run("forward+backward", mode, length)

    def time_forward_backward(self, mode, length):
        _run("forward+backward", mode, length)()


class BlockStep(_Suite):
    """One token."""

    params = (MODES, (1,))

    def setup(self, mode, length):
        _run("step", mode, length)

    def time_step(self, mode, length):
        _run("step", mode, length)()


class BlockPeak(_Suite):
    params = (("eager",), (2048,))

    def setup(self, mode, length):
        common.return_freed_memory()
        _run("forward+backward", mode, length)

    def track_peak_forward_backward(self, mode, length):
        return common.peak_mib(_run("forward+backward", mode, length))


class _Small(common.Suite):
    """Parts of a block on 64 channels."""

    params = (("convolution", "scan"), (64,))
    param_names = ("part", "length")
    version = VERSION


class SmallCall(_Small):
    def setup(self, part, length):
        _small(part, length, False)

    def time_forward(self, part, length):
        _small(part, length, False)()


class SmallCallGrad(_Small):
    def setup(self, part, length):
        _small(part, length, True)

    def time_forward_backward(self, part, length):
        _small(part, length, True)()
