"""The journal: an SQLite file beside asv's results; every outcome is on disk before the next process starts.

A row for each process of a benchmark at one combination of parameters, with its outcome, samples, reason and
provenance; known by benchmark, version and parameters. asv's own JSON is written from it, a file at a time,
whole, and merged with what it held (`export`). Write-ahead logging:
whatever ends the writer, and whenever, the rows written so far are there.
"""

import datetime
import fcntl
import itertools
import json
import math
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from projecta.regress.errors import cannot
from projecta.regress.project.config import Project
from projecta.regress.project.machine import LASTING
from projecta.regress.run.case import OK, Case, Combination, Outcome
from projecta.regress.store.results import NOISE

NAME, LOCK = "journal.sqlite", "journal.lock"


MOVES = -1  # the place of a combination, which a change of `params` moves: not kept any more


BENCH = "bench"  # the purpose of runs that become asv's results; those of gates name the gate and the side


_DOCTOR = "`projecta doctor --fix` sets it aside."
_TABLES = """
create table if not exists provenance (id integer primary key, facts text unique not null);
create table if not exists runs (
    id integer primary key, machine text not null, commit_hash text not null, environment text not null,
    benchmark text not null, version text not null, place integer not null, params text not null,
    at text not null, status text not null, samples text not null, number integer, reason text not null,
    seconds real not null, purpose text not null, provenance integer references provenance);
create index if not exists by_commit on runs (machine, commit_hash, environment, benchmark, place);
create table if not exists noise (
    machine text not null, label text not null, version text not null, spread real not null,
    pairs integer not null, at text not null, provenance integer references provenance,
    primary key (machine, label));
create table if not exists gates (
    id integer primary key, machine text not null, at text not null, base text not null, head text not null,
    contents text not null, verdict text not null, verdicts text not null, seconds real not null);
"""


@dataclass(frozen=True)
class Run:
    """One process in the journal."""

    benchmark: str
    version: str
    params: Combination
    outcome: Outcome
    at: str


@dataclass(frozen=True)
class Gate:
    """One gate. contents: digests of both sides, by side. verdicts: of the benchmarks that it measured."""

    base: str
    head: str
    contents: dict[str, str]
    verdict: str
    verdicts: list[str]
    seconds: float


