"""
How much work a stage's stream usually has where the events of one call cannot tell: while the host is still inside.

That is what all its calls answered when their streams were asked, less what is known. Estimates; draws nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpuscope._data.batch import RowFlag
from gpuscope.analysis._busy.estimate import share_of
from gpuscope.analysis._viewers.timeline_lanes import leaves

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from gpuscope.analysis._plain import Plain
    from gpuscope.analysis.recording import Recording


def usual_work(recording: Recording) -> Iterator[dict[str, Plain]]:
    """Yield a line for each stage within each kind of request that has enough answers: parts from 0 to 1."""
    asked = leaves(recording) & recording.measured & ~recording.in_warmup_request & ~recording.in_graph
    kind = recording.stage[recording.root].astype(np.int64) * max(1, len(recording.names)) + recording.stage
    for each in np.unique(kind[asked & (recording.samples > 0)]).tolist():
        line = _line(recording, np.flatnonzero(asked & (kind == each)))
        if line is not None:
            yield line


def _line(recording: Recording, rows: NDArray[np.int64]) -> dict[str, Plain] | None:
    _, request = np.unique(recording.root[rows], return_inverse=True)
    answers, hits = np.zeros((2, int(request.max()) + 1), np.int64)
    np.add.at(answers, request.ravel(), recording.samples[rows])
    np.add.at(hits, request.ravel(), recording.had_work[rows])
    share, whole_ns, known_ns = share_of(hits, answers), *_parts_ns(recording, rows)
    if share is None or whole_ns <= known_ns:
        return None
    # Where the host had gone on there is work: what is left of the answers is for the rest.
    work, low, high = (min(1.0, max(0.0, (part * whole_ns - known_ns) / (whole_ns - known_ns))) for part in share[:3])
    return {
        "root": int(recording.stage[recording.root[rows[0]]]),
        "stage": int(recording.stage[rows[0]]),
        "work": work,
        "low": low,
        "high": high,
        "answers": share.answers,
        "requests": share.requests,
    }


def _parts_ns(recording: Recording, rows: NDArray[np.int64]) -> tuple[int, int]:
    """Return the time of these bars, and the part of it that is drawn as work: after the host had gone on."""
    start_ns, end_ns, left_ns = recording.gpu_start_ns[rows], recording.gpu_end_ns[rows], recording.host_end_ns[rows]
    sure = (recording.flags[rows] & RowFlag.CLAMPED) == 0
    late = sure & (end_ns - left_ns > recording.uncertainty_ns[rows])
    known_ns = (end_ns - np.maximum(start_ns, left_ns))[late].clip(0)
    return int((end_ns - start_ns).sum()), int(known_ns.sum())
