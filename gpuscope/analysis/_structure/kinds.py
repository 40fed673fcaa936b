"""
The rows of a recording by stage and kind of request, and how long each request took.

Groups and orders rows; computes no figure of a stage, and judges nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpuscope._data.stage_order import Place, in_order
from gpuscope.analysis._structure.parts import counted, work_end_ns

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from gpuscope.analysis.recording import Recording


class StageInRequest(NamedTuple):
    """One stage within one kind of request."""

    name: str
    root: str
    """Name of the outermost stage: the kind of request."""
    parent: str | None
    """Name of the stage around its first call."""
    depth: int
    """0 for the outermost stage."""
    rows: NDArray[np.int64]


def kinds(recording: Recording) -> Iterator[StageInRequest]:
    """
    Yield the stages of each kind of request from its root, kinds in the order in which they first started.

    Within a kind, stages come in the order in which most requests run them, since a first request may be unlike others.
    """
    places: dict[tuple[int, int], Place] = {}
    # On the host, all stages of one replay start at its launch, so the GPU's times tell their order.
    begin_ns = np.where(recording.in_graph, recording.gpu_start_ns, recording.host_start_ns)
    rows_of = {}
    # By their first rows: an outer stage comes before an inner one, so that no two can be inside each other.
    for rows in sorted(_groups(recording), key=lambda rows: int(rows[0])):
        first, around = int(rows[0]), int(recording.parent[rows[0]])
        stage, root = int(recording.stage[first]), int(recording.stage[recording.root[first]])
        place = Place(recording.names[stage], recording.names[root], int(begin_ns[first]))
        # In a damaged file, an outermost stage may begin after those inside it.
        if around >= 0 and not place.is_root:
            place.parent = places.get((int(recording.stage[around]), root))
            place.offset_ns = _usual_offset_ns(recording, rows, begin_ns)
        places[stage, root] = place
        rows_of[place] = rows
    for place, parent, depth in in_order(places.values()):
        yield StageInRequest(place.name, place.root, parent.name if parent else None, depth, rows_of[place])


def _usual_offset_ns(recording: Recording, rows: NDArray[np.int64], begin_ns: NDArray[np.int64]) -> int:
    """Return how long after the stage around it a stage usually begins for the first time in that."""
    around = recording.parent[rows]
    # A stage may be inside different ones; its place is in the one around its first call.
    alike = (around >= 0) & (recording.stage[around] == recording.stage[around[0]])
    rows = counted(recording, rows[alike])
    around, first = np.unique(recording.parent[rows], return_index=True)
    return int(np.median(begin_ns[rows[first]] - begin_ns[around]))


def _groups(recording: Recording) -> list[NDArray[np.int64]]:
    """Return the rows of each stage within each kind of request, in their order."""
    codes = recording.stage.astype(np.int64) * len(recording.names) + recording.stage[recording.root]
    order = codes.argsort(kind="stable")
    return np.split(order, np.flatnonzero(np.diff(codes[order])) + 1) if len(order) else []


def end_to_end_ns(recording: Recording) -> NDArray[np.int64]:
    """Return for each root the time from its host start until all work of its request was done; 0 for other rows."""
    end_ns = work_end_ns(recording)
    duration_ns: NDArray[np.int64] = np.where(recording.parent < 0, end_ns - recording.host_start_ns, 0)
    return duration_ns
