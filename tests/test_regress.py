"""Reading asv's results, the tables, and the command, on a small asv project of their own."""

import csv
import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from projecta.regress import report, runner
from projecta.regress.cli import cli
from projecta.regress.store import Measurement, Project

SUITE = """
    class Sleep:
        params = ([1, 2], ["a", "b"])
        param_names = ["n", "word"]
        version = "1"
        number, repeat, rounds, warmup_time = 1, 1, 1, 0.0

        def time_sleep(self, n, word):
            import time
            time.sleep(0.01 * n)

        def track_size(self, n, word):
            if word == "b" and n == 2:
                raise RuntimeError("planted failure")
            return n
        track_size.unit = "MiB"
"""


def git(folder, *words):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *words], check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """An asv project that is not ours: two commits, benchmarks of its own, the interpreter at hand."""
    config = {
        "version": 1, "project": "foreign", "repo": ".", "branches": ["HEAD"], "environment_type": "existing",
        "results_dir": ".asv/results", "html_dir": ".asv/html", "env_dir": ".asv/env",
    }  # fmt: skip
    (tmp_path / "asv.conf.json").write_text(json.dumps(config))
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/__init__.py").write_text("")
    (tmp_path / "benchmarks/suite.py").write_text(textwrap.dedent(SUITE))
    (tmp_path / ".gitignore").write_text(".asv\n__pycache__\n")
    git(tmp_path, "init", "--quiet", "--initial-branch", "main")
    for message in ("one", "two"):
        (tmp_path / "file").write_text(message)
        git(tmp_path, "add", "--all")
        git(tmp_path, "commit", "--quiet", "--message", message)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / ".asv"))  # asv keeps its machine file there
    return tmp_path


def measure_with_asv(folder, commit="HEAD"):
    """As a user of asv would by hand."""
    commit = git(folder, "rev-parse", commit).strip()
    (folder / ".asv").mkdir(exist_ok=True)
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
    assert project.machines() == ["desk"]
    found = {(m.benchmark, m.params["n"], m.params["word"]): m for m in project.measurements("desk")}
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
    assert {m.benchmark for m in Project(foreign).measurements("desk")} == {"suite.Sleep.track_size"}


def test_a_folder_without_results_reads_empty(foreign):
    assert Project(foreign).machines() == []
    assert list(Project(foreign).measurements("desk")) == []


def measurement(benchmark, value, unit="seconds", date=1, commit="c" * 40, **params):
    return Measurement(
        "desk", "env", commit, date, benchmark, {k: str(v) for k, v in params.items()}, value, unit
    )


MEASURED = [
    *(
        measurement("clip.Vtp.time_forward", 0.2 * keep * batch, case=case, batch=batch)
        for case, keep in (("full", 1.0), ("input 0.5", 0.5))
        for batch in (1, 8)
    ),
    *(
        measurement("clip.VtpPeak.track_peak_forward", 100 * keep, "MiB", case=case, batch=8)
        for case, keep in (("full", 1.0), ("input 0.5", 0.5))
    ),
    measurement("clip.VtpControl.time_forward", 0.9, case="random 0.7", batch=8),
    measurement("clip.VtpFlops.track_flops_ratio", 0.496, "of the full tower", case="input 0.5"),
    *(measurement("scan.Scan.time_forward", 1e-5 * l, backend="vectorised", length=l) for l in (512, 256)),
    *(
        measurement("scan.ScanPeak.track_peak_forward", l / 9, "MiB", backend="vectorised", length=l)
        for l in (256, 512)
    ),
    measurement("scan.ScanBound.track_peak_forward", 1.0, "MiB", length=256),
    measurement("mrss.Mrss.time_forward", 0.001, periods="every 16", length=256),
    measurement("scan.Scan.time_forward", None, backend="reference", length=256),
    measurement("scan.Scan.time_forward", float("nan"), backend="reference", length=512),
]


