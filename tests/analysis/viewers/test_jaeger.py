"""The file for Jaeger's upload."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from gpuscope._settings.config import Config
from gpuscope.analysis.jaeger import traces, write_jaeger
from gpuscope.analysis.read import read
from gpuscope.exporters.file import FileExporter

from ...exporters.batches import Delivery, Row, make_batch
from ..recordings import EPOCH_NS, Stage, recording, repeat

REQUEST = Stage(
    "request",
    0,
    900,
    inside=[
        Stage("infer", 10.5, 300.25, gpu=(15, 880), attributes={"batch": 8, "ratio": 0.5, "ok": True, "shape": [1, 2]}),
        Stage("back", 300, 890, error=True),
    ],
)


def by_name(trace):
    """The spans of a trace in which no name occurs twice."""
    return {span["operationName"]: span for span in trace["spans"]}


def tags(span):
    """The tags of a span, by key: (type, value)."""
    return {tag["key"]: (tag["type"], tag["value"]) for tag in span["tags"]}


def test_one_trace_per_request():
    """Each trace id is one trace with a host span per stage and a GPU span for each that has GPU times."""
    found = list(traces(recording(*repeat(REQUEST, 3, 5000))))
    assert [trace["traceID"] for trace in found] == [f"{1 + 3 * n:032x}" for n in range(3)]
    assert all({*by_name(trace)} == {"request", "infer", "infer [gpu]", "back"} for trace in found)


def test_references_lead_to_the_stage_around_and_to_the_host_span():
    """A stage's span is a child of the one around it, and its GPU span is a child of its own host span."""
    (trace,) = traces(recording(REQUEST))
    spans = by_name(trace)
    assert spans["request"]["references"] == []
    for inner, outer in (("infer", "request"), ("back", "request"), ("infer [gpu]", "infer")):
        (reference,) = spans[inner]["references"]
        assert reference == {"refType": "CHILD_OF", "traceID": trace["traceID"], "spanID": spans[outer]["spanID"]}
    assert set(Counter(span["spanID"] for span in trace["spans"]).values()) == {1}


def test_times_are_whole_microseconds_that_stay_inside_each_other():
    """Times are microseconds since the epoch, cut off so that what was inside stays inside."""
    (trace,) = traces(recording(REQUEST))
    spans = by_name(trace)
    assert (spans["request"]["startTime"], spans["request"]["duration"]) == (EPOCH_NS // 1000, 900)
    assert (spans["infer"]["startTime"], spans["infer"]["duration"]) == (EPOCH_NS // 1000 + 10, 290)
    assert spans["infer [gpu]"]["startTime"] == EPOCH_NS // 1000 + 15


def test_tags_have_types():
    """Attributes become tags of Jaeger's types; an exception is Jaeger's own tag; GPU spans have what was measured."""
    (trace,) = traces(recording(REQUEST))
    spans = by_name(trace)
    own = {"batch": ("int64", 8), "ratio": ("float64", 0.5), "ok": ("bool", True), "shape": ("string", "[1, 2]")}
    assert tags(spans["infer"]).items() >= own.items()
    assert tags(spans["back"])["error"] == ("bool", True)
    assert "error" not in tags(spans["infer"])
    assert tags(spans["infer [gpu]"])["gpuscope.clock.uncertainty"] == ("float64", pytest.approx(3e-6))


def test_processes():
    """A trace names the processes that its spans are of, with their resource, and no others."""
    found = list(traces(recording(REQUEST, Stage("other", 5000, 5001, process="proxy"))))
    assert [[process["serviceName"] for process in trace["processes"].values()] for trace in found] == [
        ["server"],
        ["proxy"],
    ]
    assert all(span["processID"] in trace["processes"] for trace in found for span in trace["spans"])


def test_the_file_is_json(tmp_path):
    """The file is one JSON object, also for an empty recording."""
    for stages in ([], [REQUEST, REQUEST.shifted(5000)]):
        whole = recording(*stages)
        write_jaeger(whole, tmp_path / "jaeger.json")
        assert json.loads((tmp_path / "jaeger.json").read_text())["data"] == list(traces(whole))


def test_gpu_spans_have_the_ids_of_live_ones(tmp_path):
    """A GPU span has the id that the exporters give it, so that links to it stay right."""
    host_id = 0x1234_5678_9ABC_DEF0
    exporter = FileExporter(Config().changed(file=str(tmp_path / "trace.jsonl")), {})
    exporter.export(make_batch(Row(span_id=host_id, gpu_span_id=host_id ^ 1 << 63)), Delivery(1))
    exporter.shutdown(1)
    (trace,) = traces(read([tmp_path / "trace.jsonl"]))
    assert [span["spanID"] for span in trace["spans"]] == [f"{host_id:016x}", f"{host_id ^ 1 << 63:016x}"]
