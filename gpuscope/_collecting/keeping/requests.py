"""
Which request each resolved stage belongs to: a key per row of the batch that is being made.

Reads records and keeps none. A request is an outermost stage of this process with all stages inside; a trace that began
elsewhere, or has spans of the application's above its stages, may have several.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from gpuscope._collecting.resolve import Row
    from gpuscope._cuda.graphs.placing import Placed
    from gpuscope._data.record import StageRecord


class RequestKeys:
    """Collects the keys of a batch's rows, in their order."""

    def __init__(self) -> None:
        self._keys: list[int] = []
        self._roots: list[int] = []

    def add(self, rows: Iterable[Row]) -> None:
        """Note stages that were added to the batch."""
        keys, roots = self._keys, self._roots
        for row in rows:
            record = row[0]
            if record.outer is None:
                top = record
            elif (top := _outermost(record)) is not record:
                keys.append(top.span_id if top.trace.root is top.site else 0)
                continue
            # One below a stage that had ended when it began is no request; its request's decision holds for it.
            if record.trace.root is record.site:
                roots.append(len(keys))
                keys.append(record.span_id)
            else:
                keys.append(0)

    def add_replays(self, placed: Placed) -> None:
        """Note the stages inside replays that were added to the batch, replay by replay."""
        for replay in placed.replays:
            top = _outermost(replay.outer)
            self._keys += [top.span_id if top.trace.root is top.site else 0] * len(placed.graph)

    def take(self) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        """
        Return the keys of the rows so far, and which of them are the outermost stages; begin anew.

        A row whose outermost stage is not known has the key 0.
        """
        keys, is_root = np.array(self._keys, np.uint64), np.zeros(len(self._keys), np.bool_)
        is_root[self._roots] = True
        self._keys, self._roots = [], []
        return keys, is_root


def _outermost(record: StageRecord) -> StageRecord:
    """Return the outermost stage around this one in its trace, also where the application's spans lie between."""
    while (outer := record.outer) is not None and (
        outer.trace is record.trace or outer.trace.trace_id == record.trace.trace_id
    ):
        record = outer
    return record
