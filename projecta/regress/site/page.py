"""Writes the front page of the site: the last verdict, what changed, a chart for each table of the report.

One page a machine; `index.html` is that of the machine used last. No script, one style sheet: a page is whole
when it has arrived, works from any folder, and prints. Every chart has its numbers beside it, as a table and
as CSV.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from projecta.regress.gate import output
from projecta.regress.project.config import Project
from projecta.regress.site import changepoints, charts, tables
from projecta.regress.site.changepoints import Series, Step
from projecta.regress.store.results import Measurement, list_machines, read_measurements, read_noise

DATA = "data"
SHOWN = 40  # changes in the page; all are in the CSV
DRAWN = 300  # commits in a history
HISTORIES = 12
ACCURACY = ("post hoc, theta 0.1", "post hoc, theta 0.5", "trained, theta 0.5")
Table = list[dict[str, Any]]


@dataclass
class Chart:
    """A drawing, what it says, and its numbers."""

    name: str
    title: str
    says: str
    svg: str
    rows: Table

    @property
    def head(self) -> list[str]:
        return list(self.rows[0])


@dataclass
class Section:
    name: str
    title: str
    charts: list[Chart] = field(default_factory=list)


@dataclass
class Page:
    """What the template shows of one machine."""

    project: str
    machine: str
    machines: Mapping[str, str]  # name: page
    commit: str
    date: str
    verdict: Mapping[str, Any] | None
    changes: list[dict[str, Any]]
    more: int
    sections: list[Section]
    cards: list[tuple[str, dict[str, str]]]
    histories: list[dict[str, str]]


def write_pages(
    project: Project, folder: Path, history: Sequence[str], extra: Path | None = None,
    headline: str | None = None,
) -> list[Path]:  # fmt: skip
    """Write a page for each machine; return them, the one for `index.html` first.

    Args:
        history: hashes of the commits, newest first.
        extra: a folder with tables that other sessions wrote (fidelity, accuracy).
        headline: a regular expression: the benchmarks whose history is drawn; the most changed, if None.
    """
    machines = list_machines(project)
    pages = {name: "index.html" if i == 0 else f"machine-{name}.html" for i, name in enumerate(machines)}
    (folder / "page.css").write_bytes(
        files("projecta.regress").joinpath("site", "template", "page.css").read_bytes()
    )
    cards, template = [(name, _card(project, name)) for name in machines], _template()
    for name, page in pages.items():
        made = _page(project, name, pages, cards, history, extra, headline, folder)
        (folder / page).write_text(template.render(page=made), encoding="utf-8")
    return [folder / page for page in pages.values()]


def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    room = Environment(
        loader=PackageLoader("projecta.regress.site", "template"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    room.filters |= {"cell": _cell, "amount": output.amount, "percent": lambda x: f"{100 * x:+.1f} %"}
    return room.get_template("page.html")


def _page(
    project: Project, machine: str, pages: Mapping[str, str], cards: list[tuple[str, dict[str, str]]],
    history: Sequence[str], extra: Path | None, headline: str | None, folder: Path,
) -> Page:  # fmt: skip
    measurements = list(read_measurements(project, machine))
    series = changepoints.collect(measurements, history)
    steps = sorted(
        (step for one in series for step in changepoints.steps(one)),
        key=lambda step: (-step.date, not step.worse, -abs(step.change)),
    )
    newest = tables.newest_commit(measurements, history)
    room = folder / DATA / machine
    room.mkdir(parents=True, exist_ok=True)
    sections = [s for s in _sections(newest, extra) if s.charts]
    for section in sections:
        for chart in section.charts:
            tables.write_csv(room / f"{chart.name}.csv", chart.rows)
    link = project.config.show_commit_url.removesuffix("#")  # asv's way to say that there is none
    told = [_told(step, link) for step in steps]
    tables.write_csv(room / "changes.csv", told)
    tables.write_csv(room / "newest.csv", [
        {"benchmark": s.label, "value": s.points[-1].value, "unit": s.unit, "commit": s.points[-1].commit}
        for s in series
    ])  # fmt: skip
    return Page(
        project.config.project, machine, pages, newest[0].commit if newest else "",
        _day(newest[0].date) if newest else "", _verdict(project.results / machine / output.LAST),
        told[:SHOWN],
        max(0, len(told) - SHOWN), sections, cards,
        _histories(series, steps, read_noise(project, machine), headline),
    )  # fmt: skip


def _verdict(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    bad = [row for row in found["benchmarks"] if row["verdict"] != "PASS"]
    return found | {"bad": bad, "passed": len(found["benchmarks"]) - len(bad)}


def _history_of(series: Series) -> str:
    """Its page among asv's."""
    return f"history.html#{series.benchmark}"


def _told(step: Step, link: str) -> dict[str, Any]:
    return {
        "benchmark": step.series.label, "page": _history_of(step.series),
        "change": step.change, "worse": step.worse, "before": step.before, "after": step.after,
        "unit": step.series.unit, "commit": step.commit, "link": f"{link}{step.commit}" if link else "",
        "day": _day(step.date), "cause": step.cause,
    }  # fmt: skip


