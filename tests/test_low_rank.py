"""Factors of linear maps, and updates merged into them."""

import pytest
import torch
from torch import nn

from projecta.low_rank import break_even_rank, factorise, merge_lora


@pytest.mark.parametrize(("inputs", "outputs"), [(12, 20), (20, 12), (16, 16)])
def test_full_rank_is_exact_and_the_error_is_correct(inputs, outputs):
    linear, x = nn.Linear(inputs, outputs).double(), torch.randn(5, inputs, dtype=torch.float64)
    torch.testing.assert_close(factorise(linear, min(inputs, outputs))(x), linear(x))
    errors = []
    for rank in range(1, min(inputs, outputs) + 1):
        factors = factorise(linear, rank)
        product = factors[1].weight @ factors[0].weight
        error = (product - linear.weight).norm() / linear.weight.norm()
        assert factors.error == pytest.approx(error.item(), abs=1e-12)
        errors.append(factors.error)
    assert errors == sorted(errors, reverse=True)


def test_no_product_of_random_factors_is_nearer():
    linear = nn.Linear(10, 8)
    best = factorise(linear, 3).error
    weight = linear.weight.detach()
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        V = torch.linalg.qr(torch.randn(10, 3, generator=draw)).Q
        assert (weight - weight @ V @ V.T).norm() / weight.norm() >= best


def test_break_even():
    for inputs, outputs in ((768, 3072), (8, 8), (7, 13), (1, 5)):
        rank = break_even_rank(nn.Linear(inputs, outputs, device="meta"))
        assert rank * (inputs + outputs) < inputs * outputs <= (rank + 1) * (inputs + outputs)


def test_bias_dtype_and_gradients_follow():
    linear = nn.Linear(6, 4, bias=False).to(torch.bfloat16)
    factors = factorise(linear, 2)
    assert factors[1].bias is None
    assert factors[0].weight.dtype == torch.bfloat16
    factors(torch.randn(2, 6, dtype=torch.bfloat16)).sum().backward()
    assert factors[0].weight.grad.abs().sum() > 0
    assert linear.weight.grad is None
    assert "rank=2, error=" in repr(factors)


def test_a_map_of_zeros():
    linear = nn.Linear(3, 3)
    nn.init.zeros_(linear.weight)
    assert factorise(linear, 1).error == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merged_is_the_sum_and_unmerged_the_same_bits(dtype):
    linear, A, B = nn.Linear(6, 5).to(dtype), torch.randn(2, 6), torch.randn(5, 2)
    before, x = linear.weight.detach().clone(), torch.randn(3, 6, dtype=dtype)
    apart = linear(x).float() + 4.0 / 2 * (x.float() @ A.T @ B.T)
    merged = merge_lora(linear, A, B, alpha=4.0)
    torch.testing.assert_close(
        linear(x).float(), apart, rtol=1e-2 if dtype == torch.float16 else 1e-5, atol=1e-2
    )
    merged.unmerge()
    assert torch.equal(linear.weight, before)
    with torch.no_grad():
        linear.weight.fill_(7)
    merged.unmerge()  # again: nothing happens
    assert (linear.weight == 7).all()


def test_misuse_is_named_in_one_line():
    linear = nn.Linear(4, 3)
    with pytest.raises(TypeError, match=r"^factorise: linear must be an nn\.Linear; got Conv2d\.$"):
        factorise(nn.Conv2d(1, 1, 1), 1)
    with pytest.raises(ValueError, match=r"^factorise: rank must lie in 1\.\.\.3; got 4\.$"):
        factorise(linear, 4)
    with pytest.raises(
        ValueError, match=r"^merge_lora: A must have shape \(r, 4\) with r > 0; got \(2, 3\)\.$"
    ):
        merge_lora(linear, torch.ones(2, 3), torch.ones(3, 2), 1.0)
    with pytest.raises(ValueError, match=r"^merge_lora: B must have shape \(3, 2\); got \(2, 3\)\.$"):
        merge_lora(linear, torch.ones(2, 4), torch.ones(2, 3), 1.0)
    with pytest.raises(TypeError, match=r"^merge_lora: A must be a tensor; got list\.$"):
        merge_lora(linear, [[1.0]], torch.ones(3, 1), 1.0)


@pytest.mark.parametrize(
    "call", [lambda t: factorise(t, 1), lambda t: merge_lora(t, torch.ones(1, 4), torch.ones(3, 1), 1.0)]
)
def test_integer_weights_are_refused(call):
    linear = nn.Linear(4, 3, bias=False)
    linear.weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"linear must have floating-point weights; got torch\.int8"):
        call(linear)
