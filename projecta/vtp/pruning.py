"""Attaches a plan to the vision tower of one Hugging Face model, and removes it again.

The plan runs in forward pre-hooks of blocks, on that model instance only: no class is changed, no weight is
renamed, and other models in the process are not affected.
"""

import dataclasses
import inspect
import itertools
import threading
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from projecta._checks import Checker, fail, host
from projecta.vtp.fusion import PAIRS, take
from projecta.vtp.plan import Costs, Plan, ScanCosts
from projecta.vtp.scores import MODEL_SCORES, attention_scores
from projecta.vtp.towers import (
    MASKABLE,
    Family,
    as_pair,
    check_score,
    find_tower,
    is_averaged,
    probe_scores,
    scan_costs,
    split_heads,
    width_of_mlp,
)

_CALL = "projecta_call"  # keyword argument that a tower passes on to its blocks


_versions = itertools.count(1)


def prune(model: nn.Module, plan: Plan) -> "Pruning":
    """Prune the tokens of a vision tower by `plan` from now on, until the handle's `remove()`.

    Args:
        model: a CLIP, ViT, DINOv2 or SigLIP model of transformers 5, or `projecta.vision_mamba`: the tower,
            or a model of its family that contains it (CLIPModel, CLIPVisionModelWithProjection,
            ViTForImageClassification...) and whose head does not need every patch. A deep copy of a pruned
            model (or one that was saved and loaded) is pruned too; `prune` of the copy replaces its plan by
            the given one.
        plan: the tokens to prune, and the blocks before which they are pruned.

    Returns:
        A handle, also a context manager that removes the pruning at its end; `print` it to see its keep
        ratios and the tokens per block.

    An attention mask is reduced to the kept tokens. Masked patches are pruned first, and are merged into no
    other token. If a classifier that averages patches holds the tower when `prune` is called, patches in
    `last_hidden_state` are multiplied by their mass over the mean mass. Threads may call a pruned
    tower at the same time. A compiled tower is compiled again when it is pruned, when `keep` is set and when
    the pruning is removed.

    Raises:
        TypeError: the model has no such tower, or a head that needs every patch. ValueError: it is pruned
            already, has no block `plan.at`, or lacks a part that the plan needs: a class token for "cls" and
            "value", a pooling head for "probe", attention with a mask ("sdpa" or "eager") for `mass`, scans
            for "delta", `forget` and `unmerge`.

    Examples:
        >>> import torch
        >>> from transformers import CLIPVisionConfig, CLIPVisionModel
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
        >>> model = CLIPVisionModel(CLIPVisionConfig(**sizes, num_hidden_layers=2, num_attention_heads=2))
        >>> with prune(model, Plan(keep=0.5)) as handle:
        ...     handle.tokens, model(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape[1]
        ((9, 9), 9)
    """
    check = Checker("prune")
    check.that(isinstance(plan, Plan), "plan", "be a projecta.vtp.Plan", type(plan).__name__, error=TypeError)
    family, tower = find_tower(check, getattr(model, "_orig_mod", model))  # torch.compile's wrapper
    blocks = tower.get_submodule(family.blocks)
    check.that(
        plan.stages[-1] < len(blocks), "plan.at", f"be below the number of blocks, {len(blocks)}", plan.at
    )
    hooks = [hook for block in blocks for hook in block._forward_pre_hooks.values()]
    for pruning in {id(hook.pruning): hook.pruning for hook in hooks if isinstance(hook, _Hook)}.values():
        check.that(
            not pruning.has_handle, "model", "not be pruned already", "a pruned model",
            "Call remove() of its handle first.",
        )  # fmt: skip
        pruning.remove()
    check_score(check, family, tower, blocks[plan.stages[0]], plan.score)
    check.that(not (plan.mass and family.scans), "plan.mass", "be False in a tower without attention", True)
    for name, wanted in (("unmerge", plan.unmerge), ("forget", plan.forget)):
        check.that(family.scans or not wanted, f"plan.{name}", "be False in a tower without scans", True)
    attention = tower.config._attn_implementation
    check.that(
        not plan.mass or attention in MASKABLE, "plan.mass",
        f"be False with attention {attention!r}, which takes no mask", plan.mass,
    )  # fmt: skip
    masks = "attention_mask" in inspect.signature(type(tower).forward).parameters
    check.that(
        plan.keep == 1 or not masks or attention != "flex_attention", "model",
        "have an attention whose masks are tensors: take 'sdpa' or 'eager'", f"attention {attention!r}",
    )  # fmt: skip
    check.that(
        not plan.mass or "attention_mask" in inspect.signature(type(blocks[0]).forward).parameters,
        "plan.mass", f"be False: {type(blocks[0]).__name__} of {host('transformers')} takes no mask",
        plan.mass, "Take a newer transformers.",
    )  # fmt: skip
    return Pruning(family, tower, plan)


