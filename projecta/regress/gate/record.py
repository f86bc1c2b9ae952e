"""How often this machine's own gates were wrong: their verdicts on code that did not change.

Every gate is kept. Two sides are the same code if they are one commit, or if their contents have the same
digest (see `Build.contents`). Gates that measured nothing, because the contents were the same, do not count.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from projecta.regress.gate import statistics
from projecta.regress.gate.session import Result
from projecta.regress.store.journal import Gate, Journal

RATES = "gates.rates"  # beside a machine's results, in JSON; asv reads files named .json


@dataclass(frozen=True)
class Rate:
    """How many of `of` had a verdict, and Wilson's bounds of its share, 95 % confidence.

    >>> Rate.of_count("REGRESSED", 0, 40)
    Rate(what='REGRESSED', count=0, of=40, low=0.0, high=0.0876)
    """

    what: str
    count: int
    of: int
    low: float
    high: float

    @classmethod
    def of_count(cls, what: str, count: int, of: int) -> "Rate":
        from scipy.stats import binomtest

        found = binomtest(count, of).proportion_ci(0.95, "wilson")
        return cls(what, count, of, round(float(found.low), 4), round(float(found.high), 4))


def keep(journal: Journal, machine: str, result: Result) -> None:
    """Store a gate, and write the machine's rates for the site."""
    measured = [row.verdict for row in result.rows if row.judgement.pairs]
    gate = Gate(result.base, result.head, result.contents, result.verdict, measured, result.seconds)
    journal.keep_gate(machine, gate)
    path = journal.project.results / machine / RATES
    path.parent.mkdir(parents=True, exist_ok=True)
    gates = journal.gates(machine)
    path.write_text(json.dumps([asdict(rate) for rate in rates(gates)], indent=1) + "\n")


def same_code(gate: Gate) -> bool:
    """Whether a gate measured the same code on both sides."""
    base, head = (gate.contents.get(side, "") for side in ("base", "head"))
    return bool(gate.verdicts) and (gate.base == gate.head or bool(base and base == head))


def rates(gates: Sequence[Gate]) -> list[Rate]:
    """Shares of gates on the same code, and of their benchmarks, that were REGRESSED or INCONCLUSIVE."""
    own = [gate for gate in gates if same_code(gate)]
    if not own:
        return []
    rows = [verdict for gate in own for verdict in gate.verdicts]
    wrong = (statistics.REGRESSED, statistics.INCONCLUSIVE)
    whole = [Rate.of_count(f"gates {v}", sum(g.verdict == v for g in own), len(own)) for v in wrong]
    return whole + [Rate.of_count(f"benchmarks {v}", rows.count(v), len(rows)) for v in wrong]


def report(gates: Sequence[Gate]) -> Any:
    """Terminal table of the rates, and a line about all gates."""
    from rich.console import Group
    from rich.table import Table

    counts = {v: sum(g.verdict == v for g in gates) for v in statistics.WORST_FIRST}
    words = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count) or "none"
    made = Table(box=None, pad_edge=False)
    for title in ("on the same code", "share", "95 % bounds"):
        made.add_column(title, justify="left" if title.startswith("on") else "right")
    for rate in rates(gates):
        bounds = f"{100 * rate.low:.1f} to {100 * rate.high:.1f} %"
        made.add_row(rate.what, f"{rate.count} of {rate.of}", bounds)
    if not made.row_count:
        hint = "No gate measured the same code on both sides. `projecta gate HEAD HEAD --always` does."
        return Group(f"Gates on this machine: {words}.", hint)
    return Group(f"Gates on this machine: {words}.", made)


def read_rates(folder: Path) -> list[dict[str, Any]]:
    """The rates of a machine, from its results folder."""
    try:
        found: list[dict[str, Any]] = json.loads((folder / RATES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return found
