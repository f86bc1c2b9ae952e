"""Runs base and head against each other, process by process, until each benchmark has its verdict."""

import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median, stdev
from typing import Any

from projecta.regress.gate import statistics
from projecta.regress.gate.statistics import Design, Judgement
from projecta.regress.project import machine
from projecta.regress.project.commands import TestsProject
from projecta.regress.project.config import Project
from projecta.regress.run.build import (
    Build,
    BuildFailed,
    cases,
    changed_places,
    environment_labels,
    find_environments,
)
from projecta.regress.run.case import FAILURES, SKIPPED, Case, Outcome, select
from projecta.regress.run.launch import Worker
from projecta.regress.run.pair import measure_pair
from projecta.regress.run.tests import TestsBuild
from projecta.regress.store.journal import Journal

FLOORS = {"MiB": 0.25, "bytes": 2**18}  # differences of peaks that the allocator alone makes, by unit
SIDES = ("base", "head")
MOST_PAIRS = 40  # that calibration may ask for


@dataclass
class Row:
    """A benchmark at one combination of parameters: outcomes of both sides, and the judgement."""

    case: Case  # of head; of base, if head has none
    cases: dict[str, Case] = field(default_factory=dict)  # of each side that has it
    environment: str = ""  # its name, if there are several
    outcomes: dict[str, list[Outcome]] = field(default_factory=lambda: {side: [] for side in SIDES})
    judgement: Judgement = field(default_factory=Judgement)
    new: bool = False  # base does not have it, or skips it: there is nothing that it could have made worse

    @property
    def label(self) -> str:
        return f"{self.case.label} [{self.environment}]" if self.environment else self.case.label

    @property
    def verdict(self) -> str:
        return self.judgement.verdict or statistics.INCONCLUSIVE

    @property
    def values(self) -> dict[str, list[float]]:
        """Values by side, one for each process: the lower quartile in seconds, or the metric."""
        return {
            side: [o.lower_quartile for o in self.outcomes[side] if o.lower_quartile is not None]
            for side in SIDES
        }

    @property
    def ratios(self) -> list[float]:
        """Ratios head / base, one for each pair."""
        base, head = (self.values[side] for side in SIDES)
        return [h / b if b else math.inf if h else 1.0 for b, h in zip(base, head, strict=False)]

    def decide(self, verdict: str, reason: str) -> None:
        self.judgement = replace(self.judgement, verdict=verdict, reason=reason)

    def judge(self, design: Design, over: bool = False) -> None:
        """Look at the pairs so far; `over`: there is no time for another."""
        last = {side: self.outcomes[side][-1] for side in SIDES}
        for side in reversed(SIDES):
            if last[side].status in FAILURES:
                self.decide(statistics.BROKEN, f"{side} {last[side].status}: {last[side].reason}")
                return
        skipped = [side for side in SIDES if last[side].status == SKIPPED]
        if skipped:
            where, self.new = "" if len(skipped) == 2 else f"{skipped[0]} ", skipped == ["base"]
            self.decide(statistics.NOT_MEASURED, f"{where}skipped: {last[skipped[0]].reason}")
            return
        base, head = (self.values[side] for side in SIDES)
        better = self.case.higher_is_better
        if self.case.timed and min(base + head) <= 0:
            zero = "base" if min(base) <= 0 else "head"
            self.decide(
                statistics.NOT_MEASURED,
                f"{zero} took 0 s, less than its clock resolves: set a larger `number`",
            )
            return
        tolerance = design.tolerance
        if not self.case.timed:
            floor = 0.0 if self.case.type == "memory" else FLOORS.get(self.case.unit, 0.0)  # an object's size
            self.judgement = statistics.judge_exact(base, head, design, floor, better)
            if self.judgement.verdict or not self.judgement.reason or min(base + head) <= 0:
                return
            tolerance = max(design.memory_tolerance, floor / median(base))
        if better:
            found = statistics.judge_pairs([1 / ratio for ratio in self.ratios], design, tolerance, over)
            self.judgement = statistics.invert(found)
        else:
            self.judgement = statistics.judge_pairs(self.ratios, design, tolerance, over)


@dataclass
class Result:
    """A gate's rows, and the state of machine and environments."""

    base: str
    head: str
    machine: str
    design: Design
    rows: list[Row]
    seconds: float
    state: dict[str, Any]
    warnings: list[str]
    contents: dict[str, str] = field(default_factory=dict)  # digests of both sides, by side; "" if unknown

    @property
    def verdict(self) -> str:
        """The worst of all rows but new ones; NOT MEASURED if there is no other."""
        return statistics.overall([row.verdict for row in self.rows if not row.new])


