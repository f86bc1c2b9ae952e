"""Worker process. It runs benchmarks by the code of asv or pytest, and takes timing samples only when asked.

A file of its own, started by its path in the environment of a commit: projecta may not be installed there.

    worker.py SOCKET asv FOLDER FORKS      asv's suites in a folder. With FORKS = 1 the process imports them
                                           once and runs each order in a fork; with 0 it runs one and ends
    worker.py SOCKET pytest TREE PATH...   the tests in a commit's files that use pytest-benchmark's fixture;
                                           each order runs in a fork of the process that has collected them
    worker.py - pytest TREE PATH...        only list these tests, as JSON

Orders arrive over a socket, one JSON object a line:

    {"cache": ...}                    run the benchmark's setup_cache
    {"name": ..., "paired": false}    run the benchmark as asv does
    {"name": ..., "paired": true}     set up and answer {"ready": true}; on {"warm": true} warm up, and answer
                                      the same; then take samples on {"seconds": s} and answer
                                      {"sampled": true}, until {"seconds": 0}

With PROJECTA_TRACE=1 the files that an order has read are written beside its result. PROJECTA_CHECKED=1 tells
the benchmarks that an earlier process has checked their results.
"""

from __future__ import annotations  # the environment's Python may be older than projecta's

import _posixsubprocess
import contextlib
import functools
import gc
import hashlib
import importlib.util
import inspect
import json
import os
import socket
import sys
import time
import timeit
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

TRACE = "PROJECTA_TRACE"  # set: note the files that each order reads
CHECKED = "PROJECTA_CHECKED"  # set: an earlier process of the same build has run each benchmark's checks
SPAWNS = ("subprocess.Popen", "os.posix_spawn", "os.spawn", "os.exec", "os.system", "os.fork", "os.forkpty")
LEAST = 0.005  # seconds of a sample of a test: its calls are repeated for so long


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


class Trace:
    """Notes which files this process reads, and whether it starts another, by Python's audit events."""

    def __init__(self) -> None:
        self.opened: set[str] = set()
        self.spawned = False
        self.paused = False
        sys.addaudithook(self.note)
        plain = _posixsubprocess.fork_exec

        def fork_exec(*args: Any) -> int:
            self.spawned = True
            return plain(*args)

        _posixsubprocess.fork_exec = fork_exec  # multiprocessing calls it, which raises no event

    def note(self, event: str, values: tuple[Any, ...]) -> None:
        if event == "open" and not isinstance(values[0], int):  # of a file that is open already
            self.opened.add(os.path.abspath(os.fsdecode(values[0])))  # the folder may change later
        elif event in SPAWNS and not self.paused:
            self.spawned = True

    def write(self, path: str) -> None:
        """Write the files read so far, those of imported modules among them; null if processes started."""
        modules = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
        sources = {self.source(path) for path in [*self.opened, *filter(None, modules)]}
        found = None if self.spawned else sorted(map(os.path.realpath, sources))
        Path(path + ".files").write_text(json.dumps(found))

    @staticmethod
    def source(path: str) -> str:
        if path.endswith(".pyc"):
            with contextlib.suppress(ValueError, NotImplementedError):  # one that lies where no source does
                return importlib.util.source_from_cache(path)
        return path


def wait_to_warm_up(link: Link) -> None:
    """Say that the benchmark has set up; return when the other end asks it to warm up."""
    link.send({"ready": True})
    link.receive()


def take_samples(take: Callable[[], float], link: Link) -> list[float]:
    """Say that the benchmark has warmed up; samples, taken when the other end asks for them.

    The first of several samples of a request is left out: it refills the caches that the other process used.
    """
    link.send({"warm": True})
    samples = []
    while (seconds := link.receive().get("seconds", 0)) > 0:
        end = time.monotonic() + seconds
        requested = [take()]
        if requested[0] < seconds / 4:
            requested.clear()
        while not requested or time.monotonic() < end:
            requested.append(take())
        link.send({"sampled": True})
        samples += requested
    return samples


