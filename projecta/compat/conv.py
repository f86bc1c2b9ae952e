"""causal-conv1d's functions on `projecta.causal_conv` and `projecta.causal_conv_update`."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from projecta._checks import Checker
from projecta.conv import causal_conv, causal_conv_update, last_inputs
from projecta.scan.pool import blank_rows, read_rows, write_rows


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Any = None, initial_states: Any = None,
    return_final_states: bool = False, final_states_out: Tensor | None = None, activation: str | None = None,
    *, backend: str = "auto",
) -> Any:  # fmt: skip
    """The causal depthwise convolution; see `projecta.causal_conv`.

    Args:
        x: (b, d, l). weight: (d, k). bias: (d,).
        seq_idx: integers (b, l); a token sees only the tokens of the run of equal numbers that it is in, and
            one with a number below 0 is padding, whose output is 0. Older versions take `activation` in this
            place or in the next, and so does this function.
        initial_states: (b, d, k - 1); with seq_idx they come before the first run of each row.
        return_final_states: also return the last k - 1 inputs. final_states_out: they are written here.
        activation: None, "silu" or "swish".
    """
    check = Checker("causal_conv1d_fn")
    if isinstance(seq_idx, str):
        seq_idx, activation = None, seq_idx
    if isinstance(initial_states, str):
        initial_states, activation = None, initial_states
    if seq_idx is not None:
        unasked = not return_final_states and final_states_out is None
        check.that(unasked, "seq_idx", "be None with final states", "both")
        return _by_runs(check, x, weight, bias, seq_idx, initial_states, activation, backend)
    y, last = causal_conv(
        x, weight, bias, activation=activation, initial_state=initial_states, return_last_state=True,
        backend=backend,
    )  # fmt: skip
    if final_states_out is not None:
        final_states_out.copy_(last)
        last = final_states_out
    return (y, last) if return_final_states else y


def causal_conv1d_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, initial_states: Any = None,
    return_final_states: bool = False, final_states_out: Tensor | None = None, activation: str | None = None,
    seq_idx: Any = None,
) -> Any:  # fmt: skip
    """`causal_conv1d_fn` by the reference backend; the order of the arguments is causal-conv1d's."""
    if isinstance(initial_states, str):  # the order of older versions
        initial_states, activation = None, initial_states
    return causal_conv1d_fn(
        x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out, activation,
        backend="reference",
    )  # fmt: skip


def _by_runs(
    check: Checker, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor,
    initial_states: Tensor | None, activation: Any, backend: str,
) -> Tensor:  # fmt: skip
    b, d, l = x.shape
    check.shape("seq_idx", seq_idx, (b, l), "(b, l)")
    change = torch.ones(b, l, dtype=torch.bool, device=x.device)
    change[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    starts = change.flatten().nonzero()[:, 0].to(torch.int32)
    bounds = torch.cat([starts, starts.new_tensor([b * l])])
    before = None
    if initial_states is not None and l:
        first = change.flatten().cumsum(0).view(b, l)[:, 0] - 1  # run of each row
        before = initial_states.new_zeros(len(starts), d, initial_states.shape[-1])
        before = before.index_put((first,), initial_states)
    row = x.transpose(0, 1).reshape(1, d, b * l)
    y: Any = causal_conv(
        row, weight, bias, activation=activation, initial_state=before, cu_seqlens=bounds, backend=backend
    )
    return y.view(d, b, l).transpose(0, 1).masked_fill((seq_idx < 0)[:, None], 0)


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Any = None,
    cache_seqlens: Tensor | None = None, conv_state_indices: Tensor | None = None, *, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """One more step, or several; see `projecta.causal_conv_update`.

    Args:
        x: (b, d), or (b, d, l) for l steps. conv_state: (b, d, m), m >= k - 1; overwritten.
        activation: None, "silu" or "swish"; True and False are also taken, as in older versions.
        cache_seqlens: int (b,): the state is a ring, in which row i writes at cache_seqlens[i] modulo m.
        conv_state_indices: int (b,): row i reads and overwrites conv_state[conv_state_indices[i]]. A row
            with an index below 0 is padding: it gives 0 and writes nothing.
    """
    if isinstance(activation, bool):
        activation = "silu" if activation else None
    own = conv_state if conv_state_indices is None else read_rows(conv_state, conv_state_indices)
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
            write_rows(conv_state, conv_state_indices, state)
        elif state is not conv_state:
            conv_state.copy_(state)
    return y if conv_state_indices is None else blank_rows(y, conv_state_indices)


causal_conv1d_update_ref = partial(causal_conv1d_update, backend="reference")


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last `state_len` inputs of each of s packed sequences, x (tokens, d): (s, d, state_len)."""
    return last_inputs(x.t()[None], state_len, None, cu_seqlens)
