"""Measures one benchmark of two builds against each other: two processes, whose turns alternate.

On a machine that others use too, a process is slow for seconds on end, and the one that ran after it is not.
So both are alive at once, and each is given some hundredths of a second in turn (base head, base head, ...)
while the other waits: what slows one turn slows its neighbours. Every turn follows one of the other side:
what that left in the caches is the same for both. `turns.py` is what runs there.
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
from typing import Any

from projecta.regress.builds import Build
from projecta.regress.processes import Case, Outcome, asv_name, end_group, outcome_of, tail_of

TURN = 0.04  # seconds, or one sample if that takes longer
MOST, LEAST, TOTAL = 20, 4, 4.0  # turns of a side; seconds after which no more begin, but for the least
_SCRIPT = Path(__file__).with_name("turns.py")


class Side:
    """One build, and the process that has imported its suites: a new one whenever asked for, or ended."""

    def __init__(self, build: Build):
        self.build, self.launcher = build, build.launcher()
        self._process: subprocess.Popen[bytes] | None = None
        self._room = Path()

    def begin(self, case: Case) -> Outcome | None:
        """Have the case set up; why it cannot be."""
        self._case, self._began = case, time.monotonic()
        missing = self.launcher.set_up(case)
        if missing is not None:
            return missing
        if self._process is None or self._process.poll() is not None or not self.build.forks:
            self.start()
        place = Path(tempfile.mkdtemp(dir=self._room))
        self._result, self._mark = place / "result.json", (self._room / "printed").stat().st_size
        where = self.launcher.place(case, str(place))
        self._tell({"name": asv_name(case), "cwd": where, "result": str(self._result)})
        return None

    def ready(self) -> Outcome | None:
        """Wait until the case has set up and warmed up; what came of it if it ended instead."""
        return self._hear("ready")

    def turn(self) -> Outcome | None:
        """Have it take samples for the time of a turn; what came of it if it ended instead."""
        self._tell({"seconds": TURN})
        return self._hear("turn")

    def finish(self) -> Outcome:
        """Have it take no more: what it gave."""
        self._tell({"seconds": 0})
        return self.outcome()

    def outcome(self) -> Outcome:
        """Wait for the case's end: what it gave."""
        found = self._hear("")
        assert found is not None
        return found

    def start(self) -> None:
        """A new process."""
        self.end()
        self._room = Path(tempfile.mkdtemp(prefix="projecta-"))
        own, other = socket.socketpair()
        forks = str(int(self.build.forks))
        with (self._room / "printed").open("wb") as out, other:
            words = [self.build.python, str(_SCRIPT), str(self.build.folder), str(other.fileno()), forks]
            self._process = self.launcher.guard.start(
                words, out, self._room, self.build.variables, [other.fileno()]
            )
        self._socket, self._heard, self._told = own, own.makefile("r"), own.makefile("w")

    def end(self) -> None:
        if self._process is not None:
            end_group(self._process, patience=0)
            self._process = None
            for end in (self._heard, self._told, self._socket):
                with contextlib.suppress(OSError):
                    end.close()
            shutil.rmtree(self._room, ignore_errors=True)

    def close(self) -> None:
        self.end()
        self.launcher.close()

    def _tell(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it has ended: reading will tell
            self._told.write(json.dumps(message) + "\n")
            self._told.flush()

    def _hear(self, word: str) -> Outcome | None:
        """None when the process says the word, within the case's timeout; if it ends instead, the outcome."""
        assert self._process is not None
        self._socket.settimeout(self._case.timeout)
        line = ""
        try:
            with contextlib.suppress(ConnectionError):  # as if it had hung up
                line = self._heard.readline()
            answer = json.loads(line) if line else {"ended": self._process.wait(self._case.timeout)}
        except (TimeoutError, subprocess.TimeoutExpired):
            answer = {"ended": None}
        if word in answer:
            return None
        code, printed = answer.get("ended"), tail_of(self._room / "printed", self._mark)
        found = outcome_of(self._case, code, printed, self._result, time.monotonic() - self._began)
        if code is None:
            self.end()
        return found


def duel(sides: Mapping[str, Side], cases: Mapping[str, Case]) -> dict[str, Outcome]:
    """What each side gave; the first of them begins. Each side has its own case: its index may differ."""
    found: dict[str, Outcome] = {}
    if not all(case.timed for case in cases.values()):
        for name, side in sides.items():
            found[name] = side.begin(cases[name]) or side.outcome()
        return found
    ready = []
    for name, side in sides.items():  # in turn: two that spin for the same cores take far longer
        ended = side.begin(cases[name]) or side.ready()
        if ended is None:
            ready.append(name)
        else:
            found[name] = ended
    start = time.monotonic()
    for i in range(MOST if len(ready) == len(sides) else 0):
        if i >= LEAST and time.monotonic() - start > TOTAL:
            break
        for name in [name for name in sides if name not in found]:
            ended = sides[name].turn()
            if ended is not None:
                found[name] = ended
    return found | {name: sides[name].finish() for name in ready if name not in found}
