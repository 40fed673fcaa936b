"""
The JSON that the Jaeger UI takes under "Upload": a host span and a GPU span per stage, like live spans.

Formats; judges nothing. Jaeger counts in microseconds, so all that is finer is cut off.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from gpuscope._data.attributes import SERVICE_NAME
from gpuscope.analysis._structure.replays import outside_ns
from gpuscope.analysis._viewers.tags import gpu_tags, host_tags

if TYPE_CHECKING:
    from collections.abc import Iterator
    from os import PathLike

    import numpy as np

    from gpuscope.analysis._plain import Plain
    from gpuscope.analysis._viewers.tags import Tags
    from gpuscope.analysis.recording import Recording

_GPU_BIT = 1 << 63
"""The bit in which the id of a GPU span differs from its host span's, as in live spans."""


def write_jaeger(recording: Recording, path: str | PathLike[str]) -> None:
    """
    Write the recording, with one Jaeger trace per trace id.

    Raises:
        OSError: The file cannot be written.

    """
    with Path(path).open("w", encoding="ascii") as file:
        file.write('{"data":[\n')
        file.writelines(",\n" * (number > 0) + json.dumps(trace) for number, trace in enumerate(traces(recording)))
        file.write("\n]}\n")


def traces(recording: Recording) -> Iterator[dict[str, Plain]]:
    """Yield the traces in the order of their first stages."""
    rows: dict[str, list[int]] = {}
    for row, trace_id in enumerate(recording.trace_id):
        rows.setdefault(trace_id, []).append(row)
    outside = outside_ns(recording)
    processes = {f"p{number}": _process(recording, number) for number in range(len(recording.processes))}
    for trace_id, of_trace in rows.items():
        spans = [span for row in of_trace for span in _spans(recording, row, outside)]
        used = {str(span["processID"]) for span in spans}
        yield {"traceID": trace_id, "spans": spans, "processes": {key: processes[key] for key in sorted(used)}}


def _process(recording: Recording, number: int) -> dict[str, Plain]:
    resource = recording.processes[number].resource
    tags = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in resource.items()}
    service = str(tags.pop(SERVICE_NAME, "unknown_service"))
    return {"serviceName": service, "tags": _tags(tags)}


def _spans(recording: Recording, row: int, outside: dict[int, int]) -> Iterator[dict[str, Plain]]:
    """Yield the host span of a stage and its GPU span, if it has GPU times. Inside a graph there is no host span."""
    name, span_id, parent = recording.names[recording.stage[row]], recording.span_id[row], int(recording.parent[row])
    outer = recording.span_id[parent] if parent >= 0 else None
    shared = {"processID": f"p{recording.threads[recording.thread[row]].process}", "logs": []}
    if not recording.in_graph[row]:
        yield {
            **_identified(recording.trace_id[row], span_id, outer),
            **_timed(recording.host_start_ns[row], recording.host_end_ns[row]),
            **shared,
            "operationName": name,
            "tags": _tags({**host_tags(recording, row), **({"error": True} if recording.error[row] else {})}),
        }
        span_id, outer = f"{int(span_id, 16) ^ _GPU_BIT:016x}", span_id
    if recording.stream[row] >= 0:
        yield {
            **_identified(recording.trace_id[row], span_id, outer),
            **_timed(recording.gpu_start_ns[row], recording.gpu_end_ns[row]),
            **shared,
            "operationName": f"{name} [gpu]",
            "tags": _tags(gpu_tags(recording, row, outside)),
        }


def _identified(trace_id: str, span_id: str, parent: str | None) -> dict[str, Plain]:
    references = [{"refType": "CHILD_OF", "traceID": trace_id, "spanID": parent}] if parent else []
    return {"traceID": trace_id, "spanID": span_id, "references": references}


def _timed(start_ns: np.int64, end_ns: np.int64) -> dict[str, int]:
    start_us, end_us = int(start_ns) // 1000, int(end_ns) // 1000
    return {"startTime": start_us, "duration": end_us - start_us}


def _tags(values: Tags) -> list[dict[str, Plain]]:
    return [{"key": key, "type": _TYPES[type(value)], "value": value} for key, value in values.items()]


_TYPES = {bool: "bool", int: "int64", float: "float64", str: "string"}
