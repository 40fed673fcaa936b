"""
Requests that go from one process to another: when they were in no stage of either, and whether the other was busy.

Knows no batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpuscope.analysis._structure.intervals import Intervals, intersection, union
from gpuscope.analysis.latency._sweep import Claim
from gpuscope.analysis.latency.parts import BETWEEN, QUEUE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuscope.analysis.recording import Recording


class Crossings:
    """
    All of a recording.

    Args:
        recording: any recording.

    """

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        of_thread = np.array([thread.process for thread in recording.threads], np.int64)
        self._process = of_thread[recording.thread] if len(recording.thread) else np.zeros(0, np.int64)
        self._end_ns = np.maximum(recording.host_end_ns, np.where(recording.measured, recording.gpu_end_ns, 0))
        inside = np.flatnonzero((recording.parent >= 0) & ~recording.in_graph)
        crosses = inside[self._process[inside] != self._process[recording.parent[inside]]]
        around = set(recording.parent[crosses].tolist())
        self._inside: dict[int, dict[int, list[int]]] = {}
        """By request and stage: the stages directly in it, of which one at least is in another process."""
        for row in inside.tolist() if around else ():
            parent = int(recording.parent[row])
            if parent in around:
                self._inside.setdefault(int(recording.root[row]), {}).setdefault(parent, []).append(row)
        self._busy: dict[int, Intervals] = {}

    def claims(self, root: int) -> Iterator[Claim]:
        """Yield what is known of a request while it went from a process to another."""
        recording = self._recording
        for around, rows in self._inside.get(root, {}).items():
            last_ns, process = int(recording.host_start_ns[around]), int(self._process[around])
            for row in rows:  # In the order in which they began.
                start_ns, now_in = int(recording.host_start_ns[row]), int(self._process[row])
                if process != now_in and last_ns < start_ns:
                    yield from self._handed_over(last_ns, start_ns, now_in)
                if self._end_ns[row] >= last_ns:
                    last_ns, process = int(self._end_ns[row]), now_in
            if process != self._process[around]:
                yield Claim(last_ns, int(recording.host_end_ns[around]), (8.7,), (BETWEEN,))

    def _handed_over(self, start_ns: int, end_ns: int, process: int) -> Iterator[Claim]:
        yield Claim(start_ns, end_ns, (8.7,), (BETWEEN,))
        wait = Intervals(np.array([start_ns]), np.array([end_ns]))
        busy = intersection(wait, self._busy_in(process))
        for first_ns, last_ns in zip(busy.start.tolist(), busy.end.tolist(), strict=True):
            yield Claim(first_ns, last_ns, (8.5,), (QUEUE,))

    def _busy_in(self, process: int) -> Intervals:
        """Return when a process was in a stage that another process had handed to it."""
        if process not in self._busy:
            recording = self._recording
            parents = recording.parent.clip(0)
            own = (recording.parent >= 0) & (self._process == process) & (self._process[parents] != process)
            rows = np.flatnonzero(own & ~recording.in_graph)
            self._busy[process] = union(Intervals(recording.host_start_ns[rows], self._end_ns[rows]))
        return self._busy[process]
