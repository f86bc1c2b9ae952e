"""mamba-ssm's and causal-conv1d's functions against plain formulas, in float64 where they can."""

import pytest
import torch
import torch.nn.functional as F

from projecta import selective_scan
from projecta.compat import conv, extensions, norm, scan
from tests.cases import make_scan

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def close(a, b, tolerance=1e-5):
    a, b = a.detach(), b.detach().to(a.dtype)
    assert torch.allclose(a, b, atol=tolerance * max(1.0, float(b.abs().max()))), float((a - b).abs().max())


def silu_conv(x, weight, bias, start=None):
    k = weight.shape[1]
    start = x.new_zeros(*x.shape[:2], k - 1) if start is None else start
    return F.silu(F.conv1d(torch.cat([start, x], -1), weight[:, None], bias, groups=len(weight)))


def test_runs_of_seq_idx_do_not_see_each_other():
    seq_idx = [[0, 0, 0, 1, 1, 2, 2, 2, 2], [5] * 9]
    x, weight, bias = torch.randn(2, 3, 9), torch.randn(3, 4), torch.randn(3)
    y = conv.causal_conv1d_fn(x, weight, bias, torch.tensor(seq_idx), activation="silu")
    for row, marks in enumerate(seq_idx):
        for mark in set(marks):
            at = [t for t, other in enumerate(marks) if other == mark]
            close(y[row : row + 1, :, at], silu_conv(x[row : row + 1, :, at], weight, bias))
    with pytest.raises(ValueError, match="causal_conv1d_fn: seq_idx must be None with final states"):
        conv.causal_conv1d_fn(x, weight, bias, torch.tensor(seq_idx), return_final_states=True)


def test_states_before_runs_and_padding_among_them():
    seq_idx = torch.tensor([[-1, -1, 0, 0, 0, 1, 1, -1, -1], [3, 3, 4, 4, 4, 4, 4, 4, 4]])
    x, weight, bias, start = torch.randn(2, 3, 9), torch.randn(3, 4), torch.randn(3), torch.randn(2, 3, 3)
    leaves = [t.requires_grad_() for t in (x, weight, bias, start)]
    y = conv.causal_conv1d_fn(x, weight, bias, seq_idx, start, activation="silu")
    truth = torch.zeros_like(y)
    parts = [(0, 2, 5, None), (0, 5, 7, None), (1, 0, 2, start[1:]), (1, 2, 9, None)]
    for row, first, last, before in parts:
        truth[row : row + 1, :, first:last] = silu_conv(x[row : row + 1, :, first:last], weight, bias, before)
    close(y, truth)
    grad = torch.randn_like(y)
    for got, wanted in zip(*(torch.autograd.grad(t, leaves, grad) for t in (y, truth)), strict=True):
        close(got, wanted)
    same = conv.causal_conv1d_ref(x, weight, bias, start, activation="silu", seq_idx=seq_idx)
    close(same, truth)


@pytest.mark.parametrize("indices", [[4, -1, 0], [0, 3, -1], [4, -1, 2], [-1, -1, -1], [2, 1, 3], []])
def test_rows_of_a_pool_that_are_padding(indices):
    b, where = len(indices), torch.tensor(indices, dtype=torch.int32)
    real = [i for i, index in enumerate(indices) if index >= 0]
    x, weight, pool = torch.randn(b, 3), torch.randn(3, 4), torch.randn(5, 3, 3)
    before = pool.clone()
    y = conv.causal_conv1d_update(x, pool, weight, activation="silu", conv_state_indices=where)
    A, B, states = -torch.rand(3, 2), torch.randn(b, 2), torch.randn(5, 3, 2)
    kept = states.clone()
    z = scan.selective_state_update(states, x, x, A, B, B, state_batch_indices=where)
    for i, index in enumerate(indices):
        if i not in real:
            assert not y[i].any()
            assert not z[i].any()
            continue
        own, state = before[index : index + 1], kept[index : index + 1]
        close(y[i : i + 1], conv.causal_conv1d_update(x[i : i + 1], own, weight, activation="silu"))
        close(pool[index], own[0])
        close(
            z[i],
            scan.selective_state_update(state, *(t[i : i + 1] for t in (x, x)), A, *[B[i : i + 1]] * 2)[0],
        )
        close(states[index], state[0])
    others = [i for i in range(5) if i not in indices]
    assert torch.equal(pool[others], before[others])
    assert torch.equal(states[others], kept[others])


