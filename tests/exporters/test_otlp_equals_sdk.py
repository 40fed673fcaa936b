"""All four ways send what the application's own SDK sends for the same stages, ids aside."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")

PROGRAM = """
import sys
import numpy as np
from gpuscope import _runtime, flush, stage, statistics
from gpuscope._cuda.stream_sampler import ANSWER
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


    class Passing(SimpleSpanProcessor):
        def on_end(self, span):
            super().on_end(span)

    kind = Passing if exporter == "processors" else SimpleSpanProcessor
    provider.add_span_processor(kind(OTLPSpanExporter(endpoint=url)))
    trace.set_tracer_provider(provider)

clock = ManualClock()
config = Config().changed(
    mode="on",
    exporters="auto" if exporter in ("application", "processors") else exporter,
    otlp_endpoint=url, otlp_compression=compression, warmup=1, metrics="none", gpu_spans="all",
)


class Sampling:
    hz, why_off, answers = 200.0, "", []

    def take(self):
        taken, self.answers = np.array(self.answers, ANSWER), []
        return taken

    def counts(self):
        return {}


device = FakeDevice(clock, completes=True)
device.sampling = Sampling()


def asked(*had_work):
    device.sampling.answers += [(clock(), 7, 0, 1, 1, had) for had in had_work]


with _runtime.period(config, device=device, clock=clock):

    @stage("infer", attributes={"model": "vit", "gpus": 1, "scale": 0.5, "eager": True})
    def infer():
        with stage("h2d") as copy:
            copy.set_attribute("batch_size", 8)
            copy.set_attribute("shape", [3, 224, 224])
            asked(0, 1, 1)

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
        asked(1)
        try:
            with stage("postprocess"):
                raise ValueError("no such image")
        except ValueError:
            pass
    assert flush(20)
    assert statistics().exporters == (exporter,)
"""


def described(spans):
    """Everything of the spans by name, but ids, times and what is measured; parents by name."""
    names = {span.span_id: span.name for span in spans}
    found = {}
    for span in spans:
        # Of ours, those of a GPU span may be more than the limit.
        left_out = ("thread.id", "gpuscope.cuda.stream", "gpuscope.device.index", "hw.type")
        attributes = {item.key: item.value for item in span.attributes if item.key not in left_out}
        for key, value in attributes.items():
            measured = key.startswith("gpuscope.") and key != "gpuscope.gpu.had_work"
            if measured and value.WhichOneof("value") == "double_value":
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
    found = described(spans)
    asked = {
        name: (said[2].get("gpuscope.gpu.samples"), said[2].get("gpuscope.gpu.had_work"))
        for name, said in found.items()
    }
    assert {name: (number.int_value, part.double_value) for name, (number, part) in asked.items() if number} == {
        "h2d [gpu]": (3, pytest.approx(2 / 3)),
        "request [gpu]": (1, 1.0),
    }
    return found


def spans_in(message):
    """Every span of a request."""
    return [span for resource in message.resource_spans for scope in resource.scope_spans for span in scope.spans]


def test_spans_of_both_exporters_are_equal(run_python, otlp_receiver):
    """Names, parents, kinds, attributes with their types, events and status are the same from both."""
    url = otlp_receiver.url
    assert sent(run_python, "otlp", url, to=otlp_receiver) == sent(run_python, "sdk", url, to=otlp_receiver)


LIMITS = {
    "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "13",
    "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT": "6",
    "OTEL_SPAN_EVENT_COUNT_LIMIT": "2",
    "OTEL_SPAN_LINK_COUNT_LIMIT": "3",
    "OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT": "1",
    "OTEL_LINK_ATTRIBUTE_COUNT_LIMIT": "1",
}


@pytest.mark.parametrize("way", ["application", "processors"])
@pytest.mark.parametrize("environ", [{}, LIMITS], ids=["usual", "limits"])
def test_other_ways_through_the_application_equal_what_its_provider_makes(run_python, otlp_receiver, environ, way):
    """Also the trace's state, flags, events and links, and what the limits of OpenTelemetry leave, with its counts."""
    url = otlp_receiver.url
    ours = sent(run_python, way, url, to=otlp_receiver, rich="1", **environ)
    assert ours == sent(run_python, "sdk", url, to=otlp_receiver, rich="1", **environ)


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_spans_through_a_collector_equal_those_of_the_sdk(
    run_python, rotel_port, behind_rotel, otlp_receiver, compression
):
    """`otlp`, through a collector, decoded with opentelemetry-proto, is what the SDK sends for the same stages."""
    through = f"http://127.0.0.1:{rotel_port}/v1/traces"
    ours = sent(run_python, "otlp", through, to=behind_rotel, compression=compression)
    assert ours == sent(run_python, "sdk", otlp_receiver.url, to=otlp_receiver)


