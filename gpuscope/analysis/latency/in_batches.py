"""
What requests spend in and waiting for the batches that work for them, for the answer on top of a report.

Adds up what `explain` and `_worked` know; judges nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from gpuscope.analysis._structure.intervals import Intervals, covered, union
from gpuscope.analysis._structure.parts import some_of
from gpuscope.analysis.latency._worked import Work
from gpuscope.analysis.latency.explain import MOST, Explainer
from gpuscope.analysis.latency.parts import BATCH, QUEUE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpuscope.analysis.recording import Recording

PLACES = ("in the queue for its batch", "waiting for its batch", "in its batch")
"""The three columns of a request's time."""


@dataclass(frozen=True, eq=False)
class InBatches:
    """What some requests spend there. Times are nanoseconds."""

    names: tuple[str, ...]
    """Of the batches' stages, the one with most runs first."""
    rows: NDArray[np.int64]
    """The requests that were looked at: evenly over those asked about, `MOST` at most."""
    spent_ns: NDArray[np.int64]
    """One line per row: other batches ran there, none of them ran, its batch ran (the columns of `PLACES`)."""
    whole_ns: int
    """Of all these requests."""

    @property
    def shares(self) -> tuple[float, float, float]:
        """Return the parts of the requests' time, from 0 to 1."""
        queue, waits, inside = (float(ns) / max(1, self.whole_ns) for ns in self.spent_ns.sum(0))
        return queue, waits, inside


class BatchTimes:
    """
    Tells what requests spend in batches.

    Args:
        recording: any recording.

    """

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    @cached_property
    def _work(self) -> Work:
        return Work(self._recording)

    @cached_property
    def _explainer(self) -> Explainer:
        return Explainer(self._recording)

    def of(self, rows: NDArray[np.int64]) -> InBatches | None:
        """
        Return what requests of one kind spend in batches; None unless batches worked for most of them.

        Args:
            rows: of the requests.

        """
        batches = self._recording.batches
        if not len(rows) or not len(batches.links.member) + len(batches.shares.member):
            return None
        some = some_of(rows, MOST)
        if 2 * sum(bool(self._work.members_in(row)) for row in some.tolist()) <= len(some):
            return None
        names: Counter[str] = Counter()
        for row in some.tolist():
            names.update(each.name for member in self._work.members_in(row) for each in self._work.for_member(member))
        spent = np.array([self.spent_ns(row) for row in some.tolist()], np.int64)
        whole_ns = int(self._explainer.duration_ns(some).sum())
        return InBatches(tuple(name for name, _ in names.most_common()), some, spent, whole_ns)

    def spent_ns(self, row: int) -> tuple[int, int, int]:
        """Return what a request spent in the queue, waiting for the batch, and in its batches."""
        start_ns = int(self._recording.host_start_ns[row])
        end_ns = start_ns + int(self._explainer.duration_ns(np.array([row]))[0])
        whole = Intervals(np.array([start_ns]), np.array([end_ns]))
        worked = [each for member in self._work.members_in(row) for each in self._work.for_member(member)]
        runs = [(run.start_ns, max(run.end_ns, run.gpu_end_ns)) for each in worked for run in each.runs]
        ran = union(Intervals(*np.array(runs, np.int64).reshape(-1, 2).T))
        parts = self._explainer.explain(row).parts
        return parts[QUEUE], parts[BATCH], int(covered(whole, ran)[0])

    def waiting_stages(self, rows: NDArray[np.int64]) -> set[int]:
        """Return the stages of requests that wait for batches, and those around them: their own time is not work."""
        recording, found = self._recording, set()
        for row in rows.tolist():
            for member in self._work.members_in(row):
                around = member
                while around >= 0:
                    found.add(int(recording.stage[around]))
                    around = int(recording.parent[around])
        return found
