"""MRSS band by band, as one autograd node, for backends with kernels of their own.

Such a backend is a module here with NAME, `takes`, `Fine` and `Coarse` (the passes of a band, made once for
calls that differ in values only), `new_like`, `may_run_beside`, and `scanning`, a context for the forward
passes of all bands. Bands read and write the caller's tensors in place.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from projecta._operators import differentiable, is_plain
from projecta.mrss.reference import Cut, channels_of
from projecta.scan._operator import Inputs


def can_scan(inputs: Inputs, backend: Any) -> bool:
    """Whether `Bands` takes a call; else it needs torch's operators."""
    return bool(inputs.u.numel() and not inputs.A.is_complex() and is_plain(inputs) and backend.takes(inputs))


def _own(inputs: Inputs, span: slice) -> Inputs:
    own = channels_of(inputs, span)
    start = own.initial_state
    return own if start is None else own._replace(initial_state=start.contiguous())


class Bands:
    """The bands of calls that differ in values only."""

    def __init__(self, inputs: Inputs, softplus: bool, cut: Cut, backend: Any):
        self.cut, self.backend = cut, backend
        self.grouped = inputs.B.dim() == 4, inputs.C.dim() == 4
        self.graded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
        self.sequences = len(inputs.u) if inputs.cu_seqlens is None else len(inputs.cu_seqlens) - 1
        self.passes = []
        for span, period in cut:
            own = _own(inputs, span)
            make = backend.Fine(own, softplus) if period == 1 else backend.Coarse(own, softplus, period)
            self.passes.append(make)

    def scan(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """y and the last state."""
        if self.graded:
            name = self.backend.NAME
            return differentiable("mrss_scan", name, self._forward, self._backward, inputs)
        return self._forward(*inputs)[0]

    def _forward(self, *tensors: Any) -> tuple:
        inputs = Inputs(*tensors)
        A, y = inputs.A, self.backend.new_like(inputs.u)

        def scan(i: int, span: slice) -> tuple[Tensor, list[Tensor]]:
            own = _own(inputs, span)
            last = A.new_empty(self.sequences, *own.A.shape)
            return last, self.passes[i].forward(own, y[:, span], last, self.graded)

        with self.backend.scanning():
            lasts, kept = zip(*self._each(inputs.u, scan), strict=True)
        return (y, lasts[0] if len(lasts) == 1 else torch.cat(lasts, 1)), tuple(itertools.chain(*kept))

    def _each(self, u: Tensor, scan: Callable[[int, slice], Any]) -> list:
        """The results of `scan` for each band; coarse bands run beside the others where that is faster."""
        bands, backend = [(i, span) for i, (span, _) in enumerate(self.cut)], self.backend
        if not (len(bands) > 1 and backend.may_run_beside(u)):
            return [scan(*band) for band in bands]
        found: dict[int, Any] = {}
        with backend.beside(u):
            found |= {i: scan(i, span) for i, span in bands if self.cut[i][1] > 1}
        found |= {i: scan(i, span) for i, span in bands if self.cut[i][1] == 1}
        backend.join(u)
        return [found[i] for i, _ in bands]

    def _backward(self, grads: tuple, kept: tuple, given: tuple) -> list[Tensor | None]:
        inputs, (grad_y, grad_last), new_like = Inputs(*given), grads, self.backend.new_like
        grad_y = torch.zeros_like(inputs.u) if grad_y is None else grad_y
        new: list[Any] = [None if t is None else new_like(t) for t in inputs[:9]]
        new[3:5] = (inputs.A.new_empty(t.shape) for t in (inputs.B, inputs.C))  # dense: bands write groups
        found, parts = Inputs(*new), iter(kept)
        saved = [[*itertools.islice(parts, each.keeps)] for each in self.passes]

        def differentiate(i: int, span: slice) -> tuple:
            own, to = _own(inputs, span), channels_of(found, span)
            start = None if own.initial_state is None else torch.empty_like(own.initial_state)
            to, last = to._replace(initial_state=start), None if grad_last is None else grad_last[:, span]
            last = None if last is None else last.contiguous()
            # B and C of one group are of all bands, whose gradients are added
            alone = [span.start == 0 or t.dim() == 2 or t.shape[1] > 1 for t in (inputs.B, inputs.C)]
            targets, passes = (to.B, to.C), self.passes[i]
            if self.cut[i][1] > 1:
                sums = passes.backward(own, grad_y[:, span], last, saved[i], to)
                pairs = zip("BC", sums, targets, alone, strict=True)
                return start, [partial(passes.spread, own, *pair[:3], not pair[3]) for pair in pairs]
            dB, dC = (t if only else torch.empty_like(t) for t, only in zip(targets, alone, strict=True))
            passes.backward(own, grad_y[:, span], last, saved[i], to._replace(B=dB, C=dC))
            return start, [
                partial(t.add_, part) for t, part in zip(targets, (dB, dC), strict=False) if part is not t
            ]

        starts, sums = zip(*self._each(inputs.u, differentiate), strict=True)
        for add in itertools.chain(*sums):
            add()
        if inputs.initial_state is not None:
            found = found._replace(initial_state=torch.cat(starts, 1))
        pairs: Any = zip(found, inputs[:9], strict=False)
        return [*(None if t is None else g.to(t.dtype) for g, t in pairs), None]
