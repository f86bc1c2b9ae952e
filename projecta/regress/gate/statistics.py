"""Judges paired ratios with stated error rates (group-sequential signed-rank tests).

The unit of replication is a pair: a process of base and one of head, whose samples were taken in alternation
(`run.pair`): noise between processes is many times that within one. A timing's datum is the logarithm of the
ratio of their lower quartiles, for who disturbs a call only ever makes it slower. If base and head differ by
a factor f and are otherwise alike, such data are symmetric about log f, whatever the noise's distribution:
Wilcoxon's signed-rank test is exact for them, and its inversion gives the bounds of f.

    REGRESSED     the lower bound exceeds 1 + tolerance
    PASS          the upper bound lies below 1 + tolerance: proved, not merely "no difference found"
    INCONCLUSIVE  neither, and the time is spent; with how many more pairs it would take

Looks and benchmarks are corrected for (Bonferroni, in unequal shares): a gate says REGRESSED of anything
whose true ratio is at most 1 + tolerance with a probability of at most `error`; it says PASS of a given
benchmark that is slower than that with at most `miss`. Metrics that do not vary (peak memory, counts) are
compared as they are.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

PASS, REGRESSED, BROKEN, NOT_MEASURED, INCONCLUSIVE = (
    "PASS", "REGRESSED", "BROKEN", "NOT MEASURED", "INCONCLUSIVE"
)  # fmt: skip
EXIT_CODES = {PASS: 0, REGRESSED: 1, BROKEN: 3, NOT_MEASURED: 4, INCONCLUSIVE: 5}
WORST_FIRST = (REGRESSED, BROKEN, INCONCLUSIVE, NOT_MEASURED, PASS)
LOOKS = 5  # of each kind
GROWTH = 1.25  # of the pairs from look to look


@dataclass(frozen=True)
class Design:
    """Error rates, tolerances and limits of a gate."""

    tolerance: float = 0.03  # a timing's ratio up to 1 + tolerance is none of its business
    memory_tolerance: float = 0.005  # the same of other metrics
    error: float = 0.01  # of the whole gate: saying REGRESSED of what is not
    miss: float = 0.05  # of a benchmark: saying PASS of what has regressed
    benchmarks: int = 1  # among which `error` is shared
    pairs: int = 0  # that the last look waits for at least, as `projecta calibrate` found

    def looks(self) -> tuple[dict[int, float], dict[int, float]]:
        """Interim looks: numbers of pairs, with the alpha of each, for PASS and for REGRESSED."""
        return _plan(self.miss, self.pairs), _plan(self.error / max(1, self.benchmarks), self.pairs)

    @property
    def most(self) -> int:
        """Pairs after the last look."""
        return max(max(plan) for plan in self.looks())


def _plan(share: float, last: int) -> dict[int, float]:
    """Interim looks: numbers of pairs that grow by one factor, and the alpha that each spends.

    No p of n pairs is less than 2^-n. What the first look needs is enough for those that follow, which find
    what is plain; the last, which has the most pairs, has all that is left.
    """
    first = math.ceil(-math.log2(share / LOOKS))
    factor = max(GROWTH, (last / first) ** (1 / (LOOKS - 1)))
    looks = [first]
    while len(looks) < LOOKS:
        looks.append(math.ceil(looks[-1] * factor - 1e-9))
    if factor > GROWTH:
        looks[-1] = last  # which the steps above round up
    least = 2.0**-first
    return dict.fromkeys(looks, least) | {looks[-1]: share - (LOOKS - 1) * least}


def pairs_for_power(spread: float, design: Design, slower: float, power: float = 0.95) -> int:
    """Pairs after which a benchmark that is slower by this share is found REGRESSED with this probability.

    `spread` is the standard deviation of the logarithm of a pair's ratio. From the normal distribution.

    >>> pairs_for_power(0.02, Design(benchmarks=3), 0.10)
    11
    """
    from scipy.stats import norm

    distance = math.log1p(slower) - math.log1p(design.tolerance)
    if distance <= 0:
        return 10**6
    regresses = design.looks()[1]
    level = regresses[max(regresses)]
    needed = ((float(norm.isf(level)) + float(norm.ppf(power))) * spread / distance) ** 2
    return max(min(regresses), math.ceil(min(needed, 1e6)))


@dataclass
class Judgement:
    """The ratio head / base of a benchmark, its bounds, and the verdict, if it is decided."""

    verdict: str | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str = ""
    pairs: int = 0
    more: int | None = None  # pairs that it would take


def _level(plan: dict[int, float], n: int, over: bool) -> float | None:
    """The alpha of a look at n pairs; None if there is no look.

    The clock ends a gate, and not what it found. So if the time is `over`, the look that is made instead of
    all that were to come may spend what these would have spent.
    """
    return sum(alpha for look, alpha in plan.items() if look >= n) or None if over else plan.get(n)


def judge_pairs(
    ratios: Sequence[float], design: Design, tolerance: float | None = None, over: bool = False
) -> Judgement:
    """The verdict over paired ratios so far, if this many pairs are a look; bounds and estimate in any case.

    `over`: there is no time for another pair, which makes this the last look.

    >>> judge_pairs([1.2, 1.21, 1.19, 1.2, 1.22, 1.2, 1.18, 1.2, 1.21], Design()).verdict
    'REGRESSED'
    """
    tolerance = design.tolerance if tolerance is None else tolerance
    n, found = len(ratios), Judgement(pairs=len(ratios))
    if n < 2:
        found.ratio = ratios[0] if ratios else None
        return found
    logs, limit = [math.log(r) for r in ratios], math.log1p(tolerance)
    averages = sorted((a + b) / 2 for i, a in enumerate(logs) for b in logs[i:])
    found.ratio = math.exp(statistics.median(averages))
    passes, regresses = design.looks()
    low, high = (_level(plan, n, over) for plan in (regresses, passes))
    found.low = math.exp(lower_bound(averages, n, low or min(regresses.values())))  # 0: too few pairs to say
    found.high = math.exp(-lower_bound([-a for a in reversed(averages)], n, high or min(passes.values())))
    if low and found.low > 1 + tolerance:
        found.verdict = REGRESSED
    elif high and found.high < 1 + tolerance:
        found.verdict = PASS
    distance = abs(math.log(found.ratio) - limit)
    found.more = max(
        1, _pairs_needed(statistics.stdev(logs), distance, design, found.ratio > 1 + tolerance) - n
    )
    return found


def lower_bound(averages: list[float], n: int, level: float) -> float:
    """The least value that the signed-rank test does not reject at this level: an average of two (Walsh)."""
    ranks = _critical(n, level)
    return -math.inf if ranks is None else averages[ranks]


def _critical(n: int, level: float) -> int | None:
    """The largest k with P(T < k) <= level, T the signed-rank sum of n; None if even T = 0 is likelier.

    The sum of the ranks of those differences that are positive; each sign is as likely: a sum of independent
    halves, whose distribution is a product of polynomials.
    """
    import numpy as np

    ways = np.ones(1)
    for rank in range(1, n + 1):
        longer = np.zeros(len(ways) + rank)
        longer[: len(ways)] += ways / 2
        longer[rank:] += ways / 2
        ways = longer
    below = np.cumsum(ways)
    k = int(np.searchsorted(below, level, side="right"))
    return k - 1 if k else None


def _pairs_needed(spread: float, distance: float, design: Design, slower: bool) -> int:
    """Pairs for the bound to clear a limit at this distance, were the data normal."""
    from scipy.stats import norm

    plan = design.looks()[slower]
    level, least = plan[max(plan)], min(plan)
    if distance == 0:
        return 10_000
    wanted = (float(norm.isf(level)) * spread / distance) ** 2
    return min(10_000, max(least, math.ceil(wanted)))


def invert(found: Judgement) -> Judgement:
    """The judgement of base / head, restated for head / base: for metrics where higher is better.

    >>> invert(Judgement("REGRESSED", 1.25, 1.0, 2.0)).low
    0.5
    """
    ratio, low, high = ((1 / x if x else math.inf) if x is not None else None
                        for x in (found.ratio, found.high, found.low))  # fmt: skip
    return replace(found, ratio=ratio, low=low, high=high)


def judge_exact(
    base: Sequence[float], head: Sequence[float], design: Design, floor: float, higher_is_better: bool = False
) -> Judgement:
    """The verdict over a metric that does not vary, from two values a side; below `floor` a difference is 0.

    If a side's own values differ by more than half of what is tolerated, there is no verdict: it varies.
    Unless the sides differ by twenty times as much, which two values of each hardly do by chance.
    """
    found = Judgement(pairs=min(len(base), len(head)))
    if found.pairs < 2:
        return found
    low, high = statistics.median(base), statistics.median(head)
    allowed = max(design.memory_tolerance * abs(low), floor)
    found.ratio = high / low if low else (1.0 if high == low else math.inf)
    spread = max(max(base) - min(base), max(head) - min(head))
    worse = min(base) - max(head) if higher_is_better else min(head) - max(base)
    if spread > allowed / 2 and not worse > max(2 * allowed, 20 * spread):
        found.reason = f"varies by {spread:.3g} from process to process"
        return found
    found.low = found.high = found.ratio
    found.verdict = REGRESSED if (low - high if higher_is_better else high - low) > allowed else PASS
    return found


def overall(verdicts: Sequence[str]) -> str:
    """The worst of the verdicts; NOT MEASURED of none."""
    return next((v for v in WORST_FIRST if v in verdicts), NOT_MEASURED)
