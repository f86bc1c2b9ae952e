"""MRSS in plain PyTorch: token by token (the judge of the others), piece by piece, and block by block."""

import functools
import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from projecta.scan import reference as scan
from projecta.scan._operator import Inputs

Cut = list[tuple[slice, int]]  # channels and period of each band


def channels_of(inputs: Inputs, span: slice) -> Inputs:
    """The inputs of some channels, as views. B and C that vary in time keep the groups of these channels."""
    u, delta, A, B, C, D, z, bias, start, bounds = inputs
    d, first, count = A.shape[0], span.start, span.stop - span.start

    def grouped(t: Tensor) -> Tensor:
        if t.dim() == 2:
            return t.narrow(0, first, count)
        each = d // t.shape[1]
        return t if t.shape[1] == 1 else t[:, first // each : -(-span.stop // each)]

    def own(t: Tensor | None, axis: int) -> Any:
        return None if t is None else t.narrow(axis, first, count)

    return Inputs(
        own(u, 1), own(delta, 1), own(A, 0), grouped(B), grouped(C), own(D, 0), own(z, 1), own(bias, 0),
        own(start, 1), bounds,
    )  # fmt: skip


class MrssState(NamedTuple):
    """The state of a sequence that may stop within blocks.

    h: the states (b, d, n). output: what the tokens of the present blocks read. product, span: the sums of
    s u and of s since the blocks began; all (b, d). B, C: the sums of B and C since then (bands, b, g, n).
    length: the tokens so far, an int64 on the CPU.
    """

    h: Tensor
    output: Tensor
    product: Tensor
    span: Tensor
    B: Tensor
    C: Tensor
    length: Tensor

    @classmethod
    def start(cls, h: Tensor, bands: int = 2, groups: int = 1) -> "MrssState":
        """The state before the first token, from h (b, d, n), for so many bands and groups.

        Examples:
            >>> MrssState.start(torch.zeros(1, 2, 3)).output.shape
            torch.Size([1, 2])
        """
        b, _, n = h.shape
        output, product, span = h.real.new_zeros(3, *h.shape[:2]).unbind()
        B, C = h.new_zeros(2, bands, b, groups, n).unbind()
        return cls(h.clone(), output, product, span, B, C, torch.zeros((), dtype=torch.int64, device="cpu"))


def _real(A: Tensor) -> torch.dtype:
    return torch.float64 if A.dtype in (torch.float64, torch.complex128) else torch.float32


class Blocks(NamedTuple):
    """How the steps of a row are cut into blocks.

    period: steps of a block. number: of blocks, at most. of: the block of each step. reads: the block that it
    reads, `number` for none. sizes: steps of each block, 1 for none. bounds: as cu_seqlens, but in blocks.
    """

    period: int
    number: int
    of: Tensor
    reads: Tensor
    sizes: Tensor
    bounds: Tensor | None


def cut_blocks(l: int, period: int, bounds: Tensor | None, device: torch.device) -> Blocks:
    """Blocks of `period` steps from each sequence's first step on.

    Packed sequences begin at block cu_seqlens // period + their number, which needs no look at the values;
    the blocks between two sequences are empty, and an empty block changes no state.
    """
    if bounds is None:
        even = _even_blocks.__wrapped__ if torch.compiler.is_compiling() else _even_blocks
        return even(l, period, device)
    t = torch.arange(l, device=device)
    sequences = len(bounds) - 1
    starts = bounds.long()
    count = l // period + sequences
    first = starts[:-1] // period + torch.arange(sequences, device=device)
    own = torch.searchsorted(starts, t, right=True) - 1
    place = (t - starts[own]) // period
    of = first[own] + place
    ends = torch.cat([first, first.new_tensor([count])]).to(torch.int32)
    return Blocks(period, count, of, torch.where(place > 0, of - 1, count), _sizes(of, count), ends)


@functools.lru_cache(64)
def _even_blocks(l: int, period: int, device: torch.device) -> Blocks:
    of, count = torch.arange(l, device=device) // period, -(-l // period)
    return Blocks(period, count, of, torch.where(of > 0, of - 1, count), _sizes(of, count), None)


def _sizes(of: Tensor, count: int) -> Tensor:
    return torch.bincount(of, minlength=count).clamp_min(1)


def block_sums(t: Tensor, blocks: Blocks) -> Tensor:
    """(..., l) summed to (..., number)."""
    if blocks.bounds is None:  # in a fixed order on every device
        whole = F.pad(t, (0, -t.shape[-1] % blocks.period))
        return whole.unflatten(-1, (blocks.number, blocks.period)).sum(-1)
    return t.new_zeros(*t.shape[:-1], blocks.number).index_add(-1, blocks.of, t)


def block_means(t: Tensor, blocks: Blocks, real: torch.dtype) -> Tensor:
    """B or C (b, g, n, l) as (b, g, n, number), in the type of the states; constant ones as they are."""
    if t.dim() == 2:
        return t
    t = t if t.is_complex() else t.to(real)
    return block_sums(t, blocks) / blocks.sizes.to(real)


def scan_blocks(inputs: Inputs, softplus: bool, period: int, module: Any) -> tuple[Tensor, Tensor]:
    """y and the last state of one band; `module` is a backend of the scan."""
    u, delta, A, B, C, D, z, bias, start, bounds = inputs
    real = _real(A)
    blocks = cut_blocks(u.shape[2], period, bounds, u.device)
    s = scan.step_size(delta, bias, softplus, real)
    span = block_sums(s, blocks)
    x = block_sums(s * u.to(real), blocks) / (span + torch.finfo(real).tiny)
    B, C = (block_means(t, blocks, real) for t in (B, C))
    y, last = module.selective_scan(x, span, A, B, C, None, None, None, False, start, blocks.bounds)
    y = y.to(real)
    if bounds is None:
        read = F.pad(y[..., :-1], (1, 0)).repeat_interleave(period, -1)[..., : u.shape[2]]
    else:
        read = F.pad(y, (0, 1))[..., blocks.reads]
    return scan.skip_and_gate(read, u.to(real), D, None if z is None else z.to(real)).to(u.dtype), last


def by_tokens(inputs: Inputs, softplus: bool, cut: Cut) -> tuple[Tensor, Tensor]:
    """y and the last state by the formula, one token after the other."""
    u, A, bounds = inputs.u, inputs.A, inputs.cu_seqlens
    if bounds is None:
        start = A.new_zeros(len(u), *A.shape) if inputs.initial_state is None else inputs.initial_state
        groups = max(t.shape[1] if t.dim() == 4 else 1 for t in (inputs.B, inputs.C))
        y, state = scan_piece(inputs, softplus, cut, MrssState.start(start, len(cut), groups))
        return y, _end_blocks(state, inputs, cut)
    ys, lasts, ends = [u[..., :0]], [], bounds.tolist()
    for i, (first, stop) in enumerate(itertools.pairwise(ends)):
        along: Any = (None if t is None or t.dim() == 2 else t[..., first:stop] for t in inputs[:7])
        u, delta, _, B, C, _, z = along
        own = inputs._replace(
            u=u, delta=delta, B=inputs.B if B is None else B, C=inputs.C if C is None else C, z=z,
            initial_state=None if inputs.initial_state is None else inputs.initial_state[i : i + 1],
            cu_seqlens=None,
        )  # fmt: skip
        y, last = by_tokens(own, softplus, cut)
        ys.append(y)
        lasts.append(last)
    return torch.cat(ys, -1), torch.cat(lasts) if lasts else A.new_zeros(0, *A.shape)


def scan_piece(inputs: Inputs, softplus: bool, cut: Cut, state: MrssState) -> tuple[Tensor, MrssState]:
    """y and the state after a piece of a sequence, band by band, one token after the other."""
    ys, parts = [], []
    for i, (at, period) in enumerate(cut):
        own = channels_of(inputs, at)
        held = *(t[:, at] for t in state[:4]), state.B[i], state.C[i]
        if period == 1:
            y, h = scan.selective_scan(*own[:8], softplus, held[0], None)
            parts.append((h, *held[1:]))
        else:
            y, new = _band_piece(inputs, own, softplus, (at, period), held, int(state.length))
            parts.append(new)
        ys.append(y)
    h, output, product, span = (torch.cat([part[k] for part in parts], 1) for k in range(4))
    B, C = (torch.stack([part[k] for part in parts]) for k in (4, 5))
    length = state.length + inputs.u.shape[2]
    return torch.cat(ys, 1), MrssState(h, output, product, span, B, C, length)


def _band_piece(
    inputs: Inputs, own: Inputs, softplus: bool, band: tuple[slice, int], held: tuple, length: int
) -> tuple[Tensor, tuple]:
    """The same of one coarse band; own: its inputs, held: its part of the state."""
    (u, delta, A), D, z, bias, (at, period) = own[:3], own.D, own.z, own.delta_bias, band
    real, d, l = _real(A), len(inputs.A), u.shape[2]
    s, x = scan.by_token(lambda t: scan.step_size(t, bias, softplus, real), delta), u.to(real)
    h, output, product, span, *sums = held
    ys = []
    for t in range(l):
        ys.append(output)
        product, span = product + s[..., t] * x[..., t], span + s[..., t]
        sums = [c if w.dim() == 2 else c + w[..., t] for c, w in zip(sums, (inputs.B, inputs.C), strict=True)]
        if (length + t + 1) % period == 0:
            h = _end_block(h, A, product, span, sums[0] / period, (inputs.B, d, at))
            output = scan.read_out(h, _weights(sums[1] / period, inputs.C, d, at))
            product, span, *sums = (torch.zeros_like(each) for each in (product, span, *sums))
    y = torch.stack(ys, -1) if ys else x
    y = scan.by_token(lambda y, x, z: scan.skip_and_gate(y, x, D, z), y, x, z)
    return y.to(u.dtype), (h, output, product, span, *sums)


def _end_block(h: Tensor, A: Tensor, product: Tensor, span: Tensor, B: Tensor, given: tuple) -> Tensor:
    """The state at the end of a block, of the sums over it and the mean of B."""
    return torch.exp(span[..., None] * A) * h + product[..., None] * _weights(B, *given)


def _weights(mean: Tensor, given: Tensor, d: int, at: slice) -> Tensor:
    """The mean of B or C over a block (b, g, n), or a constant one, for a band's channels."""
    if given.dim() == 2:
        return given[at]
    mean = scan.for_channels(mean, d)
    return mean if mean.shape[1] == 1 else mean[:, at]


def _end_blocks(state: MrssState, inputs: Inputs, cut: Cut) -> Tensor:
    """The states, as if all blocks ended here."""
    h, d = [], len(inputs.A)
    for i, (at, period) in enumerate(cut):
        own, size = state.h[:, at], int(state.length) % period
        if period > 1 and size:
            sums = state.product[:, at], state.span[:, at]
            own = _end_block(own, inputs.A[at], *sums, state.B[i] / size, (inputs.B, d, at))
        h.append(own)
    return torch.cat(h, 1)
