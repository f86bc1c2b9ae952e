"""Runs one benchmark at one combination of parameters in a process of its own: what it gave, or why nothing.

The code that runs there is asv's own (`asv/benchmark.py` of the environment that asv built). Around it stands
what asv leaves out: a timeout counts wall time, whatever the benchmark prints; the whole process group ends
with it, even if this process is killed; and every ending has a status and a reason.
"""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

OK, SKIPPED = "ok", "skipped"
FAILED, CRASHED, MEMORY, TIMED_OUT, BAD = "failed", "crashed", "out of memory", "timed out", "bad result"
BROKEN = (FAILED, CRASHED, MEMORY, TIMED_OUT, BAD)
TAIL = 65536  # bytes of what a benchmark printed that are looked at
PATIENCE = 3.0  # seconds to end by oneself
_OUT_OF_MEMORY = re.compile(
    r"MemoryError|OutOfMemoryError|CUDA out of memory|can't allocate memory|bad_alloc|Cannot allocate memory"
)
_EXCEPTION = re.compile(
    r"^(?:[\w.]+\.)?([A-Z]\w*(?:Error|Exception|Result|Interrupt|Exit|Warning|Failure)\b.*)$"
)
_PLACE = re.compile(r'^\s*File "([^"]+)", line (\d+)')
_SKIPPED = re.compile(r"asv: skipped: (?:\w+)\((.*)\)\s*$", re.M)


@dataclass(frozen=True)
class Case:
    """A benchmark at one combination of its parameters, as asv found it."""

    name: str
    index: int  # of the combination
    params: tuple[str, ...]  # as asv writes them
    type: str  # asv's: time, track, memory, peakmemory...
    unit: str
    version: str
    timeout: float
    cache: str | None = None  # asv's key of the setup_cache that the benchmark wants
    cache_timeout: float = 0.0  # of that; 0: the benchmark's
    higher_is_better: bool = False

    @property
    def label(self) -> str:
        """As asv writes it, and as --bench matches it."""
        return f"{self.name}({', '.join(self.params)})" if self.params else self.name

    @property
    def key(self) -> tuple[str, str, tuple[str, ...]]:
        """What a result is known by. (A change of `params` moves the index.)"""
        return self.name, self.version, self.params

    @property
    def timed(self) -> bool:
        return self.type in ("time", "timeraw")


