"""The Mamba block, and Hugging Face models on projecta's scan."""

import copy
import io
import re
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from projecta import BackendUnavailable, _backends
from projecta.mamba import MambaBlock, accelerate
from projecta.mrss import BANDS

transformers = pytest.importorskip("transformers")
SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}
FAMILIES = {
    "mamba": ("Mamba", SMALL | {"state_size": 5}),
    "falcon_mamba": ("FalconMamba", SMALL | {"state_size": 5}),
    "jamba": (
        "Jamba",
        SMALL
        | {"mamba_d_state": 5, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
        | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    ),
}


def make_model(family):
    kind, sizes = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():  # the initial ones hide the effect of the state
        if parameter.dim() == 2 and not name.endswith("A_log"):
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(params=list(FAMILIES))
def model(request):
    return make_model(request.param)


@pytest.fixture
def mamba():
    return make_model("mamba")


def tokens(b=2, l=9):
    return torch.randint(0, 50, (b, l), generator=torch.Generator().manual_seed(1))


def left_padded():
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    return {"input_ids": tokens(), "attention_mask": mask}


def cache_of(output):
    """The name and value of the cache in a model's output; the model takes it by the same name."""
    names = (
        "cache",
        "cache_params",
        "past_key_values",
    )  # transformers >= 5.24; < 5.24; Jamba < 5.24
    return next((name, output[name]) for name in names if output.get(name) is not None)


def run_in_two_parts(model, ids, at):
    with torch.no_grad():
        first = model(ids[:, :at], use_cache=True)
        name, cache = cache_of(first)
        rest = model(ids[:, at:], use_cache=True, **{name: cache})
    return torch.cat([first.logits, rest.logits], 1)


def close(x, y, scale=1e-5):
    largest = y.detach().abs().amax().item() if y.numel() else 0
    torch.testing.assert_close(x, y, rtol=0, atol=scale * largest)


# --- accelerate


def test_logits_and_gradients_are_those_of_the_stock_model(model):
    batch = left_padded() | {"labels": tokens()}

    def run():
        model.zero_grad()
        out = model(**batch)
        out.loss.backward()
        return {"logits": out.logits.detach()} | {
            n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
        }

    stock = run()
    with accelerate(model, backend="cpu") as handle:
        assert handle.layers >= 1
        fast = run()
    assert fast.keys() == stock.keys()
    for name, expected in stock.items():
        if float(expected.abs().max()) > 1e-7:  # the gradient of an expert without tokens is rounding noise
            close(fast[name], expected, 1e-4)


COMPILED = {
    "cache_implementation": "static",
    "compile_config": transformers.CompileConfig(backend="eager", fullgraph=False, dynamic=False),
}
GENERATE = {
    "greedy": {}, "beams": {"num_beams": 3}, "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"}, "compiled": COMPILED,
}  # fmt: skip


@pytest.mark.parametrize("way", GENERATE)
def test_generate_gives_the_same_tokens(model, way):
    options = GENERATE[way] | left_padded() | {"max_new_tokens": 12, "do_sample": False}
    stock = model.generate(**options)
    with accelerate(model, backend="cpu"):
        assert torch.equal(model.generate(**options), stock)


def test_every_step_and_hidden_state_is_that_of_the_stock_model(model):
    ids = tokens()

    def run():
        with torch.no_grad():
            first = model(ids[:, :4], use_cache=True)
            (name, cache), outputs = cache_of(first), [first.logits]
            for t in range(4, 9):
                outputs.append(model(ids[:, t : t + 1], use_cache=True, **{name: cache}).logits)
            return [torch.cat(outputs, 1), *model(ids, output_hidden_states=True).hidden_states]

    stock = run()
    with accelerate(model, backend="cpu"):
        for one, other in zip(run(), stock, strict=True):
            close(one, other)


def test_a_cached_call_continues_from_the_cache(model):
    """transformers starts the scan of such a call from a zero state, `accelerate` from the cache."""
    ids = tokens()
    with torch.no_grad():
        whole = model(ids).logits
    wrong = (run_in_two_parts(model, ids, 4) - whole)[:, 4:].abs().max()
    assert wrong > 1e-3 * whole.abs().max(), "transformers has mended this: say so in accelerate's docstring"
    with accelerate(model, backend="cpu"):
        for at in (1, 2, 4, 8):
            close(run_in_two_parts(model, ids, at), whole)


