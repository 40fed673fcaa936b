"""What members are allotted adds up to the whole, whatever the weights are."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuscope._recording.batches.weights import fault_in, shares, whole

FINITE = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
WEIGHTS = st.lists(
    st.integers(0, 2**70)
    | FINITE
    | FINITE.map(np.float64)
    | st.integers(0, 2**31 - 1).map(np.int32)
    | st.floats(min_value=0, width=32, allow_nan=False, allow_infinity=False).map(np.float32)
    | st.fractions(min_value=0),
    min_size=1,
    max_size=300,
).filter(any)
TOTALS = st.integers(0, 2**56)


@given(total=TOTALS, weights=WEIGHTS)
def test_shares_add_up_exactly(total, weights):
    """No nanosecond is lost or made, whatever the weights, and none is off by a whole one."""
    assert fault_in(weights) == -1
    parts = shares(total, len(weights), whole(weights))
    exact = [Fraction(weight.item() if isinstance(weight, np.generic) else weight) for weight in weights]
    assert sum(parts) == total
    assert all(abs(part - total * weight / sum(exact)) < 1 for part, weight in zip(parts, exact, strict=True))


@given(total=TOTALS, count=st.integers(1, 2000))
def test_equal_shares_add_up_and_differ_by_one_at_most(total, count):
    """Equal weights are a case of their own, and give the same as weights that are equal."""
    parts = shares(total, count, None)
    assert sum(parts) == total
    assert max(parts) - min(parts) <= 1
    assert parts == shares(total, count, [3] * count)


def test_the_largest_remainder_gets_what_is_left():
    """Of 10 by 1, 2 and 3 the exact parts are 1⅔, 3⅓ and 5."""
    assert shares(10, 3, [1, 2, 3]) == [2, 3, 5]
    assert shares(1, 3, [1, 1, 1]) == [1, 0, 0]


@pytest.mark.parametrize(
    ("weights", "place"),
    [
        ([1, -1], 1),
        ([math.nan, 1], 0),
        ([1, 2, math.inf], 2),
        ([0, 0.0], 2),
        ([1, "2"], 1),
        ([None], 0),
        ([1, 1j], 1),
        ([np.float32("nan")], 0),
    ],
)
def test_a_fault_is_found_where_it_is(weights, place):
    """What is no finite number of 0 or more is named by its place; all zero by their number."""
    assert fault_in(weights) == place
