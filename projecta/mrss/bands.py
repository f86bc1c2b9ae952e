"""MRSS band by band, as one autograd node, for backends with kernels of their own.

Such a backend is a module here with NAME, `takes`, `scan` (the scan's launches on that device), `Coarse`,
`new_like` and `may_run_beside`. Bands read and write the caller's tensors in place.
"""

import itertools
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from projecta._operators import differentiable, is_plain
from projecta.mrss.reference import Cut, channels_of
from projecta.scan._operator import Inputs


def scan_bands(inputs: Inputs, softplus: bool, cut: Cut, backend: ModuleType) -> tuple[Tensor, Tensor] | None:
    """y and the last state; None if the call needs torch's operators."""
    if inputs.A.is_complex() or not (inputs.u.numel() and is_plain(inputs) and backend.takes(inputs)):
        return None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        forward = partial(_forward, softplus, cut, backend, True)
        backward = partial(_backward, softplus, cut, backend)
        return differentiable("mrss_scan", backend.NAME, forward, backward, inputs)
    return _forward(softplus, cut, backend, False, *inputs)[0]


def _own(inputs: Inputs, span: slice) -> Inputs:
    own = channels_of(inputs, span)
    start = own.initial_state
    return own if start is None else own._replace(initial_state=start.contiguous())


def _forward(softplus: bool, cut: Cut, backend: Any, save: bool, *tensors: Any) -> tuple:
    inputs = Inputs(*tensors)
    A, bounds = inputs.A, inputs.cu_seqlens
    y, sequences = backend.new_like(inputs.u), len(inputs.u) if bounds is None else len(bounds) - 1

    def scan(span: slice, period: int) -> tuple[Tensor, list[Tensor]]:
        own = _own(inputs, span)
        last = A.new_empty(sequences, *own.A.shape)
        if period > 1:
            return last, backend.Coarse(own, softplus, period).forward(y[:, span], last, save)
        saved = A.new_empty(backend.scan.saved_shape(own, sequences, 8) if save else 0)
        backend.scan.forward_pass(own, softplus, y[:, span], last, saved)
        return last, [saved]

    lasts, kept = zip(*_each(backend, inputs.u, cut, scan), strict=True)
    return (y, torch.cat(lasts, 1)), tuple(itertools.chain(*kept))


def _each(backend: Any, u: Tensor, cut: Cut, scan: Callable[[slice, int], Any]) -> list:
    """The results of `scan` for each band; coarse bands run beside the others where that is faster."""
    if not (len(cut) > 1 and backend.may_run_beside(u)):
        return [scan(*band) for band in cut]
    found: dict[int, Any] = {}
    with backend.beside(u):
        for i, (span, period) in enumerate(cut):
            if period > 1:
                found[i] = scan(span, period)
    for i, (span, period) in enumerate(cut):
        if period == 1:
            found[i] = scan(span, period)
    backend.join(u)
    return [found[i] for i in range(len(cut))]


def _backward(
    softplus: bool, cut: Cut, backend: Any, grads: tuple, kept: tuple, given: tuple
) -> list[Tensor | None]:
    inputs, (grad_y, grad_last) = Inputs(*given), grads
    bounds, A = inputs.cu_seqlens, inputs.A
    grad_y = torch.zeros_like(inputs.u) if grad_y is None else grad_y
    if grad_last is None:
        grad_last = A.new_zeros(len(inputs.u) if bounds is None else len(bounds) - 1, *A.shape)
    new: list[Any] = [None if t is None else backend.new_like(t) for t in inputs[:9]]
    new[3:5] = (A.new_empty(t.shape) for t in (inputs.B, inputs.C))  # dense: bands write groups of them
    found, parts = Inputs(*new), iter(kept)
    saved = {span.start: [next(parts) for _ in range(1 if period == 1 else 4)] for span, period in cut}

    def differentiate(span: slice, period: int) -> tuple:
        own, to = _own(inputs, span), channels_of(found, span)
        start = None if own.initial_state is None else torch.empty_like(own.initial_state)
        to, last = to._replace(initial_state=start), grad_last[:, span].contiguous()
        # B and C of one group are of all bands, whose gradients are added
        alone = [span.start == 0 or t.dim() == 2 or t.shape[1] > 1 for t in (inputs.B, inputs.C)]
        targets = to.B, to.C
        if period > 1:
            band = backend.Coarse(own, softplus, period)
            parts = band.backward(grad_y[:, span], last, saved[span.start], to)
            return start, [
                partial(band.spread, name, part, target, not only)
                for name, part, target, only in zip("BC", parts, targets, alone, strict=True)
            ]
        dB, dC = (t if only else torch.empty_like(t) for t, only in zip(targets, alone, strict=True))
        to = to._replace(B=dB, C=dC)
        backend.scan.backward_pass(grad_y[:, span], last, saved[span.start][0], own, softplus, to)
        pairs = zip(targets, (dB, dC), strict=True)
        return start, [partial(t.add_, part) for t, part in pairs if part is not t]

    starts, sums = zip(*_each(backend, inputs.u, cut, differentiate), strict=True)
    for add in itertools.chain(*sums):
        add()
    if inputs.initial_state is not None:
        found = found._replace(initial_state=torch.cat(starts, 1))
    pairs: Any = zip(found, inputs[:9], strict=False)
    return [*(None if t is None else g.to(t.dtype) for g, t in pairs), None]
