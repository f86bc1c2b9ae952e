"""Makes one PyTorch operator out of a backend's forward and backward functions.

A backend gives three functions over the canonical arguments (see `projecta.scan`):

    forward(inputs, delta_softplus, y, last_state, saved)       writes the last three; `saved` may be empty
    backward(grad_y, grad_last, saved, inputs, delta_softplus, grads)   writes `grads`, None for absent inputs
    saved_shape(inputs, sequences, every) -> the shape of `saved`, the additional inputs of `backward`

The result is a callable with the signature of `reference.selective_scan`. Autograd,
`torch.compile(fullgraph=True)` and `torch.library.opcheck` accept it. Nothing is saved if no gradient can be
asked for. `every` is the number of steps between saved states, if a backend can choose it; 0 saves nothing.

These operators have first derivatives in reverse mode. Forward mode and second derivatives raise an error:
PyTorch would return zero for both.
"""

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
    """The tensors of one scan, in the order of the public signature."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None = None


DIFFERENTIABLE = 9  # all but cu_seqlens


def define(name: str, forward: Callable, backward: Callable, saved_shape: Callable) -> Callable:
    """Register `projecta::{name}` and its backward operator; return the function to call."""
    backend = name.removeprefix("scan_").removesuffix("_reversed")

    def allocate(inputs: Inputs, every: int) -> tuple[Tensor, Tensor, Tensor]:
        u, A = inputs.u, inputs.A
        sequences = u.shape[0] if inputs.cu_seqlens is None else inputs.cu_seqlens.shape[0] - 1
        saved = saved_shape(inputs, sequences, every) if every else (0,)
        return torch.empty_like(u), A.new_empty(sequences, *A.shape), A.new_empty(saved)

    def scan(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        delta_bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
        delta_softplus: bool, every: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        inputs = Inputs(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
        y, last_state, saved = allocate(inputs, every)
        with without_autocast(u):
            forward(inputs, delta_softplus, y, last_state, saved)
        return y, last_state, saved

    def scan_shapes(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, every):
        return allocate(Inputs(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens), every)

    def scan_backward(
        grad_y: Tensor, grad_last: Tensor, saved: Tensor,
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        delta_bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
        delta_softplus: bool,
    ) -> list[Tensor]:  # fmt: skip
        inputs = Inputs(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
        grads = backward_shapes(grad_y, grad_last, saved, *inputs)
        present: list[Any] = [None if t is None else g for g, t in zip(grads, inputs, strict=False)]
        with without_autocast(u):
            backward(grad_y, grad_last, saved, inputs, delta_softplus, Inputs(*present))
        return grads

    def backward_shapes(grad_y, grad_last, saved, *rest):
        return [rest[0].new_empty(0) if t is None else torch.empty_like(t) for t in rest[:DIFFERENTIABLE]]

    scan_op = register(name, scan, scan_shapes)
    backward_op = register(f"{name}_backward", scan_backward, backward_shapes)

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        *tensors, ctx.delta_softplus, ctx.every = inputs
        ctx.save_for_backward(output[2], *tensors)
        ctx.last_state_shape = output[1].shape

    def differentiate(ctx, grad_y, grad_last, _):
        saved, *tensors = ctx.saved_tensors
        if not ctx.every:
            raise RuntimeError(f"projecta::{name}: every must be above 0 for a backward pass; got 0.")
        u, A = tensors[0], tensors[2]
        refuse_tangents("selective_scan", (grad_y, grad_last, *tensors), backend)
        grad_y = torch.zeros_like(u) if grad_y is None else grad_y
        grad_last = A.new_zeros(ctx.last_state_shape) if grad_last is None else grad_last
        grads = backward_op(grad_y, grad_last, saved, *tensors, ctx.delta_softplus)
        present = zip(grads, tensors, strict=False)
        return *(None if t is None else g for g, t in present), None, None, None

    def differentiate_again(ctx, *grads):
        refuse_derivative("selective_scan", "second derivatives", backend)

    torch.library.register_autograd(f"projecta::{name}", differentiate, setup_context=setup_context)
    torch.library.register_autograd(f"projecta::{name}_backward", differentiate_again)

    def selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, save_every=8
    ):  # fmt: skip
        tensors = Inputs(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
        refuse_tangents("selective_scan", tensors, backend)  # here: torch.func hides tangents from kernels
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        if torch.compiler.is_compiling() or not is_plain(tensors):
            return scan_op(*tensors, delta_softplus, save_every if save else 0)[:2]
        if not save:
            return scan(*tensors, delta_softplus, 0)[:2]
        return _call_directly(backend, scan, scan_backward, tensors, delta_softplus, save_every)

    return selective_scan


def _call_directly(
    backend: str, scan: Callable, scan_backward: Callable, tensors: Inputs, softplus: bool, every: int
) -> tuple[Tensor, Tensor]:
    """Run an operator's functions without the operator, whose dispatch is a large part of a small call."""

    def forward(*tensors: Any) -> tuple:
        y, last_state, saved = scan(*tensors, softplus, every)
        return (y, last_state), (saved, last_state)

    def backward(grads: tuple, kept: tuple, tensors: tuple) -> list[Tensor | None]:
        grad_y, grad_last = grads
        grad_y = torch.zeros_like(tensors[0]) if grad_y is None else grad_y
        grad_last = torch.zeros_like(kept[1]) if grad_last is None else grad_last
        found = scan_backward(grad_y, grad_last, kept[0], *tensors, softplus)
        return [None if t is None else g for g, t in zip(found, tensors, strict=False)] + [None]

    return differentiable("selective_scan", backend, forward, backward, tensors)
