"""
The span above a trace's outermost stage, as that stage's own span has to see it.

Settles no ids: a lazy span is not asked for its ids here, because another one is being settled at that moment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry.trace import NonRecordingSpan, Span, SpanContext

from gpuscope._otel.contexts import flags, span_in, with_span
from gpuscope._otel.lazy_span import record_of, settled_ids
from gpuscope._recording.current_stage import root_stage

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import TraceState

    from gpuscope._data.record import StageRecord, Trace


def with_parent_of(trace: Trace, seen: Context | None) -> Context:
    """Return the context at a trace's outermost stage, with that stage's parent as the current span."""
    if not trace.parent_id:
        return with_span(seen, None)
    span = span_in(seen)
    ids = span.get_span_context() if isinstance(span, Span) and record_of(span) is None else None
    if seen is not None and ids is not None and ids.span_id == trace.parent_id:
        return seen
    ids = SpanContext(
        trace.trace_id, trace.parent_id, is_remote=trace.remote, trace_flags=flags(sampled=trace.sampled is not False)
    )
    return with_span(seen, NonRecordingSpan(ids))


def trace_state(record: StageRecord) -> TraceState | None:
    """Return the vendors' part of a trace that came from elsewhere: whoever passes a trace on must pass it on too."""
    span = span_in(root_stage(record).context_before)
    stage = record_of(span)
    if stage is not None:
        ids = settled_ids(stage)
        return None if ids is None else ids.trace_state
    return span.get_span_context().trace_state if isinstance(span, Span) else None
