"""Stages inside the application's traces: the door to OpenTelemetry, with real SDK providers."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import logging
import os
import random
import subprocess
import sys
import threading
import time
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace

import pytest
from opentelemetry import baggage, context, propagate, trace
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.trace import NonRecordingSpan, SpanContext, Status, StatusCode, TraceFlags, TraceState

from gpuscope._data.native import StageRecord, Trace
from gpuscope._data.record import ExceptionInfo, Site, ThreadInfo
from gpuscope._log import say_what_waits
from gpuscope._otel.bridge import Bridge
from gpuscope._otel.lazy_span import own_context, settled_ids
from gpuscope._recording.queue import ByteBudget
from gpuscope._settings.config import Config


class Program:
    """An application with stages and a provider of its own: as little of the recording side as the door needs."""

    def __init__(self, provider=None, **settings):
        self.provider, self.finished = provider, InMemorySpanExporter()
        if provider is not None and hasattr(provider, "add_span_processor"):
            provider.add_span_processor(SimpleSpanProcessor(self.finished))
        self.random_bits = random.Random(7).getrandbits
        self.recorder = SimpleNamespace(budget=ByteBudget(1 << 20), random_bits=self.random_bits)
        self.ids, self.ended, self.current = itertools.count(0xABC0), [], ContextVar("current", default=None)
        visible = settings.pop("visible", None)
        self.bridge = Bridge(Config(**settings), get_provider=lambda: self.provider, visible=visible)

    @contextlib.contextmanager
    def stage(self, name="stage", **attributes):
        """Run a block as a stage."""
        record = self.begin(Site(name, attributes))
        try:
            yield record
        except Exception as error:
            record.error = ExceptionInfo(type(error).__name__, str(error), ())
            raise
        finally:
            self.end(record)

    def begin(self, site):
        """Begin a stage, as the hot path does."""
        record = StageRecord()
        record.members = None
        record.recorder, record.site, record.outer = self.recorder, site, self.current.get()
        record.span = record.context_before = record.timed_stream = record.pair = record.range = record.error = None
        record.before, record.place = None, 0
        record.attributes, record.start_ns, record.end_ns = None, 0, 0
        record.thread, record.span_id = ThreadInfo(1, "main"), next(self.ids)
        record.trace = record.outer.trace if record.outer is not None else self.new_trace(site)
        self.bridge.enter(record)
        self.current.set(record)
        record.start_ns = time.perf_counter_ns()
        return record

    def new_trace(self, site):
        """Make the trace of a root stage."""
        made = Trace()
        made.trace_id, made.parent_id, made.remote = self.random_bits(128), 0, False
        made.root, made.sampled, made.state = site, None, None
        return made

    def end(self, record):
        """End a stage, and keep its record."""
        record.end_ns = time.perf_counter_ns()
        if record.span is not None:
            own = context.get_current() is own_context(record)
            (self.bridge.leave if own else self.bridge.leave_elsewhere)(record)
        if self.current.get() is record:
            self.current.set(record.outer)
        self.ended.append(record)

    def span(self, name):
        """Return a block that is an application's span."""
        return self.provider.get_tracer("application").start_as_current_span(name)

    def identities(self):
        """Return (trace id, span id, parent's id, sampled) by stage, as the collector would have them."""
        return {record.site.name: self.bridge.identify(record) for record in self.ended}

    def exported(self):
        """Return the application's finished spans by name."""
        return {span.name: span for span in self.finished.get_finished_spans()}


@pytest.fixture(params=["otlp", "sdk"], ids=["own ids", "provider's ids"])
def exporters(request):
    """Both ways in which a stage gets its ids."""
    return (request.param,)


@pytest.fixture(autouse=True)
def clean_context():
    """Each test starts without a span and must end without one of a stage."""
    yield
    left = trace.get_current_span()
    context.attach(context.Context())
    assert left is trace.INVALID_SPAN


def remote_context(*, sampled, state=None):
    """Return what a propagator makes of the headers of an incoming request."""
    parent = SpanContext(0x1234 << 64 | 5, 0x77, is_remote=True, trace_flags=TraceFlags(sampled), trace_state=state)
    return trace.set_span_in_context(NonRecordingSpan(parent), context.Context())


