"""Vision towers of about equal size on a GPU: a ViT with attention beside a Vision Mamba with scans.

`python -m studies.vision [FOLDER]` times forward passes in bfloat16 by image size and keep ratio, both towers
in one run, eagerly and by replay of a CUDA graph, and writes FOLDER/vision_gpu.csv. The weights are random.
Attention is what torch selects, in a graph often a slower kernel than eagerly: compare the faster times.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import ViTConfig, ViTModel

from projecta.mrss import BANDS
from projecta.regress.store.provenance import record_provenance
from projecta.vision_mamba import VisionMambaConfig, VisionMambaModel
from projecta.vtp import Plan, prune
from studies.against_mamba_ssm import kernel_and_eager_ms, peak_mib
from studies.block import write_rows

WIDTHS = {"small": (384, 6), "base": (768, 12)}  # width, heads of ViT-S/16 and ViT-B/16
TOWERS = ("ViT", "Vision Mamba", "Vision Mamba, MRSS")
SIZES = (224, 384, 512, 1024)
BATCH, LARGE_BATCH = 8, 64
Row = dict[str, Any]


def build(tower: str, size: str) -> torch.nn.Module:
    torch.manual_seed(0)
    width, heads = WIDTHS[size]
    if tower == "ViT":
        config = ViTConfig(
            hidden_size=width, intermediate_size=4 * width, num_attention_heads=heads, num_hidden_layers=12
        )
        model: torch.nn.Module = ViTModel(config, add_pooling_layer=False)
    else:
        mrss = BANDS if tower.endswith("MRSS") else None
        model = VisionMambaModel(VisionMambaConfig(hidden_size=width, num_hidden_layers=24, mrss=mrss))
    return model.eval().to("cuda", torch.bfloat16)


def call_of(model: torch.nn.Module, images: torch.Tensor) -> Callable[[], torch.Tensor]:
    options = {"interpolate_pos_encoding": True} if isinstance(model, ViTModel) else {}

    def call() -> torch.Tensor:
        with torch.inference_mode():
            return model(images, **options).last_hidden_state

    return call


PLANS: dict[str, dict[str, Any]] = {
    "drop, block 0": {},
    "squeeze, block 0": {"fuse": "squeeze"},
    "unmerged, block 0": {"fuse": "squeeze", "unmerge": True},
}


def cases() -> Iterator[tuple[str, int, int, float, str]]:
    """Size of the tower, pixels, batch, keep ratio, plan."""
    first, *others = PLANS
    for size in WIDTHS:
        for pixels in SIZES:
            yield size, pixels, BATCH, 1.0, first
            yield size, pixels, BATCH, 0.5, first
        for keep in (1.0, 0.7, 0.5):
            yield size, 224, LARGE_BATCH, keep, first
        for plan in others:
            yield size, 224, LARGE_BATCH, 0.5, plan


def check(size: str) -> float:
    """The largest error of Vision Mamba in bfloat16 against float32 on the CPU, over the largest output."""
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    model = build("Vision Mamba", size)
    got = call_of(model, images.to("cuda", torch.bfloat16))().float().cpu()
    truth = call_of(model.float().cpu(), images)()
    return float((got - truth).abs().max() / truth.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results"))
    folder = parser.parse_args().folder
    folder.mkdir(exist_ok=True)
    error = check("small")
    print(f"error of the small tower in bfloat16: {error:.1e}", flush=True)
    if not error <= 5e-2:
        raise AssertionError(f"Vision Mamba in bfloat16 differs by {error:.1e} of its largest output")
    models = {(tower, size): build(tower, size) for tower in TOWERS for size in WIDTHS}
    rows: list[Row] = []
    for size, pixels, batch, keep, plan in cases():
        images = torch.randn(batch, 3, pixels, pixels, device="cuda", dtype=torch.bfloat16)
        for tower in TOWERS if batch == LARGE_BATCH else TOWERS[:2]:
            if tower == "ViT" and plan.startswith("unmerged"):
                continue
            model = models[tower, size]
            with prune(model, Plan(keep=keep, score="norm", **PLANS[plan])):
                call = call_of(model, images)
                row: Row = {
                    "size": size, "pixels": pixels, "batch": batch, "keep": keep, "plan": plan, "tower": tower
                }  # fmt: skip
                row["graph_ms"], row["eager_ms"] = kernel_and_eager_ms(call)
                row["peak_mib"] = peak_mib(call)
            rows.append(row)
            print({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    path = folder / "vision_gpu.csv"
    write_rows(path, rows)
    record_provenance([path], "python -m studies.vision")


if __name__ == "__main__":
    main()
