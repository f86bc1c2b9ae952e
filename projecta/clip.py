"""Attaches a `vtp.Plan` to the vision tower of one Hugging Face model, and takes it off again; knows which
scores need a block, and how its queries, keys and values are made; no scoring.

The plan runs in forward pre-hooks of blocks, on that model instance only: no class is changed, no weight is
renamed, and a second model in the process never notices.
"""

import dataclasses
import sys
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from projecta._checks import Checker
from projecta.vtp import MODEL_SCORES, Costs, Plan, attention_scores


class _Family(NamedTuple):
    """Where a vision tower keeps what pruning needs."""

    module: str  # of transformers.models; the models that it defines are accepted
    tower: str
    blocks: str
    norm: str  # before attention
    attention: str
    prefix: int


_FAMILIES = (
    _Family("clip.modeling_clip", "CLIPVisionModel", "encoder.layers", "layer_norm1", "self_attn", 1),
    _Family("vit.modeling_vit", "ViTModel", "layers", "layernorm_before", "attention", 1),
    _Family("dinov2.modeling_dinov2", "Dinov2Model", "encoder.layer", "norm1", "attention", 1),
    _Family("siglip.modeling_siglip", "SiglipVisionModel", "encoder.layers", "layer_norm1", "self_attn", 0),
)
# Their classifiers average the patches that are left.
_AVERAGING = {"CLIPForImageClassification", "Dinov2ForImageClassification", "SiglipForImageClassification"}


