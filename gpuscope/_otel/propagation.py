"""
`inject` and `extract`: a trace goes on in another process, by the application's own propagators.

`inject` writes whatever a stage that began here would be a child of. Neither makes a span or keeps anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from opentelemetry import propagate
from opentelemetry.context import Context, attach, create_key, get_current
from opentelemetry.propagators.textmap import DefaultGetter, default_setter
from opentelemetry.trace import (
    INVALID_SPAN,
    INVALID_SPAN_CONTEXT,
    NonRecordingSpan,
    Span,
    SpanContext,
    TraceFlags,
    set_span_in_context,
)

from gpuscope._data.native import StageRecord
from gpuscope._data.plain.values import shown
from gpuscope._data.record import Site
from gpuscope._interrupts import is_the_programs
from gpuscope._log import SUPPRESSED, WarnOnce, later
from gpuscope._otel.contexts import SPAN_KEY, has_ended, span_in, with_span
from gpuscope._otel.lazy_span import own_context, record_of
from gpuscope._recording.batches.token import Token
from gpuscope._recording.current_stage import current, find_current, is_collecting
from gpuscope._recording.state import state
from gpuscope._settings.environment import FALSE_WORDS
from gpuscope._settings.keeping.rules import rules_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.propagators.textmap import CarrierT, Getter, Setter
    from typing_extensions import Self

    from gpuscope._data.interfaces import Bridge
    from gpuscope._settings.config import Config

_ENTRY = create_key("gpuscope-extract")
_warnings = WarnOnce(SUPPRESSED, later)


def inject(carrier: CarrierT, *, setter: Setter[CarrierT] | None = None) -> None:
    """
    Write the current trace into what is sent to another process: headers of a request, a field of a message.

    The receiver's spans become children of the current stage or, inside a span of the application's, of that span.
    With recording off, only a span of the application's counts; without one, no trace is written. The application's
    propagators decide which fields are written (`OTEL_PROPAGATORS`; by default `traceparent`, `tracestate` and
    `baggage`).

    Args:
        carrier: a mutable mapping of `str` to `str`, or whatever `setter` writes to.
        setter: as for `opentelemetry.propagate.inject`.

    """
    propagate.inject(carrier, _context_here(), setter or default_setter)


def extract(carrier: CarrierT | Token, *, getter: Getter[CarrierT] | None = None, trace: bool = True) -> RemoteContext:
    """
    Read the trace that another process wrote; `with gpuscope.extract(headers):` continues it.

    Stages and spans in the block are children of the remote span, even if a stage is running around the block. A
    carrier without a trace, or one that cannot be read, changes nothing, except that a stage which has ended is not
    continued: the next request on a connection may inherit that from the last one. The sampling decision of the process
    that began the trace holds here.

    A token is continued likewise. One of nothing, `gpuscope.Token()`, continues nothing: what begins in the block
    begins a trace of its own. That is for tasks that work for many requests and were started within one.

    Args:
        carrier: a mapping of `str` to `str`, with names in lower case, or whatever `getter` reads from; or a token.
        getter: as for `opentelemetry.propagate.extract`.
        trace: `False` reads no trace, only what `keeps` and `reply` say: for a server whose request is a span of the
            application's already. Such a server calls the result's `keep(token)` where `keeps` is true, with the
            span's `gpuscope.here()`.

    Returns:
        A context manager that is an OpenTelemetry `Context` too: pass it as `context=` to OpenTelemetry's functions.
        Its `keeps` tells whether the carrier has the header that `GPUSCOPE_KEEP` names, and its `reply` is the header
        in which the response is to have the trace's id (`GPUSCOPE_TRACE_HEADER`), or empty.

    """
    if isinstance(carrier, Token):
        return RemoteContext(set_span_in_context(_span_of(carrier), Context()))
    try:
        reader: Any = getter or _as_text  # It reads any mapping, and what is not one is not read.
        context = RemoteContext(propagate.extract(carrier, Context(), reader) if trace else Context())
        if (engine := state.engine) is not None and (engine.config.keep or engine.config.trace_header):
            state.reads_headers = True
            context.reply, context.judges = engine.config.trace_header, bool(engine.config.keep)
            context.keeps = _is_forced(engine.config, carrier, reader)
        return context
    except Exception as error:  # What a client sends, and what a propagator makes of it, fails no request.
        if is_the_programs(error):
            raise
        _warnings.warn("extract", "the trace of a request could not be read: %s.", shown(error))
        return RemoteContext(Context())


def _is_forced(config: Config, carrier: object, reader: Any) -> bool:
    """Tell whether the carrier has the header by which a trace is kept, and it does not say no."""
    rules = rules_of(config.keep)
    values = reader.get(carrier, rules.header) if rules is not None and rules.header else None
    return any(str(value).strip().lower() not in FALSE_WORDS for value in values or ())


def _span_of(token: Token) -> Span:
    if not token:
        return INVALID_SPAN
    flags = TraceFlags(TraceFlags.SAMPLED if token.sampled else TraceFlags.DEFAULT)
    return NonRecordingSpan(SpanContext(token.trace_id, token.span_id, True, flags))


class _AsText(DefaultGetter):
    """
    Reads fields that are text, or lists of it; bytes are text, as in headers.

    Other fields, which a propagator would try to parse, are passed over, and nothing asks them anything.
    """

    def get(self, carrier: Mapping[str, object], key: str) -> list[str] | None:
        """Return the field's texts, or None for none."""
        field = carrier.get(key)
        several = field if type(field) is list or type(field) is tuple else [field]
        texts = [one.decode("latin-1") if type(one) is bytes else one for one in cast("list[object]", several)]
        return [one for one in texts if type(one) is str] or None


