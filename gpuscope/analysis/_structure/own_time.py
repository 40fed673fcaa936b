"""
What each stage takes itself: the time in which the host is in it and in no stage inside it.

These are parts that add up: with the time in no stage, which is the outermost stage's own, and the time after the host
had left, they are the request. Arithmetic on columns; judges nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpuscope.analysis._structure.segments import segments_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpuscope.analysis.recording import Recording


def own_ns(recording: Recording) -> NDArray[np.int64]:
    """
    Return the nanoseconds of the host that are each row's own.

    Where stages of a request run at the same time, as tasks and threads do, they share that time equally.
    """
    segments, tangled = segments_of(recording)
    spent = segments.host_end_ns - segments.host_start_ns
    own = np.zeros(len(recording.stage), np.int64)
    np.add.at(own, segments.owner, spent)
    rows = np.flatnonzero(tangled & ~recording.in_graph)
    own[rows] = 0
    by_root = rows[np.argsort(recording.root[rows], kind="stable")]
    for request in np.split(by_root, np.flatnonzero(np.diff(recording.root[by_root])) + 1) if len(rows) else []:
        _share(recording, request.tolist(), own)
    return own


def _share(recording: Recording, rows: list[int], own: NDArray[np.int64]) -> None:
    """Give each instant of a request to the stages that are open then and have no open stage inside."""
    first_ns = int(recording.host_start_ns[recording.root[rows[0]]])
    starts, ends = (column[rows].clip(first_ns).tolist() for column in (recording.host_start_ns, recording.host_end_ns))
    spans = [(start, end, row) for start, end, row in zip(starts, ends, rows, strict=True) if end > start]
    # At one instant, what ends comes before what starts.
    points = sorted([(start, True, row) for start, _, row in spans] + [(end, False, row) for _, end, row in spans])
    is_open: set[int] = set()
    open_inside: dict[int, int] = {}
    before_ns = first_ns
    for now_ns, opens, row in points:
        if now_ns > before_ns and is_open:
            _give(now_ns - before_ns, sorted(each for each in is_open if not open_inside.get(each)), own)
        before_ns = max(before_ns, now_ns)
        (is_open.add if opens else is_open.discard)(row)
        around = int(recording.parent[row])
        while around >= 0:
            open_inside[around] = open_inside.get(around, 0) + (1 if opens else -1)
            around = int(recording.parent[around])


def _give(ns: int, innermost: list[int], own: NDArray[np.int64]) -> None:
    each, rest = divmod(ns, len(innermost))
    for place, row in enumerate(innermost):
        own[row] += each + (place < rest)
