"""A line of the `file` exporter becomes the bytes that `otlp` sends, whatever is in the line."""

from __future__ import annotations

import json
from threading import Event

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from gpuscope._collecting.active_exporters import with_work
from gpuscope._data.batch import NO_WORK_NS
from gpuscope._settings.config import Config
from gpuscope._version import __version__
from gpuscope.exporters._encoding.otlp_bytes import SpanEncoder
from gpuscope.exporters._encoding.otlp_json import JsonEncoder
from gpuscope.exporters._encoding.otlp_message import split_stages
from gpuscope.exporters._recorded import RecordedLines
from gpuscope.exporters._resend import FirstTry, Resender
from gpuscope.exporters._transport.http import Endpoint, HttpClient
from gpuscope.exporters._transport.sender import Limits
from gpuscope.exporters.otlp import Envelope

from .batches import Row, batches, make_batch
from .receiver import Answer, rejects

RESOURCE = {"service.name": "tests", "host.name": "h\u00f4te", "ranks": [1, 2], "ratio": 0.5}


def line_of(batch, **resource):
    """What the file has of a batch."""
    return JsonEncoder({**RESOURCE, **resource}, __version__).encode(batch).encode() + b"\n"


def normal(binary):
    """A request as text, whatever the order of a span's attributes."""
    request = ExportTraceServiceRequest.FromString(binary)
    for span in request.resource_spans[0].scope_spans[0].spans:
        ordered = sorted(span.attributes, key=str)
        del span.attributes[:]
        span.attributes.extend(ordered)
    return str(request)


def resent(line, *, every_gpu_span=True):
    """A line as the request that is sent of it, and as the spans' bytes."""
    lines = RecordedLines(every_gpu_span=every_gpu_span)
    (part,) = lines.parts(line)
    assert not lines.skipped
    return normal(part.envelope.wrap([part.body])), part


@settings(max_examples=100, deadline=None)
@given(batches(), st.booleans())
def test_a_line_becomes_what_the_live_exporter_sends(batch, every_gpu_span):
    """Ids, times, attributes and their types, events, links, status, trace state: all as if sent at once."""
    assume(len(set(batch.span_id.tolist())) == len(batch.span_id))
    live = SpanEncoder().encode(batch if every_gpu_span else with_work(batch))
    sent, part = resent(line_of(batch), every_gpu_span=every_gpu_span)
    assert sent == normal(Envelope(RESOURCE, __version__).wrap([live]))
    assert part.stages == len(batch.span_id)
    assert part.spans == len(ExportTraceServiceRequest.FromString(part.envelope.wrap([part.body])).resource_spans[0]
                             .scope_spans[0].spans)  # fmt: skip


def test_a_stage_without_work_has_no_gpu_span_as_when_sent_live():
    """The host span then says nothing of a GPU; one nanosecond more, and both are there."""
    rows = [Row(span_id=9 + n, gpu_span_id=(1 << 63) + 9 + n, gpu_ns=NO_WORK_NS + n) for n in (0, 1)]
    _, part = resent(line_of(make_batch(*rows)), every_gpu_span=False)
    assert (part.stages, part.spans) == (2, 3)
    _, part = resent(line_of(make_batch(*rows)))
    assert part.spans == 4


def test_what_is_sent_can_be_halved():
    """An endpoint that finds a payload too large gets it in pieces, of which each is a stage with its GPU span."""
    rows = [Row(span_id=n, parent_id=n - 1, gpu_span_id=(1 << 63) + n) for n in range(1, 5)]
    _, part = resent(line_of(make_batch(*rows)))
    assert [piece.count(b" [gpu]") for piece in split_stages(part.body)] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"resourceSpans": [{"scopeSp', "truncated"),
        (b'{"resourceSpans": [}\n', "malformed"),
        (b"time,stage\n", "foreign"),
        (b'{"resourceLogs": []}\n', "foreign"),
        (b"[1]\n", "foreign"),
        (b'{"resourceSpans": 3}\n', "malformed"),
        (b'{"resourceSpans": [3]}\n', "malformed"),
        (b'{"resourceSpans": [{"scopeSpans": [{"scope": {"name": "other"}, "spans": [{}]}]}]}\n', "foreign spans"),
        (b'{"resourceSpans": [{"scopeSpans": [{"scope": {"name": "gpuscope"}, "spans": [{}]}]}]}\n', "malformed spans"),
        (b'{"resourceSpans": [{"scopeSpans": [{"scope": {"name": "gpuscope"}, "spans": [3]}]}]}\n', "malformed"),
    ],
)
def test_what_is_not_a_line_of_ours_is_counted(line, reason):
    """It is skipped, and nothing is raised."""
    lines = RecordedLines(every_gpu_span=False)
    assert lines.parts(line) == []
    assert dict(lines.skipped) == {reason: 1}


