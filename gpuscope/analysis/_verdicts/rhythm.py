"""
How requests follow each other on their threads, and what the GPU has to do in between.

Figures alone: whether the time between requests is the bottleneck is decided in `verdict`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpuscope.analysis._verdicts.cold import MAD_TO_SIGMA
from gpuscope.analysis._verdicts.decide import MIN_CALLS
from gpuscope.analysis._verdicts.findings import IdleCause

if TYPE_CHECKING:
    from gpuscope.analysis._verdicts.calls import CallsOfStage

REGULAR = 0.25
"""Up to this robust deviation over median of the gaps between requests, the program makes them, not its clients."""


class Rhythm(NamedTuple):
    """Requests of one kind that follow each other on a thread, and what is between them."""

    between: IdleCause
    regular: bool
    """Whether the gaps are so alike that the program must make them."""
    period_ms: float
    """Median."""
    gain_ms: float
    """What would be saved at most if the gap's work went on during the request."""
    gain_share: float


def rhythm_of(calls: CallsOfStage) -> Rhythm | None:
    """Return the rhythm of the requests that are followed by another; None without any."""
    evidence, recording = calls.material.evidence, calls.material.recording
    rows = calls.judged[evidence.gap_ns[calls.judged] >= 0]
    if not len(rows):
        return None
    host_ns = recording.host_end_ns[rows] - recording.host_start_ns[rows]
    gap_ns, idle_ns = evidence.gap_ns[rows], evidence.gap_idle_ns[rows]
    period_ns = np.maximum(host_ns + gap_ns, 1)
    gap, mean_ns = float(np.median(gap_ns)), float(period_ns.mean())
    deviation = MAD_TO_SIGMA * float(np.median(np.abs(gap_ns - gap)))
    idle_share = float(idle_ns.mean()) / mean_ns
    gain_share = float(np.minimum(idle_ns, host_ns).mean()) / mean_ns
    period_ms = float(np.median(period_ns)) / 1e6
    return Rhythm(
        between=IdleCause(cause="between requests", stage=None, ms=idle_share * period_ms, share=idle_share),
        regular=len(rows) >= MIN_CALLS and deviation <= REGULAR * gap,
        period_ms=period_ms,
        gain_ms=gain_share * period_ms,
        gain_share=gain_share,
    )
