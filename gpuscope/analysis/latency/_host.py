"""
A stretch of the host's time in a stage: garbage collection and compilation taken out of it, as far as files tell them.

Reads a recording; decides nothing about batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuscope._data.attributes import COMPILE_SPAN
from gpuscope.analysis._structure.pauses import PausesByProcess
from gpuscope.analysis.latency._sweep import Claim
from gpuscope.analysis.latency.parts import COMPILE, GARBAGE, HOST

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuscope.analysis.recording import Recording

_BEFORE = 0.25
"""So far before the rank of a stretch comes that of a pause in it; ranks of claims differ by 0.5 at least."""


class HostTime:
    """
    Says of host time what it was.

    Args:
        recording: any recording.

    """

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._pauses = PausesByProcess(recording)
        self._compile = recording.names.index(COMPILE_SPAN) if COMPILE_SPAN in recording.names else -1

    def said(self, row: int) -> tuple[str, ...]:
        """Return what the host does in a stage itself."""
        stage = int(self._recording.stage[row])
        return (COMPILE,) if stage == self._compile else (HOST, self._recording.names[stage])

    def is_compile(self, row: int) -> bool:
        """Whether a stage stands for a compilation."""
        return int(self._recording.stage[row]) == self._compile

    def pauses(self, row: int, start_ns: int, end_ns: int, rank: float) -> Iterator[Claim]:
        """
        Yield the garbage collections of a stretch.

        Args:
            row: of a stage in the process; -1 where it is not in the files.
            start_ns: where the stretch begins.
            end_ns: where it ends.
            rank: of the stretch itself.

        """
        if row >= 0:
            process = self._recording.threads[self._recording.thread[row]].process
            for first_ns, last_ns in self._pauses.within(process, start_ns, end_ns):
                yield Claim(first_ns, last_ns, (rank - _BEFORE,), (GARBAGE,))
