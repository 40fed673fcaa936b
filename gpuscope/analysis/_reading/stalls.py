"""
Events of host spans: garbage collections, stalls that were found, and GPU memory that ran out.

Knows OTLP's events and no files. An event that cannot be read is counted, and its span stays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from gpuscope._data.attributes import EXCEPTION_TYPE, GC_DURATION, GC_EVENT, GC_GENERATION, STALL, STALL_KIND
from gpuscope.analysis._reading.otlp_values import MALFORMED, plain_attributes

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from gpuscope.analysis._reading.otlp_values import JsonObject

_EXCEPTION = "exception"
_OUT_OF_MEMORY = "OutOfMemoryError"
_END_OF_TIME = 2**63


class Collected(NamedTuple):
    """One garbage collection that a stage was open in."""

    start_ns: int
    """Since the epoch."""
    took_ns: int
    generation: int


@dataclass(frozen=True, slots=True)
class Stalls:
    """By row of the recording, where there are any."""

    collections: Mapping[int, tuple[Collected, ...]] = field(default_factory=dict)
    out_of_memory: tuple[int, ...] = ()
    """Rows of stages that PyTorch's `OutOfMemoryError` left."""
    stalled: Mapping[int, str] = field(default_factory=dict)
    """Which kind of stall was found in a stage: the last, where there were several."""

    def kept(self, place: NDArray[np.int64]) -> Stalls:
        """Return them of those rows that have a place, which is not negative, in another recording."""
        return Stalls(
            {int(place[row]): found for row, found in self.collections.items() if place[row] >= 0},
            tuple(int(place[row]) for row in self.out_of_memory if place[row] >= 0),
            {int(place[row]): kind for row, kind in self.stalled.items() if place[row] >= 0},
        )


class StallEvents:
    """
    What the events of all host spans tell, by the spans' keys.

    Args:
        skipped: counts what cannot be read.

    """

    def __init__(self, skipped: Counter[str]) -> None:
        self._skipped = skipped
        self._collections: dict[tuple[str, str], tuple[Collected, ...]] = {}
        self._stalled: dict[tuple[str, str], str] = {}
        self._out_of_memory: set[tuple[str, str]] = set()

    def add(self, key: tuple[str, str], span: JsonObject) -> None:
        """Take the events of one host span."""
        try:
            for event in span["events"]:
                self._add(key, event)
        except MALFORMED:
            self._skipped["malformed events"] += 1

    def _add(self, key: tuple[str, str], event: JsonObject) -> None:
        if event["name"] == GC_EVENT:
            self._collections[key] = (*self._collections.get(key, ()), _collected(event))
        elif event["name"] == STALL:
            self._stalled[key] = str(plain_attributes(event["attributes"])[STALL_KIND])
        elif event["name"] == _EXCEPTION:
            kind = plain_attributes(event.get("attributes", [])).get(EXCEPTION_TYPE)
            if str(kind).rpartition(".")[2] == _OUT_OF_MEMORY:
                self._out_of_memory.add(key)

    def stalls(self, place: Mapping[tuple[str, str], int]) -> Stalls:
        """Return them by the rows of a recording."""
        return Stalls(
            {place[key]: found for key, found in self._collections.items() if key in place},
            tuple(sorted(place[key] for key in self._out_of_memory if key in place)),
            {place[key]: kind for key, kind in self._stalled.items() if key in place},
        )


def _collected(event: JsonObject) -> Collected:
    told = plain_attributes(event["attributes"])
    start_ns, took_ns, generation = int(event["timeUnixNano"]), told[GC_DURATION], told[GC_GENERATION]
    if not (isinstance(took_ns, int) and isinstance(generation, int)):
        raise TypeError(took_ns, generation)
    if not (0 <= start_ns < _END_OF_TIME and 0 <= took_ns < _END_OF_TIME):
        raise ValueError(start_ns, took_ns)
    return Collected(start_ns, took_ns, generation)
