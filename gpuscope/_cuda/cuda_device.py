"""
`CudaDevice`: which of PyTorch's streams is current, event pairs recorded on it, and what the collector asks about them.

Never waits for the GPU, never creates a context, never touches a device that the program has not used itself, and never
destroys an event.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from typing import TYPE_CHECKING

from gpuscope._cuda.anchors import Anchors
from gpuscope._cuda.driver import (
    CAPTURED_EVENT,
    INVALID_HANDLE,
    INVALID_VALUE,
    NOT_READY,
    SUCCESS,
    Handle,
    load_driver,
)
from gpuscope._cuda.entry_points import EntryPoints
from gpuscope._cuda.open_streams import OpenStreams
from gpuscope._cuda.stream_sampler import StreamSampler
from gpuscope._cuda.timed_stream import FOREIGN_CAPTURERS, SHARE_NS, events_of
from gpuscope._data.batch import DeviceInfo
from gpuscope._data.interfaces import BROKEN, CAPTURED, DONE, PENDING
from gpuscope._data.native import native

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from gpuscope._cuda.driver import Driver, EventReader, Function
    from gpuscope._cuda.entry_points import Begin, End
    from gpuscope._cuda.timed_stream import TimedStream
    from gpuscope._data.interfaces import Anchor, Stream
    from gpuscope._data.record import StageRecord


_PAIR_SIZE = 4
"""What the program put in a record's place for a pair does not come into the pool."""


