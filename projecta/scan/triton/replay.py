"""The launch cache: a call that differs from an earlier one in values only goes straight to its launches.

Checks, layout and launch cost the CPU several times what a small kernel costs the GPU. Here they are done
once per key. The key is the shapes, strides, types, devices and alignment of the tensors.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from projecta._operators import KINDS, untraced

Launch = Callable[..., tuple[Tensor, Tensor]]

_launches: dict[tuple, Launch] = {}
MOST = 4096  # launches: many lengths must not fill the memory


def cache_key(tensors: tuple[Tensor | None, ...], *others: object) -> tuple[tuple, list[int | None]] | None:
    """The cache key of a call and the addresses of its tensors; None if it cannot use the cache."""
    if not untraced():
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


def cached_launch(key: tuple) -> Launch | None:
    return _launches.get(key)


def cache_launch(key: tuple, launch: Launch | None) -> None:
    if launch is not None:
        if len(_launches) >= MOST:
            _launches.clear()
        _launches[key] = launch
