"""Vision Mamba against a plain PyTorch tower in float64, and as a model of transformers."""

import copy
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("transformers")

from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    VisionTextDualEncoderModel,
)

from projecta import MambaBlock
from projecta.mrss import BANDS
from projecta.vision_mamba import (
    Order,
    VisionMambaConfig,
    VisionMambaForImageClassification,
    VisionMambaModel,
    convert_vim,
)
from projecta.vtp import Plan, draw, prune

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "image_size": 32, "patch_size": 8}


def build(kind=VisionMambaModel, **changes):
    torch.manual_seed(0)
    return kind(VisionMambaConfig(**{**SMALL, **changes})).eval()


def image(b=2, rows=32, columns=32, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(b, 3, rows, columns, dtype=dtype)


def plain_convolution(x, direction):
    assert direction.conv1d.kernel_size[0] == 4
    return F.silu(direction.conv1d(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)


def plain_scan(u, z, direction, gap):
    """One direction over u (b, t, d), step by step; gap (b, t): how often a state forgets."""
    x, n = u, direction.A_log.shape[1]
    dt, B, C = direction.x_proj(u).split([direction.dt_proj.in_features, n, n], -1)
    step, A = F.softplus(direction.dt_proj(dt)), -torch.exp(direction.A_log)
    h, ys = x.new_zeros(len(x), x.shape[2], n), []
    for t in range(x.shape[1]):
        s = step[:, t, :, None]
        h = torch.exp(gap[:, t, None, None] * s * A) * h + s * B[:, t, None] * u[:, t, :, None]
        ys.append((h * C[:, t, None]).sum(-1) + direction.D * u[:, t])
    return torch.stack(ys, 1) * F.silu(z)


def plain_tower(model, pixels, kept=None):
    """The whole tower in plain PyTorch; `kept`: indices (t',) of the tokens that remain after the embedding."""
    embeddings = model.embeddings
    found = embeddings.projection(pixels)
    grid = tuple(found.shape[2:])
    tokens = found.flatten(2).transpose(1, 2)
    at = embeddings.class_at(grid)
    tokens = torch.cat([tokens[:, :at], embeddings.cls_token.expand(len(tokens), -1, -1), tokens[:, at:]], 1)
    tokens = tokens + embeddings.position_embeddings
    count = tokens.shape[1]
    kept = torch.arange(count) if kept is None else kept
    tokens = tokens[:, kept]

    def by_column(place):
        if place == at:
            return place
        patch = place - (place > at)
        moved = patch % grid[1] * grid[0] + patch // grid[1]
        return moved + (moved >= at)

    columns = sorted(range(len(kept)), key=lambda i: by_column(int(kept[i])))
    for layer in model.layers:
        x, z = layer.mixer.in_proj(layer.norm(tokens)).chunk(2, -1)
        total = 0
        for direction, (axis, way) in zip(layer.mixer.directions, layer.mixer.ways, strict=True):
            order = list(range(len(kept))) if axis == "rows" else columns
            places = [int(kept[i]) if axis == "rows" else by_column(int(kept[i])) for i in order]
            if way < 0:
                order, places = order[::-1], [count - 1 - p for p in places[::-1]]
            gap = [p - q for p, q in zip(places, [-1, *places[:-1]], strict=True)]
            gaps = torch.tensor(gap, dtype=x.dtype).expand(len(x), -1)
            u = plain_convolution(x[:, order], direction)
            y = plain_scan(u, z[:, order], direction, gaps)
            total = total + y[:, torch.tensor(order).argsort()]
        tokens = tokens + layer.mixer.out_proj(total / len(layer.mixer.ways))
    return model.norm(tokens)


def gradients(model, output):
    torch.manual_seed(2)
    loss = (output * torch.randn(output.shape, dtype=torch.float64).to(output)).sum()
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def error(got, wanted):
    got, wanted = got.detach().double(), wanted.detach()
    return float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


@pytest.mark.parametrize("directions", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_the_plain_tower(directions, dtype):
    model = build(directions=directions, class_token="middle").to(dtype)
    wide = copy.deepcopy(model).double()
    output = model(image(dtype=dtype)).last_hidden_state
    wanted = plain_tower(wide, image(dtype=dtype).double())
    limit = 1e-12 if dtype == torch.float64 else 2e-5
    assert error(output, wanted) < limit
    for (name, _), got, truth in zip(
        model.named_parameters(), gradients(model, output), gradients(wide, wanted), strict=True
    ):
        assert error(got, truth) < 10 * limit, name


def plain_merged_tower(model, pixels, owner, places, scans_all):
    """The tower of one image, whose tokens are merged after the embedding: into `owner` (all,), at `places`."""
    tokens, order = model.embeddings(pixels)
    everyone, columns = torch.arange(tokens.shape[1]), order.column_places(tokens.device).argsort()
    held = F.one_hot(owner, len(places)).to(tokens.dtype)
    tokens = (held / held.sum(0)).T @ tokens[0]
    for layer in model.layers:
        x, z = layer.mixer.in_proj(layer.norm(tokens)).chunk(2, -1)
        total = 0
        for direction, (axis, way) in zip(layer.mixer.directions, layer.mixer.ways, strict=True):
            walk = everyone if axis == "rows" else columns
            walk = walk.flip(0) if way < 0 else walk
            u = plain_convolution(x[owner[walk]][None], direction)
            if not scans_all:
                seen = torch.isin(walk, places)
                walk, u = walk[seen], u[:, seen]
            y = plain_scan(u, z[owner[walk]][None], direction, torch.ones(1, len(walk)))[0]
            total = total + y[[walk.tolist().index(p) for p in places.tolist()]]
        tokens = tokens + layer.mixer.out_proj(total / len(layer.mixer.ways))
    return model.norm(tokens)


@pytest.mark.parametrize("unmerge", [False, True])
@pytest.mark.parametrize("directions", [1, 2, 4])
@pytest.mark.parametrize("class_token", ["middle", "first"])
@pytest.mark.parametrize("fuse", ["squeeze", "checkerboard", "next"])
def test_a_merged_token_is_read_from_the_one_that_holds_it(fuse, class_token, directions, unmerge):
    model = build(directions=directions, class_token=class_token).double()
    pixels = image(b=1, dtype=torch.float64)
    with prune(model, Plan(keep=0.5, fuse=fuse, unmerge=unmerge)) as handle:
        found = model(pixels).last_hidden_state
        trace, owner = handle.trace[0], handle.owner[0]
        grads = gradients(model, found)
    at = 8 if class_token == "middle" else 0
    place_of = [at] + [p for p in range(17) if p != at]  # of the class token, then of each patch
    places = torch.tensor(sorted(place_of[k] for k in trace.tolist()))
    rank = [places.tolist().index(place_of[k]) for k in trace.tolist()]
    holders = torch.tensor([rank[owner[place_of.index(p)]] for p in range(17)])
    wanted = plain_merged_tower(model, pixels, holders, places, unmerge)[None]
    assert error(found, wanted) < 1e-12
    for got, truth in zip(grads, gradients(model, wanted), strict=True):
        assert error(got, truth) < 1e-10


@pytest.mark.parametrize("directions", [1, 2, 4])
@pytest.mark.parametrize("kept", [[0, 3, 4, 8, 9, 15], [1, 2, 8, 16]])
def test_missing_tokens_leave_their_step(directions, kept):
    model = build(directions=directions).double()
    tokens, order = model.embeddings(image(dtype=torch.float64))
    order = order.with_columns(tokens.device) if directions == 4 else order
    kept = torch.tensor(kept)
    index = kept.expand(2, -1)
    tokens, order = tokens[:, kept], order.keep(index, True)
    for layer in model.layers:
        tokens, order = layer(tokens, order)
    wanted = plain_tower(model, image(dtype=torch.float64), kept)
    assert error(model.norm(tokens), wanted) < 1e-12
    at = kept.tolist().index(8)
    assert torch.equal(order.of_class(tokens), tokens[:, at])


PLANS = {
    "norm": {}, "distance": {"score": "distance", "at": 1}, "grid": {"score": "grid"},
    "delta": {"score": "delta", "at": 1}, "similarity": {"score": "similarity", "at": 1},
    "next": {"fuse": "next"}, "pairs": {"fuse": "bipartite", "at": (0, 1)}, "mean": {"fuse": "mean"},
    "two stages": {"at": (0, 1), "score": "distance"}, "with their steps": {"forget": True},
    "pairs of a checkerboard": {"fuse": "checkerboard", "at": (0, 1), "unmerge": True},
}  # fmt: skip


@pytest.mark.parametrize("directions", [1, 2, 4])
@pytest.mark.parametrize("class_token", ["middle", "none"])
@pytest.mark.parametrize("name", PLANS)
def test_it_is_pruned(name, class_token, directions):
    model = build(directions=directions, class_token=class_token)
    full = model(image())
    with prune(model, Plan(keep=0.5, **PLANS[name])) as handle:
        found = model(image())
        extra = class_token != "none"
        assert found.last_hidden_state.shape == (2, 8 + extra, 16)
        assert handle.tokens[-1] == 8 + extra
        assert 0.2 < handle.flops_ratio < 1
        assert handle.trace.shape == (2, 8 + extra)
        assert (handle.trace.diff(dim=1) > 0).all() or "pairs" in name
        assert handle.mass.sum() == (2 * 16 + 2 * extra if "fuse" in PLANS[name] else 2 * (8 + extra))
        handle.keep = 1.0
        assert torch.equal(model(image()).last_hidden_state, full.last_hidden_state)
    assert torch.equal(model(image()).last_hidden_state, full.last_hidden_state)


@pytest.mark.parametrize("directions", [2, 4])
def test_a_pruned_tower_is_the_plain_one_of_the_kept_tokens(directions):
    model = build(directions=directions).double()
    pixels = image(b=1, dtype=torch.float64)
    with prune(model, Plan(keep=0.4, score="grid", forget=True)) as handle:
        found = model(pixels)
        trace = handle.trace[0]
    places = torch.tensor(sorted(8 if k == 0 else k - 1 + (k > 8) for k in trace.tolist()))
    wanted = plain_tower(model, pixels, places)
    assert error(found.last_hidden_state, wanted) < 1e-12
    assert error(found.pooler_output, wanted[:, places.tolist().index(8)]) < 1e-12
    with prune(model, Plan(keep=0.4, score="grid")):
        assert error(model(pixels).last_hidden_state, wanted) > 1e-5


def test_a_pruned_tower_trains_is_compiled_and_drawn():
    model = build(directions=2)
    with prune(model, Plan(keep=0.5, score="delta")) as handle:
        found = model(image())
        found.pooler_output.sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        figure = draw(torch.zeros(3, 32, 32), handle)
        assert figure.get_suptitle().startswith("8 of 16 patches")
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            assert error(compiled(image()).last_hidden_state, found.last_hidden_state.double()) < 1e-6


def test_plans_that_a_tower_cannot_take_are_refused():
    model = build()
    for score in ("cls", "value", "received", "probe"):
        with pytest.raises(ValueError, match=r"plan\.score must be of tokens alone or 'delta'"):
            prune(model, Plan(score=score))
    with pytest.raises(ValueError, match=r"plan\.mass must be False in a tower without attention"):
        prune(model, Plan(fuse="mean", mass=True))
    with pytest.raises(
        ValueError, match=r"^Plan: unmerge must be False where tokens are dropped; got True\.$"
    ):
        Plan(unmerge=True)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=8, **sizes))
    with pytest.raises(ValueError, match=r"plan\.score must not be 'delta'"):
        prune(clip, Plan(score="delta"))
    with pytest.raises(ValueError, match=r"plan\.unmerge must be False in a tower without scans"):
        prune(clip, Plan(fuse="next", unmerge=True))


def test_flops_count_maps_and_states():
    config = VisionMambaConfig.of_size("tiny")
    with torch.device("meta"):
        model = VisionMambaModel(config)
    scans, convolutions = 2 * (2 * (384 * 44 + 12 * 384) + 9 * 384 * 16), 2 * 2 * 384 * 4
    maps, embedding = 2 * (192 * 768 + 384 * 192), 2 * 196 * 3 * 16 * 16 * 192
    for plan, everywhere in (
        ({}, 0), ({"fuse": "next"}, convolutions), ({"fuse": "next", "unmerge": True}, scans + convolutions),
    ):  # fmt: skip
        whole = maps + scans + convolutions
        with prune(model, Plan(keep=0.5, **plan)) as handle:
            pruned = 24 * (99 * (whole - everywhere) + 197 * everywhere) + embedding
            assert handle.flops_ratio == pytest.approx(pruned / (24 * 197 * whole + embedding))


def test_one_direction_is_a_stack_of_blocks():
    model = build(directions=1)
    tokens, _ = model.embeddings(image())
    for layer in model.layers:
        block = MambaBlock(16, d_state=4)
        weights = dict(layer.mixer.directions[0].state_dict())
        weights |= {f"{name}.weight": getattr(layer.mixer, name).weight for name in ("in_proj", "out_proj")}
        block.load_state_dict(weights)
        tokens = tokens + block(layer.norm(tokens))
    assert error(model(image()).last_hidden_state, model.norm(tokens).double()) < 1e-6


@pytest.mark.parametrize("directions", [2, 4])
def test_bands(directions):
    """MRSS changes little of what the directions with long memory see, and trains."""
    full, banded = build(directions=directions), build(directions=directions, mrss=BANDS)
    banded.load_state_dict(full.state_dict())
    a, b = (model(image()).pooler_output for model in (full, banded))
    assert 1e-4 < error(a, b.detach().double()) < 0.5
    assert all(torch.isfinite(g).all() for g in gradients(banded, b) if g is not None)
    per_token = build(directions=directions, mrss=[[1.0, 1]])
    per_token.load_state_dict(full.state_dict())
    assert error(per_token(image()).pooler_output, a.detach().double()) < 1e-5


@pytest.mark.parametrize("class_token", ["middle", "first", "none"])
def test_class_token_and_other_sizes(class_token):
    model = build(class_token=class_token)
    small, large = model(image()), model(image(rows=48, columns=64))
    extra = class_token != "none"
    assert small.last_hidden_state.shape == (2, 16 + extra, 16)
    assert large.last_hidden_state.shape == (2, 48 + extra, 16)
    at = {"middle": 24, "first": 0, "none": None}[class_token]
    pooled = large.last_hidden_state.mean(1) if at is None else large.last_hidden_state[:, at]
    assert torch.equal(large.pooler_output, pooled)
    assert torch.equal(model.embeddings.positions((4, 4)), model.embeddings.position_embeddings)


def test_it_is_saved_and_loaded(tmp_path):
    for kind, auto in (
        (VisionMambaModel, AutoModel),
        (VisionMambaForImageClassification, AutoModelForImageClassification),
    ):
        model = build(kind, directions=4, mrss=BANDS, num_labels=3)
        model.save_pretrained(tmp_path)
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is kind
        for name, t in model.state_dict().items():
            assert torch.equal(t, loaded.state_dict()[name]), name
        half = auto.from_pretrained(tmp_path, dtype=torch.bfloat16)
        rates = [t.dtype for name, t in half.named_parameters() if name.endswith("A_log")]
        assert set(rates) == {torch.float32}
        found = half(image()).hidden_states
        assert found is None
        assert len(half(image(), output_hidden_states=True).hidden_states) == 3
        assert isinstance(half(image(), return_dict=False), tuple)


def test_initialisation():
    model = build(num_hidden_layers=3, mrss=BANDS)
    for layer in model.layers:
        for direction in layer.mixer.directions:
            steps = F.softplus(direction.dt_proj.bias)
            assert (steps[1:] <= steps[:-1] + 1e-7).all()  # MRSS: the largest steps come first
            assert 9e-4 < steps.min() < steps.max() < 0.11
            assert torch.allclose(direction.A_log[0].exp(), torch.arange(1.0, 5))
    assert 0.01 < model.embeddings.position_embeddings.std() < 0.03


def test_it_trains_with_checkpoints():
    model = build(VisionMambaForImageClassification, num_labels=3, directions=4).train()
    labels = torch.tensor([0, 2])
    loss = model(image(), labels=labels).loss
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model(image(), labels=labels).loss.backward()
    for p, g in zip(model.parameters(), wanted, strict=True):
        assert torch.allclose(p.grad, g, atol=1e-7)


def test_it_is_the_vision_tower_of_a_clip():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=20, max_position_embeddings=8, eos_token_id=1, **sizes))
    model = VisionTextDualEncoderModel(vision_model=build(), text_model=text)
    ids = torch.tensor([[3, 4, 1], [5, 6, 1]])
    output = model(input_ids=ids, pixel_values=image(), return_loss=True)
    output.loss.backward()
    assert output.logits_per_image.shape == (2, 2)
    assert all(p.grad is not None for p in model.vision_model.parameters())
    again = VisionTextDualEncoderModel(model.config)  # builds the tower by its name
    assert type(again.vision_model) is VisionMambaModel


