"""Which way metrics go, when, and what a process's end, a fork or a late provider does to them."""

from __future__ import annotations

import contextlib
import json
import time

import opentelemetry.metrics._internal as otel_metrics
import pytest
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

import gpuscope
from gpuscope import _runtime, stage
from gpuscope._data.metrics import DURATION, RECORDED
from gpuscope._settings.config import Config
from gpuscope.testing import FakeDevice, ManualClock, capture

from ..exporters.receiver import Answer, Receiver

SELDOM = {"metrics_interval_s": 3600.0, "warmup": 0}
ONLY_SPANS = {"otlp_endpoint": "http://127.0.0.1:9/t", "otlp_base_endpoint": Config().otlp_base_endpoint}


@pytest.fixture
def receiver():
    """A receiver of spans and metrics."""
    made = Receiver()
    yield made
    made.close()


@pytest.fixture
def make_engine():
    """Return a function that makes an engine on fake parts, with exporters that are real; stepped by hand."""
    with contextlib.ExitStack() as stack:

        def make(**settings):
            clock = ManualClock()
            config = Config().changed(**{"mode": "on", "exporters": "none", "warmup": 0, **settings})
            device = FakeDevice(clock, completes=True)
            engine = stack.enter_context(_runtime.period(config, device=device, clock=clock))
            engine.recorder.accept(engine.queue)
            # Its thread never runs, so nobody else ends the exporters' threads.
            stack.callback(engine.collector._finish, time.monotonic() + 5)
            return engine

        yield make


def run(engine, name="s", stages=1):
    """Record some stages, and let the collector do what it can."""
    for _ in range(stages):
        with stage(name):
            pass
    while engine.collector.step():
        pass


@pytest.fixture
def reader(monkeypatch):
    """The reader of a MeterProvider that the application has set."""
    made = InMemoryMetricReader()
    provider = MeterProvider([made])
    # It can be set only once in a process.
    monkeypatch.setattr(otel_metrics, "_METER_PROVIDER", provider)
    yield made
    provider.shutdown()


def read(reader):
    """The metrics that a reader sees: values by name."""
    data = reader.get_metrics_data()
    scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics] if data else []
    return {
        metric.name: [point.value for point in metric.data.data_points] for scope in scopes for metric in scope.metrics
    }


def metrics_requests(receiver):
    """The requests for metrics that came."""
    return [request for request in receiver.requests if request.path == "/v1/metrics"]


