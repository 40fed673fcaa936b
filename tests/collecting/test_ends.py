"""The ends of periods, providers and flushes: all is exported or counted, and nobody waits for ever."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time

import pytest
from opentelemetry import trace
from opentelemetry.metrics import _internal as metrics_internal
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from gpuscope import _runtime, stage
from gpuscope._otel.provider_end import end_of
from gpuscope._recording.state import state
from gpuscope._settings.config import Config

from ..exporters.receiver import Receiver


class Takes:
    """An exporter that loses batches while it is told to."""

    name = "takes"
    loses = False

    def export(self, batch, delivery):
        """Take it, or not."""
        stages = len(batch.site)
        delivery.settle(0, {"refused": stages}) if self.loses else delivery.settle(stages)

    def flush(self, timeout_s):
        """Hold nothing."""
        return True

    def shutdown(self, timeout_s):
        """End."""


@pytest.fixture
def period():
    """Return a function that begins a period of recording with a thread of its own."""
    before = (state.engine, state.recorder, state.may_toggle)
    engines = []

    def begin(*exporters, on_pass=None, **settings):
        config = Config().changed(**{"mode": "on", "exporters": "none", "interval_s": 0.01, **settings})
        engines.append(_runtime.start(config, exporters=exporters))
        if on_pass is not None:
            engines[-1].collector._on_pass = on_pass
        return engines[-1]

    yield begin
    for engine in engines:
        engine.shutdown(5)
    state.engine, state.recorder, state.may_toggle = before


def balanced(statistics):
    """Whether every stage has a fate."""
    fates = statistics.exported + sum(statistics.dropped.values()) + sum(statistics.lost.values())
    return statistics.recorded == fates + statistics.pending


class Raises(Takes):
    """An exporter that takes nothing, and says so in its own way."""

    name = "raises"

    def export(self, batch, delivery):
        """Fail."""
        raise ValueError("no")


@pytest.mark.parametrize("error", [RuntimeError("no disk"), SystemExit(1)], ids=repr)
def test_what_handlers_of_logs_raise_ends_no_thread(period, error):
    """A warning that cannot be logged costs nothing else: the collector goes on, and so does the account."""

    class Broken(logging.Handler):
        def emit(self, record):
            raise error

    engine, handler = period(Raises()), Broken()
    logging.getLogger("gpuscope").addHandler(handler)
    try:
        for number in (1, 2):
            with stage("s"):
                pass
            assert not engine.flush(10)
            assert engine.statistics().lost == {"exporter_error": number}
    finally:
        logging.getLogger("gpuscope").removeHandler(handler)


class TestPeriod:
    """Stages that end after the period in which they began."""

    @pytest.mark.parametrize("started", [True, False])
    def test_a_stage_in_progress_is_counted(self, period, started):
        """What ends after `shutdown` is refused and said to be, whether anything had ended before or not."""
        engine = period(Takes())
        if started:
            with stage("before"):
                pass
        with stage("over the end"), stage("inside"):
            engine.shutdown(10)
        found = engine.statistics()
        assert found.dropped["after_shutdown"] == 2
        assert (found.exported, found.pending, found.recorded) == (started, 0, 2 + started)
        assert balanced(found)

    def test_what_ends_in_the_next_period_is_in_its_account(self, period):
        """Nobody can ask for the account of a period that another has replaced."""
        first = period(Takes())
        with stage("over the end"):
            first.shutdown(10)
            second = period(Takes())
            with stage("in the second"):
                pass
        assert second.flush(10)
        found = second.statistics()
        assert (found.recorded, found.exported, found.dropped["after_shutdown"]) == (2, 1, 1)
        assert balanced(found)

    def test_a_flush_without_a_collector_does_not_say_that_all_is_exported(self, period, monkeypatch):
        """Where no thread can be had, stages wait, and are exported on the thread that ends the period."""
        engine = period(Takes())

        def refuses(_):
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuses)
        with stage("waits"):
            pass
        assert engine.statistics().pending == 1
        assert not engine.flush(10)
        assert engine.shutdown(10)
        assert engine.statistics().exported == 1

    def test_what_slipped_in_is_lost_and_not_pending(self, period):
        """A record that came to the queue after it was emptied for the last time, as threads may do, is swept up."""
        engine = period(Takes())
        with stage("before"):
            pass
        held = stage("held")
        with held:
            engine.shutdown(10)
            engine.recorder.accept(engine.queue)
        found = engine.statistics()
        assert (found.lost, found.pending) == ({"shutdown": 1}, 0)
        assert balanced(found)

    def test_many_threads_over_the_end(self, period):
        """However threads and the end fall together, each stage has one fate."""
        engine, go = period(Takes()), threading.Event()

        def work():
            go.wait()
            for _ in range(300):
                with stage("work"):
                    pass

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        go.set()
        engine.shutdown(10)
        for thread in threads:
            thread.join()
        found = engine.statistics()
        assert (found.recorded, found.pending) == (1200, 0)
        assert balanced(found)
        assert engine.statistics() == found

    def test_the_second_shutdown_says_what_the_first_said(self, period):
        """Both tell whether all was exported; so does a flush after them."""
        exporter = Takes()
        for loses in (False, True):
            exporter.loses = loses
            engine = period(exporter)
            with stage("work"):
                pass
            said = [engine.shutdown(10), engine.shutdown(10), engine.flush(10)]
            assert said == [not loses] * 3


class TestFlush:
    """`flush` is true only if all was exported."""

    def test_a_loss_is_said_once(self, period):
        """A flush after a loss is false, wherever the loss came from; the next is true again."""
        exporter = Takes()
        engine = period(exporter)

        def flushed():
            with stage("work"):
                pass
            return engine.flush(20)

        assert flushed()
        exporter.loses = True
        assert not flushed()
        exporter.loses = False
        assert flushed()
        engine.ledger.fail("begin_failed")
        assert not flushed()
        assert flushed()

    def test_what_found_no_room_is_not_exported(self, period):
        """Stages that were dropped because the queue was full make the next flush false."""
        engine = period(Takes(), queue_size=16, interval_s=60.0)
        for _ in range(200):
            with stage("work"):
                pass
        assert engine.flush(20) is (not engine.statistics().dropped["queue_full"])
        assert engine.flush(20)

    def test_all_has_its_turn_under_a_constant_load(self, period):
        """While more is recorded than can be collected, flushes end and passes go on."""
        passes, busy, done = [], threading.Event(), threading.Event()

        def on_pass(_):
            passes.append(1)
            if len(passes) > 20:
                busy.set()

        engine = period(Takes(), on_pass=on_pass)

        def load():
            while not done.is_set():
                with stage("work"):
                    pass

        threads = [threading.Thread(target=load) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            assert busy.wait(30)
            began = time.monotonic()
            assert engine.flush(30, send=False)
            engine.flush(30)
            assert time.monotonic() - began < 30
        finally:
            done.set()
            for thread in threads:
                thread.join()


def make_provider(processor=SimpleSpanProcessor):
    """Return a provider and what it exports to."""
    memory, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(processor(memory))
    return provider, memory


@pytest.fixture
def provider(monkeypatch):
    """The application's provider, with what it exported."""
    made, memory = make_provider(BatchSpanProcessor)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", made)
    return made, memory


