"""Sequence mixers by length: attention, S4D, the selective scan, MRSS; width 256, forward."""

import functools

import torch

from benchmarks import common, mrss, s4d, scan

LAYERS = ("attention", "S4D", "selective scan", "MRSS, half per 8")
WIDTH, HEADS = 256, 4
VERSION = common.version(__file__)


@functools.cache
def _attention(l: int):
    """torch's causal attention with 4 heads of width 64. The first 64 rows are checked."""
    q, k, v = (common.randn(1, HEADS, l, WIDTH // HEADS, seed=seed) for seed in range(3))
    run = torch.inference_mode()(
        functools.partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=True)
    )
    few = [t[:, :, :64].double() for t in (q, k, v)]
    scores = (few[0] @ few[1].mT / 8).masked_fill(
        torch.ones(64, 64, device=q.device).triu(1).bool(), -torch.inf
    )
    common.check_close("attention", run()[:, :, :64], scores.softmax(-1) @ few[2], 1e-4)
    return run


def _layer(layer: str, l: int):
    if layer == "attention":
        return _attention(l)
    if layer == "S4D":
        return s4d._scan("convolution", l, WIDTH)
    case = "full scan" if layer == "selective scan" else "half per 8"
    return mrss._scan(case, l, WIDTH, backward=False)


class Lengths(common.Suite):
    """b = 1, float32, the backend that "auto" selects."""

    params = (LAYERS, (2048, 8192))
    param_names = ("layer", "length")
    version = f"{VERSION} {scan.VERSION} {s4d.VERSION} {mrss.VERSION}"
    timeout = 1200

    def setup(self, layer, length):
        _layer(layer, length)

    def time_forward(self, layer, length):
        _layer(layer, length)()


class FullLengths(Lengths):
    params = (LAYERS, (512, 16384, 32768, 65536))

    def setup(self, layer, length):
        common.require_full()
        super().setup(layer, length)
