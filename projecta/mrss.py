"""Multi-resolution selective scan (MRSS): a selective scan that updates slow states less often.

Two parameters trade accuracy for time: periods and decay. A state with period p is updated once per block of
p tokens. Inputs in between are accumulated without decay, so that no input is lost or late:

    S = sum of delta, acc = sum of delta B u                       over the block so far
    y_t = C_t (h + acc) + D u_t                                    within the block
    h = f(A S) h + f(A S (p - 1) / (2 p)) acc                     at the block's last token, before its output

The decay factor f is exp ("exact") or max(0, 1 + z / 8)^8 ("compound"). "compound" needs no exponential, and
equals exp at z = 0 (1) and for z -> -inf (0). The inputs of a block are decayed over their mean distance to
its end, (p - 1) / 2 steps. With period 1 this is 0, and the formula is that of the selective scan.

Each sequence starts a block. A short last block ends with the sequence: its length replaces p in the returned
state. For a sequence that comes in pieces, or token by token, a `MrssState` holds unfinished blocks: the
result is the same as that of one scan.
"""

import itertools
import math
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from projecta._backends import require_backend
from projecta._checks import Checker
from projecta._operators import only_once, refuse_tangents
from projecta.scan import available_backends, reference, selective_scan, vectorised
from projecta.scan._arguments import canonical_arguments
from projecta.scan._operator import Inputs

BACKENDS = ("reference", "vectorised", "cpu")
DECAYS = ("compound", "exact")
PERIODS = (1, 4, 8, 16)  # candidates of `choose_periods`; 2 costs the kernels as much as 1
VECTOR = (16, 4)  # numbers of adjacent channels and states that share a period: one vector is one update
SEGMENT_ELEMENTS = 2_000_000  # elements of (t, b, d, n) in memory at a time


class MrssState(NamedTuple):
    """The state of a sequence that may stop in the middle of blocks.

    h: the states at the start of their blocks. acc: the inputs accumulated since. span: the sum of delta
    since; all (b, d, n). length: tokens since, (d, n). Float32, float64 for float64 inputs; length int64.
    """

    h: Tensor
    acc: Tensor
    span: Tensor
    length: Tensor

    @classmethod
    def start(cls, h: Tensor) -> "MrssState":
        """A state at the start of every block, with the given h (b, d, n).

        Examples:
            >>> MrssState.start(torch.zeros(1, 2, 3)).length.shape
            torch.Size([2, 3])
        """
        length = torch.zeros(h.shape[1:], dtype=torch.int64, device=h.device)
        return cls(h.clone(), torch.zeros_like(h), torch.zeros_like(h.real), length)


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
    initial_state: "Tensor | MrssState | None" = None,
    cu_seqlens: Tensor | None = None,
    periods: Tensor | list[int] | None = None,
    decay: str = "compound",
    backend: str = "auto",
) -> "Tensor | tuple[Tensor, Tensor | MrssState]":
    """Scan as `selective_scan` does, but update each state once per period, by the formula of this module.

    Arguments that are not listed, the result and the errors are those of `projecta.selective_scan`; complex A
    needs "exact".

    Args:
        periods: update periods in tokens, integers >= 1, (n,) or (d, n). None: `choose_periods(A,
            delta_bias)`.
        decay: "compound" or "exact". With "exact" and periods of 1 the bits are those of `selective_scan`.
        initial_state: as in `selective_scan`, or a `MrssState` of an earlier piece of the sequence; then the
            last state is a `MrssState` too.
        backend: "reference" (a loop over time), "vectorised", "cpu" (kernels; periods 1, 2, 4, 8 or 16, equal
            in 64 bytes of adjacent channels and 4 states), or "auto": "cpu" if possible.

    Examples:
        >>> u, delta = torch.ones(1, 2, 4), torch.full((1, 2, 4), 0.1)
        >>> A, B, C = -torch.ones(2, 1), torch.ones(1, 1, 4), torch.ones(1, 1, 4)
        >>> mrss_scan(u, delta, A, B, C, periods=[2])[0, 0]
        tensor([0.1000, 0.1902, 0.2902, 0.3456])
    """
    check = Checker("mrss_scan")
    if isinstance(initial_state, MrssState):
        check.that(cu_seqlens is None, "cu_seqlens", "be None with a MrssState", "a tensor")
        y, state = _scan_piece(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, periods, decay, backend
        )
        return (y, state) if return_last_state else y
    A, B, C, first = canonical_arguments(
        check, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens
    )
    check.one_of("decay", decay, DECAYS)
    check.that(decay == "exact" or not A.is_complex(), "decay", "be 'exact' with complex A", repr(decay))
    check.one_of("backend", backend, ("auto", *BACKENDS))
    if backend != "reference":
        refuse_tangents("mrss_scan", (u, delta, A, B, C, D, z, delta_bias, first), backend)
    table = _check_periods(check, periods, A, delta_bias, delta_softplus)
    backend, in_vectors = _choose(check, backend, u, A, B, C, table)
    shape = (delta, A, B, C, D, z, delta_bias, delta_softplus)
    if backend != "reference" and decay == "exact" and bool((table == 1).all()):
        return selective_scan(
            u, *shape, return_last_state, initial_state=first, cu_seqlens=cu_seqlens, backend=backend
        )
    if in_vectors is not None:
        tensors = [
            None if t is None else t.resolve_neg()
            for t in (u, delta, A, B, C, D, z, delta_bias, first, cu_seqlens)
        ]
        y, last = _OnCpu.apply(in_vectors, decay == "exact", delta_softplus, *tensors)
        return (y, last) if return_last_state else y
    y, last = _scan_sequences(u, *shape, first, cu_seqlens, table, decay, backend)
    return (y, last) if return_last_state else y


