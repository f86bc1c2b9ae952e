"""`Mamba` in every direction, the language model, and small models in the style of published ones."""

import copy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from projecta import MambaBlock, selective_scan
from projecta.compat.generation import InferenceParams
from projecta.compat.mamba import Mamba
from projecta.compat.model import MambaConfig, MambaLMHeadModel

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def close(a, b, tolerance=1e-6):
    a, b = a.detach(), b.detach().to(a.dtype)
    assert torch.allclose(a, b, atol=tolerance * max(1.0, float(b.abs().max()))), float((a - b).abs().max())


def one_way(block, x, parts, A_log, back):
    """A block's gated output in float64, in plain PyTorch: the reverse direction by flipping everything."""
    xz = F.linear(x, block.in_proj.weight, block.in_proj.bias).transpose(1, 2)
    xz = xz.flip(-1) if back else xz
    u, z = xz.chunk(2, 1)
    conv, x_proj, dt_proj, D = parts
    u = F.silu(F.conv1d(F.pad(u, (3, 0)), conv.weight, conv.bias, groups=len(conv.weight)))
    r, n = dt_proj.weight.shape[1], A_log.shape[1]
    dt, B, C = x_proj(u.transpose(1, 2)).split([r, n, n], -1)
    delta = F.linear(dt, dt_proj.weight).transpose(1, 2)
    y = selective_scan(
        u, delta, -torch.exp(A_log), B.transpose(1, 2), C.transpose(1, 2), D, z, dt_proj.bias, True,
        backend="reference",
    )  # fmt: skip
    return y.flip(-1) if back else y


def expected(block, x):
    own = block.conv1d, block.x_proj, block.dt_proj, block.D
    y = one_way(block, x, own, block.A_log, False)
    if block.bimamba_type == "v2":
        other = block.conv1d_b, block.x_proj_b, block.dt_proj_b, block.D_b
        y = y + one_way(block, x, other, block.A_b_log, True)
        y = y / 2 if block.if_divide_out else y
    if block.bimamba_type == "v1":  # one convolution, causal; only the scan goes both ways
        xz = F.linear(x, block.in_proj.weight).transpose(1, 2)
        u, z = xz.chunk(2, 1)
        conv = block.conv1d
        u = F.silu(F.conv1d(F.pad(u, (3, 0)), conv.weight, conv.bias, groups=len(conv.weight)))
        r, n = block.dt_proj.weight.shape[1], block.A_log.shape[1]
        dt, B, C = block.x_proj(u.transpose(1, 2)).split([r, n, n], -1)
        delta = F.linear(dt, block.dt_proj.weight).transpose(1, 2)
        back = [t.flip(-1) for t in (u, delta, B.transpose(1, 2), C.transpose(1, 2), z)]
        A = -torch.exp(block.A_b_log)
        y = y + selective_scan(
            back[0], back[1], A, back[2], back[3], block.D, back[4], block.dt_proj.bias, True,
            backend="reference",
        ).flip(-1)  # fmt: skip
    y = F.linear(y.transpose(1, 2), block.out_proj.weight)
    return y * block.gamma if block.init_layer_scale is not None else y


@pytest.mark.parametrize(
    "options",
    [{}, {"bimamba_type": "v1"}, {"bimamba_type": "v2"},
     {"bimamba_type": "v2", "if_divide_out": True, "init_layer_scale": 0.1}],
)  # fmt: skip
def test_outputs_and_every_gradient(options):
    torch.manual_seed(0)
    block = Mamba(8, d_state=4, **options)
    with torch.no_grad():
        for name, p in block.named_parameters():
            if name.endswith("A_b_log"):
                p += 0.3 * torch.rand_like(p)
    wide = copy.deepcopy(block).double()
    x = torch.randn(2, 9, 8, requires_grad=True)
    wide_x = x.detach().double().requires_grad_()
    y, wanted = block(x), expected(wide, wide_x)
    close(y, wanted)
    weight = torch.randn(2, 9, 8)
    grads = torch.autograd.grad((y * weight).sum(), [x, *block.parameters()])
    others = torch.autograd.grad((wanted * weight).sum(), [wide_x, *wide.parameters()])
    for (name, _), got, other in zip([("x", x), *block.named_parameters()], grads, others, strict=True):
        assert float((got - other).abs().max()) <= 1e-6 * max(1.0, float(other.abs().max())), name


