"""causal-conv1d's functions on `projecta.causal_conv` and `projecta.causal_conv_update`."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from projecta._checks import Checker
from projecta.conv import causal_conv, causal_conv_update, last_inputs


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Any = None, initial_states: Any = None,
    return_final_states: bool = False, final_states_out: Tensor | None = None, activation: str | None = None,
    *, backend: str = "auto",
) -> Any:  # fmt: skip
    """The causal depthwise convolution; see `projecta.causal_conv`.

    Args:
        x: (b, d, l). weight: (d, k). bias: (d,).
        seq_idx: integers (b, l); a token sees only the tokens of the run of equal numbers that it is in.
            Older versions take `activation` in this place or in the next, and so does this function.
        initial_states: (b, d, k - 1).
        return_final_states: also return the last k - 1 inputs. final_states_out: they are written here.
        activation: None, "silu" or "swish".
    """
    check = Checker("causal_conv1d_fn")
    if isinstance(seq_idx, str):
        seq_idx, activation = None, seq_idx
    if isinstance(initial_states, str):
        initial_states, activation = None, initial_states
    if seq_idx is not None:
        check.that(
            initial_states is None and not return_final_states and final_states_out is None, "seq_idx",
            "be None with initial or final states", "both",
        )  # fmt: skip
        return _by_runs(check, x, weight, bias, seq_idx, activation, backend)
    y, last = causal_conv(
        x, weight, bias, activation=activation, initial_state=initial_states, return_last_state=True,
        backend=backend,
    )  # fmt: skip
    if final_states_out is not None:
        final_states_out.copy_(last)
        last = final_states_out
    return (y, last) if return_final_states else y


causal_conv1d_ref = partial(causal_conv1d_fn, backend="reference")


def _by_runs(
    check: Checker, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor, activation: Any,
    backend: str,
) -> Tensor:  # fmt: skip
    b, d, l = x.shape
    check.shape("seq_idx", seq_idx, (b, l), "(b, l)")
    change = torch.ones(b, l, dtype=torch.bool, device=x.device)
    change[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    starts = change.flatten().nonzero()[:, 0].to(torch.int32)
    bounds = torch.cat([starts, starts.new_tensor([b * l])])
    row = x.transpose(0, 1).reshape(1, d, b * l)
    y: Any = causal_conv(row, weight, bias, activation=activation, cu_seqlens=bounds, backend=backend)
    return y.view(d, b, l).transpose(0, 1)


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Any = None,
    cache_seqlens: Tensor | None = None, conv_state_indices: Tensor | None = None, *, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """One more step, or several; see `projecta.causal_conv_update`.

    Args:
        x: (b, d), or (b, d, l) for l steps. conv_state: (b, d, m), m >= k - 1; overwritten.
        activation: None, "silu" or "swish"; True and False are also taken, as in older versions.
        cache_seqlens: int (b,): the state is a ring, in which row i writes at cache_seqlens[i] modulo m.
        conv_state_indices: int (b,): row i reads and overwrites conv_state[conv_state_indices[i]].
    """
    if isinstance(activation, bool):
        activation = "silu" if activation else None
    own = conv_state if conv_state_indices is None else conv_state.index_select(0, conv_state_indices)
    steps, m = 1 if x.dim() == 2 else x.shape[2], own.shape[2]
    state = own
    if cache_seqlens is not None:  # unroll the ring: the oldest entry first
        ring = (cache_seqlens.long()[:, None] + torch.arange(m, device=x.device)) % m
        ring = ring[:, None].expand_as(own)
        state = own.gather(2, ring)
    if x.dim() == 2:
        y: Any = causal_conv_update(x, state, weight, bias, activation=activation, backend=backend)
    else:
        kept = state[..., m - weight.shape[1] + 1 :]
        y = causal_conv(x, weight, bias, activation=activation, initial_state=kept, backend=backend)
        state = last_inputs(x, m, state, None)
    with torch.no_grad():
        if cache_seqlens is not None:
            state = torch.empty_like(own).scatter_(2, (ring + steps) % m, state.to(own.dtype))
        if conv_state_indices is not None:
            conv_state.index_copy_(0, conv_state_indices.long(), state.to(conv_state.dtype))
        elif state is not conv_state:
            conv_state.copy_(state)
    return y


causal_conv1d_update_ref = partial(causal_conv1d_update, backend="reference")


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last `state_len` inputs of each of s packed sequences, x (tokens, d): (s, d, state_len)."""
    return last_inputs(x.t()[None], state_len, None, cu_seqlens)
