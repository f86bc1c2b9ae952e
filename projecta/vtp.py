"""Vision token pruning (VTP): which tokens of a vision transformer to keep. Tensors in, tensors out; knows no
model.

Tokens are (b, t, c): `prefix` tokens first (the class token), which are never scored and always kept, then
the patches. Kept patches keep their order. The number kept depends on the shape alone, so that nothing waits
for the device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from projecta._checks import Checker


def _score_norm(tokens: Tensor, seed: int) -> Tensor:
    return torch.linalg.vector_norm(
        tokens, dim=-1, dtype=torch.float64 if tokens.dtype == torch.float64 else torch.float32
    )


def _score_random(tokens: Tensor, seed: int) -> Tensor:
    scores = torch.rand(tokens.shape[1], generator=torch.Generator().manual_seed(seed))
    return scores.to(tokens.device).expand(tokens.shape[:2])


SCORES: dict[str, Callable[[Tensor, int], Tensor]] = {"norm": _score_norm, "random": _score_random}
FUSIONS = ("drop",)


@dataclass(frozen=True)
class Plan:
    """What to prune, and where.

    Args:
        keep: the part of the patch tokens that is kept, in (0, 1]; ceil(keep * patches) of them stay.
        at: index of the block before which tokens go; 0 prunes right after the embedding.
        score: "norm", the token's length ||x||_2, or "random", one fixed order for every image; the highest
            stay.
        fuse: "drop": pruned tokens leave no trace.
        multiple_of: round the tokens that remain, class token included, up to a multiple of this.
        seed: of the random score.

    Raises:
        ValueError: a value is out of its range. TypeError: one is of the wrong type.

    >>> Plan(keep=0.7).tokens_kept(197)
    139
    >>> Plan(keep=1.5)
    Traceback (most recent call last):
    ValueError: Plan: keep must lie in (0, 1]; got 1.5.
    """

    keep: float = 0.5
    at: int = 0
    score: str = "norm"
    fuse: str = "drop"
    multiple_of: int = 1
    seed: int = 0

    def __post_init__(self):
        check = Checker("Plan")
        check.that(
            isinstance(self.keep, int | float), "keep", "be a number", repr(self.keep), error=TypeError
        )
        check.that(0 < self.keep <= 1, "keep", "lie in (0, 1]", self.keep)
        for name, least in (("at", 0), ("multiple_of", 1), ("seed", 0)):
            value = getattr(self, name)
            check.that(isinstance(value, int), name, "be an integer", repr(value), error=TypeError)
            check.that(value >= least, name, f"be at least {least}", value)
        check.one_of("score", self.score, tuple(SCORES))
        check.one_of("fuse", self.fuse, FUSIONS)

    def tokens_kept(self, tokens: int, prefix: int = 1) -> int:
        """How many of `tokens` remain, the prefix included."""
        kept = prefix + math.ceil(self.keep * (tokens - prefix) - 1e-9)  # 0.7 * 10 is a hair above 7
        return min(tokens, math.ceil(kept / self.multiple_of) * self.multiple_of)

    def apply(self, tokens: Tensor, prefix: int = 1) -> tuple[Tensor, Tensor]:
        """Prune (b, t, c) tokens: the remaining ones (b, t', c), and their indices (b, t') in the input,
        ascending.

        If nothing is pruned, the tokens returned are the tensor given.

        >>> tokens = torch.tensor([[[0.0], [1.0], [3.0], [2.0], [1.0]]])
        >>> Plan(keep=0.5).apply(tokens)[1]
        tensor([[0, 2, 3]])
        """
        Checker("Plan.apply").that(tokens.dim() == 3, "tokens", "have shape (b, t, c)", tuple(tokens.shape))
        b, t, c = tokens.shape
        kept = self.tokens_kept(t, prefix)
        if kept == t:
            return tokens, torch.arange(t, device=tokens.device).expand(b, t)
        scores = SCORES[self.score](tokens.detach(), self.seed)[:, prefix:]
        patches = select_tokens(scores, kept - prefix) + prefix
        first = torch.arange(prefix, device=tokens.device).expand(b, prefix)
        index = torch.cat([first, patches], 1)  # (b, t')
        return tokens.gather(1, index[..., None].expand(-1, -1, c)), index


def select_tokens(scores: Tensor, count: int) -> Tensor:
    """Indices (b, count), ascending, of the highest of the scores (b, t); of equal scores the first.

    >>> select_tokens(torch.tensor([[1.0, 3.0, 2.0, 3.0]]), 2)
    tensor([[1, 3]])
    """
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :count].sort(-1).values
