"""Multi-resolution selective scan (MRSS): the selective scan's recurrence, slow states updated less often.

Two dials trade accuracy for time. A state with period p is updated once per block of p tokens; what arrives
in between is accumulated undecayed, so that no input is lost or late:

    S = sum of delta, acc = sum of delta B u                       over the block so far
    y_t = C_t (h + acc) + D u_t                                    within the block
    h = f(A S) h + f(A S (p - 1) / (2 p)) acc                     at the block's last token, before its output

and the decay factor f is exp ("exact") or max(0, 1 + z / 4)^4 ("compound"), which needs no exponential and
keeps exp's values at 0 (1) and far out (0). The inputs of a block are decayed from their mean distance to its
end, (p - 1) / 2 steps: with period 1 nothing is left to decay and the formula is the selective scan's.

Blocks start with each sequence; a short last block ends with it (its own length then stands for p in the
returned state).
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from projecta._checks import Checker
from projecta.scan import reference, selective_scan, vectorised
from projecta.scan._arguments import canonical_arguments

BACKENDS = ("reference", "vectorised")
DECAYS = ("compound", "exact")
PERIODS = (1, 2, 4, 8, 16)  # what `choose_periods` chooses from
SEGMENT_ELEMENTS = 2_000_000  # elements of (t, b, d, n) in flight


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
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    periods: Tensor | list[int] | None = None,
    decay: str = "compound",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan as `selective_scan` does, with each state updated once per its period; the formula is this
    module's.

    Args:
        periods: update periods in tokens, integers >= 1, (n,) or (d, n). None: `choose_periods(A,
            delta_bias)`.
        decay: "compound" or "exact". Periods all 1 and "exact" together are `selective_scan`, bit for bit.
        backend: "reference" (a loop over time), "vectorised", or "auto", which is "vectorised".
        The other arguments, the result and the errors are those of `projecta.selective_scan`; complex A needs
        "exact".

    >>> u, delta = torch.ones(1, 2, 4), torch.full((1, 2, 4), 0.1)
    >>> A, B, C = -torch.ones(2, 1), torch.ones(1, 1, 4), torch.ones(1, 1, 4)
    >>> mrss_scan(u, delta, A, B, C, periods=[2])[0, 0]
    tensor([0.1000, 0.1902, 0.2902, 0.3451])
    """
    check = Checker("mrss_scan")
    A, B, C, initial_state = canonical_arguments(
        check, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens
    )
    check.one_of("decay", decay, DECAYS)
    check.that(decay == "exact" or not A.is_complex(), "decay", "be 'exact' with complex A", repr(decay))
    check.one_of("backend", backend, ("auto", *BACKENDS))
    table = _check_periods(check, periods, A, delta_bias, delta_softplus)
    shape = (delta, A, B, C, D, z, delta_bias, delta_softplus)
    if backend != "reference" and decay == "exact" and bool((table == 1).all()):
        return selective_scan(
            u,
            *shape,
            return_last_state,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            backend="vectorised",
        )
    scan_one = _scan_reference if backend == "reference" else _scan_vectorised
    bounds = [0, u.shape[-1]] if cu_seqlens is None else cu_seqlens.tolist()
    rows = len(u) if cu_seqlens is None else 1  # of the batch, in each sequence of the list
    if initial_state is None:
        initial_state = A.new_zeros(rows * (len(bounds) - 1), *A.shape)
    real = A.real.dtype if A.is_complex() else A.dtype
    ys, states = [u[..., :0]], [initial_state[:0]]
    for (start, stop), h in zip(itertools.pairwise(bounds), initial_state.split(rows), strict=True):
        x, step = u[..., start:stop].to(real), delta[..., start:stop]
        step = reference.step_size(step, delta_bias, delta_softplus, real)
        B_cut, C_cut = (t if t.dim() == 2 else t[..., start:stop] for t in (B, C))
        with torch.autocast(u.device.type, enabled=False):  # the state is float32 whatever surrounds it
            y, h = scan_one(x, step, A, B_cut, C_cut, h, table, decay)
        gate = None if z is None else z[..., start:stop]
        ys.append(reference.skip_and_gate(y, x, D, gate).to(u.dtype))
        states.append(h)
    y = torch.cat(ys, -1)
    return (y, torch.cat(states)) if return_last_state else y


def choose_periods(
    A: Tensor, delta_bias: Tensor | None = None, delta_softplus: bool = True, theta: float = 0.5
) -> Tensor:
    """The largest period p of `PERIODS` with |A| delta p <= theta for each state, (d, n), at the step that
    the bias alone gives.

    >>> choose_periods(-torch.tensor([[0.01, 0.1, 1.0]]), torch.tensor([1.0]))
    tensor([[16,  2,  1]])
    """
    bias = torch.zeros(A.shape[0], device=A.device) if delta_bias is None else delta_bias.detach().float()
    step = F.softplus(bias) if delta_softplus else bias.abs()
    speed = (A.detach().abs() * step[:, None])[..., None]  # (d, n, 1), per token
    ladder = torch.tensor(PERIODS, device=A.device)
    fits = speed * ladder <= theta
    return torch.where(fits, ladder, 1).amax(-1)