def test_the_newest_commit_with_a_result_is_reported():
    old = measurement("a", 1.0, date=1, commit="a" * 40)
    new = measurement("a", 2.0, date=2, commit="b" * 40)
    failed = measurement("a", None, date=3, commit="d" * 40)
    assert report.newest_commit([new, failed, old], []) == [new]
    assert report.newest_commit([new, failed, old], ["d" * 40, "a" * 40]) == [old]
    assert report.newest_commit([], []) == []


def test_the_report_writes_tables_and_plots(tmp_path):
    written = report.write_report(report.newest_commit(MEASURED, []), tmp_path)
    assert {p.name for p in written} == {
        "clip_vtp_results.csv", "clip_vtp_latency.png", "clip_vtp_memory.png", "scan_time.csv", "scan_time.png",
        "scan_memory.csv", "scan_memory.png", "mrss_time.csv", "mrss_time.png",
    }  # fmt: skip
    with (tmp_path / "clip_vtp_results.csv").open() as file:
        rows = list(csv.DictReader(file))
    by_name = {(row["variant"], row["keep_ratio"]): row for row in rows}
    assert by_name["baseline_b8", "1.0"] == {
        "variant": "baseline_b8", "plan": "full", "keep_ratio": "1.0", "flops_ratio": "", "latency_ms": "1600.0",
        "latency_change": "0.0", "throughput_img_s": "5.0", "memory_mib": "100.0",
        "memory_by_formula_mib": "", "t4_latency_ms": "81.0",
        "t4_memory_mib": "420.0",
    }  # fmt: skip
    half = by_name["input_b8", "0.5"]
    assert (half["flops_ratio"], half["latency_change"], half["t4_latency_ms"]) == ("0.496", "-0.5", "46.0")
    assert by_name["random_b8", "0.7"]["t4_latency_ms"] == ""
    assert rows[0]["memory_mib"] == ""  # not measured at batch 1
    with (tmp_path / "scan_time.csv").open() as file:
        assert [(r["backend"], r["length"], r["time_ms"]) for r in csv.DictReader(file)] == [
            ("vectorised", "256", "2.56"), ("vectorised", "512", "5.12"),
        ]  # fmt: skip
    for path in written:
        assert path.stat().st_size > (10_000 if path.suffix == ".png" else 20)


def test_the_summary_is_markdown():
    text = report.summary(report.newest_commit(MEASURED, []))
    assert "| variant | plan | keep_ratio | flops_ratio | latency_ms | latency_change |" in text
    assert "| input_b8 | input | 0.5 | 0.496 | 800 | -0.5 | 10 | 50 |  | 46 | 380 |" in text
    assert "| forward | vectorised | 2.56 | 5.12 |" in text


def run(*words):
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    return result.exit_code, result.output


def test_no_repository_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for command in ("bench", "report", "publish"):
        assert run(command) == (
            2,
            f"projecta: the current folder must be inside a git repository; got {tmp_path}.\n",
        )


def test_no_asv_project_is_said_in_one_line(foreign):
    (foreign / "asv.conf.json").unlink()
    code, text = run("report")
    assert (code, text.count("\n")) == (2, 1)
    assert "must hold an asv.conf.json" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "projecta bench: RANGE must name commits of this repository; got 'nonsense'."),
        (["HEAD..HEAD"], "projecta bench: RANGE must hold at least one commit; got 'HEAD..HEAD'."),
        (["--bench", "("], "projecta bench: --bench must be a regular expression; got '(': missing )"),
        (
            ["--machine", "../x"],
            "projecta bench: --machine must be letters, digits, '.', '_' or '-'; got '../x'.",
        ),
    ],
)
def test_wrong_words_are_named_in_one_line(foreign, words, message):
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
    assert (code, text) == (0, "Pages: .asv/html/index.html (served by `asv preview`)\n")
    assert len(json.loads((foreign / ".asv/html/index.json").read_text())["revision_to_hash"]) == 2


