"""
The account of losses in a recording's files: cumulative OTLP metrics, of which the last of each process counts.

Reads three of our sums; knows no other metric.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from gpuscope._data.attributes import REASON
from gpuscope._data.metrics import DROPPED, LOST, UNTIMED
from gpuscope.analysis._reading.otlp_values import plain_attributes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuscope.analysis._reading.otlp_values import JsonObject

KINDS = {DROPPED.name: "dropped", LOST.name: "lost", UNTIMED.name: "untimed"}
"""The field of `Losses` that each metric fills, by the metric's name."""


class Account:
    """Keeps the newest figure of each process, kind and reason."""

    def __init__(self) -> None:
        self._newest: dict[tuple[int, str, str], tuple[int, int]] = {}

    def add(self, process: int, metric: JsonObject) -> None:
        """
        Take one metric of a process, and ignore it if it is none of the three.

        Raises:
            MALFORMED: The metric is not as OTLP has it. The points before the fault are kept.

        """
        kind = KINDS.get(metric["name"])
        if kind is None:
            return
        for reason, time_ns, stages in _points(metric):
            key = process, kind, reason
            # Files may be read in any order.
            self._newest[key] = max(self._newest.get(key, (0, 0)), (time_ns, stages))

    def of(self, kind: str) -> dict[str, int]:
        """Return the number of stages by reason, over all processes, largest first; without zeros."""
        total: Counter[str] = Counter()
        for (_, of_kind, reason), (_, stages) in self._newest.items():
            total[reason] += stages * (of_kind == kind)
        return {reason: stages for reason, stages in total.most_common() if stages}


def _points(metric: JsonObject) -> Iterator[tuple[str, int, int]]:
    """Yield (reason, time, stages)."""
    for point in metric["sum"]["dataPoints"]:
        reason = str(plain_attributes(point.get("attributes", [])).get(REASON, "unknown"))
        stages = int(point["asInt"] if "asInt" in point else point["asDouble"])
        if stages < 0:
            raise ValueError(stages)
        yield reason, int(point["timeUnixNano"]), stages
