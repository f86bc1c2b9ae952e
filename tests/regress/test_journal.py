"""No result is lost by faults of benchmarks, runners, disks or files."""

import contextlib
import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from projecta.regress.project.config import Project
from projecta.regress.project.git import find_commits
from projecta.regress.run import group
from projecta.regress.run.case import Case, Outcome
from projecta.regress.store import journal
from projecta.regress.store.journal import Journal
from projecta.regress.store.results import list_commits, read_measurements
from tests.regress import foreign
from tests.regress.foreign import ENDINGS, FAULTS, FOREVER, run, running, start


@pytest.fixture
def project(workplace):
    return workplace


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_every_fault_has_its_reason(project, method):
    foreign.make(project, FAULTS, launch_method=method)
    foreign.commit(project, "one")
    code, _ = run("bench", "HEAD", "--machine", "desk")
    assert code == 3
    with sqlite3.connect(project / ".asv/results/journal.sqlite") as base:
        rows = base.execute("select benchmark, status, reason, samples, provenance from runs").fetchall()
        facts = json.loads(base.execute("select facts from provenance").fetchone()[0])
    base.close()
    found = {name.split(".")[-1].partition("_")[2]: (status, reason) for name, status, reason, _, _ in rows}
    if method == "forkserver":
        assert "SIGSEGV" in found.pop("segfaults")[1]
    else:
        assert found["segfaults"] == ENDINGS["segfaults"]
        found.pop("segfaults")
    for name, (status, reason) in found.items():
        assert status == ENDINGS[name][0], name
        assert ENDINGS[name][1] in reason, name
    assert len(rows) == len(ENDINGS)
    assert facts["processors"] == os.cpu_count()
    assert facts["packages"]["asv-runner" if "asv-runner" in facts["packages"] else "asv_runner"]
    assert not running(FOREVER)
    stored = {
        m.benchmark.split("_")[-1]: m.value for m in read_measurements(Project(project), "desk") if m.measured
    }
    assert stored == {"good": 1.5, "garbage": 2.5, "cached": 7.0}


def test_a_benchmark_without_a_timeout_takes_the_project_s(project):
    foreign.make(project, SLEEPS, default_benchmark_timeout=1)
    foreign.commit(project, "one")
    code, text = run("bench", "HEAD", "--machine", "desk", "--quick")
    assert code == 3
    assert text.count("took longer than its timeout of 1 s") == 1, text
    assert text.splitlines()[-1] == "1 failed, with the reasons above."


SLEEPS = """
    import time

    def track_its_own():
        time.sleep(1.5)
        return 1
    track_its_own.timeout = 20

    def track_the_project_s():
        time.sleep(4242)
"""
SLOW = """
    import time

    class Slow:
        params = list(range(6))
        version = "1"
        number, repeat, rounds, warmup_time = 1, 1, 2, 0.0

        def time_it(self, i):
            time.sleep(0.05)
"""


def kept(folder):
    path = folder / ".asv/results/journal.sqlite"
    if not path.exists():
        return 0
    base = sqlite3.connect(path)
    try:
        assert base.execute("pragma integrity_check").fetchone()[0] == "ok"
        if not base.execute("select 1 from sqlite_master where name = 'runs'").fetchone():
            return 0  # killed before it created the table
        return base.execute("select count(*) from runs where status = 'ok'").fetchone()[0]
    finally:
        base.close()


def size_of(path):
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def wait_for_writes(folder, process, count):
    """Return while the run writes to the journal for the `count`-th time, or when it has ended."""
    log = folder / ".asv/results/journal.sqlite-wal"
    for _ in range(count):
        before = size_of(log)
        while size_of(log) == before and process.poll() is None:
            time.sleep(0.001)


def test_a_run_killed_at_any_moment_keeps_its_results_and_resumes(project):
    """kill -9 at eight random moments: in turn by time, and as it writes. Processes of the run end as well."""
    foreign.make(project, SLOW)
    foreign.commit(project, "one")
    draw, counts = random.Random(0), []
    for i in range(8):
        process = start(project, "bench", "HEAD", "--machine", "desk", start_new_session=True)
        if i % 2:
            wait_for_writes(project, process, draw.randint(1, 6))
        else:
            time.sleep(draw.uniform(0.1, 1.6))
        process.kill()
        process.communicate()
        counts.append(kept(project))
    assert counts == sorted(counts)
    assert any(0 < count < 12 for count in counts)
    time.sleep(0.5)
    assert not running(str(project / "benchmarks"))
    process = start(project, "bench", "HEAD", "--machine", "desk")
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert kept(project) == 12  # six cases, two rounds: none twice
    assert len([m for m in read_measurements(Project(project), "desk") if m.measured]) == 6