def _scan_sequences(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, first, cu_seqlens, table, decay, backend
) -> tuple[Tensor, Tensor]:
    """y and the last states, one sequence after another, by backend "reference" or "vectorised"."""
    scan_one, each = _scan_vectorised, lambda function, *along: function(*along)
    if backend == "reference":
        scan_one, each = _scan_reference, reference.by_token
    bounds = [0, u.shape[-1]] if cu_seqlens is None else cu_seqlens.tolist()
    rows = len(u) if cu_seqlens is None else 1  # batch rows per sequence
    if first is None:
        first = A.new_zeros(rows * (len(bounds) - 1), *A.shape)
    real = A.real.dtype if A.is_complex() else A.dtype
    ys, states = [u[..., :0]], [first[:0]]
    for (start, stop), h in zip(itertools.pairwise(bounds), first.split(rows), strict=True):
        x, step = u[..., start:stop].to(real), delta[..., start:stop]
        step = each(lambda t: reference.step_size(t, delta_bias, delta_softplus, real), step)
        B_cut, C_cut = (t if t.dim() == 2 else t[..., start:stop] for t in (B, C))
        with torch.autocast(u.device.type, enabled=False):  # the state stays float32
            y, h = scan_one(x, step, A, B_cut, C_cut, h, table, decay)
        gate = None if z is None else z[..., start:stop]
        ys.append(each(lambda y, x, z: reference.skip_and_gate(y, x, D, z), y, x, gate).to(u.dtype))
        states.append(h)
    return torch.cat(ys, -1), torch.cat(states)


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
    periods: Tensor | list[int] | None = None,
    decay: str = "compound",
) -> Tensor:
    """Advance `state` in place by one token. The outputs equal those of `mrss_scan` over all tokens so far.

    Other arguments are those of `mrss_scan`.

    Args:
        x: input (b, d).
        dt: step size (b, d).
        z: gate (b, d).
        B: input weights (b, n) or (b, g, n).
        C: output weights, as B.

    Returns:
        y (b, d), of x's dtype.

    Examples:
        >>> state = MrssState.start(torch.zeros(1, 2, 1))
        >>> x, A, B = torch.ones(1, 2), -torch.ones(2, 1), torch.ones(1, 1)
        >>> torch.cat([mrss_update(state, x, 0.1 * x, A, B, B, periods=[2])[:, :1] for _ in range(4)], 1)
        tensor([[0.1000, 0.1902, 0.2902, 0.3456]])
    """
    check = Checker("mrss_update")
    check.that(isinstance(state, MrssState), "state", "be a MrssState", type(state).__name__, error=TypeError)
    check.tensor("x", x)
    check.that(x.dim() == 2, "x", "have shape (b, d)", tuple(x.shape))
    token = [None if t is None else t[..., None] for t in (x, dt, B, C, z)]
    A, B, C, _ = canonical_arguments(
        check, token[0], token[1], A, token[2], token[3], D, token[4], dt_bias, None, None
    )
    check.one_of("decay", decay, DECAYS)
    table = _check_periods(check, periods, A, dt_bias, dt_softplus)
    y, new = _piece_by_reference(
        token[0], token[1], A, B, C, D, token[4], dt_bias, dt_softplus, state, table, decay
    )
    for old, t in zip(state, new, strict=True):
        old.copy_(t)
    return y[..., 0]


