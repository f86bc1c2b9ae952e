"""Keeps results in git: a branch with the results of every machine and nothing else.

A runner brings its own machine's folder and the descriptions of the benchmarks; what is on the branch stays.
Whoever pushes second fetches what the first one pushed, merges, and pushes again: nothing is forced, nothing
is deleted, and nothing can conflict, for

    machine/commit-environment.json   the machine's newest rows, and older ones that only the branch has
    machine/machine.json, *.gate ...  as the machine's runner wrote it last
    benchmarks.json                   the union; of two entries the one that a newer commit gave

The journal stays on its machine: it is that machine's, large, and a database.
"""

import base64
import contextlib
import json
import os
import random
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from projecta.regress.errors import cannot
from projecta.regress.project.config import Project
from projecta.regress.project.git import run_git
from projecta.regress.store.doctor import QUARANTINE
from projecta.regress.store.export import merge_results
from projecta.regress.store.results import list_commits

BRANCH, REMOTE = "results", "origin"
TOKEN = "PROJECTA_TOKEN"  # variable with what proves to a remote who pushes; git has it by no argument
BENCHMARKS, AGES = "benchmarks.json", "benchmarks.ages"  # asv's; and of which time each of its entries is
KINDS = (".json", ".gate", ".noise", ".preflight", ".state")
ATTEMPTS, LONGEST = 10, 10.0  # pushes; seconds between two
_AUTHOR = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "benchmark results"), ("EMAIL", "results@localhost"))
}


