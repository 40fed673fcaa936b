"""
How certain the change of a median is: a seeded bootstrap that allows for calls that resemble the calls before them.

Numbers in, numbers out; knows no stages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

DRAWS = 10_000
CONFIDENCE = 0.99
"""Not 0.95: with that, one in twenty stages that did not change would be called changed."""
_BLOCKS = (5, 10, 20)
"""Numbers of blocks: few long ones see slow changes, many short ones are more certain about fast ones."""


class Interval(NamedTuple):
    """The change of a median, and the ends of its confidence interval."""

    before: float
    after: float
    low: float
    """This and the next in the unit of the values."""
    high: float
    low_part: float | None
    """This and the next as parts of what it was before: -1 at least; None where it may have been 0."""
    high_part: float | None


def median_change(
    before: NDArray[np.float64], after: NDArray[np.float64], *, seed: int = 0
) -> tuple[float, float, float]:
    """
    Return the median of `after` less that of `before`, and the ends of its confidence interval, in the values' unit.

    Args:
        before: At least one value, in the order of time.
        after: The same.
        seed: Equal seeds give equal intervals.

    """
    found = change_of(before, after, seed=seed)
    return found.after - found.before, found.low, found.high


def change_of(before: NDArray[np.float64], after: NDArray[np.float64], *, seed: int = 0) -> Interval:
    """
    Return how a median changed.

    Args:
        before: At least one value, in the order of time; none below 0.
        after: The same.
        seed: Equal seeds give equal intervals.

    """
    random = np.random.default_rng(seed)
    drawn_after, drawn_before = _bootstrap(after, random), _bootstrap(before, random)
    outside = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(drawn_after - drawn_before, (outside, 100 - outside)).tolist()
    parts: tuple[float | None, float | None] = (None, None)
    if drawn_before.min() > 0:
        first, last = (np.percentile(drawn_after / drawn_before, (outside, 100 - outside)) - 1).tolist()
        parts = first, last
    return Interval(float(np.median(before)), float(np.median(after)), low, high, *parts)


def _bootstrap(values: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.float64]:
    """
    Return medians of random samples of the values.

    The median of m draws from n ordered values is the value at place n * Beta((m + 1) / 2, (m + 1) / 2), so each is
    one draw from a Beta distribution instead of m draws and a sort: Maritz and Jarrett, "A note on estimating the
    variance of the sample median", JASA 73 (1978). The formula also takes an m that is not a whole number.
    """
    half = (_independent(values) + 1) / 2
    places = (random.beta(half, half, DRAWS) * len(values)).astype(np.int64)
    chosen: NDArray[np.float64] = np.sort(values)[np.minimum(places, len(values) - 1)]
    return chosen


def _independent(values: NDArray[np.float64]) -> float:
    """
    Return how many independent values would place the median as well as these do: at most as many as there are.

    The method is batch means (Conway, "Some tactical problems in digital simulation", Management Science 10, 1963):
    where neighbours are alike, the share of values above the median varies from block to block by more than chance. A
    change that is slower than the longest block, a fifth of the values, cannot be told from a lasting one.
    """
    above = values > np.median(values)
    share = float(above.mean())
    inflation = 1.0
    for blocks in _BLOCKS:
        size = len(values) // blocks
        if share and size > 1:
            shares = above[: blocks * size].reshape(blocks, size).mean(axis=1)
            inflation = max(inflation, size * float(shares.var(ddof=1)) / (share * (1 - share)))
    return len(values) / inflation
