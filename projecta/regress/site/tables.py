"""Tables and charts of a machine's newest results, as the project declares them.

`tables` of [tool.projecta] in pyproject.toml names a Python file. Its function `sections()` returns a
sequence of `Section`: the tables of the report, the CSV files and the start page, in this order.
Without such a file there are no tables; histories and change points are shown all the same.
"""

import csv
import datetime
import importlib.util
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from projecta.regress.errors import cannot
from projecta.regress.project.config import read_setting
from projecta.regress.site import charts
from projecta.regress.store.provenance import record_provenance
from projecta.regress.store.results import Measurement

Row = dict[str, Any]
BOUND = "lower bound"  # the line of benchmarks that lack the parameter `by`


@dataclass(frozen=True)
class Source:
    """Input of tables: the newest commit's measurements, and the project's folder."""

    measurements: Sequence[Measurement]
    root: Path

    def read_csv(self, path: str) -> list[dict[str, str]]:
        """The rows of a CSV file of the project; none if it is missing."""
        if not (self.root / path).is_file():
            return []
        with (self.root / path).open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


class Table(Protocol):
    """A table and its chart.

    `name` is that of its CSV file. `file` is a CSV of the project that holds the rows already, if any.
    """

    name: str
    title: str
    file: str

    def rows(self, source: Source) -> list[Row]:
        """The rows; none if nothing was measured."""

    def note(self, rows: Sequence[Row]) -> str:
        """One or two sentences for the page."""

    def draw(self, rows: Sequence[Row], style: charts.Style) -> Any:
        """A matplotlib figure, or None."""

    def summary(self, rows: Sequence[Row]) -> list[Row]:
        """The rows as the terminal shows them."""


@dataclass(frozen=True)
class Section:
    """Tables under one heading of the start page."""

    name: str
    title: str
    tables: Sequence[Table]


@dataclass(frozen=True)
class Lines:
    """A measured value against a numeric parameter: one line for each value of another parameter.

    Args:
        name, title: of the table.
        value: the column's name, with its unit, like "time_ms". scale: from asv's unit to the column's.
        by: the parameter that has one line a value. x: the numeric parameter, on the horizontal axis.
        benchmarks: asv's name of each benchmark, and the name of its panel.
        against: the line that the others are compared with, in parentheses, as "times as fast".
        slopes: whether each line's growth is fitted, as a power of x.
    """

    name: str
    title: str
    value: str
    scale: float
    by: str
    benchmarks: Mapping[str, str]
    x: str = "length"
    against: str = ""
    slopes: bool = False
    file: str = ""

    def rows(self, source: Source) -> list[Row]:
        found = [
            {
                "pass": self.benchmarks[m.benchmark], self.by: m.params.get(self.by, BOUND),
                self.x: int(m.params[self.x]), self.value: round(m.value * self.scale, 4),
            }
            for m in source.measurements if m.benchmark in self.benchmarks and m.value is not None
        ]  # fmt: skip
        return sorted(found, key=lambda row: (row["pass"], row[self.by], row[self.x]))

    def note(self, rows: Sequence[Row]) -> str:
        if not self.slopes:
            return f"By {self.by}."
        powers = [
            f"{line} {power}"
            for line in dict.fromkeys(row[self.by] for row in rows)
            if (power := self._slope([row for row in rows if row[self.by] == line])) is not None
        ]
        return f"By {self.by}. Power of {self.x} that it grows by, from 1,024 on: {', '.join(powers)}."

    def draw(self, rows: Sequence[Row], style: charts.Style) -> Any:
        """A panel for each pass; bars where there is one x only."""
        panels: dict[str, charts.Panel] = {}
        for title in dict.fromkeys(row["pass"] for row in rows):
            own = [row for row in rows if row["pass"] == title]
            lines: dict[str, list[tuple[float, float]]] = {}
            for row in own:
                lines.setdefault(row[self.by], []).append((row[self.x], row[self.value]))
            panels[title] = lines
        label = self.value.replace("_ms", " (ms)").replace("_mib", " (MiB)")
        return charts.lines(panels, self.x, label, style, dashed=[BOUND])

    def summary(self, rows: Sequence[Row]) -> list[Row]:
        """One row for each line, with a column for each x."""
        made: dict[tuple[str, str], Row] = {}
        places = sorted({row[self.x] for row in rows})
        known = {(row["pass"], row[self.by], row[self.x]): row[self.value] for row in rows}
        for kind, line in dict.fromkeys((row["pass"], row[self.by]) for row in rows):
            cells: Row = {"pass": kind, self.by: line}
            for x in places:
                value, other = known.get((kind, line, x)), known.get((kind, self.against, x))
                times = f" ({other / value:.3g}x)" if value and other and line != self.against else ""
                cells[f"{self.x} {x}"] = "" if value is None else f"{value:.4g}{times}"
            if self.slopes:
                own = [row for row in rows if (row["pass"], row[self.by]) == (kind, line)]
                cells[f"power of {self.x}"] = self._slope(own)
            made[kind, line] = cells
        return list(made.values())

    def _slope(self, rows: Sequence[Row]) -> float | None:
        return slope((row[self.x], row[self.value]) for row in rows)