class Journal:
    """The journal file; one process at a time may write.

    Raises:
        ValueError: another process writes to it (its number is named), or the file is no SQLite database.
    """

    def __init__(self, project: Project):
        folder = project.results
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.project = folder / NAME, project
        self._lock = (folder / LOCK).open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            other = self._lock.read().strip()
            self._lock.close()
            cannot("write the journal", f"another run holds it (process {other})", "Wait for it, or end it.")
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        try:
            self.base = sqlite3.connect(self.path, isolation_level=None)
            self.base.execute("pragma journal_mode = wal")
            self.base.execute("pragma synchronous = full")
            self.base.executescript(_TABLES)
        except sqlite3.DatabaseError as error:
            self._lock.close()
            name = getattr(error, "sqlite_errorname", "")
            if name in ("SQLITE_NOTADB", "SQLITE_CORRUPT"):
                cannot(
                    f"read {self.path}",
                    f"it is no journal ({error})",
                    "`projecta doctor --fix` sets it aside.",
                )
            explain(self.path, error)
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.base.close()
        self._lock.close()

    def provenance(self, facts: dict[str, Any]) -> int:
        """The row number of these facts."""
        text = json.dumps(facts, sort_keys=True)
        self.base.execute("insert or ignore into provenance (facts) values (?)", [text])
        return self.base.execute("select id from provenance where facts = ?", [text]).fetchone()[0]

    def add(
        self, machine: str, commit: str, environment: str, case: Case, outcome: Outcome, purpose: str,
        provenance: int,
    ) -> None:  # fmt: skip
        """Store one process's outcome. ValueError if the disk is full; earlier outcomes stay."""
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        row = (
            machine, commit, environment, case.name, case.version, MOVES, json.dumps(case.params), at,
            outcome.status, json.dumps(outcome.samples), outcome.number, outcome.reason, outcome.seconds,
            purpose, provenance,
        )  # fmt: skip
        marks = ", ".join("?" * len(row))
        try:
            self.base.execute(
                "insert into runs (machine, commit_hash, environment, benchmark, version, place, params, at,"
                f" status, samples, number, reason, seconds, purpose, provenance) values ({marks})",
                row,
            )
        except sqlite3.OperationalError as error:
            explain(self.path, error)
            raise

    def runs(self, machine: str, commit: str, environment: str, purpose: str = BENCH) -> list[Run]:
        """The outcomes of a commit, oldest first."""
        found = self.base.execute(
            "select benchmark, version, params, status, samples, number, reason, seconds, at from runs"
            " where machine = ? and commit_hash = ? and environment = ? and purpose = ? order by id",
            [machine, commit, environment, purpose],
        )
        return [
            Run(name, version, _tuple(params), Outcome(status, _tuple(samples), *rest), at)
            for name, version, params, status, samples, *rest, at in found
        ]

    def known(
        self, machine: str, commit: str, environment: str, benchmarks: dict[str, dict[str, Any]]
    ) -> dict[tuple[str, Combination], list[Run]]:
        """The runs of today's versions of the benchmarks, by name and parameters."""
        found: dict[tuple[str, Combination], list[Run]] = {}
        for run in self.runs(machine, commit, environment):
            if run.benchmark in benchmarks and str(benchmarks[run.benchmark]["version"]) == run.version:
                found.setdefault((run.benchmark, run.params), []).append(run)
        return found

    def durations(self, machine: str) -> dict[tuple[str, Combination], float]:
        """Seconds that a process of each benchmark took on a machine, on average, by name and parameters."""
        rows = self.base.execute(
            "select benchmark, params, avg(seconds) from runs"
            " where machine = ? and status = ? and purpose = ? group by benchmark, params",
            [machine, OK, BENCH],
        )
        return {(name, _tuple(params)): seconds for name, params, seconds in rows}

    def places(self, machine: str, commit: str, environment: str) -> set[tuple[str, str, int, Combination]]:
        """(benchmark, version, place, parameters) of rows by which older versions wrote asv's file."""
        found = self.base.execute(
            "select distinct benchmark, version, place, params from runs where machine = ?"
            " and commit_hash = ? and environment = ? and purpose = ? and place >= 0",
            [machine, commit, environment, BENCH],
        )
        return {(name, version, place, _tuple(params)) for name, version, place, params in found}

    def absorb(
        self, machine: str, commit: str, environment: Any, benchmarks: dict[str, dict[str, Any]]
    ) -> None:
        """Import values from asv's file of a commit that the journal lacks."""
        from asv.results import Results, get_filename
        from asv.util import UserError

        path = self.project.results / get_filename(machine, commit, environment.name)
        if not path.is_file():
            return
        try:
            results = Results.load(str(path), machine_name=machine)
        except (UserError, ValueError, KeyError) as error:  # a UnicodeDecodeError is a ValueError
            reason = " ".join(str(error).split())
            cannot(
                f"read {path}", f"it is not asv's JSON ({reason})", "`projecta doctor --fix` sets it aside."
            )
        known = {(run.benchmark, run.version) for run in self.runs(machine, commit, environment.name)}
        facts = self.provenance({"taken from": "asv's results"})
        for name in results.get_all_result_keys():
            version, params = str(results.benchmark_version.get(name)), results.get_result_params(name)
            if (name, version) in known:
                continue
            entry = benchmarks.get(name, {})
            rounds = int(entry.get("rounds") or 1) if str(entry.get("version")) == version else 1
            columns = (results.get_result_value, results.get_result_stats, results.get_result_samples)
            rows = zip(itertools.product(*params), *(column(name, params) for column in columns), strict=True)
            for combination, value, stat, own in rows:
                if value is None or not math.isfinite(value):
                    continue  # why is not known: measure it
                timed = bool(entry.get("type", "").startswith("time")) if entry else stat is not None
                kind = "time" if timed else "track"
                case = Case(name, MOVES, combination, kind, entry.get("unit", ""), version, 0.0)
                number = stat and stat.get("number")
                outcome = Outcome(OK, tuple(own or [value]), (number or 1) if timed else None)
                for _ in range(rounds if timed and not own else 1):
                    self.add(machine, commit, environment.name, case, outcome, BENCH, facts)

    def state(self, machine: str, commit: str) -> dict[str, Any]:
        """The machine's state when the commit was measured last."""
        row = self.base.execute(
            "select facts from runs join provenance on provenance.id = provenance"
            " where machine = ? and commit_hash = ? and purpose = ? order by runs.id desc limit 1",
            [machine, commit, BENCH],
        ).fetchone()
        facts = {} if row is None else json.loads(row[0])
        return {name: facts[name] for name in LASTING if name in facts}

    def keep_gate(self, machine: str, gate: Gate) -> None:
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        contents, verdicts = json.dumps(gate.contents), json.dumps(gate.verdicts)
        row = [machine, at, gate.base, gate.head, contents, gate.verdict, verdicts, gate.seconds]
        self.base.execute(
            "insert into gates (machine, at, base, head, contents, verdict, verdicts, seconds)"
            " values (?, ?, ?, ?, ?, ?, ?, ?)",
            row,
        )

    def gates(self, machine: str) -> list[Gate]:
        """The machine's gates, oldest first."""
        rows = self.base.execute(
            "select base, head, contents, verdict, verdicts, seconds from gates"
            " where machine = ? order by id",
            [machine],
        )
        return [
            Gate(base, head, json.loads(contents), verdict, json.loads(verdicts), seconds)
            for base, head, contents, verdict, verdicts, seconds in rows
        ]

    def keep_noise(
        self, machine: str, label: str, version: str, spread: float, pairs: int, provenance: int
    ) -> None:
        """Store a calibration: the standard deviation of the log ratio of a pair."""
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.base.execute(
            "insert or replace into noise values (?, ?, ?, ?, ?, ?, ?)",
            [machine, label, version, spread, pairs, at, provenance],
        )

    def noise(self, machine: str) -> dict[str, tuple[str, float, int]]:
        """By benchmark: version, spread, pairs."""
        rows = self.base.execute(
            "select label, version, spread, pairs from noise where machine = ?", [machine]
        )
        return {label: (version, spread, pairs) for label, version, spread, pairs in rows}

    def write_noise(self, machine: str) -> None:
        """Write a machine's noise beside its results, for the site."""
        path = self.project.results / machine / NOISE
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {label: round(spread, 6) for label, (_, spread, _) in sorted(self.noise(machine).items())}
        path.write_text(json.dumps(found, indent=1) + "\n")

    def calibrated(self, machine: str) -> tuple[str, dict[str, Any]] | None:
        """When, and in what state, the machine was calibrated last."""
        row = self.base.execute(
            "select at, facts from noise join provenance on provenance.id = provenance"
            " where machine = ? order by at desc limit 1",
            [machine],
        ).fetchone()
        return None if row is None else (row[0], json.loads(row[1]))


def _tuple(text: str) -> tuple[Any, ...]:
    """A list in JSON."""
    return tuple(json.loads(text))


def explain(path: Path, error: sqlite3.Error) -> None:
    """Raise a UsageError for errors that the user can mend; return for others."""
    name = getattr(error, "sqlite_errorname", "")
    kept = "What was measured before is kept; run it again."
    if name in ("SQLITE_FULL", "SQLITE_IOERR_WRITE"):
        cannot(f"write {path}", f"the disk is full ({error})", f"Free some space. {kept}")
    if name in ("SQLITE_BUSY", "SQLITE_LOCKED"):
        cannot(f"write {path}", f"another program has it open ({error})", f"End that program. {kept}")
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN")):
        cannot(f"write {path}", f"it may not be written ({error})", f"Change its permissions. {kept}")
