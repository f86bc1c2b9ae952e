"""The pruning plan: how many tokens each block sees, which ones are kept, and the cost.

Tokens are (b, t, c): `prefix` tokens first (the class token), which are never scored and always kept, then
the patches. Kept patches keep their order. Their number depends on shapes alone, so that nothing waits for
the device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from projecta._checks import Checker, fail
from projecta.vtp.fusion import FUSIONS, PAIRS, Pruned, keep_highest, merge_pairs
from projecta.vtp.scores import MODEL_SCORES, SCORES, View, stand, wide_dtype

SEMANTICS = ("tokens", "stage", "flops")


PRESETS: dict[str, dict[str, Any]] = {
    "input": {"at": 0, "score": "norm"},
    "early": {"at": 4, "score": "cls", "fuse": "squeeze", "mass": True},
    "evit3": {"at": (3, 6, 9), "score": "cls", "fuse": "mean"},
    "merge": {"at": (0, 2, 4, 6, 8, 10), "fuse": "bipartite", "mass": True, "semantics": "flops"},
}


class Costs(NamedTuple):
    """The sizes that give a tower's FLOPs: its widths, and the operations that do not depend on tokens."""

    hidden: int = 768
    intermediate: int = 3072
    fixed: int = 0

    def of(self, schedule: tuple[int, ...]) -> int:
        """Operations of a tower whose blocks see `schedule` tokens: projections, attention, MLP."""
        c, m = self.hidden, self.intermediate
        return self.fixed + sum(2 * t * (4 * c * c + 2 * t * c + 2 * c * m) for t in schedule)


VIT_B16 = Costs()


class ScanCosts(NamedTuple):
    """The operations of a tower of scans: of a token and of a place in one block, and of the embedding.

    Where pruned tokens are merged, some operations run over all places: convolutions, or the whole scan.
    """

    per_token: int
    fixed: int = 0
    per_place: int = 0
    places: int = 0

    def of(self, schedule: tuple[int, ...]) -> int:
        return self.fixed + self.per_token * sum(schedule) + self.per_place * self.places * len(schedule)


