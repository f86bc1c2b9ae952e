"""Process groups: started so that they end with this process, and ended as a whole."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

PATIENCE = 3.0  # seconds to end by oneself


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
    """Starts process groups; a guard process kills them if this process dies.

    Args:
        popen: starts a process of a group.
    """

    def __init__(self, popen: "Callable[..., subprocess.Popen[bytes]]" = subprocess.Popen):
        words = [sys.executable, "-I", "-S", "-c", _GUARD]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)
        self.popen = popen
        self.groups: list[subprocess.Popen[bytes]] = []

    def start(
        self, words: list[str], out: IO[bytes], folder: Path, variables: Mapping[str, str],
        inherited: Sequence[int] = (),
    ) -> "subprocess.Popen[bytes]":  # fmt: skip
        with _uninterrupted():  # a process that nobody knows of would outlive us
            process = self.popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=folder,
                env=variables, start_new_session=True, pass_fds=inherited,
            )  # fmt: skip
            self.groups = [*(group for group in self.groups if group.poll() is None), process]
            assert self.process.stdin is not None
            self.process.stdin.write(f"{process.pid}\n".encode())
            self.process.stdin.flush()
        return process

    def close(self) -> None:
        """End the groups that still run, and the guard."""
        for group in self.groups:
            if group.poll() is None:
                end_group(group)
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delay signals until the block is done."""
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


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Treat SIGTERM and the end of the parent process like Ctrl-C: workers end, results are kept.

    A process that ignores SIGHUP (nohup) goes on without its parent.
    """
    previous = signal.signal(signal.SIGTERM, _interrupt)
    done, parent = threading.Event(), os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            if done.wait(1.0):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    if parent > 1 and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()
        signal.signal(signal.SIGTERM, previous)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
