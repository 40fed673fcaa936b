"""Columns through the application's own OTLP exporters: what arrives, and what becomes of what does not."""

from __future__ import annotations

import contextlib
import socket
import time
import types

import grpc
import pytest
from opentelemetry import context, trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState

from gpuscope import _runtime, stage
from gpuscope._recording.state import state
from gpuscope._settings.config import Config
from gpuscope.exporters._transport.through import ApplicationClient

from .receiver import Answer, Receiver
from .receiver_of_grpc import GrpcReceiver

RESOURCE = Resource.create({"service.name": "named in code"}, schema_url="https://example.com/schema")


@pytest.fixture
def record(monkeypatch):
    """Return a function that begins to record, with a provider of the application's."""
    before = (state.engine, state.recorder, state.may_toggle)
    engines = []

    def begin(provider, exporters="auto", **settings):
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
        given = {"interval_s": 0.01, "schedule_delay_s": 0.01, "metrics": "none", "warmup": 0, **settings}
        engines.append(_runtime.start(Config().changed(mode="on", exporters=exporters, **given)))
        return engines[-1]

    yield begin
    for engine in engines:
        engine.shutdown(5)
    state.engine, state.recorder, state.may_toggle = before


@pytest.fixture
def receivers():
    """Two receivers."""
    with contextlib.closing(Receiver()) as one, contextlib.closing(Receiver()) as other:
        yield one, other


def provider_of(*exporters, processor=SimpleSpanProcessor, **settings):
    """Return a provider with these exporters."""
    made = TracerProvider(resource=RESOURCE, shutdown_on_exit=False, **settings)
    for exporter in exporters:
        made.add_span_processor(processor(exporter))
    return made


def run(*names):
    """Run a stage inside each other."""
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(stage(name))


def test_spans_arrive_with_the_providers_resource_and_headers(record, receivers):
    """Names, parents, the resource and its schema, and what the application's exporter adds to each request."""
    exporter = OTLPSpanExporter(receivers[0].url, headers={"x-tenant": "a"})
    provider = provider_of(exporter)
    engine = record(provider)
    with provider.get_tracer("app").start_as_current_span("request"):
        run("outer", "inner")
    assert engine.flush(20)
    assert engine.statistics().exporters == ("application",)
    assert f"to {receivers[0].url}" in engine.statistics().route
    spans = {span.name: span for span in receivers[0].spans}
    assert set(spans) == {"request", "outer", "inner"}
    assert spans["inner"].parent_span_id == spans["outer"].span_id
    assert spans["outer"].parent_span_id == spans["request"].span_id
    for group in receivers[0].resource_spans:
        assert group.schema_url == "https://example.com/schema"
        ours = group.scope_spans[0].scope.name == "gpuscope"
        # A host, without which Jaeger would move GPU spans.
        expected = {"host.name": socket.gethostname()} if ours else {}
        found = {item.key: item.value.string_value for item in group.resource.attributes}
        assert found == {**RESOURCE.attributes, **expected}
    assert all(request.headers["x-tenant"] == "a" for request in receivers[0].requests)


def test_spans_for_processors_name_the_host_too(record):
    """A stage's finished span has the provider's resource and, because that names none, this host."""
    finished = InMemorySpanExporter()
    engine = record(provider_of(finished))
    run("infer")
    assert engine.flush(20)
    assert engine.statistics().exporters == ("processors",)
    (span,) = finished.get_finished_spans()
    assert span.resource.attributes == {**RESOURCE.attributes, "host.name": socket.gethostname()}
    assert span.resource.schema_url == RESOURCE.schema_url


def test_two_exporters_get_all_spans(record, receivers):
    """As the provider's own processors would have it."""
    engine = record(provider_of(*(OTLPSpanExporter(receiver.url) for receiver in receivers)))
    run("infer")
    assert engine.flush(20)
    assert [[span.name for span in receiver.spans] for receiver in receivers] == [["infer"], ["infer"]]
    assert engine.statistics().exported == 1


def test_what_one_of_two_endpoints_refuses_counts_as_exported(record, receivers):
    """A stage that arrived somewhere is not lost."""
    receivers[0].answer(400)
    engine = record(provider_of(*(OTLPSpanExporter(receiver.url) for receiver in receivers)))
    run("infer")
    assert engine.flush(20)
    assert engine.statistics().lost == {}


def test_what_is_refused_is_counted(record, receivers):
    """By the endpoint's status."""
    receivers[0].answer(400)
    engine = record(provider_of(OTLPSpanExporter(receivers[0].url)))
    run("infer")
    assert not engine.flush(20)
    assert engine.statistics().lost == {"http_400": 1}


