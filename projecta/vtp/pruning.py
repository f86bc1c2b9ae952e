"""Attaches a `vtp.Plan` to the vision tower of one Hugging Face model, and takes it off again; knows which
scores need a block, and how its queries, keys and values are made; no scoring.

The plan runs in forward pre-hooks of blocks, on that model instance only: no class is changed, no weight is
renamed, and a second model in the process never notices.
"""

import dataclasses
import gc
import inspect
import itertools
import sys
import threading
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from projecta._checks import Checker, fail, host
from projecta.vtp import MODEL_SCORES, Costs, Plan, attention_scores


class _Family(NamedTuple):
    """Where a vision tower keeps what pruning needs."""

    module: str  # of transformers.models
    models: tuple[str, ...]  # those it defines whose heads need no patch in its place; the tower is first
    blocks: str
    norm: str  # before attention
    attention: str
    prefix: int


_FAMILIES = (
    _Family(
        "clip.modeling_clip",
        ("CLIPVisionModel", "CLIPModel", "CLIPVisionModelWithProjection", "CLIPForImageClassification"),
        "encoder.layers", "layer_norm1", "self_attn", 1,
    ),
    _Family(
        "vit.modeling_vit", ("ViTModel", "ViTForImageClassification"), "layers", "layernorm_before",
        "attention", 1,
    ),
    _Family(
        "dinov2.modeling_dinov2", ("Dinov2Model", "Dinov2ForImageClassification"), "encoder.layer", "norm1",
        "attention", 1,
    ),
    _Family(
        "siglip.modeling_siglip", ("SiglipVisionModel", "SiglipModel", "SiglipForImageClassification"),
        "encoder.layers", "layer_norm1", "self_attn", 0,
    ),
)  # fmt: skip
# Their classifiers average the patches that are left.
_AVERAGING = {"CLIPForImageClassification", "Dinov2ForImageClassification", "SiglipForImageClassification"}
_MASKABLE = ("sdpa", "eager")  # attention that takes a mask as a tensor
_CALL = "projecta_call"  # among the arguments that a tower hands on to its blocks
_versions = itertools.count(1)


