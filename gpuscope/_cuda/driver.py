"""
The CUDA driver functions that gpuscope calls, through `ctypes`.

Handles are plain integers wrapped in `c_void_p`, never PyTorch event objects: destroying those in a forked child aborts
it, and their methods cost more and release the GIL. Nothing here creates a context.

`PyDLL` keeps the GIL during the call. That is on purpose: a pair of records costs less than half as much when several
threads record at once, and a call of about a microsecond is too short to be worth releasing it. With 16 threads of one
server (H200) stages cost 3 to 5 % of the throughput with the GIL kept, and 11 to 29 % with it released around each
record. The collector's questions are another matter: they may wait for the driver's lock, so `EventReader` asks them
without the GIL.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from typing import TYPE_CHECKING, Protocol, TypeAlias

from gpuscope._errors import DriverError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gpuscope._data.record import StageRecord

SUCCESS, INVALID_VALUE, DEINITIALIZED, INVALID_CONTEXT = 0, 1, 4, 201
INVALID_HANDLE, NOT_READY, CAPTURED_EVENT = 400, 600, 907
CAPTURING = -1
"""`EventReader`'s answer about a stream that is being captured, or may be: it asked about no event."""
PENDING_CODES = (CAPTURING, NOT_READY)
"""Answers of `EventReader` that mean: ask again later."""
CAPTURE_MODE_RELAXED = 2
_CAPTURE_ACTIVE = 1
_RECORD_EXTERNAL = 1
_SET_DEPENDENCIES = 1
_STREAM_NON_BLOCKING = 1
_FOR_GRAPHS = (
    "cuEventRecordWithFlags",
    "cuStreamGetCaptureInfo_v2",
    "cuStreamUpdateCaptureDependencies",
    "cuGraphExecEventRecordNodeSetEvent",
)
"""Since CUDA 11.4."""

Handle = ctypes.c_void_p
Function: TypeAlias = "ctypes._NamedFuncPointer"
"""A function of the driver, as `ctypes` finds it."""


class EventReader(Protocol):
    """
    Asks the driver about events without the GIL: `native.EventReader`, which has no stubs (`csrc/reader.c`).

    Events, streams and contexts are addresses. `read` and `read_replays` take what is on one stream, oldest first, and
    stop at the first that is not done; their answer is the driver's code for that one, 0 if there is none. Of a stream
    that is `foreign` nothing is asked but its events.
    """

    def read(  # noqa: PLR0917 - C takes them by their places
        self,
        records: list[StageRecord],
        context: int | None,
        stream: int,
        foreign: bool,
        anchor: int | None,
        clamped: int,
        trimmed: int,
        *terms: float,
    ) -> tuple[int, list[tuple[StageRecord, int, int, int, int]]]:
        """Return the answer, and a row for each record that is done, placed by a clock's `terms`."""

    def read_replays(
        self,
        replays: list[bytes],
        context: int | None,
        stream: int,
        foreign: bool,
        anchor: int | None,
    ) -> tuple[int, int, bytes]:
        """Return the answer, how many replays are done, and their distances in milliseconds as 32-bit floats."""

    def spacing(self, events: bytes, stream: int | None, limit_ns: int) -> tuple[float, tuple[float, ...]] | None:
        """Return nanoseconds of the host per event, and how far they are apart: ascending, ms. None if not in time."""

    def bracket(self, event: int | None, stream: int | None, limit_ns: int) -> tuple[int, int] | None:
        """Return the host's clock before and after an event; None if it did not complete in time."""


