"""asv projects with other names, repositories, environments and plugins; and messages about faults."""

import contextlib
import errno
import json
import os
import re
import sqlite3
import subprocess
import sys
import tarfile
import textwrap
import venv
from pathlib import Path

import pytest

from projecta.regress.cli import errors as command
from projecta.regress.gate import session, statistics
from projecta.regress.project.config import Project
from projecta.regress.run import build as builds
from projecta.regress.run.case import Case, Outcome, higher_is_better, select
from projecta.regress.store import journal
from projecta.regress.store.journal import Journal
from projecta.regress.store.results import read_measurements
from tests.regress import foreign
from tests.regress.foreign import run

ONE = "def track_one():\n    return 1\n"
OF_TINY = "import tiny\n\ndef track_cost():\n    return tiny.COST\n"


def judged(path="gate.json"):
    return {row["name"]: row for row in json.loads(Path(path).read_text())["benchmarks"]}


# --- repositories


def test_a_suite_in_a_repository_of_its_own(workplace):
    """asv's `repo` is another repository. Gate, bench, publish and doctor use its commits."""
    library, own = workplace / "lib", workplace / "suite"
    for folder in (library, own):
        folder.mkdir()
    foreign.git(library, "init", "--quiet", "--initial-branch", "main")
    first = foreign.commit(library, "one", tiny="COST = 1\n")
    foreign.git(library, "tag", "v1")
    foreign.commit(library, "two", tiny="COST = 3\n")
    foreign.git(library, "tag", "v2")
    foreign.make(own, OF_TINY, repo="../lib", branches=["main"])
    foreign.commit(own, "suite")
    with contextlib.chdir(own):
        assert run("gate", "v1", "v2", "--json", "gate.json")[0] == 1
        assert judged()["suite.track_cost"]["ratio"] == 3.0
        assert run("gate", "v2", "v2")[0] == 0
        code, text = run("bench", "v1..v2", "--machine", "desk")
        assert code == 0
        assert "uncommitted" not in text
        assert run("bench", "v1", "--machine", "desk")[0] == 0
        assert {m.commit[:8]: m.value for m in read_measurements(Project(own), "desk")}[first[:8]] == 1
        assert run("doctor") == (0, "No problems.\n")
        code, text = run("gate", "v1", "v3")
        assert code == 2
        assert "a revision must name a commit of this repository; got 'v3'" in text


def test_a_repository_that_is_not_there(workplace):
    foreign.make(workplace, ONE, repo="../nowhere")
    foreign.commit(workplace, "one")
    code, text = run("gate", "HEAD", "HEAD", "--always")
    assert code == 2
    assert "projecta: cannot open the repository of asv.conf.json: '../nowhere'" in text


@pytest.mark.parametrize("package", ["", "src/"])
def test_a_configuration_in_a_subfolder_and_the_package_at_the_top(workplace, package):
    folder = workplace / "perf"
    folder.mkdir()
    foreign.make(folder, OF_TINY, repo="..")
    subprocess.run(["rm", "-rf", folder / ".git"], check=True)
    foreign.git(workplace, "init", "--quiet", "--initial-branch", "main")
    (workplace / package / "tiny").mkdir(parents=True)
    commits = []
    for cost in (1, 2):
        (workplace / package / "tiny/__init__.py").write_text(f"COST = {cost}\n")
        commits.append(foreign.commit(workplace, str(cost)))
    with contextlib.chdir(folder):
        assert run("gate", *commits, "--json", "gate.json")[0] == 1
        assert judged()["suite.track_cost"]["ratio"] == 2.0


def test_a_python_whose_tarfile_knows_no_filters(workplace, monkeypatch):
    """Python 3.11.0 to 3.11.3."""
    plain = tarfile.TarFile.extractall

    def extractall(self, path=".", members=None, *, numeric_owner=False):
        return plain(self, path, members, numeric_owner=numeric_owner)

    monkeypatch.setattr(tarfile.TarFile, "extractall", extractall)
    foreign.make(workplace, OF_TINY)
    commit = foreign.commit(workplace, "one", tiny="COST = 1")
    assert (builds.worktree(Project(workplace), commit) / "tiny.py").is_file()