def choose_periods(
    A: Tensor,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    theta: float = 0.5,
    *,
    step: Tensor | None = None,
    vector: tuple[int, int] = VECTOR,
) -> Tensor:
    """The largest period p of `PERIODS` with |A| step p <= theta for each state, (d, n).

    Args:
        A: (d, n). delta_bias, delta_softplus: as in `mrss_scan`; they give the step if `step` is None.
        step: step size of each channel (d,), for example the root mean square of its steps.
        theta: how far a state may decay within a block. Smaller is slower and more accurate.
        vector: numbers of adjacent channels and states that get the smallest of their periods.

    Examples:
        >>> choose_periods(-torch.tensor([[0.01, 0.1, 1.0]]), torch.tensor([1.0]), vector=(1, 1))
        tensor([[16,  1,  1]])
    """
    if step is None:
        bias = torch.zeros(A.shape[0], device=A.device) if delta_bias is None else delta_bias.detach().float()
        step = F.softplus(bias) if delta_softplus else bias.abs()
    speed = _in_tiles(A.detach().abs() * step[:, None], vector).amax((1, 3))  # per token
    ladder = torch.tensor(PERIODS, device=A.device)
    periods = torch.where(speed[..., None] * ladder <= theta, ladder, 1).amax(-1)
    whole = periods.repeat_interleave(vector[0], 0).repeat_interleave(vector[1], 1)
    return whole[: A.shape[0], : A.shape[1]]


