"""
For tests, ours and yours: capture spans in memory, a fake GPU that completes work when told, a clock that is moved.

Uses the same recorder, collector and batches as production; only the parts at the edges are other ones.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gpuscope import _runtime
from gpuscope._data.batch import DeviceInfo
from gpuscope._data.interfaces import CAPTURED, DONE, PENDING, Anchor
from gpuscope._recording.state import state
from gpuscope.exporters.memory import CapturedSpan, MemoryExporter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuscope._data.record import StageRecord

__all__ = ["CapturedSpan", "FakeDevice", "ManualClock", "capture"]


@contextlib.contextmanager
def capture(**settings: Any) -> Iterator[list[CapturedSpan]]:
    """
    Record within the block, whatever the environment says, into a list.

    The list is filled by `gpuscope.flush()` and when the block ends, ordered by start then. Functions that were
    decorated while gpuscope was off for good record nothing here either; set `GPUSCOPE=idle` for such tests.

    Args:
        settings: fields of `Config`, and parts of the engine: `device`, `nvtx`, `clock`, `epoch_clock`.

    """
    spans: list[CapturedSpan] = []
    parts = {name: settings.pop(name) for name in ("device", "nvtx", "clock", "epoch_clock") if name in settings}
    config = state.config.changed(**{"exporters": "none", "interval_s": 0.005, **settings, "mode": "on"})
    with _runtime.period(config, exporters=(MemoryExporter(spans),), **parts):
        yield spans
    spans.sort(key=lambda span: span.start_ns)


class ManualClock:
    """Nanoseconds that pass when told, and one a reading, so that no two readings are equal."""

    def __init__(self, now_ns: int = 1_000_000_000) -> None:
        self.now_ns = now_ns

    def __call__(self) -> int:
        """Read the clock."""
        self.now_ns += 1
        return self.now_ns

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now_ns += round(seconds * 1e9)


@dataclass(eq=False)
class FakeEvent:
    """An event of `FakeDevice`: when it was recorded, and whether the GPU has got there."""

    time_ns: int = 0
    done: bool = False
    captured: bool = False


@dataclass(eq=False)
class FakeStream:
    """A stream of `FakeDevice`."""

    index: int
    raw: int
    capturing: bool = False
    recorded: deque[tuple[FakeEvent, FakeEvent]] = field(default_factory=deque)


class FakeDevice:
    """
    A GPU that finishes work when `complete` is called, `delay_ns` after it was launched on a clock.

    A stage's `stream` may be any object with `device_index` and `cuda_stream`; the current one is stream 7 of
    device 0. `lanes` shows what was recorded; set `capturing` on one to have its stages captured.
    """

    reader = None

    def __init__(self, clock: ManualClock, *, delay_ns: int = 0, completes: bool = False) -> None:
        self.clock = clock
        self.delay_ns = delay_ns
        self.completes = completes
        self.lanes: dict[tuple[int, int], FakeStream] = {}
        self.pairs_in_use = 0

    def begin(self, record: StageRecord, stream: Any) -> None:
        """Record the start event."""
        key = (0, 7) if stream is None else (stream.device_index, stream.cuda_stream)
        timed_stream = self.lanes.setdefault(key, FakeStream(*key))
        record.timed_stream, record.pair = timed_stream, (FakeEvent(), FakeEvent())
        self.pairs_in_use += 1
        self._record(record.pair[0], timed_stream)

    def end(self, record: StageRecord) -> None:
        """Record the end event."""
        self._record(record.pair[1], record.timed_stream)
        record.timed_stream.recorded.append(record.pair)

    def _record(self, event: FakeEvent, timed_stream: FakeStream) -> None:
        event.time_ns, event.captured, event.done = self.clock() + self.delay_ns, timed_stream.capturing, self.completes

    def complete(self, stages: int | None = None) -> None:
        """Let the GPU finish the oldest stages of each stream; all of them by default."""
        for timed_stream in self.lanes.values():
            for _ in range(len(timed_stream.recorded) if stages is None else min(stages, len(timed_stream.recorded))):
                for event in timed_stream.recorded.popleft():
                    event.done = True

    def give_back(self, record: StageRecord) -> None:
        """Take the pair back."""
        if record.pair is not None:
            record.pair = None
            self.pairs_in_use -= 1

    def attach(self) -> None:
        """Do nothing."""

    def is_capturing(self, timed_stream: FakeStream) -> bool:
        """Tell what the test set."""
        return timed_stream.capturing

    def query(self, record: StageRecord) -> str:
        """Tell about the end event; asking about a captured one during the capture is what must never happen."""
        event = record.pair[1]
        if event.captured:
            if record.timed_stream.capturing:
                raise AssertionError("A captured event was asked about: that would have invalidated the capture.")
            return CAPTURED
        return DONE if event.done else PENDING

    def elapsed_ms(self, first: FakeEvent, second: FakeEvent) -> float | None:
        """GPU time between two events."""
        if first.captured or second.captured or not (first.done and second.done):
            return None
        return (second.time_ns - first.time_ns) / 1e6

    def calibrate(self, timed_stream: FakeStream, keep: Anchor | None) -> Anchor | None:  # noqa: ARG002 - all share the clock
        """Take an anchor without error."""
        before, now, after = self.clock(), self.clock(), self.clock()
        return Anchor(FakeEvent(now, done=True), now, (after - before + 1) // 2)

    def facts(self, index: int) -> DeviceInfo:
        """Describe the fake."""
        return DeviceInfo(index, "Fake GPU", f"GPU-00000000-0000-0000-0000-{index:012d}")

    def close(self) -> None:
        """Do nothing."""
