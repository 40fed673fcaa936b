"""
OTLP's bytes into spans of OpenTelemetry's SDK, for exporters that take nothing else.

Slow, some 50 µs per span, and only for what could not be sent as bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from opentelemetry.attributes import BoundedAttributes
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from gpuscope.exporters._encoding.otlp_message import PARENT_REMOTE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan

Message: TypeAlias = Any
"""A message of `opentelemetry-proto`, whose classes are made at run time."""

_CODES = (StatusCode.UNSET, StatusCode.OK, StatusCode.ERROR)


def readable_spans(payload: bytes, resource: Resource) -> list[ReadableSpan]:
    """Return the spans of an `ExportTraceServiceRequest`, as spans of a process with this resource."""
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    found = []
    for group in ExportTraceServiceRequest.FromString(payload).resource_spans:
        for scoped in group.scope_spans:
            scope = InstrumentationScope(scoped.scope.name, scoped.scope.version)
            found += [_readable(span, resource, scope) for span in scoped.spans]
    return found


def _readable(span: Message, resource: Resource, scope: Any) -> ReadableSpan:
    from opentelemetry.sdk.trace import Event, ReadableSpan

    context = _context(span.trace_id, span.span_id, state=span.trace_state)
    parent = None
    if span.parent_span_id:
        is_remote = bool(span.flags & PARENT_REMOTE)
        parent = _context(span.trace_id, span.parent_span_id, is_remote=is_remote, state=span.trace_state)
    return ReadableSpan(
        name=span.name,
        context=context,
        parent=parent,
        resource=resource,
        attributes=_attributes(span.attributes),
        events=[Event(event.name, _counted(event), event.time_unix_nano) for event in span.events],
        links=[Link(_context(link.trace_id, link.span_id), _counted(link)) for link in span.links],
        kind=SpanKind.INTERNAL,
        status=Status(_CODES[span.status.code], span.status.message or None),
        start_time=span.start_time_unix_nano,
        end_time=span.end_time_unix_nano,
        instrumentation_scope=scope,
    )


def _context(trace_id: bytes, span_id: bytes, *, is_remote: bool = False, state: str = "") -> SpanContext:
    return SpanContext(
        int.from_bytes(trace_id, "big"),
        int.from_bytes(span_id, "big"),
        is_remote=is_remote,
        trace_flags=TraceFlags(TraceFlags.SAMPLED),
        trace_state=TraceState.from_header([state]) if state else None,
    )


def _counted(message: Message) -> BoundedAttributes:
    """Return the attributes of an event or a link as the SDK's kind, without which older versions encode nothing."""
    found = BoundedAttributes(attributes=_attributes(message.attributes))
    found.dropped = message.dropped_attributes_count
    return found


def _attributes(pairs: Iterable[Message]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Message) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return _attributes(value.kvlist_value.values)
    return None if kind is None else getattr(value, kind)
