"""A benchmark at one combination of parameters, and the outcome of one process that ran it."""

import json
import math
import re
import signal
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OK, SKIPPED = "ok", "skipped"


FAILED, CRASHED, MEMORY, TIMED_OUT, BAD = "failed", "crashed", "out of memory", "timed out", "bad result"


FAILURES = (FAILED, CRASHED, MEMORY, TIMED_OUT, BAD)


TAIL = 65536  # bytes of what a benchmark printed that are looked at


_OUT_OF_MEMORY = re.compile(
    r"MemoryError|OutOfMemoryError|CUDA out of memory|can't allocate memory|bad_alloc|Cannot allocate memory"
)


_EXCEPTION = re.compile(
    r"^(?:[\w.]+\.)?([A-Z]\w*(?:Error|Exception|Result|Interrupt|Exit|Warning|Failure)\b.*)$"
)


_PLACE = re.compile(r'^\s*File "([^"]+)", line (\d+)')


_SKIPPED = re.compile(r"asv: skipped: (?:\w+)\((.*)\)\s*$", re.M)


Combination = tuple[str, ...]  # of parameters, each as asv writes it


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
        """The name as asv writes it and --bench matches it."""
        return f"{self.name}({', '.join(self.params)})" if self.params else self.name

    @property
    def key(self) -> tuple[str, str, tuple[str, ...]]:
        """The key of a result: name, version and parameters (a change of `params` moves the index)."""
        return self.name, self.version, self.params

    @property
    def timed(self) -> bool:
        return self.type in ("time", "timeraw")


@dataclass(frozen=True)
class Outcome:
    """Outcome of a process: samples (for a timing: seconds a call), one value, or the reason for neither."""

    status: str
    samples: tuple[float, ...] = ()
    number: int | None = None  # calls in each sample; None if this is not a timing
    reason: str = ""
    seconds: float = 0.0  # that the process took

    @property
    def value(self) -> float | None:
        """The median of the samples."""
        return statistics.median(self.samples) if self.samples else None

    @property
    def lower_quartile(self) -> float | None:
        """The lower quartile: interference only adds time, and the minimum hangs on a single call."""
        return sorted(self.samples)[len(self.samples) // 4] if self.samples else None


def select(found: Sequence[Case], regex: str | None) -> list[Case]:
    """The cases whose label matches the pattern."""
    wanted = re.compile(regex or "")
    return [case for case in found if wanted.search(case.label)]


RATES = ("/s", "hz")  # how units end of which more is better


def higher_is_better(entry: Mapping[str, Any]) -> bool:
    """The direction of a benchmark: as its `higher_is_better` says, or by its unit.

    >>> higher_is_better({"unit": "images/s"}), higher_is_better({"unit": "unit", "higher_is_better": True})
    (True, True)
    """
    declared = entry.get("higher_is_better")
    return str(entry["unit"]).lower().endswith(RATES) if declared is None else bool(declared)


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
    """The outcome by exit code (None: timeout), output and result file."""

    def ended(status: str, reason: str) -> Outcome:
        return Outcome(status, reason=reason, seconds=seconds)

    if code is None:
        return ended(TIMED_OUT, too_long(case.timeout))
    if code:
        words = last_words(printed)
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


def last_words(printed: str) -> str:
    """The exception that ended a process, and its place, in one line; else the last line printed."""
    place, found = "", ""
    for line in printed.splitlines():
        where, exception = _PLACE.match(line), _EXCEPTION.match(line)
        if where:
            place = f" ({Path(where[1]).name}:{where[2]})"
        elif exception:
            found = exception[1].strip() + place
    lines = printed.strip().splitlines()
    return (found or (lines[-1].strip() if lines else ""))[:300]
