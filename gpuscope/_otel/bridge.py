"""
The recording side's only door to OpenTelemetry: stages inside the application's traces.

When a stage is entered, it finds the stage's parent and puts a lazy span into the context, where the application's own
spans, propagators and logs find it. It makes no real span then. It never sets up, loads or shuts down a provider.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from opentelemetry.context import Context, attach, get_current
from opentelemetry.trace import INVALID_SPAN, INVALID_SPAN_CONTEXT, Span

from gpuscope._data.batch import SpanDetails
from gpuscope._data.native import Trace, native
from gpuscope._otel.contexts import (
    SPAN_KEY,
    find_current_context,
    find_provider,
    has_ended,
    keeps_contexts,
    span_in,
    with_span,
)
from gpuscope._otel.identities import ids_of
from gpuscope._otel.lazy_span import LazySpan, notes_of, own_context, record_of, stand, take_out
from gpuscope._otel.members import MemberIdentities
from gpuscope._otel.provider_end import end_of
from gpuscope._recording.current_stage import before, is_collecting, running_stage

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.trace import SpanContext, TracerProvider

    from gpuscope._data.record import Site, StageRecord
    from gpuscope._settings.config import Config


if native is not None:
    native.know_spans(SPAN_KEY, LazySpan, INVALID_SPAN)


class Bridge(MemberIdentities):
    """
    Enters and leaves stages in the application's OpenTelemetry context, and says which ids they have there.

    Args:
        config: the settings.
        clock: the clock of the records.
        epoch_clock: nanoseconds since the epoch.
        get_provider: returns the application's provider, or None; by default the one that OpenTelemetry has.
        visible: whether stages stand in the context. By default they do if their spans go where the application's
            spans go, because a span in a trace must not have a parent that only a file knows.

    """

    def __init__(
        self,
        config: Config,
        *,
        clock: Callable[[], int] = time.perf_counter_ns,
        epoch_clock: Callable[[], int] = time.time_ns,
        get_provider: Callable[[], TracerProvider | None] | None = None,
        visible: bool | None = None,
    ) -> None:
        super().__init__(config, clock=clock, epoch_clock=epoch_clock, get_provider=get_provider or find_provider())
        self.current_context = find_current_context()
        wanted = (self._auto or self.sdk or "otlp" in config.exporters) if visible is None else visible
        self.visible = wanted and keeps_contexts()

    def enter(self, record: StageRecord) -> None:
        """Find the stage's parent, and put the stage into the context. Needs the record's outer, trace and ids."""
        outer = record.outer
        if self.look_for_provider() is None:
            # Nothing can ask for a stage's ids, but a request's parent may come from elsewhere.
            if outer is not None:
                if outer.end_ns:
                    self._follow(record, outer)
            elif (span := get_current().get(SPAN_KEY)) is not None:
                self._adopt(record, span)
            return
        previous = get_current()
        span = previous.get(SPAN_KEY)
        if _is_none(span):
            self._begin_anew(record)
        elif outer is None or record_of(span) is not outer or outer.end_ns:
            self._adopt(record, span)
        if self.visible and not is_collecting():
            stand(self, record, previous)

    def leave(self, record: StageRecord) -> None:
        """Put the span of the entry back, whatever span came since; what else the application has attached stays."""
        # Not `detach(token)`, which logs an error when a generator is closed in another context than it began in.
        own, current, previous = own_context(record), get_current(), record.context_before
        if own is not None:
            if current is own:
                attach(previous)
            elif not (_is_none(span_in(current)) and _is_over(span_in(previous))):
                attach(with_span(current, span_in(previous)))
            take_out(record)  # At last, because an interrupt may come before, and then this is done again.

    def leave_behind(self, record: StageRecord) -> None:
        """Take the stage, which has ended elsewhere, out of the current context; its own contexts may be let go of."""
        current, outer = get_current(), before(record)
        if record_of(span_in(current)) is not record:
            return
        if record.context_before is not None:
            below = span_in(record.context_before)
        else:
            runs = outer is not None and not outer.end_ns and own_context(outer) is not None
            below = self.lazy(outer) if outer is not None and runs else None
        attach(with_span(current, below))

    def leave_elsewhere(self, record: StageRecord) -> None:
        """Take the stage out of a context that is not its own: that of a task that was started inside, say."""
        if is_collecting():
            return
        previous = record.context_before
        own, current = own_context(record), get_current()
        if own is None or previous is None:
            return
        if current is own:
            attach(previous)
        else:
            _leave_otherwise(record, current, span_in(previous))
        if not record.place:  # Else that context, in which it still is, may become current again.
            take_out(record)

    def here(self, stage: StageRecord | None) -> StageRecord | SpanContext | None:
        """Return what a stage that began now, in the stage given, would be a child of; it settles no ids."""
        span = get_current().get(SPAN_KEY)
        found = record_of(span)
        while found is not None and found.recorder.bridge is not self:  # As in `_adopt`.
            span = span_in(found.context_before)
            found = record_of(span)
        if found is not None:
            return stage if stage is not None and _is_above(stage, INVALID_SPAN_CONTEXT, found) else found
        ids = span.get_span_context() if isinstance(span, Span) else INVALID_SPAN_CONTEXT
        if not ids.is_valid or (stage is not None and _is_above(stage, ids, None)):
            return stage
        return ids

    def load_sampler(self) -> None:
        """Make the environment's sampler before a stage has to wait for that."""
        self._sampler.load()

    def watch_provider(self, before_its_end: Callable[[], bool]) -> None:
        """Have something called before the application ends or flushes its provider, where stages go there."""
        goes_there = self._auto or self.sdk
        if goes_there and (provider := self.provider) is not None and (end := end_of(provider)) is not None:
            end.tell(before_its_end)

    def provider_has_ended(self) -> bool:
        """Tell whether the application has ended its provider, which then takes spans and exports none."""
        end = getattr(getattr(self.provider, "shutdown", None), "gpuscope_end", None)
        return end is not None and end.has_come

    def details(self, record: StageRecord) -> SpanDetails | None:
        """Return what few stages have: attributes of this run, an error, and what the current span was told."""
        notes = notes_of(record)
        # Not a copy: where there is something large, the bytes are held as long as this lives.
        attributes, error, state = record.attributes, record.error, record.trace.state
        if notes is None:
            few = attributes or error is not None or state
            return SpanDetails(attributes, error, trace_state=state) if few else None
        return SpanDetails(
            attributes,
            error,
            notes.name,
            notes.status,
            tuple(notes.events),
            tuple(notes.links),
            (notes.events.dropped, notes.links.dropped),
            state,
        )

    def _adopt(self, record: StageRecord, span: object) -> None:
        """Make the stage a child of the span in the context, unless that span is above the enclosing stage too."""
        stage = record_of(span)
        while stage is not None and stage.recorder is not record.recorder:
            # Of a recorder that was shut down, or of the process that this one was forked from.
            span = span_in(stage.context_before)
            stage = record_of(span)
        if not isinstance(span, Span):
            return
        outer, context = record.outer, span.get_span_context()
        if not context.is_valid:
            self._begin_anew(record)
            return
        if outer is not None and _is_above(outer, context, stage):
            return
        above = stage or outer
        record.trace = _new_trace(
            context.trace_id,
            context.span_id,
            remote=context.is_remote,
            root=record.site if above is None else above.trace.root,
            # The decision of a stage holds; for an application's span, the sampler decides.
            sampled=None if stage is None else context.trace_flags.sampled,
            state=context.trace_state.to_header() if context.trace_state else None,
        )
        record.context_before = get_current()
        _enclose(record, outer)

    def _begin_anew(self, record: StageRecord) -> None:
        """Make the stage a root where the application has put a context back that was before the enclosing stage."""
        # That one was never left, as in a generator inside a span of the application's that nobody reads any more.
        outer = record.outer
        if outer is None or outer.end_ns or own_context(outer) is None or is_collecting():
            return
        trace_id = record.recorder.random_bits(128)
        record.trace = _new_trace(trace_id, 0, remote=False, root=record.site, sampled=None)
        record.context_before = get_current()
        _enclose(record, outer)

    def _follow(self, record: StageRecord, outer: StageRecord) -> None:
        """Make the stage a child of one that has ended, as in a task that was started inside it; by its ids alone."""
        # Not by reference, because a task that starts its successor inside its stage would hold all earlier stages.
        sampled, (trace_id, span_id) = self.sampled(outer, wait_s=0), ids_of(outer)
        above = outer.trace
        record.trace = _new_trace(trace_id, span_id, remote=False, root=above.root, sampled=sampled, state=above.state)
        _enclose(record, outer)


