"""The tasks: answers follow from the tokens, and a model trains on a task with every scan."""

import pytest
import torch

from projecta.mrss import BANDS
from studies import accuracy

pytest.importorskip("transformers")


def drawn(name, count=8, test=False):
    return accuracy.TASKS[name].draw(count, torch.Generator().manual_seed(3), test)


def test_copying_asks_for_the_data_in_order():
    ids, answers = drawn("selective copying")
    for row, answer in zip(ids, answers, strict=True):
        assert row[row > 1].tolist() == answer[answer != accuracy.IGNORE].tolist()
        assert (answer[row != 1] == accuracy.IGNORE).all()


@pytest.mark.parametrize("test", [False, True])
def test_induction_asks_what_followed_the_marker(test):
    ids, answers = drawn("induction heads", test=test)
    assert ids.shape[1] == (256 if test else 64)
    for row, answer in zip(ids, answers, strict=True):
        first, last = (row == 0).nonzero()[:, 0].tolist()
        assert last == len(row) - 1
        assert answer[last] == row[first + 1]


def test_recall_asks_for_each_key_s_value():
    ids, answers = drawn("associative recall")
    for row, answer in zip(ids.tolist(), answers.tolist(), strict=True):
        table = dict(zip(row[:12:2], row[1:12:2], strict=True))
        assert [table[key] for key in row[12:]] == answer[12:]


def test_language_asks_for_the_next_byte():
    ids, answers = drawn("language")
    assert torch.equal(ids[:, 1:], answers[:, :-1])
    train, test = (accuracy.library_bytes()[i] for i in (False, True))
    assert len(train) > len(test) > 10_000


def test_digits_are_apart_and_labelled():
    pytest.importorskip("sklearn")
    ids, answers = drawn("sequential digits")
    assert ids.shape == (8, 65)
    assert ((answers[:, -1] >= 0) & (answers[:, -1] < 10)).all()


@pytest.mark.parametrize("mrss", [None, BANDS])
def test_a_model_learns_and_is_judged(mrss):
    model, handle = accuracy.train("associative recall", seed=0, mrss=mrss, steps=30)
    assert handle.layers == accuracy.LAYERS
    loss = accuracy.loss_of(model, *drawn("associative recall", 64)).item()
    fresh = accuracy.loss_of(
        accuracy.build(accuracy.TASKS["associative recall"], 0), *drawn("associative recall", 64)
    ).item()
    assert loss < fresh
    assert 0 <= accuracy.judge("associative recall", model, 256) <= 100


def test_the_results_of_a_seed_are_written_and_not_measured_again(tmp_path):
    names, asked = ["associative recall"], []

    def compare(name, seed):
        asked.append((name, seed))
        return {"full": 90.0 + seed, "half per 8": 89.5}

    accuracy.write_results(tmp_path, names, (0,), compare)
    accuracy.write_results(tmp_path, names, (0, 1), compare)
    assert asked == [("associative recall", 0), ("associative recall", 1)]
    text = (tmp_path / "mrss_accuracy.csv").read_text().splitlines()
    assert text[2] == "associative recall,half per 8,per cent right,2,89.500,-1.000,-1.500,-0.500"
    assert (tmp_path / "mrss_accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_the_chart_has_a_panel_for_each_task_and_a_dot_for_each_seed():
    figure = accuracy.draw_chart([
        ("associative recall", "full", [90.0, 91.0, 92.0]), ("associative recall", "trained", [89.5, 91.5, 92.0]),
        ("language", "full", [2.0, 2.5, 3.0]), ("language", "trained", [2.25, 2.5, 4.0]),
    ])  # fmt: skip
    found = {axis.get_title(): axis for axis in figure.axes}
    assert {name: axis.get_xlabel() for name, axis in found.items()} == {
        "associative recall": "change, per cent right", "language": "change, bits per byte",
    }  # fmt: skip
    changes = {"associative recall": [-0.5, 0.5, 0.0], "language": [0.25, 0.0, 1.0]}
    for name, axis in found.items():
        assert [text.get_text() for text in axis.get_yticklabels()] == ["full", "trained"]
        full, trained, zero = axis.lines
        assert (list(full.get_xdata()), list(full.get_ydata())) == ([0.0] * 3, [0] * 3)
        assert (list(trained.get_xdata()), list(trained.get_ydata())) == (changes[name], [1] * 3)
        assert set(zero.get_xdata()) == {0}