def test_links_that_lead_out_of_the_archive(workplace):
    foreign.make(workplace, OF_TINY)
    (workplace / "absolute").symlink_to("/etc")
    (workplace / "outside").symlink_to("../../elsewhere")
    first = foreign.commit(workplace, "one", tiny="COST = 1")
    assert run("gate", first, first)[0] == 0


# --- packages


def test_an_installed_copy_is_not_taken_for_the_commit(workplace):
    """The package is in lib/ under another name, so the files of neither commit are imported."""
    environment = workplace / "venv"
    venv.create(environment, symlinks=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "here.pth").write_text("\n".join(path for path in sys.path if path))
    (packages / "tiny.py").write_text("COST = 1\n")
    folder = workplace / "project"
    folder.mkdir()
    suite = "def track_cost():\n    import tiny\n    return tiny.COST\n"  # imports when it runs, not before
    foreign.make(folder, suite, project="fast-yaml", benchmark_dir="benchmarks", environment_type="existing")
    (folder / "lib").mkdir()
    commits = []
    for cost in (1, 10):
        (folder / "lib/tiny.py").write_text(f"COST = {cost}\n")
        commits.append(foreign.commit(folder, str(cost)))
    words = [environment / "bin/python", "-m", "projecta", "gate", *commits, "--machine", "desk"]
    project = str(Path(__file__).parents[2])
    done = subprocess.run(
        words, cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": project}
    )
    assert done.returncode == 3, done.stderr
    assert "tiny is imported from" in done.stderr
    assert "not from the commit's files. Take environment_type virtualenv" in done.stderr


@pytest.mark.parametrize(
    ("name", "project", "source", "kept"),
    [
        ("my-lib", "my_lib", "", False), ("My.Lib", "my_lib", "", False), ("other", "my_lib", "", True),
        ("dist-of-it", "my_lib", "file://{folder}/.asv/env/abc/wheels/dist.whl", False),
        ("dist-of-it", "my_lib", "file:///elsewhere/dist.whl", True),
    ],
)  # fmt: skip
def test_the_packages_leave_out_the_project_itself(tmp_path, name, project, source, kept):
    installed = [(name, "1.0", source.format(folder=tmp_path)), ("numpy", "2.0", "")]
    found = builds.other_packages(installed, project, tmp_path / ".asv/env")
    assert found == {"numpy": "2.0"} | ({builds.normalised(name): "1.0"} if kept else {})


# --- environments and plugins


class FakeEnvironment:
    def __init__(self, requirements, variables):
        self.python, self.requirements, self.env_vars = "3.11", requirements, variables


def test_labels_of_environments_name_their_differences():
    made = [
        FakeEnvironment({"numpy": n, "six": "1"}, {"MODE": m}) for n in ("1", "2") for m in ("fast", "slow")
    ]
    assert builds.environment_labels(made) == [
        "MODE=fast, numpy=1", "MODE=slow, numpy=1", "MODE=fast, numpy=2", "MODE=slow, numpy=2",
    ]  # fmt: skip
    assert builds.environment_labels(made[:1]) == [""]


PLUGIN = """
    from asv.environment import ExistingEnvironment

    class Mine(ExistingEnvironment):
        tool_name = "mine"

        def __init__(self, conf, python, requirements, variables):
            self.mode = "-".join(variables.values())
            super().__init__(conf, "same", {}, variables)

        @classmethod
        def matches(cls, python):
            return True

        @property
        def name(self):
            return f"mine-{self.mode}"
"""