def _enclose(record: StageRecord, outer: StageRecord | None) -> None:
    """Enclose the stage in the one that still runs, and remember which was current."""
    if record.before is None:
        record.before = outer
    record.outer = running_stage(outer)


def _new_trace(
    trace_id: int, parent_id: int, *, remote: bool, root: Site, sampled: bool | None, state: str | None = None
) -> Trace:
    trace = Trace()
    trace.trace_id, trace.parent_id, trace.remote = trace_id, parent_id, remote
    trace.root, trace.sampled, trace.state = root, sampled, state
    return trace


def _is_none(span: object) -> bool:
    return span is None or span is INVALID_SPAN


def _is_over(span: object) -> bool:
    """Whether a span has ended, as far as it says so. Where the application has put its context back, it stays out."""
    stage = record_of(span)
    return has_ended(span) if stage is None else stage.end_ns != 0


def _is_above(outer: StageRecord, context: SpanContext, stage: StageRecord | None) -> bool:
    """Whether the span in the context was there before the enclosing stage, which does not stand in the context."""
    if outer.end_ns or own_context(outer) is not None:
        return False
    return stage is not None or (context.span_id, context.trace_id) == (outer.trace.parent_id, outer.trace.trace_id)


def _leave_otherwise(record: StageRecord, current: Context, below: object) -> None:
    """Take the stage out of a context that is not its own, where the span before it was `below`."""
    span = span_in(current)
    if record_of(span) is record:
        # The application has put something else into the context, such as baggage, and has not taken it out yet.
        attach(with_span(current, below))
        return
    # A stage that was entered inside this one is still running. When it ends, it must not bring this one back.
    while (inner := record_of(span)) is not None and (seen := inner.context_before) is not None:
        span = span_in(seen)
        if record_of(span) is record:
            inner.context_before = with_span(seen, below)
            return
