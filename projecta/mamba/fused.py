"""The Mamba block on a GPU as one autograd node, whose tensors all have time as their last axis in memory.

    xz     = W_in h^T                  (2 d, b l): x and z are its halves, read in place
    u      = silu(conv(x))             (d, b l)
    s      = W_x u                     (r + 2 n, b l): dt, B and C are its rows, read in place
    delta  = W_dt s[:r]                (d, b l)
    y      = scan(u, delta, -exp(A_log), B, C, D, z)
    output = (W_out y)^T               (b, l, d_model)

Nothing is transposed or copied between the products. The forward pass keeps xz, s and the scan's states; the
backward pass computes u, delta and y again, which is cheap. Gradients reuse memory: ddelta is written over
delta, du over the gradient of y, dx and dz into the two halves that the gradient of W_in reads.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projecta._calls import remembered, traits
from projecta._operators import KINDS, differentiable, refuse_tangents, untraced
from projecta._triton.launch import Recording, repeated
from projecta.conv import WIDEST
from projecta.conv import triton as conv
from projecta.conv._operator import Grads as ConvGrads
from projecta.conv._operator import Inputs as ConvInputs
from projecta.parallel import Context
from projecta.scan._operator import Inputs
from projecta.scan.triton import launch as scan

# Steps between the saved states, by bytes of a number. 16 halve the states' memory for a little time.
SAVE_EVERY = {2: 16, 4: 8}
# Rows of a step whose state update also projects delta: each row reads the weight again.
FEW = 8


class Weights(NamedTuple):
    """The weights of a block, in the order in which they are used; biases may be None."""

    in_proj: Tensor
    in_bias: Tensor | None
    conv: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor | None
    A_log: Tensor
    D: Tensor
    out_proj: Tensor
    out_bias: Tensor | None


def weights_of(layer: Any, hidden: Tensor) -> Weights | None:
    """The weights of a layer that this node can run on `hidden`, in its dtype; None if it cannot.

    It runs plain layers on the device of the Triton backend. It does not run what a module's hooks, adapters
    or quantisation would change, nor what a tracer or a transform must see as single operators.
    """
    # through the modules' own tables: nn.Module's attribute access takes as long as the rest of the call
    parts = [layer._modules[name] for name in _PARTS]
    if (
        hidden.dtype not in _DTYPES
        or not hidden.numel()
        or "dt_layernorm" in layer._modules  # falcon_mamba, jamba
        or any(type(part) is not (nn.Conv1d if part is parts[1] else nn.Linear) for part in parts)
        or parts[1].kernel_size[0] > WIDEST
        or any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in parts)
        or not untraced()
    ):
        return None
    (in_w, in_b), (conv_w, conv_b), (x_w, _), (dt_w, dt_b), (out_w, out_b) = (
        (part._parameters["weight"], part._parameters["bias"]) for part in parts
    )
    own = layer._parameters
    tensors = Weights(in_w, in_b, conv_w, conv_b, x_w, dt_w, dt_b, own["A_log"], own["D"], out_w, out_b)
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        cast = {
            name: t.to(dtype) for name, t in tensors._asdict().items() if t is not None and name in _PRODUCTS
        }
        tensors = tensors._replace(**cast)
    device = hidden.device
    plain = device.type == "cpu" or device.index == torch.cuda.current_device()  # where launches are repeated
    for name, t in zip(Weights._fields, tensors, strict=True):
        if t is not None:
            fits = t.dtype == dtype or (name not in _PRODUCTS and t.dtype in _DTYPES)
            plain = plain and fits and type(t) in KINDS and t.device == device and t.is_contiguous()
    return tensors if plain else None


_PARTS = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_PRODUCTS = ("in_proj", "in_bias", "x_proj", "dt_proj", "out_proj", "out_bias")


def run(
    hidden: Tensor, weights: Weights, conv_start: Tensor | None = None, state: Tensor | None = None,
    keep: int = 0, where: Context | None = None, reverse: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The output (b, l, d_model) and the state after the last step; differentiable in every tensor.

    conv_start: the d_conv - 1 inputs of the convolution before the first (b, d, d_conv - 1).
    keep: also return the last `keep` inputs of the convolution (b, d, keep).
    where: hidden is this rank's piece of a sequence, and the states go from rank to rank.
    reverse: convolution and scan go from the last step to the first.
    """
    hidden = hidden.to(weights.in_proj.dtype)
    conv_start = None if conv_start is None else conv_start.contiguous()
    state = None if state is None else state.float().contiguous()
    given = hidden, conv_start, state, *weights
    refuse_tangents("MambaBlock", given, "triton")
    graded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    every = SAVE_EVERY[hidden.element_size()] if graded else 0
    receives = where is not None and where.before is not None
    records = _records_of(hidden, conv_start, state, every, weights, receives, reverse)
    call = _Call(records, every, keep, where, reverse)
    if graded:
        return differentiable(
            "MambaBlock", "triton", partial(_forward, call), partial(_backward, call), given
        )
    return _forward(call, *given)[0]


