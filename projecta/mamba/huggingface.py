"""A Mamba block on these scans, and `accelerate`, which puts Hugging Face's Mamba models on them.

    x, z        = in_proj(input)                        (b, l, d_inner) each
    x           = silu(causal depthwise conv(x))
    dt, B, C    = x_proj(x)                             (b, l, dt_rank), (b, l, n), (b, l, n)
    y           = selective_scan(x, dt_proj(dt), -exp(A_log), B, C, D, z)
    output      = out_proj(y)

Source: Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), section 3.4 and
figure 3. `MambaBlock` and the layers of transformers name their weights alike, so one set of functions runs
both. Everything stays (b, l, d_inner) in memory; the scan takes the transposed views as they are.
"""

import math
import sys
from collections.abc import Iterable
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projecta import mrss as multi
from projecta._checks import Checker, host
from projecta.mrss import MrssState, choose_periods, mrss_scan, mrss_update
from projecta.scan import BACKENDS, require_backend, selective_scan, selective_state_update


class State(NamedTuple):
    """What a block remembers of a sequence.

    conv: the last inputs of the convolution (b, d_inner, d_conv - 1). ssm: the state of the scan (b, d_inner,
    d_state), or with MRSS a `MrssState`.
    """

    conv: Tensor
    ssm: Tensor | MrssState


