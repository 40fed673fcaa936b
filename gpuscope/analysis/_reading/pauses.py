"""
Garbage collection in a recording's files: an event of each stage that was open meanwhile.

Knows neither files nor rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuscope._data.attributes import GC_DURATION, GC_EVENT
from gpuscope.analysis._reading.otlp_values import plain_attributes

if TYPE_CHECKING:
    from gpuscope.analysis._reading.otlp_values import JsonObject

_END_OF_TIME = 2**63


class GcEvents:
    """All of them."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, int, int], None] = {}

    def add(self, process: int, events: list[JsonObject]) -> None:
        """
        Take the events of a span, and ignore those that are none of these.

        Args:
            process: the number of the span's process.
            events: of OTLP.

        Raises:
            MALFORMED: One is not as it should be. Those before it are kept.

        """
        for event in events:
            if event["name"] == GC_EVENT:
                start_ns = int(event["timeUnixNano"])
                duration_ns = int(str(plain_attributes(event["attributes"])[GC_DURATION]))
                if not (0 < start_ns < _END_OF_TIME and 0 <= duration_ns < _END_OF_TIME - start_ns):
                    raise ValueError(start_ns, duration_ns)
                self._found[process, start_ns, start_ns + duration_ns] = None

    def pauses(self) -> list[tuple[int, int, int]]:
        """Return each as a line of `Pauses`."""
        return list(self._found)