def _vim_weights():
    """A state_dict in the layout of Vim's published checkpoints, with random numbers."""
    torch.manual_seed(3)
    c, d, n, r, layers = 16, 32, 4, 1, 2
    shapes = {
        "cls_token": (1, 1, c), "pos_embed": (1, 17, c), "patch_embed.proj.weight": (c, 3, 8, 8),
        "patch_embed.proj.bias": (c,), "norm_f.weight": (c,), "head.weight": (5, c), "head.bias": (5,),
    }  # fmt: skip
    for i in range(layers):
        at = f"layers.{i}.mixer."
        shapes |= {
            f"layers.{i}.norm.weight": (c,), at + "in_proj.weight": (2 * d, c), at + "out_proj.weight": (c, d)
        }  # fmt: skip
        for mark in ("", "_b"):
            shapes |= {
                at + f"conv1d{mark}.weight": (d, 1, 4), at + f"conv1d{mark}.bias": (d,),
                at + f"x_proj{mark}.weight": (r + 2 * n, d), at + f"dt_proj{mark}.weight": (d, r),
                at + f"dt_proj{mark}.bias": (d,), at + f"A{mark}_log": (d, n), at + f"D{mark}": (d,),
            }  # fmt: skip
    return {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}


def test_weights_of_vim():
    weights = _vim_weights()
    model = convert_vim(weights)
    config = model.config
    assert (config.directions, config.num_hidden_layers, config.num_labels) == (2, 2, 5)
    assert (tuple(config.image_size), tuple(config.patch_size), config.state_size) == ((32, 32), (8, 8), 4)
    backward = model.vision_mamba.layers[1].mixer.directions[1]
    for name, t in (
        ("A_b_log", backward.A_log), ("D_b", backward.D), ("x_proj_b.weight", backward.x_proj.weight)
    ):  # fmt: skip
        assert torch.equal(t, weights[f"layers.1.mixer.{name}"])
    wanted = plain_tower(model.vision_mamba.double(), image(dtype=torch.float64))[:, 8]
    logits = model.double()(image(dtype=torch.float64)).logits
    assert error(logits, model.classifier(wanted)) < 1e-12
    with pytest.raises(ValueError, match="weights must have every name"):
        convert_vim({name: t for name, t in weights.items() if name != "layers.1.mixer.A_b_log"})
    with pytest.raises(ValueError, match="weights must have no other names"):
        convert_vim(weights | {"layers.1.mixer.other": torch.zeros(1)})
    with pytest.raises(ValueError, match="weights must be those of a Vim"):
        convert_vim({"x": torch.zeros(1)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"directions": 3}, "VisionMambaConfig: directions must be one of 1, 2, 4; got 3."),
        ({"class_token": "last"}, "VisionMambaConfig: class_token must be one of"),
        (
            {"image_size": 30},
            "VisionMambaConfig: image_size must be a multiple of the patch size, 8; got 30.",
        ),
        ({"mrss": [[0.5, 2]]}, "VisionMambaConfig: mrss must have fractions whose sum is 1"),
    ],
)
def test_bad_configs_say_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        build(**change)


