"""The exporter to the application's own TracerProvider."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from opentelemetry import context, trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from gpuscope._collecting.batch_builder import BatchBuilder
from gpuscope._data.batch import RowFlag
from gpuscope._data.native import StageRecord, Trace
from gpuscope._data.record import ExceptionInfo, Site, ThreadInfo
from gpuscope._otel.bridge import Bridge
from gpuscope._otel.lazy_span import own_context, real_span
from gpuscope._recording.ledger import Ledger
from gpuscope._settings.config import Config
from gpuscope.exporters.sdk import SdkExporter
from gpuscope.testing import FakeDevice, FakeStream, ManualClock

EPOCH_NS = 1_700_000_000 * 10**9


class Service:
    """A provider of the application's, a bridge to it, and stages that have ended."""

    def __init__(self, provider=None, **settings):
        self.provider = TracerProvider(resource=Resource({})) if provider is None else provider
        self.finished, self.ledger = InMemorySpanExporter(), Ledger()
        if isinstance(self.provider, TracerProvider):
            self.provider.add_span_processor(SimpleSpanProcessor(self.finished))
        clock = ManualClock()
        epoch = lambda: EPOCH_NS + clock()  # noqa: E731
        settings.setdefault("exporters", ("sdk",))
        self.bridge = Bridge(
            Config(**settings), clock=clock, epoch_clock=epoch, get_provider=lambda: self.provider or None
        )
        self.builder = BatchBuilder(FakeDevice(clock), warmup=0, clock=clock, epoch_clock=epoch)
        self.exporter = SdkExporter(self.bridge)
        self.recorder, self.span_ids = object(), iter(range(1, 10_000))

    def run(self, name="infer", outer=None, inside=lambda record: None, error=None, attributes=None):
        """Run a stage of one millisecond."""
        record = StageRecord()
        record.members = None
        record.recorder, record.site, record.outer = (
            self.recorder,
            Site(name, attributes or {}, function="app.run"),
            outer,
        )
        record.span = record.context_before = record.timed_stream = record.pair = record.range = record.attributes = (
            None
        )
        record.before = None
        record.error, record.end_ns, record.thread = error, 0, ThreadInfo(41, "main")
        record.start_ns, record.span_id = self.bridge._clock() + 1_000_000, next(self.span_ids)
        record.trace = outer.trace if outer is not None else Trace()
        if outer is None:
            record.trace.trace_id, record.trace.parent_id, record.trace.remote = next(self.span_ids), 0, False
            record.trace.root, record.trace.sampled, record.trace.state = record.site, None, None
        self.bridge.enter(record)
        inside(record)
        record.end_ns = record.start_ns + 1_000_000
        if record.span is not None:
            self.bridge.leave(record)
        return record

    def batch(self, *records, gpu=False, flags=0):
        """Resolve stages; on a GPU, the work starts half a millisecond after the launch and takes two."""
        rows = []
        for record in records:
            start = record.start_ns + 500_000 if gpu else 0
            record.timed_stream = FakeStream(0, 7) if gpu else None
            rows.append((record, start, start + 2_000_000 if gpu else 0, 3_500 if gpu else 0, flags))
        self.builder.add(rows, self.bridge)
        return self.builder.finish(self.bridge)

    def export(self, *records, **how):
        """Resolve and export stages; return the finished spans by name."""
        batch = self.batch(*records, **how)
        list(self.exporter.export(batch, self.ledger.deliver(len(records), 1)))
        return {span.name: span for span in self.finished.get_finished_spans()}

    def account(self):
        """Return how many stages were exported, and those lost by reason."""
        statistics = self.ledger.statistics()
        return statistics.exported, statistics.lost


@pytest.fixture
def service():
    """A service with an SDK provider."""
    made = Service()
    yield made
    made.exporter.shutdown(0)


