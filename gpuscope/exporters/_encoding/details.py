"""
What one span has that others have not: its run's attributes, events, links, status and error, all clean.

Knows OpenTelemetry's conventions for them, and no format.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gpuscope._data.attributes import (
    BATCH_BASIS,
    BATCH_SIZE,
    ERROR_TYPE,
    EXCEPTION_MESSAGE,
    EXCEPTION_STACKTRACE,
    EXCEPTION_TYPE,
    OURS,
)
from gpuscope._data.plain.values import as_text, clean_mapping
from gpuscope._data.record import ExceptionInfo
from gpuscope.exporters._encoding.source_lines import stacktrace

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from gpuscope._data.batch import MemberLinks, SpanDetails
    from gpuscope._data.plain.values import Clean

_OK, _ERROR = 1, 2
_STATUS = {"UNSET": 0, "OK": _OK, "ERROR": _ERROR}


@dataclass(slots=True)
class Dropped:
    """How much a span has no room for, by OpenTelemetry's limits."""

    attributes: int = 0
    events: int = 0
    links: int = 0


@dataclass(slots=True)
class CleanDetails:
    """A row's `SpanDetails` in clean form: what one span has besides its group's `SpanTemplate`."""

    attributes: dict[str, Clean] = field(default_factory=dict)
    events: list[tuple[str, int, dict[str, Clean]]] = field(default_factory=list)
    """(name, nanoseconds since the epoch, attributes)."""
    links: list[tuple[int, int, dict[str, Clean]]] = field(default_factory=list)
    """(trace id, span id, attributes)."""
    dropped_inside: dict[int, int] = field(default_factory=dict)
    """How many attributes an event or a link has no room for, by the `id` of its attributes."""
    status: tuple[int, str] = (0, "")
    """OTLP's code (0 unset, 1 OK, 2 error), and the description."""
    error: ExceptionInfo | None = None
    linked: NDArray[np.uint64] | None = None
    """Of a batch: the spans of its members, to which it links as well, whatever the limits; as in `MemberLinks`."""
    trace_state: str = ""
    """Of the whole trace, as in the header `tracestate`."""
    dropped: Dropped = field(default_factory=Dropped)


def clean_details(details: SpanDetails, end_ns: int) -> CleanDetails:
    """Return a row's details in clean form; `end_ns` is when its exception, if any, left the stage."""
    attributes = clean_mapping(details.attributes or {})
    for name in OURS.intersection(attributes):
        del attributes[name]
    clean = CleanDetails(attributes, trace_state=as_text(details.trace_state or ""))
    clean.dropped.events, clean.dropped.links = details.dropped
    if details.status is not None:
        code, description = details.status
        clean.status = _STATUS.get(code, 0), as_text(description or "") if code == "ERROR" else ""
    elif (
        ERROR_TYPE in attributes
    ):  # As of a response of 500 or more. OpenTelemetry: then the status should be an error.
        clean.status = _ERROR, ""
    if details.events:
        clean.events = [(as_text(name), _time(at), _of_event(values or {})) for name, at, values in details.events]
    if details.links:
        clean.links = [(trace_id, span_id, clean_mapping(values or {})) for trace_id, span_id, values in details.links]
    if details.error is not None:
        _add_error(clean, details.error, end_ns)
    return clean


def link_members(clean: CleanDetails, linked: MemberLinks) -> None:
    """Add what is said of a batch, for which there is always room."""
    clean.attributes[BATCH_SIZE], clean.attributes[BATCH_BASIS] = linked.size, as_text(linked.basis)
    clean.linked = linked.ids


def links_of(details: CleanDetails) -> list[tuple[int, int, dict[str, Clean]]]:
    """Return all links of a span, those to the members of a batch included: trace id, span id, attributes."""
    if details.linked is None:
        return details.links
    return details.links + [(high << 64 | low, span_id, {}) for high, low, span_id in details.linked.tolist()]


def _of_event(values: Mapping[str, object]) -> dict[str, Clean]:
    trace = values.get(EXCEPTION_STACKTRACE)
    if isinstance(trace, ExceptionInfo):  # Of `record_exception`.
        values = {**values, EXCEPTION_STACKTRACE: stacktrace(trace)}
    return clean_mapping(values)


def _add_error(clean: CleanDetails, error: ExceptionInfo, end_ns: int) -> None:
    """Add what the SDK adds when an exception leaves a span."""
    kind, message = as_text(error.type), as_text(error.message)
    clean.error = error
    clean.attributes.setdefault(ERROR_TYPE, kind)
    trace = as_text(stacktrace(error))
    values: dict[str, Clean] = {EXCEPTION_TYPE: kind, EXCEPTION_MESSAGE: message, EXCEPTION_STACKTRACE: trace}
    clean.events.append(("exception", end_ns, values))
    # OpenTelemetry: a status of OK is final.
    if clean.status[0] != _OK:
        clean.status = _ERROR, f"{kind.rpartition('.')[2]}: {message}"


def _time(at: int) -> int:
    """Return a time that fits OTLP's unsigned 64 bits; the application chose it, so at run time it may be anything."""
    try:
        return min(max(int(at), 0), 2**64 - 1)
    except (TypeError, ValueError, OverflowError):
        return 0