def test_a_plugin_s_environments_are_all_gated(workplace):
    """Head costs ten times as much, in the second environment only. The environments share one error rate."""
    suite = "import os\nimport tiny\n\ndef track_cost():\n    return tiny.COST[os.environ['MODE']]\n"
    matrix = {"env": {"MODE": ["fast", "slow"]}}
    foreign.make(workplace, suite, plugins=[".my_plugin"], environment_type="mine", matrix=matrix)
    first = foreign.commit(
        workplace, "one", tiny="COST = {'fast': 1, 'slow': 1}\n", my_plugin=textwrap.dedent(PLUGIN)
    )
    second = foreign.commit(workplace, "two", tiny="COST = {'fast': 1, 'slow': 10}\n")
    code, text = run("gate", first, second, "--json", "gate.json")
    assert code == 1
    assert "environment 2 of 2: MODE=slow" in text
    rows = {row["environment"]: row for row in json.loads(Path("gate.json").read_text())["benchmarks"]}
    assert {label: row["verdict"] for label, row in rows.items()} == {
        "MODE=fast": "PASS",
        "MODE=slow": "REGRESSED",
    }
    assert "[MODE=slow]" in text
    assert "chance of a false REGRESSED at most 1% a gate" in text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"environment_type": "strange"}, "strange"),
        ({"plugins": [".no_such_plugin"]}, "cannot import a plugin of asv.conf.json: '.no_such_plugin': ModuleNotFoundError"),
        ({"environment_type": "virtualenv", "pythons": ["2.0"]}, "2.0"),
    ],
)  # fmt: skip
def test_an_error_of_asv_is_reported(workplace, settings, words):
    foreign.make(workplace, ONE, **settings)
    foreign.commit(workplace, "one")
    code, text = run("gate", "HEAD", "HEAD", "--always")
    assert code == 2
    assert words in text
    assert len(text.strip().splitlines()) == 1


# --- results of benchmarks


def test_asv_conventions_hold_for_benchmarks(workplace):
    """nan means skipped, True is 1, setup_cache has its own timeout and fails once, --quick runs once."""
    foreign.make(workplace, f"""
        import time

        def track_nan():
            return float("nan")

        def track_true():
            return True

        class Slow:
            timeout = 1
            def setup_cache(self):
                time.sleep(1.5)
                return 5
            setup_cache.timeout = 60
            def track_cached(self, five):
                return five

        class Fails:
            params = list(range(4))
            def setup_cache(self):
                open({str(workplace / "calls")!r}, "a").write("x")
                raise RuntimeError("no network")
            def track_y(self, data, p):
                return data

        def time_rounds():
            open({str(workplace / "rounds")!r}, "a").write("x")
        time_rounds.rounds, time_rounds.number, time_rounds.repeat, time_rounds.warmup_time = 4, 1, 1, 0
    """)  # fmt: skip
    foreign.commit(workplace, "one")
    code, text = run("bench", "HEAD", "--machine", "desk", "--quick")
    assert code == 3
    assert len((workplace / "calls").read_text()) == 1
    assert text.count("setup_cache: RuntimeError: no network") == 4
    assert len(text.split("suite.time_rounds")) == 2, "once"
    assert "suite.track_nan skipped" in text
    assert "suite.track_true 1 unit" in text
    assert "suite.Slow.track_cached 5 unit" in text


def test_a_setup_cache_takes_the_longest_timeout_of_its_benchmarks():
    entry = {"type": "track", "unit": "unit", "version": "1", "params": [], "setup_cache_key": "suite:7"}
    found = builds.cases(
        {"a": entry | {"timeout": 5}, "b": entry | {"timeout": 50, "setup_cache_timeout": None}}
    )
    assert [case.cache_timeout for case in found] == [50.0, 50.0]
    found = builds.cases({"a": entry | {"timeout": 5, "setup_cache_timeout": 7}})
    assert [case.cache_timeout for case in found] == [7.0]


