"""
What NVML said of GPUs, in a recording's files: cumulative OTLP metrics, of which the last of each process counts.

Reads our sums about GPUs; knows no other metric, and judges nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from gpuscope._data.attributes import DEVICE_INDEX, GPU_PART, HW_ID, HW_MODEL, HW_VENDOR, REASON
from gpuscope._data.metrics import ACTIVE, ENERGY, SHARED, THROTTLED, WATCHED
from gpuscope._data.plain.gpu_use import GpuUse
from gpuscope.analysis._reading.otlp_values import plain_attributes
from gpuscope.analysis.recording import WatchedGpu

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuscope.analysis._reading.otlp_values import JsonObject

_SUMS = frozenset(spec.name for spec in (WATCHED, ACTIVE, ENERGY, THROTTLED, SHARED))
_SHORTEST_S = 1e-3
"""Sums are rounded where they are written, so parts may exceed the whole by a little."""


class _Key(NamedTuple):
    process: int
    uuid: str
    device: int


class GpuSums:
    """Keeps the newest figure of each process, GPU, sum and reason."""

    def __init__(self) -> None:
        self._newest: dict[_Key, dict[tuple[str, str], tuple[int, float]]] = {}
        self._words: dict[_Key, tuple[str, str, bool]] = {}

    def add(self, process: int, metric: JsonObject) -> None:
        """
        Take one metric of a process, and ignore it if it is none of these.

        Raises:
            MALFORMED: The metric is not as OTLP has it. The points before the fault are kept.

        """
        name = metric["name"]
        if name not in _SUMS:
            return
        for values, time_ns, value in points_of(metric):
            key = _Key(process, str(values.get(HW_ID) or ""), int(str(values.get(DEVICE_INDEX, 0))))
            model, vendor = (str(values.get(each) or "") for each in (HW_MODEL, HW_VENDOR))
            self._words[key] = model, vendor, values.get(GPU_PART) is True
            found = self._newest.setdefault(key, {})
            place = name, str(values.get(REASON, ""))
            # Files may be read in any order.
            found[place] = max(found.get(place, (0, 0.0)), (time_ns, value))

    def gpus(self) -> tuple[WatchedGpu, ...]:
        """Return what each process saw of each of its GPUs."""
        return tuple(WatchedGpu(key.process, self._use(key)) for key in sorted(self._newest))

    def _use(self, key: _Key) -> GpuUse:
        found, (model, vendor, is_part) = self._newest[key], self._words[key]
        _, watched_s = found.get((WATCHED.name, ""), (0, 0.0))
        throttled = {reason: value for (name, reason), (_, value) in found.items() if name == THROTTLED.name}
        shared = {reason: value for (name, reason), (_, value) in found.items() if name == SHARED.name}
        alone_s = watched_s - sum(shared.values())
        return GpuUse(
            *(key.device, key.uuid, model, vendor),
            watched_s=watched_s,
            active_s=found.get((ACTIVE.name, ""), (0, None))[1],
            energy_j=found.get((ENERGY.name, ""), (0, None))[1],
            cycles=None,
            throttled_s=throttled or None,
            others_s=shared | ({"alone": alone_s} if alone_s > _SHORTEST_S else {}),
            others=None,
            is_part=is_part,
        )


def points_of(metric: JsonObject) -> Iterator[tuple[dict[str, object], int, float]]:
    """
    Yield (attributes, time, value) of a sum.

    Raises:
        MALFORMED: It is none.

    """
    for point in metric["sum"]["dataPoints"]:
        value = float(point["asInt"] if "asInt" in point else point["asDouble"])
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(value)
        yield plain_attributes(point.get("attributes", [])), int(point["timeUnixNano"]), value
