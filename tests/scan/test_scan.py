"""Every backend against the reference in float64, and the reference against a closed form."""

import ast
import multiprocessing
import os
import platform
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from benchmarks.common import peak_mib
from projecta import available_backends, selective_scan, selective_state_update
from projecta.scan import BackendUnavailable, _eager, vectorised
from projecta.scan.cpu import backward, forward, layout  # importing them registers the operators
from tests.cases import make_scan, run_with_gradients, widen

TOLERANCE = {  # dtype of u: (rtol, atol) of y and every gradient, relative to the largest value
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2e-3, 2e-3),  # outputs and gradients are rounded to the dtype
    torch.bfloat16: (1e-2, 1e-2),
}
CASES = {
    **{f"length {l}": {"l": l} for l in (0, 1, 2, 3, 15, 16, 17, 31, 33)},
    **{f"length {l}": {"b": 1, "d": 3, "l": l} for l in (2047, 2048, 2049)},
    **{f"states {n}": {"n": n, "d": 5} for n in (1, 3, 16, 17, 64, 256)},
    **{f"40 channels of {n} states": {"d": 40, "n": n, "l": 70} for n in (5, 16)},  # several blocks
    "one channel": {"d": 1, "b": 1},
    "empty batch": {"b": 0},
    "two groups": {"g": 2},
    "a group per channel": {"g": 4},
    "constant B": {"constant": "B"},
    "constant C": {"constant": "C"},
    "constant B and C": {"constant": "BC"},
    "constant B, grouped C": {"constant": "B", "g": 2},
    "complex": {"complex_A": True},
    "complex, groups": {"complex_A": True, "g": 2},
    "complex, constant": {"complex_A": True, "constant": "BC"},
    "packed": {"b": 1, "l": 70, "packed": [0, 5, 16, 17, 64, 70]},
    "packed, empty sequences": {"b": 1, "l": 40, "packed": [0, 0, 32, 32, 40, 40]},
    "packed, no initial state": {"b": 1, "l": 40, "packed": [0, 7, 40], "without": ("initial_state",)},
    "packed, complex, groups": {"b": 1, "l": 40, "packed": [0, 16, 40], "complex_A": True, "g": 2},
    "no options": {"without": ("D", "z", "delta_bias", "initial_state")},
    "no z": {"without": ("z",)},
    "no D": {"without": ("D",)},
    "float64": {"dtype": torch.float64},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.fixture
def short_segments(monkeypatch):
    """Segments of 32 steps, so that short tests cross their bounds."""
    monkeypatch.setattr(vectorised, "SEGMENT_ELEMENTS", 1)
    monkeypatch.setattr(vectorised, "CHUNK", 8)


def assert_close(got, truth, tolerance):
    rtol, atol = tolerance
    for name, expected in truth.items():
        scale = float(expected.abs().max()) if expected.numel() else 1.0
        torch.testing.assert_close(
            widen(got[name]),
            expected,
            rtol=rtol,
            atol=atol * max(scale, 1e-30),
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("segments", ["long", "short"])
@pytest.mark.parametrize("case", CASES)
def test_backend_agrees_with_the_reference(backend, case, segments, request):
    if segments == "short":
        request.getfixturevalue("short_segments")
    arguments = make_scan(**CASES[case])
    if backend == "triton" and (arguments["A"].is_complex() or arguments["u"].dtype == torch.float64):
        pytest.skip("refused: see test_triton.py")
    truth = run_with_gradients(
        selective_scan, {n: widen(t) for n, t in arguments.items()}, backend="reference"
    )
    got = run_with_gradients(selective_scan, arguments, backend=backend)
    assert_close(got, truth, TOLERANCE[arguments["u"].dtype])
    for name, t in arguments.items():
        if name != "cu_seqlens":
            assert got[f"d{name}"].dtype == t.dtype
    assert got["y"].dtype == arguments["u"].dtype


@pytest.mark.parametrize("case", ["length 33", "two groups", "constant B and C", "complex", "packed"])
def test_reference_in_float32_agrees_with_float64(case):
    arguments = make_scan(**CASES[case])
    truth = run_with_gradients(
        selective_scan, {n: widen(t) for n, t in arguments.items()}, backend="reference"
    )
    assert_close(
        run_with_gradients(selective_scan, arguments, backend="reference"), truth, TOLERANCE[torch.float32]
    )


def test_reference_agrees_with_the_closed_form():
    """n = 1: h_t is the sum over s <= t of exp(A (delta_{s+1} + ... + delta_t)) delta_s B_s u_s."""
    a = {name: t.numpy() for name, t in make_scan(b=1, d=2, l=20, n=1, dtype=torch.float64).items()}
    delta = np.log1p(np.exp(a["delta"] + a["delta_bias"][:, None]))[0]
    until = np.cumsum(delta, -1)
    y = np.empty((2, 20))
    for c in range(2):
        for t in range(20):
            h = np.exp(a["A"][c, 0] * until[c, t]) * a["initial_state"][0, c, 0]
            for s in range(t + 1):
                h += (
                    np.exp(a["A"][c, 0] * (until[c, t] - until[c, s]))
                    * delta[c, s]
                    * a["B"][0, 0, s]
                    * a["u"][0, c, s]
                )
            y[c, t] = a["C"][0, 0, t] * h + a["D"][c] * a["u"][0, c, t]
    y *= a["z"][0] / (1 + np.exp(-a["z"][0]))
    got = selective_scan(
        **{n: torch.from_numpy(t) for n, t in a.items()}, delta_softplus=True, backend="reference"
    )
    np.testing.assert_allclose(got[0].numpy(), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend_or_reference", ["reference", "vectorised"])
@pytest.mark.parametrize(
    "case", [{}, {"g": 2}, {"constant": "BC"}, {"complex_A": True}, {"b": 1, "packed": [0, 2, 5]}]
)
def test_gradcheck(case, backend_or_reference, short_segments):
    arguments = {n: widen(t) for n, t in make_scan(**{"b": 1, "d": 2, "l": 5, "n": 2} | case).items()}
    fixed = {n: arguments.pop(n) for n in ["cu_seqlens"] if n in arguments}

    def scan(*tensors):
        y, last = selective_scan(
            **dict(zip(arguments, tensors, strict=True)), **fixed, delta_softplus=True, return_last_state=True,
            backend=backend_or_reference,
        )  # fmt: skip
        return y, torch.view_as_real(last) if last.is_complex() else last

    assert torch.autograd.gradcheck(scan, [t.requires_grad_() for t in arguments.values()])


@pytest.mark.parametrize("value", [-40.0, -30.0, -15.0, 19.9, 20.1, 30.0])
def test_softplus_far_out(backend, value):
    arguments = make_scan()
    arguments["delta"] = torch.full_like(arguments["delta"], value)
    arguments["delta_bias"] = torch.zeros(4)
    truth = run_with_gradients(
        selective_scan, {n: widen(t) for n, t in arguments.items()}, backend="reference"
    )
    assert_close(
        run_with_gradients(selective_scan, arguments, backend=backend), truth, TOLERANCE[torch.float32]
    )


def test_any_strides(backend):
    plain = make_scan(b=2, d=4, l=33)
    expected = selective_scan(**plain, delta_softplus=True, backend=backend)
    turned = dict(plain)
    for name in ("u", "delta", "z", "B", "C"):
        turned[name] = plain[name].transpose(1, 2).contiguous().transpose(1, 2)
    got = selective_scan(**turned, delta_softplus=True, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    expanded = plain | {
        "delta": plain["delta"][:, :1].expand(2, 4, 33),
        "B": plain["B"][:1].expand(2, -1, -1),
    }
    copied = {n: t.contiguous() for n, t in expanded.items()}
    got, truth = (run_with_gradients(selective_scan, a, backend=backend) for a in (expanded, copied))
    assert_close(got, {n: widen(t) for n, t in truth.items()}, TOLERANCE[torch.float32])


def test_chunks_of_a_sequence_equal_the_whole(backend):
    arguments = make_scan(l=50)
    whole, last = selective_scan(**arguments, delta_softplus=True, return_last_state=True, backend=backend)
    state, parts = arguments.pop("initial_state"), []
    for span in (slice(0, 1), slice(1, 18), slice(18, 18), slice(18, 50)):
        cut = {n: t[..., span] if n in ("u", "delta", "z", "B", "C") else t for n, t in arguments.items()}
        y, state = selective_scan(
            **cut, initial_state=state, delta_softplus=True, return_last_state=True, backend=backend
        )
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, -1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


def test_a_loss_on_the_last_state_alone(backend):
    arguments = make_scan(without=("z",))
    u = arguments["u"].requires_grad_()
    losses = [
        selective_scan(**arguments, return_last_state=True, backend=b)[1].sum()
        for b in ("reference", backend)
    ]
    truth, got = (torch.autograd.grad(loss, u)[0] for loss in losses)
    torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [{}, {"g": 2}, {"complex_A": True}])
@pytest.mark.parametrize("name", ["reference", "vectorised", "auto"])
def test_steps_equal_the_scan(name, case):
    arguments = make_scan(l=9, **case)
    if case.get("complex_A"):  # the step takes B and C as complex numbers
        for weight in ("B", "C"):
            arguments[weight] = torch.view_as_complex(arguments[weight].unflatten(-1, (9, 2)))
    y, last = selective_scan(**arguments, delta_softplus=True, return_last_state=True, backend="reference")
    state = arguments["initial_state"].clone()
    for t in range(9):
        now = {n: arguments[n][..., t] for n in ("u", "delta", "B", "C", "z")}
        step = selective_state_update(
            state, now["u"], now["delta"], arguments["A"], now["B"], now["C"], arguments["D"], now["z"],
            arguments["delta_bias"], True, backend=name,
        )  # fmt: skip
        torch.testing.assert_close(step, y[..., t], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


def test_step_with_heads_equals_the_step_of_their_channels():
    b, h, d, n, g = 2, 3, 4, 5, 3
    state, x, dt, z = (torch.randn(b, h, d, *tail) for tail in ((n,), (), (), ()))
    A, D, bias = -torch.rand(h, d, n), torch.randn(h, d), torch.randn(h, d)
    B, C = torch.randn(b, g, n), torch.randn(b, g, n)
    flat = state.flatten(1, 2).clone()
    expected = selective_state_update(
        flat,
        x.flatten(1),
        dt.flatten(1),
        A.flatten(0, 1),
        B,
        C,
        D.flatten(),
        z.flatten(1),
        bias.flatten(),
        True,
    )
    assert torch.equal(
        selective_state_update(state, x, dt, A, B, C, D, z, bias, True), expected.view(b, h, d)
    )
    assert torch.equal(state, flat.view(b, h, d, n))


def test_step_keeps_a_half_precision_state():
    state, x = torch.zeros(1, 2, 3, dtype=torch.bfloat16), torch.ones(1, 2, dtype=torch.bfloat16)
    y = selective_state_update(state, x, x, -torch.ones(2, 3), torch.ones(1, 3), torch.ones(1, 3))
    assert y.dtype == state.dtype == torch.bfloat16
    assert state.eq(1).all()
    assert y.eq(3).all()


def test_operator_passes_opcheck(backend, short_segments):
    for case in ({}, {"b": 1, "packed": [0, 3, 9]}, {"constant": "BC", "without": ("z", "initial_state")}):
        a = make_scan(**{"l": 9} | case)
        weights = [a[n] if a[n].dim() == 2 else a[n][:, None] for n in ("B", "C")]
        tensors = [a["u"], a["delta"], a["A"], *weights, a["D"], a.get("z"), a["delta_bias"]]
        tensors = [
            None if t is None else t.detach().requires_grad_() for t in (*tensors, a.get("initial_state"))
        ]
        torch.library.opcheck(
            getattr(torch.ops.projecta, f"scan_{backend}"),
            (*tensors, a.get("cu_seqlens"), True, True),
            rtol=1e-4,
            atol=1e-4,
        )


def _bits(backend, threads):
    """All results of a scan of several blocks and tiles, computed by `threads` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return run_with_gradients(selective_scan, _again(b=2, d=150, l=300, n=16), backend=backend)
    finally:
        torch.set_num_threads(before)


def _again(**options):
    torch.manual_seed(0)
    return make_scan(**options)


@pytest.mark.parametrize("cores", [2, 100])
def test_the_number_of_threads_changes_no_bit(cores, monkeypatch):
    monkeypatch.setattr(_eager, "_calls", {})
    monkeypatch.setattr(layout, "CORES", cores)  # with 100 cores, time is cut into pieces
    monkeypatch.setattr(layout, "PIECE", 40)
    one, two, again = _bits("cpu", 1), _bits("cpu", 2), _bits("cpu", 2)
    for name, t in one.items():
        assert torch.equal(t, two[name])
        assert torch.equal(two[name], again[name])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["u", "delta", "z"])
def test_nan_and_inf_affect_later_steps_of_their_channel_only(name, value):
    """The value appears in its channel from its step on, and in no other channel, row or earlier step."""
    arguments = make_scan(b=2, d=20, l=90, n=5)
    clean = selective_scan(**arguments, delta_softplus=True, backend="cpu")
    arguments[name][1, 7, 40] = value
    y = selective_scan(**arguments, delta_softplus=True, backend="cpu")
    assert not y[1, 7, 40].isfinite() or (name == "z" and value == float("inf") and y[1, 7, 40].isinf())
    touched = torch.zeros_like(y, dtype=torch.bool)
    touched[1, 7, 40:] = True
    assert torch.equal(y[~touched], clean[~touched])


def test_a_rate_of_nan_affects_its_channel_only():
    arguments = make_scan(b=2, d=20, l=90, n=5)
    clean = selective_scan(**arguments, delta_softplus=True, backend="cpu")
    arguments["A"][7, 2] = float("nan")
    y = selective_scan(**arguments, delta_softplus=True, backend="cpu")
    others = [c for c in range(20) if c != 7]
    assert y[:, 7].isnan().all()
    assert torch.equal(y[:, others], clean[:, others])


def test_lazily_conjugated_and_negated_arguments():
    """torch sets a flag instead of computing these; a kernel that reads memory must respect the flag."""
    arguments = make_scan(l=9, complex_A=True)
    lazy = arguments | {n: arguments[n].conj().resolve_conj().conj() for n in ("A", "initial_state")}
    lazy["u"] = torch.complex(torch.zeros_like(arguments["u"]), -arguments["u"]).conj().imag
    assert lazy["A"].is_conj()
    assert lazy["u"].is_neg()
    for got, expected in zip(
        selective_scan(**lazy, return_last_state=True, backend="cpu"),
        selective_scan(**arguments, return_last_state=True, backend="cpu"),
        strict=True,
    ):
        assert torch.equal(got, expected)


def test_exponents_out_of_range_saturate():
    """As with exp, delta A far below -126 gives 0, and a large positive delta A gives infinity."""
    u, B = torch.ones(1, 16, 3), torch.ones(1, 4, 3)
    for delta, A in ((1e4, -1.0), (1e4, -1e30), (3e38, -1e-30), (-50.0, -1.0), (-1.0, -50.0)):
        d, rate = torch.full_like(u, delta), torch.full((16, 4), A)
        truth = selective_scan(u, d, rate, B, B, backend="reference")
        torch.testing.assert_close(selective_scan(u, d, rate, B, B, backend="cpu"), truth, rtol=1e-5, atol=0)


def test_rates_of_zero_sum_up(backend):
    """Without decay the state is a running sum; and no warning is raised."""
    u, A, B = torch.rand(1, 3, 40), torch.zeros(3, 2), torch.ones(1, 2, 40)
    y = selective_scan(u, torch.ones_like(u), A, B, B, backend=backend)
    torch.testing.assert_close(y, 2 * u.cumsum(-1))


@pytest.mark.parametrize(
    "options",
    [
        {"d": 5},
        {"d": 20, "g": 2},
        {"d": 3, "complex_A": True},
        {"d": 3, "constant": "BC"},
        {"without": ("z", "D")},
    ],
    ids=str,
)
def test_pieces_of_time_give_the_same(options, monkeypatch):
    """As on a machine with more processors than the scan has blocks."""
    monkeypatch.setattr(_eager, "_calls", {})
    monkeypatch.setattr(layout, "CORES", 20)
    monkeypatch.setattr(layout, "PIECE", 40)
    arguments = make_scan(l=333, n=3, **({"b": 1} | options))
    runs = []

    def count(kernel, items, *args, run=layout.run, **options):
        if kernel in (forward.forward, backward.backward):
            runs.append(items)
        run(kernel, items, *args, **options)

    monkeypatch.setattr(layout, "run", count)
    truth = run_with_gradients(
        selective_scan, {n: widen(t) for n, t in arguments.items()}, backend="reference"
    )
    assert_close(
        run_with_gradients(selective_scan, arguments, backend="cpu"), truth, TOLERANCE[torch.float32]
    )
    assert len(runs) == 4, "forward and backward, twice each"
    assert min(runs) >= 5, "of pieces"


def test_a_forked_child_computes_the_same(tmp_path):
    """As a DataLoader's worker does, after the parent has used its threads."""
    arguments = make_scan(b=2, d=150, l=300, n=16)
    expected = selective_scan(**arguments, delta_softplus=True, backend="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the test forks with threads on purpose
        child = multiprocessing.get_context("fork").Process(
            target=_save_scan, args=(arguments, tmp_path / "y.pt")
        )
        child.start()
    child.join(30)
    child.kill()
    assert child.exitcode == 0
    assert torch.equal(torch.load(tmp_path / "y.pt"), expected)


def _save_scan(arguments, path):
    torch.utils.deterministic.fill_uninitialized_memory = False  # torch's own threads do not survive a fork
    torch.save(selective_scan(**arguments, delta_softplus=True, backend="cpu"), path)


class Scans(torch.utils.data.Dataset):
    """Sequences that are scanned by the workers of a DataLoader."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        torch.manual_seed(i)
        return selective_scan(**make_scan(b=1, d=40, l=300, n=16), delta_softplus=True, backend="cpu")


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loader_workers_scan(context):
    expected = torch.stack([Scans()[i] for i in range(4)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about a fork with threads
        loader = torch.utils.data.DataLoader(
            Scans(), batch_size=None, num_workers=2, multiprocessing_context=context, timeout=60
        )
        got = torch.stack(list(loader))
    assert torch.equal(got, expected)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="narrows the vectors of an x86 processor")
def test_narrower_vectors_compute_the_same(tmp_path):
    """AVX2 instead of the vectors of this processor: the compiler splits the same code."""
    torch.manual_seed(0)
    arguments = make_scan(d=20, l=70, n=5)
    torch.save(arguments, tmp_path / "arguments.pt")
    code = (
        "import sys, torch, projecta; a = torch.load(sys.argv[1] + '/arguments.pt'); "
        "torch.save(projecta.selective_scan(**a, delta_softplus=True, backend='cpu'), sys.argv[1] + '/y.pt')"
    )
    narrow = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=os.environ | narrow)
    truth = selective_scan(
        **{n: widen(t) for n, t in arguments.items()}, delta_softplus=True, backend="reference"
    )
    assert_close({"y": torch.load(tmp_path / "y.pt")}, {"y": truth}, TOLERANCE[torch.float32])


def test_runs_without_a_folder_for_its_cache(tmp_path):
    """Read-only installations compile anew in each process."""
    code = (
        "import numba.core.caching as c; c.CacheImpl._locator_classes = []; import torch, projecta; "
        "print(projecta.causal_conv(torch.ones(1, 2, 3), torch.ones(2, 2), activation=None, backend='cpu')[0, 0].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == [1.0, 2.0, 2.0]


def test_inference_mode_and_autocast(backend):
    arguments = make_scan()
    expected = selective_scan(**arguments, delta_softplus=True, backend=backend)
    with torch.inference_mode(), torch.autocast(arguments["u"].device.type, torch.bfloat16):
        assert torch.equal(selective_scan(**arguments, delta_softplus=True, backend=backend), expected)
        mixed = arguments | {"delta": arguments["delta"].bfloat16()}  # a Linear under autocast returns this
        got = selective_scan(**mixed, delta_softplus=True, backend=backend)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


def test_compiles_without_a_graph_break(backend):
    arguments = make_scan()
    leaves = {n: t.requires_grad_() for n, t in arguments.items()}

    def block(**kwargs):
        return selective_scan(**kwargs, delta_softplus=True, backend=backend).sin().sum()

    expected = torch.autograd.grad(block(**leaves), list(leaves.values()))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for got, truth in zip(
        torch.autograd.grad(compiled(**leaves), list(leaves.values())), expected, strict=True
    ):
        torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-5)


def test_memory_stays_below_two_states_per_step():
    b, d, l, n = 1, 512, 2048, 16
    arguments = make_scan(b, d, l, n, without=("initial_state",))
    every_state = b * d * l * n * 4 / 2**20
    assert (
        peak_mib(lambda: selective_scan(**arguments, delta_softplus=True, backend="vectorised"))
        < 2 * every_state
    )
    leaves = [t.requires_grad_() for t in arguments.values()]

    def train():
        y = selective_scan(**arguments, delta_softplus=True, backend="vectorised")
        return torch.autograd.grad(y.sum(), leaves)

    assert peak_mib(train) < 2 * every_state


def test_available_backends_name_themselves():
    reasons = available_backends()
    assert list(reasons) == ["reference", "vectorised", "cpu", "triton"]
    assert all(reasons[name] == "" for name in ("reference", "vectorised", "cpu"))
    if not torch.cuda.is_available():
        assert reasons["triton"] in (
            "there is no CUDA device",
            "triton cannot be imported (No module named 'triton')",
        )


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(vectorised, "unavailable", lambda: "no such luck")
    with pytest.raises(
        BackendUnavailable, match=r"^selective_scan: backend must .*; got 'vectorised': no such luck\.$"
    ):
        selective_scan(**make_scan(), backend="vectorised")


x = torch.zeros
ERRORS = {  # argument: (changes, exception, message)
    "delta": ({"delta": x(2, 33, 4)}, ValueError, "delta must have shape (b, d, l) = (2, 4, 33) like u; got (2, 33, 4)."),
    "u's rank": ({"u": x(4, 33)}, ValueError, "u must have shape (b, d, l); got (4, 33)."),
    "u's type": ({"u": [1.0]}, TypeError, "u must be a tensor; got list."),
    "u's dtype": ({"u": x(2, 4, 33).int()}, TypeError, "u must be float16, bfloat16, float32 or float64; got int32."),
    "A's shape": ({"A": x(3, 3)}, ValueError, "A must have shape (d, n) with d = 4, n > 0; got (3, 3)."),
    "A's dtype": (
        {"A": x(4, 3).half()}, TypeError, "A must be float32, float64, complex64 or complex128; got float16.",
    ),
    "B's length": (
        {"B": x(2, 3, 32)}, ValueError,
        "B must have shape (d, n), (b, n, l) = (2, 3, 33) or (b, g, n, l); got (2, 3, 32).",
    ),
    "B's groups": ({"B": x(2, 3, 3, 33)}, ValueError, "B must have a number of groups that divides d = 4; got 3."),
    "C's groups": (
        {"B": x(2, 2, 3, 33), "C": x(2, 4, 3, 33)}, ValueError, "C must have as many groups as B, 2; got 4.",
    ),
    "complex B": (
        {"B": x(2, 3, 33, dtype=torch.complex64)}, TypeError, "B must be real like A; got torch.complex64.",
    ),
    "D": ({"D": x(5)}, ValueError, "D must have shape (d,) = (4,); got (5,)."),
    "z": ({"z": x(2, 4, 34)}, ValueError, "z must have shape (b, d, l) = (2, 4, 33) like u; got (2, 4, 34)."),
    "device": ({"delta": x(2, 4, 33, device="meta")}, ValueError, "delta must be on cpu like u; got meta."),
    "initial_state": (
        {"initial_state": x(2, 4, 4)}, ValueError, "initial_state must have shape (b, d, n) = (2, 4, 3); got (2, 4, 4).",
    ),
    "batch with cu_seqlens": (
        {"cu_seqlens": torch.tensor([0, 33], dtype=torch.int32)}, ValueError, "u must have b = 1 with cu_seqlens; got 2.",
    ),
    "backend": (
        {"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'reference', 'vectorised', 'cpu', 'triton'; got 'cuda'.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ERRORS)
def test_a_wrong_argument_is_named_in_one_line(what):
    changes, error, message = ERRORS[what]
    with pytest.raises(error) as caught:
        selective_scan(**make_scan() | changes)
    assert str(caught.value) == f"selective_scan: {message}"


@pytest.mark.parametrize(
    ("bounds", "got"), [([1, 33], "[1, 33]"), ([0, 20], "[0, 20]"), ([0, 20, 10, 33], "[0, 20, 10, 33]")]
)
def test_wrong_bounds_are_named(bounds, got):
    arguments = make_scan(b=1, without=("initial_state",))
    with pytest.raises(
        ValueError, match=r"^selective_scan: cu_seqlens must rise from 0 to l = 33; got "
    ) as caught:
        selective_scan(**arguments, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    assert got in str(caught.value)


def test_a_wrong_step_argument_is_named():
    state, v = torch.zeros(1, 2, 3), torch.ones(1, 2)
    with pytest.raises(
        ValueError, match=r"^selective_state_update: state must have shape \(b, d, n\) = \(1, 2, 4\)"
    ):
        selective_state_update(state, v, v, -torch.ones(2, 4), torch.ones(1, 4), torch.ones(1, 4))
    with pytest.raises(
        ValueError, match=r"^selective_state_update: B must have shape \(b, n\) = \(1, 3\) or"
    ):
        selective_state_update(state, v, v, -torch.ones(2, 3), torch.ones(1, 4), torch.ones(1, 3))


@pytest.mark.parametrize("gradients", [False, True])
def test_meta_tensors_give_shapes_without_memory(gradients):
    arguments = {name: t.to("meta").requires_grad_(gradients) for name, t in make_scan().items()}
    y, last = selective_scan(**arguments, return_last_state=True, backend="vectorised")
    assert y.is_meta
    assert y.shape == arguments["u"].shape
    assert last.shape == arguments["initial_state"].shape
