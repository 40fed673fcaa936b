"""
What a recorder holds, as interfaces: the GPUs, the queue, the account, and the doors to NVTX and OpenTelemetry.

Interfaces and the words of their answers; nothing here acts. Whoever follows a stage from `stage()` to its exporter
goes through here. `import gpuscope` does not import it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable, Iterator

    from gpuscope._data.batch import DeviceInfo, SpanDetails
    from gpuscope._data.record import Site, StageRecord
    from gpuscope._data.wall_clock import WallClock

Event: TypeAlias = Any
"""A CUDA event as its device knows it. `Any`, because nobody but that device looks inside."""
Stream: TypeAlias = Any
"""What a program gives as `stream=`: any object with `cuda_stream` and `device_index`, as `torch.cuda.Stream` is."""
TimedStreamOfDevice: TypeAlias = Any
"""A stream as its device knows it, with `index` and `raw`. `Any`, because each device has a class of its own."""
Identity: TypeAlias = "tuple[int, int, int, bool]"
"""Trace id, span id, parent's span id or 0, and whether the stage is exported."""

DONE, PENDING, CAPTURED, BROKEN = "done", "pending", "captured", "broken"


@dataclass(frozen=True, slots=True)
class Anchor:
    """One paired reading of the host and GPU clocks: the event completed at `host_ns`, plus or minus `half_ns`."""

    event: Event
    host_ns: int
    half_ns: int


class Device(Protocol):
    """What the hot path and the collector need of GPUs. `gpuscope.testing.FakeDevice` is another one."""

    begin: Callable[[StageRecord, Stream], None]
    """Record the start event on the given stream or the current one: sets `timed_stream` and `pair`, or neither."""

    end: Callable[[StageRecord], None]
    """Record the end event, or take `pair` away."""

    def give_back(self, record: StageRecord) -> None:
        """Return a record's events to the pool."""

    def attach(self) -> None:
        """Prepare the collector's thread for one pass."""

    def is_capturing(self, timed_stream: TimedStreamOfDevice) -> bool:
        """Tell whether the stream is being captured: then none of its events may be asked about."""

    def query(self, record: StageRecord) -> str:
        """Tell about the end event: DONE, PENDING, CAPTURED or BROKEN."""

    reader: Any
    """An `EventReader` of `native`, which does what the next four do, or None. C has no stubs, hence `Any`."""

    def elapsed_ms(self, first: Event, second: Event) -> float | None:
        """GPU time between two completed events; None if one of them can't be timed."""

    def calibrate(self, timed_stream: TimedStreamOfDevice, keep: Anchor | None) -> Anchor | None:
        """Take a new anchor on the stream's device, with another event than that of the one to keep."""

    def facts(self, index: int) -> DeviceInfo:
        """Describe a device."""

    def close(self) -> None:
        """Record nothing any more. Also for the child after a fork, where CUDA must not be touched."""


class Queue(Protocol):
    """Takes records from application threads: `_recording.queue.RecordQueue`, and what stands there until it starts."""

    def put(self, record: StageRecord) -> bool:
        """Take the record and return True, or count a refusal and return False."""


class Account(Protocol):
    """Counts what failed on application threads: `_recording.ledger.Ledger`."""

    def untimed(self, reason: str, stages: int = 1) -> None:
        """Count stages that go out without GPU times though a GPU is in use."""

    def fail(self, reason: str) -> None:
        """Count a stage that never reached the queue."""

    def refuse(self, reason: str, stages: int) -> None:
        """Count stages that are never to reach the collector."""


class Nvtx(Protocol):
    """Opens and closes NVTX ranges: `_recording.nvtx.Nvtx`, or what a deep look puts in front of it for a while."""

    def begin(self, site: Site, suspends: int) -> object:
        """Open a range and return what `end` takes."""

    def end(self, opened: Any) -> None:
        """Close a range. `Any`: only who opened it knows what it is."""


class Bridge(Protocol):
    """
    The recording side's door to OpenTelemetry: `_otel.bridge.Bridge`.

    Spans, contexts and providers are `Any` here, because this room does not import OpenTelemetry.
    """

    sdk: bool
    """Whether the application's provider makes the ids."""
    offset_ns: int | None
    """Epoch less the records' clock, once the collector has read both."""
    wall: WallClock | None
    """What the collector read them with."""
    visible: bool
    """Whether stages stand in the application's context."""
    look_for_provider: Callable[[], Any]
    """Returns what tells that there is a provider, or None; cheap enough for the hot path."""
    current_context: Callable[[], Any]
    """Returns the application's context, false where it holds nothing."""

    @property
    def provider(self) -> Any:
        """The application's TracerProvider, or None."""

    def enter(self, record: StageRecord) -> None:
        """Find the stage's parent, and stand in the context for it."""

    def leave(self, record: StageRecord) -> None:
        """Put the context back as it was at entry."""

    def lazy(self, record: StageRecord) -> Any:
        """Return the stage's lazy span."""

    def details(self, record: StageRecord) -> SpanDetails | None:
        """Return what few stages have."""

    def identify(self, record: StageRecord) -> Identity:
        """Settle a stage that has ended, and let go of the context that it ran in."""

    def settle(self, record: StageRecord) -> tuple[int, int, bool]:
        """Return trace id, span id and whether it is exported, of a stage that may still run."""

    def retire(self) -> None:
        """Settle nothing more."""


class RecorderFields:
    """What recording needs, in slots: of a `Recorder`, which fills and changes it. `native` has a twin."""

    __slots__ = (
        "bridge",
        "capacity",
        "clock",
        "current_context",
        "device",
        "ledger",
        "look_for_provider",
        "nvtx",
        "queue",
        "random_bits",
        "span_ids",
        "waiting",
    )
    bridge: Bridge | None
    """Once OpenTelemetry is imported."""
    capacity: int
    """Of `waiting`; 0 until the first record has started the collector."""
    clock: Callable[[], int]
    current_context: Callable[[], Any] | None
    """The bridge's, once there is one."""
    device: Device
    ledger: Account
    look_for_provider: Callable[[], Any] | None
    """The bridge's, once there is one."""
    nvtx: Nvtx | None
    """None where no tool listens. A deep look stands here while it is on (`_profiling.session.NvtxTap`)."""
    queue: Queue
    random_bits: Callable[[int], int]
    span_ids: Iterator[int]
    waiting: deque[StageRecord]
    """The queue's own, to which the hot path appends while there is room; empty for good until the collector runs."""