class Driver:
    """The loaded driver library. The hot functions are public attributes, because a direct call costs least."""

    def __init__(self, library: ctypes.CDLL) -> None:
        # Without `argtypes` prepared `c_void_p` objects pass straight through.
        self.event_record: Function = library.cuEventRecord
        self.event_query = library.cuEventQuery
        self.stream_is_capturing = library.cuStreamIsCapturing
        # CUDA 12.8 renamed it; the old entry point went away in 13.
        self.event_elapsed = getattr(library, "cuEventElapsedTime_v2", None) or library.cuEventElapsedTime
        self.can_time_graphs = all(hasattr(library, name) for name in _FOR_GRAPHS)
        """Whether the driver has what stages inside graphs need."""
        self._library = library

    def call(self, name: str, *arguments: object) -> None:
        """
        Call a function by name.

        Raises:
            DriverError: if its answer is not success.

        """
        self.check(name, getattr(self._library, name)(*arguments))

    @staticmethod
    def check(name: str, code: int) -> None:
        """
        Check the answer of a function.

        Raises:
            DriverError: if it is not success.

        """
        if code != SUCCESS:
            raise DriverError(name, code)

    def addresses_to_read(self) -> tuple[int, ...]:
        """Return the addresses of the functions that `native.EventReader` calls, in the order of its arguments."""
        functions = (
            self._library.cuCtxSetCurrent,
            self.stream_is_capturing,
            self.event_query,
            self.event_elapsed,
            self.event_record,
        )
        return _addresses_of(functions)

    def addresses_to_sample(self) -> tuple[int, ...]:
        """Return those that `native.StreamSampler` calls."""
        library = self._library
        exchange = library.cuThreadExchangeStreamCaptureMode
        return _addresses_of((library.cuCtxSetCurrent, exchange, self.stream_is_capturing, library.cuStreamQuery))

    def is_in_use(self, device: int) -> bool:
        """Tell whether the program has made the device's primary context active."""
        handle, flags, active = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(handle), device)
        self.call("cuDevicePrimaryCtxGetState", handle, ctypes.byref(flags), ctypes.byref(active))
        return bool(active.value)

    def active_context(self, device: int) -> Handle | None:
        """Return the device's primary context if the program has made it active, else None."""
        if not self.is_in_use(device):
            return None
        handle, context = ctypes.c_int(), Handle()
        self.call("cuDeviceGet", ctypes.byref(handle), device)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
        return context

    @contextlib.contextmanager
    def current(self, context: Handle) -> Iterator[None]:
        """Make a context current on this thread for a block. For cold paths: a generator costs microseconds."""
        self.call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self._library.cuCtxPopCurrent_v2(ctypes.byref(Handle()))

    def new_event(self) -> Handle:
        """Create a timing event in the current context."""
        event = Handle()
        self.call("cuEventCreate", ctypes.byref(event), 0)
        return event

    def new_stream(self) -> Handle:
        """
        Create a stream of the highest priority in the current context.

        It is not one of PyTorch's, because those come from a pool of 32 and are sooner or later shared with the
        application.
        """
        least, greatest, stream = ctypes.c_int(), ctypes.c_int(), Handle()
        self.call("cuCtxGetStreamPriorityRange", ctypes.byref(least), ctypes.byref(greatest))
        self.call("cuStreamCreateWithPriority", ctypes.byref(stream), _STREAM_NON_BLOCKING, greatest)
        return stream

    def relax_capture_mode(self) -> int:
        """
        Let this thread query and create events while others capture.

        In the default mode that would invalidate the capture of any thread in the process.

        Returns:
            The previous mode, for `exchange_capture_mode`.

        """
        return self.exchange_capture_mode(CAPTURE_MODE_RELAXED)

    def exchange_capture_mode(self, mode: int) -> int:
        """Set this thread's capture mode and return the previous one."""
        exchanged = ctypes.c_int(mode)
        self.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(exchanged))
        return exchanged.value

    def capture_of(self, stream: Handle) -> int | None:
        """Return the id of the capture that a stream takes part in; None if there is none or it can't be told."""
        status, ident = ctypes.c_int(), ctypes.c_ulonglong()
        code = self._library.cuStreamGetCaptureInfo_v2(
            stream, ctypes.byref(status), ctypes.byref(ident), None, None, None
        )
        return ident.value if code == SUCCESS and status.value == _CAPTURE_ACTIVE else None

    def capture_position(self, stream: Handle) -> tuple[int, ...]:
        """
        Return the addresses of the nodes that whatever is captured next on a stream will wait for.

        Raises:
            DriverError: if the driver refuses, as it does where one of them is waited for in part only, by a
                programmatic launch.

        """
        status, nodes, count = ctypes.c_int(), ctypes.POINTER(Handle)(), ctypes.c_size_t()
        arguments = (ctypes.byref(status), None, None, ctypes.byref(nodes), ctypes.byref(count))
        self.call("cuStreamGetCaptureInfo_v2", stream, *arguments)
        return tuple(nodes[i] or 0 for i in range(count.value))

    def set_capture_position(self, stream: Handle, nodes: tuple[int, ...]) -> None:
        """
        Have whatever is captured next on a stream wait for other nodes.

        Raises:
            DriverError: if the driver refuses.

        """
        name, count = "cuStreamUpdateCaptureDependencies", len(nodes)
        self.call(name, stream, (Handle * count)(*nodes), ctypes.c_size_t(count), _SET_DEPENDENCIES)

    def add_record_node(self, event: Handle, stream: Handle) -> int:
        """
        Have the graph that is being captured on a stream record an event at this place, in each of its launches.

        Until the position is set again, everything that follows waits for the new node alone.

        Returns:
            The node's address.

        Raises:
            DriverError: if the driver refuses.

        """
        self.call("cuEventRecordWithFlags", event, stream, _RECORD_EXTERNAL)
        return self.capture_position(stream)[0]

    def set_node_events(self, graph: int, nodes: Sequence[int], events: Sequence[Handle]) -> None:
        """
        Have record nodes of an executable graph record into other events, from its next launch on.

        Launches that were made before keep the events that they were given.

        Args:
            graph: the address of the executable graph.
            nodes: the addresses of its record nodes.
            events: an event for each node; what is beyond, as a fence, is not used.

        Raises:
            DriverError: if the driver refuses.

        """
        for node, event in zip(nodes, events, strict=False):
            self.call("cuGraphExecEventRecordNodeSetEvent", Handle(graph), Handle(node), event)

    @property
    def set_node_event_address(self) -> int:
        """The address of the function that exchanges the event of one node, for the parts in C."""
        return ctypes.cast(self._library.cuGraphExecEventRecordNodeSetEvent, Handle).value or 0

    def device_name_and_uuid(self, device: int) -> tuple[str, str]:
        """Return a device's name, and its UUID in NVIDIA's form."""
        handle, name, uuid = ctypes.c_int(), ctypes.create_string_buffer(256), (ctypes.c_ubyte * 16)()
        self.call("cuDeviceGet", ctypes.byref(handle), device)
        self.call("cuDeviceGetName", name, 256, handle)
        self.call("cuDeviceGetUuid_v2", uuid, handle)
        text = bytes(uuid).hex()
        parts = (text[:8], text[8:12], text[12:16], text[16:20], text[20:])
        return name.value.decode(errors="replace"), "GPU-" + "-".join(parts)


def _addresses_of(functions: tuple[Function, ...]) -> tuple[int, ...]:
    return tuple(ctypes.cast(function, Handle).value or 0 for function in functions)


def load_driver() -> Driver | None:
    """Return NVIDIA's driver, which the program has loaded already, or None where there is none."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return Driver(ctypes.PyDLL(name))
    except (OSError, AttributeError):
        return None