@dataclass(frozen=True)
class Custom:
    """A table that functions of the project make.

    Args:
        find: the rows, from a `Source`. chart: the figure, from the rows and a `charts.Style`.
        text: the note, or a function of the rows.
        columns: those that the terminal shows; all if empty.
        file: the CSV of the project that holds the rows already; the report does not write it again.
    """

    name: str
    title: str
    find: Callable[[Source], list[Row]]
    text: str | Callable[[Sequence[Row]], str]
    chart: Callable[[Sequence[Row], charts.Style], Any] | None = None
    columns: Sequence[str] = ()
    file: str = ""

    def rows(self, source: Source) -> list[Row]:
        return self.find(source)

    def note(self, rows: Sequence[Row]) -> str:
        return self.text if isinstance(self.text, str) else self.text(rows)

    def draw(self, rows: Sequence[Row], style: charts.Style) -> Any:
        return None if self.chart is None else self.chart(rows, style)

    def summary(self, rows: Sequence[Row]) -> list[Row]:
        return [{name: row[name] for name in self.columns or row} for row in rows]


def load_sections(root: Path) -> Sequence[Section]:
    """What the project's file of tables declares; nothing if it names none."""
    name = read_setting(root, "tables")
    if name is None:
        return ()
    path = root / name
    spec = importlib.util.spec_from_file_location("projecta_tables", path)
    try:
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sections: Sequence[Section] = module.sections()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        cannot("read the tables", f"{name}: {reason}", "Mend `tables` of [tool.projecta] or that file.")
    return sections


def newest_commit(measurements: Iterable[Measurement], history: Sequence[str]) -> list[Measurement]:
    """The measurements of the newest commit that has any; `history` lists commits, newest first.

    Commits that are not in it (of another branch, say) come last, by their date.
    """
    done = [m for m in measurements if m.measured]
    place = {commit: i for i, commit in enumerate(history)}
    newest = min(done, key=lambda m: (place.get(m.commit, len(place)), -m.date), default=None)
    return [m for m in done if newest is not None and m.commit == newest.commit]


def write_report(source: Source, sections: Sequence[Section], folder: Path) -> list[Path]:
    """Write each table that has rows as CSV, its chart as PNG, and their provenance; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    origin = source.measurements[0]
    caption = f"{origin.machine}, commit {origin.commit[:8]}"
    for section in sections:
        for table in section.tables:
            rows = table.rows(source)
            if not rows or table.file:
                continue
            written.append(write_csv(folder / f"{table.name}.csv", rows))
            figure = table.draw(rows, charts.PRINT)
            if figure is not None:
                written.append(charts.save(figure, folder / f"{table.name}.png", f"{table.title}. {caption}"))
    record_provenance(
        written, f"projecta bench && projecta report --into {folder.name}", provenance_of(origin)
    )
    return written


def provenance_of(origin: Measurement) -> dict[str, Any]:
    """Where a measurement comes from, as `provenance.json` keeps it."""
    known = dict(origin.state)
    date = datetime.datetime.fromtimestamp((origin.at or origin.date) / 1000, datetime.UTC).date().isoformat()
    processor = known.get("processor") or known.get("cpu", "")
    versions = {n: known[n] for n in ("python", "torch", "numba", "triton", "transformers") if n in known}
    facts = {"commit": origin.commit, "date": date, "machine": origin.machine, "processor": processor}
    return {**facts, **({"gpu": known["gpu"]} if "gpu" in known else {}), "versions": versions}


def summaries(source: Source, sections: Sequence[Section]) -> Iterator[tuple[str, list[Row]]]:
    """Title and rows of each table that has any, as the terminal shows them."""
    for section in sections:
        for table in section.tables:
            rows = table.rows(source)
            if rows:
                yield table.title, table.summary(rows)


def slope(points: Iterable[tuple[Any, Any]], least: int = 1024) -> float | None:
    """The power of x that a value grows by: the slope of the log-log points from `least` on.

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
    lines += ["| " + " | ".join(cell(row.get(name)) for name in head) + " |" for row in rows]
    return "\n".join(lines)


def cell(value: Any) -> str:
    """A number with four digits, as text.

    >>> cell(None), cell(12.0), cell(8)
    ('', '12', '8')
    """
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as CSV with a header; no rows give an empty file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        if rows:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path
