"""`accelerate`: run the Mamba-1 layers of a Hugging Face model on projecta's scan."""

import sys
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projecta import parallel
from projecta._checks import Checker, host
from projecta.mamba.layer import (
    check_backend,
    check_piece,
    convolve,
    fused,
    run_piece,
    scan_layer,
    step_layer,
)
from projecta.mrss import Bands, check_bands

# The Mamba layers and the norms of transformers that `accelerate` knows, by the module that defines them.
_KNOWN = {
    "transformers.models.mamba.modeling_mamba": ("MambaMixer", "MambaRMSNorm"),
    "transformers.models.falcon_mamba.modeling_falcon_mamba": ("FalconMambaMixer", "FalconMambaRMSNorm"),
    "transformers.models.jamba.modeling_jamba": ("JambaMambaMixer", "JambaRMSNorm"),
}


def accelerate(
    model: nn.Module, *, mrss: Bands | None = None, group: Any = None, backend: str = "auto"
) -> "Acceleration":
    """Run the Mamba layers of a Hugging Face model on projecta's scan, until the handle's `remove()`.

    Its RMS norms run as one operator of torch, whose result is rounded once instead of twice. Weights,
    names, caches and `generate` stay the same. One result differs: a call with a cache and several new tokens
    continues from the cached state; transformers wrongly starts such a call from zero.

    Args:
        model: any model with Mamba-1 layers of transformers (mamba, falcon_mamba, jamba). Only this instance
            changes. A second call changes nothing. A deep copy of an accelerated model (or one that was saved
            and loaded) is accelerated too; `accelerate` of the copy replaces its arguments by the given ones.
        mrss: bands of `projecta.mrss_scan`, for training. A layer's channels are sorted by step size, in its
            weights, until `remove()`. Calls with a cache raise: a cache of transformers has no place for
            unfinished blocks.
        group: the ranks that share each sequence, a process group or a one-dimensional `DeviceMesh`: the
            model takes this rank's piece until `remove()`, as within `projecta.parallel.context`, by the
            schedule that its number of layers asks for.
        backend: backend of the scan and the step, as in `projecta.selective_scan`.

    Returns:
        A handle. As a context manager it undoes at its end the changes of this call.

    Raises:
        TypeError: the model has no such layer. ValueError: it is accelerated already, on another backend or
            with `mrss` or `group` now; parts of it are offloaded; or bands do not fit. RuntimeError: `group`
            is given, and torch.distributed is not initialised. BackendUnavailable: `backend` cannot run here.

    Examples:
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> model = MambaForCausalLM(MambaConfig(vocab_size=10, hidden_size=8, num_hidden_layers=2))
        >>> with accelerate(model) as handle:
        ...     handle.layers
        2
    """
    check = Checker("accelerate")
    named = _mixers(check, model)
    mixers = [mixer for _, mixer in named]
    check_backend(check, backend)
    for name, mixer in named:
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
                "have layers with their own forward, and weights in place",
                f"a wrapped or offloaded layer, {name!r}",
            )  # fmt: skip
    order: list[Tensor | None] = [None] * len(mixers)
    fresh = not any(isinstance(vars(mixer).get("forward"), _Forward) for mixer in mixers)
    for argument, value in (("mrss", mrss), ("group", group)):
        rule, advice = "be None on an accelerated model", "Call remove() of its handle first."
        check.that(value is None or fresh, argument, rule, value, advice)
    check.that(mrss is None or group is None, "mrss", "be None with group", mrss)
    if mrss is not None:
        for i, mixer in enumerate(mixers):
            check_bands(check, mrss, mixer.A_log.shape[0], name="mrss")
            order[i] = _sort_order(check, mixer)
    where = None
    if group is not None:
        where = parallel.Context(group)
        where.schedule = parallel.choose_schedule(len(mixers), where.size)
    handle = Acceleration(mixers, [m for m in model.modules() if isinstance(m, _known(1))], backend)
    for mixer, rank in zip(mixers, order, strict=True):
        if where is not None:
            mixer.forward.where = where
        if rank is not None:
            _permute(mixer, rank)
            mixer.forward.order, mixer.forward.bands = rank, mrss
    return handle


def _known(kind: int) -> tuple[type, ...]:
    """The classes of Mamba layers (0) or of norms (1) of the model families that are imported."""
    return tuple(getattr(sys.modules[at], names[kind]) for at, names in _KNOWN.items() if at in sys.modules)


def _mixers(check: Checker, model: nn.Module) -> list[tuple[str, Any]]:
    known = _known(0)
    mixers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, known)]
    families = ", ".join(name.split(".")[2] for name in _KNOWN)
    check.that(
        bool(mixers), "model", f"have Mamba-1 layers of transformers ({families})", type(model).__name__,
        error=TypeError,
    )  # fmt: skip
    return mixers


def _sort_order(check: Checker, mixer: Any) -> Tensor:
    """The order of the layer's channels by the step size that the bias gives, the largest first."""
    parts = ("in_proj", "x_proj", "dt_proj", "out_proj")
    plain = all(type(getattr(mixer, part)) is nn.Linear for part in parts)
    check.that(
        plain and mixer.A_log.is_floating_point(), "model",
        "have layers of plain weights, whose channels can be sorted, for mrss", "other layers",
    )  # fmt: skip
    return mixer.dt_proj.bias.detach().float().argsort(descending=True, stable=True)