def prune(model: nn.Module, plan: Plan) -> "Pruning":
    """Prune the tokens of a vision tower by `plan` from now on, until the handle's `remove()`.

    Args:
        model: a CLIP, ViT, DINOv2 or SigLIP model of transformers 5: the tower, or a model around it of the
            same family (CLIPModel, CLIPVisionModelWithProjection, ViTForImageClassification...).
        plan: what to prune, and before which block.

    Returns:
        A handle, also a context manager that removes the pruning at its end; `print` it for what the plan
        comes to.

    Where a checkpoint runs hooks again (torch.utils.checkpoint around blocks; transformers' own does not), a
    plan with `mass` or several stages wants each backward pass right after its forward pass.

    Raises:
        TypeError: the model has no such tower. ValueError: it is pruned already, has no block `plan.at`, or
            cannot do what the plan asks: "cls" and "value" need a class token, "probe" a pooling head, `mass`
            attention that takes a mask ("sdpa" or "eager").

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
    family, tower = _find_tower(check, model)
    blocks = tower.get_submodule(family.blocks)
    check.that(
        plan.stages[-1] < len(blocks), "plan.at", f"be below the number of blocks, {len(blocks)}", plan.at
    )
    pruned = any(isinstance(hook, _Hook) for block in blocks for hook in block._forward_pre_hooks.values())
    check.that(
        not pruned, "model", "not be pruned already", "a pruned model", "Call remove() of its handle first."
    )
    check.that(
        plan.score not in ("cls", "value") or family.prefix > 0, "plan.score",
        "be another: this tower has no class token", repr(plan.score), "Take 'probe' or 'received'.",
    )  # fmt: skip
    check.that(
        plan.score != "probe" or getattr(tower, "head", None) is not None, "plan.score",
        "be another: this tower has no pooling head", repr(plan.score),
    )  # fmt: skip
    attention = tower.config._attn_implementation
    check.that(
        not plan.mass or attention in ("sdpa", "eager"), "plan.mass",
        f"be False with attention {attention!r}, which takes no mask", plan.mass,
    )  # fmt: skip
    return Pruning(family, tower, plan, any(c.__name__ in _AVERAGING for c in type(model).__mro__))


class Pruning:
    """What `prune` returns.

    Attributes:
        plan: the plan in force. keep: its keep ratio; set it to plan anew.
        tokens: tokens that each block sees. flops_ratio: arithmetic of the pruned tower over that of the full
            one.
        trace: of the last forward pass, where the tokens that remain stood, (b, t'), or None.
        owner: of the last forward pass, which of those took each token in, (b, t); -1: none.
        mass: of the last forward pass, how many tokens each of those stands for, (b, t').
    """

    def __init__(self, family: _Family, tower: Any, plan: Plan, averaging: bool):
        config, blocks = tower.config, tower.get_submodule(family.blocks)
        self._family, self._blocks = family, len(blocks)
        (rows, columns), (high, wide) = _pair(config.image_size), _pair(config.patch_size)
        self._patches = (rows // high) * (columns // wide)
        embedding = 2 * self._patches * config.num_channels * high * wide * config.hidden_size
        self._costs = Costs(config.hidden_size, _width_of_mlp(family, blocks[0]), embedding)
        self._tower = tower
        self._found: dict[int, _Found] = {}  # by stage
        self._adopt(plan)
        self._removals = [
            block.register_forward_pre_hook(_Hook(self, i), with_kwargs=True)
            for i, block in enumerate(blocks)
        ]
        if averaging and plan.fuse != "drop":
            self._removals.append(tower.register_forward_hook(_Weigh(self)))
        head = getattr(tower, "head", None)
        if plan.mass and head is not None:
            self._removals.append(head.attention.register_forward_pre_hook(_Attend(self), with_kwargs=True))

    def _adopt(self, plan: Plan) -> None:
        prefix = self._family.prefix
        self.tokens = plan.schedule(self._patches + prefix, self._blocks, prefix, self._costs)
        self.plan = plan

    @property
    def keep(self) -> float:
        return self.plan.keep

    @keep.setter
    def keep(self, keep: float) -> None:
        self._adopt(dataclasses.replace(self.plan, keep=keep))

    @property
    def flops_ratio(self) -> float:
        full = (self._patches + self._family.prefix,) * self._blocks
        return self._costs.of(self.tokens) / self._costs.of(full)

    def _last(self, name: str) -> Tensor | None:
        return getattr(self._found.get(len(self.plan.stages) - 1), name, None)

    @property
    def trace(self) -> Tensor | None:
        return self._last("kept")

    @property
    def owner(self) -> Tensor | None:
        return self._last("owner")

    @property
    def mass(self) -> Tensor | None:
        return self._last("mass")

    def __str__(self) -> str:
        return self.plan.describe(
            self._patches + self._family.prefix, self._blocks, self._family.prefix, self._costs
        )

    def remove(self) -> None:
        """Take the pruning off; the model is as it was. A second call does nothing."""
        for removal in self._removals:
            removal.remove()

    def __enter__(self) -> "Pruning":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def enter_block(self, i: int, block: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tokens that block i sees, and what to add to its attention's logits."""
        stages, prefix = self.plan.stages, self._family.prefix
        behind = [s for s, at in enumerate(stages) if at <= i]
        if not behind:
            return tokens, None
        stage = behind[-1]
        if stages[stage] == i:
            before = self._found[stage - 1] if stage else None
            t = tokens.shape[1]
            count, mass = self._count(stage, t), None if before is None else before.mass
            scored = count < t and self.plan.fuse != "bipartite"  # merging pairs asks for no score
            scores = self._scores(block, tokens, mass) if scored else None
            pruned = self.plan.apply(tokens, prefix, count=count, scores=scores, mass=mass)
            kept, owner = pruned.kept, pruned.owner
            if before is not None:
                kept = before.kept.gather(1, kept)
                moved = owner.gather(1, before.owner.clamp(min=0))
                owner = torch.where(before.owner < 0, before.owner, moved)
            tokens = pruned.tokens
            self._found[stage] = _Found(kept, pruned.mass, owner)
        if not self.plan.mass or self.tokens[-1] == self._patches + prefix:  # nothing is pruned
            return tokens, None
        return tokens, self._found[stage].mass.log()[:, None, None].to(tokens.dtype)

    def _count(self, stage: int, t: int) -> int:
        """How many of t remain: of an image of another size than the configuration's, the same part."""
        full, prefix = self._patches + self._family.prefix, self._family.prefix
        seen = full if stage == 0 else self.tokens[self.plan.stages[stage] - 1]
        if t == seen:
            return self.tokens[self.plan.stages[stage]]
        part = (self.tokens[self.plan.stages[stage]] - prefix) / (seen - prefix)
        return dataclasses.replace(self.plan, keep=part, semantics="stage").tokens_kept(t, prefix)

    def _scores(self, block: Any, tokens: Tensor, mass: Tensor | None) -> Tensor | None:
        score, prefix = self.plan.score, self._family.prefix
        if score not in MODEL_SCORES:
            return None
        mass = mass if self.plan.mass else None
        tokens = tokens.detach()
        if score == "probe":
            return _probe_scores(self._tower.head, self._tower.post_layernorm(tokens), prefix, mass)
        normed = getattr(block, self._family.norm)(tokens)
        attention = getattr(block, self._family.attention)
        width = attention.head_dim
        query = _heads(attention.q_proj(normed if score == "received" else normed[:, :1]), width)
        keys = _heads(attention.k_proj(normed), width)
        values = _heads(attention.v_proj(normed), width) if score == "value" else None
        return attention_scores(query, keys, width**-0.5, prefix=prefix, values=values, mass=mass)


class _Found(NamedTuple):
    """What became of the tokens before the first stage: as in `vtp.Pruned`, but for the tokens."""

    kept: Tensor
    mass: Tensor
    owner: Tensor


class _Hook:
    """The pre-hook of one block."""

    def __init__(self, pruning: Pruning, i: int):
        self.pruning, self.i = pruning, i

    def __call__(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        named = "hidden_states" in kwargs
        tokens = kwargs["hidden_states"] if named else args[0]
        tokens, bias = self.pruning.enter_block(self.i, block, tokens)
        args = args if named else (tokens, *args[1:])
        kwargs = kwargs | {"hidden_states": tokens} if named else kwargs
        if bias is not None:
            if len(args) > 1:
                args = (args[0], bias, *args[2:])
            else:
                kwargs = kwargs | {"attention_mask": bias}
        return args, kwargs


class _Weigh:
    """Behind a tower whose patches are averaged next: each counts for what it took in."""

    def __init__(self, pruning: Pruning):
        self.pruning = pruning

    def __call__(self, tower: nn.Module, args: tuple, output: Any) -> Any:
        prefix, mass = self.pruning._family.prefix, self.pruning.mass
        tokens = output[0]
        if mass is None or mass.shape[1] != tokens.shape[1]:
            return output
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
        mass, tokens = self.pruning.mass, args[1]
        if mass is None or mass.shape[1] != tokens.shape[1]:
            return args, kwargs
        bias = mass.log().to(tokens.dtype).repeat_interleave(attention.num_heads, 0)[:, None]
        return args, kwargs | {"attn_mask": bias}  # (b heads, 1, t)


def show(image: Any, handle: Pruning, row: int = 0) -> Any:
    """Draw which patches the last forward pass kept: pruned ones are dark, a line leads to what took them in.

    Args:
        image: what the model saw, before normalisation: (rows, columns, 3) as matplotlib's imshow takes it,
            or a (3, rows, columns) tensor in 0...1.
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
    side = int(patches**0.5)
    check.that(side * side == patches, "handle", "be of a square image", f"{patches} patches")
    at = handle.trace[row].cpu() - prefix
    kept = torch.zeros(patches, dtype=torch.bool)
    kept[at[prefix:]] = True
    height, width = image.shape[0] / side, image.shape[1] / side
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(image)
    axes.set_axis_off()
    for patch in (~kept).nonzero()[:, 0].tolist():
        y, x = divmod(patch, side)
        box = axes.add_patch(Rectangle((x * width, y * height), width, height))
        box.set(facecolor="black", alpha=0.7, linewidth=0)
        into = int(owner[patch + prefix])
        if into >= prefix:
            v, u = divmod(int(at[into]), side)
            axes.plot(
                [(x + 0.5) * width, (u + 0.5) * width], [(y + 0.5) * height, (v + 0.5) * height],
                color="white", alpha=0.5, linewidth=0.6,
            )  # fmt: skip
    axes.set_xlim(0, image.shape[1])
    axes.set_ylim(image.shape[0], 0)
    figure.suptitle(f"{int(kept.sum())} of {patches} patches, {handle.flops_ratio:.2f} of the FLOPs")
    return figure


def _probe_scores(head: Any, tokens: Tensor, prefix: int, mass: Tensor | None) -> Tensor:
    """What SigLIP's pooling head would pay these tokens."""
    attention = head.attention
    q, k, _ = attention.in_proj_weight.chunk(3)
    q_bias, k_bias, _ = attention.in_proj_bias.chunk(3)
    width = attention.head_dim
    query = nn.functional.linear(head.probe, q, q_bias).expand(len(tokens), -1, -1)
    keys = nn.functional.linear(tokens, k, k_bias)
    return attention_scores(_heads(query, width), _heads(keys, width), width**-0.5, prefix=prefix, mass=mass)


def _heads(x: Tensor, width: int) -> Tensor:
    """(b, t, h e) as (b, h, t, e)."""
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def _pair(size: Any) -> tuple[int, int]:
    """Rows and columns of a size that may be one number."""
    return (size, size) if isinstance(size, int) else tuple(size)


def _width_of_mlp(family: _Family, block: nn.Module) -> int:
    """The width m for which an MLP of two maps, 2 c m weights, is as large as the block's."""
    maps = [
        m for name, m in block.named_modules() if isinstance(m, nn.Linear) and family.attention not in name
    ]
    return sum(m.weight.numel() for m in maps) // (2 * maps[0].in_features)


def _find_tower(check: Checker, model: nn.Module) -> tuple[_Family, Any]:
    """The family and the one tower in the model."""
    for family in _FAMILIES:
        module = sys.modules.get("transformers.models." + family.module)
        if module is None or not any(c.__module__ == module.__name__ for c in type(model).__mro__):
            continue
        kind = getattr(module, family.tower)
        towers = [m for m in model.modules() if isinstance(m, kind)]
        if len(towers) == 1:
            return family, towers[0]
    supported = ", ".join(family.tower for family in _FAMILIES)
    check.that(
        False, "model", f"be or hold one of {supported}, in a model of its family", type(model).__name__,
        error=TypeError,
    )  # fmt: skip
    raise AssertionError
