"""Interleaved pairs of two builds: alternation, common noise, and every way in which a case can end."""

import itertools
import json
import statistics

import pytest

from projecta.regress.project.config import Project
from projecta.regress.run.build import Build, cases
from projecta.regress.run.case import OK
from projecta.regress.run.launch import Worker
from projecta.regress.run.pair import measure_pair
from tests.regress import foreign
from tests.regress.foreign import ENDINGS, FAULTS, FOREVER, running

pytestmark = pytest.mark.serial

LOGGED = """
    import json, os, time
    from pathlib import Path
    import work

    LOG = Path(__file__).parents[1] / ".asv/log"

    class Logged:
        version = "1"
        number, repeat, warmup_time = 1, (1, 10, 0.5), 0.0

        def time_logged(self):
            start = time.time()
            time.sleep(0.002)
            with LOG.open("a") as file:
                file.write(json.dumps([work.NAME, start, time.time()]) + "\\n")

        def time_quick(self):
            sum(range(100))
        time_quick.number = 0

        def timeraw_import(self):
            return "import json"
"""

DISTURBED = """
    import time
    from pathlib import Path
    import work

    LOG = Path(__file__).parents[1] / ".asv/log"
    spent = 0.0

    class Disturbed:
        # The machine takes twice as long from base's eighth turn on, by a clock that only its work moves on:
        # what else runs beside this test is not seen.
        version = "1"
        number, repeat, warmup_time = 1, (1, 10, 0.5), 0.0
        timer = staticmethod(lambda: spent)

        def time_it(self):
            global spent
            with LOG.open("a") as file:
                file.write(work.NAME)
            spent += 0.004 * work.FACTOR * (2 if LOG.read_text().count("hb") > 7 else 1)
            time.sleep(0.004)  # so that a turn holds some ten calls
"""


@pytest.fixture
def workers(workplace):
    """A function that starts the workers of two commits. They are closed after the test."""
    made = []

    def make(suite, base="", head="", **settings):
        foreign.make(workplace, suite, **settings)
        commits = [
            foreign.commit(workplace, name, work=text) for name, text in (("one", base), ("two", head))
        ]
        builds = dict(
            zip(("base", "head"), (Build(Project(workplace), commit) for commit in commits), strict=True)
        )
        for build in builds.values():
            build.make()
            found = {case.name.split(".")[-1]: case for case in cases(build.benchmarks())}
        made.extend(Worker(build) for build in builds.values())
        return dict(zip(builds, made, strict=True)), found

    yield make
    for worker in made:
        worker.close()


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_only_one_side_runs_at_a_time_and_they_alternate(workers, tmp_path, method):
    both, found = workers(LOGGED, "NAME = 'base'", "NAME = 'head'", launch_method=method)
    outcomes = measure_pair(both, dict.fromkeys(both, found["time_logged"]))
    lines = [json.loads(line) for line in (tmp_path / ".asv/log").read_text().splitlines()]
    inside = lines[2 * 2 :]  # after the warm-up of both
    assert all(a[2] <= b[1] for a, b in itertools.pairwise(inside))
    runs = [name for name, _ in itertools.groupby(name for name, _, _ in inside)]
    assert runs == ["base", "head"] * 20
    spans = [list(own) for _, own in itertools.groupby(inside, key=lambda line: line[0])]
    assert 0.03 < statistics.median(own[-1][2] - own[0][1] for own in spans) < 0.08  # one time slice
    assert {name: outcome.status for name, outcome in outcomes.items()} == {"base": OK, "head": OK}
    assert min(len(outcome.samples) for outcome in outcomes.values()) >= 100
    assert all(0.002 < outcome.lower_quartile < 0.004 for outcome in outcomes.values())


def test_a_disturbance_affects_both_sides(workers):
    both, found = workers(DISTURBED, "NAME, FACTOR = 'b', 1", "NAME, FACTOR = 'h', 1.1")
    outcomes = measure_pair(both, dict.fromkeys(both, found["time_it"]))
    for outcome, factor in zip(outcomes.values(), (1, 1.1), strict=True):
        assert max(outcome.samples) == pytest.approx(0.008 * factor)  # it was disturbed
        assert outcome.lower_quartile == pytest.approx(0.004 * factor)


