"""Results are identified by benchmark, version and parameters, never by index. Stored results are kept."""

import contextlib
import json
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from projecta.regress.project.config import Project
from projecta.regress.run.build import Build
from projecta.regress.store.export import merge_results
from projecta.regress.store.results import read_measurements
from tests.regress import foreign
from tests.regress.foreign import run

SUITE = """
    class Work:
        params = {params}
        version = "1"

        def track_n(self, n):
            return int(n)

        def time_n(self, n):
            pass
        time_n.number, time_n.repeat, time_n.rounds, time_n.warmup_time = 1, 2, {rounds}, 0
"""
PACKAGED = """
    import time
    import codecs_of_mine as mine

    class Codecs:
        params = list(mine.COSTS)
        version = "1"

        def track_cost(self, codec):
            return mine.COSTS[codec]

        def time_cost(self, codec):
            time.sleep(0.01 * mine.COSTS[codec])
        time_cost.number, time_cost.warmup_time = 1, 0
"""


def suite(params, rounds=1):
    return SUITE.format(params=params, rounds=rounds)


def stored(folder):
    """Values of the one result file, by benchmark and parameters."""
    path = next(p for p in (folder / ".asv/results/desk").glob("*-*.json"))
    data = json.loads(path.read_text())
    rows = {
        name: dict(zip(data["result_columns"], row, strict=False)) for name, row in data["results"].items()
    }
    return {
        (name, parameter): value
        for name, row in rows.items()
        for parameter, value in zip((row["params"] or [[""]])[0], row["result"], strict=True)
    }


def in_journal(folder):
    with sqlite3.connect(folder / ".asv/results/journal.sqlite") as base:
        rows = base.execute("select benchmark, params, samples from runs where status = 'ok'").fetchall()
    base.close()
    return {
        (name, json.loads(params)[0] if params != "[]" else ""): json.loads(samples)
        for name, params, samples in rows
    }


def write(folder, text):
    (folder / "benchmarks/suite.py").write_text(textwrap.dedent(text))


@pytest.mark.parametrize("params", [[10, 100, 1000], [1000, 100], [7, 1000], [1000], ["100", 1000]])
def test_a_change_of_parameters_moves_no_value(workplace, params):
    foreign.make(workplace, suite([100, 1000]))
    foreign.commit(workplace, "one")
    assert run("bench", "HEAD", "--machine", "desk")[0] == 0
    timed = {key: value for key, value in stored(workplace).items() if "time_n" in key[0]}
    write(workplace, suite(params))
    code, text = run("bench", "HEAD", "--machine", "desk")
    assert code == 0
    ran = {line.split("(")[1].split(")")[0] for line in text.splitlines() if "track_n(" in line}
    assert ran == {repr(p) for p in params} - {"100", "1000"}, "what is new runs, and nothing else"
    after = stored(workplace)
    assert {p: value for (name, p), value in after.items() if "track_n" in name} == {
        p: int(p.strip("'")) for p in ran | {"100", "1000"}
    }
    assert timed.items() <= after.items(), "the file keeps parameters that have left the suite"
    found = {m.label: m.value for m in read_measurements(Project(workplace), "desk")}
    assert found["suite.Work.track_n(1000)"] == 1000


def test_a_gate_compares_what_has_the_same_parameters(workplace):
    """`deflate` costs twice as much in head, at another index. Parameters of one side are not measured."""
    foreign.make(workplace, PACKAGED)
    first = foreign.commit(
        workplace, "one", codecs_of_mine="COSTS = {'deflate': 1.0, 'zip': 5.0, 'gone': 1.0}\n"
    )
    second = foreign.commit(
        workplace, "two", codecs_of_mine="COSTS = {'brotli': 0.5, 'zip': 5.0, 'deflate': 2.0}\n"
    )
    code, _ = run("gate", first, second, "--bench", "track_cost", "--json", "gate.json")
    rows = {row["params"][0]: row for row in json.loads(Path("gate.json").read_text())["benchmarks"]}
    assert code == 1
    assert {name: row["verdict"] for name, row in rows.items()} == {
        "'deflate'": "REGRESSED", "'zip'": "PASS", "'brotli'": "NOT MEASURED", "'gone'": "NOT MEASURED",
    }  # fmt: skip
    assert (rows["'deflate'"]["ratio"], rows["'zip'"]["ratio"]) == (2.0, 1.0)
    assert (rows["'brotli'"]["reason"], rows["'gone'"]["reason"]) == ("absent in base", "absent in head")
    run("gate", first, second, "--bench", "time_cost.*deflate", "--json", "gate.json", "--budget", "0")
    (timed,) = json.loads(Path("gate.json").read_text())["benchmarks"]
    assert 1.7 < timed["ratio"] < 2.3


