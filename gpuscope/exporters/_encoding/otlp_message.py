"""
OpenTelemetry's protobuf messages, made with its own classes: resources, templates and details of spans.

Every value given to it is clean. Encodes no times and no ids of spans: those are columns.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped, unused-ignore]
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.common.v1.common_pb2 import (
    AnyValue,
    ArrayValue,
    InstrumentationScope,
    KeyValue,
    KeyValueList,
)
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from gpuscope._data.plain.values import Clean
    from gpuscope.exporters._encoding.details import CleanDetails
    from gpuscope.exporters._encoding.spans import SpanTemplate

PARENT_KNOWN = 0x100
PARENT_REMOTE = 0x200
_ATTRIBUTES_CACHED, _TEXT_CACHED = 4096, 256
_GPU_BIT = 1 << 63
"""A host span's id with it is the id of its GPU span."""
_PARENT_TAG, _PARENT_BYTES, _TRACE_BYTES = 0x22, 10, 18
"""With tag and length, of the ids that a span begins with."""
_PARTIAL_SUCCESS = re.compile(rb"\x0a[\x80-\xff]*[\x00-\x7f]\x08([\x80-\xff]{0,8}[\x00-\x7f])")
"""How an answer that rejects spans begins: a message's tag and size, and the tag and value of the number."""
LINK = bytes.fromhex("6a210a1000000000000000000000000000000000120800000000000000003500010000")
"""
A link of a `Span` with ids of 0: `Link{1: trace id, 2: span id, 6: flags}` as field 13.

The flags are `PARENT_KNOWN`, which says that the span is of this process. The ids lie at `LINK_AT`.
"""
LINK_AT = 4, 12, 22
_LINK_DTYPE = np.dtype(
    {"names": ["high", "low", "span"], "formats": [">u8"] * 3, "offsets": list(LINK_AT), "itemsize": len(LINK)}
)
Fields: TypeAlias = dict[str, Any]
"""Arguments of a message by name. `Any`, because each field of a message has a type of its own."""
AttributeKey: TypeAlias = "tuple[type, str, Clean]"
"""Type, name and value of an attribute. The type is needed because 1 == True."""


def varint(value: int) -> bytes:
    """Return protobuf's variable-length form of a size."""
    out = bytearray()
    while value >> 7:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def template_bytes(template: SpanTemplate) -> bytes:
    """Return the fields of a `Span` that a whole group shares, to be joined with the bytes of the others."""
    return _serialized(
        Span(
            name=template.name,
            kind=Span.SPAN_KIND_INTERNAL,
            attributes=key_values(template.attributes),
            flags=PARENT_KNOWN | PARENT_REMOTE * template.remote,
            dropped_attributes_count=template.dropped,
        )
    )


def details_bytes(details: CleanDetails, cache: dict[AttributeKey, bytes]) -> bytes:
    """Return the fields that only one span has. They can be appended, because joined protobuf messages are merged."""
    pieces = [_attribute_bytes(key, value, cache) for key, value in details.attributes.items()]
    if details.linked is not None:
        pieces.append(_linked_bytes(details.linked))
    dropped = details.dropped
    few = details.events, details.links, details.status[0], dropped.attributes, dropped.events, dropped.links
    if any(few):
        pieces.append(_serialized(_detailed_span(details)))
    return b"".join(pieces)


def _linked_bytes(ids: NDArray[np.uint64]) -> bytes:
    """Return the links to these spans, which are of one size each."""
    cells = np.frombuffer(bytearray(LINK * len(ids)), _LINK_DTYPE)
    for place, name in enumerate(_LINK_DTYPE.names or ()):
        cells[name] = ids[:, place]
    return cells.tobytes()


def trace_state_bytes(state: str) -> bytes:
    """Return the field `trace_state` of a `Span`."""
    return _serialized(Span(trace_state=state))


def resource_bytes(attributes: Mapping[str, Clean]) -> bytes:
    """Return the field `resource` of a `ResourceSpans`."""
    body = _serialized(Resource(attributes=key_values(attributes)))
    return b"\x0a" + varint(len(body)) + body


def schema_url_bytes(url: str) -> bytes:
    """Return the field `schema_url` of a `ResourceSpans`; nothing for an empty one."""
    return b"\x1a" + varint(len(url.encode())) + url.encode() if url else b""


def scope_bytes(name: str, version: str) -> bytes:
    """Return the field `scope` of a `ScopeSpans`."""
    body = _serialized(InstrumentationScope(name=name, version=version))
    return b"\x0a" + varint(len(body)) + body


