"""
From records to rows: which stages' GPU work is done, and where in host time it lies.

Asks the device and never waits for a stage's work. A record leaves here exactly once, with GPU times or without.
"""

from __future__ import annotations

from collections import deque
from itertools import islice, repeat
from typing import TYPE_CHECKING, TypeAlias

from gpuscope._collecting.progress import Progress
from gpuscope._cuda.clock import GpuClock
from gpuscope._cuda.driver import NOT_READY, PENDING_CODES
from gpuscope._cuda.timed_stream import events_of, stream_of_all
from gpuscope._data.batch import RowFlag
from gpuscope._data.interfaces import CAPTURED, DONE, PENDING
from gpuscope._data.native import native
from gpuscope._data.plain.values import shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._data.interfaces import Anchor, Device, TimedStreamOfDevice
    from gpuscope._data.record import StageRecord
    from gpuscope._log import WarnOnce
    from gpuscope._recording.ledger import Ledger


Row: TypeAlias = "tuple[StageRecord, int, int, int, int]"
"""One resolved stage: record, GPU start and end in host nanoseconds or 0, uncertainty, flags. A tuple, for speed."""

_CAPTURED, _CLAMPED, _GIVEN_UP = int(RowFlag.CAPTURED), int(RowFlag.CLAMPED), int(RowFlag.GIVEN_UP)
_UNPLACED, _TRIMMED = int(RowFlag.UNPLACED), int(RowFlag.TRIMMED)
_NO_CLOCK = 0, 0, 1e6, 0.0, 0
"""Stands for the terms of a clock without an anchor: what ends at 0 is moved to its launch."""


_LOST = (
    "the clock of GPU %d can't be read while it is this busy (is CUDA_DEVICE_MAX_CONNECTIONS 1?). Stages have their "
    "durations, and no place on the timeline: `gpuscope.unplaced`."
)


_stream_of_all = stream_of_all if native is None else native.stream_of_all


