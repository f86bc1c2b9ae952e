"""Calls that differ in their tensors' values only: what they have in common, and a cache of it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from projecta._operators import KINDS, untraced


def traits(t: Tensor | None) -> tuple | None:
    """Everything of a tensor that a call depends on, but its values and its device."""
    return None if t is None else (t.dtype, t.shape, t.stride(), t.data_ptr() % 16)


def call_key(tensors: Sequence[Tensor | None], options: tuple) -> tuple | None:
    """Everything of a call but its values and addresses; last, whether a gradient can be asked for.

    None if the call needs an operator, or its options cannot be compared.
    """
    if not (untraced() and all(type(option) in (bool, int, str, type(None)) for option in options)):
        return None
    key: list[object] = [*options]
    graded = False
    for t in tensors:
        if t is None:
            key.append(None)
        else:
            if type(t) not in KINDS or t.is_neg() or t.is_conj():
                return None
            graded = graded or t.requires_grad
            key += (t.device, traits(t))
    device = tensors[0].device  # type: ignore[union-attr]
    if device.type == "meta" or (device.type == "cuda" and device.index != torch.cuda.current_device()):
        return None
    key.append(graded and torch.is_grad_enabled())
    return tuple(key)


def remembered(cache: dict, key: Any, make: Callable) -> Any:
    """cache[key], made if it is missing; a full cache starts anew: many lengths must not fill the memory."""
    found = cache.get(key)
    if found is None:
        if len(cache) >= 4096:
            cache.clear()
        found = cache[key] = make()
    return found
