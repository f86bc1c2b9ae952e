"""The Triton convolution, interpreted against the reference."""

import pytest
import torch

from tests.conv.test_conv import BRAIN, CASES, HALF, errors

# the interpreter cuts bfloat16 off, it does not round
TOLERANCE = {torch.float32: 1e-5, HALF: 2e-3, BRAIN: 1.6e-2}


def _update_errors():
    from projecta import causal_conv, causal_conv_update

    x, weight, bias = torch.randn(2, 130, 9), torch.randn(130, 4), torch.randn(130)
    wanted = causal_conv(x, weight, bias, backend="reference")
    found = {}
    for columns in (3, 4):
        state = torch.zeros(2, 130, columns)
        steps = [causal_conv_update(x[..., t], state, weight, bias, backend="triton") for t in range(9)]
        found[columns] = (torch.stack(steps, -1) - wanted).abs().max().item()
        assert torch.equal(state, x[..., 9 - columns :])
    return found


@pytest.mark.parametrize("case", [case for case in CASES if case != "float64"])
def test_the_kernels_agree_with_the_reference(interpreter, case):
    found = interpreter.submit(errors, case, "triton").result(timeout=300)
    for name, error in found.items():
        assert error <= TOLERANCE[CASES[case].get("dtype", torch.float32)], f"{name}: {error}"


def test_steps_equal_the_convolution(interpreter):
    assert max(interpreter.submit(_update_errors).result(timeout=300).values()) < 1e-5


def _check_repeats():
    """A call that differs only in values repeats the launches of the first call, with its own tensors."""
    from unittest import mock

    from projecta import available_backends, causal_conv
    from projecta._triton import launch
    from projecta.conv import _eager
    from projecta.conv import triton as module
    from tests.scan.test_triton import Recorded

    available_backends()  # loads the Triton backend
    log, names = [], ("convolve", "convolve_backward", "sum_totals", "convolve_backward_start")
    stubs = {name: Recorded(getattr(module, name), log) for name in names}
    calls = []
    with (
        mock.patch.multiple(module, **stubs, processors_of=lambda device: 132),
        mock.patch.dict(_eager._calls, clear=True),
        mock.patch.dict(launch._known, clear=True),
    ):
        for _ in range(2):
            shapes = {"x": (2, 8, 64), "weight": (8, 4), "bias": (8,), "initial_state": (2, 8, 3)}
            leaves = {name: torch.randn(shape).requires_grad_() for name, shape in shapes.items()}
            del log[:]
            y = causal_conv(**leaves, backend="triton")
            grad = torch.ones_like(y)
            grads = torch.autograd.grad(y, list(leaves.values()), grad)
            tensors = [*leaves.values(), y, grad, *grads]
            calls.append((list(log), [t.data_ptr() for t in tensors], tensors))
    (first, old, _), (second, new, _) = calls
    assert [name for name, _ in first] == [f"compiled {name}" for name in names]
    assert [name for name, _ in second] == list(names)
    moved, scratch = dict(zip(old, new, strict=True)), set()
    for (name, before), (_, after) in zip(first, second, strict=True):
        name = name.split()[1]
        for parameter, x, at in zip(stubs[name].arg_names, before, after, strict=False):
            if parameter == "totals":
                scratch.add(at)
            else:
                assert at == moved.get(x, x), (name, parameter)
    assert len(scratch) == 1  # memory of the call, which both kernels share


def test_a_repeated_call_is_its_launches(interpreter):
    interpreter.submit(_check_repeats).result(timeout=300)