class CudaDevice(EntryPoints):
    """
    NVIDIA GPUs as PyTorch uses them in this process.

    The hot path does not ask for the capture state, which would cost half a microsecond each time. Recording an event
    on a stream that is being captured is harmless and adds no node. *Asking* about that event invalidates the capture,
    on whatever thread. So the collector, whose thread is in relaxed mode, asks a stream whether it is being captured
    before it asks about any event recorded on it. Once the capture is over such an event answers "invalid value", and
    its stage is exported as `gpuscope.captured`. The legacy default stream is an exception: see `FOREIGN_CAPTURERS`.

    A question about a stream that was destroyed ends the process. PyTorch never destroys a stream of its pools. Any
    other may be gone when the collector comes, which then asks about its events alone. Whether it is being captured is
    asked where a stage on it ends, and costs those stages half a microsecond.

    Args:
        count_untimed: counts a stage without GPU times, by reason.
        max_pairs: how many event pairs there may be, on all devices together.
        sample_hz: how often a second streams are asked whether they have work; 0 for never.

    """

    driver: Driver | None = None
    """None until the program has begun to use CUDA."""
    _driver: Driver
    """The same, for code that only runs after that."""
    open_streams: OpenStreams
    """From then on."""
    _is_initialized: Callable[[], bool]

    def __init__(self, count_untimed: Callable[[str], None], *, max_pairs: int, sample_hz: float = 0.0) -> None:
        super().__init__()
        self._become(self._begin_unready, self._end_never)
        self.unusable: str | None = None
        self.reader: EventReader | None = None
        self._count_untimed = count_untimed
        self._max_pairs = max_pairs
        self.sampling = StreamSampler(sample_hz)
        self._lock = threading.RLock()  # A garbage collection within may run a stage.
        self._relaxed = False

    # ---- application threads

    def _begin_unready(self, record: StageRecord, stream: Stream) -> None:
        """Until PyTorch is wholly imported."""
        cuda = getattr(sys.modules.get("torch"), "cuda", None)
        is_initialized = getattr(cuda, "is_initialized", None)
        if is_initialized is not None:
            self._is_initialized = is_initialized
            self._become(self._begin_uninitialized, self._end_never)
            self._begin_uninitialized(record, stream)

    def _begin_uninitialized(self, record: StageRecord, stream: Stream) -> None:
        """Until the program uses CUDA; in a forked child whose parent did, for ever."""
        if self._is_initialized():
            self._open(sys.modules["torch"])
            # Asking PyTorch which stream is current would itself create a context, if it is the first question.
            if self.driver is None:
                return
            if stream is not None or self.driver.is_in_use(self.open_streams.current_device()):
                self._become(*self._fast_paths(self.driver.event_record))
                self.usual[0](record, stream)

    def _open(self, torch: ModuleType) -> None:
        with self._lock:
            if self.driver is not None or self.unusable:
                return
            driver = load_driver()
            if driver is None:
                self.unusable = "the CUDA driver library can't be loaded (gpuscope needs an NVIDIA GPU)"
                self._become(self._begin_never, self._end_never)
                return
            self.sampling.open(driver)
            pairs, sampling = self._max_pairs, self.sampling
            streams = OpenStreams(driver, torch, self._count_untimed, max_pairs=pairs, sampling=sampling)
            reader = None if native is None else native.EventReader(*driver.addresses_to_read())
            anchors = Anchors(driver, reader)
            if self.driver is None:
                self.open_streams, self.reader, self._anchors = streams, reader, anchors
                # Of the two, `driver` is set last: whoever finds it finds the rest. `_driver` is what code that only
                # runs after that reads, without asking each time whether there is one.
                self._driver = driver
                self.driver = driver

    def _fast_paths(self, record_event: Function) -> tuple[Begin, End]:
        # Closures, not methods: what they need is a cell away, which saves a quarter of a microsecond per stage.
        tables, current_device = self.open_streams.tables, self.open_streams.current_device
        current_stream, only_device = self.open_streams.current_stream, len(tables) == 1
        begin_slowly, end_slowly = self._begin_slowly, self._end_slowly
        if native is not None:
            address = ctypes.cast(record_event, Handle).value
            asks = ctypes.cast(self._driver.stream_is_capturing, Handle).value
            fast = native.EventRecorder(
                address, asks, tables, current_device, current_stream, begin_slowly, end_slowly, SHARE_NS
            )
            return fast.begin, fast.end

        def begin(record: StageRecord, stream: Stream) -> None:
            if stream is None:
                index = 0 if only_device else current_device()
                timed_stream = tables[index].get(current_stream(index))
                if timed_stream is not None and timed_stream.pairs and not timed_stream.guarded:
                    record.timed_stream = timed_stream
                    record.pair = pair = timed_stream.pairs.pop()
                    if not record_event(pair[0], timed_stream.handle):
                        return
                    timed_stream.pairs.append(pair)
                    record.pair = None
            begin_slowly(record, stream)

        def end(record: StageRecord) -> None:
            timed_stream = record.timed_stream
            if timed_stream.guarded or timed_stream.foreign or record_event(record.pair[1], timed_stream.handle):
                end_slowly(record)

        return begin, end

    def _begin_never(self, record: StageRecord, stream: Stream) -> None:
        pass

    def _end_never(self, record: StageRecord) -> None:
        record.pair = None

    def _begin_slowly(self, record: StageRecord, stream: Stream) -> None:
        """The first stage of a stream, an empty pool, a thread without a context, a stream that was given."""
        timed_stream = self.open_streams.find(stream)
        if timed_stream is None or (timed_stream.guarded and self._blocked(timed_stream)):
            return
        pair = self.open_streams.take_pair(timed_stream)
        if pair is None:
            return
        if self._record_in_context(timed_stream, pair[0]):
            record.timed_stream, record.pair = timed_stream, pair
        else:
            timed_stream.pairs.append(pair)

    def _end_slowly(self, record: StageRecord) -> None:
        timed_stream, pair = record.timed_stream, record.pair
        if timed_stream.foreign and self._is_captured(timed_stream):
            self.give_back(record)
            record.timed_stream = CAPTURED
            return
        blocked = timed_stream.guarded and self._blocked(timed_stream)
        if blocked or not self._record_in_context(timed_stream, pair[1]):
            self.give_back(record)

    def give_back(self, record: StageRecord) -> None:
        """Return the pair; recording a pending event anew is allowed, so it need not have completed."""
        if native is not None:
            native.give_back(record)
            return
        pair, record.pair = record.pair, None
        if type(pair) is tuple and len(pair) == _PAIR_SIZE:
            record.timed_stream.pairs.append(pair)

    def _blocked(self, timed_stream: TimedStream) -> bool:
        # The legacy default stream can't be captured, but while any blocking stream is, recording on it would
        # invalidate that capture. This question is allowed, and is answered with an error then.
        with self._driver.current(timed_stream.context):
            if self._driver.stream_is_capturing(timed_stream.handle, ctypes.byref(ctypes.c_int())) == SUCCESS:
                return False
        self._count_untimed("foreign_capture")
        return True

    def _is_captured(self, timed_stream: TimedStream) -> bool:
        """Also true where it can't be told."""
        status = ctypes.c_int()
        with self._driver.current(timed_stream.context):
            code = self._driver.stream_is_capturing(timed_stream.handle, ctypes.byref(status))
        return code != SUCCESS or status.value != 0

    def stream_of(self, index: int) -> TimedStream | None:
        """Return the current stream of a device in use; the program must have begun to use CUDA."""
        if self.driver is None:
            self._open(sys.modules["torch"])
            if self.driver is None:
                return None
        return self.open_streams.current(index)

    def capture_of(self, timed_stream: TimedStream) -> int | None:
        """Return the driver's id of the capture that a stream takes part in, or None."""
        return self._driver.capture_of(timed_stream.handle)

    def _record_in_context(self, timed_stream: TimedStream, event: Handle) -> bool:
        """Record with the stream's context current: needed where the thread has none yet, or another device's."""
        with self._driver.current(timed_stream.context):
            if self._driver.event_record(event, timed_stream.handle) == SUCCESS:
                return True
        self._count_untimed("event_failed")
        return False

    # ---- the collector's thread

    def attach(self) -> None:
        """Relax this thread's capture mode, once, and see whether other libraries may capture."""
        if self.driver is None:
            return
        if not self._relaxed:
            self._driver.relax_capture_mode()
            self._relaxed = True
            self._millis = ctypes.c_float()
            self._millis_ref = ctypes.byref(self._millis)
        if any(name in sys.modules for name in FOREIGN_CAPTURERS):
            self.open_streams.guard_default_streams()

    def is_capturing(self, timed_stream: TimedStream) -> bool:
        """
        Also true where it can't be told: of the default stream, while some blocking stream is being captured.

        False, without a question, of a stream that may be gone: what was recorded on it was not being captured.
        """
        if not self._relaxed:
            self.attach()  # The program began to use CUDA after this pass had begun.
        # The default stream is that of the current context, and this thread has none by itself.
        self._driver.call("cuCtxSetCurrent", timed_stream.context)
        status = ctypes.c_int()
        return not timed_stream.foreign and (
            self._driver.stream_is_capturing(timed_stream.handle, ctypes.byref(status)) != SUCCESS or status.value != 0
        )

    def query(self, record: StageRecord) -> str:
        """Ask about the end event, in about 0.5 µs."""
        code = self._driver.event_query(events_of(record)[1])
        if code == SUCCESS:
            return DONE
        if code == NOT_READY:
            return PENDING
        return CAPTURED if code in (INVALID_VALUE, CAPTURED_EVENT, INVALID_HANDLE) else BROKEN

    def elapsed_ms(self, first: Handle, second: Handle) -> float | None:
        """GPU time between two completed events, in milliseconds; None if one of them was captured or is pending."""
        if self._driver.event_elapsed(self._millis_ref, first, second) != SUCCESS:
            return None
        return self._millis.value

    def calibrate(self, timed_stream: TimedStream, keep: Anchor | None) -> Anchor | None:
        """Take a new anchor on the stream's device; the event of `keep` is not recorded again."""
        return self._anchors.take(timed_stream.index, timed_stream.context, keep)

    def facts(self, index: int) -> DeviceInfo:
        """Return the name and the UUID of a device."""
        name, uuid = self._driver.device_name_and_uuid(index)
        return DeviceInfo(index, name, uuid)

    def release(self) -> None:
        """Leave to later periods what anchors were taken with. The collector's thread has ended."""
        if self.driver is not None:
            self.open_streams.release()
            self._anchors.release()

    def close(self) -> None:
        """Record nothing from now on; the end of the process frees events and contexts."""
        self._become(self._begin_never, self._end_never)
