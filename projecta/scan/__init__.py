"""Mamba's selective scan, on the backend that suits the machine.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t          y_t = C_t h_t + D u_t,  gated by silu(z_t)

Axes: b batch, l length, d channels (d_inner), n state (d_state), g groups of channels that share B and C.
u delta z (b, d, l): input, step size, gate.  A (d, n): decay rates, negative.  B C: input and output weights.
D delta_bias (d,): skip weight, bias of the step size.  h (b, d, n): the state.
Source: Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), section 3,
algorithm 2.

A backend is a module or a folder here with `unavailable`, `selective_scan` and `selective_state_update`.
The last two take checked arguments in canonical form: A in the dtype of the state (float32, float64 if u is,
or the complex type of either), B and C as (d, n) or (b, g, n, l), complex if A is.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from projecta._backends import BackendUnavailable as BackendUnavailable
from projecta._backends import require_backend, why_not
from projecta._calls import call_key
from projecta._checks import Checker
from projecta.scan import _eager
from projecta.scan._arguments import canonical_arguments, check_step, state_dtype
from projecta.scan._operator import Inputs
from projecta.scan.pool import blank_rows, read_rows, write_rows

SAVE_EVERY = (8, 16, 32)
BACKENDS = ("reference", "vectorised", "cpu", "triton")
# Choice of "auto" by device type; on others "vectorised", as on a GPU for float64, complex A, or no triton.
AUTO = {"cpu": "cpu", "cuda": "triton"}


def available_backends() -> dict[str, str]:
    """List every backend with the reason why it cannot run here; "" means that it can.

    Examples:
        >>> available_backends()["vectorised"]
        ''
    """
    return {name: why_not(__name__, name) for name in BACKENDS}


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    save_every: int = 8,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan a sequence with input-dependent steps; positional arguments as in mamba-ssm's `selective_scan_fn`.

        delta = softplus(delta + delta_bias)                      softplus only if `delta_softplus`
        h_t   = exp(delta_t A) h_{t-1} + delta_t B_t u_t          h_0 = initial_state or 0
        y_t   = (C_t h_t + D u_t) silu(z_t)                       2 Re(C_t h_t) if A is complex

    Args:
        u: input (b, d, l); float16, bfloat16, float32 or float64. Any strides.
        delta: step size (b, d, l), of any of these types.
        A: decay rates (d, n), float32 or complex64 (float64 or complex128 are rounded to these unless u is
            float64); real parts are negative for decay.
        B: input weights: (d, n) constant, (b, n, l), or (b, g, n, l) with g dividing d. Complex A: constant B
            is complex, and B over time is complex or has 2 l interleaved real and imaginary parts.
        C: output weights, as B.
        D: skip weight (d,).
        z: gate (b, d, l).
        delta_bias: (d,).
        delta_softplus: apply softplus to the biased step size.
        return_last_state: also return h after the last step.
        initial_state: (b, d, n), or (s, d, n) with `cu_seqlens`; differentiable.
        cu_seqlens: int32 (s + 1): packs s sequences into one row (b = 1); sequence i is
            cu_seqlens[i]...cu_seqlens[i + 1], and each starts from its own state. The values are checked on
            the CPU only, where reading them is free.
        save_every: steps between the states that backend "triton" saves if gradients are needed: 8, 16 or 32.
            More steps take less memory and more time. The other backends ignore it. Under
            `torch.utils.checkpoint` only one layer's states exist at a time: take 8.
        reverse: scan from the last step to the first, with the bits of `selective_scan` of flipped tensors.
            `initial_state` then stands behind the last step, and the last state is that of the first step.
        backend: one of `available_backends()`, or "auto": "cpu" on a CPU; "triton" on an NVIDIA GPU, but
            "vectorised" if triton cannot run there, u is float64 or A is complex; "vectorised" elsewhere.
            "triton" computes with delta and z in float32.

    Returns:
        y (b, d, l) in u's dtype; with `return_last_state` also the last state (b, d, n), or (s, d, n) if
        packed, in float32 (float64 if u is; complex if A is). Unlike mamba-ssm's, the last state is
        differentiable.

    Raises:
        ValueError: a shape or value is wrong. TypeError: a dtype is wrong. BackendUnavailable: `backend`
            cannot run here. RuntimeError: a forward-mode or second derivative, of another backend than
            "reference".

    Examples:
        >>> import torch
        >>> u, delta = torch.ones(1, 2, 3), torch.ones(1, 2, 3)
        >>> A, B, C = -torch.ones(2, 1), torch.ones(1, 1, 3), torch.ones(1, 1, 3)
        >>> selective_scan(u, delta, A, B, C)[0, 0]
        tensor([1.0000, 1.3679, 1.5032])
    """
    given = u, delta, A, B, C, D, z, delta_bias, initial_state
    y, last_state = _scan(given, bool(delta_softplus), cu_seqlens, save_every, backend, reverse)
    return (y, last_state) if return_last_state else y


