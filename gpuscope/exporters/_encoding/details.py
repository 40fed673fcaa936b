"""
What one span has that others have not: its run's attributes, events, links, status and error, all clean.

Knows OpenTelemetry's conventions for them, and no format.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gpuscope._data.attributes import EXCEPTION_MESSAGE, EXCEPTION_STACKTRACE, EXCEPTION_TYPE, OURS
from gpuscope._data.values import as_text, clean_mapping

if TYPE_CHECKING:
    from gpuscope._data.batch import SpanDetails
    from gpuscope._data.record import ExceptionInfo

_OK, _ERROR = 1, 2
_STATUS = {"UNSET": 0, "OK": _OK, "ERROR": _ERROR}


@dataclass(slots=True)
class CleanDetails:
    """What one span has besides its group's facts; all values are clean."""

    attributes: dict[str, Any] = field(default_factory=dict)
    events: list[tuple[str, int, dict[str, Any]]] = field(default_factory=list)
    links: list[tuple[int, int, dict[str, Any]]] = field(default_factory=list)
    status: tuple[int, str] = (0, "")
    error: ExceptionInfo | None = None


def clean_details(details: SpanDetails, end_ns: int) -> CleanDetails:
    """Return a row's details in clean form; `end_ns` is when its exception, if any, left the stage."""
    attributes = clean_mapping(details.attributes or {})
    for name in OURS.intersection(attributes):
        del attributes[name]
    extra = CleanDetails(attributes)
    if details.status is not None:
        code, description = details.status
        extra.status = _STATUS.get(code, 0), as_text(description or "") if code == "ERROR" else ""
    if details.events:
        extra.events = [(as_text(name), _time(at), clean_mapping(values or {})) for name, at, values in details.events]
    if details.links:
        extra.links = [(trace_id, span_id, clean_mapping(values or {})) for trace_id, span_id, values in details.links]
    if details.error is not None:
        _add_error(extra, details.error, end_ns)
    return extra


def _add_error(extra: CleanDetails, error: ExceptionInfo, end_ns: int) -> None:
    """Add what the SDK adds when an exception leaves a span."""
    kind, message = as_text(error.type), as_text(error.message)
    extra.error = error
    extra.attributes.setdefault("error.type", kind)
    frames = "".join(f'  File "{file}", line {line}, in {function}\n' for file, line, function in error.frames)
    stacktrace = as_text(f"Traceback (most recent call last):\n{frames}{kind}: {message}\n")
    values = {EXCEPTION_TYPE: kind, EXCEPTION_MESSAGE: message, EXCEPTION_STACKTRACE: stacktrace}
    extra.events.append(("exception", end_ns, values))
    # OpenTelemetry: a status of OK is final.
    if extra.status[0] != _OK:
        extra.status = _ERROR, f"{kind}: {message}"


def _time(at: Any) -> int:
    """Return a time that fits OTLP's unsigned 64 bits; the application chose it, so it may be anything."""
    try:
        return min(max(int(at), 0), 2**64 - 1)
    except (TypeError, ValueError, OverflowError):
        return 0
