"""
Ends the spans that the application's own TracerProvider made for stages, each with its GPU child.

Public API only, with the application's sampler, processors and limits; never shuts the provider down. A span costs
some 30 µs of the GIL here, so it works in slices of a few stages, between which the collector pauses.
"""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, Status, StatusCode, TraceFlags, set_span_in_context

from gpuscope._log import logger
from gpuscope._otel.lazy_span import let_go_of_span
from gpuscope.exporters._encoding.spans import resolve, spans_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.trace import Span, Tracer

    from gpuscope._data.batch import StageBatch
    from gpuscope._data.delivery import Delivery
    from gpuscope._otel.bridge import Bridge
    from gpuscope._otel.lazy_span import LazySpan, RealSpan
    from gpuscope.exporters._encoding.details import CleanDetails
    from gpuscope.exporters._encoding.spans import SpanTemplate

_CODES = (StatusCode.UNSET, StatusCode.OK, StatusCode.ERROR)


_SLICE_ROWS = 4


class SdkExporter:
    """
    Hands stages to the application's TracerProvider.

    Args:
        bridge: started the spans, or starts them now.

    """

    name = "sdk"

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._cache: dict[Any, tuple[SpanTemplate | None, SpanTemplate | None]] = {}
        self._flusher = _Flusher()
        self._succeeded = False

    def export(self, batch: StageBatch, delivery: Delivery) -> Iterator[None]:
        """End the stages' spans, yielding after every few."""
        tracer, lost = self._bridge.tracer, Counter[str]()
        if tracer is None or batch.live is None:
            delivery.settle(0, {"no_provider": delivery.stages})
            return
        inside = _Inside(tracer, batch)
        for number, (lazy, (host, gpu)) in enumerate(zip(batch.live, self._rows_of(batch), strict=True)):
            if host is None:
                lost["not_recording"] += not inside.finish(number, gpu)
            else:
                self._end(tracer, lazy, (host, gpu), lost)
            if number % _SLICE_ROWS == _SLICE_ROWS - 1:
                yield
        exported = len(batch.live) - sum(lost.values())
        if exported and not self._succeeded:
            self._succeeded = True
            logger.info("exporting spans through the application's %s.", type(self._bridge.provider).__name__)
        delivery.settle(exported, lost)

    def _end(self, tracer: Tracer, lazy: LazySpan, spans: tuple[_Row, _Row | None], lost: Counter[str]) -> None:
        """End one stage's span, with its child."""
        real = self._bridge.realise(lazy)
        if real is None:
            lost["no_span"] += 1
        elif not real.span.is_recording():
            lost["not_recording"] += 1
        else:
            _finish(tracer, real, *spans)
        let_go_of_span(lazy)

    def flush(self, timeout_s: float) -> bool:
        """Ask the provider to flush, and wait for it no longer than the timeout, which itself often ignores."""
        return self._flusher.flush(self._bridge.provider, timeout_s)

    def shutdown(self, timeout_s: float) -> None:  # noqa: ARG002 - nothing here takes time
        """Free everything; the spans are with the provider, which the application shuts down."""
        self._flusher.stop()

    def _rows_of(self, batch: StageBatch) -> Iterator[tuple[_Row | None, _Row | None]]:
        """Yield each stage's host and GPU span, if any, with the names and attributes that other exporters give."""
        spans = spans_of(batch)
        host_times = zip(batch.host_start_ns.tolist(), batch.host_end_ns.tolist(), strict=True)
        gpu_times = zip(batch.gpu_start_ns.tolist(), batch.gpu_end_ns.tolist(), strict=True)
        columns = (spans.host_s, spans.gpu_s, spans.launch_s, spans.uncertainty_s)
        measured = zip(*(column.tolist() for column in columns), strict=True)
        facts = resolve(spans, self._cache, lambda host, gpu: (host, gpu))
        for row, ((host, gpu), seconds) in enumerate(zip(facts, measured, strict=True)):
            host_time, gpu_time = next(host_times), next(gpu_times)
            host_row = None if host is None else _Row(host, seconds[:3], host_time, spans.details_by_row.get(row))
            yield host_row, None if gpu is None else _Row(gpu, seconds[1:], gpu_time, None)