@dataclass(frozen=True)
class Plan:
    """A pruning plan: the tokens to prune, and the blocks before which they are pruned.

    Args:
        keep: fraction to keep, in (0, 1]; `semantics` says of which quantity.
        at: index of the block before which tokens are pruned, or several, ascending; 0 prunes right after
            the embedding.
        score: the patches with the highest score are kept: "norm", ||x||_2; "distance", ||x - mean(x)||_2;
            "random", one fixed order for every image; "grid", spread evenly over the image (a checkerboard at
            0.5); "similarity", how little a patch resembles the one before it; from the attention of block
            `at`, computed in advance: "cls", the class token's attention to a patch; "value", the same times
            ||v||; "received", the attention of all tokens to it; "probe", that of SigLIP's pooling head; from
            a scan: "delta", the mean step size in block `at`; or a function of the patches (b, p, c) that
            returns (b, p). The fusions "bipartite" and "checkerboard" use no score.
        fuse: "drop" the others, or merge them by "mean", "cluster", "squeeze", "next", "bipartite" or
            "checkerboard" (see `fusion`).
        mass: add log(mass) to the logits of later attention, so that a token counts for all tokens in it
            (Bolya et al., "Token Merging", arXiv 2210.09461, proportional attention).
        multiple_of: round the tokens that remain, class token included, up to a multiple of this.
        semantics: `keep` is the fraction of the patches that remains at the end ("tokens"), of the patches
            that each stage sees ("stage"), or of the tower's FLOPs ("flops").
        centres: number of tokens into which others are merged, for "cluster"; unused otherwise.
        seed: seed of the random score; unused by others.
        forget: in a tower of scans, the state of a kept token also forgets for those that are missing before
            it, as if their steps were its own. Towers with attention have no such state. A small CLIP was
            about as accurate with it (docs/vision_mamba.md).
        unmerge: in a tower of scans, scan all tokens, each missing one as the token that holds it. The linear
            maps before and after still run over the kept ones alone. It takes longer than a scan of the kept
            tokens, and stays closer to the full tower.

    Raises:
        ValueError: a value is out of its range. TypeError: a value is of the wrong type.

    Examples:
        >>> Plan(keep=0.7).tokens_kept(197)
        139
        >>> Plan(keep=0.7, at=(3, 6, 9), semantics="stage").schedule(197, 12)
        (197, 197, 197, 139, 139, 139, 98, 98, 98, 69, 69, 69)
        >>> Plan(keep=1.5)
        Traceback (most recent call last):
        ValueError: Plan: keep must lie in (0, 1]; got 1.5.
    """

    keep: float = 0.5
    at: int | tuple[int, ...] = 0
    score: str | Callable[[Tensor], Tensor] = "norm"
    fuse: str = "drop"
    mass: bool = False
    multiple_of: int = 1
    semantics: str = "tokens"
    centres: int = 8
    seed: int = 0
    forget: bool = False
    unmerge: bool = False

    def __post_init__(self):
        check = Checker("Plan")
        check.that(
            isinstance(self.keep, int | float), "keep", "be a number", repr(self.keep), error=TypeError
        )
        check.that(0 < self.keep <= 1, "keep", "lie in (0, 1]", self.keep)
        stages = self.stages
        for at in stages:
            rule = "be an integer or a tuple of integers"
            check.that(isinstance(at, int), "at", rule, repr(self.at), error=TypeError)
            check.that(at >= 0, "at", "be at least 0", self.at)
        ascending = len(stages) > 0 and list(stages) == sorted(set(stages))
        check.that(ascending, "at", "name one block or several, ascending", self.at)
        for name, least in (("multiple_of", 1), ("centres", 1), ("seed", 0)):
            value = getattr(self, name)
            check.that(isinstance(value, int), name, "be an integer", repr(value), error=TypeError)
            check.that(value >= least, name, f"be at least {least}", value)
        for name in ("mass", "forget", "unmerge"):
            value = getattr(self, name)
            check.that(isinstance(value, bool), name, "be True or False", repr(value), error=TypeError)
        if not callable(self.score):
            check.one_of("score", self.score, (*SCORES, *MODEL_SCORES))
        check.one_of("fuse", self.fuse, FUSIONS)
        check.one_of("semantics", self.semantics, SEMANTICS)
        for name, why in (("mass", "Tokens that take nothing in have mass 1."), ("unmerge", "")):
            value = getattr(self, name)
            check.that(
                self.fuse != "drop" or not value, name, "be False where tokens are dropped", value, why
            )

    @classmethod
    def preset(cls, name: str, keep: float = 0.5, **changes) -> "Plan":
        """A plan by name.

        "input": keep the patches of largest norm, before block 0. "early": merge the others into the patches
        that the class token attends to, before block 4. "evit3": EViT's three stages. "merge": merge pairs
        before every other of 12 blocks, `keep` of the FLOPs. It is closest to the full tower at equal FLOPs
        (docs/pruning.md).

        Examples:
            >>> Plan.preset("early").fuse
            'squeeze'
        """
        Checker("Plan.preset").one_of("name", name, tuple(PRESETS))
        return cls(keep=keep, **(PRESETS[name] | changes))

    @property
    def stages(self) -> tuple[int, ...]:
        return self.at if isinstance(self.at, tuple) else (self.at,)

    def tokens_kept(self, tokens: int, prefix: int = 1) -> int:
        """Number of `tokens` that remain, prefix included, if `keep` is a fraction of the patches."""
        return self._round(self.keep * (tokens - prefix), tokens, prefix)

    def schedule(
        self, tokens: int, blocks: int, prefix: int = 1, costs: Costs | ScanCosts = VIT_B16
    ) -> tuple[int, ...]:
        """Number of tokens that each block sees.

        Raises:
            ValueError: no number of tokens takes so few FLOPs, or there is no block `at`.
        """
        check = Checker("Plan")
        check.that(self.stages[-1] < blocks, "at", f"be below the number of blocks, {blocks}", self.at)
        patches = tokens - prefix
        check.that(patches > 0, "tokens", f"be more than the prefix, {prefix}", tokens)
        if self.semantics != "flops":
            return self._schedule(self.keep, tokens, blocks, prefix)
        full = costs.of((tokens,) * blocks)
        least = costs.of(self._schedule(1e-9, tokens, blocks, prefix)) / full
        rule = f"be at least {least:.3f} of the FLOPs, pruning at {self.at}"
        check.that(least <= self.keep, "keep", rule, self.keep)
        low, high = 0, patches  # search the most patches that fit
        while low < high:
            middle = (low + high + 1) // 2
            if costs.of(self._schedule(middle / patches, tokens, blocks, prefix)) / full <= self.keep:
                low = middle
            else:
                high = middle - 1
        return self._schedule(max(low, 1e-9) / patches, tokens, blocks, prefix)

    def _schedule(self, keep: float, tokens: int, blocks: int, prefix: int) -> tuple[int, ...]:
        seen, kept, patches = [tokens] * blocks, tokens, tokens - prefix
        for i, at in enumerate(self.stages):
            if self.semantics == "stage":
                part = keep * (kept - prefix)
            else:
                part = keep ** ((i + 1) / len(self.stages)) * patches
            kept = min(kept, self._round(part, tokens, prefix))
            seen[at:] = [kept] * (blocks - at)
        return tuple(seen)

    def _round(self, patches: float, tokens: int, prefix: int) -> int:
        kept = prefix + max(1, math.ceil(patches - 1e-9))  # 0.7 * 10 is slightly above 7
        return min(tokens, math.ceil(kept / self.multiple_of) * self.multiple_of)

    def describe(self, tokens: int, blocks: int, prefix: int = 1, costs: Costs | ScanCosts = VIT_B16) -> str:
        """The plan's keep ratio in each of the three semantics, and the tokens per block.

        Examples:
            >>> print(Plan(keep=0.5).describe(197, 12))
            keep 0.500 of the patches, 0.500 per stage, 0.492 of the FLOPs
            tokens per block: 99 x 12
        """
        schedule = self.schedule(tokens, blocks, prefix, costs)
        end = (schedule[-1] - prefix) / (tokens - prefix)
        flops = costs.of(schedule) / costs.of((tokens,) * blocks)
        runs: list[list[int]] = []
        for t in schedule:
            if runs and runs[-1][0] == t:
                runs[-1][1] += 1
            else:
                runs.append([t, 1])
        return (
            f"keep {end:.3f} of the patches, {end ** (1 / len(self.stages)):.3f} per stage,"
            f" {flops:.3f} of the FLOPs\n"
            "tokens per block: " + ", ".join(f"{t} x {count}" for t, count in runs)
        )

    def apply(
        self, tokens: Tensor, prefix: int = 1, *, count: int | None = None, scores: Tensor | None = None,
        mass: Tensor | None = None, visible: Tensor | None = None, grid: tuple[int, int] | None = None,
        places: Tensor | None = None,
    ) -> Pruned:  # fmt: skip
        """Prune (b, t, c) tokens once.

        Args:
            count: number of tokens that remain, prefix included; if not given, `keep` of the patches,
                whatever `semantics` and `at` say.
            scores: (b, t - prefix), if the plan's score needs a model or is already computed.
            mass: (b, t), from an earlier stage; ones if not given.
            visible: (b, t), False for masked tokens. They have no score and no mass: they are pruned first,
                and add nothing to other tokens.
            grid: rows and columns of the image, for score "grid" and fuse "checkerboard"; a square if not
                given.
            places: (b, t - prefix), index of each patch in the grid, if some were pruned before; with `grid`.

        If nothing is pruned, the result holds `tokens` itself.

        Examples:
            >>> tokens = torch.tensor([[[0.0], [1.0], [3.0], [2.0], [1.0]]])
            >>> Plan(keep=0.5).apply(tokens).kept
            tensor([[0, 2, 3]])
        """
        check = Checker("Plan.apply")
        check.that(tokens.dim() == 3, "tokens", "have shape (b, t, c)", tuple(tokens.shape))
        b, t, _ = tokens.shape
        kept = self.tokens_kept(t, prefix) if count is None else count
        check.that(prefix < kept <= t or kept == t, "count", f"lie in {prefix + 1}...{t}", kept)
        if mass is None:
            mass = torch.ones(b, t, dtype=wide_dtype(tokens.dtype), device=tokens.device)
        check.that(mass.shape == (b, t), "mass", f"have shape {(b, t)}", tuple(mass.shape))
        if visible is not None:
            check.that(visible.shape == (b, t), "visible", f"have shape {(b, t)}", tuple(visible.shape))
            mass = torch.where(visible, mass, 0)
        if kept == t:
            everyone = torch.arange(t, device=tokens.device).expand(b, t)
            return Pruned(tokens, everyone, mass, everyone)
        seen = None if visible is None else visible[:, prefix:]
        view, patches = View(self.seed, seen, grid, places), tokens[:, prefix:].detach()
        if self.fuse in PAIRS:
            colour = None
            if self.fuse == "checkerboard":
                row, column, _ = stand(patches, view, "fuse 'checkerboard'")
                colour = (row + column) % 2
            return merge_pairs(tokens, mass, kept, prefix, visible is not None, colour)
        if scores is None:
            scores = self._score(patches, view)
        check.that(
            scores.shape == (b, t - prefix), "scores", f"have shape {(b, t - prefix)}", tuple(scores.shape)
        )
        if seen is not None:
            limits = torch.finfo if scores.is_floating_point() else torch.iinfo
            scores = scores.masked_fill(~seen, limits(scores.dtype).min)
        takers, follow = self._open(kept - prefix), self.fuse == "next"
        return keep_highest(tokens, mass, scores, kept, prefix, takers, follow)

    def _score(self, patches: Tensor, view: View) -> Tensor:
        if callable(self.score):
            return self.score(patches)
        if self.score in MODEL_SCORES:
            rule = f"be given for score {self.score!r}"
            fail("Plan.apply", "scores", rule, "None", "It needs a model's block.")
        return SCORES[self.score](patches, view)

    def _open(self, kept: int) -> int:
        """Number of kept patches into which others are merged: those with the lowest scores."""
        return {"drop": 0, "mean": 1, "cluster": min(self.centres, kept), "squeeze": kept, "next": kept}[
            self.fuse
        ]
