"""Sets of intervals, against sets of single nanoseconds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuscope.analysis._structure.intervals import Intervals, covered, gaps, intersection, length, union

PAIRS = st.lists(st.tuples(st.integers(-20, 60), st.integers(-20, 60)), max_size=12)


def columns(pairs):
    """Intervals from pairs."""
    table = np.array(pairs, np.int64).reshape(-1, 2)
    return Intervals(table[:, 0], table[:, 1])


def points(intervals):
    """Every nanosecond that is covered."""
    return {at for start, end in zip(*intervals, strict=True) for at in range(start, end)}


def assert_disjoint(intervals):
    """Ordered, not empty, and not even touching."""
    assert (intervals.start < intervals.end).all()
    assert (intervals.end[:-1] < intervals.start[1:]).all()


@given(PAIRS)
def test_union_covers_the_same_and_is_disjoint(pairs):
    """A union covers each nanosecond that any interval covers, no other, and none twice."""
    joined = union(columns(pairs))
    assert_disjoint(joined)
    assert points(joined) == points(columns(pairs))
    assert length(joined) == len(points(joined))


@given(PAIRS)
def test_gaps_are_the_rest(pairs):
    """Between the first start and the last end each nanosecond is in the union or in a gap, never in both."""
    joined = union(columns(pairs))
    between = gaps(joined)
    assert not points(joined) & points(between)
    span = set(range(joined.start[0], joined.end[-1])) if len(joined.start) else set()
    assert points(joined) | points(between) == span


@given(PAIRS, PAIRS)
def test_intersection_is_what_both_cover(one, other):
    """An intersection is disjoint and covers what both sets cover."""
    one, other = union(columns(one)), union(columns(other))
    both = intersection(one, other)
    assert_disjoint(both)
    assert points(both) == points(one) & points(other)


@given(PAIRS, PAIRS)
def test_covered_counts_each_interval_on_its_own(pairs, by):
    """How much of an interval is covered does not depend on the others beside it."""
    by = union(columns(by))
    expected = [len(set(range(start, end)) & points(by)) for start, end in pairs]
    assert covered(columns(pairs), by).tolist() == expected


@pytest.mark.parametrize("at", [0, 1_700_000_000_000_000_000, 2**62])
def test_epoch_times_stay_exact(at):
    """Times since the epoch, beyond what a float can hold, keep their last nanosecond."""
    joined = union(columns([(at, at + 3), (at + 2, at + 7), (at + 9, at + 10)]))
    assert [column.tolist() for column in joined] == [[at, at + 9], [at + 7, at + 10]]
    assert [column.tolist() for column in gaps(joined)] == [[at + 7], [at + 9]]