@pytest.mark.parametrize("zero", ["base", "head"])
def test_a_timing_of_zero_is_not_measured(zero):
    case = Case("a.b", 0, (), "time", "seconds", "1", 1.0)
    row = session.Row(case, dict.fromkeys(session.SIDES, case))
    for side in session.SIDES:
        row.outcomes[side].append(Outcome("ok", (0.0 if side == zero else 1e-3,), 1))
    row.judge(statistics.Design())
    assert row.verdict == statistics.NOT_MEASURED
    assert row.judgement.reason == f"{zero} took 0 s, less than its clock resolves: set a larger `number`"


def test_metrics_have_a_direction(workplace):
    """If higher is better, a fall is a regression and a rise is not. asv's pages get the direction too."""
    foreign.make(workplace, """
        import tiny

        def track_cosine():
            return tiny.COSINE
        track_cosine.higher_is_better = True

        class Rates:
            higher_is_better = True
            def track_accuracy(self):
                return tiny.COSINE
            def track_error(self):
                return 1 - tiny.COSINE
            track_error.higher_is_better = False

        def track_images():
            return 100 * tiny.COSINE
        track_images.unit = "images/s"
    """)  # fmt: skip
    commits = [foreign.commit(workplace, str(c), tiny=f"COSINE = {c}\n") for c in (0.99, 0.5)]
    assert run("gate", *commits, "--json", "gate.json")[0] == 1
    assert {name: row["verdict"] for name, row in judged().items()} == dict.fromkeys(judged(), "REGRESSED")
    assert judged()["suite.track_cosine"]["ratio"] == pytest.approx(0.5 / 0.99)
    assert run("gate", *reversed(commits), "--json", "gate.json")[0] == 0
    run("bench", "HEAD", "--machine", "desk", "--bench", "cosine")
    described = json.loads((workplace / ".asv/results/benchmarks.json").read_text())
    known = {name: higher_is_better(entry) for name, entry in described.items() if name != "version"}
    assert [m.higher_is_better for m in read_measurements(Project(workplace), "desk")] == [True]
    assert known == {
        "suite.track_cosine": True, "suite.Rates.track_accuracy": True, "suite.Rates.track_error": False,
        "suite.track_images": True,
    }  # fmt: skip
    assert not higher_is_better({"unit": "images/s", "higher_is_better": False})


def test_a_metric_that_varies_is_judged_in_its_direction():
    case = Case("a.b", 0, (), "track", "unit", "1", 1.0, higher_is_better=True)
    for factor, verdict in ((0.8, statistics.REGRESSED), (1.25, statistics.PASS)):
        row = session.Row(case, dict.fromkeys(session.SIDES, case))
        for i in range(14):
            value = 1 + 0.03 * (i % 5)
            for side, by in (("base", 1.0), ("head", factor)):
                row.outcomes[side].append(Outcome("ok", (value * by * (1 + 0.001 * i),)))
            row.judge(statistics.Design())
            if row.judgement.verdict:
                break
        assert row.verdict == verdict
        assert row.judgement.low <= row.judgement.ratio <= row.judgement.high
        assert row.judgement.ratio == pytest.approx(factor)


@pytest.mark.parametrize(("unit", "verdict"), [("MiB", statistics.PASS), ("unit", statistics.REGRESSED)])
def test_a_small_peak_that_varies_by_what_the_allocator_makes_passes(unit, verdict):
    case = Case("a.b", 0, (), "track", unit, "1", 1.0)
    row = session.Row(case, dict.fromkeys(session.SIDES, case))
    for i in range(14):
        for side, size in (("base", 14.0), ("head", 14.15)):  # 1 %, and below the floor of peaks
            row.outcomes[side].append(Outcome("ok", (size + 0.16 * (i % 2),)))
        row.judge(statistics.Design())
        if row.judgement.verdict:
            break
    assert row.verdict == verdict