def test_ranges(foreign):
    head, first = git(foreign, "rev-list", "HEAD").split()
    assert runner.find_commits(foreign, None) == [head, first]
    assert runner.find_commits(foreign, "HEAD") == [head]
    assert runner.find_commits(foreign, f"{first}..HEAD") == [head]
    assert runner.find_commits(foreign, "main~1") == [first]
    assert runner.find_commits(foreign, "NEW") == []


def test_uncommitted_changes_are_named(foreign):
    assert runner.uncommitted(foreign) == []
    (foreign / "file").write_text("three")
    (foreign / "other").write_text("new")
    (foreign / "results").mkdir()
    (foreign / "results/scan_time.csv").write_text("written by the report")
    assert runner.uncommitted(foreign) == ["file", "other"]


def follow(script, tmp_path, capsys):
    """The progress display over a process that prints what asv would."""
    path = tmp_path / "fake.py"
    path.write_text(textwrap.dedent(script))
    code = runner._follow([sys.executable, str(path)], tmp_path, Console(width=200))
    return code, capsys.readouterr().out


def test_progress_shows_what_ran_and_why_it_failed(tmp_path, capsys):
    script = """
        print("· Discovering benchmarks")
        print("[10.00%] ··· Running (suite.a--).")
        print("[50.00%] ··· suite.a   ok")
        print("[50.00%] ··· ======\\\\n 1   1ms\\\\n ======")
        print("[75.00%] ··· suite.b   1/2 failed")
        print("             RuntimeError: planted")
        print("[100.00%] ··· suite.c   ok")
        raise SystemExit(2)
    """.replace("\\\\n", "\\n")
    code, text = follow(script, tmp_path, capsys)
    assert code == 2
    assert "Discovering benchmarks" in text
    assert "50 %" in text
    assert "suite.b   1/2 failed" in text
    assert "RuntimeError: planted" in text
    assert "1ms" not in text


def test_an_interrupt_leaves_no_process_behind(tmp_path):
    """SIGTERM to the command reaches asv as an interrupt, and its children end with it."""
    child = tmp_path / "asv.py"
    child.write_text(
        "import subprocess, sys, time\nsubprocess.Popen(['sleep', '4242'])\nprint('· up', flush=True)\ntime.sleep(60)"
    )
    command = (
        "import sys; from pathlib import Path; from rich.console import Console; from projecta.regress import runner; "
        f"runner._follow([sys.executable, {str(child)!r}], Path('.'), Console())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert "up" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in error
    time.sleep(0.1)
    left = [p for p in Path("/proc").glob("[0-9]*") if b"4242" in _read(p / "cmdline")]
    assert not left


def _read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_bench_measures_publishes_and_reports(foreign, monkeypatch):
    """The whole command on the foreign project, with asv's environment replaced by the interpreter at hand."""
    plain = runner.asv
    commit = git(foreign, "rev-parse", "HEAD").strip()

    def at_hand(root, *words):
        if words[0] == "run":
            words = ("run", f"--python={sys.executable}", "--set-commit-hash", commit, *words[2:])
        return plain(root, *words)

    monkeypatch.setattr(runner, "asv", at_hand)
    (foreign / ".asv").mkdir()
    (foreign / "file").write_text("changed")
    code, text = run("bench", "HEAD", "--machine", "desk", "--bench", "time_sleep")
    assert code == 0
    assert "Not measured: uncommitted changes in 1 file(s): file" in text
    assert "Pages: .asv/html/index.html" in text
    stored = [m for m in Project(foreign).measurements("desk") if m.measured]
    assert len(stored) == 4
    code, text = run("bench", "HEAD", "--machine", "desk", "--bench", "time_sleep")
    assert code == 0
    assert "time_sleep" not in text.partition("Machine")[0]  # nothing is measured twice
    assert [m for m in Project(foreign).measurements("desk") if m.measured] == stored
    code, text = run("bench", "HEAD", "--machine", "desk", "--bench", "track_size")
    assert code == 3
    assert "planted failure" in text
    assert len([m for m in Project(foreign).measurements("desk") if m.measured]) == 7