class TestNesting:
    """Stages in spans, and spans in stages."""

    def test_spans_and_stages_alternate(self, exporters):
        """An application's span, a stage in it, a span in that and a stage in that are one chain of one trace."""
        program = Program(TracerProvider(), exporters=exporters)
        with program.span("request"), program.stage("infer"), program.span("query"), program.stage("decode"):
            pass
        spans, stages = program.exported(), program.identities()
        assert stages["infer"][2] == spans["request"].context.span_id
        assert spans["query"].parent.span_id == stages["infer"][1]
        assert stages["decode"][2] == spans["query"].context.span_id
        assert {stages["infer"][0], stages["decode"][0]} == {spans["request"].context.trace_id}
        assert {span.context.trace_id for span in spans.values()} == {spans["request"].context.trace_id}

    def test_stage_without_a_span_above(self, exporters):
        """A stage with nothing above it begins a trace, and spans and stages inside belong to it."""
        program = Program(TracerProvider(), exporters=exporters)
        with program.stage("outer"), program.stage("inner"), program.span("query"):
            pass
        stages, query = program.identities(), program.exported()["query"]
        assert stages["outer"][2] == 0
        assert stages["inner"][2] == stages["outer"][1]
        assert query.parent.span_id == stages["inner"][1]
        assert query.context.trace_id == stages["outer"][0] == stages["inner"][0] != 0

    def test_stage_takes_itself_out_of_the_context(self, exporters):
        """After a stage, the current context is the very one from before it."""
        program = Program(TracerProvider(), exporters=exporters)
        before = context.get_current()
        with program.stage("infer"):
            assert context.get_current() is not before
        assert context.get_current() is before

    def test_nobody_asked(self):
        """As long as nobody asks, a stage costs the application's provider nothing: it is not even asked to sample."""
        program = Program(TracerProvider(sampler=Complaining()), exporters=("sdk",))
        with program.stage("outer"), program.stage("inner"):
            pass
        assert not program.bridge.warnings.counts

    def test_provider_that_comes_later(self, exporters):
        """Stages that were entered before the provider was set are outer stages of those after it all the same."""
        program = Program(None, exporters=exporters)
        with program.stage("outer"):
            program.provider = TracerProvider()
            program.provider.add_span_processor(SimpleSpanProcessor(program.finished))
            with program.stage("inner"), program.span("query"):
                pass
        stages = program.identities()
        assert program.exported()["query"].parent.span_id == stages["inner"][1]
        assert stages["inner"][2] == stages["outer"][1]
        assert stages["inner"][0] == stages["outer"][0]

    def test_provider_that_comes_later_inside_a_remote_trace(self, exporters):
        """A stage in a stage that saw the same remote parent is the stage's child, not the remote parent's."""
        program = Program(None, exporters=exporters)
        token = context.attach(remote_context(sampled=True))
        with program.stage("outer"):
            program.provider = TracerProvider()
            with program.stage("inner"):
                pass
        context.detach(token)
        stages = program.identities()
        assert stages["outer"][2] == 0x77
        assert stages["inner"][2] == stages["outer"][1]
        assert stages["inner"][0] == stages["outer"][0] == 0x1234 << 64 | 5

    def test_without_a_provider(self):
        """Where no provider exists the context is left alone, and a remote parent is still found."""
        program = Program(None)
        token = context.attach(remote_context(sampled=True))
        before = context.get_current()
        with program.stage("outer") as outer, program.stage("inner"):
            assert context.get_current() is before
        context.detach(token)
        assert outer.trace.remote
        assert program.identities()["outer"][::2] == (0x1234 << 64 | 5, 0x77)

    def test_attached_context_decides(self, exporters):
        """A context handed to another thread makes the stage there a child of the stage that it was taken from."""
        program = Program(TracerProvider(), exporters=exporters)

        def work(handed):
            token = context.attach(handed)
            with program.stage("worker"):
                pass
            context.detach(token)

        with program.stage("request"):
            thread = threading.Thread(target=work, args=(context.get_current(),))
            thread.start()
            thread.join()
        stages = program.identities()
        assert stages["worker"][2] == stages["request"][1]
        assert stages["worker"][0] == stages["request"][0]

    def test_decision_is_handed_on(self, exporters):
        """A stage that is a child by ids alone is exported if its parent is, and only then."""
        program = Program(TracerProvider(sampler=ParentBased(ALWAYS_OFF)), exporters=exporters)
        with program.stage("request"):
            handed = context.get_current()
        token = context.attach(handed)
        with program.stage("later"):
            pass
        context.detach(token)
        assert [identity[3] for identity in program.identities().values()] == [False, False]

    def test_application_goes_back(self, exporters):
        """Where the application put back a context from above the enclosing stage, that context has the parent."""
        program = Program(TracerProvider(), exporters=exporters)
        with program.span("request") as request:
            above = context.get_current()
            with program.stage("outer"):
                token = context.attach(above)
                with program.stage("beside"):
                    pass
                context.detach(token)
        assert program.identities()["beside"][2] == request.get_span_context().span_id

    def test_root_is_the_outermost_stage(self):
        """A stage below an application's span inside a stage still belongs to the outermost stage's request."""
        program = Program(TracerProvider(), exporters=("otlp",))
        with program.stage("request") as request, program.span("query"), program.stage("decode") as decode:
            assert decode.trace is not request.trace
            assert decode.trace.root is request.site

    def test_stale_recorder(self, exporters):
        """A stage of a recorder that is gone is not a parent; what lies above it is."""
        program = Program(TracerProvider(), exporters=exporters)
        with program.span("request"), program.stage("old") as old:
            program.recorder = object()
            program.current.set(None)
            with program.stage("new"):
                pass
            program.current.set(old)
        assert program.identities()["new"][2] == program.exported()["request"].context.span_id

    def test_invisible(self):
        """Where spans go to a file only, the application's spans keep the parents that they had."""
        program = Program(TracerProvider(), exporters=("file",))
        with program.span("request"), program.stage("outer"), program.stage("inner"), program.span("query"):
            assert type(trace.get_current_span()).__name__ == "_Span"
        spans, stages = program.exported(), program.identities()
        assert spans["query"].parent.span_id == spans["request"].context.span_id == stages["outer"][2]
        assert stages["inner"][2] == stages["outer"][1]

    def test_invisible_below_a_span(self):
        """There too a stage is the child of the application's span around it, also once its trace is decided on."""
        program = Program(TracerProvider(), exporters=("file",))
        with program.stage("outer"), program.span("query"), program.stage("decode"), program.stage("inner"):
            pass
        spans, stages = program.exported(), program.identities()
        assert stages["decode"][2] == spans["query"].context.span_id
        assert stages["inner"][2] == stages["decode"][1]

    def test_disabled_sdk(self):
        """With `OTEL_SDK_DISABLED` nothing of ours stands in the context, for it would never be exported."""
        program = Program(TracerProvider(), exporters=("auto",), sdk_disabled=True)
        with program.stage("infer") as record:
            assert record.span is None
        assert program.bridge.provider is None