class Resolver:
    """
    Holds the records whose events are not done yet: one deque per stream, oldest first.

    Args:
        device: the GPUs.
        ledger: counts what goes out without GPU times.
        warnings: logs each kind of failure once.
        clock: nanoseconds, monotonic; the clock of the records.
        event_deadline_ns: how long after a stage's end on the host its GPU work may take; then it goes out with host
            times only.
        max_pending: how many records may wait here; further ones go out with host times only.

    """

    def __init__(
        self,
        device: Device,
        ledger: Ledger,
        warnings: WarnOnce,
        *,
        clock: Callable[[], int],
        event_deadline_ns: int,
        max_pending: int,
    ) -> None:
        self.pending = 0
        self._device = device
        self._ledger = ledger
        self._warnings = warnings
        self._clock = clock
        self._event_deadline_ns = event_deadline_ns
        self._max_pending = max_pending
        self._waiting: dict[TimedStreamOfDevice, deque[StageRecord]] = {}
        self.progress = Progress(clock, self._waiting)
        self._clocks: dict[int, GpuClock] = {}

    @property
    def uncertainty_ns(self) -> int | None:
        """Half the bracket of the latest anchor, the largest over the devices."""
        anchors = [clock.anchor for clock in list(self._clocks.values())]
        return max((anchor.half_ns for anchor in anchors if anchor is not None), default=None)

    @property
    def event_cost_ns(self) -> int | None:
        """What a pair of events takes of a busy GPU's time, the largest over the devices; None where unknown."""
        return max((clock.event_cost_ns for clock in list(self._clocks.values())), default=0) or None

    def oldest_ns(self) -> int | None:
        """Return when the first of those ended that wait on any stream, or None."""
        return min((waiting[0].end_ns for waiting in self._waiting.values() if waiting), default=None)

    def accept(self, records: list[StageRecord]) -> list[Row]:
        """Take records from the queue; return those that need no GPU as rows."""
        if self._all_wait(records):
            return []
        rows: list[Row] = []
        for record in records:
            if record.pair is None and record.timed_stream is CAPTURED:
                rows.append(self._without_gpu(record, "captured", _CAPTURED))
            elif record.pair is None:
                rows.append((record, 0, 0, 0, 0))
            elif self.pending >= self._max_pending:
                rows.append(self._without_gpu(record, "too_many_pending", _GIVEN_UP))
            else:
                waiting = self._waiting.get(record.timed_stream)
                if waiting is None:
                    waiting = self._waiting[record.timed_stream] = deque()
                waiting.append(record)
                self.pending += 1
        return rows

    def _all_wait(self, records: list[StageRecord]) -> bool:
        """Have records wait, in one go, if all are on one stream and there is room: the common case."""
        if len(records) > self._max_pending - self.pending:
            return False
        timed_stream = _stream_of_all(records)
        if timed_stream is None:
            return False
        self._waiting.setdefault(timed_stream, deque()).extend(records)
        self.pending += len(records)
        return True

    def clock_of(self, timed_stream: TimedStreamOfDevice) -> GpuClock | None:
        """Return the clock of a stream's device, which may be lost; None where it cannot be calibrated now."""
        return self._clocks[timed_stream.index] if self._may_tell(timed_stream) else None

    def collect(self, limit: int, *, may_ask: bool, give_up: bool) -> list[Row]:
        """
        Return at most `limit` stages whose GPU work is done.

        Args:
            limit: how many to return at most.
            may_ask: whether this thread may ask the device at all.
            give_up: whether to return stages whose work is not done as well, without GPU times.

        """
        rows: list[Row] = []
        for timed_stream, waiting in list(self._waiting.items()):
            window = min(limit - len(rows), len(waiting))
            if window <= 0:
                break
            before = len(rows)
            try:
                self._collect_stream(timed_stream, (waiting, window), rows, may_ask=may_ask, give_up=give_up)
            except BaseException as error:  # A device that raises costs GPU times, but no stage.
                self._warnings.warn("device", "asking the GPU about stages failed: %s.", shown(error))
                left = window - (len(rows) - before)
                rows += [self._without_gpu(waiting.popleft(), "device_error", _GIVEN_UP) for _ in range(left)]
            self.pending -= len(rows) - before
            if len(rows) > before and rows[-1][2]:
                self.progress.note_done(timed_stream, rows[-1][0])
            if not waiting:
                del self._waiting[timed_stream]  # A stream that is gone leaves nothing behind.
        return rows

    def _collect_stream(
        self,
        timed_stream: TimedStreamOfDevice,
        work: tuple[deque[StageRecord], int],
        rows: list[Row],
        *,
        may_ask: bool,
        give_up: bool,
    ) -> None:
        device, (waiting, window) = self._device, work
        said: str | None = PENDING
        if may_ask and self._may_tell(timed_stream):
            before = len(rows)
            said = self._ask(timed_stream, waiting, window, rows)
            window -= len(rows) - before
        for _ in range(window):
            record = waiting[0]
            state = said or device.query(record)
            row = self._resolve(record, timed_stream.index) if state == DONE else None
            if row is None and state == DONE:
                # Captured, or not queued in the order of recording: ask the record's own event.
                state = device.query(record)
                state = CAPTURED if state == DONE else state
            if row is None:
                row = self._unresolved(record, state, give_up=give_up)
            if row is None:
                return
            waiting.popleft()
            rows.append(row)

    def _may_tell(self, timed_stream: TimedStreamOfDevice) -> bool:
        """Return whether GPU times can be told now: with their places or, once the clock is lost, without."""
        return self._calibrated(timed_stream) or self._clocks[timed_stream.index].is_lost

    def _calibrated(self, timed_stream: TimedStreamOfDevice) -> bool:
        """Return whether the clock of the stream's device has an anchor, after taking a new one where that is due."""
        clock = self._clocks.setdefault(timed_stream.index, GpuClock())
        if clock.is_due(self._clock()):
            if self._device.is_capturing(timed_stream):
                return False
            before, anchor = clock.anchor, self._new_anchor(timed_stream, clock)
            if anchor is not None:
                clock.calibrate(anchor, self._device.elapsed_ms(before.event, anchor.event) if before else None)
        return clock.anchor is not None

    def _new_anchor(self, timed_stream: TimedStreamOfDevice, clock: GpuClock) -> Anchor | None:
        anchor = None
        try:
            anchor = self._device.calibrate(timed_stream, clock.anchor)
        except Exception as error:  # No events, say. Durations can be told without.
            self._warnings.warn("anchor", "reading the clock of GPU %d failed: %s.", timed_stream.index, shown(error))
        if anchor is None:
            clock.miss(self._clock())
            if clock.is_lost:
                self._warnings.warn("clock", _LOST, timed_stream.index)
        return anchor

    def _ask(
        self, timed_stream: TimedStreamOfDevice, waiting: deque[StageRecord], window: int, rows: list[Row]
    ) -> str | None:
        """
        Return what holds for all that wait, or None if each must be asked.

        The reader, where there is one, has moved those that are done to `rows` before.
        """
        device, clock = self._device, self._clocks[timed_stream.index]
        if device.reader is None:
            if device.is_capturing(timed_stream):
                return PENDING  # Asking about an event of a stream that is being captured would break the capture.
            # Work on a stream ends in order, so the newest event answers for all before it.
            if device.query(waiting[window - 1]) == DONE:
                return DONE
            self.progress.note_not_done(timed_stream)
            return None
        # Without the GIL: a copy from pageable memory holds the driver's lock, and nobody may wait for us meanwhile.
        code, done = device.reader.read(
            list(waiting if window == len(waiting) else islice(waiting, window)),
            timed_stream.context.value,
            timed_stream.raw,
            timed_stream.foreign,
            clock.anchor.event.value if clock.anchor else 0,
            _CLAMPED,
            _TRIMMED,
            *(clock.terms if clock.anchor else _NO_CLOCK),
        )
        if len(done) == len(waiting):
            waiting.clear()
        else:
            deque(map(deque.popleft, repeat(waiting, len(done))), 0)
        rows += done if clock.anchor else map(self._unplaced, done)
        if code == NOT_READY:
            self.progress.note_not_done(timed_stream)
        return PENDING if code in PENDING_CODES else None

    def _resolve(self, record: StageRecord, index: int) -> Row | None:
        clock, (start, end) = self._clocks[index], events_of(record)
        duration_ms = self._device.elapsed_ms(start, end)
        end_ms = self._device.elapsed_ms(clock.anchor.event, end) if clock.anchor else 0.0
        if duration_ms is None or end_ms is None:
            return None
        start_ns, end_ns, uncertainty_ns = (
            clock.place(end_ms, duration_ms) if clock.anchor else (-int(duration_ms * 1e6), 0, 1)
        )
        flags = 0
        early_ns = record.start_ns - start_ns
        if early_ns > 0:
            # Nothing runs before it is launched, so the launch is the better reading.
            flags = _CLAMPED if early_ns > uncertainty_ns else 0
            start_ns, end_ns = start_ns + early_ns, end_ns + early_ns
        elif clock.anchor:
            less = clock.less_events(start_ns, end_ns, uncertainty_ns, record.end_ns)
            start_ns, end_ns, flags = (start_ns, end_ns, 0) if less is None else (*less, _TRIMMED)
        self._device.give_back(record)
        row = record, start_ns, end_ns, uncertainty_ns, flags
        return row if clock.anchor else self._unplaced(row)

    def _unplaced(self, row: Row) -> Row:
        """Say of a stage that was moved to its launch how much later it may have been: until now, when it is done."""
        record, start_ns, end_ns, _, flags = row
        return record, start_ns, end_ns, max(1, self._clock() - end_ns), flags | _CLAMPED | _UNPLACED

    def _unresolved(self, record: StageRecord, state: str, *, give_up: bool) -> Row | None:
        if state == CAPTURED:
            return self._without_gpu(record, "captured", _CAPTURED)
        if state != PENDING:
            return self._without_gpu(record, "device_error", _GIVEN_UP)
        if give_up or self._clock() - record.end_ns > self._event_deadline_ns:
            return self._without_gpu(record, "given_up", _GIVEN_UP, self._clock() - record.end_ns)
        return None

    def _without_gpu(self, record: StageRecord, reason: str, flag: int, waited_ns: int = 0) -> Row:
        self._ledger.untimed(reason)
        try:
            self._device.give_back(record)
        except BaseException as error:  # The pool is one pair poorer.
            self._warnings.warn("device", "returning events failed: %s.", shown(error))
        return record, 0, 0, waited_ns, flag
