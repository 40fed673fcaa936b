"""
Histograms of durations: columns in, counts kept.

Arithmetic only. Visits no row in Python except a sampled one that is the slowest so far. Takes no lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpuscope._data.metrics import BOUNDS_S, Exemplar

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from gpuscope._collecting.aggregation.joined_columns import Columns

_BOUNDS = np.array(BOUNDS_S)
_BUCKETS = len(BOUNDS_S) + 1


class Histograms:
    """One histogram per series; series are numbered from 0."""

    def __init__(self) -> None:
        self._counts = np.zeros((0, _BUCKETS), np.int64)
        self._sums_s = np.zeros(0)
        self._slowest_s = np.zeros(0)
        self._exemplars: dict[int, Exemplar] = {}

    def _make_room(self, series: int) -> None:
        missing = series - len(self._sums_s)
        if missing > 0:
            self._counts = np.pad(self._counts, ((0, missing), (0, 0)))
            self._sums_s = np.pad(self._sums_s, (0, missing))
            self._slowest_s = np.pad(self._slowest_s, (0, missing))

    def add(self, series: NDArray[np.int64], seconds: NDArray[np.float64]) -> None:
        """Count durations; `series` holds the number of each one's series."""
        self._make_room(int(series.max()) + 1)
        cells = series * _BUCKETS + _BOUNDS.searchsorted(seconds)
        self._counts += np.bincount(cells, minlength=self._counts.size).reshape(self._counts.shape)
        self._sums_s += np.bincount(series, seconds, minlength=len(self._sums_s))

    def remember(self, rows: Columns, series: NDArray[np.int64], seconds: NDArray[np.float64]) -> None:
        """Keep the slowest sampled spans as exemplars: first the rows' host spans, then their GPU spans."""
        slower = np.flatnonzero(seconds > self._slowest_s[series])
        if slower.size:
            slower = slower[rows.sampled[slower % len(rows.sampled)]]
        slower = slower[seconds[slower].argsort()]
        # In a dictionary the last of each series wins, which is the slowest.
        for number, index in dict(zip(series[slower].tolist(), slower.tolist(), strict=True)).items():
            self._slowest_s[number] = seconds[index]
            gpu, row = divmod(index, len(rows.sampled))
            self._exemplars[number] = _exemplar(rows, row, float(seconds[index]), gpu=gpu == 1)

    def take_exemplars(self) -> dict[int, Exemplar]:
        """Return the exemplars by series, and forget them."""
        taken, self._exemplars = self._exemplars, {}
        self._slowest_s[:] = 0.0
        return taken

    def counts(self) -> Iterator[tuple[int, tuple[int, ...], float]]:
        """Yield the number of each series that has counts, with its counts by bucket and its sum in seconds."""
        for number in np.flatnonzero(self._counts.any(axis=1)).tolist():
            yield number, tuple(self._counts[number].tolist()), float(self._sums_s[number])


def _exemplar(rows: Columns, row: int, seconds: float, *, gpu: bool) -> Exemplar:
    return Exemplar(
        seconds,
        time_ns=int((rows.gpu_end_ns if gpu else rows.host_end_ns)[row]),
        trace_id=int(rows.trace_high[row]) << 64 | int(rows.trace_low[row]),
        span_id=int((rows.gpu_span_id if gpu else rows.span_id)[row]),
    )