class MambaBlock(nn.Module):
    """The Mamba block; a drop-in for mamba-ssm's `Mamba`, whose checkpoints it loads.

    Args:
        d_model: width of input and output. d_state: states per channel. d_conv: width of the convolution.
        expand: d_inner / d_model. dt_rank: rank of the step size's projection, "auto" for d_model / 16
            rounded up.
        dt_min, dt_max, dt_init_floor: the step sizes at initialisation are log-uniform between the first two
            and not below the last. dt_init: "random" or "constant" weights of dt_proj, of size
            dt_scale / sqrt(dt_rank).
        conv_bias, bias: whether the convolution, and in_proj and out_proj, have a bias.
        backend: of the scan, as in `projecta.selective_scan`.
        mrss: scan by `projecta.mrss_scan` (compound decay), with the periods that this theta gives at the
            initial step sizes, which are then sorted; 0.5, say. The periods are a buffer of the module.

    Raises:
        ValueError: an argument is out of range; the message names it.

    >>> import torch
    >>> block = MambaBlock(8)
    >>> x = torch.randn(1, 5, 8)
    >>> y, state = block(x[:, :4], return_state=True)
    >>> torch.allclose(block.step(x[:, 4], state), block(x)[:, 4], atol=1e-6)
    True
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        *,
        backend: str = "auto",
        mrss: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check = Checker("MambaBlock")
        for name, size in (("d_model", d_model), ("d_state", d_state), ("d_conv", d_conv)):
            check.that(size >= 1, name, "be at least 1", size)
        check.that(0 < dt_min <= dt_max, "dt_min", f"lie in (0, dt_max] = (0, {dt_max}]", dt_min)
        check.one_of("dt_init", dt_init, ("random", "constant"))
        _check_backend(check, backend, mrss is not None)
        check.that(mrss is None or mrss > 0, "mrss", "be above 0", mrss)
        self.backend, self.mrss = backend, mrss
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        to: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **to)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias, **to
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **to)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **to)
        rates = torch.arange(1.0, d_state + 1, device=device).repeat(self.d_inner, 1)
        self.A_log = nn.Parameter(torch.log(rates))  # float32 in every model: small changes of a rate count
        self.D = nn.Parameter(torch.ones(self.d_inner, device=device))
        for kept in (self.A_log, self.D):
            kept._no_weight_decay = True  # type: ignore[attr-defined]  # the mark that trainers of Mamba read
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **to)

        scale = dt_scale / math.sqrt(self.dt_rank)
        with torch.no_grad():
            if dt_init == "random":
                self.dt_proj.weight.uniform_(-scale, scale)
            else:
                self.dt_proj.weight.fill_(scale)
            spread = math.log(dt_max) - math.log(dt_min)
            steps = torch.exp(torch.rand(self.d_inner, device=device) * spread + math.log(dt_min))
            steps = steps.clamp(min=dt_init_floor)
            if mrss is not None:  # so that neighbours can share their periods
                steps = steps.sort().values
                self.register_buffer("periods", choose_periods(rates, theta=mrss, step=steps))
            self.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus's inverse
            self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]

    def initial_state(self, batch: int) -> State:
        """The state before the first token: zeros."""
        weight = self.conv1d.weight
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        zeros = torch.zeros(batch, self.d_inner, self.d_state, device=weight.device, dtype=wide)
        ssm = zeros if self.mrss is None else MrssState.start(zeros)
        return State(weight.new_zeros(batch, self.d_inner, self.d_conv - 1), ssm)

    def forward(
        self, hidden_states: Tensor, state: State | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, State]:
        """Map (b, l, d_model) to as much, going on from `state` if it is given; differentiable in both.

        Returns the output, with `return_state` also the state after the last token.
        """
        check = Checker("MambaBlock")
        check.that(
            hidden_states.dim() == 3 and hidden_states.shape[2] == self.d_model,
            "hidden_states", f"have shape (b, l, d_model = {self.d_model})", tuple(hidden_states.shape),
        )  # fmt: skip
        x, z = self.in_proj(hidden_states).chunk(2, -1)
        conv, ssm = (None, None) if state is None else state
        if self.mrss is not None and ssm is None and return_state:
            ssm = self.initial_state(len(x)).ssm
        periods: Any = None if self.mrss is None else self.periods
        y, last = _scan(self, _convolve(self, x, conv), z, ssm, self.backend, periods)
        output = self.out_proj(y)
        if not return_state:
            return output
        kept = self.d_conv - 1
        before = x.new_zeros(len(x), self.d_inner, kept) if conv is None else conv
        window = _joined(before, x[:, max(0, x.shape[1] - kept) :])
        after = window[:, window.shape[1] - kept :].transpose(1, 2).contiguous()
        return output, State(after, last)

    def step(self, hidden_states: Tensor, state: State) -> Tensor:
        """Map one token (b, d_model) to (b, d_model), overwriting `state` with the state after it."""
        check = Checker("MambaBlock.step")
        check.shape("hidden_states", hidden_states, (len(state.conv), self.d_model), "(b, d_model)")
        x, z = self.in_proj(hidden_states).chunk(2, -1)
        window = torch.cat([state.conv, x[..., None]], -1)
        state.conv.copy_(window[..., 1:])
        return self.out_proj(_step(self, window, z, state.ssm, self.backend))


def _check_backend(check: Checker, backend: str, by_mrss: bool = False) -> None:
    check.one_of("backend", backend, ("auto", *(multi.BACKENDS if by_mrss else BACKENDS)))
    if backend != "auto":
        require_backend(check, backend)


def _activate(layer: Any, x: Tensor) -> Tensor:
    return layer.act(x) if hasattr(layer, "act") else F.silu(x)


def _joined(before: Tensor, x: Tensor) -> Tensor:
    """The columns before (b, d, k - 1 or more) and x (b, l, d) as one (b, k - 1 + l, d)."""
    return torch.cat([before.transpose(1, 2).to(x.dtype), x], 1)


def _convolve(layer: Any, x: Tensor, before: Tensor | None) -> Tensor:
    """The causal depthwise convolution of x (b, l, d) and its activation; zeros, or `before`, precede x.

    As a convolution of an image one pixel high whose channels are last, it leaves x where it lies.
    """
    l, width = x.shape[1], layer.conv1d.kernel_size[0]
    if not l:  # torch's convolutions refuse an empty image
        return x
    if before is not None:
        x = _joined(before[..., before.shape[-1] - (width - 1) :], x)
    padding = (0, width - 1 if before is None else 0)
    image = x.transpose(1, 2).unsqueeze(2)
    weight, bias = layer.conv1d.weight.unsqueeze(2), layer.conv1d.bias
    y = F.conv2d(image, weight, bias, padding=padding, groups=len(weight))
    return _activate(layer, y[..., :l].squeeze(2).transpose(1, 2))


def _select(layer: Any, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """delta (..., d) before its bias, the bias, B and C (..., n) of x (..., d)."""
    return _split(layer, layer.x_proj(x))


def _split(layer: Any, projected: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    n = layer.A_log.shape[1]
    dt, B, C = projected.tensor_split((-2 * n, -n), -1)
    if hasattr(layer, "dt_layernorm"):  # falcon_mamba, jamba
        dt, B, C = layer.dt_layernorm(dt), layer.b_layernorm(B), layer.c_layernorm(C)
    plain = type(layer.dt_proj) is nn.Linear and "forward" not in vars(layer.dt_proj)
    if plain:  # the scan adds the bias, in float32
        return F.linear(dt, layer.dt_proj.weight), layer.dt_proj.bias, B, C
    return layer.dt_proj(dt), None, B, C  # quantised, adapted or offloaded


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _scan(
    layer: Any, x: Tensor, z: Tensor, initial_state: Any, backend: str, periods: Tensor | None = None
) -> tuple[Tensor, Any]:
    """y (b, l, d) and the last state, of x and z (b, l, d); by MRSS if there are `periods`."""
    delta, bias, B, C = _select(layer, x)
    u, delta, B, C, z = (t.transpose(1, 2) for t in (x, delta, B, C, z))
    A, D = -torch.exp(_wide(layer.A_log)), _wide(layer.D)
    options = {"initial_state": initial_state, "backend": backend}
    if periods is None:
        y, last_state = selective_scan(u, delta, A, B, C, D, z, bias, True, True, **options)
    else:
        y, last_state = mrss_scan(u, delta, A, B, C, D, z, bias, True, True, periods=periods, **options)
    return y.transpose(1, 2), last_state


def _step(layer: Any, window: Tensor, z: Tensor, state: Any, backend: str) -> Tensor:
    """y (b, d) of the last columns (b, d, d_conv) and z (b, d); `state` is overwritten."""
    x = (window * layer.conv1d.weight.squeeze(1)).sum(-1)
    if layer.conv1d.bias is not None:
        x = x + layer.conv1d.bias
    x = _activate(layer, x)
    delta, bias, B, C = _select(layer, x)
    A, D = -torch.exp(_wide(layer.A_log)), _wide(layer.D)
    if isinstance(state, MrssState):
        return mrss_update(state, x, delta, A, B, C, D, z, bias, True, periods=layer.periods)
    return selective_state_update(state, x, delta, A, B, C, D, z, bias, True, backend=backend)


_MIXERS = {  # the layers of transformers that `accelerate` knows, by the module that defines them
    "transformers.models.mamba.modeling_mamba": "MambaMixer",
    "transformers.models.falcon_mamba.modeling_falcon_mamba": "FalconMambaMixer",
    "transformers.models.jamba.modeling_jamba": "JambaMambaMixer",
}


class Calibration(NamedTuple):
    """What `calibrate` finds: theta, and the root mean square of each channel's steps (d_inner,) by layer."""

    theta: float
    steps: dict[str, Tensor]


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any], theta: float = 0.1) -> Calibration:
    """Run a Hugging Face Mamba model over `batches`, and note the step sizes that its layers take.

    Args:
        model: as for `accelerate`. batches: token ids (b, l), or dictionaries of the model's arguments.
        theta: how far a state may decay within a block of `mrss_scan`.

    Returns:
        What to give `accelerate` as `mrss`.
    """
    check = Checker("calibrate")
    check.that(theta > 0, "theta", "be above 0", theta)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    hooks = []
    for name, layer in _mixers(check, model):

        def note(module: nn.Module, args: tuple, output: Tensor, name: str = name, layer: Any = layer):
            delta, bias, _, _ = _split(layer, output)
            steps = F.softplus(delta.float() if bias is None else delta.float() + bias.float())
            squares = steps.square().flatten(0, -2).sum(0)
            sums[name] = sums.get(name, torch.zeros_like(squares)) + squares
            counts[name] = counts.get(name, 0) + steps.numel() // steps.shape[-1]

        hooks.append(layer.x_proj.register_forward_hook(note))
    try:
        with accelerate(model):
            for batch in batches:
                model(**batch) if isinstance(batch, dict) else model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    check.that(bool(sums), "batches", "hold at least one batch", "none")
    return Calibration(theta, {name: (sums[name] / counts[name]).sqrt() for name in sums})


