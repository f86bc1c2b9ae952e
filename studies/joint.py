"""CLIPs of equal size whose image tower is a ViT or a Vision Mamba: zero-shot accuracy, full and pruned.

`python -m studies.joint [SEEDS]` trains both on Fashion-MNIST for each seed (0,1,2) with the same text tower,
images and steps, and writes joint_zero_shot.csv. `studies.zero_shot` says where the images come from.
"""

import csv
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel
from transformers import VisionTextDualEncoderModel as DualEncoder

from projecta.regress.store.provenance import record_provenance
from projecta.vision_mamba import VisionMambaConfig, VisionMambaModel
from projecta.vtp import Plan, prune
from studies.zero_shot import JUDGED, SEEDS, SIZE, TEXT, VISION, accuracy, load, train

Row = tuple[str, str, float]  # tower, plan, keep
Found = dict[Row, list[float]]  # the accuracy of each seed
TOWERS = ("ViT", "Vision Mamba")
LAYERS = 7  # of Vision Mamba: as many weights as 6 blocks of the ViT
PLANS: dict[str, dict[str, Any]] = {
    "grid, drop, block 0": {"score": "grid"},
    "delta, drop, block 2": {"score": "delta", "at": 2},
    "grid, squeeze, block 0": {"score": "grid", "fuse": "squeeze"},
    "grid, squeeze, block 2": {"score": "grid", "fuse": "squeeze", "at": 2},
    "delta, squeeze, block 2": {"score": "delta", "fuse": "squeeze", "at": 2},
    "bipartite, block 2": {"fuse": "bipartite", "at": 2},
    "checkerboard, block 2": {"fuse": "checkerboard", "at": 2},
    "checkerboard, blocks 2 and 4": {"fuse": "checkerboard", "at": (2, 4)},
}


def build(tower: str, seed: int) -> DualEncoder:
    torch.manual_seed(seed)
    text = CLIPTextModel(CLIPTextConfig(**TEXT))
    if tower == "ViT":
        vision = CLIPVisionModel(CLIPVisionConfig(**VISION))
    else:
        sizes = {"hidden_size": 64, "num_hidden_layers": LAYERS, "image_size": SIZE, "patch_size": 4}
        vision = VisionMambaModel(VisionMambaConfig(**sizes))
    return DualEncoder(vision_model=vision, text_model=text)


def plans_of(tower: str) -> dict[str, dict]:
    """The plans by row; a Vision Mamba runs each with and without the steps of missing tokens, too."""
    if tower == "ViT":
        return {name: plan for name, plan in PLANS.items() if plan.get("score") != "delta"}
    rows = {}
    for name, plan in PLANS.items():
        rows[name] = plan
        rows[f"{name}, with the steps of missing tokens"] = plan | {"forget": True}
        if "fuse" in plan:
            rows[f"{name}, unmerged"] = plan | {"unmerge": True}
    return rows


def write(path: Path, found: Found, flops: dict[Row, float]) -> None:
    with path.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        numbers = ("accuracy", "least", "most", "change", "change_least", "change_most")
        out.writerow(["tower", "plan", "keep", "flops", "seeds", *numbers])
        for row, values in found.items():
            change = [v - f for v, f in zip(values, found[row[0], "full", 1.0], strict=True)]
            each = (f"{f(v):.2f}" for v in (values, change) for f in (statistics.mean, min, max))
            out.writerow([*row, f"{flops.get(row, 1.0):.4f}", len(values), *each])


def main() -> None:
    images, labels = (t[:JUDGED] for t in load("t10k"))
    seeds = tuple(map(int, sys.argv[1].split(","))) if len(sys.argv) > 1 else SEEDS
    path = Path("results/joint_zero_shot.csv")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: Found = {}
    flops: dict[Row, float] = {}
    for seed in seeds:
        for tower in TOWERS:
            start = time.perf_counter()
            model: Any = build(tower, seed).to(device)
            weights = sum(p.numel() for p in model.vision_model.parameters())
            model = train(model, seed)
            full = accuracy(model, images, labels)
            found.setdefault((tower, "full", 1.0), []).append(full)
            seconds = time.perf_counter() - start
            print(f"seed {seed}, {tower}, {weights} weights, {seconds:.0f} s: {full:.2f}", flush=True)
            for name, plan in plans_of(tower).items():
                for keep in (0.7, 0.5):
                    row = tower, name, keep
                    with prune(model.vision_model, Plan(keep=keep, **plan)) as handle:
                        found.setdefault(row, []).append(accuracy(model, images, labels))
                    flops[row] = handle.flops_ratio
                    print(f"{keep} {name}: {found[row][-1] - full:+.2f}", flush=True)
        write(path, found, flops)
        record_provenance([path], "python -m studies.joint")


if __name__ == "__main__":
    main()
