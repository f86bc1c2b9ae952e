"""Attaches a `vtp.Plan` to the vision tower of one Hugging Face CLIP model, and takes it off again; knows no
scoring.

The plan runs in a forward pre-hook of the block `plan.at`, on that model instance only: no class is changed,
no weight is renamed, and a second model in the process never notices.
"""

import dataclasses
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from projecta._checks import Checker
from projecta.vtp import Plan

PREFIX = 1  # CLIP's class token


def prune(model: nn.Module, plan: Plan) -> "Pruning":
    """Prune the tokens of a CLIP vision tower by `plan` from now on, until the handle's `remove()`.

    Args:
        model: CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection or CLIPForImageClassification of
            transformers 5.
        plan: what to prune, and before which block.

    Returns:
        A handle, also a context manager that removes the pruning at its end.

    Raises:
        TypeError: the model has no CLIP vision tower. ValueError: it is pruned already, or has no block
            `plan.at`.

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
    tower = _vision_tower(check, model)
    layers = tower.encoder.layers
    check.that(plan.at < len(layers), "plan.at", f"be below the number of blocks, {len(layers)}", plan.at)
    pruned = any(isinstance(hook, Pruning) for layer in layers for hook in layer._forward_pre_hooks.values())
    check.that(
        not pruned, "model", "not be pruned already", "a pruned model", "Call remove() of its handle first."
    )
    return Pruning(tower, plan)


class Pruning:
    """What `prune` returns.

    Attributes:
        plan: the plan in force. keep: its keep ratio; set it to plan anew.
        tokens: tokens that each block sees. flops_ratio: arithmetic of the pruned tower over that of the full
            one.
        trace: indices (b, t') of the tokens kept by the last forward pass, or None.
    """

    def __init__(self, tower: Any, plan: Plan):
        self.plan = plan
        self.trace: Tensor | None = None
        self._config: Any = tower.config
        self._removal = tower.encoder.layers[plan.at].register_forward_pre_hook(self, with_kwargs=True)

    @property
    def keep(self) -> float:
        return self.plan.keep

    @keep.setter
    def keep(self, keep: float) -> None:
        self.plan = dataclasses.replace(self.plan, keep=keep)

    @property
    def tokens(self) -> tuple[int, ...]:
        full = (self._config.image_size // self._config.patch_size) ** 2 + PREFIX
        kept, blocks = self.plan.tokens_kept(full, PREFIX), self._config.num_hidden_layers
        return (full,) * self.plan.at + (kept,) * (blocks - self.plan.at)

    @property
    def flops_ratio(self) -> float:
        c, m = self._config.hidden_size, self._config.intermediate_size
        patches = (self._config.image_size // self._config.patch_size) ** 2
        embedding = 2 * patches * self._config.num_channels * self._config.patch_size**2 * c

        def block(t: int) -> int:  # projections, attention, MLP
            return 2 * t * (4 * c * c + 2 * t * c + 2 * c * m)

        full = embedding + len(self.tokens) * block(patches + PREFIX)
        return (embedding + sum(map(block, self.tokens))) / full

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The pre-hook of the block."""
        named = "hidden_states" in kwargs
        tokens = kwargs["hidden_states"] if named else args[0]
        tokens, self.trace = self.plan.apply(tokens, PREFIX)
        return (args, kwargs | {"hidden_states": tokens}) if named else ((tokens, *args[1:]), kwargs)

    def remove(self) -> None:
        """Take the pruning off; the model is as it was. A second call does nothing."""
        self._removal.remove()

    def __enter__(self) -> "Pruning":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()


def _vision_tower(check: Checker, model: nn.Module) -> Any:
    from transformers.models.clip.modeling_clip import CLIPVisionModel

    for candidate in (model, getattr(model, "vision_model", None)):
        if isinstance(candidate, CLIPVisionModel):
            return candidate
    supported = "CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection or CLIPForImageClassification"
    check.that(False, "model", f"be a {supported}", type(model).__name__, error=TypeError)
    return None  # not reached
