"""What `otlp` sends is what the application's own SDK sends for the same stages, ids aside."""

from __future__ import annotations

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")

PROGRAM = """
import sys
from gpuscope import _runtime, flush, stage
from gpuscope._settings.config import Config
from gpuscope.testing import FakeDevice, ManualClock

exporter, url, compression, rich = sys.argv[1:]
from opentelemetry import context, trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState
if exporter != "otlp":
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint=url)))
    trace.set_tracer_provider(provider)

clock = ManualClock()
config = Config().changed(
    mode="on", exporters=exporter, otlp_endpoint=url, otlp_compression=compression, warmup=1, metrics="none"
)
with _runtime.period(config, device=FakeDevice(clock, completes=True), clock=clock):

    @stage("infer", attributes={"model": "vit", "gpus": 1, "scale": 0.5, "eager": True})
    def infer():
        with stage("h2d") as copy:
            copy.set_attribute("batch_size", 8)
            copy.set_attribute("shape", [3, 224, 224])

    above = NonRecordingSpan(SpanContext(5, 6, True, TraceFlags(1), TraceState([("vendor", "a"), ("other", "th:8")])))
    if rich:
        context.attach(trace.set_span_in_context(above))
    with stage("request", attributes={"tenant": "long name", "first": 1}):
        span = trace.get_current_span()
        if rich:
            for number in range(4):
                span.add_event("cache", {"key": "abcdefgh", "number": number})
                span.add_link(SpanContext(8 + number, 9, False), {"why": "a batch", "number": number})
            span.set_attribute("texts", ["abcdefgh", "a"])
            span.set_attributes({f"many {number}": number for number in range(8)})
        infer()
        try:
            with stage("postprocess"):
                raise ValueError("no such image")
        except ValueError:
            pass
    assert flush(20)
"""


def described(spans):
    """Everything of the spans by name, but ids, times and what is measured; parents by name."""
    names = {span.span_id: span.name for span in spans}
    found = {}
    for span in spans:
        # Of ours, those of a GPU span may be more than the limit.
        left_out = ("thread.id", "gpuscope.cuda.stream")
        attributes = {item.key: item.value for item in span.attributes if item.key not in left_out}
        for key, value in attributes.items():
            if key.startswith("gpuscope.") and value.WhichOneof("value") == "double_value":
                attributes[key] = "measured"
        events = [
            (event.name, sorted(item.key for item in event.attributes), event.dropped_attributes_count)
            for event in span.events
        ]
        links = [
            (link.trace_id, [(item.key, item.value) for item in link.attributes], link.dropped_attributes_count)
            for link in span.links
        ]
        status = (span.status.code, span.status.message)
        # The SDK drops an attribute twice that is set at the start and at the end. GPU spans have only ours.
        some = not span.name.endswith("[gpu]") and span.dropped_attributes_count > 0
        dropped = (some, span.dropped_events_count, span.dropped_links_count)
        parent = names.get(span.parent_span_id, span.parent_span_id)
        found[span.name] = (
            parent, span.kind, attributes, events, links, status, dropped, span.flags, span.trace_state
        )  # fmt: skip
    return found


def sent(run_python, exporter, url, *, to, compression="none", rich="", **environ):
    """Run the program, and return what then arrived; `rich`: the span is told much, inside another trace."""
    before = len(to.requests)
    result = run_python(PROGRAM, exporter, url, compression, rich, **environ)
    assert result.returncode == 0, result.stderr
    for requests in range(before + 1, before + 20):
        to.wait_for(requests)
        spans = [span for request in to.requests[before:] for span in spans_in(request.message)]
        if len(spans) >= 8:
            break
    assert len(spans) == 8
    return described(spans)


def spans_in(message):
    """Every span of a request."""
    return [span for resource in message.resource_spans for scope in resource.scope_spans for span in scope.spans]


def test_spans_of_both_exporters_are_equal(run_python, otlp_receiver):
    """Names, parents, kinds, attributes with their types, events and status are the same from both."""
    url = otlp_receiver.url
    assert sent(run_python, "otlp", url, to=otlp_receiver) == sent(run_python, "sdk", url, to=otlp_receiver)


LIMITS = {
    "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "11",
    "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT": "6",
    "OTEL_SPAN_EVENT_COUNT_LIMIT": "2",
    "OTEL_SPAN_LINK_COUNT_LIMIT": "3",
    "OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT": "1",
    "OTEL_LINK_ATTRIBUTE_COUNT_LIMIT": "1",
}


@pytest.mark.parametrize("environ", [{}, LIMITS], ids=["usual", "limits"])
def test_columns_through_the_application_equal_what_its_provider_makes(run_python, otlp_receiver, environ):
    """Also the trace's state, flags, events and links, and what the limits of OpenTelemetry leave, with its counts."""
    url = otlp_receiver.url
    ours = sent(run_python, "auto", url, to=otlp_receiver, rich="1", **environ)
    assert ours == sent(run_python, "sdk", url, to=otlp_receiver, rich="1", **environ)


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_spans_through_a_collector_equal_those_of_the_sdk(
    run_python, rotel_port, behind_rotel, otlp_receiver, compression
):
    """`otlp`, through a collector, decoded with opentelemetry-proto, is what the SDK sends for the same stages."""
    through = f"http://127.0.0.1:{rotel_port}/v1/traces"
    ours = sent(run_python, "otlp", through, to=behind_rotel, compression=compression)
    assert ours == sent(run_python, "sdk", otlp_receiver.url, to=otlp_receiver)
