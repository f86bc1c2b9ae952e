"""Multi-resolution selective scan (MRSS): channels in bands, of which only some are scanned at every token.

A band is a fraction of the channels and a period p. With p = 1 its channels are scanned as `selective_scan`
does. Otherwise they are scanned once per block of p tokens, and the tokens of the next block read the result:

    s_t = softplus(delta_t + bias)       S_k = sum of s_t over block k
    h_k = exp(A S_k) h_{k-1} + B_k (sum of s_t u_t)           B_k, C_k: means of B and C over block k
    y_t = (C_{k-1} h_{k-1} + D u_t) silu(z_t)                  for the tokens t of block k

So the result is causal: a token reads blocks that have ended. Those of the first block read 0. A sequence's
blocks start with it, and its last block may be short. By default half of the channels are scanned at every
token, the others once per 8; give the first half large steps and the second small ones (long memory).

States, saved states and the sums of dB and dC shrink with the coarse channels. What a coarse channel still
costs is to read u, delta and z and to write y.
"""

import math
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from projecta._calls import call_key, remembered
from projecta._checks import Checker
from projecta._operators import refuse_tangents
from projecta.mrss import reference
from projecta.mrss.bands import Bands as _Bands
from projecta.mrss.bands import can_scan
from projecta.mrss.reference import MrssState as MrssState
from projecta.scan import choose_backend
from projecta.scan._arguments import canonical_arguments, is_canonical, with_groups
from projecta.scan._operator import Inputs

Bands = Sequence[tuple[float, int]]
BANDS: Bands = ((0.5, 1), (0.5, 8))


