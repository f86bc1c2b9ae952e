"""Calls as earlier ones were, which are not checked or laid out again, on the CPU."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from projecta import selective_scan
from projecta._calls import call_key
from projecta.scan import _eager
from tests.cases import make_scan, run_with_gradients, widen
from tests.scan.test_scan import CASES, ERRORS, TOLERANCE, assert_close

KINDS = ("length 33", "40 channels of 5 states", "two groups", "constant B, grouped C", "complex", "no options",
         "float64", "bfloat16")  # fmt: skip


@pytest.fixture(autouse=True)
def no_calls(monkeypatch):
    monkeypatch.setattr(_eager, "_calls", {})


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", KINDS)
def test_a_later_call_computes_its_own_values(case, reverse):
    options = {"backend": "cpu", "reverse": reverse}
    for _ in range(3):
        arguments = make_scan(**CASES[case])
        truth = run_with_gradients(
            selective_scan, {n: widen(t) for n, t in arguments.items()}, backend="reference", reverse=reverse
        )
        found = run_with_gradients(selective_scan, arguments, **options)
        assert_close(found, truth, TOLERANCE[arguments["u"].dtype])
    expected = 0 if case == "complex" else 1  # whose interleaved B and C become others
    assert len(_eager._calls) == expected


def test_the_outputs_of_a_later_call_are_tensors_of_their_own():
    arguments = make_scan()
    with torch.no_grad():
        y, last = selective_scan(**arguments, return_last_state=True)
        kept = y.clone(), last.clone()
        again = selective_scan(**make_scan(), return_last_state=True)
    assert torch.equal(y, kept[0])
    assert torch.equal(last, kept[1])
    assert again[0].data_ptr() != y.data_ptr()


@pytest.mark.parametrize("what", ERRORS)
def test_a_wrong_argument_is_named_after_a_right_call(what):
    arguments = make_scan()
    selective_scan(**arguments)
    changes, error, message = ERRORS[what]
    with pytest.raises(error) as caught:
        selective_scan(**arguments | changes)
    assert str(caught.value) == f"selective_scan: {message}"


def test_any_change_of_a_call_but_its_values_makes_another():
    arguments = make_scan(b=3, d=8)
    arguments |= {name: arguments[name].abs() for name in ("delta", "delta_bias")}
    u, grouped = arguments["u"], {n: arguments[n][:, None].expand(3, 2, 3, 33) for n in "BC"}
    shifted = torch.zeros(u.numel() + 1)[1:].view(u.shape).copy_(u)
    changes = [
        {}, {"u": u.mT.contiguous().mT}, {"u": shifted}, {"D": arguments["D"].half()}, {"z": None},
        grouped, {"A": arguments["A"].detach().requires_grad_()},
        {"delta_softplus": True}, {"reverse": True}, {"backend": "cpu"}, {"save_every": 16},
    ]  # fmt: skip
    for count, change in enumerate(changes, 1):
        first, second = (selective_scan(**arguments | change) for _ in range(2))
        assert len(_eager._calls) == count, change
        truth = selective_scan(**arguments | change | {"backend": "vectorised"})
        assert torch.equal(first, second)
        torch.testing.assert_close(first, truth, rtol=1e-4, atol=1e-4)
    graded = arguments | changes[6]
    assert selective_scan(**graded).requires_grad
    with torch.no_grad():
        assert not selective_scan(**graded).requires_grad
        # nothing is saved then
        assert call_key([*graded.values()], ()) == call_key([*arguments.values()], ())
    assert call_key([*graded.values()], ()) != call_key([*arguments.values()], ())


@pytest.mark.parametrize("given", [[8], 9, None])
def test_a_value_that_is_no_number_of_steps_is_named(given):
    with pytest.raises(ValueError, match=r"^selective_scan: save_every must be one of 8, 16, 32; got"):
        selective_scan(**make_scan(), save_every=given)


def test_lazily_conjugated_and_negated_tensors_are_not_taken_for_plain_ones():
    arguments = make_scan(complex_A=True, constant="BC")
    arguments["delta_softplus"] = True
    selective_scan(**arguments)
    for name in ("A", "B", "C"):
        changed = arguments | {name: arguments[name].conj()}
        resolved = arguments | {name: arguments[name].conj().resolve_conj()}
        assert torch.equal(selective_scan(**changed), selective_scan(**resolved))
    u = torch.complex(arguments["u"], arguments["u"]).conj().imag  # lazily negated
    assert torch.equal(
        selective_scan(**arguments | {"u": u}), selective_scan(**arguments | {"u": u.resolve_neg()})
    )


def test_threads_with_the_same_kind_of_call_do_not_mix():
    calls = [make_scan(b=1, d=8, l=40) for _ in range(4)]
    alone = [run_with_gradients(selective_scan, a, backend="cpu") for a in calls]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            found = list(pool.map(lambda a: run_with_gradients(selective_scan, a, backend="cpu"), calls))
            for got, truth in zip(found, alone, strict=True):
                assert all(torch.equal(got[name], truth[name]) for name in truth)
