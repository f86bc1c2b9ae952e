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