def prune(model: nn.Module, plan: Plan) -> "Pruning":
    """Prune the tokens of a vision tower by `plan` from now on, until the handle's `remove()`.

    Args:
        model: a CLIP, ViT, DINOv2 or SigLIP model of transformers 5: the tower, or a model around it of the
            same family (CLIPModel, CLIPVisionModelWithProjection, ViTForImageClassification...) whose head
            does not need every patch. A deep copy of a pruned model (or one that was saved and loaded) is
            pruned too: a call with the copy takes it over, with the plan that is given.
        plan: what to prune, and before which block.

    Returns:
        A handle, also a context manager that removes the pruning at its end; `print` it for what the plan
        comes to.

    An attention mask is gathered by the tokens that are kept. Masked patches are pruned first, and no other
    token takes them in. A classifier that averages its patches weighs each by its mass. Threads may call a
    pruned tower at the same time. A compiled tower is compiled again when it is pruned, when `keep` is set
    and when the pruning is removed.

    Raises:
        TypeError: the model has no such tower, or a head that needs every patch. ValueError: it is pruned
            already, has no block `plan.at`, or cannot do what the plan asks: "cls" and "value" need a class
            token, "probe" a pooling head, `mass` attention that takes a mask ("sdpa" or "eager").

    >>> import torch
    >>> from transformers import CLIPVisionConfig, CLIPVisionModel
    >>> model = CLIPVisionModel(CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=2, image_size=32, patch_size=8))
    >>> with prune(model, Plan(keep=0.5)) as handle:
    ...     handle.tokens, model(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape[1]
    ((9, 9), 9)
    """
    check = Checker("prune")
    check.that(isinstance(plan, Plan), "plan", "be a projecta.vtp.Plan", type(plan).__name__, error=TypeError)
    family, tower = _find_tower(check, getattr(model, "_orig_mod", model))  # torch.compile's wrapper
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
    _check_score(check, family, tower, blocks[plan.stages[0]], plan.score)
    attention = tower.config._attn_implementation
    check.that(
        not plan.mass or attention in _MASKABLE, "plan.mass",
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


def _check_score(check: Checker, family: _Family, tower: Any, block: Any, score: Any) -> None:
    """Whether the tower has what a score reads."""
    head = getattr(tower, "head", None)
    check.that(
        score not in ("cls", "value") or family.prefix > 0, "plan.score",
        "be another: this tower has no class token", repr(score), "Take 'probe' or 'received'.",
    )  # fmt: skip
    check.that(
        score != "probe" or head is not None, "plan.score", "be another: this tower has no pooling head",
        repr(score),
    )  # fmt: skip
    if score == "probe":
        weight = getattr(head.attention, "in_proj_weight", None)  # type: ignore[union-attr]
        plain = isinstance(weight, Tensor) and weight.is_floating_point()
        check.that(plain, "plan.score", "be another: the pooling head's weights are quantised", repr(score))
    elif isinstance(score, str) and score in MODEL_SCORES:
        attention = getattr(block, family.attention)
        whole = all(hasattr(attention, part) for part in ("q_proj", "k_proj", "v_proj"))
        kind = f"{type(attention).__name__} of {host('transformers')}"
        rule = f"be another: {kind} has no q_proj, k_proj and v_proj"
        check.that(whole, "plan.score", rule, repr(score))


class _Found(NamedTuple):
    """What became of the tokens before the first stage: as in `vtp.Pruned`, but for the tokens."""

    kept: Tensor
    mass: Tensor  # 0 for a masked token
    owner: Tensor


class _Call:
    """One forward pass of a tower: the module that was called (nn.DataParallel calls replicas), the rows and
    columns of its patches, and what each stage found."""

    def __init__(self, tower: Any, grid: tuple[int, int] | None, whole: bool):
        self.tower, self.grid, self.whole = tower, grid, whole  # not whole: blocks called without their tower
        self.found: dict[int, _Found] = {}  # by stage


class Pruning:
    """What `prune` returns.

    Attributes:
        plan: the plan in force. keep: its keep ratio; set it to plan anew.
        tokens: tokens that each block sees. flops_ratio: arithmetic of the pruned tower over that of the full
            one.
        trace: of the last forward pass, where the tokens that remain stood, (b, t'), or None.
        owner: of the last forward pass, which of those took each token in, (b, t); -1: none.
        mass: of the last forward pass, how many tokens each of those stands for, (b, t'); 0: a masked one.
        grid: of the last forward pass, rows and columns of patches.
    """

    def __init__(self, family: _Family, tower: Any, plan: Plan):
        config, blocks = tower.config, tower.get_submodule(family.blocks)
        self._family, self._blocks = family, list(blocks)
        (rows, columns), (high, wide) = _pair(config.image_size), _pair(config.patch_size)
        self._patch, self._grid = (high, wide), (rows // high, columns // wide)
        self._patches = self._grid[0] * self._grid[1]
        embedding = 2 * self._patches * config.num_channels * high * wide * config.hidden_size
        self._costs = Costs(config.hidden_size, _width_of_mlp(family, blocks[0]), embedding)
        self._tower, self.has_handle = tower, True
        self._last: _Call | None = None
        self._thread, self._traced = threading.local(), None
        self._adopt(plan)
        self._removals = [tower.register_forward_pre_hook(_Begin(self), with_kwargs=True)]
        self._removals += [
            block.register_forward_pre_hook(_Hook(self, i), with_kwargs=True)
            for i, block in enumerate(blocks)
        ]
        weigh = plan.fuse != "drop" and _is_averaged(tower)
        self._removals.append(tower.register_forward_hook(_End(self, weigh)))
        head = getattr(tower, "head", None)
        if head is not None:
            self._removals.append(head.attention.register_forward_pre_hook(_Attend(self), with_kwargs=True))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_thread": None, "_traced": None, "_last": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, whose handle nobody was given."""
        self.__dict__.update(state, _thread=threading.local(), has_handle=False)

    def _adopt(self, plan: Plan) -> None:
        prefix, count = self._family.prefix, len(self._blocks)
        self.tokens = plan.schedule(self._patches + prefix, count, prefix, self._costs)
        self.plan = plan
        for block in self._blocks:
            _outdate_compiled(block)

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
        """Take the pruning off; the model is as it was. A second call does nothing."""
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
        """A forward pass of the tower, in this thread."""
        grid = None
        if isinstance(pixels, Tensor) and pixels.dim() == 4:
            grid = pixels.shape[2] // self._patch[0], pixels.shape[3] // self._patch[1]
        call = _Call(tower, grid, whole)
        self.current = call
        return call

    @property
    def current(self) -> _Call | None:
        """The pass that this thread is in. (torch traces one thread at a time; it knows no thread-locals.)"""
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
        """The tokens that block i sees, and the mask of its attention."""
        stages, prefix = self.plan.stages, self._family.prefix
        behind = [s for s, at in enumerate(stages) if at <= i]
        if not behind:
            return tokens, mask
        call = self.current if call is None else call
        if stages[0] == i and (call is None or not call.whole):
            call = self.begin(self._tower, None, whole=False)
        if call is None:
            fail("prune", f"block {i}", f"run after block {stages[0]} of the same pass", "a call of it alone")
        stage, prunes = behind[-1], self.tokens[-1] < self._patches + prefix
        if stages[stage] == i:
            tokens = self._prune(call, stage, block, tokens, mask if prunes else None)
        if not prunes:
            return tokens, mask
        return tokens, self._mask(call.found[stage], mask, tokens)

    def _prune(self, call: _Call, stage: int, block: nn.Module, tokens: Tensor, mask: Any) -> Tensor:
        prefix, t = self._family.prefix, tokens.shape[1]
        before = call.found[stage - 1] if stage else None
        visible, mass, places = None, None, None
        if before is not None:
            mass, places = before.mass, before.kept[:, prefix:] - prefix
        if mask is not None:
            self._check_mask(mask, t if before is None else before.owner.shape[1])
            visible = _visible(mask).expand(len(tokens), -1) if before is None else before.mass > 0
        count = self._count(stage, t)
        scored = count < t and self.plan.fuse != "bipartite"  # merging pairs asks for no score
        scores = self._scores(call, block, tokens, mass, visible) if scored else None
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
            attention not in _MASKABLE
            or not isinstance(mask, Tensor)
            or mask.dim() != 4
            or mask.shape[-1] != t
        ):
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            rule = f"be a (b, 1, t, t) tensor, t = {t}, for attention 'sdpa' or 'eager', in a pruned tower"
            fail("prune", "attention_mask", rule, f"{got} with attention {attention!r}")

    def _mask(self, found: _Found, mask: Any, tokens: Tensor) -> Tensor | None:
        """The mask of the tokens that are left: what was given of them, and the logarithm of their mass."""
        if self.plan.mass and self._tower.config._attn_implementation not in _MASKABLE:  # set since
            attention = self._tower.config._attn_implementation
            fail("prune", "plan.mass", f"be False with attention {attention!r}, which takes no mask", True)
        if mask is None:
            return found.mass.log()[:, None, None].to(tokens.dtype) if self.plan.mass else None
        # A patch that no query sees has mass 0, unless it took in others: the mass decides, not the mask.
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
        """How many of t remain: of an image of another size than the configuration's, the same part."""
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
            return _probe_scores(call.tower.head, normed, prefix, mass, visible)
        normed = getattr(block, self._family.norm)(tokens)
        attention = getattr(block, self._family.attention)
        width = attention.head_dim
        query = _heads(attention.q_proj(normed if score == "received" else normed[:, :1]), width)
        keys = _heads(attention.k_proj(normed), width)
        values = _heads(attention.v_proj(normed), width) if score == "value" else None
        return attention_scores(
            query, keys, width**-0.5, prefix=prefix, values=values, mass=mass, visible=visible
        )


class _Begin:
    """Before a tower: a pass begins, and its blocks are told of it."""

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
        given = dict(zip(("hidden_states", "attention_mask"), args, strict=False))
        named = given | kwargs
        for name, value in [*kwargs.items(), *((f"argument {i}", args[i]) for i in range(2, len(args)))]:
            if name not in ("hidden_states", "attention_mask") and isinstance(value, Tensor):
                rule = f"be None: projecta does not know this argument of {host('transformers')}"
                fail("prune", name, rule, f"a tensor {tuple(value.shape)}", error=TypeError)
        tokens, mask = self.pruning.enter_block(
            call, self.i, block, named["hidden_states"], named.get("attention_mask")
        )
        changed = {"hidden_states": tokens, "attention_mask": mask}
        args = (*(changed[name] for name in given), *args[2:])
        if "hidden_states" in kwargs:
            kwargs["hidden_states"] = tokens
        if "attention_mask" in kwargs or (mask is not None and "attention_mask" not in given):
            kwargs["attention_mask"] = mask
        return args, kwargs


class _End:
    """Behind a tower: the pass ends. Where patches are averaged next, each counts for what it took in."""

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
    """Before a pooling head's attention: its probe, too, counts a token for all that it took in."""

    def __init__(self, pruning: Pruning):
        self.pruning = pruning

    def __call__(self, attention: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        mass = _mass_of(self.pruning, self.pruning.current, args[1]) if self.pruning.plan.mass else None
        if mass is None:
            return args, kwargs
        bias = mass.log().to(args[1].dtype).repeat_interleave(attention.num_heads, 0)[:, None]
        return args, kwargs | {"attn_mask": bias}  # (b heads, 1, t)


def _mass_of(pruning: Pruning, call: _Call | None, tokens: Tensor) -> Tensor | None:
    """The masses of tokens that a pass has left; None if these are others."""
    found = {} if call is None else call.found
    mass = getattr(found.get(len(pruning.plan.stages) - 1), "mass", None)
    return mass if mass is not None and mass.shape == tokens.shape[:2] else None


def _visible(mask: Tensor) -> Tensor:
    """Which tokens some query sees, (b, t), of a mask (b, h, t, t): True or near 0 where it does."""
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen.flatten(1, 2).any(1)


def _rows_and_columns(mask: Tensor, kept: Tensor) -> Tensor:
    """A mask (b, h, q, t) of the queries and keys kept (b, t'); q may be 1, for all queries."""
    _, h, q, _ = mask.shape
    mask = mask.gather(3, kept[:, None, None].expand(-1, h, q, -1))
    return mask if q == 1 else mask.gather(2, kept[:, None, :, None].expand(-1, h, -1, kept.shape[1]))


def _outdate_compiled(block: Any) -> None:
    """Have code that torch.compile made of a block made anew.

    It looks at no hooks. It does look whether a block has attributes of its own, by names that it has read.
    """
    block.pruning_version = next(
        _versions
    )  # for code of a pruned block; for other code, what all blocks read:
    if hasattr(type(block), "gradient_checkpointing") and "gradient_checkpointing" not in vars(block):
        block.gradient_checkpointing = type(block).gradient_checkpointing


def _restore_compiled(block: Any) -> None:
    vars(block).pop("pruning_version", None)
    usual = getattr(type(block), "gradient_checkpointing", None)
    if vars(block).get("gradient_checkpointing") is usual:
        vars(block).pop("gradient_checkpointing", None)


def _is_averaged(tower: nn.Module) -> bool:
    """Whether there is a classifier that averages the tower's patches, given to `prune` or not."""
    return any(
        issubclass(type(thing), nn.Module)
        and any(kind.__name__ in _AVERAGING for kind in type(thing).__mro__)
        and any(child is tower for child in vars(thing).get("_modules", {}).values())
        for thing in gc.get_objects()
    )


def show(image: Any, handle: Pruning, row: int = 0) -> Any:
    """Draw which patches the last forward pass kept: pruned ones are dark, a line leads to what took them in.

    Args:
        image: what the model saw, before normalisation: (rows, columns, 3) as matplotlib's imshow takes it,
            or a (3, rows, columns) tensor in 0...1. Any size and aspect ratio.
        handle: of a model that has run. row: of the batch.

    Returns:
        A matplotlib figure (matplotlib is an extra: `pip install projecta[plots]`).
    """
    check = Checker("show")
    check.that(handle.trace is not None, "handle", "be of a model that has run", "a handle without a trace")
    assert handle.trace is not None
    assert handle.owner is not None
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    prefix = handle._family.prefix
    if isinstance(image, Tensor):
        image = image.detach().float().cpu().permute(1, 2, 0).clamp(0, 1).numpy()
    owner = handle.owner[row].cpu()
    patches = len(owner) - prefix
    rows, columns = handle.grid
    check.that(rows * columns == patches, "handle", f"be of a {rows} x {columns} grid", f"{patches} patches")
    at = handle.trace[row].cpu() - prefix
    kept = torch.zeros(patches, dtype=torch.bool)
    kept[at[prefix:]] = True
    height, width = image.shape[0] / rows, image.shape[1] / columns
    figure = Figure(figsize=(5, 5 * image.shape[0] / image.shape[1]), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(image)
    axes.set_axis_off()
    for patch in (~kept).nonzero()[:, 0].tolist():
        y, x = divmod(patch, columns)
        box = axes.add_patch(Rectangle((x * width, y * height), width, height))
        box.set(facecolor="black", alpha=0.7, linewidth=0)
        into = int(owner[patch + prefix])
        if into >= prefix:
            v, u = divmod(int(at[into]), columns)
            axes.plot(
                [(x + 0.5) * width, (u + 0.5) * width], [(y + 0.5) * height, (v + 0.5) * height],
                color="white", alpha=0.5, linewidth=0.6,
            )  # fmt: skip
    axes.set_xlim(0, image.shape[1])
    axes.set_ylim(image.shape[0], 0)
    figure.suptitle(f"{int(kept.sum())} of {patches} patches, {handle.flops_ratio:.2f} of the FLOPs")
    return figure


def _probe_scores(
    head: Any, tokens: Tensor, prefix: int, mass: Tensor | None, visible: Tensor | None
) -> Tensor:
    """What SigLIP's pooling head would pay these tokens."""
    attention = head.attention
    q, k, _ = attention.in_proj_weight.chunk(3)
    q_bias, k_bias, _ = attention.in_proj_bias.chunk(3)
    width = attention.head_dim
    query = nn.functional.linear(head.probe, q, q_bias).expand(len(tokens), -1, -1)
    keys = nn.functional.linear(tokens, k, k_bias)
    return attention_scores(
        _heads(query, width), _heads(keys, width), width**-0.5, prefix=prefix, mass=mass, visible=visible
    )


def _heads(x: Tensor, width: int) -> Tensor:
    """(b, t, h e) as (b, h, t, e)."""
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def _pair(size: Any) -> tuple[int, int]:
    """Rows and columns of a size that may be one number."""
    return (size, size) if isinstance(size, int) else tuple(size)


def _width_of_mlp(family: _Family, block: nn.Module) -> int:
    """The width m for which an MLP of two maps, 2 c m weights, is as large as the block's.

    A map is what has `in_features` and `out_features`: quantised ones do, and their weights may be packed.
    """
    maps: list[Any] = [
        m for name, m in block.named_modules()
        if hasattr(m, "in_features") and hasattr(m, "out_features") and family.attention not in name
    ]  # fmt: skip
    if not maps:
        fail("prune", "model", "have linear maps in its blocks", type(block).__name__, error=TypeError)
    return sum(m.in_features * m.out_features for m in maps) // (2 * maps[0].in_features)


def _find_tower(check: Checker, model: nn.Module) -> tuple[_Family, Any]:
    """The family and the one tower in the model."""
    for family in _FAMILIES:
        module = sys.modules.get("transformers.models." + family.module)
        kinds = [] if module is None else [c for c in type(model).__mro__ if c.__module__ == module.__name__]
        if not kinds:
            continue
        check.that(
            kinds[0].__name__ in family.models, "model",
            f"be one of {', '.join(family.models)}: the head of others needs every patch",
            type(model).__name__, error=TypeError,
        )  # fmt: skip
        kind = getattr(module, family.models[0])
        towers = [m for m in model.modules() if isinstance(m, kind)]
        if len(towers) == 1:
            return family, towers[0]
    supported = ", ".join(family.models[0] for family in _FAMILIES)
    check.that(
        False, "model", f"be or hold one of {supported}, in a model of its family", type(model).__name__,
        error=TypeError,
    )  # fmt: skip
    raise AssertionError
