"""The state of the machine and of an environment, on which measurements depend."""

import os
import platform
import re
import socket
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from projecta._checks import fail
from projecta.regress.errors import UsageError

LOAD = 0.5  # runnable processes per processor above which a machine is busy
HOT = 10.0  # degrees above those at calibration
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
SLOW = 0.9  # of the clock at calibration
LASTING = ("system", "processor", "processors", "governor", "gpu", "threads")  # what a state is known by


def state() -> dict[str, Any]:
    """Processor, governor, clock, temperature, load, GPU, driver, threads; unreadable ones are left out."""
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}", "processor": _processor(),
        "processors": os.cpu_count(),
        "governor": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"), "clock_mhz": _clock(),
        "temperature": _temperature(), "load": load(), "gpu": _gpu(),
        "threads": {k: os.environ[k] for k in THREADS if k in os.environ} or None,
    }  # fmt: skip
    return {name: fact for name, fact in facts.items() if fact is not None}


def warnings(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Differences of the machine's state from its state at calibration.

    >>> warnings({"governor": "performance"}, {"governor": "powersave"})
    ['governor: performance when calibrated, powersave now']
    """
    found = [
        f"{name}: {then.get(name)} when calibrated, {now.get(name)} now"
        for name in LASTING
        if then.get(name) != now.get(name)
    ]
    before, after = (dict(facts.get("packages") or {}) for facts in (then, now))
    found += [
        f"package {name}: {before.get(name)} when calibrated, {after.get(name)} now"
        for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)
    ]  # fmt: skip
    if now.get("load", 0) > max(LOAD, then.get("load", 0) + LOAD):
        found.append(f"load: {now['load']:.2f} runnable processes per processor")
    if "temperature" in then and now.get("temperature", 0) > then["temperature"] + HOT:
        found.append(
            f"temperature: {then['temperature']:.0f} C when calibrated, {now['temperature']:.0f} C now"
        )
    if "clock_mhz" in then and now.get("clock_mhz", then["clock_mhz"]) < SLOW * then["clock_mhz"]:
        found.append(f"clock: {then['clock_mhz']:.0f} MHz when calibrated, {now['clock_mhz']:.0f} MHz now")
    return found


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _processor() -> str:
    lines = (_text("/proc/cpuinfo") or "").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _clock() -> float | None:
    lines = (_text("/proc/cpuinfo") or "").splitlines()
    clocks = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return max(clocks, default=None)


def _temperature() -> float | None:
    found = (_text(str(path)) for path in Path("/sys/class/thermal").glob("thermal_zone*/temp"))
    return max((int(text) / 1000 for text in found if text and text.lstrip("-").isdigit()), default=None)


def load() -> float | None:
    """Runnable processes per processor; None where the system does not say."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except (AttributeError, OSError):
        return None


def _gpu() -> str | None:
    words = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,clocks.applications.graphics",
        "--format=csv,noheader",
    ]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return one_line_of(done.stdout) if done.returncode == 0 else None


def one_line_of(gpus: str) -> str | None:
    """GPUs, a line each, in one line; equal ones are counted.

    >>> one_line_of("H200, 580\\nH200, 580\\n"), one_line_of("T4, 535\\n"), one_line_of("")
    ('2 x H200, 580', 'T4, 535', None)
    """
    counts = Counter(line.strip() for line in gpus.splitlines() if line.strip())
    return "; ".join(f"{count} x {gpu}" if count > 1 else gpu for gpu, count in counts.items()) or None


def machine_name(name: str | None) -> str:
    """The name under which results are stored: the given one, or the host's."""
    name = socket.gethostname() if name is None else name
    if not re.fullmatch(r"[\w.-]+", name):
        fail("projecta", "--machine", "be letters, digits, '.', '_' or '-'", repr(name), error=UsageError)
    return name


def register_machine(name: str) -> None:
    """Write asv's description of this machine, if it is missing."""
    from asv.machine import Machine, MachineCollection
    from asv.util import UserError

    try:
        known = MachineCollection.load(name)
    except UserError:
        known = {}
    facts = Machine.get_defaults() | {k: v for k, v in known.items() if v} | {"machine": name}
    if facts != known:  # `asv machine --yes` describes none but the host by its own name
        MachineCollection.save(name, facts)
