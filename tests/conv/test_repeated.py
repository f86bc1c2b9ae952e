"""Convolutions as earlier ones were, which are not checked or laid out again."""

import pytest
import torch

from projecta import causal_conv
from projecta.conv import _eager
from tests.cases import widen
from tests.conv.test_conv import CASES, OPTIONS, TOLERANCE, WRONG, W, X, make_conv, run_all

KINDS = [case for case in CASES if "packed" not in case]


@pytest.fixture(autouse=True)
def no_calls(monkeypatch):
    monkeypatch.setattr(_eager, "_calls", {})


@pytest.mark.parametrize("case", KINDS)
def test_a_later_call_computes_its_own_values(case):
    for _ in range(3):
        tensors, options = make_conv(**CASES[case])
        truth = run_all({name: widen(t) for name, t in tensors.items()}, options, "reference")
        limit = TOLERANCE[tensors["x"].dtype]
        for name, t in run_all(tensors, options, "cpu").items():
            scale = float(truth[name].abs().max()) if t.numel() else 1.0
            torch.testing.assert_close(widen(t), truth[name], rtol=0, atol=limit * scale)
    assert len(_eager._calls) == (tensors["x"].numel() > 0 and case != "width 1")  # which has an empty start


def test_any_change_of_a_call_but_its_values_makes_another():
    tensors, _ = make_conv(b=3, d=8, start=True)
    x = tensors["x"]
    shifted = torch.zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)
    changes = [
        {}, {"x": x.mT.contiguous().mT}, {"x": shifted}, {"weight": tensors["weight"].bfloat16()}, {"bias": None},
        {"initial_state": None}, {"weight": tensors["weight"].detach().requires_grad_()}, {"reverse": True},
        {"activation": None}, {"backend": "cpu"},
    ]  # fmt: skip
    for count, change in enumerate(changes, 1):
        first, second = (causal_conv(**tensors | change) for _ in range(2))
        assert len(_eager._calls) == count, change
        truth = causal_conv(**tensors | change | {"backend": "reference"})
        assert torch.equal(first, second)
        torch.testing.assert_close(first, truth, rtol=1e-4, atol=1e-4)
    graded = tensors | changes[6]
    assert causal_conv(**graded).requires_grad
    with torch.no_grad():
        assert not causal_conv(**graded).requires_grad


@pytest.mark.parametrize("message", [*WRONG, *OPTIONS])
def test_errors_are_named_after_a_right_call(message):
    causal_conv(X, W)
    with pytest.raises((ValueError, TypeError)) as error:
        causal_conv(*WRONG.get(message, (X, W)), **OPTIONS.get(message, {}))
    assert str(error.value) == f"causal_conv: {message}."


@pytest.mark.parametrize("given", [["silu"], {"silu"}])
def test_an_activation_that_is_no_name_is_named(given):
    with pytest.raises(
        ValueError, match=r"^causal_conv: activation must be one of 'silu', 'swish', None; got"
    ):
        causal_conv(X, W, activation=given)
