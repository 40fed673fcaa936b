"""
`LazySpan`: what stands for a running stage in the application's OpenTelemetry context.

A lazy span makes no ids and no spans: it asks its source for them when the application asks it. It is not the stage's
context manager, because applications write `with trace.get_current_span():`; nothing that they call on it ends the
stage.

Its private attributes, and those of `Standing`, are touched in this file only, and in `csrc/pack.c`; the other files
use the functions at the end. They are functions, not methods, because a public method would hide the attribute of that
name of the application's own span, to which `LazySpan.__getattr__` passes on what OpenTelemetry's API does not have.
"""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from opentelemetry.context import Context, attach
from opentelemetry.trace import Span, Status, StatusCode

from gpuscope._data.attributes import EXCEPTION_ESCAPED, EXCEPTION_MESSAGE, EXCEPTION_STACKTRACE, EXCEPTION_TYPE
from gpuscope._data.plain.descriptions import size_of
from gpuscope._data.plain.exceptions import facts_of, size_of_exception
from gpuscope._data.plain.values import as_key, snapshot, snapshot_mapping
from gpuscope._otel.contexts import SPAN_KEY
from gpuscope._otel.notes import Notes
from gpuscope._recording.queue import hold, tell

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.trace import SpanContext

    from gpuscope._data.record import StageRecord

_new = object.__new__


class RealSpan(NamedTuple):
    """The span that the application's provider made for a stage."""

    span: Span
    parent_context: Context
    """The context that it was started in, with its baggage; the GPU child is started there too."""
    start_ns: int


class Source(Protocol):
    """Where a lazy span gets its ids: `Identities`."""

    def context_of(self, record: StageRecord) -> SpanContext:
        """Settle the ids of the stage's host span if that is possible now, and return them."""

    def seen_by(self, record: StageRecord) -> Span:
        """Return the application's span above the stage."""

    def now_ns(self, record: StageRecord) -> int:
        """Return the time since the epoch, as the stage's own times are placed."""


class Standing:
    """What a stage is in OpenTelemetry's contexts and traces: `StageRecord.span`."""

    # Defaults of the class and no slots, because one is made on every entry of a stage: only what differs is stored.
    _attached: Context | None = None
    """The context that the stage was put into, as long as it stands there."""
    _context: SpanContext | None = None
    """The ids, once settled; they do not change after that."""
    _real: RealSpan | None = None
    """Set with the ids, and let go when that span has ended."""
    _notes: Notes | None = None


class LazySpan(Span):
    """
    A stage as the application's code sees it through `trace.get_current_span()`.

    Args:
        source: decides on the ids when they are first asked for.
        record: the stage.

    """

    # Refers to the record, which refers to a `Standing` and not back: no stage may need the garbage collector.

    def __init__(self, source: Source, record: StageRecord) -> None:
        self._source = source
        self._record = record

    def get_span_context(self) -> SpanContext:
        """Return the ids of the stage's host span."""
        return settled_ids(self._record) or self._source.context_of(self._record)

    @property
    def context(self) -> SpanContext:
        """The ids. The API does not have this property, but every span of the SDK has it, and applications use it."""
        return self.get_span_context()

    def is_recording(self) -> bool:
        """Return False once the stage has ended, and in a trace that is known not to be sampled."""
        if self._record.end_ns:
            return False
        real = real_span(self._record)
        if real is not None:
            return real.span.is_recording()
        return self._record.trace.sampled is not False

    def end(self, end_time: int | None = None) -> None:
        """Do nothing: a stage ends where its block ends."""

    def set_attributes(self, attributes: Mapping[str, object]) -> None:
        """Add to the stage's attributes."""
        if self._record.end_ns == 0:
            tell(self._record, snapshot_mapping(attributes))

    def set_attribute(self, key: str, value: object) -> None:
        """Add to the stage's attributes."""
        if self._record.end_ns == 0:
            tell(self._record, {as_key(key): snapshot(value)})

    def add_event(
        self, name: str, attributes: Mapping[str, object] | None = None, timestamp: int | None = None
    ) -> None:
        """Add an event to the host span."""
        if self._record.end_ns == 0:
            name, taken = as_key(name), _taken(attributes)
            self._add_event(name, taken, timestamp, size_of(name) + size_of(taken))

    def add_link(self, context: SpanContext, attributes: Mapping[str, object] | None = None) -> None:
        """Add a link to the host span."""
        if self._record.end_ns == 0 and context is not None and context.is_valid:
            taken = _taken(attributes)
            links = self._noted().links
            if hold(self._record, size_of(taken), told=len(links)):
                links.append((context.trace_id, context.span_id, taken))

    def update_name(self, name: str) -> None:
        """Rename this run's host span; NVTX and the summary keep the stage's name."""
        if self._record.end_ns == 0:
            name = as_key(name)
            if hold(self._record, size_of(name)):
                self._noted().name = name

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        """Set the host span's status. As OpenTelemetry specifies, UNSET changes nothing and OK is final."""
        if isinstance(status, Status):
            code, description = status.status_code, status.description
        else:
            code = status
        notes = self._noted()
        final = notes.status is not None and notes.status[0] == StatusCode.OK.name
        if self._record.end_ns == 0 and code is not StatusCode.UNSET and not final:
            told = as_key(description) if code is StatusCode.ERROR and description is not None else None
            if hold(self._record, size_of(told)):
                notes.status = code.name, told

    def record_exception(
        self,
        exception: BaseException,
        attributes: Mapping[str, object] | None = None,
        timestamp: int | None = None,
        escaped: bool = False,
    ) -> None:
        """
        Add an exception event to the host span, with the attributes that the SDK gives one.

        The exception is not printed, because what it holds may be on the GPU; its text is made where it is encoded.
        """
        if self._record.end_ns == 0:
            facts, taken = facts_of(exception), _taken(attributes)
            values = {
                EXCEPTION_TYPE: facts.type,
                EXCEPTION_MESSAGE: facts.message,
                EXCEPTION_STACKTRACE: facts,
                EXCEPTION_ESCAPED: as_key(escaped),
                **taken,
            }
            self._add_event("exception", values, timestamp, size_of_exception(facts) + size_of(taken))

    def __getattr__(self, name: str) -> object:
        """
        Answer what is not in the API, such as `attributes`, as the application's span around the stage does.

        Private names are not passed on.
        """
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._source.seen_by(self._record), name)

    def __repr__(self) -> str:
        """Leave the ids out: printing a span must not settle them."""
        return f"LazySpan(stage={self._record.site.name!r})"

    def _add_event(self, name: str, taken: dict[str, Any], timestamp: object, size: int) -> None:
        at_ns = snapshot(timestamp)
        # A float would be accepted here, and the encoder would then lose the whole batch.
        if type(at_ns) is not int:
            finite = type(at_ns) is float and isfinite(at_ns)
            at_ns = int(at_ns) if finite else self._source.now_ns(self._record)
        events = self._noted().events
        if hold(self._record, size, told=len(events)):
            events.append((name, at_ns, taken))

    def _noted(self) -> Notes:
        standing: Standing = self._record.span
        if standing._notes is None:
            standing._notes = Notes()
        return standing._notes