def test_it_is_the_block_with_mamba_ssm_s_weights():
    theirs = Mamba(8, d_state=4, bias=True)
    block = MambaBlock(8, d_state=4, bias=True)
    block.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(block.state_dict())
    x = torch.randn(2, 5, 8)
    assert torch.equal(block(x), theirs(x))
    names = {
        "A_log",
        "D",
        "in_proj.weight",
        "conv1d.weight",
        "conv1d.bias",
        "x_proj.weight",
        "dt_proj.weight",
    }
    assert names <= theirs.state_dict().keys()
    vision = {name for name in Mamba(8, bimamba_type="v2").state_dict() if "_b" in name.partition(".")[0]}
    assert vision == {
        "A_b_log", "D_b", "conv1d_b.weight", "conv1d_b.bias", "x_proj_b.weight", "dt_proj_b.weight", "dt_proj_b.bias"
    }  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_continues_the_sequence(dtype):
    block = Mamba(8, d_state=4, layer_idx=3, dtype=dtype)
    x, state = torch.randn(2, 9, 8, dtype=dtype), InferenceParams(9, 2)
    pieces = [block(x[:, :6], state)]
    for t in range(6, 9):
        state.seqlen_offset = t
        pieces.append(block(x[:, t : t + 1], state))
    close(torch.cat(pieces, 1), block(x), 1e-6 if dtype == torch.float32 else 3e-2)
    conv, ssm = block.allocate_inference_cache(2, 9)
    assert conv.shape == (2, 16, 4)
    assert ssm.shape == (2, 16, 4)
    assert ssm.dtype == dtype
    with pytest.raises(ValueError, match="layer_idx must be given to use a cache"):
        Mamba(8)(torch.randn(2, 1, 8), state)
    with pytest.raises(ValueError, match="inference_params must be None for both directions"):
        Mamba(8, bimamba_type="v2")(torch.randn(2, 1, 8), state)
    with pytest.raises(ValueError, match=r"hidden_states must have shape \(b, 1, d_model\)"):
        block.step(x, conv, ssm)


def small_model(**options):
    torch.manual_seed(0)
    return MambaLMHeadModel(MambaConfig(d_model=16, n_layer=2, vocab_size=20, **options)).eval()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rms_norm", [False, True])
def test_the_language_model_generates_what_it_says(fused, rms_norm):
    model = small_model(fused_add_norm=fused, rms_norm=rms_norm, d_intermediate=16)
    ids = torch.randint(0, 20, (2, 5))
    tokens, scores = ids, []
    with torch.no_grad():
        while tokens.shape[1] < 10:
            scores.append(model(tokens).logits[:, -1])
            tokens = torch.cat([tokens, scores[-1].argmax(-1, keepdim=True)], 1)
    found = model.generate(ids, 10, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(found.sequences, tokens)
    for got, wanted in zip(found.scores, scores, strict=True):
        close(got, wanted, 1e-5)
    assert model(ids, num_last_tokens=1).logits.shape == (2, 1, 24)  # the vocabulary in multiples of 8


def test_generation_s_options(capsys):
    model, ids = small_model(), torch.randint(0, 20, (2, 5))
    greedy = model.generate(ids, 10)
    assert model.generate(ids, 10, top_k=0, top_p=0.9, min_p=0.01, temperature=0.7, vocab_size=20).max() < 20
    teacher = torch.full((2, 8), 3)
    assert (model.generate(ids, 10, teacher_outputs=teacher)[:, 5:8] == 3).all()
    end = int(greedy[0, 5])
    assert model.generate(ids[:1], 10, eos_token_id=end).shape == (1, 6)
    streamed = []
    streamer = SimpleNamespace(put=lambda t: streamed.append(t), end=lambda: streamed.append(None))
    assert torch.equal(model.generate(ids, 10, streamer=streamer, enable_timing=True), greedy)
    assert streamed[-1] is None
    assert len(streamed) == 7
    assert capsys.readouterr().out.startswith("Prompt of 5 and 5 new tokens:")
    with pytest.raises(ValueError, match="cg must be False on a device other than a GPU"):
        model.generate(ids, 10, cg=True)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        model.generate(ids, 10, temperature=0.0)


def test_it_is_saved_and_loaded(tmp_path):
    model, ids = small_model(), torch.randint(0, 20, (1, 5))
    model.save_pretrained(tmp_path)
    loaded = MambaLMHeadModel.from_pretrained(str(tmp_path)).eval()
    assert loaded.config == model.config
    assert loaded.lm_head.weight is loaded.backbone.embedding.weight
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_layers_out_of_scope_are_refused():
    for options, rule in (
        ({"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg"),
        ({"attn_layer_idx": [1]}, "attn_layer_idx"),
    ):
        with pytest.raises(ValueError, match=f"create_block: {rule} must"):
            small_model(**options)


FAMILIES = ["vim", "vmamba", "mamba_vision", "vm_unet", "u_mamba", "caduceus", "audio_mamba", "s_d_mamba"]


def test_models_in_the_style_of_the_families_train():
    command = [sys.executable, "-m", "projecta.compat", str(HERE / "families.py"), *FAMILIES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in lines] == FAMILIES
    assert all(float(after) < float(before) for _, before, after in lines), lines


def test_stock_transformers_computes_the_same(tmp_path):
    pytest.importorskip("transformers")
    results, said = [], []
    for kind in ("stock", "compat"):
        path = tmp_path / f"{kind}.pt"
        command = [sys.executable, str(HERE / "stock_models.py"), kind, str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said.append(done.stderr)
        results.append(torch.load(path))
    assert "`selective_scan_fn` is falling back" in said[0]
    assert "falling back" not in said[1]
    stock, ours = results
    assert stock.keys() == ours.keys()
    for name, wanted in stock.items():
        if wanted.dtype == torch.long:
            assert torch.equal(ours[name], wanted), name
        else:
            bound = (6e-2 if name.endswith("half") else 1e-4) * max(float(wanted.abs().max()), 1e-4)
            assert float((ours[name] - wanted).abs().max()) <= bound, name
