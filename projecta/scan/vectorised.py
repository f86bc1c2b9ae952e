"""The scan in plain PyTorch operations, on any device, without a loop over every step.

Time is cut into segments, so that memory does not grow with (b, d, l, n). A segment is cut into chunks of
`CHUNK` steps. A loop of `CHUNK` steps advances all chunks at once, then the state is carried from chunk to
chunk. The scan is stable for any length: decay factors are multiplied, never divided by.

The backward pass recomputes each segment from the state at its start. The forward pass saves only these
states.

Inside a segment, time comes first and channels are grouped as B and C are: (t, b, g, k, n) with d = g k.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from projecta.scan import reference
from projecta.scan._operator import Inputs, define

CHUNK = 16  # steps per chunk: the loop's length
SEGMENT_ELEMENTS = 3_000_000  # size of a segment in elements of (t, b, d, n): it should fit in the cache


def unavailable() -> str:
    """Why this backend cannot run; "" when it can."""
    return ""


selective_state_update = reference.selective_state_update  # one step has nothing to vectorise


def linear_recurrence_(a: Tensor, v: Tensor, reverse: bool = False) -> Tensor:
    """h_t = a_t h_{t-1} + v_t (reversed: a_t h_{t+1}), axis 0, from h = 0; v becomes h, a is overwritten."""
    whole = len(a) // CHUNK * CHUNK
    parts = [t for t in (slice(0, whole), slice(whole, len(a))) if t.start < t.stop]
    before = None  # the previous part
    for part in reversed(parts) if reverse else parts:
        if before is not None:
            first, neighbour = (part.stop - 1, before.start) if reverse else (part.start, before.stop - 1)
            v[first] += a[first] * v[neighbour]
        _scan_chunks_(a[part], v[part], reverse)
        before = part
    return v


def _scan_chunks_(a: Tensor, v: Tensor, reverse: bool) -> None:
    """`linear_recurrence_` for one chunk of any length, or several whole chunks."""
    chunk = min(CHUNK, len(a))
    a, v = (t.view(len(t) // chunk, chunk, *t.shape[1:]) for t in (a, v))
    steps = range(chunk - 1, -1, -1) if reverse else range(chunk)
    for before, t in itertools.pairwise(steps):
        torch.addcmul(v[:, t], a[:, t], v[:, before], out=v[:, t])
        a[:, t] *= a[:, before]
    chunks = range(len(a) - 1, -1, -1) if reverse else range(len(a))
    for before, c in itertools.pairwise(chunks):
        torch.addcmul(v[c], a[c], v[before, steps[-1]], out=v[c])


def _segments(l: int, elements_per_step: int) -> list[tuple[int, int]]:
    """(start, stop) of the segments; all but the last are whole chunks."""
    size = max(1, SEGMENT_ELEMENTS // (elements_per_step * CHUNK)) * CHUNK
    return [(start, min(start + size, l)) for start in range(0, l, size)]


class _Scan:
    """The views and sizes of one call, shared by the two passes."""

    def __init__(self, inputs: Inputs, delta_softplus: bool):
        u, _, A, B, C = inputs[:5]
        self.inputs, self.delta_softplus = inputs, delta_softplus
        self.b, self.d, self.l = u.shape
        self.n = A.shape[1]
        self.g = next((t.shape[1] for t in (B, C) if t.dim() == 4), 1)
        self.real = A.real.dtype if A.is_complex() else A.dtype
        self.A = A.view(self.g, -1, self.n)
        self.axes_B, self.axes_C = ("tbgn" if t.dim() == 4 else "gkn" for t in (B, C))
        bounds = [0, self.l] if inputs.cu_seqlens is None else inputs.cu_seqlens.tolist()
        self.sequences = list(itertools.pairwise(bounds))
        self.segments = _segments(self.l, max(1, self.b * self.d * self.n))
        self.packed = inputs.cu_seqlens is not None

    def states(self, states: Tensor) -> Tensor:
        """(b, d, n), or (s, d, n) if packed, as (sequence, b, g, k, n)."""
        return states.view(len(self.sequences), 1 if self.packed else self.b, *self.A.shape)

    def channels(self, t: Tensor, start: int, stop: int) -> Tensor:
        """(b, d, l) at start...stop as (t, b, g, k)."""
        return (
            t[..., start:stop].permute(2, 0, 1).to(self.real).reshape(stop - start, self.b, *self.A.shape[:2])
        )

    def weights(self, B: Tensor, start: int, stop: int) -> Tensor:
        """B or C at start...stop as (t, b, g, n), or (g, k, n) if constant."""
        if B.dim() == 2:
            return B.to(self.A.dtype).view(self.A.shape)
        return B[..., start:stop].permute(3, 0, 1, 2).to(self.A.dtype).contiguous()

    def vector(self, t: Tensor) -> Tensor:
        """(d,) as (g, k)."""
        return t.to(self.real).view(self.g, -1)

    def starts(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(sequence, step in the segment) of the sequences that begin in start...stop."""
        return [(s, a - start) for s, (a, z) in enumerate(self.sequences) if start <= a < stop and a < z]

    def ends(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(sequence, last step in the segment) of the sequences that end in start...stop."""
        return [(s, z - 1 - start) for s, (a, z) in enumerate(self.sequences) if start < z <= stop and a < z]

    def step_size(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """delta before and after softplus, (t, b, g, k)."""
        raw = self.channels(self.inputs.delta, start, stop)
        if self.inputs.delta_bias is not None:
            raw = raw + self.vector(self.inputs.delta_bias)
        return raw, F.softplus(raw) if self.delta_softplus else raw

    def buffers(self, count: int) -> list[Tensor]:
        """(t, b, g, k, n) buffers that all segments share: page faults cost more than the arithmetic."""
        longest = max((stop - start for start, stop in self.segments), default=0)
        return [self.A.new_empty(longest, self.b, *self.A.shape) for _ in range(count)]

    def decay(self, delta: Tensor, out: Tensor) -> Tensor:
        """exp(delta A), (t, b, g, k, n)."""
        return torch.mul(delta[..., None], self.A, out=out[: len(delta)]).exp_()

    def spread(self, x: Tensor, B: Tensor, out: Tensor) -> Tensor:
        """x_t B_t, (t, b, g, k, n), for x (t, b, g, k) and B from `weights`."""
        return torch.mul(x[..., None], B if B.dim() == 3 else B[..., None, :], out=out[: len(x)])

    def hidden(
        self, a: Tensor, v: Tensor, initial: Tensor | None, carry: Tensor | None, start: int, stop: int
    ) -> Tensor:
        """The states of a segment from its decays a, inputs v and the state before it; overwrites a and v."""
        starts = self.starts(start, stop)
        for s, t in starts:
            if initial is not None:
                v[t] += a[t] * initial[s]
            a[t] = 0
        if carry is not None and (0 not in (t for _, t in starts)):
            v[0] += a[0] * carry
        return linear_recurrence_(a, v)

    def read_out(self, h: Tensor, C: Tensor, x: Tensor) -> Tensor:
        """C h + D u, (t, b, g, k)."""
        y = _real(torch.einsum(f"tbgkn,{self.axes_C}->tbgk", h, C))
        return y if self.inputs.D is None else y + self.vector(self.inputs.D) * x


def _real(t: Tensor) -> Tensor:
    """2 Re(t) of a complex t: each complex state represents a conjugate pair."""
    return 2 * t.real if t.is_complex() else t


def _put(out: Tensor, start: int, stop: int, t: Tensor) -> None:
    """Write (t, b, g, k) into start...stop of the (b, d, l) tensor `out`."""
    out[..., start:stop] = t.flatten(2).permute(1, 2, 0)


def _forward(inputs: Inputs, delta_softplus: bool, y: Tensor, last_state: Tensor, saved: Tensor) -> None:
    scan = _Scan(inputs, delta_softplus)
    initial = None if inputs.initial_state is None else scan.states(inputs.initial_state)
    last = scan.states(last_state)
    last.copy_(torch.zeros_like(last) if initial is None else initial)  # the last state of an empty sequence
    carry = None
    buffer_a, buffer_v = scan.buffers(2)
    for i, (start, stop) in enumerate(scan.segments):
        if saved.numel():
            saved[i] = 0 if carry is None else carry.view(saved[i].shape)
        x = scan.channels(inputs.u, start, stop)
        _, delta = scan.step_size(start, stop)
        B, C = (scan.weights(t, start, stop) for t in (inputs.B, inputs.C))
        v = scan.spread(delta * x, B, buffer_v)
        h = scan.hidden(scan.decay(delta, buffer_a), v, initial, carry, start, stop)
        out = scan.read_out(h, C, x)
        if inputs.z is not None:
            out = out * F.silu(scan.channels(inputs.z, start, stop))
        _put(y, start, stop, out)
        for s, t in scan.ends(start, stop):
            last[s] = h[t]
        carry = h[-1].clone()


def _backward(
    grad_y: Tensor, grad_last: Tensor, saved: Tensor, inputs: Inputs, delta_softplus: bool, grads: Inputs
) -> None:
    scan = _Scan(inputs, delta_softplus)
    initial = None if inputs.initial_state is None else scan.states(inputs.initial_state)
    dlast = scan.states(grad_last)
    dA, dB0, dC0 = (torch.zeros_like(scan.A) for _ in range(3))  # B0, C0: constant B, C
    dD, dbias = scan.A.new_zeros(2, *scan.A.shape[:2], dtype=scan.real)
    dinitial = None
    if grads.initial_state is not None:
        dinitial = scan.states(grads.initial_state)
        dinitial.copy_(dlast)  # correct for empty sequences; the others are set below
    buffer_h, buffer_g, buffer_a, room_decay, room_before = scan.buffers(5)
    later = None  # a g at the start of the next segment: a gradient of this segment's last state
    for i, (start, stop) in reversed(list(enumerate(scan.segments))):
        x = scan.channels(inputs.u, start, stop)
        raw, delta = scan.step_size(start, stop)
        B, C = (scan.weights(t, start, stop) for t in (inputs.B, inputs.C))
        dy = scan.channels(grad_y, start, stop)

        # Recompute the states from the one that the forward pass saved.
        p = delta * x
        v = scan.spread(p, B, buffer_h)
        decay = scan.decay(delta, room_decay)
        carry = saved[i].view(scan.b, *scan.A.shape) if i else None
        h = scan.hidden(buffer_a[: len(x)].copy_(decay), v, initial, carry, start, stop)
        before = _before(room_before[: len(x)], h, carry, initial, scan.starts(start, stop))

        if inputs.z is not None and grads.z is not None:
            dz, dy = _ungate(scan.channels(inputs.z, start, stop), scan.read_out(h, C, x), dy)
            _put(grads.z, start, stop, dz)
        dx = torch.zeros_like(x)
        if inputs.D is not None:
            dD += (dy * x).sum((0, 1))
            dx = dy * scan.vector(inputs.D)
        dy = (2 * dy if scan.A.is_complex() else dy).to(scan.A.dtype)

        # g_t = C_t dy_t + a_{t+1} g_{t+1}; no gradient crosses the start of a sequence.
        g = scan.spread(dy, C.conj(), buffer_g)
        for s, t in scan.ends(start, stop):
            g[t] += dlast[s]
        if later is not None:
            g[-1] += later
        a_next = buffer_a[: len(x)]
        a_next[:-1] = decay[1:].conj()
        a_next[-1] = 0
        for _, t in scan.starts(start, stop):
            if t:
                a_next[t - 1] = 0
        g = linear_recurrence_(a_next, g, reverse=True)
        later = decay[0].conj() * g[0]
        for s, t in scan.starts(start, stop):
            if dinitial is not None:
                dinitial[s] = decay[t].conj() * g[t]
            if t == 0:
                later = None

        dC = torch.einsum(f"tbgkn,tbgk->{scan.axes_C}", h.conj(), dy)
        dB = torch.einsum(f"tbgkn,tbgk->{scan.axes_B}", g, p.to(g.dtype))
        dp = torch.einsum(f"tbgkn,{scan.axes_B}->tbgk", g, B.conj()).real
        exponent = before.conj_physical_().mul_(g).mul_(decay.conj())  # gradient of delta A
        ddelta = torch.einsum("tbgkn,gkn->tbgk", exponent, scan.A.conj()).real + dp * x
        dA += torch.einsum("tbgkn,tbgk->gkn", exponent, delta.to(exponent.dtype))
        if delta_softplus:
            ddelta = ddelta * torch.where(raw > 20, 1.0, torch.sigmoid(raw))
        dbias += ddelta.sum((0, 1))
        _put(grads.u, start, stop, dx + dp * delta)
        _put(grads.delta, start, stop, ddelta)
        for grad, constant, part in ((grads.B, dB0, dB), (grads.C, dC0, dC)):
            if grad.dim() == 2:
                constant += part
            else:
                grad[..., start:stop] = part.permute(1, 2, 3, 0)
    totals = ((grads.A, dA), (grads.D, dD), (grads.delta_bias, dbias), (grads.B, dB0), (grads.C, dC0))
    for whole, total in totals:
        if whole is not None and whole.dim() < 4:
            whole.copy_(total.view(whole.shape))


def _before(buffer: Tensor, h: Tensor, carry: Tensor | None, initial: Tensor | None, starts) -> Tensor:
    """Write the state before each step to `buffer`."""
    buffer[1:] = h[:-1]
    buffer[0] = 0 if carry is None else carry
    for s, t in starts:
        buffer[t] = 0 if initial is None else initial[s]
    return buffer


def _ungate(z: Tensor, y: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of z and y, from the gradient of y silu(z)."""
    sigma = torch.sigmoid(z)
    return dy * y * sigma * (1 + z * (1 - sigma)), dy * z * sigma


def _saved_shape(inputs: Inputs, sequences: int, every: int) -> tuple[int, ...]:
    """The state before each segment."""
    u, A = inputs.u, inputs.A
    b, d, l = u.shape
    return len(_segments(l, max(1, b * d * A.shape[1]))), b, *A.shape


selective_scan = define("scan_vectorised", _forward, _backward, _saved_shape)
