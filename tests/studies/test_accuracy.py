"""The tasks: answers follow from the tokens, and a model trains on a task with every scan."""

import pytest
import torch

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
    train, test = (accuracy._sources()[i] for i in (False, True))
    assert len(train) > len(test) > 10_000


def test_digits_are_apart_and_labelled():
    pytest.importorskip("sklearn")
    ids, answers = drawn("sequential digits")
    assert ids.shape == (8, 65)
    assert ((answers[:, -1] >= 0) & (answers[:, -1] < 10)).all()


@pytest.mark.parametrize("mrss", [None, 0.5])
def test_a_model_learns_and_is_judged(mrss):
    model, handle = accuracy.train("associative recall", seed=0, mrss=mrss, steps=30)
    assert handle.layers == accuracy.LAYERS
    loss = accuracy._loss(model, *drawn("associative recall", 64)).item()
    fresh = accuracy._loss(
        accuracy.build(accuracy.TASKS["associative recall"], 0), *drawn("associative recall", 64)
    ).item()
    assert loss < fresh
    assert 0 <= accuracy.judge("associative recall", model, 256) <= 100


def test_the_table_and_the_chart(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "TASKS", {"associative recall": accuracy.TASKS["associative recall"]})
    monkeypatch.setattr(accuracy, "SEEDS", (0, 1))
    monkeypatch.setattr(
        accuracy, "compare", lambda name, seed: {"full": 90.0 + seed, "trained, theta 0.5": 89.5}
    )
    monkeypatch.setattr("sys.argv", ["tasks", str(tmp_path)])
    accuracy.main()
    text = (tmp_path / "mrss_accuracy.csv").read_text().splitlines()
    assert text[2] == 'associative recall,"trained, theta 0.5",per cent right,2,89.500,-1.000,-1.500,-0.500'
    assert (tmp_path / "mrss_accuracy.png").stat().st_size > 5000
