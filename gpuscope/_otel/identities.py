"""
Which ids a stage has in the application's traces: its own, or those of a span that the application's provider makes.

They are settled once per stage: when first asked for, or when the stage is resolved, whichever comes first. Settling
runs the application's code (its sampler, id generator and span processors), so whatever that raises stays here, and
nobody waits for it without a limit. Changes no current context.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from opentelemetry import trace as api
from opentelemetry.trace import INVALID_SPAN, ProxyTracerProvider, SpanContext

from gpuscope._data.plain.tracebacks import traceback_of
from gpuscope._interrupts import is_the_programs
from gpuscope._log import SUPPRESSED, WarnOnce, later
from gpuscope._otel.contexts import UNKNOWN, flags, plain_attributes, span_in, with_span
from gpuscope._otel.lazy_span import (
    LazySpan,
    RealSpan,
    give_ids,
    lazy_span,
    let_go_of_contexts,
    real_span,
    record_of,
    settled_ids,
)
from gpuscope._otel.parents import trace_state, with_parent_of
from gpuscope._otel.sampling import EnvironmentSampler, is_kept, sampler_of
from gpuscope._otel.stock import Judge
from gpuscope._recording.current_stage import parent_stage, root_stage
from gpuscope._version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer, TracerProvider

    from gpuscope._data.record import StageRecord
    from gpuscope._data.wall_clock import WallClock
    from gpuscope._settings.config import Config

T = TypeVar("T")

_TURN_S = 1.0
"""How long a thread waits for its turn to settle."""


class Identities:
    """
    Decides sampling and ids, one stage after another.

    Args:
        config: for its exporters and the environment's sampler.
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
        get_provider: Callable[[], TracerProvider | None],
    ) -> None:
        self.sdk = "sdk" in config.exporters
        """Whether the application's provider makes the ids. The collector may set this too; see `uses_sdk`."""
        self.offset_ns: int | None = None
        """Epoch less the records' clock, once the collector has set it, so that both place a stage at the same time."""
        self.wall: WallClock | None = None
        """The same where the wall clock was set anew, for stages of requests that began before."""
        self.warnings = WarnOnce(SUPPRESSED, later)
        """For exceptions of the application's code: one warning per kind."""
        self._auto = "auto" in config.exporters and config.traces_exporter.strip().lower() != "none"
        self._clock, self._epoch_clock = clock, epoch_clock
        # Cheap enough for the hot path; it returns None where there is no provider. With OTEL_SDK_DISABLED,
        # OpenTelemetry only passes on what comes from elsewhere, and so do we.
        self.look_for_provider = (lambda: None) if config.sdk_disabled else get_provider
        self._sampler = EnvironmentSampler(config.sampler, config.sampler_ratio, self.warnings)
        self._lock, self._retired = threading.RLock(), False
        self._tracer: tuple[TracerProvider, Tracer] | None = None
        self._judge = Judge(lambda: self.provider, lambda: self._ask("tracer", lambda: self.tracer, None))
        self.judgement = self._judge.judgement

    @property
    def provider(self) -> TracerProvider | None:
        """The application's TracerProvider, or None."""
        provider = self.look_for_provider()
        if provider is UNKNOWN:
            provider = api.get_tracer_provider()
            return None if isinstance(provider, ProxyTracerProvider) else provider
        return provider

    @property
    def tracer(self) -> Tracer | None:
        """The application's provider's tracer for gpuscope, or None."""
        provider = self.provider
        if provider is None:
            return None
        if self._tracer is None or self._tracer[0] is not provider:
            self._tracer = provider, api.get_tracer("gpuscope", __version__, tracer_provider=provider)
        return self._tracer[1]

    def uses_sdk(self) -> bool:
        """
        Return whether the provider makes the ids.

        With `auto` it does once there is one whose spans have to be made one by one, collector or not.
        """
        if not self.sdk and self._auto and self.provider is not None and self.judgement().makes_ids:
            self.sdk = True
        return self.sdk

    def retire(self) -> None:
        """Settle nothing more: after shutdown, and in a fork's child, where a lock of another thread stays locked."""
        self._retired = True
        self._lock = threading.RLock()

    def now_ns(self, record: StageRecord) -> int:
        """Return the time since the epoch, as the stage's own times are placed."""
        return self._epoch_ns(record, self._clock())

    def seen_by(self, record: StageRecord) -> Span:
        """Return the application's span above the stage, or an invalid one."""
        span = span_in(record.context_before)
        while (stage := record_of(span)) is not None:
            span = span_in(stage.context_before)
        return span if isinstance(span, api.Span) else INVALID_SPAN

    def lazy(self, record: StageRecord) -> LazySpan:
        """Return the stage's lazy span; make one if the stage was entered before there was a provider."""
        if record.span is None:
            with self._turn():
                return lazy_span(self, record)
        return lazy_span(self, record)

    def context_of(self, record: StageRecord) -> SpanContext:
        """Settle the ids and return them; where that is not possible now, answer as if there were no stage."""
        if not self._retired:
            with self._turn() as given:
                if given and settled_ids(record) is None:
                    self._settle(record)
        return settled_ids(record) or self.seen_by(record).get_span_context()

    def realise(self, lazy: LazySpan) -> RealSpan | None:
        """Return the span that the application's provider made for the stage, or None."""
        lazy.get_span_context()
        stage = record_of(lazy)
        return None if stage is None else real_span(stage)

    def sampled(self, record: StageRecord, *, wait_s: float = _TURN_S) -> bool:
        """Return whether the stage's trace is exported; decided once per trace."""
        if record.trace.sampled is None:
            with self._turn(wait_s=wait_s) as given:
                if given:
                    self._decide(record)
        return record.trace.sampled is not False

    def identify(self, record: StageRecord) -> tuple[int, int, int, bool]:
        """
        Settle a stage that has ended, and let go of the context that it ran in.

        Returns trace id, span id, parent's span id or 0, and whether it is exported.
        """
        if record.trace.sampled is None and not record.trace.parent_id and self.keeps_roots():
            record.trace.sampled = True  # No other answer is possible, so this need not wait for a turn.
        if not self.sdk and record.trace.sampled is not None and settled_ids(record) is None:
            # Nobody has asked for the ids, and nobody else makes them. The general way takes five times as long.
            outer, trace = parent_stage(record), record.trace
            if outer is None or settled_ids(outer) is None:
                let_go_of_contexts(record)
                parent_id = trace.parent_id if outer is None else outer.span_id
                return trace.trace_id, record.span_id, parent_id, trace.sampled is not False
        trace_id, span_id, sampled = self.settle(record)
        outer = parent_stage(record)
        parent_id = record.trace.parent_id if outer is None else ids_of(outer)[1]
        let_go_of_contexts(record)
        return trace_id, span_id, parent_id, sampled

    def settle(self, record: StageRecord) -> tuple[int, int, bool]:
        """Return trace id, span id and whether it is exported, of a stage that may still be running."""
        if self.uses_sdk():
            self.lazy(record).get_span_context()
        real, ids = real_span(record), settled_ids(record)
        if real is not None:
            sampled = real.span.is_recording()
        elif ids is not None and self.sdk:
            sampled = ids.trace_flags.sampled  # The provider's span has ended and was let go.
        else:
            sampled = self.sampled(record)
        return *ids_of(record), sampled

    @contextmanager
    def _turn(self, *, wait_s: float = _TURN_S) -> Iterator[bool]:
        """
        Wait until no other thread settles, and yield whether this one may.

        It may not in two cases. In the first, this thread is settling already: the application's sampler or processor
        runs as a part of that, and has asked for the ids that are being settled. In the second, another thread has
        been settling for too long. It may be waiting for a lock that this thread holds, such as one of `logging`, and
        then neither thread would go on.
        """
        # `retire` may put another lock in this one's place meanwhile.
        lock = self._lock
        inside = lock._is_owned()  # type: ignore[attr-defined]  # `threading.Condition` asks so, too.
        try:
            yield not inside and lock.acquire(timeout=wait_s)
        finally:
            # Asked again, because an interrupt may come between the lock and whoever notes that it was taken.
            if not inside and lock._is_owned():  # type: ignore[attr-defined]
                lock.release()

    def _settle(self, record: StageRecord) -> None:
        tracer = self._ask("tracer", lambda: self.tracer, None) if self.uses_sdk() else None
        # From the outermost stage inwards. Not by recursion: whoever asks may be near the end of Python's stack.
        chain = [record]
        while tracer is not None and (outer := parent_stage(chain[-1])) is not None and settled_ids(outer) is None:
            chain.append(outer)
        for each in reversed(chain):
            real = None if tracer is None else self._ask("span", partial(self._start, tracer, each), None)
            ids = self._own_ids(each) if real is None else real.span.get_span_context()
            give_ids(each, ids, real)

    def _start(self, tracer: Tracer, record: StageRecord) -> RealSpan:
        context, start_ns = self._parent_context(record), max(1, self._epoch_ns(record, record.start_ns))
        span = tracer.start_span(
            record.site.name, context=context, start_time=start_ns, attributes=plain_attributes(record)
        )
        return RealSpan(span, context, start_ns)

    def _own_ids(self, record: StageRecord) -> SpanContext:
        self._decide(record)
        trace = record.trace
        sampled = flags(sampled=trace.sampled is not False)
        return SpanContext(
            trace.trace_id, record.span_id, is_remote=False, trace_flags=sampled, trace_state=trace_state(record)
        )

    def _decide(self, record: StageRecord) -> None:
        if record.trace.sampled is None:
            if not record.trace.parent_id and self.keeps_roots():
                record.trace.sampled = True
                return
            root = root_stage(record)
            record.trace.sampled = self._ask("sampler", lambda: self._decision(root), otherwise=True)

    def keeps_roots(self) -> bool:
        """Return whether the sampler whose decision it is keeps every trace that begins in this process."""
        return self._sampler.keeps_all if self.look_for_provider() is None else self._judge.keeps_roots()

    def _decision(self, root: StageRecord) -> bool:
        sampler, context, trace_id = sampler_of(self.provider), self._parent_context(root), root.trace.trace_id
        asked = context, trace_id, root.site.name, plain_attributes(root)
        return self._sampler.keeps(*asked) if sampler is None else is_kept(sampler, *asked)

    def _parent_context(self, record: StageRecord) -> Context:
        """Return what the stage's span starts in: the context at its entry, with its parent as the current span."""
        outer = parent_stage(record)
        if outer is None:
            return with_parent_of(record.trace, record.context_before)
        real = real_span(outer)
        return with_span(record.context_before, lazy_span(self, outer) if real is None else real.span)

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
        except Exception as error:  # Of its sampler, id generator or processor; its program goes on as without us.
            if is_the_programs(error):
                raise
            # Not `exc_info`, with which the log would print what the exception holds.
            self.warnings.warn(kind, "the application's OpenTelemetry failed (%s).\n%s", kind, traceback_of(error))
            return otherwise


def ids_of(record: StageRecord) -> tuple[int, int]:
    """Return trace id and span id: the settled ones, else the record's own."""
    ids = settled_ids(record)
    return (record.trace.trace_id, record.span_id) if ids is None else (ids.trace_id, ids.span_id)
