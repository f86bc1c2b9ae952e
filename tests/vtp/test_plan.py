"""Selecting tokens, without any model."""

import math

import pytest
import torch

from projecta.vtp import FUSIONS, SCORES, VIT_B16, Plan, attention_scores


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
    kept, index, _, _ = Plan(keep=0.5, score=score).apply(tokens, grid=(4, 5))
    assert kept.shape == (3, 11, 8)
    assert index[:, 0].eq(0).all()
    assert (index.diff(dim=1) > 0).all()
    assert torch.equal(kept, torch.stack([row[i] for row, i in zip(tokens, index, strict=True)]))


def test_norm_keeps_the_longest():
    tokens = torch.randn(2, 17, 8)
    index = Plan(keep=0.25).apply(tokens).kept
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
    index = Plan(keep=0.5).apply(tokens).kept
    turned = Plan(keep=0.5).apply(torch.cat([tokens[:, :1], tokens[:, order]], 1)).kept
    assert set(order[turned[0, 1:] - 1].tolist()) == set(index[0, 1:].tolist())


@pytest.mark.parametrize("fuse", FUSIONS)
@pytest.mark.parametrize("score", SCORES)
def test_a_row_alone_is_the_row_in_its_batch(score, fuse):
    tokens = torch.randn(4, 33, 8, dtype=torch.float64)
    plan = Plan(keep=0.3, score=score, fuse=fuse)
    for i in range(4):
        alone, together = (plan.apply(t, grid=(4, 8)) for t in (tokens[i : i + 1], tokens))
        for one, all in zip(alone, together, strict=True):
            torch.testing.assert_close(one, all[i : i + 1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("fuse", FUSIONS)
def test_fusion_is_the_weighted_mean_of_the_merged_tokens(fuse, keep):
    tokens = torch.randn(2, 26, 5, dtype=torch.float64)
    mass = torch.rand(2, 26, dtype=torch.float64) + 0.5
    fused, kept, masses, owner = Plan(keep=keep, fuse=fuse, centres=3).apply(tokens, mass=mass)
    assert fused.shape[1] == Plan(keep=keep).tokens_kept(26)  # the same budget for all
    assert (kept.diff(dim=1) > 0).all()
    for row in range(2):
        for place in range(fused.shape[1]):
            own = owner[row] == place
            assert own[kept[row, place]]
            torch.testing.assert_close(masses[row, place], mass[row, own].sum())
            truth = (tokens[row, own] * mass[row, own, None]).sum(0) / mass[row, own].sum()
            torch.testing.assert_close(fused[row, place], truth)
        assert owner[row, 0] == 0
        assert (owner[row] == 0).sum() == 1  # nothing is merged into the class token
    if fuse == "drop":
        assert (owner >= 0).sum() == fused.shape[1] * 2
    else:
        torch.testing.assert_close(masses.sum(1), mass.sum(1))  # nothing is lost
    takers = ((masses - mass.gather(1, kept)) > 1e-9).sum(1)
    assert (takers <= {"drop": 0, "mean": 1, "cluster": 3}.get(fuse, 99)).all()


@pytest.mark.parametrize("fuse", ["mean", "cluster", "squeeze"])
def test_permuting_the_patches_permutes_the_fusion(fuse):
    tokens, order = torch.randn(1, 21, 4, dtype=torch.float64), torch.randperm(20) + 1
    plan = Plan(keep=0.4, fuse=fuse)
    one, two = plan.apply(tokens), plan.apply(torch.cat([tokens[:, :1], tokens[:, order]], 1))
    where = {int(order[k - 1]): i + 1 for i, k in enumerate(two.kept[0, 1:].tolist())}
    for i, k in enumerate(one.kept[0, 1:].tolist()):
        torch.testing.assert_close(one.tokens[0, i + 1], two.tokens[0, where[k]])


def test_squeeze_joins_the_nearest():
    tokens = torch.tensor([[[9.0, 9.0], [5.0, 0.0], [0.0, 4.0], [1.0, 0.1], [0.1, 1.0]]])
    assert Plan(keep=0.5, fuse="squeeze").apply(tokens).owner.tolist() == [[0, 1, 2, 1, 2]]


def test_bipartite_merges_the_most_similar_pair():
    tokens = torch.tensor([[[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.0, 2.0]]])
    pruned = Plan(keep=0.75, fuse="bipartite").apply(tokens)
    assert pruned.owner.tolist() == [[0, 1, 2, 2, 3]]


def test_checkerboard_merges_black_patches_into_white_ones():
    torch.manual_seed(0)
    pruned = Plan(keep=0.5, fuse="checkerboard").apply(torch.randn(2, 25, 4), prefix=0, grid=(5, 5))
    colour = torch.arange(25) % 2  # of a board of odd width
    for owner, kept in zip(pruned.owner, pruned.kept, strict=True):
        moved = kept[owner] != torch.arange(25)
        assert moved.sum() == 12
        assert (colour[moved] == 0).all()
        assert (colour[kept[owner[moved]]] == 1).all()
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.5, 1.0], [1.0, 0.5], [0.0, 1.0], [1.0, 0.0]]])
    merged = Plan(keep=0.8, fuse="checkerboard").apply(tokens, prefix=0, grid=(2, 3))
    assert merged.owner.tolist() == [[4, 0, 1, 2, 3, 4]]
    white = [1, 3, 4, 6, 9, 11, 12, 14]  # of a board of 4 x 4; in a second round all patches are white
    kept = Plan(keep=0.3, fuse="checkerboard").apply(torch.randn(1, 16, 4), prefix=0).kept[0].tolist()
    assert len(kept) == 5
    assert set(white[4:]) < set(kept) < set(white)
    with pytest.raises(
        ValueError, match=r"^Plan\.apply: grid must be given for fuse 'checkerboard' of patches"
    ):
        Plan(fuse="checkerboard").apply(tokens, prefix=0)