def test_states_and_old_positions_of_activation():
    x, weight, bias, start = torch.randn(2, 3, 9), torch.randn(3, 4), torch.randn(3), torch.randn(2, 3, 3)
    out = torch.zeros(2, 3, 3)
    y, last = conv.causal_conv1d_fn(x, weight, bias, None, start, True, out, "silu")
    close(y, silu_conv(x, weight, bias, start))
    assert last is out
    assert torch.equal(out, x[..., -3:])
    for old in (("silu",), (None, "silu")):
        close(conv.causal_conv1d_fn(x, weight, bias, *old), silu_conv(x, weight, bias))


@pytest.mark.parametrize("steps", [None, 1, 3])
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("picked", [False, True])
def test_update_with_ring_and_indices(steps, ring, picked):
    b, d, k, m = 2, 3, 4, 6
    weight, bias = torch.randn(d, k), torch.randn(d)
    x = torch.randn(b, d) if steps is None else torch.randn(b, d, steps)
    history = torch.randn(b, d, m)  # the oldest first
    at = torch.tensor([4, 11], dtype=torch.int32) if ring else None
    held = history
    if ring:
        held = torch.stack([history[i].roll(int(at[i]) % m, -1) for i in range(b)])
    rows = torch.tensor([3, 1], dtype=torch.int32) if picked else None
    pool = torch.randn(5, d, m)
    others = pool[[0, 2, 4]].clone()
    if picked:
        pool[rows.long()] = held
    state = pool if picked else held.clone()
    y = conv.causal_conv1d_update(x, state, weight, bias, True, at, rows)
    new = x[..., None] if steps is None else x
    wanted = silu_conv(new, weight, bias, history[..., -(k - 1) :])
    close(y, wanted[..., 0] if steps is None else wanted)
    after = torch.cat([history, new], -1)[..., -m:]
    if ring:
        after = torch.stack([after[i].roll((int(at[i]) + new.shape[2]) % m, -1) for i in range(b)])
    close(state[rows.long()] if picked else state, after)
    if picked:
        assert torch.equal(pool[[0, 2, 4]], others)


def test_varlen_states():
    x, bounds = torch.randn(9, 3), torch.tensor([0, 2, 9], dtype=torch.int32)
    states = conv.causal_conv1d_varlen_states(x, bounds, 4)
    assert torch.equal(states[1], x[5:9].t())
    assert torch.equal(states[0], torch.cat([torch.zeros(2, 3), x[:2]]).t())


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(rms, dtype):
    x, residual, x1 = (torch.randn(2, 5, 8, dtype=dtype) for _ in range(3))
    weight, bias, weight1, scale = torch.randn(8), torch.randn(8), torch.randn(8), torch.rand(2, 5)
    total = x.double() * scale.double()[..., None] + x1.double() + residual.double()

    def formula(w, b):
        centred = total if rms else total - total.mean(-1, keepdim=True)
        y = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * w
        return y if b is None else y + b

    y, y1, kept = norm.layer_norm_fn(
        x, weight, bias, residual, x1, weight1, None, 1e-5, 0.0, scale, True, True, rms
    )
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    close(y.double(), formula(weight, bias), tolerance)
    close(y1.double(), formula(weight1, None), tolerance)
    close(kept.double(), total, 1e-6 if dtype == torch.float32 else 1e-2)
    assert y.dtype == dtype
    assert kept.dtype == dtype  # the residual's: it is not asked to grow
    assert norm.layer_norm_fn(x, weight, bias, prenorm=True, residual_in_fp32=True)[1].dtype == torch.float32


