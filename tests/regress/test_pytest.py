"""The gate of tests that use pytest-benchmark's fixture, in a repository that is no asv project."""

import json
import subprocess
import sys

import pytest

from projecta.regress.run import pair
from projecta.regress.run import tests as tests_of_commits
from tests.regress.foreign import git, run

SORTING = """
import time


def sort(numbers):
    time.sleep({ms} / 1000)
    return sorted(numbers)
"""
TESTS = """
import time

import pytest

from sorting import sort


@pytest.fixture(scope="session")
def numbers():
    return list(range(100))[::-1]


def test_without_benchmark():
    raise RuntimeError("not the gate's to run")


@pytest.mark.parametrize("count", [10, 100])
def test_sort(benchmark, numbers, count):
    assert benchmark(sort, numbers[:count])[0] == 100 - count


def test_pedantic(benchmark):
    def setup():
        return ([3, 1, 2],), {}

    seen = []
    found = benchmark.pedantic(sort, setup=setup, teardown=seen.append, rounds=3)
    assert found == [1, 2, 3]
    assert len(seen) > 3


def test_time_alone(benchmark):
    benchmark.pedantic(time.sleep, (0.01,), iterations=2)


def test_wrong(benchmark):
    assert benchmark(sort, [2, 1]) == [2, 1]


def test_uses_nothing(benchmark):
    pass


@pytest.mark.skip(reason="no such device")
def test_skipped(benchmark):
    benchmark(sort, [])


def test_skipped_in_base(benchmark):
    import sorting
    if not hasattr(sorting, "new"):
        pytest.skip("sorting has no new")
    benchmark(sort, [])


def test_imports_what_the_commit_has(benchmark):
    benchmark(time.sleep, 0.01)
    import sorting
    assert "trees" in sorting.__file__
"""


@pytest.fixture
def sorting(workplace):
    """A package in a src layout: head sleeps for longer, and has another file of tests."""
    package, tests = workplace / "src" / "sorting", workplace / "tests"
    package.mkdir(parents=True)
    tests.mkdir()
    (workplace / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = "-n 2"\n')
    git(workplace, "init", "--quiet", "--initial-branch", "main")
    for ms in (10, 14):
        (package / "__init__.py").write_text(SORTING.format(ms=ms) + "new = None\n" * (ms == 14))
        git(workplace, "add", "--all")
        git(workplace, "commit", "--quiet", "--message", str(ms))
    (tests / "test_sort.py").write_text(TESTS)
    (tests / "test_new.py").write_text(
        "from sorting import new\n\n\ndef test_new(benchmark):\n    benchmark(print)\n"
    )
    return workplace


@pytest.mark.serial
def test_a_slower_function_is_found(sorting, monkeypatch):
    monkeypatch.setattr(pair, "MOST", 2)
    words = ("--pytest", "tests", "--json", "out.json")
    code, text = run("gate", "HEAD^", "HEAD", *words, "--bench", "pedantic")
    (row,) = json.loads((sorting / "out.json").read_text())["benchmarks"]
    assert (code, row["verdict"]) == (1, "REGRESSED"), text
    assert 1.3 < row["ratio"] < 1.45

    code, text = run("gate", "HEAD^", "HEAD", *words, "--budget", "0")
    rows = json.loads((sorting / "out.json").read_text())["benchmarks"]
    rows = {row["name"].split("::")[1]: row for row in rows}
    undecided = ("test_sort[10]", "test_sort[100]", "test_pedantic", "test_time_alone",
                 "test_imports_what_the_commit_has")  # fmt: skip
    assert {name: row["verdict"] for name, row in rows.items()} == dict.fromkeys(undecided, "INCONCLUSIVE") | {
        "test_wrong": "BROKEN", "test_uses_nothing": "BROKEN", "test_skipped": "NOT MEASURED",
        "test_new": "NOT MEASURED", "test_skipped_in_base": "NOT MEASURED",
    }  # fmt: skip
    assert rows["test_skipped_in_base"]["reason"] == "base skipped: sorting has no new"
    assert 1.3 < rows["test_sort[10]"]["ratio"] < 1.45
    assert 0.010 < rows["test_sort[10]"]["base"][0]["samples"][0] < 0.012
    assert 0.95 < rows["test_time_alone"]["ratio"] < 1.05
    assert rows["test_time_alone"]["base"][0]["number"] == 2
    assert rows["test_wrong"]["reason"].startswith("head failed: AssertionError")
    assert "did not call its fixture" in rows["test_uses_nothing"]["reason"]
    assert "no such device" in rows["test_skipped"]["reason"]
    assert rows["test_new"]["reason"] == "absent in base"


def test_what_cannot_be_collected_says_why(sorting):
    (sorting / "tests" / "test_broken.py").write_text("import no_such_module\n")
    code, text = run("gate", "HEAD^", "HEAD", "--pytest", "tests")
    assert code == 3
    assert "tests/test_broken.py: ModuleNotFoundError: No module named 'no_such_module'" in text
    code, text = run("gate", "HEAD^", "HEAD", "--pytest", ".")
    assert code == 2
    assert text.startswith(
        "projecta gate: --pytest must be a file or folder of tests below the repository's top;"
    )
    code, text = run("gate", "HEAD^", "HEAD", "--pytest", "tests", "--command", "true")
    assert (code, "--pytest must not be given with --command" in text) == (2, True)


def test_a_missing_package_is_named(sorting, monkeypatch):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "bare"], check=True)
    python = str(sorting / "bare/bin/python")
    monkeypatch.setattr(tests_of_commits.TestsBuild, "python", python)
    code, text = run("gate", "HEAD^", "HEAD", "--pytest", "tests")
    remedy = f"{python} has no pytest. Install it with {python} -m pip install pytest."
    assert (code, text.splitlines()[-1]) == (2, f"projecta: cannot collect the tests: {remedy}")


def test_the_same_commit_is_identical(sorting):
    code, text = run("gate", "HEAD", "HEAD", "--pytest", "tests/test_sort.py")
    assert (code, "identical" in text) == (0, True), text
