"""
From the queues to the batch, a slice at a time: asks which stages and replays are done, and adds them.

Works in slices of some 0.3 ms of the GIL, between which the collector pauses. Exports nothing.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from gpuscope._collecting.batch_builder import BatchBuilder
from gpuscope._collecting.resolve import Resolver
from gpuscope._cuda.graphs.resolve import ReplayResolver
from gpuscope._data.native import native

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._data.batch import StageBatch
    from gpuscope._log import WarnOnce
    from gpuscope._recording.queue import RecordQueue
    from gpuscope._recording.recorder import Recorder
    from gpuscope._settings.config import Config

_SLICE_ROWS = 32 if native is None else 128
"""A slice of so many stages holds the GIL for some 0.3 ms; finishing, counting and each of the two halves of encoding a
batch for about as long. What is fixed in all of them, ten times what a stage takes, and finding the caches cold after
each pause, wants large ones: with half of both a stage cost the collector a third more."""
_SLICE_ROWS_SDK = 4
"""Each of these starts a span of the application's tracer, at 15 to 30 µs."""
_INNER_FOR_ONE = 4
"""Stages inside replays that cost what one record does: they come as columns."""
_BATCH_ROWS = 512
_MAX_BATCH_ROWS = 4096
_BACKLOG_ROWS = 512
_BATCH_DELAY_S = 0.5


class Intake:
    """
    Holds what is not done yet, and the batch so far.

    Args:
        config: the settings.
        recorder: whose stages they are.
        queue: where its records wait.
        warnings: says each kind of failure once.
        epoch_clock: nanoseconds since the epoch.

    """

    def __init__(
        self,
        config: Config,
        recorder: Recorder,
        queue: RecordQueue,
        warnings: WarnOnce,
        epoch_clock: Callable[[], int],
    ) -> None:
        self._recorder = recorder
        self._queue = queue
        self._warnings = warnings
        self._builder = BatchBuilder(
            recorder.device, warmup=config.warmup, clock=recorder.clock, epoch_clock=epoch_clock
        )
        deadline_ns = int(config.event_deadline_s * 1e9)
        self._resolver = Resolver(
            recorder.device,
            recorder.ledger,
            warnings,
            clock=recorder.clock,
            event_deadline_ns=deadline_ns,
            max_pending=config.queue_size,
        )
        self._replays = ReplayResolver(
            recorder.device,
            recorder.ledger,
            recorder.replays,
            warnings,
            clock=recorder.clock,
            deadline_ns=deadline_ns,
            inline=config.graph_stages == "inline",
        )
        self._due_s = 0.0

    def __len__(self) -> int:
        """The rows of the batch so far."""
        return len(self._builder)

    @property
    def uncertainty_ns(self) -> int | None:
        """Half the bracket of the latest anchor, the largest over the devices."""
        return self._resolver.uncertainty_ns

    @property
    def pending(self) -> int:
        """The stages whose GPU work is not known to be done."""
        return self._resolver.pending + self._replays.pending

    @property
    def is_full(self) -> bool:
        """Whether the batch has enough rows; it grows with the replays that wait."""
        return len(self._builder) >= min(_MAX_BATCH_ROWS, _BATCH_ROWS * (1 + self._replays.pending // _MAX_BATCH_ROWS))

    @property
    def is_due(self) -> bool:
        """Whether the batch is full, or old enough."""
        return self.is_full or time.monotonic() > self._due_s

    def slice(self, *, may_ask: bool, give_up: bool = False) -> bool:
        """Add a few stages to the batch; return whether there is more that can be done at once."""
        recorder, limit, before = self._recorder, self._slice_rows(), len(self._builder)
        rows = self._resolver.accept(recorder.ledger.take(partial(self._queue.drain, limit)))
        rows += self._resolver.collect(limit, may_ask=may_ask, give_up=give_up)
        self._add(len(rows), self._builder.add, rows)
        inner = 0
        for replays in self._replays.collect(
            limit * _INNER_FOR_ONE, self._resolver.clock_of, may_ask=may_ask, give_up=give_up
        ):
            self._add(replays.start_ns.size, self._builder.add_replays, replays)
            inner += replays.start_ns.size
        if len(self._builder) and not before:
            self._due_s = time.monotonic() + _BATCH_DELAY_S
        return len(self._queue) > 0 or len(rows) >= limit or inner >= limit * _INNER_FOR_ONE

    def finish(self) -> StageBatch:
        """Return the batch, which has at least one row, and begin another, whatever happens."""
        return self._builder.finish(self._recorder.bridge)

    def _add(self, stages: int, add: Callable[[Any, Any], None], what: Any) -> None:
        if not stages:
            return
        try:
            add(what, self._recorder.bridge)
        except Exception as error:  # What can't be made part of a batch is lost, and said to be.
            self._recorder.ledger.lose("internal_error", stages)
            self._warnings.warn("batch", "adding to a batch failed: %r.", error)

    def _slice_rows(self) -> int:
        bridge = self._recorder.bridge
        rows = _SLICE_ROWS_SDK if bridge is not None and bridge.sdk else _SLICE_ROWS
        # A backlog is worked off in larger slices: spans lost would be worse than a pause missed.
        backlog = len(self._queue) + self._replays.pending // _INNER_FOR_ONE
        return min(_BATCH_ROWS, rows * (1 + backlog // _BACKLOG_ROWS))
