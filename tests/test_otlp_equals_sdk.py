"""What `otlp` sends is what the application's own SDK sends for the same stages, ids aside."""

from __future__ import annotations

import pytest

from .exporters.receiver import Receiver

pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")

PROGRAM = """
import sys
from gpuscope import _runtime, flush, stage
from gpuscope._config import Config
from gpuscope.testing import FakeDevice, ManualClock

exporter, url = sys.argv[1:]
if exporter == "sdk":
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint=url)))
    trace.set_tracer_provider(provider)

clock = ManualClock()
config = Config(mode="on", exporters=(exporter,), otlp_endpoint=url, warmup=1)
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


@pytest.fixture
def receiver():
    """A real OTLP receiver on a loopback port."""
    receiver = Receiver()
    yield receiver
    receiver.close()


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


def test_spans_of_both_exporters_are_equal(run_python, receiver):
    """Names, parents, kinds, attributes with their types, events and status are the same from both."""
    sent = {}
    for exporter in ("otlp", "sdk"):
        before = len(receiver.spans)
        result = run_python(PROGRAM, exporter, receiver.url)
        assert result.returncode == 0, result.stderr
        sent[exporter] = described(receiver.spans[before:])
    assert len(sent["otlp"]) == 8
    assert sent["otlp"] == sent["sdk"]
