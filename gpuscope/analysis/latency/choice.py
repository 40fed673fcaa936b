"""
Which requests are chosen from: those that verdicts judge, as in the report and on the timeline's page.

A request is judged if it has ended, and has neither warm-up nor a late cold call in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpuscope.analysis._verdicts.cold import find_cold

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpuscope.analysis.recording import Recording


def preferred(recording: Recording, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the requests that are judged; where there are none those that have ended, or else all."""
    ended = ~recording.not_ended[rows]
    judged = ~recording.around_warmup[rows] & ~find_cold(recording).rows[rows]
    for mask in (judged, ended):
        if mask.any():
            return rows[mask]
    return rows


def slower_apart(
    recording: Recording, rows: NDArray[np.int64], took_ns: NDArray[np.int64], row: int
) -> list[tuple[int, int]]:
    """
    Return requests that ended, are not among the preferred ones, and took longer than one of these.

    Args:
        recording: any recording.
        rows: of the requests.
        took_ns: how long each took.
        row: the one that was chosen.

    Returns:
        Rows and nanoseconds, the longest first.

    """
    apart = ~np.isin(rows, preferred(recording, rows)) & ~recording.not_ended[rows]
    slower = apart & (took_ns > took_ns[rows == row].max(initial=0))
    found = zip(rows[slower].tolist(), took_ns[slower].tolist(), strict=True)
    return sorted(found, key=lambda each: -each[1])


def batch_names(recording: Recording) -> dict[str, list[str]]:
    """Return the names of batches, each with those of the requests that they worked for."""
    found: dict[str, dict[str, None]] = {}
    links = recording.batches.links
    for batch, member in zip(links.batch.tolist(), links.member.tolist(), strict=True):
        if batch < 0 or member < 0:  # One of both is in no file.
            continue
        request = recording.names[recording.stage[recording.root[member]]]
        found.setdefault(recording.names[recording.stage[batch]], {})[request] = None
    return {name: [*requests] for name, requests in found.items()}
