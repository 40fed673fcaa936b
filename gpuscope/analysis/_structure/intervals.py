"""
Sets of intervals of integer nanoseconds: union, gaps, intersection, and how much of something they cover.

Arithmetic on columns alone; knows neither stages nor files. An interval includes its start and not its end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Intervals(NamedTuple):
    """Starts and ends: two columns of one length. *Disjoint* intervals are ordered, not empty, and do not touch."""

    start: NDArray[np.int64]
    end: NDArray[np.int64]


def union(intervals: Intervals) -> Intervals:
    """Return the disjoint intervals that cover the same time; empty and reversed ones cover nothing."""
    real = intervals.end > intervals.start
    order = np.argsort(intervals.start[real], kind="stable")
    start = intervals.start[real][order]
    reached = np.maximum.accumulate(intervals.end[real][order])
    first = np.ones(len(start), np.bool_)
    first[1:] = start[1:] > reached[:-1]
    last = np.append(first[1:], True)[: len(start)]
    return Intervals(start[first], reached[last])


def gaps(disjoint: Intervals) -> Intervals:
    """Return what lies between disjoint intervals, from the first start to the last end."""
    return Intervals(disjoint.end[:-1], disjoint.start[1:])


def intersection(one: Intervals, other: Intervals) -> Intervals:
    """Return the disjoint intervals that two sets of disjoint intervals have in common."""
    first = np.searchsorted(other.end, one.start, side="right")
    count = np.maximum(np.searchsorted(other.start, one.end, side="left") - first, 0)
    ours = np.repeat(np.arange(len(one.start)), count)
    # The n-th partner of an interval comes n places after its first.
    theirs = first[ours] + np.arange(len(ours)) - (np.cumsum(count) - count)[ours]
    return Intervals(np.maximum(one.start[ours], other.start[theirs]), np.minimum(one.end[ours], other.end[theirs]))


def length(disjoint: Intervals) -> int:
    """Return the nanoseconds that disjoint intervals cover."""
    return int((disjoint.end - disjoint.start).sum())


def covered(intervals: Intervals, by: Intervals) -> NDArray[np.int64]:
    """Return for each interval, disjoint or not, how many of its nanoseconds the disjoint intervals `by` cover."""
    ns: NDArray[np.int64] = _covered_before(intervals.end, by) - _covered_before(intervals.start, by)
    return np.maximum(ns, 0)


def _covered_before(times: NDArray[np.int64], by: Intervals) -> NDArray[np.int64]:
    if not len(by.start):
        return np.zeros(len(times), np.int64)
    sizes = by.end - by.start
    last = np.searchsorted(by.start, times, side="right") - 1
    inside = np.minimum(times - by.start[last], sizes[last])
    return np.where(last < 0, 0, np.cumsum(sizes)[last] - sizes[last] + inside)