def accelerate(
    model: nn.Module, *, mrss: "float | Calibration | None" = None, backend: str = "auto"
) -> "Acceleration":
    """Run the Mamba layers of a Hugging Face model on projecta's scan, until the handle's `remove()`.

    Weights, names, caches and `generate` stay as they are. One result differs, for the better: a call with a
    cache and several new tokens goes on from the cached state; transformers starts such a call from zero.

    Args:
        model: any model with Mamba-1 layers of transformers (mamba, falcon_mamba, jamba). Only this instance
            changes. A second call changes nothing more. A deep copy of an accelerated model (or one that was
            saved and loaded) is accelerated too: a call with the copy takes it over, with its own arguments.
        mrss: read several tokens by `projecta.mrss_scan`, with the periods that a `Calibration` gives; a
            number is its theta, at the steps that the biases alone give. A layer's channels are sorted by
            step size, in its weights, until `remove()`. Single tokens are still decoded by the full update.
        backend: of the scan and the step, as in `projecta.selective_scan`.

    Returns:
        A handle. As a context manager it undoes at its end what its own call did.

    Raises:
        TypeError: the model has no such layer. ValueError: it is accelerated already, on another backend, or
            parts of it are offloaded. BackendUnavailable: `backend` cannot run here.

    >>> from transformers import MambaConfig, MambaForCausalLM
    >>> model = MambaForCausalLM(MambaConfig(vocab_size=10, hidden_size=8, num_hidden_layers=2))
    >>> with accelerate(model) as handle:
    ...     handle.layers
    2
    """
    check = Checker("accelerate")
    named = _mixers(check, model)
    mixers = [mixer for _, mixer in named]
    _check_backend(check, backend, mrss is not None)
    for mixer in mixers:
        current = vars(mixer).get("forward")
        if isinstance(current, _Forward) and not current.has_handle:
            _restore(mixer)
            current = None
        if isinstance(current, _Forward):
            check.that(
                current.backend == backend, "backend",
                f"be that of the first call, {current.backend!r}, on an accelerated model", backend,
                "Call remove() of its handle first.",
            )  # fmt: skip
        else:
            check.that(
                current is None and not hasattr(mixer.conv1d, "_hf_hook"), "model",
                "have layers with their own forward, and weights in place", "a wrapped or offloaded layer",
            )  # fmt: skip
    order: list[Tensor | None] = [None] * len(mixers)
    if mrss is not None:
        fresh = not any(isinstance(vars(mixer).get("forward"), _Forward) for mixer in mixers)
        check.that(
            fresh, "mrss", "be None on an accelerated model", mrss, "Call remove() of its handle first."
        )
        theta, steps = mrss if isinstance(mrss, Calibration) else (mrss, {})
        check.that(theta > 0, "mrss", "be above 0", theta)
        for i, (name, mixer) in enumerate(named):
            order[i] = _sort_order(check, mixer, steps.get(name), isinstance(mrss, Calibration), name)
    handle = Acceleration(mixers, backend)
    for (name, mixer), rank in zip(named, order, strict=True):
        if rank is not None:
            step = steps.get(name)
            step = F.softplus(mixer.dt_proj.bias.detach().float()) if step is None else step.to(rank.device)
            _permute(mixer, rank)
            A = torch.exp(mixer.A_log.detach().float())
            mixer.forward.order = rank
            mixer.forward.periods = choose_periods(A, theta=theta, step=step[rank]).cpu()
    return handle


