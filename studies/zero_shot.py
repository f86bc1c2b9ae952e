"""Zero-shot accuracy before and after pruning: a small CLIP trained here on Fashion-MNIST, by plan and keep.

`python -m studies.zero_shot` trains one model per seed and writes results/vtp_zero_shot.csv. The images come
from Debian's package dataset-fashion-mnist, in /usr/share/datasets or .data.
"""

import csv
import gzip
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

from projecta.regress.store.provenance import record_provenance
from studies import real

NAMES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"
)  # fmt: skip
TEMPLATES = ("a photo of a {}", "a picture of a {}", "a {} in grey", "one {}", "the {}")
HELD_OUT = ("an image of a {}", "some grey {}")  # never seen in training: zero-shot prompts
SEEDS, STEPS, BATCH, SIZE, JUDGED = (0, 1, 2), 1200, 128, 32, 5000
ROWS = {
    "norm, drop, block 0": {"at": 0, "score": "norm"},
    "norm, squeeze, block 0": {"at": 0, "score": "norm", "fuse": "squeeze", "mass": True},
    "random, drop, block 0": {"at": 0, "score": "random"},
    "checkerboard, drop, block 0": {"at": 0, "score": "grid"},
    "cls, drop, block 2": {"at": 2, "score": "cls"},
    "cls, squeeze, block 2": {"at": 2, "score": "cls", "fuse": "squeeze", "mass": True},
    "bipartite, block 2": {"at": 2, "fuse": "bipartite", "mass": True},
}
WORDS = sorted({word for t in (*TEMPLATES, *HELD_OUT) for word in t.split()} | set(NAMES) - {"{}"})
END = len(WORDS) + 1  # 0 is padding


def _read(name: str) -> np.ndarray:
    places = (Path("/usr/share/datasets/fashion-mnist"), *real.DATA.glob("**/fashion-mnist"))
    path = next((p / name for p in places if (p / name).exists()), None)
    if path is None:
        raise FileNotFoundError(
            f"zero_shot: {name} must be in /usr/share/datasets/fashion-mnist or {real.DATA}."
        )
    raw = gzip.decompress(path.read_bytes())
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])


def load(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (b, 3, 32, 32) in -1...1, and labels; `part` is "train" or "t10k"."""
    images = torch.from_numpy(_read(f"{part}-images-idx3-ubyte.gz").copy()).reshape(-1, 1, 28, 28)
    images = torch.nn.functional.pad(images.float() / 127.5 - 1, (2, 2, 2, 2), value=-1.0)
    return images.expand(-1, 3, -1, -1), torch.from_numpy(_read(f"{part}-labels-idx1-ubyte.gz").copy()).long()


def tokenise(text: str) -> list[int]:
    ids = [WORDS.index(word) + 1 for word in text.split()] + [END]
    return ids + [0] * (8 - len(ids))


def captions(template: str) -> torch.Tensor:
    return torch.tensor([tokenise(template.format(name)) for name in NAMES])


VISION = {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4,
    "image_size": SIZE, "patch_size": 4,
}  # fmt: skip
TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": END + 1, "max_position_embeddings": 8, "eos_token_id": END, "bos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip


def build(seed: int):
    """A CLIP of 64 patches: 6 blocks of width 64 for images, 2 of 64 for text."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=64))


def train(model, seed: int):
    """Contrastive training: images against captions of all classes, classes against images of the batch."""
    device = model.device
    images, labels = (t.to(device) for t in load("train"))
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=STEPS)
    draw = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        rows = torch.randint(len(images), (BATCH,), generator=draw)
        x, y = images[rows], labels[rows]
        flip = (torch.rand(BATCH, generator=draw) < 0.5).to(device)
        x = torch.where(flip[:, None, None, None], x.flip(-1), x)
        text = captions(TEMPLATES[step % len(TEMPLATES)]).to(device)
        logits = model(input_ids=text, pixel_values=x).logits_per_image  # (b, 10)
        same = torch.nn.functional.one_hot(y, len(NAMES)).float()
        share = same / same.sum(0, keepdim=True).clamp(min=1)
        loss = torch.nn.functional.cross_entropy(logits, y)
        loss = loss - (logits.log_softmax(0) * share).sum(0).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


@torch.inference_mode()
def accuracy(model, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Accuracy in per cent, with prompts that were not used in training."""
    unit = torch.nn.functional.normalize
    prompts = (captions(t).to(model.device) for t in HELD_OUT)
    texts = torch.stack([unit(model.get_text_features(p).pooler_output, dim=-1) for p in prompts])
    texts, hits = texts.mean(0), 0
    for x, y in zip(images.split(500), labels.split(500), strict=True):
        features = model.get_image_features(pixel_values=x.to(model.device)).pooler_output
        hits += int(((features @ texts.T).argmax(-1).cpu() == y).sum())
    return 100 * hits / len(labels)


def main() -> None:
    """Train, prune, and write the table."""
    from projecta.vtp import Plan, prune

    images, labels = (t[:JUDGED] for t in load("t10k"))
    found: dict[tuple[str, float], list[float]] = {}
    flops: dict[tuple[str, float], float] = {}
    for seed in SEEDS:
        model = train(build(seed), seed)
        full = accuracy(model, images, labels)
        found.setdefault(("full", 1.0), []).append(full)
        print(f"seed {seed}: {full:.2f} %", flush=True)
        for label, row in ROWS.items():
            for keep in (0.7, 0.5):
                with prune(model, Plan(keep=keep, **row)) as handle:
                    after = accuracy(model, images, labels)
                flops[label, keep] = handle.flops_ratio
                found.setdefault((label, keep), []).append(after)
                print(f"seed {seed}: {keep} {label}: {after - full:+.2f}", flush=True)
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "results/vtp_zero_shot.csv")
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(
            ["row", "keep", "accuracy", "change", "change, worst seed", "change, best seed", "FLOPs"]
        )
        for (label, keep), values in found.items():
            change = [v - f for v, f in zip(values, found["full", 1.0], strict=True)]
            numbers = (statistics.mean(values), statistics.mean(change), min(change), max(change))
            out.writerow(
                [label, keep, *(f"{v:.2f}" for v in numbers), f"{flops.get((label, keep), 1.0):.4f}"]
            )
    record_provenance([path], "nox -s fidelity")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
