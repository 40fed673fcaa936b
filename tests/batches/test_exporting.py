"""Links and light spans arrive whole, whichever way spans go."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import ScopeSpans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import gpuscope
from gpuscope import _runtime
from gpuscope._collecting.active_exporters import with_work
from gpuscope._settings.config import Config
from gpuscope._version import __version__
from gpuscope.analysis.read import read_lines
from gpuscope.exporters._encoding import otlp_bytes, spans
from gpuscope.exporters._encoding.limits import SpanLimits as OurLimits
from gpuscope.exporters._encoding.otlp_bytes import SpanEncoder
from gpuscope.exporters._encoding.otlp_json import JsonEncoder
from gpuscope.exporters._encoding.otlp_message import split_stages
from gpuscope.exporters._encoding.readable import readable_spans
from gpuscope.exporters._recorded import RecordedLines
from gpuscope.exporters.otlp import Envelope
from gpuscope.testing import FakeDevice, ManualClock

VALUES = {"string_value", "int_value", "double_value", "bool_value"}


def plain(span):
    """A span of protobuf's as a captured one is: ids, times, attributes and links."""
    assert all(item.value.WhichOneof("value") in VALUES for item in span.attributes)
    links = tuple(
        (int.from_bytes(link.trace_id, "big"), int.from_bytes(link.span_id, "big"), {}) for link in span.links
    )
    return {
        "name": span.name,
        "ids": tuple(int.from_bytes(each, "big") for each in (span.trace_id, span.span_id, span.parent_span_id)),
        "times": (span.start_time_unix_nano, span.end_time_unix_nano),
        "attributes": {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes},
        "links": links,
        "failed": span.status.code == 2,
    }


def captured(span):
    """A captured span in the same terms."""
    return {
        "name": span.name,
        "ids": (span.trace_id, span.span_id, span.parent_id),
        "times": (span.start_ns, span.end_ns),
        "attributes": span.attributes,
        "links": span.links,
        "failed": span.status == "ERROR",
    }


def by_id(found):
    """Spans in an order that does not depend on the exporter's."""
    return sorted(found, key=lambda span: span["ids"])


@pytest.fixture(params=["native", "twins"])
def _twins(request, monkeypatch):
    """The encoder in C, and that in Python."""
    if request.param == "twins":
        monkeypatch.setattr(otlp_bytes, "native", None)
        monkeypatch.setattr(spans, "native", None)


@pytest.mark.usefixtures("_twins")
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("count", [1, 3, 129, 300])
def test_protobuf_has_all_that_the_memory_has(resolved, count, fails):
    """Decoded by `opentelemetry-proto`: also more links than the SDK's limit, and numbers of any size."""
    stages, light, in_memory = resolved(count, fails=fails, weights=range(1, count + 1), basis="tokens")
    # Limits of the application's provider never cut what gpuscope itself says.
    encoder = SpanEncoder(limits=OurLimits(links=128, attributes=None if fails else 1))
    body = encoder.encode(stages) + encoder.encode(light)
    decoded = [plain(span) for span in ScopeSpans.FromString(body).spans]
    expected = [captured(span) for span in in_memory]
    for span in (*decoded, *expected):  # The limit's business.
        span["attributes"].pop("model", None)
    assert by_id(decoded) == by_id(expected)
    assert sum(len(span["links"]) for span in decoded) == 2 * count


@pytest.mark.usefixtures("_twins")
def test_numbers_of_any_size_are_read_back(resolved):
    """Padded numbers of protobuf mean the same: shares of days, and positions of thousands."""
    _, light, _ = resolved(5)
    numbers = np.array([0, 1, 127, 128, 2**56 - 1])
    shared = replace(light.shared, size=numbers, position=numbers, share_ns=numbers)
    decoded = [plain(span) for span in ScopeSpans.FromString(SpanEncoder().encode(replace(light, shared=shared))).spans]
    found = [span["attributes"] for span in decoded if not span["name"].endswith("[gpu]")]
    for name in ("gpuscope.batch.size", "gpuscope.batch.position", "gpuscope.gpu.share"):
        assert [each[name] for each in found] == numbers.tolist()


