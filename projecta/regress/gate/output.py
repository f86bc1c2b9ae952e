"""A gate's result for people and machines: terminal table, JSON, Markdown, and the samples as a picture."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from projecta.regress.gate import statistics
from projecta.regress.gate.session import MOST_PAIRS, SIDES, Result, Row
from projecta.regress.gate.statistics import Design

COLOURS = {
    statistics.PASS: "green",
    statistics.REGRESSED: "bold red",
    statistics.BROKEN: "bold magenta",
    statistics.INCONCLUSIVE: "yellow",
    statistics.NOT_MEASURED: "blue",
}
_ORDER = {verdict: i for i, verdict in enumerate(statistics.WORST_FIRST)}

LAST = "last.gate"  # beside a machine's results: the newest verdict, in JSON; asv reads files named .json


def sorted_rows(result: Result) -> list[Row]:
    """Sort order: the worst verdict first, then the slowest benchmark."""
    return sorted(result.rows, key=lambda row: (_ORDER[row.verdict], -(row.judgement.ratio or 0), row.label))


def table(result: Result) -> Any:
    """Terminal table: a line for each benchmark, with the reason below it."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False)
    for title, side in (
        ("verdict", "left"), ("head / base", "right"), ("bounds", "right"), ("base", "right"),
        ("pairs", "right"),
    ):  # fmt: skip
        made.add_column(title, justify=side, no_wrap=True)  # type: ignore[arg-type]
    made.add_column("benchmark", overflow="fold")
    for row in sorted_rows(result):
        *cells, why = _cells(row)
        label = _escape(row.label) + (f"\n[dim]{_escape(why)}[/]" if why else "")
        made.add_row(f"[{COLOURS[row.verdict]}]{row.verdict}[/]", *cells, label)
    return made