def test_what_is_too_large_goes_in_halves(record, receivers):
    """As with an endpoint of our own."""
    engine = record(provider_of(OTLPSpanExporter(receivers[0].url)), interval_s=60, schedule_delay_s=60)
    receivers[0].most_bytes = 6000
    for number in range(40):
        run(f"stage {number}")
    assert engine.flush(20)
    assert len(receivers[0].spans) == 40
    assert receivers[0].refused


@pytest.mark.parametrize("missing", ["_client", "everything"])
def test_a_version_that_takes_no_bytes(record, receivers, missing, monkeypatch):
    """Spans go through the public `export`, with ids, times, attributes, events, links and status as they were."""
    exporter = OTLPSpanExporter(receivers[0].url)
    if missing == "_client" and not hasattr(exporter, missing):
        pytest.skip("this version of OpenTelemetry's exporter has no client of its own")
    through = record(provider_of(exporter))
    told = NonRecordingSpan(SpanContext(5, 6, True, TraceFlags(1), TraceState([("vendor", "a")])))

    def request():
        token = context.attach(trace.set_span_in_context(told))
        with contextlib.suppress(ValueError), stage("infer", attributes={"model": "vit", "sizes": [1, 2]}):
            span = trace.get_current_span()
            span.add_event("cache miss", {"key": "a"}, 7)
            span.add_link(SpanContext(8, 9, True), {"why": "batch"})
            raise ValueError("bad")
        context.detach(token)

    request()
    assert through.flush(20)
    if missing == "_client":
        client = exporter._client
        monkeypatch.setattr(type(client), "export", property(lambda _: 1 / 0))
        monkeypatch.setattr(exporter, "export", lambda spans: client_export(client, spans), raising=False)
    sender = next(iter(through.collector.active_exporters._made["application"]._senders.values()))[1]
    if missing == "everything":
        sender._client._send = None
    request()
    assert through.flush(20)
    first, second = receivers[0].spans
    for span in (first, second):
        for field in ("span_id", "start_time_unix_nano", "end_time_unix_nano"):
            span.ClearField(field)
        span.attributes.remove(next(item for item in span.attributes if item.key.endswith("duration")))
        del span.events[1:]
        span.links[0].ClearField("flags")  # The SDK writes those of the span's parent there.
    first.attributes.sort(key=lambda item: item.key)
    second.attributes.sort(key=lambda item: item.key)
    assert first == second


def client_export(client, spans):
    """Send spans of the SDK's, as an exporter does."""
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
    from opentelemetry.sdk.trace.export import SpanExportResult

    answer = client._submit(encode_spans(spans).SerializePartialToString(), 10)
    return SpanExportResult.SUCCESS if answer.status_code == 200 else SpanExportResult.FAILURE


@pytest.mark.parametrize("end", ["force_flush", "shutdown"])
def test_a_flush_and_the_end_of_the_provider_reach_stages(record, receivers, end):
    """Programs that freeze between requests count on it."""
    provider = provider_of(OTLPSpanExporter(receivers[0].url), processor=BatchSpanProcessor)
    engine = record(provider, interval_s=60, schedule_delay_s=60)
    run("first")
    assert getattr(provider, end)() in (True, None)
    assert [span.name for span in receivers[0].spans] == ["first"]
    run("second")
    if end == "shutdown":
        assert not engine.flush(20)
        assert engine.statistics().lost == {"provider_shutdown": 1}
    else:
        assert provider.force_flush()
        assert len(receivers[0].spans) == 2


def test_a_flush_that_fails_says_so(record, receivers):
    """`force_flush` returns False where stages could not be sent."""
    receivers[0].answer(400)
    provider = provider_of(OTLPSpanExporter(receivers[0].url))
    record(provider)
    run("infer")
    assert provider.force_flush() is False


def test_a_flush_of_the_provider_reaches_stages_made_one_by_one(record):
    """It does not come back to itself either, however it is called."""
    memory = InMemorySpanExporter()
    provider = provider_of(memory)
    engine = record(provider, interval_s=60)
    run("infer")
    began = time.monotonic()
    assert provider.force_flush()
    assert [span.name for span in memory.get_finished_spans()] == ["infer"]
    assert engine.flush(20)
    assert time.monotonic() - began < 4


class Marks(SpanProcessor):
    """Changes spans at their start."""

    def on_start(self, span, parent_context=None):
        """Mark it."""
        span.set_attribute("marked", True)

    def force_flush(self, timeout_millis=30000):
        """Say that it was done; of older versions the base class says no."""
        return True