ON_A_GPU = {
    "whole": {"keep": 1.0}, "pruned": {}, "merged": {"fuse": "checkerboard"},
    "unmerged": {"fuse": "squeeze", "unmerge": True}, "with their steps": {"forget": True},
}  # fmt: skip


def _errors_on_triton(directions, plan, pixels):
    """The largest error of features and of each weight's gradient, by the GPU's kernels, interpreted."""
    found = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        model = build(directions=directions, backend=backend).to(dtype)
        x = image(1, pixels, 24).to(dtype)
        with prune(model, Plan(score="norm", at=1, **plan)):
            y = model(x).last_hidden_state
            draw = torch.cos(torch.arange(y.numel())).view(y.shape).to(dtype)
            grads = torch.autograd.grad((y * draw).sum(), list(model.parameters()), allow_unused=True)
        found.append([y.detach(), *(g for g in grads if g is not None)])
        if backend == "triton" and directions < 4:
            assert model.layers[0].mixer._takes_time_last(y, Order((3, 3), None))
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True)]


@pytest.mark.parametrize(
    ("directions", "pixels", "plan"),
    [
        *((k, pixels, plan) for k, pixels in ((1, 24), (2, 40), (4, 24)) for plan in ("whole", "pruned")),
        *((2, 24, plan) for plan in ON_A_GPU),
    ],
)
def test_the_gpu_s_kernels_compute_the_same(interpreter, directions, pixels, plan):
    errors = interpreter.submit(_errors_on_triton, directions, ON_A_GPU[plan], pixels).result(timeout=300)
    assert max(errors) < 1e-5


