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

import math
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projecta import parallel
from projecta._backends import device_of, require_backend, why_not
from projecta._checks import Checker
from projecta.conv import causal_conv, causal_conv_update, last_inputs
from projecta.mrss import Bands, MrssState, mrss_scan, mrss_update
from projecta.scan import BACKENDS, selective_scan, selective_state_update


def check_backend(check: Checker, backend: str) -> None:
    check.one_of("backend", backend, ("auto", *BACKENDS))
    if backend != "auto":
        require_backend(check, "projecta.scan", backend)


def check_piece(
    check: Checker, where: parallel.Context, bands: Bands | None, cu_seqlens: Tensor | None = None
) -> None:
    """Refuse what a layer within `parallel.context` cannot do."""
    check.that(bands is None, "mrss", "be None within parallel.context", bands)
    plain = cu_seqlens is None or where.schedule == "pass"
    check.that(plain, "cu_seqlens", 'be None with schedule "gather"', "a packed row", 'Take "pass".')


def draw_steps(
    d: int, rank: int, least: float, most: float, floor: float = 1e-4, kind: str = "random",
    scale: float = 1.0, device: Any = None, ordered: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weight (d, rank) and bias (d,) of dt_proj at initialisation: steps log-uniform from `least` to `most`.

    ordered: the largest steps come first, for MRSS.
    """
    weight = torch.full((d, rank), scale / math.sqrt(rank), device=device)
    if kind == "random":
        weight = weight * (2 * torch.rand(d, rank, device=device) - 1)
    spread = math.log(most) - math.log(least)
    steps = torch.exp(torch.rand(d, device=device) * spread + math.log(least)).clamp(min=floor)
    if ordered:
        steps = steps.sort(descending=True).values
    return weight, steps + torch.log(-torch.expm1(-steps))  # softplus's inverse


def activate(layer: Any, x: Tensor) -> Tensor:
    return layer.act(x) if hasattr(layer, "act") else F.silu(x)


def convolve(
    layer: Any, x: Tensor, before: Tensor | None, backend: str, cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> Tensor:  # fmt: skip
    """The causal depthwise convolution of x (b, l, d) and its activation; zeros, or `before`, precede x.

    `reverse`: from the last step to the first.
    """
    kept, silu = layer.conv1d.kernel_size[0] - 1, _is_silu(layer)
    start = None if before is None else before[..., before.shape[-1] - kept :]
    y: Any = causal_conv(
        x.transpose(1, 2), layer.conv1d.weight.squeeze(1), layer.conv1d.bias,
        activation="silu" if silu else None, initial_state=start, cu_seqlens=cu_seqlens,
        backend=_conv_backend(backend), reverse=reverse,
    )  # fmt: skip
    y = y.transpose(1, 2)
    return y if silu else activate(layer, y)


def _conv_backend(backend: str) -> str:
    """The convolution's backend beside a scan's: plain PyTorch, with every derivative, beside the same."""
    return "reference" if backend in ("reference", "vectorised") else "auto"


def _is_silu(layer: Any) -> bool:
    return type(getattr(layer, "act", None)).__name__ in ("NoneType", "SiLU", "SiLUActivation")


def runs_triton(hidden: Tensor, backend: str) -> bool:
    """Whether a layer's kernels are those of backend "triton", outside of torch.compile."""
    if torch.compiler.is_compiling() or hidden.device.type != device_of("triton"):
        return False
    return backend in ("auto", "triton") and not why_not("projecta.scan", "triton")


def fused(layer: Any, hidden: Tensor, backend: str) -> tuple[Any, Any]:
    """The module that runs a layer as one node on the GPU, and its weights; (None, None) if it cannot."""
    if not runs_triton(hidden, backend) or not _is_silu(layer):
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
    layer: Any, x: Tensor, z: Tensor, initial_state: Any, backend: str, bands: Bands | None = None,
    cu_seqlens: Tensor | None = None, reverse: bool = False,
) -> tuple[Tensor, Any]:  # fmt: skip
    """y (b, l, d) and the last state, of x and z (b, l, d); by MRSS if `bands` are given."""
    delta, bias, B, C = select(layer, x)
    u, delta, B, C, z = (t.transpose(1, 2) for t in (x, delta, B, C, z))
    A, D = -torch.exp(as_wide(layer.A_log)), as_wide(layer.D)
    options: dict[str, Any] = {"initial_state": initial_state, "backend": backend}
    if bands is None:
        options |= {"cu_seqlens": cu_seqlens, "reverse": reverse}
        y, last_state = selective_scan(u, delta, A, B, C, D, z, bias, True, True, **options)
    else:
        y, last_state = mrss_scan(u, delta, A, B, C, D, z, bias, True, True, bands=bands, **options)
    return y.transpose(1, 2), last_state


def run(
    layer: Any, hidden: Tensor, backend: str, conv: Any = None, ssm: Any = None, *, keep: bool = False,
    bands: Bands | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Any, Any]:  # fmt: skip
    """The output of hidden (b, l, d_model), and the states after it: conv only if `keep`.

    conv (b, d, d_conv - 1), ssm (b, d, n): the states before, or None; (s, ...) for s packed sequences.
    """
    kept = layer.conv1d.kernel_size[0] - 1
    module, weights = None, None
    if bands is None and cu_seqlens is None:
        module, weights = fused(layer, hidden, backend)
    if module is not None:
        if not keep:
            return module.run(hidden, weights, conv, ssm)[0], None, None
        output, last, *x = module.run(hidden, weights, conv, ssm, min(kept, hidden.shape[1]))
        x = x[0] if x else hidden.new_empty(len(hidden), layer.A_log.shape[0], 0)
        return output, x if x.shape[-1] == kept else last_inputs(x, kept, conv, None), last
    x, z = layer.in_proj(hidden).chunk(2, -1)
    u = convolve(layer, x, conv, backend, cu_seqlens)
    y, last = scan_layer(layer, u, z, ssm, backend, bands, cu_seqlens)
    after = last_inputs(x.transpose(1, 2), kept, conv, cu_seqlens) if keep else None
    return layer.out_proj(y), after, last


