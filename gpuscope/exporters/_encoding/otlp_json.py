"""
Batches into OTLP's JSON: one `ExportTraceServiceRequest` per batch, on one line; and the account of stages likewise.

Ids are hexadecimal, 64-bit integers are text and enumerations are numbers, as OTLP's JSON mapping says. Knows nothing
of files.
"""

from __future__ import annotations

import base64
import json
import math
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from gpuscope._data.attributes import GPU_SAMPLES
from gpuscope.exporters._encoding.details import links_of
from gpuscope.exporters._encoding.otlp_message import PARENT_KNOWN, PARENT_REMOTE
from gpuscope.exporters._encoding.resource import DISTRIBUTION
from gpuscope.exporters._encoding.rows import rows_of
from gpuscope.exporters._encoding.spans import resolve, spans_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from gpuscope._data.batch import StageBatch
    from gpuscope._data.metrics import DataPoint, InstrumentSpec, Snapshot
    from gpuscope._data.plain.values import Clean
    from gpuscope.exporters._encoding.details import CleanDetails
    from gpuscope.exporters._encoding.rows import SpanRow
    from gpuscope.exporters._encoding.spans import Group, SpanTemplate

    Json: TypeAlias = dict[str, object]

_INTERNAL = 1
"""`SPAN_KIND_INTERNAL`."""
_NUMBERS = '"doubleValue":%r', '"intValue":"%d"'
_CUMULATIVE = 2
"""`AGGREGATION_TEMPORALITY_CUMULATIVE`."""


class _Shared(NamedTuple):
    """The text that the spans of one group share: a `SpanTemplate` in JSON."""

    head: str
    """From the name to the middle of the list of attributes."""
    doubles: str
    """The measured attributes, to be filled in. One of them is a whole number."""


class JsonEncoder:
    """Encodes batches, and remembers what it encoded of their groups. For one thread only."""

    def __init__(self, resource: Mapping[str, Clean], version: str) -> None:
        scope = json.dumps({"name": DISTRIBUTION, "version": version})
        self._before, self._before_metrics = (
            f'{{"resource{what}":[{{"resource":{{"attributes":[{_attributes(resource)}]}},'
            f'"scope{what}":[{{"scope":{scope},"{what.lower()}":['
            for what in ("Spans", "Metrics")
        )
        self._groups: dict[Group, tuple[_Shared | None, _Shared | None]] = {}

    def encode(self, batch: StageBatch) -> str:
        """Return the batch's request, without an end of line."""
        spans = spans_of(batch)
        shared = resolve(spans, self._groups, lambda host, gpu: (_shared(host), _shared(gpu)))
        texts = [text for pair in rows_of(spans, shared) for text in _texts(*pair)]
        return f"{self._before}{','.join(texts)}]}}]}}]}}"

    def encode_metrics(self, snapshot: Snapshot) -> str:
        """Return a snapshot of sums and gauges as a request of its own, without an end of line."""
        texts = [_metric(spec, points, snapshot) for spec, points in snapshot.points.items() if points]
        return f"{self._before_metrics}{','.join(texts)}]}}]}}]}}"


def _shared(template: SpanTemplate | None) -> _Shared | None:
    if template is None:
        return None
    flags = PARENT_KNOWN | PARENT_REMOTE * template.remote
    head = f'"flags":{flags},"kind":{_INTERNAL},"name":{json.dumps(template.name)},"attributes":['
    doubles = ",".join(f'{{"key":"{name}","value":{{{_NUMBERS[name == GPU_SAMPLES]}}}}}' for name in template.measured)
    return _Shared(f"{head}{_attributes(template.attributes)},", doubles)


def _texts(host: SpanRow[_Shared] | None, gpu: SpanRow[_Shared] | None) -> Iterator[str]:
    """Yield a stage's spans. Both are in the trace whose state the host span's details have."""
    state = host.details.trace_state if host is not None and host.details is not None else ""
    for row in (host, gpu):
        if row is not None:
            yield _span(row, f'"traceState":{json.dumps(state)},' if state else "")