def run_session(
    builds: dict[str, Build], pattern: str | None, design: Design, budget: float, journal: Journal, host: str,
    log: Callable[[str], None] = lambda line: None, pairs: int | None = None, environment: str = "",
    always: bool = False,
) -> Result:  # fmt: skip
    """Measure base and head in turn for `budget` seconds, but two pairs at least; building is not counted.

    Nothing is measured where both builds have the same contents, unless `always`: the verdict is PASS.

    What is compared has the same benchmark, version and parameters on both sides. `environment` names the
    one of several that the builds are of.

    With `pairs` so many are run of everything, whatever they show: to calibrate.

    Raises:
        BuildFailed: one of them cannot be built or imported, or their environments differ.
    """
    found, packages = _make(builds, log)
    now = machine.state() | {"packages": packages}
    before = journal.calibrated(host)
    warned = [] if before is None else machine.warnings(before[1], now)
    facts = journal.provenance(now)
    rows, gone = _matched(found, pattern, environment)
    noise = journal.noise(host)
    design = replace(design, benchmarks=len(rows))
    wanted = [
        statistics.pairs_for_power(noise[row.label][1], design, 2 * design.tolerance)
        for row in rows if row.case.timed and noise.get(row.label, ("",))[0] == row.case.version
    ]  # fmt: skip
    design = replace(design, pairs=min(MOST_PAIRS, max(wanted, default=0)))
    for line in warned:
        log(f"warning: {line}")
    start = time.monotonic()
    contents = {side: builds[side].contents() for side in SIDES} if pairs is None and rows else {}
    changed = None
    if contents and not always and contents["base"] and contents["base"] == contents["head"]:
        log("base and head install identical files: nothing to measure")
        for row in rows:
            row.decide(statistics.PASS, "identical: both install the same files")
    elif contents and not always:
        changed = changed_places(builds["base"], builds["head"])
    session = f"gate {uuid.uuid4().hex[:8]}"
    workers = {name: Worker(builds[name]) for name in SIDES}
    pair, last = 0, 0.0
    try:
        while pair < (design.most if pairs is None else pairs):
            open_rows = [row for row in rows if row.judgement.verdict is None or _goes_on(row, pairs)]
            elapsed = time.monotonic() - start
            over = pair >= 2 and elapsed + last > budget
            if over and pairs is None:
                for row in open_rows:
                    row.judge(design, over)
            if over or not open_rows:
                break
            order = SIDES if pair % 2 == 0 else SIDES[::-1]
            for name in order:
                workers[name].restart(pair == 0 and changed is not None, checked=pair > 0)
            for row in open_rows:
                both = {name: workers[name] for name in order}
                for name, outcome in measure_pair(both, row.cases).items():
                    row.outcomes[name].append(outcome)
                    where = builds[name].environment.name
                    words = f"{session} {name}"
                    journal.add(host, builds[name].commit, where, row.case, outcome, words, facts)
                row.judge(design)
                if changed is not None and pair == 0 and row.judgement.verdict is None:
                    _pass_if_unread(row, workers, changed)
            pair, last = pair + 1, time.monotonic() - start - elapsed
            left = sum(row.judgement.verdict is None for row in rows)
            log(f"pair {pair}: {len(rows) - left} of {len(rows)} decided, {time.monotonic() - start:.0f} s")
    finally:
        for worker in workers.values():
            worker.close()
    if pairs is not None:
        _keep_noise(journal, host, rows, facts)
    return Result(
        builds["base"].commit, builds["head"].commit, host, design, rows + gone, time.monotonic() - start,
        now, warned, contents,
    )  # fmt: skip


def _make(
    builds: Mapping[str, Build], log: Callable[[str], None]
) -> tuple[dict[str, list[Case]], dict[str, str]]:
    """Build both sides: the cases of each, and the packages, which both share."""
    found = {}
    for side in SIDES:
        log(f"building {side}, {builds[side].commit[:8]}")
        builds[side].make()
        found[side] = cases(builds[side].benchmarks())
    packages = {side: builds[side].packages() for side in SIDES}
    differ = differing_packages(packages["base"], packages["head"])
    if differ:
        raise BuildFailed(
            f"the environments of base and head differ: {', '.join(differ[:4])}. Delete "
            f"{builds['base'].config.env_dir} and {builds['head'].config.env_dir}; they are made anew."
        )
    return found, packages["head"]