def step(hidden: Tensor, weights: Weights, conv_state: Tensor, state: Tensor) -> Tensor:
    """One token (b, d_model); both states are overwritten. Not differentiable."""
    r, n = weights.dt_proj.shape[1], weights.A_log.shape[1]
    x, z = F.linear(hidden.to(weights.in_proj.dtype), weights.in_proj, weights.in_bias).chunk(2, -1)
    u = conv.update(x, conv_state, weights.conv.squeeze(1), weights.conv_bias, True)
    s = F.linear(u, weights.x_proj)
    B, C = s[:, None, r : r + n], s[:, None, r + n :]
    own, dt, dt_weight = state.contiguous(), s[:, :r], None
    if len(hidden) <= FEW:
        dt_weight = weights.dt_proj
    else:
        dt = F.linear(dt, weights.dt_proj)
    y = scan.update_state(
        own, u, dt, weights.A_log, B, C, weights.D, z, weights.dt_bias, True, True, dt_weight
    )  # fmt: skip
    if own is not state:
        state.copy_(own)
    return F.linear(y, weights.out_proj, weights.out_bias)


class _Call(NamedTuple):
    """What a call is besides its tensors; see `run`. every: steps between saved states, 0 for none."""

    records: dict[Any, Recording]
    every: int
    keep: int
    where: Context | None
    reverse: bool


def _rows(t: Tensor, b: int, l: int, first: int = 0, rows: int | None = None) -> Tensor:
    """Rows of a contiguous (rows, b l) as (b, rows, l), in place."""
    rows = t.shape[0] if rows is None else rows
    return t.as_strided((b, rows, l), (l, b * l, 1), first * b * l)


def _records_of(
    hidden: Tensor, conv_start: Tensor | None, state: Tensor | None, every: int, weights: Weights,
    receives: bool, reverse: bool,
) -> dict[Any, Recording]:  # fmt: skip
    """The recorded launches of all calls that differ from this one in values only."""
    others = map(traits, (conv_start, state, *weights))
    key = every, receives, reverse, hidden.dtype, hidden.device, hidden.shape, *others
    return remembered(_records, key, dict)


_records: dict[tuple, dict[Any, Recording]] = {}


