"""Tables and charts of projecta's benchmarks, for `projecta report` and the start page.

This module must import on every commit, so only its functions import from projecta.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]
VTP_TIME = tuple(f"vtp.{name}.time_forward" for name in ("Vtp", "VtpSingle", "FullVtpControl", "FullVtp"))
VTP_MEMORY = (
    "vtp.VtpPeak.track_peak_forward", "vtp.FullVtpControlPeak.track_peak_forward",
    "vtp.FullVtpPeak.track_peak_forward",
)  # fmt: skip
VTP_BOUND = ("vtp.VtpBound.track_peak_forward", "vtp.FullVtpControlBound.track_peak_forward")
VTP_FLOPS = ("vtp.VtpFlops.track_flops_ratio", "vtp.FullVtpControlFlops.track_flops_ratio")
T4 = {1.0: (81.0, 420.0), 0.7: (63.0, 400.0), 0.5: (46.0, 380.0)}  # keep: targets in ms and MiB, batch 8
SCAN, SCAN_D, SCAN_N = ("scan.Scan.time_forward", "scan.ScanReference.time_forward"), 256, 16
SCAN_OPERATIONS = 13  # per token, channel and state: the exponential counts 10
MRSS = ("half per 8",)


def sections():
    """The sections of the start page, in order."""
    from projecta.regress.site.tables import Custom, Lines, Section

    return (
        Section("scan", "Selective scan", (
            Lines("scan_time", "Selective scan: time", "time_ms", 1e3, "backend", {
                "scan.Scan.time_forward": "forward", "scan.ScanReference.time_forward": "forward",
                "scan.ScanGrad.time_forward_backward": "forward+backward",
                "scan.ScanGradReference.time_forward_backward": "forward+backward",
                "scan.FullScanReference.time_forward": "forward",
                "scan.FullScanReference.time_forward_backward": "forward+backward",
                "scan.FullScan.time_forward": "forward, d 1536",
            }, against="reference"),
            Lines("scan_memory", "Selective scan: peak memory over inputs", "memory_mib", 1.0, "backend", {
                "scan.ScanPeak.track_peak_forward": "forward",
                "scan.ScanGradPeak.track_peak_forward_backward": "forward+backward",
                "scan.FullScanGradPeak.track_peak_forward_backward": "forward+backward",
                "scan.FullScanPeak.track_peak_forward": "forward, d 1536",
                "scan.ScanBound.track_peak_forward": "forward",
                "scan.ScanBound.track_peak_forward_backward": "forward+backward",
            }),
            Custom("scan_roofline", "Roofline", roofline_rows, roofline_note, roofline_chart),
        )),
        block_section(),
        vision_section(),
        Section("models", "Models, beside what transformers does by itself", (
            Lines("model_time", "mamba-130m's shape in transformers: time", "time_ms", 1e3, "model", {
                "mamba.ModelPrefill.time_prefill": "prefill",
                "mamba.FullModelPrefill.time_prefill": "prefill",
                "mamba.ModelDecode.time_decode": "decode",
                "mamba.ModelTrain.time_step": "training step",
                "mamba.FullModelTrain.time_step": "training step",
            }, against="stock"),
        )),
        Section("vtp", "Vision token pruning", (
            Custom(
                "clip_vtp_results", "CLIP ViT-B/16 vision tower, by plan and keep ratio", vtp_rows,
                "Change of the time of one forward pass against the full tower, in per cent.", vtp_chart,
                ("variant", "flops_ratio", "latency_ms", "latency_change", "throughput_img_s", "memory_mib"),
            ),
            Custom(
                "vtp_targets", "Beside the targets on a T4", target_rows,
                "Pruning before block 0, batch 8, against the full tower: here, and the targets on a T4.",
                target_chart,
            ),
            Custom(
                "vtp_fidelity", "Fidelity against arithmetic", fidelity_rows,
                "DINOv2-S/14 with real weights on photographs: cosine of the class token's output to that of "
                "the full model, against the part of the FLOPs that is left.",
                fidelity_chart, ("row", "keep", "cosine", "FLOPs"), file="results/vtp_fidelity.csv",
            ),
        )),
        Section("mrss", "Multi-resolution scan", (
            Lines("mrss_time", "Multi-resolution scan: time", "time_ms", 1e3, "case", {
                "mrss.Mrss.time_forward": "forward", "mrss.FullMrss.time_forward": "forward, d 1536",
                "mrss.MrssGrad.time_forward_backward": "forward+backward",
                "mrss.FullMrssGrad.time_forward_backward": "forward+backward, d 1536",
            }, against="full scan"),
            Lines("mrss_memory", "Multi-resolution scan: peak memory", "memory_mib", 1.0, "case", {
                "mrss.MrssPeak.track_peak_forward": "forward",
                "mrss.FullMrssGradPeak.track_peak_forward_backward": "forward+backward",
                "mrss.FullMrssPeak.track_peak_forward": "forward, d 1536",
            }),
            Custom(
                "mrss_accuracy", "Accuracy after a change of the scan", accuracy_rows,
                "Small models, five seeds: change against the full scan, in points of per cent right.",
                accuracy_chart, ("task", "scan", "mean", "change"), file="results/mrss_accuracy.csv",
            ),
        )),
        Section("lengths", "Time against length", (
            Lines("length_time", "A layer's time against length", "time_ms", 1e3, "layer", {
                "lengths.Lengths.time_forward": "forward", "lengths.FullLengths.time_forward": "forward",
            }, against="attention", slopes=True),
            Lines("s4d_time", "S4D: time", "time_ms", 1e3, "mode", {"s4d.S4d.time_forward": "forward"}),
            Lines("s4d_memory", "S4D: peak memory over inputs", "memory_mib", 1.0, "mode", {
                "s4d.S4dPeak.track_peak_forward": "forward",
            }),
        )),
    )  # fmt: skip


def block_section():
    """A block of width 256 and small calls of its parts."""
    from projecta.regress.site.tables import Lines, Section

    return Section(
        "block",
        "The Mamba block as a whole",
        (
            Lines(
                "block_time",
                "A block of width 256: time",
                "time_ms",
                1e3,
                "mode",
                {
                    "block.Block.time_forward": "forward",
                    "block.BlockGrad.time_forward_backward": "forward+backward",
                    "block.BlockStep.time_step": "one token",
                },
            ),
            Lines(
                "block_memory",
                "A block of width 256: peak memory over inputs",
                "memory_mib",
                1.0,
                "mode",
                {
                    "block.BlockPeak.track_peak_forward_backward": "forward+backward",
                },
            ),
            Lines(
                "small_call_time",
                "Small calls of its parts: time",
                "time_ms",
                1e3,
                "part",
                {
                    "block.SmallCall.time_forward": "forward",
                    "block.SmallCallGrad.time_forward_backward": "forward+backward",
                },
            ),
        ),
    )


def vision_section():
    """Attention and scans by image size."""
    from projecta.regress.site.tables import Lines, Section

    time = {
        "vision.Vision.time_forward": "small, batch 1", "vision.FullVision.time_forward": "small, batch 1",
        "vision.FullVisionBatch.time_forward": "small, batch 8",
        "vision.FullVisionBase.time_forward": "base, batch 1",
    }  # fmt: skip
    memory = {"vision.FullVisionPeak.track_peak_forward": "small, batch 8"}
    return Section("vision", "Vision towers: attention and scans, by keep ratio", (
        Lines("vision_time", "ViT and Vision Mamba: time", "time_ms", 1e3, "case", time, x="pixels"),
        Lines("vision_memory", "The same: peak memory", "memory_mib", 1.0, "case", memory, x="pixels"),
    ))  # fmt: skip


def vtp_rows(source) -> list[dict[str, Any]]:
    """One row for each batch and case; `latency_change` is against the full tower."""
    time, memory, bound, flops = {}, {}, {}, {}
    for m in source.measurements:
        if m.benchmark in VTP_FLOPS:
            flops[m.params["case"]] = m.value
        for names, found in ((VTP_TIME, time), (VTP_MEMORY, memory), (VTP_BOUND, bound)):
            if m.benchmark in names:
                found[int(m.params["batch"]), m.params["case"]] = m.value
    rows = []
    for batch, case in sorted(time, key=lambda key: key[0]):  # in the order measured, within a batch
        plan, _, ratio = case.partition(" ")
        seconds, full = time[batch, case], time.get((batch, "full"))
        rows.append({
            "variant": f"{'baseline' if plan == 'full' else case.replace(' ', '_')}_b{batch}", "plan": plan,
            "keep_ratio": float(ratio) if ratio else 1.0, "batch": batch,
            "flops_ratio": round(flops[case], 4) if case in flops else None,
            "latency_ms": round(seconds * 1e3, 3),
            "latency_change": round(seconds / full - 1, 4) if full else None,
            "throughput_img_s": round(batch / seconds, 3),
            "memory_mib": round(memory[batch, case], 3) if (batch, case) in memory else None,
            "memory_by_formula_mib": round(bound[batch, case], 3) if (batch, case) in bound else None,
        })  # fmt: skip
    return rows


def vtp_chart(rows: Rows, style):
    from projecta.regress.site import charts

    panels: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["latency_change"] is not None and row["plan"] in ("input", "early", "evit3", "merge"):
            group = panels.setdefault(f"batch {row['batch']}", {}).setdefault(row["plan"], {})
            group[f"keep {row['keep_ratio']}"] = 100 * row["latency_change"]
    return charts.bars(panels, "change of latency (%)", style, "{:.0f}") if panels else None


def target_rows(source) -> list[dict[str, Any]]:
    """Change of latency and peak memory against the full tower: measured, and the target on a T4."""
    own = {(row["plan"], row["keep_ratio"]): row for row in vtp_rows(source) if row["batch"] == 8}
    full, rows = own.get(("full", 1.0)), []
    for keep in (0.7, 0.5):
        row = own.get(("input", keep))
        for i, name in enumerate(("latency_ms", "memory_mib")):
            if full and row and row[name] is not None and full[name]:
                rows.append({
                    "change": name.partition("_")[0], "keep": keep,
                    "measured": round(100 * (row[name] / full[name] - 1), 1),
                    "target": round(100 * (T4[keep][i] / T4[1.0][i] - 1), 1),
                })  # fmt: skip
    return rows


def target_chart(rows: Rows, style):
    from projecta.regress.site import charts

    panels: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        bars = {"measured here": row["measured"], "target, T4": row["target"]}
        panels.setdefault(f"{row['change']} (%)", {})[f"keep {row['keep']}"] = bars
    return charts.bars(panels, "change (%)", style, "{:.0f}")


def fidelity_rows(source) -> list[dict[str, Any]]:
    rows = source.read_csv("results/vtp_fidelity.csv")
    return [row for row in rows if row["images"] == "natural"]


def fidelity_chart(rows: Rows, style):
    from projecta.regress.site import charts

    groups: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        fusions = (fuse for fuse in ("squeeze", "bipartite", "drop", "mean", "cluster") if fuse in row["row"])
        kind = "control" if row["row"].startswith("control") else next(fusions, "preset")
        groups.setdefault(kind, []).append((float(row["FLOPs"]), float(row["cosine"])))
    return charts.scatter(groups, "part of the FLOPs", "cosine to the full model", style)


def accuracy_rows(source) -> list[dict[str, Any]]:
    return source.read_csv("results/mrss_accuracy.csv")


def accuracy_chart(rows: Rows, style):
    from projecta.regress.site import charts

    panel: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["unit"].startswith("per cent") and row["scan"] in MRSS:
            panel.setdefault(row["task"].replace(" ", "\n"), {})[row["scan"]] = float(row["change"])
    return charts.bars({"": panel}, "change (points)", style, "{:+.2f}", width=8.4)


def roofline_rows(source) -> list[dict[str, Any]]:
    """Operations per byte and 10^9 operations per second of the forward scan, by backend and length.

    The bytes are the least possible: u, delta, z, B and C are read once and y is written once, in float32.
    """
    ceilings = {m.benchmark: m.value for m in source.measurements if m.benchmark.startswith("roofline.")}
    bandwidth, arithmetic = (
        ceilings.get(f"roofline.{name}") for name in ("Bandwidth.track_copy", "Arithmetic.track_product")
    )
    rows = []
    for m in source.measurements:
        if m.benchmark in SCAN and m.value and bandwidth and arithmetic:
            length = int(m.params["length"])
            operations = SCAN_OPERATIONS * SCAN_D * SCAN_N * length
            moved = 4 * (4 * SCAN_D + 2 * SCAN_N) * length
            rows.append({
                "backend": m.params["backend"], "length": length,
                "operations_per_byte": round(operations / moved, 3),
                "gops": round(operations / m.value / 1e9, 3), "copy_gb_s": round(bandwidth, 1),
                "product_gops": round(arithmetic, 1),
            })  # fmt: skip
    return sorted(rows, key=lambda row: (row["backend"], row["length"]))


def roofline_note(rows: Rows) -> str:
    return (
        f"Forward, by backend and length: operations (a multiply-and-add is one) against a copy of memory "
        f"({rows[0]['copy_gb_s']:.0f} GB/s) and a matrix product ({rows[0]['product_gops']:.0f} Gop/s)."
    )


def roofline_chart(rows: Rows, style):
    from projecta.regress.site import charts

    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        points.setdefault(row["backend"], []).append((row["operations_per_byte"], row["gops"]))
    return charts.roofline(points, rows[0]["copy_gb_s"], rows[0]["product_gops"], style)
