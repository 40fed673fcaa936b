"""Metrics to a real receiver, read with OpenTelemetry's own messages."""

from __future__ import annotations

import json
import logging
import time

import pytest
from google.protobuf import json_format
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AGGREGATION_TEMPORALITY_CUMULATIVE

from gpuscope._data.metrics import (
    BOUNDS_S,
    DURATION,
    LOST,
    SPECS,
    UNCERTAINTY,
    DataPoint,
    Exemplar,
    Histogram,
    Snapshot,
)
from gpuscope._settings.config import Config
from gpuscope._version import __version__
from gpuscope.exporters._encoding.metrics_message import request_bytes
from gpuscope.exporters._encoding.otlp_json import JsonEncoder
from gpuscope.exporters.metrics_otlp import OtlpMetrics

from .receiver import Answer, rejects

RESOURCE = {"service.name": "tests"}
ACCOUNT = {LOST: [DataPoint({"gpuscope.reason": "shut\u00e9"}, 2**40)], UNCERTAINTY: [DataPoint({}, 3.5e-6)]}


def snapshot(lost=1):
    """Some metrics of a moment."""
    exemplar = Exemplar(0.25, 900, 0xABC, 0xDEF)
    histogram = Histogram((1, *[0] * (len(BOUNDS_S) - 1), 2), 40.5, exemplar)
    where = {"gpuscope.stage": "infer", "gpuscope.device.index": 0}
    points = {spec: [] for spec in SPECS}
    points |= {DURATION: [DataPoint(where, histogram)], UNCERTAINTY: [DataPoint({}, 3.5e-6)]}
    return Snapshot(100, 1000, {**points, LOST: [DataPoint({"gpuscope.reason": "shutdown"}, lost)]})


@pytest.fixture
def make_metrics(otlp_receiver):
    """Return a function that makes an exporter of metrics to the receiver; shut down at the end."""
    made = []

    def make(**settings):
        config = Config().changed(**{"otlp_base_endpoint": otlp_receiver.endpoint, **settings})
        made.append(OtlpMetrics(config, RESOURCE))
        return made[-1]

    yield make
    otlp_receiver.release()
    for exporter in made:
        exporter.shutdown(5)


def send(exporter, *snapshots):
    """Have each tried."""
    for each in snapshots or (snapshot(),):
        exporter.put(each)
        exporter.flush(20)