class TestSpans:
    """What a stage looks like to the provider's processors."""

    def test_host_and_gpu(self, service):
        """A stage with a GPU part is two finished spans, the GPU's a child of the host's, at the resolved times."""
        record = service.run(attributes={"model": "vit"})
        spans = service.export(record, gpu=True)
        host, gpu = spans["infer"], spans["infer [gpu]"]
        assert gpu.parent.span_id == host.context.span_id
        assert gpu.start_time - host.start_time == pytest.approx(500_000, abs=100)
        assert host.end_time - host.start_time == pytest.approx(1_000_000, abs=100)
        assert gpu.end_time - gpu.start_time == 2_000_000
        assert host.instrumentation_scope.name == "gpuscope"
        assert dict(host.attributes) == {
            "gpuscope.stage": "infer",
            "model": "vit",
            "code.function.name": "app.run",
            "thread.id": 41,
            "thread.name": "main",
            "gpuscope.host.duration": 0.001,
            "gpuscope.gpu.duration": 0.002,
            "gpuscope.launch_to_start": 0.0005,
        }
        assert dict(gpu.attributes) == {
            "gpuscope.stage": "infer",
            "thread.id": 41,
            "thread.name": "main",
            "gpuscope.cuda.stream": 7,
            "gpuscope.device.index": 0,
            "hw.id": "GPU-00000000-0000-0000-0000-000000000000",
            "hw.type": "gpu",
            "hw.model": "Fake GPU",
            "hw.vendor": "NVIDIA",
            "gpuscope.gpu.duration": 0.002,
            "gpuscope.launch_to_start": 0.0005,
            "gpuscope.clock.uncertainty": 3.5e-06,
        }

    def test_plain_numbers(self, service):
        """Times and attributes are Python's own numbers: numpy's would be lost or become text in the encoder."""
        record = service.run()
        record.attributes = {"n": np.int64(3), "x": np.float32(0.5), "yes": np.bool_(True)}
        for span in service.export(record, gpu=True).values():
            assert type(span.start_time) is type(span.end_time) is int
            assert {type(value) for value in span.attributes.values()} <= {str, bool, int, float}
        assert dict(span.attributes).items() >= {"n": 3, "x": 0.5, "yes": True}.items()

    def test_host_only(self, service):
        """A stage without a GPU part is one span, without the GPU's attributes."""
        spans = service.export(service.run())
        assert list(spans) == ["infer"]
        assert "gpuscope.gpu.duration" not in spans["infer"].attributes

    def test_flags(self, service):
        """What is special about a stage is an attribute, and only then."""
        host = service.export(service.run(), flags=RowFlag.GIVEN_UP)["infer"]
        assert host.attributes["gpuscope.given_up"] is True
        assert "gpuscope.warmup" not in host.attributes

    def test_error(self, service):
        """An exception is an event, the status and `error.type`."""
        error = ExceptionInfo("ValueError", "bad image", (("app.py", 12, "run"),))
        host = service.export(service.run(error=error))["infer"]
        assert (host.status.status_code, host.status.description) == (StatusCode.ERROR, "ValueError: bad image")
        assert host.attributes["error.type"] == "ValueError"
        (event,) = host.events
        assert (event.name, event.timestamp) == ("exception", host.end_time)
        assert event.attributes["exception.message"] == "bad image"
        assert 'File "app.py", line 12, in run' in event.attributes["exception.stacktrace"]

    def test_what_the_application_said(self, service):
        """Attributes, events, links, name and status set on the current span are on the finished one."""

        def inside(_):
            span = trace.get_current_span()
            span.set_attribute("user", "ada")
            span.add_event("hit", {"key": 1}, timestamp=EPOCH_NS + 5)
            span.add_link(trace.SpanContext(7, 8, is_remote=True), {"why": "batch"})
            span.update_name("infer vit")
            span.set_status(StatusCode.OK)

        host = service.export(service.run(inside=inside, error=ExceptionInfo("E", "m", ())))["infer vit"]
        assert host.attributes["user"] == "ada"
        assert [(event.name, event.timestamp) for event in host.events] == [
            ("hit", EPOCH_NS + 5),
            ("exception", host.end_time),
        ]
        assert [(link.context.trace_id, link.context.span_id) for link in host.links] == [(7, 8)]
        assert host.status.status_code is StatusCode.OK

    def test_limits_are_the_applications(self):
        """The provider's limits hold for stages as for its own spans."""
        limits = SpanLimits(max_attribute_length=3)
        service = Service(TracerProvider(span_limits=limits))
        host = service.export(service.run(attributes={"model": "vision"}))["infer"]
        assert host.attributes["model"] == "vis"

    def test_times_never_run_backwards(self, service):
        """A span that the provider started after the resolved end, for a clock was set, ends when it starts."""
        service.bridge.offset_ns = 2 * EPOCH_NS
        record = service.run()
        service.bridge.lazy(record).get_span_context()
        host = service.export(record)["infer"]
        assert host.end_time == host.start_time

    def test_nesting(self, service):
        """Stages resolved innermost first are one trace, with the application's spans between them."""
        inner = []

        def inside(record):
            with service.provider.get_tracer("app").start_as_current_span("query"):
                inner.append(service.run("decode", outer=record))

        outer = service.run("request", inside=inside)
        spans = service.export(*inner, outer, gpu=True)
        parents = {name: span.parent.span_id if span.parent else None for name, span in spans.items()}
        ids = {name: span.context.span_id for name, span in spans.items()}
        assert parents == {
            "request": None,
            "request [gpu]": ids["request"],
            "query": ids["request"],
            "decode": ids["query"],
            "decode [gpu]": ids["decode"],
        }
        assert len({span.context.trace_id for span in spans.values()}) == 1

    def test_batch_has_the_exported_ids(self, service):
        """The ids in the batch, which the summary and other exporters see, are the finished spans'."""
        record = service.run()
        batch = service.batch(record)
        list(service.exporter.export(batch, service.ledger.deliver(1, 1)))
        (host,) = service.finished.get_finished_spans()
        assert host.context.span_id == int(batch.span_id[0])
        assert host.context.trace_id == int(batch.trace_high[0]) << 64 | int(batch.trace_low[0])

    def test_context_is_let_go(self, service):
        """After the export a stage holds neither the context that it ran in nor the provider's span."""
        record = service.run()
        service.export(record, gpu=True)
        assert record.context_before is None
        assert real_span(record) is None
        assert own_context(record) is None

    def test_current_context_is_untouched(self, service):
        """Exporting leaves the current context of its thread alone."""
        before = context.get_current()
        service.export(service.run(), gpu=True)
        assert context.get_current() is before


