"""Calls that differ from an earlier one in their values only, where one launch is all that a call takes.

Checks, layout and launch cost the processor several times what a small kernel costs the GPU. What was checked
once is not checked again: shapes, strides, types, devices and alignment are the key to a launch, ready made.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from projecta.scan._operator import KINDS, unwatched

Launch = Callable[..., tuple[Tensor, Tensor]]

_launches: dict[tuple, Launch] = {}
MOST = 4096  # lengths that never come again must not fill the memory


def kind_of(tensors: tuple[Tensor | None, ...], *others: object) -> tuple[tuple, list[int | None]] | None:
    """A key to all but the values, and where these lie; None if the call needs the whole way."""
    if not unwatched():
        return None
    key: list[object] = [*others]
    places: list[int | None] = []
    graded = torch.is_grad_enabled()
    for t in tensors:
        if t is None:
            key.append(None)
            places.append(None)
        else:
            if type(t) not in KINDS or t.is_neg() or (graded and t.requires_grad):
                return None
            place = t.data_ptr()
            key += (t.dtype, t.device, t.shape, t.stride(), place % 16)
            places.append(place)
    index = tensors[0].device.index  # type: ignore[union-attr]
    if index is not None and index != torch.cuda.current_device():
        return None
    return tuple(key), places


def known(key: tuple) -> Launch | None:
    return _launches.get(key)


def learn(key: tuple, launch: Launch | None) -> None:
    if launch is not None:
        if len(_launches) >= MOST:
            _launches.clear()
        _launches[key] = launch