def _scan(
    given: tuple, softplus: bool, cu_seqlens: Tensor | None, save_every: int, backend: str, reverse: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and the last state: a call as an earlier one was, or checks, a backend and its operator."""
    u, delta, A, B, C, D, z, delta_bias, initial_state = given
    key = None
    if cu_seqlens is None and isinstance(u, Tensor) and not torch.compiler.is_compiling():
        key = call_key(given, (softplus, save_every, reverse, backend))
        found = None if key is None else _eager.repeat(key, given)
        if found is not None:
            return found
    check = Checker("selective_scan")
    A, B, C, initial_state = canonical_arguments(
        check, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens
    )  # fmt: skip
    check.one_of("save_every", save_every, SAVE_EVERY)
    module = choose_backend(check, backend, u, A.dtype)
    canonical = Inputs(u, delta, A, B, C, D, z, delta_bias, initial_state)
    if key is not None:
        found = _eager.first(key, module, given, canonical, softplus, reverse)
        if found is not None:
            return found
    if reverse:
        return _reversed(module, canonical[:9], softplus, cu_seqlens, save_every)
    return module.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, softplus, initial_state, cu_seqlens, save_every
    )


def _reversed(
    module: ModuleType, tensors: tuple, softplus: bool, cu_seqlens: Any, save_every: int
) -> tuple[Tensor, Tensor]:
    """The scan from the last step to the first: in place where the backend can, else of flipped tensors."""
    u, delta, A, B, C, D, z, delta_bias, start = tensors
    packed = cu_seqlens is not None
    if packed:  # mirrored, the last sequence is the first
        cu_seqlens = (u.shape[2] - cu_seqlens).flip(0)
        start = None if start is None else start.flip(0)
    run = getattr(module, "scan_reversed", None)
    if run is None:
        u, delta, z = (None if t is None else t.flip(-1) for t in (u, delta, z))
        B, C = (t if t.dim() == 2 else t.flip(-1) for t in (B, C))
    y, last = (run or module.selective_scan)(
        u, delta, A, B, C, D, z, delta_bias, softplus, start, cu_seqlens, save_every
    )
    return y.flip(-1) if run is None else y, last.flip(0) if packed else last


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Advance the state by one step; positional arguments as in mamba-ssm's `selective_state_update`.

    The formula is that of `selective_scan` with l = 1. `state` is overwritten with the new state, so call it
    within `torch.no_grad()`; for gradients take `selective_scan` with `initial_state`.

    Args:
        state: (b, d, n), or (b, h, d, n) for h heads: then x, dt, z are (b, h, d), A (h, d, n), D, dt_bias
            (h, d).
        x: input (b, d). dt: step size (b, d). A: (d, n).
        B: (b, n), or (b, g, n) with g dividing h d. C: as B.
        D: (d,). z: (b, d). dt_bias: (d,). dt_softplus: apply softplus to the biased step.
        state_batch_indices: int32 or int64 (b,): row i of the batch reads and overwrites entry
            state_batch_indices[i] of a pool of N states, (N, d, n) or (N, h, d, n). Indices are distinct and
            in 0...N - 1, or below 0 for padding: such a row gives 0 and writes nothing. This is checked on
            the CPU only, where reading them is free.
        backend: as in `selective_scan`. "cpu" and "vectorised" take the step of "reference", and so does
            "triton" where a gradient may be asked for.

    Returns:
        y, of the shape and dtype of x.

    Raises:
        ValueError, TypeError, BackendUnavailable: as `selective_scan`.

    Examples:
        >>> import torch
        >>> state = torch.zeros(1, 2, 1)
        >>> x, A, B = torch.ones(1, 2), -torch.ones(2, 1), torch.ones(1, 1)
        >>> y = selective_state_update(state, x, x, A, B, B)
        >>> y, state[0, :, 0]
        (tensor([[1., 1.]]), tensor([1., 1.]))
    """
    check = Checker("selective_state_update")
    check_step(check, state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices)
    heads = x.dim() - 1  # axes that become channels

    def flat(t, axis=1):
        return t if t is None else t.flatten(axis, axis + heads - 1)

    def grouped(t):  # (b, g, n)
        return t[:, None] if t.dim() == 2 else t

    module = choose_backend(check, backend, x, state_dtype(x, A))
    own = state if state_batch_indices is None else read_rows(state, state_batch_indices)
    wide = flat(own).to(state_dtype(x, A))
    y = module.selective_state_update(
        wide, flat(x), flat(dt), flat(A, 0).to(wide.dtype), grouped(B), grouped(C), flat(D, 0), flat(z),
        flat(dt_bias, 0), dt_softplus
    )  # fmt: skip
    if state_batch_indices is not None:
        write_rows(state, state_batch_indices, wide.view(own.shape))
        y = blank_rows(y, state_batch_indices)
    elif wide.dtype != state.dtype or not _flattens(state):
        state.copy_(wide.view(state.shape))
    return y.view(x.shape)


def _flattens(state: Tensor) -> bool:
    """Whether a state's heads and channels flatten into one axis without a copy."""
    return state.dim() == 3 or state.stride(1) == state.shape[2] * state.stride(2)


def choose_backend(check: Checker, backend: str, u: Tensor, state: torch.dtype) -> ModuleType:
    check.one_of("backend", backend, ("auto", *BACKENDS))
    device = u.device.type
    name = backend
    if backend == "auto":
        name = AUTO.get(device, "vectorised")
        if name == "triton" and (state != torch.float32 or why_not(__name__, name)):
            name = "vectorised"
    return require_backend(check, __name__, name, device)
