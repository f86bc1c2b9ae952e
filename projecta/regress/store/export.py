"""Writes asv's JSON from the journal, and merges two such files of a commit.

A value is known by benchmark, version and parameters, never by its place.
"""

import datetime
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from projecta.regress.project.config import Project
from projecta.regress.project.git import run_git
from projecta.regress.run.case import FAILURES, OK, Combination, Outcome
from projecta.regress.store.journal import Journal, Run
from projecta.regress.store.results import STATE


def export(
    journal: Journal, machine: str, commit: str, environment: Any, benchmarks: dict[str, dict[str, Any]]
) -> Path:
    """Write asv's file of one commit from the journal; a reader finds the old file or the new one, whole.

    What the file holds and the journal does not is kept: benchmarks and parameters that have left the suite.
    """
    from asv.machine import Machine
    from asv.results import Results
    from asv.runner import BenchmarkResult

    folder = journal.project.results
    about = Machine.load(machine_name=machine, interactive=False)
    about.save(str(folder))
    date = _date(journal.project, commit)
    results = Results(
        dict(about.__dict__) | {"python": environment.python} | environment.requirements,
        environment.requirements, commit, date, environment.python, environment.name, environment.env_vars,
    )  # fmt: skip
    known = journal.known(machine, commit, environment.name, benchmarks)
    for name, entry in benchmarks.items():
        each = [known.get((name, combination), []) for combination in itertools.product(*entry["params"])]
        if not any(each):
            continue
        found = [_merged(runs) for runs in each]
        printed = "\n".join(o.reason for o in found if o.status in FAILURES)
        started = min(run.at for runs in each for run in runs)
        results.add_result(
            entry,
            BenchmarkResult(
                result=[_value(o) for o in found],
                samples=[list(o.samples) if o.number is not None else None for o in found],
                number=[o.number for o in found], errcode=int(bool(printed)), stderr=printed, profile=None,
            ),
            started_at=datetime.datetime.fromisoformat(started),
            duration=sum(run.outcome.seconds for runs in each for run in runs),
            record_samples=True,
        )  # fmt: skip
    target = folder / results._filename
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as temporary:
        results.save(temporary)
        written = Path(temporary, results._filename)
        if target.is_file():  # whole: `absorb` has read it
            _keep_what_only_the_old_file_has(journal, target, written, results)
        with written.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(written, target)
    target.with_suffix(STATE).write_text(json.dumps(journal.state(machine, commit), indent=1) + "\n")
    return target


def _keep_what_only_the_old_file_has(journal: Journal, target: Path, written: Path, results: Any) -> None:
    from asv.util import write_json

    old, new = (json.loads(path.read_bytes()) for path in (target, written))
    if not isinstance(old.get("results"), dict):
        return
    moved = journal.places(results.params["machine"], results.commit_hash, results._env_name)
    order = {
        name: [(row["version"], combination) for combination in itertools.product(*(row["params"] or []))]
        for name, columns in old["results"].items()
        for row in [dict(zip(old["result_columns"], columns, strict=False))]
        if row.get("version") is not None
    }

    def believed(name: str, combination: Combination) -> bool:
        """Skip places where an older version may have written the value of other parameters."""
        for i, (version, here) in enumerate(order.get(name, [])):
            if here == combination:
                return not any(row[:3] == (name, str(version), i) and row[3] != combination for row in moved)
        return True

    write_json(str(written), merge_results(old, new, believed), results.api_version, compact=True)


def _merged(runs: Sequence[Run]) -> Outcome:
    """All good samples of a case; if there are none, the last outcome."""
    good = [run.outcome for run in runs if run.outcome.status == OK]
    if not good:
        return runs[-1].outcome if runs else Outcome("absent")
    if good[-1].number is None:
        return good[-1]
    return Outcome(OK, tuple(itertools.chain(*(o.samples for o in good))), good[-1].number)


def _value(outcome: Outcome) -> float | bool | None:
    """The value as asv stores it: a number, nan if skipped, None if failed."""
    if outcome.status in FAILURES:
        return None
    if outcome.status != OK:
        return float("nan")
    return True if outcome.number is not None else outcome.value


def _date(project: Project, commit: str) -> int:

    return 1000 * int(
        run_git(project.repository, "show", "--no-patch", "--format=%ct", commit).splitlines()[-1]
    )


def merge_results(
    old: Mapping[str, Any], new: Mapping[str, Any],
    believed: Callable[[str, Combination], bool] = lambda name, combination: True,
) -> dict[str, Any]:  # fmt: skip
    """asv's file of a commit with the values of two: all of the new one, and what only the old one has.

    Of a benchmark whose version differs the new row stands. `believed` may refuse values of the old one.
    """
    rows, before, after = dict(new["results"]), old["result_columns"], new["result_columns"]
    for name, row in old["results"].items():
        known = dict(zip(before, row, strict=False))
        mine = None if name not in rows else dict(zip(after, rows[name], strict=False))
        if mine is None:
            merged: dict[str, Any] | None = known
        elif str(known.get("version")) != str(mine.get("version")):
            continue
        else:
            merged = _merge_row(name, known, mine, believed)
        if merged is not None:
            rows[name] = [merged.get(column) for column in after]
            while rows[name] and rows[name][-1] is None:  # as asv writes it
                rows[name].pop()
    spent = [part["durations"] for part in (old, new) if "durations" in part]
    durations = {"durations": {k: v for part in spent for k, v in part.items()}} if spent else {}
    return {**new, "results": rows, **durations}


def _merge_row(
    name: str, old: dict[str, Any], new: dict[str, Any], believed: Callable[[str, Combination], bool]
) -> dict[str, Any] | None:
    """A benchmark's columns with all combinations of both; None if the old one adds nothing."""
    axes, added = (list(row.get("params") or []) for row in (new, old))
    if len(axes) != len(added):
        return None
    mine, theirs = _by_combination(new), _by_combination(old)
    extra = {
        combination: values for combination, values in theirs.items()
        if _is_missing(mine.get(combination, {}).get("result")) and not _is_missing(values.get("result"))
        and believed(name, combination)
    }  # fmt: skip
    if not extra:
        return None
    both = [
        [*axis, *(value for value in more if value not in axis and any(c[i] == value for c in extra))]
        for i, (axis, more) in enumerate(zip(axes, added, strict=True))
    ]
    combinations = list(itertools.product(*both))
    found = mine | extra
    merged = new | {"params": both}
    for column in {key for values in found.values() for key in values}:
        each = [found.get(combination, {}).get(column) for combination in combinations]
        merged[column] = None if all(value is None for value in each) else each
    return merged


def _is_missing(value: Any) -> bool:
    """Whether a value is missing: asv writes null for failed, nan for skipped or not selected."""
    return value is None or value != value


def _by_combination(row: Mapping[str, Any]) -> dict[Combination, dict[str, Any]]:
    """The columns that have a value for each combination, by combination."""
    combinations = list(itertools.product(*(row.get("params") or [])))
    columns = {
        column: values for column, values in row.items()
        if (column in ("result", "samples") or column.startswith("stats_")) and isinstance(values, list)
    }  # fmt: skip
    return {
        combination: {column: values[i] for column, values in columns.items() if i < len(values)}
        for i, combination in enumerate(combinations)
    }
