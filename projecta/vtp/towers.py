"""The vision towers that can be pruned: the names of the parts of CLIP, ViT, DINOv2, SigLIP, Vision Mamba."""

import gc
import itertools
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from projecta._checks import Checker, fail, host
from projecta.vtp.plan import Plan, ScanCosts
from projecta.vtp.scores import MODEL_SCORES, attention_scores


class Family(NamedTuple):
    """The names of the parts of a vision tower that pruning needs."""

    module: str  # that defines it
    models: tuple[str, ...]  # supported classes: the heads do not need every patch; the tower is first
    blocks: str
    norm: str  # before attention
    attention: str  # or the mixer, in a tower of scans
    prefix: int
    scans: bool = False  # whether tokens stand in a sequence, not in a set


FAMILIES = (
    Family(
        "transformers.models.clip.modeling_clip",
        ("CLIPVisionModel", "CLIPModel", "CLIPVisionModelWithProjection", "CLIPForImageClassification"),
        "encoder.layers", "layer_norm1", "self_attn", 1,
    ),
    Family(
        "transformers.models.vit.modeling_vit", ("ViTModel", "ViTForImageClassification"), "layers",
        "layernorm_before", "attention", 1,
    ),
    Family(
        "transformers.models.dinov2.modeling_dinov2", ("Dinov2Model", "Dinov2ForImageClassification"),
        "encoder.layer", "norm1", "attention", 1,
    ),
    Family(
        "transformers.models.siglip.modeling_siglip",
        ("SiglipVisionModel", "SiglipModel", "SiglipForImageClassification"), "encoder.layers",
        "layer_norm1", "self_attn", 0,
    ),
    Family(
        "projecta.vision_mamba", ("VisionMambaModel", "VisionMambaForImageClassification"), "layers", "norm",
        "mixer", 1, True,
    ),
)  # fmt: skip


# Models whose classifiers average the remaining patches.
_AVERAGING = {"CLIPForImageClassification", "Dinov2ForImageClassification", "SiglipForImageClassification"}


MASKABLE = ("sdpa", "eager")  # attention that takes a mask as a tensor


def find_tower(check: Checker, model: nn.Module) -> tuple[Family, Any]:
    """The family and the one tower in the model."""
    for family in FAMILIES:
        module = sys.modules.get(family.module)
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
            bare = family.scans and towers[0].embeddings.cls_token is None
            return (family._replace(prefix=0) if bare else family), towers[0]
    supported = ", ".join(family.models[0] for family in FAMILIES)
    check.that(
        False, "model", f"be or hold one of {supported}, in a model of its family", type(model).__name__,
        error=TypeError,
    )  # fmt: skip
    raise AssertionError


def check_score(check: Checker, family: Family, tower: Any, block: Any, score: Any) -> None:
    """Check that the tower has the parts that a score reads."""
    if family.scans or score == "delta":
        known = not isinstance(score, str) or score == "delta" or score not in MODEL_SCORES
        rule = "be of tokens alone or 'delta'" if family.scans else "not be 'delta', the step of a scan"
        check.that(family.scans and known, "plan.score", f"{rule}, in this tower", repr(score))
        return
    head = getattr(tower, "head", None)
    check.that(
        score not in ("cls", "value") or family.prefix > 0, "plan.score",
        "not need a class token: this tower has none", repr(score), "Take 'probe' or 'received'.",
    )  # fmt: skip
    check.that(
        score != "probe" or head is not None, "plan.score", "not need a pooling head: this tower has none",
        repr(score),
    )  # fmt: skip
    if score == "probe":
        weight = getattr(head.attention, "in_proj_weight", None)  # type: ignore[union-attr]
        plain = isinstance(weight, Tensor) and weight.is_floating_point()
        check.that(plain, "plan.score", "not need the pooling head: its weights are quantised", repr(score))
    elif isinstance(score, str) and score in MODEL_SCORES:
        attention = getattr(block, family.attention)
        whole = all(hasattr(attention, part) for part in ("q_proj", "k_proj", "v_proj"))
        kind = f"{type(attention).__name__} of {host('transformers')}"
        rule = f"not need q_proj, k_proj and v_proj: {kind} lacks them"
        check.that(whole, "plan.score", rule, repr(score))


def scan_costs(block: Any, embedding: int, plan: Plan, places: int) -> ScanCosts:
    """The costs of a tower of scans: its maps, and 9 operations for each state of each direction."""
    mixer = block.mixer

    def maps(part: Any) -> int:
        linear = [m for m in part.modules() if hasattr(m, "in_features") or isinstance(m, nn.Conv1d)]
        return sum(2 * m.weight.numel() for m in linear)

    states = 9 * sum(direction.A_log.numel() for direction in mixer.directions)
    whole = maps(mixer.directions) + states  # of all directions, and of their convolutions
    convolutions = sum(maps(direction.conv1d) for direction in mixer.directions)
    everywhere = 0 if plan.fuse == "drop" else whole if plan.unmerge else convolutions
    return ScanCosts(maps(block) + states - everywhere, embedding, everywhere, places)


def is_averaged(tower: nn.Module) -> bool:
    """Whether any model in memory averages the tower's patches in its classifier."""
    modules = {base.__module__ for base in type(tower).__mro__}
    kinds = {
        kind for kind in _subclasses(nn.Module)
        if any(base.__name__ in _AVERAGING and base.__module__ in modules for base in kind.__mro__)
    }  # fmt: skip
    if not kinds:
        return False
    things = gc.get_objects()  # hundreds of thousands: no Python code runs for each
    models = itertools.compress(things, map(kinds.__contains__, map(type, things)))
    return any(tower is child for model in models for child in vars(model).get("_modules", {}).values())


def _subclasses(kind: type[nn.Module]) -> Iterator[type[nn.Module]]:
    for below in kind.__subclasses__():
        yield below
        yield from _subclasses(below)


def probe_scores(
    head: Any, tokens: Tensor, prefix: int, mass: Tensor | None, visible: Tensor | None
) -> Tensor:
    """The attention of SigLIP's pooling head to these tokens."""
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
    """The width m for which an MLP of two maps, 2 c m weights, is as large as the block's MLP.

    A map is a module with `in_features` and `out_features`: quantised maps have them, but may pack weights.
    """
    maps: list[Any] = [
        m for name, m in block.named_modules()
        if hasattr(m, "in_features") and hasattr(m, "out_features") and family.attention not in name
    ]  # fmt: skip
    if not maps:
        fail("prune", "model", "have linear maps in its blocks", type(block).__name__, error=TypeError)
    return sum(m.in_features * m.out_features for m in maps) // (2 * maps[0].in_features)
