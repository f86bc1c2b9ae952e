"""Rows of a pool of states. An index below 0 is padding: a row that reads anything and writes nothing."""

import torch
from torch import Tensor


def read_rows(pool: Tensor, indices: Tensor) -> Tensor:
    """A copy of entries of a pool (N, ...): (b, ...)."""
    return pool.index_select(0, indices.clamp_min(0))


def write_rows(pool: Tensor, indices: Tensor, rows: Tensor) -> None:
    """Write rows (b, ...) to the entries that they belong to, which differ. No synchronisation of a GPU.

    Padding repeats a row that is none: the same numbers at the same place.

    >>> pool = torch.zeros(3)
    >>> write_rows(pool, torch.tensor([2, -1, 0]), torch.tensor([5.0, 6.0, 7.0]))
    >>> pool
    tensor([7., 0., 5.])
    """
    if not len(indices):
        return
    real = indices >= 0
    source = torch.where(real, torch.arange(len(indices), device=indices.device), real.int().argmax())
    target = indices.long()[source].clamp_min(0)
    # without any row, entry 0 keeps what it has
    pool.index_copy_(0, target, torch.where(real.any(), rows[source].to(pool.dtype), pool[:1]))


def blank_rows(y: Tensor, indices: Tensor) -> Tensor:
    """y (b, ...) with zeros in rows that are padding."""
    return y.masked_fill((indices < 0).view(-1, *[1] * (y.dim() - 1)), 0)
