"""
What deep looks saw that were taken now and then, in a recording's files: cumulative sums, the last of each process.

Reads our sums about looks; knows no other metric, and judges nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuscope._data.attributes import REASON, REQUEST, STAGE
from gpuscope._data.metrics import LOOK_BUSY, LOOK_CALLS, LOOK_KERNELS, LOOK_REQUESTS, LOOK_SQUARES, LOOK_TIME
from gpuscope._data.statistics import LookedStage
from gpuscope.analysis._reading.gpus import points_of
from gpuscope.analysis.recording import Looked

if TYPE_CHECKING:
    from gpuscope.analysis._reading.otlp_values import JsonObject

_FIELDS = {
    (LOOK_REQUESTS.name, ""): "requests",
    (LOOK_CALLS.name, ""): "calls",
    (LOOK_TIME.name, ""): "time_s",
    (LOOK_BUSY.name, ""): "busy_s",
    (LOOK_KERNELS.name, ""): "kernels",
    (LOOK_SQUARES.name, "time"): "time2_s2",
    (LOOK_SQUARES.name, "busy"): "busy2_s2",
    (LOOK_SQUARES.name, "both"): "both_s2",
}
"""By metric and reason: the field of `LookedStage`."""
_NAMES = frozenset(name for name, _ in _FIELDS)
_WHOLE = ("requests", "calls")


class LookSums:
    """Keeps the newest figure of each process, kind of request, stage and sum."""

    def __init__(self) -> None:
        self._newest: dict[tuple[int, str, str], dict[str, tuple[int, float]]] = {}

    def add(self, process: int, metric: JsonObject) -> None:
        """
        Take one metric of a process, and ignore it if it is none of these.

        Raises:
            MALFORMED: The metric is not as OTLP has it. The points before the fault are kept.

        """
        name = metric["name"]
        if name not in _NAMES:
            return
        for values, time_ns, value in points_of(metric):
            place = _FIELDS[name, str(values.get(REASON, ""))]
            found = self._newest.setdefault((process, str(values[REQUEST]), str(values[STAGE])), {})
            # Files may be read in any order.
            found[place] = max(found.get(place, (0, 0.0)), (time_ns, value))

    def looks(self) -> tuple[Looked, ...]:
        """Return what looks saw of each stage, once for each process; not of those whose sums are not all there."""
        return tuple(
            Looked(process, _stage(root, stage, found))
            for (process, root, stage), found in self._newest.items()
            if len(found) == len(_FIELDS)
        )


def _stage(root: str, stage: str, found: dict[str, tuple[int, float]]) -> LookedStage:
    values = {name: int(value) if name in _WHOLE else value for name, (_, value) in found.items()}
    return LookedStage(root=root, stage=stage, **values)  # type: ignore[arg-type]  # Some are whole numbers.
