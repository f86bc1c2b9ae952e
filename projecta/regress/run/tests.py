"""Builds a commit whose benchmarks are tests that use pytest-benchmark's fixture."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from projecta.regress.errors import cannot
from projecta.regress.project.commands import TestsProject
from projecta.regress.run.build import WORKER, Build, BuildFailed, imported, worktree
from projecta.regress.run.case import last_words


class TestsBuild(Build):
    """A commit's files with the working tree's tests, run by the interpreter that exists."""

    project: TestsProject

    def __init__(self, project: TestsProject, commit: str, slot: str = "", which: int = 0):
        super().__init__(project, commit, slot, which)
        self.complete = not slot  # head: each of its files must be importable. Base may lack what is new.

    @property
    def tree(self) -> Path:
        return worktree(self.project, self.commit).resolve()

    @property
    def forks(self) -> bool:
        return True

    @property
    def worker_arguments(self) -> list[str]:
        return ["pytest", str(self.tree), *map(str, self.project.tests)]

    def imports(self) -> set[str]:
        places = [self.project.top / path for path in self.project.tests]
        return imported(f for p in places for f in (p.rglob("*.py") if p.is_dir() else [p]))

    def benchmarks(self) -> dict[str, dict[str, Any]]:
        """Descriptions of the tests, as asv's of benchmarks.

        Raises:
            UsageError: pytest or pytest-benchmark is missing.
            BuildFailed: the tests cannot be collected.
        """
        words = [self.python, str(WORKER), "-", *self.worker_arguments]
        done = subprocess.run(words, capture_output=True, text=True, env=self.variables, cwd=self.tree)
        short = self.commit[:8]
        missing = re.search(r"No module named '(pytest\w*)'", done.stderr)
        if missing:
            package = missing[1].replace("_", "-")
            remedy = f"Install it with {self.python} -m pip install {package}."
            cannot("collect the tests", f"{self.python} has no {package}", remedy)
        if done.returncode:
            words = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
            reason = words[0][7:] if words else last_words(done.stderr + done.stdout)
            raise BuildFailed(f"{short}: its tests cannot be collected by {self.python}: {reason}")
        found = json.loads(done.stdout.splitlines()[-1])
        if found["broken"] and (self.complete or not found["tests"]):
            raise BuildFailed(f"{short}: a test file cannot be collected: {found['broken']}")
        usual = {"type": "time", "unit": "seconds", "params": [], "timeout": self.project.timeout}
        return {name: usual | {"version": version} for name, version in found["tests"].items()}
