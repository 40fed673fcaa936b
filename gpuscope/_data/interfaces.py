"""
What the hot path and the collector need of GPUs, whoever provides it.

An interface and the words of its answers; nothing here acts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._data.batch import DeviceInfo
    from gpuscope._data.record import StageRecord


@dataclass(frozen=True, slots=True)
class Anchor:
    """One paired reading of the host and GPU clocks: the event completed at `host_ns`, plus or minus `half_ns`."""

    event: Any
    host_ns: int
    half_ns: int


DONE, PENDING, CAPTURED, BROKEN = "done", "pending", "captured", "broken"


class Device(Protocol):
    """What the hot path and the collector need of GPUs. `gpuscope.testing.FakeDevice` is another one."""

    begin: Callable[[StageRecord, Any], None]
    """Record the start event on the given stream or the current one: sets `timed_stream` and `pair`, or neither."""

    end: Callable[[StageRecord], None]
    """Record the end event, or take `pair` away."""

    def give_back(self, record: StageRecord) -> None:
        """Return a record's events to the pool."""

    def attach(self) -> None:
        """Prepare the collector's thread for one pass."""

    def is_capturing(self, timed_stream: Any) -> bool:
        """Tell whether the stream is being captured: then none of its events may be asked about."""

    def query(self, record: StageRecord) -> str:
        """Tell about the end event: DONE, PENDING, CAPTURED or BROKEN."""

    reader: Any
    """An `EventReader` of `native`, which does what the next four do, or None."""

    def elapsed_ms(self, first: Any, second: Any) -> float | None:
        """GPU time between two completed events; None if one of them can't be timed."""

    def calibrate(self, timed_stream: Any, keep: Anchor | None) -> Anchor | None:
        """Take a new anchor on the stream's device, with another event than that of the one to keep."""

    def facts(self, index: int) -> DeviceInfo:
        """Describe a device."""

    def close(self) -> None:
        """Record nothing any more. Also for the child after a fork, where CUDA must not be touched."""
