"""
The stages around a stage: its parent, the root of its trace, the innermost one that still runs.

Asks records only; knows no context and changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpuscope._data.record import StageRecord


def parent_stage(record: StageRecord) -> StageRecord | None:
    """Return the enclosing stage, or None if a span of the application's lies between."""
    outer = record.outer
    return outer if outer is not None and outer.trace is record.trace else None


def root_stage(record: StageRecord) -> StageRecord:
    """Return the outermost stage of the same trace."""
    while (outer := parent_stage(record)) is not None:
        record = outer
    return record


def running_stage(record: StageRecord | None) -> StageRecord | None:
    """
    Return the stage itself or the innermost one around it that has not ended.

    Stages held open across a `yield` may end out of order, so a stage that has ended can enclose one that runs.
    """
    while record is not None and record.end_ns:
        record = record.outer
    return record
