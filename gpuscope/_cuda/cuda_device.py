"""
The recording side's only door to PyTorch and CUDA: current stream, event pairs; and the collector's questions to them.

Never waits for the GPU, never creates a context, never touches a device that the program has not used itself, never
destroys an event.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from typing import TYPE_CHECKING, Any, TypeAlias

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
from gpuscope._data.batch import DeviceInfo
from gpuscope._data.interfaces import BROKEN, CAPTURED, DONE, PENDING
from gpuscope._data.native import TimedStreamFields, native

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._cuda.entry_points import Begin, End
    from gpuscope._data.interfaces import Anchor
    from gpuscope._data.record import StageRecord

Pair: TypeAlias = "tuple[Handle, Handle, int | None, int | None]"
"""The start and the end event, and the addresses of both: what `ctypes` takes, and what `native` does."""

_PAIRS_AT_ONCE = 16
_FOREIGN_CAPTURERS = (
    "cupy",
    "cuda.bindings.runtime",
    "cuda.cudart",
    "numba.cuda",
    "onnxruntime",
    "pycuda",
    "tensorrt",
    "torch_tensorrt",
)
"""Libraries that may capture a graph on a blocking stream, which PyTorch never does by itself."""


class TimedStream(TimedStreamFields):
    """A stream of a device, and the pool of event pairs that it draws on."""

    __slots__ = ()

    def __init__(self, index: int, raw: int, context: Handle, pairs: list[Pair]) -> None:
        self.index = index
        self.raw = raw
        self.handle = Handle(raw)
        self.context = context
        self.pairs = pairs
        self.guarded = False
        """Whether recording needs a question first: see `_FOREIGN_CAPTURERS`."""


class CudaDevice(EntryPoints):
    """
    NVIDIA GPUs as PyTorch uses them in this process.

    The hot path asks for no capture state, which costs half a microsecond a call. Recording an event on a stream that
    is being captured is harmless and adds no node; what would invalidate the capture is to *ask* about that event.
    So the collector asks a stream whether it is being captured before it asks about any event recorded on it, and once
    the capture is over such an event answers "invalid value", which tells that it was captured.
    """

    def __init__(self, count_untimed: Callable[[str], None], *, max_pairs: int) -> None:
        self._become(self._begin_unready, self._end_never)
        self.unusable: str | None = None
        self.reader: Any = None
        self._is_initialized: Any = None
        self._count_untimed = count_untimed
        self._max_pairs = max_pairs
        self._lock = threading.Lock()
        self._streams: list[dict[int, TimedStream]] = []
        self._contexts: dict[int, tuple[Handle, list[Pair]]] = {}
        self._pairs_made = 0
        self._relaxed = False
        self.driver: Any = None

    # ---- application threads

    def _begin_unready(self, record: StageRecord, stream: Any) -> None:
        """Until PyTorch is imported whole."""
        cuda = getattr(sys.modules.get("torch"), "cuda", None)
        self._is_initialized = getattr(cuda, "is_initialized", None)
        if self._is_initialized is not None:
            self._become(self._begin_uninitialized, self._end_never)
            self._begin_uninitialized(record, stream)

    def _begin_uninitialized(self, record: StageRecord, stream: Any) -> None:
        """Until the program uses CUDA; in a forked child whose parent did, for ever."""
        if self._is_initialized():
            self._open(sys.modules["torch"])
            # PyTorch's answer to what stream is current would itself create a context, if it is the first question.
            if self.driver is not None and (stream is not None or self.driver.is_in_use(self._current_device())):
                self._become(*self._fast_paths(self.driver.event_record))
                self.usual[0](record, stream)

    def _open(self, torch: Any) -> None:
        with self._lock:
            if self.driver is not None or self.unusable:
                return
            driver = load_driver()
            if driver is None:
                self.unusable = "the CUDA driver library can't be loaded (gpuscope needs an NVIDIA GPU)"
                self._become(self._begin_never, self._end_never)
                return
            count = torch.cuda.device_count()
            self._streams = [{} for _ in range(count)]
            self._current_device = getattr(torch._C, "_cuda_getDevice", None) or torch.cuda.current_device
            self._current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
                lambda index: torch.cuda.current_stream(index).cuda_stream
            )
            self.reader = None if native is None else native.EventReader(*driver.addresses_to_read())
            self._anchors = Anchors(driver, self.reader)
            self.driver = driver

    def _fast_paths(self, record_event: Any) -> tuple[Begin, End]:
        # Closures, not methods: what they need is a cell away, which makes up for a quarter of a microsecond a stage.
        tables, current_device, current_stream = self._streams, self._current_device, self._current_stream
        begin_slowly, end_slowly, only_device = self._begin_slowly, self._end_slowly, len(self._streams) == 1
        if native is not None:
            address = ctypes.cast(record_event, Handle).value
            fast = native.EventRecorder(address, tables, current_device, current_stream, begin_slowly, end_slowly)
            return fast.begin, fast.end

        def begin(record: StageRecord, stream: Any) -> None:
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
            if timed_stream.guarded or record_event(record.pair[1], timed_stream.handle):
                end_slowly(record)

        return begin, end

    def _begin_never(self, record: StageRecord, stream: Any) -> None:
        pass

    def _end_never(self, record: StageRecord) -> None:
        record.pair = None

    def _begin_slowly(self, record: StageRecord, stream: Any) -> None:
        """The first stage of a stream, an empty pool, a thread without a context, a stream that was given."""
        if stream is None:
            index = self._current_device()
            raw = self._current_stream(index)
        else:
            index, raw = stream.device_index, stream.cuda_stream
        timed_stream = self._streams[index].get(raw) or self._open_stream(index, raw)
        if timed_stream is None or (timed_stream.guarded and self._blocked(timed_stream)):
            return
        pair = timed_stream.pairs.pop() if timed_stream.pairs else self._make_pairs(timed_stream)
        if pair is None:
            return
        if self._record_in_context(timed_stream, pair[0]):
            record.timed_stream, record.pair = timed_stream, pair
        else:
            timed_stream.pairs.append(pair)

    def _end_slowly(self, record: StageRecord) -> None:
        timed_stream, pair = record.timed_stream, record.pair
        if (timed_stream.guarded and self._blocked(timed_stream)) or not self._record_in_context(timed_stream, pair[1]):
            record.pair = None
            timed_stream.pairs.append(pair)

    def give_back(self, record: StageRecord) -> None:
        """Return the pair; recording a pending event anew is allowed, so it need not have completed."""
        pair, record.pair = record.pair, None
        if pair is not None:
            record.timed_stream.pairs.append(pair)

    def _blocked(self, timed_stream: TimedStream) -> bool:
        # The legacy default stream can't be captured, but while any blocking stream is, recording on it would
        # invalidate that capture. This question is allowed, and is answered with an error then.
        with self.driver.current(timed_stream.context):
            if self.driver.stream_is_capturing(timed_stream.handle, ctypes.byref(ctypes.c_int())) == SUCCESS:
                return False
        self._count_untimed("foreign_capture")
        return True

    def _open_stream(self, index: int, raw: int) -> TimedStream | None:
        with self._lock:
            if index not in self._contexts:
                context = self.driver.active_context(index)
                if context is None:
                    self._count_untimed("device_not_in_use")
                    return None
                self._contexts[index] = (context, [])
            return self._streams[index].setdefault(raw, TimedStream(index, raw, *self._contexts[index]))

    def stream_of(self, index: int) -> TimedStream | None:
        """Return what is current on a device in use, of a program that has begun to use CUDA."""
        if self.driver is None:
            self._open(sys.modules["torch"])
            if self.driver is None:
                return None
        raw = self._current_stream(index)
        return self._streams[index].get(raw) or self._open_stream(index, raw)

    def _make_pairs(self, timed_stream: TimedStream) -> Pair | None:
        with self._lock:
            if self._pairs_made >= self._max_pairs:
                self._count_untimed("no_free_events")
                return None
            self._pairs_made += _PAIRS_AT_ONCE
        with self.driver.current(timed_stream.context):
            events = [(self.driver.new_event(), self.driver.new_event()) for _ in range(_PAIRS_AT_ONCE)]
        new = [(start, end, start.value, end.value) for start, end in events]
        pair = new.pop()
        timed_stream.pairs.extend(new)
        return pair

    def _record_in_context(self, timed_stream: TimedStream, event: Handle) -> bool:
        """Record with the stream's context current: needed where the thread has none yet, or another device's."""
        with self.driver.current(timed_stream.context):
            if self.driver.event_record(event, timed_stream.handle) == SUCCESS:
                return True
        self._count_untimed("event_failed")
        return False

    # ---- the collector's thread

    def attach(self) -> None:
        """Relax this thread's capture mode, once, and look which other libraries may capture."""
        if self.driver is None:
            return
        if not self._relaxed:
            self.driver.relax_capture_mode()
            self._relaxed = True
            self._millis = ctypes.c_float()
            self._millis_ref = ctypes.byref(self._millis)
        if any(name in sys.modules for name in _FOREIGN_CAPTURERS):
            for table in self._streams:
                if 0 in table:
                    table[0].guarded = True

    def is_capturing(self, timed_stream: TimedStream) -> bool:
        """Also true where it can't be told: the default stream, while some blocking stream is captured."""
        if not self._relaxed:
            self.attach()  # The program began to use CUDA after this pass had begun.
        # The default stream is that of the current context, and this thread has none by itself.
        self.driver.call("cuCtxSetCurrent", timed_stream.context)
        status = ctypes.c_int()
        return (
            self.driver.stream_is_capturing(timed_stream.handle, ctypes.byref(status)) != SUCCESS or status.value != 0
        )

    def query(self, record: StageRecord) -> str:
        """Ask about the end event, in about 0.5 µs."""
        code = self.driver.event_query(record.pair[1])
        if code == SUCCESS:
            return DONE
        if code == NOT_READY:
            return PENDING
        return CAPTURED if code in (INVALID_VALUE, CAPTURED_EVENT, INVALID_HANDLE) else BROKEN

    def elapsed_ms(self, first: Handle, second: Handle) -> float | None:
        """GPU time between two completed events; None if one of them was captured, or is pending."""
        if self.driver.event_elapsed(self._millis_ref, first, second) != SUCCESS:
            return None
        return self._millis.value

    def calibrate(self, timed_stream: TimedStream, keep: Anchor | None) -> Anchor | None:
        """Take a new anchor on the stream's device, with another event than that of the one to keep."""
        return self._anchors.take(timed_stream.index, timed_stream.context, keep)

    def facts(self, index: int) -> DeviceInfo:
        """Name and UUID of a device."""
        name, uuid = self.driver.device_name_and_uuid(index)
        return DeviceInfo(index, name, uuid)

    def close(self) -> None:
        """Record nothing from now on; events and contexts are left to the end of the process."""
        self._become(self._begin_never, self._end_never)
