"""Providers that a program makes by hand of OpenTelemetry's own parts: which way its stages go, and that they come."""

from __future__ import annotations

import json

import pytest

from .conftest import NAME
from .whole import assert_nothing_lost, assert_whole

BY_HAND = f"""
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SimpleSpanProcessor

provider = TracerProvider(resource=Resource.create({{"service.name": {NAME!r}}}))
trace.set_tracer_provider(provider)
"""
HTTP = """
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
"""
GRPC = """
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
"""
BATCHES = """
for url in urls:
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
"""
REPLACED = """
processor = BatchSpanProcessor(OTLPSpanExporter(endpoint=urls[0]))
processor.on_start = lambda span, parent_context=None: span.set_attribute("marked", span.name)
provider.add_span_processor(processor)
"""
FILTER = """
class Filter(BatchSpanProcessor):
    def on_end(self, span):
        if span.name != "attention" or "gpuscope.stage" not in span.attributes:
            super().on_end(span)


provider.add_span_processor(Filter(OTLPSpanExporter(endpoint=urls[0])))
"""
CONSOLE = """
provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(out=open("console.txt", "w"))))
"""
LATE = """
import gpuscope

with gpuscope.stage("before"):
    pass
assert gpuscope.flush(20)
first = gpuscope.statistics()
print(json.dumps([first.exporters, first.exported, first.lost]))
"""
MARKS = """
from opentelemetry.sdk.trace import SpanProcessor


class Marks(SpanProcessor):
    def on_start(self, span, parent_context=None):
        span.set_attribute("marked", span.name)


provider.add_span_processor(Marks())
"""


def marks(spans):
    """What the processor has put on each span."""
    return {
        name: item.value.string_value
        for name, span in spans.items()
        for item in span.attributes
        if item.key == "marked"
    }


def test_over_http(told, http):
    """A batch processor and the exporter over HTTP, as documentation has it."""
    account = told(BY_HAND + HTTP + BATCHES, http.url)
    assert_nothing_lost(account, way="application", said=http.url)
    assert_whole(http, service=NAME)


def test_over_grpc(told, grpc):
    """The same over gRPC."""
    account = told(BY_HAND + GRPC + BATCHES, grpc.endpoint)
    assert_nothing_lost(account, way="application", said=str(grpc.port))
    assert_whole(grpc, service=NAME)


def test_two_exporters(told, http, other_http):
    """Each gets the whole trace."""
    account = told(BY_HAND + HTTP + BATCHES, http.url, other_http.url)
    assert_nothing_lost(account, way="application", said=f"{http.url}, {other_http.url}")
    for receiver in (http, other_http):
        assert_whole(receiver, service=NAME)


def test_both_protocols(told, http, grpc):
    """One exporter over HTTP, and one over gRPC."""
    both = BY_HAND + HTTP + BATCHES.replace("urls", "urls[:1]") + GRPC + BATCHES.replace("urls", "urls[1:]")
    account = told(both, http.url, grpc.endpoint)
    assert_nothing_lost(account, way="application", said=f"{http.url}, ")
    for receiver in (http, grpc):
        assert_whole(receiver, service=NAME)


def test_a_replaced_method(told, http):
    """What an instrumentation has put on the object itself sees every stage."""
    account = told(BY_HAND + HTTP + REPLACED, http.url)
    assert_nothing_lost(account, way="sdk", said="BatchSpanProcessor` may change spans")
    assert marks(assert_whole(http, service=NAME)) == {
        name: name for name in ("request", "infer", "attention", "look up")
    }


def test_a_console_beside(told, http, tmp_path):
    """Stages are on the console, too."""
    account = told(BY_HAND + HTTP + BATCHES + CONSOLE, http.url)
    assert_nothing_lost(account, way="processors", said="ConsoleSpanExporter` is not OpenTelemetry's for OTLP")
    assert_whole(http, service=NAME)
    written = (tmp_path / "console.txt").read_text()
    assert [written.count(f'"name": "{name}"') for name in ("infer", "attention")] == [1, 1]


def test_a_filter(told, http):
    """A processor that leaves out spans by what they are at their end sees all stages, and its choice holds."""
    account = told(BY_HAND + HTTP + FILTER, http.url)
    assert_nothing_lost(account, way="processors", said="Filter` may change spans")
    assert {span.name for span in http.spans} == {"request", "infer", "look up"}


def test_a_processor_that_comes_late(play, http):
    """What ended before it went as columns; what comes after is seen by it; and nothing is lost between."""
    first, account = map(json.loads, play(BY_HAND + HTTP + BATCHES + LATE + MARKS, http.url).splitlines())
    assert first == [["application"], 1, {}]
    assert (account["exporters"], account["recorded"], account["exported"], account["lost"]) == (["sdk"], 3, 3, {})
    assert "Marks` may change spans" in account["route"]
    spans = {span.name: span for span in http.spans}
    assert sorted(spans) == sorted(span.name for span in http.spans)
    assert set(spans) == {"before", "request", "infer", "attention", "look up"}
    assert marks(spans) == {name: name for name in ("request", "infer", "attention", "look up")}


@pytest.mark.parametrize("end", ["force_flush", "shutdown"])
@pytest.mark.parametrize("way", ["http", "grpc"])
def test_the_providers_own_end_takes_stages_along(play, http, grpc, way, end):
    """A program that calls only its provider has sent its stages, and what comes after the end is counted."""
    made, receiver = (HTTP, http) if way == "http" else (GRPC, grpc)
    program = f"""
import gpuscope

with gpuscope.stage("first"):
    pass
before = gpuscope.statistics().exported
provider.{end}()
with gpuscope.stage("second"):
    pass
gpuscope.flush(20)
account = gpuscope.statistics()
print(json.dumps([account.exporters, account.exported, account.lost]))
raise SystemExit
"""
    url = http.url if way == "http" else grpc.endpoint
    settings = {"GPUSCOPE_INTERVAL": "60", "OTEL_BSP_SCHEDULE_DELAY": "60000"}
    found = json.loads(play(BY_HAND + made + BATCHES + program, url, **settings))
    sent = [span.name for span in receiver.spans]
    if end == "shutdown":
        assert (found, sent) == ([["application"], 1, {"provider_shutdown": 1}], ["first"])
    else:
        assert (found, sent) == ([["application"], 2, {}], ["first", "second"])


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_the_state_of_a_trace_from_elsewhere(play, http, grpc, protocol):
    """Is in the spans of stages, as in those of the provider."""
    made, receiver = (HTTP, http) if protocol == "http" else (GRPC, grpc)
    program = """
import gpuscope
from opentelemetry import context
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState

above = NonRecordingSpan(SpanContext(5, 6, True, TraceFlags(1), TraceState([("vendor", "a"), ("other", "th:8")])))
token = context.attach(trace.set_span_in_context(above))
with gpuscope.stage("stage"):
    pass
with trace.get_tracer("app").start_as_current_span("span"):
    pass
assert gpuscope.flush(20)
provider.force_flush()
raise SystemExit
"""
    assert play(BY_HAND + made + BATCHES + program, http.url if protocol == "http" else grpc.endpoint) == ""
    spans = {span.name: span for span in receiver.spans}
    for field in ("trace_id", "parent_span_id", "trace_state"):
        assert getattr(spans["stage"], field) == getattr(spans["span"], field)
    # Newer versions note in their spans whether an id is random, which of a trace from elsewhere nobody knows.
    assert spans["stage"].flags == spans["span"].flags
    assert spans["stage"].trace_state == "vendor=a,other=th:8"