def test_a_masked_step_is_that_of_the_stock_model(mamba):
    """A row that has ended takes no input, and none from the convolution's state."""
    ids, ended = tokens(), torch.tensor([[1], [0]])

    def run():
        with torch.no_grad():
            name, cache = cache_of(mamba(ids[:, :5], use_cache=True))
            mamba(ids[:, 5:6], use_cache=True, **{name: cache}, attention_mask=ended)
            return mamba(ids[:, 6:7], use_cache=True, **{name: cache}).logits

    stock = run()
    with accelerate(mamba, backend="cpu"):
        close(run(), stock)


def test_decoding_with_gradients_is_differentiable(mamba):
    ids = tokens()
    with accelerate(mamba, backend="cpu"):
        first = mamba(ids[:, :4], use_cache=True)
        name, cache = cache_of(first)
        one = mamba(ids[:, 4:5], use_cache=True, **{name: cache}).logits
        one.sum().backward()
        close(one, mamba(ids[:, :5]).logits[:, 4:])
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mamba.parameters())


def test_remove_leaves_the_model_as_it_was(model):
    names, before = list(model.state_dict()), model(tokens()).logits
    other = make_model("mamba")
    handle = accelerate(model, backend="cpu")
    assert list(model.state_dict()) == names
    assert "forward" not in vars(other.backbone.layers[0].mixer)
    handle.remove()
    handle.remove()
    assert handle.layers == 0
    assert torch.equal(model(tokens()).logits, before)


def test_accelerate_twice_is_accelerate_once(mamba):
    with accelerate(mamba, backend="cpu"):
        with accelerate(mamba, backend="cpu") as inner:
            assert inner.layers == 2
        assert inner.layers == 2, "the inner context did nothing, so it undoes nothing"
        with pytest.raises(ValueError, match=r"^accelerate: backend must be that of the first call, 'cpu'"):
            accelerate(mamba, backend="reference")
    assert inner.layers == 0
    accelerate(mamba)
    accelerate(mamba).remove()  # as when a cell of a notebook runs twice
    assert "forward" not in vars(mamba.backbone.layers[0].mixer)


def test_a_copy_is_accelerated_and_independent(mamba):
    accelerate(mamba, backend="cpu")
    kept = io.BytesIO()
    torch.save(mamba, kept)
    kept.seek(0)
    for twin in (copy.deepcopy(mamba), torch.load(kept, weights_only=False)):
        expected = mamba(tokens()).logits
        with torch.no_grad():
            twin.backbone.layers[0].mixer.D.fill_(7)
        assert not torch.equal(twin(tokens()).logits, expected), "its layers use its own weights"
        assert torch.equal(mamba(tokens()).logits, expected)
        assert accelerate(twin, backend="cpu").layers == 2


def test_a_copy_has_a_working_handle(mamba):
    stock = mamba(tokens()).logits
    accelerate(mamba, mrss=BANDS)
    kept = io.BytesIO()
    torch.save(mamba, kept)
    kept.seek(0)
    for twin in (copy.deepcopy(mamba), torch.load(kept, weights_only=False)):
        with accelerate(twin, backend="reference") as handle:
            assert handle.layers == 2
            assert {m.forward.backend for m in (layer.mixer for layer in twin.backbone.layers)} == {
                "reference"
            }
            close(twin(tokens()).logits, stock)
        assert handle.layers == 0
        assert torch.equal(twin(tokens()).logits, stock), "its channels are in their own order again"
        assert all(not module._forward_pre_hooks for module in twin.modules())


def test_a_replica_computes_with_its_own_weights(mamba):
    """nn.DataParallel copies the attributes of a module, also its `forward`. The copy has its own weights."""
    mixer = mamba.backbone.layers[0].mixer
    accelerate(mamba, backend="cpu")
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = mixer(x)
        replica = mixer._replicate_for_data_parallel()
        for name, part in mixer.named_children():
            replica._modules[name] = copy.deepcopy(part)
        for name, parameter in mixer.named_parameters(recurse=False):
            setattr(replica, name, parameter.detach().clone())
        replica.D.zero_()
        assert not torch.equal(replica(x), expected)
        assert torch.equal(mixer(x), expected)


