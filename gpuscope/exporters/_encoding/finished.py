"""
Rows into finished spans of OpenTelemetry's SDK, as its span processors get them at the end.

Their attributes are plain dictionaries wherever that makes no difference: the SDK's own kind costs more than the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opentelemetry.attributes import BoundedAttributes
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from gpuscope._version import __version__
from gpuscope.exporters._encoding.details import links_of
from gpuscope.exporters._encoding.resource import DISTRIBUTION

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.sdk.trace import Event, ReadableSpan

    from gpuscope._data.plain.values import Clean
    from gpuscope.exporters._encoding.details import CleanDetails
    from gpuscope.exporters._encoding.rows import SpanRow
    from gpuscope.exporters._encoding.spans import SpanTemplate

_SCALARS = frozenset((str, bool, int, float))
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_CODES = (StatusCode.UNSET, StatusCode.OK, StatusCode.ERROR)
_UNSET, _NO_STATE = Status(StatusCode.UNSET), TraceState()


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """What the spans of one group share, as the SDK has it."""

    name: str
    attributes: dict[str, Any]
    remote: bool
    measured: tuple[str, ...]
    dropped: int


class SpanMaker:
    """
    Makes spans of one tracer.

    Args:
        scope: the tracer's; by default one with our name and version.

    """

    def __init__(self, scope: Any = None) -> None:
        from opentelemetry.sdk import trace
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        self.resource: Any = None
        """The provider's at this moment, with a host."""
        self._scope = scope or InstrumentationScope(DISTRIBUTION, __version__)
        self._span, self._event = trace.ReadableSpan, trace.Event

    def shared(self, template: SpanTemplate | None) -> Made | None:
        """Return what is made once for a group."""
        if template is None:
            return None
        attributes = dict(_as_the_sdk_has_them(template.attributes))
        return Made(template.name, attributes, template.remote, template.measured, template.dropped)

    def make(self, row: SpanRow[Made], details: CleanDetails | None) -> ReadableSpan:
        """Return a row's span; `details` are those of its stage, of which a GPU span has the trace's state alone."""
        shared, own = row.shared, row.details
        state = _state(details) if details is not None and details.trace_state else _NO_STATE
        parent = None
        if row.parent_id:
            parent = SpanContext(row.trace_id, row.parent_id, shared.remote, _SAMPLED, state)
        attributes: Any = dict(shared.attributes)
        dropped = shared.dropped
        if own is not None:
            attributes.update(_as_the_sdk_has_them(own.attributes))
            dropped += own.dropped.attributes
        attributes.update(zip(shared.measured, row.measured, strict=True))
        start_ns = max(1, row.start_ns)
        return self._span(
            name=shared.name,
            context=SpanContext(row.trace_id, row.span_id, is_remote=False, trace_flags=_SAMPLED, trace_state=state),
            parent=parent,
            resource=self.resource,
            attributes=_counted(attributes, dropped),
            events=() if own is None else self._events(own),
            links=() if own is None else _links(own),
            kind=SpanKind.INTERNAL,
            status=_UNSET if own is None or not own.status[0] else Status(_CODES[own.status[0]], own.status[1] or None),
            start_time=start_ns,
            end_time=max(start_ns, row.end_ns),
            instrumentation_scope=self._scope,
        )

    def _events(self, details: CleanDetails) -> Any:
        events: list[Event] = [
            self._event(name, _inner(attributes, details), max(1, at_ns)) for name, at_ns, attributes in details.events
        ]
        return _list(events, details.dropped.events)


def _links(details: CleanDetails) -> Any:
    links = [
        Link(SpanContext(trace_id, span_id, is_remote=True, trace_flags=_SAMPLED), _inner(attributes, details))
        for trace_id, span_id, attributes in links_of(details)
    ]
    return _list(links, details.dropped.links)


def _list(items: list[Any], dropped: int) -> Any:
    """Return a list of the SDK's kind where it has to say how much it has no room for."""
    if not dropped:
        return tuple(items)
    from opentelemetry.sdk.util import BoundedList

    found = BoundedList.from_seq(len(items), items)
    found.dropped = dropped
    return found


def _inner(attributes: Mapping[str, Clean], details: CleanDetails) -> BoundedAttributes:
    found = BoundedAttributes(attributes=_without_none(attributes))
    found.dropped = details.dropped_inside.get(id(attributes), 0)
    return found


def _counted(attributes: dict[str, Any], dropped: int) -> Any:
    if not dropped:
        return attributes
    found = BoundedAttributes(attributes=attributes)
    found.dropped = dropped
    return found


def _as_the_sdk_has_them(attributes: Mapping[str, Clean]) -> Mapping[str, Any]:
    """Return attributes as this version of the SDK would have taken them."""
    if all(type(value) in _SCALARS for value in attributes.values()):
        return attributes
    return BoundedAttributes(attributes=_without_none(attributes), immutable=False)


def _without_none(attributes: Mapping[str, Clean]) -> dict[str, Any]:
    return {key: value for key, value in attributes.items() if value is not None}


def _state(details: CleanDetails) -> TraceState:
    return TraceState.from_header([details.trace_state])
