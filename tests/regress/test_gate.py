"""The gate: its statistics against scipy and by simulation, and the command on a small asv project."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wilcoxon

from projecta.regress.gate import output, session, statistics
from projecta.regress.gate.statistics import (
    BROKEN,
    INCONCLUSIVE,
    NOT_MEASURED,
    PASS,
    REGRESSED,
    Design,
    Judgement,
    judge_exact,
    judge_pairs,
    overall,
    pairs_for_power,
)  # fmt: skip
from projecta.regress.project.machine import state, warnings
from projecta.regress.run import build, pair
from projecta.regress.run.case import Case, Outcome
from tests.regress import foreign
from tests.regress.foreign import git, run

DATA = st.lists(st.floats(-0.2, 0.2).filter(lambda x: abs(x) > 1e-6), min_size=8, max_size=20, unique_by=abs)


@settings(max_examples=60, deadline=None)
@given(DATA, st.sampled_from([0.01, 0.002, 0.05]))
def test_the_bound_agrees_with_the_signed_rank_test_of_scipy(data, level):
    averages = sorted((a + b) / 2 for i, a in enumerate(data) for b in data[i:])
    bound = statistics.lower_bound(averages, len(data), level)
    if bound == -math.inf:
        assert 2.0 ** -len(data) > level
        return
    for shift, rejected in ((-1e-9, True), (1e-9, False)):
        moved = np.array(data) - (bound + shift)
        if len(np.unique(np.abs(moved))) == len(moved) and np.all(
            moved != 0
        ):  # scipy is exact without ties only
            p = wilcoxon(moved, alternative="greater", method="exact").pvalue
            assert (p <= level) == rejected


@pytest.mark.parametrize("over", [False, True], ids=["all looks", "the time ends"])
@pytest.mark.parametrize("noise", ["normal", "heavy", "skewed"])
def test_errors_are_as_rare_as_stated(noise, over):
    """Worst case, a slow-down equal to the tolerance: at most `error` of the gates of 20 benchmarks fail."""
    draw, design = np.random.default_rng(0), Design(benchmarks=20, error=0.2, miss=0.2)
    looks = sorted({*design.looks()[0], *design.looks()[1]})
    wrong, passed, gates = 0, 0, 40
    for _ in range(gates):
        verdicts = []
        end = int(draw.integers(looks[0], design.most)) if over else design.most  # as a clock would end it
        for _ in range(20):
            size = (2, design.most)
            sides = {
                "normal": draw.normal(size=size), "heavy": draw.standard_t(2, size=size),
                "skewed": draw.exponential(size=size) ** 2,
            }[noise]  # fmt: skip
            ratios = np.exp(0.03 * (sides[0] - sides[1]) + math.log1p(design.tolerance))
            found = [judge_pairs(ratios[:n].tolist(), design).verdict for n in looks if n <= end]
            found.append(judge_pairs(ratios[:end].tolist(), design, over=over).verdict)
            verdicts.append(next((v for v in found if v), None))
        wrong += REGRESSED in verdicts
        passed += verdicts.count(PASS)
    assert wrong <= 0.2 * gates + 5  # the stated rate plus two standard deviations of the count
    assert passed <= 0.2 * 20 * gates


@pytest.mark.parametrize("design", [Design(), Design(benchmarks=7), Design(benchmarks=3, pairs=40)])
def test_looks_spend_the_alpha_and_each_can_decide(design):
    for plan, share in zip(design.looks(), (design.miss, design.error / design.benchmarks), strict=True):
        assert sum(plan.values()) == pytest.approx(share)
        assert all(level >= 2.0**-pairs for pairs, level in plan.items())


def test_when_the_time_is_over_a_look_spends_what_is_left():
    draw, design = np.random.default_rng(2), Design(benchmarks=10)
    plan = design.looks()[1]
    between = [n for n in range(min(plan), design.most) if n not in plan]
    found = 0
    for n in between:
        ratios = (np.exp(0.012 * draw.normal(size=n)) * 1.05).tolist()
        plain, last = judge_pairs(ratios, design), judge_pairs(ratios, design, over=True)
        assert plain.verdict is None  # no look was planned
        assert plain.low < last.low  # more alpha than an interim look has
        found += last.verdict == REGRESSED
    assert found > len(between) / 2
    passes = design.looks()[0]
    same = np.exp(0.001 * draw.normal(size=max(passes) + 1)).tolist()
    assert judge_pairs(same[: min(passes) + 1], design, over=True).verdict == PASS
    assert judge_pairs(same, design, over=True).verdict is None  # all looks for PASS are behind
    few = [1.2] * (min(plan) - 4)
    assert judge_pairs(few, design, over=True).verdict is None


def test_a_slow_down_is_found_and_no_change_passes():
    draw, design = np.random.default_rng(1), Design(benchmarks=3)
    for factor, verdict in ((1.0, PASS), (1.1, REGRESSED)):
        ratios = np.exp(0.01 * draw.normal(size=design.most)) * factor
        looks = sorted({*design.looks()[0], *design.looks()[1]})
        found = [judge_pairs(ratios[:n].tolist(), design) for n in looks]
        first = next(f for f in found if f.verdict)
        assert first.verdict == verdict
        assert first.low < factor < first.high


def test_noise_is_inconclusive_and_more_pairs_are_asked_for():
    draw, design = np.random.default_rng(2), Design()
    found = judge_pairs(np.exp(0.3 * draw.normal(size=design.most)).tolist(), design)
    assert found.verdict is None
    assert found.more > 10


def test_calibration_asks_for_more_pairs_where_it_is_noisier():
    design = Design(benchmarks=5)
    needed = [pairs_for_power(spread, design, 0.1) for spread in (0.01, 0.05, 0.1)]
    assert needed == sorted(needed)
    assert needed[0] == min(design.looks()[1])
    assert Design(benchmarks=5, pairs=needed[1]).most >= needed[1]
    draw, found = np.random.default_rng(3), 0
    wide = Design(benchmarks=5, pairs=needed[1])
    for _ in range(100):
        ratios = (1.1 * np.exp(0.05 * draw.normal(size=wide.most))).tolist()
        found += any(judge_pairs(ratios[:n], wide).verdict == REGRESSED for n in wide.looks()[1])
    assert found >= 85


@pytest.mark.parametrize("benchmarks", [1, 3, 10, 20])
def test_every_planned_look_is_made_and_none_waits_for_more_than_is_asked(benchmarks):
    for pairs in (0, 20, 30, 40):
        design = Design(benchmarks=benchmarks, pairs=pairs)
        passes, regresses = design.looks()
        assert design.most == max(*passes, *regresses)
        assert pairs != 40 or design.most == 40


def test_a_gate_without_tolerance_needs_no_power():
    assert pairs_for_power(0.02, Design(tolerance=0.0), 0.0) > 1000


def test_exact_metrics_are_compared_as_they_are():
    design = Design()
    assert judge_exact([50.0], [60.0], design, 0.25).verdict is None  # one process is not enough
    assert judge_exact([50.0, 50.0], [50.2, 50.2], design, 0.25).verdict == PASS
    assert judge_exact([50.0, 50.0], [50.5, 50.5], design, 0.25).verdict == REGRESSED  # +1 %
    assert judge_exact([50.0, 50.0], [40.0, 40.0], design, 0.25).verdict == PASS
    assert judge_exact([0.0, 0.0], [0.0, 0.0], design, 0.0).verdict == PASS
    assert "varies" in judge_exact([50.0, 55.0], [50.0, 50.0], design, 0.25).reason
    assert "varies" in judge_exact([50.0, 51.0], [52.0, 53.0], design, 0.25).reason  # apart, as 1 in 6 are
    assert (
        judge_exact([50.0, 50.3], [60.0, 60.0], design, 0.25).verdict == REGRESSED
    )  # the variation is smaller than the growth


def test_the_worst_verdict_counts():
    assert overall([PASS, INCONCLUSIVE, REGRESSED, BROKEN]) == REGRESSED
    assert overall([PASS, BROKEN, INCONCLUSIVE]) == BROKEN
    assert overall([PASS, NOT_MEASURED]) == NOT_MEASURED
    assert overall([]) == NOT_MEASURED
    assert {v: statistics.EXIT_CODES[v] for v in (PASS, REGRESSED, BROKEN, NOT_MEASURED, INCONCLUSIVE)} == {
        PASS: 0, REGRESSED: 1, BROKEN: 3, NOT_MEASURED: 4, INCONCLUSIVE: 5,
    }  # fmt: skip


def judged(name, verdict, ratios, low=None, high=None):
    """A row of a gate: one pair for each ratio."""
    row = session.Row(Case(name, 0, (), "time", "seconds", "1", 1.0))
    for ratio in ratios:
        for side, value in (("base", 1.0), ("head", ratio)):
            row.outcomes[side].append(Outcome("ok", (value,), 1))
    row.judgement = Judgement(verdict, ratios[0] if ratios else None, low, high, pairs=len(ratios))
    return row


def test_the_chart_has_the_pairs_and_the_interval_of_each_row():
    rows = [
        judged("same", PASS, [1.0, 1.01], 0.0, 1.02), judged("slow", REGRESSED, [1.1, 1.2, 1.15], 1.05, 1.25),
        judged("few", None, [1.02]), judged("broken", BROKEN, []),
    ]  # fmt: skip
    figure = output.draw(session.Result("b" * 40, "h" * 40, "desk", Design(), rows, 1.0, {}, []))
    (axis,) = figure.axes
    labels = [text.get_text() for text in axis.get_yticklabels()]
    assert labels == ["slow  REGRESSED", "few  INCONCLUSIVE", "same  PASS"]
    assert "head against base, %" in axis.get_xlabel()
    dots = [line for line in axis.lines if line.get_marker() == "."]
    assert [set(line.get_ydata()) for line in dots] == [{0}, {1}, {2}]
    for line, changes in zip(dots, ([10, 20, 15], [2], [0, 1]), strict=True):
        assert line.get_xdata() == pytest.approx(changes)
    slow, same = (line for line in axis.lines if line.get_linewidth() == 5)  # not few: one pair
    assert [set(line.get_ydata()) for line in (slow, same)] == [{0}, {2}]
    assert slow.get_xdata() == pytest.approx([5, 25])
    assert same.get_xdata()[1] == pytest.approx(2)
    left, right = axis.get_xlim()
    assert same.get_xdata()[0] < left  # no lower bound: the bar leaves the chart
    assert right > 25
    unchanged, tolerated = (line.get_xdata()[0] for line in axis.lines[-2:])
    assert (unchanged, tolerated) == (0, pytest.approx(3))


def test_a_machine_in_another_state_is_named():
    now = state()
    assert now["processors"] >= 1
    assert warnings(now, now | {"load": 0.0}) == []
    then = now | {"governor": "performance", "clock_mhz": 9e9, "temperature": 1.0, "gpu": "T4, 500"}
    text = "\n".join(warnings(then, now | {"temperature": 80.0, "load": 9.0, "clock_mhz": 1000.0}))
    for word in ("governor", "clock", "temperature", "gpu", "load"):
        assert word in text


SUITE = """
    import time
    import work

    class Work:
        version = "1"
        number, repeat, rounds, warmup_time = 1, 3, 1, 0.0

        def time_work(self):
            time.sleep(0.01 * work.FACTOR)

        def track_memory(self):
            return work.MEMORY
        track_memory.unit = "MiB"

        def track_broken(self):
            return work.BROKEN

        def track_absent(self):
            return work.NEW
