"""
The lines of the timeline's table of stages: the report's figures, and the shape of each distribution.

Only sorts durations into bins; every other figure comes from `figures`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from gpuscope.analysis._structure.kinds import kinds

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from gpuscope.analysis._plain import Plain
    from gpuscope.analysis.figures import StageFigures
    from gpuscope.analysis.recording import Recording

BINS = 24


def stage_lines(recording: Recording, figured: Iterable[StageFigures]) -> Iterator[dict[str, Plain]]:
    """Yield one line per stage within each kind of request, in the order of the figures."""
    steady, replayed = ~recording.in_warmup_request, recording.in_graph
    for kind, line in zip(kinds(recording), figured, strict=True):
        rows = kind.rows if line.only_warmup else kind.rows[steady[kind.rows]]
        timed, hosted = rows[recording.stream[rows] >= 0], rows[~replayed[rows]]
        yield asdict(line) | {
            "host_shape": _shape((recording.host_end_ns - recording.host_start_ns)[hosted]),
            "gpu_shape": _shape((recording.gpu_end_ns - recording.gpu_start_ns)[timed]),
        }


def _shape(durations_ns: NDArray[np.int64]) -> dict[str, Plain] | None:
    """Return how many durations fall into each of `BINS` equal steps of a logarithmic scale; None without durations."""
    if not durations_ns.size:
        return None
    low, high = max(1, durations_ns.min()), max(1, durations_ns.max())
    # If a stage always takes the same time, its distribution is one peak, and not a scale of length 0.
    edges = np.geomspace(low, max(high, low * 1.1), BINS + 1)
    counts, _ = np.histogram(np.clip(durations_ns, edges[0], edges[-1]), edges)
    return {"low_ms": edges[0] / 1e6, "high_ms": edges[-1] / 1e6, "counts": counts.tolist()}
