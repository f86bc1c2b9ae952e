"""Helpers of several test files: random scans, and the benchmarks of the suites."""

import importlib
import itertools
import os
import random

import torch

SUITES = ("scan", "s4d", "mrss", "lengths", "block", "mamba", "vtp")


def use_interpreter():
    """Let Triton interpret in this process. No module of projecta may be imported yet: they read this, too."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    from triton.runtime import interpreter

    # Each call of a device function looks for what it must replace in triton.language: two fifths of the time.
    # A kernel's start has done so, for all but the functions of triton.language itself.
    plain, done = interpreter.InterpretedFunction.__call__, set()

    def call(self, *args, **kwargs):
        if not self.fn.__module__.startswith("triton.") or self.fn.__module__ in done:
            return self.rewrite()(*args, **kwargs)
        done.add(self.fn.__module__)
        return plain(self, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    # Half of the rest: each sum of integers is computed again in 64 bits, and compared for an assertion that
    # only debug=True makes; and each array builds the table of types again.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    find, types = interpreter._get_np_dtype, {}

    def find_once(kind):
        name = kind.scalar.name
        if name not in types:
            types[name] = find(kind)
        return types[name]

    interpreter._get_np_dtype = find_once


def make_scan(
    b=2, d=4, l=33, n=3, g=None, constant="", complex_A=False, packed=None, dtype=torch.float32, without=()
):
    """Arguments of a scan. `constant`: those of "BC" that do not vary in time. `packed`: sequence bounds."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    A = -torch.rand(d, n, dtype=wide) * n - 0.1
    if complex_A:
        A = torch.complex(A, torch.randn(d, n, dtype=wide))

    def weight(name):
        if name in constant:
            return torch.randn(d, n, dtype=A.dtype)
        length = 2 * l if complex_A else l
        return torch.randn(*((b, n, length) if g is None else (b, g, n, length)), dtype=dtype)

    sequences = b if packed is None else len(packed) - 1
    arguments = {
        "u": torch.randn(b, d, l, dtype=dtype),
        "delta": 0.5 * torch.randn(b, d, l, dtype=dtype),
        "A": A,
        "B": weight("B"),
        "C": weight("C"),
        "D": torch.randn(d, dtype=wide),
        "z": torch.randn(b, d, l, dtype=dtype),
        "delta_bias": torch.randn(d, dtype=wide) - 1,
        "initial_state": torch.randn(sequences, d, n, dtype=A.dtype),
    }
    if packed is not None:
        arguments["cu_seqlens"] = torch.tensor(packed, dtype=torch.int32)
    return {name: t for name, t in arguments.items() if name not in without}


def widen(t):
    """To float64 or complex128; integers stay."""
    if t.is_complex():
        return t.to(torch.complex128)
    return t.double() if t.is_floating_point() else t


def run_with_gradients(scan, arguments, **options):
    """y, the last state and every gradient of one fixed loss, by name."""
    return _run({n: t.detach().clone() for n, t in arguments.items()}, scan, lambda t: t, options)


def run_strided(scan, arguments, seed, **options):
    """The same without copies of the arguments, and with output gradients of random strides."""
    draw = random.Random(seed)
    return _run({n: t.detach() for n, t in arguments.items()}, scan, lambda t: strided(t, draw), options)


def strided(t, draw, expand=True):
    """t's values (or some of them, expanded) with random strides, inside a margin of NaN."""
    if draw.random() < 0.1:
        return t.clone()
    if expand and t.dim() > 1 and draw.random() < 0.2 and t.numel():
        axis = draw.randrange(t.dim())
        return strided(t.narrow(axis, 0, 1), draw, False).expand(t.shape)
    order = draw.sample(range(t.dim()), t.dim())  # order of the axes in memory
    steps = [draw.choice((1, 1, 2, 3)) for _ in order]
    sizes = [t.shape[axis] * step + 4 for axis, step in zip(order, steps, strict=True)]
    whole = torch.full(
        sizes, float("nan") if t.is_floating_point() or t.is_complex() else 2**30, dtype=t.dtype
    )
    for i, (axis, step) in enumerate(zip(order, steps, strict=True)):
        start = draw.randrange(4)
        whole = (
            whole.narrow(i, start, t.shape[axis] * step).unflatten(i, (t.shape[axis], step)).select(i + 1, 0)
        )
    place = whole.permute([order.index(axis) for axis in range(t.dim())])
    place.copy_(t)
    return place


def _run(leaves, scan, lay, options):
    leaves = {n: t.requires_grad_(t.is_floating_point() or t.is_complex()) for n, t in leaves.items()}
    y, last = scan(**leaves, delta_softplus=True, return_last_state=True, **options)
    draw = torch.Generator("cpu").manual_seed(1)
    grad_y = lay(torch.randn(y.shape, generator=draw, dtype=torch.float64, device="cpu").to(y))
    grad_last = lay(torch.randn(last.shape, generator=draw, dtype=torch.float64, device="cpu").to(last))
    wanted = {n: t for n, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad((y, last), list(wanted.values()), (grad_y, grad_last), materialize_grads=True)
    return {"y": y.detach(), "last": last.detach()} | {
        f"d{n}": g.detach() for n, g in zip(wanted, grads, strict=True)
    }


def benchmarks(prefix):
    """(suite, class, method) of every benchmark whose name starts with `prefix`, without the Full suites."""
    for suite in SUITES:
        module = importlib.import_module(f"benchmarks.{suite}")
        for name, kind in vars(module).items():
            if isinstance(kind, type) and kind.__module__ == module.__name__ and not name.startswith("Full"):
                yield from ((suite, kind, method) for method in dir(kind) if method.startswith(prefix))


def parameters(kind):
    """Every combination of a suite's parameters."""
    return list(itertools.product(*kind.params))
