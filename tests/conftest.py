"""Seeds, NaN in fresh memory, the `backend` fixture, and a process that interprets Triton kernels."""

import importlib.util
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from projecta.scan import BACKENDS, available_backends
from tests.cases import use_interpreter


def pytest_addoption(parser):
    parser.addoption(
        "--backends", default="", help="comma-separated: a named backend that cannot run is a failure"
    )
    parser.addoption("--browser", default="", help="path of a Chromium; named, it must run")
    parser.addoption("--screenshots", default="", help="folder to keep pictures of pages in")


def pytest_ignore_collect(collection_path, config):
    """Only `nox -s quick` collects test_speed.py; test_benchmarks.py runs the same cases once."""
    return (
        True if collection_path.name == "test_speed.py" and not config.getoption("benchmark_only") else None
    )


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items):
    """One worker runs what compiles numba kernels: two would compile them twice."""
    for item in items:
        path = str(item.path)
        rooms = (
            "tests/scan",
            "tests/conv",
            "tests/mamba",
            "tests/test_mrss",
            "tests/test_s4d",
            "test_parallel",
            "test_benchmarks",
        )
        if any(room in path for room in rooms) and "interpreter" not in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("numba"))


@pytest.hookimpl(trylast=True, specname="pytest_collection_modifyitems")
def pytest_groups_hold(config, items):
    """xdist marks the tests of a group in their ids, with the pytest that it was made for."""
    grouped = [item for item in items if item.get_closest_marker("xdist_group")]
    if getattr(config.option, "loadgroup", False) and not all("@" in item.nodeid for item in grouped):
        raise pytest.UsageError(f"pytest {pytest.__version__} does not keep the groups of pytest-xdist")


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        named = [name for name in metafunc.config.getoption("backends").split(",") if name]
        metafunc.parametrize("backend", named or [b for b in BACKENDS if b != "reference"], indirect=True)


@pytest.fixture
def backend(request):
    """Each backend but the reference; skipped where it cannot run, unless --backends names it."""
    reason = available_backends().get(request.param, "no such backend")
    if reason:
        (pytest.fail if request.config.getoption("backends") else pytest.skip)(f"{request.param}: {reason}")
    if request.param != "triton":
        yield request.param
        return
    torch.set_default_device("cuda")
    yield request.param
    torch.set_default_device("cpu")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty working folder for commands; asv keeps its machine file below it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / ".asv"))
    return tmp_path


@pytest.fixture(autouse=True)
def _deterministic():
    """A fixed seed; memory that an operator leaves unwritten reads as NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    if "torch._dynamo" in sys.modules:  # compilations must not count towards the next test's limit
        torch._dynamo.reset()


@pytest.fixture(scope="session")
def interpreter():
    """A process in which Triton is set to interpret before it is imported."""
    if importlib.util.find_spec("triton") is None:  # not imported here: the interpreter is chosen before that
        pytest.skip("triton is not installed")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), use_interpreter) as pool:
        yield pool
        pool.shutdown(cancel_futures=True)