class TestIds:
    """Ids are the same wherever they are seen."""

    def test_inject(self, exporters):
        """The ids in the headers of an outgoing request are those that are exported."""
        program, headers = Program(TracerProvider(), exporters=exporters), {}
        with program.stage("infer"):
            propagate.inject(headers)
        trace_id, span_id, _, sampled = program.identities()["infer"]
        assert sampled
        assert headers["traceparent"].split("-")[1:3] == [f"{trace_id:032x}", f"{span_id:016x}"]

    def test_ids_do_not_change(self, exporters):
        """Ids that were given out once are given out for ever, after the stage and after its export too."""
        program = Program(TracerProvider(), exporters=exporters)
        with program.stage("infer") as record:
            span = trace.get_current_span()
            asked = span.get_span_context()
        assert program.bridge.identify(record)[:2] == (asked.trace_id, asked.span_id)
        assert not asked.is_remote
        assert span.get_span_context() == asked
        assert span.context == asked

    def test_outer_ids_do_not_change(self, exporters):
        """A stage whose ids are known is the parent under these ids of a stage that is asked afterwards."""
        program, headers = Program(TracerProvider(), exporters=exporters), {}
        with program.stage("outer"):
            propagate.inject(headers)
            with program.stage("inner"):
                trace.get_current_span().get_span_context()
        assert f"{program.identities()['inner'][2]:016x}" == headers["traceparent"].split("-")[2]

    def test_auto_follows_the_provider(self):
        """With `auto` the provider makes the ids as soon as it exists, though the collector has not seen it yet."""
        program = Program(TracerProvider())
        program.bridge.sdk = False
        program.provider.add_span_processor(type("Starts", (SpanProcessor,), {"on_start": lambda *_, **__: None})())
        with program.stage("infer") as record:
            assert trace.get_current_span().get_span_context().span_id != record.span_id
        assert program.bridge.sdk

    def test_auto_with_traces_exporter_none(self):
        """With `OTEL_TRACES_EXPORTER=none` and `auto` nothing is exported, so nothing stands in the context."""
        program = Program(TracerProvider(), traces_exporter="none")
        with program.stage("infer") as record:
            assert record.span is None
        assert not program.bridge.uses_sdk()

    def test_trace_state_is_passed_on(self, exporters):
        """What other vendors put into a trace's state goes out again with a stage's ids."""
        program, headers = Program(TracerProvider(), exporters=exporters), {}
        token = context.attach(remote_context(sampled=True, state=TraceState([("vendor", "1")])))
        with program.stage("outer"), program.stage("inner"):
            propagate.inject(headers)
        context.detach(token)
        assert headers["tracestate"] == "vendor=1"

    def test_deep_chain(self, exporters):
        """Nine hundred stages in one another are settled by one question, without recursion."""
        program = Program(TracerProvider(), exporters=exporters)
        with contextlib.ExitStack() as stack:
            records = [stack.enter_context(program.stage(f"s{depth}")) for depth in range(900)]
            innermost = trace.get_current_span().get_span_context()
        stages = program.identities()
        assert stages["s899"][1] == innermost.span_id
        assert all(stages[f"s{n}"][2] == stages[f"s{n - 1}"][1] for n in range(1, 900))
        assert len({identity[0] for identity in stages.values()}) == 1
        assert all(record.context_before is None for record in records)

    def test_two_threads_ask_at_once(self, exporters):
        """Threads that ask a stage for its ids at the same moment get the same ones, of one span."""
        asking = threading.Semaphore(0)
        counting = Counting(on_start=lambda: asking.acquire(timeout=60))
        program = Program(TracerProvider(), exporters=exporters)
        program.provider.add_span_processor(counting)
        for _ in range(20):
            with program.stage("outer"), program.stage("inner"):
                span, answers = trace.get_current_span(), []

                def ask(span=span, answers=answers):
                    asking.release()
                    answers.append(span.get_span_context())

                threads = [threading.Thread(target=ask) for _ in range(4)]
                [thread.start() for thread in threads]
                [thread.join() for thread in threads]
                assert len({(answer.trace_id, answer.span_id) for answer in answers}) == 1
        assert counting.started == (40 if exporters == ("sdk",) else 0)

    def test_start_time(self):
        """The provider's span starts when the stage did, on the clock that the collector shares."""
        program = Program(TracerProvider(), exporters=("sdk",))
        program.bridge.offset_ns = 10**18
        with program.stage("infer") as record:
            pass
        real = program.bridge.realise(program.bridge.lazy(record))
        assert real.start_ns == real.span.start_time == record.start_ns + 10**18

    def test_baggage_reaches_the_processors(self):
        """The provider's processors see the context that the stage was entered in, with its baggage."""
        counting = Counting()
        program = Program(TracerProvider(), exporters=("sdk",))
        program.provider.add_span_processor(counting)
        token = context.attach(baggage.set_baggage("tenant", "blue"))
        with program.stage("infer"):
            trace.get_current_span().get_span_context()
        context.detach(token)
        assert counting.tenants == ["blue"]

    def test_spans_above_reach_the_processors(self):
        """As the current span they see the one that the provider made for the stage around, with its attributes."""
        counting = Counting()
        program = Program(TracerProvider(), exporters=("sdk",))
        program.provider.add_span_processor(counting)
        with program.stage("outer", model="vit") as outer, program.stage("inner"):
            trace.get_current_span().get_span_context()
            real = program.bridge.realise(program.bridge.lazy(outer)).span
        assert counting.above == [trace.INVALID_SPAN, real]
        assert real.attributes["model"] == "vit"

    def test_a_span_that_could_not_be_started(self, caplog):
        """The stage has ids of its own, and those inside it are its children under these."""
        failures = iter([True, False])
        counting = Counting(on_start=lambda: 1 / 0 if next(failures) else None)
        program = Program(TracerProvider(), exporters=("sdk",))
        program.provider.add_span_processor(counting)
        with program.stage("outer") as outer, program.stage("inner") as inner:
            trace.get_current_span().get_span_context()
        stages = program.identities()
        assert stages["outer"][:2] == (outer.trace.trace_id, outer.span_id)
        assert stages["inner"][2] == outer.span_id
        assert program.bridge.realise(program.bridge.lazy(inner)).span.parent.span_id == outer.span_id
        say_what_waits()
        assert [record.message.count("ZeroDivisionError") for record in caplog.records] == [1]

    def test_retired(self):
        """After a shutdown or a fork a stage that nobody asked before answers with the span above it."""
        program = Program(TracerProvider(), exporters=("sdk",))
        with program.span("request") as request, program.stage("infer"):
            program.bridge.retire()
            assert trace.get_current_span().get_span_context() == request.get_span_context()

    def test_no_provider_for_sdk(self):
        """Where `sdk` is asked for and no provider comes, stages have ids of their own."""
        program = Program(None, exporters=("sdk",))
        with program.stage("infer") as record:
            pass
        assert program.bridge.identify(record) == (record.trace.trace_id, record.span_id, 0, True)
        assert program.bridge.realise(program.bridge.lazy(record)) is None


