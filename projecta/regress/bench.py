"""Measures commits: each process's outcome is in the journal before the next starts, so nothing is lost.

Whatever ends a run, the same command goes on where it stopped. A benchmark is measured by as many processes
as its `rounds` says, at different times of the run; what failed is tried again by the next run.
"""

import contextlib
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from projecta.regress.project import machine
from projecta.regress.project.config import Project
from projecta.regress.run.build import Build, BuildFailed, builds_of, cases
from projecta.regress.run.case import FAILED, FAILURES, OK, SKIPPED, Case, Combination, Outcome, select
from projecta.regress.run.launch import Worker
from projecta.regress.store.export import export
from projecta.regress.store.journal import BENCH, Journal, Run

GUESS = 2.0  # seconds of a process, where none is known
_QUICK = {"number": 1, "repeat": 1, "warmup_time": 0, "rounds": 1}
_BUILDING = Case("(build)", 0, (), "build", "", "", 0.0)  # the row of a commit that does not build


def measure(
    project: Project, journal: Journal, host: str, commits: Iterable[str], pattern: str | None, quick: bool,
    console: Console,
) -> int:  # fmt: skip
    """Measure the missing results of the commits on this machine; return the number of broken outcomes.

    `quick` runs everything once and keeps nothing.
    """
    broken = 0
    for commit in commits:
        for build in builds_of(project, commit):
            _say(console, f"{commit[:8]}: building in {build.environment.name}")
            try:
                build.make()
                found = build.benchmarks()
            except BuildFailed as error:
                console.print(f"BROKEN: {error}", style="magenta", markup=False, highlight=False)
                broken += 1
                if not quick:
                    outcome, facts = Outcome(FAILED, reason=str(error)), journal.provenance(machine.state())
                    journal.add(host, commit, build.environment.name, _BUILDING, outcome, BENCH, facts)
                continue
            broken += _measure_build(project, journal, host, build, found, pattern, quick, console)
    return broken


def _measure_build(
    project: Project, journal: Journal, host: str, build: Build, found: dict[str, dict[str, Any]],
    pattern: str | None, quick: bool, console: Console,
) -> int:  # fmt: skip
    wanted = select(cases(found), pattern)
    if not quick:
        build.found.save()
        journal.absorb(host, build.commit, build.environment, found)
        facts = journal.provenance(machine.state() | {"packages": build.packages()})
    known = {} if quick else journal.known(host, build.commit, build.environment.name, found)
    todo, broken = list(_plan(wanted, found, known, quick)), 0
    values = len({case for _, case in todo})
    if todo:
        _say(console, f"{build.commit[:8]}: {values} values to measure, {estimate(journal, host, todo)}")
    else:
        _say(console, f"{build.commit[:8]}: all {len(wanted)} values are measured")
    try:
        for case, outcome in _run(build, todo, quick, console):
            if not quick:
                journal.add(host, build.commit, build.environment.name, case, outcome, BENCH, facts)
            broken += outcome.status in FAILURES
    finally:
        if not quick:
            export(journal, host, build.commit, build.environment, found)
    return broken


def _plan(
    wanted: Sequence[Case], found: dict[str, dict[str, Any]],
    known: dict[tuple[str, Combination], list[Run]], quick: bool,
) -> Iterator[tuple[int, Case]]:  # fmt: skip
    """The (round, case) pairs without a result, round by round."""
    missing = {}
    for case in wanted:
        endings = [run.outcome.status for run in known.get((case.name, case.params), [])]
        rounds = int(found[case.name].get("rounds") or 1) if case.timed and not quick else 1
        missing[case] = 0 if SKIPPED in endings else max(0, rounds - endings.count(OK))
    for round_ in range(max(missing.values(), default=0)):
        yield from ((round_, case) for case in wanted if missing[case] > round_)


def estimate(journal: Journal, host: str, todo: Sequence[tuple[int, Case]]) -> str:
    """Estimated duration of a plan, from earlier runs of the same benchmarks on this machine."""
    known = journal.durations(host)
    usual = statistics.median(known.values()) if known else GUESS
    seconds = sum(known.get((case.name, case.params), usual) for _, case in todo)
    basis = "from earlier runs" if known else "a guess: nothing was measured on this machine before"
    return f"about {_minutes(seconds).strip()} minutes ({basis})"


def _run(
    build: Build, todo: Sequence[tuple[int, Case]], quick: bool, console: Console
) -> Iterator[tuple[Case, Outcome]]:
    """Run the plan, each round in a fresh worker; print a line for each case, or show a bar on a terminal."""
    worker, failed = Worker(build, _QUICK if quick else {}), set[Case]()
    current, start = 0, time.monotonic()
    with contextlib.closing(worker), Progress(
        BarColumn(bar_width=24), TextColumn("{task.percentage:3.0f}%"), TextColumn("{task.description}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=True),
        console=console, disable=not console.is_terminal, transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task("starting", total=len(todo))
        for i, (round_, case) in enumerate(todo):
            if round_ != current:
                current = round_
                worker.end()
            if case in failed:  # or skipped, in an earlier round
                continue
            progress.update(task, completed=i, description=case.label)
            outcome = worker.run(case)
            if outcome.status != OK:
                failed.add(case)
            yield case, outcome
            done, seconds = (i + 1) / len(todo), time.monotonic() - start
            if outcome.status in FAILURES:
                line = f"{case.label} {outcome.status}: {outcome.reason}"
                console.print(line, style="magenta", markup=False, soft_wrap=True)
            elif progress.disable:
                value = outcome.status if outcome.value is None else f"{outcome.value:.4g} {case.unit}"
                _say(console, f"{pace(100 * done, seconds)}  {case.label} {value}")


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def pace(percent: float, seconds: float) -> str:
    """Progress: the share done, time so far, time left.

    >>> pace(25.0, 90.0)
    ' 25 %   1:30, about   4:30 left'
    """
    left = f"about {_minutes(seconds * (100 - percent) / percent)} left" if percent >= 5 else "starting"
    return f"{percent:3.0f} % {_minutes(seconds)}, {left}"


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 60):3d}:{int(seconds % 60):02d}"