@dataclass(frozen=True)
class Outcome:
    """What one process gave: samples (of a timing: seconds a call) or one value, or why it gave none."""

    status: str
    samples: tuple[float, ...] = ()
    number: int | None = None  # calls in each sample; None if this is not a timing
    reason: str = ""
    seconds: float = 0.0  # that the process took

    @property
    def value(self) -> float | None:
        """The median of the samples, which one slow call does not move."""
        return statistics.median(self.samples) if self.samples else None

    @property
    def undisturbed(self) -> float | None:
        """The lower quartile: who disturbs a call makes it slower, and the least is one call's luck."""
        return sorted(self.samples)[len(self.samples) // 4] if self.samples else None


class Spawn:
    """A new interpreter for each benchmark."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        variables: Mapping[str, str],
        settings: Mapping[str, Any],
    ):
        self.command, self.folder, self.variables = list(command), folder, dict(variables)
        self.settings = json.dumps(dict(settings))
        self.guard = Guard()
        self._caches: dict[str, tempfile.TemporaryDirectory[str]] = {}
        self._failed: dict[str, Outcome] = {}  # what became of a setup_cache: it is not tried again

    def run(self, case: Case) -> Outcome:
        start = time.monotonic()
        missing = self.set_up(case)
        if missing is not None:
            return missing
        with tempfile.TemporaryDirectory(prefix="projecta-", ignore_cleanup_errors=True) as room:
            result = Path(room, "result.json")
            words = ["run", str(self.folder), asv_name(case), self.settings, "None", str(result)]
            code, printed = self._finish(words, self.place(case, room), case.timeout)
            return outcome_of(case, code, printed, result, time.monotonic() - start)

    def _finish(self, words: list[str], place: str, timeout: float) -> tuple[int | None, str]:
        """The exit code of a process, or None if it took too long; what it printed."""
        with tempfile.TemporaryDirectory(prefix="projecta-", ignore_cleanup_errors=True) as room:
            printed = Path(room, "printed")
            with printed.open("wb") as out:
                process = self.guard.start([*self.command, *words], out, Path(place), self.variables)
                try:
                    code: int | None = process.wait(timeout)
                except subprocess.TimeoutExpired:
                    code = None
                finally:
                    end_group(process)
            return code, tail_of(printed)

    def set_up(self, case: Case) -> Outcome | None:
        """Run the setup_cache that a benchmark wants, once; why it could not be."""
        if case.cache is None or case.cache in self._caches:
            return None
        if case.cache in self._failed:
            return self._failed[case.cache]
        place = tempfile.TemporaryDirectory(prefix="projecta-", ignore_cleanup_errors=True)
        words = ["setup_cache", str(self.folder), asv_name(case), "{}"]
        limit = case.cache_timeout or case.timeout
        code, printed = self._finish(words, place.name, limit)
        if code == 0:
            self._caches[case.cache] = place
            return None
        place.cleanup()
        reason = too_long(limit) if code is None else _last_words(printed)
        found = Outcome(TIMED_OUT if code is None else FAILED, reason=f"setup_cache: {reason}")
        self._failed[case.cache] = found
        return found

    def place(self, case: Case, room: str) -> str:
        return room if case.cache is None else self._caches[case.cache].name

    def close(self) -> None:
        self.guard.close()
        for place in self._caches.values():
            place.cleanup()
        self._caches.clear()


class Fork(Spawn):
    """One interpreter that has imported the suites, and a fork of it for each benchmark: asv's forkserver."""

    process: "subprocess.Popen[bytes] | None" = None
    room = Path()  # of the process

    def run(self, case: Case) -> Outcome:
        start = time.monotonic()
        missing = self.set_up(case)
        if missing is not None:
            return missing
        try:
            if self.process is None or self.process.poll() is not None:
                self._start(case.timeout)
            result = self.room / "result.json"
            result.unlink(missing_ok=True)
            with tempfile.TemporaryDirectory(dir=self.room, ignore_cleanup_errors=True) as place:
                answer = self._ask(
                    {
                        "action": "run", "benchmark_id": asv_name(case), "params_str": self.settings,
                        "profile_path": "None", "result_file": str(result), "timeout": case.timeout,
                        "cwd": self.place(case, place),
                    },
                    case.timeout + PATIENCE,
                )  # fmt: skip
        except TimeoutError:
            self._end()
            return Outcome(TIMED_OUT, reason=too_long(case.timeout), seconds=time.monotonic() - start)
        except (OSError, EOFError) as error:
            reason = _last_words(tail_of(self.room / "printed")) or str(error)
            self._end()
            return Outcome(CRASHED, reason=f"the process that imports the suites ended: {reason}")
        code = None if answer["errcode"] == -256 else answer["errcode"]
        return outcome_of(case, code, answer["out"][-TAIL:], result, time.monotonic() - start)

    def _start(self, timeout: float) -> None:
        self._end()
        self.room = Path(tempfile.mkdtemp(prefix="projecta-"))
        with (self.room / "printed").open("wb") as out:
            words = [*self.command, "run_server", str(self.folder), str(self.room / "socket")]
            self.process = self.guard.start(words, out, self.room, self.variables)
        limit = time.monotonic() + timeout
        while not (self.room / "socket").exists():
            if self.process.poll() is not None:
                raise EOFError(f"exit status {self.process.returncode}")
            if time.monotonic() > limit:
                raise TimeoutError
            time.sleep(0.01)
        self._ask({"action": "preimport"}, timeout)

    def _ask(self, message: dict[str, Any], timeout: float) -> Any:
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(timeout)
            link.connect(str(self.room / "socket"))
            text = json.dumps(message).encode()
            link.sendall(struct.pack("<Q", len(text)) + text)
            (size,) = struct.unpack("<Q", _receive(link, 8))
            return json.loads(_receive(link, size))

    def _end(self) -> None:
        if self.process is not None:
            end_group(self.process)
            self.process = None
            shutil.rmtree(self.room, ignore_errors=True)

    def close(self) -> None:
        self._end()
        super().close()


def _receive(link: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        got = link.recv(size - len(data))
        if not got:
            raise EOFError("it hung up")
        data += got
    return data


# Reads process groups from a pipe, and kills them when the pipe closes: when its writer has ended, however.
_GUARD = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
groups = sys.stdin.read().split()
for group in groups:
    try:
        os.killpg(int(group), signal.SIGKILL)
    except OSError:
        pass
"""


class Guard:
    """Starts processes that lead groups; if this process ends before it is closed, they are killed."""

    def __init__(self) -> None:
        words = [sys.executable, "-I", "-S", "-c", _GUARD]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)
        self.groups: list[subprocess.Popen[bytes]] = []

    def start(
        self, words: list[str], out: IO[bytes], folder: Path, variables: Mapping[str, str],
        inherited: Sequence[int] = (),
    ) -> "subprocess.Popen[bytes]":  # fmt: skip
        with _uninterrupted():  # a process that nobody knows of would outlive us
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=folder,
                env=variables, start_new_session=True, pass_fds=inherited,
            )  # fmt: skip
            self.groups = [*(group for group in self.groups if group.poll() is None), process]
            assert self.process.stdin is not None
            self.process.stdin.write(f"{process.pid}\n".encode())
            self.process.stdin.flush()
        return process

    def close(self) -> None:
        """End the groups that have not ended; then there is nobody to kill."""
        for group in self.groups:
            if group.poll() is None:
                end_group(group)
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """What interrupts this process waits until the block is done."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in numbers if callable(signal.getsignal(number))}
    for number in before:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


def end_group(process: "subprocess.Popen[Any]", patience: float = PATIENCE) -> None:
    """End a process that leads a group, and all that it started, by force in the end."""
    if process.poll() is None:
        _signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    _signal_group(process.pid, signal.SIGKILL)  # whoever is left, were the leader gone
    process.wait()


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def asv_name(case: Case) -> str:
    return f"{case.name}-{case.index}" if case.params else case.name


def tail_of(path: Path, start: int = 0) -> str:
    """The end of what a process printed, from `start` on."""
    try:
        with path.open("rb") as file:
            file.seek(max(start, path.stat().st_size - TAIL))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def too_long(limit: float) -> str:
    return f"took longer than its timeout of {limit:g} s"


def outcome_of(case: Case, code: int | None, printed: str, result: Path, seconds: float) -> Outcome:
    """What exit code (None: too long), output and result file say."""

    def ended(status: str, reason: str) -> Outcome:
        return Outcome(status, reason=reason, seconds=seconds)

    if code is None:
        return ended(TIMED_OUT, too_long(case.timeout))
    if code:
        words = _last_words(printed)
        if _OUT_OF_MEMORY.search(printed):
            return ended(MEMORY, words or "memory could not be had")
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            kernel = ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
            return ended(MEMORY if kernel else CRASHED, f"ended by {name}{kernel}")
        return ended(FAILED, words or f"exit status {code}")
    try:
        found = json.loads(result.read_text())
    except (OSError, ValueError) as error:
        return ended(BAD, f"its result could not be read: {error}")
    if isinstance(found, dict) and isinstance(found.get("samples"), list):
        samples, number = found["samples"], int(found["number"])
    else:
        skipped = _SKIPPED.search(printed)
        if isinstance(found, float) and math.isnan(found):  # asv takes it for a skip, whoever returned it
            return ended(SKIPPED, skipped[1].strip("'\"") if skipped else "gave nan")
        samples, number = [float(found) if isinstance(found, bool) else found], None
    for value in samples or [None]:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return ended(BAD, f"gave {str(value)[:80]!r}, not a finite number")
    return Outcome(OK, tuple(map(float, samples)), number, seconds=seconds)


def _last_words(printed: str) -> str:
    """The exception that ended it, and where, in one line; else the last line."""
    place, found = "", ""
    for line in printed.splitlines():
        where, said = _PLACE.match(line), _EXCEPTION.match(line)
        if where:
            place = f" ({Path(where[1]).name}:{where[2]})"
        elif said:
            found = said[1].strip() + place
    lines = printed.strip().splitlines()
    return (found or (lines[-1].strip() if lines else ""))[:300]