class _Found(NamedTuple):
    """The fields of `vtp.Pruned` without the tokens, relative to the tokens before the first stage."""

    kept: Tensor
    mass: Tensor  # 0 for a masked token
    owner: Tensor


class _Call:
    """One forward pass of a tower: the module that was called (nn.DataParallel calls replicas), the rows and
    columns of its patches, and the result of each stage."""

    def __init__(self, tower: Any, grid: tuple[int, int] | None, whole: bool):
        self.tower, self.grid, self.whole = tower, grid, whole  # not whole: blocks called without their tower
        self.found: dict[int, _Found] = {}  # by stage


class Pruning:
    """Handle of a pruned tower, returned by `prune`.

    Attributes:
        plan: the plan in force. keep: its keep ratio; set it to change the plan.
        tokens: tokens that each block sees. flops_ratio: FLOPs of the pruned tower over those of the full
            one.
        trace: in the last forward pass, the indices before pruning of the remaining tokens, (b, t'), or None.
        owner: in the last forward pass, index of the remaining token that holds each token, (b, t); -1: none.
        mass: in the last forward pass, number of tokens merged in each remaining token, (b, t'); 0: masked.
        grid: in the last forward pass, rows and columns of patches.

    In a Vision Mamba these count the class token as 0, wherever it stands, and then the patches by rows; the
    tokens of `last_hidden_state` are in the order of their places instead.
    """

    def __init__(self, family: Family, tower: Any, plan: Plan):
        config, blocks = tower.config, tower.get_submodule(family.blocks)
        self._family, self._blocks = family, list(blocks)
        (rows, columns), (high, wide) = as_pair(config.image_size), as_pair(config.patch_size)
        self._patch, self._grid = (high, wide), (rows // high, columns // wide)
        self._patches = self._grid[0] * self._grid[1]
        embedding = 2 * self._patches * config.num_channels * high * wide * config.hidden_size
        self._costs: Costs | ScanCosts
        if family.scans:
            self._costs = scan_costs(blocks[0], embedding, plan, self._patches + family.prefix)
        else:
            self._costs = Costs(config.hidden_size, width_of_mlp(family, blocks[0]), embedding)
        self._tower, self.has_handle = tower, True
        self._last: _Call | None = None
        self._thread, self._traced = threading.local(), None
        self._adopt(plan)
        self._removals = [tower.register_forward_pre_hook(_Begin(self), with_kwargs=True)]
        self._removals += [
            block.register_forward_pre_hook(_Hook(self, i), with_kwargs=True)
            for i, block in enumerate(blocks)
        ]
        weigh = plan.fuse != "drop" and is_averaged(tower)
        self._removals.append(tower.register_forward_hook(_End(self, weigh)))
        head = getattr(tower, "head", None)
        if head is not None:
            self._removals.append(head.attention.register_forward_pre_hook(_Attend(self), with_kwargs=True))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_thread": None, "_traced": None, "_last": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, whose handle no caller holds."""
        self.__dict__.update(state, _thread=threading.local(), has_handle=False)

    def _adopt(self, plan: Plan) -> None:
        prefix, count = self._family.prefix, len(self._blocks)
        self.tokens = plan.schedule(self._patches + prefix, count, prefix, self._costs)
        self.plan = plan
        for block in self._blocks:
            _outdate_compiled(block)

    @property
    def scans(self) -> bool:
        """Whether the tower is one of scans, whose tokens stand in a sequence."""
        return self._family.scans

    @property
    def keep(self) -> float:
        return self.plan.keep

    @keep.setter
    def keep(self, keep: float) -> None:
        self._adopt(dataclasses.replace(self.plan, keep=keep))

    @property
    def flops_ratio(self) -> float:
        full = (self._patches + self._family.prefix,) * len(self._blocks)
        return self._costs.of(self.tokens) / self._costs.of(full)

    def _of_last(self, name: str) -> Tensor | None:
        found = {} if self._last is None else self._last.found
        return getattr(found.get(len(self.plan.stages) - 1), name, None)

    @property
    def trace(self) -> Tensor | None:
        return self._of_last("kept")

    @property
    def owner(self) -> Tensor | None:
        return self._of_last("owner")

    @property
    def mass(self) -> Tensor | None:
        return self._of_last("mass")

    @property
    def grid(self) -> tuple[int, int]:
        seen = None if self._last is None else self._last.grid
        return seen or self._grid

    def __str__(self) -> str:
        prefix = self._family.prefix
        return self.plan.describe(self._patches + prefix, len(self._blocks), prefix, self._costs)

    def remove(self) -> None:
        """Remove the pruning and restore the model. A second call does nothing."""
        for removal in self._removals:
            removal.remove()
        for block in self._blocks if self._removals else ():
            _restore_compiled(block)
        self._removals = []

    def __enter__(self) -> "Pruning":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def begin(self, tower: Any, pixels: Any, whole: bool = True) -> _Call:
        """Start a forward pass of the tower, in this thread."""
        grid = None
        if isinstance(pixels, Tensor) and pixels.dim() == 4:
            grid = pixels.shape[2] // self._patch[0], pixels.shape[3] // self._patch[1]
        call = _Call(tower, grid, whole)
        self.current = call
        return call

    @property
    def current(self) -> _Call | None:
        """The current pass of this thread. (torch traces one thread at a time, and no thread-locals.)"""
        if torch.compiler.is_compiling():
            return self._traced
        return getattr(self._thread, "call", None)

    @current.setter
    def current(self, call: _Call | None) -> None:
        if torch.compiler.is_compiling():
            self._traced = call  # type: ignore[assignment]
        else:
            self._thread.call = call

    def enter_block(
        self, call: _Call | None, i: int, block: nn.Module, tokens: Tensor, mask: Any
    ) -> tuple[Tensor, Any]:
        """The tokens that block i sees, and the mask of its attention, or in a tower of scans their order."""
        stages, prefix = self.plan.stages, self._family.prefix
        behind = [s for s, at in enumerate(stages) if at <= i]
        if not behind:
            return tokens, mask
        call = self.current if call is None else call
        if stages[0] == i and (call is None or not call.whole):
            call = self.begin(self._tower, None, whole=False)
        if call is None:
            fail("prune", f"block {i}", f"run after block {stages[0]} of the same pass", "a separate call")
        stage, prunes = behind[-1], self.tokens[-1] < self._patches + prefix
        if self._family.scans:
            if stages[stage] != i:
                return tokens, mask
            return self._prune_sequence(call, stage, block, tokens, mask)
        if stages[stage] == i:
            tokens = self._prune(call, stage, block, tokens, mask if prunes else None)
        if not prunes:
            return tokens, mask
        return tokens, self._mask(call.found[stage], mask, tokens)

    def _prune_sequence(
        self, call: _Call, stage: int, block: Any, tokens: Tensor, order: Any
    ) -> tuple[Tensor, Any]:
        """Prune tokens that stand in an order: with the class token first, and back into their order."""
        (b, t, _), given, places = tokens.shape, tokens, order.places
        if places is None:
            places = torch.arange(t, device=tokens.device).expand(b, t)
        scores = None
        if self.plan.score == "delta":
            scores = block.mixer.steps(block.norm(tokens.detach()), order).detach()
        if order.class_at is not None:
            first = places.masked_fill(places == order.class_at, -1).argsort(-1)
            tokens = take(tokens, first)
            scores = None if scores is None else scores.gather(1, first)[:, 1:]
        tokens = self._prune(call, stage, block, tokens, None, scores)
        if tokens.shape[1] == t:
            return given, order
        found = call.found[stage]
        kept, holders = found.kept, found.owner  # 0: the class token, then the patches
        if order.class_at is not None:
            patch = kept - 1
            kept = torch.where(kept == 0, order.class_at, patch + (patch >= order.class_at))
            every = torch.arange(holders.shape[1], device=kept.device)
            shifted = torch.where(every < order.class_at, every + 1, every)
            holders = holders[:, shifted.masked_fill(every == order.class_at, 0)]
        places, back = kept.sort(-1)
        if self.plan.fuse == "drop":
            return take(tokens, back), order.keep(places, self.plan.forget)
        holders, mass = back.argsort(-1).gather(1, holders), found.mass.gather(1, back)
        return take(tokens, back), order.keep(places, self.plan.forget, mass, holders, self.plan.unmerge)

    def _prune(
        self,
        call: _Call,
        stage: int,
        block: nn.Module,
        tokens: Tensor,
        mask: Any,
        scores: Tensor | None = None,
    ) -> Tensor:
        prefix, t = self._family.prefix, tokens.shape[1]
        before = call.found[stage - 1] if stage else None
        visible, mass, places = None, None, None
        if before is not None:
            mass, places = before.mass, before.kept[:, prefix:] - prefix
        if mask is not None:
            self._check_mask(mask, t if before is None else before.owner.shape[1])
            visible = _visible(mask).expand(len(tokens), -1) if before is None else before.mass > 0
        count = self._count(stage, t)
        scored = count < t and self.plan.fuse not in PAIRS  # merging pairs needs no score
        if not scored:
            scores = None
        elif scores is None:
            scores = self._scores(call, block, tokens, mass, visible)
        pruned = self.plan.apply(
            tokens, prefix, count=count, scores=scores, mass=mass, visible=visible, places=places,
            grid=call.grid or self._grid,
        )  # fmt: skip
        kept, owner = pruned.kept, pruned.owner
        if before is not None:
            kept = before.kept.gather(1, kept)
            moved = owner.gather(1, before.owner.clamp(min=0))
            owner = torch.where(before.owner < 0, before.owner, moved)
        call.found[stage] = _Found(kept, pruned.mass, owner)
        if not torch.compiler.is_exporting():
            self._last = call
        return pruned.tokens

    def _check_mask(self, mask: Any, t: int) -> None:
        attention = self._tower.config._attn_implementation
        if (
            attention not in MASKABLE
            or not isinstance(mask, Tensor)
            or mask.dim() != 4
            or mask.shape[-1] != t
        ):
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            rule = f"be a (b, 1, t, t) tensor, t = {t}, for attention 'sdpa' or 'eager', in a pruned tower"
            fail("prune", "attention_mask", rule, f"{got} with attention {attention!r}")

    def _mask(self, found: _Found, mask: Any, tokens: Tensor) -> Tensor | None:
        """The mask of the remaining tokens: their part of the given mask, plus the log of their mass."""
        if self.plan.mass and self._tower.config._attn_implementation not in MASKABLE:  # set after `prune`
            attention = self._tower.config._attn_implementation
            fail("prune", "plan.mass", f"be False with attention {attention!r}, which takes no mask", True)
        if mask is None:
            return found.mass.log()[:, None, None].to(tokens.dtype) if self.plan.mass else None
        # A patch that no query sees has mass 0, unless others were merged in: the mass decides, not the mask.
        hidden = ~_visible(mask)[:, None, None]
        mask = mask | hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, 0)
        mask = _rows_and_columns(mask.expand(len(tokens), -1, -1, -1), found.kept)
        visible = (found.mass > 0)[:, None, None]
        if mask.dtype == torch.bool and not self.plan.mass:
            return mask & visible
        least = torch.finfo(tokens.dtype).min
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=tokens.dtype).masked_fill(~mask, least)
        mask = mask.to(tokens.dtype).clamp_min(least)
        logits = found.mass.log() if self.plan.mass else torch.zeros_like(found.mass)
        bias = logits[:, None, None].to(tokens.dtype).masked_fill(~visible, least)
        return (mask + bias).clamp_min(least)

    def _count(self, stage: int, t: int) -> int:
        """Number of the t tokens that remain: the same fraction for images of any size."""
        full, prefix = self._patches + self._family.prefix, self._family.prefix
        seen = full if stage == 0 else self.tokens[self.plan.stages[stage] - 1]
        if t == seen:
            return self.tokens[self.plan.stages[stage]]
        part = (self.tokens[self.plan.stages[stage]] - prefix) / (seen - prefix)
        return dataclasses.replace(self.plan, keep=part, semantics="stage").tokens_kept(t, prefix)

    def _scores(
        self, call: _Call, block: Any, tokens: Tensor, mass: Tensor | None, visible: Tensor | None
    ) -> Tensor | None:
        score, prefix = self.plan.score, self._family.prefix
        if score not in MODEL_SCORES:
            return None
        mass = mass if self.plan.mass else None
        tokens = tokens.detach()
        if score == "probe":
            normed = call.tower.post_layernorm(tokens)
            return probe_scores(call.tower.head, normed, prefix, mass, visible)
        normed = getattr(block, self._family.norm)(tokens)
        attention = getattr(block, self._family.attention)
        width = attention.head_dim
        query = split_heads(attention.q_proj(normed if score == "received" else normed[:, :1]), width)
        keys = split_heads(attention.k_proj(normed), width)
        values = split_heads(attention.v_proj(normed), width) if score == "value" else None
        return attention_scores(
            query, keys, width**-0.5, prefix=prefix, values=values, mass=mass, visible=visible
        )


