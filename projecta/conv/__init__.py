"""The causal depthwise convolution of a Mamba block, on the backend that suits the machine.

    y_t = act(bias + sum_j weight_j x_{t - k + 1 + j}),  j = 0...k - 1,  act = silu or nothing

Axes: b batch, d channels, l length, k width. Source: Gu & Dao, "Mamba: Linear-Time Sequence Modeling with
Selective State Spaces" (2023), figure 3. A backend is a module here with `unavailable`, `causal_conv` and
`causal_conv_update`, which take the arguments checked.
"""

from types import ModuleType

import torch
from torch import Tensor

from projecta._backends import require_backend, why_not
from projecta._calls import call_key
from projecta._checks import Checker
from projecta.conv import _eager

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BACKENDS = ("reference", "cpu", "triton")
WIDEST = 8  # weights of a channel that the kernels take
AUTO = {"cpu": "cpu", "cuda": "triton"}


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve each channel with its own causal filter; causal-conv1d's `causal_conv1d_fn`.

        y_t = act(bias + sum_j weight_j x_{t - k + 1 + j})        x before the sequence: initial_state or 0

    Args:
        x: input (b, d, l); float16, bfloat16, float32 or float64. Any strides: (b, l, d) memory is read and
            written as it is stored.
        weight: (d, k). bias: (d,).
        activation: "silu" (also called "swish") or None.
        initial_state: the k - 1 inputs before the first, (b, d, k - 1), or (s, d, k - 1) with `cu_seqlens`.
        return_last_state: also return the last k - 1 inputs.
        cu_seqlens: int32 (s + 1): packs s sequences into one row (b = 1), as in `projecta.selective_scan`.
        reverse: go from the last step to the first, with the bits of `causal_conv` of the flipped x. The
            initial state then stands behind the last step, and the last state is that of the first step.
        backend: "reference", "cpu" (k <= 8), "triton" (k <= 8), or "auto": "cpu" on a CPU and "triton" on an
            NVIDIA GPU; "reference" elsewhere, for a wider filter, for float64 on a GPU, and where triton
            cannot run.

    Returns:
        y, of the shape, dtype and strides of x; with `return_last_state` also the last inputs
        (b, d, k - 1), or (s, d, k - 1) if packed. Both are differentiable in every argument.

    Raises:
        ValueError: a shape or value is wrong. TypeError: a dtype is wrong. BackendUnavailable: `backend`
            cannot run here. RuntimeError: a forward-mode or second derivative, of another backend than
            "reference".

    Examples:
        >>> import torch
        >>> x = torch.arange(4.0).view(1, 1, 4)
        >>> causal_conv(x, torch.ones(1, 2), activation=None)
        tensor([[[0., 1., 3., 5.]]])
    """
    given, key = (x, weight, bias, initial_state), None
    if cu_seqlens is None and isinstance(x, Tensor) and not torch.compiler.is_compiling():
        key = call_key(given, (activation, reverse, backend))
        y = None if key is None else _eager.repeat(key, given)
        if y is not None:
            return y if not return_last_state else (y, _last(x, weight, initial_state, None, reverse))
    check = Checker("causal_conv", "x")
    check.tensor("x", x)
    check.dtype("x", x, FLOATS)
    check.that(x.dim() == 3, "x", "have shape (b, d, l)", tuple(x.shape))
    b, d, _ = x.shape
    _check_filter(check, weight, bias, activation, d, x.device)
    kept, sequences, axes = weight.shape[1] - 1, b, "(b, d, k - 1)"
    if cu_seqlens is not None:
        check.that(b == 1, "x", "have b = 1 with cu_seqlens", b)
        sequences, axes = check.bounds("cu_seqlens", cu_seqlens, x.device, x.shape[2]), "(s, d, k - 1)"
    if initial_state is not None:
        check.tensor("initial_state", initial_state, x.device)
        check.dtype("initial_state", initial_state, FLOATS)
        check.shape("initial_state", initial_state, (sequences, d, kept), axes)
    module = _choose(check, backend, x, weight)
    if reverse and cu_seqlens is not None:  # mirrored, the last sequence is the first
        cu_seqlens = (x.shape[2] - cu_seqlens).flip(0)
        initial_state = None if initial_state is None else initial_state.flip(0)
    start = None if initial_state is None or not kept else initial_state.contiguous()
    y = None
    if key is not None and start is initial_state:
        y = _eager.first(key, module, given, activation is not None, reverse)
    if y is None:
        y = module.causal_conv(x, weight, bias, activation is not None, start, cu_seqlens, reverse)
    return y if not return_last_state else (y, _last(x, weight, initial_state, cu_seqlens, reverse))


def _last(
    x: Tensor, weight: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, reverse: bool
) -> Tensor:
    """The last inputs of each sequence; with `reverse`, those of mirrored ones."""
    kept, packed = weight.shape[1] - 1, cu_seqlens is not None
    if not reverse:
        return last_inputs(x, kept, initial_state, cu_seqlens)
    ends = x if packed else x[..., :kept]
    last = last_inputs(ends.flip(-1), kept, initial_state, cu_seqlens)
    return last.flip(0) if packed else last


def causal_conv_update(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    backend: str = "auto",
) -> Tensor:
    """Convolve one more step; causal-conv1d's `causal_conv1d_update`.

    Args:
        x: input (b, d). state: the last m >= k - 1 inputs (b, d, m), overwritten with those up to x.
        weight: (d, k). bias: (d,). activation: "silu" (also called "swish") or None.
        backend: as in `causal_conv`.

    Returns:
        y (b, d), of the dtype of x.

    Raises:
        ValueError, TypeError, BackendUnavailable: as `causal_conv`.

    Examples:
        >>> import torch
        >>> state = torch.tensor([[[1.0, 2.0]]])
        >>> causal_conv_update(torch.tensor([[3.0]]), state, torch.ones(1, 3), activation=None), state
        (tensor([[6.]]), tensor([[[2., 3.]]]))
    """
    check = Checker("causal_conv_update", "x")
    check.tensor("x", x)
    check.dtype("x", x, FLOATS)
    check.that(x.dim() == 2, "x", "have shape (b, d)", tuple(x.shape))
    b, d = x.shape
    _check_filter(check, weight, bias, activation, d, x.device)
    check.tensor("state", state, x.device)
    check.dtype("state", state, FLOATS)
    least = weight.shape[1] - 1
    check.that(
        state.dim() == 3 and state.shape[:2] == (b, d) and state.shape[2] >= least, "state",
        f"have shape (b, d, m) = {(b, d)}, m >= k - 1 = {least}", tuple(state.shape),
    )  # fmt: skip
    module = _choose(check, backend, x, weight)
    return module.causal_conv_update(x, state, weight, bias, activation is not None)


def last_inputs(x: Tensor, kept: int, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The last `kept` inputs of each sequence, those of `initial_state` (or 0) before its first."""
    b, d, l = x.shape
    if cu_seqlens is None:
        before = x.new_zeros(b, d, kept) if initial_state is None else initial_state.to(x.dtype)
        window = torch.cat([before, x[..., max(0, l - kept) :]], -1)
        return window[..., window.shape[-1] - kept :].contiguous()
    sequences = len(cu_seqlens) - 1
    before = x.new_zeros(sequences, d, kept) if initial_state is None else initial_state.to(x.dtype)
    starts, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    t = ends - kept + torch.arange(kept, device=x.device)  # (s, kept)
    padded = torch.cat([x[0], x.new_zeros(d, 1)], -1)
    inside = padded[:, torch.where(t < starts, l, t)].transpose(0, 1)
    earlier = (t - starts + kept).clamp(0, max(kept - 1, 0))[:, None].expand(sequences, d, kept)
    return torch.where((t < starts)[:, None], before.gather(2, earlier), inside)