@pytest.mark.parametrize("name", ["cache", "cache_params"])
def test_the_cache_has_two_names(mamba, name):
    """transformers uses one name, depending on its version. Copies of older code may use the other."""
    with accelerate(mamba, backend="cpu"), torch.no_grad():
        x, mixer = torch.randn(1, 6, 32), mamba.backbone.layers[0].mixer
        _, cache = cache_of(mamba(tokens(1, 1), use_cache=True))
        cache.reset()
        whole = mixer(x)
        parts = [mixer(part, **{name: cache}) for part in (x[:, :3], x[:, 3:4], x[:, 4:])]
        close(torch.cat(parts, 1), whole)
        with pytest.raises(ValueError, match="cache_params must be None where cache is given"):
            mixer(x, cache=cache, cache_params=copy.copy(cache))


def test_an_argument_that_is_not_known_is_refused_by_name(mamba):
    """Host libraries rename arguments. An argument that is silently ignored would change results."""
    mixer, x = mamba.backbone.layers[0].mixer, torch.randn(1, 3, 32)
    with accelerate(mamba, backend="cpu"):
        mixer(x, kv_cache=None)
        message = f"kv_cache must be None: projecta does not know this argument of transformers {transformers.__version__}; got dict."
        with pytest.raises(ValueError, match=f"^accelerate: {re.escape(message)}$"):
            mixer(x, kv_cache={})
        with pytest.raises(
            ValueError, match="seq_idx must be None: layers of transformers take one sequence"
        ):
            mixer(x, seq_idx=torch.zeros(1, 3))


def test_it_compiles_without_a_break(mamba):
    with accelerate(mamba, backend="cpu"), torch.no_grad():
        expected = mamba(tokens()).logits
        compiled = torch.compile(
            lambda x: mamba(x, use_cache=False).logits, fullgraph=True, backend="aot_eager"
        )
        close(compiled(tokens()), expected)


def test_gradient_checkpointing(mamba):
    mamba.train()
    with accelerate(mamba, backend="cpu"):
        mamba(tokens(), labels=tokens()).loss.backward()
        expected = mamba.backbone.layers[0].mixer.A_log.grad.clone()
        mamba.zero_grad()
        with warnings.catch_warnings():  # transformers 5.17 has only this name, 5.23 warns about it
            warnings.simplefilter("ignore", FutureWarning)
            mamba.gradient_checkpointing_enable({"use_reentrant": False})
        mamba(tokens(), labels=tokens()).loss.backward()
    close(mamba.backbone.layers[0].mixer.A_log.grad, expected)


def test_an_adapted_projection_is_called_not_bypassed(mamba):
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    projection = mamba.backbone.layers[0].mixer.dt_proj
    accelerate(mamba, backend="cpu")
    with torch.no_grad():
        plain = mamba(tokens()).logits
        projection.__class__ = Adapted
        adapted = mamba(tokens()).logits
        projection.__class__ = nn.Linear
        projection.bias += 1
        close(adapted, mamba(tokens()).logits, 1e-4)
        assert (adapted - plain).abs().max() > 1e-3


def test_half_precision_stays_close(mamba):
    with torch.no_grad(), accelerate(mamba, backend="cpu"):
        expected = mamba(tokens()).logits
        with torch.autocast("cpu", torch.bfloat16):
            close(mamba(tokens()).logits, expected, 5e-2)
        half = mamba.to(torch.bfloat16)
        close(half(tokens()).logits, expected, 5e-2)
        assert half.generate(tokens(), max_new_tokens=4).shape == (2, 13)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m: accelerate(nn.Linear(2, 2)),
            TypeError,
            "model must have Mamba-1 layers of transformers (mamba, ",
        ),
        (lambda m: accelerate(m, backend="gpu"), ValueError, "backend must be one of 'auto', "),
    ],
)
def test_errors_name_the_argument(mamba, call, error, message):
    with pytest.raises(error) as caught:
        call(mamba)
    assert str(caught.value).startswith(f"accelerate: {message}")


def test_an_offloaded_layer_is_refused(mamba):
    mamba.backbone.layers[1].mixer.conv1d._hf_hook = object()
    with pytest.raises(
        ValueError, match=r"^accelerate: model must have layers with their own forward, and weights"
    ):
        accelerate(mamba)
    assert "forward" not in vars(mamba.backbone.layers[0].mixer), "all layers, or none"


