"""
Garbage collections, as events of the stages that were open meanwhile and as a metric; stages that replay no more.

Every thread that needs the GIL waits for a collection. The hot path knows nothing of this: a batch is compared with the
newest collections, and where there are none that costs one call.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from gpuscope._data.attributes import EAGER_AGAIN, GC_DURATION, GC_EVENT, GC_GENERATION
from gpuscope._data.batch import RowFlag, SpanDetails
from gpuscope._data.metrics import BOUNDS_S, COLLECTIONS, DataPoint, Histogram
from gpuscope._data.plain.values import shown
from gpuscope._log import later
from gpuscope._recording.pauses.collections import collections_since

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from gpuscope._data.batch import StageBatch
    from gpuscope._data.metrics import InstrumentSpec
    from gpuscope._data.record import Site
    from gpuscope._recording.pauses.collections import Collection

MOST_EVENTS = 32
"""Of collections per stage, the newest; older ones are counted as dropped events."""
ENOUGH_CALLS, USUALLY = 32, 0.9
"""So many calls with replays, in so large a part of them, and then so many without one."""
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


class Replaying:
    """
    Finds stages that stopped replaying their CUDA graphs, and so run eagerly: for a new shape, for one.

    Replays are counted by stage where they are launched, ahead of the stages' rows: so many calls without one, and no
    row of them can have had one that was counted before.
    """

    def __init__(self) -> None:
        self._seen: dict[Site, _Replayed] = {}

    def look(self, batch: StageBatch) -> StageBatch:
        """Return the batch, with an attribute on a stage that is found, and have that said once."""
        for number, site in enumerate(batch.sites):
            if not site.replays:
                continue
            rows = np.flatnonzero((batch.site == number) & ((batch.flags & _IN_GRAPH) == 0))
            if rows.size and self._seen.setdefault(site, _Replayed()).is_eager_again(rows.size, site.replays):
                later(
                    "stage `%s` no longer replays its CUDA graph: its last %d calls ran without one.",
                    shown(site.name),
                    self._seen[site].quiet,
                )
                row = int(rows[-1])
                found = batch.details.get(row) or SpanDetails()
                found = replace(found, attributes={**(found.attributes or {}), EAGER_AGAIN: True})
                batch = replace(batch, details={**batch.details, row: found})
        return batch


class _Replayed:
    """What is known of one stage."""

    def __init__(self) -> None:
        self.calls = self.quiet = self._replays = 0

    def is_eager_again(self, calls: int, replays: int) -> bool:
        """Take so many more calls, and all replays so far; return whether they have just become too few."""
        if replays > self._replays:
            self.calls += calls + self.quiet
            self._replays, self.quiet = replays, 0
            return False
        before, self.quiet = self.quiet, self.quiet + calls
        usual = self.calls >= ENOUGH_CALLS and self._replays >= USUALLY * self.calls
        return usual and before < ENOUGH_CALLS <= self.quiet
