"""
From the queues to the batch, one slice at a time: asks which stages and replays are done, and adds them.

A slice holds the GIL for some 0.6 ms, or longer where there is a backlog; then the collector pauses. Exports nothing.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeVar

from gpuscope._collecting.batch_builder import BatchBuilder
from gpuscope._collecting.batches.generations import GenerationTimes
from gpuscope._collecting.batches.members import BatchMembers
from gpuscope._collecting.batches.sums import Sums
from gpuscope._collecting.joins.pauses import Replaying, with_collections
from gpuscope._collecting.joins.samples import SampleJoin
from gpuscope._collecting.keeping.requests import RequestKeys
from gpuscope._collecting.resolve import Resolver
from gpuscope._cuda.graphs.resolve import ReplayResolver
from gpuscope._cuda.nvml.watch import HZ, GpuWatch
from gpuscope._data.native import native
from gpuscope._data.plain.values import shown
from gpuscope._data.statistics import Observed
from gpuscope._recording.queue import is_refused
from gpuscope._settings.config import Config

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from gpuscope._collecting.resolve import Row
    from gpuscope._data.batch import FinishedGeneration, StageBatch
    from gpuscope._data.flight import WaitingStage
    from gpuscope._data.interfaces import Bridge, Device
    from gpuscope._data.record import StageRecord
    from gpuscope._log import WarnOnce
    from gpuscope._recording.queue import RecordQueue
    from gpuscope._recording.recorder import Recorder

_SLICE_ROWS, _BACKLOG_ROWS, _BATCH_ROWS = (32, 512, 512) if native is None else (512, 4096, 2048)
"""A slice of so many stages, and as many more for each of the second number that wait; and rows at which a batch is
exported. A slice takes some 0.6 ms of CPU time, and the longest piece of work on a batch that keeps the GIL 0.9 ms.
What a stage costs is largely wake-ups and cold caches: with half of these sizes the background paid 8 to 24 % more."""
_SLICE_ROWS_SDK = 4
"""With the `sdk` exporter: each stage starts a span of the application's tracer, which takes 15 to 30 µs."""
_INNER_FOR_ONE = 4
"""This many stages inside replays cost what one record does, because they come as columns."""
_BACKLOG_ROWS_SDK = 512
_MAX_BATCH_ROWS = 4096
"""The most where replays wait: `_BATCH_ROWS` more for every 4,096 stages inside them, up to this. The last slice may
exceed it."""
_BATCH_BYTES = 1 << 20
"""Bytes of what stages were told at which a batch is exported: encoding takes as much again, several times."""
_SLICE_ROWS_LARGE, _SLICE_BYTES = 8, 1 << 17
"""While more than that waits: a slice of so many stages at least, and of more where they were told less on average."""
_BATCH_DELAY_NS = 500_000_000
"""From a batch's first row until it is exported, however small it is."""

_GATHER_NS = 1_000_000_000
"""Answers of the sampler are taken so often at least."""

T = TypeVar("T")


