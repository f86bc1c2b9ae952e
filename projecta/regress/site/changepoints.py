"""Finds where a series of results changed for good: steps up and down, and at which commit.

asv's segmentation (a Potts fit of least absolute deviations) proposes more levels than there are. Neighbours
are then joined, the least certain first, until each border that is left is a step:

- the results before and after it differ in rank (Mann-Whitney, alpha shared among all places of the series),
- their medians differ by at least `LEAST`,
- two levels fit them better than one line does (Theil-Sen): a drift has no commit to blame.

A step where the machine or its packages changed as well is that change's, never a commit's. How often this is
right, beside asv's own detection and apache-otava's: `studies/histories.py`, docs/measured.md.
"""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from projecta.regress.store.results import Measurement

LEAST = 0.02  # of the level before: smaller steps are not shown
WINDOW = 200  # newest commits
SIZE = 2  # least number of results in a level: a single one is the gate's to judge
ALPHA = 0.05  # of a series: chance that one that only varies has a step
PENALTY = 8.0  # of a border in the segmentation, in deviations of the noise: low, to propose too many


@dataclass(frozen=True)
class Point:
    """A result, and what it was measured in."""

    commit: str
    date: int  # milliseconds since 1970
    value: float
    state: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Series:
    """One benchmark at one combination of parameters, in the order of the commits."""

    benchmark: str
    params: tuple[tuple[str, str], ...]
    unit: str
    points: tuple[Point, ...]
    asv_label: str = ""  # as gates name it
    higher_is_better: bool = False

    @property
    def label(self) -> str:
        """
        >>> Series("scan.time", (("length", "64"), ("backend", "cpu")), "seconds", ()).label
        'scan.time(64, cpu)'
        """
        values = ", ".join(value for _, value in self.params)
        return f"{self.benchmark}({values})" if self.params else self.benchmark


@dataclass(frozen=True)
class Step:
    """From `before` to `after`, first seen at `commit`; `cause` says what else changed there, if anything."""

    series: Series
    commit: str
    date: int
    before: float
    after: float
    cause: str = ""
    last: str = ""  # the newest commit before it with a result
    confidence: float = 0.0  # that it is none of the noise: 1 - p, with the number of places corrected for
    gone: str = ""  # the commit at which the level came back, if it did

    @property
    def change(self) -> float:
        return self.after / self.before - 1

    @property
    def worse(self) -> bool:
        return (self.change > 0) != self.series.higher_is_better


def collect(measurements: Iterable[Measurement], history: Sequence[str] = ()) -> list[Series]:
    """Series in the order of `history` (newest first); commits outside of it are left out, if it is given."""
    place = {commit: -i for i, commit in enumerate(history)}
    found: dict[tuple[str, tuple[tuple[str, str], ...]], list[Measurement]] = {}
    for m in measurements:
        if m.measured and (not place or m.commit in place):
            found.setdefault((m.benchmark, tuple(m.params.items())), []).append(m)
    made = []
    for (benchmark, params), own in sorted(found.items()):
        own.sort(key=lambda m: (place.get(m.commit, 0), m.date))
        points = tuple(Point(m.commit, m.date, m.value, m.state) for m in own if m.value is not None)
        made.append(Series(benchmark, params, own[0].unit, points, own[0].label, own[0].higher_is_better))
    return made


def steps(series: Series) -> list[Step]:
    """The steps of a series within its newest commits, oldest first.

    >>> points = tuple(Point(f"c{i}", i, 1.0 if i < 10 else 2.0) for i in range(20))
    >>> [(step.commit, step.last, step.change) for step in steps(Series("x", (), "seconds", points))]
    [('c10', 'c9', 1.0)]
    """
    points = series.points[-WINDOW:]
    found = borders([point.value for point in points])
    ends = [0, *found, len(points)]
    levels = [statistics.median(p.value for p in points[a:b]) for a, b in itertools.pairwise(ends)]
    made = []
    for i, (place, p) in enumerate(found.items()):
        before, after = levels[i : i + 2]
        if before <= 0:
            continue
        point, last = points[place], points[place - 1]
        cause, confidence = differences(last.state, point.state), 1 - min(1.0, p * len(points))
        made.append(Step(series, point.commit, point.date, before, after, cause, last.commit, confidence))
    return [replace(step, gone=_gone(step, made[i + 1 :])) for i, step in enumerate(made)]


def _gone(step: Step, later: Sequence[Step]) -> str:
    """The commit at which the level before a step came back."""
    back = (other.commit for other in later if abs(other.after / step.before - 1) < LEAST)
    return next(back, "")


def borders(values: Sequence[float]) -> dict[int, float]:
    """The first place of each level after the first, with the p of the rank test against the one before.

    >>> list(borders([1.0, 1.1, 0.9, 1.05, 0.95, 2.0, 2.1, 1.9, 2.05, 1.95, 2.0]))
    [5]
    """
    from asv.step_detect import solve_potts_approx

    if len(values) < 2 * SIZE:
        return {}
    if min(values) > 0:
        x = [math.log(value) for value in values]
    else:  # counts, differences: their share of the usual size
        size = statistics.median(abs(value) for value in values) or 1.0
        x = [value / size for value in values]
    noise = 1.05 * statistics.median(abs(b - a) for a, b in itertools.pairwise(x))  # 1.4826 / sqrt(2)
    ends, _, _ = solve_potts_approx(x, [1] * len(x), PENALTY * max(noise, 1e-9), min_size=SIZE)
    cuts = [0, *ends]
    while len(cuts) > 2:
        tested = [(*_test(x, *cuts[i : i + 3]), i + 1) for i in range(len(cuts) - 2)]
        wrong = [(p, place) for is_step, p, place in tested if not is_step]
        if not wrong:
            return {cuts[place]: p for _, p, place in tested}
        cuts.pop(max(wrong)[1])
    return {}


def _test(x: Sequence[float], first: int, border: int, end: int) -> tuple[bool, float]:
    """Whether the values change for good at a border between two levels, and the p of the rank test."""
    import numpy as np
    from scipy.stats import mannwhitneyu, theilslopes

    before, after = np.asarray(x[first:border]), np.asarray(x[border:end])
    method = "exact" if min(len(before), len(after)) <= 10 else "asymptotic"
    p = float(mannwhitneyu(before, after, method=method).pvalue)
    levels = np.median(before), np.median(after)
    if p > ALPHA / len(x) or abs(levels[1] - levels[0]) < math.log1p(LEAST):
        return False, p
    both, place = np.asarray(x[first:end]), np.arange(end - first)
    rest = both - theilslopes(both, place).slope * place
    line = np.abs(rest - np.median(rest)).sum()
    return bool(line >= np.abs(before - levels[0]).sum() + np.abs(after - levels[1]).sum()), p


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """
    >>> differences({"torch": "2.12", "cpu": "a"}, {"torch": "2.13", "cpu": "a"})
    'torch 2.12 to 2.13'
    """
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return ", ".join(f"{name} {before.get(name) or 'none'} to {after.get(name) or 'none'}" for name in names)
