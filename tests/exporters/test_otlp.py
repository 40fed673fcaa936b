"""Batches as OTLP bytes: the templates say exactly what OpenTelemetry's own encoder says."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import ScopeSpans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, Status, StatusCode

from gpuscope._data.batch import RowFlag, SpanDetails
from gpuscope._data.record import Site
from gpuscope._settings.config import Config
from gpuscope._version import __version__
from gpuscope.exporters._encoding.otlp_bytes import SpanEncoder
from gpuscope.exporters.memory import MemoryExporter
from gpuscope.exporters.otlp import Envelope, sending

from .batches import Account, Row, Unprintable, batches, make_batch

RESOURCE = {"service.name": "tests", "host.name": "here"}
SCOPE = InstrumentationScope("gpuscope", __version__)


def captured(batch):
    """The batch's spans as objects."""
    spans = []
    MemoryExporter(spans).export(batch, Account().open(batch))
    return spans


def by_sdk(batch):
    """The batch's spans as OpenTelemetry's SDK and encoder make them."""
    resource = Resource(RESOURCE)
    has_host = batch.flags & RowFlag.IN_GRAPH == 0
    remote = iter((batch.flags[has_host] & RowFlag.REMOTE_PARENT != 0).tolist())
    spans = captured(batch)
    return encode_spans([_readable(span, resource, next(remote) if span.kind == "host" else False) for span in spans])


def _readable(span, resource, remote):
    """A span as the SDK holds it."""
    parent = SpanContext(span.trace_id, span.parent_id, is_remote=remote) if span.parent_id else None
    return ReadableSpan(
        name=span.name,
        context=SpanContext(span.trace_id, span.span_id, is_remote=False),
        parent=parent,
        resource=resource,
        attributes=span.attributes,
        events=[Event(name, attributes, at) for name, at, attributes in span.events],
        links=[Link(SpanContext(trace, link, is_remote=False), attributes) for trace, link, attributes in span.links],
        status=Status(StatusCode[span.status], span.description or None),
        start_time=span.start_ns,
        end_time=span.end_ns,
        instrumentation_scope=SCOPE,
    )


def normal(span):
    """A span as text, whatever the order of its attributes; NaN is itself and an unset status an empty one."""
    copy = type(span)()
    copy.CopyFrom(span)
    copy.ClearField("attributes")
    for name in ("trace_state", "dropped_events_count", "dropped_links_count"):
        copy.ClearField(name)  # Captured spans have none: see `test_otlp_equals_sdk.py`.
    copy.ClearField("status") if not span.status.code else None
    return str(copy), sorted(map(str, span.attributes))


def decoded(batch):
    """The batch's spans as they are sent."""
    return ScopeSpans.FromString(SpanEncoder().encode(batch)).spans


@settings(max_examples=150, deadline=None)
@given(batches())
def test_templates_agree_with_the_ordinary_encoder(batch):
    """Every span that the templates write decodes to the one that OpenTelemetry's encoder writes."""
    theirs = by_sdk(batch)
    expected = [span for resource in theirs.resource_spans for scope in resource.scope_spans for span in scope.spans]
    assert list(map(normal, decoded(batch))) == list(map(normal, expected))


@settings(max_examples=50, deadline=None)
@given(batches(), batches())
def test_what_is_remembered_changes_nothing(first, second):
    """An encoder that has seen another batch writes the same bytes as one that has not."""
    encoder = SpanEncoder()
    encoder.encode(first)
    assert encoder.encode(second) == SpanEncoder().encode(second) == encoder.encode(second)


def test_the_envelope_holds_resource_and_scope():
    """A payload is one request with one resource and one scope, and the spans of all its chunks in order."""
    chunks = [SpanEncoder().encode(make_batch(Row(span_id=number))) for number in (1, 2, 300)]
    request = ExportTraceServiceRequest.FromString(Envelope(RESOURCE, __version__).wrap(chunks))
    theirs = by_sdk(make_batch(Row())).resource_spans[0]
    (resource,) = request.resource_spans
    (scope,) = resource.scope_spans
    assert resource.resource == theirs.resource
    assert scope.scope == theirs.scope_spans[0].scope
    assert [int.from_bytes(span.span_id, "big") for span in scope.spans] == [1, 2, 300]


def test_a_stage_inside_a_graph_is_one_span():
    """It has the GPU's attributes, the stage's own, a mark, and the stage around it as its parent."""
    inside = Row(span_id=5, gpu_span_id=5, parent_id=3, host_ns=0, flags=int(RowFlag.IN_GRAPH))
    (span,) = decoded(make_batch(inside))
    attributes = {each.key for each in span.attributes}
    assert (int.from_bytes(span.span_id, "big"), int.from_bytes(span.parent_span_id, "big")) == (5, 3)
    assert span.name == "infer [gpu]"
    assert {
        "gpuscope.graph",
        "gpuscope.gpu.duration",
        "gpuscope.cuda.stream",
        "model",
        "code.function.name",
        "code.file.path",
        "code.line.number",
    } <= attributes
    assert "gpuscope.host.duration" not in attributes


