"""Pruned towers share no state between threads, copies, replicas and compiled code. Refused models."""

import copy
import io
import re
import threading
import warnings

import pytest
import torch
from transformers import (
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionModel,
    Dinov2ForImageClassification,
    Dinov2Model,
    SiglipForImageClassification,
    SiglipVisionModel,
    ViTConfig,
    ViTForMaskedImageModeling,
    ViTModel,
)

from projecta.vtp import Plan, draw, prune
from tests.vtp.test_towers import PIXELS, SMALL, TOWERS, embed, make, other, skip_what_is_too_old, states

MASSES = Plan(keep=0.5, at=(0, 1), score="random", fuse="squeeze", mass=True)


@pytest.mark.parametrize("kind", [CLIPVisionModel, SiglipVisionModel])
def test_threads_that_share_a_pruned_tower_do_not_mix_their_calls(kind):
    """4 threads make 100 calls each, on different images. The blocks of a call read only its state."""
    model = other(kind)
    images, wrong = torch.randn(4, 1, 3, 32, 32), []

    def call(i):
        with torch.no_grad():
            return model(pixel_values=images[i])[:2]

    def work(i, truth):
        for _ in range(100):
            if not all(torch.allclose(one, two, atol=1e-5) for one, two in zip(call(i), truth, strict=True)):
                wrong.append(i)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with prune(model, Plan(keep=0.5, at=(0, 1, 2), fuse="squeeze", mass=True)) as handle:
            truths = [call(i) for i in range(4)]
            threads = [threading.Thread(target=work, args=(i, truths[i])) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert wrong == []
            assert handle.mass.sum() == handle.owner.numel()  # of one complete call, the last one
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", TOWERS)
def test_a_copy_has_a_working_handle(kind):
    skip_what_is_too_old(kind, MASSES)
    model = other(kind)
    stock, handle = states(model), prune(model, MASSES)
    pruned, saved = states(model), io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for twin in (copy.deepcopy(model), torch.load(saved, weights_only=False)):
        assert torch.equal(states(twin), pruned), "a copy is pruned as it was"
        with prune(twin, Plan(keep=0.25)) as own:
            assert states(twin).shape[1] == own.tokens[-1] < pruned.shape[1]
        assert torch.equal(states(twin), stock)
        assert all(not m._forward_pre_hooks and not m._forward_hooks for m in twin.modules())
        assert torch.equal(states(model), pruned), "the original has its handle, and its plan"
    with pytest.raises(
        ValueError, match=r"^prune: model must not be pruned already; got a pruned model\. Call remove"
    ):
        prune(model, MASSES)
    handle.remove()
    assert torch.equal(states(model), stock)


@pytest.mark.parametrize("score", ["probe", "received"])
def test_a_replica_is_scored_by_its_own_weights(score):
    """Replicas of nn.DataParallel share their hooks, but their weights are on another device."""
    model = other(SiglipVisionModel)
    with prune(model, Plan(keep=0.25, at=1, score=score, fuse="squeeze", mass=True)):
        expected = states(model)
        replica = model._replicate_for_data_parallel()
        whole = copy.deepcopy(model)
        for name, part in whole.named_children():
            replica._modules[name] = part
        with torch.no_grad():
            for parameter in whole.parameters():
                parameter.neg_()
            negative, truth = (m(pixel_values=PIXELS).last_hidden_state for m in (replica, whole))
        torch.testing.assert_close(negative, truth)
        assert torch.equal(states(model), expected)


@pytest.mark.parametrize("way", ["module", "function", "in place"])
def test_compiled_code_follows_the_pruning(way):
    """The tower is compiled first. torch.compile does not check hooks, and would run unpruned code."""
    torch._dynamo.reset()
    tower = make(CLIPVisionModel)
    run = tower
    if way == "in place":
        tower.compile(backend="eager", fullgraph=True)
    else:
        run = torch.compile(tower if way == "module" else lambda x: tower(x), backend="eager", fullgraph=True)

    def count():
        with torch.no_grad():
            return run(PIXELS).last_hidden_state.shape[1]

    assert count() == 17
    with prune(run if way == "module" else tower, Plan(keep=0.5)) as handle:
        assert count() == 9
        handle.keep = 0.25
        assert count() == 5
    assert count() == 17
    with prune(tower, MASSES):
        assert count() == 9
    assert count() == 17
    assert all("gradient_checkpointing" not in vars(block) for block in tower.encoder.layers)
    torch._dynamo.reset()


@pytest.mark.parametrize("through", ["classifier", "tower"])
@pytest.mark.parametrize(
    "kind", [CLIPForImageClassification, Dinov2ForImageClassification, SiglipForImageClassification]
)
def test_a_classifier_averages_tokens_by_mass(kind, through):
    model = other(kind)
    tower = next(m for m in model.modules() if isinstance(m, TOWERS))
    plan, prefix = Plan(keep=0.5, at=1, fuse="squeeze"), 0 if isinstance(tower, SiglipVisionModel) else 1
    seen = []
    with prune(model if through == "classifier" else tower, plan) as handle, torch.no_grad():
        hook = tower.register_forward_hook(lambda module, args, output: seen.append(output[0]))
        logits = model(pixel_values=PIXELS).logits
        hook.remove()
        mass = handle.mass[:, prefix:, None]
    with prune(tower, plan), torch.no_grad():
        pass
    assert logits.shape == (2, 2)
    alone = copy.deepcopy(tower)
    with prune(alone, plan), torch.no_grad():
        tokens = alone(pixel_values=PIXELS)[0][:, prefix:]
    torch.testing.assert_close(seen[0][:, prefix:].mean(1), (tokens * mass).sum(1) / mass.sum(1))


def test_heads_that_need_every_patch_are_refused():
    model = ViTForMaskedImageModeling(ViTConfig(**SMALL, encoder_stride=8))

    class Mine(ViTForMaskedImageModeling):
        pass

    for kind in (ViTForMaskedImageModeling, Mine):
        model.__class__ = kind
        message = f"prune: model must be one of ViTModel, ViTForImageClassification: the head of others needs every patch; got {kind.__name__}."
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            prune(model, Plan())
    with prune(model.vit, Plan(keep=0.5)):
        assert states(model.vit).shape[1] == 9


@pytest.mark.parametrize("kind", [*TOWERS, CLIPModel])
def test_towers_whose_maps_are_quantised(kind):
    skip_what_is_too_old(kind, Plan(at=1, score="received"))
    model = other(kind)
    towers = [m for m in model.modules() if isinstance(m, TOWERS)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        small = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
        with prune(towers[0], Plan(keep=0.5)) as handle:
            full = handle.flops_ratio
        for plan in (Plan(keep=0.5), Plan(keep=0.5, at=1, score="received", fuse="squeeze", mass=True)):
            with prune(small, plan) as handle:
                embed(small) if kind is CLIPModel else states(small)
                assert handle.trace.shape[1] == handle.tokens[-1]
                assert plan.at or handle.flops_ratio == full
        if kind is SiglipVisionModel:
            weight = small.head.attention.in_proj_weight
            del small.head.attention.in_proj_weight
            with pytest.raises(
                ValueError, match=r"plan\.score must not need the pooling head: its weights are quantised"
            ):
                prune(small, Plan(at=1, score="probe"))
            small.head.attention.in_proj_weight = weight


def test_a_grid_that_is_no_square_is_pruned_evenly_and_shown():
    model = ViTModel(ViTConfig(**SMALL | {"image_size": (32, 64)})).eval()
    for keep, at in ((0.5, 0), (0.25, (0, 1))):
        with prune(model, Plan(keep=keep, at=at, score="grid", fuse="squeeze")) as handle:
            with torch.no_grad():
                model(pixel_values=torch.randn(1, 3, 32, 64))
            assert handle.grid == (4, 8)
            kept = torch.zeros(32).index_fill(0, handle.trace[0, 1:] - 1, 1).view(4, 8)
            blocks = kept.unflatten(0, (2, 2)).unflatten(2, (4, 2)).sum((1, 3))
            assert blocks.eq(4 * keep).all(), "each square of 2 x 2 patches keeps as many"
            axes = draw(torch.rand(3, 32, 64), handle).axes[0]
            dark = {(int(p.get_x() // 8), int(p.get_y() // 8)) for p in axes.patches}
            assert dark == {(x, y) for y in range(4) for x in range(8) if not kept[y, x]}
    with pytest.raises(
        ValueError,
        match=r"^Plan\.apply: grid must be given for score 'grid' of patches that are no square; got None for 32 patches",
    ):
        Plan(score="grid").apply(torch.zeros(1, 33, 2))


def test_an_image_of_another_shape_is_shown_on_its_own_grid():
    model = other(Dinov2Model)
    with prune(model, Plan(keep=0.5, score="grid")) as handle, torch.no_grad():
        model(pixel_values=torch.randn(1, 3, 16, 48))
        assert handle.grid == (2, 6)
        assert len(draw(torch.rand(3, 16, 48), handle).axes[0].patches) == 6


def test_arguments_of_blocks_that_are_not_known_are_refused():
    model = other(ViTModel)
    with prune(model, Plan(keep=0.5)), torch.no_grad():
        model.layers[0](torch.zeros(1, 17, 32), None, rope=None)
        with pytest.raises(
            TypeError,
            match=r"^prune: rope must be None: projecta does not know this argument of transformers \d",
        ):
            model.layers[0](torch.zeros(1, 17, 32), None, rope=torch.zeros(17, 2))


def test_a_call_of_a_later_block_alone_is_refused():
    model = other(ViTModel)
    with prune(model, MASSES):
        states(model)
        with pytest.raises(
            ValueError,
            match=r"^prune: block 1 must run after block 0 of the same pass; got a separate call",
        ):
            model.layers[1](torch.zeros(1, 17, 32), None)