def _mixers(check: Checker, model: nn.Module) -> list[tuple[str, Any]]:
    known = tuple(getattr(sys.modules[at], name) for at, name in _MIXERS.items() if at in sys.modules)
    mixers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, known)]
    families = ", ".join(name.split(".")[2] for name in _MIXERS)
    check.that(
        bool(mixers), "model", f"have Mamba-1 layers of transformers ({families})", type(model).__name__,
        error=TypeError,
    )  # fmt: skip
    return mixers


def _sort_order(check: Checker, mixer: Any, step: Tensor | None, calibrated: bool, name: str) -> Tensor:
    """The layer's channels by step size."""
    check.that(
        step is not None or not calibrated, "mrss", "be a calibration of this model", f"none of layer {name}"
    )
    plain = all(
        type(getattr(mixer, part)) is nn.Linear for part in ("in_proj", "x_proj", "dt_proj", "out_proj")
    )
    check.that(
        plain and mixer.A_log.is_floating_point(), "model",
        "have layers of plain weights, whose channels can be sorted, for mrss", "others",
    )  # fmt: skip
    return (mixer.dt_proj.bias.detach().float() if step is None else step).argsort(stable=True)


@torch.no_grad()
def _permute(layer: Any, order: Tensor) -> None:
    """Put a layer's channels (d_inner) into another order, in place; what it computes stays the same."""
    both = torch.cat([order, order + len(order)])  # in_proj gives x, then z
    for module, rows in ((layer.in_proj, both), (layer.conv1d, order), (layer.dt_proj, order)):
        for t in (module.weight, module.bias):
            if t is not None:
                t.copy_(t[rows.to(t.device)])
    for t in (layer.A_log, layer.D):
        t.copy_(t[order.to(t.device)])
    for t in (layer.x_proj.weight, layer.out_proj.weight):
        t.copy_(t[:, order.to(t.device)])


