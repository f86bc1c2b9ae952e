"""Calls outside of tracers and transforms: one autograd node, for each kind of call prepared once.

As `projecta.scan._eager`: a backend takes part by `Passes(inputs, silu, reverse)`.
"""

from types import ModuleType

import torch
from torch import Tensor

from projecta._calls import remembered
from projecta._operators import differentiable
from projecta.conv._operator import Grads, Inputs

Given = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # x, weight, bias, start
_calls: dict[tuple, "_Call"] = {}


def repeat(key: tuple, given: Given) -> Tensor | None:
    """y, if a call with this key has been made."""
    call = _calls.get(key)
    return None if call is None else call.run(given)


def first(key: tuple, module: ModuleType, given: Given, silu: bool, reverse: bool) -> Tensor | None:
    """The same of the first call with a key; None if it is the operator's."""
    x, _, _, start = given
    if not (hasattr(module, "Passes") and x.numel()) or (start is not None and not start.is_contiguous()):
        return None
    return remembered(_calls, key, lambda: _Call(module, given, silu, reverse, key[-1])).run(given)


class _Call:
    """All calls with one key."""

    def __init__(self, module: ModuleType, given: Given, silu: bool, reverse: bool, graded: bool):
        self.passes, self.graded = module.Passes(Inputs(*given), silu, reverse), graded
        self.backend = module.__name__.rpartition(".")[2]

    def run(self, given: Given) -> Tensor:
        if self.graded:
            return differentiable("causal_conv", self.backend, self.forward, self.backward, given)
        return self.forward(*given)[0]

    def forward(self, *given: Tensor | None) -> tuple[Tensor, tuple]:
        inputs = Inputs(*given)  # type: ignore[arg-type]
        y = torch.empty_like(inputs.x)
        self.passes.forward(inputs, y)
        return y, ()

    def backward(self, grads: tuple, kept: tuple, given: tuple) -> list[Tensor | None]:
        x, *others = given
        dense = torch.contiguous_format
        found = [None if t is None else torch.empty_like(t, memory_format=dense) for t in others]
        to = Grads(torch.empty_like(x), *found)  # type: ignore[arg-type]
        self.passes.backward(grads[0], Inputs(*given), to)
        return list(to)
