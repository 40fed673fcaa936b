"""
Where the bars of the timeline lie, and which times between them are shaded.

Arithmetic on a `Recording`'s columns; draws nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gpuscope._data.batch import RowFlag
from gpuscope.analysis._structure.ancestors import ancestors
from gpuscope.analysis._structure.intervals import Intervals, gaps, union
from gpuscope.analysis._structure.replays import replays_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from gpuscope.analysis.recording import Recording

    Times = NDArray[np.int64]

MAX_ROWS = 64
"""Most rows of a lane. If more stages run at once, as in an asynchronous server, they share the last row."""


@dataclass(frozen=True, slots=True, eq=False)
class Device:
    """One GPU, whichever processes use it."""

    index: int
    name: str
    uuid: str
    streams: tuple[int, ...]
    """Indices into `Recording.streams`."""
    start_ns: int
    """Start of its first leaf stage. Nothing is known of the GPU before that, or after the end of the last one."""
    end_ns: int
    covered: Intervals
    """Time covered by leaf stages. Outside it, no stream that was measured was in any stage."""
    queued: Intervals
    """Time in which a stage's GPU work went on after the host had left it, or inside a replay: the stream was not
    waiting for the host."""


def host_rows(recording: Recording) -> NDArray[np.int32]:
    """Return each stage's row in its thread's lane, below its parent and overlapping no other stage; -1 in a graph."""
    slack, lane = np.zeros_like(recording.host_start_ns), np.where(recording.in_graph, -1, recording.thread)
    return _place(lane, recording.host_start_ns, recording.host_end_ns, recording.parent, slack)


def gpu_rows(recording: Recording) -> NDArray[np.int32]:
    """Return the same for its stream's lane, -1 without GPU times. Overlaps within the uncertainty are ignored."""
    return _place(
        recording.stream, recording.gpu_start_ns, recording.gpu_end_ns, recording.parent, recording.uncertainty_ns
    )


def leaves(recording: Recording, parent: Times | None = None) -> NDArray[np.bool_]:
    """
    Return which stages have GPU times, but contain no other stage on the same GPU.

    Other stages are of no use here: their GPU times also cover the gaps between the stages inside them.

    Args:
        recording: A whole recording.
        parent: The row of the stage around each row, if not the recording's own column.

    """
    device = device_of(recording)
    leaf = device >= 0
    for rows, above in ancestors(recording.parent if parent is None else parent):
        leaf[above[device[above] == device[rows]]] = False
    return leaf


def device_of(recording: Recording) -> NDArray[np.int64]:
    """Return for each stage the first stream of its GPU, as the GPU's number; -1 without GPU times."""
    same = [(stream.device_uuid or (stream.process, stream.device)) for stream in recording.streams]
    first = np.array([*(same.index(each) for each in same), -1], np.int64)
    return first[recording.stream]


def thread_gaps(recording: Recording, thread: int) -> Intervals:
    """Return the times between the outermost stages of a thread."""
    parent_thread = np.where(recording.parent >= 0, recording.thread[recording.parent], -1)
    rows = np.flatnonzero((recording.thread == thread) & (parent_thread != thread))
    return gaps(union(Intervals(recording.host_start_ns[rows], recording.host_end_ns[rows])))


def devices(recording: Recording) -> Iterator[Device]:
    """Yield the GPUs in the order of their streams."""
    device, replayed, replays = device_of(recording), recording.in_graph, replays_of(recording)
    # A stage around replays covers the gaps in them. Those are not bubbles: in a replay the GPU waits for nobody.
    leaf = leaves(recording, np.where(replayed, -1, recording.parent)) & ~replayed
    for number in np.unique(device[leaf]).tolist():
        rows = np.flatnonzero(leaf & (device == number))
        start_ns, end_ns = recording.gpu_start_ns[rows], recording.gpu_end_ns[rows]
        left_ns = recording.host_end_ns[rows]
        sure = (recording.flags[rows] & RowFlag.CLAMPED) == 0
        late = sure & (end_ns - left_ns > recording.uncertainty_ns[rows])
        # From its first to its last stage, a replay goes on whatever the host does.
        here = device[replays.caller] == number
        queued_from = np.concatenate([np.maximum(start_ns, left_ns)[late], replays.start_ns[here]])
        queued_to = np.concatenate([end_ns[late], replays.end_ns[here]])
        first = recording.streams[number]
        yield Device(
            index=first.device,
            name=first.device_name,
            uuid=first.device_uuid,
            streams=tuple(np.unique(recording.stream[device == number]).tolist()),
            start_ns=int(start_ns.min()),
            end_ns=int(end_ns.max()),
            covered=union(Intervals(start_ns, end_ns)),
            queued=union(Intervals(queued_from, queued_to)),
        )


def _place(
    lane: NDArray[np.int32], start_ns: Times, end_ns: Times, parent: Times, slack_ns: Times
) -> NDArray[np.int32]:
    """Return for each stage the first free row of its lane below its parent's row; -1 without a lane."""
    depth, start_ns = _nested(start_ns, parent)
    rows = np.full(len(lane), -1, np.int32)
    busy_until: dict[int, list[int]] = {}
    for stage in np.lexsort((depth, start_ns)).tolist():
        if lane[stage] < 0:
            continue
        ends = busy_until.setdefault(int(lane[stage]), [])
        around = parent[stage]
        row = rows[around] + 1 if around >= 0 and lane[around] == lane[stage] else 0
        free_ns = start_ns[stage] + slack_ns[stage]
        while row < len(ends) and ends[row] > free_ns:
            row += 1
        row = rows[stage] = min(row, MAX_ROWS - 1)
        ends[row : row + 1] = [int(end_ns[stage])]
    return rows


def _nested(start_ns: Times, parent: Times) -> tuple[NDArray[np.int32], Times]:
    """Return each stage's depth, and its start, moved into the stage around it if it was measured a little before."""
    depth, start_ns = np.zeros(len(parent), np.int32), start_ns.copy()
    for rows, above in ancestors(parent):
        depth[rows] += 1
        start_ns[rows] = np.maximum(start_ns[rows], start_ns[above])
    return depth, start_ns
