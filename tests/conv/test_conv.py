"""The causal convolution: every backend against the reference in float64, its derivatives and its errors."""

import pytest
import torch

from projecta import BackendUnavailable, causal_conv, causal_conv_update
from tests.cases import widen

HALF, BRAIN = torch.float16, torch.bfloat16
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, HALF: 2e-3, BRAIN: 1.6e-2}
CASES = {
    **{f"length {l}": {"l": l} for l in (0, 1, 2, 3, 9)},
    **{f"width {k}": {"k": k, "start": True} for k in (1, 2, 3, 5, 8)},
    "one channel": {"d": 1},
    "vectors of channels and a rest": {"d": 150, "l": 20, "order": "bld"},
    "blocks of time and a rest": {"l": 300},
    "chunks of time": {"l": 2500, "d": 2, "k": 3},
    "chunks of steps": {"l": 150, "d": 5, "order": "bld", "start": True},
    "batch of whole blocks": {"l": 512, "d": 5, "b": 3, "dtype": BRAIN},
    "time last, batch inside": {"l": 64, "d": 5, "b": 3, "order": "dbl"},
    "time first": {"order": "lbd", "start": True},
    "no bias": {"bias": False},
    "no activation": {"activation": None, "start": True},
    "start": {"start": True, "l": 21},
    "start, longer than the sequence": {"start": True, "l": 2, "k": 5},
    "packed": {"packed": [0, 5, 16, 17, 17, 40], "start": True},
    "packed, channels last": {"packed": [0, 5, 16, 17, 17, 40], "order": "bld"},
    "packed, whole blocks": {"packed": [0, 16, 40], "dtype": HALF},
    "float16, channels last": {"dtype": HALF, "order": "bld", "d": 40},
    "bfloat16": {"dtype": BRAIN, "l": 48},
    "float64": {"dtype": torch.float64, "l": 48},
    "reversed": {"reverse": True, "start": True, "l": 21},
    "reversed, whole blocks": {"reverse": True, "l": 256, "d": 3, "b": 1, "dtype": BRAIN},
    "reversed, words": {"reverse": True, "l": 48, "start": True, "dtype": HALF},
    "reversed, channels last": {"reverse": True, "l": 150, "d": 5, "order": "bld", "start": True},
    "reversed, packed": {"reverse": True, "packed": [0, 5, 16, 17, 17, 40], "start": True},
    "reversed, packed, channels last": {"reverse": True, "packed": [0, 5, 16, 17, 17, 40], "order": "bld"},
    "reversed, length 2": {"reverse": True, "l": 2, "start": True, "k": 5},
}


def make_conv(b=2, d=4, l=33, k=4, order="bdl", bias=True, start=False, packed=None, activation="silu",
              dtype=torch.float32, reverse=False):  # fmt: skip
    """Tensors and options of a call; `order` is that of x's axes in memory."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if packed:
        b, l = 1, packed[-1]
    sizes = {"b": b, "d": d, "l": l}
    x = torch.randn([sizes[axis] for axis in order], dtype=dtype).permute(
        [order.index(axis) for axis in "bdl"]
    )
    tensors = {"x": x, "weight": torch.randn(d, k, dtype=wide)}
    if bias:
        tensors["bias"] = torch.randn(d, dtype=wide)
    if start:
        tensors["initial_state"] = torch.randn(len(packed) - 1 if packed else b, d, k - 1, dtype=dtype)
    bounds = torch.tensor(packed, dtype=torch.int32) if packed else None
    return tensors, {"activation": activation, "cu_seqlens": bounds, "reverse": reverse}


def run_all(tensors, options, backend):
    """y, the last inputs and every gradient of one fixed loss, by name."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y, last = causal_conv(**leaves, **options, return_last_state=True, backend=backend)
    torch.manual_seed(1)
    draw = torch.randn(y.shape, dtype=torch.float64).to(y)
    loss = (y * draw).sum() + (last * torch.randn(last.shape, dtype=torch.float64).to(last)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"y": y.detach(), "last": last.detach(), **dict(zip(leaves, grads, strict=True))}


def errors(case, backend):
    """The error of each result against the reference in float64, relative to its largest value."""
    torch.manual_seed(0)
    tensors, options = make_conv(**CASES[case])
    truth = run_all({n: widen(t) for n, t in tensors.items()}, options, "reference")
    got, found = run_all(tensors, options, backend), {}
    for name, value in truth.items():
        assert got[name].dtype == ({**tensors, "y": tensors["x"], "last": tensors["x"]}[name]).dtype
        assert got[name].shape == value.shape
        scale = value.abs().max().item() if value.numel() else 0
        worst = (got[name].double() - value).abs().max().item() if value.numel() else 0
        found[name] = worst / (scale or 1)
    assert got["y"].stride() == torch.empty_like(tensors["x"]).stride()
    again = run_all(tensors, options, backend)
    assert all(torch.equal(got[name], again[name]) for name in got)
    return found


def within(found, dtype):
    for name, error in found.items():
        assert error <= TOLERANCE[dtype], f"{name}: {error}"


@pytest.mark.parametrize("case", CASES)
def test_cpu_equals_the_reference(case):
    within(errors(case, "cpu"), CASES[case].get("dtype", torch.float32))


