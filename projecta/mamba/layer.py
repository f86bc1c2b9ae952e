"""A Mamba layer, computed from its weights: shared by `MambaBlock` and the layers of transformers.

    x, z        = in_proj(input)                        (b, l, d_inner) each
    x           = silu(causal depthwise conv(x))
    dt, B, C    = x_proj(x)                             (b, l, dt_rank), (b, l, n), (b, l, n)
    y           = selective_scan(x, dt_proj(dt), -exp(A_log), B, C, D, z)
    output      = out_proj(y)

Source: Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), section 3.4 and
figure 3. Both layer classes use the same weight names, so one set of functions runs both. Tensors stay
(b, l, d_inner) in memory; the scan takes transposed views.
"""

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projecta import parallel
from projecta._backends import device_of, require_backend, why_not
from projecta._checks import Checker
from projecta.conv import causal_conv, causal_conv_update
from projecta.mrss import Bands, MrssState, mrss_scan, mrss_update
from projecta.scan import BACKENDS, selective_scan, selective_state_update


def check_backend(check: Checker, backend: str) -> None:
    check.one_of("backend", backend, ("auto", *BACKENDS))
    if backend != "auto":
        require_backend(check, "projecta.scan", backend)


def activate(layer: Any, x: Tensor) -> Tensor:
    return layer.act(x) if hasattr(layer, "act") else F.silu(x)


def convolve(layer: Any, x: Tensor, before: Tensor | None, backend: str) -> Tensor:
    """The causal depthwise convolution of x (b, l, d) and its activation; zeros, or `before`, precede x."""
    kept, silu = layer.conv1d.kernel_size[0] - 1, _is_silu(layer)
    start = None if before is None else before[..., before.shape[-1] - kept :]
    y: Any = causal_conv(
        x.transpose(1, 2), layer.conv1d.weight.squeeze(1), layer.conv1d.bias,
        activation="silu" if silu else None, initial_state=start, backend=_conv_backend(backend),
    )  # fmt: skip
    y = y.transpose(1, 2)
    return y if silu else activate(layer, y)


def _conv_backend(backend: str) -> str:
    """The convolution's backend beside a scan's: plain PyTorch, with every derivative, beside the same."""
    return "reference" if backend in ("reference", "vectorised") else "auto"


def _is_silu(layer: Any) -> bool:
    return type(getattr(layer, "act", None)).__name__ in ("NoneType", "SiLU", "SiLUActivation")


def fused(layer: Any, hidden: Tensor, backend: str) -> tuple[Any, Any]:
    """The module that runs a layer as one node on the GPU, and its weights; (None, None) if it cannot."""
    if torch.compiler.is_compiling() or hidden.device.type != device_of("triton") or not _is_silu(layer):
        return None, None
    if backend not in ("auto", "triton") or why_not("projecta.scan", "triton"):
        return None, None
    module = import_module("projecta.mamba.fused")
    weights = module.weights_of(layer, hidden)
    return (None, None) if weights is None else (module, weights)


def select(layer: Any, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """delta (..., d) before its bias, the bias, B and C (..., n) of x (..., d)."""
    return split_projection(layer, layer.x_proj(x))


def split_projection(layer: Any, projected: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    n = layer.A_log.shape[1]
    dt, B, C = projected.tensor_split((-2 * n, -n), -1)
    if hasattr(layer, "dt_layernorm"):  # falcon_mamba, jamba
        dt, B, C = layer.dt_layernorm(dt), layer.b_layernorm(B), layer.c_layernorm(C)
    plain = type(layer.dt_proj) is nn.Linear and "forward" not in vars(layer.dt_proj)
    if plain:  # the scan adds the bias, in float32
        return F.linear(dt, layer.dt_proj.weight), layer.dt_proj.bias, B, C
    return layer.dt_proj(dt), None, B, C  # quantised, adapted or offloaded


def as_wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def scan_layer(
    layer: Any, x: Tensor, z: Tensor, initial_state: Any, backend: str, bands: Bands | None = None
) -> tuple[Tensor, Any]:
    """y (b, l, d) and the last state, of x and z (b, l, d); by MRSS if `bands` are given."""
    delta, bias, B, C = select(layer, x)
    u, delta, B, C, z = (t.transpose(1, 2) for t in (x, delta, B, C, z))
    A, D = -torch.exp(as_wide(layer.A_log)), as_wide(layer.D)
    options = {"initial_state": initial_state, "backend": backend}
    if bands is None:
        y, last_state = selective_scan(u, delta, A, B, C, D, z, bias, True, True, **options)
    else:
        y, last_state = mrss_scan(u, delta, A, B, C, D, z, bias, True, True, bands=bands, **options)
    return y.transpose(1, 2), last_state


def run_piece(layer: Any, hidden: Tensor, where: parallel.Context, backend: str) -> Tensor:
    """The output of a layer for this rank's piece (b, l, d_model) of a sequence; see `projecta.parallel`."""
    (d, n), kept = layer.A_log.shape, layer.conv1d.kernel_size[0] - 1
    conv = parallel.inputs_before(where, hidden, layer.in_proj, kept, d)
    if where.schedule == "pass":
        ssm = parallel.state_before(where, hidden, (len(hidden), d, n))
        module, weights = fused(layer, hidden, backend)
        if module is not None:
            return parallel.hand_on(where, *module.run(hidden, weights, conv, ssm))
        x, z = layer.in_proj(hidden).chunk(2, -1)
        y, last = scan_layer(layer, convolve(layer, x, conv, backend), z, ssm, backend)
        return parallel.hand_on(where, layer.out_proj(y), last)
    x, z = layer.in_proj(hidden).chunk(2, -1)
    u = convolve(layer, x, conv, backend)
    delta, bias, B, C = select(layer, u)
    A, D, span = -torch.exp(as_wide(layer.A_log)), as_wide(layer.D), parallel.sum_of_steps(delta, bias)
    u, delta, B, C, z = (t.transpose(1, 2) for t in (u, delta, B, C, z))
    end = selective_scan(u, delta, A, B, C, None, None, bias, True, True, backend=backend)[1]
    ssm = parallel.folded_state(where, end, span, A)
    whole: Any = selective_scan(u, delta, A, B, C, D, z, bias, True, initial_state=ssm, backend=backend)
    return layer.out_proj(whole.transpose(1, 2))


def step_layer(layer: Any, x: Tensor, conv: Tensor, z: Tensor, state: Any, backend: str) -> Tensor:
    """y (b, d) of one token's x and z (b, d); `conv`, the inputs before it, and `state` are overwritten."""
    silu = _is_silu(layer)
    x = causal_conv_update(
        x, conv, layer.conv1d.weight.squeeze(1), layer.conv1d.bias, activation="silu" if silu else None,
        backend=_conv_backend(backend),
    )  # fmt: skip
    x = x if silu else activate(layer, x)
    delta, bias, B, C = select(layer, x)
    A, D = -torch.exp(as_wide(layer.A_log)), as_wide(layer.D)
    if isinstance(state, MrssState):
        y, after = mrss_update(state, x, delta, A, B, C, D, z, bias, True, bands=layer.mrss)
        for t, new in zip(state, after, strict=True):
            t.copy_(new)
        return y
    return selective_state_update(state, x, delta, A, B, C, D, z, bias, True, backend=backend)