"""


@pytest.fixture
def project(workplace, monkeypatch):
    """Two commits: the second is a tenth slower, takes 1 % more memory, and fails.

    A sleep varies so little that a pair needs five requests to each side, and not twenty.
    """
    monkeypatch.setattr(pair, "MOST", 5)
    foreign.make(workplace, SUITE)
    foreign.commit(workplace, "one", work="FACTOR, MEMORY, BROKEN = 1, 50.0, 1")
    foreign.commit(workplace, "two", work="FACTOR, MEMORY, BROKEN = 1.1, 50.5, None")
    return workplace


@pytest.mark.serial
def test_the_gate_finds_a_slow_down_more_memory_and_a_failure(project):
    words = ("gate", "HEAD^", "--json", "out.json", "--markdown", "out.md", "--plot", "out.png")
    code, text = run(*words, "--bench", "time_work|memory|broken")
    assert code == 1
    found = json.loads((project / "out.json").read_text())
    rows = {row["name"].split(".")[-1]: row for row in found["benchmarks"]}
    assert (found["verdict"], found["exit_code"]) == ("REGRESSED", 1)
    slow = rows["time_work"]
    assert slow["verdict"] == "REGRESSED"
    assert 1.05 < slow["low"] < 1.1 < slow["high"] + 0.01
    assert len(slow["base"]) == slow["pairs"] >= 9
    assert rows["track_memory"]["verdict"] == "REGRESSED"
    assert rows["track_memory"]["ratio"] == pytest.approx(1.01)
    assert rows["track_broken"]["verdict"] == "BROKEN"
    assert "gave 'None'" in rows["track_broken"]["reason"]
    assert "REGRESSED: 2 REGRESSED, 1 BROKEN." in text
    markdown = (project / "out.md").read_text()
    assert "| REGRESSED | 1.010 | 1.010 to 1.010 | 50 MiB | 2 | `suite.Work.track_memory` |  |" in markdown
    assert (project / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.serial
def test_the_same_commit_passes(project):
    code, text = run("gate", "HEAD", "HEAD", "--bench", "time_work|memory", "--always")
    assert (code, "2 PASS" in text) == (0, True)
    assert "identical" not in text


def test_identical_files_pass_without_measuring(project):
    """A commit that changes nothing has the tree of the one before; its benchmarks are not run."""
    git(project, "commit", "--allow-empty", "--message", "nothing")
    code, text = run("gate", "HEAD^", "--bench", "time_work|memory", "--json", "out.json")
    assert code == 0
    assert "base and head install identical files: nothing to measure" in text
    found = json.loads((project / "out.json").read_text())
    assert {row["reason"] for row in found["benchmarks"]} == {"identical: both install the same files"}
    assert not any(row["base"] for row in found["benchmarks"])
    (project / "data.txt").write_text("1")  # any file of the commit counts
    git(project, "add", ".")
    git(project, "commit", "--message", "data")
    assert "identical" not in run("gate", "HEAD^", "--bench", "memory")[1]


def test_the_contents_of_an_environment(tmp_path):
    """Every installed file counts, wherever it lies; caches and notes of installers do not."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    python = str(tmp_path / "env/bin/python")
    environment = SimpleNamespace(can_install_project=lambda: True, find_executable=lambda name: python)
    (packages,) = (tmp_path / "env/lib").glob("python*/site-packages")
    info = packages / "work-1.dist-info"
    info.mkdir()
    (tmp_path / "env/share").mkdir(exist_ok=True)
    files = ["work.py", "table.csv", "../../../share/data", f"{info.name}/METADATA"]
    unseen = [f"{info.name}/INSTALLER", "old.pyc"]
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in [*files, *unseen, f"{info.name}/RECORD"]))
    origin = {"url": "file:///wheels/work-1.whl", "archive_info": {}}
    (info / "direct_url.json").write_text(json.dumps(origin))

    def contents():
        built = build.Build.__new__(build.Build)  # which reads an environment once
        built.environment, built.variables = environment, None
        return built.contents()

    for name in (*files, *unseen):
        (packages / name).write_text("1")
    first = contents()
    assert len(first) == 64
    for name in (*files, *unseen):
        (packages / name).write_text("2")
        assert (contents() == first) == (name in unseen), name
        (packages / name).write_text("1")
    assert contents() == first
    (packages / "work.py").write_text(f"1{tmp_path / 'env'}")  # the place of the environment, as in a script
    assert contents() == first
    (info / "direct_url.json").write_text(json.dumps(origin | {"dir_info": {"editable": True}}))
    assert contents() == ""
    (info / "direct_url.json").write_text("{}")  # nothing here is the project's, as far as one can tell
    assert contents() == ""


