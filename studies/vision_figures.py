"""The tables of pruned towers and of Vision Mamba."""

from studies.cells import ms, read, table


def fidelity_row(preset: str, keep: str, images: str) -> str:
    rows = {
        "input": "norm, drop, block 0",
        "early": "cls, squeeze, block 4",
        "evit3": "preset evit3",
        "merge": "equal FLOPs: bipartite, blocks 0 2 4 6 8 10",
    }
    key = (rows[preset], keep, images)
    (cosine,) = (r["cosine"] for r in read("vtp_fidelity.csv") if (r["row"], r["keep"], r["images"]) == key)
    return f"{float(cosine):.3f}"


def vtp() -> str:
    """Plans of the CLIP tower, batch 8."""
    rows = []
    for row in read("clip_vtp_results.csv"):
        if row["batch"] != "8" or row["plan"] not in ("full", "input", "early", "merge"):
            continue
        cosines = ["1", "1"]
        if row["plan"] != "full":
            cosines = [
                fidelity_row(row["plan"], row["keep_ratio"], images) for images in ("natural", "emoji")
            ]
        change = f"{100 * float(row['latency_change']):+.0f} %" if row["plan"] != "full" else ""
        rows.append(
            [
                row["plan"],
                row["keep_ratio"],
                f"{float(row['flops_ratio']):.2f}",
                ms(row["latency_ms"]),
                change,
                f"{float(row['throughput_img_s']):.1f}",
                f"{float(row['memory_mib']):.0f} MiB" if row["memory_mib"] else "",
                *cosines,
            ]
        )
    head = ["plan", "keep", "FLOPs", "latency", "change", "images/s", "peak memory"]
    return table([*head, "cosine, photographs", "cosine, emoji"], rows)


def fidelity() -> str:
    """Selected rows of the fidelity study."""
    chosen = (
        "control: resized image",
        "control: checkerboard, block 0",
        "control: random, block 0",
        "norm, drop, block 0",
        "distance, squeeze, block 4",
        "received, squeeze, block 4",
        "cls, squeeze, block 4",
        "cls, squeeze without mass, block 4",
        "preset evit3",
        "equal FLOPs: cls, squeeze, block 3",
        "equal FLOPs: bipartite, blocks 0 2 4 6 8 10",
        "as many FLOPs as cls, squeeze, block 4: bipartite, blocks 0 2 4 6 8 10",
    )
    found = {(r["row"], r["keep"], r["images"]): r for r in read("vtp_fidelity.csv")}
    rows = []
    for name in chosen:
        flops = ", ".join(f"{float(found[name, keep, 'natural']['FLOPs']):.2f}" for keep in ("0.7", "0.5"))
        cells = [
            f"{float(found[name, keep, images]['cosine']):.3f}"
            for images in ("natural", "emoji")
            for keep in ("0.7", "0.5")
        ]
        rows.append([name, flops, *cells])
    return table(["plan", "FLOPs at 0.7, 0.5", "photographs 0.7", "0.5", "emoji 0.7", "0.5"], rows)


def zero_shot() -> str:
    """Zero-shot accuracy of a small CLIP before and after pruning."""
    rows = [
        [
            row["row"],
            row["keep"],
            f"{float(row['FLOPs']):.2f}",
            f"{row['accuracy']} %",
            "{:+.2f} ({:+.2f} to {:+.2f})".format(
                *(float(row[name]) for name in ("change", "change, worst seed", "change, best seed"))
            ),
        ]
        for row in read("vtp_zero_shot.csv")
    ]
    return table(["plan", "keep", "FLOPs", "accuracy", "change in points (worst to best seed)"], rows)


def joint() -> str:
    """Zero-shot accuracy of a CLIP with a ViT and with a Vision Mamba, full and pruned."""
    shown = (
        "full", "grid, drop, block 0", "delta, drop, block 2", "grid, squeeze, block 2",
        "grid, squeeze, block 2, unmerged", "bipartite, block 2", "checkerboard, block 2",
        "checkerboard, block 2, with the steps of missing tokens", "checkerboard, block 2, unmerged",
        "checkerboard, blocks 2 and 4, unmerged",
    )  # fmt: skip
    rows = []
    for row in read("joint_zero_shot.csv"):
        if row["plan"] not in shown:
            continue
        values = [float(row[name]) for name in ("change", "change_least", "change_most")]
        change = "" if row["plan"] == "full" else "{:+.2f} ({:+.2f} to {:+.2f})".format(*values)
        rows.append(
            [
                row["tower"],
                row["plan"],
                row["keep"],
                f"{float(row['flops']):.2f}",
                f"{row['accuracy']} %",
                change,
            ]
        )
    return table(
        ["tower", "plan", "keep", "FLOPs", "accuracy", "change in points (worst to best seed)"], rows
    )


def _change(new: float, old: float) -> str:
    return f"{100 * (new / old - 1):+.0f} %"


def vision_time() -> str:
    """Attention and scans by image size, on a CPU."""
    known = {
        (r["pass"], r["case"], int(r["pixels"])): float(r["time_ms"])
        for r in read("vision_time.csv")
    }  # fmt: skip
    rows = []
    for kind in dict.fromkeys(kind for kind, _, _ in known):
        for pixels in sorted({p for k, _, p in known if k == kind}):
            full = [known[kind, f"{tower} 1.0", pixels] for tower in ("attention", "scans")]
            half = known[kind, "scans 0.5", pixels]
            times = [*map(ms, full), f"{full[0] / full[1]:.2f}"]
            rows.append([kind, pixels, *times, _change(half, full[1])])
    head = ["size, images", "pixels", "ViT", "Vision Mamba", "ViT / Vision Mamba", "with keep 0.5"]
    return table(head, rows)


def vision_gpu() -> str:
    """A ViT and Vision Mamba by image size, on a GPU: the faster of a call and a replay of its graph."""
    known = {
        (r["size"], r["batch"], int(r["pixels"]), r["tower"]): r
        for r in read("vision_gpu.csv")
        if float(r["keep"]) == 1
    }
    rows = []
    for size, batch, pixels, tower in known:
        if tower != "ViT":
            continue
        pair = [known[size, batch, pixels, name] for name in ("ViT", "Vision Mamba")]
        fastest = [_fastest(r) for r in pair]
        times = f"{fastest[0] / fastest[1]:.2f}"
        rows.append([f"{size}, batch {batch}", pixels, *map(ms, fastest), times])
    return table(["size, images", "pixels", "ViT", "Vision Mamba", "ViT / Vision Mamba"], rows)


def vision_pruned() -> str:
    """Towers that keep half of the tokens on a GPU, batch 64 at 224 pixels."""
    known = {
        (r["size"], r["tower"], float(r["keep"]), r["plan"]): (_fastest(r), float(r["peak_mib"]))
        for r in read("vision_gpu.csv")
        if r["batch"] == "64"
    }
    rows = []
    for (size, tower, keep, plan), (time, peak) in known.items():
        if keep != 0.5:
            continue
        full = known[size, tower, 1.0, "drop, block 0"]
        rows.append([size, tower, plan, ms(time), _change(time, full[0]), _change(peak, full[1])])
    return table(["size", "tower", "plan", "time", "change", "peak memory"], rows)


def _fastest(row: dict[str, str]) -> float:
    return min(float(row["graph_ms"]), float(row["eager_ms"]))
