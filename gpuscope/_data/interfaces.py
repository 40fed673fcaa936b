"""
What a recorder holds, as interfaces: the GPUs, the queue, the account, and the doors to NVTX and OpenTelemetry.

Nothing here acts. A stage's way from `stage()` to its exporter goes through here. `import gpuscope` does not import it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from gpuscope._data.member_interfaces import MemberBridge

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable, Iterator

    from gpuscope._data.batch import DeviceInfo, SpanDetails
    from gpuscope._data.flight import Flight
    from gpuscope._data.record import FromAbove, LazySpan, Site, StageRecord
    from gpuscope._data.wall_clock import WallClock

Event: TypeAlias = Any
"""A CUDA event as its device knows it. Each device has a class of its own, and nobody else looks inside."""
TimedStreamOfDevice: TypeAlias = Any
"""A stream as its device knows it, with `index` and `raw`. Each device has a class of its own here, too."""
Provider: TypeAlias = "FromAbove"
"""The application's TracerProvider; this room does not import OpenTelemetry."""
Identity: TypeAlias = "tuple[int, int, int, bool]"
"""Trace id, span id, parent's span id or 0, and whether the stage is exported."""

DONE, PENDING, CAPTURED, BROKEN = "done", "pending", "captured", "broken"


class GivenStream(Protocol):
    """What a program gives as `stream=`, as a `torch.cuda.Stream` is."""

    @property
    def cuda_stream(self) -> int:
        """The stream's address, 0 for the default stream."""

    @property
    def device_index(self) -> int:
        """The index of its GPU."""


Stream: TypeAlias = "GivenStream | None"
"""The stream whose work is to be timed; None is the one that is current on the calling thread."""


@dataclass(frozen=True, slots=True)
class Anchor:
    """The event completed at `host_ns`, plus or minus `half_ns`. A pair takes `event_cost_ns`, 0 if unknown."""

    event: Event
    host_ns: int
    half_ns: int
    event_cost_ns: int = 0


class Device(Protocol):
    """What the hot path and the collector need of GPUs. `gpuscope.testing.FakeDevice` is another one."""

    begin: Callable[[StageRecord, Stream], None]
    """Record the start event on the stream: sets `timed_stream` and `pair`, or neither."""

    end: Callable[[StageRecord], None]
    """Record the end event. Where that fails `pair` is None then, and `timed_stream` `CAPTURED` if the stream was."""

    def give_back(self, record: StageRecord) -> None:
        """Return a record's events to the pool."""

    def attach(self) -> None:
        """Prepare the collector's thread for one pass."""

    def is_capturing(self, timed_stream: TimedStreamOfDevice) -> bool:
        """Tell whether the stream is being captured. If so, none of its events may be asked about yet."""

    def query(self, record: StageRecord) -> str:
        """Return what is known of the end event: DONE, PENDING, CAPTURED or BROKEN."""

    reader: Any
    """The device's `EventReader` of `native`, which asks about many events at once, or None. `native` has no stubs."""

    def elapsed_ms(self, first: Event, second: Event) -> float | None:
        """Return the GPU time between two completed events, or None if one of them can't be timed."""

    def calibrate(self, timed_stream: TimedStreamOfDevice, keep: Anchor | None) -> Anchor | None:
        """Take a new anchor on the stream's device. It uses another event than the anchor `keep` does."""

    def facts(self, index: int) -> DeviceInfo:
        """Describe a device."""

    def close(self) -> None:
        """Record nothing any more. The child after a fork calls this too, so it must not touch CUDA."""


class Queue(Protocol):
    """
    Takes records from application threads: `_recording.queue.RecordQueue`.

    Until the first record, `_collecting.engine.StartingQueue` stands in its place.
    """

    def put(self, record: StageRecord) -> bool:
        """Take the record and return True, or count a refusal and return False."""


class Account(Protocol):
    """Counts what failed on application threads, and stages in captures: `_recording.ledger.Ledger`."""

    def untimed(self, reason: str, stages: int = 1) -> None:
        """Count stages that go out without GPU times although a GPU is in use."""

    def fail(self, reason: str) -> None:
        """Count a stage that never reached the queue."""

    def refuse(self, reason: str, stages: int) -> None:
        """Count stages that will never reach the collector."""

    def graph_stage(self, reason: str, stages: int = 1) -> None:
        """Count stages in a capture by what comes of them in replays."""


class ReplaySink(Protocol):
    """Takes the replays of CUDA graphs with stages inside: `_cuda.graphs.replay.ReplayQueue`."""

    @property
    def stages(self) -> int:
        """The stages inside the replays that wait."""

    @property
    def refused(self) -> int:
        """How many stages it has refused since the start."""

    def put(self, held: list[FromAbove]) -> None:
        """Take the replay that is in a list after a None."""

    def drain(self) -> list[FromAbove]:
        """Remove and return all replays, oldest first."""

    def give_up(self) -> int:
        """Remove all replays, unread, and return how many stages are inside them."""