def test_benchmarks_that_are_not_measured_do_not_pass(project):
    assert run("gate", "HEAD^", "--bench", "nothing like it")[0] == 4
    (project / "benchmarks/suite.py").write_text(
        "class Skips:\n    def setup(self):\n        raise NotImplementedError('no GPU')\n    def track_x(self):\n"
        "        return 1\n"
    )
    code, text = run("gate", "HEAD^")
    assert code == 4
    assert "skipped: no GPU" in text


def test_time_that_runs_out_is_inconclusive(project):
    code, text = run("gate", "HEAD^", "--bench", "time_work", "--budget", "0")
    assert code == 5
    assert "more pairs are needed" in text


def test_the_first_pair_alone_is_asked_for_checks(workplace, monkeypatch):
    monkeypatch.setattr(pair, "MOST", 5)
    suite = f"""
        import os
        class Work:
            def setup(self):
                with open({str(workplace / ".asv/seen")!r}, "a") as file:
                    print(os.environ.get("PROJECTA_CHECKED", "check"), file=file)
            def time_work(self):
                pass
    """
    foreign.make(workplace, suite)
    foreign.commit(workplace, "one", work="A = 1")
    foreign.commit(workplace, "two", work="A = 2")
    assert run("gate", "HEAD^", "--budget", "0")[0] in (0, 5)
    seen = (workplace / ".asv/seen").read_text().split()
    first = seen.index("1")  # asv calls setup before each sample
    assert 0 < first < len(seen)
    assert set(seen[:first]) == {"check"}
    assert set(seen[first:]) == {"1"}


