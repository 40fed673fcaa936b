"""
Lines of OTLP JSON into stages: each stage's host span and its GPU span, by the id of the host span.

Never raises on what a line says: what cannot be read is counted and skipped. Knows no files, and relates no stage to
another.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from gpuscope._data.attributes import (
    CLAMPED,
    CLOCK_UNCERTAINTY,
    CUDA_STREAM,
    DEVICE_INDEX,
    FILE,
    FLAGS,
    FUNCTION,
    GPU_HAD_WORK,
    GPU_SAMPLES,
    GRAPH,
    HOST_DURATION,
    HOST_NAME,
    HW_ID,
    HW_MODEL,
    HW_NAME,
    HW_TYPE,
    HW_VENDOR,
    LAUNCH_TO_START,
    LINE,
    OURS,
    PROCESS_PID,
    SERVICE_INSTANCE_ID,
    SERVICE_NAME,
    SHARED,
    STAGE,
    THREAD_ID,
    THREAD_NAME,
    TRIMMED,
)
from gpuscope._data.batch import RowFlag
from gpuscope.analysis._reading.gpus import GpuSums
from gpuscope.analysis._reading.light import LightSpans
from gpuscope.analysis._reading.looks import LookSums
from gpuscope.analysis._reading.losses import Account
from gpuscope.analysis._reading.otlp_values import MALFORMED, hex_id, plain, plain_attributes
from gpuscope.analysis._reading.stalls import StallEvents
from gpuscope.analysis.recording import Stream, Thread

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from gpuscope.analysis._reading.otlp_values import Json, JsonObject

T = TypeVar("T")

SCOPE = "gpuscope"
SpanKey = tuple[str, str]
"""Trace id and span id, hexadecimal."""

_ERROR = 2
"""`STATUS_CODE_ERROR`."""
_PARENT_REMOTE = 0x200
"""`SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK`."""
_END_OF_TIME = 2**63
_MANY = 2**31
_ROUNDING = 1e-6
"""By so much a share may be outside of 0 to 1: what passed the file may have kept it in fewer digits."""
_FLAGS = {name: flag for flag, name in FLAGS.items()}
_NOT_THE_APPLICATIONS = OURS | {THREAD_ID, THREAD_NAME, FUNCTION, FILE, LINE}
_STAGE = (STAGE, THREAD_ID, THREAD_NAME)
_STREAM = (CUDA_STREAM, DEVICE_INDEX, HW_MODEL, HW_ID)
_STREAM_BEFORE = (CUDA_STREAM, DEVICE_INDEX, HW_NAME, HW_ID)
"""The same in files of earlier versions."""
_NOT_OF_GRAPHS = {
    CLAMPED,
    TRIMMED,
    CLOCK_UNCERTAINTY,
    GPU_HAD_WORK,
    GPU_SAMPLES,
    HW_TYPE,
    HW_VENDOR,
    *_STREAM,
    *_STREAM_BEFORE,
}
"""Ours as well, on the one span of a stage inside a graph, which is a GPU span."""
_NOTHING: JsonObject = {}
_IDENTITY = (SERVICE_NAME, SERVICE_INSTANCE_ID, HOST_NAME, PROCESS_PID)


class Numbers(NamedTuple):
    """What a host span tells, as numbers: the columns of a recording that come from it."""

    stage: int
    thread: int
    start_ns: int
    end_ns: int
    flags: int
    error: bool


class HostPart(NamedTuple):
    """A stage as its host span tells it."""

    key: SpanKey
    parent: str
    """Span id of the parent, or empty."""
    numbers: Numbers


class GpuPart(NamedTuple):
    """A stage as its GPU span tells it."""

    stream: int
    start_ns: int
    end_ns: int
    uncertainty_ns: int
    flags: int
    samples: int
    had_work: int


class Lines:
    """What all lines held. `stage`, `thread` and `stream` of a part are places in the tables here."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.processes: dict[Hashable, tuple[int, dict[str, object]]] = {}
        """Number and resource attributes, by what identifies a process."""
        self.threads: dict[Thread, int] = {}
        self.streams: dict[Stream, int] = {}
        self.host: dict[SpanKey, HostPart] = {}
        self.gpu: dict[SpanKey, GpuPart] = {}
        """By the key of the host span."""
        self.attributes: dict[SpanKey, dict[str, object]] = {}
        self.light = LightSpans()
        self.account = Account()
        self.gpus, self.looks = GpuSums(), LookSums()
        self.skipped: Counter[str] = Counter()
        self.stalls = StallEvents(self.skipped)
        self._known: dict[tuple[object, ...], tuple[int, ...]] = {}

    def add(self, line: bytes) -> None:
        """Take one line. A stage that is there already, from a copy of a file, is not taken again."""
        if not line.strip():
            return
        try:
            request = json.loads(line)
        except MALFORMED:
            self.skipped[_fault(line)] += 1
            return
        if not isinstance(request, dict) or not request.keys() & {"resourceSpans", "resourceMetrics"}:
            self.skipped["foreign"] += 1
            return
        try:
            self._add_spans(request.get("resourceSpans", ()))
            self._add_metrics(request.get("resourceMetrics", ()))
        except MALFORMED:
            self.skipped["malformed"] += 1

    def _add_spans(self, resources: list[JsonObject]) -> None:
        for process, span in self._ours(resources, "scopeSpans", "spans"):
            try:
                self._add_span(process, span)
            except MALFORMED:
                self.skipped["malformed spans"] += 1

    def _add_metrics(self, resources: list[JsonObject]) -> None:
        for process, metric in self._ours(resources, "scopeMetrics", "metrics"):
            for each in (self.account, self.gpus, self.looks):
                each.add(process, metric)

    def _ours(self, resources: list[JsonObject], scopes: str, items: str) -> Iterator[tuple[int, JsonObject]]:
        """Yield (number of the process, span or metric) for those of our scope; count the spans of other scopes."""
        for resource in resources:
            for scope in resource[scopes]:
                if scope.get("scope", {}).get("name") == SCOPE:
                    process = self._process(resource)
                    for item in scope[items]:
                        yield process, item
                elif items == "spans":
                    self.skipped["foreign spans"] += len(scope[items])

    def _process(self, resource: JsonObject) -> int:
        attributes = plain_attributes(resource.get("resource", {}).get("attributes", []))
        # As text: an attribute may be a list.
        key = tuple(str(attributes.get(name)) for name in _IDENTITY)
        return self.processes.setdefault(key, (len(self.processes), attributes))[0]

    def _add_span(self, process: int, span: JsonObject) -> None:
        values = {each["key"]: each["value"] for each in span["attributes"]}
        if SHARED in values:  # The light span of a batch in a member's trace, which is not a stage.
            self.light.add(span, values)
            return
        if HOST_DURATION in values:
            self._add_host(process, span, values)
        else:
            self._add_gpu(process, span, values)

    def _add_host(self, process: int, span: JsonObject, values: JsonObject) -> None:
        key = hex_id(span["traceId"], 32), hex_id(span["spanId"], 16)
        if key in self.host:
            return
        self._take_host(process, span, values, key)

    def _take_host(self, process: int, span: JsonObject, values: JsonObject, key: SpanKey) -> None:
        start_ns, end_ns = _interval(span)
        if GRAPH in values:
            # A stage inside a graph has no host span: all that the host did was to launch the graph.
            start_ns = end_ns = start_ns - round(plain(values[LAUNCH_TO_START]) * 1e9)
            if not 0 < start_ns < _END_OF_TIME:
                raise ValueError(start_ns)
        flags = _flags(values) | (RowFlag.REMOTE_PARENT if span.get("flags", 0) & _PARENT_REMOTE else 0)
        failed = "status" in span and span["status"].get("code") == _ERROR
        parent = hex_id(span["parentSpanId"], 16) if span.get("parentSpanId") else ""
        own = {name: plain(values[name]) for name in values.keys() - _NOT_THE_APPLICATIONS - _NOT_OF_GRAPHS}
        stage, thread = self._numbers(process, values, _STAGE, self._stage_and_thread)
        self.host[key] = HostPart(key, parent, Numbers(stage, thread, start_ns, end_ns, flags, failed))
        self.light.link(key, span, values)
        if "events" in span:
            self.stalls.add(key, span)
        if own:
            self.attributes[key] = own

    def _add_gpu(self, process: int, span: JsonObject, values: JsonObject) -> None:
        start_ns, end_ns = _interval(span)
        uncertainty_ns = round(plain(values[CLOCK_UNCERTAINTY]) * 1e9)
        if not 0 <= uncertainty_ns < _END_OF_TIME:
            raise ValueError(uncertainty_ns)
        names = _STREAM if HW_MODEL in values else _STREAM_BEFORE
        (stream,) = self._numbers(process, values, names, self._stream)
        key = span["traceId"], span["parentSpanId"]
        if GRAPH in values:
            key = hex_id(span["traceId"], 32), hex_id(span["spanId"], 16)
            if key not in self.host:
                self._take_host(process, span, values, key)
        self.gpu[key] = GpuPart(stream, start_ns, end_ns, uncertainty_ns, _flags(values), *_answers(values))

    def _numbers(
        self, process: int, values: JsonObject, names: tuple[str, ...], make: Callable[..., tuple[int, ...]]
    ) -> tuple[int, ...]:
        """Return places in the tables, worked out once for equal attributes: nearly all spans repeat earlier ones."""
        key = process, *[tuple(values.get(name, _NOTHING).values()) for name in names]
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = make(process, *[plain(values.get(name, _NOTHING)) for name in names])
        return found

    def _stage_and_thread(self, process: int, stage: object, ident: Json, name: object) -> tuple[int, int]:
        if not isinstance(stage, str):
            raise TypeError(stage)
        return _number(stage, self.names), _number(Thread(process, int(ident), str(name)), self.threads)

    def _stream(self, process: int, handle: Json, device: Json, name: object, uuid: object) -> tuple[int]:
        stream = Stream(process, int(device), str(name or ""), str(uuid or ""), int(handle))
        return (_number(stream, self.streams),)


