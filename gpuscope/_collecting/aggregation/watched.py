"""
What NVML said of GPUs, with means over the last interval, and what deep looks saw, as points of metrics.

Arithmetic only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuscope._data.attributes import (
    DEVICE_INDEX,
    GPU_PART,
    HW_ID,
    HW_MODEL,
    HW_TYPE,
    HW_VENDOR,
    REASON,
    REQUEST,
    STAGE,
)
from gpuscope._data.metrics import (
    ACTIVE,
    CLOCK,
    ENERGY,
    LOOK_BUSY,
    LOOK_CALLS,
    LOOK_KERNELS,
    LOOK_REQUESTS,
    LOOK_SQUARES,
    LOOK_TIME,
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
    from gpuscope._data.plain.gpu_use import GpuUse
    from gpuscope._data.statistics import LookedStage

    Points = dict[InstrumentSpec, list[DataPoint]]

_MEANS = ((UTILIZATION, "active_s"), (POWER, "energy_j"), (CLOCK, "cycles"))
_SUMS = ((ACTIVE, "active_s"), (ENERGY, "energy_j"))
_NOT_SHARED = "alone"
_OF_LOOKS = (
    (LOOK_REQUESTS, "requests"),
    (LOOK_CALLS, "calls"),
    (LOOK_TIME, "time_s"),
    (LOOK_BUSY, "busy_s"),
    (LOOK_KERNELS, "kernels"),
)
_SQUARES = (("time", "time2_s2"), ("busy", "busy2_s2"), ("both", "both_s2"))


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


def sums_of_looks(looks: Sequence[LookedStage], *, squares: bool) -> dict[InstrumentSpec, list[DataPoint]]:
    """Return what deep looks saw, for files with sums of squares; nothing where there were no looks."""
    points: dict[InstrumentSpec, list[DataPoint]] = {}
    for look in looks:
        attributes = {STAGE: look.stage, REQUEST: look.root}
        for spec, name in _OF_LOOKS:
            points.setdefault(spec, []).append(DataPoint(attributes, getattr(look, name)))
        for reason, name in _SQUARES if squares else ():
            points.setdefault(LOOK_SQUARES, []).append(DataPoint({**attributes, REASON: reason}, getattr(look, name)))
    return points
