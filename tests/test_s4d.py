"""S4D: the convolution, the recurrence and a plain loop agree."""

import math

import pytest
import torch

from projecta.s4d import DISCRETISATIONS, INITS, S4DBlock, discretise, s4d_kernel, s4d_rates, s4d_scan


def make(init="lin", b=2, d=3, l=37, n=4, dtype=torch.float32):
    torch.manual_seed(0)
    A = s4d_rates(n, init).repeat(d, 1)
    C = torch.randn(d, n, dtype=A.dtype)
    if dtype == torch.float64:
        A, C = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (A, C))
    return {
        "u": torch.randn(b, d, l, dtype=dtype), "delta": torch.rand(d, dtype=dtype) * 0.2 + 0.01, "A": A, "C": C,
        "D": torch.randn(d, dtype=dtype),
    }  # fmt: skip


def written_out(u, delta, A, C, D, discretisation, state=None):
    z = delta[:, None] * A
    if discretisation == "zoh":
        A_bar, B_bar = z.exp(), (z.exp() - 1) / A
    else:
        A_bar, B_bar = (1 + z / 2) / (1 - z / 2), delta[:, None] / (1 - z / 2)
    state = A.new_zeros(len(u), *A.shape) if state is None else state
    ys = []
    for t in range(u.shape[-1]):
        state = A_bar * state + B_bar * u[:, :, t, None]
        y = (C * state).sum(-1)
        ys.append((2 * y.real if y.is_complex() else y) + D * u[:, :, t])
    return torch.stack(ys, -1), state


@pytest.mark.parametrize("discretisation", DISCRETISATIONS)
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("l", [1, 2, 37, 256])
def test_convolution_and_recurrence_are_the_formula(init, discretisation, l):
    a = make(init, l=l, dtype=torch.float64)
    start = torch.randn(2, *a["A"].shape, dtype=a["A"].dtype)
    for state in (None, start):
        truth, last = written_out(**a, discretisation=discretisation, state=state)
        for mode in ("convolution", "recurrence"):
            y, end = s4d_scan(
                **a, discretisation=discretisation, mode=mode, initial_state=state, return_last_state=True
            )
            torch.testing.assert_close(y, truth, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(end, last, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("init", INITS)
def test_the_two_modes_agree_in_float32_over_long_sequences(init):
    a = make(init, b=1, l=8192, n=16)
    one, two = (s4d_scan(**a, mode=mode) for mode in ("convolution", "recurrence"))
    assert (one - two).abs().max() <= 1e-5 * two.abs().max()


def test_rates_are_the_papers():
    lin, inv, real = (s4d_rates(4, init) for init in INITS)
    assert lin.tolist() == pytest.approx([complex(-0.5, math.pi * k) for k in range(4)])
    assert inv.tolist() == pytest.approx(
        [complex(-0.5, 8 / math.pi * (8 / (2 * k + 1) - 1)) for k in range(4)], rel=1e-6
    )
    assert real.tolist() == [-1, -2, -3, -4]


@pytest.mark.parametrize("init", INITS)
def test_gradients_of_the_convolution_are_the_recurrences(init):
    found = []
    for mode in ("convolution", "recurrence"):
        a = {name: t.requires_grad_() for name, t in make(init, dtype=torch.float64).items()}
        y = s4d_scan(**a, mode=mode, backend="reference")
        weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
        found.append(torch.autograd.grad((y * weights).sum(), list(a.values())))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)


def test_the_kernel_is_the_answer_to_an_impulse():
    a = make(l=50)
    a["u"] = torch.zeros(1, 3, 50).index_fill(2, torch.tensor(0), 1.0)
    kernel = s4d_kernel(*discretise(a["delta"], a["A"]), a["C"], 50)
    a["D"] = torch.zeros(3)
    torch.testing.assert_close(s4d_scan(**a, mode="recurrence")[0], kernel, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("discretisation", DISCRETISATIONS)
@pytest.mark.parametrize("step", [0.0, 1e-6, 2e-4, 1e-3, 0.1])
def test_small_steps_do_not_cancel(step, discretisation):
    A = torch.tensor([[-1.0 + 0j, -0.5 + 3j]])
    wide = discretise(torch.tensor([step], dtype=torch.float64), A.to(torch.complex128), None, discretisation)
    for got, truth in zip(discretise(torch.tensor([step]), A, None, discretisation), wide, strict=True):
        torch.testing.assert_close(got.to(torch.complex128), truth, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("mode", ["convolution", "recurrence"])
def test_bilinear_turns_fast_real_rates_into_alternating_signs(mode):
    a = make("real", l=20, n=8, dtype=torch.float64)
    a["delta"] = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    truth, last = written_out(**a, discretisation="bilinear")
    y, end = s4d_scan(**a, discretisation="bilinear", mode=mode, return_last_state=True)
    torch.testing.assert_close(y, truth, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(end, last, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["convolution", "recurrence"])
@pytest.mark.parametrize(("b", "l"), [(2, 0), (0, 4)])
def test_empty_inputs_give_empty_outputs(mode, b, l):
    a = make(b=b, l=l)
    y, last = s4d_scan(**a, mode=mode, return_last_state=True)
    assert y.shape == (b, 3, l)
    assert last.shape == (b, 3, 4)
    assert (last == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    block, x = S4DBlock(6, 8).to(dtype), torch.randn(2, 9, 6, dtype=dtype)
    assert block(x).dtype == dtype
    y, _ = block.step(x[:, 0], block.init_state(2))
    torch.testing.assert_close(y, block(x)[:, 0], rtol=2e-2, atol=2e-2)
    a = make("real", l=64)
    expected = s4d_scan(**a)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(s4d_scan(**a), expected)


@pytest.mark.parametrize("discretisation", DISCRETISATIONS)
@pytest.mark.parametrize("init", INITS)
def test_the_block_streams(init, discretisation):
    torch.manual_seed(0)
    block, x = S4DBlock(6, 8, init=init, discretisation=discretisation), torch.randn(2, 11, 6)
    whole, state, ys = block(x), block.init_state(2), []
    for t in range(11):
        y, state = block.step(x[:, t], state)
        ys.append(y)
    torch.testing.assert_close(torch.stack(ys, 1), whole, rtol=1e-4, atol=1e-5)
    whole.sum().backward()
    assert all(p.grad is not None for p in block.parameters())


def test_misuse_is_named_in_one_line():
    a = make()
    with pytest.raises(ValueError, match=r"^s4d_scan: delta must have shape \(d,\) = \(3,\); got \(2,\)\.$"):
        s4d_scan(**a | {"delta": torch.ones(2)})
    with pytest.raises(
        TypeError, match=r"^s4d_scan: C must be complex where A is, and only there; got torch\.float32\.$"
    ):
        s4d_scan(**a | {"C": torch.ones(3, 4)})
    with pytest.raises(
        ValueError, match=r"^s4d_scan: mode must be one of 'convolution', 'recurrence'; got 'fft'\.$"
    ):
        s4d_scan(**a, mode="fft")
    with pytest.raises(
        ValueError, match=r"^discretise: discretisation must be one of 'zoh', 'bilinear'; got 'x'\.$"
    ):
        s4d_scan(**a, discretisation="x")
    with pytest.raises(
        ValueError, match=r"^s4d_rates: init must be one of 'lin', 'inv', 'real'; got 'hippo'\.$"
    ):
        s4d_rates(4, "hippo")
