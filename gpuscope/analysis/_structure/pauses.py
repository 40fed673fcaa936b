"""
When Python collected garbage: no thread of that process ran Python code meanwhile.

Each stage that was open says so, whichever thread collected. Knows no files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpuscope.analysis._structure.intervals import Intervals, covered, union

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from gpuscope.analysis.recording import Recording

_END_OF_TIME = 2**63 - 1


class PausesByProcess:
    """
    Finds the pauses of a process.

    Args:
        recording: any recording.

    """

    def __init__(self, recording: Recording) -> None:
        found: dict[int, set[tuple[int, int]]] = {}
        for row, collections in recording.stalls.collections.items():
            pauses = found.setdefault(recording.threads[recording.thread[row]].process, set())
            pauses.update((each.start_ns, min(_END_OF_TIME, each.start_ns + each.took_ns)) for each in collections)
        of_thread = np.array([thread.process for thread in recording.threads], np.int64)
        self._process = of_thread[recording.thread] if len(recording.thread) else np.zeros(0, np.int64)
        self._of = {
            process: union(Intervals(*np.array(sorted(pauses), np.int64).T)) for process, pauses in found.items()
        }

    def within(self, process: int, start_ns: int, end_ns: int) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of each pause of a process, as far as it lies within a stretch of time."""
        found = self._of.get(process)
        if found is None:
            return
        first = int(np.searchsorted(found.end, start_ns, side="right"))
        last = int(np.searchsorted(found.start, end_ns, side="left"))
        for start, end in zip(found.start[first:last].tolist(), found.end[first:last].tolist(), strict=True):
            yield max(start, start_ns), min(end, end_ns)

    def took_ns(
        self, rows: NDArray[np.int64], start_ns: NDArray[np.int64], end_ns: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Return how many nanoseconds of each stretch of time the pauses take of the process that a row is of."""
        took = np.zeros(len(rows), np.int64)
        for process, pauses in self._of.items():
            there = self._process[rows] == process
            took[there] = covered(Intervals(start_ns[there], end_ns[there]), pauses)
        return took