def sample_on_request(benchmark: Any, link: Link) -> None:
    """Make asv's timing benchmark take its samples when the other end asks for them."""
    measure = benchmark.benchmark_timing

    def timing(
        timer: Any, min_repeat: int, max_repeat: int, max_time: float, warmup_time: float, number: int,
        min_run_count: int,
    ) -> tuple[list[float], int]:  # fmt: skip
        wait_to_warm_up(link)
        first, number = measure(timer, 1, 1, 0.0, warmup_time, number, 1)
        return take_samples(lambda: timer.timeit(number), link) or first, number

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


def perform(work: Callable[[], None], trace: Trace | None, order: dict[str, Any]) -> None:
    """Run one order, and write which files it has read if that is asked."""
    work()
    if trace is not None and "result" in order:
        trace.write(order["result"])


@contextlib.contextmanager
def ready_to_fork() -> Iterator[None]:
    """Import without collections of garbage, a quarter of the time; no fork collects what is imported."""
    gc.disable()
    yield
    gc.freeze()  # a fork's collections would mark every imported object, and so copy its page
    gc.enable()


def run_in_fork(work: Callable[[], None], trace: Trace | None, order: dict[str, Any]) -> int:
    """`perform` in a fork; return its exit status."""
    if trace is not None:
        trace.paused = True  # this fork is no benchmark's
    child = os.fork()
    if trace is not None:
        trace.paused = False
    if child == 0:
        code = 1
        try:
            perform(work, trace, order)
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


