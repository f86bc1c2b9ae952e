"""An asv project that is not ours, for the tests of `regress`: it knows nothing of projecta."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from click.testing import CliRunner

from projecta.regress.cli import cli

SUITE = """
    class Sleep:
        params = ([1, 2], ["a", "b"])
        param_names = ["n", "word"]
        version = "1"
        number, repeat, rounds, warmup_time = 1, 1, 1, 0.0

        def time_sleep(self, n, word):
            import time
            time.sleep(0.01 * n)

        def track_size(self, n, word):
            if word == "b" and n == 2:
                raise RuntimeError("planted failure")
            return n
        track_size.unit = "MiB"
"""


def git(folder, *words):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *words], check=True, capture_output=True, text=True
    ).stdout


def commit(folder, message, **files):
    """A commit that writes files, named without .py."""
    for name, text in files.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    (folder / "file").write_text(message)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", message)
    return git(folder, "rev-parse", "HEAD").strip()


def make(folder, suite=SUITE, **settings):
    """The project, without a commit yet; benchmarks run in the interpreter at hand."""
    config = {
        "version": 1, "project": "foreign", "repo": ".", "branches": ["HEAD"], "environment_type": "existing",
        "results_dir": ".asv/results", "html_dir": ".asv/html", "env_dir": ".asv/env", **settings,
    }  # fmt: skip
    (folder / "asv.conf.json").write_text(json.dumps(config))
    (folder / "benchmarks").mkdir()
    (folder / "benchmarks/__init__.py").write_text("")
    (folder / "benchmarks/suite.py").write_text(textwrap.dedent(suite))
    (folder / ".gitignore").write_text(".asv\n__pycache__\n")
    git(folder, "init", "--quiet", "--initial-branch", "main")
    (folder / ".asv").mkdir()


def run(*words):
    """The command, in this process: exit code and output."""
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    return result.exit_code, result.output


def start(folder, *words, **options):
    """The command, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "projecta", *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}, **options,
    )  # fmt: skip


def running(mark):
    """Command lines of processes that hold `mark`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes()
        except OSError:
            continue
        if mark.encode() in text:
            found.append(text.replace(b"\0", b" ").decode(errors="replace"))
    return found