_as_text = _AsText()


class _Entry:
    """One time that a remote context was entered; this much of it stays in contexts that were copied inside."""

    is_left = False


_NO_SITE = Site("", {})


class _Border(StageRecord):
    """
    Current in place of a stage while a remote context is; it is of no recorder, so that it encloses nothing.

    By it a stage that ends finds out that it is around a remote context that nobody has left.
    """

    __slots__ = ()

    def __init__(self, stage: StageRecord, seen: Context) -> None:
        self.recorder = self.before = self.span = None
        self.site = _NO_SITE
        self.outer, self.end_ns, self.place, self.context_before = stage, 1, 0, seen

    def close(self) -> None:
        """Take the remote context out."""
        attach(self.context_before)


class RemoteContext(Context):
    """
    A context from another process, current during a `with` block.

    Several threads and tasks may enter it at once. Leaving puts back the previous context and stage, even if a stage
    that began inside was ended by another task.
    """

    keeps = False
    """Whether whoever sent it wants the trace kept: see `GPUSCOPE_KEEP`."""
    reply = ""
    """The header in which the response is to have the trace's id; empty for none."""
    judges = False
    """Whether `GPUSCOPE_KEEP` decides which traces are exported."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._before: dict[_Entry, tuple[Context, StageRecord | None]] = {}

    def keep(self, token: Token, *, failed: bool = False) -> None:
        """
        Keep a trace whose request is not a stage that could say `gpuscope.keep`: stages of it that wait or come later.

        Args:
            token: of the request's span.
            failed: whether that is because the request failed, which counts where `error` is a rule.

        """
        engine = state.engine
        if engine is not None and engine.recorder.to_keep is not None and token.sampled:
            engine.recorder.to_keep.append((token.trace_id, failed))

    def __enter__(self) -> Self:
        """Make it the current context."""
        # The context holds only a key to what is put back. If it held that itself, the last of a chain of tasks, each
        # started inside the block of the one before, would hold the contexts of all of them.
        if is_collecting():  # No variable may be set: see `_recording.current_stage`.
            return self
        entry, seen, stage = _Entry(), get_current(), find_current()
        self._before[entry] = seen, stage
        around: Context = Context() if SPAN_KEY in self else seen
        if around is seen and _is_over(seen, stage):
            around = with_span(seen, _span_that_runs(seen))
        if around is not seen:
            current.set(None if stage is None else _Border(stage, seen))
        attach(Context({**around, **self, _ENTRY: entry}))
        return self

    def __exit__(self, *exception: object) -> None:
        """Put back what was current before."""
        entry = get_current().get(_ENTRY)
        # It is none where the block is left in another context than it was entered in.
        if isinstance(entry, _Entry) and entry in self._before:
            entry.is_left = True
            seen, stage = self._before.pop(entry)
            attach(seen)
            current.set(stage)


def _is_over(seen: Context, stage: StageRecord | None) -> bool:
    """Whether the request that this context was inherited from is over, as on a connection that serves one by one."""
    entry, span = seen.get(_ENTRY), span_in(seen)
    if record_of(span) is None and has_ended(span):
        return True
    return (stage is not None and stage.end_ns != 0) or (isinstance(entry, _Entry) and entry.is_left)


def _span_that_runs(seen: Context) -> object:
    """Return the innermost span of the application's below stages that have ended; None for a remote one."""
    span = span_in(seen)
    while (stage := record_of(span)) is not None and stage.end_ns:
        span = span_in(stage.context_before)
    return None if isinstance(span, Span) and (has_ended(span) or span.get_span_context().is_remote) else span


def _context_here() -> Context:
    """Return the current context; its span is the one that a stage beginning here would be a child of."""
    seen, stage, engine = get_current(), current.get(), state.engine
    if stage is None or engine is None or engine.ended or stage.recorder is not engine.recorder:
        return seen
    recorder = engine.recorder
    recorder.open_bridge()
    bridge = recorder.bridge
    if bridge is None or own_context(stage) is not None:
        return seen
    if not _is_above(stage, span_in(seen)) or not _may_be_a_parent(bridge, engine.config):
        return seen
    return with_span(seen, bridge.lazy(stage))


def _may_be_a_parent(bridge: Bridge, config: Config) -> bool:
    """Whether stages are exported, and not only to a file while the application's spans go elsewhere."""
    if bridge.visible and not config.sdk_disabled:
        return True
    return "file" in config.exporters and bridge.provider is None


def _is_above(stage: StageRecord, span: object) -> bool:
    """Whether the span was in the context before the stage began; the stage itself does not stand in it."""
    ids = _ids(span)
    return not ids.is_valid or (ids.span_id, ids.trace_id) == (stage.trace.parent_id, stage.trace.trace_id)


def _ids(span: object) -> SpanContext:
    return span.get_span_context() if isinstance(span, Span) else INVALID_SPAN_CONTEXT