def test_a_backend_that_cannot_run_is_refused_at_once(mamba, monkeypatch):
    monkeypatch.setattr("projecta.scan.cpu.unavailable", lambda: "no processor")
    for call in (lambda: accelerate(mamba, backend="cpu"), lambda: MambaBlock(8, backend="cpu")):
        with pytest.raises(BackendUnavailable, match="got 'cpu': no processor"):
            call()


# --- the block


def block_by_the_formula(block, x):
    """One token after another, in float64, from the weights alone."""
    w = {n: p.detach().double() for n, p in block.named_parameters()}
    x, z = (x.double() @ w["in_proj.weight"].T).chunk(2, -1)
    b, l, d = x.shape
    k, n = block.d_conv, block.d_state
    padded = torch.cat([torch.zeros(b, k - 1, d, dtype=torch.float64), x], 1)
    state, ys = torch.zeros(b, d, n, dtype=torch.float64), []
    for t in range(l):
        u = (padded[:, t : t + k] * w["conv1d.weight"][:, 0].T).sum(1) + w["conv1d.bias"]
        u = u * torch.sigmoid(u)
        dt, B, C = (u @ w["x_proj.weight"].T).split([block.dt_rank, n, n], -1)
        delta = torch.log1p(torch.exp(dt @ w["dt_proj.weight"].T + w["dt_proj.bias"]))[..., None]
        state = torch.exp(delta * -torch.exp(w["A_log"])) * state + delta * B[:, None] * u[..., None]
        y = (state * C[:, None]).sum(-1) + w["D"] * u
        ys.append((y * z[:, t] * torch.sigmoid(z[:, t])) @ w["out_proj.weight"].T)
    return torch.stack(ys, 1)


@pytest.mark.parametrize("sizes", [{}, {"d_state": 3, "d_conv": 2, "expand": 3, "dt_rank": 1}, {"d_conv": 1}])
def test_block_is_the_formula(sizes, backend):
    block, x = MambaBlock(12, **sizes, backend=backend), torch.randn(2, 19, 12)
    close(block(x).double(), block_by_the_formula(block, x))


@pytest.mark.parametrize("d_conv", [1, 2, 4])
def test_prefill_and_steps_equal_the_whole(d_conv):
    block, x = MambaBlock(12, d_conv=d_conv), torch.randn(2, 19, 12)
    whole = block(x)
    y, state = block(x[:, :1], return_state=True)  # shorter than the convolution
    ys = [y]
    y, state = block(x[:, 1:13], state, return_state=True)
    ys.append(y)
    with torch.no_grad():
        ys += [block.step(x[:, t], state)[:, None] for t in range(13, 19)]
    close(torch.cat(ys, 1), whole)
    fresh = block.initial_state(2)
    with torch.no_grad():
        close(torch.stack([block.step(x[:, t], fresh) for t in range(19)], 1), whole)
    for kept, once in zip(state, fresh, strict=True):
        close(kept, once)


@pytest.mark.parametrize("options", [{}, {"d_conv": 1}, {"mrss": BANDS}])
def test_a_block_of_no_tokens(options):
    block = MambaBlock(32, **options)
    _, state = block(torch.randn(2, 5, 32), return_state=True)
    nothing = torch.randn(2, 0, 32, requires_grad=True)
    y, after = block(nothing, state, return_state=True)
    assert y.shape == (2, 0, 32)
    y.sum().backward()
    assert nothing.grad.shape == (2, 0, 32)
    before, now = ((s.conv, *(s.ssm if "mrss" in options else [s.ssm])) for s in (state, after))
    for one, other in zip(before, now, strict=True):
        assert torch.equal(one, other)
    assert block(nothing).shape == (2, 0, 32)
    close(block(nothing, return_state=True)[1].conv, block.initial_state(2).conv)


def test_gradients_flow_through_the_state():
    block, x = MambaBlock(8), torch.randn(2, 10, 8)

    def gradients(run):
        return torch.autograd.grad(run().square().sum(), list(block.parameters()))

    def parts():
        first, state = block(x[:, :6], return_state=True)
        return torch.cat([first, block(x[:, 6:], state)], 1)

    for once, twice in zip(gradients(lambda: block(x)), gradients(parts), strict=True):
        close(twice, once)


