"""Tables and plots of one machine's newest results: CSV, PNG and Markdown.

What goes into which table is said by `TABLES`: a benchmark of the suites belongs to a table by its name.
"""

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from projecta.regress.store.results import Measurement

Row = dict[str, str | float | None]


@dataclass(frozen=True)
class Table:
    """One CSV and one plot: `value` against `length`, one line for each `by` and benchmark."""

    name: str
    title: str
    value: str  # column, with the unit
    scale: float  # from asv's unit to the column's
    by: str  # the parameter that tells the lines apart
    benchmarks: dict[str, str]  # asv's name: what the table calls it
    slopes: bool = False  # whether each line's growth with length is fitted


TABLES = (
    Table("scan_time", "Selective scan: time", "time_ms", 1e3, "backend", {
        "scan.Scan.time_forward": "forward",
        "scan.ScanGrad.time_forward_backward": "forward+backward",
        "scan.FullScan.time_forward": "forward, d 1536",
    }),
    Table("scan_memory", "Selective scan: peak memory over inputs", "memory_mib", 1.0, "backend", {
        "scan.ScanPeak.track_peak_forward": "forward",
        "scan.ScanGradPeak.track_peak_forward_backward": "forward+backward",
        "scan.FullScanPeak.track_peak_forward": "forward, d 1536",
        "scan.ScanBound.track_peak_forward": "forward",
        "scan.ScanBound.track_peak_forward_backward": "forward+backward",
    }),
    Table("s4d_time", "S4D: time", "time_ms", 1e3, "mode", {"s4d.S4d.time_forward": "forward"}),
    Table("s4d_memory", "S4D: peak memory over inputs", "memory_mib", 1.0, "mode", {
        "s4d.S4dPeak.track_peak_forward": "forward",
    }),
    Table("mrss_time", "Multi-resolution scan: time", "time_ms", 1e3, "case", {
        "mrss.Mrss.time_forward": "forward", "mrss.FullMrss.time_forward": "forward, d 1536",
        "mrss.MrssGrad.time_forward_backward": "forward+backward",
    }),
    Table("mrss_memory", "Multi-resolution scan: peak memory over inputs", "memory_mib", 1.0, "case", {
        "mrss.MrssPeak.track_peak_forward": "forward",
        "mrss.FullMrssPeak.track_peak_forward": "forward, d 1536",
    }),
    Table("length_time", "A layer's time against length", "time_ms", 1e3, "layer", {
        "lengths.Lengths.time_forward": "forward", "lengths.FullLengths.time_forward": "forward",
    }, slopes=True),
    Table("model_time", "mamba-130m's shape in transformers: time", "time_ms", 1e3, "model", {
        "mamba.ModelPrefill.time_prefill": "prefill", "mamba.FullModelPrefill.time_prefill": "prefill",
        "mamba.ModelDecode.time_decode": "decode",
        "mamba.ModelTrain.time_step": "training step", "mamba.FullModelTrain.time_step": "training step",
    }),
)  # fmt: skip
VTP_TIME = ("vtp.Vtp.time_forward", "vtp.VtpControl.time_forward", "vtp.FullVtp.time_forward")
VTP_MEMORY = (
    "vtp.VtpPeak.track_peak_forward", "vtp.VtpControlPeak.track_peak_forward",
    "vtp.FullVtpPeak.track_peak_forward",
)  # fmt: skip
VTP_BOUND = ("vtp.VtpBound.track_peak_forward",)
VTP_FLOPS = "vtp.VtpFlops.track_flops_ratio"
T4 = {
    1.0: (81.0, 420.0),
    0.7: (63.0, 400.0),
    0.5: (46.0, 380.0),
}  # keep: ms and MiB, the figures to beat, batch 8
BOUND = "lower bound"
SCAN, SCAN_D, SCAN_N = "scan.Scan.time_forward", 256, 16
SCAN_OPERATIONS = 13  # per token, channel and state, an exponential as what it takes (docs/gpu.md)


def newest_commit(measurements: Iterable[Measurement], history: Sequence[str]) -> list[Measurement]:
    """The measurements of the newest commit that has any; `history` lists commits, newest first.

    Commits that are not in it (of another branch, say) come behind, by their date.
    """
    done = [m for m in measurements if m.measured]
    place = {commit: i for i, commit in enumerate(history)}
    newest = min(done, key=lambda m: (place.get(m.commit, len(place)), -m.date), default=None)
    return [m for m in done if newest is not None and m.commit == newest.commit]


