"""Vision towers of about the same size, with attention and with scans, by image size and keep ratio.

The weights are random. With keep < 1 the patches of largest norm are kept, before block 0.
"""

import functools

import torch

from benchmarks import common

WIDTHS = {"small": (384, 1536, 6), "base": (768, 3072, 12)}  # of ViT-S/16 and ViT-B/16: c, MLP, heads
CASES = tuple(f"{tower} {keep}" for tower in ("attention", "scans") for keep in (1.0, 0.7, 0.5))
LONG_SIZES, BATCH_SIZES = (384, 512, 1024), (224, 384)
BATCH = 8
VERSION = common.version(__file__)


@functools.cache
def _tower(kind: str, size: str):
    """ViT-S/16 (22 million weights) or ViT-B/16 (86 million), or Vim's towers of the same width (26, 98)."""
    width, inner, heads = WIDTHS[size]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "scans":
            module = "projecta.vision_mamba"
            config = common.require(module, "VisionMambaConfig")(hidden_size=width, num_hidden_layers=24)
            model = common.require(module, "VisionMambaModel")(config)
        else:
            from transformers import ViTConfig, ViTModel

            config = ViTConfig(
                hidden_size=width, intermediate_size=inner, num_attention_heads=heads, num_hidden_layers=12
            )
            model = ViTModel(config, add_pooling_layer=False)
    return model.eval().to(common.device())


@functools.cache
def _call(case: str, size: str, pixels: int, batch: int):
    """A forward pass, whose first tokens are checked against float64 where that is quick."""
    kind, keep = case.split()[0], float(case.split()[1])
    prune, Plan = common.require("projecta.vtp", "prune"), common.require("projecta.vtp", "Plan")
    model, images = _tower(kind, size), common.photographs(batch, pixels)
    options = {"interpolate_pos_encoding": True} if kind == "attention" else {}

    @torch.inference_mode()
    def run(model=model, images=images):
        if keep == 1:
            return model(images, **options).last_hidden_state
        with prune(model, Plan(keep=keep)):
            return model(images, **options).last_hidden_state

    tokens = run().shape[1]
    wanted = Plan(keep=keep).tokens_kept((pixels // 16) ** 2 + 1)
    if abs(tokens - wanted) > wanted / 100:  # the ratio is that of the tokens kept at 224 pixels
        raise common.WrongResult(f"{tokens} tokens remain, not about {wanted}")
    if size == "small" and pixels == 224 and common.device().type == "cpu":
        got = run(images=images[:1])
        wide = run(model.double(), images[:1].double())
        model.float()
        common.check_close(case, got, wide, 1e-3)
    return run


class Vision(common.Suite):
    """Towers of the small size, one image."""

    param_names = ("case", "pixels")
    params = (CASES, (224,))
    version = VERSION
    size, batch = "small", 1

    def setup(self, case, pixels):
        _call(case, self.size, pixels, self.batch)

    def time_forward(self, case, pixels):
        _call(case, self.size, pixels, self.batch)()


class FullVisionPeak(common.Suite):
    """A batch of 8 images."""

    param_names, params = Vision.param_names, Vision.params
    version = VERSION

    def setup(self, case, pixels):
        common.require_full()
        common.return_freed_memory()

    def track_peak_forward(self, case, pixels):
        return common.peak_mib(_call(case, "small", pixels, BATCH))


class FullVision(Vision):
    """Larger images."""

    params = (CASES, LONG_SIZES)
    timeout = 300.0

    def setup(self, case, pixels):
        common.require_full()
        super().setup(case, pixels)


class FullVisionBatch(FullVision):
    params = (CASES, BATCH_SIZES)
    batch = BATCH


class FullVisionBase(FullVision):
    params = (CASES, (224, *LONG_SIZES))
    timeout = 600.0
    size = "base"