def _check_filter(check: Checker, weight, bias, activation, d, device) -> None:
    check.tensor("weight", weight, device)
    check.dtype("weight", weight, FLOATS)
    fits = weight.dim() == 2 and weight.shape[0] == d and weight.shape[1] > 0
    check.that(fits, "weight", f"have shape (d, k) with d = {d}, k > 0", tuple(weight.shape))
    if bias is not None:
        check.tensor("bias", bias, device)
        check.dtype("bias", bias, FLOATS)
        check.shape("bias", bias, (d,), "(d,)")
    check.one_of("activation", activation, ("silu", "swish", None))


def _choose(check: Checker, backend: str, x: Tensor, weight: Tensor) -> ModuleType:
    check.one_of("backend", backend, ("auto", *BACKENDS))
    name, width = backend, weight.shape[1]
    if backend == "auto":
        name = AUTO.get(x.device.type, "reference")
        if width > WIDEST or (name == "triton" and (x.dtype == torch.float64 or why_not(__name__, name))):
            name = "reference"
    module = require_backend(check, __name__, name, x.device.type)
    if name != "reference":
        check.that(width <= WIDEST, "weight", f"have k <= {WIDEST} for backend {name!r}", width)
    if name == "triton":
        check.dtype("x", x, FLOATS[:3])
    return module
