"""MRSS: every backend against the formula in float64, streaming, and what is refused."""

import pytest
import torch

from projecta import mrss_scan, selective_scan
from projecta.mrss import BANDS, MrssState, mrss_update
from tests.cases import make_scan, widen

COARSE = ((0.5, 1), (0.5, 4))
CASES = {
    "plain": {},
    "one short block": {"l": 3},
    "whole blocks": {"l": 32},
    "no steps": {"l": 0},
    "constant B": {"constant": "B"},
    "groups": {"g": 2},
    "complex": {"complex_A": True},
    "no gate": {"without": ["z"]},
    "bare": {"without": ["D", "delta_bias", "initial_state"]},
    "packed": {"b": 1, "packed": [0, 5, 5, 17, 33]},
    "many channels": {"d": 40, "l": 150},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
}


def run(arguments, **options):
    """y, the last state and every gradient of one fixed loss, by name."""
    leaves = {name: t.detach().requires_grad_() for name, t in arguments.items() if name != "cu_seqlens"}
    bounds = arguments.get("cu_seqlens")
    options = {"delta_softplus": True, "return_last_state": True, "cu_seqlens": bounds} | options
    y, last = mrss_scan(**leaves, **options)
    torch.manual_seed(3)
    grads = [torch.randn(t.shape, dtype=widen(t.detach()).dtype).to(t.dtype) for t in (y, last)]
    found = torch.autograd.grad([y, last], [*leaves.values()], grads, allow_unused=True)
    return dict(zip(("y", "last", *leaves), (y, last, *found), strict=True))


@pytest.mark.parametrize("on", ["reference", "vectorised", "cpu"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_formula(case, on):
    torch.manual_seed(0)
    arguments = make_scan(**{"d": 8, "n": 3, **CASES[case]})
    truth = run({name: widen(t) for name, t in arguments.items()}, bands=COARSE, backend="reference")
    got = run(arguments, bands=COARSE, backend=on)
    tolerance = 3e-2 if arguments["u"].dtype == torch.bfloat16 else 2e-6
    for name, wanted in truth.items():
        if wanted is None or not wanted.numel():
            continue
        error = (got[name].detach().to(wanted.dtype) - wanted.detach()).abs().max()
        assert error <= tolerance * wanted.detach().abs().max().clamp_min(1.0), name


@pytest.mark.parametrize("last", ["time", "channels"])
@pytest.mark.parametrize("period", [2, 3, 8, 48, 100])
def test_any_period_is_that_of_the_formula_on_the_cpu(period, last):
    torch.manual_seed(0)
    arguments = make_scan(b=2, d=40, l=150, n=4)
    if last == "channels":
        arguments |= {k: arguments[k].mT.contiguous().mT for k in ("u", "delta", "z", "B", "C")}
    bands = ((0.5, 1), (0.5, period))
    truth = run({name: widen(t) for name, t in arguments.items()}, bands=bands, backend="reference")
    for _ in range(2):  # the second call is prepared
        got = run(arguments, bands=bands, backend="cpu")
        for name, wanted in truth.items():
            error = (got[name].detach().to(wanted.dtype) - wanted.detach()).abs().max()
            assert error <= 2e-6 * wanted.detach().abs().max().clamp_min(1.0), name


def test_a_call_like_an_earlier_one_has_its_own_values_and_gradients():
    torch.manual_seed(0)
    first, second = make_scan(d=8, n=3), make_scan(d=8, n=3)
    for bands in (COARSE, [list(band) for band in COARSE]):
        for arguments in (
            first,
            second,
            {k: v.mT.contiguous().mT if v.dim() > 1 else v for k, v in second.items()},
        ):
            for asked in ((), ("u",), ("A", "z"), ()):
                tensors = {k: t.detach().requires_grad_(k in asked) for k, t in arguments.items()}
                y = mrss_scan(**tensors, delta_softplus=True, bands=bands, backend="cpu")
                wanted = mrss_scan(**tensors, delta_softplus=True, bands=bands, backend="vectorised")
                assert torch.allclose(y, wanted, atol=1e-5)
                assert y.requires_grad == bool(asked)
                if asked:
                    inputs = [tensors[k] for k in asked]
                    pairs = zip(
                        torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(wanted.sum(), inputs),
                        strict=True,
                    )  # fmt: skip
                    assert all(torch.allclose(a, b, atol=1e-4) for a, b in pairs)


def test_bands_that_run_together_have_the_bits_of_one_thread():
    torch.manual_seed(0)
    arguments = make_scan(b=2, d=64, l=600, n=16, without=["initial_state"])
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found += [run(arguments, bands=BANDS, backend="cpu") for _ in range(2)]
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(t, other[name]) for name, t in found[0].items())


GPU = {
    **{
        name: CASES[name]
        for name in ("plain", "constant B", "groups", "no gate", "bare", "packed", "bfloat16")
    },
    "channels last": {"d": 40, "l": 17},
    "groups, channels last": {"g": 4, "l": 17},
    "whole blocks of float16": {"dtype": torch.float16, "l": 32},
}
PERIODS = {"half per 4": COARSE, "three bands": ((0.25, 100), (0.25, 1), (0.5, 3))}


def _errors_on_a_gpu(case, bands):
    """The error of each output and gradient, over the largest value, in the interpreter."""
    torch.manual_seed(0)
    arguments = make_scan(**{"d": 8, "n": 3, **GPU[case]})
    if "channels last" in case:
        arguments |= {k: arguments[k].mT.contiguous().mT for k in ("u", "delta", "z", "B", "C")}
        arguments |= {k: torch.stack([arguments[k]] * 2, -1)[..., 0] for k in ("D", "delta_bias")}
    truth = run({name: widen(t) for name, t in arguments.items()}, bands=bands, backend="reference")
    got = run(arguments, bands=bands, backend="triton")
    with torch.no_grad():
        got["y alone"] = mrss_scan(**arguments, delta_softplus=True, bands=bands, backend="triton")
    truth["y alone"] = truth["y"]
    return {
        name: float(
            (widen(got[name].detach()) - t.detach()).abs().max() / t.detach().abs().max().clamp_min(1)
        )
        for name, t in truth.items()
        if t is not None and t.numel()
    }


@pytest.mark.parametrize(
    ("case", "periods"),
    [(c, p) for c in GPU for p in PERIODS if p == "half per 4" or c == "packed"],
)
def test_the_kernels_of_the_gpu_are_those_of_the_formula(interpreter, case, periods):
    found = interpreter.submit(_errors_on_a_gpu, case, PERIODS[periods]).result(timeout=300)
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 3e-3}.get(GPU[case].get("dtype"), 2e-6)
    assert {name: error for name, error in found.items() if not error <= tolerance} == {}


