"""Calls outside of tracers and transforms: one autograd node that repeats the launches of the first call.

A call whose shapes, strides, dtypes, devices and alignment are those of an earlier one is not checked or laid
out again.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from projecta._operators import KINDS, differentiable, untraced
from projecta._triton.launch import Recording, remembered, repeated, traits
from projecta.scan._operator import Inputs
from projecta.scan.triton.launch import backward_pass, forward_pass, saved_shape

Given = tuple[Tensor | None, ...]
_calls: dict[tuple, "_Call"] = {}


def cache_key(given: Given, softplus: bool, every: int, reverse: bool) -> tuple | None:
    """Everything of a call but its values and addresses; None if the call needs the operator."""
    if not untraced():
        return None
    key: list[object] = [softplus, every, reverse]
    graded = False
    for t in given:
        if t is None:
            key.append(None)
        else:
            if type(t) not in KINDS or t.is_neg():
                return None
            graded = graded or t.requires_grad
            key += (t.device, traits(t))
    index = given[0].device.index  # type: ignore[union-attr]
    if index is not None and index != torch.cuda.current_device():
        return None
    key.append(every if graded and torch.is_grad_enabled() else 0)
    return tuple(key)


def repeat(key: tuple, given: Given) -> tuple[Tensor, Tensor] | None:
    """y and the last state, if a call with this key has been made."""
    call = _calls.get(key)
    return None if call is None else call.run(given)


def first(
    key: tuple, given: Given, canonical: Inputs, softplus: bool, reverse: bool
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """The same of the first call with a key; None if its canonical form is a copy."""
    steps = canonical.delta, canonical.z
    if not canonical.u.numel() or canonical.A.dtype != torch.float32:
        return None
    if any(t is not None and t.dtype == torch.float64 for t in steps):
        return None
    for t, other in zip(given, canonical, strict=False):
        if t is not other and (t is None or other is None or t.data_ptr() != other.data_ptr()):
            return None
    return remembered(_calls, key, lambda: _Call(canonical, softplus, reverse, key[-1])).run(given)


class _Call:
    """All calls with one key. every: steps between saved states, 0 without gradients."""

    def __init__(self, canonical: Inputs, softplus: bool, reverse: bool, every: int):
        self.softplus, self.reverse, self.every = softplus, reverse, every
        self.grouped = canonical.B.dim() == 4, canonical.C.dim() == 4
        self.state_shape = (len(canonical.u), *canonical.A.shape)
        self.saved_shape = saved_shape(canonical, len(canonical.u), every) if every else (0,)
        self.records: dict[Any, Recording] = {}

    def run(self, given: Given) -> tuple[Tensor, Tensor]:
        if self.every:
            return differentiable("selective_scan", "triton", self.forward, self.backward, given)
        return self.forward(*given)[0]

    def inputs(self, given: Sequence[Tensor | None]) -> Inputs:
        """The canonical form, in which B and C that vary in time have groups."""
        u, delta, A, B, C, D, z, bias, start = given
        if self.grouped[0] and B.dim() == 3:  # type: ignore[union-attr]
            B = B[:, None]  # type: ignore[index]
        if self.grouped[1] and C.dim() == 3:  # type: ignore[union-attr]
            C = C[:, None]  # type: ignore[index]
        return Inputs(u, delta, A, B, C, D, z, bias, start)  # type: ignore[arg-type]

    def forward(self, *given: Tensor | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor]]:
        """y and the last state, and what `backward` needs besides the inputs."""
        inputs = self.inputs(given)
        y, new = torch.empty_like(inputs.u), inputs.A.new_empty
        last, saved = new(self.state_shape), new(self.saved_shape)
        repeated(
            self.records, "forward", inputs[:9], (y, last, saved),
            lambda: forward_pass(inputs, self.softplus, y, last, saved, reverse=self.reverse),
        )  # fmt: skip
        return (y, last), (saved,)

    def backward(self, grads: Given, kept: tuple[Tensor], given: Given) -> list[Tensor | None]:
        (grad_y, grad_last), (saved,) = grads, kept
        grad_y = torch.zeros_like(given[0]) if grad_y is None else grad_y  # type: ignore[arg-type]
        grad_last = None if grad_last is None else grad_last.contiguous()
        found = [None if t is None else torch.empty_like(t) for t in given]
        inputs, to = self.inputs(given), self.inputs(found)
        key = traits(grad_y), grad_last is None
        repeated(
            self.records, key, (*inputs[:9], grad_y, grad_last), (saved, *to[:9]),
            lambda: backward_pass(
                grad_y, grad_last, saved, inputs, self.softplus, to, reverse=self.reverse
            ),
        )  # fmt: skip
        return found