class _Begin:
    """Hook before a tower: starts a pass and gives its `_Call` to the blocks."""

    def __init__(self, pruning: Pruning):
        self.pruning = pruning

    def __call__(self, tower: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        call = self.pruning.begin(tower, args[0] if args else kwargs.get("pixel_values"))
        return args, kwargs | {_CALL: call}


class _Hook:
    """The pre-hook of one block."""

    def __init__(self, pruning: Pruning, i: int):
        self.pruning, self.i = pruning, i

    def __call__(self, block: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        _ = block.pruning_version  # compiled code depends on it: see `_outdate_compiled`
        kwargs = dict(kwargs)
        call = kwargs.pop(_CALL, None)
        second = "order" if self.pruning.scans else "attention_mask"
        given = dict(zip(("hidden_states", second), args, strict=False))
        named = given | kwargs
        for name, value in [*kwargs.items(), *((f"argument {i}", args[i]) for i in range(2, len(args)))]:
            if name not in ("hidden_states", second) and isinstance(value, Tensor):
                rule = f"be None: projecta does not know this argument of {host('transformers')}"
                fail("prune", name, rule, f"a tensor {tuple(value.shape)}", error=TypeError)
        tokens, mask = self.pruning.enter_block(
            call, self.i, block, named["hidden_states"], named.get(second)
        )
        changed = {"hidden_states": tokens, second: mask}
        args = (*(changed[name] for name in given), *args[2:])
        if "hidden_states" in kwargs:
            kwargs["hidden_states"] = tokens
        if second in kwargs or (mask is not None and second not in given):
            kwargs[second] = mask
        return args, kwargs


class _End:
    """Hook after a tower: ends the pass. If patches are averaged next, each is weighted by its mass."""

    def __init__(self, pruning: Pruning, weigh: bool):
        self.pruning, self.weigh = pruning, weigh

    def __call__(self, tower: nn.Module, args: tuple, output: Any) -> Any:
        call, self.pruning.current = self.pruning.current, None
        mass = _mass_of(self.pruning, call, output[0]) if self.weigh else None
        if mass is None:
            return output
        prefix, tokens = self.pruning._family.prefix, output[0]
        weight = torch.ones_like(mass)
        weight[:, prefix:] = mass[:, prefix:] / mass[:, prefix:].mean(1, keepdim=True)
        tokens = tokens * weight[..., None].to(tokens.dtype)
        if isinstance(output, tuple):
            return (tokens, *output[1:])
        output.last_hidden_state = tokens
        return output


class _Attend:
    """Hook before a pooling head's attention: adds log(mass) to the logits of its probe, too."""

    def __init__(self, pruning: Pruning):
        self.pruning = pruning

    def __call__(self, attention: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        mass = _mass_of(self.pruning, self.pruning.current, args[1]) if self.pruning.plan.mass else None
        if mass is None:
            return args, kwargs
        bias = mass.log().to(args[1].dtype).repeat_interleave(attention.num_heads, 0)[:, None]
        return args, kwargs | {"attn_mask": bias}  # (b heads, 1, t)


def _mass_of(pruning: Pruning, call: _Call | None, tokens: Tensor) -> Tensor | None:
    """The masses of `tokens`, if they are those that remain of a pass; else None."""
    found = {} if call is None else call.found
    mass = getattr(found.get(len(pruning.plan.stages) - 1), "mass", None)
    return mass if mass is not None and mass.shape == tokens.shape[:2] else None


def _visible(mask: Tensor) -> Tensor:
    """Whether any query sees each token, (b, t), from a mask (b, h, t, t): True or near 0 if it does."""
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen.flatten(1, 2).any(1)


def _rows_and_columns(mask: Tensor, kept: Tensor) -> Tensor:
    """The part of a mask (b, h, q, t) for the kept queries and keys (b, t'); q may be 1, for all queries."""
    _, h, q, _ = mask.shape
    mask = mask.gather(3, kept[:, None, None].expand(-1, h, q, -1))
    return mask if q == 1 else mask.gather(2, kept[:, None, :, None].expand(-1, h, -1, kept.shape[1]))


def _outdate_compiled(block: Any) -> None:
    """Make torch.compile compile a block again.

    Its guards ignore hooks. They check whether a block has instance attributes with the names that it reads.
    """
    # Code of a pruned block reads `pruning_version`; other code reads `gradient_checkpointing`.
    block.pruning_version = next(_versions)
    if hasattr(type(block), "gradient_checkpointing") and "gradient_checkpointing" not in vars(block):
        block.gradient_checkpointing = type(block).gradient_checkpointing


def _restore_compiled(block: Any) -> None:
    vars(block).pop("pruning_version", None)
    usual = getattr(type(block), "gradient_checkpointing", None)
    if vars(block).get("gradient_checkpointing") is usual:
        vars(block).pop("gradient_checkpointing", None)
