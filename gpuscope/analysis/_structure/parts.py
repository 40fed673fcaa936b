"""
Which part of its requests a stage takes, and which calls count: the same answer for tables, verdicts and pictures.

Arithmetic on columns; judges nothing. A part is never larger than the whole: time that several calls cover, as calls
inside themselves or beside each other do, counts once, and what lies outside the request does not count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpuscope.analysis._structure.ancestors import ancestors
from gpuscope.analysis._structure.intervals import Intervals, length, union

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpuscope.analysis.recording import Recording


def counted(recording: Recording, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows that medians and other percentiles are of: those that are not warm-up, or all if all are."""
    steady = rows[~recording.in_warmup_request[rows]]
    return steady if len(steady) else rows


def some_of(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """
    Return so many rows at most, evenly over all of them: from each stretch of them one at random.

    Every n-th would miss, or take too often, what comes back every n-th time. Equal rows give equal choices.
    """
    if len(rows) <= most:
        return rows
    places = (np.arange(most) + np.random.default_rng(0).random(most)) * len(rows) / most
    return rows[places.astype(np.int64)]


def work_end_ns(recording: Recording) -> NDArray[np.int64]:
    """Return when all work of each row was done, on the host and on the GPU, inner stages included."""
    own_ns: NDArray[np.int64] = np.maximum(recording.host_end_ns, recording.gpu_end_ns * recording.measured)
    own_ns = np.maximum(own_ns, recording.host_start_ns)
    end_ns: NDArray[np.int64] = own_ns.copy()
    for rows, above in ancestors(recording.parent):
        np.maximum.at(end_ns, above, own_ns[rows])
    return end_ns


class Requests:
    """
    Some requests laid end to end, so that the time that stages cover in all of them can be measured at once.

    Args:
        recording: Any recording.
        rows: The rows of the requests, each once.
        end_ns: What `work_end_ns` returns: the ends of the requests.

    """

    def __init__(self, recording: Recording, rows: NDArray[np.int64], end_ns: NDArray[np.int64]) -> None:
        self._recording = recording
        self._whole_ns = end_ns[rows] - recording.host_start_ns[rows]
        self._number = np.full(len(recording.stage), -1, np.int64)
        self._number[rows] = np.arange(len(rows))
        self._from_ns = np.cumsum(self._whole_ns) - self._whole_ns
        self.rows = rows
        self.total_ns = int(self._whole_ns.sum())

    def inside(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return which of the rows belong to these requests."""
        return rows[self._number[self._recording.root[rows]] >= 0]

    def part(self, rows: NDArray[np.int64], start_ns: NDArray[np.int64], end_ns: NDArray[np.int64]) -> float | None:
        """
        Return the part of the requests' time, from 0 to 1, that these rows cover; None if the requests took no time.

        Args:
            rows: Any rows; those of other requests are left out.
            start_ns: A column of the recording.
            end_ns: Another.

        """
        if not self.total_ns:
            return None
        rows = self.inside(rows)
        number, root = self._number[self._recording.root[rows]], self._recording.root[rows]
        zero_ns, whole_ns, from_ns = self._recording.host_start_ns[root], self._whole_ns[number], self._from_ns[number]
        start, end = (from_ns + (column[rows] - zero_ns).clip(0, whole_ns) for column in (start_ns, end_ns))
        return length(union(Intervals(start, end))) / self.total_ns
