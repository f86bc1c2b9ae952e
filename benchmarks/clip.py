"""Vision token pruning in the CLIP ViT-B/16 vision tower, by keep ratio and batch, on real photographs."""

import functools

import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from benchmarks import common

KEEP = (1.0, 0.7, 0.5)
VERSION = common.version(__file__)


@functools.cache
def _tower():
    """CLIP ViT-B/16's vision tower at full size, random weights from a fixed seed.

    The gains of the norm before block 0 are drawn as well: with gains of 1 all tokens would have the same
    length.
    """
    config = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        patch_size=16, image_size=224, projection_dim=512,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPVisionModelWithProjection(config).eval()
        torch.nn.init.uniform_(model.vision_model.pre_layrnorm.weight, 0.2, 1.8)
    return model.to(common.device())


@torch.inference_mode()
def _pruned_by_hand(model, pixels, keep):
    """The pruned tower written out: embed, keep the class token and the longest patches, encode, project."""
    tower = model.vision_model
    tokens = tower.pre_layrnorm(tower.embeddings(pixels))
    lengths = tokens[:, 1:].norm(dim=-1)
    count = tokens.shape[1] - 1 if keep == 1 else {0.7: 138, 0.5: 98}[keep]
    order = lengths.topk(count).indices.sort().values + 1
    kept = torch.stack(
        [row[torch.cat([order.new_zeros(1), index])] for row, index in zip(tokens, order, strict=True)]
    )
    for block in tower.encoder.layers:
        kept = block(kept, None)
    return model.visual_projection(tower.post_layernorm(kept[:, 0]))


@functools.cache
def _forward(keep: float, batch: int):
    """A call of the pruned tower, checked against the one written out."""
    prune, Plan = common.require("projecta.clip", "prune"), common.require("projecta.vtp", "Plan")
    model, pixels = _tower(), common.photographs(batch)
    truth = _pruned_by_hand(model, pixels, keep)

    @torch.inference_mode()
    def run():
        with prune(model, Plan(keep=keep)):
            return model(pixel_values=pixels).image_embeds

    common.check_close(f"keep {keep}", run(), truth, 1e-5)
    return run


class _Forward(common.Suite):
    """Float32, plan "norm" before block 0; keep 1.0 is the unpruned tower."""

    params = (KEEP, (1, 8))
    param_names = ("keep", "batch")
    version = VERSION


class Vtp(_Forward):
    def setup(self, keep, batch):
        _forward(keep, batch)

    def time_forward(self, keep, batch):
        _forward(keep, batch)()


class VtpPeak(_Forward):
    def setup(self, keep, batch):
        common.return_freed_memory()
        _forward(keep, batch)

    def track_peak_forward(self, keep, batch):
        return common.peak_mib(_forward(keep, batch))


class _Large(common.Suite):
    """The batches of a large GPU."""

    params = (KEEP, (64, 256))
    param_names = ("keep", "batch")
    version = VERSION
    timeout = 1200


class FullVtp(_Large):
    def setup(self, keep, batch):
        common.require_full()
        _forward(keep, batch)

    def time_forward(self, keep, batch):
        _forward(keep, batch)()


class FullVtpPeak(_Large):
    def setup(self, keep, batch):
        common.require_full()
        common.return_freed_memory()
        _forward(keep, batch)

    def track_peak_forward(self, keep, batch):
        return common.peak_mib(_forward(keep, batch))