def write_report(measurements: Sequence[Measurement], folder: Path) -> list[Path]:
    """Write every table that has rows, and its plots; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    rows = vtp_rows(measurements)
    if rows:
        written += [write_csv(folder / "clip_vtp_results.csv", rows)]
        written += [
            _plot_vtp(folder / "clip_vtp_latency.png", rows, "latency_ms", "latency (ms)", measurements),
            _plot_vtp(
                folder / "clip_vtp_memory.png",
                rows,
                "memory_mib",
                "peak memory over the resident (MiB)",
                measurements,
            ),
        ]
    for table in TABLES:
        rows = length_rows(table, measurements)
        if rows:
            written += [write_csv(folder / f"{table.name}.csv", rows)]
            written += [_plot_lengths(folder / f"{table.name}.png", table, rows, measurements)]
    return written


def vtp_rows(measurements: Iterable[Measurement]) -> list[Row]:
    """One row per batch and case: variant, plan, keep_ratio, flops_ratio, latency_ms, latency_change against
    the full tower, throughput_img_s, memory_mib, measured and by arithmetic; beside pruning before block 0,
    what a T4 was to reach."""
    time: dict[tuple[int, str], float] = {}
    memory: dict[tuple[int, str], float] = {}
    bound: dict[tuple[int, str], float] = {}
    flops: dict[str, float] = {}
    for m in measurements:
        if m.value is None:
            continue
        if m.benchmark == VTP_FLOPS:
            flops[str(m.params["case"])] = m.value
        for names, found in ((VTP_TIME, time), (VTP_MEMORY, memory), (VTP_BOUND, bound)):
            if m.benchmark in names:
                found[int(m.params["batch"]), str(m.params["case"])] = m.value
    rows: list[Row] = []
    for batch, case in sorted(time, key=lambda key: key[0]):  # in the order measured, within a batch
        plan, _, ratio = case.partition(" ")
        keep = float(ratio) if ratio else 1.0
        seconds, full = time[batch, case], time.get((batch, "full"))
        t4 = T4.get(keep, (None, None)) if batch == 8 and plan in ("full", "input") else (None, None)
        rows.append({
            "variant": f"{'baseline' if plan == 'full' else plan}_b{batch}", "plan": plan, "keep_ratio": keep,
            "flops_ratio": round(flops[case], 4) if case in flops else None,
            "latency_ms": round(seconds * 1e3, 3),
            "latency_change": round(seconds / full - 1, 4) if full else None,
            "throughput_img_s": round(batch / seconds, 3),
            "memory_mib": round(memory[batch, case], 3) if (batch, case) in memory else None,
            "memory_by_formula_mib": round(bound[batch, case], 3) if (batch, case) in bound else None,
            "t4_latency_ms": t4[0], "t4_memory_mib": t4[1],
        })  # fmt: skip
    return rows


def length_rows(table: Table, measurements: Iterable[Measurement]) -> list[Row]:
    """One row per line and length of a table."""
    rows: list[Row] = []
    for m in measurements:
        if m.benchmark in table.benchmarks and m.value is not None:
            line = m.params.get(table.by, BOUND)
            value = round(m.value * table.scale, 4)
            rows.append(
                {
                    "pass": table.benchmarks[m.benchmark],
                    table.by: line,
                    "length": int(m.params["length"]),
                    table.value: value,
                }
            )
    return sorted(rows, key=lambda row: (str(row["pass"]), str(row[table.by]), float(row["length"] or 0)))


def roofline_rows(measurements: Iterable[Measurement]) -> list[Row]:
    """One row per backend and length of the forward scan: its operations per byte, and 10^9 of them a second.

    What is moved at least: u, delta, z, B and C read and y written, once, in float32.
    """
    rows: list[Row] = []
    for m in measurements:
        if m.benchmark == SCAN and m.value:
            length = int(m.params["length"])
            operations = SCAN_OPERATIONS * SCAN_D * SCAN_N * length
            moved = 4 * (4 * SCAN_D + 2 * SCAN_N) * length
            rows.append({
                "backend": m.params["backend"], "length": length, "intensity": round(operations / moved, 3),
                "gops": round(operations / m.value / 1e9, 3),
            })  # fmt: skip
    return sorted(rows, key=lambda row: (str(row["backend"]), float(row["length"] or 0)))


def slope(points: Iterable[tuple[Any, Any]], least: int = 1024) -> float | None:
    """The power of the length that a time grows by: the slope of the log-log points from `least` steps on.

    >>> slope([(1024, 1.0), (2048, 2.0), (4096, 4.0)])
    1.0
    """
    long = [(math.log(x), math.log(y)) for x, y in points if x >= least and y > 0]
    if len(long) < 2:
        return None
    return round(statistics.linear_regression(*zip(*long, strict=True)).slope, 2)


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table.

    >>> print(markdown([{"keep_ratio": 0.5, "latency_ms": 12.0}]))
    | keep_ratio | latency_ms |
    | --- | --- |
    | 0.5 | 12 |
    """
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    lines += ["| " + " | ".join(_cell(row[name]) for name in head) + " |" for row in rows]
    return "\n".join(lines)


