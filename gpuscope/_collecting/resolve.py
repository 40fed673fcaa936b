"""
From records to rows: which stages' GPU work is done, and where in host time it lies.

Asks the device and never waits for it. A record leaves here exactly once, with GPU times or without.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

from gpuscope._cuda.clock import GpuClock
from gpuscope._cuda.driver import PENDING_CODES
from gpuscope._data.batch import RowFlag
from gpuscope._data.interfaces import CAPTURED, DONE, PENDING

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._data.interfaces import Device
    from gpuscope._data.record import StageRecord
    from gpuscope._log import WarnOnce
    from gpuscope._recording.ledger import Ledger


Row: TypeAlias = "tuple[StageRecord, int, int, int, int]"
"""One resolved stage: record, GPU start and end in host nanoseconds or 0, uncertainty, flags. Plain, for speed."""

_CAPTURED, _CLAMPED, _GIVEN_UP = int(RowFlag.CAPTURED), int(RowFlag.CLAMPED), int(RowFlag.GIVEN_UP)


class Resolver:
    """Holds the records whose events are not done yet, a deque a stream, oldest first."""

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
        self._waiting: dict[Any, deque[StageRecord]] = {}
        self._clocks: dict[int, GpuClock] = {}

    @property
    def uncertainty_ns(self) -> int | None:
        """Half the bracket of the latest anchor, the largest over the devices."""
        anchors = [clock.anchor for clock in list(self._clocks.values())]
        return max((anchor.half_ns for anchor in anchors if anchor is not None), default=None)

    def accept(self, records: list[StageRecord]) -> list[Row]:
        """Take records from the queue; return those that need no GPU as rows."""
        rows: list[Row] = []
        for record in records:
            if record.pair is None:
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

    def clock_of(self, timed_stream: Any) -> GpuClock | None:
        """Return the clock of a stream's device, or None where it can't be calibrated now."""
        return self._clocks[timed_stream.index] if self._calibrated(timed_stream) else None

    def collect(self, limit: int, *, may_ask: bool = True, give_up: bool = False) -> list[Row]:
        """
        Return at most `limit` stages whose GPU work is done.

        Args:
            limit: how many.
            may_ask: whether the device may be asked at all on this thread.
            give_up: whether to return those, too, whose work is not done, without GPU times.

        """
        rows: list[Row] = []
        for timed_stream, waiting in list(self._waiting.items()):
            window = min(limit - len(rows), len(waiting))
            if window <= 0:
                continue
            before = len(rows)
            try:
                self._collect_stream(timed_stream, (waiting, window), rows, may_ask=may_ask, give_up=give_up)
            except Exception as error:  # A device that raises costs GPU times, never stages.
                self._warnings.warn("device", "asking the GPU about stages failed: %r.", error)
                left = window - (len(rows) - before)
                rows += [self._without_gpu(waiting.popleft(), "device_error", _GIVEN_UP) for _ in range(left)]
            self.pending -= len(rows) - before
        return rows

    def _collect_stream(
        self, timed_stream: Any, work: tuple[deque[StageRecord], int], rows: list[Row], *, may_ask: bool, give_up: bool
    ) -> None:
        device, (waiting, window) = self._device, work
        said: str | None = PENDING
        if may_ask and self._calibrated(timed_stream):
            before = len(rows)
            said = self._ask(timed_stream, waiting, window, rows)
            window -= len(rows) - before
        for _ in range(window):
            record = waiting[0]
            state = said or device.query(record)
            row = self._resolve(record, timed_stream.index) if state == DONE else None
            if row is None and state == DONE:
                # Captured, or queued in another order than recorded: the record's own event tells.
                state = device.query(record)
                state = CAPTURED if state == DONE else state
            if row is None:
                row = self._unresolved(record, state, give_up=give_up)
            if row is None:
                return
            waiting.popleft()
            rows.append(row)

    def _calibrated(self, timed_stream: Any) -> bool:
        clock = self._clocks.setdefault(timed_stream.index, GpuClock())
        if clock.is_due(self._clock()):
            if self._device.is_capturing(timed_stream):
                return False
            before = clock.anchor
            anchor = self._device.calibrate(timed_stream, before)
            if anchor is not None:
                clock.calibrate(anchor, self._device.elapsed_ms(before.event, anchor.event) if before else None)
        return clock.anchor is not None

    def _ask(self, timed_stream: Any, waiting: deque[StageRecord], window: int, rows: list[Row]) -> str | None:
        """Return what is known of those that wait, or None; with the reader, after those that are done were moved."""
        device, clock = self._device, self._clocks[timed_stream.index]
        if device.reader is None or clock.anchor is None:
            if device.is_capturing(timed_stream):
                return PENDING
            # Work on a stream ends in order, so the newest answers for all before it.
            return DONE if device.query(waiting[window - 1]) == DONE else None
        code, done = device.reader.read(
            list(islice(waiting, window)),
            timed_stream.context.value,
            timed_stream.raw,
            clock.anchor.event.value,
            _CLAMPED,
            *clock.terms,
        )
        for _ in done:
            waiting.popleft()
        rows += done
        return PENDING if code in PENDING_CODES else None

    def _resolve(self, record: StageRecord, index: int) -> Row | None:
        clock, pair = self._clocks[index], record.pair
        duration_ms = self._device.elapsed_ms(pair[0], pair[1])
        end_ms = self._device.elapsed_ms(clock.anchor.event, pair[1]) if clock.anchor else None
        if duration_ms is None or end_ms is None:
            return None
        start_ns, end_ns, uncertainty_ns = clock.place(end_ms, duration_ms)
        flags = 0
        early_ns = record.start_ns - start_ns
        if early_ns > 0:
            # Nothing runs before it is launched, so the launch is the better reading of the two.
            flags = _CLAMPED if early_ns > uncertainty_ns else 0
            start_ns, end_ns = start_ns + early_ns, end_ns + early_ns
        self._device.give_back(record)
        return record, start_ns, end_ns, uncertainty_ns, flags

    def _unresolved(self, record: StageRecord, state: str, *, give_up: bool) -> Row | None:
        if state == CAPTURED:
            return self._without_gpu(record, "captured", _CAPTURED)
        if state != PENDING:
            return self._without_gpu(record, "device_error", _GIVEN_UP)
        if give_up or self._clock() - record.end_ns > self._event_deadline_ns:
            return self._without_gpu(record, "given_up", _GIVEN_UP)
        return None

    def _without_gpu(self, record: StageRecord, reason: str, flag: int) -> Row:
        self._ledger.untimed(reason)
        try:
            self._device.give_back(record)
        except Exception as error:  # The pool is one pair poorer.
            self._warnings.warn("device", "returning events failed: %r.", error)
        return record, 0, 0, 0, flag
