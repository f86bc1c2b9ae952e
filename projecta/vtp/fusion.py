"""Fusion of vision tokens: patches that are not kept are dropped or merged. Pure tensor functions.

All fusions have the form X' = D^-1 A X. `owner` is the token into which each token is merged, A holds the
masses, and its row sums D are the masses of the remaining tokens. `drop` merges nothing. `mean` merges all
pruned tokens into one (as EViT, arXiv 2202.07800, with equal weights), `cluster` into the nearest of a few,
`squeeze` into the nearest of all kept ones, `next` into the kept one that follows. `bipartite` merges the
most similar pairs of an even and an odd patch, whatever their scores (as ToMe, arXiv 2210.09461), and
`checkerboard` those of a black and a white patch of the image. All leave the same number of tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from projecta.vtp.scores import wide_dtype

FUSIONS = ("drop", "mean", "cluster", "squeeze", "next", "bipartite", "checkerboard")
PAIRS = FUSIONS[-2:]  # which need no scores


class Pruned(NamedTuple):
    """Tokens after pruning.

    tokens: (b, t', c). kept: (b, t'), their indices before pruning, ascending. mass: (b, t'), number of
    tokens merged in each. owner: (b, t), index (of t') of the token that contains each token; -1: none.
    """

    tokens: Tensor
    kept: Tensor
    mass: Tensor
    owner: Tensor


def take(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def unit(tokens: Tensor) -> Tensor:
    return torch.nn.functional.normalize(tokens.detach().to(wide_dtype(tokens.dtype)), dim=-1)


def keep_highest(
    tokens: Tensor, mass: Tensor, scores: Tensor, kept: int, prefix: int, takers: int, follow: bool = False
) -> Pruned:
    """Keep the highest scores; merge each pruned patch into the nearest of the `takers` lowest ones kept.

    follow: merge each into the kept one that follows it, and those after the last one into that.
    """
    b, t, _ = tokens.shape
    order = scores.argsort(dim=-1, descending=True, stable=True) + prefix
    first = torch.arange(prefix, device=tokens.device).expand(b, prefix)
    index = torch.cat([first, order[:, : kept - prefix].sort(-1).values], 1)
    place = torch.full((b, t), -1, dtype=index.dtype, device=tokens.device)  # index among the kept
    place = place.scatter(1, index, torch.arange(kept, device=tokens.device).expand(b, kept))
    if not takers:
        return Pruned(take(tokens, index), index, mass.gather(1, index), place)
    rest, open = order[:, kept - prefix :], order[:, kept - prefix - takers : kept - prefix]
    pruned = take(tokens, rest)
    if follow:
        patches = index[:, prefix:].contiguous()
        into = (prefix + torch.searchsorted(patches, rest.contiguous())).clamp(max=kept - 1)
    else:
        if takers == 1:
            nearest = torch.zeros_like(rest)
        else:
            nearest = (unit(pruned) @ unit(take(tokens, open)).mT).argmax(-1)
        into = place.gather(1, open).gather(1, nearest)  # (b, pruned): index among the kept
    owner = place.scatter(1, rest, into)
    fused, masses = _fuse(take(tokens, index), mass.gather(1, index), pruned, mass.gather(1, rest), into)
    return Pruned(fused, index, masses, owner)


def _fuse(kept: Tensor, mass: Tensor, pruned: Tensor, mass_pruned: Tensor, into: Tensor) -> tuple:
    """D^-1 A X: merge each pruned token into the kept token with index `into`, weighted by their masses."""
    wide = wide_dtype(kept.dtype)
    here = torch.arange(kept.shape[1], device=kept.device)
    A = torch.where(into[:, None] == here[None, :, None], mass_pruned[:, None], 0.0).to(wide)
    total = mass + A.sum(-1)
    least = torch.finfo(wide).tiny  # for a masked token, whose mass is 0
    fused = (kept.to(wide) * mass[..., None] + A @ pruned.to(wide)) / total[..., None].clamp_min(least)
    alone = (total == mass)[..., None]  # nothing merged: the bits stay
    return torch.where(alone, kept, fused.to(kept.dtype)), total


def merge_pairs(
    tokens: Tensor, mass: Tensor, kept: int, prefix: int, masked: bool, colour: Tensor | None = None
) -> Pruned:
    """Merge even patches into their most similar odd patch, the most similar pairs first; repeat until `kept`
    tokens are left. Masked patches (mass 0) are merged first, and are the last choice to merge into.

    colour: (1 or b, p), 0 or 1: merge those of colour 0 into those of colour 1 instead. If there are not as
    many of both, the first of the larger half count to the other."""

    def pick(index: Tensor) -> Tensor:  # one index for all rows, or one per row
        return tokens[:, index] if index.dim() == 1 else take(tokens, index)

    b, t, _ = tokens.shape
    index = torch.arange(t, device=tokens.device).expand(b, t)
    owner = index
    while tokens.shape[1] > kept:
        now = tokens.shape[1]
        even = torch.arange(prefix, now, 2, device=tokens.device)
        odd = torch.arange(prefix + 1, now, 2, device=tokens.device)
        if masked or colour is not None:
            turn = torch.arange(now - prefix, device=tokens.device) % 2 if colour is None else colour
            hidden = mass == 0
            if masked:
                turn = torch.where(hidden[:, prefix:], -1, turn)
            # masked patches, even ones, odd ones
            order = turn.expand(b, -1).argsort(dim=-1, stable=True) + prefix
            even, odd = order[:, : len(even)], order[:, len(even) :]
        likeness = unit(pick(even)) @ unit(pick(odd)).mT  # in -1...1
        if masked:
            likeness = likeness.masked_fill(hidden.gather(1, odd)[:, None], -2)
            likeness = likeness.masked_fill(hidden.gather(1, even)[..., None], 2)
        similar, partner = likeness.max(-1)
        even, odd = even.expand(b, -1), odd.expand(b, -1)
        count = min(now - kept, even.shape[1])
        chosen = similar.argsort(dim=-1, descending=True, stable=True)[:, :count]
        rest = even.gather(1, chosen)
        gone = torch.zeros(b, now, dtype=torch.bool, device=tokens.device).scatter(1, rest, True)
        stay = gone.to(torch.uint8).argsort(dim=-1, stable=True)[:, : now - count]
        place = (~gone).cumsum(-1) - 1
        into = place.gather(1, odd.gather(1, partner.gather(1, chosen)))
        tokens, mass = _fuse(
            take(tokens, stay), mass.gather(1, stay), take(tokens, rest), mass.gather(1, rest), into
        )
        owner = place.scatter(1, rest, into).gather(1, owner)
        index = index.gather(1, stay)
        if colour is not None:
            colour = colour.expand(b, -1).gather(1, stay[:, prefix:] - prefix)
    return Pruned(tokens, index, mass, owner)
