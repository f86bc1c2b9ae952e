"""The compiled modules that older code calls directly: selective_scan_cuda, its oflex, causal_conv1d_cuda."""

from typing import Any

import torch
from torch import Tensor

from projecta._checks import Checker
from projecta.compat.conv import causal_conv1d_fn
from projecta.compat.conv import causal_conv1d_update as update
from projecta.scan import selective_scan


def scan_fwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool,
) -> list[Tensor]:  # fmt: skip
    """selective_scan_cuda.fwd: y before the gate, x, and with z the gated y.

    x (b, d, 1, 2 n) holds the decay over the whole sequence and the last state, alternating.
    """
    with torch.no_grad():
        y, last = selective_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus, True)
        steps = delta.float() if delta_bias is None else delta.float() + delta_bias.float()[:, None]
        steps = torch.nn.functional.softplus(steps) if delta_softplus else steps
        decay = torch.exp(steps.sum(-1)[..., None] * A)
        x = torch.stack([decay, last], -1).flatten(-2)[:, :, None]
        return [y, x] if z is None else [y, x, y * torch.nn.functional.silu(z.float()).to(y.dtype)]


def scan_bwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, dout: Tensor, x: Tensor | None, out: Tensor | None, dz: Tensor | None,
    delta_softplus: bool, recompute_out_z: bool,
) -> list[Tensor | None]:  # fmt: skip
    """selective_scan_cuda.bwd: gradients of u, delta, A, B, C, D, delta_bias; then dz, then the gated y.

    dz is also written to `dz` if given. x and out are not needed.
    """
    given = (u, delta, A, B, C, D, z, delta_bias)
    leaves: list[Any] = [None if t is None else t.detach().requires_grad_() for t in given]
    with torch.enable_grad():
        first, rest = leaves[:5], leaves[5:]
        y: Any = selective_scan(*first, *rest, delta_softplus)  # type: ignore[arg-type, call-arg, misc]
    present = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(y, present, dout.to(y.dtype)))
    grads = [None if t is None else next(found) for t in leaves]
    result = [*grads[:6], grads[7]]
    if z is not None:
        result.append(grads[6] if dz is None else dz.copy_(grads[6]))  # type: ignore[arg-type]
        if recompute_out_z:
            result.append(y.detach())
    return result


def oflex_fwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    delta_softplus: bool, nrows: int = 1, out_float: bool = True,
) -> list[Tensor]:  # fmt: skip
    """VMamba's selective_scan_cuda_oflex.fwd: y (float32 with `out_float`) and x. nrows changes nothing."""
    wide = u.float() if out_float else u
    return scan_fwd(wide, delta, A, B, C, D, None, delta_bias, delta_softplus)


def oflex_bwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    dout: Tensor, x: Tensor | None, delta_softplus: bool, nrows: int = 1,
) -> list[Tensor | None]:  # fmt: skip
    """VMamba's selective_scan_cuda_oflex.bwd: gradients of u, delta, A, B, C, D, delta_bias."""
    return scan_bwd(
        u, delta, A, B, C, D, None, delta_bias, dout, x, None, None, delta_softplus, False
    )  # fmt: skip


def causal_conv1d_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """causal_conv1d_cuda.causal_conv1d_fwd of all versions: y, also written to `out` where it is given.

    rest, by version: (silu), (seq_idx, silu), (seq_idx, initial, final, silu), (seq_idx, initial, out, final,
    silu).
    """
    *rest, silu = rest  # type: ignore[assignment]
    seq_idx, initial = (*rest[:2], None, None)[:2]
    out, final = (rest[2], rest[3]) if len(rest) == 4 else (None, rest[2] if len(rest) == 3 else None)
    Checker("causal_conv1d_fwd").that(
        len(rest) in (0, 1, 3, 4), "arguments", "be those of a version", len(rest) + 4
    )
    with torch.no_grad():
        y = causal_conv1d_fn(
            x, weight, bias, seq_idx, initial, False, final, activation="silu" if silu else None
        )
        return y if out is None else out.copy_(y)


def causal_conv1d_bwd(x: Tensor, weight: Tensor, bias: Tensor | None, dout: Tensor, *rest: Any) -> list[Any]:
    """causal_conv1d_cuda.causal_conv1d_bwd: gradients of x, weight and bias; in newer versions of the start.

    rest, by version: (dx, silu), (seq_idx, dx, silu), (seq_idx, initial, dfinal, dx, return_dinitial, silu).
    dx is also written to `dx` where it is given.
    """
    *rest, silu = rest  # type: ignore[assignment]
    Checker("causal_conv1d_bwd").that(
        len(rest) in (1, 2, 5), "arguments", "be those of a version", len(rest) + 5
    )
    seq_idx, initial, dfinal, dx = {
        1: lambda: (None, None, None, rest[0]),
        2: lambda: (rest[0], None, None, rest[1]),
        5: lambda: tuple(rest[:4]),
    }[len(rest)]()
    leaves: list[Any] = [
        None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, initial)
    ]
    with torch.enable_grad():
        found = causal_conv1d_fn(
            leaves[0], leaves[1], leaves[2], seq_idx, leaves[3], activation="silu" if silu else None,
            return_final_states=dfinal is not None,
        )  # fmt: skip
    present = [t for t in leaves if t is not None]
    each = iter(torch.autograd.grad(found, present, dout if dfinal is None else [dout, dfinal]))
    grads = [None if t is None else next(each) for t in leaves]
    grads[0] = grads[0] if dx is None else dx.copy_(grads[0])
    return grads if len(rest) == 5 else grads[:3]


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool,
    cache_seqlens: Tensor | None = None, conv_state_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """causal_conv1d_cuda.causal_conv1d_update; see `causal_conv1d_update` of the interface."""
    return update(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices)
