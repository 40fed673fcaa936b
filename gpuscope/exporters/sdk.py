"""
The `sdk` exporter: ends the spans that the application's TracerProvider made for stages, each with its GPU child.

The only exporter that holds the bridge to OpenTelemetry: it asks the bridge for a stage's span, and lets go of it. Of
OpenTelemetry it uses the public API, with the application's sampler, processors and limits; it never shuts the provider
down. A span costs some 30 µs of the GIL here, so it works in steps of a few stages, between which the collector pauses.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future, wait
from copy import copy
from itertools import repeat
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeAlias

from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, Status, StatusCode, TraceFlags, set_span_in_context

from gpuscope._data.plain.values import shown
from gpuscope._log import inform, logger
from gpuscope._otel.lazy_span import RealSpan, let_go_of_span
from gpuscope._otel.provider_end import original_flush
from gpuscope.exporters._encoding.details import links_of
from gpuscope.exporters._encoding.rows import rows_of
from gpuscope.exporters._encoding.spans import SAID_BY_US, resolve, spans_of
from gpuscope.exporters._transport.sender import start_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opentelemetry.trace import Span, Tracer

    from gpuscope._data.batch import StageBatch
    from gpuscope._data.plain.values import Clean
    from gpuscope._data.statistics import Delivery
    from gpuscope._otel.bridge import Bridge
    from gpuscope._otel.lazy_span import LazySpan
    from gpuscope.exporters._encoding.details import CleanDetails
    from gpuscope.exporters._encoding.rows import SpanRow
    from gpuscope.exporters._encoding.spans import Group, SpanTemplate

    _Row: TypeAlias = SpanRow[SpanTemplate]

_CODES = (StatusCode.UNSET, StatusCode.OK, StatusCode.ERROR)
_STEP_ROWS = 4
_TOO_MANY_LINKS = (
    "the span of the batch %r links to %d spans, and the application's TracerProvider keeps %d "
    "(OTEL_SPAN_LINK_COUNT_LIMIT). Its members' own spans link to it all the same."
)


class SdkExporter:
    """
    Hands stages to the application's TracerProvider.

    Args:
        bridge: has started the spans that somebody asked for, and starts the others now.
        count: takes a reason and a message with its arguments where links of a batch find no room.

    """

    name = "sdk"
    place = "the program's TracerProvider"

    def __init__(self, bridge: Bridge, count: Callable[..., None] = lambda *_: None) -> None:
        self._bridge, self._count = bridge, count
        self._cache: dict[Group, tuple[SpanTemplate | None, SpanTemplate | None]] = {}
        self._flusher = _Flusher()
        self._succeeded = False

    def export(self, batch: StageBatch, delivery: Delivery) -> Iterator[None]:
        """End the stages' spans, a few per step."""
        tracer, lost = self._bridge.tracer, Counter[str]()
        if tracer is None or (batch.live is None and batch.shared is None):
            delivery.settle(0, {"no_provider": delivery.stages})
            return
        inside, spans = _Inside(tracer), spans_of(batch)
        rows = rows_of(spans, resolve(spans, self._cache, lambda host, gpu: (host, gpu)))
        for number, (lazy, (host, gpu)) in enumerate(zip(batch.live or repeat(None), rows, strict=False)):
            if self._bridge.provider_has_ended():
                # It takes spans as ever, and drops them without a word.
                lost["provider_shutdown"] += 1
                if lazy is not None:
                    let_go_of_span(lazy)
            elif host is None:
                lost["not_recording"] += not inside.finish(gpu)
            elif batch.shared is not None:
                lost["not_recording"] += not _make_light(tracer, host, gpu)
            elif lazy is not None:
                self._end(tracer, lazy, (host, gpu), lost)
            if number % _STEP_ROWS == _STEP_ROWS - 1:
                yield
        exported = len(batch.site) - sum(lost.values())
        if exported and not self._succeeded:
            self._succeeded = True
            inform("exporting spans through the application's %s.", type(self._bridge.provider).__name__)
        delivery.settle(exported, lost)

    def _end(self, tracer: Tracer, lazy: LazySpan, rows: tuple[_Row, _Row | None], lost: Counter[str]) -> None:
        """End one stage's span, with its child."""
        real = self._bridge.realise(lazy) or _made_late(tracer, rows[0])
        if real is None:
            lost["no_span"] += 1
        elif not real.span.is_recording():
            lost["not_recording"] += 1
        else:
            self._count_links(real.span, rows[0])
            _finish(tracer, real, *rows)
        let_go_of_span(lazy)

    def _count_links(self, span: Span, row: _Row) -> None:
        """Count the links to members that the span has no room for: by its limits the SDK drops the first ones."""
        if row.details is None or row.details.linked is None:
            return
        room = getattr(getattr(span, "_limits", None), "max_links", None)
        links = len(links_of(row.details))
        if room is not None and links > room:
            self._count("links", _TOO_MANY_LINKS, row.shared.name, links, room)

    def flush(self, timeout_s: float) -> bool:
        """Ask the provider to flush, and wait no longer than the timeout, which providers often ignore."""
        # A provider that has ended holds nothing, though it may say that it could not flush.
        return self._bridge.provider_has_ended() or self._flusher.flush(self._bridge.provider, timeout_s)

    def shutdown(self, timeout_s: float) -> None:  # noqa: ARG002 - nothing here takes time
        """End our thread. The spans are with the provider, which the application shuts down."""
        self._flusher.stop()


