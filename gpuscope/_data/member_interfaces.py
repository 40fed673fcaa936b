"""
What is asked of the door to OpenTelemetry about tokens and the members of batches.

An interface; nothing here acts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from gpuscope._data.record import FromAbove, StageRecord


class MemberBridge(Protocol):
    """What `_data.interfaces.Bridge` says of members: `_otel.members.MemberIdentities`, and `Bridge.here`."""

    def here(self, stage: StageRecord | None) -> FromAbove:
        """Return what a stage that began now would be a child of: a stage, the ids of a span, or None."""

    def ids_of_member(self, record: StageRecord) -> FromAbove:
        """Settle a stage's ids for good, and return them."""

    def settle_member(self, record: StageRecord) -> tuple[int, int, bool]:
        """Return trace id, span id and whether a stage is exported, which may still run."""
