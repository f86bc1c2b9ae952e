"""A small asv project for the tests of `regress`. It does not depend on projecta."""

import atexit
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import venv
from pathlib import Path

import asv_runner
from click.testing import CliRunner

from projecta.regress.cli import cli

# Seconds that a process sleeps. They tell it from processes of tests that run beside this one.
FOREVER = f"4243.{os.getpid():08d}"

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

FAULTS = """
    import ctypes, os, resource, signal, subprocess, sys, time

    class Faults:
        version = "1"
        timeout = 20
        number, repeat, rounds, warmup_time = 1, 1, 1, 0.0

        def track_good(self):
            return 1.5

        def track_raises(self):
            raise KeyError("planted")

        def track_segfaults(self):
            ctypes.string_at(0)

        def track_memory_is_short(self):
            resource.setrlimit(resource.RLIMIT_AS, (2**28, 2**28))
            return len(bytearray(2**30))

        def track_is_killed(self):
            os.kill(os.getpid(), signal.SIGKILL)

        def track_hangs_while_printing(self):
            subprocess.Popen(["sleep", "FOREVER"])
            while True:
                print("still here", flush=True)
                time.sleep(0.01)
        track_hangs_while_printing.timeout = 1

        def track_inf(self):
            return float("inf")

        def track_nan(self):
            return float("nan")

        def track_none(self):
            return None

        def track_text(self):
            return "much"

        def track_garbage(self):
            os.write(1, bytes(range(256)) * 100)
            sys.stdout.write("{not json")
            return 2.5

        def track_exits(self):
            os._exit(3)

    class Skips:
        version = "1"
        def setup(self):
            raise NotImplementedError("no such device")
        def time_it(self):
            pass

    class Cached:
        version = "1"
        def setup_cache(self):
            return 7
        def track_cached(self, seven):
            return seven
""".replace("FOREVER", FOREVER)
ENDINGS = {
    "good": ("ok", ""), "raises": ("failed", "KeyError: 'planted' (suite.py:13)"),
    "segfaults": ("crashed", "ended by SIGSEGV"), "memory_is_short": ("out of memory", "MemoryError (suite.py:20)"),
    "is_killed": ("out of memory", "ended by SIGKILL, as the kernel does when memory runs out"),
    "hangs_while_printing": ("timed out", "took longer than its timeout of 1 s"),
    "inf": ("bad result", "gave 'inf', not a finite number"), "nan": ("skipped", "gave nan"),
    "none": ("bad result", "gave 'None', not a finite number"),
    "text": ("bad result", "gave 'much', not a finite number"), "garbage": ("ok", ""),
    "exits": ("failed", "exit status 3"), "it": ("skipped", "no such device"), "cached": ("ok", ""),
}  # fmt: skip


def git(folder, *words):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *words], check=True, capture_output=True, text=True
    ).stdout


def commit(folder, message, **files):
    """Commit files, which are named without .py; return the hash."""
    for name, text in files.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    (folder / "file").write_text(message)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", message)
    return git(folder, "rev-parse", "HEAD").strip()


@functools.cache
def small_python():
    """A Python with asv's runner alone: it starts in a quarter of the time of the tests' own."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    venv.create(folder, symlinks=True, with_pip=False)
    room = sysconfig.get_path("purelib", "venv", {"base": folder, "platbase": folder})
    for path in Path(asv_runner.__file__).parents[1].glob("asv_runner*"):
        Path(room, path.name).symlink_to(path)
    return str(Path(folder, "bin/python"))


def make(folder, suite=SUITE, **settings):
    """Create the project without a commit. Its benchmarks run in `small_python`."""
    config = {
        "version": 1, "project": "foreign", "repo": ".", "branches": ["HEAD"],
        "environment_type": f"existing:{small_python()}",
        "results_dir": ".asv/results", "html_dir": ".asv/html", "env_dir": ".asv/env", **settings,
    }  # fmt: skip
    (folder / "asv.conf.json").write_text(json.dumps(config))
    (folder / "benchmarks").mkdir()
    (folder / "benchmarks/__init__.py").write_text("")
    (folder / "benchmarks/suite.py").write_text(textwrap.dedent(suite))
    (folder / ".gitignore").write_text(".asv\n__pycache__\n")
    git(folder, "init", "--quiet", "--initial-branch", "main")
    (folder / ".asv").mkdir()


def configure(folder, **settings):
    """Change settings of the project."""
    path = folder / "asv.conf.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def make_history(folder, commits, benchmarks, value, machine="desk", conditions=lambda i: {}):
    """Write asv results for a linear history without running anything; return the commits, oldest first.

    benchmarks: {name: parameters of each axis}. value(name, index of the combination, index of the commit).
    """
    text = []
    for i in range(commits):
        text.append(
            f"commit refs/heads/main\nmark :{i + 1}\ncommitter t <t@example.org> {1_700_000_000 + 86_400 * i} +0000\n"
            f"data 1\nx\n"
            + (f"from :{i}\n" if i else "from refs/heads/main^0\n")
            + f"M 644 inline file\ndata {len(str(i))}\n{i}\n"
        )
    subprocess.run(
        ["git", "-C", str(folder), "fast-import", "--quiet", "--force"],
        input="\n".join(text),
        text=True,
        check=True,
    )
    git(folder, "reset", "--quiet", "--hard", "main")
    made = git(folder, "rev-list", f"--max-count={commits}", "HEAD").split()[::-1]
    room = folder / ".asv/results" / machine
    room.mkdir(parents=True, exist_ok=True)
    (room / "machine.json").write_text(
        json.dumps({"machine": machine, "cpu": "a processor", "ram": "16 GiB", "os": "Linux", "version": 1})
    )
    described = {
        name: {
            "name": name, "params": [list(map(repr, axis)) for axis in axes], "type": "time", "unit": "seconds",
            "param_names": [f"p{i}" for i in range(len(axes))], "version": "1", "code": "", "number": 1, "timeout": 60,
            "rounds": 1, "repeat": 1, "min_run_count": 1, "sample_time": 0.01, "warmup_time": 0,
        }
        for name, axes in benchmarks.items()
    }  # fmt: skip
    (folder / ".asv/results/benchmarks.json").write_text(json.dumps(described | {"version": 2}))
    for i, commit_hash in enumerate(made):
        params = {"machine": machine, "cpu": "a processor", "python": "3.11"} | conditions(i)
        results = {
            name: [
                [value(name, k, i) for k, _ in enumerate(itertools.product(*entry["params"]))], entry["params"], "1",
            ]
            for name, entry in described.items()
        }  # fmt: skip
        (room / f"{commit_hash[:8]}-env.json").write_text(json.dumps({
            "commit_hash": commit_hash, "env_name": "env", "date": 1_700_000_000_000 + 86_400_000 * i, "params": params,
            "python": "3.11", "requirements": {}, "env_vars": {}, "result_columns": ["result", "params", "version"],
            "results": results, "durations": {}, "version": 2,
        }))  # fmt: skip
    return made


def run(*words):
    """Run the command in this process; return exit code and output."""
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    return result.exit_code, result.output


# Like `python -m projecta` in a terminal. The environment of the tests may ignore these signals.
COMMAND = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
runpy.run_module("projecta", run_name="__main__", alter_sys=True)
"""
# A parent process that starts the command and waits.
PARENT = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"


def start(folder, *words, parent=False, **options):
    """Start the command in a new process. With `parent`, return a parent process that starts it."""
    own = [*(("-c", PARENT) if parent else ()), "-c", COMMAND]
    return subprocess.Popen(
        [sys.executable, *own, *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}, **options,
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