class Remote:
    """A branch of a remote, by the remote's name in the project or by its address."""

    def __init__(self, root: Path, name: str = REMOTE, branch: str = BRANCH):
        known = subprocess.run(
            ["git", "-C", str(root), "remote", "get-url", "--", name], capture_output=True, text=True
        )
        address = known.stdout.strip() if known.returncode == 0 else name
        self.address = str((root / address).resolve()) if (root / address).exists() else address
        self.reference = f"refs/heads/{branch}"
        self.variables = _variables(self.address)

    def git(self, folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
        own = ["git", "-c", "core.hooksPath=/dev/null", "-c", "core.autocrlf=false", "-C", str(folder)]
        return subprocess.run([*own, *words], capture_output=True, text=True, env=self.variables)

    def must(self, folder: Path, *words: str) -> str:
        done = self.git(folder, *words)
        if done.returncode:
            cannot(f"run git {words[0]} on the branch of results", _reason(done))
        return done.stdout.strip()

    def checkout(self, folder: Path) -> str:
        """Put the branch's files into an empty folder; its commit, or "" if there is no such branch."""
        self.must(folder, "init", "--quiet", "--template=")
        asked = self.git(folder, "ls-remote", "--exit-code", "--", self.address, self.reference)
        if asked.returncode == 2:
            return ""
        if asked.returncode:
            cannot("reach the remote", _reason(asked), f"Check its address, and the token in {TOKEN}.")
        self.must(folder, "fetch", "--quiet", "--depth=1", "--", self.address, self.reference)
        self.must(folder, "checkout", "--quiet", "--detach", "FETCH_HEAD")
        return self.must(folder, "rev-parse", "HEAD")

    def commit(self, folder: Path, parent: str, message: str) -> str:
        """Commit all files there; the parent if nothing differs from it."""
        self.must(folder, "add", "--all", "--force")
        tree = self.must(folder, "write-tree")
        if parent and tree == self.must(folder, "rev-parse", f"{parent}^{{tree}}"):
            return parent
        return self.must(folder, "commit-tree", tree, *(("-p", parent) if parent else ()), "-m", message)

    def push(self, folder: Path, commit: str) -> str:
        """Push a commit; "", or why another one was there first."""
        done = self.git(folder, "push", "--porcelain", "--", self.address, f"{commit}:{self.reference}")
        refused = [line for line in done.stdout.splitlines() if line.startswith("!")]
        if done.returncode and not refused:
            cannot("push the results", _reason(done))
        return " ".join(refused[0].split()[2:]) if done.returncode else ""


def push(
    project: Project, sources: Sequence[tuple[Path, str | None]], remote: Remote,
    pause: Callable[[float], None] = time.sleep,
) -> tuple[str, int]:  # fmt: skip
    """Push results of machines; return the branch's commit, and how many files of the sources it holds.

    Args:
        sources: folders as asv lays them out, each with the one machine whose results are taken; None: all.
        pause: waits some seconds before another attempt.

    Raises:
        ValueError: the remote refuses, or always another was first; or, when all else is pushed, files
            that are no JSON.
    """
    age = int(run_git(project.repository, "log", "-1", "--format=%ct", "HEAD"))
    refused = ""
    for attempt in range(ATTEMPTS):
        with tempfile.TemporaryDirectory(prefix="projecta-", ignore_cleanup_errors=True) as temporary:
            place = Path(temporary)
            parent = remote.checkout(place)
            taken: list[Path] = []
            damaged: list[Path] = []
            for folder, machine in sources:
                for path in _files(folder, machine):
                    (taken if _bring(folder / path, place / path, _ours) else damaged).append(folder / path)
                if taken and not _bring_benchmarks(folder / BENCHMARKS, place, age):
                    damaged.append(folder / BENCHMARKS)
            names = sorted({path.parent.name for path in taken})
            commit = remote.commit(place, parent, f"{', '.join(names)}: results") if taken else parent
            refused = "" if commit == parent else remote.push(place, commit)
        if not refused:
            if damaged:
                what = ", ".join(map(str, damaged))
                cannot("push all results", f"{what} holds no JSON", "All others are pushed.")
            return commit, len(taken)
        pause(random.uniform(0, min(LONGEST, 0.5 * 2**attempt)))
    cannot("push the results", f"{ATTEMPTS} pushes were refused: {refused}", "Run it again.")


def pull(project: Project, machine: str, remote: Remote) -> list[Path]:
    """Bring what the branch holds into the results folder; return the files that changed.

    Of this machine's results those that lie here already are the newer ones. No branch: a first run.
    """
    changed = []
    with tempfile.TemporaryDirectory(prefix="projecta-", ignore_cleanup_errors=True) as temporary:
        place = Path(temporary)
        if not remote.checkout(place):
            return []
        for path in _files(place, None):
            choose = _theirs if path.parent.name == machine else _ours
            target = project.results / path
            before = _bytes(target)
            if _bring(place / path, target, choose) and _bytes(target) != before:
                changed.append(target)
        known, found = (_table(folder / BENCHMARKS) for folder in (project.results, place))
        if found and known | found != known:
            _write(project.results / BENCHMARKS, _text(known | found))
            changed.append(project.results / BENCHMARKS)
    return changed


def base_of(project: Project, machine: str) -> str:
    """What a gate of HEAD compares with: the newest commit before it, along first parents, that the machine
    has measured; if it has none, the commit before HEAD, or HEAD if that is the first."""
    line = run_git(project.repository, "rev-list", "--first-parent", "HEAD").splitlines()
    measured = list_commits(project, machine)
    return next((commit for commit in line[1:] if commit[:8] in measured), line[min(1, len(line) - 1)])


def _files(folder: Path, machine: str | None) -> Iterator[Path]:
    """Files of a results folder that the branch keeps, as relative paths; links are not followed."""
    for place in sorted(folder.iterdir()) if folder.is_dir() else ():
        wanted = re.fullmatch(r"\w[\w.-]*", place.name) and place.name != QUARANTINE
        if not wanted or machine not in (None, place.name) or place.is_symlink():
            continue
        if (place / "machine.json").is_file():
            for path in sorted(place.iterdir()):
                whole = path.suffix in KINDS and not path.name.startswith(".")
                if whole and path.is_file() and not path.is_symlink():
                    yield path.relative_to(folder)


def _ours(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Merge two asv files: our values, and values that only theirs has."""
    same = all(theirs.get(key) == ours.get(key) for key in ("commit_hash", "env_name"))
    if not same or not isinstance(theirs.get("results"), dict) or not isinstance(ours.get("results"), dict):
        return ours
    return merge_results(theirs, ours)


def _theirs(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    return _ours(ours, theirs)


def _bring(
    source: Path, target: Path, choose: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
) -> bool:
    """Merge a file into another, or copy it as it is; False if it is no JSON, which nobody could read."""
    data, before = _bytes(source), _bytes(target)
    new, old = _parsed(data), _parsed(before)
    if new is None:
        return False
    if old is None or old == new:
        _write(target, data if old is None else before)
        return True
    chosen = choose(old, new)
    _write(target, data if chosen == new else before if chosen == old else _text(chosen))
    return True


def _bring_benchmarks(source: Path, place: Path, age: int) -> bool:
    """Merge descriptions of benchmarks, of a commit of that age, into those of the branch."""
    new = _table(source)
    if not new:
        return not source.exists()
    known, ages = _table(place / BENCHMARKS), _table(place / AGES)
    for name, entry in new.items():
        if name not in known or age >= ages.get(name, 0):
            known[name], ages[name] = entry, age
    _write(place / BENCHMARKS, _text(known))
    _write(place / AGES, _text(ages))
    return True


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() and not path.is_symlink() else b""


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(data.decode("utf-8"))
    except ValueError:  # a UnicodeDecodeError is one
        return None
    return found if isinstance(found, dict) else None


def _table(path: Path) -> dict[str, Any]:
    return _parsed(_bytes(path)) or {}


def _text(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=1, sort_keys=True) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    """Write a file atomically; `projecta doctor` finds leftovers in the folder."""
    if _bytes(path) == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    root = path.parent if path.name in (BENCHMARKS, AGES) else path.parent.parent
    with tempfile.TemporaryDirectory(dir=root, prefix=".writing-") as temporary:
        fresh = Path(temporary, path.name)
        fresh.write_bytes(data)
        fresh.replace(path)


def _variables(address: str) -> dict[str, str]:
    """git's environment: no prompts, and the token is sent to that address alone."""
    own = os.environ | _AUTHOR | {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        own.pop(name, None)
    token = own.pop(TOKEN, "")
    if token and address.startswith("https://"):
        count = 0
        with contextlib.suppress(ValueError):
            count = int(own.get("GIT_CONFIG_COUNT", "0"))
        secret = base64.b64encode(f"x-access-token:{token}".encode()).decode()
        own |= {
            "GIT_CONFIG_COUNT": str(count + 1),
            f"GIT_CONFIG_KEY_{count}": f"http.{address}.extraHeader",
            f"GIT_CONFIG_VALUE_{count}": f"Authorization: Basic {secret}",
        }
    return own


def _reason(done: "subprocess.CompletedProcess[str]") -> str:
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no reason given"]
    return lines[0].removeprefix("fatal: ").removeprefix("error: ").rstrip(".")
