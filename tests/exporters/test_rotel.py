"""An independent decoder: spans pass through `rotel`, a collector written in Rust, and come out the same."""

from __future__ import annotations

import pytest

from gpuscope._data.batch import RowFlag, SpanDetails
from gpuscope._data.record import ExceptionInfo, Site
from gpuscope._settings.config import Config
from gpuscope.exporters.otlp import OtlpExporter

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
