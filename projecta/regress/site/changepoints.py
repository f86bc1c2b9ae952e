"""Finds where a series of results changed for good: steps up and down, and at which commit.

A step where the machine or its packages changed as well is that change's, never a commit's.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from projecta.regress.store.results import Measurement

LEAST = 0.03  # of the level before: smaller steps are not shown
WINDOW = 200  # newest commits
SIZE = 2  # least number of results in a level: a single one is the gate's to judge


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


def steps(series: Series, least: float = LEAST) -> list[Step]:
    """The steps of a series within its newest commits, oldest first.

    >>> points = tuple(Point(f"c{i}", i, 1.0 if i < 10 else 2.0) for i in range(20))
    >>> [(step.commit, step.change) for step in steps(Series("x", (), "seconds", points))]
    [('c10', 1.0)]
    """
    from asv.step_detect import detect_steps

    points = series.points[-WINDOW:]
    if len(points) < 2:
        return []
    levels = detect_steps([point.value for point in points])
    made = []
    for (first, start, before, *_), (_, end, after, *_) in itertools.pairwise(levels):
        short = min(start - first, end - start) < SIZE
        if short or before <= 0 or abs(after / before - 1) < least:
            continue
        point, previous = points[start], points[max(0, start - 1)]
        cause = differences(previous.state, point.state)
        made.append(Step(series, point.commit, point.date, before, after, cause))
    return made


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """
    >>> differences({"torch": "2.12", "cpu": "a"}, {"torch": "2.13", "cpu": "a"})
    'torch 2.12 to 2.13'
    """
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return ", ".join(f"{name} {before.get(name) or 'none'} to {after.get(name) or 'none'}" for name in names)
