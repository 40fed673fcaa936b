"""
Helpers for OpenTelemetry contexts.

Settles nothing and changes no current context.
"""

from __future__ import annotations

from contextvars import Context as EmptyContext
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

from opentelemetry import context as api_of_contexts
from opentelemetry import trace as api
from opentelemetry.context import Context
from opentelemetry.context.contextvars_context import ContextVarsRuntimeContext
from opentelemetry.trace import INVALID_SPAN, NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

from gpuscope._data.attributes import FUNCTION, STAGE
from gpuscope._otel.lazy_span import LazySpan

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._data.record import StageRecord, Trace

SPAN_KEY = next(iter(set_span_in_context(INVALID_SPAN, Context())))
"""The current span's key in a context, learnt from the public function that uses it."""
UNKNOWN = object()
"""For a provider: this version of OpenTelemetry does not show whether there is one."""


def find_provider() -> Callable[[], Any]:
    """
    Return a function that returns the provider in force: None for none, `UNKNOWN` where that does not show.

    `get_tracer_provider()` won't do: where there is none it loads the one that the environment names.
    """
    return partial(vars(api).get, "_TRACER_PROVIDER", UNKNOWN)


def find_current_context() -> Callable[[], Context]:
    """
    Return OpenTelemetry's `get_current`, or what it comes down to where contexts are kept as they are by default.

    That is a context variable's `get`, at a tenth of the price.
    """
    keeper = getattr(api_of_contexts, "_RUNTIME_CONTEXT", None)
    variable = getattr(keeper, "_current_context", None) if type(keeper) is ContextVarsRuntimeContext else None
    if not isinstance(variable, ContextVar):
        return api_of_contexts.get_current
    try:
        EmptyContext().run(variable.get)
    except LookupError:  # It has no default.
        return api_of_contexts.get_current
    return variable.get


def keeps_contexts() -> bool:
    """
    Tell whether `get_current` gives back what was attached.

    Datadog's contexts are made anew at each question: what stands in one could not be taken out again.
    """

    def probe() -> bool:
        context = Context(api_of_contexts.get_current())
        api_of_contexts.attach(context)
        return api_of_contexts.get_current() is context

    return EmptyContext().run(probe)


def span_in(context: Context | None) -> Any:
    """Return the span in a context, or None."""
    return None if context is None else context.get(SPAN_KEY)


def with_span(context: Context | None, span: Any) -> Context:
    """Return the context with another span in it; None stands for none."""
    return set_span_in_context(INVALID_SPAN if span is None else span, Context() if context is None else context)


def flags(*, sampled: bool) -> TraceFlags:
    """Return a trace's flags."""
    return TraceFlags(TraceFlags.SAMPLED if sampled else TraceFlags.DEFAULT)


def with_parent_of(trace: Trace, seen: Context | None) -> Context:
    """Return the context at a trace's outermost stage, with that stage's parent as the current span."""
    if not trace.parent_id:
        return with_span(seen, None)
    span = span_in(seen)
    # To ask a lazy span could settle it here, in the middle of settling another.
    ids = span.get_span_context() if isinstance(span, api.Span) and type(span) is not LazySpan else None
    if seen is not None and ids is not None and ids.span_id == trace.parent_id:
        return seen
    ids = SpanContext(
        trace.trace_id, trace.parent_id, is_remote=trace.remote, trace_flags=flags(sampled=trace.sampled is not False)
    )
    return with_span(seen, NonRecordingSpan(ids))


def plain_attributes(record: StageRecord) -> dict[str, Any]:
    """Return what a sampler may look at: plain values only, since the SDK would print others, tensors too."""
    values = {STAGE: record.site.name, **record.site.attributes, **(record.attributes or {})}
    if record.site.function:
        values[FUNCTION] = record.site.function
    return {key: value for key, value in values.items() if type(value) in (str, bool, int, float)}