class Captures(Protocol):
    """The captures of CUDA graphs that are going on: `_cuda.graphs.capture.OpenCaptures`."""

    @property
    def device(self) -> FromAbove:
        """The `CudaDevice` whose streams are captured."""

    @property
    def ledger(self) -> Account:
        """Counts what became of stages inside captures."""

    @property
    def inline(self) -> bool:
        """Whether record nodes stand in line with those of the program."""

    def open(self, ident: int, capture: FromAbove) -> None:
        """Take notice of stages on the streams of a capture that has begun; the driver knows it by `ident`."""

    def close(self, ident: int) -> None:
        """Take notice of no more."""

    def includes(self, timed_stream: TimedStreamOfDevice) -> bool:
        """Tell whether a stream takes part in a capture."""


class Nvtx(Protocol):
    """Opens and closes NVTX ranges: `_recording.nvtx.Nvtx`, or what a deep look puts in its place for a while."""

    def begin(self, site: Site, suspends: int) -> object:
        """Open a range and return what `end` takes."""

    def end(self, opened: object) -> None:
        """Close a range, which only whoever opened it can read."""


class Judgement(Protocol):
    """What is known of the application's provider: `_otel.stock.Judgement`."""

    @property
    def targets(self) -> tuple[object, ...]:
        """Exporters of the application's that bytes may go through; none where spans have to be made one by one."""

    @property
    def takes_finished(self) -> bool:
        """Whether its span processors may get spans that are made at their end."""

    @property
    def reason(self) -> str:
        """Why they have to be made at all."""


class Bridge(MemberBridge, Protocol):
    """The recording side's door to OpenTelemetry: `_otel.bridge.Bridge`."""

    sdk: bool
    """Whether the application's provider makes the ids."""
    offset_ns: int | None
    """Epoch less the records' clock, once the collector has read both."""
    wall: WallClock | None
    """What the collector read them with."""
    visible: bool
    """Whether stages stand in the application's context."""

    @property
    def look_for_provider(self) -> Callable[[], object]:
        """Returns something if there is a provider, else None; cheap enough for the hot path."""

    @property
    def current_context(self) -> Callable[[], object]:
        """Returns the application's context, which is false where it holds nothing."""

    @property
    def provider(self) -> Provider | None:
        """The application's TracerProvider."""

    def judgement(self, *, anew: bool = False) -> Judgement:
        """Return what is known of the provider, the same object as long as that is the same; `anew` looks again."""

    def keeps_roots(self) -> bool:
        """Return whether the sampler whose decision it is keeps every trace that begins in this process."""

    def load_sampler(self) -> None:
        """Make the environment's sampler before a stage has to wait for that."""

    def watch_provider(self, before_its_end: Callable[[], bool]) -> None:
        """Have something called before the application ends or flushes its provider, where stages go there."""

    def enter(self, record: StageRecord) -> None:
        """Find the stage's parent, and put the stage's lazy span into the application's context."""

    def leave(self, record: StageRecord) -> None:
        """Put the context back as it was at entry, whatever was put into it since."""

    def leave_behind(self, record: StageRecord) -> None:
        """Take the stage, which has ended elsewhere, out of the current context."""

    def leave_elsewhere(self, record: StageRecord) -> None:
        """Take the stage out of a context that is not the one it was put into."""

    def lazy(self, record: StageRecord) -> LazySpan:
        """Return the stage's lazy span."""

    def details(self, record: StageRecord) -> SpanDetails | None:
        """Return what only few stages have, or None."""

    def identify(self, record: StageRecord) -> Identity:
        """Settle a stage that has ended, and let go of the context that it ran in."""

    def settle(self, record: StageRecord) -> tuple[int, int, bool]:
        """Return trace id, span id and whether the stage is exported; the stage may still run."""

    def retire(self) -> None:
        """Settle nothing more."""


class RecorderFields:
    """The fields that the hot path reads, in slots; `Recorder` fills and changes them. `native` has a twin."""

    __slots__ = (
        "bridge",
        "capacity",
        "clock",
        "current_context",
        "device",
        "flight",
        "ledger",
        "look_for_provider",
        "nvtx",
        "paused",
        "queue",
        "random_bits",
        "span_ids",
        "waiting",
    )
    bridge: Bridge | None
    """None until OpenTelemetry is imported."""
    capacity: int
    """Of `waiting`, without `put`; 0 until the first record has started the collector: see `_recording.queue`."""
    clock: Callable[[], int]
    current_context: Callable[[], object] | None
    """The bridge's, once there is one."""
    device: Device
    flight: Flight | None
    ledger: Account
    look_for_provider: Callable[[], object] | None
    """The bridge's, once there is one."""
    nvtx: Nvtx | None
    """None where no tool listens. A deep look stands here while it is on (`_profiling.session.NvtxTap`)."""
    paused: bool
    """Whether it is not, or no longer, what new stages are recorded by. A block that is entered late asks for that."""
    queue: Queue
    random_bits: Callable[[int], int]
    span_ids: Iterator[int]
    waiting: deque[StageRecord]
    """The queue's own deque, to which the hot path appends while there is room: see `_recording.queue`."""