class _Row:
    """One span to be ended; plain Python values, for the SDK turns numpy's into text."""

    __slots__ = ("attributes", "details", "end_ns", "name", "start_ns")

    def __init__(
        self, facts: SpanTemplate, seconds: tuple[float, ...], times: tuple[int, int], details: CleanDetails | None
    ) -> None:
        attributes = {**facts.attributes, **dict(zip(facts.measured, seconds, strict=False))}
        if details is not None:
            attributes.update(details.attributes)
        # The SDK exports no null, and older versions warn of one.
        self.attributes = {key: value for key, value in attributes.items() if value is not None}
        self.name, self.details = facts.name, details
        self.start_ns = max(1, times[0])
        self.end_ns = max(self.start_ns, times[1])


class _Inside:
    """
    Makes the spans of stages inside graphs, which nobody has asked for before.

    Their parents may have ended, or have a span id that the provider made: known by their contexts alone.
    """

    def __init__(self, tracer: Tracer, batch: StageBatch) -> None:
        self._tracer = tracer
        self._batch = batch
        self._made: dict[int, SpanContext] = {}
        """Of those in this batch, where a replay is whole, by the ids that we had given them."""

    def finish(self, row: int, gpu: _Row | None) -> bool:
        """Make and end the span of a row; return whether it was recorded."""
        if gpu is None:
            return False
        batch = self._batch
        parent_id = int(batch.parent_id[row])
        parent = self._made.get(parent_id)
        if parent is None:
            trace_id = int(batch.trace_high[row]) << 64 | int(batch.trace_low[row])
            parent = SpanContext(trace_id, parent_id, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
        context = set_span_in_context(NonRecordingSpan(parent), Context())
        span = self._tracer.start_span(gpu.name, context, start_time=gpu.start_ns, attributes=gpu.attributes)
        recorded = span.is_recording()
        self._made[int(batch.span_id[row])] = span.get_span_context()
        span.end(end_time=gpu.end_ns)
        return recorded


def _finish(tracer: Tracer, real: RealSpan, host: _Row, gpu: _Row | None) -> None:
    span = real.span
    span.set_attributes(host.attributes)
    if host.details is not None:
        _add(span, host.name, host.details)
    if gpu is not None:
        context = set_span_in_context(span, real.parent_context)
        child = tracer.start_span(gpu.name, context=context, start_time=gpu.start_ns, attributes=gpu.attributes)
        child.end(end_time=gpu.end_ns)
    span.end(end_time=max(host.end_ns, real.start_ns))


def _add(span: Span, name: str, details: CleanDetails) -> None:
    span.update_name(name)
    for event, at_ns, attributes in details.events:
        span.add_event(event, attributes, timestamp=max(1, at_ns))
    for trace_id, span_id, attributes in details.links:
        ids = SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
        span.add_link(ids, attributes)
    code, description = details.status
    if code:
        span.set_status(Status(_CODES[code], description or None))


class _Flusher:
    """
    Waits for the provider's `force_flush`, which may ignore its deadline, so that nobody else has to.

    Its thread starts with it: at exit Python starts no more.
    """

    def __init__(self) -> None:
        self._requests: SimpleQueue[tuple[Any, float, Future[bool]] | None] = SimpleQueue()
        threading.Thread(target=self._run, name="gpuscope-flush", daemon=True).start()

    def flush(self, provider: Any, timeout_s: float) -> bool:
        """Return whether the provider flushed within the time; raise what it raised."""
        if not hasattr(provider, "force_flush"):
            return True
        answer: Future[bool] = Future()
        self._requests.put((provider, timeout_s, answer))
        done, _ = wait((answer,), timeout_s)
        return bool(done) and answer.result()

    def stop(self) -> None:
        """End the thread, once it is done with what hangs."""
        self._requests.put(None)

    def _run(self) -> None:
        while (request := self._requests.get()) is not None:
            provider, timeout_s, answer = request
            try:
                # A provider that answers nothing has flushed.
                answer.set_result(provider.force_flush(int(timeout_s * 1e3)) is not False)
            except Exception as error:  # Raised again where the collector counts it; this thread is needed again.
                answer.set_exception(error)
