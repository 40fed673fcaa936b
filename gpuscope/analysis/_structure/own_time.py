"""
What each stage takes itself: the time in which the host is in it and in no stage inside it.

These are parts that add up: with the time in no stage, which is the outermost stage's own, and the time after the host
had left, they are the request. Arithmetic on columns; judges nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from gpuscope.analysis._structure.pauses import PausesByProcess
from gpuscope.analysis._structure.segments import segments_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from gpuscope.analysis.recording import Recording


def own_ns(recording: Recording) -> NDArray[np.int64]:
    """
    Return the nanoseconds of the host that are each row's own.

    Where stages of a request run at the same time, as tasks and threads do, they share that time equally.
    """
    return _given(recording, lambda _, start, end: end - start)


def collected_ns(recording: Recording) -> NDArray[np.int64]:
    """Return the nanoseconds of each row's own that garbage collections took, as far as the files tell of them."""
    if not recording.stalls.collections:
        return np.zeros(len(recording.stage), np.int64)
    return _given(recording, PausesByProcess(recording).took_ns)


Column: TypeAlias = "NDArray[np.int64]"
Measure: TypeAlias = "Callable[[Column, Column, Column], Column]"
"""Takes columns (row, start, end) of stretches of the host's time; returns how many nanoseconds of each count."""


def _given(recording: Recording, measure: Measure) -> NDArray[np.int64]:
    """Return what of a measure falls to each row."""
    segments, tangled = segments_of(recording)
    own = np.zeros(len(recording.stage), np.int64)
    np.add.at(own, segments.owner, measure(segments.owner, segments.host_start_ns, segments.host_end_ns))
    rows = np.flatnonzero(tangled & ~recording.in_graph)
    own[rows] = 0
    by_root = rows[np.argsort(recording.root[rows], kind="stable")]
    for request in np.split(by_root, np.flatnonzero(np.diff(recording.root[by_root])) + 1) if len(rows) else []:
        _share(recording, request.tolist(), own, measure)
    return own


def _share(recording: Recording, rows: list[int], own: NDArray[np.int64], measure: Measure) -> None:
    """Give each instant of a request to the stages that are open then and have no open stage inside."""
    first_ns = int(recording.host_start_ns[recording.root[rows[0]]])
    starts, ends = (column[rows].clip(first_ns).tolist() for column in (recording.host_start_ns, recording.host_end_ns))
    spans = [(start, end, row) for start, end, row in zip(starts, ends, rows, strict=True) if end > start]
    # At one instant, what ends comes before what starts.
    points = sorted([(start, True, row) for start, _, row in spans] + [(end, False, row) for _, end, row in spans])
    is_open: set[int] = set()
    open_inside: dict[int, int] = {}
    stretches: list[tuple[int, int]] = []
    innermost: list[list[int]] = []
    before_ns = first_ns
    for now_ns, opens, row in points:
        if now_ns > before_ns and is_open:
            stretches.append((before_ns, now_ns))
            innermost.append(sorted(each for each in is_open if not open_inside.get(each)))
        before_ns = max(before_ns, now_ns)
        (is_open.add if opens else is_open.discard)(row)
        around = int(recording.parent[row])
        while around >= 0:
            open_inside[around] = open_inside.get(around, 0) + (1 if opens else -1)
            around = int(recording.parent[around])
    start, end = np.array(stretches, np.int64).reshape(-1, 2).T
    for ns, some in zip(measure(np.full(len(start), rows[0]), start, end).tolist(), innermost, strict=True):
        _give(ns, some, own)


def _give(ns: int, innermost: list[int], own: NDArray[np.int64]) -> None:
    each, rest = divmod(ns, len(innermost))
    for place, row in enumerate(innermost):
        own[row] += each + (place < rest)