def _refused_on_a_gpu(**case):
    try:
        mrss_scan(**make_scan(**case), backend="triton")
    except TypeError as error:
        return str(error)


@pytest.mark.parametrize("case", [{"dtype": torch.float64}, {"complex_A": True}])
def test_the_gpu_refuses_what_the_scan_refuses_there(interpreter, case):
    message = interpreter.submit(_refused_on_a_gpu, **case).result(timeout=300)
    assert "A must be real, and u not float64, for backend 'triton'" in message


def plain(u, delta, A, B, C, D, z, period):
    """The formula of the module, in a loop over blocks, of one coarse band."""
    y = torch.zeros_like(u)
    h, value = torch.zeros(*u.shape[:2], A.shape[1], dtype=u.dtype), torch.zeros(u.shape[:2], dtype=u.dtype)
    for begin in range(0, u.shape[2], period):
        at = slice(begin, begin + period)
        y[..., at] = (value[..., None] + D[:, None] * u[..., at]) * torch.nn.functional.silu(z[..., at])
        drive = (delta[..., at] * u[..., at]).sum(-1)[..., None] * B[..., at].mean(-1)[:, None]
        h = torch.exp(delta[..., at].sum(-1)[..., None] * A) * h + drive
        value = (h * C[..., at].mean(-1)[:, None]).sum(-1)
    return y, h


def test_the_reference_is_the_formula():
    a = make_scan(b=2, d=4, l=11, n=3, dtype=torch.float64, without=["delta_bias", "initial_state"])
    a["delta"] = a["delta"].abs()
    y, last = mrss_scan(**a, bands=[(1.0, 4)], return_last_state=True, backend="reference")
    wanted, h = plain(*(a[k] for k in ("u", "delta", "A", "B", "C", "D", "z")), 4)
    assert torch.allclose(y, wanted)
    assert torch.allclose(last, h)


@pytest.mark.parametrize("on", ["reference", "vectorised", "cpu"])
def test_period_1_has_the_bits_of_the_full_scan(on):
    a = make_scan(b=2, d=8, l=33, n=3)
    full = selective_scan(**a, delta_softplus=True, return_last_state=True, backend=on)
    for bands in ([(1.0, 1)], [(0.5, 1), (0.5, 1)]):
        got = mrss_scan(**a, bands=bands, delta_softplus=True, return_last_state=True, backend=on)
        for one, other in zip(got, full, strict=True):
            assert torch.equal(one, other)


