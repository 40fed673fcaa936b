"""
What NVML said of GPUs, as points of metrics: sums since recording began, and means over the last interval.

Arithmetic only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuscope._data.attributes import DEVICE_INDEX, GPU_PART, HW_ID, HW_MODEL, HW_TYPE, HW_VENDOR, REASON
from gpuscope._data.metrics import (
    ACTIVE,
    CLOCK,
    ENERGY,
    OTHERS,
    POWER,
    SHARED,
    THROTTLED,
    UTILIZATION,
    WATCHED,
    DataPoint,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuscope._data.metrics import InstrumentSpec
    from gpuscope._data.statistics import GpuUse

    Points = dict[InstrumentSpec, list[DataPoint]]

_MEANS = ((UTILIZATION, "active_s"), (POWER, "energy_j"), (CLOCK, "cycles"))
_SUMS = ((ACTIVE, "active_s"), (ENERGY, "energy_j"))
_NOT_SHARED = "alone"


class GpuMeans:
    """Means over each interval."""

    def __init__(self) -> None:
        self._before: dict[int, GpuUse] = {}
        self._points: Points = {}

    def end_interval(self, uses: Sequence[GpuUse]) -> None:
        """Compute the means of what came since the last call."""
        points: Points = {}
        for use in uses:
            before = self._before.get(use.index)
            took_s = use.watched_s - (before.watched_s if before else 0.0)
            for spec, name in _MEANS:
                total = getattr(use, name)
                if total is not None and took_s > 0:
                    since = total - ((getattr(before, name) or 0.0) if before else 0.0)
                    points.setdefault(spec, []).append(DataPoint(_gpu(use), max(0.0, since / took_s)))
            if use.others is not None:
                points.setdefault(OTHERS, []).append(DataPoint(_gpu(use), use.others))
        self._points, self._before = points, {use.index: use for use in uses}

    def points(self) -> Points:
        """Return them."""
        return dict(self._points)


def sums_of(uses: Sequence[GpuUse]) -> Points:
    """Return what was added up; nothing where no GPU is watched, so that there is no metric either."""
    points: Points = {}
    for use in uses:
        gpu = _gpu(use)
        points.setdefault(WATCHED, []).append(DataPoint(gpu, use.watched_s))
        for spec, name in _SUMS:
            if (total := getattr(use, name)) is not None:
                points.setdefault(spec, []).append(DataPoint(gpu, total))
        if use.throttled_s is not None:
            # Where nothing holds it down, a zero tells that from a GPU of which nobody knows.
            held = use.throttled_s or {"power_cap": 0.0}
            points.setdefault(THROTTLED, []).extend(_by_reason(gpu, held))
        shared = {state: seconds for state, seconds in use.others_s.items() if state != _NOT_SHARED}
        points.setdefault(SHARED, []).extend(_by_reason(gpu, shared))
    return {spec: found for spec, found in points.items() if found}


def _by_reason(gpu: dict[str, str | int], seconds: dict[str, float]) -> list[DataPoint]:
    return [DataPoint({**gpu, REASON: reason}, each) for reason, each in sorted(seconds.items())]


def _gpu(use: GpuUse) -> dict[str, str | int]:
    """Return which GPU it is, with the names that OpenTelemetry gives hardware."""
    found: dict[str, str | int] = {DEVICE_INDEX: use.index, HW_ID: use.uuid, HW_TYPE: "gpu"}
    found |= {HW_MODEL: use.model, HW_VENDOR: use.vendor}
    return {**found, GPU_PART: True} if use.is_part else found
