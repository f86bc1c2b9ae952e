"""Whole commands as benchmarks: a generated asv project, for any repository with something to run.

Each commit is checked out into a folder of its own, built there once, and the commands run in it. A generated
suite gives their time and the peak memory of the process and its children.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

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


class CommandProject(Project):
    """The project of some commands of the repository at `top`; `build` makes a commit ready to run them."""

    def __init__(self, top: Path, commands: Sequence[str], build: str | None, timeout: float):
        folder = top / ".asv" / "commands"
        suites = folder / "suites"
        suites.mkdir(parents=True, exist_ok=True)
        (folder / ".gitignore").write_text("*\n")
        (suites / "__init__.py").write_text("")
        text = _SUITE.format(commands=list(commands), tree=TREE, timeout=timeout)
        (suites / "commands.py").write_text(text)
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
        self._build, self._limit = build, timeout

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


def command_project(folder: Path, commands: Sequence[str], build: str | None, timeout: float) -> Project:
    """The project of commands of the git repository around `folder`."""
    return CommandProject(find_top(folder, "find the repository"), commands, build, timeout)
