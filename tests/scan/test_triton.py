"""The Triton kernels without a GPU: interpreted against the reference, and compiled for several GPUs."""

import contextlib
import functools
import importlib.util
import multiprocessing
import os
import random
import re
import subprocess
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.cases import make_scan, run_strided, run_with_gradients, strided, widen

if importlib.util.find_spec("triton") is None:  # no import here: the interpreter must be chosen before
    pytest.skip("triton is not installed", allow_module_level=True)

HALF, BRAIN = torch.float16, torch.bfloat16
TOLERANCE = {
    torch.float32: 1e-5,
    HALF: 2e-3,
    BRAIN: 1.6e-2,
}  # the interpreter truncates bfloat16 instead of rounding
MODES = ("states", "times, chunks")  # plans that `plan_of` returns
CASES = {
    **{f"length {l}": {"l": l, "b": 1, "d": 3} for l in (0, 1, 2, 3, 31, 33)},
    "whole slabs": {"l": 48, "n": 4, "b": 1},
    "whole blocks": {"l": 64, "n": 4, "b": 1},
    "whole blocks of time": {"l": 512, "d": 4, "n": 2, "b": 1, "dtype": HALF},
    "three chunks of two rows": {"l": 136, "d": 2, "n": 2, "b": 2},
    **{f"states {n}": {"n": n, "d": 3, "l": 11} for n in (1, 16, 17, 64)},
    "groups": {"g": 2, "l": 11},
    "constant B": {"constant": "B", "l": 11},
    "constant C": {"constant": "C", "l": 11},
    "constant B, grouped C": {"constant": "B", "g": 2, "l": 11},
    "constant B and C": {"constant": "BC", "l": 11},
    "packed": {"b": 1, "l": 40, "packed": [0, 5, 16, 17, 17, 40]},
    "packed, whole slabs": {"b": 1, "l": 40, "packed": [0, 16, 40], "dtype": HALF},
    "no options": {"without": ("D", "z", "delta_bias", "initial_state"), "l": 11},
    "no z": {"without": ("z",), "l": 11},
    "float16": {"dtype": HALF, "l": 48, "n": 5, "b": 1},
    "float16, odd": {"dtype": HALF, "l": 11},
    "bfloat16": {"dtype": BRAIN, "l": 48, "n": 5, "b": 1},
}
# Cases that also run with fewer saved states, which must change no bit.
SAVED_RARELY = ("length 33", "whole slabs", "packed", "float16, odd")
ARCHITECTURES = (75, 80, 90, 100)