SLOW = """
    import json, time
    from pathlib import Path
    import work

    LOG = Path(__file__).parents[1] / ".asv/log"

    def note(kind, seconds):
        start = time.time()
        time.sleep(seconds)
        with LOG.open("a") as file:
            file.write(json.dumps([start, time.time(), kind]) + "\\n")

    class Slow:
        version = "1"
        number, repeat, warmup_time = 1, (1, 10, 0.1), 0.2

        def setup(self):
            if not hasattr(work, "ready"):  # asv sets up before each sample
                work.ready = True
                note("set up", work.SECONDS)

        def time_it(self):
            note("call", 0.002)
"""


def test_sides_set_up_at_once_and_warm_up_in_turn(workers, tmp_path):
    both, found = workers(SLOW, "SECONDS = 1.0", "SECONDS = 1.5")
    outcomes = measure_pair(both, dict.fromkeys(both, found["time_it"]))
    assert {outcome.status for outcome in outcomes.values()} == {OK}
    first, second, *calls = sorted(
        json.loads(line) for line in (tmp_path / ".asv/log").read_text().splitlines()
    )
    assert [first[2], second[2]] == ["set up"] * 2
    assert second[0] < first[1]
    assert calls[0][0] >= max(first[1], second[1])
    assert len(calls) > 100
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(calls))


def test_forks_collect_no_garbage_of_imports(workers):
    suite = """
        import gc

        class Collector:
            version = "1"

            def track_frozen(self):
                return gc.get_freeze_count() if gc.isenabled() else -1
    """
    both, found = workers(suite, launch_method="forkserver")
    outcomes = measure_pair(both, dict.fromkeys(both, found["track_frozen"]))
    assert all(outcome.value > 1000 for outcome in outcomes.values())


def test_automatic_number_and_timeraw(workers):
    both, found = workers(LOGGED, "NAME = ''", "NAME = ''")
    quick = measure_pair(both, dict.fromkeys(both, found["time_quick"]))["base"]
    assert quick.number > 100
    assert 1e-7 < quick.lower_quartile < 1e-4
    raw = measure_pair(both, dict.fromkeys(both, found["timeraw_import"]))["head"]
    assert raw.status == OK
    assert 1e-5 < raw.lower_quartile < 1


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_every_fault_has_its_reason_and_the_next_case_runs(workers, method):
    both, found = workers(FAULTS, launch_method=method)
    assert len(found) == len(ENDINGS)
    for name, case in found.items():
        status, reason = ENDINGS[name.partition("_")[2]]
        for outcome in measure_pair(both, dict.fromkeys(both, case)).values():
            assert outcome.status == status, name
            assert reason in outcome.reason, name
    assert not running(FOREVER)


def test_messages_to_a_dead_case_do_not_reach_the_next(workers):
    suite = """
        import os, threading
        class Dies:
            version = "1"
            number, repeat, warmup_time = 1, 1, 0.0
            calls = 0
            def time_it(self):
                self.calls += 1
                if self.calls == 3:  # early in its turn of 40 ms: it dies in the other's
                    threading.Timer(0.06, os._exit, [7]).start()
            def track_it(self):
                return 1.0
    """
    both, found = workers(suite, launch_method="forkserver")
    for _ in range(5):
        died, lived = (
            measure_pair(both, dict.fromkeys(both, found["time_it"])),
            measure_pair(both, dict.fromkeys(both, found["track_it"])),
        )
        assert {(o.status, o.reason) for o in died.values()} == {("failed", "exit status 7")}
        assert {(o.status, o.samples) for o in lived.values()} == {(OK, (1.0,))}


def test_a_failure_on_one_side_ends_the_pair(workers):
    suite = """
        import work
        class Half:
            version = "1"
            def setup(self):
                assert work.GOOD, "planted"
            def time_it(self):
                pass
    """
    both, found = workers(suite, "GOOD = True", "GOOD = False")
    outcomes = measure_pair(both, dict.fromkeys(both, found["time_it"]))
    assert outcomes["base"].status == OK
    assert (outcomes["head"].status, outcomes["head"].reason) == (
        "failed", "AssertionError: planted (suite.py:6)"
    )  # fmt: skip
