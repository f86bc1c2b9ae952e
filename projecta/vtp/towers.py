"""The vision towers that can be pruned: where CLIP, ViT, DINOv2 and SigLIP keep their parts."""

import gc
import sys
from typing import Any, NamedTuple

from torch import Tensor, nn

from projecta._checks import Checker, fail, host
from projecta.vtp.scores import MODEL_SCORES, attention_scores


class Family(NamedTuple):
    """Where a vision tower keeps what pruning needs."""

    module: str  # of transformers.models
    models: tuple[str, ...]  # those it defines whose heads need no patch in its place; the tower is first
    blocks: str
    norm: str  # before attention
    attention: str
    prefix: int


FAMILIES = (
    Family(
        "clip.modeling_clip",
        ("CLIPVisionModel", "CLIPModel", "CLIPVisionModelWithProjection", "CLIPForImageClassification"),
        "encoder.layers", "layer_norm1", "self_attn", 1,
    ),
    Family(
        "vit.modeling_vit", ("ViTModel", "ViTForImageClassification"), "layers", "layernorm_before",
        "attention", 1,
    ),
    Family(
        "dinov2.modeling_dinov2", ("Dinov2Model", "Dinov2ForImageClassification"), "encoder.layer", "norm1",
        "attention", 1,
    ),
    Family(
        "siglip.modeling_siglip", ("SiglipVisionModel", "SiglipModel", "SiglipForImageClassification"),
        "encoder.layers", "layer_norm1", "self_attn", 0,
    ),
)  # fmt: skip


# Their classifiers average the patches that are left.
_AVERAGING = {"CLIPForImageClassification", "Dinov2ForImageClassification", "SiglipForImageClassification"}


MASKABLE = ("sdpa", "eager")  # attention that takes a mask as a tensor


def find_tower(check: Checker, model: nn.Module) -> tuple[Family, Any]:
    """The family and the one tower in the model."""
    for family in FAMILIES:
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
    supported = ", ".join(family.models[0] for family in FAMILIES)
    check.that(
        False, "model", f"be or hold one of {supported}, in a model of its family", type(model).__name__,
        error=TypeError,
    )  # fmt: skip
    raise AssertionError


def check_score(check: Checker, family: Family, tower: Any, block: Any, score: Any) -> None:
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


def is_averaged(tower: nn.Module) -> bool:
    """Whether there is a classifier that averages the tower's patches, given to `prune` or not."""
    return any(
        issubclass(type(thing), nn.Module)
        and any(kind.__name__ in _AVERAGING for kind in type(thing).__mro__)
        and any(child is tower for child in vars(thing).get("_modules", {}).values())
        for thing in gc.get_objects()
    )


def probe_scores(
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
        split_heads(query, width),
        split_heads(keys, width),
        width**-0.5,
        prefix=prefix,
        mass=mass,
        visible=visible,
    )


def split_heads(x: Tensor, width: int) -> Tensor:
    """(b, t, h e) as (b, h, t, e)."""
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def as_pair(size: Any) -> tuple[int, int]:
    """Rows and columns of a size that may be one number."""
    return (size, size) if isinstance(size, int) else tuple(size)


def width_of_mlp(family: Family, block: nn.Module) -> int:
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
