"""The multi-resolution scan: its two backends against each other, and the properties that it promises."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from projecta import mrss_scan, selective_scan
from projecta.mrss import MrssState, choose_periods, decay_factor, error_bound, mrss_update
from tests.cases import make_scan, run_with_gradients, widen

CASES = {
    "plain": {},
    "short": {"l": 2},
    "empty": {"l": 0},
    "long": {"l": 101},
    "groups": {"g": 2},
    "constant": {"constant": "BC"},
    "constant B": {"constant": "B", "g": 2},
    "complex": {"complex_A": True},
    "packed": {"b": 1, "l": 70, "packed": [0, 5, 5, 16, 17, 64, 70]},
    "no options": {"without": ("D", "z", "delta_bias", "initial_state")},
}
PERIODS = {
    "by state": [1, 2, 4],
    "odd": [3, 5, 1],
    "by channel": torch.randint(1, 7, (4, 3)).tolist(),
    "chosen": None,
}


@pytest.mark.parametrize("periods", PERIODS)
@pytest.mark.parametrize("case", CASES)
def test_vectorised_agrees_with_the_loop(case, periods, monkeypatch):
    monkeypatch.setattr("projecta.mrss.SEGMENT_ELEMENTS", 300)
    arguments = make_scan(**CASES[case], dtype=torch.float64)
    options = {"periods": PERIODS[periods], "decay": "exact" if CASES[case].get("complex_A") else "compound"}
    truth = run_with_gradients(mrss_scan, arguments, **options, backend="reference")
    got = run_with_gradients(mrss_scan, arguments, **options, backend="vectorised")
    for name, expected in truth.items():
        torch.testing.assert_close(
            got[name], expected, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["reference", "vectorised"])
def test_periods_of_one_with_exact_decay_are_the_selective_scan(name, case):
    arguments = make_scan(**CASES[case])
    truth = run_with_gradients(selective_scan, arguments, backend=name)
    got = run_with_gradients(mrss_scan, arguments, backend=name, periods=[1, 1, 1], decay="exact")
    assert torch.equal(got["y"], truth["y"])
    assert torch.equal(got["last"], truth["last"])


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(0, 39), st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_causal(l, t, periods):
    """Inputs from step t on do not change outputs before t, even if the sequence ends at t."""
    t = min(t, l)
    torch.manual_seed(0)
    arguments = make_scan(l=l, dtype=torch.float64)
    cut = {n: v[..., :t] if n in ("u", "delta", "z", "B", "C") else v for n, v in arguments.items()}
    for name in ("reference", "vectorised"):
        options = {"periods": periods, "delta_softplus": True, "backend": name}
        torch.testing.assert_close(
            mrss_scan(**cut, **options), mrss_scan(**arguments, **options)[..., :t], rtol=1e-12, atol=1e-12
        )


def test_no_input_is_late():
    """The last token reaches the output at once, at any position within a period."""
    for l in range(1, 9):
        arguments = make_scan(l=l, dtype=torch.float64, without=("D", "z", "initial_state"))
        u = arguments["u"].requires_grad_()
        y = mrss_scan(**arguments, delta_softplus=True, periods=[4, 4, 4], backend="vectorised")
        (slope,) = torch.autograd.grad(y[..., -1].sum(), u)
        assert slope[..., -1].abs().min() > 0


@pytest.mark.parametrize("decay", ["exact", "compound"])
def test_the_error_vanishes_with_the_step(decay):
    errors = []
    for scale in (1e-2, 1e-3, 1e-4):
        torch.manual_seed(0)
        arguments = make_scan(l=64, dtype=torch.float64, without=("D", "z", "delta_bias", "initial_state"))
        arguments["delta"] = scale * arguments["delta"].abs()
        truth = selective_scan(**arguments, backend="reference")
        got = mrss_scan(**arguments, periods=[4, 4, 4], decay=decay, backend="vectorised")
        errors.append(((got - truth).abs().max() / truth.abs().max()).item())
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert errors[2] < 1e-3


def test_chosen_periods_follow_the_time_constant():
    A, bias = -torch.tensor([[0.001, 0.1, 1.0]]), torch.tensor([0.5413])  # softplus: 1
    assert choose_periods(A, bias, theta=0.5, vector=(1, 1)).tolist() == [[16, 4, 1]]
    assert choose_periods(A, bias, theta=0.1, vector=(1, 1)).tolist() == [[16, 1, 1]]
    assert choose_periods(A, bias, theta=0.5).tolist() == [[1, 1, 1]]  # the three states share one vector
    A, step = -torch.ones(40, 6), torch.linspace(0.01, 0.3, 40)
    table = choose_periods(A, theta=0.5, step=step)
    assert table[:, 0].tolist() == [4] * 16 + [1] * 24
    assert (A.abs() * step[:, None] * table <= 0.5).all()


@pytest.mark.parametrize("decay", ["exact", "compound"])
@settings(deadline=None, max_examples=40)
@given(
    st.floats(0.01, 4), st.sampled_from([1, 2, 4, 8, 16]), st.integers(0, 2**31), st.sampled_from([0.0, 1.0])
)
def test_the_error_stays_within_its_bound(decay, theta, p, seed, alike):
    """For steps of any size and inputs of one sign or of both, as long as |A| S <= theta in every block."""
    draw = torch.Generator().manual_seed(seed)
    rates = torch.rand(1, generator=draw, dtype=torch.float64) * 5 + 0.1
    delta = torch.rand(1, 1, 320, generator=draw, dtype=torch.float64) ** 4 + 1e-4
    spans = delta.unflatten(-1, (-1, p)).sum(-1, keepdim=True)
    delta = (delta.unflatten(-1, (-1, p)) / spans.amax() * (theta / rates)).flatten(-2)
    u = torch.sign(torch.rand(1, 1, 320, generator=draw, dtype=torch.float64) - (0.5 if alike == 0 else 0))
    one = torch.ones(1, 1, 320, dtype=torch.float64)
    truth = selective_scan(u, delta, -rates[:, None], one, one, backend="reference")
    got = mrss_scan(u, delta, -rates[:, None], one, one, periods=[p], decay=decay, backend="reference")
    assert (got - truth).abs().max() <= error_bound(theta, decay) / rates


def test_the_bound_vanishes_with_theta():
    bounds = [error_bound(theta) for theta in (0.4, 0.04, 0.004)]
    assert bounds[0] > 9 * bounds[1] > 80 * bounds[2] > 0
    for theta in torch.linspace(0.01, 12, 500).tolist():  # the assumption of the bound
        z = torch.tensor(-theta, dtype=torch.float64)
        lost = (torch.exp(z) - decay_factor(z, "compound")).item()
        assert 0 <= lost <= theta**2 / 16


VECTORS = {  # cases of the kernels: one period for each 64 bytes of channels and four states
    "plain": {"d": 20, "l": 101, "n": 8},
    "groups": {"d": 40, "l": 33, "n": 5, "g": 2},
    "constant": {"d": 9, "l": 50, "constant": "BC"},
    "packed": {"b": 1, "d": 16, "l": 70, "packed": [0, 5, 5, 16, 17, 64, 70]},
    "empty": {"l": 0},
    "no options": {"d": 9, "l": 40, "without": ("D", "z", "delta_bias", "initial_state")},
}


def vector_periods(d, n, g, width):
    k = d // g
    table = torch.tensor([1, 2, 4, 8, 16])[torch.randint(0, 5, (g, -(-k // width), -(-n // 4)))]
    table = table.repeat_interleave(width, 1)[:, :k].flatten(0, 1)
    return table.repeat_interleave(4, 1)[:, :n]


# Each takes 10 s to compile: every dtype for one case, and every case for two dtypes.
KERNELS = [("plain", torch.float32, "exact"), ("plain", torch.bfloat16, "exact")]
KERNELS += [("plain", torch.float64, "compound"), ("plain", torch.bfloat16, "compound")]
KERNELS += [(c, t, d) for c in VECTORS for t, d in ((torch.float64, "exact"), (torch.float32, "compound"))]


@pytest.mark.parametrize(("case", "dtype", "decay"), KERNELS)
def test_the_kernels_agree_with_the_loop(case, dtype, decay):
    torch.manual_seed(0)
    arguments = make_scan(**VECTORS[case], dtype=dtype)
    wide = {name: widen(t) for name, t in arguments.items()}
    (d, n), tolerance = (
        arguments["A"].shape,
        {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 1e-2},
    )
    width = 8 if dtype == torch.float64 else 16
    for periods in (torch.full((d, n), 1), vector_periods(d, n, VECTORS[case].get("g") or 1, width)):
        options = {"periods": periods, "decay": decay}
        truth = run_with_gradients(mrss_scan, wide, **options, backend="reference")
        got = run_with_gradients(mrss_scan, arguments, **options, backend="cpu")
        for name, expected in truth.items():
            limit = tolerance[dtype] * expected.abs().max().item() if expected.numel() else 0
            torch.testing.assert_close(
                widen(got[name]), expected, rtol=0, atol=limit, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_auto_takes_the_kernels_where_periods_allow_it():
    arguments = make_scan(d=16, n=4)
    for periods, backend in (
        ([4, 4, 4, 4], "cpu"),
        ([4, 4, 4, 2], "vectorised"),
        ([3, 3, 3, 3], "vectorised"),
    ):
        got = mrss_scan(**arguments, periods=periods, delta_softplus=True)
        same = mrss_scan(**arguments, periods=periods, delta_softplus=True, backend=backend)
        assert torch.equal(got, same)
    with pytest.raises(
        ValueError, match="periods must be 1, 2, 4, 8 or 16, and equal in 16 adjacent channels"
    ):
        mrss_scan(**arguments, periods=[4, 4, 4, 2], backend="cpu")


def pieces(arguments, cuts, backend, **options):
    """The scan in pieces, one state carried through."""
    b, (d, n) = len(arguments["u"]), arguments["A"].shape
    state, ys = MrssState.start(torch.zeros(b, d, n, dtype=torch.float64)), []
    for start, stop in itertools.pairwise(cuts):
        cut = {
            k: v[..., start:stop] if k in ("u", "delta", "z", "B", "C") else v for k, v in arguments.items()
        }
        y, state = mrss_scan(**cut, return_last_state=True, initial_state=state, backend=backend, **options)
        ys.append(y)
    return torch.cat(ys, -1)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 50), max_size=5), st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_pieces_and_tokens_are_the_scan(cuts, periods):
    torch.manual_seed(0)
    arguments = make_scan(l=50, dtype=torch.float64, without=("initial_state",))
    options = {"periods": periods, "delta_softplus": True}
    cuts = [0, *sorted(cuts), 50]
    truth = mrss_scan(**arguments, **options, backend="reference")
    assert torch.equal(pieces(arguments, cuts, "reference", **options), truth)
    torch.testing.assert_close(
        pieces(arguments, cuts, "vectorised", **options), truth, rtol=1e-11, atol=1e-11
    )
    state = MrssState.start(torch.zeros(2, 4, 3, dtype=torch.float64))
    for t in range(50):
        u, delta, z, B, C = (arguments[name][..., t] for name in ("u", "delta", "z", "B", "C"))
        y = mrss_update(
            state, u, delta, arguments["A"], B, C, arguments["D"], z, arguments["delta_bias"], True,
            periods=periods,
        )  # fmt: skip
        assert torch.equal(y, truth[..., t])


def test_pieces_in_the_kernels():
    arguments = make_scan(d=16, l=77, n=8, dtype=torch.float64, without=("initial_state",))
    options = {"periods": [1, 1, 1, 1, 16, 16, 16, 16], "delta_softplus": True}
    truth = mrss_scan(**arguments, **options, backend="cpu")
    got = pieces(arguments, [0, 1, 3, 33, 50, 55, 77], "cpu", **options)
    torch.testing.assert_close(got, truth, rtol=1e-11, atol=1e-11)


ERRORS = {
    "decay": ({"decay": "linear"}, ValueError, "decay must be one of 'compound', 'exact'; got 'linear'."),
    "periods' shape": (
        {"periods": [1, 2]}, ValueError, "periods must have shape (n,) = (3,) or (d, n) = (4, 3); got (2,).",
    ),
    "periods' values": ({"periods": [0, 1, 2]}, ValueError, "periods must be at least 1; got 0."),
    "periods' dtype": ({"periods": [1.0, 1, 2]}, TypeError, "periods must be integers; got torch.float32."),
    "backend": ({"backend": "gpu"}, ValueError, "backend must be one of 'auto', 'reference', 'vectorised', 'cpu'; got 'gpu'."),
    "a state's shape": (
        {"initial_state": MrssState.start(torch.zeros(2, 4, 2))}, ValueError,
        "initial_state.h must have shape (2, 4, 3); got (2, 4, 2).",
    ),
    "delta": (
        {"delta": torch.zeros(2, 4, 3)}, ValueError, "delta must have shape (b, d, l) = (2, 4, 33) like u; got (2, 4, 3).",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ERRORS)
def test_a_wrong_argument_is_named_in_one_line(what):
    changes, error, message = ERRORS[what]
    with pytest.raises(error) as caught:
        mrss_scan(**make_scan() | changes)
    assert str(caught.value) == f"mrss_scan: {message}"
    with pytest.raises(ValueError, match="decay must be 'exact' with complex A"):
        mrss_scan(**make_scan(complex_A=True))