class _Given:
    """An id generator that gives one stage's ids."""

    def __init__(self, row: _Row, usual: object) -> None:
        self._row, self._usual = row, usual

    def __getattr__(self, name: str) -> object:
        return getattr(self._usual, name)

    def generate_span_id(self) -> int:
        return self._row.span_id

    def generate_trace_id(self) -> int:
        return self._row.trace_id


def _made_late(tracer: Tracer, row: _Row) -> RealSpan | None:
    """
    Make the span of a stage whose own ids somebody has seen: while it ran, spans began to be made one by one.

    Returns None where the provider cannot give it those ids.
    """
    if not hasattr(tracer, "id_generator"):
        return None
    context = _below(row)
    try:
        tracer = copy(tracer)
        tracer.id_generator = _Given(row, tracer.id_generator)
        return RealSpan(_start(tracer, row, context), context, max(1, row.start_ns))
    except Exception as error:  # Of the application's sampler or processors, or of a tracer that cannot be copied.
        logger.debug("a stage's span could not be made: %s", shown(error))
        return None


def _below(row: _Row) -> Context:
    """Return a context in which a row's parent is current; it is known by its ids alone."""
    if not row.parent_id:
        return Context()
    flags = TraceFlags(TraceFlags.SAMPLED)
    parent = SpanContext(row.trace_id, row.parent_id, is_remote=row.shared.remote, trace_flags=flags)
    return set_span_in_context(NonRecordingSpan(parent), Context())


class _Inside:
    """
    Makes the spans of stages inside replays of CUDA graphs; nobody can have asked for them before.

    Their parents may have ended, and may have span ids that the provider made. They are known only by their contexts.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._made: dict[int, SpanContext] = {}
        """Contexts of this batch's spans, by the span ids that we had given them. A batch has replays whole."""

    def finish(self, gpu: _Row | None) -> bool:
        """Make and end the span of a row; return whether it was recorded."""
        if gpu is None:
            return False
        parent = self._made.get(gpu.parent_id)
        if parent is None:
            flags = TraceFlags(TraceFlags.SAMPLED)
            parent = SpanContext(gpu.trace_id, gpu.parent_id, is_remote=False, trace_flags=flags)
        span = _start(self._tracer, gpu, set_span_in_context(NonRecordingSpan(parent), Context()))
        recorded = span.is_recording()
        self._made[gpu.span_id] = span.get_span_context()
        span.end(end_time=_end_ns(gpu))
        return recorded


