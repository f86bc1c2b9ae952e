"""The gates' own rate of error: kept, counted on the same code, with Wilson's bounds."""

import json

import pytest

from projecta.regress.gate import record
from projecta.regress.gate.statistics import INCONCLUSIVE, PASS, REGRESSED
from projecta.regress.store.journal import Gate
from tests.regress import foreign
from tests.regress.foreign import commit, run

SUITE = """
    def track_size():
        return 3.0
"""
SAME = {"base": "x", "head": "x"}


@pytest.mark.parametrize(
    ("gate", "counts"),
    [
        (Gate("a", "a", {}, PASS, [PASS], 1.0), True),
        (Gate("a", "b", SAME, PASS, [PASS], 1.0), True),
        (Gate("a", "b", {"base": "x", "head": "y"}, PASS, [PASS], 1.0), False),
        (Gate("a", "b", {"base": "", "head": ""}, PASS, [PASS], 1.0), False),  # contents that are not known
        (Gate("a", "b", SAME, PASS, [], 0.1), False),  # nothing was measured
    ],
)
def test_only_measured_gates_of_the_same_code_count(gate, counts):
    assert record.same_code(gate) is counts
    assert bool(record.rates([gate])) is counts


def test_rates_have_the_published_bounds():
    gates = [Gate("a", "b", SAME, PASS, [PASS, PASS], 1.0) for _ in range(8)]
    gates.append(Gate("a", "b", SAME, REGRESSED, [REGRESSED, PASS], 1.0))
    gates.append(Gate("a", "b", SAME, INCONCLUSIVE, [INCONCLUSIVE, PASS], 1.0))
    gates.append(Gate("a", "b", {}, REGRESSED, [REGRESSED], 1.0))  # other code
    found = {rate.what: rate for rate in record.rates(gates)}
    wrong = found["gates REGRESSED"]
    assert (wrong.count, wrong.of) == (1, 10)
    assert (wrong.low, wrong.high) == (0.0179, 0.4042)  # Wilson's interval for 1 of 10
    assert (found["benchmarks REGRESSED"].count, found["benchmarks REGRESSED"].of) == (1, 20)
    assert found["benchmarks INCONCLUSIVE"].count == 1


def test_gates_are_kept_and_reported(workplace):
    foreign.make(workplace, SUITE)
    commit(workplace, "one")
    commit(workplace, "two")
    code, text = run("gate", "--report")
    assert code == 0
    assert "Gates on this machine: none." in text
    assert "`projecta gate HEAD HEAD --always` does" in " ".join(text.split())
    assert run("gate", "HEAD", "HEAD", "--bench", "size")[0] == 0  # identical: measures nothing
    assert run("gate", "HEAD", "HEAD", "--bench", "size", "--always")[0] == 0
    code, text = run("gate", "--report")
    assert code == 0
    assert "Gates on this machine: 2 PASS." in text
    assert "gates REGRESSED" in text
    assert "0 of 1" in text
    assert run("gate", "HEAD", "HEAD")[0] == 0
    assert not list(workplace.glob(".asv/results/*/last.gate"))  # the page's verdict is one on a change
    (path,) = workplace.glob(".asv/results/*/gates.rates")
    assert [rate["of"] for rate in json.loads(path.read_text())][:2] == [1, 1]
    code, text = run("gate")
    assert (code, text) == (2, "projecta gate: BASE must be given, without --report; got nothing.\n")
