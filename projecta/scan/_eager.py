"""Calls outside of tracers and transforms: one autograd node, for each kind of call prepared once.

A call whose shapes, strides, dtypes, devices and alignment are those of an earlier one is not checked or laid
out again. A backend takes part by `Passes(inputs, delta_softplus, reverse)`, whose forward and backward run a
call's passes, and `saved_shape`; `repeats(inputs)` says of which calls.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from projecta._calls import remembered
from projecta._operators import differentiable
from projecta.scan._arguments import is_canonical, with_groups
from projecta.scan._operator import Inputs

Given = tuple[Tensor | None, ...]
_calls: dict[tuple, "_Call"] = {}


def repeat(key: tuple, given: Given) -> tuple[Tensor, Tensor] | None:
    """y and the last state, if a call with this key has been made."""
    call = _calls.get(key)
    return None if call is None else call.run(given)


def first(
    key: tuple, module: ModuleType, given: Given, canonical: Inputs, softplus: bool, reverse: bool
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """The same of the first call with a key; None if its canonical form is a copy, or the operator's."""
    if not hasattr(module, "Passes") or not module.repeats(canonical):
        return None
    if not is_canonical(given, canonical):
        return None
    every = key[1] if key[-1] else 0
    return remembered(_calls, key, lambda: _Call(module, canonical, softplus, reverse, every)).run(given)


class _Call:
    """All calls with one key. every: steps between saved states, 0 without gradients."""

    def __init__(self, module: ModuleType, canonical: Inputs, softplus: bool, reverse: bool, every: int):
        self.passes, self.every = module.Passes(canonical, softplus, reverse), every
        self.backend = module.__name__.rpartition(".")[2]
        self.grouped = canonical.B.dim() == 4, canonical.C.dim() == 4
        self.state_shape = (len(canonical.u), *canonical.A.shape)
        self.saved_shape = module.saved_shape(canonical, len(canonical.u), every) if every else (0,)

    def run(self, given: Given) -> tuple[Tensor, Tensor]:
        if self.every:
            return differentiable("selective_scan", self.backend, self.forward, self.backward, given)
        return self.forward(*given)[0]

    def inputs(self, given: Sequence[Tensor | None]) -> Inputs:
        return Inputs(*with_groups(given, self.grouped))  # type: ignore[arg-type]

    def forward(self, *given: Tensor | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor]]:
        """y and the last state, and what `backward` needs besides the inputs."""
        inputs = self.inputs(given)
        y, new = torch.empty_like(inputs.u), inputs.A.new_empty
        last, saved = new(self.state_shape), new(self.saved_shape)
        self.passes.forward(inputs, y, last, saved)
        return (y, last), (saved,)

    def backward(self, grads: Given, kept: tuple[Tensor], given: Given) -> list[Tensor | None]:
        grad_y, grad_last = grads
        grad_y = torch.zeros_like(given[0]) if grad_y is None else grad_y  # type: ignore[arg-type]
        found = [None if t is None else torch.empty_like(t) for t in given]
        self.passes.backward(grad_y, grad_last, kept[0], self.inputs(given), self.inputs(found))
        return found