@pytest.mark.parametrize("on", ["reference", "cpu"])
@pytest.mark.parametrize("case", [case for case in CASES if "reversed" in case])
def test_reversed_it_has_the_bits_of_a_flipped_input(case, on):
    tensors, options = make_conv(**CASES[case])
    y, last = causal_conv(**tensors, **options, return_last_state=True, backend=on)
    bounds, flipped = options["cu_seqlens"], {**tensors, "x": tensors["x"].flip(-1)}
    options |= {"reverse": False}
    if bounds is not None:
        options["cu_seqlens"] = (bounds[-1] - bounds).flip(0)
        if "initial_state" in tensors:
            flipped["initial_state"] = tensors["initial_state"].flip(0)
    wanted, end = causal_conv(**flipped, **options, return_last_state=True, backend=on)
    assert torch.equal(y, wanted.flip(-1))
    assert torch.equal(last, end if bounds is None else end.flip(0))


def test_threads_change_nothing():
    tensors, options = make_conv(b=2, d=300, l=700, order="bld", start=True)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(run_all(tensors, options, "cpu"))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


def test_nothing_reads_across_packed_sequences():
    tensors, options = make_conv(packed=[0, 7, 20], order="bld")
    tensors["x"][..., :7] = float("nan")
    for backend in ("reference", "cpu"):
        assert causal_conv(**tensors, **options, backend=backend)[..., 7:].isfinite().all()


@pytest.mark.parametrize("cut", [0, 1, 2, 9, 33])
def test_two_calls_equal_one(cut):
    tensors, _ = make_conv(start=True)
    x, start = tensors.pop("x"), tensors.pop("initial_state")
    whole, last = causal_conv(x, **tensors, initial_state=start, return_last_state=True)
    one, between = causal_conv(x[..., :cut], **tensors, initial_state=start, return_last_state=True)
    other, end = causal_conv(x[..., cut:], **tensors, initial_state=between, return_last_state=True)
    assert torch.allclose(torch.cat([one, other], -1), whole, atol=1e-6)
    assert torch.equal(end, last)


@pytest.mark.parametrize("columns", [3, 4, 6])
def test_update_equals_the_convolution(columns):
    tensors, _ = make_conv(l=9)
    x, state = tensors.pop("x"), torch.zeros(2, 4, columns)
    steps = [causal_conv_update(x[..., t], state, **tensors) for t in range(9)]
    assert torch.allclose(torch.stack(steps, -1), causal_conv(x, **tensors), atol=1e-6)
    assert torch.equal(state, x[..., 9 - columns :])


def test_operators_are_registered_as_torch_wants():
    tensors, _ = make_conv(start=True)
    x, weight, bias, start = (t.requires_grad_() for t in tensors.values())
    torch.library.opcheck(torch.ops.projecta.conv_cpu.default, (x, weight, bias, start, None, True, True))


def test_compiles_as_one_graph():
    tensors, options = make_conv(start=True)
    call = torch.compile(lambda t: causal_conv(**t, **options), fullgraph=True, backend="aot_eager")
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    assert torch.equal(call(leaves), causal_conv(**leaves, **options))
    call(leaves).sum().backward()
    assert all(t.grad is not None for t in leaves.values())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch warns at a dual number
def test_refused_derivatives_raise():
    tensors, _ = make_conv()
    leaves = [t.requires_grad_() for t in tensors.values()]
    (first,) = torch.autograd.grad(causal_conv(*leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="backend must be 'reference' for second derivatives"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match="backend must be 'reference' for forward-mode"):
        torch.func.jvp(lambda x: causal_conv(x, *leaves[1:]), (leaves[0],), (leaves[0],))


X, W = torch.zeros(2, 4, 5), torch.zeros(4, 3)
WRONG = {
    "x must have shape (b, d, l); got (4, 5)": (X[0], W),
    "weight must have shape (d, k) with d = 4, k > 0; got (5, 3)": (X, torch.zeros(5, 3)),
    "bias must have shape (d,) = (4,); got (3,)": (X, W, torch.zeros(3)),
    "x must be float16, bfloat16, float32 or float64; got int64": (X.long(), W),
}
OPTIONS = {
    "activation must be one of 'silu', 'swish', None; got 'relu'": {"activation": "relu"},
    "initial_state must have shape (b, d, k - 1) = (2, 4, 2); got (2, 4, 3)": {"initial_state": X[..., :3]},
    "x must have b = 1 with cu_seqlens; got 2": {"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)},
    "backend must be one of 'auto', 'reference', 'cpu', 'triton'; got 'cuda'": {"backend": "cuda"},
}


@pytest.mark.parametrize("message", [*WRONG, *OPTIONS])
def test_errors_name_argument_rule_and_value(message):
    with pytest.raises((ValueError, TypeError)) as error:
        causal_conv(*WRONG.get(message, (X, W)), **OPTIONS.get(message, {}))
    assert str(error.value) == f"causal_conv: {message}."


def test_wide_filters_and_missing_backends():
    x, wide = torch.randn(1, 2, 20), torch.randn(2, 9)
    assert torch.equal(causal_conv(x, wide), causal_conv(x, wide, backend="reference"))
    with pytest.raises(ValueError, match="weight must have k <= 8 for backend 'cpu'; got 9"):
        causal_conv(x, wide, backend="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="got 'triton'"):
            causal_conv(x, wide[:, :4], backend="triton")
