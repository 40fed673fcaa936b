"""
Lines of the `file` exporter, as the bytes that `otlp` would have sent of the same stages.

Ids, times, attributes, events, links, status, resource and scope are those of the line. Never fails on what a line
says: what cannot be read is counted and skipped. Sends nothing and reads no files.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from gpuscope._data.attributes import GPU_DURATION, GPU_SHARE, GRAPH, HOST_DURATION, LAUNCH_TO_START, SHARED, TRIMMED
from gpuscope._data.batch import NO_WORK_NS, NO_WORK_TRIMMED_NS
from gpuscope._data.plain.values import as_text
from gpuscope.exporters._encoding.details import CleanDetails, Dropped
from gpuscope.exporters._encoding.otlp_message import (
    PARENT_REMOTE,
    details_bytes,
    template_bytes,
    trace_state_bytes,
    varint,
)
from gpuscope.exporters._encoding.resource import DISTRIBUTION
from gpuscope.exporters._encoding.spans import SpanTemplate
from gpuscope.exporters.otlp import Envelope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gpuscope._data.plain.values import Clean
    from gpuscope.exporters._encoding.otlp_message import AttributeKey

Json: TypeAlias = Any
"""What `json.loads` returned. `Any`, because its shape has not been checked: whoever reads it catches `_MALFORMED`."""

_MALFORMED = (AttributeError, LookupError, TypeError, ValueError, OverflowError, RecursionError)
_TRACE_BYTES, _SPAN_BYTES = 16, 8
_OF_GPU_PART = (GPU_DURATION, LAUNCH_TO_START, GPU_SHARE)
"""What a host span says only if it has a GPU span."""
_CACHED = 4096


class Part(NamedTuple):
    """Spans of one process, encoded."""

    envelope: Envelope
    body: bytes
    """As `SpanEncoder` would have made it: the GPU span of a stage follows its host span."""
    stages: int
    spans: int


class RecordedLines:
    """
    Encodes lines, and remembers what it encoded. For one thread only.

    Args:
        every_gpu_span: whether stages without work on the GPU keep their GPU span, as in the file; `otlp` sends none.

    """

    def __init__(self, *, every_gpu_span: bool) -> None:
        self.skipped: Counter[str] = Counter()
        """What could not be read, by reason: lines and, as `malformed spans`, spans."""
        self._every_gpu_span = every_gpu_span
        self._envelopes: dict[str, Envelope] = {}
        """By the text of resource and scope: one for each process."""
        self._shared: dict[tuple[str, bool, bool], bytes] = {}
        self._attributes: dict[AttributeKey, bytes] = {}

    @property
    def processes(self) -> int:
        """How many different processes there were."""
        return len(self._envelopes)

    def parts(self, line: bytes) -> list[Part]:
        """Return the spans of one line by process; none of a line that has the account of stages, or is empty."""
        if not line.strip():
            return []
        try:
            request = json.loads(line)
        except _MALFORMED:
            self.skipped[_fault(line)] += 1
            return []
        if not isinstance(request, dict) or not request.keys() & {"resourceSpans", "resourceMetrics"}:
            self.skipped["foreign"] += 1
            return []
        try:
            return list(self._parts(request.get("resourceSpans", [])))
        except _MALFORMED:
            self.skipped["malformed"] += 1
            return []

    def _parts(self, resources: Json) -> Iterator[Part]:
        for resource in resources:
            for scope in resource["scopeSpans"]:
                spans = scope["spans"]
                if scope.get("scope", {}).get("name") != DISTRIBUTION:
                    self.skipped["foreign spans"] += len(spans)
                    continue
                envelope = self._envelope(resource, scope["scope"])
                idle = set() if self._every_gpu_span else _without_work(spans)
                encoded: list[bytes] = []
                stages = 0
                for span in spans:
                    keys = _keys(span)
                    if _is_gpu_part(keys) and span.get("parentSpanId") in idle:
                        continue
                    if body := self._encoded(span, has_gpu=span.get("spanId") not in idle):
                        encoded.append(b"\x12" + varint(len(body)) + body)
                        stages += not (_is_gpu_part(keys) or SHARED in keys)
                if encoded:
                    yield Part(envelope, b"".join(encoded), stages, len(encoded))

    def _envelope(self, resource: Json, scope: Json) -> Envelope:
        said = resource.get("resource", {}).get("attributes", [])
        schema_url = as_text(resource.get("schemaUrl", ""))
        version = as_text(scope.get("version", ""))
        key = json.dumps([said, version, schema_url])
        if key not in self._envelopes:
            self._envelopes[key] = Envelope(_clean_attributes(said), version, schema_url)
        return self._envelopes[key]

    def _encoded(self, span: Json, *, has_gpu: bool) -> bytes:
        """Return a span without its tag and size, or nothing where that cannot be read."""
        try:
            return self._head(span) + self._rest(span, has_gpu=has_gpu)
        except _MALFORMED:
            self.skipped["malformed spans"] += 1
            return b""

    def _head(self, span: Json) -> bytes:
        """Return what `split_stages` expects in this order: the parent, if any, the ids, and the times."""
        parent = span.get("parentSpanId")
        start_ns, end_ns = (int(span[name]).to_bytes(8, "little") for name in ("startTimeUnixNano", "endTimeUnixNano"))
        ids = b"\x0a\x10" + _id(span["traceId"], _TRACE_BYTES) + b"\x12\x08" + _id(span["spanId"], _SPAN_BYTES)
        before = b"\x22\x08" + _id(parent, _SPAN_BYTES) if parent else b""
        return before + ids + b"\x39" + start_ns + b"\x41" + end_ns

    def _rest(self, span: Json, *, has_gpu: bool) -> bytes:
        attributes = _clean_attributes(span["attributes"])
        if not has_gpu:
            for name in _OF_GPU_PART:
                attributes.pop(name, None)
        status = span.get("status", {})
        details = CleanDetails(
            attributes=attributes,
            events=[
                (as_text(each["name"]), int(each["timeUnixNano"]), _clean_attributes(each.get("attributes", [])))
                for each in span.get("events", ())
            ],
            links=[
                (int(each["traceId"], 16), int(each["spanId"], 16), _clean_attributes(each.get("attributes", [])))
                for each in span.get("links", ())
            ],
            status=(status.get("code", 0), as_text(status.get("message", ""))),
            dropped=Dropped(
                *(span.get(f"dropped{what}Count", 0) for what in ("Attributes", "Events", "Links")),
            ),
        )
        state = span.get("traceState")
        return (
            self._template(span)
            + (trace_state_bytes(as_text(state)) if state else b"")
            + details_bytes(details, self._attributes)
        )

    def _template(self, span: Json) -> bytes:
        key = as_text(span["name"]), bool(span.get("parentSpanId")), bool(span.get("flags", 0) & PARENT_REMOTE)
        if key not in self._shared:
            if len(self._shared) >= _CACHED:
                self._shared.clear()
            name, child, remote = key
            template = SpanTemplate(name=name, attributes={}, child=child, remote=remote, measured=())
            self._shared[key] = template_bytes(template)
        return self._shared[key]


def _fault(line: bytes) -> str:
    """Return why a line is not JSON: it was cut short or changed, or it never was ours."""
    if not line.startswith(b"{"):
        return "foreign"
    return "malformed" if line.endswith((b"}\n", b"}\r\n")) else "truncated"


def _keys(span: Json) -> set[str]:
    try:
        return {each["key"] for each in span["attributes"]}
    except _MALFORMED:
        return set()


def _is_gpu_part(keys: set[str]) -> bool:
    """Whether a span is the second one of its stage."""
    return GPU_DURATION in keys and HOST_DURATION not in keys and GRAPH not in keys


def _without_work(spans: Json) -> set[str]:
    """Return the ids of the host spans of those stages that `otlp` gives no GPU span."""
    found = set()
    for span in spans:
        keys = _keys(span)
        if _is_gpu_part(keys):
            try:
                limit_ns = NO_WORK_TRIMMED_NS if TRIMMED in keys else NO_WORK_NS
                if int(span["endTimeUnixNano"]) - int(span["startTimeUnixNano"]) <= limit_ns:
                    found.add(span["parentSpanId"])
            except _MALFORMED:
                continue  # It will be counted where it is encoded.
    return found


def _id(text: str, size: int) -> bytes:
    value = bytes.fromhex(text)
    if len(value) != size:
        raise ValueError(text)
    return value


def _clean_attributes(attributes: Json) -> dict[str, Clean]:
    return {as_text(each["key"]): _clean(each["value"]) for each in attributes}


def _clean(value: Json) -> Clean:
    for kind, held in value.items():
        return _KINDS[kind](held)
    return None


_KINDS: dict[str, Callable[[Json], Clean]] = {
    "stringValue": as_text,
    "intValue": int,
    "doubleValue": float,
    "boolValue": bool,
    "bytesValue": base64.b64decode,
    "arrayValue": lambda held: [_clean(each) for each in held.get("values", ())],
    "kvlistValue": lambda held: _clean_attributes(held.get("values", ())),
}
