"""
What a stage costs per call, and what per item: a straight line of cost over size, if the calls follow one.

The method is Theil and Sen's estimator, the median of the slopes between all pairs of calls (P. K. Sen, J. Am. Stat.
Assoc. 63, 1379, 1968), by `scipy.stats.theilslopes`. Up to 29 % outliers do not spoil it. Refuses rather than guesses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MIN_CALLS = 20
MIN_SIZES = 3
MIN_SPREAD = 2.0
"""The 90th percentile of the sizes must be at least so many times the 10th."""
MAX_WIDTH = 0.25
"""How uncertain the fitted cost may be, as a part of the median cost."""
MAX_BEND = 0.15
"""How far off the line the small, middle and large sizes may be, as a part of the median cost."""
MAX_CALLS = 1000
"""The estimator looks at all pairs of calls: 1,000 take about 20 ms."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Cost = `fixed_ms` + `per_item_ms` times the size. The ranges are 95 % confidence intervals."""

    size: str
    """Name of the attribute that says how many items a call was given."""
    fixed_ms: float
    fixed_range_ms: tuple[float, float]
    per_item_ms: float
    per_item_range_ms: tuple[float, float]
    fixed_share: float
    """The fixed part of the cost at the median size, from 0 to 1."""
    calls: int


def fit_cost(size: str, sizes: NDArray[np.float64], costs_ms: NDArray[np.float64]) -> Fit | str:
    """
    Return the line, or why there is none.

    Args:
        size: The attribute's name.
        sizes: One per call.
        costs_ms: One per call.

    """
    refused = _refusal(size, sizes)
    if refused:
        return refused
    try:
        from scipy.stats import theilslopes
    except ImportError:
        return 'this needs SciPy: `pip install "gpuscope[report]"`'
    chosen = np.linspace(0, len(sizes) - 1, min(len(sizes), MAX_CALLS)).astype(int)
    sizes, costs_ms = sizes[chosen], costs_ms[chosen]
    with np.errstate(invalid="ignore"):  # With many equal values it returns a range of NaN.
        slope, fixed, low, high = (float(value) for value in theilslopes(costs_ms, sizes, alpha=0.95))
    middle, cost = float(np.median(sizes)), float(np.median(costs_ms))
    reach = float(np.ptp(np.percentile(sizes, (10, 90))))
    if (high - low) * reach > MAX_WIDTH * cost or not np.isfinite(high - low):
        return f"the calls differ too much to tell the effect of `{size}`"
    fixed_range = cost - high * middle, cost - low * middle
    # A curve that bends upwards has a line that begins below zero.
    if max(_bend(sizes, costs_ms - fixed - slope * sizes), -fixed_range[1]) > MAX_BEND * cost:
        return f"the cost does not follow a straight line over `{size}`"
    return Fit(
        size=size,
        fixed_ms=fixed,
        fixed_range_ms=fixed_range,
        per_item_ms=slope,
        per_item_range_ms=(low, high),
        fixed_share=min(max(fixed / (fixed + slope * middle), 0.0), 1.0),
        calls=len(sizes),
    )


def _refusal(size: str, sizes: NDArray[np.float64]) -> str:
    if len(sizes) < MIN_CALLS:
        return f"{len(sizes)} calls with `{size}`; at least {MIN_CALLS} are needed"
    smallest, largest = np.percentile(sizes, (10, 90))
    if len(np.unique(sizes)) < MIN_SIZES or smallest <= 0 or largest < MIN_SPREAD * smallest:
        return f"`{size}` varies too little: {sizes.min():g} to {sizes.max():g}"
    return ""


def _bend(sizes: NDArray[np.float64], residuals: NDArray[np.float64]) -> float:
    """Return the largest absolute median residual among the small, the middle and the large sizes."""
    first, second = np.percentile(sizes, (100 / 3, 200 / 3))
    thirds = (sizes <= first), (sizes > first) & (sizes <= second), (sizes > second)
    return max(abs(float(np.median(residuals[third]))) for third in thirds if third.any())