def test_a_new_benchmark_does_not_count_beside_others(workplace):
    text = """
        import work
        from asv_runner.benchmarks.mark import SkipNotImplemented

        class Skips:
            version = "1"

            def setup(self):
                if not hasattr(work, "NEW"):
                    raise SkipNotImplemented("this commit has no NEW")

            def track_skips(self):
                return 1

        def track_all(): return 1
        if hasattr(work, "NEW"):
            def track_new(): return 1
    """
    foreign.make(workplace, text)
    first = foreign.commit(workplace, "one", work="")
    second = foreign.commit(workplace, "two", work="NEW = 1\n")
    for pattern, expected, missing in ((".", 0, 2), ("new|skips", 4, 2), ("skips", 4, 1)):
        code, text = run("gate", first, second, "--bench", pattern)
        assert (code, text.count("NOT MEASURED  ")) == (expected, missing), text
    code, text = run("gate", second, first, "--bench", "track")  # what head lacks counts
    assert code == 4, text


def test_another_version_of_a_benchmark_is_not_compared(workplace):
    text = "import work\ndef track_n():\n    return 1\ntrack_n.version = str(work.VERSION)\n"
    foreign.make(workplace, text)
    first = foreign.commit(workplace, "one", work="VERSION = 1")
    second = foreign.commit(workplace, "two", work="VERSION = 2")
    code, text = run("gate", first, second)
    assert code == 4
    assert "base has another version of it" in text


def test_results_of_an_old_journal_keep_their_values(workplace):
    """An old version stored values by index. Then 10 was added before 100, and got the value of 100."""
    foreign.make(workplace, suite([10, 100, 1000]))
    commit = foreign.commit(workplace, "one")
    run("bench", "HEAD", "--machine", "desk", "--bench", "nothing")
    environment = Build(Project(workplace), commit).environment.name
    path = workplace / ".asv/results/journal.sqlite"
    for old in path.parent.glob("journal.sqlite*"):
        old.unlink()
    text = Path(__file__).with_name("journal_by_place.sql").read_text()
    text = text.replace("{commit}", commit).replace("{environment}", environment).replace("'m'", "'desk'")
    with sqlite3.connect(path) as base:
        base.executescript(text)
    base.close()
    with sqlite3.connect(path) as base:
        base.execute("update runs set benchmark = replace(benchmark, 'w.W', 'suite.Work')")
        rows = base.execute("select id, benchmark, params, samples, status from runs order by id").fetchall()
    base.close()
    wrong = {"suite.Work.track_n": [100.0, 1000.0, 1000.0], "suite.Work.time_n": [1e-6, 2e-6, 3e-6]}
    file = workplace / ".asv/results/desk" / f"{commit[:8]}-{environment}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({
        "commit_hash": commit, "env_name": environment, "date": 1, "params": {"machine": "desk"}, "python": "3.11",
        "requirements": {}, "env_vars": {}, "result_columns": ["result", "params", "version"], "durations": {},
        "results": {name: [values, [["10", "100", "1000"]], "1"] for name, values in wrong.items()}, "version": 2,
    }))  # fmt: skip
    code, text = run("bench", "HEAD", "--machine", "desk", "--bench", "track_n")
    assert code == 0
    assert "track_n(10)" in text
    assert "track_n(100)" not in text, "what was measured is not measured again"
    found = stored(workplace)
    assert [found["suite.Work.track_n", str(n)] for n in (10, 100, 1000)] == [10.0, 100.0, 1000.0]
    assert found["suite.Work.time_n", "10"] != found["suite.Work.time_n", "10"], (
        "not measured: the value was another's"
    )
    with sqlite3.connect(path) as base:
        now = base.execute("select id, benchmark, params, samples, status from runs order by id").fetchall()
    base.close()
    assert now[: len(rows)] == rows, "every row is there, value for value"


