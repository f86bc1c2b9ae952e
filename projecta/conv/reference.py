"""The causal depthwise convolution in plain PyTorch: the judge of the other backends, on any device.

Differentiable any number of times, in every mode.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def unavailable() -> str:
    """Why this backend cannot run; "" when it can."""
    return ""


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, start: Tensor | None, bounds: Tensor | None,
    reverse: bool = False,
) -> Tensor:  # fmt: skip
    """The arguments are those of `projecta.causal_conv`, checked; start (b, d, width - 1).

    reverse: start and bounds are those of the flipped x.
    """
    if reverse:
        return causal_conv(x.flip(-1), weight, bias, silu, start, bounds).flip(-1)
    if bounds is not None:
        ends = bounds.tolist()
        pieces = [
            causal_conv(
                x[..., i:j], weight, bias, silu, None if start is None else start[k : k + 1], None
            )
            for k, (i, j) in enumerate(itertools.pairwise(ends))
        ]  # fmt: skip
        return torch.cat([x[..., :0], *pieces], -1)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    b, d, l = x.shape
    width = weight.shape[1]
    before = x.new_zeros(b, d, width - 1, dtype=wide) if start is None else start.to(wide)
    padded, taps = torch.cat([before, x.to(wide)], -1), weight.to(wide)
    y = torch.zeros(b, d, l, dtype=wide, device=x.device)
    for j in range(width):
        y = y + taps[:, j, None] * padded[..., j : j + l]
    if bias is not None:
        y = y + bias.to(wide)[:, None]
    return (F.silu(y) if silu else y).to(x.dtype)


def start_gradient(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, start: Tensor, bounds: Tensor | None,
    silu: bool,
) -> Tensor:  # fmt: skip
    """The gradient of `start`: only the first width - 1 outputs of a sequence depend on it."""
    kept = weight.shape[1] - 1
    if bounds is None:
        first_x, first_grad = x[..., :kept], grad_y[..., :kept]
    else:
        t = bounds[:-1, None] + torch.arange(kept, device=x.device)
        inside = t < bounds[1:, None]
        at = torch.where(inside, t, 0).long()
        first_x, first_grad = (
            torch.where(inside[:, None], s[0][:, at].transpose(0, 1), 0) for s in (x, grad_y)
        )  # (s, d, width - 1)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    first_grad, taps = first_grad.to(wide), weight.to(wide)
    if silu:
        value = causal_conv(first_x.to(wide), weight, bias, False, start, None)
        open = torch.sigmoid(value)
        first_grad = first_grad * open * (1 + value * (1 - open))
    grad = torch.zeros_like(start, dtype=wide)
    for i in range(first_x.shape[2]):  # column i + j of start meets tap j at step i
        grad[..., i:] += taps[:, : kept - i] * first_grad[..., i, None]
    return grad.to(start.dtype)


def causal_conv_update(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """One step: y (b, d) of x (b, d); `state` (b, d, width - 1 or more) is overwritten."""
    width, wide = weight.shape[1], torch.float64 if x.dtype == torch.float64 else torch.float32
    window = torch.cat([state, x[..., None].to(state.dtype)], -1)
    y = (window[..., window.shape[-1] - width :].to(wide) * weight.to(wide)).sum(-1)
    if bias is not None:
        y = y + bias.to(wide)
    with torch.no_grad():
        state.copy_(window[..., 1:])
    return (F.silu(y) if silu else y).to(x.dtype)