class _Pass:
    """The tensors of one pass, as views: x and z of xz, dt, B and C of s; all but dt (b, rows, l)."""

    def __init__(self, xz: Tensor, weights: Weights, b: int, l: int, call: "_Call"):
        self.b, self.l, self.weights, self.records, self.reverse = b, l, weights, call.records, call.reverse
        self.d, self.rank = weights.dt_proj.shape
        self.n = weights.A_log.shape[1]
        self.x, self.z = _rows(xz, b, l, 0, self.d), _rows(xz, b, l, self.d, self.d)

    def convolved(self, start: Tensor | None) -> Tensor:
        """u (d, b l)."""
        u = self.z.new_empty(self.d, self.b * self.l)
        inputs, y = self.conv_inputs(start), _rows(u, self.b, self.l)
        repeated(
            self.records, "conv", inputs[:4], (y,), lambda: conv.forward_pass(inputs, True, y, self.reverse)
        )  # fmt: skip
        return u

    def conv_inputs(self, start: Tensor | None) -> ConvInputs:
        return ConvInputs(self.x, self.weights.conv.squeeze(1), self.weights.conv_bias, start)

    def split(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt (r, b l), B and C (b, 1, n, l) within s."""
        r, n, b, l = self.rank, self.n, self.b, self.l
        shape, strides = (b, 1, n, l), (l, l, b * l, 1)
        B, C = (s.as_strided(shape, strides, i * b * l) for i in (r, r + n))
        return s[:r], B, C

    def delta(self, s: Tensor) -> Tensor:
        """(d, b l), before the bias."""
        return torch.mm(self.weights.dt_proj, s[: self.rank])

    def scan_inputs(self, u: Tensor, s: Tensor, delta: Tensor, state: Tensor | None) -> Inputs:
        (_, B, C), w = self.split(s), self.weights
        rows = (_rows(u, self.b, self.l), _rows(delta, self.b, self.l))
        return Inputs(*rows, w.A_log, B, C, w.D, self.z, w.dt_bias, state)


def _forward(
    call: _Call, hidden: Tensor, conv_start: Tensor | None, state: Tensor | None, *weights: Any
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """The outputs; and what the backward pass needs: xz, s, the saved states and what was received."""
    (b, l, m), w = hidden.shape, Weights(*weights)
    columns = hidden.reshape(b * l, m).t()
    where, kept = call.where, w.conv.shape[-1] - 1
    received: list[Tensor | None] = [None, None]
    if w.in_bias is None:
        xz = torch.mm(w.in_proj, columns)
    else:
        xz = torch.addmm(w.in_bias[:, None], w.in_proj, columns)
    made = _Pass(xz, w, b, l, call)
    if where is not None:
        where.send(made.x[..., l - kept :].float())
        received[0] = where.receive((b, made.d, kept), hidden.device)
        conv_start = conv_start if received[0] is None else received[0]
    u = made.convolved(conv_start)
    s = torch.mm(w.x_proj, u)
    delta = made.delta(s)
    link = None
    if where is not None:
        link, before = _link(where, u, (b, made.d, made.n))
        received[1], state = before, state if before is None else before
    inputs = made.scan_inputs(u, s, delta, state)
    y, last = torch.empty_like(u), u.new_empty(b, made.d, made.n, dtype=torch.float32)
    saved = u.new_empty(scan.saved_states(inputs, b, call.every) if call.every else 0, dtype=torch.float32)
    rows = _rows(y, b, l)

    def launch() -> None:
        scan.forward_pass(inputs, True, rows, last, saved, False, log_A=True, reverse=call.reverse, link=link)

    if link is None:
        repeated(call.records, "scan", inputs[:9], (rows, last, saved), launch)
    else:
        launch()
    if w.out_bias is None:
        out = torch.mm(y.t(), w.out_proj.t())
    else:
        out = torch.addmm(w.out_bias, y.t(), w.out_proj.t())
    outputs: tuple[Tensor, ...] = out.view(b, l, -1), last
    if call.keep:
        outputs += (made.x[..., l - call.keep :].contiguous(),)
    return outputs, (xz, s, saved, *received)


def _link(
    where: Context, like: Tensor, shape: tuple[int, ...], back: bool = False
) -> tuple[scan.Link, Tensor | None]:
    """The scan's link to the ranks beside this one, and where what it receives will be, if it receives."""
    arriving = (where.after if back else where.before) is not None
    place = like.new_empty(shape, dtype=torch.float32) if arriving else None

    def receive() -> None:
        found = where.receive(shape, like.device, back)
        if place is not None and found is not None:
            place.copy_(found)

    return scan.Link(receive, lambda t: where.send(t, back)), place


def _backward(
    call: _Call, grads: tuple[Tensor | None, ...], kept: tuple[Any, ...], given: tuple[Any, ...]
) -> list[Tensor | None]:
    """The gradients of hidden, conv_start, state and the weights."""
    (grad_output, grad_last, *grad_x), (xz, s, saved, *received) = grads, kept
    (hidden, conv_start, state), w = given[:3], Weights(*given[3:])
    b, l, m = hidden.shape
    last_x = grad_x[0] if grad_x else None
    if received[0] is not None:
        conv_start, state = received
    made, flat, dxz = _Pass(xz, w, b, l, call), hidden.reshape(b * l, m), torch.empty_like(xz)
    if grad_output is None:
        grad_output = torch.zeros_like(hidden)
    found: dict[str, Tensor | None] = {}
    sent = grad_output.reshape(b * l, m)
    du = _scan_backward(made, sent, grad_last, s, saved, conv_start, state, dxz, found, call.where)
    dstart = _conv_backward(made, du, conv_start, dxz, found)
    del du  # before the largest products
    if call.where is not None:
        if dstart is not None:
            call.where.send(dstart, back=True)
        last_x = call.where.receive((b, made.d, w.conv.shape[-1] - 1), hidden.device, back=True)
    if last_x is not None:
        _rows(dxz, b, l, 0, made.d)[..., l - last_x.shape[-1] :] += last_x
    found["in_proj"] = torch.mm(dxz, flat)
    found["in_bias"] = None if w.in_bias is None else dxz.sum(1)
    dhidden = torch.mm(dxz.t(), w.in_proj).view(b, l, m)
    if received[0] is not None:
        dstart = found["state"] = None
    return [dhidden, dstart, found["state"], *(found[name] for name in Weights._fields)]


def _conv_backward(
    made: _Pass, du: Tensor, conv_start: Tensor | None, dxz: Tensor, found: dict[str, Tensor | None]
) -> Tensor | None:
    """The gradient of the convolution's start; dx goes to `dxz`, gradients of the weights to `found`."""
    w = made.weights
    rows, dx, inputs = (
        _rows(du, made.b, made.l),
        _rows(dxz, made.b, made.l, 0, made.d),
        made.conv_inputs(conv_start),
    )
    dweight, dbias = torch.empty_like(w.conv), None if w.conv_bias is None else torch.empty_like(w.conv_bias)
    dstart = None if conv_start is None else torch.empty_like(conv_start)
    grads = ConvGrads(dx, dweight.squeeze(1), dbias, dstart)
    repeated(
        made.records, "conv back", (rows, *inputs[:4]), grads,
        lambda: conv.backward_pass(rows, inputs, True, grads, made.reverse),
    )  # fmt: skip
    found |= {"conv": dweight, "conv_bias": dbias}
    return dstart


def _scan_backward(
    made: _Pass, sent: Tensor, grad_last: Tensor | None, s: Tensor, saved: Tensor, conv_start: Tensor | None,
    state: Tensor | None, dxz: Tensor, found: dict[str, Tensor | None], where: Context | None,
) -> Tensor:  # fmt: skip
    """The gradient of u (d, b l); dz goes to `dxz`, gradients of the weights and of the state to `found`."""
    w, d, r, b, l = made.weights, made.d, made.rank, made.b, made.l
    u = made.convolved(conv_start)
    delta = made.delta(s)
    inputs = made.scan_inputs(u, s, delta, state)
    grad_y, ds = torch.mm(w.out_proj.t(), sent.t()), torch.empty_like(s)
    rows, dx, (_, dB, dC) = _rows(grad_y, b, l), _rows(dxz, b, l, 0, d), made.split(ds)
    dA, dD, dbias, dstate = (
        None if t is None else torch.empty_like(t) for t in (w.A_log, w.D, w.dt_bias, state)
    )  # fmt: skip
    grads = Inputs(rows, inputs.delta, dA, dB, dC, dD, _rows(dxz, b, l, d, d), dbias, dstate)  # type: ignore[arg-type]
    link = None
    if where is not None:
        link, grad_last = _link(where, u, (b, d, made.n), back=True)
    if grad_last is not None:
        grad_last = grad_last.contiguous()

    def launch() -> None:  # y takes the place of dx until dx is computed
        scan.backward_pass(
            rows, grad_last, saved, inputs, True, grads, dx, log_A=True, reverse=made.reverse, link=link
        )

    if link is None:
        given, written = (*inputs[:9], rows, grad_last), (saved, dx, *grads[2:9])
        repeated(made.records, ("scan back", grad_last is None), given, written, launch)
    else:
        launch()
    found |= {
        "out_proj": torch.mm(sent.t(), dxz[:d].t()), "dt_proj": torch.mm(delta, s[:r].t()), "A_log": dA,
        "D": dD, "dt_bias": dbias, "state": dstate, "out_bias": None if w.out_bias is None else sent.sum(0),
    }  # fmt: skip
    torch.mm(w.dt_proj.t(), delta, out=ds[:r])
    found["x_proj"] = torch.mm(ds, u.t())
    return grad_y.addmm_(w.x_proj.t(), ds)
