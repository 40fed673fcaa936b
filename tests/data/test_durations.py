"""How durations are written: three significant digits and a unit, wherever somebody reads them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuscope._data.plain.durations import duration

UNITS = {"s": 1e3, "ms": 1.0, "µs": 1e-3, "ns": 1e-6}


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (233.282, "233 ms"),
        (23.226, "23.2 ms"),
        (9.996, "10.0 ms"),
        (99.96, "100 ms"),
        (0.99951, "1.00 ms"),
        (999.6, "1.00 s"),
        (0.0364, "36.4 µs"),
        (0.000_012, "12 ns"),
        (0, "0 ns"),
        (-1.2345, "-1.23 ms"),
        (1_234_567, "1,235 s"),
        (None, "-"),
        (float("nan"), "-"),
    ],
)
def test_three_digits_and_a_unit(ms, text):
    """The unit is the largest of which there is at least one, after rounding."""
    assert duration(ms) == text


def test_a_sign_where_it_is_asked_for():
    """Of changes, also those that are not negative have one."""
    assert [duration(ms, "+") for ms in (1.5, -1.5, 0)] == ["+1.50 ms", "-1.50 ms", "0 ns"]


@given(ms=st.floats(1e-3, 999_000))
def test_what_is_written_is_what_was_measured(ms):
    """To half a unit of the third digit, and never with more than three digits below 1,000 s."""
    number, unit = duration(ms).split()
    assert abs(float(number) * UNITS[unit] - ms) <= ms * 0.005 * 1.001
    assert sum(letter.isdigit() for letter in number) == 3
