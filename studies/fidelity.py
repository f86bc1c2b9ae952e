"""Effect of pruning on a model's features: DINOv2-S/14, real weights and images, by plan and keep ratio.

`python -m studies.fidelity` writes the table of all rows, results/vtp_fidelity.csv. It needs the files that
`nox -s fidelity` downloads.
"""

import csv
import functools
import sys
from pathlib import Path

import torch

from benchmarks import common
from projecta.regress.store.provenance import record_provenance
from studies import real

KEEP = (0.7, 0.5)
SETS = ("natural", "emoji")
BATCH = 16
PREFIX, TOKENS = 1, (real.SIZE // real.PATCH) ** 2 + 1
FUSED = ("mean", "cluster", "squeeze")


def rows() -> dict[str, dict]:
    """Arguments of Plan, besides keep, for every row of the table. The controls come first."""
    table: dict[str, dict] = {
        "control: resized image": {"resize": True},
        "control: checkerboard, block 0": {"score": "grid"},
        "control: random, block 0": {"score": "random"},
        "control: alignment only (256 of 257)": {"score": "random", "align": True},
        "control: merging in every block": {
            "at": tuple(range(real.BLOCKS)), "fuse": "bipartite", "mass": True, "semantics": "flops",
        },
        "preset evit3": {"at": (3, 6, 9), "score": "cls", "fuse": "mean"},
    }  # fmt: skip
    for score in ("norm", "distance", "random", "grid", "cls", "value", "received"):
        for at in (0, 4):
            table[f"{score}, drop, block {at}"] = {"score": score, "at": at}
            table[f"{score}, squeeze, block {at}"] = {
                "score": score,
                "at": at,
                "fuse": "squeeze",
                "mass": True,
            }
    for at in (2, 6):
        table[f"cls, squeeze, block {at}"] = {"score": "cls", "at": at, "fuse": "squeeze", "mass": True}
    for fuse in ("mean", "cluster"):
        table[f"cls, {fuse}, block 4"] = {"score": "cls", "at": 4, "fuse": fuse, "mass": True}
    table["bipartite, block 0"] = {"at": 0, "fuse": "bipartite", "mass": True}
    table["bipartite, block 4"] = {"at": 4, "fuse": "bipartite", "mass": True}
    table["cls, squeeze without mass, block 4"] = {"score": "cls", "at": 4, "fuse": "squeeze"}
    for score, fuse, at in (
        ("cls", "squeeze", 3), ("distance", "squeeze", 3), ("distance", "squeeze", (1, 4, 7)),
        ("cls", "squeeze", (1, 4, 7)), ("norm", "bipartite", (1, 4, 7)),
        ("norm", "bipartite", (0, 2, 4, 6, 8, 10)),
    ):  # fmt: skip
        where = "blocks " + " ".join(map(str, at)) if isinstance(at, tuple) else f"block {at}"
        label = f"equal FLOPs: {fuse if fuse == 'bipartite' else f'{score}, {fuse}'}, {where}"
        table[label] = {"score": score, "at": at, "fuse": fuse, "mass": True, "semantics": "flops"}
    early = {"score": "cls", "at": 4, "fuse": "squeeze", "mass": True}
    table["as many FLOPs as cls, squeeze, block 4: bipartite, blocks 0 2 4 6 8 10"] = {
        "at": (0, 2, 4, 6, 8, 10), "fuse": "bipartite", "mass": True, "semantics": "flops", "like": early,
    }  # fmt: skip
    return table


@functools.cache
def _images(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(view.to(common.device()) for view in getattr(real, name)())


@torch.inference_mode()
def _features(pixels: torch.Tensor) -> torch.Tensor:
    """The class token's output, a batch at a time."""
    return torch.cat([real.dinov2()(pixel_values=x).last_hidden_state[:, 0] for x in pixels.split(BATCH)])


@functools.cache
def _truth(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The full model's features of both views."""
    return tuple(_features(view) for view in _images(name))


@functools.cache
def _saliency(name: str) -> torch.Tensor:
    """Saliency of each patch of the first view, from the original model with its decoder: (b, patches)."""
    maps = torch.cat([real.run_onnx()(x) for x in _images(name)[0].split(BATCH)])
    return torch.nn.functional.avg_pool2d(maps, real.PATCH).flatten(1)


def measure(name: str, row: dict, keep: float) -> dict[str, float]:
    """Compare the pruned model with the full model: one row of the table.

    Cosine of both class tokens: mean and 10 % quantile. Retrieval: share of images whose nearest second view,
    by the full model, is their own. Salient kept: share of the most salient patches that stay. FLOPs: share
    of the full model's.
    """
    prune = common.require("projecta.vtp", "prune", formerly="projecta.clip")
    Plan = common.require("projecta.vtp", "Plan")
    model, pixels, saliency = real.dinov2(), _images(name)[0], None
    options = {k: v for k, v in row.items() if k not in ("resize", "align", "like")}
    if "like" in row:
        keep = _flops(Plan(keep=keep, **row["like"]).schedule(TOKENS, real.BLOCKS, PREFIX))
    if row.get("resize"):
        side = {0.7: 13, 0.5: 11}[keep]  # 66 % and 47 % of the patches
        small = torch.nn.functional.interpolate(
            pixels, size=(side * real.PATCH,) * 2, mode="bicubic", antialias=True
        )
        got, tokens = _features(small), side * side + 1
        flops = _flops((tokens,) * real.BLOCKS)
    else:
        plan = Plan(keep=(TOKENS - 2) / (TOKENS - 1) if row.get("align") else keep, **options)
        got, found = [], []
        with prune(model, plan) as handle:
            for x in pixels.split(BATCH):
                got.append(_features(x))
                found.append(handle.trace[:, PREFIX:] - PREFIX)
            flops = handle.flops_ratio
        got, kept = torch.cat(got), torch.cat(found)
        best = _saliency(name).topk(kept.shape[1]).indices
        chosen = torch.zeros(len(kept), TOKENS - 1, device=kept.device).scatter(1, kept, 1.0)
        saliency = chosen.gather(1, best.to(kept.device)).mean().item()
    truth, second = _truth(name)
    cosine = torch.nn.functional.cosine_similarity(got, truth)
    near = torch.nn.functional.normalize(got, dim=-1) @ torch.nn.functional.normalize(second, dim=-1).T
    hits = near.argmax(-1) == torch.arange(len(near), device=near.device)
    return {
        "cosine": cosine.mean().item(), "cosine, lowest tenth": cosine.quantile(0.1).item(),
        "retrieval": hits.float().mean().item(), "salient kept": saliency, "FLOPs": flops,
    }  # fmt: skip


def _flops(schedule: tuple[int, ...]) -> float:
    Costs = common.require("projecta.vtp", "Costs")
    costs = Costs(real.WIDTH, 4 * real.WIDTH, 2 * (TOKENS - 1) * 3 * real.PATCH**2 * real.WIDTH)
    return costs.of(schedule) / costs.of((TOKENS,) * real.BLOCKS)


@torch.inference_mode()
def picture(path: Path) -> None:
    """Draw one photograph as pruned by the preset "early"."""
    prune, draw = (common.require("projecta.vtp", name) for name in ("prune", "draw"))
    pixels = _images("natural")[0][:2]
    mean, std = (
        torch.tensor(values, device=pixels.device)[:, None, None] for values in (real.MEAN, real.STD)
    )
    with prune(real.dinov2(), common.require("projecta.vtp", "Plan").preset("early")) as handle:
        real.dinov2()(pixel_values=pixels)
        draw(pixels[1] * std + mean, handle, row=1).savefig(path, dpi=100)


def main() -> None:
    """Write the table and a picture, and print each row as it comes."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "results/vtp_fidelity.csv")
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        for keep in KEEP:
            for label, row in rows().items():
                for name in SETS:
                    found = measure(name, row, keep)
                    if file.tell() == 0:
                        out.writerow(["row", "keep", "images", *found])
                    out.writerow(
                        [label, keep, name, *(None if v is None else f"{v:.4f}" for v in found.values())]
                    )
                    file.flush()
                    print(f"{keep} {label:42s} {name:8s} cosine {found['cosine']:.4f}", flush=True)
    shown = path.with_name("vtp_picture.png")
    picture(shown)
    record_provenance([path, shown], "nox -s fidelity")
    print(f"wrote {path} and vtp_picture.png")


if __name__ == "__main__":
    main()
