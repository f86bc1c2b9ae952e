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

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from projecta._checks import fail


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


KINDS = (Tensor, torch.nn.Parameter)
DIFFERENTIABLE = 9  # all but cu_seqlens


def without_autocast(u: Tensor) -> contextlib.AbstractContextManager:
    """Disable autocast: the backends choose their types."""
    kind = u.device.type
    return (
        torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()
    )


def _register(name: str, function: Callable, shapes: Callable) -> Callable:
    """Register as `torch.library.custom_op` does, but import no compiler at the first call (0.7 s)."""
    name = f"projecta::{name}"
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "default", function)
    torch.library.register_fake(name, shapes)
    return getattr(torch.ops.projecta, name.split("::")[1]).default


def refuse_derivative(function: str, derivative: str, backend: str = "") -> NoReturn:
    """Raise for a derivative that only backend "reference" has."""
    got = f"{backend!r}" if backend else "a backend without it"
    fail(
        function,
        "backend",
        f"be 'reference' for {derivative}",
        got,
        'Pass backend="reference".',
        RuntimeError,
    )


def refuse_tangents(function: str, tensors: Iterable[Tensor | None], backend: str = "") -> None:
    """Raise if a tensor carries a tangent of forward-mode differentiation, which a kernel would drop."""
    if forward_ad._current_level >= 0 and any(t is not None and _has_tangent(t) for t in tensors):
        refuse_derivative(function, "forward-mode derivatives (jvp)", backend)


def _has_tangent(t: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return True  # unknown while tracing
    try:
        return forward_ad.unpack_dual(t).tangent is not None
    except RuntimeError:  # a batch of torch.func.vmap, which hides tangents
        return True


class _NoSecondDerivative(torch.autograd.Function):
    """Return the first `count` tensors as functions of all tensors; their derivative raises."""

    @staticmethod
    def forward(ctx, function, backend, count, *tensors):
        ctx.refused = function, backend
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        refuse_derivative(ctx.refused[0], "second derivatives", ctx.refused[1])


def only_once(
    function: str, backend: str, grads: Iterable[Tensor | None], sources: Iterable[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of an autograd.Function, computed from `sources`, whose derivative raises.

    (`once_differentiable` raises only for derivatives by an incoming gradient; else it gives None.)
    """
    grads = list(grads)
    if not torch.is_grad_enabled():
        return grads
    present = [g for g in grads if g is not None]
    marked = iter(
        _NoSecondDerivative.apply(
            function, backend, len(present), *present, *(t for t in sources if t is not None)
        )
    )
    return [None if g is None else next(marked) for g in grads]


def untraced() -> bool:
    """Whether no trace, dispatch mode, transform or dual number is active that must see an operator."""
    return (
        forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def _plain(tensors: Inputs) -> bool:
    """Whether the call may skip the operator: it is `untraced`, and all tensors are plain."""
    return (
        untraced()
        and all(t is None or (type(t) in KINDS and not (t.is_conj() or t.is_neg())) for t in tensors)
        and tensors.u.device.type != "meta"
    )


def define(name: str, forward: Callable, backward: Callable, saved_shape: Callable) -> Callable:
    """Register `projecta::{name}` and its backward operator; return the function to call."""
    backend = name.removeprefix("scan_")

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

    scan_op = _register(name, scan, scan_shapes)
    backward_op = _register(f"{name}_backward", scan_backward, backward_shapes)

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
        refuse_tangents("selective_scan", tensors, backend)  # torch.func hides tangents from kernels
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        if not torch.compiler.is_compiling() and not save and _plain(tensors):
            return scan(*tensors, delta_softplus, 0)[:2]  # the dispatcher takes a third of a small call
        y, last_state, _ = scan_op(*tensors, delta_softplus, save_every if save else 0)
        return y, last_state

    return selective_scan
