"""Finds problems in a project's results, and repairs them or sets files aside.

Nothing is deleted: what is moved lies in `quarantine` beside the results.
"""

import contextlib
import json
import math
import os
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from projecta.regress.project.config import Project
from projecta.regress.store.journal import NAME

QUARANTINE = "quarantine"


@dataclass(frozen=True)
class Finding:
    """A problem with a file, and the repair."""

    path: Path
    problem: str
    remedy: str
    fixable: bool = True


def examine_results(project: Project, fix: bool) -> list[Finding]:
    """All problems; with `fix`, they are repaired or set aside."""
    found = [*_journal(project, fix), *_leftovers(project, fix)]
    for folder in sorted(project.results.iterdir()) if project.results.is_dir() else ():
        if folder.is_dir() and folder.name != QUARANTINE and not folder.name.startswith("."):
            found += _folder(project, folder, fix)
    return [*found, *_same_machine(project)]


def _journal(project: Project, fix: bool) -> Iterator[Finding]:
    path = project.results / NAME
    if not path.is_file():
        return
    try:
        with contextlib.closing(sqlite3.connect(path)) as base:
            answer = base.execute("pragma integrity_check").fetchone()[0]
    except sqlite3.DatabaseError as error:
        answer = str(error)
    if answer == "ok":
        return
    aside = "set aside; a new one begins, and asv's files, which were written from it, are read into it"
    yield Finding(path, f"the journal is damaged: {answer.splitlines()[0]}", aside)
    if fix:
        for suffix in ("-wal", "-shm", ""):
            _set_aside(project, path.with_name(path.name + suffix))


def _leftovers(project: Project, fix: bool) -> Iterator[Finding]:
    for path in sorted(project.results.glob(".writing-*")):
        yield Finding(path, "a run that was killed was writing here", "set aside")
        if fix:
            _set_aside(project, path)


def _folder(project: Project, folder: Path, fix: bool) -> Iterator[Finding]:
    files = sorted(folder.glob("*.json"))
    if files and not (folder / "machine.json").is_file():
        yield Finding(
            folder,
            "results of a machine that nothing describes",
            f"run `asv machine --machine {folder.name}`",
            False,
        )
    for path in files:
        try:
            data = json.loads(path.read_bytes().decode("utf-8"))
        except UnicodeDecodeError:
            problem = "is not UTF-8"
        except ValueError as error:
            problem = f"is not whole: {error}"
        else:
            if path.name != "machine.json":
                yield from _results(project, path, data, fix)
            continue
        again = (
            "asv asks for it again"
            if path.name == "machine.json"
            else "`projecta bench` writes it from the journal"
        )
        yield Finding(path, problem, f"set aside; {again}")
        if fix:
            _set_aside(project, path)


def _results(project: Project, path: Path, data: Any, fix: bool) -> Iterator[Finding]:
    if not isinstance(data, dict) or not isinstance(data.get("results"), dict):
        yield Finding(path, "holds no results", "set aside")
        if fix:
            _set_aside(project, path)
        return
    commit = str(data.get("commit_hash"))
    try:
        repository = project.repository
    except ValueError as error:
        yield Finding(
            path, f"commit {commit[:8]} cannot be looked up: {error}", "make `repo` reachable", False
        )
        return
    words = ["git", "-C", str(repository), "cat-file", "-e", commit + "^{commit}"]
    if subprocess.run(words, capture_output=True).returncode:
        partial = _partial(repository)
        if partial:  # absence proves nothing there
            advice = "fetch all of the repository to check this result"
            yield Finding(path, f"commit {commit[:8]} is not in this clone, which {partial}", advice, False)
            return
        yield Finding(
            path, f"commit {commit[:8]} is not in the repository (its history was rewritten?)", "set aside"
        )
        if fix:
            _set_aside(project, path)
        return
    rows = [row for row in data["results"].values() if isinstance(row, list) and row]
    count = sum(_infinities(row) for row in rows)
    if count:
        yield Finding(
            path,
            f"holds {count} infinite value(s), on which asv publish hangs",
            "made null; a copy set aside",
        )
        if fix:
            text = json.dumps(data)
            _set_aside(project, path)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, path)


def _partial(repository: Path) -> str:
    """The known part of the history, if a clone may be shallow."""

    def ask(*words: str) -> str:
        return subprocess.run(["git", "-C", str(repository), *words], capture_output=True, text=True).stdout

    if ask("rev-parse", "--is-shallow-repository").strip() == "true":
        return "is shallow"
    fetched = ask("config", "--get-regexp", r"^remote\..*\.fetch$").splitlines()
    return "" if all("*" in line for line in fetched) else "has one branch only"


def _infinities(row: list[Any]) -> int:
    """Make a benchmark's infinite values null, and count them. Bounds (other columns) may be infinite."""
    values = row[0] if isinstance(row[0], list) else []
    places = [i for i, value in enumerate(values) if isinstance(value, float) and math.isinf(value)]
    for i in places:
        values[i] = None
    return len(places)


def _same_machine(project: Project) -> Iterator[Finding]:
    """Two names for one description: a machine that was renamed, whose history is in two."""
    known: dict[str, Path] = {}
    for path in sorted(project.results.glob("*/machine.json")):
        try:
            facts = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        facts = {k: v for k, v in facts.items() if k not in ("machine", "version")}
        text = json.dumps(facts, sort_keys=True)
        if any(facts.values()) and text in known:
            first = known[text].parent.name
            yield Finding(
                path.parent, f"describes the same machine as {first}: renamed?",
                f"give `--machine {first}` from now on; charts draw the two apart", False,
            )  # fmt: skip
        known.setdefault(text, path)


def _set_aside(project: Project, path: Path) -> None:
    if not path.exists():
        return
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
    target = project.results / QUARANTINE / stamp / path.relative_to(project.results)
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)
