"""Worker process. It runs asv's benchmark code, and takes paired timing samples only when asked.

A file of its own, started by its path in the environment that asv built: projecta may not be installed there.
Orders arrive over a socket, one JSON object a line. With `forks` = 1 the process imports the suites once and
runs each order in a fork; with 0 it runs one order itself and ends.

    {"cache": ...}                    run the benchmark's setup_cache
    {"name": ..., "paired": false}    run the benchmark as asv does
    {"name": ..., "paired": true}     set up, answer {"ready": true}, then take samples on {"seconds": s}
                                      and answer {"sampled": true}, until {"seconds": 0}
"""

import json
import os
import socket
import sys
import time
from typing import Any


class Link:
    """One end of a socket that carries a JSON object a line."""

    def __init__(self, end: socket.socket):
        self._incoming, self._outgoing = end.makefile("r"), end.makefile("w")

    def receive(self) -> dict[str, Any]:
        """The next message; an empty one if the other end has closed."""
        return json.loads(self._incoming.readline() or "{}")  # type: ignore[no-any-return]

    def send(self, message: dict[str, Any]) -> None:
        self._outgoing.write(json.dumps(message) + "\n")
        self._outgoing.flush()


def sample_on_request(benchmark: Any, link: Link) -> None:
    """Make a timing benchmark take its samples when the other end asks for them.

    The first of several samples of a request is left out: it refills the caches that the other process used.
    """
    measure = benchmark.benchmark_timing

    def timing(
        timer: Any, min_repeat: int, max_repeat: int, max_time: float, warmup_time: float, number: int,
        min_run_count: int,
    ) -> tuple[list[float], int]:  # fmt: skip
        first, number = measure(timer, 1, 1, 0.0, warmup_time, number, 1)
        link.send({"ready": True})
        samples = []
        while (seconds := link.receive().get("seconds", 0)) > 0:
            end = time.monotonic() + seconds
            requested = [timer.timeit(number)]
            if requested[0] < seconds / 4:
                requested.clear()
            while not requested or time.monotonic() < end:
                requested.append(timer.timeit(number))
            link.send({"sampled": True})
            samples += requested
        return samples or first, number

    benchmark.benchmark_timing = timing


def run(folder: str, order: dict[str, Any], link: Link) -> None:
    """Run one order; asv's code writes the result, or the cache, in the order's folder."""
    import asv_runner.run as runner
    from asv_runner.setup_cache import _setup_cache

    os.chdir(order["cwd"])
    if "cache" in order:
        _setup_cache((folder, order["cache"], "{}"))
        return
    find = runner.get_benchmark_from_name

    def find_paired(*args: Any, **kwargs: Any) -> Any:
        benchmark = find(*args, **kwargs)
        if order["paired"] and hasattr(benchmark, "benchmark_timing"):
            sample_on_request(benchmark, link)
        return benchmark

    runner.get_benchmark_from_name = find_paired
    runner._run((folder, order["name"], json.dumps(order["settings"]), "None", order["result"]))


def run_in_fork(folder: str, order: dict[str, Any], link: Link) -> int:
    """Run one order in a fork; return its exit status."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run(folder, order, link)
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
        run(folder, link.receive(), link)
        return
    for _ in disc_benchmarks(folder, ignore_import_errors=True):
        pass
    while order := link.receive():
        if "cwd" in order:  # a request for samples may be left over from an order that has ended
            link.send({"ended": run_in_fork(folder, order, link)})


if __name__ == "__main__":
    main()