class TestWay:
    """`auto`, `otlp`, `sdk`, `none`, and OpenTelemetry's own switches."""

    @pytest.mark.parametrize(
        ("settings", "way"),
        [
            ({"exporters": "none"}, "none"),
            ({"exporters": "otlp"}, "otlp"),
            ({"exporters": "auto"}, "otlp"),
            ({"exporters": "otlp", "metrics": "none"}, "none"),
            ({"exporters": "none", "metrics": "otlp"}, "otlp"),
            ({"exporters": "otlp", "metrics": "sdk"}, "none"),
            ({"exporters": "otlp", "metrics_exporter": "none"}, "none"),
            ({"exporters": "otlp", "metrics_exporter": "none", "metrics": "otlp"}, "otlp"),
            ({"exporters": "otlp", "sdk_disabled": True, "metrics": "otlp"}, "none"),
            ({"exporters": "otlp", **ONLY_SPANS}, "none"),
            ({"exporters": "otlp", "otlp_endpoint": ONLY_SPANS["otlp_endpoint"]}, "otlp"),
        ],
    )
    def test_without_a_provider(self, make_engine, receiver, settings, way):
        """Metrics follow the spans to `otlp`, unless only spans were given an endpoint or somebody says otherwise."""
        engine = make_engine(**{"otlp_base_endpoint": receiver.endpoint, **settings})
        engine.collector.step()
        assert engine.collector.metrics_pipeline.way == way

    @pytest.mark.parametrize(
        ("settings", "way"),
        [({}, "sdk"), ({"metrics": "sdk"}, "sdk"), ({"metrics": "otlp"}, "otlp"), ({"sdk_disabled": True}, "none")],
    )
    def test_with_a_provider(self, make_engine, receiver, reader, settings, way):
        """The application's provider comes first, wherever spans go, unless something else was asked for."""
        engine = make_engine(otlp_base_endpoint=receiver.endpoint, **settings)
        run(engine)
        assert engine.collector.metrics_pipeline.way == way
        assert bool(read(reader)) == (way == "sdk")

    def test_none_counts_nothing(self, make_engine):
        """Where metrics are off for good, not even the counting is done."""
        engine = make_engine(metrics="none")
        run(engine)
        assert not engine.collector.metrics_pipeline.snapshot().points[DURATION]

    def test_a_provider_that_comes_late_gets_everything(self, make_engine, monkeypatch):
        """What was recorded before the application set its provider up counts too."""
        engine = make_engine()
        run(engine)
        reader = InMemoryMetricReader()
        provider = MeterProvider([reader])
        monkeypatch.setattr(otel_metrics, "_METER_PROVIDER", provider)
        run(engine)
        assert read(reader)["gpuscope.stages.recorded"] == [2]
        provider.shutdown()

    def test_a_provider_that_refuses_costs_metrics_only(self, make_bench, monkeypatch, caplog):
        """A provider that raises is said once, and stages go on."""

        class Refusing(NoOpMeterProvider):
            def get_meter(self, *args, **kwargs):
                raise RuntimeError("no")

        monkeypatch.setattr(otel_metrics, "_METER_PROVIDER", Refusing())
        bench = make_bench()
        for _ in range(3):
            with stage("s"):
                pass
            bench.collect()
        assert len(bench.named("s [gpu]")) == 3
        assert [record.message.count("RuntimeError") for record in caplog.records] == [1]


class TestCounting:
    """What counts."""

    def test_unsampled_stages_count(self, receiver):
        """With nothing sampled no span is sent, and every stage is in the histograms, without an exemplar."""
        clock = ManualClock()
        with capture(
            exporters="otlp",
            sampler="always_off",
            otlp_base_endpoint=receiver.endpoint,
            device=FakeDevice(clock, completes=True),
            clock=clock,
            **SELDOM,
        ):
            for _ in range(5):
                with stage("s"):
                    pass
            assert gpuscope.flush(20)
        assert {request.path for request in receiver.requests} == {"/v1/metrics"}
        metrics = receiver.requests[-1].metrics
        counts = [point.count for point in metrics[DURATION.name].histogram.data_points]
        assert counts == [5, 5]
        assert not any(point.exemplars for point in metrics[DURATION.name].histogram.data_points)
        assert metrics["gpuscope.stages.dropped"].sum.data_points[0].as_int == 5

    def test_an_exemplar_names_a_span_that_was_sent(self, receiver):
        """From a histogram one gets to a trace: the ids are those of a span of the same process, sent as well."""
        clock = ManualClock()
        device = FakeDevice(clock, completes=True)
        with capture(
            exporters="otlp", otlp_base_endpoint=receiver.endpoint, device=device, clock=clock, **SELDOM
        ) as spans:
            with stage("s"):
                pass
            assert gpuscope.flush(20)
        (first, *_) = metrics_requests(receiver)
        linked = {
            (int.from_bytes(exemplar.trace_id, "big"), int.from_bytes(exemplar.span_id, "big"))
            for point in first.metrics[DURATION.name].histogram.data_points
            for exemplar in point.exemplars
        }
        assert linked == {(span.trace_id, span.span_id) for span in spans}
        metrics = ExportMetricsServiceRequest.FromString(first.body).resource_metrics
        assert metrics[0].resource == receiver.requests[0].message.resource_spans[0].resource

    def test_warm_up_calls_are_in_the_sums_only(self, make_engine):
        """Cold calls would spoil every percentile; that they happened is not kept quiet."""
        engine = make_engine(warmup=2)
        run(engine, "first called here", 5)
        points = engine.collector.metrics_pipeline.snapshot().points
        assert sum(points[DURATION][0].value.counts) == 3
        assert points[RECORDED][0].value == 5


