"""
Where in host time the stages inside replays lie, and which times are a replay's own: arithmetic on columns.

Asks nothing and counts nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpuscope._cuda.clock import GpuClock
    from gpuscope._cuda.graphs.events import GraphStages
    from gpuscope._cuda.graphs.replay import Replay

_ROUNDING_NS = 2_000
"""Two steps of a 32-bit float of milliseconds at 8 s from the anchor (0.5 µs each), for each of two replays."""
_IMPOSSIBLE_NS = 50_000
"""A stage that began before its launch by the uncertainty and so much more has another replay's time."""
_NO_CLOCK = 0, 0, 1e6, 0.0, 0
"""Stands for the terms of a clock without an anchor: what ends at 0 is moved to its launch."""


class Placed(NamedTuple):
    """Replays of one graph on one stream; times in host nanoseconds, a row per replay and a column per stage."""

    graph: GraphStages
    replays: list[Replay]
    start_ns: NDArray[np.int64]
    end_ns: NDArray[np.int64]
    uncertainty_ns: NDArray[np.int64]
    clamped: NDArray[np.bool_]
    """Per replay, whether it began before its launch by more than the uncertainty, and was moved to it."""
    unplaced: bool = False
    """Whether the durations alone are known."""


def largest_crowd(placed: list[Placed]) -> int:
    """Return how many replays ran on one GPU at once."""
    devices: dict[int, list[Placed]] = {}
    for group in placed:
        if group.replays:
            devices.setdefault(group.replays[0].timed_stream.index, []).append(group)
    return max(map(_most_at_once, devices.values()), default=0)


def _most_at_once(groups: list[Placed]) -> int:
    if len({group.replays[0].timed_stream for group in groups}) == 1:
        return 1
    start_ns = np.concatenate([group.start_ns.min(axis=1) for group in groups])
    # Replays on one stream follow each other, but for rounding.
    end_ns = np.maximum(start_ns, np.concatenate([group.end_ns.max(axis=1) for group in groups]) - 2 * _ROUNDING_NS)
    step = np.repeat([1, -1], len(start_ns))
    order = np.lexsort((step, np.concatenate([start_ns, end_ns])))
    return int(step[order].cumsum().max())


def place(
    distances: NDArray[np.float64],
    nodes: tuple[NDArray[np.int64], NDArray[np.int64]],
    launched_ns: NDArray[np.int64],
    clock: GpuClock,
    seen_ns: int,
) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """
    Place the stages of replays of one graph on one stream, as `GpuClock.place` does with one stage.

    Stages that share a node meet to the nanosecond.

    Args:
        distances: a row per replay, oldest first: of each node to the fence, and of the fence from the anchor, in
            milliseconds; NaN where the driver could not tell.
        nodes: places of the nodes at which the stages start, and at which they end.
        launched_ns: when each replay was launched.
        clock: of the device. Without an anchor each replay begins at its launch, and the distances from one are 0.
        seen_ns: when the replays were seen done, for the uncertainty without an anchor.

    Returns:
        Which replays have times of their own; starts, ends and uncertainties in nanoseconds, a row per replay; and by
        how much each replay began before its launch, to which it was then moved.

    """
    host_ns, half_ns, host_ns_per_ms, doubt_ns_per_ms, _ = clock.terms if clock.anchor else _NO_CLOCK
    right: NDArray[np.bool_] = np.logical_not(np.isnan(distances).any(axis=1))
    distances = np.nan_to_num(distances)
    to_fence_ms, fence_ms = distances[:, :-1], distances[:, -1:]
    fence_ns = host_ns + (fence_ms * host_ns_per_ms).astype(np.int64)
    node_ns = fence_ns - (to_fence_ms * host_ns_per_ms).astype(np.int64)
    starts, ends = nodes
    start_ns, end_ns = node_ns[:, starts], node_ns[:, ends]
    length_ms = to_fence_ms[:, starts] - to_fence_ms[:, ends]
    doubtful_ms = abs(fence_ms - to_fence_ms[:, ends]) + length_ms
    uncertainty_ns = half_ns + (doubtful_ms * doubt_ns_per_ms).astype(np.int64) + 1
    early_ns = (launched_ns - start_ns.min(axis=1)).clip(min=0)
    right &= (to_fence_ms >= 0).all(axis=1) & (start_ns <= end_ns).all(axis=1)
    early = early_ns[:, np.newaxis]
    if clock.anchor is None:
        uncertainty_ns = (seen_ns - end_ns - early).clip(min=1)
    else:
        right &= early_ns <= uncertainty_ns.max(axis=1) + _IMPOSSIBLE_NS
        # Launches of one graph follow each other.
        in_order = start_ns.min(axis=1)[1:] >= end_ns.max(axis=1)[:-1] - _ROUNDING_NS
        right[1:] &= in_order | ~right[:-1]
    return right, start_ns + early, end_ns + early, uncertainty_ns, early_ns
