"""
What `gpuscope top` shows, as data: the stages of the last seconds, those that run, and the account.

Knows neither files nor a terminal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

WINDOW_S = 10.0


@dataclass(frozen=True, eq=False)
class View:
    """A moment of a service. The columns are of the stages that ended within the window; times are nanoseconds."""

    state: str
    """Who it is, and whether it still runs."""
    names: tuple[str, ...]
    stage: NDArray[np.int64]
    """Index into `names`."""
    took_ns: NDArray[np.int64]
    gpu_ns: NDArray[np.int64]
    """-1 where it is not known."""
    failed: NDArray[np.bool_]
    seconds: float
    """How much of the window is known."""
    running: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """By name: how many have not ended, and since when the oldest runs."""
    account: Mapping[str, int] = field(default_factory=dict)
    """Stages by what became of them: those that wait, and those that are missing."""
    busy: float | None = None
    """The part of the answers of streams that found work; None where streams are not asked."""


class Row(NamedTuple):
    """One stage."""

    name: str
    rate: float
    """Ends per second."""
    p50_ms: float | None
    p99_ms: float | None
    gpu_ms: float | None
    """Median on the stream."""
    gpu_share: float
    """Time on streams per second; more than 1 where several streams are at it."""
    running: int
    longest_ms: float
    """So long the oldest of these has run."""
    errors: int


SORTS = {
    "n": ("name", lambda row: row.name),
    "r": ("rate", lambda row: -float(f"{row.rate:.2g}")),  # Else rows would change places at each look.
    "5": ("p50", lambda row: -(row.p50_ms or 0.0)),
    "9": ("p99", lambda row: -(row.p99_ms or 0.0)),
    "g": ("GPU", lambda row: -row.gpu_share),
    "o": ("open", lambda row: (-row.longest_ms, -row.running)),
}
"""By key: what the rows are in the order of."""


def rows_of(view: View, sort: str) -> list[Row]:
    """Return a row per stage that ended within the window or runs."""
    names = {*(view.names[stage] for stage in np.unique(view.stage).tolist()), *view.running}
    places = {name: place for place, name in enumerate(view.names)}
    rows = [_row(view, name, places.get(name, -1)) for name in names]
    return sorted(sorted(rows), key=SORTS[sort][1])


def _row(view: View, name: str, place: int) -> Row:
    own = view.stage == place
    took_ms, gpu_ns = view.took_ns[own] / 1e6, view.gpu_ns[own]
    timed = gpu_ns[gpu_ns >= 0]
    count, since_ns = view.running.get(name, (0, 0))
    p50_ms, p99_ms = np.percentile(took_ms, (50, 99)).tolist() if len(took_ms) else (None, None)
    return Row(
        name=name,
        rate=len(took_ms) / view.seconds if view.seconds else 0.0,
        p50_ms=p50_ms,
        p99_ms=p99_ms,
        gpu_ms=float(np.median(timed)) / 1e6 if len(timed) else None,
        gpu_share=float(timed.sum()) / 1e9 / view.seconds if view.seconds else 0.0,
        running=count,
        longest_ms=since_ns / 1e6,
        errors=int(view.failed[own].sum()),
    )
