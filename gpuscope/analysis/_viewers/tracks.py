"""
Where slices are drawn: the slices on one track of a viewer may follow or contain each other, but not overlap.

Intervals in, places out; knows no viewer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpuscope.analysis.recording import Recording


class Slices(NamedTuple):
    """Slices as columns of one length, track by track, each ordered by start, outer before inner."""

    row: NDArray[np.int64]
    """Row of the recording."""
    track: NDArray[np.int64]
    """Index into the recording's threads, or into its streams."""
    layer: NDArray[np.int64]
    """0, or the number of a further layer of the track, if it overlaps another slice without being inside it."""
    start_ns: NDArray[np.int64]
    end_ns: NDArray[np.int64]


def host_slices(recording: Recording) -> Slices:
    """Return the host intervals on their threads. Coroutines of one thread may overlap."""
    rows = np.flatnonzero(~recording.in_graph)
    thread, nothing = recording.thread[rows], np.zeros(len(rows), np.int64)
    return _slices(rows, thread, recording.host_start_ns[rows], recording.host_end_ns[rows], nothing)


def gpu_slices(recording: Recording) -> Slices:
    """
    Return the GPU intervals on their streams. Stages of threads that share a stream may overlap.

    If two overlap by no more than the uncertainty, a start or an end is moved by that little.
    """
    rows = np.flatnonzero(recording.stream >= 0)
    start_ns, end_ns, slack_ns = recording.gpu_start_ns.copy(), recording.gpu_end_ns.copy(), recording.uncertainty_ns
    # On a stream, a stage lies within the stage around it. As measured it can stick out a little.
    for row, parent in zip(rows.tolist(), recording.parent[rows].tolist(), strict=True):
        if parent >= 0 and recording.stream[parent] == recording.stream[row]:
            start_ns[row] += _up_to(slack_ns[row], start_ns[parent] - start_ns[row])
            end_ns[row] -= _up_to(slack_ns[row], end_ns[row] - end_ns[parent])
    return _slices(rows, recording.stream[rows], start_ns[rows], end_ns[rows], slack_ns[rows])


def _up_to(limit_ns: np.int64, excess_ns: np.int64) -> np.int64:
    return excess_ns if 0 < excess_ns <= limit_ns else np.int64(0)


def _slices(
    row: NDArray[np.int64],
    track: NDArray[np.int32],
    start_ns: NDArray[np.int64],
    end_ns: NDArray[np.int64],
    slack_ns: NDArray[np.int64],
) -> Slices:
    order = np.lexsort((row, -end_ns, start_ns, track))
    columns = np.stack([column[order].astype(np.int64) for column in (row, track, start_ns, end_ns)])
    tracks: dict[int, list[_Layer]] = {}
    placed = [
        _place(tracks.setdefault(on, []), start, end, slack)
        for on, start, end, slack in zip(*columns[1:].tolist(), slack_ns[order].tolist(), strict=True)
    ]
    layer, start, end = np.array(placed, np.int64).reshape(-1, 3).T
    return Slices(columns[0], columns[1], layer, start, end)


class _Layer:
    """The slices of one layer that are open, outermost first."""

    def __init__(self) -> None:
        self._open: list[tuple[int, int]] = []

    def fit(self, start_ns: int, end_ns: int, slack_ns: int) -> tuple[int, int] | None:
        """Return the slice's times on this layer, each moved by at most the slack; None if it does not fit."""
        while self._open and self._open[-1][1] <= start_ns:
            self._open.pop()
        first_ns, depth = start_ns, len(self._open)
        while depth and end_ns > (limit_ns := self._open[depth - 1][1]):
            if end_ns - limit_ns <= min(slack_ns, limit_ns - first_ns):
                end_ns = limit_ns
            elif limit_ns - first_ns <= slack_ns:
                start_ns, depth = limit_ns, depth - 1
            else:
                return None
        del self._open[depth:]
        # The slice around this one may itself have been moved.
        start_ns = max(start_ns, self._open[-1][0]) if self._open else start_ns
        end_ns = max(start_ns, end_ns)
        self._open.append((start_ns, end_ns))
        return start_ns, end_ns


def _place(layers: list[_Layer], start_ns: int, end_ns: int, slack_ns: int) -> tuple[int, int, int]:
    """Return the layer and the times of a slice, which starts no earlier than any before it."""
    for number, layer in enumerate(layers):
        if at := layer.fit(start_ns, end_ns, slack_ns):
            return number, *at
    layers.append(_Layer())
    return _place(layers, start_ns, end_ns, slack_ns)
