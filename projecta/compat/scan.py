"""mamba-ssm's scan functions on `projecta.selective_scan`, `selective_state_update` and `causal_conv`."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from projecta import scan
from projecta.compat.norm import layer_norm_fn
from projecta.conv import causal_conv
from projecta.scan import selective_scan


def selective_scan_fn(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
    return_last_state: bool = False, *, backend: str = "auto",
) -> Any:  # fmt: skip
    """See `projecta.selective_scan`. The last state is differentiable, which mamba-ssm's is not."""
    return selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, backend=backend
    )


selective_scan_ref = partial(selective_scan_fn, backend="reference")


def selective_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None, *, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """See `projecta.selective_state_update`."""
    return scan.selective_state_update(
        state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, backend=backend
    )


selective_state_update_ref = partial(selective_state_update, backend="reference")


def rms_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-6, is_rms_norm: bool = True
):
    """The RMS norm over the last axis, statistics in float32."""
    return layer_norm_fn(x, weight, bias, eps=eps, is_rms_norm=is_rms_norm)


def _inner(
    xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor,
    delta_proj_weight: Tensor, A: Tensor, B: Any, C: Any, D: Tensor | None, delta_bias: Tensor | None,
    B_proj_bias: Tensor | None, C_proj_bias: Tensor | None, delta_softplus: bool, backend: str,
    A_reverse: Tensor | None = None, norms: tuple = (None, None, None), eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """The gated output (b, d, l) between in_proj and out_proj; with `A_reverse` the sum of both directions.

    norms: RMS norm weights of B, C and dt. dt's norm comes before its projection, as in transformers; weights
    (d,) of it scale delta.
    """
    x, z = xz.chunk(2, 1)
    plain = "reference" if backend == "reference" else "auto"
    u: Any = causal_conv(x, conv1d_weight.squeeze(1), conv1d_bias, backend=plain)
    rank, n = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    dt, own_B, own_C = F.linear(u.transpose(1, 2), x_proj_weight).split(
        [rank, n * (B is None), n * (C is None)], -1
    )  # fmt: skip
    steady = B is not None, C is not None
    for i, (own, bias) in enumerate(((own_B, B_proj_bias), (own_C, C_proj_bias))):
        if steady[i]:
            continue
        own = own if bias is None else own + bias.to(own.dtype)
        own = own if norms[i] is None else rms_norm_forward(own, norms[i], None, eps)
        # complex: pairs of real and imaginary parts along the states become pairs along time
        own = own.unflatten(-1, (-1, 2 if A.is_complex() else 1)).transpose(1, 2).flatten(2)
        B, C = (own, C) if i == 0 else (B, own)
    scale = norms[2]
    if scale is not None:
        own = scale if len(scale) == rank else torch.ones_like(scale[:rank])
        dt = rms_norm_forward(dt, own, None, eps)
    delta = F.linear(dt, delta_proj_weight).transpose(1, 2)
    if scale is not None and len(scale) != rank:
        delta = delta * scale.to(delta.dtype)[:, None]
    y: Any = selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, backend=backend)
    if A_reverse is not None:
        y = y + selective_scan(
            u, delta, A_reverse, B, C, D, z, delta_bias, delta_softplus, backend=backend, reverse=True
        )
    return y


def mamba_inner_fn(
    xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor,
    delta_proj_weight: Tensor, out_proj_weight: Tensor, out_proj_bias: Tensor | None, A: Tensor,
    B: Tensor | None = None, C: Tensor | None = None, D: Tensor | None = None,
    delta_bias: Tensor | None = None, B_proj_bias: Tensor | None = None, C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True, checkpoint_lvl: int = 1, b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None, dt_rms_weight: Tensor | None = None, b_c_dt_rms_eps: float = 1e-6,
    *, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """The part of a block after in_proj: xz (b, 2 d, l) to (b, l, d_model).

    B and C come from x_proj unless given as (d, n). `checkpoint_lvl` changes nothing. `dt_rms_weight` (r,)
    norms dt before its projection, as transformers' own path does; mamba-ssm norms it after. As (d,) it
    scales the projection of the normed dt (FalconMamba's are ones).
    """
    y = _inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, B_proj_bias,
        C_proj_bias, delta_softplus, backend, None, (b_rms_weight, c_rms_weight, dt_rms_weight),
        b_c_dt_rms_eps,
    )  # fmt: skip
    return F.linear(y.transpose(1, 2), out_proj_weight, _like(out_proj_bias, out_proj_weight))


mamba_inner_ref = partial(mamba_inner_fn, backend="reference")


def mamba_inner_fn_no_out_proj(
    xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor,
    delta_proj_weight: Tensor, A: Tensor, B: Tensor | None = None, C: Tensor | None = None,
    D: Tensor | None = None, delta_bias: Tensor | None = None, B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None, delta_softplus: bool = True, checkpoint_lvl: int = 1,
    *, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """`mamba_inner_fn` without out_proj: (b, d, l). From Vision Mamba."""
    return _inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, B_proj_bias,
        C_proj_bias, delta_softplus, backend,
    )  # fmt: skip


def bimamba_inner_fn(
    xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor,
    delta_proj_weight: Tensor, out_proj_weight: Tensor, out_proj_bias: Tensor | None, A: Tensor, A_b: Tensor,
    B: Tensor | None = None, C: Tensor | None = None, D: Tensor | None = None,
    delta_bias: Tensor | None = None, B_proj_bias: Tensor | None = None, C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True, checkpoint_lvl: int = 1, *, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """`mamba_inner_fn` with the sum of the scans in both directions; A_b is the reverse one's A."""
    y = _inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, B_proj_bias,
        C_proj_bias, delta_softplus, backend, A_b,
    )  # fmt: skip
    return F.linear(y.transpose(1, 2), out_proj_weight, _like(out_proj_bias, out_proj_weight))


bimamba_inner_ref = partial(bimamba_inner_fn, backend="reference")


def _like(t: Tensor | None, other: Tensor) -> Tensor | None:
    return None if t is None else t.to(other.dtype)
