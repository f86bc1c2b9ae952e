"""asv's results, the tables and the commands, on a small asv project."""

import json
import subprocess
import sys

import pytest

from projecta.regress.project import git as project_git
from projecta.regress.project.config import Project
from projecta.regress.site import tables as report
from projecta.regress.store.results import Measurement, list_machines, read_measurements
from tests.regress.foreign import commit, configure, git, make, run


@pytest.fixture
def foreign(workplace):
    """A small asv project with two commits."""
    make(workplace)
    for message in ("one", "two"):
        commit(workplace, message)
    return workplace


def measure_with_asv(folder, commit="HEAD"):
    """Run asv as its user would by hand."""
    configure(folder, environment_type="existing")
    commit = git(folder, "rev-parse", commit).strip()
    asv = [sys.executable, "-m", "asv"]
    subprocess.run(
        [*asv, "machine", "--yes", "--machine", "desk"], check=True, capture_output=True, cwd=folder
    )
    subprocess.run(
        [*asv, "run", f"--python={sys.executable}", "--set-commit-hash", commit, "--machine", "desk"],
        capture_output=True, cwd=folder,
    )  # fmt: skip


def test_the_store_reads_what_asv_wrote(foreign):
    measure_with_asv(foreign)
    project = Project(foreign)
    assert list_machines(project) == ["desk"]
    found = {(m.benchmark, m.params["n"], m.params["word"]): m for m in read_measurements(project, "desk")}
    assert len(found) == 8
    slow = found["suite.Sleep.time_sleep", "2", "a"]
    assert slow.measured
    assert slow.unit == "seconds"
    assert 0.02 <= slow.value < 0.2
    assert slow.commit == git(foreign, "rev-parse", "HEAD").strip()
    failed = found["suite.Sleep.track_size", "2", "b"]
    assert failed.value is None
    assert not failed.measured
    assert found["suite.Sleep.track_size", "1", "b"].value == 1


def test_results_of_another_version_of_a_benchmark_are_left_out(foreign):
    measure_with_asv(foreign)
    path = foreign / ".asv/results/benchmarks.json"
    described = json.loads(path.read_text())
    described["suite.Sleep.time_sleep"]["version"] = "2"
    path.write_text(json.dumps(described))
    assert {m.benchmark for m in read_measurements(Project(foreign), "desk")} == {"suite.Sleep.track_size"}


def test_a_folder_without_results_reads_empty(foreign):
    assert list_machines(Project(foreign)) == []
    assert list(read_measurements(Project(foreign), "desk")) == []


def measurement(benchmark, value, unit="seconds", date=1, commit="c" * 40, **params):
    return Measurement(
        "desk", "env", commit, date, benchmark, {k: str(v) for k, v in params.items()}, value, unit
    )


def test_the_newest_commit_with_a_result_is_reported():
    old = measurement("a", 1.0, date=1, commit="a" * 40)
    new = measurement("a", 2.0, date=2, commit="b" * 40)
    failed = measurement("a", None, date=3, commit="d" * 40)
    assert report.newest_commit([new, failed, old], []) == [new]
    assert report.newest_commit([new, failed, old], ["d" * 40, "a" * 40]) == [old]
    assert report.newest_commit([], []) == []


def test_a_missing_repository_is_reported_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for command in ("bench", "report", "publish"):
        assert run(command) == (
            2,
            f"projecta: cannot find the project: {tmp_path} is not inside a git repository. Change to the project's folder.\n",
        )


def test_a_missing_asv_project_is_reported_in_one_line(foreign):
    (foreign / "asv.conf.json").unlink()
    code, text = run("report")
    assert (code, text.count("\n")) == (2, 1)
    assert "holds no asv.conf.json" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "projecta bench: RANGE must name commits of this repository; got 'nonsense'."),
        (["HEAD..HEAD"], "projecta bench: RANGE must hold at least one commit; got 'HEAD..HEAD'."),
        (["--bench", "("], "projecta: --bench must be a regular expression; got '(': missing )"),
        (
            ["--machine", "../x"],
            "projecta: --machine must be letters, digits, '.', '_' or '-'; got '../x'.",
        ),
    ],
)
def test_invalid_arguments_are_reported_in_one_line(foreign, words, message):
    code, text = run("bench", *words)
    assert code == 2
    assert text.startswith(message)
    assert text.count("\n") == 1


def test_nothing_measured_is_not_a_success(foreign):
    for command in ("report", "publish"):
        code, text = run(command)
        assert code == 4
        assert "no results yet" in text
    measure_with_asv(foreign)
    assert run("report", "--machine", "moon") == (
        2,
        "projecta report: --machine must be one of desk; got 'moon'.\n",
    )


def test_publish_writes_pages(foreign):
    measure_with_asv(foreign)
    measure_with_asv(foreign, "HEAD~1")
    code, text = run("publish")
    assert (code, text) == (0, "Pages: .asv/html/index.html (`projecta preview` serves them)\n")
    assert len(json.loads((foreign / ".asv/html/index.json").read_text())["revision_to_hash"]) == 2


def test_ranges(foreign):
    head, first = git(foreign, "rev-list", "HEAD").split()
    assert project_git.find_commits(foreign, None) == [head, first]
    assert project_git.find_commits(foreign, "HEAD") == [head]
    assert project_git.find_commits(foreign, f"{first}..HEAD") == [head]
    assert project_git.find_commits(foreign, "main~1") == [first]
    assert project_git.find_commits(foreign, "NEW") == [head]


def test_uncommitted_changes_are_named(foreign):
    assert project_git.uncommitted(foreign) == []
    (foreign / "file").write_text("three")
    (foreign / "other").write_text("new")
    (foreign / "results").mkdir()
    (foreign / "results/scan_time.csv").write_text("written by the report")
    assert project_git.uncommitted(foreign) == ["file", "other", "results/scan_time.csv"]


def test_bench_measures_publishes_and_reports(foreign):
    (foreign / "file").write_text("changed")
    code, text = run("bench", "HEAD", "--machine", "desk", "--bench", "time_sleep")
    assert code == 0
    assert "Not measured: uncommitted changes in 1 file(s): file" in text
    assert "Pages: .asv/html/index.html" in text
    assert "suite.Sleep.time_sleep(1, 'a') 0.01" in text
    stored = [m for m in read_measurements(Project(foreign), "desk") if m.measured]
    assert len(stored) == 4
    code, text = run("bench", "HEAD", "--machine", "desk", "--bench", "time_sleep")
    assert code == 0
    assert "time_sleep" not in text.partition("Machine")[0]  # nothing is measured twice
    assert [m for m in read_measurements(Project(foreign), "desk") if m.measured] == stored
    code, text = run("bench", "HEAD", "--machine", "desk", "--bench", "track_size")
    assert code == 3
    assert "RuntimeError: planted failure (suite.py:14)" in text
    assert len([m for m in read_measurements(Project(foreign), "desk") if m.measured]) == 7


def test_quick_stores_nothing(foreign):
    code, text = run("bench", "HEAD", "--machine", "desk", "--bench", "time_sleep", "--quick")
    assert code == 0
    assert "time_sleep" in text
    assert not list(read_measurements(Project(foreign), "desk"))
