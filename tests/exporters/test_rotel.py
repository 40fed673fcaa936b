"""An independent decoder: spans pass through `rotel`, a collector written in Rust, and come out the same."""

from __future__ import annotations

import pytest

import gpuscope
from gpuscope._data.batch import RowFlag, SpanDetails
from gpuscope._data.record import ExceptionInfo, Site
from gpuscope._settings.config import Config
from gpuscope.exporters.otlp import OtlpExporter

from ..batches.conftest import KeepsBatches
from .batches import NOW_NS, Row, make_batch

RESOURCE = {"service.name": "tests", "host.name": "hôte", "process.pid": 7, "ratio": 0.5, "flag": True}
BATCH = make_batch(
    Row(span_id=1, gpu_span_id=2, flags=RowFlag.WARMUP | RowFlag.CLAMPED),
    Row(span_id=3, parent_id=1, gpu_span_id=4, site=Site("größe", {"list": [1, 2.5, "x"], "none": True})),
    Row(span_id=5, parent_id=2**63 + 1, flags=RowFlag.REMOTE_PARENT | RowFlag.CAPTURED, trace_id=2**128 - 1),
    Row(span_id=6, details=SpanDetails(attributes={"batch_size": 8, "raw": b"\x00\xff", "map": {"a": [None, False]}})),
    Row(span_id=7, details=SpanDetails(error=ExceptionInfo("ValueError", "bad", (("a.py", 1, "f"),)))),
    Row(span_id=8, details=SpanDetails(events=(("token", NOW_NS + 1, {"n": 1}),), links=((9, 10, {"why": "batch"}),))),
    Row(span_id=9, details=SpanDetails(name="renamed", status=("OK", None))),
    *(Row(span_id=100 + number, gpu_span_id=1000 + number, parent_id=1) for number in range(50)),
)


def spans_by_id(messages):
    """Every span, with its resource and scope, by span id; a span's attributes in an order of their own."""
    found = {}
    for message in messages:
        for resource in message.resource_spans:
            shared = sorted(map(str, resource.resource.attributes))
            for scope in resource.scope_spans:
                for span in scope.spans:
                    span_id = span.span_id
                    attributes = sorted(map(str, span.attributes))
                    del span.attributes[:]
                    found[span_id] = (str(span), attributes, shared, str(scope.scope))
    return found


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_what_goes_through_rotel_comes_out_the_same(rotel_port, behind_rotel, otlp_receiver, account, compression):
    """Names, ids, times, attributes, parents, status, events, links and resource survive, plain and gzip."""
    behind_rotel.requests.clear()
    for endpoint in (f"http://127.0.0.1:{rotel_port}/v1/traces", otlp_receiver.url):
        config = Config().changed(otlp_endpoint=endpoint, otlp_compression=compression, otlp_timeout_s=30)
        exporter = OtlpExporter(config, RESOURCE)
        list(exporter.export(BATCH, account.open(BATCH)))
        exporter.shutdown(30)
    account.check()
    assert account.exported == 2 * len(BATCH.site)

    direct = spans_by_id(request.message for request in otlp_receiver.requests)
    assert len(direct) == len(BATCH.site) + 52
    for count in range(1, 60):
        through = spans_by_id(request.message for request in behind_rotel.wait_for(count))
        if len(through) >= len(direct):
            break
    assert through == direct


@pytest.fixture
def passed_on(rotel_ports, behind_rotel, otlp_receiver, account):
    """Return a function that sends batches through rotel; it returns the spans, which are those that were sent."""

    def send(batches, protocol):
        behind_rotel.requests.clear()
        ways = ((f"http://127.0.0.1:{rotel_ports[protocol]}", protocol), (otlp_receiver.endpoint, "http/protobuf"))
        for url, way in ways:
            config = Config().changed(otlp_base_endpoint=url, otlp_protocol=way, otlp_timeout_s=30)
            exporter = OtlpExporter(config, RESOURCE)
            for batch in batches:
                list(exporter.export(batch, account.open(batch)))
            exporter.shutdown(30)
        account.check()
        direct = spans_of(request.message for request in otlp_receiver.requests)
        for count in range(1, 60):
            through = spans_of(request.message for request in behind_rotel.wait_for(count))
            if len(through) >= len(direct):
                break
        assert {str(span) for span in through} == {str(span) for span in direct}
        return through

    return send


def spans_of(messages):
    """Every span, its attributes in the order of their names."""
    resources = [resource for message in messages for resource in message.resource_spans]
    spans = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    for span in spans:
        span.attributes.sort(key=lambda each: each.key)
    return spans


@pytest.mark.parametrize("members", [3, 300])
@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_the_links_of_a_batch(passed_on, make_bench, protocol, members):
    """By both protocols: a batch links to all its members, each light span back to it, and the shares add up."""
    if protocol == "grpc":
        pytest.importorskip("grpc")
    keeps = KeepsBatches()
    bench = make_bench(exporters=(keeps,))
    numbers = range(1, members + 1)
    tokens = [gpuscope.Token.from_traceparent(f"00-{number:032x}-{number:016x}-01") for number in numbers]
    with gpuscope.stage("predict", members=tokens, weights=numbers, basis="rows"):
        bench.clock.advance(0.001_234_567)
    bench.collect()
    spans = passed_on(keeps.batches, protocol)
    (batch,) = (span for span in spans if span.name == "predict")
    (on_gpu,) = (span for span in spans if span.name == "predict [gpu]")
    light = [span for span in spans if span.name == "predict (shared)"]
    assert [(link.trace_id, link.span_id) for link in batch.links] == [
        (number.to_bytes(16, "big"), number.to_bytes(8, "big")) for number in numbers
    ]
    assert {(span.trace_id, span.parent_span_id) for span in light} == {
        (link.trace_id, link.span_id) for link in batch.links
    }
    for span in light:
        assert [(link.trace_id, link.span_id) for link in span.links] == [(batch.trace_id, batch.span_id)]
    shares = [each.value.int_value for span in light for each in span.attributes if each.key == "gpuscope.gpu.share"]
    assert len(shares) == members
    assert sum(shares) == on_gpu.end_time_unix_nano - on_gpu.start_time_unix_nano