def _histories(
    series: Sequence[Series], steps: Iterable[Step], noise: Mapping[str, float], headline: str | None
) -> list[dict[str, str]]:
    """Charts of those that the project gates, or of those that changed most."""
    long = [one for one in series if len(one.points) > 1]
    if headline is not None:
        chosen = [one for one in long if re.search(headline, one.asv_label)]
    else:
        largest: dict[str, float] = {}
        for step in steps:
            largest[step.series.label] = max(largest.get(step.series.label, 0), abs(step.change))
        chosen = sorted(long, key=lambda one: -largest.get(one.label, 0))
    made = []
    for one in chosen[:HISTORIES]:
        points = one.points[-DRAWN:]
        size, unit = output.scale(points[-1].value, one.unit)
        values = [point.value / size for point in points]
        marks = [i for i in range(1, len(points)) if points[i].state != points[i - 1].state]
        spread = noise.get(one.asv_label)
        level = sorted(values[-5:])[len(values[-5:]) // 2]
        svg = charts.history(values, marks, level, None if spread is None else 2 * spread)
        words = f"{len(points)} commits; {values[0]:.3g} to {values[-1]:.3g} {unit}"
        if marks:
            words += f"; machine or packages changed {len(marks)} time(s): dashed"
        made.append({"title": one.label, "svg": svg, "says": words, "page": _history_of(one)})
    return made


def _card(project: Project, machine: str) -> dict[str, str]:
    """What is known of a machine: by asv, and by its last gate."""
    facts = json.loads((project.results / machine / "machine.json").read_text())
    if str(facts.get("ram", "")).isdigit():
        facts["ram"] = f"{int(facts['ram']) / 2**30:.1f} GiB"
    verdict = _verdict(project.results / machine / output.LAST)
    state = verdict["state"] if verdict else {}
    facts |= {key: state[key] for key in ("gpu", "governor", "system") if key in state}
    return {key: str(value) for key, value in facts.items() if value and key not in ("machine", "version")}


def _sections(newest: Sequence[Measurement], extra: Path | None) -> Iterator[Section]:
    made = {table.name: _of_table(table, newest) for table in tables.TABLES}
    whole = {name: [chart] for name, chart in made.items() if chart is not None}

    def some(*names: str) -> list[Chart]:
        return [chart for name in names for chart in whole.get(name, [])]

    yield Section("scan", "Selective scan", some("scan_time", "scan_memory") + _roofline(newest))
    yield Section("models", "Models, beside what transformers does by itself", some("model_time"))
    yield Section("vtp", "Vision token pruning", _of_vtp(newest) + _fidelity(extra))
    yield Section("mrss", "Multi-resolution scan", some("mrss_time", "mrss_memory") + _accuracy(extra))
    yield Section("lengths", "Time against length", some("length_time", "s4d_time", "s4d_memory"))


def _of_table(table: tables.Table, newest: Sequence[Measurement]) -> Chart | None:
    rows = tables.length_rows(table, newest)
    if not rows:
        return None
    unit = table.value.replace("_ms", " (ms)").replace("_mib", " (MiB)")
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    single: dict[str, dict[str, dict[str, float]]] = {}
    for title in dict.fromkeys(str(row["pass"]) for row in rows):
        own = [row for row in rows if row["pass"] == title]
        for row in own:
            point = (float(row["length"] or 0), float(row[table.value] or 0))
            panels.setdefault(title, {}).setdefault(str(row[table.by]), []).append(point)
        if len({row["length"] for row in own}) == 1:
            single[title] = {str(row[table.by]): {"": point[0][1]} for row, point in zip(
                own, panels.pop(title).values(), strict=True)}  # fmt: skip
    svg = charts.lines(panels, "length (steps)", unit, dashed=[tables.BOUND]) if panels else ""
    if single:
        svg += charts.bars(single, unit)
    says = f"By {table.by}."
    if table.slopes:
        powers = [
            f"{line}: {power}" for panel in panels.values() for line, points in panel.items()
            if (power := tables.slope(points)) is not None
        ]  # fmt: skip
        says += " Grows with this power of the length, from 1,024 steps on: " + ", ".join(powers) + "."
    return Chart(table.name, table.title, says, svg, list(rows))


def _of_vtp(newest: Sequence[Measurement]) -> list[Chart]:
    rows = tables.vtp_rows(newest)
    if not rows:
        return []
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for batch in dict.fromkeys(str(row["variant"]).rpartition("_b")[2] for row in rows):
        own = [row for row in rows if str(row["variant"]).endswith(f"_b{batch}")]
        for row in own:
            if row["latency_change"] and row["plan"] in ("input", "early", "evit3", "merge"):
                group = panels.setdefault(f"batch {batch}", {}).setdefault(str(row["plan"]), {})
                group[f"keep {row['keep_ratio']}"] = 100 * float(row["latency_change"])
    made = [Chart(
        "vtp_latency", "Latency against the full tower",
        "CLIP ViT-B/16, change of the time of one forward pass, in per cent.",
        charts.bars(panels, "change of latency (%)", "{:.0f}"), list(rows),
    )]  # fmt: skip
    beside: dict[str, dict[str, dict[str, float]]] = {
        "latency (%)": {},
        "throughput (%)": {},
        "peak memory (%)": {},
    }
    full = {str(r["variant"]): r for r in rows if r["plan"] == "full"}.get("baseline_b8")
    for row in rows:
        if full is None or row["t4_latency_ms"] is None or row["plan"] == "full":
            continue
        name, base = f"keep {row['keep_ratio']}", tables.T4[1.0]
        pairs = [("latency (%)", row["latency_ms"], full["latency_ms"], 0)]
        if row["memory_mib"] is not None and full["memory_mib"] is not None:
            pairs.append(("peak memory (%)", row["memory_mib"], full["memory_mib"], 1))
        for panel, value, whole, place in pairs:
            aim = (row["t4_latency_ms"], row["t4_memory_mib"])[place]
            measured, aimed = float(value or 0) / float(whole or 1), float(aim or 0) / base[place]
            beside[panel][name] = {
                "measured here": 100 * (measured - 1),
                "figure to beat, T4": 100 * (aimed - 1),
            }
            if place == 0:
                beside["throughput (%)"][name] = {
                    "measured here": 100 * (1 / measured - 1), "figure to beat, T4": 100 * (1 / aimed - 1)
                }  # fmt: skip
    beside = {panel: groups for panel, groups in beside.items() if groups}
    if beside:
        numbers = [
            {"change": panel.removesuffix(" (%)"), "keep": group, **{k: round(v, 1) for k, v in bars.items()}}
            for panel, groups in beside.items() for group, bars in groups.items()
        ]  # fmt: skip
        made.append(Chart(
            "vtp_beside", "Beside the figures to beat",
            "Pruning before block 0, batch 8, against the full tower; the figures to beat are of a T4.",
            charts.bars(beside, "change (%)", "{:.0f}"), numbers,
        ))  # fmt: skip
    return made


def _read(extra: Path | None, name: str) -> list[dict[str, str]]:
    if extra is None or not (extra / name).is_file():
        return []
    with (extra / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _fidelity(extra: Path | None) -> list[Chart]:
    rows = [row for row in _read(extra, "vtp_fidelity.csv") if row["images"] == "natural"]
    if not rows:
        return []
    groups: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        kind = "control" if row["row"].startswith("control") else next(
            (fuse for fuse in ("squeeze", "bipartite", "drop", "mean", "cluster") if fuse in row["row"]),
            "preset",
        )  # fmt: skip
        groups.setdefault(kind, []).append((float(row["FLOPs"]), float(row["cosine"])))
    return [Chart(
        "vtp_fidelity", "Fidelity against arithmetic",
        "DINOv2-S/14 with real weights on photographs: the cosine of the class token's output to the full "
        "model's, against the part of the arithmetic that is left.",
        charts.scatter(groups, "part of the FLOPs", "cosine to the full model"), list(rows),
    )]  # fmt: skip


def _accuracy(extra: Path | None) -> list[Chart]:
    rows = _read(extra, "mrss_accuracy.csv")
    if not rows:
        return []
    panel: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["unit"].startswith("per cent") and row["scan"] in ACCURACY:
            panel.setdefault(row["task"].replace(" ", "\n"), {})[row["scan"]] = float(row["change"])
    return [Chart(
        "mrss_accuracy", "Accuracy against the full scan",
        "Mean change over five seeds, in points of per cent right.",
        charts.bars({"": panel}, "change (points)", "{:+.2f}", width=8.4), list(rows),
    )]  # fmt: skip


def _roofline(newest: Sequence[Measurement]) -> list[Chart]:
    ceilings = {m.benchmark: m.value for m in newest if m.benchmark.startswith("roofline.")}
    bandwidth = ceilings.get("roofline.Bandwidth.track_copy")
    arithmetic = ceilings.get("roofline.Arithmetic.track_product")
    rows = tables.roofline_rows(newest)
    if not (bandwidth and arithmetic and rows):
        return []
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        points.setdefault(str(row["backend"]), []).append(
            (float(row["intensity"] or 0), float(row["gops"] or 0))
        )
    return [Chart(
        "scan_roofline", "Roofline",
        f"Forward, by backend and length: operations (a multiply-and-add is one) against what a copy "
        f"({bandwidth:.0f} GB/s) and a matrix product ({arithmetic:.0f} Gop/s) reach here. u, delta, z, "
        "B and C are read and y written once.",
        charts.roofline(points, bandwidth, arithmetic), list(rows),
    )]  # fmt: skip


def _day(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
