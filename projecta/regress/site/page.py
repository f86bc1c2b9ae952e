"""Writes the start page of the site: the last verdict, change points, a chart for each declared table.

One page a machine; `index.html` is that of the machine used last. No script, one style sheet: a page is whole
when it has arrived, works from any folder, and prints. Every chart has its numbers beside it, as a table and
as CSV.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from projecta.regress.gate import output, record
from projecta.regress.project.config import Project
from projecta.regress.site import changepoints, charts, tables
from projecta.regress.site.changepoints import Series, Step
from projecta.regress.site.tables import Source
from projecta.regress.store.results import list_machines, read_measurements, read_noise

DATA = "data"
SHOWN = 40  # changes in the page; all are in the CSV
DRAWN = 300  # commits in a history
HISTORIES = 12
Table = list[dict[str, Any]]


@dataclass
class Chart:
    """A chart with its caption and numbers."""

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
    """Data of one machine for the template."""

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
    rates: list[dict[str, Any]] = field(default_factory=list)  # see `gate.record`


def write_pages(
    project: Project, folder: Path, history: Sequence[str], headline: str | None = None
) -> list[Path]:
    """Write a page for each machine; return them, the one for `index.html` first.

    Args:
        history: hashes of the commits, newest first.
        headline: a regular expression: the benchmarks whose history is drawn; the most changed, if None.
    """
    machines = list_machines(project)
    pages = {name: "index.html" if i == 0 else f"machine-{name}.html" for i, name in enumerate(machines)}
    (folder / "page.css").write_bytes(
        files("projecta.regress").joinpath("site", "template", "page.css").read_bytes()
    )
    cards, template = [(name, _card(project, name)) for name in machines], _template()
    declared = tables.load_sections(project.folder)
    for name, page in pages.items():
        made = _page(project, name, pages, cards, history, declared, headline, folder)
        (folder / page).write_text(template.render(page=made), encoding="utf-8")
    return [folder / page for page in pages.values()]


def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("projecta.regress.site", "template"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "cell": tables.cell,
        "amount": output.amount,
        "percent": lambda x: f"{100 * x:+.1f} %",
        "certainty": lambda x: f"{100 * x:.1f} %" if x < 0.9995 else "> 99.9 %",
    }
    environment.globals["least"] = f"{changepoints.LEAST:.0%}".replace("%", " %")
    return environment.get_template("page.html")


def _page(
    project: Project, machine: str, pages: Mapping[str, str], cards: list[tuple[str, dict[str, str]]],
    history: Sequence[str], declared: Sequence[tables.Section], headline: str | None, folder: Path,
) -> Page:  # fmt: skip
    measurements = list(read_measurements(project, machine))
    series = changepoints.collect(measurements, history)
    steps = sorted(
        (step for one in series for step in changepoints.steps(one)),
        key=lambda step: (-step.date, not step.worse, -abs(step.change)),
    )
    newest = tables.newest_commit(measurements, history)
    data = folder / DATA / machine
    data.mkdir(parents=True, exist_ok=True)
    sections = list(_sections(Source(newest, project.folder), declared))
    for section in sections:
        for chart in section.charts:
            tables.write_csv(data / f"{chart.name}.csv", chart.rows)
    link = project.config.show_commit_url.removesuffix("#")  # asv's way to say that there is none
    changes = [_change(step, link) for step in steps]
    tables.write_csv(data / "changes.csv", changes)
    tables.write_csv(data / "newest.csv", [
        {"benchmark": s.label, "value": s.points[-1].value, "unit": s.unit, "commit": s.points[-1].commit}
        for s in series
    ])  # fmt: skip
    return Page(
        project.config.project, machine, pages, newest[0].commit if newest else "",
        _day(newest[0].date) if newest else "", _verdict(project.results / machine / output.LAST),
        changes[:SHOWN], max(0, len(changes) - SHOWN), sections, cards,
        _histories(series, steps, read_noise(project, machine), headline),
        record.read_rates(project.results / machine),
    )  # fmt: skip


def _verdict(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    bad = [row for row in found["benchmarks"] if row["verdict"] != "PASS"]
    return found | {"bad": bad, "passed": len(found["benchmarks"]) - len(bad)}


def _history_of(series: Series) -> str:
    """The benchmark's page in asv's site."""
    return f"history.html#{series.benchmark}"


def _change(step: Step, link: str) -> dict[str, Any]:
    return {
        "benchmark": step.series.label, "page": _history_of(step.series),
        "change": step.change, "worse": step.worse, "before": step.before, "after": step.after,
        "unit": step.series.unit, "commit": step.commit, "link": f"{link}{step.commit}" if link else "",
        "day": _day(step.date), "cause": step.cause, "last": step.last, "gone": step.gone,
        "confidence": step.confidence,
    }  # fmt: skip


def _histories(
    series: Sequence[Series], steps: Iterable[Step], noise: Mapping[str, float], headline: str | None
) -> list[dict[str, str]]:
    """Charts of the gated benchmarks, or of those that changed most."""
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
        figure = charts.history(values, marks, level, None if spread is None else 2 * spread)
        words = f"{len(points)} commits; {values[0]:.3g} to {values[-1]:.3g} {unit}"
        if marks:
            words += f"; machine or packages changed {len(marks)} time(s): dashed"
        made.append({"title": one.label, "svg": charts.svg(figure), "says": words, "page": _history_of(one)})
    return made


def _card(project: Project, machine: str) -> dict[str, str]:
    """Facts about a machine, from asv and from its last gate."""
    facts = json.loads((project.results / machine / "machine.json").read_text())
    if str(facts.get("ram", "")).isdigit():
        facts["ram"] = f"{int(facts['ram']) / 2**30:.1f} GiB"
    verdict = _verdict(project.results / machine / output.LAST)
    state = verdict["state"] if verdict else {}
    facts |= {key: state[key] for key in ("gpu", "governor", "system") if key in state}
    return {key: str(value) for key, value in facts.items() if value and key not in ("machine", "version")}


def _sections(source: Source, declared: Sequence[tables.Section]) -> Iterator[Section]:
    """The declared tables that have rows, drawn."""
    for section in declared:
        drawn = []
        for table in section.tables:
            rows = table.rows(source)
            if rows:
                figure = table.draw(rows, charts.PAGE)
                drawing = "" if figure is None else charts.svg(figure)
                drawn.append(Chart(table.name, table.title, table.note(rows), drawing, list(rows)))
        if drawn:
            yield Section(section.name, section.title, drawn)


def _day(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d")
