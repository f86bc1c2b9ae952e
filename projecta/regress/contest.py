"""Runs base and head against each other, process by process, until each benchmark has its verdict."""

import math
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from projecta.regress import gate, machine, runner
from projecta.regress.builds import Build, BuildFailed, cases
from projecta.regress.duel import Side, duel
from projecta.regress.gate import Design, Judgement
from projecta.regress.journal import Journal
from projecta.regress.processes import BROKEN, SKIPPED, Case, Outcome

FLOORS = {"MiB": 0.25, "bytes": 2**18}  # differences of peaks that the allocator alone makes, by unit
SIDES = ("base", "head")
MOST_PAIRS = 40  # that calibration may ask for


@dataclass
class Row:
    """A benchmark at one combination of parameters: what both sides gave, and what follows."""

    case: Case
    outcomes: dict[str, list[Outcome]] = field(default_factory=lambda: {side: [] for side in SIDES})
    judgement: Judgement = field(default_factory=Judgement)

    @property
    def verdict(self) -> str:
        return self.judgement.verdict or gate.INCONCLUSIVE

    @property
    def values(self) -> dict[str, list[float]]:
        """Of each process that gave one: seconds a call, undisturbed, or the metric."""
        return {
            side: [o.undisturbed for o in self.outcomes[side] if o.undisturbed is not None] for side in SIDES
        }

    @property
    def ratios(self) -> list[float]:
        """Head over base, pair by pair."""
        base, head = (self.values[side] for side in SIDES)
        return [h / b if b else math.inf if h else 1.0 for b, h in zip(base, head, strict=False)]

    def settle(self, verdict: str, reason: str) -> None:
        self.judgement = replace(self.judgement, verdict=verdict, reason=reason)

    def judge(self, design: Design) -> None:
        """After a pair: look at what there is."""
        last = {side: self.outcomes[side][-1] for side in SIDES}
        for side in reversed(SIDES):
            if last[side].status in BROKEN:
                self.settle(gate.BROKEN, f"{side} {last[side].status}: {last[side].reason}")
                return
        skipped = [side for side in SIDES if last[side].status == SKIPPED]
        if skipped:
            where = "" if len(skipped) == 2 else f"{skipped[0]} "
            self.settle(gate.NOT_MEASURED, f"{where}skipped: {last[skipped[0]].reason}")
            return
        if not self.case.timed:
            base, head = (self.values[side] for side in SIDES)
            self.judgement = gate.judge_exact(base, head, design, FLOORS.get(self.case.unit, 0.0))
            if self.judgement.verdict or not self.judgement.reason or min(base + head) <= 0:
                return
        tolerance = design.tolerance if self.case.timed else design.memory_tolerance
        self.judgement = gate.judge_pairs(self.ratios, design, tolerance)


@dataclass
class Result:
    """A gate's rows, and what they were measured in."""

    base: str
    head: str
    machine: str
    design: Design
    rows: list[Row]
    seconds: float
    state: dict[str, Any]
    warnings: list[str]

    @property
    def verdict(self) -> str:
        return gate.overall([row.verdict for row in self.rows])


def contest(
    builds: dict[str, Build], pattern: str | None, design: Design, budget: float, journal: Journal, host: str,
    tell: Callable[[str], None] = lambda line: None, pairs: int | None = None,
) -> Result:  # fmt: skip
    """Measure base and head in turn for `budget` seconds at most, the building not counted.

    With `pairs` so many are run of everything, whatever they show: to calibrate.

    Raises:
        BuildFailed: one of them cannot be built or imported, or their environments differ.
    """
    found = {}
    for side in SIDES:
        tell(f"building {side}, {builds[side].commit[:8]}")
        builds[side].make()
        found[side] = cases(builds[side].benchmarks())
    packages = {side: builds[side].packages() for side in SIDES}
    if packages["base"] != packages["head"]:
        names = sorted(
            k for k in packages["base"] | packages["head"] if len({p.get(k) for p in packages.values()}) > 1
        )
        differ = ", ".join(f"{k} {packages['base'].get(k)} and {packages['head'].get(k)}" for k in names[:4])
        raise BuildFailed(
            f"the environments of base and head differ: {differ}. Delete {builds['base'].config.env_dir} and "
            f"{builds['head'].config.env_dir}; they are made anew."
        )
    now = machine.state() | {"packages": packages["head"]}
    before = journal.calibrated(host)
    warned = [] if before is None else machine.warnings(before[1], now)
    facts = journal.provenance(now)
    rows = [Row(case) for case in runner.select(found["head"], pattern)]
    known = {case.label for case in found["head"]}
    gone = [Row(case) for case in runner.select(found["base"], pattern) if case.label not in known]
    for row in gone:
        row.settle(gate.NOT_MEASURED, "absent in head")
    noise = journal.noise(host)
    design = replace(design, benchmarks=len(rows))
    wanted = [
        gate.pairs_for_power(noise[row.case.label][1], design, 2 * design.tolerance)
        for row in rows if row.case.timed and noise.get(row.case.label, ("",))[0] == row.case.version
    ]  # fmt: skip
    design = replace(design, pairs=min(MOST_PAIRS, max(wanted, default=0)))
    for line in warned:
        tell(f"warning: {line}")
    start = time.monotonic()
    session = f"gate {uuid.uuid4().hex[:8]}"
    sides = {name: Side(builds[name]) for name in SIDES}
    pair, last = 0, 0.0
    try:
        while pair < (design.most if pairs is None else pairs):
            open_rows = [row for row in rows if row.judgement.verdict is None or _goes_on(row, pairs)]
            elapsed = time.monotonic() - start
            if not open_rows or (pair >= 2 and elapsed + last > budget):
                break
            order = SIDES if pair % 2 == 0 else SIDES[::-1]
            for name in order:
                sides[name].start()
            for row in open_rows:
                for name, outcome in duel({name: sides[name] for name in order}, row.case).items():
                    row.outcomes[name].append(outcome)
                    where = builds[name].environment.name
                    words = f"{session} {name}"
                    journal.add(host, builds[name].commit, where, row.case, outcome, words, facts)
                row.judge(design)
            pair, last = pair + 1, time.monotonic() - start - elapsed
            left = sum(row.judgement.verdict is None for row in rows)
            tell(f"pair {pair}: {len(rows) - left} of {len(rows)} decided, {time.monotonic() - start:.0f} s")
    finally:
        for one in sides.values():
            one.close()
    if pairs is not None:
        _keep_noise(journal, host, rows, facts)
    return Result(
        builds["base"].commit, builds["head"].commit, host, design, rows + gone, time.monotonic() - start,
        now, warned,
    )  # fmt: skip


def _goes_on(row: Row, pairs: int | None) -> bool:
    """Whether a decided benchmark is measured all the same."""
    return pairs is not None and row.case.timed and row.judgement.verdict in (gate.PASS, gate.REGRESSED)


def _keep_noise(journal: Journal, host: str, rows: Sequence[Row], facts: int) -> None:
    for row in rows:
        logs = [math.log(r) for r in row.ratios if r > 0 and math.isfinite(r)]
        if row.case.timed and len(logs) >= 3:
            spread = statistics.stdev(logs)
            journal.keep_noise(host, row.case.label, row.case.version, spread, len(logs), facts)
    journal.write_noise(host)
