"""
What a stage costs per call, and what per item: a straight line through cost over size, where the data can bear one.

Theil and Sen's estimator, the median of the slopes between all pairs of calls (P. K. Sen, J. Am. Stat. Assoc. 63,
1379, 1968), by `scipy.stats.theilslopes`: up to 29 % of odd calls do not move it. Refuses rather than guesses.
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
"""The largest tenth of the sizes must be at least so many times the smallest tenth."""
MAX_WIDTH = 0.25
"""How uncertain the fitted cost may be, as a part of the median cost."""
MAX_BEND = 0.15
"""How far off the line small, middling and large sizes may be, as a part of the median cost."""
MAX_CALLS = 1000
"""The estimator looks at all pairs of calls: 1,000 take about 20 ms."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Cost = `fixed_ms` + `per_item_ms` times the size; the ranges hold the true values with 95 % confidence."""

    size: str
    """The attribute that says how many items."""
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
        sizes: One a call.
        costs_ms: One a call.

    """
    refused = _refusal(size, sizes)
    if refused:
        return refused
    try:
        from scipy.stats import theilslopes
    except ImportError:
        return 'it takes SciPy: `pip install "gpuscope[report]"`'
    chosen = np.linspace(0, len(sizes) - 1, min(len(sizes), MAX_CALLS)).astype(int)
    sizes, costs_ms = sizes[chosen], costs_ms[chosen]
    with np.errstate(invalid="ignore"):  # Of many equal values it answers with a range that is not a number.
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
        return f"{len(sizes)} calls with `{size}`, of at least {MIN_CALLS}"
    smallest, largest = np.percentile(sizes, (10, 90))
    if len(np.unique(sizes)) < MIN_SIZES or smallest <= 0 or largest < MIN_SPREAD * smallest:
        return f"`{size}` varies too little: {sizes.min():g} to {sizes.max():g}"
    return ""


def _bend(sizes: NDArray[np.float64], residuals: NDArray[np.float64]) -> float:
    """Return the largest median residual of the smaller, the middling and the larger sizes."""
    first, second = np.percentile(sizes, (100 / 3, 200 / 3))
    thirds = (sizes <= first), (sizes > first) & (sizes <= second), (sizes > second)
    return max(abs(float(np.median(residuals[third]))) for third in thirds if third.any())
