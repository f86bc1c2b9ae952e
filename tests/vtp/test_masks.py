"""An attention mask on a pruned tower: masked tokens stay hidden, whichever tokens are pruned or merged."""

import itertools

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from projecta.vtp import FUSIONS, Plan, prune
from tests.vtp.test_towers import skip_what_is_too_old

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
SHOWN = 9  # of 17 tokens: the class token and the upper half of the image
MASK = (torch.arange(17) < SHOWN).long().expand(2, -1)
FUSED = [(fuse, mass) for fuse in FUSIONS for mass in (False, True) if not (mass and fuse == "drop")]
SCORES = ("norm", "distance", "random", "grid", "cls", "value", "received", lambda patches: patches[..., 0])


def make(kind, attention="sdpa"):
    torch.manual_seed(0)
    config = (ViTConfig if kind is ViTModel else Dinov2Config)(**SIZES)
    model = kind._from_config(config, attn_implementation=attention).eval()
    for name, parameter in model.named_parameters():
        if "proj" in name or "fc" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def run(model, mask=None, pixels=PIXELS):
    with torch.no_grad():
        return model(pixel_values=pixels, attention_mask=mask).last_hidden_state


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", [ViTModel, Dinov2Model])
def test_pruning_masked_tokens_does_not_change_the_others(kind, attention):
    """The masked half of the tokens is pruned, so the results of the other half do not change."""
    skip_what_is_too_old(kind, Plan(fuse="mean", mass=True))
    model = make(kind, attention)
    truth = run(model, MASK)[:, :SHOWN]
    plans = [
        Plan(keep=0.5, at=at, fuse=fuse, mass=mass) for (fuse, mass), at in itertools.product(FUSED, (0, 2))
    ]
    plans += [Plan(keep=0.5, at=1, score=score) for score in SCORES]
    plans += [Plan(keep=0.5, at=(0, 1, 3), fuse=fuse, mass=mass) for fuse, mass in FUSED]
    for plan in plans:
        with prune(model, plan) as handle:
            got = run(model, MASK)
            assert handle.trace.tolist() == [list(range(SHOWN))] * 2
            torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-5)
            assert handle.mass[:, 1:].sum() == 2 * 8, "no masked patch has a mass"


@pytest.mark.parametrize("keep", [0.25, 0.75])
@pytest.mark.parametrize(("fuse", "mass"), FUSED)
def test_masked_pixels_do_not_affect_visible_tokens(fuse, mass, keep):
    """Masked pixels change, and no bit of the visible tokens changes."""
    model, other = make(ViTModel), PIXELS.clone()
    other[:, :, 16:] = 5 * torch.randn(2, 3, 16, 32)
    for at, score in (((0,), "norm"), ((0, 2), "distance"), ((1, 3), "cls"), ((1,), "received")):
        with prune(model, Plan(keep=keep, at=at, fuse=fuse, mass=mass, score=score)) as handle:
            one, two = (run(model, MASK, pixels) for pixels in (PIXELS, other))
            shown = handle.mass > 0
            assert torch.equal(one[shown], two[shown])
            assert shown[:, 0].all()


def test_a_mask_of_each_query_is_gathered_by_rows_and_columns():
    model, plan = make(ViTModel, "eager"), Plan(keep=0.5, at=1)
    seen = torch.rand(2, 1, 17, 17, generator=torch.Generator().manual_seed(0)) > 0.4
    added = torch.zeros(2, 1, 17, 17).masked_fill(~(seen | torch.eye(17, dtype=torch.bool)), -1e9)
    with torch.no_grad(), prune(model, plan) as handle:
        got = model(pixel_values=PIXELS, attention_mask=added).last_hidden_state
        kept = handle.trace
    with torch.no_grad():
        x = model.embeddings(PIXELS)
        for i, block in enumerate(model.layers):
            if i == 1:
                x = torch.stack([row[at] for row, at in zip(x, kept, strict=True)])
                added = torch.stack([m[:, at][..., at] for m, at in zip(added, kept, strict=True)])
            x = block(x, added)
        torch.testing.assert_close(got, model.layernorm(x), rtol=1e-4, atol=1e-5)


def test_masks_of_another_form_are_refused():
    model = make(ViTModel)
    with prune(model, Plan(keep=0.5)):
        for mask in (torch.ones(2, 17), torch.ones(2, 1, 17, 9), object()):
            with pytest.raises(
                ValueError, match=r"^prune: attention_mask must be a \(b, 1, t, t\) tensor, t = 17, for"
            ):
                model.layers[0](torch.zeros(2, 17, 32), mask)
    with prune(model, Plan(keep=0.5, fuse="mean", mass=True)):
        run(model)
        model.config._attn_implementation = "flex_attention"
        with pytest.raises(
            ValueError, match=r"^prune: plan\.mass must be False with attention 'flex_attention'"
        ):
            model.layers[0](torch.zeros(2, 17, 32), None)


def test_keep_1_leaves_a_mask_as_it_is():
    model = make(ViTModel)
    truth, seen = run(model, MASK), []
    for fuse, mass in FUSED:
        with prune(model, Plan(keep=1.0, at=(0, 2), fuse=fuse, mass=mass)):
            assert torch.equal(run(model, MASK), truth)
            block = (
                torch.ones(2, 1, 17, 17, dtype=torch.bool),
                object(),
            )  # the mask of another attention is passed on
            model.layers[0].register_forward_pre_hook(
                lambda _, args, kwargs: seen.append(args[1]), with_kwargs=True
            )
            with pytest.raises((TypeError, RuntimeError, AttributeError)):
                model.layers[0](torch.zeros(2, 17, 32), block)
            assert seen[-1] is block


@pytest.mark.parametrize(
    ("kind", "plan"),
    [(ViTModel, Plan.preset("merge", at=(0, 2))), (Dinov2Model, Plan(keep=0.5, at=1))],
    ids=["merge", "drop"],
)
def test_towers_with_masks_compile_and_export(kind, plan):
    """During tracing, transformers passes a mask for all tokens of the image."""
    skip_what_is_too_old(kind, Plan(fuse="mean", mass=True))
    model = make(kind)
    with prune(model, plan):
        for mask in (None, MASK):
            given = {"pixel_values": PIXELS} | ({} if mask is None else {"attention_mask": mask})
            expected = run(model, mask)
            with torch.no_grad():
                exported = torch.export.export(model, (), given, strict=False).module()
                compiled = torch.compile(model, backend="eager")
                for traced in (exported, compiled):
                    got = traced(**given).last_hidden_state
                    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