def asv(folder, *words):
    done = subprocess.run([sys.executable, "-m", "asv", *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_results_that_left_the_suite_are_kept(workplace):
    """Results of a removed benchmark, parameter or version stay in the file or in the journal."""
    text = suite([1, 2]) + "\n    def track_gone():\n        return 42\n"
    foreign.make(workplace, text, environment_type="existing")
    commit = foreign.commit(workplace, "one")
    asv(workplace, "machine", "--yes", "--machine", "desk")
    asv(workplace, "run", f"--python={sys.executable}", "--set-commit-hash", commit, "--machine", "desk")
    foreign.configure(workplace, pythons=[sys.executable])
    before = stored(workplace)
    write(workplace, suite([2, 3]))
    assert run("bench", "HEAD", "--machine", "desk")[0] == 0
    after = stored(workplace)
    assert before.items() <= after.items(), "nothing is dropped, nothing changed"
    assert after["suite.Work.track_n", "3"] == 3
    write(workplace, suite([2]).replace('version = "1"', 'version = "2"'))
    assert run("bench", "HEAD", "--machine", "desk")[0] == 0
    kept = in_journal(workplace)
    assert kept["suite.Work.track_n", "1"] == [1.0], (
        "the file has the new version's row, the journal the old one's"
    )
    assert stored(workplace)["suite.track_gone", ""] == 42


COLUMNS = ["result", "params", "version", "stats_number", "samples"]


def file_of(**rows):
    return {"result_columns": COLUMNS, "results": rows, "durations": {}}


def test_files_are_merged_by_value():
    old = file_of(
        a=[[1.0, 2.0], [["1", "2"]], "v", [7, 8], [[1.0], [2.0]]], b=[[5.0], [], "v"], c=[[9.0], [["1"]], "old"],
    )  # fmt: skip
    new = file_of(a=[[30.0, None], [["3", "2"]], "v", [9, None]], c=[[1.0], [["1"]], "new"])
    rows = merge_results(old, new)["results"]
    assert rows["a"] == [[30.0, 2.0, 1.0], [["3", "2", "1"]], "v", [9, 8, 7], [None, [2.0], [1.0]]]
    assert rows["b"] == old["results"]["b"]
    assert rows["c"] == new["results"]["c"]
    assert merge_results(old, new, lambda name, key: key != ("1",))["results"]["a"][0] == [30.0, 2.0]
    assert merge_results(new, merge_results(old, new))["results"] == rows, "once more changes nothing"
    two = file_of(a=[[1.0, 2.0, 3.0, 4.0], [["1", "2"], ["'x'", "'y'"]], "v"])
    other = file_of(a=[[5.0], [["3"], ["'y'"]], "v"])
    merged = merge_results(two, other)["results"]["a"]
    assert merged[1] == [["3", "1", "2"], ["'y'", "'x'"]]
    assert merged[0] == [5.0, None, 2.0, 1.0, 4.0, 3.0]


def test_the_doctor_keeps_results_of_commits_that_a_clone_lacks(workplace):
    (workplace / "lib").mkdir()
    foreign.make(workplace / "lib", "def track_one():\n    return 1\n", results_dir="perf")
    foreign.commit(workplace / "lib", "one")
    with contextlib.chdir(workplace / "lib"):
        assert run("bench", "HEAD", "--machine", "desk")[0] == 0
    foreign.commit(workplace / "lib", "results of one")
    foreign.git(workplace, "clone", "--quiet", "--depth=1", f"file://{workplace}/lib", "shallow")
    foreign.git(workplace / "lib", "checkout", "--quiet", "--orphan", "other")
    foreign.commit(workplace / "lib", "unrelated")
    foreign.git(
        workplace,
        "clone",
        "--quiet",
        "--single-branch",
        "--branch=other",
        f"file://{workplace}/lib",
        "single",
    )
    (workplace / "suite").mkdir()
    foreign.make(workplace / "suite", "def track_one():\n    return 1\n", results_dir="perf", repo="../lib")
    foreign.commit(workplace / "suite", "suite")
    subprocess.run(["cp", "-r", "lib/perf", "suite/"], check=True, cwd=workplace)
    for folder, words in (
        ("shallow", "is not in this clone, which is shallow"), ("suite", "No problems."),
        ("single", "is not in this clone, which has one branch only"),
    ):  # fmt: skip
        with contextlib.chdir(workplace / folder):
            code, text = run("doctor", "--fix")
            assert code == 0
            assert words in text
            assert not list(Path("perf/quarantine").rglob("*.json"))
            assert list(Path("perf/desk").glob("*-*.json"))