def test_dropout_gives_its_masks():
    x = torch.ones(4, 1000)
    _, total, mask, other = norm.rms_norm_fn(
        x, torch.ones(1000), dropout_p=0.25, prenorm=True, return_dropout_mask=True
    )
    assert other is None
    assert torch.equal(total, mask / 0.75)
    assert 0.7 < float(mask.float().mean()) < 0.8
    module = norm.RMSNorm(1000, dropout_p=0.25)
    assert not torch.equal(module(x), module.eval()(x))


def inner_arguments(d=8, r=3, n=4, l=7, b=2, width=6):
    torch.manual_seed(0)
    return {
        "xz": torch.randn(b, 2 * d, l, dtype=torch.float64), "conv1d_weight": torch.randn(d, 1, 4),
        "conv1d_bias": torch.randn(d), "x_proj_weight": torch.randn(r + 2 * n, d) / 3,
        "delta_proj_weight": torch.randn(d, r) / 2, "out_proj_weight": torch.randn(width, d),
        "out_proj_bias": torch.randn(width), "A": -torch.rand(d, n), "D": torch.randn(d),
        "delta_bias": torch.randn(d) - 1,
    }  # fmt: skip


def plain_inner(a, reverse=(), norms=(None, None, None)):
    """The formula, in float64, by a loop over time."""
    a = {k: t.double() for k, t in a.items()}
    x, z = a["xz"].chunk(2, 1)
    u = silu_conv(x, a["conv1d_weight"][:, 0], a["conv1d_bias"])
    r, n = a["delta_proj_weight"].shape[1], a["A"].shape[1]
    dt, B, C = (u.transpose(1, 2) @ a["x_proj_weight"].t()).split([r, n, n], -1)

    def normed(t, w):
        return t if w is None else t / torch.sqrt(t.square().mean(-1, keepdim=True) + 1e-6) * w.double()

    B, C, dt = (normed(t, w) for t, w in zip((B, C, dt), norms, strict=True))
    delta = F.softplus(dt @ a["delta_proj_weight"].t() + a["delta_bias"])  # (b, l, d)
    total = 0
    for A, order in (
        (a["A"], range(x.shape[2])),
        *((A.double(), reversed(range(x.shape[2]))) for A in reverse),
    ):
        h, ys = torch.zeros(*x.shape[:2], n, dtype=torch.float64), {}
        for t in order:
            step = delta[:, t, :, None]
            h = torch.exp(step * A) * h + step * B[:, t, None] * u[:, :, t, None]
            ys[t] = (h * C[:, t, None]).sum(-1)
        y = torch.stack([ys[t] for t in range(x.shape[2])], -1)
        total = total + (y + a["D"][:, None] * u) * F.silu(z)
    return total.transpose(1, 2) @ a["out_proj_weight"].t() + a["out_proj_bias"]


def as_float(arguments):
    return {k: t.float() for k, t in arguments.items()}


def test_inner_functions():
    a = inner_arguments()
    wanted = plain_inner(a)
    close(scan.mamba_inner_fn(**as_float(a)), wanted)
    close(scan.mamba_inner_ref(**as_float(a)), wanted)
    rest = {k: t for k, t in as_float(a).items() if not k.startswith("out_proj")}
    y = scan.mamba_inner_fn_no_out_proj(**rest)
    close(F.linear(y.transpose(1, 2), a["out_proj_weight"], a["out_proj_bias"]), wanted)
    A_b = -torch.rand(8, 4)
    close(scan.bimamba_inner_fn(**as_float(a), A_b=A_b), plain_inner(a, [A_b]))


