"""Has asv measure commits, and shows how far it is: asv runs, stores and publishes."""

import codecs
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from projecta._checks import Checker, fail

ENTIRE_SUITES = (
    r"^(?!\w+\.Full)"  # suites named Full... skip unless PROJECTA_FULL=1: a skip must not pass for a result
)
_STEP = re.compile(r"^\[\s*([\d.]+)%\]\s+·+\s*(.*)$")


def git(folder: Path, *words: str) -> str:
    """Output of a git command; ValueError with git's reason if it fails."""
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["unknown reason"])[0].removeprefix("fatal: ")
        fail("projecta", f"git {words[0]}", "succeed", reason)
    return done.stdout.rstrip()


def find_root(folder: Path) -> Path:
    """The top of the git repository around `folder`."""
    check = Checker("projecta")
    done = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "--show-toplevel"], capture_output=True, text=True
    )
    check.that(done.returncode == 0, "the current folder", "be inside a git repository", str(folder))
    return Path(done.stdout.strip())


def find_commits(root: Path, revisions: str | None) -> list[str]:
    """Hashes of the commits to measure, newest first.

    None is HEAD and the commit before it; `A..B` the commits of a range along first parents; `NEW` those of
    the current branch without results (asv decides: an empty list); anything else one commit.
    """
    check = Checker("projecta bench")
    if revisions is None:
        return git(root, "rev-list", "--first-parent", "--max-count=2", "HEAD").splitlines()
    if revisions == "NEW":
        return []
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


def measure(
    root: Path, machine: str, commits: Iterable[str], regex: str | None, quick: bool, console: Console
) -> int:
    """Measure what the commits lack; return asv's exit code (0: all ran, 2: some benchmark failed).

    What has a result is not measured again. `quick` runs everything once and stores nothing.
    """
    subprocess.run(
        asv(root, "machine", "--yes", "--machine", machine), check=True, capture_output=True, cwd=root
    )
    wanted = regex or ("." if os.environ.get("PROJECTA_FULL") == "1" else ENTIRE_SUITES)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        commits = list(commits)
        file.write("\n".join(commits))
        file.flush()
        spec = f"HASHFILE:{file.name}" if commits else "NEW"
        words = ["run", spec, "--machine", machine, "--bench", wanted, "--show-stderr"]
        words += ["--quick", "--dry-run"] if quick else ["--skip-existing-successful"]
        return _follow(asv(root, *words), root, console)


def publish(root: Path) -> None:
    """Have asv write its pages; ValueError with its last line if it cannot."""
    done = subprocess.run(asv(root, "publish"), cwd=root, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
        fail("projecta publish", "asv publish", "succeed", lines[-1])


def _follow(command: list[str], root: Path, console: Console) -> int:
    """Run asv and turn its lines into a progress display. An interrupt ends asv and what it started."""
    process = subprocess.Popen(
        command, cwd=root, env=os.environ | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with Progress(
            BarColumn(bar_width=24), TextColumn("{task.percentage:3.0f}%"), TextColumn("{task.description}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=True),
            console=console, disable=not console.is_terminal, transient=True,
        ) as progress:  # fmt: skip
            _show(process, progress, console)
        return process.wait()
    finally:
        signal.signal(signal.SIGTERM, previous)
        _end(process)
        if process.stdout:
            process.stdout.close()


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _show(process: subprocess.Popen[bytes], progress: Progress, console: Console) -> None:
    """A bar that names what is running; a line per finished benchmark; asv's words where one failed."""
    task = progress.add_task("starting", total=100.0)
    started, detail, failed = time.monotonic(), list[str](), False
    for line, complete in _read_lines(process):
        step = _STEP.match(line)
        if step:
            words = step[2].strip()
            name = words.removeprefix("Running (").split()[0].removesuffix("--).") if words else "running"
            progress.update(task, completed=float(step[1]), description=name)
        if not complete:
            continue
        if step is None or words.startswith(
            "="
        ):  # part of a result's table, of an error, or of the preparation
            detail.append(line.rstrip())
            if line.startswith("·"):
                progress.update(task, description=line.strip("· "))
                _say(progress, console, line.strip("· "))
            continue
        if failed:
            console.print("\n".join(detail), markup=False, highlight=False)
        detail, failed = [], words.endswith("failed")
        _say(progress, console, f"{_pace(float(step[1]), time.monotonic() - started)}  {words}")
    if failed or process.wait() not in (0, 2):
        console.print("\n".join(detail), markup=False, highlight=False)


def _read_lines(process: subprocess.Popen[bytes]) -> Iterator[tuple[str, bool]]:
    """What asv prints, line by line; (line, False) while asv is still writing it, as it names what runs."""
    assert process.stdout is not None
    decoder, pending = codecs.getincrementaldecoder("utf-8")("replace"), ""
    while chunk := os.read(process.stdout.fileno(), 65536):
        *done, pending = (pending + decoder.decode(chunk)).split("\n")
        yield from ((line, True) for line in done)
        if pending:
            yield pending, False
    if pending:
        yield pending, True


def _pace(percent: float, seconds: float) -> str:
    """How far, how long so far, how long still.

    >>> _pace(25.0, 90.0)
    ' 25 %   1:30, about   4:30 left'
    """
    left = f"about {_minutes(seconds * (100 - percent) / percent)} left" if percent >= 5 else "starting"
    return f"{percent:3.0f} % {_minutes(seconds)}, {left}"


def _say(progress: Progress, console: Console, line: str) -> None:
    """Without a terminal there is no bar: print lines instead."""
    if progress.disable:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 60):3d}:{int(seconds % 60):02d}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt asv, which ends its benchmark; kill what is left after ten seconds."""
    for number, patience in ((signal.SIGINT, 10.0), (signal.SIGTERM, 2.0), (signal.SIGKILL, None)):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