def key_values(attributes: Mapping[str, Clean]) -> list[KeyValue]:
    """Return attributes, whose values are clean, as messages."""
    return [KeyValue(key=key, value=_any(value)) for key, value in attributes.items()]


def rejected_spans(body: bytes) -> tuple[int, str]:
    """
    Return how many spans a receiver says it rejected, and its message; 0 and "" where the body does not say so.

    The answer to metrics has the same fields, so this counts rejected data points too.
    """
    try:
        partial = ExportTraceServiceResponse.FromString(body).partial_success
    except DecodeError:
        # It may be cut off, because the message is long; the number stands before that. Of anything else nothing is
        # known but the status, which said that the request was accepted.
        begins = _PARTIAL_SUCCESS.match(body)
        return sum((byte & 0x7F) << 7 * place for place, byte in enumerate(begins[1])) if begins else 0, ""
    return max(partial.rejected_spans, 0), partial.error_message


def split_stages(encoded: bytes) -> list[bytes]:
    """
    Return each stage's part of what `SpanEncoder.encode` made: one span, or its host span and its GPU span.

    Slow, and only for what an endpoint found too large.
    """
    parts: list[bytes] = []
    begin = at = 0
    last_id = -1
    while at < len(encoded):
        first, end = _bounds(encoded, at)
        # A host span without a parent begins with its trace's id.
        place = first + _TRACE_BYTES + (_PARENT_BYTES if encoded[first] == _PARENT_TAG else 0)
        span_id = int.from_bytes(encoded[place + 2 : place + 10], "big")
        if at and span_id != last_id ^ _GPU_BIT:
            parts.append(encoded[begin:at])
            begin = at
        last_id, at = span_id, end
    return [*parts, encoded[begin:]] if begin < at else parts


def _bounds(encoded: bytes, at: int) -> tuple[int, int]:
    """Return where the span whose tag is at that place begins, and where it ends."""
    size = shift = 0
    while True:
        at += 1
        size |= (encoded[at] & 0x7F) << shift
        if encoded[at] < 0x80:  # noqa: PLR2004
            return at + 1, at + 1 + size
        shift += 7


def _serialized(message: Message) -> bytes:
    return bytes(message.SerializeToString())


def _attribute_bytes(key: str, value: Clean, cache: dict[AttributeKey, bytes]) -> bytes:
    kind = type(value)
    if (kind is not str and kind is not int and kind is not bool) or (
        isinstance(value, str) and len(value) > _TEXT_CACHED
    ):
        # Floats are not cached: 0.0 equals -0.0, and NaN is never found again. Long texts would fill the memory.
        return _serialized(Span(attributes=key_values({key: value})))
    attribute = (kind, key, value)
    encoded = cache.get(attribute)
    if encoded is None:
        if len(cache) >= _ATTRIBUTES_CACHED:
            cache.clear()
        encoded = cache[attribute] = _serialized(Span(attributes=key_values({key: value})))
    return encoded


def _detailed_span(details: CleanDetails) -> Span:
    (code, description), dropped = details.status, details.dropped_inside
    return Span(
        events=[
            Span.Event(
                name=name,
                time_unix_nano=at,
                attributes=key_values(attributes),
                dropped_attributes_count=dropped.get(id(attributes), 0),
            )
            for name, at, attributes in details.events
        ],
        links=[_link(*link, dropped.get(id(link[2]), 0)) for link in details.links],
        status=Status(code=Status.StatusCode.Name(code), message=description) if code else None,
        dropped_attributes_count=details.dropped.attributes,
        dropped_events_count=details.dropped.events,
        dropped_links_count=details.dropped.links,
    )


def _link(trace_id: int, span_id: int, attributes: Mapping[str, Clean], dropped: int) -> Span.Link:
    return Span.Link(
        trace_id=trace_id.to_bytes(16, "big"),
        span_id=span_id.to_bytes(8, "big"),
        attributes=key_values(attributes),
        dropped_attributes_count=dropped,
        flags=PARENT_KNOWN,
    )


def _any(value: Clean) -> AnyValue:
    if value is None:
        return AnyValue()
    if isinstance(value, list):
        return AnyValue(array_value=ArrayValue(values=[_any(item) for item in value]))
    if isinstance(value, dict):
        return AnyValue(kvlist_value=KeyValueList(values=key_values(value)))
    chosen: Fields = {_FIELDS[type(value)]: value}
    return AnyValue(**chosen)


_FIELDS = {
    bool: "bool_value",
    int: "int_value",
    float: "double_value",
    str: "string_value",
    bytes: "bytes_value",
}
