"""
What the hot path's recorder, the collector and what looks for stalls (`_stalls/`) tell each other.

Nothing here acts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpuscope._data.batch import StageBatch
    from gpuscope._data.record import StageRecord

StallEvent: TypeAlias = "tuple[str, int, Mapping[str, object]]"
"""The event of a stage that stalled: name, nanoseconds on the records' clock, attributes."""


class WaitingStage(NamedTuple):
    """The oldest stage of a stream that the host has left, and whose GPU work is not known to be done."""

    record: StageRecord
    device: int
    stream: int
    waiting: int
    """How many stages wait there."""
    asked_ns: int
    """When the GPU last said that it is not done; 0 for never."""
    done: str
    """The stage that was done there last; empty for none."""
    done_ns: int
    """When that was found."""


class StallWatch(Protocol):
    """Looks for stages without progress: `_stalls.stalls.Stalls`. It never raises."""

    has_events: bool
    """Whether there are events for stages that end later."""

    def take_event(self, span_id: int) -> StallEvent | None:
        """Return the event of a stage, once."""

    def look(self, batch: StageBatch) -> None:
        """Learn the names of stages."""

    def start(self) -> None:
        """Look again, after `stop`."""

    def stop(self) -> None:
        """Look for nothing until `start`."""

    def close(self) -> None:
        """End."""

    def abandon(self) -> None:
        """Let go: this process is the child of a fork."""