def noise_table(rows: Sequence[Row], noise: dict[str, tuple[str, float, int]], design: Design) -> Any:
    """The noise between processes, and the pairs that it takes to see twice the tolerance."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False)
    made.add_column("noise", justify="right")
    made.add_column(f"pairs for +{2 * design.tolerance:.0%}", justify="right")
    made.add_column("benchmark", overflow="fold")
    for row in sorted(rows, key=lambda row: -noise[row.label][1]):
        _, spread, _ = noise[row.label]
        needed, label = statistics.pairs_for_power(spread, design, 2 * design.tolerance), _escape(row.label)
        if needed > MOST_PAIRS:
            label += (
                "\n[yellow]too noisy to gate: let it run longer (repeat, sample_time), give it a core of "
            )
            label += f"its own, or gate it at --tolerance {1.2 * spread:.2f}[/]"
        made.add_row(f"{spread:.1%}", str(needed), label)
    return made


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _cells(row: Row) -> tuple[str, str, str, str, str]:
    """The cells of a row: ratio, bounds, base, pairs, reason."""
    j = row.judgement
    ratio = "" if j.ratio is None else f"{j.ratio:.3f}"
    low = f"{j.low:.3f} to " if j.low else "up to "  # 0: too few pairs for a lower bound
    bounds = f"{low}{j.high:.3f}" if j.high is not None and math.isfinite(j.high) else ""
    base = row.values["base"]
    size = amount(sorted(base)[len(base) // 2], row.case.unit) if base else ""
    why = j.reason
    if row.verdict == statistics.INCONCLUSIVE:
        unknown = "one pair has no spread" if j.pairs < 2 else "a value of 0 or less has no ratio"
        more = f"about {j.more} more pairs are needed" if j.more else unknown
        why = "; ".join(filter(None, [why, more]))
    return ratio, bounds, size, str(j.pairs or ""), why


def scale(value: float, unit: str) -> tuple[float, str]:
    """A readable unit for a value, and its size."""
    if unit == "seconds":
        sizes = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
        # 0.9996 s are 1 s in three digits
        return next((pair for pair in sizes if value >= 0.9995 * pair[0]), (1e-9, "ns"))
    return (2.0**20, "MiB") if unit == "bytes" else (1.0, unit)


def amount(value: float, unit: str) -> str:
    """
    >>> amount(0.00123, "seconds"), amount(0.9997, "seconds")
    ('1.23 ms', '1 s')
    """
    size, name = scale(value, unit)
    return f"{value / size:.{3 if unit == 'seconds' else 4}g} {name}"


def sentence(result: Result) -> str:
    """The verdict line: verdict, pairs, tolerance."""
    counts = {v: sum(row.verdict == v for row in result.rows) for v in statistics.WORST_FIRST}
    parts = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count) or "nothing matched"
    design = result.design
    return (
        f"{result.verdict}: {parts}. {result.base[:8]} to {result.head[:8]} on {result.machine}, "
        f"{result.seconds:.0f} s; tolerance {design.tolerance:.1%}, other metrics "
        f"{design.memory_tolerance:.1%}; chance of a false REGRESSED at most {design.error:.0%} a gate, of a "
        f"false PASS {design.miss:.0%} a benchmark."
    )


def as_json(result: Result) -> dict[str, Any]:
    """JSON of all rows, samples included."""
    design = result.design
    return {
        "verdict": result.verdict, "exit_code": statistics.EXIT_CODES[result.verdict], "base": result.base,
        "head": result.head, "machine": result.machine, "seconds": round(result.seconds, 1),
        "state": result.state, "warnings": result.warnings,
        "design": {
            "tolerance": design.tolerance, "memory_tolerance": design.memory_tolerance, "error": design.error,
            "miss": design.miss, "benchmarks": design.benchmarks,
        },
        "benchmarks": [
            {
                "name": row.case.name, "params": list(row.case.params), "environment": row.environment,
                "unit": row.case.unit, "higher_is_better": row.case.higher_is_better,
                "verdict": row.verdict,
                **{name: _finite(getattr(row.judgement, name)) for name in ("ratio", "low", "high")},
                "pairs": row.judgement.pairs, "more": row.judgement.more,
                "reason": row.judgement.reason,
                **{side: [vars(outcome) for outcome in row.outcomes[side]] for side in SIDES},
            }
            for row in sorted_rows(result)
        ],
    }  # fmt: skip


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def as_markdown(result: Result) -> str:
    """Comment for a pull request: a table of rows that did not pass; the others are folded."""
    lines = [f"**{sentence(result)}**", ""]
    lines += [f"- warning: {line}" for line in result.warnings]
    rows = sorted_rows(result)
    bad, passed = (
        [r for r in rows if r.verdict != statistics.PASS],
        [r for r in rows if r.verdict == statistics.PASS],
    )
    lines += _markdown_table(bad)
    if passed:
        lines += [
            f"<details><summary>{len(passed)} passed</summary>",
            "",
            *_markdown_table(passed),
            "</details>",
            "",
        ]
    return "\n".join(lines)


def _markdown_table(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    lines = [
        "| verdict | head / base | bounds | base | pairs | benchmark | why |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row.verdict, *_cells(row)[:4], f"`{row.label}`", _cells(row)[4]]
        lines.append("| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |")
    return [*lines, ""]


def write_json(result: Result, path: Path) -> None:
    path.write_text(json.dumps(as_json(result), indent=1) + "\n")


def draw(result: Result) -> Any:
    """Chart of each benchmark's pairs, bounds and tolerance, as a matplotlib figure."""
    from matplotlib.figure import Figure

    rows = [row for row in sorted_rows(result) if any(map(math.isfinite, row.ratios))]
    height = 1.2 + 0.32 * max(1, len(rows))
    figure = Figure(figsize=(9, height), layout="constrained")
    axis = figure.subplots()
    names = {"green": "C2", "bold red": "C3", "bold magenta": "C6", "yellow": "C1", "blue": "C0"}
    bounds = [bound for row in rows for bound in (row.judgement.low, row.judgement.high)]
    shown = [bound for bound in bounds if bound and math.isfinite(bound)]  # the rest are open: over the edge
    shown += [1.0, 1 + result.design.tolerance, *(r for row in rows for r in row.ratios if math.isfinite(r))]
    left, right = 100 * (min(shown) - 1), 100 * (max(shown) - 1)
    margin = 0.04 * max(1.0, right - left)
    axis.set_xlim(left - margin, right + margin)
    for i, row in enumerate(rows):
        colour, j = names[COLOURS[row.verdict]], row.judgement
        axis.plot([100 * (r - 1) for r in row.ratios], [i] * len(row.ratios), ".", color=colour, alpha=0.6)
        if j.low is not None and j.high is not None:
            ends = (max(100 * (j.low - 1), left - 2 * margin), min(100 * (j.high - 1), right + 2 * margin))
            axis.plot(ends, (i, i), color=colour, alpha=0.3, linewidth=5, solid_capstyle="butt")
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.axvline(100 * result.design.tolerance, color="C3", linewidth=0.8, linestyle="--")
    axis.set_yticks(range(len(rows)), [f"{row.label}  {row.verdict}" for row in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel(
        "head against base, % (dots: pairs of processes; bars: bounds; dashed: tolerance)", fontsize=8
    )
    return figure
