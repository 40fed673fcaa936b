"""
The account of losses that a recording carries: OTLP metrics, cumulative, of which each process's last counts.

Knows our three sums and nothing else of metrics.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from gpuscope._data.attributes import REASON
from gpuscope._data.metrics import DROPPED, LOST, UNTIMED
from gpuscope.analysis._reading.otlp_values import plain_attributes

if TYPE_CHECKING:
    from collections.abc import Iterator

KINDS = {DROPPED.name: "dropped", LOST.name: "lost", UNTIMED.name: "untimed"}
"""Names of the metrics, and of the fields of `Losses` that they fill."""


class Account:
    """Keeps the newest figure of each process, kind and reason."""

    def __init__(self) -> None:
        self._newest: dict[tuple[int, str, str], tuple[int, int]] = {}

    def add(self, process: int, metric: dict[str, Any]) -> None:
        """
        Take one metric of a process; others than ours do nothing.

        Raises:
            MALFORMED: where it is not what OTLP says; what came before the fault is kept.

        """
        kind = KINDS.get(metric["name"])
        if kind is None:
            return
        for reason, time_ns, stages in _points(metric):
            key = process, kind, reason
            # Files may be read in any order.
            self._newest[key] = max(self._newest.get(key, (0, 0)), (time_ns, stages))

    def of(self, kind: str) -> dict[str, int]:
        """Return the stages of all processes by reason, the most first; reasons without any are left out."""
        total: Counter[str] = Counter()
        for (_, of_kind, reason), (_, stages) in self._newest.items():
            total[reason] += stages * (of_kind == kind)
        return {reason: stages for reason, stages in total.most_common() if stages}


def _points(metric: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Yield (reason, time, stages)."""
    for point in metric["sum"]["dataPoints"]:
        reason = str(plain_attributes(point.get("attributes", [])).get(REASON, "unknown"))
        stages = int(point["asInt"] if "asInt" in point else point["asDouble"])
        if stages < 0:
            raise ValueError(stages)
        yield reason, int(point["timeUnixNano"]), stages
