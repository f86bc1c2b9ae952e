"""What is measured: commits, machines, benchmarks by name; and asv's commands."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from projecta._checks import Checker, fail
from projecta.regress.processes import Case


def git(folder: Path, *words: str) -> str:
    """Output of a git command; ValueError with git's reason if it fails."""
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["unknown reason"])[0].removeprefix("fatal: ")
        fail("projecta", f"git {words[0]}", "succeed", reason)
    return done.stdout.rstrip()


def find_root(folder: Path) -> Path:
    """The folder of the asv project around `folder`: the nearest with an asv.conf.json, or git's top."""
    check = Checker("projecta")
    done = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "--show-toplevel"], capture_output=True, text=True
    )
    check.that(done.returncode == 0, "the current folder", "be inside a git repository", str(folder))
    top, here = Path(done.stdout.strip()), folder.resolve()
    around = [place for place in (here, *here.parents) if place == top or top in place.parents]
    return next((place for place in around if (place / "asv.conf.json").is_file()), top)


def find_commits(root: Path, revisions: str | None, measured: Collection[str] = ()) -> list[str]:
    """Hashes of the commits to measure, newest first.

    None is HEAD and the commit before it; `A..B` the commits of a range along first parents; `NEW` those of
    the current branch since the last one that has results (HEAD if none has); anything else one commit.
    `measured` are the first eight digits of commits that have results.
    """
    check = Checker("projecta bench")
    if revisions is None:
        return git(root, "rev-list", "--first-parent", "--max-count=2", "HEAD").splitlines()
    if revisions == "NEW":
        line = git(root, "rev-list", "--first-parent", "HEAD").splitlines()
        newest = next((i for i, commit in enumerate(line) if commit[:8] in measured), None)
        return line[:1] if newest is None else line[:newest]
    words = [revisions] if ".." in revisions else ["--max-count=1", revisions]
    done = subprocess.run(
        ["git", "-C", str(root), "rev-list", "--first-parent", *words, "--"], capture_output=True, text=True
    )
    check.that(
        done.returncode == 0 and not revisions.startswith("-"),
        "RANGE",
        "name commits of this repository",
        repr(revisions),
    )
    commits = done.stdout.split()
    check.that(bool(commits), "RANGE", "hold at least one commit", repr(revisions))
    return commits


def find_commit(root: Path, revision: str) -> str:
    """The hash of one commit."""
    words = ["rev-parse", "--verify", "--quiet", "--end-of-options", revision + "^{commit}"]
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
    Checker("projecta gate").that(
        done.returncode == 0, "a revision", "name a commit of this repository", repr(revision)
    )
    return done.stdout.strip()


def pattern(regex: str) -> str:
    """The regular expression, if it is one."""
    try:
        re.compile(regex)
    except re.error as error:
        fail("projecta", "--bench", "be a regular expression", f"{regex!r}: {error}")
    return regex


def select(found: Sequence[Case], regex: str | None) -> list[Case]:
    """The cases whose label the regular expression finds."""
    wanted = re.compile(regex or "")
    return [case for case in found if wanted.search(case.label)]


def gate_pattern(root: Path) -> str | None:
    """What the project gates: `gate` of [tool.projecta] in pyproject.toml; None is everything."""
    return _setting(root, "gate")


def short_suites(root: Path) -> str | None:
    """What is measured unless PROJECTA_FULL=1: all but `long` of [tool.projecta]; None is everything.

    Those suites would skip themselves: a skip must not pass for a result.
    """
    long = _setting(root, "long")
    return None if long is None or os.environ.get("PROJECTA_FULL") == "1" else f"^(?!.*(?:{long}))"


def _setting(root: Path, name: str) -> str | None:
    """A regular expression among the project's settings."""
    import tomllib

    path = root / "pyproject.toml"
    try:
        settings = (
            tomllib.loads(path.read_text()).get("tool", {}).get("projecta", {}) if path.is_file() else {}
        )
    except tomllib.TOMLDecodeError as error:
        fail("projecta", "pyproject.toml", "be readable", str(error))
    found = settings.get(name)
    return None if found is None else pattern(found)


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM is as Ctrl-C: what runs is ended, what was measured is kept."""
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def uncommitted(root: Path) -> list[str]:
    """Files that differ from HEAD, and so are not measured; the report's own are left out."""
    lines = git(
        root, "status", "--porcelain", "--untracked-files=all", "--", ":/", ":(exclude)results"
    ).splitlines()
    return [line[3:] for line in lines]


def history(root: Path) -> list[str]:
    """Hashes of HEAD and all commits before it, newest first."""
    return git(root, "rev-list", "--topo-order", "HEAD").splitlines()


def machine_name(name: str | None) -> str:
    """The name under which results are stored: the given one, or the host's."""
    name = socket.gethostname() if name is None else name
    Checker("projecta bench").that(
        bool(re.fullmatch(r"[\w.-]+", name)), "--machine", "be letters, digits, '.', '_' or '-'", repr(name)
    )
    return name


def asv(root: Path, *words: str) -> list[str]:
    """The command line of asv in this interpreter's environment."""
    return [sys.executable, "-m", "asv", *words, "--config", str(root / "asv.conf.json")]


def know_machine(name: str) -> None:
    """Have asv note what kind of machine this is, if it has not."""
    from asv.machine import Machine, MachineCollection
    from asv.util import UserError

    try:
        known = MachineCollection.load(name)
    except UserError:
        known = {}
    facts = Machine.get_defaults() | {k: v for k, v in known.items() if v} | {"machine": name}
    if facts != known:  # `asv machine --yes` describes none but the host by its own name
        MachineCollection.save(name, facts)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