@pytest.mark.parametrize(
    "wrong",
    [
        {"traceId": "xx"},
        {"spanId": "00"},
        {"parentSpanId": "0"},
        {"startTimeUnixNano": "-1"},
        {"endTimeUnixNano": str(2**64)},
        {"attributes": [{"key": "a", "value": {"intValue": str(2**63)}}]},
        {"attributes": [{"key": "a", "value": {"otherValue": 1}}]},
        {"attributes": None},
        {"status": {"code": 7}},
        {"links": [{"traceId": "f" * 33, "spanId": "1"}]},
        {"events": [{"name": "x"}]},
        {"traceState": 5, "name": None, "flags": "x"},
    ],
)
def test_a_damaged_span_is_left_out_alone(wrong):
    """The others of its line are sent."""
    request = json.loads(line_of(make_batch(Row(span_id=1), Row(span_id=2))))
    request["resourceSpans"][0]["scopeSpans"][0]["spans"][0].update(wrong)
    lines = RecordedLines(every_gpu_span=False)
    (part,) = lines.parts(json.dumps(request).encode())
    assert part.stages == 1
    assert dict(lines.skipped) == {"malformed spans": 1}


@pytest.fixture
def make_resender(otlp_receiver):
    """Return a function that makes what sends to the receiver."""
    clients = []

    def make(first_try=False, **limits):
        config = Config().changed(otlp_endpoint=otlp_receiver.url, otlp_timeout_s=2)
        interrupt = Event()
        client = HttpClient(Endpoint.for_traces(config), interrupt, version="1", backoff_s=0.001)
        clients.append(FirstTry(client, interrupt) if first_try else client)
        return Resender(clients[-1], Limits(delay_s=0.0, **limits))

    yield make
    for client in clients:
        client.close()


def add(resender, *ids, **resource):
    """Have one line for each number sent."""
    lines = RecordedLines(every_gpu_span=False)
    for number in ids:
        for part in lines.parts(line_of(make_batch(Row(span_id=number)), **resource)):
            resender.add(part)


def test_payloads_are_filled(make_resender, otlp_receiver):
    """Lines of one process go together, as many stages as a payload may have."""
    resender = make_resender(payload_stages=2)
    add(resender, 1, 2, 3)
    resender.finish()
    assert [len(r.message.resource_spans[0].scope_spans[0].spans) for r in otlp_receiver.requests] == [2, 1]
    assert (resender.delivered, resender.stages, dict(resender.lost)) == (3, 3, {})


def test_processes_are_kept_apart(make_resender, otlp_receiver):
    """Each payload has the resource of the process that its spans come from."""
    lines, resender = RecordedLines(every_gpu_span=False), make_resender()
    for number in range(1, 5):
        for part in lines.parts(line_of(make_batch(Row(span_id=number)), **{"process.pid": number % 2})):
            resender.add(part)
    resender.finish()
    assert lines.processes == 2
    assert [len(r.message.resource_spans[0].scope_spans[0].spans) for r in otlp_receiver.requests] == [2, 2]


def test_what_is_held_of_many_processes_is_bounded(make_resender, otlp_receiver):
    """When it is too much, all of it is sent."""
    lines, resender = RecordedLines(every_gpu_span=False), make_resender(buffer_bytes=1)
    for part in lines.parts(line_of(make_batch(Row(span_id=1)))):
        resender.add(part)
    assert len(otlp_receiver.requests) == 1


def test_a_partial_refusal_is_counted_and_the_rest_is_sent(make_resender, otlp_receiver):
    """Spans that an endpoint rejects are about those spans: the next payload goes."""
    otlp_receiver.answer(rejects(1), 400)
    resender = make_resender(payload_stages=1)
    add(resender, 1, 2, 3)
    resender.finish()
    assert dict(resender.lost) == {"rejected": 1, "http_400": 1}
    assert resender.delivered == 1
    assert "1 spans rejected: no room" in resender.worst.detail


def test_after_a_failure_of_the_endpoint_nothing_more_is_sent(make_resender, otlp_receiver):
    """What a wrong key or a wrong path refuses once it refuses always."""
    otlp_receiver.answer(200, 401)
    resender = make_resender(payload_stages=1)
    add(resender, 1, 2, 3, 4)
    resender.finish()
    assert len(otlp_receiver.requests) == 2
    assert (resender.delivered, dict(resender.lost)) == (1, {"http_401": 1, "not_sent": 2})


def test_the_first_payload_is_tried_again_where_somebody_asks_for_that(make_resender, otlp_receiver):
    """An endpoint that is busy is not one that is not there."""
    otlp_receiver.answer(503, Answer(503))
    resender = make_resender(first_try=True)
    add(resender, 1)
    resender.finish()
    assert resender.delivered == 1
    assert len(otlp_receiver.requests) == 3


def test_nobody_there_is_known_at_once(make_resender, otlp_receiver):
    """The first payload is tried once where no connection comes about."""
    otlp_receiver.refuse()
    resender = make_resender(first_try=True)
    add(resender, 1)
    resender.finish()
    assert dict(resender.lost) == {"unreachable": 1}
