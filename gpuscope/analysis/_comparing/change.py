"""
The change of a median duration, what it is called, and whether the slow ones changed beside it.

Numbers in, numbers and words out; knows no stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gpuscope.analysis._comparing.median import change_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpuscope.analysis._comparing.median import Interval

MIN_CALLS = 20
"""With fewer calls, the interval of a median is nearly as wide as the range of all values."""
FASTER, SLOWER, NOISE, FEW = "faster", "slower", "within noise", "too few"
SMALL, NOISY = "too small", "too noisy"
WORTH = 0.01
"""A change of less than this part of the request, beyond noise as it may be, is too small to matter."""
TOO_WIDE = 0.1
"""An interval that reaches farther than this part of the median to either side does not tell that nothing changed."""
SLOW = 0.99
MIN_OF_SLOW = 100
"""With fewer requests, their 99th percentile is the slowest one."""
SIGMAS = 2.58
"""So many standard deviations of the normal distribution are 99 % on both sides."""
WORTH_OF_SLOW = 0.1
"""A change of the 99th percentile by less than this part of it comes from one run to the next."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """The change of a median duration. A figure is `None` if there were no calls to take it from."""

    calls: tuple[int, int]
    """Before and after, warm-up left out."""
    before_ms: float | None
    after_ms: float | None
    change_ms: float | None
    relative: float | None
    """The change as a part of the median before: 0.1 is 10 % slower."""
    low_ms: float | None
    """This and the next are the ends of the 99 % confidence interval of the change."""
    high_ms: float | None
    verdict: str
    """
    `faster` or `slower` if the interval excludes zero, else `within noise`; `too small` if it excludes zero for less
    than `WORTH` of what a request takes; `too noisy` if it includes zero and is wider than `TOO_WIDE` to either side;
    `too few` below `MIN_CALLS` calls.
    """
    low_part: float | None = None
    """This and the next are the ends of the interval of the ratio, less 1: -0.5 is half. None beside medians of 0."""
    high_part: float | None = None

    @property
    def interval(self) -> str:
        """The interval of the ratio as it stands in a sentence: `-1.0% to +2.0%`."""
        if self.low_part is None or self.high_part is None:
            return "unknown"
        return f"{self.low_part:+.1%} to {self.high_part:+.1%}"

    def is_slower(self, allowed: float) -> bool:
        """Return whether the median rose, beyond noise, by more than this part of what it was: 0.1 is 10 %."""
        beyond_noise = self.verdict != FEW and self.low_ms is not None and self.low_ms > 0
        return beyond_noise and (self.relative is None or self.relative > allowed)

    def may_be_slower(self, allowed: float) -> bool:
        """Return whether nobody can tell that it is not slower by more than this part: the interval is too wide."""
        if self.verdict not in (NOISE, NOISY) or self.low_part is None or self.high_part is None:
            return False
        limit = allowed or TOO_WIDE
        return self.high_part > limit and self.high_part - self.low_part > 2 * limit


def change_between(before: NDArray[np.float64], after: NDArray[np.float64], worth_ms: float) -> Change:
    """
    Return the change of a median, and what it is called.

    Args:
        before: Durations in milliseconds, in the order of time; there may be none.
        after: The same.
        worth_ms: Less is too small to matter.

    """
    before_ms, after_ms = (float(np.median(values)) if len(values) else None for values in (before, after))
    found = change_of(before, after) if len(before) and len(after) else None
    change_ms = found.after - found.before if found else None
    few = min(len(before), len(after)) < MIN_CALLS
    return Change(
        calls=(len(before), len(after)),
        before_ms=before_ms,
        after_ms=after_ms,
        change_ms=change_ms,
        relative=change_ms / before_ms if before_ms and change_ms is not None else None,
        low_ms=found.low if found else None,
        high_ms=found.high if found else None,
        verdict=FEW if few or found is None else _verdict(found, worth_ms),
        low_part=found.low_part if found else None,
        high_part=found.high_part if found else None,
    )


def _verdict(found: Interval, worth_ms: float) -> str:
    if found.low <= 0 <= found.high:
        if found.low_part is None or found.high_part is None or found.high - found.low <= 2 * worth_ms:
            return NOISE
        return NOISY if found.high_part - found.low_part > 2 * TOO_WIDE else NOISE
    if abs(found.after - found.before) < worth_ms:
        return SMALL
    return SLOWER if found.low > 0 else FASTER


def slow_ones(before: NDArray[np.float64], after: NDArray[np.float64]) -> tuple[float, float] | None:
    """
    Return the 99th percentiles before and after, if they differ beyond noise and by enough to matter.

    Noise is told by how often there are values above the middle between the two. Those in a row count once, because
    what holds up one request often holds up its neighbours.
    """
    if min(len(before), len(after)) < MIN_OF_SLOW:
        return None
    first, last = (float(np.quantile(values, SLOW)) for values in (before, after))
    if abs(last - first) < WORTH_OF_SLOW * first:
        return None
    counts = [_runs(values > (first + last) / 2) for values in (before, after)]
    rates = [count / len(values) for count, values in zip(counts, (before, after), strict=True)]
    spread = sum(rate / len(values) for rate, values in zip(rates, (before, after), strict=True)) ** 0.5
    return (first, last) if abs(rates[1] - rates[0]) > SIGMAS * spread else None


def _runs(above: NDArray[np.bool_]) -> int:
    return int(above[0]) + int((above[1:] & ~above[:-1]).sum())
