"""Pruning inside Hugging Face towers, at small sizes."""

import copy
import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from projecta.vtp import Plan, draw, prune

VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8, "projection_dim": 16,
}  # fmt: skip
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
}
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def make(kind, attention="sdpa"):
    torch.manual_seed(0)
    joint = kind in (CLIPModel, CLIPForImageClassification)
    config = (
        CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)
        if joint
        else CLIPVisionConfig(**VISION)
    )
    model = kind._from_config(config, attn_implementation=attention).eval()
    torch.nn.init.uniform_(
        next(m for m in model.modules() if isinstance(m, CLIPVisionModel)).pre_layrnorm.weight, 0.5, 2
    )
    return model


def embed(model):
    with torch.inference_mode():
        if isinstance(model, CLIPModel):
            return model.get_image_features(PIXELS).pooler_output
        output = model(pixel_values=PIXELS)
        return next(output[name] for name in ("image_embeds", "logits", "pooler_output") if name in output)


KINDS = [CLIPVisionModel, CLIPVisionModelWithProjection, CLIPModel, CLIPForImageClassification]


@pytest.mark.parametrize("kind", KINDS)
def test_keep_1_changes_no_bit_and_remove_restores_every_bit(kind):
    model, other = make(kind), make(kind)
    state, before = copy.deepcopy(model.state_dict()), embed(model)
    with prune(model, Plan(keep=1.0)):
        assert torch.equal(embed(model), before)
    with prune(model, Plan(keep=0.5)) as handle:
        assert not torch.equal(embed(model), before)
        assert torch.equal(embed(other), before)
        assert list(model.state_dict()) == list(state)
    handle.remove()  # again: nothing happens
    assert torch.equal(embed(model), before)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in state.items())


@pytest.mark.parametrize("at", [0, 1, 2])
def test_equals_the_pruned_tower_written_out(at):
    model = make(CLIPVisionModel)
    with torch.inference_mode():
        tokens = model.pre_layrnorm(model.embeddings(PIXELS))
        for i, block in enumerate(model.encoder.layers):
            if i == at:
                order = tokens[:, 1:].norm(dim=-1).topk(8).indices.sort().values + 1
                tokens = torch.stack(
                    [t[torch.tensor([0, *o])] for t, o in zip(tokens, order.tolist(), strict=True)]
                )
            tokens = block(tokens, None)
        truth = model.post_layernorm(tokens[:, 0])
    with prune(model, Plan(keep=0.5, at=at)) as handle:
        torch.testing.assert_close(embed(model), truth)
        assert handle.tokens == (17,) * at + (9,) * (3 - at)
        assert handle.trace[:, 1:].tolist() == order.tolist()


def test_eager_attention_agrees_with_sdpa():
    models = [make(CLIPVisionModel, attention) for attention in ("sdpa", "eager")]
    for model in models:
        prune(model, Plan(keep=0.5))
    torch.testing.assert_close(*map(embed, models))


def test_hidden_states_have_their_lengths():
    model = make(CLIPVisionModel)
    with prune(model, Plan(keep=0.5, at=1)):
        states = model(pixel_values=PIXELS, output_hidden_states=True).hidden_states
    assert len(states) == 4
    assert states[-1].shape[1] == 9


def test_keep_can_be_set():
    model = make(CLIPVisionModel)
    with prune(model, Plan(keep=0.5)) as handle:
        embed(model)
        assert handle.trace.shape[1] == 9
        handle.keep = 0.25
        embed(model)
        assert (handle.trace.shape[1], handle.tokens[0], handle.keep) == (5, 5, 0.25)
        with pytest.raises(ValueError, match=r"^Plan: keep must lie in \(0, 1\]; got 2\.$"):
            handle.keep = 2


def test_flops_ratio_of_vit_b16_is_the_published_one():
    with torch.device("meta"):
        model = CLIPVisionModel(CLIPVisionConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16
        ))  # fmt: skip
    for keep, ratio in ((1.0, 1.0), (0.7, 0.699), (0.5, 0.496)):
        with prune(model, Plan(keep=keep)) as handle:
            assert handle.flops_ratio == pytest.approx(ratio, abs=5e-4)


SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
TOWERS = (CLIPVisionModel, ViTModel, Dinov2Model, SiglipVisionModel)
HEADED = (CLIPForImageClassification, ViTForImageClassification, Dinov2ForImageClassification,
          SiglipForImageClassification)  # fmt: skip


def other(kind, attention="sdpa"):
    """A small model of any of the families."""
    if kind in KINDS:
        return make(kind, attention)
    config = {
        ViTModel: ViTConfig, ViTForImageClassification: ViTConfig, Dinov2Model: Dinov2Config,
        Dinov2ForImageClassification: Dinov2Config, SiglipVisionModel: SiglipVisionConfig,
    }.get(kind)  # fmt: skip
    torch.manual_seed(0)
    config = SiglipConfig(text_config=TEXT, vision_config=SMALL) if config is None else config(**SMALL)
    if kind in (Dinov2Model, Dinov2ForImageClassification):
        config.mlp_ratio = 2
    return kind._from_config(config, attn_implementation=attention).eval()


def skip_what_is_too_old(kind, *plans):
    """Skip if `prune` refuses a plan: DINOv2 of transformers 5.17 takes no mask and has no q_proj."""
    model = other(kind)
    for plan in plans:
        try:
            prune(model, plan).remove()
        except ValueError as error:
            assert kind in (Dinov2Model, Dinov2ForImageClassification)
            pytest.skip(str(error))


def states(model):
    with torch.inference_mode():
        return model(pixel_values=PIXELS).last_hidden_state


@pytest.mark.parametrize("kind", TOWERS)
def test_every_family_is_pruned_and_restored(kind):
    skip_what_is_too_old(kind, Plan(at=1, fuse="mean", mass=True))
    model = other(kind)
    before, prefix = states(model), 0 if kind is SiglipVisionModel else 1
    plans = [
        Plan(keep=0.5, at=1, score=score) for score in ("norm", "distance", "random", "grid", "received")
    ]
    plans += [
        Plan(keep=0.5, at=1, fuse=fuse, mass=True) for fuse in ("mean", "cluster", "squeeze", "bipartite")
    ]
    plans += [Plan(keep=0.25, at=(0, 2), fuse="squeeze", mass=True)]
    plans += [Plan(at=1, score=score) for score in (("cls", "value") if prefix else ("probe",))]
    for plan in plans:
        with prune(model, plan) as handle:
            after = states(model)
            assert after.shape[1] == handle.tokens[-1] == prefix + round(16 * plan.keep)
            assert handle.trace.shape == after.shape[:2]
            assert handle.owner.shape == before.shape[:2]
            assert not torch.isnan(after).any()
            torch.testing.assert_close(  # a row gives the same alone and in a batch
                model(pixel_values=PIXELS[1:]).last_hidden_state, after[1:], rtol=1e-4, atol=1e-5
            )
        with prune(model, dataclasses.replace(plan, keep=1.0)):
            assert torch.equal(states(model), before)
    assert torch.equal(states(model), before)


@pytest.mark.parametrize("score", ["cls", "received"])
@pytest.mark.parametrize("kind", TOWERS[:3])
def test_scores_are_the_attention_of_the_block(kind, score):
    """The score is the attention that the block computes with all tokens."""
    skip_what_is_too_old(kind, Plan(at=1, score=score))
    model = other(kind, "eager")
    with torch.inference_mode():
        maps = model(pixel_values=PIXELS, output_attentions=True).attentions[1].mean(1)
    truth = maps[:, 0, 1:] if score == "cls" else maps.mean(1)[:, 1:]
    with prune(model, Plan(keep=0.25, at=1, score=score)) as handle:
        states(model)
        assert handle.trace[:, 1:].tolist() == (truth.topk(4).indices.sort().values + 1).tolist()


