"""Calls that differ in their tensors' values only: what they have in common, and a cache of it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def traits(t: Tensor | None) -> tuple | None:
    """Everything of a tensor that a call depends on, but its values and its device."""
    return None if t is None else (t.dtype, t.shape, t.stride(), t.data_ptr() % 16)


def remembered(cache: dict, key: Any, make: Callable) -> Any:
    """cache[key], made if it is missing; a full cache starts anew: many lengths must not fill the memory."""
    found = cache.get(key)
    if found is None:
        if len(cache) >= 4096:
            cache.clear()
        found = cache[key] = make()
    return found