def _make_light(tracer: Tracer, host: _Row, gpu: _Row | None) -> bool:
    """Make and end a light span, and its GPU span; return whether it was recorded."""
    span = _start(tracer, host, _below(host))
    recorded = span.is_recording()
    if host.details is not None:
        _add(span, host.shared.name, host.details)
    if gpu is not None:
        _start(tracer, gpu, set_span_in_context(span, Context())).end(end_time=_end_ns(gpu))
    span.end(end_time=_end_ns(host))
    return recorded


def _finish(tracer: Tracer, real: RealSpan, host: _Row, gpu: _Row | None) -> None:
    span = real.span
    span.set_attributes(_attributes(host))
    if host.details is not None:
        _add(span, host.shared.name, host.details)
    if gpu is not None:
        _start(tracer, gpu, set_span_in_context(span, real.parent_context)).end(end_time=_end_ns(gpu))
    span.end(end_time=max(_end_ns(host), real.start_ns))


def _start(tracer: Tracer, gpu: _Row, context: Context) -> Span:
    return tracer.start_span(gpu.shared.name, context, start_time=max(1, gpu.start_ns), attributes=_attributes(gpu))


def _end_ns(row: _Row) -> int:
    return max(1, row.start_ns, row.end_ns)


def _attributes(row: _Row) -> dict[str, Clean]:
    template, details = row.shared, row.details
    ours: dict[str, Clean] = {}
    attributes: dict[str, Clean] = {}
    for key, value in template.attributes.items():
        (ours if key in SAID_BY_US else attributes)[key] = value
    if details is not None:
        attributes.update(details.attributes)
    # Ours come last, because the SDK makes room by dropping the oldest.
    attributes.update(ours)
    attributes.update(zip(template.measured, row.measured, strict=True))
    if None in attributes.values():  # The SDK exports no null, and older versions warn of one.
        attributes = {key: value for key, value in attributes.items() if value is not None}
    return attributes


def _add(span: Span, name: str, details: CleanDetails) -> None:
    span.update_name(name)
    for event, at_ns, attributes in details.events:
        span.add_event(event, attributes, timestamp=max(1, at_ns))
    for trace_id, span_id, attributes in links_of(details):
        ids = SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
        span.add_link(ids, attributes)
    code, description = details.status
    if code:
        span.set_status(Status(_CODES[code], description or None))


class _Flusher:
    """
    Waits for the provider's `force_flush`, which may ignore its deadline, so that nobody else has to.

    Its thread starts with it: Python 3.12 and later start none once the interpreter has begun to exit.
    """

    def __init__(self) -> None:
        self._requests: SimpleQueue[tuple[Callable[[int], object], float, Future[bool]] | None] = SimpleQueue()
        self._thread = start_thread(self._run, "gpuscope-flush")

    def flush(self, provider: object, timeout_s: float) -> bool:
        """Return whether the provider flushed within the time; raise what it raised."""
        force_flush = original_flush(provider)
        if force_flush is None:
            return True
        if self._thread is None:
            return force_flush(int(timeout_s * 1e3)) is not False
        answer: Future[bool] = Future()
        self._requests.put((force_flush, timeout_s, answer))
        done, _ = wait((answer,), timeout_s)
        return bool(done) and answer.result()

    def stop(self) -> None:
        """End the thread, once a `force_flush` that hangs has returned."""
        self._requests.put(None)

    def _run(self) -> None:
        while (request := self._requests.get()) is not None:
            force_flush, timeout_s, answer = request
            try:
                # A provider that returns None has flushed.
                answer.set_result(force_flush(int(timeout_s * 1e3)) is not False)
            except BaseException as error:  # `flush` raises it again; this thread is still needed.
                answer.set_exception(error)