class _Reverse:
    """The reverse direction of a layer, under the names of a layer's own parts."""

    def __init__(self, layer: Any):
        self.conv1d, self.x_proj, self.dt_proj = layer.conv1d_b, layer.x_proj_b, layer.dt_proj_b
        self.A_log, self.D = layer.A_b_log, layer.D_b
        own = {"conv1d": self.conv1d, "x_proj": self.x_proj, "dt_proj": self.dt_proj}
        self._modules = {"in_proj": layer.in_proj, "out_proj": layer.out_proj} | own
        self._parameters = {"A_log": self.A_log, "D": self.D}


def run_both_ways(
    layer: Any, hidden: Tensor, backend: str, cu_seqlens: Tensor | None = None, halve: bool = False
) -> Tensor:
    """The output of hidden (b, l, d_model): the sum, or mean, of the gated scans in both directions."""
    ways = ((layer, False), (_Reverse(layer), True))
    if cu_seqlens is None:
        nodes = [fused(way, hidden, backend) for way, _ in ways]
        if all(module is not None for module, _ in nodes):
            outputs = [
                module.run(hidden, weights._replace(out_bias=None), reverse=reverse)[0]
                for (module, weights), (_, reverse) in zip(nodes, ways, strict=True)
            ]
            total, bias = outputs[0] + outputs[1], nodes[0][1].out_bias
            total = total / 2 if halve else total
            return total if bias is None else total + bias
    x, z = layer.in_proj(hidden).chunk(2, -1)
    parts = []
    for way, reverse in ways:
        u = convolve(way, x, None, backend, cu_seqlens, reverse)
        parts.append(scan_layer(way, u, z, None, backend, None, cu_seqlens, reverse)[0])
    total = parts[0] + parts[1]
    return layer.out_proj(total / 2 if halve else total)


def run_piece(
    layer: Any, hidden: Tensor, where: parallel.Context, backend: str, state: Any = (None, None),
    cu_seqlens: Tensor | None = None, drop: bool = True,
) -> tuple[Tensor, Any, Any]:  # fmt: skip
    """As `run`, for this rank's piece of a sequence; the first rank takes `state`. See `projecta.parallel`.

    cu_seqlens: of the piece, as `parallel.split_packed` gives it. drop: the caller does not need the states.
    """
    (d, n), kept = layer.A_log.shape, layer.conv1d.kernel_size[0] - 1
    where.check_alike(hidden, kept if where.schedule == "gather" else 0)
    if where.schedule == "gather":
        return _run_gathered(layer, hidden, where, backend, state, kept)
    b = len(hidden)
    if drop and cu_seqlens is None and hidden.shape[1] >= kept > 0:
        module, weights = fused(layer, hidden, backend)
        if module is not None:  # it sends and receives while it computes
            return module.run(hidden, weights, *state, where=where)[0], None, None
    found = parallel.received(where, hidden.device, (b, d, kept), (b, d, n))
    if found is not None:
        state = found[0].to(hidden.dtype), found[1]
    own = cu_seqlens
    if cu_seqlens is not None:
        own = cu_seqlens.clamp(min=0)
        if found is not None:  # only the first sequence goes on from the rank before, if it does
            goes_on = cu_seqlens[0] < 0
            rest = (0, 0, 0, 0, 0, len(cu_seqlens) - 2)
            state = tuple(F.pad(torch.where(goes_on, t, 0), rest) for t in state)
    output, conv, ssm = run(layer, hidden, backend, *state, keep=True, cu_seqlens=own)
    return parallel.hand_on(where, output, conv[-b:].float(), ssm[-b:].float()), conv, ssm


def _run_gathered(
    layer: Any, hidden: Tensor, where: parallel.Context, backend: str, state: Any, kept: int
) -> tuple[Tensor, Any, Any]:
    x, z = layer.in_proj(hidden).chunk(2, -1)
    conv, ssm = state if where.rank == 0 else (None, None)
    after = last_inputs(x.transpose(1, 2), kept, conv, None)
    before = parallel.from_before(where, after)
    u = convolve(layer, x, before if conv is None else before + conv, backend)
    delta, bias, B, C = select(layer, u)
    A, D, span = -torch.exp(as_wide(layer.A_log)), as_wide(layer.D), parallel.sum_of_steps(delta, bias)
    u, delta, B, C, z = (t.transpose(1, 2) for t in (u, delta, B, C, z))
    options: dict[str, Any] = {"delta_softplus": True, "return_last_state": True, "backend": backend}
    end = selective_scan(u, delta, A, B, C, None, None, bias, initial_state=ssm, **options)[1]
    start = parallel.folded_state(where, end, span, A)
    start = start if ssm is None else start + ssm
    y, last = selective_scan(u, delta, A, B, C, D, z, bias, initial_state=start, **options)
    return layer.out_proj(y.transpose(1, 2)), after, last


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
