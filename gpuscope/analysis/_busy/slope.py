"""
How a stage's GPU interval moves with its host time over the calls: what paces the stage, without asking its stream.

Where the GPU sets the pace, a call whose launches take longer takes no longer on the GPU: the slope is about 0. Where
launches set it, what the host takes longer the GPU's interval is longer, too: about 1. Numbers in, numbers out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MIN_CALLS = 20
MIN_SPREAD = 0.04
"""The host's times must differ by at least this part of their median, from the 10th to the 90th percentile."""
MAX_CALLS = 400
"""The estimator looks at all pairs of calls: 400 take about 5 ms."""
BETWEEN = 0.5
"""Half way from 0, which the GPU's pace gives, to 1, which the launches' pace gives."""
STEEP = 1.5
"""A slope above this is of calls that are given more or less work, and says nothing."""


class Slope(NamedTuple):
    """GPU interval over host time, and the ends of its 95 % interval."""

    slope: float
    low: float
    high: float
    calls: int

    @property
    def gpu_sets_the_pace(self) -> bool:
        """Whether the interval excludes that launches do."""
        return self.low > -BETWEEN and self.high < BETWEEN

    @property
    def launches_set_the_pace(self) -> bool:
        """Whether the interval excludes that the GPU does."""
        return self.low > BETWEEN and self.high < STEEP


def slope_of(host_ns: NDArray[np.int64], gpu_ns: NDArray[np.int64]) -> Slope | None:
    """
    Return the slope; None where the calls are too few, their host times too much alike, or SciPy is missing.

    The method is Theil and Sen's estimator, the median of the slopes between all pairs of calls (P. K. Sen, J. Am.
    Stat. Assoc. 63, 1379, 1968), by `scipy.stats.theilslopes`: a few odd calls do not move it.

    Args:
        host_ns: One per call.
        gpu_ns: One per call.

    """
    if len(host_ns) < MIN_CALLS:
        return None
    low, middle, high = np.percentile(host_ns, (10, 50, 90))
    if high - low < MIN_SPREAD * middle:
        return None
    try:
        from scipy.stats import theilslopes
    except ImportError:
        return None
    chosen = np.linspace(0, len(host_ns) - 1, min(len(host_ns), MAX_CALLS)).astype(int)
    with np.errstate(invalid="ignore"):  # With many equal values it returns a range of NaN.
        slope, _, least, most = (float(each) for each in theilslopes(gpu_ns[chosen], host_ns[chosen], alpha=0.95))
    return Slope(slope, least, most, len(chosen)) if np.isfinite(most - least) else None