class TestTimes:
    """Once an interval, on `flush`, and at the end."""

    def test_once_an_interval_and_not_once_a_stage(self, make_engine, receiver):
        """However many stages there are, one export an interval; the last is at shutdown."""
        engine = make_engine(metrics="otlp", otlp_base_endpoint=receiver.endpoint, metrics_interval_s=60)
        for passed in range(2):
            for _ in range(50):
                run(engine)
            assert len(metrics_requests(receiver)) == passed
            engine.recorder.clock.advance(61)
            run(engine, stages=0)
            receiver.wait_for(passed + 1)
        assert receiver.requests[1].metrics[RECORDED.name].sum.data_points[0].as_int == 100

    def test_the_last_export_has_the_last_stage(self, receiver):
        """What was recorded since the last interval is not lost at shutdown."""
        with capture(metrics="otlp", otlp_base_endpoint=receiver.endpoint, **SELDOM), stage("s"):
            pass
        (request,) = metrics_requests(receiver)
        assert request.metrics[RECORDED.name].sum.data_points[0].as_int == 1

    def test_spans_that_hang_leave_time_for_metrics(self, receiver, caplog):
        """An endpoint of spans that takes all the time there is does not take that of the metrics."""
        receiver.answer(Answer(hang=True))
        at_once = {"shutdown_timeout_s": 2, "schedule_delay_s": 0.0}
        with capture(exporters="otlp", otlp_base_endpoint=receiver.endpoint, **at_once, **SELDOM):
            with stage("s"):
                pass
            receiver.wait_for(1)
        (request,) = metrics_requests(receiver)
        assert request.metrics[RECORDED.name].sum.data_points[0].as_int == 1
        assert "the time ran out" in caplog.text


class TestFile:
    """The account in the `file` exporter's files."""

    def accounts(self, path):
        """Each account in a file: the counts by metric and reason."""
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        metrics = [
            line["resourceMetrics"][0]["scopeMetrics"][0]["metrics"] for line in lines if "resourceMetrics" in line
        ]
        return [
            {
                (metric["name"], *(item["value"]["stringValue"] for item in point["attributes"])): int(point["asInt"])
                for metric in account
                if "sum" in metric
                for point in metric["sum"]["dataPoints"]
            }
            for account in metrics
        ]

    def test_losses_are_in_the_file(self, tmp_path, make_engine):
        """A reader of the file alone knows what is missing from it, and why; unchanged, it is not written again."""
        path = tmp_path / "spans.jsonl"
        engine = make_engine(exporters="file", file=str(path), queue_size=16)
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                stack.enter_context(stage("s"))
        for _ in range(4):
            run(engine, stages=0)
            engine.recorder.clock.advance(100)
        (account,) = self.accounts(path)
        assert account == {
            ("gpuscope.stages.recorded",): 20,
            ("gpuscope.stages.exported",): 16,
            ("gpuscope.stages.dropped", "queue_full"): 4,
        }
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        resources = [next(iter(line.values()))[0]["resource"] for line in lines]
        assert len(resources) > 1
        assert all(resource == resources[0] for resource in resources)

    @pytest.mark.parametrize("sampler", ["always_on", "always_off"])
    def test_the_last_account_is_complete(self, tmp_path, sampler):
        """At the end the account adds up; a file of nothing but unsampled stages says so."""
        path = tmp_path / "spans.jsonl"
        with capture(exporters="file", file=str(path), sampler=sampler):
            for _ in range(3):
                with stage("s"):
                    pass
        last = self.accounts(path)[-1]
        fate = (
            {("gpuscope.stages.exported",): 3}
            if sampler == "always_on"
            else {
                ("gpuscope.stages.exported",): 0,
                ("gpuscope.stages.dropped", "unsampled"): 3,
            }
        )
        assert last == {("gpuscope.stages.recorded",): 3, **fate}

    def test_nothing_recorded_makes_no_file(self, tmp_path):
        """A process without stages leaves no file behind."""
        with capture(exporters="file", file=str(tmp_path / "spans.jsonl")):
            assert gpuscope.flush(20)
        assert not list(tmp_path.iterdir())


