"""The tokens of a Vision Mamba in the order in which each direction scans them, some of them missing."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor


class Order(NamedTuple):
    """The tokens of a pass and where they stand.

    grid: rows and columns of patches. class_at: place of the class token among all tokens; None: there is
    none. places: (b, t), the place of each token among all, ascending; None: all are there. columns: (1 or b,
    t), the tokens in the order of the columns, and back: the inverse, if a direction needs them. factors: by
    axis and way, (b, 1, t), how often a state forgets at each token in that order: 1 + the tokens missing
    before it; empty: once. mass: (b, t), the tokens merged in each, if any were. holders: (b, tokens), the
    token, of t, that stands for each place, if missing ones were merged. unmerge: whether scans also read
    that token in each place, as convolutions do. whole: the order of all tokens, if some are missing.
    """

    grid: tuple[int, int]
    class_at: int | None
    places: Tensor | None = None
    columns: Tensor | None = None
    back: Tensor | None = None
    factors: Mapping[tuple[str, int], Tensor] = MappingProxyType({})
    mass: Tensor | None = None
    holders: Tensor | None = None
    unmerge: bool = False
    whole: "Order | None" = None

    @property
    def tokens(self) -> int:
        """The number of all tokens, missing ones too."""
        return self.grid[0] * self.grid[1] + (self.class_at is not None)

    def column_places(self, device: torch.device) -> Tensor:
        """(tokens,): the place of each token if patches are counted by columns; a class token keeps its."""
        rows, wide = self.grid
        patch = torch.arange(rows * wide, device=device)
        by_column = patch % wide * rows + patch // wide
        if self.class_at is None:
            return by_column
        by_column = by_column + (by_column >= self.class_at)
        own = torch.full((1,), self.class_at, device=device)
        return torch.cat([by_column[: self.class_at], own, by_column[self.class_at :]])

    def with_columns(self, device: torch.device) -> "Order":
        table = self.column_places(device)
        columns = (table[None] if self.places is None else table[self.places]).argsort(-1)
        return self._replace(columns=columns, back=columns.argsort(-1))

    def spread(self, t: Tensor) -> Tensor:
        """(b, d, t) of the tokens to (b, d, tokens) of all places, each read from the token that holds it."""
        return gathered(t, self.holders)

    def pick(self, t: Tensor) -> Tensor:
        """(b, d, tokens) of all places to (b, d, t) of the tokens."""
        return gathered(t, self.places)

    def keep(
        self, places: Tensor, forget: bool, mass: Tensor | None = None, holders: Tensor | None = None,
        unmerge: bool = False,
    ) -> "Order":  # fmt: skip
        """The order of the tokens at `places` (b, t'), ascending, of these.

        forget: a token's state also forgets for the tokens that are missing before it.
        """
        kept = self._replace(
            places=places, mass=mass, holders=holders, unmerge=unmerge, whole=self.whole or self
        )
        orders, forget = {"rows": places}, forget and not unmerge
        if self.columns is not None:
            kept = kept.with_columns(places.device)
            orders["columns"] = self.column_places(places.device)[places].sort(-1).values
        factors = {
            (axis, way): self._gaps(own, way) for axis, own in orders.items() for way in (1, -1) if forget
        }
        return kept._replace(factors=factors)

    def _gaps(self, places: Tensor, way: int) -> Tensor:
        """(b, 1, t): 1 + the places that are missing before each, on the way."""
        ends = places.new_full((len(places), 1), -1 if way > 0 else self.tokens)
        if way > 0:
            gap = places - torch.cat([ends, places[:, :-1]], 1)
        else:
            gap = torch.cat([places[:, 1:], ends], 1) - places
        return gap[:, None].float()

    def of_class(self, tokens: Tensor) -> Tensor:
        """The class token (b, c) of (b, t, c), or the mean of all."""
        if self.class_at is None and self.mass is not None:
            share = (self.mass / self.mass.sum(1, keepdim=True)).to(tokens.dtype)
            return (share[:, None] @ tokens)[:, 0]
        if self.class_at is None:
            return tokens.mean(1)
        if self.places is None:
            return tokens[:, self.class_at]
        at = (self.places == self.class_at).to(torch.uint8).argmax(1)
        return tokens.gather(1, at[:, None, None].expand(-1, 1, tokens.shape[2]))[:, 0]


def ordered(t: Tensor, axis: str, order: Order) -> Tensor:
    """(b, d, t) in the order of a direction's axis."""
    return t if axis == "rows" else gathered(t, order.columns)


def restored(t: Tensor, axis: str, order: Order) -> Tensor:
    return t if axis == "rows" else gathered(t, order.back)


def gathered(t: Tensor, places: Tensor | None) -> Tensor:
    """(b, d, t) at these places (1 or b, t) of its time; channels are last in memory."""
    assert places is not None
    b, d, length = t.shape
    rows = (places + length * torch.arange(b, device=t.device)[:, None]).flatten()
    return t.transpose(1, 2).reshape(-1, d).index_select(0, rows).unflatten(0, (b, -1)).transpose(1, 2)
