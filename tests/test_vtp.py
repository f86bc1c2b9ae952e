"""Selecting tokens, without any model."""

import math

import pytest
import torch

from projecta.vtp import SCORES, Plan, select_tokens


@pytest.mark.parametrize(("keep", "kept"), [(1.0, 197), (0.7, 139), (0.5, 99), (0.001, 2)])
def test_token_counts_of_vit_b16(keep, kept):
    assert Plan(keep=keep).tokens_kept(197) == kept


def test_counts_are_exact_where_floats_are_not():
    for patches in range(1, 300):
        for tenth in range(1, 11):
            assert Plan(keep=tenth / 10).tokens_kept(patches + 1) == 1 + math.ceil(
                tenth * patches / 10 - 1e-12
            )


def test_rounding_up_to_a_multiple():
    assert Plan(keep=0.5, multiple_of=8).tokens_kept(197) == 104
    assert Plan(keep=1.0, multiple_of=8).tokens_kept(197) == 197


@pytest.mark.parametrize("score", SCORES)
def test_prefix_stays_and_order_is_kept(score):
    tokens = torch.randn(3, 21, 8)
    tokens[:, 0] = 0
    kept, index = Plan(keep=0.5, score=score).apply(tokens)
    assert kept.shape == (3, 11, 8)
    assert index[:, 0].eq(0).all()
    assert (index.diff(dim=1) > 0).all()
    assert torch.equal(kept, torch.stack([row[i] for row, i in zip(tokens, index, strict=True)]))


def test_norm_keeps_the_longest():
    tokens = torch.randn(2, 17, 8)
    _, index = Plan(keep=0.25).apply(tokens)
    lengths = tokens[:, 1:].norm(dim=-1)
    for row, chosen in zip(lengths, index[:, 1:] - 1, strict=True):
        left = torch.ones(16, dtype=torch.bool).index_fill(0, chosen, False)
        assert row[chosen].min() >= row[left].max()


def test_norm_in_half_precision_does_not_overflow():
    tokens = torch.full((1, 5, 64), 1e4).half()
    tokens[0, 3] *= 2
    assert Plan(keep=0.25).apply(tokens)[1].tolist() == [[0, 3]]


def test_permuting_the_patches_permutes_the_choice():
    tokens, order = torch.randn(1, 13, 4), torch.randperm(12) + 1
    _, index = Plan(keep=0.5).apply(tokens)
    _, turned = Plan(keep=0.5).apply(torch.cat([tokens[:, :1], tokens[:, order]], 1))
    assert set(order[turned[0, 1:] - 1].tolist()) == set(index[0, 1:].tolist())


@pytest.mark.parametrize("score", SCORES)
def test_a_row_alone_is_the_row_in_its_batch(score):
    tokens = torch.randn(4, 33, 8)
    plan = Plan(keep=0.3, score=score)
    for i in range(4):
        assert torch.equal(plan.apply(tokens[i : i + 1])[1], plan.apply(tokens)[1][i : i + 1])


def test_random_follows_its_seed():
    tokens = torch.randn(1, 101, 4)
    first, again, other = (Plan(score="random", seed=seed).apply(tokens)[1] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_keeping_all_returns_the_tensor_itself():
    tokens = torch.randn(2, 5, 4)
    assert Plan(keep=1.0).apply(tokens)[0] is tokens


def test_equal_scores_keep_the_first():
    assert select_tokens(torch.zeros(1, 6), 3).tolist() == [[0, 1, 2]]


ERRORS = {
    "keep 0": ({"keep": 0}, ValueError, "keep must lie in (0, 1]; got 0."),
    "keep 1.5": ({"keep": 1.5}, ValueError, "keep must lie in (0, 1]; got 1.5."),
    "keep nan": ({"keep": math.nan}, ValueError, "keep must lie in (0, 1]; got nan."),
    "keep text": ({"keep": "half"}, TypeError, "keep must be a number; got 'half'."),
    "at": ({"at": -1}, ValueError, "at must be at least 0; got -1."),
    "score": ({"score": "magic"}, ValueError, "score must be one of 'norm', 'random'; got 'magic'."),
    "fuse": ({"fuse": "melt"}, ValueError, "fuse must be one of 'drop'; got 'melt'."),
    "multiple_of": ({"multiple_of": 0}, ValueError, "multiple_of must be at least 1; got 0."),
}


@pytest.mark.parametrize("what", ERRORS)
def test_a_wrong_plan_is_named_in_one_line(what):
    changes, error, message = ERRORS[what]
    with pytest.raises(error) as caught:
        Plan(**changes)
    assert str(caught.value) == f"Plan: {message}"