def test_it_is_causal_and_reads_ended_blocks_only():
    a = make_scan(b=1, d=8, l=32, n=3, without=["initial_state"])
    y = mrss_scan(**a, bands=COARSE, delta_softplus=True)
    later = {k: t.clone() for k, t in a.items()}
    for name in ("u", "delta", "B", "C", "z"):
        later[name][..., 17:] += 1
    changed = mrss_scan(**later, bands=COARSE, delta_softplus=True)
    assert torch.equal(y[..., :17], changed[..., :17])
    assert not torch.equal(y[..., 20:], changed[..., 20:])


@pytest.mark.parametrize("cuts", [[33], [1, 6, 12], [4, 8, 20]])
def test_pieces_and_steps_have_the_bits_of_the_scan(cuts):
    a = make_scan(b=2, d=8, l=33, n=3)
    start = a.pop("initial_state")
    steady = {k: a[k] for k in ("A", "D", "delta_bias")}
    whole, last = mrss_scan(
        **a,
        bands=COARSE,
        delta_softplus=True,
        initial_state=start,
        return_last_state=True,
        backend="reference",
    )
    state, ys, at = MrssState.start(start), [], 0
    for stop in cuts:
        part = {k: t if k in steady else t[..., at:stop] for k, t in a.items()}
        y, state = mrss_scan(
            **part, bands=COARSE, delta_softplus=True, initial_state=state, return_last_state=True
        )
        ys.append(y)
        at = stop
    for t in range(at, 33):
        token = {k: t_[..., t] for k, t_ in a.items() if k not in steady}
        y, state = mrss_update(
            state, token["u"], token["delta"], a["A"], token["B"], token["C"], a["D"], token["z"],
            a["delta_bias"], True, bands=COARSE,
        )  # fmt: skip
        ys.append(y[..., None])
    assert torch.equal(torch.cat(ys, -1), whole)
    assert int(state.length) == 33
    fine = state.h[:, :4]
    assert torch.equal(fine, last[:, :4])


def test_it_compiles_in_one_graph():
    a = make_scan(b=1, d=8, l=16, n=3)
    call = torch.compile(
        lambda u: mrss_scan(**{**a, "u": u}, delta_softplus=True, bands=COARSE),
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.allclose(call(a["u"]), mrss_scan(**a, delta_softplus=True, bands=COARSE), atol=1e-6)


def test_less_is_saved():
    """Half at 1 and half at 8 keep 9 / 16 of the states, three values of each block, and its means of B and C.

    The states before each chunk of 16 steps or blocks, and a chunk for the rest, which is empty here.
    """
    a = make_scan(b=1, d=64, l=256, n=16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        leaves = {k: t.requires_grad_() for k, t in a.items()}
        mrss_scan(**leaves, bands=BANDS, backend="cpu")
        coarse = sum(saved)
        saved.clear()
        selective_scan(**leaves, backend="cpu")
    inputs = sum(t.numel() for t in a.values())
    assert sum(saved) - inputs == 17 * 64 * 16
    assert coarse - inputs == (17 + 3) * 32 * 16 + 3 * 32 * 32 + 2 * 32 * 16


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        ([(0.5, 1)], "bands must have fractions whose sum is 1; got 0.5"),
        ([(1.0, 0)], "bands must have integer periods of at least 1; got 0"),
        ([(1.0, 1.5)], "bands must have integer periods of at least 1; got 1.5"),
        ([(-1.0, 1), (2.0, 1)], "bands must have fractions above 0; got -1.0"),
    ],
)
def test_wrong_bands_are_refused(bands, message):
    with pytest.raises(ValueError, match=message):
        mrss_scan(**make_scan(), bands=bands)


def test_bands_begin_with_a_group():
    with pytest.raises(ValueError, match="begin with a group of channels, of which there are 2"):
        mrss_scan(**make_scan(d=8, g=2), bands=((0.25, 1), (0.75, 4)))


def test_a_piece_is_not_packed():
    a = make_scan(b=1, d=4, packed=[0, 33])
    state = MrssState.start(a.pop("initial_state"))
    with pytest.raises(ValueError, match="cu_seqlens must be None with a MrssState"):
        mrss_scan(**a, initial_state=state)


def test_a_token_needs_a_state_with_blocks():
    x, A, B = torch.ones(1, 2), -torch.ones(2, 1), torch.ones(1, 1)
    with pytest.raises(
        TypeError, match=r"^mrss_update: state must be a MrssState; got Tensor\. Take MrssState\.start"
    ):
        mrss_update(torch.zeros(1, 2, 1), x, x, A, B, B)
    with pytest.raises(ValueError, match=r"^mrss_update: x must have shape \(b, d\); got \(2,\)\.$"):
        mrss_update(MrssState.start(torch.zeros(1, 2, 1)), x[0], x, A, B, B)
