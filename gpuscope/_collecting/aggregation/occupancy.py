"""
For which part of each interval stages were on each GPU: the union of their intervals, never the sum.

Overstates what it cannot know: an event interval is time on the stream, the host's pauses included. Counts leaf stages
only, because a stage's interval covers those inside it, with the pauses between them. Takes no lock, and asks no clock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpuscope._data.batch import RowFlag

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpuscope._collecting.aggregation.joined_columns import Columns

_IN_GRAPH = int(RowFlag.IN_GRAPH)
_PARENTS_KEPT = 1024
"""Parents whose rows have not come yet; beyond it the oldest are forgotten, and would count as leaves."""
_MIN_WAIT_NS, _MAX_WAIT_NS = 2 * 10**9, 60 * 10**9
_MAX_PENDING = 16_384
"""Intervals not settled yet: a millisecond's work. With more, what is older than the shortest wait is settled early."""
_MAX_PIECES = 128
"""Arrays of intervals per device; with more, they are joined to their union."""


class Occupancy:
    """
    Takes every stage, and tells for which part of each interval each device was occupied.

    A stage is known only once it has ended. So time is settled `wait_ns` later, when stages as long as those seen so
    far must have come in: 2 s and one and a half times the longest one, a minute at most. Of a stage that comes later,
    the part that is already settled is not counted.

    Args:
        start_ns: when the first interval begins, in nanoseconds since the epoch.

    """

    def __init__(self, start_ns: int) -> None:
        self.wait_ns = _MIN_WAIT_NS
        self.ratios: dict[int, float] = {}
        """The occupied part of the last interval, by device; empty before the first has ended."""
        self._devices: dict[int, _Device] = {}
        self._begin_ns = self._settled_ns = start_ns
        self._pending = 0
        # Span ids of parents. A parent ends after the stages inside it, so its row comes after theirs. One that belongs
        # to the application never comes. So beyond a number the lowest ids are forgotten: of ours those are the oldest.
        self._awaited = np.zeros(0, np.uint64)

    def add(self, rows: Columns) -> None:
        """Keep the GPU intervals of the leaf stages until they are settled."""
        leaves = self._leaves(rows)
        if not leaves.size:
            return
        starts, ends = intervals = np.array((rows.gpu_start_ns[leaves], rows.gpu_end_ns[leaves]))
        longest_ns = int((ends - starts).max())
        self.wait_ns = min(max(self.wait_ns, _MIN_WAIT_NS + longest_ns * 3 // 2), _MAX_WAIT_NS)
        devices = rows.device[leaves]
        present = np.flatnonzero(np.bincount(devices)).tolist()
        for index in present:
            mine = intervals if len(present) == 1 else intervals[:, devices == index]
            self._devices.setdefault(index, _Device()).add(mine)
        self._pending += leaves.size
        if self._pending > _MAX_PENDING:
            self.settle(int(ends.max()) - _MIN_WAIT_NS)

    def settle(self, until_ns: int) -> None:
        """Count the time up to a moment for good: intervals before it that come later are left out."""
        if until_ns <= self._settled_ns:
            if self._settled_ns - until_ns > _MAX_WAIT_NS:
                # The wall clock was set back: begin again from there, or nothing would count until it has caught up.
                self._begin_ns = self._settled_ns = until_ns
            return
        for device in self._devices.values():
            device.settle(self._settled_ns, until_ns)
        self._settled_ns = until_ns
        self._pending = sum(piece.shape[1] for device in self._devices.values() for piece in device.pieces)

    def end_interval(self) -> None:
        """Compute `ratios` for the time settled since the last call, and begin the next interval."""
        length_ns = self._settled_ns - self._begin_ns
        if length_ns <= 0:
            return
        self.ratios = {index: device.occupied_ns / length_ns for index, device in self._devices.items()}
        self._begin_ns = self._settled_ns
        for device in self._devices.values():
            device.occupied_ns = 0

    def _leaves(self, rows: Columns) -> NDArray[np.int64]:
        """Return which rows have a GPU part, and no other row with a GPU part inside."""
        # Of a replay the stage around it counts, as a whole: work in a graph outside any inner stage is work as well.
        timed = (rows.gpu_end_ns != 0) & ((rows.flags & _IN_GRAPH == 0) | ~rows.nested)
        # What is above an outermost stage is not a stage, and would be awaited for ever.
        parents = np.concatenate((self._awaited, rows.parent_id[timed & rows.nested]))
        parents.sort()
        first = np.ones(parents.size, np.bool_)
        first[1:] = parents[1:] != parents[:-1]
        parents = parents[first]
        places = np.flatnonzero(timed)
        spans = rows.span_id[places]
        around = _is_in(spans, parents)
        self._awaited = parents[~_is_in(parents, np.sort(spans[around]))][-_PARENTS_KEPT:]
        return places[~around]


class _Device:
    """The occupied time of one device."""

    def __init__(self) -> None:
        self.occupied_ns = 0
        self.pieces: list[NDArray[np.int64]] = []
        """What is not settled: arrays with a row of starts and a row of ends, in any order."""

    def add(self, piece: NDArray[np.int64]) -> None:
        self.pieces.append(piece)
        if len(self.pieces) > _MAX_PIECES:
            self.pieces = [np.stack(union(np.concatenate(self.pieces, axis=1)))]

    def settle(self, from_ns: int, until_ns: int) -> None:
        if not self.pieces:
            return
        starts, ends = union(np.concatenate(self.pieces, axis=1).clip(min=from_ns))
        self.occupied_ns += int((ends.clip(max=until_ns) - starts.clip(max=until_ns)).sum())
        later = ends > until_ns
        self.pieces = [np.stack((starts[later], ends[later]))] if later.any() else []


def _is_in(values: NDArray[np.uint64], table: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return which values are in the sorted table; takes a third of the time of `np.isin`."""
    if not table.size:
        return np.zeros(values.shape, np.bool_)
    found: NDArray[np.bool_] = table.take(table.searchsorted(values), mode="clip") == values
    return found


def union(intervals: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return starts and ends of the disjoint intervals that cover the same time; `intervals` has them as two rows."""
    starts, ends = intervals[:, intervals[0].argsort()]
    reach = np.maximum.accumulate(ends)
    first = np.flatnonzero(np.concatenate(([True], starts[1:] > reach[:-1])))
    return starts[first], reach[np.concatenate((first[1:] - 1, [len(reach) - 1]))]