class Acceleration:
    """What `accelerate` returns. layers: how many layers run on projecta now."""

    def __init__(self, mixers: list[Any], backend: str):
        self._mixers = mixers
        self._first = not self.layers
        for mixer in mixers:
            if not isinstance(vars(mixer).get("forward"), _Forward):
                mixer.forward = _Forward(mixer, backend)
                mixer.register_forward_pre_hook(_name_layer, with_kwargs=True)

    @property
    def layers(self) -> int:
        return sum(isinstance(vars(mixer).get("forward"), _Forward) for mixer in self._mixers)

    def remove(self) -> None:
        """Give the layers their own forward back. A second call does nothing."""
        for mixer in self._mixers:
            if isinstance(vars(mixer).get("forward"), _Forward):
                _restore(mixer)

    def __enter__(self) -> "Acceleration":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._first:
            self.remove()


def _name_layer(layer: nn.Module, args: tuple, options: dict) -> tuple[tuple, dict]:
    """Before a layer's `_Forward`: which layer was called, for a replica (nn.DataParallel) shares it."""
    return args, options | {"layer": layer}


def _restore(mixer: Any) -> None:
    """Give a layer its own forward back, and the order of its channels."""
    if mixer.forward.order is not None:
        _permute(mixer, mixer.forward.order.argsort())
    for key in [key for key, hook in mixer._forward_pre_hooks.items() if hook is _name_layer]:
        del mixer._forward_pre_hooks[key], mixer._forward_pre_hooks_with_kwargs[key]
    del mixer.forward


class _Forward:
    """Takes the place of one layer's `forward`; copied and saved together with the layer."""

    def __init__(self, mixer: Any, backend: str):
        self.mixer, self.backend = mixer, backend
        self.has_handle = True  # that somebody can call `remove` of
        self.order: Tensor | None = None  # of the channels, and
        self.periods: Tensor | None = None  # those of their states, with MRSS

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, which nobody was given a handle of."""
        self.__dict__.update(state, has_handle=False)

    def __call__(
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        *,
        cache_params: Any = None,
        layer: Any = None,
        **unknown: Any,
    ) -> Tensor:
        """The layer's arguments; attention_mask is (b, l) or longer.

        `cache`, a transformers `Cache`, was named `cache_params` before transformers 5.24.
        """
        mixer, l = self.mixer if layer is None else layer, hidden_states.shape[1]
        check = Checker("accelerate")
        for name, value in unknown.items():
            rule = "be None: layers of transformers take one sequence per row"
            if name not in ("seq_idx", "cu_seqlens"):
                rule = f"be None: projecta does not know this argument of {host('transformers')}"
            check.that(value is None, name, rule, type(value).__name__)
        check.that(
            cache is None or cache_params is None or cache is cache_params, "cache_params",
            "be None where cache is given", type(cache_params).__name__,
        )  # fmt: skip
        cache = cache_params if cache is None else cache
        mask = None if attention_mask is None else attention_mask[:, -l:, None]
        x, z = mixer.in_proj(_masked(hidden_states, mask)).chunk(2, -1)
        conv: Any = None
        ssm: Any = None
        if cache is not None:
            kept = cache.layers[mixer.layer_idx]
            if cache.has_previous_state(mixer.layer_idx):
                conv, ssm = kept.conv_states[0], kept.recurrent_states[0]
        single = l == 1 and mask is None and not x.requires_grad
        if ssm is not None and single and not kept.record_past:
            window = torch.cat([conv[..., 1:], x.transpose(1, 2)], -1)
            conv.copy_(window)
            return mixer.out_proj(_step(mixer, window, z[:, 0], ssm, self.backend)[:, None])
        if ssm is not None and x.requires_grad:
            ssm = ssm.clone()  # kept for the gradients; the cache is about to be overwritten
        convolved = _convolve(mixer, x, conv)
        y, last = _scan(mixer, _masked(convolved, mask), z, ssm, self.backend, self.periods)
        if cache is not None:
            width = mixer.conv_kernel_size
            cache.update_conv_state(x.transpose(1, 2), mixer.layer_idx, conv_kernel_size=width)
            cache.update_recurrent_state(last, mixer.layer_idx)
        return mixer.out_proj(y)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask.to(x.dtype)