@torch.no_grad()
def _permute(layer: Any, order: Tensor) -> None:
    """Reorder a layer's channels (d_inner) in place; its outputs stay the same."""
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
    """Handle returned by `accelerate`. layers: how many layers run on projecta now."""

    def __init__(self, mixers: list[Any], norms: list[Any], backend: str):
        self._mixers, self._norms = mixers, norms
        self._first = not self.layers
        for layer, forward in (*((m, _Forward(m, backend)) for m in mixers), *((n, _Norm(n)) for n in norms)):
            if "forward" not in vars(layer):
                layer.forward = forward
                layer.register_forward_pre_hook(_name_layer, with_kwargs=True)

    @property
    def layers(self) -> int:
        return sum(isinstance(vars(mixer).get("forward"), _Forward) for mixer in self._mixers)

    def remove(self) -> None:
        """Restore the original forward of the layers. A second call does nothing."""
        for layer in (*self._mixers, *self._norms):
            if isinstance(vars(layer).get("forward"), _Forward | _Norm):
                _restore(layer)

    def __enter__(self) -> "Acceleration":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._first:
            self.remove()


def _name_layer(layer: nn.Module, args: tuple, options: dict) -> tuple[tuple, dict]:
    """Hook before a layer: passes the called layer to its forward, which replicas (nn.DataParallel) share."""
    return args, options | {"layer": layer}


def _restore(layer: Any) -> None:
    """Restore a layer's original forward, and the order of its channels."""
    if getattr(layer.forward, "order", None) is not None:
        _permute(layer, layer.forward.order.argsort())
    for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is _name_layer]:
        del layer._forward_pre_hooks[key], layer._forward_pre_hooks_with_kwargs[key]
    del layer.forward


class _Norm:
    """Replaces the `forward` of an RMS norm: one operator, where transformers calls eight."""

    def __init__(self, norm: Any):
        self.norm = norm

    def __call__(self, hidden_states: Tensor, *, layer: Any = None) -> Tensor:
        norm = self.norm if layer is None else layer
        if hidden_states.dtype != norm.weight.dtype:
            return type(norm).forward(norm, hidden_states)
        return F.rms_norm(hidden_states, norm.weight.shape, norm.weight, norm.variance_epsilon)


class _Forward:
    """Replaces one layer's `forward`; copied and saved together with the layer."""

    def __init__(self, mixer: Any, backend: str):
        self.mixer, self.backend = mixer, backend
        self.has_handle = True  # whether a caller can `remove` it
        self.order: Tensor | None = None  # of the channels, with MRSS
        self.bands: Bands | None = None  # with MRSS
        self.where: parallel.Context | None = None  # the ranks that share its sequences

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and saved: not the ranks, which end with their processes."""
        return self.__dict__ | {"where": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, whose handle no caller holds."""
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
        """Run the layer; attention_mask is (b, l) or longer.

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
        check.that(
            cache is None or self.bands is None, "cache", "be None with mrss: pass use_cache=False", "a cache"
        )
        where = parallel.context_of(mixer, self.where)
        if where is not None:
            for name, value in (("cache", cache), ("attention_mask", attention_mask)):
                check.that(value is None, name, "be None where ranks share a sequence", type(value).__name__)
            check_piece(check, where, self.bands)
            return run_piece(mixer, hidden_states, where, self.backend)[0]
        mask = None if attention_mask is None else attention_mask[:, -l:, None]
        conv: Any = None
        ssm: Any = None
        if cache is not None:
            kept = cache.layers[mixer.layer_idx]
            if cache.has_previous_state(mixer.layer_idx):
                conv, ssm = kept.conv_states[0], kept.recurrent_states[0]
        graded = torch.is_grad_enabled()
        module, weights = None, None
        past = cache is not None and (graded or kept.record_past)
        if mask is None and self.bands is None and not past:
            module, weights = fused(mixer, hidden_states, self.backend)
        steps = ssm is not None and l == 1 and mask is None and not kept.record_past
        if module is not None:
            if steps:
                return module.step(hidden_states[:, 0], weights, conv, ssm)[:, None]
            width = mixer.conv_kernel_size
            output, last = module.run(
                hidden_states, weights, None if conv is None else conv[..., conv.shape[-1] - width + 1 :], ssm
            )
            if cache is not None:
                x = mixer.in_proj(hidden_states[:, max(0, l - width) :])[..., : mixer.intermediate_size]
                cache.update_conv_state(x.transpose(1, 2), mixer.layer_idx, conv_kernel_size=width)
                cache.update_recurrent_state(last, mixer.layer_idx)
            return output
        x, z = mixer.in_proj(_masked(hidden_states, mask)).chunk(2, -1)
        if steps and not x.requires_grad:
            return mixer.out_proj(step_layer(mixer, x[:, 0], conv, z[:, 0], ssm, self.backend)[:, None])
        if ssm is not None and x.requires_grad:
            ssm = ssm.clone()  # kept for the gradients; the cache is about to be overwritten
        convolved = convolve(mixer, x, conv, self.backend)
        y, last = scan_layer(mixer, _masked(convolved, mask), z, ssm, self.backend, self.bands)
        if cache is not None:
            width = mixer.conv_kernel_size
            cache.update_conv_state(x.transpose(1, 2), mixer.layer_idx, conv_kernel_size=width)
            cache.update_recurrent_state(last, mixer.layer_idx)
        return mixer.out_proj(y)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask.to(x.dtype)