class TestProvider:
    """The application ends its TracerProvider."""

    def test_stages_before_its_end_are_exported(self, period, provider):
        """What ended a moment before goes through it; what comes after is lost, and counted as that."""
        made, memory = provider
        engine = period(exporters="auto")
        for _ in range(3):
            with stage("before"):
                pass
        made.shutdown()
        with stage("after"):
            pass
        assert not engine.flush(20)
        assert [span.name for span in memory.get_finished_spans()] == ["before"] * 3
        found = engine.statistics()
        assert (found.exported, found.lost) == (3, {"provider_shutdown": 1})

    def test_the_end_of_one_that_came_late(self, period, monkeypatch):
        """A provider that is set while stages are recorded gets all that ended before its end, too."""
        engine = period(exporters="sdk")
        with stage("early"):
            pass
        engine.flush(20)
        made, memory = make_provider()
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", made)
        engine.flush(20)
        with stage("late"):
            pass
        made.shutdown()
        assert [span.name for span in memory.get_finished_spans()] == ["late"]

    def test_an_end_that_went_another_way_is_noticed(self, period, provider):
        """Where `shutdown` is called past ours, stages that come later are not said to be exported."""
        made, memory = provider
        engine = period(exporters="sdk")
        with stage("before"):
            pass
        assert engine.flush(20)
        type(made).shutdown(made)
        with stage("after"):
            pass
        engine.flush(20)
        assert engine.statistics().lost == {"provider_shutdown": 1}
        assert len(memory.get_finished_spans()) == 1

    def test_its_shutdown_is_as_it_was(self):
        """Arguments, results and exceptions pass; what we do before it cannot be in its way."""

        class Odd:
            def shutdown(self, *arguments, **keywords):
                """End."""
                if arguments == ("bad",):
                    raise KeyError(arguments)
                return arguments, keywords

        odd = Odd()
        end = end_of(odd)
        assert end_of(odd) is end
        end.tell(lambda: 1 / 0)
        assert odd.shutdown(1, a=2) == ((1,), {"a": 2})
        with pytest.raises(KeyError):
            odd.shutdown("bad")
        assert odd.shutdown.__doc__ == "End."
        assert end.has_come

    def test_a_provider_that_cannot_be_watched_is_left_alone(self):
        """No `shutdown`, or one that cannot be replaced: spans go there as ever."""

        class Slotted:
            __slots__ = ()

            def shutdown(self):
                """End."""

        assert end_of(object()) is None
        assert end_of(Slotted()) is None

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_child_does_not_wait_for_its_parents_thread(self):
        """In a fork's child, which has no such thread, the provider's end is its end alone."""
        made, _ = make_provider()
        end_of(made).tell(lambda: os._exit(1))
        child = os.fork()
        if not child:
            made.shutdown()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0

    def test_the_newest_period_is_asked(self, period, provider):
        """After a change of settings the provider's end concerns the period that is on."""
        made, memory = provider
        for _ in range(2):
            engine = period(exporters="sdk")
            with stage("work"):
                pass
        made.shutdown()
        assert engine.statistics().exported == 1
        assert len(memory.get_finished_spans()) == 1


