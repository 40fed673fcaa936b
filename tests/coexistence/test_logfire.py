"""Logfire, which sets providers of its own that wrap OpenTelemetry's."""

from __future__ import annotations

import pytest

pytest.importorskip("logfire")

PROGRAM = """
import logfire
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
import gpuscope

reader = InMemoryMetricReader()
logfire.configure(
    send_to_logfire=False,
    console=False,
    inspect_arguments=False,
    additional_span_processors=[SimpleSpanProcessor(finished)],
    metrics=logfire.MetricsOptions(additional_readers=[reader]),
)
with logfire.span("request {number}", number=1):
    with gpuscope.stage("infer", attributes={"batch_size": 8}):
        logfire.info("found {name}", name="cat")
        with logfire.span("look up"):
            pass
    try:
        with gpuscope.stage("fails"):
            raise ValueError("bad")
    except ValueError:
        logfire.exception("no luck")
assert gpuscope.flush(10)
data = reader.get_metrics_data()
scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics]
names = [metric.name for scope in scopes for metric in scope.metrics if scope.scope.name == "gpuscope"]
print_as_json(metrics=names)
"""


def test_stages_lie_between_logfires_spans(ask_for_spans):
    """
    Logfire's spans, logs and exceptions inside a stage are its children; the stage is Logfire's span's child.

    Logfire shows its own messages and a stage by its name; a stage has its attributes and its error. Logfire's
    MeterProvider, which can't be hashed, takes our instruments.
    """
    watched = ask_for_spans(PROGRAM, GPUSCOPE="1", GPUSCOPE_WARMUP="0")
    assert sorted(path for path, _, _ in watched["spans"]) == [
        "fails < request {number}",
        "found {name} < infer < request {number}",
        "infer < request {number}",
        "look up < infer < request {number}",
        "no luck < request {number}",
        "request {number}",
    ]
    spans = {path.partition(" < ")[0]: (status, attributes) for path, status, attributes in watched["spans"]}
    assert spans["found {name}"][1]["logfire.msg"] == "found cat"
    assert spans["request {number}"][1]["logfire.msg"] == "request 1"
    status, infer = spans["infer"]
    assert (status, infer["logfire.msg"], infer["batch_size"], infer["gpuscope.stage"]) == (
        "UNSET",
        "infer",
        8,
        "infer",
    )
    status, fails = spans["fails"]
    assert (status, fails["error.type"]) == ("ERROR", "ValueError")
    assert "gpuscope.stages.recorded" in watched["metrics"]