def test_inner_function_with_norms_and_given_B():
    a = inner_arguments()
    norms = torch.rand(4) + 0.5, torch.rand(4) + 0.5, torch.rand(3) + 0.5
    named = dict(zip(("b_rms_weight", "c_rms_weight", "dt_rms_weight"), norms, strict=True))
    close(scan.mamba_inner_fn(**as_float(a), **named), plain_inner(a, norms=norms))
    named["dt_rms_weight"] = torch.ones(8)  # of the channels, as FalconMamba has it
    ones = (*norms[:2], torch.ones(3))
    close(scan.mamba_inner_fn(**as_float(a), **named), plain_inner(a, norms=ones))
    a["x_proj_weight"] = a["x_proj_weight"][:7]  # dt and C only
    B = torch.randn(8, 4)
    y = scan.mamba_inner_fn(**as_float(a), B=B, C_proj_bias=torch.ones(4))
    assert y.shape == (2, 7, 6)
    assert not torch.equal(y, scan.mamba_inner_fn(**as_float(a), B=2 * B, C_proj_bias=torch.ones(4)))


def test_the_compiled_modules():
    a = {k: t for k, t in make_scan(b=2, d=4, l=9, n=3).items() if k in NAMES}
    leaves = {k: t.detach().requires_grad_() for k, t in a.items()}
    y, last = selective_scan(**leaves, delta_softplus=True, return_last_state=True)
    grad = torch.randn_like(y)
    wanted = dict(zip(leaves, torch.autograd.grad(y, leaves.values(), grad), strict=True))
    given = [a[k] for k in NAMES]
    out, x, gated = extensions.scan_fwd(*given, True)
    close(gated, y)
    close(out * F.silu(a["z"]), y)
    close(x[:, :, -1, 1::2], last)
    dz = torch.zeros_like(a["z"])
    found = extensions.scan_bwd(*given, grad, x, out, dz, True, True)
    order = ("u", "delta", "A", "B", "C", "D", "delta_bias", "z")
    for name, got in zip(order, found, strict=False):
        close(got, wanted[name])
    assert found[7] is dz
    close(found[8], y)
    plain = [a[k] for k in ("u", "delta", "A", "B", "C", "D", "delta_bias")]
    y, x = extensions.oflex_fwd(*plain, True, 1, True)
    close(y, out)
    assert len(extensions.oflex_bwd(*plain, grad, x, True, 1)) == 7


def test_the_compiled_convolution_of_every_version():
    x, weight, bias, start = torch.randn(2, 3, 9), torch.randn(3, 4), torch.randn(3), torch.randn(2, 3, 3)
    grad, leaves = torch.randn(2, 3, 9), [t.detach().requires_grad_() for t in (x, weight, bias, start)]
    plain, started = silu_conv(*leaves[:3]), silu_conv(*leaves)
    final, out = torch.zeros(2, 3, 3), torch.zeros_like(x)
    for rest in ((True,), (None, True), (None, None, final, True), (None, None, out, final, True)):
        close(extensions.causal_conv1d_fwd(x, weight, bias, *rest), plain)
    close(out, plain)
    close(final, x[..., -3:])
    wanted = torch.autograd.grad(plain, leaves[:3], grad)
    for rest in ((None, True), (None, None, True)):
        for got, other in zip(
            extensions.causal_conv1d_bwd(x, weight, bias, grad, *rest), wanted, strict=True
        ):
            close(got, other)
    dx, dfinal = torch.empty_like(x), torch.randn(2, 3, 3)
    final = torch.cat([leaves[3], leaves[0]], -1)[..., -3:]
    wanted = torch.autograd.grad([started, final], leaves, [grad, dfinal])
    found = extensions.causal_conv1d_bwd(x, weight, bias, grad, None, start, dfinal, dx, True, True)
    for got, other in zip(found, wanted, strict=True):
        close(got, other)
    assert found[0] is dx
    with pytest.raises(ValueError, match="arguments must be those of a version"):
        extensions.causal_conv1d_fwd(x, weight, bias, None, None, True)