LONG = """
    import subprocess

    class Long:
        version = "1"

        def track_it(self):
            subprocess.run(["sleep", "FOREVER"])
""".replace("FOREVER", FOREVER)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_killed_run_leaves_no_process(project, method):
    """A long benchmark and its child process end when the run is killed."""
    foreign.make(project, LONG, launch_method=method)
    foreign.commit(project, "one")
    process = start(project, "bench", "HEAD", "--machine", "desk", start_new_session=True)
    limit = time.monotonic() + 60
    while not running(FOREVER) and time.monotonic() < limit:
        time.sleep(0.05)
    assert running(FOREVER)
    process.kill()
    process.communicate()
    limit = time.monotonic() + 10
    while (running(FOREVER) or running(str(project / "benchmarks"))) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not running(FOREVER)
    assert not running(str(project / "benchmarks"))


def test_a_run_ends_with_its_parent(project):
    """A runner kills the shell that called the command."""
    foreign.make(project, LONG)
    foreign.commit(project, "one")
    process = start(project, "bench", "HEAD", "--machine", "desk", parent=True, start_new_session=True)
    limit = time.monotonic() + 60
    while not running(FOREVER) and time.monotonic() < limit:
        time.sleep(0.05)
    assert running(FOREVER)
    process.kill()
    text, _ = process.communicate(timeout=30)  # ends when the command has closed its output
    assert "Interrupted" in text
    assert not running(FOREVER)
    assert not running(str(project / "benchmarks"))


def test_an_interrupted_quick_run_does_not_claim_stored_results(project):
    foreign.make(project, LONG)
    foreign.commit(project, "one")
    process = start(project, "bench", "HEAD", "--machine", "desk", "--quick", start_new_session=True)
    limit = time.monotonic() + 60
    while not running(FOREVER) and time.monotonic() < limit:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert (process.returncode, text.splitlines()[-1]) == (130, "Interrupted.")
    assert not running(FOREVER)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_writes_its_results(project, number):
    foreign.make(project, SLOW)
    foreign.commit(project, "one")
    process = start(project, "bench", "HEAD", "--machine", "desk", start_new_session=True)
    limit = time.monotonic() + 60
    while kept(project) < 2 and time.monotonic() < limit:
        time.sleep(0.05)
    os.kill(process.pid, number)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert "what was measured is stored" in text
    assert not running(str(project / "benchmarks"))
    assert len([m for m in read_measurements(Project(project), "desk") if m.measured]) >= 2