def _pass_if_unread(row: Row, workers: Mapping[str, Worker], changed: Mapping[str, set[str]]) -> None:
    """PASS if neither side's process has read a file that differs. What a setup_cache reads is not known."""
    if row.case.cache is not None:
        return
    read = {side: worker.read_files() for side, worker in workers.items()}
    if all(found is not None and not found & changed[side] for side, found in read.items()):
        reason = "identical: it reads none of the files that differ"
        row.judgement = Judgement(statistics.PASS, reason=reason, pairs=1)  # one pair has no ratio to show


def differing_packages(base: Mapping[str, str], head: Mapping[str, str]) -> list[str]:
    """The packages that are not the same on both sides, with their versions.

    >>> differing_packages({"numpy": "1.0", "six": "1"}, {"numpy": "2.0", "six": "1", "rich": "3"})
    ['numpy 1.0 and 2.0', 'rich None and 3']
    """
    return [
        f"{name} {base.get(name)} and {head.get(name)}"
        for name in sorted(base.keys() | head.keys())
        if base.get(name) != head.get(name)
    ]


def _matched(
    found: dict[str, list[Case]], pattern: str | None, environment: str
) -> tuple[list[Row], list[Row]]:
    """Rows of the cases of both sides; and rows, already judged, of those that one side lacks."""
    known = {side: {case.key: case for case in found[side]} for side in SIDES}
    labels = {side: {case.label: case for case in found[side]} for side in SIDES}
    both, one = [], []
    for case in select(found["head"], pattern):
        if case.key in known["base"]:
            both.append(Row(case, {side: known[side][case.key] for side in SIDES}, environment))
            continue
        other = labels["base"].get(case.label)
        why = "absent in base" if other is None else "base has another version of it"
        one.append((Row(case, {"head": case}, environment, new=other is None), why))
    for case in select(found["base"], pattern):
        if case.label not in labels["head"]:
            one.append((Row(case, {"base": case}, environment), "absent in head"))
    for row, why in one:
        row.decide(statistics.NOT_MEASURED, why)
    return both, [row for row, _ in one]


def judge_environments(
    project: Project, commits: Mapping[str, str], pattern: str | None, design: Design, budget: float,
    journal: Journal, host: str, log: Callable[[str], None], pairs: int | None = None,
    always: bool = False,
) -> Result:  # fmt: skip
    """Judge base and head in every environment of the project's matrix.

    The environments share the `budget` (minutes) and the gate's rate of error.
    """
    labels, results = environment_labels(find_environments(project, project.config)), []
    share = replace(design, error=design.error / len(labels))
    for i, label in enumerate(labels):
        if label:
            log(f"environment {i + 1} of {len(labels)}: {label}")
        kind: Any = TestsBuild if isinstance(project, TestsProject) else Build
        builds = {
            "base": kind(project, commits["base"], "base", which=i),
            "head": kind(project, commits["head"], which=i),
        }
        seconds = 60 * budget / len(labels)
        results.append(run_session(builds, pattern, share, seconds, journal, host, log, pairs, label, always))
    first = results[0]
    return replace(
        first, rows=[row for result in results for row in result.rows],
        seconds=sum(result.seconds for result in results),
        warnings=list(dict.fromkeys(line for result in results for line in result.warnings)),
        design=replace(first.design, error=len(results) * first.design.error),
        contents={side: _joined([result.contents.get(side, "") for result in results]) for side in SIDES},
    )  # fmt: skip


def _joined(digests: Sequence[str]) -> str:
    """The digests of all environments as one; "" if any is unknown."""
    return "+".join(digests) if all(digests) else ""


def _goes_on(row: Row, pairs: int | None) -> bool:
    """Whether to go on measuring a benchmark that has its verdict."""
    return (
        pairs is not None
        and row.case.timed
        and row.judgement.verdict in (statistics.PASS, statistics.REGRESSED)
    )


def _keep_noise(journal: Journal, host: str, rows: Sequence[Row], facts: int) -> None:
    for row in rows:
        logs = [math.log(r) for r in row.ratios if r > 0 and math.isfinite(r)]
        if row.case.timed and len(logs) >= 3:
            spread = stdev(logs)
            journal.keep_noise(host, row.label, row.case.version, spread, len(logs), facts)
    journal.write_noise(host)
