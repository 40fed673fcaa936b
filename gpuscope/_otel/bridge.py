"""
The recording side's only door to OpenTelemetry: stages inside the application's traces.

Finds a stage's parent at entry and puts a lazy span into the context, where the application's own spans, propagators
and logs find it; makes no span there. Never sets a provider up, never loads one, never shuts one down.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from opentelemetry.context import Context, attach, get_current
from opentelemetry.trace import Span

from gpuscope._data.batch import SpanDetails
from gpuscope._data.native import Trace
from gpuscope._otel.contexts import (
    SPAN_KEY,
    find_current_context,
    find_provider,
    keeps_contexts,
    span_in,
    with_span,
)
from gpuscope._otel.identities import Identities, ids_of
from gpuscope._otel.lazy_span import LazySpan
from gpuscope._recording.ancestry import running_stage

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.trace import SpanContext

    from gpuscope._data.record import Site, StageRecord
    from gpuscope._settings.config import Config


class Bridge(Identities):
    """
    Enters and leaves stages in the application's OpenTelemetry context, and says which ids they have there.

    Args:
        config: the settings.
        clock: the clock of the records.
        epoch_clock: nanoseconds since the epoch.
        get_provider: returns the application's provider, or None; by default the one that OpenTelemetry has.
        visible: whether stages stand in the context. By default where their spans go where the application's go: a
            span in a trace must not have a parent that only a file knows.

    """

    def __init__(
        self,
        config: Config,
        *,
        clock: Callable[[], int] = time.perf_counter_ns,
        epoch_clock: Callable[[], int] = time.time_ns,
        get_provider: Callable[[], Any] | None = None,
        visible: bool | None = None,
    ) -> None:
        super().__init__(config, clock=clock, epoch_clock=epoch_clock, get_provider=get_provider or find_provider())
        self.current_context = find_current_context()
        wanted = (self._auto or self.sdk or "otlp" in config.exporters) if visible is None else visible
        self.visible = wanted and keeps_contexts()

    def enter(self, record: StageRecord) -> None:
        """Find the stage's parent, and stand in the context for it. Needs the record's outer, trace and ids."""
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
        if span is not None and (outer is None or outer.span is not span or outer.end_ns):
            self._adopt(record, span)
        if self.visible:
            record.span = lazy = LazySpan(self, record)
            record.context_before = previous
            lazy._attached = context = Context({**previous, SPAN_KEY: lazy})
            attach(context)

    def leave(self, record: StageRecord) -> None:
        """Put the context back as it was at entry, where the stage still stands in it."""
        # Not `detach(token)`: it logs an error when a generator is closed in another context than it began in.
        lazy, current = record.span, get_current()
        if lazy is None or lazy._attached is None:
            return
        if current is lazy._attached:
            attach(record.context_before)
        else:
            _leave_otherwise(record, current)

    def details(self, record: StageRecord) -> SpanDetails | None:
        """Return what few stages have: attributes of this run, an error, and what was said to the current span."""
        notes = None if record.span is None else record.span._notes
        # Copied, for another thread that has the span at hand may be about to add one more.
        attributes = dict(record.attributes) if record.attributes else None
        if notes is None:
            return SpanDetails(attributes, record.error) if attributes or record.error is not None else None
        return SpanDetails(attributes, record.error, notes.name, notes.status, tuple(notes.events), tuple(notes.links))

    def _adopt(self, record: StageRecord, span: Any) -> None:
        """Make the stage a child of the span in the context, unless that is above the enclosing stage too."""
        while type(span) is LazySpan and span._record.recorder is not record.recorder:
            # Of a recorder that was shut down, or of the process that this one was forked from.
            span = span_in(span._record.context_before)
        if not isinstance(span, Span):
            return
        outer, stage = record.outer, span._record if type(span) is LazySpan else None
        context = span.get_span_context()
        if not context.is_valid or (outer is not None and _is_above(outer, context, stage)):
            return
        above = stage or outer
        record.trace = _new_trace(
            context.trace_id,
            context.span_id,
            remote=context.is_remote,
            root=record.site if above is None else above.trace.root,
            # A stage's decision holds; whether an application's span's does is for the sampler to say.
            sampled=None if stage is None else context.trace_flags.sampled,
        )
        record.context_before = get_current()
        record.outer = running_stage(outer)

    def _follow(self, record: StageRecord, outer: StageRecord) -> None:
        """Make the stage a child of one that has ended, as in a task that was started in it; by its ids alone."""
        # Not by reference: a task that starts its successor inside its stage would hold all the stages before it.
        sampled, (trace_id, span_id) = self.sampled(outer), ids_of(outer)
        record.trace = _new_trace(trace_id, span_id, remote=False, root=outer.trace.root, sampled=sampled)
        record.outer = running_stage(outer)


def _new_trace(trace_id: int, parent_id: int, *, remote: bool, root: Site, sampled: bool | None) -> Trace:
    trace = Trace()
    trace.trace_id, trace.parent_id, trace.remote, trace.root, trace.sampled = (
        trace_id,
        parent_id,
        remote,
        root,
        sampled,
    )
    return trace


def _is_above(outer: StageRecord, context: SpanContext, stage: StageRecord | None) -> bool:
    """Whether the span in the context was there before the enclosing stage, which then does not stand in it."""
    if outer.end_ns or (outer.span is not None and outer.span._attached is not None):
        return False
    return stage is not None or (context.span_id, context.trace_id) == (outer.trace.parent_id, outer.trace.trace_id)


def _leave_otherwise(record: StageRecord, current: Context) -> None:
    lazy, below = record.span, span_in(record.context_before)
    span = span_in(current)
    if span is lazy:
        # The application put something else, baggage say, into the context and has not taken it out yet.
        attach(with_span(current, below))
        return
    # A stage that was entered inside this one ends after it; this one must not come back when it does.
    while type(span) is LazySpan and (seen := span._record.context_before) is not None:
        if span_in(seen) is lazy:
            span._record.context_before = with_span(seen, below)
            return
        span = span_in(seen)