def summary(measurements: Sequence[Measurement]) -> str:
    """The report's tables in Markdown: the lengths side by side."""
    parts = []
    rows = vtp_rows(measurements)
    if rows:
        parts.append("CLIP ViT-B/16 vision tower, by plan and keep ratio\n\n" + markdown(rows))
    for table in TABLES:
        wide: dict[tuple[object, object], Row] = {}
        for row in length_rows(table, measurements):
            start: Row = {"pass": row["pass"], table.by: row[table.by]}
            wide.setdefault((row["pass"], row[table.by]), start)[f"l = {row['length']}"] = row[table.value]
        if wide:
            head = list(dict.fromkeys(name for row in wide.values() for name in row))
            head[2:] = sorted(head[2:], key=lambda name: int(name.removeprefix("l = ")))
            if table.slopes:
                for row in wide.values():
                    points = [(int(n[4:]), float(row[n] or 0)) for n in head[2:] if row.get(n) is not None]
                    row["power of l"] = slope(points)
                head.append("power of l")
            parts.append(
                f"{table.title}, {table.value}\n\n"
                + markdown([{n: row.get(n) for n in head} for row in wide.values()])
            )
    return "\n\n".join(parts)


def _cell(value: str | float | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.4g}"


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """The rows below the names of their columns; of no rows an empty file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        if rows:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def _plot_lengths(path: Path, table: Table, rows: Sequence[Row], measurements: Sequence[Measurement]) -> Path:
    """One panel per pass: against length, log-log, one line per `by`; bars if there is one length only."""
    passes = list(dict.fromkeys(str(row["pass"]) for row in rows))
    figure, panels = _figure(len(passes), measurements)
    for axes, name in zip(panels, passes, strict=True):
        mine = [row for row in rows if row["pass"] == name]
        axes.set_title(f"{table.title}, {name}" if len(passes) == 1 else name)
        if len({row["length"] for row in mine}) == 1:  # bars, that begin at 0
            bars = axes.bar(
                [str(row[table.by]) for row in mine], [row[table.value] for row in mine], width=0.6
            )
            axes.bar_label(bars, fmt="%.4g", padding=2)
            axes.margins(y=0.15)
            axes.set_xlabel(f"length {mine[0]['length']}")
            continue
        for line in dict.fromkeys(str(row[table.by]) for row in mine):
            points = [(row["length"], row[table.value]) for row in mine if row[table.by] == line]
            style = {"color": "0.5", "linestyle": "--"} if line == BOUND else {"marker": "o"}
            label = f"{line}: l^{slope(points)}" if table.slopes else line
            axes.loglog(*zip(*points, strict=True), label=label, base=2, **style)
        axes.set_yscale("log", base=10)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_xlabel("length (steps)")
        axes.legend(title=table.by)
    panels[0].set_ylabel(table.value.replace("_ms", " (ms)").replace("_mib", " (MiB)"))
    if len(passes) > 1:
        figure.suptitle(table.title)
    return _save(figure, path)


def _plot_vtp(
    path: Path, rows: Sequence[Row], value: str, label: str, measurements: Sequence[Measurement]
) -> Path:
    """Bars by case, one panel per batch, each with its change against the full tower."""
    batches = list(dict.fromkeys(str(row["variant"]).rpartition("_b")[2] for row in rows))
    figure, panels = _figure(len(batches), measurements)
    for axes, batch in zip(panels, batches, strict=True):
        mine = [row for row in rows if str(row["variant"]).endswith(f"_b{batch}") and row[value] is not None]
        heights = [float(row[value] or 0) for row in mine]
        names = [f"{row['plan']} {row['keep_ratio']}" if row["plan"] != "full" else "full" for row in mine]
        bars = axes.barh(names, heights, height=0.7)
        full = next((h for row, h in zip(mine, heights, strict=True) if row["plan"] == "full"), 0.0)
        changes = [f"{h:.4g}" + (f" ({h / full - 1:+.0%})" if full and h != full else "") for h in heights]
        axes.bar_label(bars, changes, padding=3, fontsize="small")
        axes.invert_yaxis()
        axes.margins(x=0.3)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", alpha=0.3)
        axes.set(title=f"batch {batch}", xlabel=label)
    figure.suptitle("CLIP ViT-B/16 vision tower, by plan and keep ratio")
    return _save(figure, path)


def _figure(panels: int, measurements: Sequence[Measurement]) -> tuple[Any, list[Any]]:
    """A row of panels, marked with where the numbers come from."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * panels, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for panel in axes:
        panel.grid(axis="y", alpha=0.3)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    origin = measurements[0]
    figure.supxlabel(f"{origin.machine}, commit {origin.commit[:8]}", fontsize="small", color="0.4")
    return figure, list(axes)


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path