class TestMessage:
    """What is sent."""

    def test_true_histograms_cumulative_with_exemplars(self, make_metrics, otlp_receiver):
        """A histogram has bounds, buckets, sum, count, start and the slowest stage's ids; empty ones are left out."""
        send(make_metrics())
        (request,) = otlp_receiver.requests
        assert request.path == "/v1/metrics"
        assert set(request.metrics) == {DURATION.name, LOST.name, UNCERTAINTY.name}
        metric = request.metrics[DURATION.name]
        assert (metric.unit, metric.description) == ("s", DURATION.description)
        assert metric.histogram.aggregation_temporality == AGGREGATION_TEMPORALITY_CUMULATIVE
        (point,) = metric.histogram.data_points
        assert (point.start_time_unix_nano, point.time_unix_nano) == (100, 1000)
        assert tuple(point.explicit_bounds) == BOUNDS_S
        assert (point.bucket_counts[0], point.bucket_counts[-1], point.count, point.sum) == (1, 2, 3, 40.5)
        assert {item.key: item.value.WhichOneof("value") for item in point.attributes} == {
            "gpuscope.stage": "string_value",
            "gpuscope.device.index": "int_value",
        }
        (exemplar,) = point.exemplars
        assert (exemplar.as_double, exemplar.time_unix_nano) == (0.25, 900)
        assert (exemplar.trace_id.hex(), exemplar.span_id.hex()) == (f"{0xABC:032x}", f"{0xDEF:016x}")

    def test_sums_are_monotonic_and_whole(self, make_metrics, otlp_receiver):
        """Counts are cumulative sums of whole numbers, and gauges say what is so now."""
        send(make_metrics(), snapshot(lost=7))
        metrics = otlp_receiver.requests[0].metrics
        lost = metrics[LOST.name].sum
        assert lost.is_monotonic
        assert lost.aggregation_temporality == AGGREGATION_TEMPORALITY_CUMULATIVE
        assert [point.as_int for point in lost.data_points] == [7]
        assert [point.as_double for point in metrics[UNCERTAINTY.name].gauge.data_points] == [3.5e-6]

    def test_json_says_what_protobuf_says(self):
        """The file's line decodes to the very message that is sent, but for the descriptions."""
        account = Snapshot(100, 1000, ACCOUNT)
        line = json.loads(JsonEncoder(RESOURCE, __version__).encode_metrics(account))
        binary = ExportMetricsServiceRequest.FromString(request_bytes(account, RESOURCE))
        for metric in binary.resource_metrics[0].scope_metrics[0].metrics:
            metric.description = ""
        assert json_format.ParseDict(line, ExportMetricsServiceRequest()) == binary

    def test_variables_of_metrics_come_first(self, make_metrics, otlp_receiver):
        """Headers and compression are those for metrics, the general ones where there are none."""
        environ = {"OTEL_EXPORTER_OTLP_METRICS_HEADERS": "key=m", "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "key=t"}
        config, _ = Config.from_env({**environ, "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip"})
        names = ("otlp_headers", "otlp_metrics_headers", "otlp_metrics_compression")
        send(make_metrics(**{name: getattr(config, name) for name in names}))
        headers = otlp_receiver.requests[0].headers
        assert (headers["key"], headers["content-encoding"]) == ("m", "gzip")
        assert otlp_receiver.requests[0].metrics


class TestFailures:
    """What is said, and that nobody waits."""

    @pytest.mark.parametrize("status", [404, 405, 501])
    def test_an_endpoint_without_metrics_is_told_once_and_left_alone(self, make_metrics, otlp_receiver, caplog, status):
        """Jaeger takes spans only: that is not worth a warning, and nothing more is sent there."""
        caplog.set_level(logging.INFO, "gpuscope")
        otlp_receiver.answer(status)
        exporter = make_metrics()
        send(exporter, snapshot(), snapshot(), snapshot())
        assert len(otlp_receiver.requests) == 1
        (record,) = [record for record in caplog.records if "takes no metrics" in record.message]
        assert record.levelno == logging.INFO
        assert str(status) in record.message

    def test_each_kind_of_failure_is_said_once_and_the_next_makes_it_good(self, make_metrics, otlp_receiver, caplog):
        """A snapshot is tried once; what failed is in the next, for figures are cumulative."""
        caplog.set_level(logging.INFO, "gpuscope")
        otlp_receiver.answer(503, 503, 400, rejects(3))
        send(make_metrics(), *(snapshot(lost=number) for number in range(1, 6)))
        assert len(otlp_receiver.requests) == 5
        said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
        assert len(said) == 3
        assert all(text.endswith("). Further warnings of this kind are suppressed.") for text in said)
        assert all(reason in text for reason, text in zip(("http_503", "http_400", "rejected"), said, strict=True))
        assert any("exporting metrics to" in record.message for record in caplog.records)

    def test_only_the_newest_waits(self, make_metrics, otlp_receiver):
        """While a request hangs, snapshots replace each other: memory and traffic are bounded."""
        otlp_receiver.answer(Answer(hang=True))
        exporter = make_metrics()
        exporter.put(snapshot(lost=1))
        otlp_receiver.wait_for(1)
        for lost in range(2, 50):
            exporter.put(snapshot(lost=lost))
        otlp_receiver.release()
        second = otlp_receiver.wait_for(2)[1]
        assert second.metrics[LOST.name].sum.data_points[0].as_int == 49
        exporter.flush(20)
        assert len(otlp_receiver.requests) == 2

    def test_a_hanging_endpoint_holds_shutdown_no_longer_than_its_deadline(self, make_metrics, otlp_receiver):
        """Neither `flush` nor `shutdown` waits beyond its time, and nothing is taken after it."""
        otlp_receiver.answer(Answer(hang=True))
        exporter = make_metrics()
        exporter.put(snapshot())
        otlp_receiver.wait_for(1)
        started = time.monotonic()
        exporter.flush(0.05)
        exporter.shutdown(0.05)
        assert time.monotonic() - started < 5
        exporter.put(snapshot())
        exporter.flush(20)
        assert len(otlp_receiver.requests) == 1

    def test_without_a_thread_a_flush_sends(self, make_metrics, otlp_receiver, no_threads):
        """Each snapshot once; the shutdown sends the last."""
        exporter = make_metrics()
        send(exporter)
        exporter.flush(20)
        exporter.put(snapshot(lost=7))
        exporter.shutdown(20)
        assert [each.metrics[LOST.name].sum.data_points[0].as_int for each in otlp_receiver.requests][1:] == [7]

    def test_the_thread_ends_with_shutdown(self, make_metrics):
        """Nothing of ours stays behind where the endpoint answers."""
        exporter = make_metrics()
        send(exporter)
        exporter.shutdown(20)
        exporter._thread.join(20)
        assert not exporter._thread.is_alive()