def plan_of(mode, b, d, l, n, groups, packed, saves, wide, along, processors):
    from projecta.scan.triton.plan import Plan

    slabs = -(-l // 8)
    if packed or mode == "states":
        return Plan(False, 1, slabs)
    if not saves and n <= 32:
        return Plan(True, 1, slabs)
    return Plan(False, max(1, -(-slabs // 8)), 8)


def _errors(case, mode):
    """The error of each output and gradient, relative to its largest value."""
    from projecta import selective_scan
    from projecta._triton import launch
    from projecta.scan.triton import layout

    with (
        mock.patch.object(layout, "plan", functools.partial(plan_of, mode)),
        mock.patch.dict(launch._known, clear=True),  # entries of another plan
    ):
        length = CASES[case].get("l", 33)
        return _errors_of(selective_scan, case, graded=mode == "states" or length >= 128)


def _errors_of(selective_scan, case, graded):
    """graded: with gradients, too. Short cases have one chunk of time in both modes."""
    torch.manual_seed(0)
    arguments = make_scan(**CASES[case])
    wide = {name: widen(t) for name, t in arguments.items()}
    truth, got = {}, {}
    if graded:
        truth = run_with_gradients(selective_scan, wide, backend="reference")
        got = run_with_gradients(selective_scan, arguments, backend="triton")
    for every in (16, 32) if graded and case in SAVED_RARELY else ():
        rare = run_with_gradients(selective_scan, arguments, backend="triton", save_every=every)
        for name, value in got.items():
            assert torch.equal(value, rare[name]), f"{name}, saved every {every}"
    with torch.no_grad():  # uses other kernels
        y, last = selective_scan(**arguments, delta_softplus=True, return_last_state=True, backend="triton")
    got |= {"y, no gradients": y, "last, no gradients": last}
    if not graded:
        names = dict(delta_softplus=True, return_last_state=True, backend="reference")
        truth = dict(zip(("y", "last"), selective_scan(**wide, **names), strict=True))
    truth |= {"y, no gradients": truth["y"], "last, no gradients": truth["last"]}
    truth = {name: t for name, t in truth.items() if name in got}
    return {
        name: float((widen(got[name]) - t).abs().max() / t.abs().max().clamp_min(1e-30))
        for name, t in truth.items()
        if t.numel()
    }


@pytest.mark.parametrize(
    ("case", "mode"),
    [(c, m) for c, options in CASES.items() for m in (MODES[:1] if "packed" in options else MODES)],
)
def test_the_kernels_agree_with_the_reference(interpreter, case, mode):
    found = interpreter.submit(_errors, case, mode).result(timeout=600)
    tolerance = TOLERANCE[CASES[case].get("dtype", torch.float32)]
    assert {name: error for name, error in found.items() if not error <= tolerance} == {}


WAYS = ({}, {"g": 2}, {"constant": "BC"}, {"constant": "B", "dtype": HALF}, {"b": 1, "l": 9, "packed": [0, 4, 9]},
        {"dtype": BRAIN}, {"without": ("z", "D")})  # fmt: skip


def _strided_errors(seed):
    """The largest error over tolerance of scans and steps with random strides, inside margins of NaN."""
    from projecta import selective_scan, selective_state_update

    torch.manual_seed(seed)
    draw, worst = random.Random(seed), 0.0
    for way in draw.sample(WAYS, 2):
        tensors = make_scan(**{"b": 2, "d": 4, "l": draw.choice((1, 9, 16)), "n": draw.choice((1, 4))} | way)
        lying = {name: strided(t, draw) for name, t in tensors.items()}
        wide = {name: widen(t) for name, t in lying.items()}
        truth = run_strided(selective_scan, wide, seed, backend="reference")
        got = run_strided(selective_scan, lying, seed, backend="triton")
        for name, t in truth.items():
            error = (widen(got[name]) - t).abs().max() / t.abs().max().clamp_min(1e-30)
            worst = max(worst, float(error) / TOLERANCE[lying["u"].dtype])
    shapes = {"x": (2, 4), "dt": (2, 4), "A": (4, 3), "B": (2, 3), "C": (2, 1, 3), "D": (4,), "z": (2, 4)}
    step = {name: strided(torch.randn(shape), draw) for name, shape in shapes.items()}
    state = strided(torch.randn(2, 4, 3), draw, expand=False)
    kept = state.clone(memory_format=torch.contiguous_format)
    y, truth = (
        selective_state_update(s, **step, backend=b) for s, b in ((state, "triton"), (kept, "reference"))
    )
    found = max((y - truth).abs().max() / truth.abs().max(), (state - kept).abs().max() / kept.abs().max())
    return max(worst, float(found) / TOLERANCE[torch.float32])


def test_calls_of_random_strides_agree_with_the_reference(interpreter):
    jobs = [interpreter.submit(_strided_errors, seed) for seed in range(5)]
    assert [job.result(timeout=600) for job in jobs if not job.result() <= 1] == []


def _check_others():
    """Strides, the step, NaN between packed sequences, refusals."""
    from projecta import selective_scan, selective_state_update

    torch.manual_seed(0)
    a = make_scan(b=2, d=8, l=19, n=3)
    y = selective_scan(**a, delta_softplus=True, backend="triton")  # steps below 0 would overflow
    views = {n: t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() == 3 else t for n, t in a.items()}
    torch.testing.assert_close(
        selective_scan(**views, delta_softplus=True, backend="triton"), y, rtol=1e-6, atol=1e-6
    )

    for extra in (
        {},
        {"z": torch.randn(2, 8), "D": torch.randn(8), "dt_bias": torch.randn(8), "dt_softplus": True},
    ):
        state, x, dt = torch.randn(2, 8, 3), torch.randn(2, 8), torch.rand(2, 8)
        B, C, other = torch.randn(2, 2, 3), torch.randn(2, 3), state.clone()
        one = selective_state_update(state, x, dt, a["A"], B, C, **extra, backend="triton")
        two = selective_state_update(other, x, dt, a["A"], B, C, **extra, backend="reference")
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state, other, rtol=1e-5, atol=1e-5)

    wide = torch.randn(2, 3, 8).transpose(1, 2)  # a layout that no kernel writes
    other, A = wide.contiguous(), a["A"].T.contiguous().T
    one = selective_state_update(wide, x, dt, A, B, C, backend="triton")
    torch.testing.assert_close(
        one, selective_state_update(other, x, dt, A, B, C, backend="reference"), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(wide, other, rtol=1e-5, atol=1e-5)

    steady = make_scan(constant="BC", l=11)
    truth = run_with_gradients(selective_scan, steady, backend="reference")
    steady |= {name: steady[name].T.contiguous().T for name in "BC"}
    got = run_with_gradients(selective_scan, steady, backend="triton")
    for name in ("dB", "dC"):
        torch.testing.assert_close(got[name], truth[name], rtol=1e-4, atol=1e-4)

    for n, l in ((4, 16), (33, 16), (33, 11)):  # mixed dtypes: the narrowest one decides the word
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            mixed = make_scan(b=1, d=2, n=n, l=l)
            mixed |= {name: mixed[name].to(dtype) for name in ("delta", "z")}
            truth = run_with_gradients(selective_scan, mixed, backend="reference")
            got = run_with_gradients(selective_scan, mixed, backend="triton")
            for name in ("y", "du", "dB", "ddelta", "dz"):
                assert got[name].dtype == truth[name].dtype
                error = (got[name].float() - truth[name].float()).abs().max() / truth[name].abs().max()
                assert error < (1e-2 if name in ("ddelta", "dz") and dtype == torch.bfloat16 else 2e-3), (
                    name,
                    error,
                )

    packed = make_scan(b=1, l=40, packed=[0, 13, 40])
    for name in ("u", "delta", "B", "C", "z"):
        packed[name][..., :13] = float("nan")
    out = run_with_gradients(selective_scan, packed, backend="triton")
    for name in ("y", "du", "ddelta", "dz"):
        assert torch.isfinite(out[name][..., 13:]).all(), name

    with pytest.raises(TypeError, match="A must be real, and u not float64, for backend 'triton'"):
        selective_scan(**make_scan(complex_A=True), backend="triton")
    with pytest.raises(TypeError, match="Take backend='vectorised'"):
        selective_scan(**make_scan(dtype=torch.float64), backend="triton")


def test_strides_steps_and_refusals(interpreter):
    interpreter.submit(_check_others).result(timeout=300)


def _module_of(kernel):
    """The module that defines a kernel."""
    places = {"forward": "forward", "backward": "backward", "carry": "backward"}
    if "convolve" in kernel or kernel == "sum_totals":
        return "projecta.conv.triton.kernels"
    if kernel.partition("_")[0] in ("pool", "expand", "spread"):
        return "projecta.mrss.triton"
    return "projecta.scan.triton." + places.get(kernel.partition("_")[0], "pack_and_step")


def _compile(kernel, element, architecture, constants):
    """Compile for an architecture, without a GPU: (PTX, shared bytes, registers, spilled bytes)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel = kernel.partition(",")[0]
    function = getattr(import_module(_module_of(kernel)), kernel)
    names = [p.name for p in function.params]
    own = {
        "u", "delta", "z", "y", "ungated", "grad_y", "du", "ddelta", "dz", "x", "dt", "gated", "dx", "dt_weight",
        "dstart",
    }  # fmt: skip
    wide = {
        "A", "D", "bias", "last", "saved", "start", "grad_last", "sums", "totals", "carried", "spans", "state",
        "B", "C", "to_B", "to_C", "dA", "dD", "dbias", "grad_start", "weight", "dweight", "to",
    }  # fmt: skip

    by_block = {"x", "span", "values", "dx", "dspan", "dvalues"} if "mrss" in function.__module__ else set()

    def kind(name):
        if name in constants:
            return "constexpr"
        if name in by_block:
            return "*fp32"
        if name in own or (name in {"B", "C", "dB", "dC"} and "pack_and_step" in _module_of(kernel)):
            return "*" + element
        return (
            "*fp32" if name in wide else "*i32" if name in {"bounds", "begins", "sizes", "leads"} else "i32"
        )

    warps = constants.get("THREADS", 32) // 32 * constants.get("WARPS", 1)
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: kind(name) for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    fixed = {(names.index(n),): value for n, value in constants.items()}
    source = ASTSource(function, signature, constexprs=fixed, attrs=aligned)
    built = compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": 4 if kernel == "pack_weights" else warps},
    )
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    cubin = Path(os.environ["PROJECTA_CUBINS"]) / f"{kernel}-{element}-{architecture}.cubin"
    cubin.write_bytes(built.asm["cubin"])
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack, shared = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage).groups())
    return built.asm["ptx"], shared + built.metadata.shared, registers, stack


_CONV = {
    "start": None, "bounds": None, "WIDTH": 4, "SILU": True, "TIME": True, "WIDE": True, "WHOLE": True,
    "THREADS": 128,
}  # fmt: skip
_SCAN = {
    "bounds": None, "SOFTPLUS": True, "LOG_A": False, "STEADY_B": False, "STEADY_C": False, "WIDE": True, "WHOLE": True, "N": 16,
    "LANES": 4, "CHANNELS": 8, "WARPS": 4,
}  # fmt: skip
_MRSS = {
    "begins": None, "sizes": None, "leads": None, "SOFTPLUS": True, "PERIOD": 8, "STEPS": 8, "WHOLE": True,
    "CHANNELS": 1, "BLOCKS": 128, "WARPS": 4, "ul": 1, "sl": 1, "zl": 1, "yl": 1, "gl": 1,
}  # fmt: skip
_ACROSS = _MRSS | {"CHANNELS": 32, "BLOCKS": 4, "WARPS": 1, "ud": 1, "sd": 1, "zd": 1, "yd": 1, "gd": 1}
KERNELS = {
    "forward_states": _SCAN | {"start": None, "UNROLL": 4, "EVERY": 1},
    "forward_times": _SCAN | {"start": None, "WARPS": 1, "NATIVE": False, "PIN": True},
    "backward": _SCAN | {"EVERY": 2, "carried": None, "spans": None, "grad_start": None, "gated": None},
    "backward, y again": _SCAN
    | {"EVERY": 2, "carried": None, "spans": None, "grad_start": None, "ungated": None},
    "carry": _SCAN | {"UNROLL": 4},
    "forward_times, reversed": _SCAN | {"start": None, "WARPS": 1, "WIDE": -1, "NATIVE": -1, "PIN": True},
    "backward, reversed": _SCAN
    | {"WIDE": -1, "EVERY": 1, "carried": None, "spans": None, "grad_start": None, "gated": None},
    "pack_weights": {"N": 16, "LANES": 0, "BLOCK": 128, "UNIT": True},
    "reduce_tiles": {"N": 16, "BLOCK": 128},
    "fold_chunks": {"start": None, "BACK": False, "LOG_A": True, "N": 16, "STATES": 16, "BLOCK": 16},
    "convolve": _CONV,
    "convolve, along channels": _CONV | {"TIME": False, "WIDE": False, "WHOLE": False, "WIDTH": 8},
    "convolve_backward": _CONV,
    "convolve_backward_start": {"bounds": None, "WIDTH": 4, "SILU": True, "BLOCK": 128, "WARPS": 4},
    "convolve_step": {"WIDTH": 4, "SILU": True, "BLOCK": 128, "KEPT": 3, "WARPS": 4},
    "sum_totals": {"WIDTH": 4, "BLOCK": 128, "WARPS": 4},
    **{f"{name}, time last": _MRSS for name in ("pool", "expand", "expand_back", "pool_back")},
    **{f"{name}, channels last": _ACROSS for name in ("pool", "expand_back", "pool_back")},
    "spread, added": _MRSS | {"ADD": True},
    "update_state": {
        "SOFTPLUS": True, "LOG_A": False, "CHANNELS": 64, "N": 16, "GROUPED": False, "WHOLE": True, "RANK": 48,
        "WARPS": 4,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    os.environ["PROJECTA_CUBINS"] = str(tmp_path_factory.mktemp("cubins"))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool
    del os.environ["PROJECTA_CUBINS"]


def _check_launches():
    """The second launch calls the kernel that the first compiled, with the constants in its order."""
    from projecta._triton import launch

    log = []

    class Built:
        def __getitem__(self, grid):
            return lambda *arguments: log.append(("built", grid, arguments))

    class Kernel:
        def __init__(self):
            self.arg_names = ["x", "y", "n", "N", "BLOCK"]

        def __getitem__(self, grid):
            def run(**arguments):
                log.append(("compiled", grid, arguments))
                return Built()

            return run

    x, options, kernel = torch.zeros(9), {"BLOCK": 4, "N": 2, "num_warps": 1}, Kernel()
    for tensor in (x, x + 1, x.half(), x[1:], x):
        launches = launch.cached(dict, (tensor, None), "kind")
        tensors = {"x": tensor, "y": None}
        launch.start_kernel(launches, kernel, tensors, lambda: ((7,), {"n": 3}, options))
    assert [entry[0] for entry in log] == ["compiled", "built", "compiled", "compiled", "built"]
    assert log[0][1:] == ((7,), {"x": x, "y": None, "n": 3} | options)
    assert log[4][1:] == ((7, 1, 1), (x.data_ptr(), None, 3, 2, 4))


class Recorded:
    """Replaces a kernel; logs each launch, with the arguments in the kernel's order."""

    def __init__(self, kernel, log):
        self.name, self.arg_names, self.log = kernel.__name__, kernel.arg_names, log

    def __getitem__(self, grid):
        def compile_(**given):
            given = {n: t.data_ptr() if isinstance(t, torch.Tensor) else t for n, t in given.items()}
            self.log.append((f"compiled {self.name}", tuple(given[name] for name in self.arg_names)))
            return {grid if len(grid) == 3 else (*grid, 1, 1)[:3]: self.run}

        return compile_

    def run(self, *arguments):
        self.log.append((self.name, arguments))


def _check_addresses():
    """A repeated call gets the addresses of its own tensors, of views of them, and of its own scratch memory."""
    from projecta._triton.launch import Recording

    def start(stream, *addresses):
        log.append(addresses)

    def record(given, made, scratch):
        recording = Recording(given, made)
        with recording:
            recording.add_buffer(scratch)
            recording.add((start, (7,)), [given[0], made[0], made[0][2:], None, scratch, scratch[5:]])
        return recording

    memory, log = bytearray(4 * 64), []
    neighbours = [torch.frombuffer(memory, dtype=torch.float32, count=16, offset=64 * i) for i in range(2)]
    # the output is the second half of its storage, and scratch memory begins right behind that
    recording = record([torch.ones(3)], [neighbours[0][8:]], neighbours[1])
    assert recording.complete
    given, made = torch.ones(3), torch.ones(16)[8:]
    recording.repeat((given, made), given)
    x, y, view, none, scratch, part, number = log[-1]
    assert (x, y, view, none, number) == (
        given.data_ptr(), made.data_ptr(), made.data_ptr() + 8, None, 7
    )  # fmt: skip
    assert part - scratch == 20
    assert not 0 <= scratch - made.data_ptr() < 64
    twice = torch.ones(3)
    assert not Recording([twice, twice], []).complete  # says nothing of calls with two tensors
    with Recording([], []) as other:
        other.add((start, ()), [torch.ones(3)])
    assert not other.complete  # a copy that only the recorded call had


def _check_repeats():
    """A call that differs only in values repeats the launches of the first call, with its own tensors."""
    from projecta import available_backends, selective_scan
    from projecta._calls import call_key
    from projecta._triton import launch
    from projecta.scan import _eager
    from projecta.scan.triton import backward, forward, layout, pack_and_step

    log = []

    def inputs(b=1, d=1536, l=64, n=16, dtype=HALF, constant=False):
        u, delta, z = (torch.randn(b, d, l).to(dtype) for _ in range(3))
        B, C = (torch.randn(b, n, l).to(dtype) for _ in range(2))
        return {
            "u": u, "delta": delta, "A": -torch.rand(d, n), "B": torch.randn(d, n) if constant else B, "C": C,
            "D": torch.ones(d), "z": z, "delta_bias": torch.ones(d),
        }  # fmt: skip

    def call(**arguments):
        del log[:]
        found = selective_scan(**arguments, delta_softplus=True, return_last_state=True, backend="triton")
        return found, list(log)

    names = {
        "pack_weights": pack_and_step, "forward_times": forward, "forward_states": forward,
        "backward": backward, "reduce_tiles": pack_and_step, "reduce_chunks": pack_and_step,
    }  # fmt: skip
    stubs = {name: Recorded(getattr(module, name), log) for name, module in names.items()}
    available_backends()  # loads the Triton backend
    with contextlib.ExitStack() as patches:
        for name, module in names.items():
            patches.enter_context(mock.patch.object(module, name, stubs[name]))
        patches.enter_context(mock.patch.object(layout, "processors_of", return_value=132))
        for table in (_eager._calls, launch._known):
            patches.enter_context(mock.patch.dict(table, clear=True))
        for case, expected in (
            ({}, ["forward_times"]),
            ({"dtype": torch.float32}, ["pack_weights", "forward_times"]),
            ({"dtype": torch.float32, "constant": True}, ["pack_weights", "forward_times"]),
            ({"b": 8, "l": 40}, ["pack_weights", "forward_states"]),
            ({"d": 64, "l": 1024}, ["pack_weights", "forward_states", "forward_states"]),
        ):
            first, second = inputs(**case), inputs(**case)
            (y, last), compiled = call(**first)
            assert [name for name, _ in compiled] == [f"compiled {name}" for name in expected]
            moved = {t.data_ptr(): second[name].data_ptr() for name, t in first.items()}
            old, found = (y, last), []
            (y, last), found = call(**second)
            assert [name for name, _ in found] == expected
            assert (y.shape, y.dtype, last.shape) == (old[0].shape, old[0].dtype, old[1].shape)
            moved |= {o.data_ptr(): t.data_ptr() for o, t in zip(old, (y, last), strict=True)}
            for (name, before), (_, after) in zip(compiled, found, strict=True):
                for parameter, x, at in zip(stubs[name.split()[1]].arg_names, before, after, strict=False):
                    if parameter in ("B", "C", "to_B", "to_C", "carried", "spans") and x not in moved:
                        assert (x is None) == (at is None), parameter  # scratch memory of each call
                    else:
                        assert at == moved.get(x, x), (name, parameter)
            rows = [dict(zip(stubs[name].arg_names, at, strict=False)) for name, at in found]
            for row in rows[1:]:  # each kernel reads the output of `pack_weights`
                assert (row["B"], row["C"]) == (rows[0]["to_B"], rows[0]["to_C"])
        first = inputs()
        whole = len(_eager._calls)
        for change in ({"u": first["u"].mT.contiguous().mT}, {"D": first["D"].half()}, {"z": None}):
            assert call(**{**first, **change})[1]
        assert len(_eager._calls) == whole + 3
        first = inputs(l=32)
        call(**{**first, "delta": first["u"]})  # one tensor in two places, then two with the same key
        for _ in range(2):
            row = dict(zip(stubs["forward_times"].arg_names, call(**first)[1][-1][1], strict=False))
            assert (row["u"], row["delta"]) == (first["u"].data_ptr(), first["delta"].data_ptr())
        wide = inputs(b=8, l=40)
        for prefix in ("compiled ", ""):  # with gradients: the second call compiles nothing
            leaves = [t.detach().requires_grad_() for t in wide.values()]
            (y, _), forwards = call(**dict(zip(wide, leaves, strict=True)))
            del log[:]
            grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
            assert [name for name, _ in forwards] == [prefix + n for n in ("pack_weights", "forward_states")]
            expected = ["pack_weights", "backward", "reduce_tiles", "reduce_chunks"]
            assert [name.removeprefix("compiled ") for name, _ in log] == expected
            assert [g.shape for g in grads] == [t.shape for t in leaves]
            found = dict(log)
        back = dict(zip(stubs["backward"].arg_names, found["backward"], strict=False))
        assert back["u"] == leaves[0].data_ptr()
        assert back["du"] == grads[0].data_ptr()
        assert back["grad_last"] is None
        for name, wrong in (("delta", first["delta"][..., 1:]), ("D", first["D"][1:]), ("u", [1])):
            with pytest.raises((ValueError, TypeError), match=rf"^selective_scan: {name} must"):
                call(**{**first, name: wrong})
        with pytest.raises(ValueError, match=r"^selective_scan: save_every must"):
            call(**first, save_every=9)
    graded = torch.ones(3, requires_grad=True)
    key = functools.partial(call_key, options=(True, 8, False, "triton"))
    assert key((graded,)) != key((graded.detach(),))
    seen = []  # transforms need it too
    torch.func.vmap(lambda t: seen.append(key((t,))) or t)(torch.ones(3))
    assert seen == [None]


def _check_plan():
    """The fastest plans on an H100: (saves, float32) -> lanes along time, chunks of time."""
    from projecta.scan.triton.plan import plan

    table = {
        (1, 1536, 512): {(False, False): (True, 1), (False, True): (True, 1), (True, False): (False, 8)},
        (1, 1536, 16384): {(False, False): (True, 1), (False, True): (False, 8), (True, True): (False, 8)},
        (8, 1536, 2048): {(False, False): (False, 1), (False, True): (False, 1), (True, False): (False, 1)},
        (1, 5120, 2048): {(False, False): (True, 1), (False, True): (False, 1), (True, False): (False, 2)},
        (4, 1024, 1000): {(False, False): (True, 1), (False, True): (False, 3), (True, False): (False, 3)},
        (1, 64, 65536): {(False, False): (False, 64), (True, False): (False, 64)},
    }
    for (b, d, l), cases in table.items():
        for (saves, wide), expected in cases.items():
            times, parts, chunk = plan(b, d, l, 16, 1, False, saves, wide, True, 132)
            assert (times, parts) == expected, (b, d, l, saves, wide)
            assert (parts - 1) * chunk < -(-l // 8) <= parts * chunk  # every chunk has a slab
    for l, along, expected in ((2048, True, True), (2048, False, False), (256, True, False)):
        assert plan(8, 768, l, 16, 1, False, False, False, along, 132)[:2] == (expected, 1), (l, along)
    for l in range(1, 3000, 7):
        for d in (1, 8, 100, 1000):
            for saves in (False, True):
                _, parts, chunk = plan(1, d, l, 16, 1, False, saves, True, True, 132)
                assert (parts - 1) * chunk < -(-l // 8) <= parts * chunk, (d, l, saves)


def test_the_table_of_plans(compiler):
    compiler.submit(_check_plan).result(timeout=300)


def test_launches_after_the_first(interpreter):
    interpreter.submit(_check_launches).result(timeout=300)


def test_a_repeated_call_gets_its_own_addresses(interpreter):
    interpreter.submit(_check_addresses).result(timeout=300)


def test_a_repeated_call_is_one_launch(interpreter):
    interpreter.submit(_check_repeats).result(timeout=300)


def _check_outputs():
    """Launches that are kept for a call are another call's, if only the strides of its outputs differ."""
    from projecta._triton import launch
    from projecta.scan._operator import Inputs
    from projecta.scan.triton.launch import backward_pass, forward_pass, saved_shape

    a = make_scan(b=2, d=4, l=9, n=3)
    inputs = Inputs(
        *(
            a[k][:, None] if k in "BC" else a[k]
            for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
        )
    )
    saved, last, found = torch.empty(saved_shape(inputs, 2, 8)), torch.empty(2, 4, 3), []
    for lay in (torch.empty_like, lambda t: torch.cat([t, t], 1)[:, : t.shape[1]]):
        y, before = lay(inputs.u), len(launch._known)
        forward_pass(inputs, True, y, last, saved)
        found += [y, len(launch._known) - before]
        before, grads = (
            len(launch._known),
            Inputs(
                *(
                    lay(t) if t.dim() == 3 and t is not inputs.initial_state else torch.empty_like(t)
                    for t in inputs[:9]
                )
            ),
        )
        backward_pass(inputs.u, None, saved, inputs, True, grads)
        found.append(len(launch._known) - before)
    assert torch.equal(found[0], found[3])
    assert [found[i] for i in (1, 2, 4, 5)] == [1, 1, 1, 1]


def test_kept_launches_know_the_strides_of_outputs(interpreter):
    interpreter.submit(_check_outputs).result(timeout=300)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_compiles_from_the_t4_on(compiler, kernel):
    """No tensor cores, no bfloat16 arithmetic for sm_75, little shared memory, few spills."""
    jobs = {
        (element, architecture): compiler.submit(_compile, kernel, element, architecture, KERNELS[kernel])
        for element in ("fp16", "bf16")
        for architecture in (ARCHITECTURES if "," not in kernel else (75, 90))
        if element == "bf16" or architecture == 75
    }
    given = {name: value for name, value in KERNELS[kernel].items() if value is not None}
    if given != KERNELS[kernel]:  # every optional array, and constant B
        given |= {"WIDE": False, "WHOLE": False, "STEADY_B": True}
        jobs["fp16", 90] = compiler.submit(_compile, kernel, "fp16", 90, given)
    for (element, architecture), job in jobs.items():
        ptx, shared, registers, stack = job.result(timeout=600)
        name = f"{kernel} {element} sm_{architecture}"
        assert shared < 64 * 1024, name
        assert registers <= 255, name
        assert stack <= 64, f"{name}: {stack} bytes"
        assert not re.search(r"\b(mma|wmma|wgmma|tcgen05)\b", ptx), name
        if architecture == 75:
            assert not re.search(r"\b(add|sub|mul|fma|neg|max|min)\.\S*bf16", ptx), name