def test_the_grid_is_a_checkerboard_at_one_half():
    kept = Plan(keep=0.5, score="grid").apply(torch.zeros(1, 197, 2)).kept[0, 1:] - 1
    rows, columns = kept // 14, kept % 14
    assert ((rows + columns) % 2).unique().numel() == 1
    assert len(kept) == 98


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.7])
def test_the_grid_is_even(keep):
    kept = Plan(keep=keep, score="grid").apply(torch.zeros(1, 257, 2)).kept[0, 1:] - 1
    quarters = (kept // 16 // 8) * 2 + kept % 16 // 8
    counts = torch.bincount(quarters, minlength=4)
    assert counts.max() - counts.min() <= 1


def test_attention_scores_agree_with_the_formula():
    query, keys, values = torch.randn(2, 3, 1, 4), torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4)
    mass = torch.rand(2, 6) + 0.5
    weights = torch.einsum("bhqe,bhte->bhqt", query, keys).mul(0.5).exp() * mass[:, None, None]
    weights = (weights / weights.sum(-1, keepdim=True))[:, :, 0]
    got = attention_scores(query, keys, 0.5, mass=mass)
    torch.testing.assert_close(got, weights.mean(1)[:, 1:])
    got = attention_scores(query, keys, 0.5, mass=mass, values=values)
    torch.testing.assert_close(got, (weights * values.norm(dim=-1)).mean(1)[:, 1:])


def test_a_function_scores():
    tokens = torch.randn(1, 9, 3)
    assert Plan(keep=0.25, score=lambda x: x[..., 0]).apply(tokens).kept[0, 1:].tolist() == sorted(
        (tokens[0, 1:, 0].topk(2).indices + 1).tolist()
    )


def test_schedules_of_the_three_semantics():
    assert Plan(keep=0.5, at=4).schedule(197, 12) == (197,) * 4 + (99,) * 8
    tokens = Plan(keep=0.5, at=(3, 6, 9)).schedule(197, 12)
    assert (tokens[0], tokens[-1]) == (197, 99)
    stage = Plan(keep=0.7, at=(3, 6, 9), semantics="stage").schedule(197, 12)
    assert stage[::3] == (197, 139, 98, 69)
    for keep in (0.5, 0.7, 0.9):
        plan = Plan(keep=keep, at=(2, 6), semantics="flops")
        ratio = VIT_B16.of(plan.schedule(197, 12)) / VIT_B16.of((197,) * 12)
        assert keep - 0.01 < ratio <= keep
        assert f"{ratio:.3f} of the FLOPs" in plan.describe(197, 12)
    with pytest.raises(
        ValueError, match=r"^Plan: keep must be at least 0\.5\d+ of the FLOPs, pruning at 6; got"
    ):
        Plan(keep=0.3, at=6, semantics="flops").schedule(197, 12)
    with pytest.raises(ValueError, match=r"^Plan: at must be below the number of blocks, 12; got 12\.$"):
        Plan(at=12).schedule(197, 12)


