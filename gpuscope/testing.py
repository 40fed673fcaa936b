"""
For tests, ours and yours: spans captured in memory, a fake GPU that completes work when told, a clock that you move.

Uses the same recorder, collector and batches as in production; only the parts at the edges are replaced.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from gpuscope import _runtime
from gpuscope._data.batch import DeviceInfo
from gpuscope._data.interfaces import CAPTURED, DONE, PENDING, Anchor
from gpuscope._recording.state import state
from gpuscope._settings.enabling import to_record
from gpuscope.exporters.memory import CapturedSpan, MemoryExporter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuscope._data.batch import StageBatch
    from gpuscope._data.interfaces import Stream
    from gpuscope._data.record import StageRecord
    from gpuscope._data.statistics import Delivery
    from gpuscope.analysis.recording import Recording
    from gpuscope.analysis.timeline import Timeline

__all__ = ["Captured", "CapturedSpan", "FakeDevice", "ManualClock", "capture"]


_WHATEVER_THE_ENVIRONMENT_SAYS: dict[str, object] = {
    "exporters": "none",
    "metrics": "auto",
    "interval_s": 0.005,
    "strict": True,
    "sampler": "parentbased_always_on",
    "sampler_ratio": 1.0,
    "keep": "",
    "trace_header": "",
    "gpu_spans": "work",
    "batch_spans": "all",
    "memory": False,
    "flight": "",
    "syncs": "",
    "stall": "",
    "profile": "",
    "profile_every_s": 0.0,
}
"""Where spans go, which there are, what they and responses say, and what else looks on."""


class Captured(list[CapturedSpan]):
    """The spans that `capture` recorded: a list, which a notebook draws as a timeline."""

    def __init__(self) -> None:
        super().__init__()
        self._batches: list[StageBatch] = []

    def recording(self) -> Recording:
        """Return the stages as reports see them: what `gpuscope.analysis` judges, compares and draws."""
        from gpuscope._version import __version__
        from gpuscope.analysis.read import read_lines
        from gpuscope.exporters._encoding.otlp_json import JsonEncoder
        from gpuscope.exporters._encoding.resource import resource_attributes

        encoder = JsonEncoder(resource_attributes(), __version__)
        return read_lines(encoder.encode(batch) for batch in self._batches)

    def timeline(self) -> Timeline:
        """Return the timeline of what was recorded, with the answers on top."""
        from gpuscope.analysis.timeline import Timeline

        return Timeline(self.recording())

    def _repr_html_(self) -> str:
        return self.timeline()._repr_html_()


class _KeepsBatches(MemoryExporter):
    """Keeps the batches beside the spans, since reports are made from those."""

    def __init__(self, spans: Captured) -> None:
        super().__init__(spans)
        self._batches = spans._batches  # noqa: SLF001 - of this file

    def export(self, batch: StageBatch, delivery: Delivery) -> None:
        self._batches.append(batch)
        super().export(batch, delivery)


@contextlib.contextmanager
def capture(**settings: object) -> Iterator[Captured]:
    """
    Record into a list within the block, whatever the environment says.

    In a notebook, the list as the last expression of a cell is drawn as a timeline.

    `gpuscope.flush()` fills the list, and so does the end of the block, which also puts it in the order of the starts.
    Functions that were decorated while gpuscope was off for good record nothing here either; set `GPUSCOPE=idle` for
    such tests.

    Args:
        settings: fields of `Config`, as for `gpuscope.enable`, and parts of the engine: `device` (a `FakeDevice`, for
            one), `nvtx`, `clock` (nanoseconds, monotonic; a `ManualClock`, for one), `epoch_clock` (nanoseconds since
            the epoch).

    Raises:
        TypeError: for a name that is not a setting, or is one that only a variable can set.
        ValueError: for a value that is not allowed.

    """
    spans = Captured()
    parts: dict[str, object] = {
        name: settings.pop(name) for name in ("device", "nvtx", "clock", "epoch_clock") if name in settings
    }
    parts["exporters"] = (_KeepsBatches(spans),)
    config = to_record(state.config, {**_WHATEVER_THE_ENVIRONMENT_SAYS, **settings})
    with _runtime.period(config, **cast("_runtime.Parts", parts)):
        yield spans
    spans.sort(key=lambda span: span.start_ns)


class ManualClock:
    """Nanoseconds that pass when told, and one more per reading, so that no two readings are equal."""

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
    """An event of `FakeDevice`: when the GPU gets there, and whether it has."""

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
    A GPU that finishes work when `complete` is called, and whose times lie `delay_ns` after the launch.

    A stage's `stream` may be any object with `device_index` and `cuda_stream`; the current stream is 7 of device 0.
    `lanes` has the streams by (device, stream), and shows what was recorded on each. Set `capturing` on one to have its
    stages captured.

    Args:
        clock: the clock of the launches, which has to be that of the recorder.
        delay_ns: nanoseconds from a launch to the GPU's time for it.
        completes: whether work is done at once, without `complete`.
        event_cost_ns: what a pair of events takes of the GPU's time, in nanoseconds; 0 for unknown.

    """

    reader = None

    def __init__(
        self, clock: ManualClock, *, delay_ns: int = 0, completes: bool = False, event_cost_ns: int = 0
    ) -> None:
        self.clock = clock
        self.delay_ns = delay_ns
        self.completes = completes
        self.event_cost_ns = event_cost_ns
        self.lanes: dict[tuple[int, int], FakeStream] = {}
        self.pairs_in_use = 0

    def begin(self, record: StageRecord, stream: Stream) -> None:
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
        """Let the GPU finish so many of the oldest stages of each stream, or all of them."""
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
        """Return what is known of the end event. Nobody may ask about a captured one while the capture goes on."""
        event = record.pair[1]
        if event.captured:
            if record.timed_stream.capturing:
                raise AssertionError("A captured event was asked about: that would have invalidated the capture.")
            return CAPTURED
        return DONE if event.done else PENDING

    def elapsed_ms(self, first: FakeEvent, second: FakeEvent) -> float | None:
        """Return the GPU time between two events, or None where it can't be told."""
        if first.captured or second.captured or not (first.done and second.done):
            return None
        return (second.time_ns - first.time_ns) / 1e6

    def calibrate(self, timed_stream: FakeStream, keep: Anchor | None) -> Anchor | None:  # noqa: ARG002 - all share the clock
        """Take an anchor without error."""
        before, now, after = self.clock(), self.clock(), self.clock()
        return Anchor(FakeEvent(now, done=True), now, (after - before + 1) // 2, self.event_cost_ns)

    def facts(self, index: int) -> DeviceInfo:
        """Describe the fake."""
        return DeviceInfo(index, "Fake GPU", f"GPU-00000000-0000-0000-0000-{index:012d}")

    def close(self) -> None:
        """Do nothing."""