class Unprintable:
    """An object that may be on the GPU."""

    def __repr__(self):
        raise AssertionError("printed")

    __str__ = __len__ = __iter__ = __bool__ = __repr__


class TestApplicationCode:
    """What the application's code sees of a stage, and does with it."""

    def test_attributes_survive(self, exporters):
        """Attributes set on the current span are the stage's."""
        program = Program(TracerProvider(), exporters=exporters)
        with program.stage("infer") as record:
            trace.get_current_span().set_attribute("user", "ada")
            trace.get_current_span().set_attributes({"batch": 8, "model": "vit"})
        assert program.bridge.details(record).attributes == {"user": "ada", "batch": 8, "model": "vit"}

    def test_notes_survive(self, exporters):
        """Events, links, status, name and exceptions put on the current span come with the stage's details."""
        program, other = Program(TracerProvider(), exporters=exporters), SpanContext(7, 8, is_remote=True)
        with program.stage("infer") as record:
            span = trace.get_current_span()
            span.add_event("cache miss", {"key": "a"}, timestamp=1234)
            span.add_link(other, {"why": "batch"})
            span.update_name("infer vit")
            span.set_status(StatusCode.ERROR, "bad image")
            span.record_exception(KeyError("missing"))
        details = program.bridge.details(record)
        assert details.events[0] == ("cache miss", 1234, {"key": "a"})
        name, at_ns, attributes = details.events[1]
        assert (name, attributes["exception.type"]) == ("exception", "KeyError")
        assert attributes["exception.stacktrace"].message == "'missing'"
        assert abs(at_ns - time.time_ns()) < 60e9
        assert details.links == ((7, 8, {"why": "batch"}),)
        assert (details.name, details.status) == ("infer vit", ("ERROR", "bad image"))

    def test_what_is_said_is_taken_at_once(self):
        """Of what the application tells the current span nothing is kept, printed, or seen to change later."""
        program, batch, seen = Program(TracerProvider(), exporters=("otlp",)), Unprintable(), [1]
        given = {"batch": batch, "seen": seen}
        with program.stage("infer") as record:
            span = trace.get_current_span()
            span.set_attributes(given)
            span.set_attribute("one", batch)
            span.add_event(batch, given, timestamp=float("nan"))
            span.add_link(SpanContext(7, 8, is_remote=True), given)
            span.update_name(batch)
            span.set_status(StatusCode.ERROR, batch)
            span.record_exception(ValueError("bad", batch), given)
            seen.append(2)
        details, taken = program.bridge.details(record), {"batch": "<Unprintable>", "seen": [1]}
        assert details.attributes == {**taken, "one": "<Unprintable>"}
        (name, _, attributes), (_, _, error) = details.events
        assert (name, attributes, details.name) == ("<Unprintable>", taken, "<Unprintable>")
        assert error.items() >= taken.items()
        assert error["exception.message"] == "('bad', <Unprintable>)"
        assert details.links == ((7, 8, taken),)
        assert details.status == ("ERROR", "<Unprintable>")

    def test_status_rules(self):
        """As in the SDK, UNSET changes nothing and OK is final."""
        program = Program(TracerProvider(), exporters=("otlp",))
        with program.stage("infer") as record:
            span = trace.get_current_span()
            span.set_status(Status(StatusCode.ERROR, "one"))
            span.set_status(StatusCode.UNSET)
            assert program.bridge.details(record).status == ("ERROR", "one")
            span.set_status(StatusCode.OK)
            span.set_status(StatusCode.ERROR, "two")
        assert program.bridge.details(record).status == ("OK", None)

    def test_error_is_among_the_details(self):
        """An exception that left the stage is part of its details, and a stage with nothing has none."""
        program = Program(TracerProvider(), exporters=("otlp",))
        with pytest.raises(ValueError, match="bad"), program.stage("infer") as record:
            raise ValueError("bad")
        with program.stage("plain") as plain:
            pass
        assert program.bridge.details(record).error.message == "bad"
        assert program.bridge.details(plain) is None

    def test_end_does_not_end_the_stage(self, exporters):
        """`end()` on the current span leaves the stage running, as does using it as a context manager."""
        program = Program(TracerProvider(), exporters=exporters)
        with program.stage("infer") as record:
            trace.get_current_span().end()
            with trace.get_current_span() as span:
                span.set_attribute("a", 1)
            with trace.use_span(trace.get_current_span(), end_on_exit=True):
                pass
            assert record.end_ns == 0
            assert trace.get_current_span().is_recording()
            trace.get_current_span().set_attribute("b", 2)
        assert program.bridge.details(record).attributes == {"a": 1, "b": 2}

    def test_after_the_end(self):
        """What is said to a stage's span after the stage is ignored."""
        program = Program(TracerProvider(), exporters=("otlp",))
        with program.stage("infer") as record:
            span = trace.get_current_span()
        span.set_attribute("a", 1)
        span.add_event("late")
        span.set_status(StatusCode.ERROR)
        span.update_name("late")
        assert not span.is_recording()
        details = program.bridge.details(record)
        assert details is None or (details.events, details.status, details.name) == ((), None, None)
        assert record.attributes is None

    def test_what_the_api_does_not_name(self):
        """Code that reads `attributes` from the current span finds those of the application's span, as before."""
        program = Program(TracerProvider(), exporters=("sdk",))
        with program.span("request") as request:
            request.set_attribute("route", "/infer")
            with program.stage("outer"), program.stage("inner"):
                assert trace.get_current_span().attributes["route"] == "/infer"
        with program.stage("alone"), pytest.raises(AttributeError):
            _ = trace.get_current_span().attributes

    def test_printing_settles_nothing(self):
        """To print the current span does not make the provider start one."""
        program = Program(TracerProvider(), exporters=("sdk",))
        with program.stage("infer") as record:
            assert repr(trace.get_current_span()) == "LazySpan(stage='infer')"
        assert settled_ids(record) is None

    def test_events_are_bounded(self):
        """A stage keeps the latest events, as many as the SDK would."""
        program = Program(TracerProvider(), exporters=("otlp",))
        with program.stage("infer") as record:
            for number in range(500):
                trace.get_current_span().add_event(str(number))
        assert [event[0] for event in program.bridge.details(record).events] == [str(n) for n in range(372, 500)]


