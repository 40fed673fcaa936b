"""
A snapshot of metrics as OpenTelemetry's protobuf message.

Sums and histograms are cumulative; histograms have explicit bounds. Every value given to it is clean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import InstrumentationScope
from opentelemetry.proto.metrics.v1 import metrics_pb2 as pb
from opentelemetry.proto.resource.v1.resource_pb2 import Resource

from gpuscope._data.metrics import Histogram
from gpuscope._version import __version__
from gpuscope.exporters._encoding.otlp_message import key_values
from gpuscope.exporters._encoding.resource import DISTRIBUTION

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gpuscope._data.metrics import DataPoint, Exemplar, InstrumentSpec, Snapshot
    from gpuscope._data.plain.values import Clean
    from gpuscope.exporters._encoding.otlp_message import Fields

_CUMULATIVE = pb.AGGREGATION_TEMPORALITY_CUMULATIVE


def request_bytes(snapshot: Snapshot, resource: Mapping[str, Clean]) -> bytes:
    """Return the `ExportMetricsServiceRequest` of a snapshot."""
    scope = pb.ScopeMetrics(
        scope=InstrumentationScope(name=DISTRIBUTION, version=__version__),
        metrics=[_metric(spec, points, snapshot) for spec, points in snapshot.points.items() if points],
    )
    of_process = pb.ResourceMetrics(resource=Resource(attributes=key_values(resource)), scope_metrics=[scope])
    return bytes(ExportMetricsServiceRequest(resource_metrics=[of_process]).SerializeToString())


def _metric(spec: InstrumentSpec, points: Sequence[DataPoint], snapshot: Snapshot) -> pb.Metric:
    metric = pb.Metric(name=spec.name, unit=spec.unit, description=spec.description)
    if spec.kind == "histogram":
        metric.histogram.aggregation_temporality = _CUMULATIVE
        metric.histogram.data_points.extend(
            _histogram(point, point.value, snapshot, spec.bounds_s)
            for point in points
            if isinstance(point.value, Histogram)
        )
    elif spec.kind == "sum":
        metric.sum.aggregation_temporality, metric.sum.is_monotonic = _CUMULATIVE, True
        metric.sum.data_points.extend(_number(point, snapshot) for point in points)
    else:
        metric.gauge.data_points.extend(_number(point, snapshot) for point in points)
    return metric


def _common(point: DataPoint, snapshot: Snapshot) -> Fields:
    return {
        "attributes": key_values(point.attributes),
        "start_time_unix_nano": snapshot.start_ns,
        "time_unix_nano": snapshot.time_ns,
    }


def _number(point: DataPoint, snapshot: Snapshot) -> pb.NumberDataPoint:
    value: Fields = {"as_int" if isinstance(point.value, int) else "as_double": point.value}
    return pb.NumberDataPoint(**_common(point, snapshot), **value)


def _histogram(
    point: DataPoint, value: Histogram, snapshot: Snapshot, bounds_s: tuple[float, ...]
) -> pb.HistogramDataPoint:
    return pb.HistogramDataPoint(
        **_common(point, snapshot),
        count=sum(value.counts),
        sum=value.sum_s,
        bucket_counts=value.counts,
        explicit_bounds=bounds_s,
        exemplars=[_exemplar(value.exemplar)] if value.exemplar is not None else [],
    )


def _exemplar(exemplar: Exemplar) -> pb.Exemplar:
    return pb.Exemplar(
        time_unix_nano=exemplar.time_ns,
        as_double=exemplar.seconds,
        trace_id=exemplar.trace_id.to_bytes(16, "big"),
        span_id=exemplar.span_id.to_bytes(8, "big"),
    )
