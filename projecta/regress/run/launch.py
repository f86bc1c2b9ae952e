"""Starts worker processes, sends them orders and reads outcomes.

`worker.py` runs in the environment that asv built, with asv's own benchmark code. A timeout here counts wall
time, whatever the benchmark prints. The whole process group ends with the worker, even if this process is
killed. Every ending has a status and a reason.
"""

import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from projecta.regress.run.build import WORKER, Build
from projecta.regress.run.case import (
    FAILED,
    TIMED_OUT,
    Case,
    Outcome,
    asv_name,
    outcome_of,
    tail_of,
    too_long,
)
from projecta.regress.run.group import Guard, end_group
from projecta.regress.run.worker import CHECKED, TRACE


class Worker:
    """A process that runs a build's benchmarks; a new one is started when asked for, or when it has ended.

    Args:
        build: the commit, installed.
        settings: asv's attributes of a timing (number, repeat...) that replace each benchmark's own.
    """

    def __init__(self, build: Build, settings: Mapping[str, Any] = MappingProxyType({})):
        self.build, self.settings = build, dict(settings)
        self.guard = Guard()
        self._process: subprocess.Popen[bytes] | None = None
        self._trace, self._checked, self._used = False, False, False
        self._folder = Path()  # of the process: what it prints, and a folder for each order
        self._caches: dict[str, tempfile.TemporaryDirectory[str]] = {}
        self._failed_caches: dict[str, Outcome] = {}  # a setup_cache that failed is not tried again

    def run(self, case: Case) -> Outcome:
        """Run a benchmark as asv does; return what it gave."""
        return self.begin(case, paired=False) or self.outcome()

    def prepare(self) -> None:
        """Have a process that waits for an order; without fork each order takes a new process."""
        if self._process is None or self._process.poll() is not None or self._used:
            self.restart(self._trace, self._checked)

    def begin(self, case: Case, paired: bool) -> Outcome | None:
        """Send the order to run a benchmark; return why it cannot run, if so."""
        missing = self.set_up_cache(case)
        if missing is not None:
            return missing
        self._expect(case)
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        self._result = folder / "result.json"
        cwd = str(folder) if case.cache is None else self._caches[case.cache].name
        order = {"name": asv_name(case), "paired": paired, "settings": self.settings}
        self._send(order | {"cwd": cwd, "result": str(self._result)})
        return None

    def ready(self) -> Outcome | None:
        """Wait until a paired benchmark has set up; return its outcome if it ended instead."""
        return self._wait_for("ready")

    def warm_up(self) -> Outcome | None:
        """Have a paired benchmark warm up; return its outcome if it ended instead."""
        self._send({"warm": True})
        return self._wait_for("warm")

    def sample(self, seconds: float) -> Outcome | None:
        """Have a paired benchmark take samples for so long; return its outcome if it ended instead."""
        self._send({"seconds": seconds})
        return self._wait_for("sampled")

    def finish(self) -> Outcome:
        """Have a paired benchmark take no more samples; return what it gave."""
        self._send({"seconds": 0})
        return self.outcome()

    def outcome(self) -> Outcome:
        """Wait until the benchmark has ended; return what it gave."""
        found = self._wait_for("")
        assert found is not None
        return found

    def read_files(self) -> set[str] | None:
        """The files that the benchmark before has read; None if that is unknown."""
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self._result.with_name(self._result.name + ".files").read_text())
            return None if found is None else set(found)
        return None

    def restart(self, trace: bool = False, checked: bool = False) -> None:
        """End the process, and start another; with `trace` it notes the files that each benchmark reads.

        `checked` tells the benchmarks that an earlier process has checked their results.
        """
        self.end()
        self._trace, self._checked, self._used = trace, checked, False
        self._folder = Path(tempfile.mkdtemp(prefix="projecta-"))
        own, other = socket.socketpair()
        with (self._folder / "printed").open("wb") as out, other:
            words = [self.build.python, str(WORKER), str(other.fileno()), *self.build.worker_arguments]
            variables = self.build.variables | {
                name: "1" for name, wanted in ((TRACE, trace), (CHECKED, checked)) if wanted
            }
            self._process = self.guard.start(words, out, self._folder, variables, [other.fileno()])
        self._socket, self._incoming, self._outgoing = own, own.makefile("r"), own.makefile("w")

    def end(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            end_group(self._process, patience=0)
            self._process = None
            for end in (self._incoming, self._outgoing, self._socket):
                with contextlib.suppress(OSError):
                    end.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        """End the process and what it has started, and delete the caches."""
        self.end()
        self.guard.close()
        for folder in self._caches.values():
            folder.cleanup()
        self._caches.clear()

    def set_up_cache(self, case: Case) -> Outcome | None:
        """Run the setup_cache that a benchmark needs, once; return why it could not."""
        if case.cache is None or case.cache in self._caches:
            return None
        if case.cache in self._failed_caches:
            return self._failed_caches[case.cache]
        folder = tempfile.TemporaryDirectory(prefix="projecta-", ignore_cleanup_errors=True)
        limit = case.cache_timeout or case.timeout
        self._expect(case)
        self._send({"cache": asv_name(case), "cwd": folder.name})
        code = self._ended(limit)
        if code == 0:
            self._caches[case.cache] = folder
            return None
        printed = tail_of(self._folder / "printed", self._mark)
        reason = too_long(limit) if code is None else outcome_of(case, code, printed, Path(), 0.0).reason
        if code is None:
            self.end()
        folder.cleanup()
        found = Outcome(TIMED_OUT if code is None else FAILED, reason=f"setup_cache: {reason}")
        self._failed_caches[case.cache] = found
        return found

    def _expect(self, case: Case) -> None:
        """Note what the next order is, and have a process for it."""
        self._case, self._began = case, time.monotonic()
        self.prepare()
        self._used = not self.build.forks
        self._mark = (self._folder / "printed").stat().st_size

    def _send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it has ended: reading shows why
            self._outgoing.write(json.dumps(message) + "\n")
            self._outgoing.flush()

    def _wait_for(self, answer: str) -> Outcome | None:
        """None when the worker gives the answer within the case's timeout; the outcome if the case ends."""
        message = self._receive(self._case.timeout)
        if answer in message:
            return None
        code, printed = message.get("ended"), tail_of(self._folder / "printed", self._mark)
        found = outcome_of(self._case, code, printed, self._result, time.monotonic() - self._began)
        if code is None:
            self.end()
        return found

    def _ended(self, limit: float) -> int | None:
        """The exit status of an order, or None if it took too long."""
        code: int | None = self._receive(limit).get("ended")
        return code

    def _receive(self, limit: float) -> dict[str, Any]:
        """The next message; {"ended": status} if the process has ended, with None for a timeout."""
        assert self._process is not None
        self._socket.settimeout(min(limit, 1e6))  # more is not known to sockets
        line = ""
        try:
            with contextlib.suppress(ConnectionError):  # as if it had closed its end
                line = self._incoming.readline()
            found: dict[str, Any] = json.loads(line) if line else {"ended": self._process.wait(limit)}
        except (TimeoutError, subprocess.TimeoutExpired):
            return {
                "ended": self._process.poll()
            }  # it may have ended, and left a process that has its socket
        return found