class TestContexts:
    """Tasks, threads and generators."""

    def test_generator_closed_elsewhere(self, exporters, caplog):
        """A generator that is closed in another context than it began in logs nothing and disturbs nothing."""
        program = Program(TracerProvider(), exporters=exporters)

        def tokens():
            with program.stage("decode"):
                yield 1

        generator = tokens()
        contextvars.copy_context().run(next, generator)
        with caplog.at_level(logging.DEBUG), program.span("other") as other:
            generator.close()
            assert trace.get_current_span() is other
        assert not caplog.records

    @pytest.mark.parametrize("cleared", [False, True], ids=["span ended", "context cleared"])
    def test_a_generator_kept_below_a_span_that_has_ended(self, exporters, cleared):
        """Its stage is still open, and what begins afterwards is a trace of its own, as among spans of the SDK."""
        program = Program(TracerProvider(), exporters=exporters)

        def tokens():
            with program.stage("decode"):
                yield 1

        generator = tokens()
        if cleared:
            next(generator)
            token = context.attach(context.Context())
        else:
            with program.span("request"):
                next(generator)
        for _ in range(2):
            with program.stage("later"), program.stage("inside"):
                pass
            found = program.identities()
            assert not found["later"][2]
            assert found["inside"][2] == found["later"][1]
        if cleared:
            context.detach(token)
        generator.close()
        assert program.identities()["decode"][0] != found["later"][0]

    def test_context_of_the_application_stays(self, exporters):
        """Baggage that the application attached inside a stage is still there after it; the stage is not."""
        program = Program(TracerProvider(), exporters=exporters)
        with program.span("request") as request:
            with program.stage("infer"):
                token = context.attach(baggage.set_baggage("tenant", "blue"))
            assert baggage.get_baggage("tenant") == "blue"
            assert trace.get_current_span() is request
            context.attach(trace.set_span_in_context(request))
            del token

    def test_out_of_order(self, exporters):
        """Two stages that end in the order in which they began leave neither of them in the context."""
        program = Program(TracerProvider(), exporters=exporters)
        first = program.begin(Site("first", {}))
        second = program.begin(Site("second", {}))
        program.end(first)
        program.end(second)
        assert trace.get_current_span() is trace.INVALID_SPAN

    def test_tasks(self, exporters):
        """Concurrent tasks nest under the stage that started them, each with its own stages."""
        program = Program(TracerProvider(), exporters=exporters)

        async def work(name):
            """A query inside a stage."""
            with program.stage(name):
                await asyncio.sleep(0)
                with program.span(f"query {name}"):
                    await asyncio.sleep(0)

        async def request():
            """Two stages at once, inside a third."""
            with program.stage("request"):
                await asyncio.gather(work("a"), work("b"))

        asyncio.run(request())
        stages, spans = program.identities(), program.exported()
        for name in "ab":
            assert stages[name][2] == stages["request"][1]
            assert spans[f"query {name}"].parent.span_id == stages[name][1]

    @pytest.mark.parametrize("provided", [True, False], ids=["provider", "no provider"])
    def test_successors(self, provided, exporters):
        """A task that starts its successor inside its stage makes a chain of parents, which holds no old stage."""
        program = Program(TracerProvider() if provided else None, exporters=exporters)
        contexts = [contextvars.copy_context()]

        def tick():
            with program.stage("tick"):
                contexts.append(contextvars.copy_context())

        for _ in range(5):
            contexts.pop().run(tick)
        identities = [program.bridge.identify(record) for record in program.ended]
        assert [each[2] for each in identities] == [0, *(each[1] for each in identities[:-1])]
        assert len({each[0] for each in identities}) == 1
        assert all(record.outer is None and record.context_before is None for record in program.ended)


