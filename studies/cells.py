"""Reads the files under results/, and writes numbers and tables as README.md and docs/ show them."""

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
Rows = list[dict[str, str]]


def read(name: str) -> Rows:
    with (RESULTS / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]) + "\n"


def ms(value: str | float) -> str:
    """
    >>> ms(0.5012), ms(1234.5)
    ('0.501 ms', '1.23 s')
    """
    value = float(value)
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"


def mean(values: Iterable[float]) -> float:
    """The geometric mean."""
    return math.exp(statistics.mean(map(math.log, values)))
