"""
Helpers for OpenTelemetry contexts.

Settles nothing and changes no current context.
"""

from __future__ import annotations

from contextvars import Context as EmptyContext
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, TypeGuard

from opentelemetry import context as api_of_contexts
from opentelemetry import trace as api
from opentelemetry.context import Context, set_value
from opentelemetry.context.contextvars_context import ContextVarsRuntimeContext
from opentelemetry.trace import INVALID_SPAN, ProxyTracerProvider, TraceFlags, set_span_in_context

from gpuscope._data.attributes import FUNCTION, STAGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.trace import TracerProvider

    from gpuscope._data.record import StageRecord

SPAN_KEY = next(iter(set_span_in_context(INVALID_SPAN, Context())))
"""The current span's key in a context, learnt from the public function that uses it."""
UNKNOWN = ProxyTracerProvider()
"""In place of a provider: this version of OpenTelemetry does not show whether there is one."""
_PLAIN = (str, bool, int, float)


def find_provider() -> Callable[[], TracerProvider | None]:
    """
    Return a function that returns the provider in force: None for none, `UNKNOWN` where that does not show.

    `get_tracer_provider()` won't do: where there is no provider, it loads the one that the environment names.
    """
    return partial(vars(api).get, "_TRACER_PROVIDER", UNKNOWN)


def find_current_context() -> Callable[[], Context]:
    """
    Return OpenTelemetry's `get_current`, or what that calls in the end if contexts are kept in the default way.

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

    Datadog makes a new context for each answer, so a stage that was put into one could not be taken out again.
    """

    def probe() -> bool:
        context = Context(api_of_contexts.get_current())
        api_of_contexts.attach(context)
        return api_of_contexts.get_current() is context

    return EmptyContext().run(probe)


def span_in(context: Context | None) -> object:
    """Return what stands in a context as its span, or None."""
    return None if context is None else context.get(SPAN_KEY)


def with_span(context: Context | None, span: object) -> Context:
    """Return the context with another span in it; None as context is an empty one, None as span is not a span."""
    return set_value(SPAN_KEY, INVALID_SPAN if span is None else span, Context() if context is None else context)


def has_ended(span: object) -> bool:
    """Tell whether a span of the application's has ended, as far as it says so."""
    return getattr(span, "end_time", None) is not None


def flags(*, sampled: bool) -> TraceFlags:
    """Return a trace's flags."""
    return TraceFlags(TraceFlags.SAMPLED if sampled else TraceFlags.DEFAULT)


def plain_attributes(record: StageRecord) -> dict[str, str | bool | int | float]:
    """Return the attributes that a sampler may see: plain ones, because the SDK prints others, tensors too."""
    values = {STAGE: record.site.name, **record.site.attributes, **(record.attributes or {})}
    if record.site.function:
        values[FUNCTION] = record.site.function
    return {key: value for key, value in values.items() if _is_plain(value)}


def _is_plain(value: object) -> TypeGuard[str | bool | int | float]:
    """Tell by the exact type: a subclass, such as NumPy's `float64`, is not plain."""
    return type(value) in _PLAIN