def test_features_of_a_layer_are_not_kept():
    model, seen = build(num_hidden_layers=3), []

    def note(layer, inputs, output):
        seen.append(weakref.ref(output[0]))

    for layer in model.layers:
        layer.register_forward_hook(note)
    model.layers[2].register_forward_pre_hook(lambda *_: seen.append(seen[0]()))
    with torch.inference_mode():
        model(image())
    assert seen[2] is None


def test_bad_images_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"pixel_values must have shape \(b, 3, height, width\)"):
        build()(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match="sides that are multiples of"):
        build()(torch.zeros(1, 3, 30, 32))


def test_column_places_are_a_permutation():
    for at in (None, 0, 3):
        places = Order((2, 3), at).column_places(torch.device("cpu"))
        assert sorted(places.tolist()) == list(range(6 + (at is not None)))
    assert Order((2, 3), None).column_places(torch.device("cpu")).tolist() == [0, 2, 4, 1, 3, 5]


def _peak_of_tensors(call):
    """Most bytes that PyTorch's allocator held at once during the call, beyond those held before it.

    The resident set is no measure for a test: by allocator and kernel it differs by some MiB between runs.
    """
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        call()
    events = run.profiler.kineto_results.events()
    return max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


@pytest.mark.parametrize(
    ("plan", "numbers"),
    [
        ({"keep": 1.0}, lambda c, small, t, kept: (14 * c + small) * t),
        ({"at": 1}, lambda c, small, t, kept: (14 * c + small) * t),
        ({}, lambda c, small, t, kept: (14 * c + small) * kept + c * t),
        ({"fuse": "squeeze"}, lambda c, small, t, kept: (14 * c + small) * kept + 3 * c * t),
        (
            {"fuse": "squeeze", "unmerge": True},
            lambda c, small, t, kept: 6 * c * kept + (11 * c + small) * t,
        ),
    ],
    ids=("none", "later block", "drop", "merged", "unmerged"),
)
def test_peak_memory_is_what_the_docs_say(plan, numbers):
    b, c, r, n, t, kept = 4, 384, 24, 16, 197, 99
    model = build(hidden_size=c, state_size=n, image_size=224, patch_size=16)
    images = torch.rand(b, 3, 224, 224)
    with torch.inference_mode(), prune(model, Plan(score="grid", **plan)):
        peak = _peak_of_tensors(lambda: model(images))
    assert peak == pytest.approx(4 * b * numbers(c, r + 4 * n, t, kept), rel=0.05)


def test_labels_are_class_indices_and_their_loss_is_a_mean():
    model = build(VisionMambaForImageClassification, num_labels=3)
    assert model.accepts_loss_kwargs is False  # else Trainer does not divide it by the steps it accumulates
    with pytest.raises(
        ValueError, match=r"labels must be class indices \(b,\); got torch.float32 \(2, 3\)\.$"
    ):
        model(torch.rand(2, 3, 32, 32), labels=torch.zeros(2, 3))
