"""
When Python collected garbage: no thread of that process ran Python code meanwhile.

Each stage that was open says so, whichever thread collected. Knows no files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpuscope.analysis._structure.intervals import Intervals, union

if TYPE_CHECKING:
    from collections.abc import Iterator

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