def test_a_processor_that_comes_late_sees_the_stages_after_it(record, receivers):
    """None is lost, on either side, with ids that were given out before too."""
    provider = provider_of(OTLPSpanExporter(receivers[0].url))
    engine = record(provider)
    run("before")
    assert engine.flush(20)
    with stage("across"):
        trace.get_current_span().get_span_context()
        provider.add_span_processor(Marks())
    run("after")
    flushed = engine.flush(20)
    assert engine.statistics().lost == {}
    assert flushed
    assert engine.statistics().exporters == ("sdk",)
    assert "Marks` may change spans" in engine.statistics().route
    assert sorted(span.name for span in receivers[0].spans) == ["across", "after", "before"]
    assert (engine.statistics().exported, engine.statistics().lost) == (3, {})
    after = next(span for span in receivers[0].spans if span.name == "after")
    assert any(item.key == "marked" for item in after.attributes)


def test_spans_one_by_one_where_that_is_asked_for(record, receivers):
    """`sdk` is today's way, whatever the provider is."""
    engine = record(provider_of(OTLPSpanExporter(receivers[0].url)), exporters="sdk")
    run("infer")
    assert engine.flush(20)
    assert engine.statistics().exporters == ("sdk",)
    assert "`GPUSCOPE_EXPORTER` says so" in engine.statistics().route


@pytest.fixture
def over_grpc():
    """A receiver of gRPC, and an exporter to it."""
    with contextlib.closing(GrpcReceiver()) as receiver:
        exporter = GrpcExporter(f"http://127.0.0.1:{receiver.port}", insecure=True, headers={"x-tenant": "a"})
        yield receiver, exporter


def test_spans_over_grpc(record, over_grpc):
    """Through the application's channel, with its headers."""
    receiver, exporter = over_grpc
    engine = record(provider_of(exporter))
    run("outer", "inner")
    assert engine.flush(20)
    assert receiver.names == ["inner", "outer"]
    assert receiver.metadata[0]["x-tenant"] == "a"


def test_grpc_is_tried_again(record, over_grpc, monkeypatch):
    """After a status that OTLP calls retryable, and after no other."""
    receiver, exporter = over_grpc
    if not hasattr(exporter, "_channel"):
        pytest.skip(
            "this version of OpenTelemetry's exporter shows no channel, and says only whether it was successful"
        )
    monkeypatch.setattr("gpuscope.exporters._transport.through._FIRST_WAIT_S", 0.01)
    engine = record(provider_of(exporter))
    receiver.codes = [grpc.StatusCode.UNAVAILABLE]
    run("again")
    assert engine.flush(20)
    assert receiver.names == ["again"]
    receiver.codes = [grpc.StatusCode.INVALID_ARGUMENT]
    run("refused")
    assert not engine.flush(20)
    assert engine.statistics().lost == {"grpc_invalid_argument": 1}


def test_an_answer_that_hangs_loses_nothing_else(record, receivers):
    """The end has a deadline, whatever the application's exporter waits for."""
    receivers[0].answer(Answer(hang=True))
    engine = record(provider_of(OTLPSpanExporter(receivers[0].url)))
    run("infer")
    began = time.monotonic()
    assert not engine.shutdown(1)
    assert time.monotonic() - began < 8
    assert engine.statistics().lost == {"shutdown": 1}
    receivers[0].release()


class OlderExporter:
    """An exporter of OpenTelemetry 1.35 to 1.43, as far as bytes go: one call is one attempt, and may raise."""

    _endpoint, _timeout, _shutdown = "http://127.0.0.1:9/v1/traces", 10, False

    def __init__(self, *failures):
        self.failures, self.taken = list(failures), []

    def _export(self, payload, timeout_s):
        if self.failures:
            raise self.failures.pop(0)
        self.taken.append(payload)
        return types.SimpleNamespace(ok=True, content=b"")


def test_an_older_exporter_that_cannot_connect_is_asked_again():
    """What the network does is not taken for a version that is not known, so bytes go on being sent as bytes."""
    exporter, waits = OlderExporter(ConnectionRefusedError(), TimeoutError()), []
    client = ApplicationClient("http", exporter, list, waits.append)
    assert client.post(b"one").reason == ""
    assert client.post(b"two").reason == ""
    assert (exporter.taken, waits) == ([b"one", b"two"], [1.0, 2.0])


class StillOlderExporter(OlderExporter):
    """Until 1.33: an attempt has no deadline of its own."""

    _MAX_RETRY_TIMEOUT = 64

    def __init__(self, *statuses):
        super().__init__()
        self.statuses = list(statuses)

    def _export(self, payload):
        status = self.statuses.pop(0)
        return types.SimpleNamespace(ok=status == 200, status_code=status, reason="because", content=b"")


def test_a_still_older_exporter_tells_the_status():
    """So that what is too large can go in halves, and what is refused is counted by its reason."""
    waits = []
    client = ApplicationClient("http", StillOlderExporter(503, 503, 200, 413, 400), list, waits.append)
    assert [client.post(b"one").reason for _ in range(3)] == ["", "http_413", "http_400"]
    assert waits == [1.0, 2.0]