FAILURES = """
import json
import sys
from gpuscope import _runtime, flush, stage
from gpuscope._settings.config import Config
from gpuscope.testing import FakeDevice, ManualClock

exporter, url, how = sys.argv[1:]
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
if exporter != "otlp":
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint=url)))
    trace.set_tracer_provider(provider)
sdk = TracerProvider().get_tracer("the SDK itself")

class Oops(Exception):
    pass

def cuda():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def alone():
    raise Oops("bad")

def silent():
    raise Oops

def lines():
    raise Oops("one\\ntwo")

def cause():
    try:
        cuda()
    except RuntimeError as error:
        raise Oops("no image") from error

def context():
    try:
        cause()
    except Oops:
        {}["missing"]

def suppressed():
    try:
        cuda()
    except RuntimeError:
        raise Oops("no image") from None

def recursion(depth=80):
    if depth == 0:
        cuda()
    recursion(depth - 1)

def endless():
    endless()

def few_repetitions():
    recursion(4)

def notes():
    error = Oops("bad")
    if hasattr(error, "add_note"):
        error.add_note("batch 8\\nof 9")
        error.add_note("")
    raise error

def circle():
    first, second = Oops("first"), Oops("second")
    first.__cause__, second.__cause__ = second, first
    raise first

def without_source():
    exec(compile("cause()", "<string>", "exec"), {"cause": cause})

def group():
    if sys.version_info < (3, 11):
        raise Oops("there are none")
    try:
        cause()
    except Oops as error:
        failed = error
    try:
        raise ExceptionGroup("inner", [ValueError("not raised"), failed])
    except ExceptionGroup as error:
        inner = error
    try:
        raise ExceptionGroup("outer", [KeyError("a"), inner])
    except ExceptionGroup as error:
        raise Oops("all failed") from error

def groups_alone():
    if sys.version_info < (3, 11):
        raise Oops("there are none")
    raise ExceptionGroup("outer", [ExceptionGroup("inner", [Oops("a"), Oops("b")]), Oops("c")])

clock, expected = ManualClock(), {}
config = Config().changed(mode="on", exporters=exporter, otlp_endpoint=url, otlp_compression="none", metrics="none")

with _runtime.period(config, device=FakeDevice(clock, completes=True), clock=clock):
    for fail in (
        alone, silent, lines, cause, context, suppressed, recursion, endless, few_repetitions, notes, circle,
        without_source, group, groups_alone,
    ):
        if how == "leaves":
            try:
                with stage(fail.__name__):
                    fail()
            except Exception as error:
                failure = error
        else:
            with stage(fail.__name__):
                try:
                    fail()
                except Exception as error:
                    failure = error
                    trace.get_current_span().record_exception(error)
        span = sdk.start_span("expected")
        span.record_exception(failure)
        expected[fail.__name__] = dict(span.events[0].attributes)
    assert flush(20)
print(json.dumps(expected))
"""
MARKERS = re.compile(r"^[ |]*[~^][ ~^]*\n", re.MULTILINE)
"""Below lines of the source, from Python 3.11 on: gpuscope keeps no columns."""


@pytest.mark.parametrize("how", ["leaves", "recorded"])
@pytest.mark.parametrize("exporter", ["otlp", "auto", "sdk"])
def test_exceptions_are_those_of_the_sdk(run_python, otlp_receiver, exporter, how):
    """Type, message and stack trace: with the source, causes, contexts, notes, recursions, and members of groups."""
    if (exporter, how) == ("otlp", "recorded"):
        pytest.skip("without a provider there is no current span")
    result = run_python(FAILURES, exporter, otlp_receiver.url, how)
    assert result.returncode == 0, result.stderr
    expected = json.loads(result.stdout)
    for number in range(1, 100):
        otlp_receiver.wait_for(number)
        spans = [span for request in otlp_receiver.requests for span in spans_in(request.message)]
        if {span.name for span in spans} >= expected.keys():
            break
    events = {span.name: span.events[0] for span in spans if span.name in expected}
    for name, of_the_sdk in expected.items():
        ours = {item.key: item.value.string_value for item in events[name].attributes}
        of_the_sdk["exception.stacktrace"] = MARKERS.sub("", of_the_sdk["exception.stacktrace"])
        if how == "leaves":
            del of_the_sdk["exception.escaped"]
        assert ours == of_the_sdk, name
    if how == "leaves":
        status = {span.name: (span.status.code, span.status.message) for span in spans}
        assert status["cause"] == (2, "Oops: no image")