def test_presets():
    assert Plan.preset("input") == Plan()
    assert Plan.preset("early", 0.7, at=2).stages == (2,)
    with pytest.raises(
        ValueError, match=r"^Plan\.preset: name must be one of 'input', 'early', 'evit3', 'merge'; got"
    ):
        Plan.preset("late")


def test_scores_must_fit():
    tokens = torch.randn(1, 9, 3)
    with pytest.raises(ValueError, match=r"^Plan\.apply: scores must be given for score 'cls'; got None\."):
        Plan(score="cls").apply(tokens)
    with pytest.raises(ValueError, match=r"^Plan\.apply: scores must have shape \(1, 8\); got \(1, 9\)\.$"):
        Plan(score="cls").apply(tokens, scores=torch.zeros(1, 9))
    with pytest.raises(ValueError, match=r"^Plan\.apply: mass must have shape \(1, 9\); got \(1, 8\)\.$"):
        Plan().apply(tokens, mass=torch.ones(1, 8))
    with pytest.raises(ValueError, match=r"^Plan\.apply: count must lie in 2\.\.\.1; got 0\.$"):
        Plan().apply(tokens[:, :1], count=0)
    with pytest.raises(ValueError, match=r"^Plan: tokens must be more than the prefix, 1; got 1\.$"):
        Plan().describe(1, 12)
    with pytest.raises(ValueError, match=r"^Plan\.apply: count must lie in 2\.\.\.9; got 10\.$"):
        Plan().apply(tokens, count=10)


def test_random_follows_its_seed():
    tokens = torch.randn(1, 101, 4)
    first, again, other = (Plan(score="random", seed=seed).apply(tokens).kept for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_keeping_all_returns_the_tensor_itself():
    tokens = torch.randn(2, 5, 4)
    assert Plan(keep=1.0).apply(tokens)[0] is tokens


def test_equal_scores_keep_the_first():
    tokens = torch.tensor([[[0.0], [1.0], [3.0], [2.0], [3.0], [3.0]]])
    assert Plan(keep=0.4).apply(tokens).kept.tolist() == [[0, 2, 4]]


ERRORS = {
    "keep 0": ({"keep": 0}, ValueError, "keep must lie in (0, 1]; got 0."),
    "keep 1.5": ({"keep": 1.5}, ValueError, "keep must lie in (0, 1]; got 1.5."),
    "keep nan": ({"keep": math.nan}, ValueError, "keep must lie in (0, 1]; got nan."),
    "keep text": ({"keep": "half"}, TypeError, "keep must be a number; got 'half'."),
    "at": ({"at": -1}, ValueError, "at must be at least 0; got -1."),
    "score": (
        {"score": "magic"},
        ValueError,
        "score must be one of 'norm', 'distance', 'similarity', 'random', 'grid', 'cls', 'value', 'received', "
        "'probe', 'delta'; got 'magic'.",
    ),
    "fuse": (
        {"fuse": "melt"},
        ValueError,
        "fuse must be one of 'drop', 'mean', 'cluster', 'squeeze', 'next', 'bipartite', 'checkerboard'; got 'melt'.",
    ),
    "at list": ({"at": [3, 6]}, TypeError, "at must be an integer or a tuple of integers; got [3, 6]."),
    "at none": ({"at": ()}, ValueError, "at must name one block or several, ascending; got ()."),
    "at order": ({"at": (3, 1)}, ValueError, "at must name one block or several, ascending; got (3, 1)."),
    "mass": (
        {"mass": True},
        ValueError,
        "mass must be False where tokens are dropped; got True. Tokens that take nothing in have mass 1.",
    ),
    "semantics": (
        {"semantics": "x"},
        ValueError,
        "semantics must be one of 'tokens', 'stage', 'flops'; got 'x'.",
    ),
    "multiple_of": ({"multiple_of": 0}, ValueError, "multiple_of must be at least 1; got 0."),
}


@pytest.mark.parametrize("what", ERRORS)
def test_a_wrong_plan_is_named_in_one_line(what):
    changes, error, message = ERRORS[what]
    with pytest.raises(error) as caught:
        Plan(**changes)
    assert str(caught.value) == f"Plan: {message}"