def test_the_last_metrics_of_a_provider_have_all(period, monkeypatch):
    """A MeterProvider that the application ends reads what had ended a moment before."""
    exported = []

    class Keeps(MetricExporter):
        def export(self, metrics_data, timeout_millis=0, **keywords):
            """Keep it."""
            exported.append(metrics_data)
            return MetricExportResult.SUCCESS

        def shutdown(self, timeout_millis=0, **keywords):
            """End."""

        def force_flush(self, timeout_millis=0):
            """Hold nothing."""
            return True

    reader = PeriodicExportingMetricReader(Keeps(), export_interval_millis=10**8)
    made = MeterProvider([reader], shutdown_on_exit=False)
    monkeypatch.setattr(metrics_internal, "_METER_PROVIDER", made)
    engine = period(Takes(), metrics="sdk", interval_s=30.0, warmup=0)
    with stage("first"):
        pass
    assert engine.flush(20)
    with stage("last"):
        pass
    made.shutdown()
    points = [
        dict(point.attributes)
        for resource in exported[-1].resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.data.data_points
    ]
    assert any("last" in attributes.values() for attributes in points)


class TestLateProvider:
    """The application makes its TracerProvider after stages were recorded."""

    def test_stages_on_both_sides_of_its_coming_are_exported(self, monkeypatch):
        """What was made for the endpoint goes there, and what comes after goes to the provider."""
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
        made, memory = make_provider(SimpleSpanProcessor)
        with contextlib.closing(Receiver()) as receiver:
            config = Config().changed(mode="on", exporters="auto", otlp_endpoint=receiver.url, metrics="none", warmup=0)
            with _runtime.period(config) as engine:
                engine.recorder.accept(engine.queue)
                collector = engine.collector
                for _ in range(3):
                    with stage("before"):
                        pass
                collector._prepare()
                collector._intake.slice(may_ask=True)
                monkeypatch.setattr(trace, "_TRACER_PROVIDER", made)
                with stage("after"):
                    trace.get_current_span().get_span_context()  # Before the collector has seen the provider.
                while collector.step():
                    pass
                collector._finish(time.monotonic() + 20)
                found = engine.statistics()
            assert [span.name for span in receiver.spans] == ["before"] * 3
        assert [span.name for span in memory.get_finished_spans()] == ["after"]
        assert (found.exported, found.lost) == (4, {})
