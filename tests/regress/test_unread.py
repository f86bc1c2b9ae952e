"""A benchmark passes after one pair if its process reads none of the files that differ, and only then."""

import json
from types import SimpleNamespace

import pytest

from projecta.regress.run import pair
from projecta.regress.run.build import changed_places
from tests.regress import foreign
from tests.regress.foreign import git, run

SUITE = """
    import multiprocessing, subprocess, sys
    import work.early

    class Reads:
        version = "1"
        number, repeat, warmup_time = 1, (1, 2, 0.1), 0.0

        def time_nothing(self):
            pass

        def time_late(self):
            import work.late

        def time_text(self):
            open(work.early.__file__.replace("early", "text").encode()).read()

        def time_all(self):
            import pkgutil, importlib
            for found in pkgutil.iter_modules([work.early.__file__.rpartition("/")[0]]):
                importlib.import_module("work." + found.name)

    class Cached:
        version = "1"

        def setup_cache(self):
            import work.late
            return 1.0

        def track_cached(self, value):
            return value

    def look():
        import work.late

    class Starts:
        version = "1"

        def track_pool(self):
            process = multiprocessing.get_context("spawn").Process(target=look)
            process.start()
            process.join()
            return float(process.exitcode)

        def track_process(self):
            return float(subprocess.run([sys.executable, "-c", "import work.late"]).returncode)
"""
UNKNOWN = {"track_process", "track_pool", "track_cached"}
ALL = {"time_nothing", "time_late", "time_text", "time_all"} | UNKNOWN
FILES = ["work/__init__.py", "work/early.py", "work/late.py", "work/text.py", "work/other.py", "README.md"]
CHANGES = [  # files, the benchmarks that are measured
    (["work/other.py", "README.md"], {"time_all"} | UNKNOWN),
    (["work/added.py", "work/late.py", "work/text.py"], ALL - {"time_nothing"}),
    (["work/early.py"], ALL),
]


@pytest.fixture
def project(workplace, monkeypatch):
    monkeypatch.setattr(pair, "MOST", 4)
    foreign.make(workplace, SUITE, launch_method="forkserver")
    (workplace / "work").mkdir()
    for name in FILES:
        (workplace / name).write_text("# 1\n")
    git(workplace, "add", "--all")
    git(workplace, "commit", "--quiet", "--message", "one")
    return workplace


def measured(project, *words):
    """The benchmarks that were measured to the end."""
    run("gate", "HEAD^", "HEAD", "--machine", "desk", "--json", "out.json", "--budget", "0", *words)
    rows = json.loads((project / "out.json").read_text())["benchmarks"]
    names = {row["name"].split(".")[-1]: row for row in rows}
    passed = {name for name, row in names.items() if "it reads none of the files" in row["reason"]}
    assert all((names[n]["verdict"], names[n]["pairs"]) == ("PASS", 1) for n in passed)
    return names.keys() - passed


@pytest.mark.parametrize(("names", "expected"), CHANGES)
def test_a_change_of_what_is_read_is_measured(project, names, expected):
    for name in names:
        (project / name).write_text("# 2\n")
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--message", "two")
    assert measured(project) == expected


@pytest.mark.parametrize("name", ["work/data.csv", "lib/part.so", "config.toml", "Makefile"])
def test_what_may_be_read_unseen_is_measured(name):
    def build(**digests):
        return SimpleNamespace(files=lambda: {n: (f"/{n}", d) for n, d in digests.items()})

    base = {"a.py": "1", name: "1"}
    assert changed_places(build(**base), build(**base | {"a.py": "2"})) == {
        "base": {"/a.py"},
        "head": {"/a.py"},
    }
    assert changed_places(build(**base), build(**base | {name: "2"})) is None
    assert changed_places(build(**base), build(**{"a.py": "1"})) is None
    assert changed_places(build(**base), build()) is None
    added = changed_places(build(**base), build(**base, **{"b.py": "1"}))
    assert added == {"base": set(), "head": {"/b.py"}}


def test_what_a_benchmark_reads_is_known_without_forks_too(project):
    path = project / "asv.conf.json"
    path.write_text(path.read_text().replace("forkserver", "spawn"))
    (project / "work/late.py").write_text("# 2\n")
    git(project, "add", "work")
    git(project, "commit", "--quiet", "--message", "two")
    only = ("--bench", "late|nothing")
    assert measured(project, *only) == {"time_late"}
    assert measured(project, *only, "--always") == {"time_late", "time_nothing"}