def test_the_probe_is_the_pooling_heads_attention():
    """The last block is an identity, so the score before it is the attention of the head after it."""
    model, seen = other(SiglipVisionModel), []
    torch.nn.init.uniform_(model.post_layernorm.weight, 0.2, 2)
    for name in ("self_attn.out_proj", "mlp.fc2"):
        layer = model.encoder.layers[2].get_submodule(name)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    removal = model.head.attention.register_forward_pre_hook(lambda m, args: seen.append(args))
    states(model)
    removal.remove()
    with torch.inference_mode():
        _, truth = model.head.attention(*seen[0])
    with prune(model, Plan(keep=0.25, at=2, score="probe")) as handle:
        states(model)
        assert handle.trace.tolist() == truth[:, 0].topk(4).indices.sort().values.tolist()


@pytest.mark.parametrize("kind", TOWERS)
def test_mass_replaces_copies(kind):
    """Doubled tokens that are merged with mass give the same result: attention counts each of them twice."""
    skip_what_is_too_old(kind, Plan(fuse="mean", mass=True))
    model = other(kind)
    blocks = model.layers if kind is ViTModel else next(iter(model.encoder.children()))
    prefix, x = 0 if kind is SiglipVisionModel else 1, torch.randn(1, 9, 32)
    twice = torch.cat([x[:, :prefix], x[:, prefix:].repeat_interleave(2, 1)], 1)
    plan = Plan(
        keep=0.5,
        at=0,
        fuse="squeeze",
        mass=True,
        score=lambda t: torch.arange(t.shape[1]) % 2 + 0.0 * t[..., 0],
    )
    with torch.inference_mode():
        truth = twice
        for block in blocks:
            truth = block(truth, None)
        with prune(model, plan) as handle:
            got = twice
            for block in blocks:
                got = block(got, None)
    assert handle.mass.tolist() == [[1.0] * prefix + [2.0] * (9 - prefix)]
    torch.testing.assert_close(
        got, torch.cat([truth[:, :prefix], truth[:, prefix::2]], 1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", [*HEADED, SiglipVisionModel])
def test_heads_count_tokens_by_their_mass(kind):
    """Nine copies of a patch give the same output of the head before and after they are merged."""
    skip_what_is_too_old(kind, Plan(fuse="mean", mass=True))
    model = other(kind)
    tower = next(m for m in model.modules() if isinstance(m, TOWERS))
    prefix = 0 if isinstance(tower, SiglipVisionModel) else 1

    def copies(module, args, out):
        return torch.cat(
            [
                out[:, : prefix + 1].repeat_interleave(torch.tensor([1] * prefix + [9]), 1),
                out[:, prefix + 9 :],
            ],
            1,
        )

    def score(patches):  # all copies but the first are merged
        return torch.tensor([9.0] + [0.0] * 8 + [9.0] * 7).expand(patches.shape[:2])

    def answer():
        with torch.inference_mode():
            output = model(pixel_values=PIXELS)
            return output.logits if "logits" in output else output.pooler_output

    removal = tower.embeddings.register_forward_hook(copies)
    before = answer()
    with prune(model, Plan(keep=0.5, at=1, score=score, fuse="squeeze", mass=True)) as handle:
        after = answer()
        assert sorted(set(handle.mass[0].tolist())) == [1.0, 9.0]
    removal.remove()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_a_subclass_is_its_family():
    class Mine(CLIPForImageClassification):
        pass

    model, found = make(CLIPForImageClassification), []
    for kind in (CLIPForImageClassification, Mine):
        model.__class__ = kind
        with prune(model, Plan(keep=0.5, fuse="mean")):
            found.append(embed(model))
    assert torch.equal(*found)


def test_images_that_are_no_square_and_outputs_that_are_tuples():
    model = ViTModel(ViTConfig(**SMALL | {"image_size": (32, 64)})).eval()
    with prune(model, Plan(keep=0.5)) as handle, torch.inference_mode():
        assert (
            model(pixel_values=torch.randn(1, 3, 32, 64)).last_hidden_state.shape[1] == 17 == handle.tokens[0]
        )
    model = make(CLIPForImageClassification)
    with prune(model, Plan(keep=0.5, fuse="mean")):
        expected = embed(model)
        tower = next(m for m in model.modules() if isinstance(m, CLIPVisionModel))
        one, two = (tower(PIXELS, return_dict=kind)[0] for kind in (True, False))
    torch.testing.assert_close(one, two)
    assert expected.shape == (2, 2)


def test_flops_follow_the_maps_of_the_mlp():
    for config in (
        Dinov2Config(**SMALL | {"use_swiglu_ffn": True}), ViTConfig(**SMALL | {"intermediate_size": 16})
    ):  # fmt: skip
        model = (Dinov2Model if isinstance(config, Dinov2Config) else ViTModel)(config)
        block = model.encoder.layer[0] if isinstance(config, Dinov2Config) else model.layers[0]
        maps = sum(m.weight.numel() for m in block.modules() if isinstance(m, torch.nn.Linear))
        with prune(model, Plan()) as handle:
            assert handle._costs.of((1,)) - handle._costs.fixed == 2 * maps + 4 * 32


@pytest.mark.parametrize("fuse", ["drop", "squeeze", "bipartite"])
def test_stages_refer_to_the_tokens_of_the_embedding(fuse):
    """After three stages, a kept token owns itself, and its mass is the number of tokens that it owns."""
    model = make(CLIPVisionModel)
    with prune(model, Plan(keep=0.25, at=(0, 1, 2), fuse=fuse)) as handle:
        embed(model)
        for kept, owner, mass in zip(handle.trace, handle.owner, handle.mass, strict=True):
            assert (kept.diff() > 0).all()
            assert owner[kept].tolist() == list(range(5))
            assert torch.bincount(owner[owner >= 0]).tolist() == mass.tolist()
            assert (owner.min() < 0) == (fuse == "drop")


def test_blocks_may_be_checkpointed_with_their_hooks():
    found = []
    for checkpointed in (False, True):
        model = make(CLIPVisionModel)
        x = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with prune(model, Plan(keep=0.25, at=(0, 2), score="cls", fuse="squeeze", mass=True)):
            y = x
            for block in model.encoder.layers:
                y = checkpoint(block, y, None, use_reentrant=False) if checkpointed else block(y, None)
            y.square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


EARLY = Plan.preset("early", at=1)


def test_with_mass_eager_attention_agrees_with_sdpa():
    models = [make(CLIPVisionModel, attention) for attention in ("sdpa", "eager")]
    for model in models:
        prune(model, EARLY)
    torch.testing.assert_close(*map(embed, models), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = make(CLIPVisionModel)
    with prune(model, EARLY):
        truth = embed(model)
    with prune(model.to(dtype), EARLY), torch.inference_mode():
        half = model(pixel_values=PIXELS.to(dtype)).pooler_output
    assert half.dtype == dtype
    assert torch.nn.functional.cosine_similarity(half.float(), truth).min() > 0.99


@pytest.mark.parametrize("score", ["grid", "random", "distance"])
def test_scores_compile_and_export_before_any_eager_run(score):
    model = make(CLIPVisionModel)
    prune(model, Plan(keep=0.5, score=score))
    exported = torch.export.export(model, (), {"pixel_values": PIXELS})
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(
            pixel_values=PIXELS
        ).pooler_output
    expected = embed(model)
    torch.testing.assert_close(exported.module()(pixel_values=PIXELS).pooler_output, expected)
    torch.testing.assert_close(compiled, expected)


def test_early_compiles_and_exports():
    model = make(CLIPVisionModel)
    prune(model, EARLY)
    expected = embed(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixel_values=PIXELS).pooler_output, expected)
    exported = torch.export.export(model, (), {"pixel_values": PIXELS})
    torch.testing.assert_close(exported.module()(pixel_values=PIXELS).pooler_output, expected)


def test_gradient_checkpointing_gives_the_same_gradients():
    found = []
    for enabled in (False, True):
        model = make(CLIPVisionModel).train()
        if enabled:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable()
        with prune(model, Plan(keep=0.25, at=(0, 2), score="cls", fuse="squeeze", mass=True)):
            model(pixel_values=PIXELS).pooler_output.square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


def test_an_image_of_another_size_keeps_the_same_part():
    model = other(Dinov2Model)
    with prune(model, Plan(keep=0.5, at=1)), torch.inference_mode():
        assert model(pixel_values=torch.randn(1, 3, 48, 48)).last_hidden_state.shape[1] == 1 + 18


def test_the_picture_shows_the_pruned_patches():
    model = make(CLIPVisionModel)
    with prune(model, EARLY) as handle:
        embed(model)
        axes = draw(PIXELS[0].sigmoid(), handle, row=1).axes[0]
    dark = {(patch.get_x() // 8, patch.get_y() // 8) for patch in axes.patches}
    kept = {((k - 1) % 4, (k - 1) // 4) for k in handle.trace[1, 1:].tolist()}
    assert dark == {(x, y) for x in range(4) for y in range(4)} - kept
    assert len(axes.lines) == 8  # one line for each merged token


def test_a_handle_prints_tokens_and_flops():
    model = make(CLIPVisionModel)
    with prune(model, Plan(keep=0.5, at=1)) as handle:
        assert str(handle).splitlines()[1] == "tokens per block: 17 x 1, 9 x 2"
        assert f"{handle.flops_ratio:.3f} of the FLOPs" in str(handle)


def test_gradients_flow():
    model = make(CLIPVisionModel)
    with prune(model, Plan(keep=0.5)):
        model(pixel_values=PIXELS).pooler_output[:, 0].sum().backward()
    assert model.embeddings.patch_embedding.weight.grad.abs().sum() > 0


def test_compiles_without_a_graph_break():
    model = make(CLIPVisionModel)
    prune(model, Plan(keep=0.5))
    expected = embed(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixel_values=PIXELS).pooler_output, expected)


def test_a_copy_is_pruned_independently():
    model = make(CLIPVisionModel)
    handle = prune(model, Plan(keep=0.5))
    twin = copy.deepcopy(model)
    pruned = embed(model)
    handle.remove()
    assert torch.equal(embed(twin), pruned)
    assert not torch.equal(embed(model), pruned)


def test_the_text_tower_is_untouched():
    model = make(CLIPModel)
    ids = torch.tensor([[1, 2, 49]])
    before = model.get_text_features(ids).pooler_output
    with prune(model, Plan(keep=0.5)):
        assert torch.equal(model.get_text_features(ids).pooler_output, before)


def test_misuse_is_named_in_one_line():
    model = make(CLIPVisionModel)
    with pytest.raises(TypeError, match=r"^prune: plan must be a projecta\.vtp\.Plan; got float\.$"):
        prune(model, 0.5)
    with pytest.raises(ValueError, match=r"^prune: plan\.at must be below the number of blocks, 3; got 3\.$"):
        prune(model, Plan(at=3))
    refused = ConvNextModel(ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4))
    with pytest.raises(
        TypeError, match=r"^prune: model must be or hold one of CLIPVisionModel, .*; got ConvNextModel"
    ):
        prune(refused, Plan())
    for score, kind, rule in (
        ("cls", SiglipVisionModel, "a class token: this tower has none; got 'cls'"),
        ("probe", ViTModel, "a pooling head: this tower has none; got 'probe'"),
    ):
        with pytest.raises(ValueError, match=rf"^prune: plan\.score must not need {rule}"):
            prune(other(kind), Plan(score=score))
    flash = make(CLIPVisionModel)
    flash.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ValueError, match=r"must be False with attention 'flash_attention_2', which takes no mask"
    ):
        prune(flash, Plan.preset("early", at=1))
    with pytest.raises(ValueError, match=r"^draw: handle must be of a model that has run"):
        draw(PIXELS[0], prune(make(CLIPVisionModel), Plan()))
    with prune(model, Plan()), pytest.raises(ValueError, match=r"^prune: model must not be pruned already"):
        prune(model, Plan())
    prune(model, Plan()).remove()
