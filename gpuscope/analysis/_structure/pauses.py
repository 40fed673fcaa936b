"""
When Python collected garbage: no thread of that process ran Python code meanwhile.

Columns, and what of them lies within a stretch of time. Knows no files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from gpuscope.analysis._structure.intervals import Intervals, union

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray


def _none() -> NDArray[np.int64]:
    return np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Pauses:
    """One line per event that says so; several stages may say it of one pause. Times are since the epoch."""

    process: NDArray[np.int64] = field(default_factory=_none)
    """Index into `Recording.processes`."""
    start_ns: NDArray[np.int64] = field(default_factory=_none)
    end_ns: NDArray[np.int64] = field(default_factory=_none)

    def kept(self, processes: Sequence[int]) -> Pauses:
        """Return those of some processes."""
        some = np.isin(self.process, processes)
        return Pauses(self.process[some], self.start_ns[some], self.end_ns[some])


class PausesByProcess:
    """
    Finds the pauses of a process.

    Args:
        pauses: of a recording.

    """

    def __init__(self, pauses: Pauses) -> None:
        self._of: dict[int, Intervals] = {}
        for process in np.unique(pauses.process).tolist():
            own = pauses.process == process
            self._of[process] = union(Intervals(pauses.start_ns[own], pauses.end_ns[own]))

    def within(self, process: int, start_ns: int, end_ns: int) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of each pause of a process, as far as it lies within a stretch of time."""
        found = self._of.get(process)
        if found is None:
            return
        first = int(np.searchsorted(found.end, start_ns, side="right"))
        last = int(np.searchsorted(found.start, end_ns, side="left"))
        for start, end in zip(found.start[first:last].tolist(), found.end[first:last].tolist(), strict=True):
            yield max(start, start_ns), min(end, end_ns)
