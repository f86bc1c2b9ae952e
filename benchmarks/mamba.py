"""A Hugging Face Mamba model of mamba-130m's width: prefill, decoding and a training step.

"stock" is the model as transformers runs it; "accelerated" uses projecta's scan. The model has 4 layers.
In the Full suites it has 24 layers, like mamba-130m.
"""

import contextlib
import functools

import torch
from transformers import MambaConfig, MambaForCausalLM

from benchmarks import common

KINDS = ("stock", "accelerated")
PREFIX = 32  # the stock model checks this many first tokens of a run; the model is causal
TOLERANCE = 1e-3  # after 24 layers, float32 differs from float64 by 3e-4
VERSION = common.version(__file__)


@functools.cache
@torch.inference_mode(False)  # training needs normal tensors, even if the first call is in inference mode
def _model(layers: int):
    """Layers of width 768, 16 states, 50,280 tokens; random weights from a fixed seed."""
    config = MambaConfig(
        vocab_size=50280, hidden_size=768, num_hidden_layers=layers, state_size=16, expand=2, conv_kernel=4,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MambaForCausalLM(config).eval().to(common.device())


def _tokens(l: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(6)
    return torch.randint(0, 50280, (1, l), generator=draw).to(common.device())


def _as(kind: str, layers: int):
    """A context in which the model runs as `kind`."""
    if kind == "stock":
        return contextlib.nullcontext()
    return common.require("projecta.mamba", "accelerate")(_model(layers))


def _check(kind: str, run, l: int, layers: int) -> None:
    """Compare the first logits of `run`, a call on l tokens, with those of the stock model."""
    got = run()
    if kind != "stock":
        with torch.inference_mode():
            truth = _model(layers)(_tokens(l)[:, :PREFIX]).logits
        common.check_close(f"{kind} logits", got[:, :PREFIX].detach(), truth, TOLERANCE)


@functools.cache
def _prefill(kind: str, l: int, layers: int):
    """A call that reads l tokens into a fresh cache and returns all logits."""
    ids = _tokens(l)

    @torch.inference_mode()
    def run():
        with _as(kind, layers):
            return _model(layers)(ids, use_cache=True).logits

    _check(kind, run, l, layers)
    return run


@functools.cache
def _decode(kind: str, l: int, layers: int):
    """A call that decodes l tokens one by one, with a cache."""
    ids = _tokens(l)

    @torch.inference_mode()
    def run():
        logits, cache = [], None
        with _as(kind, layers):
            for t in range(l):
                out = _model(layers)(ids[:, t : t + 1], cache_params=cache, use_cache=True)
                cache = out.cache_params
                logits.append(out.logits)
        return torch.cat(logits, 1)

    _check(kind, run, l, layers)
    return run


def _step(kind: str, ids: torch.Tensor, layers: int):
    """Run forward, loss and all gradients; return the logits."""
    model = _model(layers)
    model.zero_grad(set_to_none=True)
    with _as(kind, layers):
        out = model(ids, labels=ids, use_cache=False)
        out.loss.backward()
    return out.logits


@functools.cache
def _train(kind: str, l: int, layers: int):
    """A call of a training step. A gradient is checked on 8 tokens, the first logits on all l."""
    if kind != "stock":
        found = []
        for each in (kind, "stock"):
            _step(each, _tokens(8), layers)
            found.append(_model(layers).get_input_embeddings().weight.grad)
        common.check_close(f"{kind} gradient", *found, TOLERANCE)
    run = functools.partial(_step, kind, _tokens(l), layers)
    _check(kind, run, l, layers)
    return run


class _Suite(common.Suite):
    """Batch 1, float32."""

    param_names = ("model", "length")
    version = VERSION
    timeout = 600
    layers = 4


class ModelPrefill(_Suite):
    params = (KINDS, (256,))

    def setup(self, model, length):
        _prefill(model, length, self.layers)

    def time_prefill(self, model, length):
        _prefill(model, length, self.layers)()


class ModelDecode(_Suite):
    """`length` tokens, one call each."""

    params = (KINDS, (16,))

    def setup(self, model, length):
        _decode(model, length, self.layers)

    def time_decode(self, model, length):
        _decode(model, length, self.layers)()


class ModelTrain(_Suite):
    """Forward, loss and all gradients."""

    params = (KINDS, (32,))

    def setup(self, model, length):
        _train(model, length, self.layers)

    def time_step(self, model, length):
        _train(model, length, self.layers)()


class FullModelPrefill(_Suite):
    layers = 24
    params = (KINDS, (64, 512, 1024))

    def setup(self, model, length):
        common.require_full()
        _prefill(model, length, self.layers)

    def time_prefill(self, model, length):
        _prefill(model, length, self.layers)()


class FullModelTrain(_Suite):
    """The stock model takes minutes: its autograd graph holds every step of every layer."""

    layers = 24
    params = (KINDS, (128, 512))
    timeout = 3600

    def setup(self, model, length):
        common.require_full()
        _train(model, length, self.layers)

    def time_step(self, model, length):
        _train(model, length, self.layers)()
