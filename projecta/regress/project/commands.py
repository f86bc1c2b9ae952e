"""Projects of repositories without asv: whole commands, or tests that use pytest-benchmark's fixture.

Each commit is checked out into a folder of its own, built there once, and run there. For commands a generated
suite gives the time, and the peak memory of the process and its children. Tests are those of the working
tree, as asv's suites are.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from projecta._checks import fail
from projecta.regress.errors import UsageError
from projecta.regress.project.config import Project, find_top

TREE = "PROJECTA_TREE"  # the environment variable that names a commit's folder
_SUITE = '''"""Whole commands. Written by `projecta gate --command`."""

import os
import subprocess
import sys

COMMANDS = {commands!r}
# A small process starts the command and reads its peak, which would begin at that of a large one.
PEAK = """
import os, sys
child = os.fork()
if not child:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.execvp("sh", ["sh", "-c", sys.argv[1]])
_, status, used = os.wait4(child, 0)
print(used.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def run(words):
    done = subprocess.run(words, cwd=os.environ["{tree}"], capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it printed no reason"]
        raise RuntimeError(f"exit code {{done.returncode}}: {{lines[-1][:300]}}")
    return done.stdout


class Command:
    params = COMMANDS
    param_names = ("command",)
    number = 1
    repeat = (1, 10, 4.0)
    warmup_time = 0.0
    timeout = {timeout}
    version = "1"
    unit = "MiB"

    def time_command(self, command):
        run(["sh", "-c", command])

    def track_peak_memory(self, command):
        kib = int(run([sys.executable, "-I", "-S", "-c", PEAK, command]).splitlines()[-1])
        return kib / (2**20 if sys.platform == "darwin" else 1024)
'''


class TreeProject(Project):
    """The repository at `top`, run in its commits' files; `build` makes a commit ready."""

    def __init__(self, top: Path, name: str, build: str | None, suites: Mapping[str, str]):
        folder = top / ".asv" / name
        (folder / "suites").mkdir(parents=True, exist_ok=True)
        (folder / ".gitignore").write_text("*\n")
        for file, text in {"__init__.py": "", **suites}.items():
            (folder / "suites" / file).write_text(text)
        branch = subprocess.run(
            ["git", "-C", str(top), "rev-parse", "--abbrev-ref", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
        settings = {
            "version": 1, "project": top.name, "repo": str(top), "branches": [branch or "HEAD"],
            "environment_type": "existing", "pythons": [sys.executable], "benchmark_dir": "suites",
            "env_dir": "env", "results_dir": "results", "html_dir": "html",
        }  # fmt: skip
        (folder / "asv.conf.json").write_text(json.dumps(settings, indent=1))
        super().__init__(folder)
        self.top, self._build = top, build

    def prepare(self, tree: Path) -> str:
        """Build a commit's folder, unless that was done; return the reason if it fails."""
        if self._build is None:
            return ""
        mark = tree.with_name(f"{tree.name}.{hashlib.sha256(self._build.encode()).hexdigest()[:12]}")
        if mark.exists():
            return ""
        done = subprocess.run(["sh", "-c", self._build], cwd=tree, capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["it printed no reason"]
            return f"`{self._build}` ended with {done.returncode}: {lines[-1][:300]}"
        mark.touch()
        return ""


class TestsProject(TreeProject):
    """The project of the tests at some paths of a repository."""

    __test__ = False  # not pytest's to collect

    def __init__(self, top: Path, paths: Sequence[Path], build: str | None, timeout: float):
        super().__init__(top, "pytest", build, {})
        self.tests = tuple(path.resolve().relative_to(top.resolve()) for path in paths)
        self.timeout = timeout

    def prepare(self, tree: Path) -> str:
        """Put the working tree's tests in the place of the commit's, and build it."""
        for path in self.tests:
            source, target = self.top / path, tree / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, target)
        return super().prepare(tree)


def command_project(folder: Path, commands: Sequence[str], build: str | None, timeout: float) -> Project:
    """The project of commands of the git repository around `folder`."""
    top = find_top(folder, "find the repository")
    suite = _SUITE.format(commands=list(commands), tree=TREE, timeout=timeout)
    return TreeProject(top, "commands", build, {"commands.py": suite})


def tests_project(folder: Path, paths: Sequence[Path], build: str | None, timeout: float) -> Project:
    """The project of the tests at `paths`, in the git repository around `folder`."""
    top = find_top(folder, "find the repository").resolve()
    for path in paths:
        if not path.resolve().is_relative_to(top) or path.resolve() == top:
            rule = "be a file or folder of tests below the repository's top"
            fail("projecta gate", "--pytest", rule, str(path), error=UsageError)
    return TestsProject(top, paths, build, timeout)
