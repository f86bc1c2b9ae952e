"""Every benchmark runs once at its smallest size, and the measuring helpers read true values."""

import functools
import itertools
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import common, scan
from projecta._cpu import threads
from tests.cases import benchmarks, parameters


def _misses(suite):
    """The cache misses of each cached function in the suite's module."""
    kept = [f for f in vars(sys.modules[f"benchmarks.{suite}"]).values() if hasattr(f, "cache_info")]
    return [f.cache_info().misses for f in kept]


@pytest.mark.parametrize(
    ("suite", "kind", "method"),
    [*benchmarks("time_"), *benchmarks("track_")],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_every_benchmark_runs(suite, kind, method, monkeypatch):
    compiled = set()  # numba kernels
    monkeypatch.setattr(threads, "_called", compiled)
    instance, before = kind(), _misses(suite)
    chosen = parameters(kind)[0]
    if hasattr(instance, "setup"):
        instance.setup(*chosen)
    prepared, ready = _misses(suite), set(compiled)
    value = getattr(instance, method)(*chosen)
    if method.startswith("time_"):
        assert _misses(suite) == prepared, "setup prepares another call than the one that is timed"
        if prepared != before:  # else an earlier test has prepared the call
            assert compiled == ready, "the timed call compiles"
    if hasattr(instance, "teardown"):
        instance.teardown(*chosen)
    if method.startswith("track_"):
        assert np.isfinite(value)
        assert value >= 0
        assert ("peak" in method) == (kind.unit == "MiB")
    assert kind.version.startswith("1-")
    assert kind.number == 1
    assert kind.timer is common.Suite.timer


def test_long_suites_skip_with_their_reason(monkeypatch):
    monkeypatch.setattr(common, "FULL", False)
    with pytest.raises(common.SkipNotImplemented, match="set PROJECTA_FULL=1"):
        scan.FullScan().setup("vectorised", 2048)


def test_a_commit_without_the_feature_skips_with_its_reason():
    with pytest.raises(common.SkipNotImplemented, match=r"this commit has no projecta\.warp_drive"):
        common.require("projecta", "warp_drive")


def test_a_commit_without_the_backend_skips_with_its_reason():
    with pytest.raises(common.SkipNotImplemented, match="this commit has no backend 'warp'"):
        scan._scan("warp", 64, 8, backward=False)


def test_a_wrong_result_is_not_timed(monkeypatch):
    right = scan.common.require("projecta", "selective_scan")

    def wrong(*args, backend, **kwargs):
        return right(*args, backend=backend, **kwargs) * (1.01 if backend == "vectorised" else 1)

    monkeypatch.setattr(common, "require_backend", lambda name: None)
    monkeypatch.setattr(common, "require", lambda module, name: wrong)
    with pytest.raises(common.WrongResult, match=r"vectorised y: error 1\.0e-02"):
        scan._scan.__wrapped__("vectorised", 64, 8, backward=False)


def _peaks():
    """(allocated MiB, read MiB) for calls that allocate by NumPy and by torch."""
    common.return_freed_memory()

    def hold(planted):
        held = np.ones(planted * 2**20 // 8)
        return float(held.sum())

    x = torch.ones(2**20)
    return [
        *((planted, common.peak_mib(functools.partial(hold, planted))) for planted in (0, 10, 50)),
        (4, common.peak_mib(lambda: x + 1)),
        (4, common.peak_mib(lambda: (x + 1).add_(1).sum())),
    ]


def test_peak_mib_reads_a_known_peak():
    """Runs in a new process, as asv does. In another process a block may get a hole of the heap for which
    NumPy requested huge pages, and count 2 MiB more."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for planted, read in pool.submit(_peaks).result(timeout=120):
            assert read == pytest.approx(planted, abs=1)


def _faults():
    """Page faults while ten calls each write 16 MiB of tensors and free them."""

    def call():
        held = [torch.ones(2**19) for _ in range(8)]
        return held[-1].sum()

    call()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_timed_call_uses_freed_memory_again():
    """Otherwise the heap layout of a process decides the page faults: here up to 4,096 per call."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(_faults).result(timeout=120) < 4096


class FakeDevice:
    """Work that is only queued; waiting for it takes its time."""

    def __init__(self):
        self.queued = 0.0

    def work(self, seconds):
        self.queued += seconds

    def synchronise(self):
        time.sleep(self.queued)
        self.queued = 0.0


@pytest.mark.serial
def test_the_timer_waits_for_an_asynchronous_device(monkeypatch):
    """asv reads the timer before and after a call. A plain clock sees only the queueing, ours the work."""
    device = FakeDevice()
    monkeypatch.setattr(common, "synchronise", device.synchronise)

    def read(timer):
        timer()
        start = timer()
        device.work(0.2)
        return timer() - start

    assert read(time.perf_counter) < 0.2 / 5
    device.synchronise()
    # A sleep may take longer, much longer on a busy machine, but never less.
    assert min(read(common.Suite.timer) for _ in range(3)) == pytest.approx(0.2, rel=0.05)


def test_the_version_follows_the_code_not_the_comments(tmp_path):
    source = tmp_path / "suite.py"
    source.write_text('"""One."""\nx = 1  # a\n')
    first = common.version(source)
    source.write_text('"""Two."""\n# b\nx = 1\n')
    assert common.version(source) == first
    source.write_text("x = 2\n")
    assert common.version(source) != first
    assert common.version(source, 2).startswith("2-")


def test_photographs_are_real_and_different():
    pixels = common.photographs(8)
    assert pixels.shape == (8, 3, 224, 224)
    flat = pixels.flatten(1)
    assert torch.pdist(flat).min() > 50
    assert flat.std(1).min() > 0.3


def test_the_quick_session_finds_its_cases():
    """A normal run leaves out test_speed.py, so check that it can be collected, from the same suites."""
    words = ["tests/test_speed.py", "--benchmark-only", "--collect-only", "--quiet", "--no-header"]
    own = {name: value for name, value in os.environ.items() if "XDIST" not in name}  # it would not collect
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], capture_output=True, text=True, cwd=Path(__file__).parents[1],
        env=own,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "scan.Scan.time_forward(cpu,2048)" in done.stdout
    assert "vtp.VtpSingle.time_forward(input 0.5,1)" in done.stdout


def test_every_part_of_the_gate_s_pattern_finds_a_benchmark():
    """A part that finds none would be left out in silence."""
    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    pattern = settings["tool"]["projecta"]["gate"].removeprefix("(?x)")
    names = [
        f"{suite}.{kind.__name__}.{method}({', '.join(map(repr, values))})"
        for suite, kind, method in (*benchmarks("time_"), *benchmarks("track_"))
        for values in itertools.product(*kind.params)
    ]
    for part in pattern.split("|"):
        assert any(re.search(part, name, re.VERBOSE) for name in names), part