class Tests:
    """A pytest plugin that serves orders for the tests with pytest-benchmark's fixture.

    Args:
        link: where orders come from; None to list the tests only.
    """

    def __init__(self, link: Link | None, trace: Trace | None):
        self.link, self.trace = link, trace
        self.found: dict[str, str] = {}  # a digest of the source by the id of a test
        self.broken = ""  # why a file could not be collected
        self.samples: list[float] = []
        self.number = 1
        self.raised: BaseException | None = None
        self.skipped, self.failed = "", False

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.broken:
            print(report.longreprtext)
            words = [line[1:].strip() for line in report.longreprtext.splitlines() if line.startswith("E ")]
            self.broken = f"{report.nodeid}: {words[-1] if words else report.longreprtext.splitlines()[-1]}"

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if "benchmark" in getattr(item, "fixturenames", ())]
        for item in items:
            text = inspect.getsource(getattr(item.function, "__wrapped__", item.function))
            self.found[item.nodeid] = hashlib.sha256(text.encode()).hexdigest()

    def pytest_runtestloop(self, session: Any) -> bool:
        if self.link is None:
            return True
        items = {item.nodeid: item for item in session.items}
        gc.freeze()
        while order := self.link.receive():
            if "cwd" in order:  # a request for samples may be left over from an order that has ended
                work = functools.partial(self.run, items[order["name"]], Path(order["result"]))
                self.link.send({"ended": run_in_fork(work, self.trace, order)})
        return True

    def pytest_runtest_makereport(self, call: Any) -> None:
        self.raised = self.raised or (call.excinfo and call.excinfo.value)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.skipped and not self.skipped:
            own = getattr(report, "wasxfail", None)
            self.skipped = own if own is not None else str(report.longrepr[2]).removeprefix("Skipped: ")
        self.failed = self.failed or report.failed

    def run(self, item: Any, result: Path) -> None:
        """Run a test, and write the samples that its fixture took."""
        from pytest_benchmark.fixture import BenchmarkFixture

        call, pedantic = BenchmarkFixture.__call__, BenchmarkFixture.pedantic
        methods: Any = BenchmarkFixture
        methods.__call__ = lambda own, *args, **kwargs: self.call(own, call, *args, **kwargs)
        methods.pedantic = lambda own, *args, **kwargs: self.pedantic(own, pedantic, *args, **kwargs)
        item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
        if self.failed:
            if self.raised is not None:
                traceback.print_exception(type(self.raised), self.raised, self.raised.__traceback__)
            raise SystemExit(1)
        if self.skipped:
            print(f"asv: skipped: Skipped({self.skipped!r})")
            result.write_text("NaN")
        elif not self.samples:
            print("RuntimeError: the test did not call its fixture `benchmark`")
            raise SystemExit(1)
        else:
            result.write_text(json.dumps({"samples": self.samples, "number": self.number}))

    def sample(self, once: Callable[[int], float], number: int) -> None:
        """Take samples: `once` gives the seconds of so many calls."""
        assert self.link is not None
        self.number = number
        taken = take_samples(lambda: once(number), self.link) or [once(number)]  # none: the other side failed
        self.samples = [seconds / number for seconds in taken]

    # Both run the plain method first. As benchmarks are disabled, it calls the function once.
    def call(self, fixture: Any, plain: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of `benchmark(function, ...)`."""
        found = plain(fixture, function, *args, **kwargs)
        assert self.link is not None
        wait_to_warm_up(self.link)
        timer = timeit.Timer(lambda: function(*args, **kwargs), gc.enable)
        number = 1
        while timer.timeit(number) < LEAST:
            number *= 2
        self.sample(timer.timeit, number)
        return found

    def pedantic(
        self, fixture: Any, plain: Any, target: Any, args: Sequence[Any] = (), kwargs: Any = None,
        setup: Any = None, teardown: Any = None, rounds: int = 1, warmup_rounds: int = 0, iterations: int = 1,
    ) -> Any:  # fmt: skip
        """In place of `benchmark.pedantic(target, ...)`: the caller's iterations, as many rounds as asked."""
        rest = {"rounds": rounds, "warmup_rounds": warmup_rounds, "iterations": iterations}
        found = plain(fixture, target, args, kwargs, setup, teardown, **rest)
        assert self.link is not None
        wait_to_warm_up(self.link)

        def once(number: int) -> float:
            own_args, own_kwargs = (setup and setup()) or (args, kwargs or {})
            seconds = timeit.Timer(lambda: target(*own_args, **own_kwargs), gc.enable).timeit(number)
            if teardown is not None:
                teardown(*own_args, **own_kwargs)
            return seconds

        self.sample(once, iterations)
        return found


def serve_tests(link: Link | None, tree: str, paths: list[str], trace: Trace | None) -> int:
    """Collect tests, and list them or serve orders for them; return the exit status."""
    import pytest
    import pytest_benchmark  # noqa: F401  its absence has this name

    os.chdir(tree)
    sys.path.insert(0, tree)  # as `python -m pytest` does
    plugin = Tests(link, trace)
    words = [
        "-s", "-q", "--rootdir", tree, "-p", "no:cacheprovider", "--benchmark-disable",
        "--continue-on-collection-errors",
    ]  # fmt: skip
    for module, option in (("xdist", "-n0"), ("pytest_cov", "--no-cov"), ("pytest_timeout", "--timeout=0")):
        if importlib.util.find_spec(module):
            words.append(option)
    code = pytest.main([*words, *paths], plugins=[plugin])
    if link is None:
        print(json.dumps({"tests": plugin.found, "broken": plugin.broken}))
    return int(code) if link is not None or code == pytest.ExitCode.USAGE_ERROR else 0


def serve_suites(link: Link, folder: str, forks: bool, trace: Trace | None) -> None:
    """Serve orders for asv's suites."""
    from asv_runner._aux import update_sys_path
    from asv_runner.discovery import disc_benchmarks

    update_sys_path(folder)
    if not forks:
        order = link.receive()
        perform(functools.partial(run, folder, order, link), trace, order)
        return
    with ready_to_fork():
        for _ in disc_benchmarks(folder, ignore_import_errors=True):
            pass
    while order := link.receive():
        if "cwd" in order:  # a request for samples may be left over from an order that has ended
            work = functools.partial(run, folder, order, link)
            link.send({"ended": run_in_fork(work, trace, order)})


def main() -> None:
    number, kind, folder, *rest = sys.argv[1:]
    own = os.path.realpath(Path(__file__).parent)  # whose modules are not the benchmarks' to import
    sys.path[:] = [place for place in sys.path if os.path.realpath(place) != own]
    link = None
    if number != "-":
        end = socket.socket(fileno=int(number))
        end.set_inheritable(False)  # what a benchmark starts would keep it open
        link = Link(end)
    trace = Trace() if os.environ.pop(TRACE, "") else None
    if kind == "pytest":
        sys.exit(serve_tests(link, folder, rest, trace))
    assert link is not None
    serve_suites(link, folder, rest == ["1"], trace)


if __name__ == "__main__":
    main()
