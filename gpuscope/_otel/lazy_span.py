"""
`LazySpan`: what stands for a running stage in the application's OpenTelemetry context.

Makes no ids and no spans: it asks its source, once somebody asks it. Is not the stage's context manager, since
applications write `with trace.get_current_span():`; nothing that they call on it ends the stage.
"""

from __future__ import annotations

import traceback
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from opentelemetry.trace import Span, Status, StatusCode

from gpuscope._data.attributes import EXCEPTION_MESSAGE, EXCEPTION_STACKTRACE, EXCEPTION_TYPE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.context import Context
    from opentelemetry.trace import SpanContext

    from gpuscope._data.record import StageRecord

_LIMIT = 128
"""Events, and links, kept a stage, the latest: the SDK's default limits."""


class RealSpan(NamedTuple):
    """The span that the application's provider made for a stage."""

    span: Span
    parent_context: Context
    """What it was started in: baggage and all, for its GPU child."""
    start_ns: int


@dataclass(slots=True, eq=False)
class Notes:
    """What the application said to the current span, besides attributes."""

    name: str | None = None
    status: tuple[str, str | None] | None = None
    events: deque[tuple[str, int, Mapping[str, Any]]] = field(default_factory=lambda: deque(maxlen=_LIMIT))
    links: deque[tuple[int, int, Mapping[str, Any]]] = field(default_factory=lambda: deque(maxlen=_LIMIT))


class Source(Protocol):
    """Who knows the ids."""

    def context_of(self, lazy: LazySpan) -> SpanContext:
        """Settle the span's ids if that can be, and return them."""

    def seen_by(self, record: StageRecord) -> Span:
        """Return the application's span above the stage."""

    def now_ns(self, record: StageRecord) -> int:
        """Return the time since the epoch, as the stage's own times are placed."""


class LazySpan(Span):
    """
    A stage as the application's code sees it through `trace.get_current_span()`.

    Args:
        source: decides the ids when they are first asked for.
        record: the stage.

    """

    # Defaults of the class and no slots: one is made on every entry of a stage, and pays for two stores.
    _attached: Context | None = None
    """The context that it was put into, while that may be current."""
    _context: SpanContext | None = None
    """The ids, once settled; they never change then."""
    _real: RealSpan | None = None
    _notes: Notes | None = None

    def __init__(self, source: Source, record: StageRecord) -> None:
        self._source = source
        self._record = record

    def get_span_context(self) -> SpanContext:
        """Return the ids of the stage's host span."""
        return self._context or self._source.context_of(self)

    @property
    def context(self) -> SpanContext:
        """The ids; not in the API, but in every span of the SDK and much used."""
        return self.get_span_context()

    def is_recording(self) -> bool:
        """Return False after the stage, and in a trace that is known not to be sampled."""
        if self._record.end_ns:
            return False
        if self._real is not None:
            return self._real.span.is_recording()
        return self._record.trace.sampled is not False

    def end(self, end_time: int | None = None) -> None:
        """Do nothing: a stage ends where its block ends."""

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Add to the stage's attributes."""
        record = self._record
        if record.end_ns == 0:
            if record.attributes is None:
                record.attributes = {}
            record.attributes.update(attributes)

    def set_attribute(self, key: str, value: Any) -> None:
        """Add to the stage's attributes."""
        self.set_attributes({key: value})

    def add_event(self, name: str, attributes: Mapping[str, Any] | None = None, timestamp: int | None = None) -> None:
        """Add an event to the host span."""
        if self._record.end_ns == 0:
            # A float would pass here and lose the whole batch in the encoder.
            at_ns = int(timestamp) if isinstance(timestamp, int | float) else self._source.now_ns(self._record)
            self._noted().events.append((name, at_ns, dict(attributes or {})))

    def add_link(self, context: SpanContext, attributes: Mapping[str, Any] | None = None) -> None:
        """Add a link to the host span."""
        if self._record.end_ns == 0 and context is not None and context.is_valid:
            self._noted().links.append((context.trace_id, context.span_id, dict(attributes or {})))

    def update_name(self, name: str) -> None:
        """Rename this run's host span; NVTX and the summary keep the stage's name."""
        if self._record.end_ns == 0:
            self._noted().name = name

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        """Set the host span's status; as OpenTelemetry has it, UNSET changes nothing and OK is final."""
        if isinstance(status, Status):
            code, description = status.status_code, status.description
        else:
            code = status
        notes = self._noted()
        final = notes.status is not None and notes.status[0] == StatusCode.OK.name
        if self._record.end_ns == 0 and code is not StatusCode.UNSET and not final:
            notes.status = code.name, description if code is StatusCode.ERROR else None

    def record_exception(
        self,
        exception: BaseException,
        attributes: Mapping[str, Any] | None = None,
        timestamp: int | None = None,
        escaped: bool = False,
    ) -> None:
        """Add an exception event to the host span, with the SDK's attributes."""
        kind = type(exception)
        values = {
            EXCEPTION_TYPE: kind.__qualname__
            if kind.__module__ == "builtins"
            else f"{kind.__module__}.{kind.__qualname__}",
            EXCEPTION_MESSAGE: str(exception),
            EXCEPTION_STACKTRACE: "".join(traceback.format_exception(kind, exception, exception.__traceback__)),
            "exception.escaped": str(escaped),
        }
        self.add_event("exception", {**values, **(attributes or {})}, timestamp)

    def __getattr__(self, name: str) -> Any:
        """Answer what is not in the API, such as `attributes`, as the current span did before there was a stage."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._source.seen_by(self._record), name)

    def __repr__(self) -> str:
        """Without the ids: to print a span must not settle them."""
        return f"LazySpan(stage={self._record.site.name!r})"

    def _noted(self) -> Notes:
        if self._notes is None:
            self._notes = Notes()
        return self._notes
