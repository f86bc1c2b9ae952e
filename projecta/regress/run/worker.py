"""Runs in an environment that asv built: asv's benchmarks as asv runs them, but that timings take turns.

A file of its own, started by its path, for there may be no projecta there. Over a socket come the cases to
run, each in a fork of the process that has imported the suites; where `forks` is 0, one case, here. Of a
timing the code is asv's own, but for when samples are taken: it tells that it is ready, and then takes as
many as fit into a turn whenever it is given one, so that two processes can be timed in alternation.
"""

import json
import os
import socket
import sys
import time
from typing import Any


class Link:
    """A line of JSON each way."""

    def __init__(self, end: socket.socket):
        self._heard, self._told = end.makefile("r"), end.makefile("w")

    def hear(self) -> dict[str, Any]:
        """What is said next; nothing if the other end has hung up."""
        return json.loads(self._heard.readline() or "{}")  # type: ignore[no-any-return]

    def tell(self, said: dict[str, Any]) -> None:
        self._told.write(json.dumps(said) + "\n")
        self._told.flush()


def _take_turns(benchmark: Any, link: Link) -> None:
    """Have a timing of asv's take its samples in turns; of many in a turn the first is not counted."""
    plain = benchmark.benchmark_timing

    def timing(
        timer: Any, min_repeat: int, max_repeat: int, max_time: float, warmup_time: float, number: int,
        min_run_count: int,
    ) -> tuple[list[float], int]:  # fmt: skip
        first, number = plain(timer, 1, 1, 0.0, warmup_time, number, 1)
        link.tell({"ready": True})
        samples = []
        while (seconds := link.hear().get("seconds", 0)) > 0:
            end = time.monotonic() + seconds
            turn = [timer.timeit(number)]
            if turn[0] < seconds / 4:  # what the other process left in caches is gone now
                turn.clear()
            while not turn or time.monotonic() < end:
                turn.append(timer.timeit(number))
            link.tell({"turn": True})
            samples += turn
        return samples or first, number

    benchmark.benchmark_timing = timing


def _run(folder: str, order: dict[str, str], link: Link) -> None:
    """One case; its result goes where asv writes it."""
    import asv_runner.run as runner

    plain = runner.get_benchmark_from_name

    def find(*args: Any, **kwargs: Any) -> Any:
        benchmark = plain(*args, **kwargs)
        if hasattr(benchmark, "benchmark_timing"):
            _take_turns(benchmark, link)
        return benchmark

    runner.get_benchmark_from_name = find
    os.chdir(order["cwd"])
    runner._run((folder, order["name"], "{}", "None", order["result"]))


def _fork(folder: str, order: dict[str, str], link: Link) -> int:
    """The same, in a fork: its exit status."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _run(folder, order, link)
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    folder, number, forks = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1"
    from asv_runner._aux import update_sys_path
    from asv_runner.discovery import disc_benchmarks

    update_sys_path(folder)
    link = Link(socket.socket(fileno=number))
    if not forks:
        _run(folder, link.hear(), link)
        return
    for _ in disc_benchmarks(folder, ignore_import_errors=True):
        pass
    while order := link.hear():
        if "name" in order:  # else it was meant for a case that has ended
            link.tell({"ended": _fork(folder, order, link)})


if __name__ == "__main__":
    main()
