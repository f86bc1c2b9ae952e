"""Makes one PyTorch operator out of a backend's forward and backward functions, as `scan._operator` does."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from projecta._operators import (
    differentiable,
    is_plain,
    refuse_derivative,
    refuse_tangents,
    register,
    without_autocast,
)


class Inputs(NamedTuple):
    """The tensors of one convolution, in the order of the public signature."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    start: Tensor | None
    bounds: Tensor | None = None


DIFFERENTIABLE = 4  # all but the bounds


class Grads(NamedTuple):
    """The gradients that a backend writes; those of bias and start are None if there is none."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    start: Tensor | None


def _new_gradients(grad_y: Tensor, x: Tensor, *others: Any) -> list[Tensor]:
    """Uninitialised gradients of x, weight, bias and start; empty ones for None."""
    dense = torch.contiguous_format
    return [
        torch.empty_like(x),
        *(
            x.new_empty(0) if t is None else torch.empty_like(t, memory_format=dense)
            for t in others[: DIFFERENTIABLE - 1]
        ),
    ]


def define(name: str, forward: Callable, backward: Callable) -> Callable:
    """Register `projecta::{name}` and its backward operator; return the function to call.

    forward(inputs, silu, y, reverse) writes y. backward(grad_y, inputs, silu, grads, reverse) writes the
    gradients. Neither is called for an empty x.
    """
    backend = name.removeprefix("conv_")

    def conv(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        start: Tensor | None,
        bounds: Tensor | None,
        silu: bool,
        reverse: bool,
    ) -> Tensor:
        y = torch.empty_like(x)
        if y.numel():
            with without_autocast(x):
                forward(Inputs(x, weight, bias, start, bounds), silu, y, reverse)
        return y

    def conv_backward(
        grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, start: Tensor | None,
        bounds: Tensor | None, silu: bool, reverse: bool,
    ) -> list[Tensor]:  # fmt: skip
        inputs = Inputs(x, weight, bias, start, bounds)
        grads = _new_gradients(grad_y, *inputs)
        if not x.numel():
            return [grad.zero_() for grad in grads]
        given = (None if t is None else grad for t, grad in zip(inputs, grads, strict=False))
        with without_autocast(x):
            backward(grad_y, inputs, silu, Grads(*given), reverse)  # type: ignore[arg-type]
        return grads

    conv_op = register(name, conv, lambda x, *rest: torch.empty_like(x))
    backward_op = register(f"{name}_backward", conv_backward, _new_gradients)

    def setup_context(ctx, inputs, output):
        *tensors, ctx.silu, ctx.reverse = inputs
        ctx.save_for_backward(*tensors)

    def differentiate(ctx, grad_y):
        tensors = ctx.saved_tensors
        refuse_tangents("causal_conv", (grad_y, *tensors), backend)
        grads = backward_op(grad_y, *tensors, ctx.silu, ctx.reverse)
        return *(None if t is None else g for g, t in zip(grads, tensors, strict=False)), None, None, None

    def differentiate_again(ctx, *grads):
        refuse_derivative("causal_conv", "second derivatives", backend)

    torch.library.register_autograd(f"projecta::{name}", differentiate, setup_context=setup_context)
    torch.library.register_autograd(f"projecta::{name}_backward", differentiate_again)

    def causal_conv(x, weight, bias, silu, start, bounds, reverse=False):
        tensors = Inputs(x, weight, bias, start, bounds)
        refuse_tangents("causal_conv", tensors, backend)
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        if torch.compiler.is_compiling() or not is_plain(tensors):
            return conv_op(*tensors, silu, reverse)
        if not save:
            return conv(*tensors, silu, reverse)

        def run_backward(grads: tuple, kept: tuple, tensors: Any) -> list[Tensor | None]:
            (grad_y,) = grads
            x, weight, bias, start, bounds = tensors
            found = conv_backward(grad_y, x, weight, bias, start, bounds, silu, reverse)
            return [None if t is None else g for g, t in zip(found, tensors, strict=False)] + [None]

        return differentiable(
            "causal_conv",
            backend,
            lambda *tensors: (conv(*tensors, silu, reverse), ()),
            run_backward,
            tensors,
        )

    return causal_conv
