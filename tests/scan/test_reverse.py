"""reverse=True has the bits of the scan of flipped tensors: outputs, last states and every gradient."""

import functools
from unittest import mock

import pytest
import torch

from projecta import selective_scan
from tests.cases import make_scan
from tests.scan.test_triton import MODES, plan_of

BOUNDS = [0, 5, 5, 70, 150]
CASES = {
    "time contiguous": {},
    "channels contiguous": {"order": "bld"},
    "bfloat16": {"dtype": torch.bfloat16},
    "constant B": {"constant": "B"},
    "groups": {"g": 2},
    "complex": {"complex_A": True},
    "packed": {"b": 1, "packed": True},
    "few steps": {"l": 3},
    "no steps": {"l": 0},
    "words": {"l": 152},
    "words of bfloat16": {"l": 152, "dtype": torch.bfloat16},
}
# Of backend "triton", whose interpreter is slow: fewer channels, states and steps.
SMALL = {"d": 4, "n": 2, "l": 21}
ON_TRITON = {
    **{
        name: SMALL | case | {"l": min(case.get("l", 21), 24)}
        for name, case in CASES.items()
        if name != "complex"
    },
    "whole blocks": SMALL | {"l": 32},
    "constant B and C": SMALL | {"constant": "BC"},
    "saved every 16 steps": SMALL | {"every": 16},
}
IN_CHUNKS = {
    "lanes along time": SMALL,
    "lanes along time, words": SMALL | {"l": 24},
    "lanes along time, B and C in place": SMALL | {"l": 24, "dtype": torch.float16},
    "whole blocks of time": {"b": 1, "d": 2, "n": 2, "l": 512, "dtype": torch.float16, "graded": False},
    "chunks of time": {"b": 1, "d": 2, "n": 1, "l": 76},
}


def _flip(name, t):
    steady = name in ("A", "D", "delta_bias", "initial_state") or t is None or t.dim() == 2
    return t if steady else t.flip(-1)


def _run(inputs, backend, reverse, bounds, every):
    leaves = {k: None if t is None else t.detach().requires_grad_() for k, t in inputs.items()}
    y, last = selective_scan(
        **leaves, delta_softplus=True, return_last_state=True, cu_seqlens=bounds, reverse=reverse,
        backend=backend, save_every=every,
    )  # fmt: skip
    torch.manual_seed(1)
    grad_y, grad_last = torch.randn_like(y), torch.randn_like(last)
    if reverse:
        grad_y = grad_y.flip(-1)
        grad_last = grad_last if bounds is None else grad_last.flip(0)
    present = {k: t for k, t in leaves.items() if t is not None}
    grads = torch.autograd.grad([y, last], [*present.values()], [grad_y, grad_last], allow_unused=True)
    return y, last, dict(zip(present, grads, strict=True))


def _compare(on, l=150, packed=False, order="bdl", every=8, graded=True, **options):
    options, bounds = {"b": 2, "d": 24, "l": l, "n": 5} | options, None
    if packed:
        bounds = [min(t, l) for t in BOUNDS]
    inputs = make_scan(**options, packed=bounds)
    bounds = inputs.pop("cu_seqlens", None)
    if inputs["A"].is_complex():
        for k in "BC":
            inputs[k] = torch.view_as_complex(inputs[k].unflatten(-1, (l, 2)).contiguous())
    if order == "bld":
        for k in ("u", "delta", "z"):
            inputs[k] = inputs[k].transpose(1, 2).contiguous().transpose(1, 2)
    flipped = {k: _flip(k, t) for k, t in inputs.items()}
    mirrored = None if bounds is None else (l - bounds).flip(0)
    if packed:
        flipped["initial_state"] = inputs["initial_state"].flip(0)
    plain = selective_scan(**flipped, delta_softplus=True, cu_seqlens=mirrored, backend=on).flip(-1)
    options = {"delta_softplus": True, "cu_seqlens": bounds, "reverse": True, "backend": on}
    assert torch.equal(selective_scan(**inputs, **options), plain)
    if not graded:
        return
    y, last, grads = _run(inputs, on, True, bounds, every)
    wanted, wanted_last, wanted_grads = _run(flipped, on, False, mirrored, every)
    assert torch.equal(y, wanted.flip(-1))
    assert torch.equal(last, wanted_last.flip(0) if packed else wanted_last)
    for name, grad in grads.items():
        other = wanted_grads[name]
        if other is None:
            assert grad is None
            continue
        other = other.flip(0) if packed and name == "initial_state" else _flip(name, other)
        assert torch.equal(grad, other), name


@pytest.mark.parametrize("on", ["reference", "vectorised", "cpu"])
@pytest.mark.parametrize("case", CASES)
def test_it_has_the_bits_of_flipped_tensors(case, on):
    options = CASES[case]
    _compare(on, **(options | {"l": min(options.get("l", 150), 10)} if on == "reference" else options))


def _compare_on_triton(options, mode):
    from projecta._triton import launch
    from projecta.scan import _eager
    from projecta.scan.triton import layout

    with (
        mock.patch.object(layout, "plan", functools.partial(plan_of, mode)),
        mock.patch.dict(launch._known, clear=True),
        mock.patch.dict(_eager._calls, clear=True),
    ):
        _compare("triton", **options)


@pytest.mark.parametrize("case", ON_TRITON | IN_CHUNKS)
def test_it_has_the_bits_of_flipped_tensors_on_triton(interpreter, case):
    mode, table = (MODES[1], IN_CHUNKS) if case in IN_CHUNKS else (MODES[0], ON_TRITON)
    interpreter.submit(_compare_on_triton, table[case], mode).result(timeout=300)


def test_it_ends_at_the_first_step():
    inputs = make_scan(b=1, d=3, l=6, n=2, without=["initial_state"])
    y, last = selective_scan(**inputs, reverse=True, return_last_state=True)
    part = {k: v if v is None or v.dim() < 3 else v[..., 3:] for k, v in inputs.items()}
    _, middle = selective_scan(**part, reverse=True, return_last_state=True)
    rest = {k: v if v is None or v.dim() < 3 else v[..., :3] for k, v in inputs.items()}
    y_rest, first = selective_scan(**rest, initial_state=middle, reverse=True, return_last_state=True)
    assert torch.allclose(y[..., :3], y_rest, atol=1e-6)
    assert torch.allclose(last, first, atol=1e-6)
