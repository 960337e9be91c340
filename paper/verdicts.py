"""What a difference means: whether a published value fits our runs, and whether one row is ahead of another.

Both are decided by a 95 % interval of Student's t around the difference. A published value is one more draw (the mean
of m draws) from the distribution that our seeds are drawn from, so that its own noise is part of the interval; two rows
of ours are compared pair by pair where they have the same seeds, which share their batches and masks, and by Welch's
test where they do not. One seed shows no noise: it is undecided, whatever the difference. The tests hold by
simulation that a perfect replication differs in 5 % of its cells. Numbers are accuracies or AP in percentage points.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
from scipy.optimize import brentq
from scipy.special import chdtri, ndtr, stdtr, stdtrit

CONFIDENCE = 0.95  # of every interval, each cell by itself
POWER = 0.80  # how often a difference of the size that is called visible would be found
RELEVANT = 1.0  # points: what the paper's claims turn on ("by about 1 %", Figure 6); what a verdict must be able to see
MOST_SEEDS = 100  # more are never advised


@dataclass(frozen=True)
class Spread:
    """Standard deviation of one run over seeds, and the degrees of freedom that it was estimated with."""

    std: float
    freedom: int

    @classmethod
    def of(cls, *samples: Sequence[float]) -> Spread | None:
        """Pooled over samples, each around its own mean; None where none of them has two values."""
        several = [sample for sample in samples if len(sample) > 1]
        freedom = sum(len(sample) - 1 for sample in several)
        squares = sum((len(sample) - 1) * variance(sample) for sample in several)
        return cls(math.sqrt(squares / freedom), freedom) if freedom else None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`word`: agrees, differs; ahead, level, behind; or undecided, with the reason. Unknown numbers are nan."""

    word: str
    difference: float
    low: float = math.nan  # the 95 % interval of the difference
    high: float = math.nan
    p: float = math.nan  # two-sided; nan for what is undecided whatever the difference
    sees: float = math.nan  # the difference that this many seeds find in 80 % of all cases
    reason: str = ""

    def __str__(self) -> str:
        """`agrees, -0.9 to +0.5`, `undecided: 3 seeds could only see a difference of 2.1`."""
        interval = "" if math.isnan(self.low) else f", {self.low:+.1f} to {self.high:+.1f}"
        return f"{self.word}: {self.reason}" if self.reason else f"{self.word}{interval}"


def fits(values: Sequence[float], published: float, behind: int = 1, spread: Spread | None = None) -> Verdict:
    """Whether `published`, the mean of `behind` runs, fits our `values`, one of each pre-training.

    spread: of one run, where it is known from more than these values (pooled); otherwise it is theirs. The t prediction
    interval: mean - published ± t(freedom) * std * sqrt(1 / n + 1 / behind).
    """
    n, difference = len(values), fmean(values) - published
    known = spread or Spread.of(values)
    if known is None or not known.std:
        return _undecided(difference, n)
    return _judged(difference, known.std * math.sqrt(1 / n + 1 / behind), known.freedom, n)


def compare(ours: Mapping[int, float], others: Mapping[int, float]) -> Verdict:
    """Whether the row with the values `ours`, by seed, is ahead of the row with `others`: paired, or Welch's."""
    difference = fmean(ours.values()) - fmean(others.values())
    n = min(len(ours), len(others))
    if ours.keys() == others.keys():
        spread = Spread.of([ours[seed] - others[seed] for seed in ours])
        error, freedom = (spread.std / math.sqrt(n), n - 1) if spread else (0.0, 0)
    else:
        error, freedom = welch([*ours.values()], [*others.values()])
    if not error:
        return _undecided(difference, n)
    verdict = _judged(difference, error, freedom, n)
    words = {"agrees": "level", "differs": "ahead" if difference > 0 else "behind"}
    return replace(verdict, word=words.get(verdict.word, verdict.word))


def welch(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Standard error of the difference of two means, and its degrees of freedom; zeros where a side has one value."""
    if min(len(one), len(other)) < 2:
        return 0.0, 0.0
    parts = [(variance(values) / len(values), len(values)) for values in (one, other)]
    total = sum(part for part, _ in parts)
    if not total:
        return 0.0, 0.0
    return math.sqrt(total), total**2 / sum(part**2 / (n - 1) for part, n in parts)


def _judged(difference: float, error: float, freedom: float, n: int) -> Verdict:
    """`n`: how many seeds stand behind it. One is undecided even where the spread of others gives it an interval."""
    width, sees = quantile(freedom) * error, noncentrality(max(1, int(freedom))) * error
    numbers = {"difference": difference, "low": difference - width, "high": difference + width, "sees": sees}
    if n < 2:
        return Verdict(word="undecided", reason="one seed", **numbers)
    numbers["p"] = 2 * float(stdtr(freedom, -abs(difference) / error))
    if abs(difference) > width:
        return Verdict(word="differs", **numbers)
    if sees <= RELEVANT:
        return Verdict(word="agrees", **numbers)
    return Verdict(word="undecided", reason=f"{n} seeds could only see a difference of {sees:.1f}", **numbers)


def _undecided(difference: float, n: int) -> Verdict:
    reason = "one seed" if n < 2 else f"{n} seeds, all alike, show no noise"
    return Verdict(word="undecided", difference=difference, reason=reason)


def variance(values: Sequence[float]) -> float:
    """Of a sample, n - 1 in the denominator (the standard library's exact fractions take thirty times as long)."""
    mean = fmean(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


@functools.cache
def quantile(freedom: float) -> float:
    """Student's t that is exceeded, in either direction, by chance in 5 % of all cases."""
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def power(size: float, freedom: float) -> float:
    """How often a difference of `size` standard errors is found by the two-sided test: the mean over estimated errors.

    (scipy's noncentral t is not a number for one degree of freedom.)
    """
    chance = (np.arange(1000) + 0.5) / 1000
    limit = quantile(freedom) * np.sqrt(chdtri(freedom, chance) / freedom)  # in true standard errors
    return float(np.mean(ndtr(size - limit) + ndtr(-size - limit)))


@functools.cache
def noncentrality(freedom: int) -> float:
    """The size of a difference, in standard errors, that is found in 80 % of all cases."""
    return brentq(lambda size: power(size, freedom) - POWER, 0.1, 50)


# ---------------------------------------------------------------------------------------------------- many cells


def holm(p: Sequence[float]) -> list[bool]:
    """Which of these p-values stay below 5 % when all are asked at once (Holm 1979), whatever their dependence."""
    order, kept = sorted(range(len(p)), key=lambda i: p[i]), [False] * len(p)
    for rank, index in enumerate(order):
        if p[index] > (1 - CONFIDENCE) / (len(p) - rank):
            break
        kept[index] = True
    return kept


def seeds_to_see(spread: Spread, behind: float = 1, size: float = RELEVANT, paired: bool = False) -> int | None:
    """The fewest seeds that find a difference of `size` from a published value in 80 % of all cases.

    None where no number does: the published value's own noise remains (`behind` runs). Of two rows with the same seeds
    (`paired`), where `spread` is that of the differences, some number always does; None beyond MOST_SEEDS.
    """
    own, freedom = (0, 0) if paired else (1 / behind, spread.freedom)

    def sees(n: int) -> float:
        return noncentrality(max(n - 1, freedom)) * spread.std * math.sqrt(1 / n + own)

    if sees(MOST_SEEDS) > size:
        return None
    return next(n for n in range(2, MOST_SEEDS + 1) if sees(n) <= size)
