"""Fixed cost and cost per item: found where the data can bear it, refused where not."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuscope.analysis._verdicts.fit import Fit, fit_cost

SIZES = np.tile([1.0, 2.0, 4.0, 8.0, 16.0], 12)


def noise(count: int, seed: int = 0) -> np.ndarray:
    """Deviations of about one, the same each time."""
    return np.random.default_rng(seed).normal(size=count)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.1, 10), st.floats(0.01, 5), st.integers(0, 99))
def test_a_straight_line_is_found_with_ranges_that_hold_it(fixed_ms, per_item_ms, seed):
    """With noise of one per cent the line is found within a few, and most is attributed to the right part."""
    costs = fixed_ms + per_item_ms * SIZES
    fit = fit_cost("batch_size", SIZES, costs * (1 + 0.01 * noise(len(SIZES), seed)))
    assert isinstance(fit, Fit)
    assert fit.per_item_ms == pytest.approx(per_item_ms, abs=0.02 * (fixed_ms / 4 + per_item_ms))
    assert fit.per_item_range_ms[0] <= fit.per_item_ms <= fit.per_item_range_ms[1]
    assert fit.fixed_range_ms[0] <= fit.fixed_ms <= fit.fixed_range_ms[1]
    assert fit.fixed_share == pytest.approx(fixed_ms / (fixed_ms + 4 * per_item_ms), abs=0.05)


def test_a_few_odd_calls_do_not_move_the_line():
    """One call in thirteen that takes fifty times as long leaves the estimate where it was."""
    costs = 2 + 0.5 * SIZES + 0.01 * noise(len(SIZES))
    costs[::13] *= 50
    fit = fit_cost("batch_size", SIZES, costs)
    assert isinstance(fit, Fit)
    assert (fit.fixed_ms, fit.per_item_ms) == (pytest.approx(2, abs=0.2), pytest.approx(0.5, abs=0.05))


def test_a_cost_that_does_not_depend_on_the_size_is_all_per_call():
    """A stage that only launches costs the same for every batch."""
    fit = fit_cost("batch_size", SIZES, 3 + 0.01 * noise(len(SIZES)))
    assert isinstance(fit, Fit)
    assert fit.fixed_share == pytest.approx(1, abs=0.01)
    assert fit.per_item_range_ms[0] <= 0 <= fit.per_item_range_ms[1] or abs(fit.per_item_ms) < 0.01


@pytest.mark.parametrize(
    ("sizes", "costs", "reason"),
    [
        (SIZES[:19], SIZES[:19], "19 calls with `batch_size`; at least 20 are needed"),
        (np.full(60, 8.0), np.ones(60), "`batch_size` varies too little: 8 to 8"),
        (np.tile([8.0, 9.0, 10.0], 20), np.ones(60), "`batch_size` varies too little: 8 to 10"),
        (np.tile([1.0, 8.0], 30), np.ones(60), "`batch_size` varies too little: 1 to 8"),
        (np.tile([0.0, 1.0, 8.0], 20), np.ones(60), "`batch_size` varies too little: 0 to 8"),
        (SIZES, np.exp(2 * noise(60)), "the calls differ too much to tell the effect of `batch_size`"),
        (
            np.tile(np.arange(1.0, 7), 20),
            np.tile(np.arange(1.0, 7), 20) ** 2,
            "the cost does not follow a straight line over `batch_size`",
        ),
    ],
)
def test_a_line_that_the_data_cannot_bear_is_refused_with_the_reason(sizes, costs, reason):
    """Few calls, few or close sizes, scattered or bent costs: no numbers, but why."""
    assert fit_cost("batch_size", sizes, costs) == reason


def test_without_scipy_there_is_no_line_but_a_hint(monkeypatch):
    """The rest of a report needs only numpy, and goes on."""
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    assert fit_cost("batch_size", SIZES, SIZES) == 'this needs SciPy: `pip install "gpuscope[report]"`'


def test_many_calls_are_thinned_out():
    """The estimator looks at pairs: of a hundred thousand calls a thousand are enough."""
    sizes = np.tile(SIZES, 2000)
    fit = fit_cost("batch_size", sizes, 1 + sizes)
    assert isinstance(fit, Fit)
    assert fit.calls == 1000


def test_the_order_of_calls_does_not_matter():
    """Each of them counts as long as there are no more than a thousand."""
    sizes, costs = SIZES[:25], 2 + 0.5 * SIZES[:25] + 0.1 * noise(25)
    there, back = fit_cost("batch_size", sizes, costs), fit_cost("batch_size", sizes[::-1], costs[::-1])
    assert there == back


NINE = np.tile(np.arange(1.0, 10), 12)


@pytest.mark.parametrize("high", [(2, 3), (5, 6), (8, 9)], ids=["small sizes", "middle sizes", "large sizes"])
@pytest.mark.parametrize(("off", "straight"), [(0.13, True), (0.2, False), (-0.13, True), (-0.2, False)])
def test_a_third_of_the_sizes_that_is_off_the_line_is_a_bend(high, off, straight):
    """A hump or a dip that the others do not show: by more than 15 % of the median cost there is no line."""
    costs = 10 + 0.01 * noise(len(NINE)) + 10 * off * np.isin(NINE, high)
    assert isinstance(fit_cost("batch_size", NINE, costs), Fit) is straight


@pytest.mark.parametrize(
    ("calls", "high", "straight"),
    [
        ((8, 8, 30, 8, 12, 12, 13, 13, 13), (1, 2), True),
        ((8, 8, 30, 8, 12, 12, 13, 13, 13), (5, 6), False),
        ((14, 14, 14, 8, 8, 30, 8, 12, 12), (4, 5), True),
        ((14, 14, 14, 8, 8, 30, 8, 12, 12), (8, 9), False),
        ((10,) * 12, (2, 3), True),
        ((10,) * 12, (10, 11), True),
    ],
)
def test_a_size_that_most_calls_have_counts_among_the_smaller_ones(calls, high, straight):
    """There it outweighs the few calls beside it, and it hides no bend of the larger ones. Half a third is no bend."""
    sizes = np.repeat(np.arange(1.0, len(calls) + 1), calls)
    costs = 10 + 0.01 * noise(len(sizes)) + 2.5 * np.isin(sizes, high)
    assert isinstance(fit_cost("batch_size", sizes, costs), Fit) is straight


@pytest.mark.parametrize(
    ("sizes", "accepted"),
    [
        (np.tile([4.0, 6.0, 8.0], 20), True),
        (np.tile([4.0, 6.0, 7.9], 20), False),
        (np.tile([1.0, 2.0, 4.0, 8.0], 5), True),
    ],
    ids=["three sizes that double", "less than double", "twenty calls"],
)
def test_the_least_that_a_line_needs(sizes, accepted):
    """Three sizes, the largest twice the smallest, and twenty calls."""
    assert isinstance(fit_cost("batch_size", sizes, 1 + sizes), Fit) is accepted


def test_the_width_of_a_line_is_that_of_the_cost_it_tells():
    """Up to a quarter of the median cost over the range of sizes, from the tenth to the ninetieth percentile."""
    sizes = np.tile(np.arange(1.0, 11), 40)
    for spread, found in ((0.52, True), (0.57, False)):
        for unit in (1, 100):
            fit = fit_cost("batch_size", unit * sizes, 10 + spread * 10 * noise(len(sizes), 1))
            assert isinstance(fit, Fit) is found


def test_the_fixed_share_is_of_the_cost_at_the_median_size():
    """From nothing to all, whatever the line says."""
    fit = fit_cost("batch_size", SIZES, 2 + 0.5 * SIZES)
    assert (fit.fixed_ms, fit.per_item_ms) == (pytest.approx(2), pytest.approx(0.5))
    assert fit.fixed_share == pytest.approx(0.5)
    assert fit.fixed_range_ms == pytest.approx((2, 2))
    assert fit_cost("batch_size", SIZES, 3 - 0.01 * SIZES).fixed_share == 1.0
    assert fit_cost("batch_size", SIZES, SIZES - 0.1).fixed_share == 0.0


def test_sizes_of_which_most_are_alike_have_a_line():
    """A third without any call says nothing about a bend."""
    sizes = np.tile([1.0, 1.0, 1.0, 2.0, 4.0, 4.0, 4.0], 10)
    assert isinstance(fit_cost("batch_size", sizes, 1 + sizes), Fit)
