"""Measures commits: each process's outcome is in the journal before the next starts, so nothing is lost.

Whatever ends a run, the same command goes on where it stopped. A benchmark is measured by as many processes
as its `rounds` says, at different times of the run; what failed is tried again by the next run.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from projecta.regress import machine, runner
from projecta.regress.builds import Build, BuildFailed, builds_of, cases
from projecta.regress.journal import BENCH, Journal, Run, export
from projecta.regress.processes import BROKEN, FAILED, OK, SKIPPED, Case, Outcome
from projecta.regress.store import Combination, Project

_QUICK = {"number": 1, "repeat": 1, "warmup_time": 0, "rounds": 1}
_BUILDING = Case("(build)", 0, (), "build", "", "", 0.0)  # the row of a commit that does not build


def measure(
    project: Project, journal: Journal, host: str, commits: Iterable[str], pattern: str | None, quick: bool,
    console: Console,
) -> int:  # fmt: skip
    """Measure what the commits lack on this machine; return how many outcomes are broken.

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
    wanted = runner.select(cases(found), pattern)
    if not quick:
        build.found.save()
        journal.absorb(host, build.commit, build.environment, found)
        facts = journal.provenance(machine.state() | {"packages": build.packages()})
    known = {} if quick else journal.known(host, build.commit, build.environment.name, found)
    todo, broken = list(_plan(wanted, found, known, quick)), 0
    try:
        for case, outcome in _run(build, todo, quick, console):
            if not quick:
                journal.add(host, build.commit, build.environment.name, case, outcome, BENCH, facts)
            broken += outcome.status in BROKEN
    finally:
        if not quick:
            export(journal, host, build.commit, build.environment, found)
    return broken


def _plan(
    wanted: Sequence[Case], found: dict[str, dict[str, Any]],
    known: dict[tuple[str, Combination], list[Run]], quick: bool,
) -> Iterator[tuple[int, Case]]:  # fmt: skip
    """(round, case) of what is missing, round by round."""
    missing = {}
    for case in wanted:
        endings = [run.outcome.status for run in known.get((case.name, case.params), [])]
        rounds = int(found[case.name].get("rounds") or 1) if case.timed and not quick else 1
        missing[case] = 0 if SKIPPED in endings else max(0, rounds - endings.count(OK))
    for turn in range(max(missing.values(), default=0)):
        yield from ((turn, case) for case in wanted if missing[case] > turn)


def _run(
    build: Build, todo: Sequence[tuple[int, Case]], quick: bool, console: Console
) -> Iterator[tuple[Case, Outcome]]:
    """Run what is planned, a fresh launcher each round; a line for each, or a bar on a terminal."""
    launcher, turn, gave_up = None, -1, set[Case]()
    start = time.monotonic()
    with Progress(
        BarColumn(bar_width=24), TextColumn("{task.percentage:3.0f}%"), TextColumn("{task.description}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=True),
        console=console, disable=not console.is_terminal, transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task("starting", total=len(todo))
        try:
            for i, (at, case) in enumerate(todo):
                if at != turn:
                    turn = at
                    if launcher is not None:
                        launcher.close()
                    launcher = build.launcher(_QUICK if quick else {})
                if case in gave_up:  # it failed or was skipped in an earlier round
                    continue
                assert launcher is not None
                progress.update(task, completed=i, description=case.label)
                outcome = launcher.run(case)
                if outcome.status != OK:
                    gave_up.add(case)
                yield case, outcome
                done, seconds = (i + 1) / len(todo), time.monotonic() - start
                if outcome.status in BROKEN:
                    line = f"{case.label} {outcome.status}: {outcome.reason}"
                    console.print(line, style="magenta", markup=False, soft_wrap=True)
                elif progress.disable:
                    said = outcome.status if outcome.value is None else f"{outcome.value:.4g} {case.unit}"
                    _say(console, f"{pace(100 * done, seconds)}  {case.label} {said}")
        finally:
            if launcher is not None:
                launcher.close()


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def pace(percent: float, seconds: float) -> str:
    """How far, how long so far, how long still.

    >>> pace(25.0, 90.0)
    ' 25 %   1:30, about   4:30 left'
    """
    left = f"about {_minutes(seconds * (100 - percent) / percent)} left" if percent >= 5 else "starting"
    return f"{percent:3.0f} % {_minutes(seconds)}, {left}"


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 60):3d}:{int(seconds % 60):02d}"