class TestSampling:
    """Who decides, and that traces stay whole."""

    def test_remote_unsampled_parent(self, exporters):
        """Below a remote parent that is not sampled nothing is exported, and the headers say so."""
        program, headers = Program(TracerProvider(), exporters=exporters), {}
        token = context.attach(remote_context(sampled=False))
        with program.stage("outer"), program.stage("inner"), program.span("query"):
            propagate.inject(headers)
        context.detach(token)
        assert [identity[3] for identity in program.identities().values()] == [False, False]
        assert headers["traceparent"].endswith("-00")
        assert not program.exported()

    def test_remote_unsampled_parent_without_a_provider(self):
        """The environment's sampler, too, follows a remote parent."""
        program = Program(None)
        token = context.attach(remote_context(sampled=False))
        with program.stage("outer"), program.stage("inner"):
            pass
        context.detach(token)
        assert [identity[3] for identity in program.identities().values()] == [False, False]

    def test_ratio_keeps_traces_whole(self, exporters):
        """With the application's parent-based ratio each trace of spans and stages is exported whole or not at all."""
        program = Program(TracerProvider(sampler=ParentBased(TraceIdRatioBased(0.5))), exporters=exporters)
        kept = 0
        for _ in range(60):
            program.ended.clear()
            program.finished.clear()
            with program.stage("request"), program.span("query"), program.stage("decode"):
                pass
            decisions = {identity[3] for identity in program.identities().values()} | {bool(program.exported())}
            assert len(decisions) == 1
            kept += decisions.pop()
        assert 5 < kept < 55

    def test_own_sampler(self, exporters):
        """The application's sampler decides for stages without a parent."""
        program = Program(TracerProvider(sampler=ALWAYS_OFF), exporters=exporters)
        with program.stage("infer"):
            trace.get_current_span().get_span_context()
            assert not trace.get_current_span().is_recording()
        assert not program.identities()["infer"][3]

    def test_sampler_that_ignores_parents(self, exporters):
        """A sampler of the application's that does not follow parents is asked though there is one."""
        program = Program(TracerProvider(sampler=ALWAYS_ON), exporters=exporters)
        token = context.attach(remote_context(sampled=False))
        with program.stage("infer"):
            pass
        context.detach(token)
        assert program.identities()["infer"][3]

    @pytest.mark.parametrize(
        ("name", "ratio", "alone", "below_unsampled"),
        [
            ("always_on", 1.0, True, True),
            ("always_off", 1.0, False, False),
            ("parentbased_always_on", 1.0, True, False),
            ("parentbased_always_off", 1.0, False, False),
            ("traceidratio", 0.0, False, False),
            ("traceidratio", 1.0, True, True),
            ("parentbased_traceidratio", 1.0, True, False),
        ],
    )
    def test_environment(self, name, ratio, alone, below_unsampled):
        """Without a provider `OTEL_TRACES_SAMPLER` and its argument decide."""
        program = Program(None, sampler=name, sampler_ratio=ratio)
        with program.stage("alone"):
            pass
        token = context.attach(remote_context(sampled=False))
        with program.stage("below"):
            pass
        context.detach(token)
        stages = program.identities()
        assert (stages["alone"][3], stages["below"][3]) == (alone, below_unsampled)

    def test_sampler_that_raises(self, exporters, caplog):
        """A sampler that raises costs the application nothing: the stage is sampled, counted, and said once."""
        program = Program(TracerProvider(sampler=Complaining()), exporters=exporters)
        for _ in range(3):
            with program.stage("infer") as record:
                assert trace.get_current_span().get_span_context().is_valid
        assert program.identities()["infer"][3]
        assert exporters == ("sdk",) or record.trace.sampled is True
        failures = program.bridge.warnings.counts
        assert sum(failures.values()) >= 3
        say_what_waits()
        said = [record.levelname for record in caplog.records if "OpenTelemetry failed" in record.message]
        assert said == ["WARNING"] * len(failures)

    def test_sampler_that_asks_back(self, exporters):
        """A sampler that asks the current span for its ids while these are being settled is answered."""
        program = Program(TracerProvider(sampler=Curious()), exporters=exporters)
        with program.span("request") as request, program.stage("infer"):
            assert trace.get_current_span().get_span_context().trace_id == request.get_span_context().trace_id

    def test_sampler_sees_the_stage(self, exporters):
        """The sampler is given the stage's name and its plain attributes."""
        seen = Curious()
        program = Program(TracerProvider(sampler=seen), exporters=exporters)
        with program.stage("infer", model="vit", odd=object()):
            trace.get_current_span().get_span_context()
        assert seen.asked[-1] == ("infer", {"gpuscope.stage": "infer", "model": "vit"})


