"""The Mamba block on a GPU as one autograd node, whose tensors all have time as their last axis in memory.

    xz     = W_in h^T                  (2 d, b l): x and z are its halves, read in place
    u      = silu(conv(x))             (d, b l)
    s      = W_x u                     (r + 2 n, b l): dt, B and C are its rows, read in place
    delta  = W_dt s[:r]                (d, b l)
    y      = scan(u, delta, -exp(A_log), B, C, D, z)
    output = (W_out y)^T               (b, l, d_model)

Nothing is transposed or copied between the products. The backward pass computes u, delta and y again, all
cheaper than to keep; it keeps xz, s and the scan's states. Gradients reuse memory: ddelta is written over
delta, du over the gradient of y, dx and dz into the two halves that the gradient of W_in reads.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projecta._operators import KINDS, only_once, refuse_tangents, untraced
from projecta.conv import WIDEST
from projecta.conv import triton as conv
from projecta.conv._operator import Inputs as ConvInputs
from projecta.scan._operator import Inputs
from projecta.scan.triton import launch as scan


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
    linears = layer.in_proj, layer.x_proj, layer.dt_proj, layer.out_proj
    modules = (*linears, layer.conv1d)
    if (
        hidden.dtype not in (torch.float16, torch.bfloat16, torch.float32)
        or not hidden.numel()
        or hasattr(layer, "dt_layernorm")  # falcon_mamba, jamba
        or any(type(module) is not nn.Linear for module in linears)
        or type(layer.conv1d) is not nn.Conv1d
        or layer.conv1d.kernel_size[0] > WIDEST
        or any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in modules)
        or not untraced()
    ):
        return None
    tensors = Weights(
        layer.in_proj.weight, layer.in_proj.bias, layer.conv1d.weight, layer.conv1d.bias, layer.x_proj.weight,
        layer.dt_proj.weight, layer.dt_proj.bias, layer.A_log, layer.D, layer.out_proj.weight,
        layer.out_proj.bias,
    )  # fmt: skip
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        cast = {
            name: t.to(dtype) for name, t in tensors._asdict().items() if t is not None and name in _PRODUCTS
        }
        tensors = tensors._replace(**cast)
    plain = all(
        t is None
        or (type(t) in KINDS and t.device == hidden.device and (n not in _PRODUCTS or t.dtype == dtype))
        for n, t in tensors._asdict().items()
    )
    return tensors if plain else None


_PRODUCTS = ("in_proj", "in_bias", "x_proj", "dt_proj", "out_proj", "out_bias")


def run(
    hidden: Tensor, weights: Weights, conv_start: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The output (b, l, d_model) and the state after the last step; differentiable in every tensor.

    conv_start: the d_conv - 1 inputs of the convolution before the first (b, d, d_conv - 1).
    """
    hidden = hidden.to(weights.in_proj.dtype)
    given = hidden, conv_start, state, *weights
    refuse_tangents("MambaBlock", given, "triton")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        every = 8 if hidden.dtype == torch.float32 else 16
        return _Block.apply(hidden, conv_start, state, every, *weights)
    return _forward(hidden, conv_start, state, 0, weights)[:2]


def step(hidden: Tensor, weights: Weights, conv_state: Tensor, state: Tensor) -> Tensor:
    """One token (b, d_model); both states are overwritten. Not differentiable."""
    r, n = weights.dt_proj.shape[1], weights.A_log.shape[1]
    x, z = F.linear(hidden.to(weights.in_proj.dtype), weights.in_proj, weights.in_bias).chunk(2, -1)
    u = conv.update(x, conv_state, weights.conv.squeeze(1), weights.conv_bias, True)
    s = F.linear(u, weights.x_proj)
    B, C = s[:, None, r : r + n], s[:, None, r + n :]
    y = scan.update_state(
        state, u, F.linear(s[:, :r], weights.dt_proj), weights.A_log, B, C, weights.D, z, weights.dt_bias,
        True, log_A=True,
    )  # fmt: skip
    return F.linear(y, weights.out_proj, weights.out_bias)


def _rows(t: Tensor, b: int, l: int) -> Tensor:
    """(rows, b l) as (b, rows, l), in place."""
    return t.view(t.shape[0], b, l).transpose(0, 1)


