"""mamba-ssm's norms: the sum with the residual and the norm in one call, statistics in float32."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def layer_norm_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None,
    x1: Tensor | None = None, weight1: Tensor | None = None, bias1: Tensor | None = None, eps: float = 1e-6,
    dropout_p: float = 0.0, rowscale: Tensor | None = None, prenorm: bool = False,
    residual_in_fp32: bool = False, is_rms_norm: bool = False, return_dropout_mask: bool = False,
) -> Any:  # fmt: skip
    """norm(dropout(x rowscale) + dropout(x1) + residual), by `weight` and also by `weight1` if given.

    Args:
        x: (..., n). weight, bias: (n,). residual, x1: of the shape of x. rowscale: (...).
        prenorm: also return the sum, in the dtype of `residual`; without one in float32 if
            `residual_in_fp32`, else in that of x.
        is_rms_norm: divide by the root mean square instead of subtracting the mean first.

    Returns:
        y in x's dtype; then y1 with `weight1`, the sum with `prenorm`, and with `return_dropout_mask` the
        masks of x and x1 (None without dropout), as one tuple.
    """
    kept = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    parts = [x.float() if rowscale is None else x.float() * rowscale.float()[..., None]]
    parts += [] if x1 is None else [x1.float()]
    masks: list[Tensor | None] = [None, None]
    for i, part in enumerate(parts):
        if dropout_p > 0:
            masks[i] = torch.rand_like(part) >= dropout_p
            parts[i] = part * masks[i] / (1 - dropout_p)  # type: ignore[operator]
    total = sum(parts[1:], parts[0])
    if residual is not None:
        total = total + residual.float()
    norm = _rms_norm if is_rms_norm else _layer_norm
    found = [norm(total, weight, bias, eps).to(x.dtype)]
    if weight1 is not None:
        found.append(norm(total, weight1, bias1, eps).to(x.dtype))
    if prenorm:
        found.append(total.to(kept))
    if return_dropout_mask:
        found += masks  # type: ignore[arg-type]
    return found[0] if len(found) == 1 else tuple(found)


def rms_norm_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None,
    x1: Tensor | None = None, weight1: Tensor | None = None, bias1: Tensor | None = None, eps: float = 1e-6,
    dropout_p: float = 0.0, rowscale: Tensor | None = None, prenorm: bool = False,
    residual_in_fp32: bool = False, return_dropout_mask: bool = False,
) -> Any:  # fmt: skip
    """`layer_norm_fn` with the root mean square."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32,
        True, return_dropout_mask,
    )  # fmt: skip


def _rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    y = F.rms_norm(x, weight.shape, weight.float(), eps)
    return y if bias is None else y + bias.float()


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight.float(), None if bias is None else bias.float(), eps)


class RMSNorm(nn.Module):
    """mamba-ssm's RMS norm; see `layer_norm_fn` for the arguments of a call."""

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, dropout_p: float = 0.0, device: Any = None,
        dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.bias: Any
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Any:
        dropout = self.drop.p if self.drop is not None and self.training else 0.0
        return rms_norm_fn(
            x, self.weight, self.bias, residual=residual, eps=self.eps, dropout_p=dropout, prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )  # fmt: skip