def _span(row: SpanRow[_Shared], state: str) -> str:
    parent = f'"parentSpanId":"{row.parent_id:016x}",' if row.parent_id else ""
    more, rest = _details(row.details) if row.details is not None else ("", "")
    return (
        f'{{"traceId":"{row.trace_id:032x}","spanId":"{row.span_id:016x}",{state}{parent}'
        f'"startTimeUnixNano":"{row.start_ns}","endTimeUnixNano":"{row.end_ns}",'
        f"{row.shared.head}{row.shared.doubles % row.measured}{more}]{rest}}}"
    )


def _details(details: CleanDetails) -> tuple[str, str]:
    """Return further attributes, and the fields after the attributes; each begins with its comma."""
    more = f",{_attributes(details.attributes)}" if details.attributes else ""
    rest = ""
    if details.events:
        events = (
            f'{{"timeUnixNano":"{at}","name":{json.dumps(name)},"attributes":[{_attributes(attributes)}]}}'
            for name, at, attributes in details.events
        )
        rest += f',"events":[{",".join(events)}]'
    # Of attributes none is dropped: files have no limits.
    if details.dropped.events:
        rest += f',"droppedEventsCount":{details.dropped.events}'
    if details.dropped.links:
        rest += f',"droppedLinksCount":{details.dropped.links}'
    if found := links_of(details):
        links = (
            f'{{"traceId":"{trace_id:032x}","spanId":"{span_id:016x}","flags":{PARENT_KNOWN},'
            f'"attributes":[{_attributes(attributes)}]}}'
            for trace_id, span_id, attributes in found
        )
        rest += f',"links":[{",".join(links)}]'
    code, description = details.status
    if code:
        rest += f',"status":{json.dumps({"code": code, "message": description})}'
    return more, rest


def _metric(spec: InstrumentSpec, points: Sequence[DataPoint], snapshot: Snapshot) -> str:
    times = f'"startTimeUnixNano":"{snapshot.start_ns}","timeUnixNano":"{snapshot.time_ns}"'
    data: dict[type, str] = {int: '"asInt":"%s"', float: '"asDouble":%r'}
    numbers = ",".join(
        f'{{"attributes":[{_attributes(point.attributes)}],{times},{data[type(point.value)] % point.value}}}'
        for point in points
    )
    how = f'"aggregationTemporality":{_CUMULATIVE},"isMonotonic":true,' if spec.kind == "sum" else ""
    return f'{{"name":"{spec.name}","unit":"{spec.unit}","{spec.kind}":{{{how}"dataPoints":[{numbers}]}}}}'


def _attributes(attributes: Mapping[str, Clean]) -> str:
    return ",".join(
        f'{{"key":{json.dumps(key)},"value":{json.dumps(_any(value))}}}' for key, value in attributes.items()
    )


def _any(value: Clean) -> Json:
    """Return an `AnyValue` of a clean value."""
    return {} if value is None else _ANY[type(value)](value)


def _double(value: float) -> Json:
    return {"doubleValue": value if math.isfinite(value) else _NOT_FINITE[str(value)]}


def _list(value: list[Clean]) -> Json:
    return {"arrayValue": {"values": [_any(item) for item in value]}}


def _dict(value: dict[str, Clean]) -> Json:
    return {"kvlistValue": {"values": [{"key": key, "value": _any(item)} for key, item in value.items()]}}


_NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
_ANY: dict[type, Callable[..., Json]] = {
    bool: lambda value: {"boolValue": value},
    int: lambda value: {"intValue": str(value)},
    float: _double,
    str: lambda value: {"stringValue": value},
    bytes: lambda value: {"bytesValue": base64.b64encode(value).decode()},
    list: _list,
    dict: _dict,
}
"""Each takes a value of its type."""
