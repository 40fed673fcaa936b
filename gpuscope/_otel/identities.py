"""
Which ids a stage has in the application's traces: its own, or those of a span that the application's provider makes.

Settled once a stage, when first asked for or at resolution, whichever comes first. Runs the application's code (its
sampler, id generator and span processors), so none of it may raise here or wait for ever. Changes no current context.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from opentelemetry import trace as api
from opentelemetry.trace import INVALID_SPAN, ProxyTracerProvider, SpanContext

from gpuscope._log import SUPPRESSED, WarnOnce
from gpuscope._otel.contexts import (
    UNKNOWN,
    flags,
    plain_attributes,
    span_in,
    with_parent_of,
    with_span,
)
from gpuscope._otel.lazy_span import LazySpan, RealSpan
from gpuscope._otel.sampling import EnvironmentSampler, is_kept, sampler_of
from gpuscope._recording.ancestry import parent_stage, root_stage
from gpuscope._version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer, TraceState

    from gpuscope._data.record import StageRecord, Trace
    from gpuscope._data.wall_clock import WallClock
    from gpuscope._settings.config import Config

T = TypeVar("T")

_TURN_S = 1.0


class Identities:
    """
    Decides sampling and ids, one stage after another.

    Args:
        config: for the exporters and the sampler of the environment.
        clock: the clock of the records.
        epoch_clock: nanoseconds since the epoch.
        get_provider: returns the application's provider, or None.

    """

    def __init__(
        self,
        config: Config,
        *,
        clock: Callable[[], int],
        epoch_clock: Callable[[], int],
        get_provider: Callable[[], Any],
    ) -> None:
        self.sdk = "sdk" in config.exporters
        """Whether the application's provider makes the ids. The collector may set it; see `uses_sdk`."""
        self.offset_ns: int | None = None
        """Epoch less the records' clock, where the collector shares its own, so that both place a stage alike."""
        self.wall: WallClock | None = None
        """The same where the wall clock was set anew, for stages of requests that began before."""
        self.warnings = WarnOnce(SUPPRESSED)
        """What of the application's raised, by kind."""
        self._auto = "auto" in config.exporters and config.traces_exporter.strip().lower() != "none"
        self._clock, self._epoch_clock = clock, epoch_clock
        # Cheap enough for the hot path: None where there is no provider. Disabled, OpenTelemetry only passes on what
        # comes from elsewhere; so do we.
        self.look_for_provider = (lambda: None) if config.sdk_disabled else get_provider
        self._sampler = EnvironmentSampler(config.sampler, config.sampler_ratio)
        self._lock, self._holder, self._retired = threading.Lock(), 0, False
        self._tracer: tuple[Any, Tracer] | None = None

    @property
    def provider(self) -> Any:
        """The application's TracerProvider, or None."""
        provider = self.look_for_provider()
        if provider is UNKNOWN:
            provider = api.get_tracer_provider()
            return None if isinstance(provider, ProxyTracerProvider) else provider
        return provider

    @property
    def tracer(self) -> Tracer | None:
        """Our tracer of the application's provider, or None."""
        provider = self.provider
        if provider is None:
            return None
        if self._tracer is None or self._tracer[0] is not provider:
            self._tracer = provider, api.get_tracer("gpuscope", __version__, tracer_provider=provider)
        return self._tracer[1]

    def uses_sdk(self) -> bool:
        """Return whether the provider makes the ids; with `auto` from its first appearance, collector or not."""
        if not self.sdk and self._auto and self.provider is not None:
            self.sdk = True
        return self.sdk

    def retire(self) -> None:
        """Settle nothing more: after shutdown, and in a fork's child, where another thread's lock stays locked."""
        self._retired = True
        self._lock, self._holder = threading.Lock(), 0

    def now_ns(self, record: StageRecord) -> int:
        """Return the time since the epoch, as the stage's own times are placed."""
        return self._epoch_ns(record, self._clock())

    def seen_by(self, record: StageRecord) -> Span:
        """Return the application's span above the stage, or an invalid one."""
        span = span_in(record.context_before)
        while type(span) is LazySpan:
            span = span_in(span._record.context_before)
        return span if isinstance(span, api.Span) else INVALID_SPAN

    def lazy(self, record: StageRecord) -> LazySpan:
        """Return the stage's lazy span; one is made for a stage that was entered before there was a provider."""
        if record.span is None:
            with self._turn():
                return self._lazy(record)
        return record.span  # type: ignore[no-any-return]

    def context_of(self, lazy: LazySpan) -> SpanContext:
        """Settle the ids; where that can't be now, answer as if there were no stage."""
        if not self._retired:
            with self._turn() as given:
                if given and lazy._context is None:
                    self._settle(lazy)
        return lazy._context or self.seen_by(lazy._record).get_span_context()

    def realise(self, lazy: LazySpan) -> RealSpan | None:
        """Return the span that the application's provider made for the stage, or None."""
        lazy.get_span_context()
        return lazy._real

    def sampled(self, record: StageRecord) -> bool:
        """Return whether the stage's trace is exported; decided once a trace."""
        if record.trace.sampled is None:
            with self._turn() as given:
                if given:
                    self._decide(record)
        return record.trace.sampled is not False

    def identify(self, record: StageRecord) -> tuple[int, int, int, bool]:
        """
        Settle a stage that has ended, and let go of the context that it ran in.

        Returns:
            Trace id, span id, parent's span id or 0, and whether it is exported.

        """
        lazy: LazySpan | None = record.span
        if record.trace.sampled is None and self._keeps_all(record.trace):
            record.trace.sampled = True  # Out of turn: no other answer is possible.
        if lazy is None and not self.sdk and record.trace.sampled is not None:
            # Nobody asked, and nobody else makes ids: the common case, in a fifth of the time.
            outer, record.context_before = record.outer, None
            trace = record.trace
            if outer is None or (outer.trace is trace and outer.span is None):
                parent_id = trace.parent_id if outer is None else outer.span_id
                return trace.trace_id, record.span_id, parent_id, trace.sampled is not False
        trace_id, span_id, sampled = self.settle(record)
        lazy = record.span
        outer = parent_stage(record)
        parent_id = record.trace.parent_id if outer is None else ids_of(outer)[1]
        # A task that starts its successor inside its stage would otherwise hold every context before it.
        record.context_before = None
        if lazy is not None:
            lazy._attached = None
        return trace_id, span_id, parent_id, sampled

    def settle(self, record: StageRecord) -> tuple[int, int, bool]:
        """Return trace id, span id and whether it is exported, of a stage that may still run."""
        lazy: LazySpan | None = record.span
        if self.uses_sdk():
            lazy = self.lazy(record)
            lazy.get_span_context()
        if lazy is not None and lazy._real is not None:
            sampled = lazy._real.span.is_recording()
        elif lazy is not None and self.sdk and lazy._context is not None:
            sampled = lazy._context.trace_flags.sampled  # Its span has ended, and was let go.
        else:
            sampled = self.sampled(record)
        return *ids_of(record), sampled

    @contextmanager
    def _turn(self) -> Iterator[bool]:
        # Not given when the application's sampler or processor asks, on this thread, for what is being settled; nor
        # when another thread's takes long: it may be waiting for a lock (of logging, say) that this thread holds.
        me, lock = threading.get_ident(), self._lock
        given = self._holder != me and lock.acquire(timeout=_TURN_S)
        if given:
            self._holder = me
        try:
            yield given
        finally:
            if given:
                self._holder = 0
                lock.release()

    def _lazy(self, record: StageRecord) -> LazySpan:
        if record.span is None:
            record.span = LazySpan(self, record)
        return record.span  # type: ignore[no-any-return]

    def _settle(self, lazy: LazySpan) -> None:
        tracer = self._ask("tracer", lambda: self.tracer, None) if self.uses_sdk() else None
        # From the outermost down, and not by recursion: Python's stack may be nearly used up where somebody asks.
        chain = [lazy]
        while tracer is not None and (outer := parent_stage(chain[-1]._record)) is not None:
            above = self._lazy(outer)
            if above._context is not None:
                break
            chain.append(above)
        for each in reversed(chain):
            real = None if tracer is None else self._ask("span", partial(self._start, tracer, each._record), None)
            each._real = real
            each._context = self._own_context(each._record) if real is None else real.span.get_span_context()

    def _start(self, tracer: Tracer, record: StageRecord) -> RealSpan:
        context, start_ns = self._parent_context(record), max(1, self._epoch_ns(record, record.start_ns))
        span = tracer.start_span(
            record.site.name, context=context, start_time=start_ns, attributes=plain_attributes(record)
        )
        return RealSpan(span, context, start_ns)

    def _own_context(self, record: StageRecord) -> SpanContext:
        self._decide(record)
        trace = record.trace
        sampled = flags(sampled=trace.sampled is not False)
        return SpanContext(
            trace.trace_id, record.span_id, is_remote=False, trace_flags=sampled, trace_state=_trace_state(record)
        )

    def _decide(self, record: StageRecord) -> None:
        if record.trace.sampled is None:
            if self._keeps_all(record.trace):
                record.trace.sampled = True
                return
            root = root_stage(record)
            record.trace.sampled = self._ask("sampler", lambda: self._decision(root), otherwise=True)

    def _keeps_all(self, trace: Trace) -> bool:
        """Whether nobody but our own sampler has a say, and it keeps every trace."""
        return self._sampler.keeps_all and not trace.parent_id and self.look_for_provider() is None

    def _decision(self, root: StageRecord) -> bool:
        sampler, context, trace_id = sampler_of(self.provider), self._parent_context(root), root.trace.trace_id
        if sampler is None:
            return self._sampler.keeps(context, trace_id)
        return is_kept(sampler, context, trace_id, root.site.name, plain_attributes(root))

    def _parent_context(self, record: StageRecord) -> Context:
        """Return what the stage's span starts in: the context at its entry, with its parent as the current span."""
        outer = parent_stage(record)
        if outer is None:
            return with_parent_of(record.trace, record.context_before)
        above = self._lazy(outer)
        return with_span(record.context_before, above if above._real is None else above._real.span)

    def _epoch_ns(self, record: StageRecord, at_ns: int) -> int:
        if at_ns == 0:  # Its entry failed before it had a time.
            return self._epoch_clock()
        if self.offset_ns is None:
            return self._epoch_clock() - self._clock() + at_ns
        if self.wall is not None and self.wall.has_stepped:
            return at_ns + self.wall.offset_of(record)
        return at_ns + self.offset_ns

    def _ask(self, kind: str, question: Callable[[], T], otherwise: T) -> T:
        try:
            return question()
        except Exception:  # The application's sampler, id generator or processor; its code goes on as without us.
            self.warnings.warn(kind, "the application's TracerProvider failed (%s).", kind, exc_info=True)
            return otherwise


def ids_of(record: StageRecord) -> tuple[int, int]:
    """Return trace id and span id: those settled, else the record's own."""
    settled: SpanContext | None = None if record.span is None else record.span._context
    return (record.trace.trace_id, record.span_id) if settled is None else (settled.trace_id, settled.span_id)


def _trace_state(record: StageRecord) -> TraceState | None:
    """Return the vendors' part of a trace that came from elsewhere: whoever passes a trace on must pass it on."""
    span = span_in(root_stage(record).context_before)
    if type(span) is LazySpan:
        return None if span._context is None else span._context.trace_state
    return span.get_span_context().trace_state if isinstance(span, api.Span) else None