def _number(key: T, table: dict[T, int]) -> int:
    return table.setdefault(key, len(table))


def _fault(line: bytes) -> str:
    """Return why a line is not JSON: it was cut short or changed, or it never was ours."""
    if not line.startswith(b"{"):
        return "foreign"
    return "malformed" if line.endswith((b"}\n", b"}\r\n")) else "truncated"


def _interval(span: JsonObject) -> tuple[int, int]:
    start_ns, end_ns = int(span["startTimeUnixNano"]), int(span["endTimeUnixNano"])
    if not 0 < start_ns <= end_ns < _END_OF_TIME:
        raise ValueError(start_ns, end_ns)
    return start_ns, end_ns


def _answers(values: JsonObject) -> tuple[int, int]:
    """Return how often the stream was asked for work during the stage, and how often it had some."""
    if GPU_SAMPLES not in values:
        return 0, 0
    samples, share = int(plain(values[GPU_SAMPLES])), float(plain(values[GPU_HAD_WORK]))
    if not 0 <= samples < _MANY or not -_ROUNDING <= share <= 1 + _ROUNDING:
        raise ValueError(samples, share)
    return samples, min(samples, max(0, round(samples * share)))


def _flags(values: JsonObject) -> int:
    if _FLAGS.keys().isdisjoint(values):
        return 0
    return sum(flag for name, flag in _FLAGS.items() if name in values and plain(values[name]) is True)