def decay_factor(exponent: Tensor, decay: str) -> Tensor:
    """f(z): exp(z), or max(0, 1 + z / 4)^4."""
    if decay == "exact":
        return torch.exp(exponent)
    root = (exponent / 4).add_(1).clamp_min_(0)
    return root.square().square() if root.requires_grad else root.square_().square_()


def _check_periods(check, periods, A, delta_bias, delta_softplus) -> Tensor:
    """The periods as (d, n), on the CPU: they decide the control flow."""
    d, n = A.shape
    if periods is None:
        return choose_periods(A, delta_bias, delta_softplus).cpu()
    table = torch.as_tensor(periods).cpu()
    whole = not (table.is_floating_point() or table.is_complex() or table.dtype == torch.bool)
    check.that(whole, "periods", "be integers", table.dtype, error=TypeError)
    check.that(
        tuple(table.shape) in ((n,), (d, n)),
        "periods",
        f"have shape (n,) = {(n,)} or (d, n) = {(d, n)}",
        tuple(table.shape),
    )
    check.that(
        bool((table >= 1).all()), "periods", "be at least 1", int(table.min()) if table.numel() else table
    )
    return table.expand(d, n)


def _scan_reference(x, delta, A, B, C, h, periods, decay):
    """The module's formula, one token after the other."""
    d = x.shape[1]
    periods = periods.to(x.device)
    S, acc = torch.zeros_like(h.real), torch.zeros_like(h)  # (b, d, n)
    length = torch.zeros_like(periods, dtype=delta.dtype)  # tokens in the block so far, (d, n)
    ys = []
    for x_t, delta_t, B_t, C_t in zip(*reference.over_time(x, delta, B, C), strict=True):
        S = S + delta_t[..., None]
        acc = acc + (delta_t * x_t)[..., None] * reference.for_channels(B_t, d)
        length = length + 1
        ends = length == periods
        h, acc = torch.where(ends, _end_block(A, S, h, acc, length, decay), h), torch.where(ends, 0, acc)
        S, length = torch.where(ends, 0, S), torch.where(ends, 0, length)
        ys.append(reference.read_out(h + acc, reference.for_channels(C_t, d)))
    last = torch.where(length > 0, _end_block(A, S, h, acc, length.clamp_min(1), decay), h)
    return torch.stack(ys, -1) if ys else x, last


def _end_block(A, S, h, acc, length, decay):
    """f(A S) h + f(A S (p - 1) / (2 p)) acc, for a block of p = length tokens."""
    return decay_factor(A * S, decay) * h + decay_factor(A * S * ((length - 1) / (2 * length)), decay) * acc


def _scan_vectorised(x, delta, A, B, C, h, periods, decay):
    """Channels with equal periods go together, and of those the states with the same period."""
    b, d, l = x.shape
    B, C = _same_groups(B, C, d, l)
    blocks = list(_blocks(periods, x.device))
    held = [h[:, channels][..., states] for _, channels, states in blocks]
    size = _segment_length(periods, b * d * A.shape[1])
    ys = []
    for start in range(0, l, size):
        time = slice(start, min(start + size, l))
        y = x.new_zeros(time.stop - start, b, d)
        for i, (p, channels, states) in enumerate(blocks):
            weights = [
                _time_first(_pick_groups(t, channels, d)[:, :, states, time]) for t in (B, C)
            ]  # (t, b, g, n')
            g = weights[0].shape[2]
            along = [
                _time_first(t[:, channels, time]).unflatten(2, (g, -1)) for t in (x, delta)
            ]  # (t, b, g, k)
            rates, state = A[channels][:, states].unflatten(0, (g, -1)), held[i].unflatten(1, (g, -1))
            part, state = _scan_block(*along, rates, *weights, state, p, decay)
            held[i], part = state.flatten(1, 2), part.flatten(2)
            y = y + part if isinstance(channels, slice) else y.index_add(2, channels, part)
        ys.append(y.permute(1, 2, 0))
    last = torch.zeros_like(h)
    for (_, channels, states), part in zip(blocks, held, strict=True):
        rows = torch.arange(d, device=x.device)[channels]
        last = last.index_put((torch.arange(b, device=x.device)[:, None, None], rows[:, None], states), part)
    return torch.cat(ys, -1) if ys else x, last