class TestAccount:
    """What is counted, and as what."""

    def test_exported(self, service):
        """Each stage that was ended counts as exported, once."""
        service.export(service.run(), service.run(), gpu=True)
        assert service.account() == (2, {})

    def test_no_provider(self):
        """Where `sdk` is asked for and the application has no provider, stages are lost and counted so."""
        service = Service(False)
        service.export(service.run())
        assert service.account() == (0, {"no_provider": 1})

    def test_unrealised(self):
        """A stage that the provider failed to make a span for is lost, and the others are not."""
        service = Service()
        records = [service.run("good"), service.run("bad")]
        fails = type("Fails", (SpanProcessor,), {"on_start": fail_on_bad})()
        service.provider.add_span_processor(fails)
        service.export(*records)
        assert service.account() == (1, {"no_span": 1})

    def test_slices(self):
        """A batch is worked off a few stages at a time, between which the collector can pause."""
        service = Service()
        records = [service.run() for _ in range(9)]
        batch = service.batch(*records)
        assert len(list(service.exporter.export(batch, service.ledger.deliver(9, 1)))) == 2
        assert service.account() == (9, {})


def fail_on_bad(self, span, parent_context=None):
    """Raise for one span."""
    if span.name == "bad":
        raise RuntimeError("no")


class Provider(TracerProvider):
    """A provider whose flush waits until it is told to go on, as a batch processor's does at a dead endpoint."""

    def __init__(self):
        super().__init__()
        self.go_on, self.shut_down, self.asked_ms = threading.Event(), False, []

    def force_flush(self, timeout_millis=30000):
        """Note the timeout, and wait for leave to go on."""
        self.asked_ms.append(timeout_millis)
        return self.go_on.wait(60)

    def shutdown(self):
        """Note that it was asked for."""
        self.shut_down = True


class TestFlush:
    """A flush, and its deadline."""

    def test_flush(self, service):
        """A flush is the provider's flush."""
        assert service.exporter.flush(5.0)

    def test_without_a_thread_it_is_asked_here(self, no_threads):
        """Its own deadline has to do, because nobody can wait in another thread."""
        service = Service(Provider())
        service.provider.go_on.set()
        assert service.exporter.flush(5.0)
        assert service.provider.asked_ms == [5000]

    def test_flush_that_hangs(self):
        """A provider that ignores the deadline of a flush holds nobody beyond it."""
        service = Service(Provider())
        started = time.monotonic()
        assert not service.exporter.flush(0.05)
        assert time.monotonic() - started < 5
        assert service.provider.asked_ms == [50]
        service.provider.go_on.set()
        assert service.exporter.flush(60)

    @pytest.mark.parametrize("error", [ValueError, SystemExit])
    def test_flush_that_raises(self, error):
        """What a provider raises in a flush reaches the collector, which counts it; it can be asked again."""

        class Fails:
            def wait(self, _):
                raise error

        service = Service(Provider())
        service.provider.go_on = Fails()
        with pytest.raises(error):
            service.exporter.flush(10)
        service.provider.go_on = threading.Event()
        service.provider.go_on.set()
        assert service.exporter.flush(60)

    def test_provider_without_flush(self):
        """A provider of another make that cannot flush is flushed at all times."""
        service = Service(
            type("Minimal", (trace.TracerProvider,), {"get_tracer": trace.NoOpTracerProvider.get_tracer})()
        )
        assert service.exporter.flush(0)

    def test_shutdown_leaves_the_provider_alone(self):
        """The provider is the application's, to be shut down by it."""
        service = Service(Provider())
        service.exporter.shutdown(1.0)
        assert not service.provider.shut_down
        assert service.provider.asked_ms == []