def _taken(attributes: Mapping[str, object] | None) -> dict[str, Any]:
    return {} if attributes is None else snapshot_mapping(attributes)


def stand(source: Source, record: StageRecord, previous: Context) -> None:
    """
    Make the stage's lazy span, and put it into the context: where `previous` was current, a copy with the span is.

    This is the hot path.
    """
    # Stores what `__init__` stores, without calling it: the call would cost as much as that of this function.
    lazy = _new(LazySpan)
    lazy._source = source
    lazy._record = record
    record.context_before = previous
    record.span = standing = _new(Standing)
    standing._attached = context = Context({**previous, SPAN_KEY: lazy})
    attach(context)


def lazy_span(source: Source, record: StageRecord) -> LazySpan:
    """Return a lazy span for a stage that may have been entered before there was a provider."""
    if record.span is None:
        record.span = Standing()
    return LazySpan(source, record)


def own_context(record: StageRecord) -> Context | None:
    """Return the context that the stage was put into, as long as that may be current."""
    return None if record.span is None else record.span._attached


def take_out(record: StageRecord) -> Context | None:
    """Return the same, and let go of it: the stage has ended."""
    standing: Standing | None = record.span
    if standing is None:
        return None
    attached, standing._attached = standing._attached, None
    return attached


def record_of(span: object) -> StageRecord | None:
    """Return the record of the stage that a span in a context stands for; None for a span of the application's."""
    return span._record if type(span) is LazySpan else None


def give_ids(record: StageRecord, ids: SpanContext, real: RealSpan | None) -> None:
    """Give the stage its ids, once and for all, and the provider's span if the ids are of one."""
    if record.span is None:
        record.span = Standing()
    # In this order: where another thread sees the ids, it finds the span as well.
    record.span._real = real
    record.span._context = ids


def settled_ids(record: StageRecord) -> SpanContext | None:
    """Return the ids if they are settled; settle nothing."""
    return None if record.span is None else record.span._context


def real_span(record: StageRecord) -> RealSpan | None:
    """Return the provider's span for the stage, if one was made and has not been let go."""
    return None if record.span is None else record.span._real


def notes_of(record: StageRecord) -> Notes | None:
    """Return what the application told the stage's span, if anything."""
    return None if record.span is None else record.span._notes


def let_go_of_contexts(record: StageRecord) -> None:
    """Forget the contexts of a stage that has ended: the one that it stood in, and the one before."""
    # A task that starts its successor inside its stage would otherwise hold every context before it.
    record.context_before = None
    if record.span is not None:
        record.span._attached = None


def let_go_of_span(lazy: LazySpan) -> None:
    """Forget the provider's span, which has ended; the ids stay."""
    # It would keep the request's objects alive as long as a task keeps the context.
    lazy._record.span._real = None
