"""Datadog's tracer: by its own interface, and as the provider behind OpenTelemetry's."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("ddtrace")

PROGRAM = """
import json, sys
from ddtrace.trace import TraceFilter, tracer
from opentelemetry import trace

kept = []


class Keep(TraceFilter):
    def process_trace(self, trace):
        kept.extend(trace)  # And nothing is sent.


tracer.configure(trace_processors=[Keep()])
span = tracer.trace
if sys.argv[1] == "opentelemetry":
    from ddtrace.opentelemetry import TracerProvider

    trace.set_tracer_provider(TracerProvider())
    span = trace.get_tracer("app").start_as_current_span

import gpuscope

with span("request"):
    with span("before"):
        pass
    with gpuscope.stage("infer"), gpuscope.stage("attention"), span("look up"):
        pass
    with gpuscope.stage("quiet"):
        pass
    with span("after"):
        pass
with span("next request"):
    pass
assert gpuscope.flush(10)
names = {item.span_id: item.resource for item in kept}
print(json.dumps([[item.resource, names.get(item.parent_id), str(item.trace_id)] for item in kept]))
"""
THEIRS = {"request": None, "before": "request", "look up": "request", "after": "request", "next request": None}
SETTINGS = {"DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false", "DD_REMOTE_CONFIGURATION_ENABLED": "false"}


def parents(rows):
    """The parent of each span, by name; whole traces share an id."""
    traces = {name: trace for name, _, trace in rows}
    assert all(parent is None or traces[name] == traces[parent] for name, parent, _ in rows)
    return {name: parent for name, parent, _ in rows}


def test_its_own_interface(ask, tmp_path):
    """Datadog's spans are as they would be without stages, and stages, which go elsewhere, nest in each other."""
    where = {"GPUSCOPE": "1", "GPUSCOPE_EXPORTER": "file", "GPUSCOPE_FILE": str(tmp_path / "spans.jsonl")}
    assert parents(ask(PROGRAM, "native", **SETTINGS, **where)) == THEIRS
    lines = [json.loads(line) for line in (tmp_path / "spans.jsonl").read_text().splitlines()]
    resources = [resource for line in lines for resource in line.get("resourceSpans", ())]
    ours = {s["name"]: s for resource in resources for scope in resource["scopeSpans"] for s in scope["spans"]}
    assert set(ours) == {"infer", "attention", "quiet"}
    assert ours["attention"]["parentSpanId"] == ours["infer"]["spanId"]


@pytest.mark.parametrize("recording", ["0", "1"])
def test_behind_opentelemetry(ask, recording):
    """
    Stages are children of Datadog's spans, and Datadog's spans are as they would be without.

    They are not children of stages: Datadog's contexts are made anew each time that one is asked for, so that a stage
    in one could not be taken out again, and what comes after it would lose its parent.
    """
    ours = {"infer": "request", "attention": "infer", "quiet": "request"} if recording == "1" else {}
    rows = ask(PROGRAM, "opentelemetry", DD_TRACE_OTEL_ENABLED="true", GPUSCOPE=recording, **SETTINGS)
    assert parents(rows) == THEIRS | ours