PROGRAM = """
import os, sys, gpuscope
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, InMemoryMetricReader, PeriodicExportingMetricReader
def show(data):
    scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics]
    found = {metric.name: metric.data.data_points[0].value for scope in scopes for metric in scope.metrics}
    return f"{os.getpid() == PARENT} {found.get('gpuscope.stages.recorded')}\\n"
PARENT = os.getpid()
def provide():
    out = PeriodicExportingMetricReader(ConsoleMetricExporter(formatter=show), 3_600_000)
    metrics.set_meter_provider(MeterProvider([out, MEMORY]))
MEMORY = InMemoryMetricReader()
def seen():
    data = MEMORY.get_metrics_data()
    return show(data) if data else "nothing\\n"
def work(n):
    for _ in range(n):
        with gpuscope.stage("s"): pass
    assert gpuscope.flush()
"""


class TestProcess:
    """Real providers in real processes."""

    @pytest.mark.parametrize("order", ["provide(); work(3)", "work(1); provide(); work(2)"])
    def test_the_provider_s_last_collection_has_everything(self, run_python, order):
        """The provider collects once more when the program ends, after us, and sees every stage."""
        result = run_python(PROGRAM + order, GPUSCOPE="1", GPUSCOPE_EXPORTER="none")
        assert (result.returncode, result.stdout, result.stderr) == (0, "True 3\n", "")

    def test_a_new_recording_takes_over(self, run_python):
        """With other settings a new recording begins; the one set of instruments shows that, and warns of nothing."""
        program = PROGRAM + (
            "provide(); work(3); gpuscope.enable(exporters='none', queue_size=64); sys.stdout.write(seen())\n"
            "work(1); sys.stdout.write(seen())\n"
        )
        result = run_python(program, GPUSCOPE="1", GPUSCOPE_EXPORTER="none")
        assert (result.stdout, result.stderr) == ("True 3\nTrue 1\nTrue 1\n", "")

    def test_a_child_shows_its_own(self, run_python):
        """After a fork the child's provider shows nothing of its parent's stages, and then the child's own."""
        program = PROGRAM + (
            "import warnings; warnings.simplefilter('ignore', DeprecationWarning)  # There are threads.\n"
            "provide(); work(3)\n"
            "if os.fork() == 0:\n"
            "    sys.stdout.write(seen()); work(1); sys.stdout.write(seen()); sys.stdout.flush(); os._exit(0)\n"
            "os.wait(); work(1); sys.stdout.write(seen())\n"
        )
        result = run_python(program, GPUSCOPE="1", GPUSCOPE_EXPORTER="none")
        assert (result.stdout, result.stderr) == ("nothing\nFalse 1\nTrue 4\nTrue 4\n", "")

    @pytest.mark.parametrize(
        "off",
        [
            {"GPUSCOPE_METRICS": "none"},
            {"OTEL_METRICS_EXPORTER": "none"},
            {"OTEL_SDK_DISABLED": "true"},
        ],
    )
    def test_each_variable_switches_metrics_off(self, run_python, receiver, off):
        """With any of them nothing is posted to the endpoint for metrics."""
        program = "import gpuscope\nfor _ in range(3):\n    with gpuscope.stage('s'): pass\n"
        environ = {"GPUSCOPE": "1", "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint}
        result = run_python(program, **environ, **off)
        assert result.returncode == 0, result.stderr
        assert not metrics_requests(receiver)
        run_python(program, **environ)
        assert metrics_requests(receiver)