def test_an_interrupt_while_a_process_starts_leaves_no_process(tmp_path):
    def interrupted(*words, **options):
        process = subprocess.Popen(*words, **options)
        signal.raise_signal(signal.SIGINT)
        return process

    guard = group.Guard(interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests' environment may ignore it
    try:
        with (tmp_path / "printed").open("wb") as out, pytest.raises(KeyboardInterrupt):
            guard.start(["sleep", FOREVER], out, tmp_path, os.environ)
    finally:
        signal.signal(signal.SIGINT, before)
    (process,) = guard.groups
    assert process.poll() is None
    guard.close()
    assert process.poll() is not None


def test_a_second_run_at_the_same_time_is_refused(project):
    foreign.make(project, SLOW)
    foreign.commit(project, "one")
    with Journal(Project(project)):
        code, text = run("bench", "HEAD", "--machine", "desk")
    assert code == 2
    assert (
        f"projecta: cannot write the journal: another run holds it (process {os.getpid()}). Wait for it, or end it."
        in text
    )


def test_a_full_disk_is_reported_and_loses_nothing(project):
    """A limit on the file size simulates the full disk."""
    foreign.make(project, SLOW)
    foreign.commit(project, "one")
    script = f"""
        import resource, signal, sys
        from pathlib import Path
        from projecta.regress.store.journal import Journal
        from projecta.regress.run.case import Case, Outcome
        from projecta.regress.project.config import Project
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        case = Case("a.b", 0, (), "track", "MiB", "1", 1.0)
        with Journal(Project(Path({str(project)!r}))) as journal:
            facts = journal.provenance({{}})
            journal.add("desk", "c", "e", case, Outcome("ok", (1.0,)), "bench", facts)
            size = sum(p.stat().st_size for p in journal.path.parent.glob("journal.sqlite*") if p.suffix != ".lock")
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
            try:
                for i in range(10_000):
                    journal.add("desk", "c", "e", case, Outcome("ok", (float(i),) * 500), "bench", facts)
            except ValueError as error:
                print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert ": the disk is full (" in done.stdout, done.stderr
    assert "What was measured before is kept; run it again." in done.stdout
    assert kept(project) >= 2


def test_a_commit_that_does_not_build_is_broken(project, monkeypatch):
    from asv.util import ProcessError

    foreign.make(project, SLOW)
    foreign.commit(project, "one")
    foreign.commit(project, "two")

    def fail(self, config, repo, commit):
        raise ProcessError(["pip"], 1, "", "error: no compiler")

    monkeypatch.setattr("asv.environment.ExistingEnvironment.install_project", fail)
    for words in (("bench", "HEAD", "--machine", "desk"), ("gate", "HEAD^")):
        code, text = run(*words)
        assert code == 3
        assert "does not build: error: no compiler" in text
    with Journal(Project(project)) as book:
        (row,) = book.base.execute("select benchmark, status, reason from runs").fetchall()
    assert row[:2] == ("(build)", "failed")


def test_suites_that_a_commit_cannot_import_are_not_tried_on_another(project, monkeypatch):
    """asv would install the tip of a branch instead, and head would be judged against itself."""
    foreign.make(project, "import work\n" + textwrap.dedent(SLOW))
    first = foreign.commit(project, "one", work="raise ImportError('not yet')")
    second = foreign.commit(project, "two", work="")
    installed = []
    monkeypatch.setattr(
        "asv.environment.ExistingEnvironment.install_project",
        lambda self, config, repo, commit: installed.append(commit),
    )
    code, text = run("gate", first, second)
    assert code == 3
    assert f"BROKEN: {first[:8]}: " in text
    assert set(installed) == {first}


def test_environments_that_differ_are_not_blamed_on_the_commit(project):
    """Each commit brings another version of a package along."""
    foreign.make(project, SLOW)
    for version in ("1.0", "2.0"):
        info = project / "brought.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: brought\nVersion: {version}\n")
        foreign.commit(project, version)
    code, text = run("gate", "HEAD^")
    assert code == 3
    assert "the environments of base and head differ: brought 1.0 and 2.0." in text


@pytest.fixture
def measured(project):
    foreign.make(project)
    foreign.commit(project, "one")
    assert run("bench", "HEAD", "--machine", "desk", "--bench", "time_sleep")[0] == 0
    return project


def result_file(folder):
    return next(p for p in (folder / ".asv/results/desk").glob("*.json") if p.name != "machine.json")


def test_a_healthy_project_has_no_findings(measured):
    assert run("doctor") == (0, "No problems.\n")


@pytest.mark.parametrize("damage", ["truncated", "not UTF-8"])
def test_a_damaged_file_is_set_aside_and_written_anew(measured, damage):
    path = result_file(measured)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"\xff\xfe" + whole)
    code, text = run("doctor")
    assert code == 3
    assert ("is not whole" if damage == "truncated" else "is not UTF-8") in text
    assert "`projecta doctor --fix` does so." in text
    code, text = run("bench", "HEAD", "--machine", "desk", "--bench", "time_sleep")
    assert code == 2
    assert "`projecta doctor --fix` sets it aside" in text
    assert run("doctor", "--fix")[0] == 0
    assert next((measured / ".asv/results/quarantine").rglob(path.name)).is_file()
    assert run("doctor") == (0, "No problems.\n")
    code, text = run("bench", "HEAD", "--machine", "desk", "--bench", "time_sleep")
    assert code == 0
    assert "time_sleep(" not in text.partition("Machine")[0]  # from the journal: nothing is measured twice
    assert json.loads(path.read_text())["results"] == json.loads(whole)["results"]


def test_a_damaged_journal_is_set_aside_and_filled_from_asv_s_files(measured):
    path = measured / ".asv/results/journal.sqlite"
    path.write_bytes(b"SQLite format 3\0" + os.urandom(5000))
    code, text = run("bench", "HEAD", "--machine", "desk", "--bench", "time_sleep")
    assert code == 2
    assert "it is no journal (" in text
    assert "the journal is damaged" in run("doctor")[1]
    assert run("doctor", "--fix")[0] == 0
    before = json.loads(result_file(measured).read_text())["results"]
    code, text = run("bench", "HEAD", "--machine", "desk", "--bench", "time_sleep")
    assert code == 0
    assert "time_sleep(" not in text.partition("Machine")[0]
    after = json.loads(result_file(measured).read_text())["results"]
    assert after["suite.Sleep.time_sleep"][0] == before["suite.Sleep.time_sleep"][0]


def test_infinities_become_null(measured):
    path = result_file(measured)
    data = json.loads(path.read_text())
    data["results"]["suite.Sleep.time_sleep"][0][0] = float("inf")
    path.write_text(json.dumps(data))
    assert "holds 1 infinite value(s), on which asv publish hangs" in run("doctor")[1]
    assert run("doctor", "--fix")[0] == 0
    assert json.loads(path.read_text())["results"]["suite.Sleep.time_sleep"][0][0] is None
    assert run("doctor") == (0, "No problems.\n")


def test_results_of_a_rewritten_history_are_set_aside(measured):
    foreign.git(measured, "commit", "--quiet", "--amend", "--message", "another one")
    foreign.git(measured, "reflog", "expire", "--expire=now", "--all")
    foreign.git(measured, "gc", "--quiet", "--prune=now")
    assert "its history was rewritten?" in run("doctor")[1]
    name = result_file(measured).name
    assert run("doctor", "--fix")[0] == 0
    assert list((measured / ".asv/results/quarantine").rglob(name))


def test_a_machine_that_was_renamed_is_named(measured):
    old = measured / ".asv/results/desk/machine.json"
    facts = json.loads(old.read_text()) | {"cpu": "one of a kind"}
    old.write_text(json.dumps(facts))
    new = measured / ".asv/results/table"
    new.mkdir()
    (new / "machine.json").write_text(json.dumps(facts | {"machine": "table"}))
    code, text = run("doctor")
    assert code == 0
    assert "describes the same machine as desk: renamed?" in text
    assert "`--machine desk`" in text


def test_a_machine_that_nothing_describes_and_leftovers(measured):
    (measured / ".asv/results/desk/machine.json").unlink()
    (measured / ".asv/results/.writing-x").mkdir()
    text = run("doctor")[1]
    assert "results of a machine that nothing describes" in text
    assert "a run that was killed was writing here" in text


def test_earlier_results_of_asv_are_imported(project):
    foreign.make(project, environment_type="existing")
    commit = foreign.commit(project, "one")
    asv = [sys.executable, "-m", "asv"]
    subprocess.run([*asv, "machine", "--yes", "--machine", "desk"], check=True, capture_output=True)
    words = ["run", f"--python={sys.executable}", "--set-commit-hash", commit, "--machine", "desk"]
    subprocess.run([*asv, *words], capture_output=True)
    before = {
        (m.benchmark, *m.params.values()): m.value
        for m in read_measurements(Project(project), "desk")
        if m.measured
    }
    assert len(before) == 7
    foreign.configure(project, pythons=[sys.executable])
    code, text = run("bench", "HEAD", "--machine", "desk")
    assert code == 3  # the planted failure is tried again
    assert "time_sleep(" not in text.partition("Machine")[0]
    after = {
        (m.benchmark, *m.params.values()): m.value
        for m in read_measurements(Project(project), "desk")
        if m.measured
    }
    assert after == before


def test_new_commits_are_those_after_the_last_with_results(measured):
    first = foreign.git(measured, "rev-parse", "HEAD").strip()
    second = foreign.commit(measured, "two")
    third = foreign.commit(measured, "three")
    done = list_commits(Project(measured), "desk")
    assert done == {first[:8]}
    assert find_commits(measured, "NEW", done) == [third, second]
    assert find_commits(measured, "NEW", {third[:8]}) == []
    assert find_commits(measured, "NEW", set()) == [third]


def test_the_journal_keeps_provenance_once(project):
    foreign.make(project)
    foreign.commit(project, "one")
    with Journal(Project(project)) as book:
        assert book.provenance({"b": 1, "a": 2}) == book.provenance({"a": 2, "b": 1})
        case = Case("a.b", 0, (), "track", "MiB", "1", 1.0)
        book.add("desk", "c", "e", case, Outcome("failed", reason="why"), "bench", 1)
        (found,) = book.runs("desk", "c", "e")
        assert (found.outcome.status, found.outcome.reason) == ("failed", "why")
    assert journal.NAME == "journal.sqlite"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    assert Path(project, ".asv/results/journal.lock").read_text() == str(os.getpid())