@pytest.mark.parametrize("before", [True, False], ids=["provider first", "stages first"])
def test_global_provider(before):
    """With the provider that the process sets, before the first stage or after it, spans and stages nest."""
    set_up = "trace.set_tracer_provider(program.provider)"
    lines = [
        "import sys; sys.path.insert(0, sys.argv[1])",
        "from test_otel import *",
        "program = Program(TracerProvider(), exporters=('sdk',)); program.bridge = Bridge(Config())",
        set_up if before else "",
        "with program.stage('early'): assert (trace.get_current_span() is trace.INVALID_SPAN) is not " + str(before),
        "" if before else set_up,
        "with trace.get_tracer('app').start_as_current_span('request'), program.stage('infer'):",
        "    with trace.get_tracer('app').start_as_current_span('query'): pass",
        "stages, spans = program.identities(), program.exported()",
        "assert spans['query'].parent.span_id == stages['infer'][1]",
        "assert stages['infer'][2] == spans['request'].context.span_id",
        "assert stages['early'][1]",
    ]
    run(lines)


def test_no_provider_is_loaded():
    """Without a provider, none is loaded from the environment either, which is the application's to do."""
    lines = [
        "import sys; sys.path.insert(0, sys.argv[1])",
        "from test_otel import *",
        "program = Program(None); program.bridge = Bridge(Config())",
        "with program.stage('infer'): pass",
        "program.identities()",
        "assert program.bridge.provider is None",
    ]
    run(lines, OTEL_PYTHON_TRACER_PROVIDER="no_such_provider")