def _in_tiles(t: Tensor, vector: tuple[int, int]) -> Tensor:
    """(d, n) as (tiles, channels, tiles, states); the last row and column are repeated as padding."""
    (d, n), (channels, states) = t.shape, vector
    rows = torch.arange(-(-d // channels) * channels, device=t.device).clamp_max(d - 1)
    columns = torch.arange(-(-n // states) * states, device=t.device).clamp_max(n - 1)
    return t[rows][:, columns].unflatten(1, (-1, states)).unflatten(0, (-1, channels))


def error_bound(theta: float, decay: str = "compound") -> float:
    """Bound the error of a state, as tokens read it, against the full scan, in units of max|B u| / |A|.

    Let x = |A| S <= theta in every block, and g = x / (1 - e^-x). The states of the full scan are at most g
    units. Each block end adds two errors. The state decays by f(-x), not e^-x: at most g x^2 / 16 units for
    "compound", 0 for "exact". Each input decays by f(-x (p - 1) / (2 p)), not by its exact factor: at most
    w = max(1 - f(-x / 2), f(-x / 4) - e^-x) of the input. The sum over all blocks is geometric:

        at block ends        g (g x / 16 + w)
        within blocks        x (2 - e^-x) more: neither the state nor the inputs are decayed yet

    The bound goes to 0 with theta. The initial state of a sequence must be at most g units as well.

    Examples:
        >>> [round(error_bound(theta), 3) for theta in (0.01, 0.1, 0.5)]
        [0.018, 0.19, 1.097]
    """
    check = Checker("error_bound")
    check.that(theta > 0, "theta", "be above 0", theta)
    check.one_of("decay", decay, DECAYS)

    def f(z: float) -> float:
        return float(decay_factor(torch.tensor(z, dtype=torch.float64), decay))

    g, kept = theta / -math.expm1(-theta), math.exp(-theta)
    w = max(1 - f(-theta / 2), f(-theta / 4) - kept)
    lost = theta / 16 if decay == "compound" else 0.0
    return g * (g * lost + w) + theta * (2 - kept)


def decay_factor(exponent: Tensor, decay: str) -> Tensor:
    """f(z): exp(z), or max(0, 1 + z / 8)^8."""
    if decay == "exact":
        return torch.exp(exponent)
    power = (exponent / 8).add_(1).clamp_min_(0)
    for _ in range(3):
        power = power.square() if power.requires_grad else power.square_()
    return power


def _choose(check, backend, u, A, B, C, table) -> tuple[str, np.ndarray | None]:
    """The backend, and for "cpu" the periods as its kernels take them."""
    g = B.shape[1] if B.dim() == 4 else C.shape[1] if C.dim() == 4 else 1
    found, able = None, u.device.type == "cpu" and not available_backends()["cpu"]
    if backend in ("auto", "cpu") and able:
        found = None if A.is_complex() else _in_vectors(table, g, 64 // A.element_size())
    if backend == "cpu":
        require_backend(check, "projecta.scan", backend, u.device.type)
        check.that(not A.is_complex(), "A", "be real for backend 'cpu'", A.dtype, error=TypeError)
        check.that(
            found is not None, "periods",
            f"be 1, 2, 4, 8 or 16, and equal in {64 // A.element_size()} adjacent channels of a group and 4 "
            "states, for backend 'cpu'", "other periods", "Use choose_periods, or backend='vectorised'.",
        )  # fmt: skip
    if backend == "auto":
        backend = "vectorised" if found is None else "cpu"
    return backend, found


def _in_vectors(table: Tensor, g: int, width: int) -> np.ndarray | None:
    """The period of each vector of channels and four states, flat; None if the kernels cannot take them."""
    kernels, periods = _kernels("layout"), table.numpy()
    if not periods.size or periods.max() > kernels.CHUNK or (periods & (periods - 1)).any():
        return None
    d, n = periods.shape
    firsts = np.concatenate([np.arange(i, i + d // g, width) for i in range(0, d, d // g)])
    found = periods[firsts][:, :: kernels.UNROLL]
    sizes = np.diff(firsts, append=d)
    again = found.repeat(sizes, 0).repeat(kernels.UNROLL, 1)[:, :n]
    return found.astype(np.int64).ravel() if np.array_equal(again, periods) else None


def _kernels(module: str) -> Any:
    """A module of backend "cpu"; numba is imported on first use."""
    return import_module(f"projecta.scan.cpu.{module}")


class _OnCpu(torch.autograd.Function):
    """The scan in the kernels of backend "cpu"."""

    @staticmethod
    def forward(ctx, periods, exact, delta_softplus, *tensors):
        inputs = Inputs(*tensors)
        y, last, saved = _kernels("launch").lazy_forward(
            inputs, delta_softplus, periods, exact, any(ctx.needs_input_grad)
        )
        ctx.save_for_backward(saved, *tensors)
        ctx.rest = periods, exact, delta_softplus
        ctx.set_materialize_grads(False)
        ctx.last_shape = last.shape
        return y, last

    @staticmethod
    def backward(ctx, grad_y, grad_last):
        saved, *tensors = ctx.saved_tensors
        sources = (grad_y, grad_last, *tensors)
        refuse_tangents("mrss_scan", sources, "cpu")
        with torch.no_grad():
            grads = _OnCpu.gradients(ctx, grad_y, grad_last, saved, tensors)
        return None, None, None, *only_once("mrss_scan", "cpu", grads, sources), None

    @staticmethod
    def gradients(ctx, grad_y, grad_last, saved, tensors):
        inputs, (periods, exact, delta_softplus) = Inputs(*tensors), ctx.rest
        grad_y = torch.zeros_like(inputs.u) if grad_y is None else grad_y
        grad_last = inputs.A.new_zeros(ctx.last_shape) if grad_last is None else grad_last
        grads = Inputs(*(None if t is None else torch.empty_like(t) for t in tensors[:9]))
        _kernels("launch").lazy_backward(
            grad_y, grad_last, saved, inputs, delta_softplus, grads, periods, exact
        )
        return grads[:9]


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
    """The module's formula, one token after the other; a short last block ends with the sequence."""
    y, state = _tokens(x, delta, A, B, C, MrssState.start(h), periods, decay)
    h, acc, S, length = state
    last = torch.where(length > 0, _end_block(A, S, h, acc, length.clamp_min(1), decay), h)
    return y, last


def _tokens(x, delta, A, B, C, state, periods, decay):
    """y, and the state after the tokens."""
    d = x.shape[1]
    periods = periods.to(x.device)
    h, acc, S, length = state
    ys = []
    for x_t, delta_t, B_t, C_t in zip(*reference.over_time(x, delta, B, C), strict=True):
        S = S + delta_t[..., None]
        acc = acc + (delta_t * x_t)[..., None] * reference.for_channels(B_t, d)
        length = length + 1
        ends = length == periods
        h, acc = torch.where(ends, _end_block(A, S, h, acc, length, decay), h), torch.where(ends, 0, acc)
        S, length = torch.where(ends, 0, S), torch.where(ends, 0, length)
        ys.append(reference.read_out(h + acc, reference.for_channels(C_t, d)))
    return (torch.stack(ys, -1) if ys else x), MrssState(h, acc, S, length)


def _scan_piece(u, delta, A, B, C, D, z, delta_bias, softplus, state, periods, decay, backend):
    """Go on from a state: by `mrss_scan` between common starts of all blocks, else token by token."""
    check = Checker("mrss_scan")
    canonical = canonical_arguments(check, u, delta, A, B, C, D, z, delta_bias, None, None)
    check.one_of("decay", decay, DECAYS)
    check.one_of("backend", backend, ("auto", *BACKENDS))
    b, (d, n) = len(u), A.shape
    for name, t in state._asdict().items():
        expected = (d, n) if name == "length" else (b, d, n)
        check.that(
            tuple(t.shape) == expected, f"initial_state.{name}", f"have shape {expected}", tuple(t.shape)
        )
    table = _check_periods(check, periods, A, delta_bias, softplus)
    common, l = math.lcm(*table.unique().tolist()) if table.numel() else 1, u.shape[-1]
    lengths = state.length.cpu()
    starts = (k for k in range(common) if bool(((lengths + k) % table == 0).all()))
    head = l if backend == "reference" else min(l, next(starts, l))
    ys, tail = [], head + (l - head) // common * common
    for start, stop in ((0, head), (head, tail), (tail, l)):
        if start == stop:
            continue
        along = [None if t is None else t[..., start:stop] for t in (u, delta, z)]
        if start == head and head < tail:
            weights = (t if t.dim() == 2 else t[..., start:stop] for t in canonical[1:3])
            y, h = mrss_scan(
                along[0], along[1], canonical[0], *weights, D, along[2], delta_bias, softplus, True,
                initial_state=state.h, periods=table, decay=decay, backend=backend,
            )  # fmt: skip
            state = MrssState.start(h)
        else:
            weights = (t if t.dim() == 2 else t[..., start:stop] for t in canonical[1:3])
            y, state = _piece_by_reference(
                along[0], along[1], canonical[0], *weights, D, along[2], delta_bias, softplus, state, table,
                decay,
            )  # fmt: skip
        ys.append(y)
    return (torch.cat(ys, -1) if ys else u), state


def _piece_by_reference(u, delta, A, B, C, D, z, delta_bias, softplus, state, table, decay):
    real = A.real.dtype if A.is_complex() else A.dtype
    x = u.to(real)
    step = reference.by_token(lambda t: reference.step_size(t, delta_bias, softplus, real), delta)
    y, state = _tokens(x, step, A, B, C, state, table, decay)
    y = reference.by_token(lambda y, x, z: reference.skip_and_gate(y, x, D, z), y, x, z)
    return y.to(u.dtype), state


def _end_block(A, S, h, acc, length, decay):
    """f(A S) h + f(A S (p - 1) / (2 p)) acc, for a block of p = length tokens."""
    length = length.to(S.dtype)
    return decay_factor(A * S, decay) * h + decay_factor(A * S * ((length - 1) / (2 * length)), decay) * acc


def _scan_vectorised(x, delta, A, B, C, h, periods, decay):
    """Group the channels with equal rows of periods, and in each group the states with equal periods."""
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
    """B and C as (b, g, n, l); if one is constant in time, every channel becomes a group."""
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
    """y (t, b, g, k) and the last state, for states with one period p; x, delta (t, b, g, k), A (g, k, n), h
    (b, g, k, n).

    Within a block of p tokens the output is a product of small matrices. The state is computed only at the
    end of the block.
    """
    l = len(x)
    short = l % p  # tokens of a short last block, else 0; steps of size 0 pad it
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
    """(t, ...) as (blocks, p, ...), padded with zeros."""
    short = -len(t) % p
    return (F.pad(t, (0, 0) * (t.dim() - 1) + (0, short)) if short else t).unflatten(0, (-1, p))


class _Recurrence(torch.autograd.Function):
    """h_t = a_t h_{t-1} + v_t along the first axis, from h."""

    @staticmethod
    def forward(ctx, a, v, h):
        if any(ctx.needs_input_grad):
            a, v, kept = a.clone(), v.clone(), a
        else:  # both are temporaries: overwrite them
            kept = None
        v[0] += a[0] * h
        hs = vectorised.linear_recurrence_(a, v)
        ctx.save_for_backward(kept, hs, h)
        return hs

    @staticmethod
    def backward(ctx, grad):
        a, hs, h = ctx.saved_tensors
        refuse_tangents("mrss_scan", (grad, a, hs, h), "vectorised")
        with torch.no_grad():
            a_next = torch.cat([a[1:], torch.zeros_like(a[:1])]).conj().resolve_conj()
            g = vectorised.linear_recurrence_(a_next, grad.clone(), reverse=True)
            before = torch.cat([h[None], hs[:-1]])
            grads = g * before.conj(), g, a[0].conj() * g[0]
        return tuple(only_once("mrss_scan", "vectorised", grads, (grad, a, hs, h)))
