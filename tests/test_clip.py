"""Pruning inside Hugging Face towers, at small sizes."""

import copy

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    ViTConfig,
    ViTModel,
)

from projecta.clip import prune
from projecta.vtp import Plan

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


def test_a_copy_is_pruned_on_its_own():
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
    with pytest.raises(TypeError, match=r"^prune: model must be a CLIPModel, .*; got ViTModel\.$"):
        prune(
            ViTModel(
                ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
            ),
            Plan(),
        )
    with prune(model, Plan()), pytest.raises(ValueError, match=r"^prune: model must not be pruned already"):
        prune(model, Plan())
    prune(model, Plan()).remove()
