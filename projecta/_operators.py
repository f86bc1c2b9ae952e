"""Registers PyTorch operators, and refuses the derivatives that they do not have.

Forward mode and second derivatives raise an error: PyTorch would return zero for both.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from projecta._checks import fail

KINDS = (Tensor, torch.nn.Parameter)


def without_autocast(u: Tensor) -> contextlib.AbstractContextManager:
    """Disable autocast: the backends choose their types."""
    kind = u.device.type
    return (
        torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()
    )


def register(name: str, function: Callable, shapes: Callable, mutates: Sequence[str] = ()) -> Callable:
    """Register as `torch.library.custom_op` does, but import no compiler at the first call (0.7 s)."""
    name = f"projecta::{name}"
    schema = torch.library.infer_schema(function, mutates_args=mutates)
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


def is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the call may skip the operator: it is `untraced`, and all tensors are plain."""
    return (
        untraced()
        and all(t is None or (type(t) in KINDS and not (t.is_conj() or t.is_neg())) for t in tensors)
        and tensors[0].device.type != "meta"  # type: ignore[union-attr]
    )


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, names: tuple[str, str], forward: Callable, backward: Callable, *tensors: Any
    ) -> Any:
        outputs, kept = forward(*tensors)
        ctx.names, ctx.run_backward, ctx.kept = names, backward, len(kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept, *tensors)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing refuses a second unpacking
        kept, tensors = saved[: ctx.kept], saved[ctx.kept :]
        function, backend = ctx.names
        refuse_tangents(function, (*grads, *tensors), backend)
        with torch.no_grad():  # kernels read memory, which a lazily conjugated or negated tensor shares
            plain = tuple(None if g is None else g.resolve_conj().resolve_neg() for g in grads)
            found = ctx.run_backward(plain, kept, tensors)
        return None, None, None, *only_once(function, backend, found, (*grads, *tensors))


def differentiable(
    function: str, backend: str, forward: Callable, backward: Callable, tensors: Iterable[Tensor | None]
) -> Any:
    """The outputs of `forward(*tensors)` as one autograd node, without an operator and its dispatch.

    forward returns the outputs, and a tuple of tensors to keep; backward(grads, kept, tensors) returns a
    gradient or None for each of `tensors`. A gradient in `grads` is None if the output has none.
    """
    return _Node.apply((function, backend), forward, backward, *tensors)