class _Pass:
    """The tensors of one forward pass that the scan reads, as views."""

    def __init__(self, xz: Tensor, s: Tensor, weights: Weights, b: int, l: int):
        self.b, self.l, self.weights, self.xz, self.s = b, l, weights, xz, s
        self.d, self.rank = weights.dt_proj.shape
        self.n = weights.A_log.shape[1]
        self.x, self.z = _rows(xz[: self.d], b, l), _rows(xz[self.d :], b, l)

    def convolved(self, start: Tensor | None) -> Tensor:
        """u (d, b l)."""
        u = torch.empty_like(self.xz[: self.d])
        conv.forward_pass(self.conv_inputs(start), True, _rows(u, self.b, self.l))
        return u

    def conv_inputs(self, start: Tensor | None) -> ConvInputs:
        return ConvInputs(self.x, self.weights.conv.squeeze(1), self.weights.conv_bias, start)

    def delta(self) -> Tensor:
        """(d, b l), before its bias."""
        return torch.mm(self.weights.dt_proj, self.s[: self.rank])

    def of_s(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """B and C (b, 1, n, l) within s."""
        return tuple(
            _rows(s[self.rank + i * self.n : self.rank + (i + 1) * self.n], self.b, self.l)[:, None]
            for i in range(2)
        )  # type: ignore[return-value]

    def scan_inputs(self, u: Tensor, delta: Tensor, A: Tensor, state: Tensor | None) -> Inputs:
        B, C = self.of_s(self.s)
        rows = (_rows(u, self.b, self.l), _rows(delta, self.b, self.l))
        return Inputs(*rows, A, B, C, self.weights.D, self.z, self.weights.dt_bias, state)


def _project(weight: Tensor, bias: Tensor | None, columns: Tensor) -> Tensor:
    return torch.mm(weight, columns) if bias is None else torch.addmm(bias[:, None], weight, columns)


def _forward(
    hidden: Tensor, conv_start: Tensor | None, state: Tensor | None, every: int, weights: Weights
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The output, the last state, and what the backward pass needs: xz, s, the saved states."""
    b, l, m = hidden.shape
    xz = _project(weights.in_proj, weights.in_bias, hidden.reshape(b * l, m).t())
    made = _Pass(xz, xz, weights, b, l)
    u = made.convolved(conv_start)
    made.s = torch.mm(weights.x_proj, u)
    A = -torch.exp(weights.A_log.float())
    inputs = made.scan_inputs(u, made.delta(), A, state)
    y, last = torch.empty_like(u), A.new_empty(b, *A.shape)
    saved = A.new_empty(scan.saved_states(inputs, b, every) if every else 0)
    scan.forward_pass(inputs, True, _rows(y, b, l), last, saved, False)
    del u, inputs
    out = torch.mm(y.t(), weights.out_proj.t()) if weights.out_bias is None else torch.addmm(
        weights.out_bias, y.t(), weights.out_proj.t()
    )  # fmt: skip
    return out.view(b, l, -1), last, (xz, made.s, saved)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, conv_start, state, every, *weights):
        output, last, kept = _forward(hidden, conv_start, state, every, Weights(*weights))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, conv_start, state, *kept, *weights)
        return output, last

    @staticmethod
    def backward(ctx, grad_output, grad_last):
        saved = ctx.saved_tensors
        with torch.no_grad():
            grads = _backward(grad_output, grad_last, saved[:3], saved[3:6], Weights(*saved[6:]))
        sources = (grad_output, grad_last, *saved[:3], *saved[6:])
        first, rest = grads[:3], grads[3:]
        marked = only_once("MambaBlock", "triton", (*first, *rest), sources)
        return *marked[:3], None, *marked[3:]


def _backward(
    grad_output: Tensor | None, grad_last: Tensor | None, given: tuple[Any, ...], kept: tuple[Tensor, ...],
    weights: Weights,
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of hidden, conv_start, state and the weights."""
    (hidden, conv_start, state), (xz, s, saved) = given, kept
    b, l, m = hidden.shape
    made, flat = _Pass(xz, s, weights, b, l), hidden.reshape(b * l, m)
    d, r = made.d, made.rank
    A = -torch.exp(weights.A_log.float())
    if grad_output is None:
        grad_output = torch.zeros_like(hidden)
    if grad_last is None:
        grad_last = A.new_zeros(b, *A.shape)
    sent = grad_output.reshape(b * l, m)
    u, delta = made.convolved(conv_start), made.delta()
    grad_y = torch.mm(weights.out_proj.t(), sent.t())
    dxz, ds = torch.empty_like(xz), torch.empty_like(s)
    y = _rows(dxz[:d], b, l)  # until dx takes its place
    dB, dC = made.of_s(ds)
    grads = Inputs(
        _rows(grad_y, b, l), _rows(delta, b, l), torch.empty_like(A), dB, dC, torch.empty_like(weights.D),
        _rows(dxz[d:], b, l), None if weights.dt_bias is None else torch.empty_like(weights.dt_bias),
        None if state is None else torch.empty_like(state),
    )  # fmt: skip
    inputs = made.scan_inputs(u, delta, A, state)
    scan.backward_pass(_rows(grad_y, b, l), grad_last, saved, inputs, True, grads, y)
    found: dict[str, Tensor | None] = {
        "out_proj": torch.mm(sent.t(), dxz[:d].t()), "dt_proj": torch.mm(delta, s[:r].t()),
        "A_log": (grads.A * A).to(weights.A_log.dtype), "D": grads.D, "dt_bias": grads.delta_bias,
        "out_bias": None if weights.out_bias is None else sent.sum(0),
    }  # fmt: skip
    torch.mm(weights.dt_proj.t(), delta, out=ds[:r])
    del delta
    found["x_proj"] = torch.mm(ds, u.t())
    del u, inputs
    grad_y.addmm_(weights.x_proj.t(), ds)
    conv_grads = ConvInputs(
        _rows(dxz[:d], b, l), torch.empty_like(weights.conv).squeeze(1),
        None if weights.conv_bias is None else torch.empty_like(weights.conv_bias),
        None if conv_start is None else torch.empty_like(conv_start),
    )  # fmt: skip
    conv.backward_pass(_rows(grad_y, b, l), made.conv_inputs(conv_start), True, conv_grads)
    del grad_y
    found |= {"conv": conv_grads.weight[:, None], "conv_bias": conv_grads.bias}
    found["in_proj"] = torch.mm(dxz, flat)
    found["in_bias"] = None if weights.in_bias is None else dxz.sum(1)
    dhidden = torch.mm(dxz.t(), weights.in_proj).view(b, l, m)
    return [dhidden, conv_grads.start, grads.initial_state, *(found[name] for name in Weights._fields)]