@pytest.mark.serial
def test_broken_beats_all_but_regressed(project):
    code, text = run("gate", "HEAD^", "--bench", "track_broken|track_absent")
    assert code == 3
    assert "AttributeError: module 'work' has no attribute 'NEW' (suite.py:20)" in " ".join(text.split())


def test_invalid_arguments_are_reported_in_one_line(project):
    code, text = run("gate", "no-such-commit")
    assert (code, text) == (
        2, "projecta gate: a revision must name a commit of this repository; got 'no-such-commit'.\n"
    )  # fmt: skip
    assert run("gate", "HEAD", "--bench", "(")[0] == 2


def test_pyproject_selects_the_benchmarks_of_the_gate(project):
    (project / "pyproject.toml").write_text("[tool.projecta]\ngate = 'track_memory'\n")
    code, text = run("gate", "HEAD^")
    assert code == 1
    assert "time_work" not in text


@pytest.mark.serial
def test_calibration_is_kept_and_used(project):
    code, text = run("calibrate", "--bench", "time_work", "--pairs", "3")
    assert code == 0
    assert "suite.Work.time_work" in text
    assert run("calibrate", "--bench", "memory", "--pairs", "3")[0] == 4  # an exact metric has no noise
    assert "warning" not in run("gate", "HEAD", "HEAD", "--bench", "memory")[1].replace("warning: load", "")
    git(project, "status")


