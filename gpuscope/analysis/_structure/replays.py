"""
Replays of CUDA graphs in a recording: which stage launched them, what they cover, and what is left over.

Inside a replay the GPU does not wait for the host, so the time between two stages of one replay is the GPU's own.
Arithmetic on columns; judges nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpuscope.analysis._structure.intervals import Intervals, length, union

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpuscope.analysis.recording import Recording


class ReplayIntervals(NamedTuple):
    """Replays with stages inside, columns of one length."""

    caller: NDArray[np.int64]
    """The row of the stage that the replay was launched in."""
    stream: NDArray[np.int32]
    start_ns: NDArray[np.int64]
    """Start of the first stage inside. Nothing is known of the replay before that, or after the last stage inside."""
    end_ns: NDArray[np.int64]


def replays_of(recording: Recording) -> ReplayIntervals:
    """Return the replays. Rows on one stream that one stage launched at one moment belong to one replay."""
    rows = np.flatnonzero(recording.in_graph & (recording.stream >= 0))
    keys = np.stack([recording.callers[rows], recording.host_start_ns[rows], recording.stream[rows]])
    kept, replay = np.unique(keys, axis=1, return_inverse=True)
    start_ns, end_ns = np.full(kept.shape[1], 2**63 - 1), np.zeros(kept.shape[1], np.int64)
    np.minimum.at(start_ns, replay.ravel(), recording.gpu_start_ns[rows])
    np.maximum.at(end_ns, replay.ravel(), recording.gpu_end_ns[rows])
    return ReplayIntervals(kept[0], kept[2].astype(np.int32), start_ns, end_ns)


def outside_ns(recording: Recording) -> dict[int, int]:
    """Return for each timed stage around replays the nanoseconds on its stream that no stage inside covers."""
    rows = np.flatnonzero(recording.in_graph)
    caller = recording.callers
    timed = recording.stream[caller[rows]] >= 0
    by_caller: dict[int, list[int]] = {}
    for row, around in zip(rows[timed].tolist(), caller[rows[timed]].tolist(), strict=True):
        by_caller.setdefault(around, []).append(row)
    return {around: _left_over(recording, around, inner) for around, inner in by_caller.items()}


def _left_over(recording: Recording, row: int, inner: list[int]) -> int:
    start_ns, end_ns = recording.gpu_start_ns[row], recording.gpu_end_ns[row]
    starts, ends = (column[inner].clip(start_ns, end_ns) for column in (recording.gpu_start_ns, recording.gpu_end_ns))
    return int(end_ns - start_ns) - length(union(Intervals(starts, ends)))