class Intake:
    """
    Holds what is not done yet, and the batch so far.

    Args:
        config: the settings.
        recorder: whose stages they are.
        queue: where its records wait.
        warnings: logs each kind of failure once.
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
        self.samples = _samples_of(recorder.device, config, warnings)
        """None where nothing is asked."""
        self.watch = GpuWatch(HZ if config.nvml else 0.0)
        self._requests = RequestKeys() if config.keep else None
        """Which request each row of the batch so far belongs to; None where nobody asks."""
        self._builder = BatchBuilder(
            recorder.device,
            warmup=config.warmup,
            clock=recorder.clock,
            epoch_clock=epoch_clock,
            samples=self.samples,
            requests=self._requests,
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
        self._links_only = config.batch_spans == "links"
        self._sums = Sums(recorder.ledger.faults, recorder.clock, deadline_ns)
        self._members = BatchMembers(
            recorder.ledger.faults, self._sums, recorder.random_bits(62) + 1, links_only=self._links_only
        )
        self._generations, self._replaying = GenerationTimes(), Replaying()
        self._due_ns, self._interval_ns = 0, int(config.interval_s * 1e9)
        self._gather_due_ns = 0

    def __len__(self) -> int:
        """The rows of the batch so far."""
        return len(self._builder)

    @property
    def observed(self) -> Observed:
        """How far off GPU times may be, what streams and NVML answered, if they are asked, and what events take."""
        samples = ({}, "") if self.samples is None else (self.samples.account(), self.samples.state)
        return Observed(
            self._resolver.uncertainty_ns, *samples, self.watch.uses, self.watch.state, self._resolver.event_cost_ns
        )

    @property
    def pending(self) -> int:
        """How many stages are not known to have ended on the GPU, those inside replays included."""
        return self._resolver.pending + self._replays.pending

    def waiting_stages(self) -> list[WaitingStage]:
        """Return of each stream the oldest stage that waits for its GPU work; any thread may ask."""
        return self._resolver.progress.waiting_stages()

    def is_past(self, until_ns: int) -> bool:
        """Tell whether all that had ended by a moment of the records' clock is in a batch."""
        return all(at_ns > until_ns for at_ns in self._oldest_ns())

    def _oldest_ns(self) -> list[int]:
        """Return when the first ended of those that wait, in the queue and on the streams."""
        # Whatever waits longest on a stream was queued first. What came to the queue after that moment ended after it.
        waiting = self._queue.waiting
        oldest = (waiting[0].end_ns if waiting else None, self._resolver.oldest_ns(), self._replays.oldest_ns())
        return [at_ns for at_ns in oldest if at_ns is not None]

    @property
    def is_full(self) -> bool:
        """
        Whether the batch has enough rows. The more replays wait, the more rows are enough.

        Where few records are left in the queue they come into the same batch, because a small batch costs nearly as
        much as a large one.
        """
        if self._builder.held_bytes >= _BATCH_BYTES:
            return True
        enough = min(_MAX_BATCH_ROWS, _BATCH_ROWS * (1 + self._replays.pending // _MAX_BATCH_ROWS))
        few = 0 < len(self._queue) < _BATCH_ROWS // 2
        return len(self._builder) >= (enough + _BATCH_ROWS // 2 if few else enough)

    @property
    def is_due(self) -> bool:
        """Whether the batch is full, or would be too old at the next pass."""
        return self.is_full or self._recorder.clock() + self._interval_ns > self._due_ns

    def slice(self, *, may_ask: bool, give_up: bool = False) -> bool:
        """Add a few stages to the batch; return whether there is more to do right away."""
        recorder, limit, before = self._recorder, self._slice_rows(), len(self._builder)
        if self.samples is not None and recorder.clock() > self._gather_due_ns:
            # Each batch does so, too; this is for where no stage ends, before the ring is full.
            self.samples.gather()
            self._gather_due_ns = recorder.clock() + _GATHER_NS
        rows = self._resolver.accept(self._without_refused(recorder.ledger.take(partial(self._queue.drain, limit))))
        rows += self._resolver.collect(limit, may_ask=may_ask, give_up=give_up)
        self._add_rows(rows)
        inner = 0
        for replays in self._replays.collect(
            limit * _INNER_FOR_ONE, self._resolver.clock_of, may_ask=may_ask, give_up=give_up
        ):
            self._add(replays.start_ns.size, self._builder.add_replays, replays)
            inner += replays.start_ns.size
        if len(self._builder) and not before:
            self._due_ns = recorder.clock() + _BATCH_DELAY_NS
        return len(self._queue) > 0 or len(rows) >= limit or inner >= limit * _INNER_FOR_ONE

    def past_ns(self) -> int:
        """Return a moment of the records' clock: all that had ended until then is in a batch, or in the one so far."""
        now_ns = self._recorder.clock()
        return min([now_ns, *(at_ns - 1 for at_ns in self._oldest_ns())])

    def take_requests(self) -> tuple[tuple[NDArray[np.uint64], NDArray[np.bool_]] | None, int]:
        """Return the requests of the batch so far, if they are wanted, and `past_ns`; before `finish`."""
        return (None, 0) if self._requests is None else (self._requests.take(), self.past_ns())

    @property
    def offset_ns(self) -> NDArray[np.int64]:
        """By so much the times of the last batch are later than the records': of each row, or of all."""
        return self._builder.offset_ns

    def finish(self) -> StageBatch:
        """Return the batch, which has at least one row, and begin another, whatever happens."""
        past_ns = 0 if self.samples is None else self.past_ns()
        batch = self._builder.finish(self._recorder.bridge, past_ns)
        batch = self._replaying.look(with_collections(batch, self._builder.offset_ns))
        self.watch.follow(batch.devices)
        self._recorder.note(batch, self.offset_ns)
        return batch

    def look_at_members(self, batch: StageBatch, breathe: Callable[[], None]) -> list[StageBatch]:
        """Link batches to their members, and return the light spans in their traces; pause now and then."""
        self._generations.look(batch)
        light = []
        for spans in self._members.look(batch, self._recorder.bridge):
            light += [] if spans is None else [spans]
            breathe()
        return light

    def take_finished(self) -> list[FinishedGeneration]:
        """Return the generations of many batches that have become complete since this was last asked."""
        return self._members.take_finished()

    def give_up_generations(self) -> None:
        """Count the light spans of generations that have not ended as lost, because this is the end."""
        if not self._links_only:
            self._recorder.ledger.shared.lose("shutdown", self._sums.unfinished())

    def _add_rows(self, rows: list[Row]) -> None:
        """Add all rows at once or, where one fails, each on its own, so that it costs itself and no other."""
        try:
            if rows:
                self._builder.add(rows, self._recorder.bridge)
                if (stalls := self._recorder.stalls) is not None and stalls.has_events:
                    self._builder.add_events(rows, stalls.take_event)
        except Exception:  # Some row can't be added; `_add` counts it.
            for row in rows:
                self._add(1, self._builder.add, [row])

    def _add(self, stages: int, add: Callable[[T, Bridge | None], None], resolved: T) -> None:
        if not stages:
            return
        try:
            add(resolved, self._recorder.bridge)
        except BaseException as error:  # What cannot be added to a batch is lost, and counted.
            self._recorder.ledger.lose("internal_error", stages)
            self._warnings.warn("batch", "adding to a batch failed: %s.", shown(error))

    def _without_refused(self, records: list[StageRecord]) -> list[StageRecord]:
        """Drop the stages for whose attributes there was no room."""
        if not self._recorder.budget.has_refused:
            return records
        kept = [record for record in records if not is_refused(record)]
        if len(kept) < len(records):
            self._recorder.ledger.drop("queue_bytes", len(records) - len(kept))
            for record in records:
                if is_refused(record) and record.pair is not None:
                    self._recorder.device.give_back(record)
        return kept

    def _slice_rows(self) -> int:
        bridge = self._recorder.bridge
        used = self._recorder.budget.used
        if used > _BATCH_BYTES:
            stages = len(self._queue) + len(self._builder) + self.pending
            return max(_SLICE_ROWS_LARGE, min(_SLICE_ROWS, _SLICE_BYTES * stages // used))
        sdk = bridge is not None and bridge.sdk
        rows, per = (_SLICE_ROWS_SDK, _BACKLOG_ROWS_SDK) if sdk else (_SLICE_ROWS, _BACKLOG_ROWS)
        # Larger slices work off a backlog: losing spans would be worse than holding the GIL for longer.
        backlog = len(self._queue) + self._replays.pending // _INNER_FOR_ONE
        return min(_BATCH_ROWS, rows * (1 + backlog // per))


def _samples_of(device: Device, config: Config, warnings: WarnOnce) -> SampleJoin | None:
    """Return what joins the answers of a device's sampler with stages, if it has one that is wanted."""
    sampling = getattr(device, "sampling", None)
    if sampling is None or not sampling.hz:
        return None
    # Whoever has not asked for it need not know that it is missing.
    return SampleJoin(sampling, warnings, says_why_off=config.sample_hz != Config.sample_hz)