def _blocks(periods: Tensor, device):
    """(period, channels, states) of the rectangles of the (d, n) table that have one period."""
    rows, kind = torch.unique(periods, dim=0, return_inverse=True)
    for r, row in enumerate(rows):
        channels = (kind == r).nonzero()[:, 0].to(device) if len(rows) > 1 else slice(None)
        for p in row.unique().tolist():
            yield p, channels, (row == p).nonzero()[:, 0].to(device)


def _segment_length(periods: Tensor, elements: int) -> int:
    """Tokens per segment: a multiple of every period, near what `SEGMENT_ELEMENTS` allows."""
    common = math.lcm(*periods.unique().tolist())
    return max(1, SEGMENT_ELEMENTS // (max(1, elements) * common)) * common


def _same_groups(B: Tensor, C: Tensor, d: int, l: int) -> tuple[Tensor, Tensor]:
    """Both as (b, g, n, l); a constant one makes every channel a group of its own."""
    if B.dim() == C.dim() == 4:
        return B, C
    B, C = (t[None, :, :, None].expand(-1, -1, -1, l) if t.dim() == 2 else t for t in (B, C))
    b = max(len(B), len(C))
    B, C = (t.expand(b, -1, -1, -1).repeat_interleave(d // t.shape[1], 1) for t in (B, C))
    return B, C


def _pick_groups(B: Tensor, channels, d: int) -> Tensor:
    """The groups of some channels: one group that all channels share, or one for each channel picked."""
    g = B.shape[1]
    return B if g == 1 or isinstance(channels, slice) else B.repeat_interleave(d // g, 1)[:, channels]


def _time_first(t: Tensor) -> Tensor:
    return t.movedim(-1, 0)


def _scan_block(x, delta, A, B, C, h, p, decay):
    """y (t, b, g, k) and the last state of states with one period p; x, delta (t, b, g, k), A (g, k, n), h
    (b, g, k, n).

    Within a block of p tokens the output is a product of small matrices: the state is only formed at the
    block's end.
    """
    l = len(x)
    short = l % p  # tokens of the last block, if it is short; steps of size 0 fill it up
    x, delta, B, C = (_in_blocks(t, p) for t in (x, delta, B, C))  # (m, p, ...)
    drive, B, C = (delta * x).to(A.dtype), B.to(A.dtype), C.to(A.dtype)
    acc = (
        torch.einsum("mpbgk,mpbgn->mbgkn", drive, B)
        if p > 1
        else drive[:, 0, ..., None] * B[:, 0, ..., None, :]
    )
    exponent = delta.sum(1)[..., None] * A
    if p > 1:
        rest = torch.full((len(acc), 1, 1, 1, 1), (p - 1) / (2 * p), dtype=delta.dtype, device=delta.device)
        if short:
            rest[-1] = (short - 1) / (2 * short)
        acc = decay_factor(exponent * rest, decay) * acc
    ends = _Recurrence.apply(decay_factor(exponent, decay), acc, h)
    y = torch.einsum("mbgn,mbgkn->mbgk", C[:, -1], ends)[:, None]  # at the last token of each block
    if p > 1:
        before = torch.cat([h[None], ends[:-1]])
        inside = torch.einsum("mpbgn,mqbgn->mbgpq", C[:, :-1], B[:, :-1]).tril()
        y_inside = torch.einsum("mpbgn,mbgkn->mpbgk", C[:, :-1], before)
        y_inside = y_inside + torch.einsum("mbgpq,mqbgk->mpbgk", inside, drive[:, :-1])
        y = torch.cat([y_inside, y], 1)
    y = y.flatten(0, 1)[:l]
    return 2 * y.real if y.is_complex() else y, ends[-1]


def _in_blocks(t: Tensor, p: int) -> Tensor:
    """(t, ...) as (blocks, p, ...), filled up with zeros."""
    short = -len(t) % p
    return (F.pad(t, (0, 0) * (t.dim() - 1) + (0, short)) if short else t).unflatten(0, (-1, p))


class _Recurrence(torch.autograd.Function):
    """h_t = a_t h_{t-1} + v_t along the first axis, from h."""

    @staticmethod
    def forward(ctx, a, v, h):
        if any(ctx.needs_input_grad):
            a, v, kept = a.clone(), v.clone(), a
        else:  # both are our own temporaries
            kept = None
        v[0] += a[0] * h
        hs = vectorised.linear_recurrence_(a, v)
        ctx.save_for_backward(kept, hs, h)
        return hs

    @staticmethod
    def backward(ctx, grad):
        a, hs, h = ctx.saved_tensors
        a_next = torch.cat([a[1:], torch.zeros_like(a[:1])]).conj().resolve_conj()
        g = vectorised.linear_recurrence_(a_next, grad.clone(), reverse=True)
        before = torch.cat([h[None], hs[:-1]])
        return g * before.conj(), g, a[0].conj() * g[0]