def test_a_root_has_no_parent_field():
    """The parent id of a root span is empty, as the protocol demands, and not eight zeros."""
    root, child = decoded(make_batch(Row(), Row(parent_id=1)))
    assert root.parent_span_id == b""
    assert child.parent_span_id == bytes(7) + b"\x01"


class Color(str):
    """A string of a type of its own."""

    __slots__ = ()

    def __str__(self):
        return "not this"


class Tensor:
    """Something like a tensor on a GPU: to print it would be to wait for it."""

    shape, dtype, device = (2, 3), "float32", "cuda:0"

    def __repr__(self):
        raise AssertionError("read")


@dataclass
class Holder:
    """A dataclass, whose own `repr` would print what it holds."""

    held: Tensor


def cyclic():
    """A list that holds itself."""
    items = [1]
    items.append(items)
    return items


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, None),
        (b"\x00\xff", b"\x00\xff"),
        (bytearray(b"ab"), b"ab"),
        (np.float32(1.5), 1.5),
        (np.int64(-7), -7),
        (np.bool_(True), True),
        (np.array([1, 2]), [1, 2]),
        (np.zeros(5000), "<ndarray shape=(5000,) dtype=float64>"),
        (np.longdouble(2.5), "2.5"),
        (2**70, str(2**70)),
        (-(2**63), -(2**63)),
        (10**5000, "<int of 16610 bits>"),
        (math.inf, math.inf),
        ((1, ("a", None)), [1, ["a", None]]),
        ({"a": {1: [True]}}, {"a": {"1": [True]}}),
        ({3}, [3]),
        (list(range(5000)), "<list of 5000 items>"),
        (range(3), "range(0, 3)"),
        (Color("red"), "red"),
        ("\ud800", "?"),
        (StatusCode.OK, "StatusCode.OK"),
        (Unprintable(), "<Unprintable>"),
        ([1, Unprintable()], [1, "<Unprintable>"]),
        (Tensor(), "<Tensor shape=(2, 3) dtype=float32 device=cuda:0>"),
        ({"t": Tensor()}, {"t": "<Tensor shape=(2, 3) dtype=float32 device=cuda:0>"}),
        (Holder(Tensor()), {"held": "<Tensor shape=(2, 3) dtype=float32 device=cuda:0>"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_of_every_kind_arrive(value, shown):
    """No value that an application may set costs it the span, and what can be kept of a value is kept."""
    batch = make_batch(Row(details=SpanDetails(attributes={"value": value})))
    (span,) = captured(batch)
    assert span.attributes["value"] == shown
    assert type(span.attributes["value"]) is type(shown)
    (sent,) = decoded(batch)
    assert "value" in [item.key for item in sent.attributes]


def test_cycles_and_depth_are_bounded():
    """A value that holds itself, or doubles at each level, is cut off and does not hold the collector."""
    doubling = []
    for _ in range(60):
        doubling = [doubling, doubling]
    for value in (cyclic(), doubling):
        (span,) = decoded(make_batch(Row(details=SpanDetails(attributes={"value": value}))))
        assert span.ByteSize() < 20_000


@pytest.mark.parametrize("attributes", [{5: "x"}, {None: 1}, {("a", 1): 2}])
def test_keys_that_are_not_text_become_text(attributes):
    """An attribute's key of another type is shown as text."""
    (span,) = decoded(make_batch(Row(details=SpanDetails(attributes=attributes))))
    assert str(next(iter(attributes))) in [item.key.replace("['a', 1]", "('a', 1)") for item in span.attributes]


def test_odd_names_and_times_of_events_arrive():
    """Names that are not text and times that do not fit 64 bits are made to fit."""
    details = SpanDetails(name=5, events=((None, -3, {}), ("late", 2**70, None)), status=("ERROR", 7))
    host, gpu = decoded(make_batch(Row(gpu_span_id=3, details=details)))
    assert (host.name, gpu.name, host.status.message) == ("5", "5 [gpu]", "7")
    assert [(event.name, event.time_unix_nano) for event in host.events] == [("None", 0), ("late", 2**64 - 1)]


def test_an_attribute_appears_once():
    """An attribute that site and run both set is written once, with the run's value."""
    row = Row(site=Site("s", {"model": "a", "thread.id": 1}), details=SpanDetails(attributes={"model": "b"}))
    (span,) = decoded(make_batch(row))
    keys = [item.key for item in span.attributes]
    assert len(keys) == len(set(keys))
    assert {item.key: item.value.string_value for item in span.attributes}["model"] == "b"


@pytest.mark.parametrize(
    ("delay_s", "interval_s", "waits_s"),
    [(5.0, 1.0, 4.0), (1.0, 1.0, 0.25), (0.1, 1.0, 0.1), (0.0, 1.0, 0.0), (5.0, 60.0, 0.25)],
)
def test_a_span_waits_no_longer_than_the_schedule_delay(delay_s, interval_s, waits_s):
    """What it has waited for the collector counts; all spans of a pass go in one request."""
    limits = sending(Config().changed(schedule_delay_s=delay_s, interval_s=interval_s))
    assert limits.delay_s == pytest.approx(waits_s)