def test_block_takes_the_weights_of_a_published_layer(mamba):
    mixer = mamba.backbone.layers[0].mixer
    block = MambaBlock(32, d_state=5)
    assert set(block.state_dict()) == set(mixer.state_dict())
    block.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 11, 32)
    close(block(x), mixer(x))


def test_initialisation_is_the_published_one():
    torch.manual_seed(0)
    block = MambaBlock(64, d_state=4)
    assert block.dt_rank == 4
    torch.testing.assert_close(block.A_log.exp(), torch.arange(1.0, 5).repeat(128, 1))
    steps = nn.functional.softplus(block.dt_proj.bias)
    assert 0.001 <= steps.min() < 0.002
    assert 0.05 < steps.max() <= 0.1
    assert 0.4 < block.dt_proj.weight.abs().max() <= 0.5
    assert block.A_log._no_weight_decay
    assert block.D._no_weight_decay
    assert torch.equal(block.D, torch.ones(128))
    assert MambaBlock(64, dt_init="constant").dt_proj.weight.unique().tolist() == [0.5]


def test_block_compiles_and_trains_in_one_graph():
    block, x = MambaBlock(8), torch.randn(2, 10, 8)
    torch.compile(block, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    compiled = {n: p.grad.clone() for n, p in block.named_parameters()}
    block.zero_grad()
    block(x).square().sum().backward()
    for name, parameter in block.named_parameters():
        close(compiled[name], parameter.grad)


def test_blocks_compile_before_any_eager_call():
    """The backends of the convolution, the scan and MRSS are imported while the compiler traces."""
    code = """if True:
        import torch
        from projecta import MambaBlock
        from projecta.mrss import BANDS
        block, x = MambaBlock(8, mrss=BANDS), torch.randn(2, 9, 8)
        found = torch.compile(block, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(found, block(x))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MambaBlock(0), "MambaBlock: d_model must be at least 1; got 0."),
        (lambda: MambaBlock(8, dt_min=1.0), "MambaBlock: dt_min must lie in (0, dt_max] = (0, 0.1]; got 1.0."),
        (lambda: MambaBlock(8)(torch.ones(1, 8)), "MambaBlock: hidden_states must have shape (b, l, d_model = 8); got (1, 8)."),
        (
            lambda: MambaBlock(8).step(torch.ones(1, 3), MambaBlock(8).initial_state(1)),
            "MambaBlock.step: hidden_states must have shape (b, d_model) = (1, 8); got (1, 3).",
        ),
        (lambda: MambaBlock(8, dt_rank=0), "MambaBlock: dt_rank must be 'auto' or an integer above 0; got 0."),
        (lambda: MambaBlock(8, dt_rank="a"), "MambaBlock: dt_rank must be 'auto' or an integer above 0; got 'a'."),
        (lambda: MambaBlock(8, expand=0), "MambaBlock: expand must give at least one channel; got 0."),
        (
            lambda: MambaBlock(8)(torch.ones(2, 4, 8), MambaBlock(8).initial_state(1)),
            "MambaBlock: state.conv must have shape (b, d_inner, d_conv - 1) = (2, 16, 3); got (1, 16, 3).",
        ),
        (
            lambda: MambaBlock(8)(torch.ones(1, 4, 8), MambaBlock(8, d_conv=5).initial_state(1)),
            "MambaBlock: state.conv must have shape (b, d_inner, d_conv - 1) = (1, 16, 3); got (1, 16, 4).",
        ),
        (
            lambda: MambaBlock(8).step(torch.ones(1, 8), MambaBlock(8, d_state=4).initial_state(1)),
            "MambaBlock.step: state.ssm must have shape (b, d_inner, d_state) = (1, 16, 16); got (1, 16, 4).",
        ),
    ],
)  # fmt: skip
def test_errors_of_the_block(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def test_states_of_another_kind_are_refused():
    plain, bands = MambaBlock(8), MambaBlock(8, mrss=BANDS)
    x = torch.ones(1, 4, 8)
    with pytest.raises(TypeError, match=r"^MambaBlock: state\.ssm must be a tensor; got MrssState\.$"):
        plain(x, bands.initial_state(1))
    message = (
        "MambaBlock.step: state.ssm must be a MrssState with mrss; got Tensor. `initial_state` gives one."
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        bands.step(x[:, 0], plain.initial_state(1))


def test_a_state_of_bands_that_join_takes_steps():
    block = MambaBlock(8, mrss=((0.25, 1), (0.25, 1), (0.5, 4)))
    x, state = torch.randn(1, 6, 8), block.initial_state(1)
    with torch.no_grad():
        steps = [block.step(x[:, t], state) for t in range(6)]
        close(torch.stack(steps, 1), block(x))


def test_a_group_is_refused_where_it_could_not_be_undone(mamba):
    with accelerate(mamba), pytest.raises(ValueError, match="group must be None on an accelerated model"):
        accelerate(mamba, group="ranks")
    with pytest.raises(ValueError, match="mrss must be None with group"):
        accelerate(mamba, group="ranks", mrss=BANDS)


# --- the multi-resolution scan


def test_mrss_in_a_model_trains_and_is_removable(model):
    with torch.no_grad():
        for layer in model.modules():
            if hasattr(layer, "dt_proj"):
                layer.dt_proj.bias.uniform_(-4, 0)
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        truth = model(tokens(2, 40)).logits
        with accelerate(model, mrss=[(1.0, 1)]):  # only the order of the channels changes
            assert any(not torch.equal(t, weights[name]) for name, t in model.state_dict().items())
            close(model(tokens(2, 40), use_cache=False).logits, truth, 1e-5)
    with accelerate(model, mrss=BANDS) as handle:
        assert handle.layers
        found = model(tokens(2, 40), use_cache=False).logits
        assert not torch.allclose(found, truth)
        found.square().sum().backward()
        mixer = next(m for m in model.modules() if hasattr(m, "dt_proj"))
        assert mixer.dt_proj.weight.grad.isfinite().all()
        assert (mixer.dt_proj.bias.diff() <= 0).all(), "large steps come first"
        with pytest.raises(ValueError, match="cache must be None with mrss: pass use_cache=False"):
            model.generate(tokens(2, 5), max_new_tokens=3, do_sample=False)
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(tokens(2, 40)).logits, truth)


def test_mrss_refusals(mamba):
    with pytest.raises(ValueError, match=r"accelerate: mrss must have fractions whose sum is 1; got 0\.5"):
        accelerate(mamba, mrss=[(0.5, 1)])
    with accelerate(mamba), pytest.raises(ValueError, match="mrss must be None on an accelerated model"):
        accelerate(mamba, mrss=BANDS)
    mamba.backbone.layers[1].mixer.x_proj = nn.Sequential(mamba.backbone.layers[1].mixer.x_proj)
    with pytest.raises(ValueError, match="have layers of plain weights"):
        accelerate(mamba, mrss=BANDS)


def test_steps_of_a_block_with_mrss_equal_its_scan():
    torch.manual_seed(0)
    block = MambaBlock(32, mrss=BANDS)
    assert (block.dt_proj.bias.diff() <= 0).all()
    x = torch.randn(2, 37, 32)
    truth = block(x)
    y, state = block(x[:, :19], return_state=True)
    steps = [block.step(x[:, t], state) for t in range(19, 30)]
    rest = block(x[:, 30:], state)
    close(torch.cat([y, torch.stack(steps, 1), rest], 1), truth)
    truth.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("name", ["reference", "vectorised"])
def test_a_block_in_plain_pytorch_needs_no_kernel(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "projecta.conv.cpu", None)  # as without numba
    monkeypatch.delitem(_backends._loaded, "projecta.conv.cpu", raising=False)
    block, x = MambaBlock(8, backend=name), torch.randn(1, 5, 8)
    y, state = block(x, return_state=True)
    with torch.no_grad():
        assert block.step(x[:, 0], state).isfinite().all()
    assert y.isfinite().all()


def test_a_reference_block_has_second_derivatives():
    block, x = MambaBlock(8, backend="reference").double(), torch.randn(1, 5, 8).double()

    def gradient(x):
        return torch.autograd.grad(block(x).square().sum(), x, create_graph=True)[0]

    assert torch.autograd.gradcheck(gradient, x.requires_grad_())
