"""Scores of vision tokens: the patches with the highest scores are kept. Pure tensor functions, no model."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from projecta._checks import fail


class View(NamedTuple):
    """The additional inputs of a score, besides the patches (b, p, c).

    seed: seed of the random score. visible: (b, p), False where a mask hides a patch; None: all are visible.
    grid: rows and columns of the image. places: (b, p), index of each patch in the grid, counted row by row;
    None: patch i has index i.
    """

    seed: int = 0
    visible: Tensor | None = None
    grid: tuple[int, int] | None = None
    places: Tensor | None = None


def _score_norm(patches: Tensor, view: View) -> Tensor:
    return torch.linalg.vector_norm(patches, dim=-1, dtype=wide_dtype(patches.dtype))


def _score_distance(patches: Tensor, view: View) -> Tensor:
    wide = patches.to(wide_dtype(patches.dtype))
    if view.visible is None:
        mean = wide.mean(1, keepdim=True)
    else:
        share = view.visible.to(wide.dtype)
        mean = (share / share.sum(1, keepdim=True).clamp_min(1))[:, None] @ wide
    return torch.linalg.vector_norm(wide - mean, dim=-1)


def _score_similarity(patches: Tensor, view: View) -> Tensor:
    """How little each patch resembles the one before it, 1 - cos; the first has the highest score, 2."""
    units = torch.nn.functional.normalize(patches.to(wide_dtype(patches.dtype)), dim=-1)
    unlike = 1 - (units[:, 1:] * units[:, :-1]).sum(-1)
    return torch.cat([unlike.new_full((len(unlike), 1), 2), unlike], 1)


def _score_random(patches: Tensor, view: View) -> Tensor:
    """A hash of the index: the same on every device, without a copy to the device."""
    x = torch.arange(1, patches.shape[1] + 1, device=patches.device) * 0x9E3779B1 + view.seed * 0x85EBCA77
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return (x ^ (x >> 16)).expand(patches.shape[:2])


def stand(patches: Tensor, view: View, user: str) -> tuple[Tensor, Tensor, int]:
    """Row and column of each patch, (1 or b, p), and the larger side of the image, which `user` needs."""
    count = patches.shape[1]
    if view.places is not None and view.grid is None:
        fail("Plan.apply", "grid", f"be given with places, for {user}", "None")
    side = math.isqrt(count)
    rows, columns = view.grid or (side, side)
    if view.places is None and rows * columns != count:
        rule = f"be given for {user} of patches that are no square"
        fail("Plan.apply", "grid", rule, f"{view.grid} for {count} patches")
    at = torch.arange(count, device=patches.device)[None] if view.places is None else view.places
    return at // columns, at % columns, max(rows, columns)


def _score_grid(patches: Tensor, view: View) -> Tensor:
    """For every k the highest k scores are spread evenly over the image: Bayer's ordered dither."""
    y, x, side = stand(patches, view, "score 'grid'")
    rank = torch.zeros_like(x)
    for bit in range(side.bit_length()):  # the lowest bits of the position decide most
        rank = rank * 4 + 2 * ((x ^ y) >> bit & 1) + (y >> bit & 1)
    return (-rank).expand(patches.shape[:2])


SCORES: dict[str, Callable[[Tensor, View], Tensor]] = {
    "norm": _score_norm, "distance": _score_distance, "similarity": _score_similarity,
    "random": _score_random, "grid": _score_grid,
}  # fmt: skip


# The caller computes them: "delta" from a scan's steps, the others by `attention_scores`.
MODEL_SCORES = ("cls", "value", "received", "probe", "delta")


def attention_scores(
    query: Tensor, keys: Tensor, scale: float, *, prefix: int = 1, values: Tensor | None = None,
    mass: Tensor | None = None, visible: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of some queries to each patch, softmax(scale Q K^T + log mass), mean over queries and heads.

    Args:
        query: (b, h, q, e): that of the class token, of a probe, or of all tokens.
        keys: (b, h, t, e), prefix included: the softmax runs over all of them.
        values: (b, h, t, e): weight each head's attention by ||v||.
        mass: (b, t).
        visible: (b, t), False for masked tokens, which neither receive nor give attention.

    Returns:
        (b, t - prefix), in float32 or wider.
    """
    wide = wide_dtype(keys.dtype)
    logits = query.to(wide) @ keys.to(wide).mT * scale
    if mass is not None:
        logits = logits + mass.to(wide).log()[:, None, None]
    if visible is not None:
        logits = logits.masked_fill(~visible[:, None, None], -math.inf)
    shares = logits.softmax(-1)
    if visible is not None and query.shape[2] == keys.shape[2]:
        who = visible.to(wide)
        shares = ((who / who.sum(1, keepdim=True).clamp_min(1))[:, None, None] @ shares)[:, :, 0]
    else:
        shares = shares.mean(2)  # (b, h, t)
    if values is not None:
        shares = shares * torch.linalg.vector_norm(values, dim=-1, dtype=wide)
    return shares.mean(1)[:, prefix:]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
