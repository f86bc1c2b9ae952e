"""Is this machine fit to measure on? Looks at the GPU (driver, clocks, heat, who uses it), at disk and load.

The state is printed and stored. A machine on which other work would disturb timings is refused. Clocks are
locked where that is asked for and permitted; a clock that cannot be locked is noted, and no reason to refuse.
"""

import dataclasses
import datetime
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from projecta.regress.project import machine

PATIENCE, INTERVAL = 60.0, 10.0  # seconds: for an answer of nvidia-smi; between two looks
_FACTS = {  # what nvidia-smi calls it: as what it is kept
    "index": "index", "uuid": "uuid", "name": "name", "driver_version": "driver", "memory.total": "memory",
    "memory.free": "free", "temperature.gpu": "temperature",
}  # fmt: skip
_CLOCKS = (
    "clocks.default_applications.graphics",
    "clocks.default_applications.memory",
    "clocks.max.graphics",
)
_UNDONE = re.compile(
    r"permission|not supported|insufficient|root|error|fail", re.I
)  # nvidia-smi may fail with exit code 0


@dataclass(frozen=True)
class Limits:
    """Limits: a machine beyond them is refused."""

    free: float = 0.9  # least share of the GPU's memory
    temperature: float = 70.0  # most, C, at the start
    disk: float = 10.0  # least, GiB
    load: float = machine.LOAD  # most runnable processes per processor


@dataclass
class Gpu:
    """One GPU as nvidia-smi describes it; MiB, C and MHz, None where it cannot say."""

    index: str
    uuid: str
    name: str
    driver: str
    memory: float | None
    free: float | None
    temperature: float | None
    clock: float | None = None
    lock: str = "not locked: not asked to"
    processes: list[tuple[int, str, float | None]] = field(default_factory=list)  # number, name, MiB


@dataclass
class Findings:
    """The state of GPU, disk and load."""

    gpus: list[Gpu]
    missing: str  # why there is no GPU
    disk: float  # free, GiB
    load: float | None

    def lines(self) -> list[str]:
        """As lines of text."""
        found = [] if self.gpus else [f"GPU: none ({self.missing})"]
        for gpu in self.gpus:
            free, total = (_amount(value, "MiB") for value in (gpu.free, gpu.memory))
            found += [
                f"GPU {gpu.index}: {gpu.name}, driver {gpu.driver}, {free} of {total} free, "
                f"{_amount(gpu.temperature, 'C')}, {len(gpu.processes)} process(es)",
                f"GPU {gpu.index}: clock {_amount(gpu.clock, 'MHz')}, {gpu.lock}",
            ]
        load = "unknown" if self.load is None else f"{self.load:.2f} runnable processes per processor"
        return [*found, f"disk: {self.disk:.1f} GiB free", f"load: {load}"]

    def problems(self, limits: Limits, demanded: bool) -> list[str]:
        """Why nothing should be measured here now, one line each."""
        found = []

        def refuse(reason: str, remedy: str) -> None:
            found.append(f"projecta: cannot measure here: {reason}. {remedy}")

        if demanded and not self.gpus:
            refuse(f"no GPU ({self.missing})", "Install the driver, or leave out --gpu.")
        for gpu in self.gpus:
            what = "the GPU" if len(self.gpus) == 1 else f"GPU {gpu.index}"
            for number, name, size in gpu.processes:
                used = f"process {number} ({name}, {_amount(size, 'MiB')})"
                refuse(f"{used} uses {what}", "Wait for it, or end it.")
            if gpu.free is not None and gpu.memory and gpu.free < limits.free * gpu.memory:
                least = f"{limits.free * gpu.memory:.0f} MiB are needed"
                refuse(
                    f"{what} has {gpu.free:.0f} MiB free and {least}",
                    "A container or a display may hold it.",
                )
            if gpu.temperature is not None and gpu.temperature > limits.temperature:
                limit = f"more than {limits.temperature:g} C"
                refuse(f"{what} has {gpu.temperature:.0f} C, {limit}", "Let it cool down: --wait SECONDS.")
        if self.disk < limits.disk:
            refuse(
                f"the disk has {self.disk:.1f} GiB free, less than {limits.disk:g} GiB", "Free some space."
            )
        if self.load is not None and self.load > limits.load:
            limit = f"more than {limits.load:g}"
            refuse(
                f"the load is {self.load:.2f} runnable processes per processor, {limit}",
                "End what runs beside.",
            )
        return found


