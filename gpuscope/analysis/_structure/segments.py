"""
Requests cut into segments: the stretches of host time between two neighbouring starts or ends of stages.

A start or end of a stage is a *point*: it says when the host was there, and when the stream had come that far.
Arithmetic alone; what a segment means is said in `_verdicts.evidence`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpuscope.analysis._structure.ancestors import ancestors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpuscope.analysis.recording import Recording


class Segments(NamedTuple):
    """Columns of one length, request by request, in the order of time. Times are nanoseconds since the epoch."""

    owner: NDArray[np.int64]
    """Row of the innermost stage that the host was in."""
    host_start_ns: NDArray[np.int64]
    host_end_ns: NDArray[np.int64]
    gpu_start_ns: NDArray[np.int64]
    """When the stream had come to the point where the segment starts."""
    gpu_end_ns: NDArray[np.int64]
    uncertainty_ns: NDArray[np.int64]
    stream: NDArray[np.int32]
    """Stream of the point where the segment ends."""
    one_stream: NDArray[np.bool_]
    """Whether both points are on one stream."""
    timed: NDArray[np.bool_]
    """Whether both points have GPU times that can be relied on. If not, the GPU times here mean nothing."""


def segments_of(recording: Recording) -> tuple[Segments, NDArray[np.bool_]]:
    """
    Return the segments, and a mask of the rows whose requests could not be cut.

    In those requests, stages overlap without one being inside the other, as the stages of concurrent tasks do: the host
    is in several stages at a time.
    """
    row, is_end = _points(recording)
    root = recording.root[row]
    same_request = root[1:] == root[:-1]
    innermost = np.where(is_end, recording.parent[row], row)
    expected = np.where(is_end, row, recording.parent[row])
    tangled = np.zeros(len(recording.stage), np.bool_)
    tangled[root[1:][same_request & (innermost[:-1] != expected[1:])]] = True
    kept = same_request & ~tangled[root[1:]]
    return _between(recording, row, is_end, innermost, kept), tangled[recording.root]


def _points(recording: Recording) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return (row, whether it is its end) for each point, request by request, in the order of time."""
    count = len(recording.stage)
    depth = np.zeros(count, np.int64)
    for rows, _ in ancestors(recording.parent):
        depth[rows] += 1
    # A stage inside a replay has no points: the host is elsewhere when it starts or ends.
    hosted = np.flatnonzero(~recording.in_graph)
    start_ns, end_ns, depth = recording.host_start_ns[hosted], recording.host_end_ns[hosted], depth[hosted]
    # At one instant: inner stages end before outer ones, then the next stages start, and empty stages end last.
    rank = np.concatenate([count + depth, np.where(end_ns <= start_ns, 3 * count - depth, -depth)])
    row = np.tile(hosted, 2)
    order = np.lexsort((rank, np.concatenate([start_ns, end_ns]), recording.root[row]))
    return row[order], order >= len(hosted)


def _between(
    recording: Recording,
    row: NDArray[np.int64],
    is_end: NDArray[np.bool_],
    innermost: NDArray[np.int64],
    kept: NDArray[np.bool_],
) -> Segments:
    host_ns = np.where(is_end, recording.host_end_ns[row], recording.host_start_ns[row])
    gpu_ns = np.where(is_end, recording.gpu_end_ns[row], recording.gpu_start_ns[row])
    uncertainty_ns, stream = recording.uncertainty_ns[row], recording.stream[row]
    timed = recording.measured[row]
    return Segments(
        owner=innermost[:-1][kept],
        host_start_ns=host_ns[:-1][kept],
        host_end_ns=host_ns[1:][kept],
        gpu_start_ns=gpu_ns[:-1][kept],
        gpu_end_ns=gpu_ns[1:][kept],
        uncertainty_ns=np.maximum(uncertainty_ns[:-1], uncertainty_ns[1:])[kept],
        stream=stream[1:][kept],
        one_stream=(stream[:-1] == stream[1:])[kept],
        timed=(timed[:-1] & timed[1:])[kept],
    )