def run(lines, **environ):
    """Run a program in a process of its own."""
    folder = Path(__file__).parent
    command = [sys.executable, "-c", "\n".join(lines), str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environ}, cwd=folder.parent, check=False
    )
    assert done.returncode == 0, done.stderr


class Counting(SpanProcessor):
    """Counts the spans that the provider starts."""

    def __init__(self, on_start=lambda: None):
        self.started, self.tenants, self.above, self.then = 0, [], [], on_start

    def on_start(self, span, parent_context=None):
        """Count the span, and do what was asked for."""
        self.then()
        self.started += 1
        self.tenants.append(baggage.get_baggage("tenant", parent_context))
        self.above.append(trace.get_current_span(parent_context))


class Complaining(Sampler):
    """Raises."""

    def should_sample(self, *arguments, **keywords):
        """Fail."""
        raise RuntimeError("no decision today")

    def get_description(self):
        """Return a name."""
        return "Complaining"


class Curious(Sampler):
    """Asks the current span for its ids, as a sampler that logs would."""

    def __init__(self):
        self.asked = []

    def should_sample(self, parent_context, trace_id, name, kind=None, attributes=None, *arguments, **keywords):
        """Note the question, and sample."""
        trace.get_current_span().get_span_context()
        self.asked.append((name, dict(attributes or {})))
        return ALWAYS_ON.should_sample(parent_context, trace_id, name, kind, attributes)

    def get_description(self):
        """Return a name."""
        return "Curious"