def check_bands(
    check: Checker, bands: Bands, d: int, groups: int = 1, name: str = "bands"
) -> list[tuple[slice, int]]:
    """The channels and the period of each band."""
    cut: list[tuple[slice, int]] = []
    at, total = 0, 0.0
    for fraction, period in bands:
        check.that(fraction > 0, name, "have fractions above 0", fraction)
        whole = isinstance(period, int) and period >= 1
        check.that(whole, name, "have integer periods of at least 1", period)
        total += fraction
        end = round(total * d)
        if end > at:
            if cut and cut[-1][1] == period:
                at = cut.pop()[0].start
            cut.append((slice(at, end), period))
        at = end
    check.that(
        bool(cut) and math.isclose(total, 1, abs_tol=1e-6), name, "have fractions whose sum is 1", total
    )
    inside = [span.start for span, _ in cut if groups > 1 and span.start % (d // groups)]
    check.that(not inside, name, f"begin with a group of channels, of which there are {groups}", inside)
    return cut


def mrss_scan(
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
    bands: Bands = BANDS,
    initial_state: "Tensor | MrssState | None" = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Any:
    """Scan as `selective_scan` does, but the channels of each band once per its period; see this module.

    Arguments that are not listed, and the errors, are those of `projecta.selective_scan`.

    Args:
        bands: (fraction of the channels, period) in the order of the channels; fractions sum to 1. A band
            ends at channel round(d times the sum of the fractions so far), and may be empty. With periods of
            1 alone the bits are those of `selective_scan`.
        initial_state: as in `selective_scan`, or a `MrssState` of an earlier piece of the sequence; then the
            last state is a `MrssState` too, and tokens are scanned one after the other, on any backend:
            slow. The tokens of the first block read 0 with a tensor.
        backend: as in `selective_scan`; "cpu" and "triton" sum and read blocks in kernels of their own.

    Returns:
        y (b, d, l); with `return_last_state` also the last state, for which a short last block has ended, or
        the `MrssState`.

    Examples:
        >>> u, delta = torch.ones(1, 2, 4), torch.full((1, 2, 4), 0.1)
        >>> A, B, C = -torch.ones(2, 1), torch.ones(1, 1, 4), torch.ones(1, 1, 4)
        >>> mrss_scan(u, delta, A, B, C, bands=((0.5, 1), (0.5, 2)))[0]
        tensor([[0.1000, 0.1905, 0.2724, 0.3464],
                [0.0000, 0.0000, 0.2000, 0.2000]])
    """
    given: Any = u, delta, A, B, C, D, z, delta_bias, initial_state
    key = None
    plain = cu_seqlens is None and not isinstance(initial_state, MrssState)
    if plain and isinstance(bands, tuple | list) and not torch.compiler.is_compiling():
        key = _key(given, bool(delta_softplus), backend, bands)
    call = None if key is None else _calls.get(key)
    if call is None:
        y, last = _scan(given, bool(delta_softplus), bands, cu_seqlens, backend, key)
    else:
        y, last = call.scan(Inputs(*with_groups(given, call.grouped)))  # type: ignore[arg-type]
    return (y, last) if return_last_state else y


def _key(given: tuple, softplus: bool, backend: str, bands: Bands) -> tuple | None:
    """What a call depends on besides values; None if it must be looked at each time."""
    if not isinstance(given[0], Tensor) or not all(isinstance(band, tuple | list) for band in bands):
        return None
    key = call_key(given, (softplus, backend))
    return None if key is None else (key, tuple(map(tuple, bands)))


_calls: dict[Any, _Bands] = {}  # prepared, by `_key`


def _scan(
    given: Any, softplus: bool, bands: Bands, cu_seqlens: Any, backend: str, key: Any
) -> tuple[Tensor, Any]:
    """y and the last state or `MrssState` of a call unlike earlier ones."""
    check = Checker("mrss_scan")
    u, delta, A, B, C, D, z, delta_bias, initial_state = given
    state = initial_state if isinstance(initial_state, MrssState) else None
    start = state.h if state is not None else initial_state
    A, B, C, start = canonical_arguments(check, u, delta, A, B, C, D, z, delta_bias, start, cu_seqlens)
    cut = check_bands(check, bands, A.shape[0], max(t.shape[1] if t.dim() == 4 else 1 for t in (B, C)))
    check.that(state is None or cu_seqlens is None, "cu_seqlens", "be None with a MrssState", "a tensor")
    inputs = Inputs(u, delta, A, B, C, D, z, delta_bias, start, cu_seqlens)
    module = choose_backend(check, backend, u, A.dtype)
    name = module.__name__.rpartition(".")[2]
    if name != "reference":
        refuse_tangents("mrss_scan", (*given[:8], start), name)
    if state is not None:
        return reference.scan_piece(inputs, softplus, cut, state)
    if name == "reference" and cut[0] != (slice(0, len(A)), 1):
        return reference.by_tokens(inputs, softplus, cut)
    if name in ("cpu", "triton") and not torch.compiler.is_compiling():
        kernels = import_module(f"projecta.mrss.{name}")
        if can_scan(inputs, kernels):
            call = _Bands(inputs, softplus, cut, kernels)
            if key is not None and is_canonical(given, inputs):
                remembered(_calls, key, lambda: call)
            return call.scan(inputs)
    parts = []
    for span, period in cut:
        own = reference.channels_of(inputs, span)
        if period == 1:
            *tensors, first, bounds = own
            parts.append(module.selective_scan(*tensors, softplus, first, bounds))
        else:
            parts.append(reference.scan_blocks(own, softplus, period, module))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([y for y, _ in parts], 1), torch.cat([last for _, last in parts], 1)


def mrss_update(
    state: MrssState,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    bands: Bands = BANDS,
) -> tuple[Tensor, MrssState]:
    """One more token: y (b, d), and the state after it.

    Args:
        state: `MrssState.start(h, number of bands)` of a first state h, or what `mrss_scan` returns if it
            started from one; not changed.
        x, dt, z: (b, d). B, C: (b, n) or (b, g, n). A, D, dt_bias, dt_softplus, bands: as in `mrss_scan`.

    Raises:
        ValueError: a shape or value is wrong. TypeError: a dtype is wrong, or `state` is no `MrssState`.

    Examples:
        >>> x, A, B = torch.ones(1, 2), -torch.ones(2, 1), torch.ones(1, 1)
        >>> y, state = mrss_update(MrssState.start(torch.zeros(1, 2, 1)), x, x, A, B, B)
        >>> y
        tensor([[1., 0.]])
    """
    check = Checker("mrss_update", "x")
    check.that(
        isinstance(state, MrssState), "state", "be a MrssState", type(state).__name__,
        "Take MrssState.start, or the state of an mrss_scan that started from one.", TypeError,
    )  # fmt: skip
    check.tensor("x", x)
    check.that(x.dim() == 2, "x", "have shape (b, d)", tuple(x.shape))
    x, dt, B, C = (t[..., None] for t in (x, dt, B, C))
    z = None if z is None else z[..., None]
    y, last = mrss_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, True, bands=bands, initial_state=state)
    return y[..., 0], last