def test_the_size_of_an_object_has_no_floor():
    case = Case("a.b", 0, (), "memory", "bytes", "1", 1.0)  # asv's mem_ benchmarks
    row = session.Row(case, dict.fromkeys(session.SIDES, case))
    for _ in range(2):
        for side, size in (("base", 2000.0), ("head", 200_000.0)):
            row.outcomes[side].append(Outcome("ok", (size,)))
        row.judge(statistics.Design())
    assert row.verdict == statistics.REGRESSED


def test_results_are_written_into_new_folders(workplace):
    foreign.make(workplace, "import tiny\ndef track_size():\n    return tiny.SIZE\n")
    commits = [foreign.commit(workplace, str(n), tiny=f"SIZE = {n}\n") for n in (1, 10)]
    words = ("--json", "new/gate.json", "--markdown", "new/gate.md", "--plot", "new/gate.chart")
    code, text = run("gate", *commits, *words)
    assert code == 1, text
    assert {path.name for path in (workplace / "new").iterdir()} == {"gate.json", "gate.md", "gate.chart"}


def test_a_metric_that_was_0_gives_valid_json(workplace):
    foreign.make(workplace, "import tiny\ndef track_errors():\n    return tiny.ERRORS\n")
    commits = [foreign.commit(workplace, str(n), tiny=f"ERRORS = {n}\n") for n in (0, 5)]
    assert run("gate", *commits, "--json", "gate.json")[0] == 1
    assert "Infinity" not in (workplace / "gate.json").read_text()


def test_a_setup_cache_that_crashes_says_how(workplace):
    foreign.make(
        workplace,
        """
        import os, signal

        class Cached:
            def setup_cache(self):
                os.kill(os.getpid(), signal.SIGSEGV)

            def track_n(self, cached):
                return 1
    """,
    )
    foreign.commit(workplace, "one")
    code, text = run("bench", "HEAD", "--machine", "desk")
    assert code == 3
    assert "setup_cache: ended by SIGSEGV" in " ".join(text.split())


@pytest.mark.parametrize("safe", ["", "1"])
def test_the_worker_starts_where_its_path_has_a_link(workplace, safe):
    link = workplace / "link"
    link.symlink_to(builds.WORKER.parent)
    (workplace / "test_a.py").write_text("def test_a(benchmark):\n    benchmark(print)\n")
    words = [sys.executable, str(link / builds.WORKER.name), "-", "pytest", str(workplace), "test_a.py"]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONSAFEPATH": safe})
    assert done.returncode == 0, done.stderr
    assert "test_a.py::test_a" in json.loads(done.stdout.splitlines()[-1])["tests"]


# --- messages to the user


def test_the_exit_code_where_every_benchmark_fails(workplace):
    foreign.make(workplace, "def track_n():\n    raise RuntimeError('broken')\n")
    foreign.commit(workplace, "one")
    code, text = run("bench", "HEAD", "--machine", "desk")
    assert code == 3
    assert text.splitlines()[-1] == "1 failed, with the reasons above."


@pytest.mark.parametrize("text", ['{"version":}', "\xff", "[]", '{"version": 1}'])
def test_a_configuration_that_cannot_be_read_is_named(workplace, text):
    foreign.make(workplace, ONE)
    foreign.commit(workplace, "one")
    (workplace / "asv.conf.json").write_bytes(text.encode("latin-1"))
    code, said = run("gate", "HEAD", "HEAD", "--always")
    assert code == 2
    assert "asv.conf.json" in said
    assert len(said.strip().splitlines()) == 1