def examine_machine(
    folder: Path, limits: Limits, demanded: bool = False, lock_clocks: bool = False, patience: float = 0.0,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Findings, list[str]]:  # fmt: skip
    """Inspect the machine; return its state, and the reasons to refuse it.

    Args:
        demanded: whether a machine without a GPU is refused.
        lock_clocks: whether the GPUs are asked to keep one clock from now on, if nothing is refused.
        patience: seconds for a GPU to cool, or a process to end, before the last look.
    """
    end = time.monotonic() + patience
    while True:
        found = look(folder)
        problems = found.problems(limits, demanded)
        left = end - time.monotonic()
        if not problems or left <= 0:
            break
        sleep(min(INTERVAL, left))
    for gpu in found.gpus if lock_clocks and not problems else ():  # another's work is not to be slowed down
        lock(gpu)
    return found, problems


def look(folder: Path) -> Findings:
    """Read the state; change nothing."""
    gpus, missing = _gpus()
    return Findings(gpus, missing, shutil.disk_usage(folder).free / 2**30, machine.load())


def lock(gpu: Gpu) -> None:
    """Lock the GPU at the clock that it can hold; `gpu.lock` says whether that worked."""
    answer, reason = _ask(
        "-i", gpu.index, f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader,nounits"
    )
    default, memory, most = (_number(word) for word in [*(answer or "").split(", "), "", "", ""][:3])
    wanted = default or most
    if wanted is None:
        gpu.lock = f"not locked: no clock is known ({reason or 'nvidia-smi names none'})"
        return
    _ask("-i", gpu.index, "-pm", "1")  # without it the driver forgets the clock when nobody uses the GPU
    ways = [("-lgc", f"{wanted:.0f},{wanted:.0f}")]
    if memory is not None:
        ways.append(("-ac", f"{memory:.0f},{wanted:.0f}"))
    reasons = []
    for way in ways:
        answer, reason = _ask("-i", gpu.index, *way)
        if answer is not None and not _UNDONE.search(answer):
            gpu.lock = f"locked at {wanted:.0f} MHz (nvidia-smi {' '.join(way)})"
            break
        reasons.append(f"{way[0]}: {(reason or answer or '').strip().splitlines()[0]}")
    else:
        gpu.lock = f"not locked: {'; '.join(reasons)}"
    gpu.clock = _clock(gpu.index)


def as_json(found: Findings, problems: list[str]) -> dict[str, Any]:
    """As JSON."""
    at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"at": at, **dataclasses.asdict(found), "problems": problems}


def write_json(found: Findings, problems: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(as_json(found, problems), indent=1) + "\n")


def _gpus() -> tuple[list[Gpu], str]:
    """All GPUs with their processes, or the reason why there are none."""
    answer, reason = _ask(f"--query-gpu={','.join(_FACTS)}", "--format=csv,noheader,nounits")
    if answer is None:
        return [], reason
    found = []
    for line in answer.splitlines():
        words = dict(zip(_FACTS.values(), line.split(", "), strict=False))
        if len(words) < len(_FACTS):
            return [], f"nvidia-smi says {line.strip()!r}"
        sizes = {name: _number(words.pop(name)) for name in ("memory", "free", "temperature")}
        found.append(Gpu(**words, **sizes))  # type: ignore[arg-type]
    words_of = "--query-compute-apps=gpu_uuid,pid,used_memory,process_name"
    answer, reason = _ask(words_of, "--format=csv,noheader,nounits")
    if answer is None:
        return [], reason
    for line in answer.splitlines():
        uuid, number, size, name = [*line.split(", ", 3), "", "", ""][:4]
        for gpu in found:
            if gpu.uuid == uuid and number.isdigit():
                gpu.processes.append((int(number), Path(name.strip()).name or "unknown", _number(size)))
    for gpu in found:
        gpu.clock = _clock(gpu.index)
    return found, "" if found else "nvidia-smi lists none"


def _clock(index: str) -> float | None:
    answer, _ = _ask("-i", index, "--query-gpu=clocks.current.graphics", "--format=csv,noheader,nounits")
    return _number(answer or "")


def _ask(*words: str) -> tuple[str | None, str]:
    """The output of nvidia-smi, or None and the reason."""
    try:
        done = subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=PATIENCE)
    except FileNotFoundError:
        return None, "no nvidia-smi"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"nvidia-smi: {error}"
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or [f"exit status {done.returncode}"]
        return None, f"nvidia-smi: {lines[0].strip().rstrip('.')}"
    return done.stdout, ""


def _number(text: str) -> float | None:
    """A number, or None for [N/A] and its like.

    >>> _number(" 585 "), _number("[N/A]")
    (585.0, None)
    """
    try:
        return float(text)
    except ValueError:
        return None


def _amount(value: float | None, unit: str) -> str:
    return f"unknown {unit}" if value is None else f"{value:.0f} {unit}"
