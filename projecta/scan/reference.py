"""The recurrence in the notation of the paper. Every other backend is tested against it.

One plain loop over time. Only autograd differentiates it, so its gradients do not depend on other code of
projecta. It computes in float64 if u is float64. Shapes and symbols: see `projecta.scan`.

Departures from the paper (Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
section 3): none in the formula. B is discretised as delta * B (the simplified rule of the paper's released
code), A as exp(delta * A).

It is not fast, and it takes much memory in training.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def unavailable() -> str:
    """Why this backend cannot run; "" when it can."""
    return ""


def selective_scan(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, save_every=8
):  # fmt: skip
    """y (b, d, l) and the last state (b, d, n), or (s, d, n) when `cu_seqlens` packs s sequences.

    `save_every` changes nothing here: autograd saves every step.
    """
    if cu_seqlens is None:
        return _scan_one(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state)
    bounds = cu_seqlens.tolist()
    outputs, states = [u[..., :0]], []
    for s, (start, stop) in enumerate(itertools.pairwise(bounds)):

        def cut(t, span=slice(start, stop)):
            return t if t is None or t.dim() == 2 else t[..., span]  # a (d, n) B or C is constant in time

        state = None if initial_state is None else initial_state[s : s + 1]
        y, last = _scan_one(
            cut(u), cut(delta), A, cut(B), cut(C), D, cut(z), delta_bias, delta_softplus, state
        )
        outputs.append(y)
        states.append(last)
    return torch.cat(outputs, -1), torch.cat(states) if states else A.new_zeros(0, *A.shape)


def _scan_one(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state):
    d = u.shape[1]
    real = torch.float64 if u.dtype == torch.float64 else torch.float32
    x = u.to(real)
    delta = by_token(lambda t: step_size(t, delta_bias, delta_softplus, real), delta)
    state = A.new_zeros(len(u), *A.shape) if initial_state is None else initial_state  # (b, d, n)
    ys = []
    for x_t, delta_t, B_t, C_t in zip(*over_time(x, delta, B, C), strict=True):
        A_bar = torch.exp(delta_t[..., None] * A)  # (b, d, n)
        B_bar_u = (delta_t * x_t)[..., None] * for_channels(B_t, d)
        state = A_bar * state + B_bar_u
        ys.append(read_out(state, for_channels(C_t, d)))  # (b, d)
    y = torch.stack(ys, -1) if ys else x
    y = by_token(lambda y, x, z: skip_and_gate(y, x, D, z), y, x, z)
    return y.to(u.dtype), state


def by_token(function: Callable, *along: Tensor | None) -> Tensor:
    """Apply `function` to one token (b, d, 1) after the other.

    A token's result then has the same bits for any number of tokens: exp and similar functions round
    differently in a full vector and in the remainder.
    """
    if not along[0].shape[-1]:  # type: ignore[union-attr]
        return function(*along)
    steps = range(along[0].shape[-1])  # type: ignore[union-attr]
    cut = ([None if t is None else t[..., i : i + 1].contiguous() for t in along] for i in steps)
    return torch.cat([function(*token) for token in cut], -1)


def over_time(x: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> list[Sequence[Tensor]]:
    """The steps of each tensor; a constant B or C is repeated at every step.

    `unbind`, because the gradient of an index would fill a tensor of all steps at every step.
    """
    return [t.unbind(-1) if t.dim() > 2 else [t] * x.shape[-1] for t in (x, delta, B, C)]


def step_size(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool, real: torch.dtype) -> Tensor:
    """delta + delta_bias, through softplus if asked for (the identity above 20)."""
    delta = delta.to(real)
    if delta_bias is not None:
        delta = delta + delta_bias[:, None].to(real)
    return F.softplus(delta) if delta_softplus else delta


def for_channels(B: Tensor, d: int) -> Tensor:
    """B (or C) of one step, to be multiplied with a (b, d, n) state: (d, n), (b, 1, n) or (b, d, n)."""
    if B.dim() == 2 or B.shape[1] == 1:
        return B
    return B.repeat_interleave(d // B.shape[1], 1)


def read_out(state: Tensor, C: Tensor) -> Tensor:
    """y = C h, or 2 Re(C h) when the state is complex (each represents a conjugate pair)."""
    y = (state * C).sum(-1)
    return 2 * y.real if y.is_complex() else y


def skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """(y + D u) * silu(z)."""
    if D is not None:
        y = y + D[:, None].to(x.dtype) * x
    return y if z is None else y * F.silu(z.to(x.dtype))


def selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    """One step of the recurrence on (b, d) inputs; overwrites `state` (b, d, n) and returns y (b, d)."""
    _b, d = x.shape
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    u = x.to(real)[..., None]  # a sequence of length 1
    delta = step_size(dt[..., None], dt_bias, dt_softplus, real)
    new = torch.exp(delta * A) * state + delta * u * for_channels(B, d)
    state.copy_(new)
    y = read_out(new, for_channels(C, d))[..., None]
    return skip_and_gate(y, u, D, None if z is None else z[..., None])[..., 0].to(x.dtype)
