"""Calls on tensors of the CPU where new tensors are made elsewhere, as after torch.set_default_device("cuda")."""

import pytest
import torch

from projecta import causal_conv, mrss_scan, selective_scan, selective_state_update
from projecta.conv import _eager as conv_calls
from projecta.mamba import MambaBlock
from projecta.mrss import BANDS, MrssState, mrss_update
from projecta.s4d import s4d_scan
from projecta.scan import _eager as scan_calls
from projecta.vision_mamba import VisionMambaConfig, VisionMambaModel
from projecta.vtp import Plan, prune
from tests.cases import make_scan, run_with_gradients

ON = ("reference", "vectorised", "cpu")
PACKED = {"b": 1, "packed": [0, 5, 33], "without": ("initial_state",)}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "image_size": 32, "patch_size": 8}


def scan(function, options, backend):
    arguments = make_scan(**options)
    return lambda: run_with_gradients(function, arguments, backend=backend).values()


def step():
    a = make_scan(l=1)
    u, delta, B, C = (a[name][..., 0] for name in ("u", "delta", "B", "C"))

    def run():
        state, other = a["initial_state"].clone(), MrssState.start(a["initial_state"])
        y = selective_state_update(state, u, delta, a["A"], B, C)
        return state, y, mrss_update(other, u, delta, a["A"], B, C)[0]

    return run


def convolution():
    x, weight = make_scan()["u"].requires_grad_(), torch.ones(4, 3, requires_grad=True)

    def run():
        y, last = causal_conv(x, weight, return_last_state=True)
        return y, last, *torch.autograd.grad(y.sum(), (x, weight))

    return run


def s4d():
    a = make_scan()
    return lambda: [s4d_scan(a["u"], a["delta"][0, :, 0].exp(), a["A"], a["A"])]


def block(**options):
    model, x = MambaBlock(16, **options), torch.randn(2, 9, 16)
    return lambda: (model(x), *torch.autograd.grad(model(x).sum(), list(model.parameters())))


def tower(**plan):
    model, image = (
        VisionMambaModel(VisionMambaConfig(directions=4, **SIZES)).eval(),
        torch.randn(1, 3, 32, 32),
    )

    def run():
        with prune(model, Plan(keep=0.5, **plan)):
            return [model(image).last_hidden_state]

    return run


CALLS = {
    **{f"scan, {on}": lambda on=on: scan(selective_scan, {}, on) for on in ON},
    **{f"MRSS, {on}": lambda on=on: scan(mrss_scan, {}, on) for on in ON},
    "step": step,
    "convolution": convolution,
    "packed": lambda: scan(selective_scan, PACKED, "cpu"),
    "packed MRSS": lambda: scan(mrss_scan, PACKED, "cpu"),
    "complex": lambda: scan(selective_scan, {"complex_A": True}, "cpu"),
    "S4D": s4d,
    "block": block,
    "bidirectional block": lambda: block(bidirectional=True),
    "MRSS block": lambda: block(mrss=BANDS),
    "pruned tower": lambda: tower(score="grid"),
    "merged tower": lambda: tower(fuse="checkerboard", unmerge=True),
    "steps of missing tokens": lambda: tower(score="delta", fuse="squeeze", forget=True),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_stay_on_the_cpu(name, monkeypatch):
    torch.manual_seed(0)
    call = CALLS[name]()
    wanted = call()
    monkeypatch.setattr(scan_calls, "_calls", {})
    monkeypatch.setattr(conv_calls, "_calls", {})
    with torch.device("meta"):
        found = call()
    for got, value in zip(found, wanted, strict=True):
        assert torch.equal(got, value)
