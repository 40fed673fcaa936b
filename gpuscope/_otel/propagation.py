"""
`inject` and `extract`: a trace goes on in another process, by the application's own propagators.

What is injected is what a stage that began here would be a child of. Makes no span and keeps nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opentelemetry import propagate
from opentelemetry.context import Context, attach, create_key, get_current
from opentelemetry.propagators.textmap import DefaultGetter, default_setter
from opentelemetry.trace import INVALID_SPAN_CONTEXT, Span

from gpuscope._log import SUPPRESSED, WarnOnce
from gpuscope._otel.contexts import SPAN_KEY, span_in, with_span
from gpuscope._recording.hot_path import current
from gpuscope._recording.state import state

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.propagators.textmap import Getter, Setter
    from opentelemetry.trace import SpanContext
    from typing_extensions import Self

    from gpuscope._data.record import StageRecord
    from gpuscope._settings.config import Config

_ENTRY = create_key("gpuscope-extract")
_warnings = WarnOnce(SUPPRESSED)


def inject(carrier: Any, *, setter: Setter[Any] | None = None) -> None:
    """
    Write the current trace into what is sent to another process: headers of a request, a field of a message.

    That is the current stage or, inside a span of the application's, that span. With recording off it is the
    application's span alone, and without one nothing is written. Which fields are written is for the application's
    propagators to say (`OTEL_PROPAGATORS`; `traceparent` and `baggage` by default).

    Args:
        carrier: a mutable mapping of `str` to `str`, or whatever `setter` writes to.
        setter: as for `opentelemetry.propagate.inject`.

    """
    propagate.inject(carrier, _context_here(), setter or default_setter)


def extract(carrier: Any, *, getter: Getter[Any] | None = None) -> RemoteContext:
    """
    Read the trace that another process wrote; `with gpuscope.extract(headers):` goes on with it.

    Stages and spans in the block are children of the remote span, also where a stage is running around it. A carrier
    without a trace changes nothing. Whether the trace is sampled was decided where it began, and holds here.

    Args:
        carrier: a mapping of `str` to `str`, or whatever `getter` reads from. Names are in lower case.
        getter: as for `opentelemetry.propagate.extract`.

    Returns:
        A context manager, which is an OpenTelemetry `Context` too: for `context=` of their functions.

    """
    try:
        found = propagate.extract(carrier, Context(), getter or _as_text)
    except Exception as error:  # What a client sends, and what a propagator makes of it, fails no request.
        _warnings.warn("extract", "a trace that another process sent cannot be read, and is left: %r.", error)
        found = Context()
    return RemoteContext(found)


class _AsText(DefaultGetter):
    """Reads from mappings whose values may be anything: bytes are text, as in headers, and what is not text is none."""

    def get(self, carrier: Mapping[str, Any], key: str) -> list[str] | None:
        """Return the values of a field that are text."""
        values = carrier.get(key)
        several = values if isinstance(values, list | tuple) else [values]
        texts = [one.decode("latin-1") if isinstance(one, bytes) else one for one in several]
        return [one for one in texts if isinstance(one, str)] or None


_as_text = _AsText()


class RemoteContext(Context):
    """
    A context from elsewhere, current for the length of a `with` block.

    May be entered by several threads and tasks at once. Leaving puts back the context and the stage of before, also
    where a stage that began inside was ended by another task.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._before: dict[object, tuple[Context, StageRecord | None]] = {}

    def __enter__(self) -> Self:
        """Make it the current context."""
        # What to put back is found by way of the context, not kept by it: a task that enters another one and starts
        # its successor there would hold all those before it.
        entry, seen = object(), get_current()
        self._before[entry] = seen, current.get()
        if SPAN_KEY in self:
            current.set(None)
        attach(Context({**({} if SPAN_KEY in self else seen), **self, _ENTRY: entry}))
        return self

    def __exit__(self, *exception: object) -> None:
        """Put back what was current before."""
        before = self._before.pop(get_current().get(_ENTRY), None)
        if before is not None:  # Otherwise the block is left in another context than it was entered in.
            seen, stage = before
            attach(seen)
            current.set(stage)


def _context_here() -> Context:
    """Return the context with the span in it that a stage beginning here would be a child of."""
    seen, stage, engine = get_current(), current.get(), state.engine
    if stage is None or engine is None or engine.ended or stage.recorder is not engine.recorder:
        return seen
    recorder = engine.recorder
    if not recorder.open_bridge() or (stage.span is not None and stage.span._attached is not None):
        return seen
    if not _is_above(stage, span_in(seen)) or not _may_be_a_parent(recorder.bridge, engine.config):
        return seen
    return with_span(seen, recorder.bridge.lazy(stage))


def _may_be_a_parent(bridge: Any, config: Config) -> bool:
    """Whether stages are exported, and not to a file alone where the application's spans go elsewhere."""
    if bridge.visible and not config.sdk_disabled:
        return True
    return "file" in config.exporters and bridge.provider is None


def _is_above(stage: StageRecord, span: Any) -> bool:
    """Whether the span was in the context before the stage, which does not stand in it, began."""
    ids = _ids(span)
    return not ids.is_valid or (ids.span_id, ids.trace_id) == (stage.trace.parent_id, stage.trace.trace_id)


def _ids(span: Any) -> SpanContext:
    return span.get_span_context() if isinstance(span, Span) else INVALID_SPAN_CONTEXT
