"""
Garbage collections: as events of the stages that were open meanwhile, on whatever thread, and as a metric.

Every thread that needs the GIL waits for a collection. The hot path knows nothing of this: a batch is compared with the
newest collections, and where there are none that costs one call.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from gpuscope._data.attributes import GC_DURATION, GC_EVENT, GC_GENERATION
from gpuscope._data.batch import RowFlag, SpanDetails
from gpuscope._data.metrics import BOUNDS_S, COLLECTIONS, DataPoint, Histogram
from gpuscope._recording.pauses.collections import collections_since

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from gpuscope._data.batch import StageBatch
    from gpuscope._data.metrics import InstrumentSpec
    from gpuscope._recording.pauses.collections import Collection

MOST_EVENTS = 32
"""Of collections per stage, the newest; older ones are counted as dropped events."""
_IN_GRAPH = int(RowFlag.IN_GRAPH)


def with_collections(batch: StageBatch, offset_ns: NDArray[np.int64]) -> StageBatch:
    """
    Return the batch with an event for each collection that a stage was open in.

    Args:
        batch: resolved stages.
        offset_ns: by so much its times are later than the records': of each row, or of all.

    """
    _, known = collections_since(0)
    starts = batch.host_start_ns - offset_ns
    if not known or known[-1].end_ns <= int(starts.min()):
        return batch
    first = np.searchsorted([each.end_ns for each in known], starts, side="right")
    last = np.searchsorted([each.start_ns for each in known], batch.host_end_ns - offset_ns, side="left")
    last[(batch.flags & _IN_GRAPH) != 0] = 0  # Their host times are those of a launch.
    details, offsets = dict(batch.details), np.broadcast_to(offset_ns, starts.shape)
    for row in np.flatnonzero(last > first).tolist():
        met = known[first[row] : last[row]]
        details[row] = _noted(details.get(row), met, int(offsets[row]))
    return replace(batch, details=details)


def _noted(found: SpanDetails | None, met: Sequence[Collection], offset_ns: int) -> SpanDetails:
    kept = met[-MOST_EVENTS:]
    events = [
        (GC_EVENT, start_ns + offset_ns, {GC_DURATION: end_ns - start_ns, GC_GENERATION: generation})
        for start_ns, end_ns, generation in kept
    ]
    found = SpanDetails() if found is None else found
    dropped, links = found.dropped
    return replace(found, events=(*found.events, *events), dropped=(dropped + len(met) - len(kept), links))


class CollectionTimes:
    """How long collections took since this was made, as a histogram by generation. Any thread may ask."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # As in `StageMetrics`.
        self._seen, _ = collections_since(0)
        self._counts: dict[int, list[int]] = {}
        self._sums_s: dict[int, float] = {}

    def look(self) -> None:
        """Count those that are new."""
        with self._lock:
            self._seen, new = collections_since(self._seen)
            for start_ns, end_ns, generation in new:
                seconds = (end_ns - start_ns) / 1e9
                counts = self._counts.setdefault(generation, [0] * (len(BOUNDS_S) + 1))
                counts[bisect_left(BOUNDS_S, seconds)] += 1
                self._sums_s[generation] = self._sums_s.get(generation, 0.0) + seconds

    def points(self) -> dict[InstrumentSpec, Sequence[DataPoint]]:
        """Return the histograms as of now; nothing where there was no collection."""
        with self._lock:
            self.look()
            return {
                COLLECTIONS: [
                    DataPoint({GC_GENERATION: generation}, Histogram(tuple(counts), self._sums_s[generation]))
                    for generation, counts in sorted(self._counts.items())
                ]
            }
