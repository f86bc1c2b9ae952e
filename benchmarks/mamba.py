"""A Hugging Face Mamba model of mamba-130m's width: prefill, decoding and a training step, as transformers
runs it ("stock") and on projecta's scan ("accelerated"). 4 layers; 24, as mamba-130m, in the Full suites."""

import contextlib
import functools

import torch
from transformers import MambaConfig, MambaForCausalLM

from benchmarks import common

KINDS = ("stock", "accelerated")
PREFIX = 32  # tokens of the stock model that judge the first of a longer, causal run
TOLERANCE = 1e-3  # through 24 layers, float32 itself is 3e-4 away from float64
VERSION = common.version(__file__)


@functools.cache
@torch.inference_mode(False)  # weights that training can use, whoever asks for them first
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
    """`run` gives the logits of l tokens; what the stock model gives for the first of them is right."""
    got = run()
    if kind != "stock":
        with torch.inference_mode():
            truth = _model(layers)(_tokens(l)[:, :PREFIX]).logits
        common.check_close(f"{kind} logits", got[:, :PREFIX].detach(), truth, TOLERANCE)


@functools.cache
def _prefill(kind: str, l: int, layers: int):
    """A call that reads l tokens into a fresh cache; logits of all of them."""
    ids = _tokens(l)

    @torch.inference_mode()
    def run():
        with _as(kind, layers):
            return _model(layers)(ids, use_cache=True).logits

    _check(kind, run, l, layers)
    return run


@functools.cache
def _decode(kind: str, l: int, layers: int):
    """A call that feeds l tokens one by one, each on the cache that the ones before it left."""
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
    """Forward, loss and all gradients; the logits."""
    model = _model(layers)
    model.zero_grad(set_to_none=True)
    with _as(kind, layers):
        out = model(ids, labels=ids, use_cache=False)
        out.loss.backward()
    return out.logits


@functools.cache
def _train(kind: str, l: int, layers: int):
    """A call of a training step; its gradients are checked on few tokens, its logits on all."""
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
    """The stock model takes minutes: a graph of every step of every layer."""

    layers = 24
    params = (KINDS, (128, 512))
    timeout = 3600

    def setup(self, model, length):
        common.require_full()
        _train(model, length, self.layers)

    def time_step(self, model, length):
        _train(model, length, self.layers)()
