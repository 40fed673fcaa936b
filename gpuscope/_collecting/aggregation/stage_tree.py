"""
Which stage runs inside which, learnt from one call of each stage.

Learns from the parent ids of batches as they come. Costs nothing once every stage has its place. Sorts nothing, and
takes no lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuscope._data.batch import RowFlag

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._collecting.aggregation.tally import Tally
    from gpuscope._data.batch import StageBatch
    from gpuscope._data.stage_order import Place

_IN_GRAPH = int(RowFlag.IN_GRAPH)
PATIENCE_NS = 60_000_000_000
"""How long the stage around one call is awaited before a later call is tried instead."""


class Family:
    """The stages without a known parent, by the span id that each one waits for. A stage waits for one at a time."""

    def __init__(self) -> None:
        self._waiting: dict[int, list[Tally]] = {}

    def orphan(self, tally: Tally, batch: StageBatch, row: int) -> None:
        """Wait for the stage around this call, unless that of another call is already awaited."""
        # A stage ends before the one around it, so its row comes first, maybe in an earlier batch. The one around it
        # may also have been dropped: hence the limit of patience.
        start_ns = begin_ns(batch, row)
        if tally.awaited_id and start_ns - tally.awaited_start_ns < PATIENCE_NS:
            return
        self._forget(tally)
        self._await(tally, batch, row)

    def learn(self, batch: StageBatch, tally_of: Callable[[StageBatch, int], Tally]) -> None:
        """Give each stage that waits for a row of this batch its place; `tally_of` returns the tally of a row."""
        if not self._waiting:
            return
        rows = {span_id: row for row, span_id in enumerate(batch.span_id.tolist())}
        found = rows.keys() & self._waiting.keys()
        while found:
            # Each row is taken once, so that no chain of parents, however odd, goes round for ever.
            row = rows.pop(span_id := found.pop())
            parent = tally_of(batch, row)
            for tally in self._waiting.pop(span_id):
                if tally is parent:
                    # A stage inside itself has the place of its outer call.
                    self._await(tally, batch, row)
                    found |= {tally.awaited_id} & rows.keys()
                else:
                    _adopt(tally, parent, tally.awaited_start_ns - begin_ns(batch, row))

    def _await(self, tally: Tally, batch: StageBatch, row: int) -> None:
        tally.awaited_id = int(batch.parent_id[row])
        tally.awaited_start_ns = begin_ns(batch, row)
        if tally.awaited_id:
            self._waiting.setdefault(tally.awaited_id, []).append(tally)

    def _forget(self, tally: Tally) -> None:
        waiting = self._waiting.get(tally.awaited_id, [])
        if tally in waiting:
            waiting.remove(tally)
            if not waiting:
                del self._waiting[tally.awaited_id]


def begin_ns(batch: StageBatch, row: int) -> int:
    """Return when a stage began: on the host or, inside a replay, whose stages are launched at once, on the GPU."""
    replayed = int(batch.flags[row]) & _IN_GRAPH
    return int((batch.gpu_start_ns if replayed else batch.host_start_ns)[row])


def _adopt(tally: Tally, parent: Tally, offset_ns: int) -> None:
    """Give a stage its parent, unless that closes a circle, as with two stages that call each other."""
    tally.awaited_id = 0
    ancestor: Place | None = parent
    while ancestor is not None:
        if ancestor is tally:
            return
        ancestor = ancestor.parent
    tally.parent, tally.offset_ns = parent, offset_ns
