"""
`TimedStream`: a stream that stages are timed on, and the event pairs that they borrow.

Data and nothing else: `CudaDevice` makes pairs and records them; the collector gives them back.
"""

from __future__ import annotations

from typing import TypeAlias

from gpuscope._cuda.driver import Handle
from gpuscope._data.native import StageRecord, TimedStreamFields, native

Pair: TypeAlias = "tuple[Handle, Handle, int | None, int | None]"
"""
The start and the end event, and the addresses of both: what `ctypes` takes, and what `native` takes.

With the parts in C it is an `EventPair`, which has these and counts who holds it: neighbouring stages share an event.
"""


def new_pair(start: Handle, end: Handle) -> Pair:
    """Return two events as a pair that nobody holds yet."""
    pair = start, end, start.value, end.value
    return pair if native is None else native.EventPair(*pair)


def events_of(record: StageRecord) -> tuple[Handle, Handle]:
    """Return a record's start and end event, which may be those of stages next to it."""
    if native is None or not isinstance(record, StageRecord):
        return record.pair[0], record.pair[1]
    return native.events_of(record)  # type: ignore[no-any-return]


def stream_of_all(records: list[StageRecord]) -> TimedStreamFields | None:
    """Return the stream that all records were timed on; None if some were not, or on another."""
    streams = {record.timed_stream if record.pair is not None else None for record in records}
    return streams.pop() if len(streams) == 1 else None


SHARE_NS = 800
"""
A stage shares an event where less time has passed since it was recorded, not counting what was spent in gpuscope.

Nothing takes less to enqueue: on an H100 an event takes 1.35 µs and more, a memset or a launch from C longer. Where
events take longer the time is longer, up to twice as much: `csrc/events.c`.
"""

FOREIGN_CAPTURERS = (
    "cupy",
    "cuda.bindings.runtime",
    "cuda.cudart",
    "numba.cuda",
    "onnxruntime",
    "pycuda",
    "tensorrt",
    "torch_tensorrt",
)
"""
Libraries that may capture a graph on a blocking stream, which PyTorch never does by itself.

While such a capture is open, even recording on the legacy default stream would break it. Where one of these is loaded,
recording there is preceded by a question, which costs half a microsecond.
"""


class TimedStream(TimedStreamFields):
    """
    A stream of a device, and the pool of event pairs that it draws on.

    Args:
        index: the device's.
        raw: the stream's address; 0 is the legacy default stream.
        context: the device's primary context.
        pairs: the pool, shared by all streams of the context.
        foreign: whether it may be destroyed, as streams of other libraries may; those of PyTorch's pools never are.

    """

    __slots__ = ()

    def __init__(self, index: int, raw: int, context: Handle, pairs: list[Pair], *, foreign: bool = False) -> None:
        self.index = index
        self.raw = raw
        self.handle = Handle(raw)
        self.context = context
        self.pairs = pairs
        self.foreign = foreign
        self.guarded = False
        """Whether recording needs a question first: see `FOREIGN_CAPTURERS`."""
