"""Histories with known steps, and how a judge of them is judged."""

import csv

import pytest

from studies import histories


def test_each_kind_has_its_steps():
    made = histories.make_histories(each=4)
    assert {h.kind for h in made} == set(histories.KINDS)
    for history in made:
        assert len(history.values) == histories.LENGTH
        assert (len(history.parts) == 2) == (history.kind == "two machines")
        expected = {"step that goes away": 2, "two machines": 1}.get(history.kind, "step of" in history.kind)
        assert len(history.steps) == expected


def test_each_true_step_counts_once():
    assert histories.matched([10, 11, 30], [12, 50]) == [12]
    assert histories.matched([10, 11], [9, 12]) == [9, 12]


def test_a_judge_is_right_where_the_steps_are_large(monkeypatch):
    large = [h for h in histories.make_histories(each=5) if h.kind == "step of 10 %"]
    kind, whole = histories.judge("projecta", large)
    assert kind[3:6] == [5, 5, 5]
    assert whole[6:8] == ["1.000", "1.000"]
    monkeypatch.setitem(histories.JUDGES, "blind", lambda history: [])
    assert histories.judge("blind", large)[0][4:8] == [0, 0, "", "0.000"]


def test_series_of_others_are_judged(tmp_path):
    with (tmp_path / "mine.csv").open("w", newline="") as file:
        values = [1.0 + 0.001 * (i % 7) + 0.2 * (i >= 12) + 1.0 * (i >= 24) for i in range(40)]
        rows = [[v, int(i == 12), "a" if i < 24 else "b"] for i, v in enumerate(values)]
        csv.writer(file).writerows([["value", "step", "state"], *rows])
    (history,) = histories.read_histories(tmp_path)
    assert history.steps == [12]
    assert histories.by_projecta(history) == [12]  # at 24 the machine changed
    assert [first for first, _ in history.parts] == [0, 24]
    assert histories.by_asv(history) == [12]


def test_otava_is_asked_by_its_own_code():
    pytest.importorskip("otava")
    (history,) = (h for h in histories.make_histories(each=1) if h.kind == "step of 10 %")
    assert any(abs(place - history.steps[0]) <= 2 for place in histories.by_otava(history))