@pytest.mark.usefixtures("_twins")
def test_without_gpu_work_there_is_no_share(resolved):
    """Where the GPU span is left out, so is what rests on it."""
    _, light, _ = resolved(2)
    nothing = with_work(replace(light, gpu_end_ns=light.gpu_start_ns))
    decoded = [plain(span) for span in ScopeSpans.FromString(SpanEncoder().encode(nothing)).spans]
    assert len(decoded) == 2
    assert not any("gpuscope.gpu.share" in span["attributes"] for span in decoded)


def test_a_payload_of_light_spans_can_be_halved(resolved):
    """Each part is a light span with its GPU span."""
    _, light, _ = resolved(4)
    parts = [ScopeSpans.FromString(part).spans for part in split_stages(SpanEncoder().encode(light))]
    assert [[span.name for span in part] for part in parts] == [["predict (shared)", "predict (shared) [gpu]"]] * 4


@pytest.mark.parametrize("fails", [False, True])
def test_a_file_has_the_same_and_can_be_sent(resolved, fails):
    """Its lines become what `otlp` sends, and light spans count as no stages."""
    stages, light, in_memory = resolved(3, fails=fails)
    encoder, lines = JsonEncoder({"service.name": "tests"}, __version__), RecordedLines(every_gpu_span=True)
    texts = [encoder.encode(batch) for batch in (stages, light)]
    parts = [part for text in texts for part in lines.parts(text.encode() + b"\n")]
    assert [part.stages for part in parts] == [1, 0]
    assert [part.spans for part in parts] == [2, 6]
    body = b"".join(part.body for part in parts)
    assert by_id(map(plain, ScopeSpans.FromString(body).spans)) == by_id(map(captured, in_memory))
    share = json.loads(texts[1])["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["attributes"][-1]
    assert share["key"] == "gpuscope.gpu.share"
    assert isinstance(share["value"]["intValue"], str)
    recording = read_lines(texts)
    assert (recording.names, len(recording.stage)) == (("predict",), 1)
    assert recording.losses.orphans == 0
    assert not any(recording.losses.skipped_lines.values())


def test_a_light_span_without_work_is_sent_without_its_share(resolved):
    """As when sent live."""
    _, light, _ = resolved(2)
    encoder = JsonEncoder({"service.name": "tests"}, __version__)
    line = encoder.encode(replace(light, gpu_end_ns=light.gpu_start_ns)).encode() + b"\n"
    (part,) = RecordedLines(every_gpu_span=False).parts(line)
    decoded = [plain(span) for span in ScopeSpans.FromString(part.body).spans]
    assert len(decoded) == 2
    assert not any("gpuscope.gpu.share" in span["attributes"] for span in decoded)


def test_an_exporter_that_takes_no_bytes_gets_the_same(resolved):
    """The application's exporter may need spans of the SDK's."""
    stages, light, _ = resolved(2)
    encoder = SpanEncoder()
    payload = Envelope({}, __version__).wrap([encoder.encode(stages), encoder.encode(light)])
    assert ExportTraceServiceRequest.FromString(payload)
    found = readable_spans(payload, Resource({}))
    assert [len(span.links) for span in found if not span.name.endswith("[gpu]")] == [2, 1, 1]


class Slow(SpanProcessor):
    """A processor that does something at the start of a span, so that spans have to be made one by one."""

    def on_start(self, span, parent_context=None):
        """Take notice."""


class Passing(SimpleSpanProcessor):
    """A processor that is none of the SDK's, and does nothing before the end."""

    def on_end(self, span):
        """Pass it on."""
        super().on_end(span)


@pytest.fixture
def through(monkeypatch):
    """Return a function that runs a batch with a provider of the application's, and returns spans and statistics."""

    def run(count, *, route, **settings):
        finished, clock = InMemorySpanExporter(), ManualClock()
        provider = TracerProvider(span_limits=SpanLimits(), shutdown_on_exit=False)
        if route == "sdk":
            provider.add_span_processor(Slow())
        provider.add_span_processor((Passing if route == "processors" else SimpleSpanProcessor)(finished))
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
        config = Config().changed(mode="on", exporters="auto", warmup=0, gpu_spans="all", metrics="none", **settings)
        device = FakeDevice(clock, completes=True)
        with _runtime.period(config, device=device, clock=clock):
            tokens = []
            for _ in range(count):
                with gpuscope.stage("request"):
                    tokens.append(gpuscope.here())
            with provider.get_tracer("app").start_as_current_span("outside"):
                tokens.append(gpuscope.here())
            with gpuscope.stage("predict", members=tokens):
                clock.advance(0.001)
            assert gpuscope.flush(20)
            statistics = gpuscope.statistics()
        return finished.get_finished_spans(), statistics, tokens

    return run


@pytest.mark.parametrize("route", ["sdk", "processors"])
@pytest.mark.parametrize("count", [3, 200])
def test_the_applications_provider_gets_the_same(through, route, count, caplog):
    """By the SDK's spans: all of it, but links beyond the limit of the provider where that makes the spans."""
    found, statistics, tokens = through(count, route=route)
    assert statistics.exporters == (route,)
    (batch,) = (span for span in found if span.name == "predict")
    limit = 128 if route == "sdk" else count + 1
    assert [link.context.span_id for link in batch.links] == [token.span_id for token in tokens][-limit:]
    light = [span for span in found if span.name == "predict (shared)"]
    assert [span.parent.span_id for span in light] == [token.span_id for token in tokens]
    assert [span.context.trace_id for span in light] == [token.trace_id for token in tokens]
    for span in light:
        assert [link.context.span_id for link in span.links] == [batch.context.span_id]
        assert (span.start_time, span.end_time) == (batch.start_time, batch.end_time)
        assert span.attributes["gpuscope.batch.size"] == count + 1
    (gpu,) = (span for span in found if span.name == "predict [gpu]")
    assert sum(span.attributes["gpuscope.gpu.share"] for span in light) == gpu.end_time - gpu.start_time
    below = [span.parent.span_id for span in found if span.name == "predict (shared) [gpu]"]
    assert below == [span.context.span_id for span in light]
    assert statistics.shared_spans == {"exported": count + 1}
    lost = {"links": 1} if (route, count) == ("sdk", 200) else {}
    assert statistics.batch_faults == lost
    importlib.import_module("gpuscope._log").say_what_waits()
    assert sum("OTEL_SPAN_LINK_COUNT_LIMIT" in record.message for record in caplog.records) == len(lost)


def test_columns_through_the_applications_exporter_have_all_links(through, monkeypatch):
    """The limit of 128 links is for the application's own."""
    http = pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    from ..exporters.receiver import Receiver

    receiver = Receiver()
    try:
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(http.OTLPSpanExporter(endpoint=receiver.url)))
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
        config = Config().changed(mode="on", exporters="auto", metrics="none", schedule_delay_s=0.01)
        with _runtime.period(config):
            tokens = [gpuscope.Token.from_traceparent(f"00-{n:032x}-{n:016x}-01") for n in range(1, 301)]
            with gpuscope.stage("predict", members=tokens):
                pass
            assert gpuscope.flush(20)
            assert gpuscope.statistics().exporters == ("application",)
            assert gpuscope.statistics().shared_spans == {"exported": 300}
        names = [span.name for span in receiver.spans]
        assert names.count("predict (shared)") == 300
        (batch,) = (span for span in receiver.spans if span.name == "predict")
        assert len(batch.links) == 300
    finally:
        receiver.close()