def test_a_project_in_a_subfolder_and_a_src_layout(project):
    """The nearest asv.conf.json is used, and the package of the commit runs."""
    inner = project / "python"
    inner.mkdir()
    foreign.make(inner, """
        import inner_package
        class Suite:
            version = "1"
            def track_it(self):
                return inner_package.VALUE
    """, project="inner-package", repo="..")  # fmt: skip
    shutil.rmtree(inner / ".git")
    (inner / "src/inner_package").mkdir(parents=True)
    for value in (1.0, 1.2):
        (inner / "src/inner_package/__init__.py").write_text(f"VALUE = {value}\n")
        foreign.commit(project, str(value))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(inner / "src")
        code, text = run("gate", "HEAD^")
    assert code == 1, text
    assert "1.200" in text


def test_an_installed_copy_does_not_replace_the_commit(project):
    foreign.configure(project, project="pytest", environment_type="existing")
    code, text = run("gate", "HEAD^")
    assert code == 3
    assert "pytest is imported from" in text.replace("\n", " ")


@pytest.mark.parametrize(
    ("broken", "code", "line"),
    [
        (
            "sys.modules['scipy.stats'] = None", 2,
            'projecta: cannot run: scipy is not installed. Install it with: pip install "projecta[gate]"',
        ),
        (
            "import projecta.regress.gate.statistics as s; s.Design.looks = None", 70,
            r"projecta: crashed: TypeError: .* The traceback is in (/.*\.txt)\. Please report it: https://.*",
        ),
    ],
)  # fmt: skip
def test_a_missing_package_and_a_crash_are_no_verdict(project, broken, code, line):
    script = f"import sys; {broken}; from projecta.regress.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "gate", "HEAD^", "--bench", "time_work"], capture_output=True, text=True,
        cwd=project, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == code
    last = done.stderr.splitlines()[-1]
    if code == 2:
        assert last == line
        return
    found = re.fullmatch(line, last)
    assert "Traceback" in Path(found[1]).read_text()
    Path(found[1]).unlink()


def test_a_machine_by_another_name_is_described(project):
    assert run("bench", "HEAD", "--machine", "desk", "--bench", "memory")[0] == 0
    facts = json.loads((project / ".asv/results/desk/machine.json").read_text())
    assert facts["cpu"]
    assert facts["machine"] == "desk"
    state = next((project / ".asv/results/desk").glob("*.state"))
    assert "system" in json.loads(state.read_text())