def test_a_damaged_machine_file_is_named(workplace):
    foreign.make(workplace, ONE)
    foreign.commit(workplace, "one")
    Path(os.environ["HOME"]).mkdir(exist_ok=True)
    Path(os.environ["HOME"], ".asv-machine.json").write_text("{broken")
    code, said = run("bench", "HEAD", "--machine", "desk")
    assert code == 2
    assert ".asv-machine.json" in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "error",
    [ValueError("math domain error"), TypeError("no len()"), sqlite3.OperationalError("no such column")],
)
def test_an_internal_error_writes_its_traceback_to_a_file(error, capsys):
    @command.one_line
    def broken():
        raise error

    with pytest.raises(SystemExit) as caught:
        broken()
    assert caught.value.code == command.CRASHED == 70
    line = capsys.readouterr().err
    path = Path(re.search(r"The traceback is in (\S+)\. Please", line)[1])
    assert line.startswith(f"projecta: crashed: {type(error).__name__}: {error}.")
    assert "raise error" in path.read_text()
    path.unlink()


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EACCES, "Change its permissions."), (errno.ENOSPC, "Free some space."),
        (errno.EADDRINUSE, "Take another port: --port."),
    ],
)  # fmt: skip
def test_an_error_of_the_system_is_reported_in_one_line(number, remedy, capsys):
    @command.one_line
    def refused():
        raise OSError(number, "no", "results")

    with pytest.raises(SystemExit) as caught:
        refused()
    assert caught.value.code == command.USAGE
    assert capsys.readouterr().err == f"projecta: cannot use results: no. {remedy}\n"


def test_calibration_reports_a_broken_benchmark(workplace):
    foreign.make(workplace, "def time_n():\n    raise RuntimeError('broken')\n")
    foreign.commit(workplace, "one")
    code, text = run("calibrate", "--pairs", "3")
    assert code == 3
    assert "BROKEN: suite.time_n: head failed: RuntimeError: broken" in text


def test_parameters_from_a_set_have_one_order_in_all_processes(workplace):
    words = [f"w{i}" for i in range(12)]
    text = f"class Work:\n    params = list({set(words)!r})\n    def track_n(self, word):\n        return int(word[1:])\n"
    foreign.make(workplace, text)
    foreign.commit(workplace, "one")
    assert run("bench", "HEAD", "--machine", "desk")[0] == 0
    found = {m.label: m.value for m in read_measurements(Project(workplace), "desk")}
    assert found == {f"suite.Work.track_n('{word}')": int(word[1:]) for word in words}


def test_exit_codes_are_those_of_the_docs():
    text = (Path(__file__).parents[2] / "docs/gate.md").read_text()
    codes = statistics.EXIT_CODES | {
        "usage": command.USAGE,
        "crash": command.CRASHED,
        "interrupted": command.INTERRUPTED,
    }
    for name, code in codes.items():
        assert f"| {name} | {code} |" in text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SQLITE_FULL", "projecta: cannot write journal.sqlite: the disk is full (it). Free some space. What was measured"),
        ("SQLITE_BUSY", "journal.sqlite: another program has it open (it). End that program."),
        ("SQLITE_READONLY", "journal.sqlite: it may not be written (it). Change its permissions."),
        ("SQLITE_ERROR", None),
    ],
)  # fmt: skip
def test_errors_of_sqlite_are_distinguished(name, words):
    error = sqlite3.OperationalError("it")
    error.sqlite_errorname = name
    if words is None:
        journal.explain(Path("journal.sqlite"), error)
        return
    with pytest.raises(ValueError, match=r"^projecta: ") as caught:
        journal.explain(Path("journal.sqlite"), error)
    assert words in str(caught.value)


def test_a_locked_journal_is_reported(workplace):
    foreign.make(workplace, ONE)
    foreign.commit(workplace, "one")
    with Journal(Project(workplace)) as book:
        book.base.execute("pragma busy_timeout = 10")
        facts = book.provenance({})
        other = sqlite3.connect(book.path, isolation_level=None)
        other.execute("begin immediate")
        with pytest.raises(
            ValueError, match=r"journal\.sqlite: another program has it open \(database is locked\)"
        ):
            book.add(
                "desk",
                "c",
                "e",
                Case("a.b", 0, (), "track", "MiB", "1", 1.0),
                Outcome("ok", (1.0,)),
                "bench",
                facts,
            )
        other.execute("rollback")
        other.close()
    assert select([], None) == []
