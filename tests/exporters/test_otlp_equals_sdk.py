"""What `otlp` sends is what the application's own SDK sends for the same stages, ids aside."""

from __future__ import annotations

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")

PROGRAM = """
import sys
from gpuscope import _runtime, flush, stage
from gpuscope._settings.config import Config
from gpuscope.testing import FakeDevice, ManualClock

exporter, url, compression = sys.argv[1:]
if exporter == "sdk":
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint=url)))
    trace.set_tracer_provider(provider)

clock = ManualClock()
config = Config(mode="on", exporters=(exporter,), otlp_endpoint=url, otlp_compression=compression, warmup=1)
with _runtime.period(config, device=FakeDevice(clock, completes=True), clock=clock):

    @stage("infer", attributes={"model": "vit", "gpus": 1, "scale": 0.5, "eager": True})
    def infer():
        with stage("h2d") as copy:
            copy.set_attribute("batch_size", 8)
            copy.set_attribute("shape", [3, 224, 224])

    with stage("request"):
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
        attributes = {item.key: item.value for item in span.attributes if item.key != "thread.id"}
        for key, value in attributes.items():
            if key.startswith("gpuscope.") and value.WhichOneof("value") == "double_value":
                attributes[key] = "measured"
        events = [(event.name, sorted(item.key for item in event.attributes)) for event in span.events]
        status = (span.status.code, span.status.message)
        found[span.name] = (names.get(span.parent_span_id), span.kind, attributes, events, status)
    return found


def sent(run_python, exporter, url, *, to, compression="none"):
    """Run the program, and return what then arrived."""
    before = len(to.requests)
    result = run_python(PROGRAM, exporter, url, compression)
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


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_spans_through_a_collector_equal_those_of_the_sdk(
    run_python, rotel_port, behind_rotel, otlp_receiver, compression
):
    """`otlp`, through a collector, decoded with opentelemetry-proto, is what the SDK sends for the same stages."""
    through = f"http://127.0.0.1:{rotel_port}/v1/traces"
    ours = sent(run_python, "otlp", through, to=behind_rotel, compression=compression)
    assert ours == sent(run_python, "sdk", otlp_receiver.url, to=otlp_receiver)
