"""Programs that use another tool beside gpuscope, each in an interpreter of its own."""

from __future__ import annotations

import json

import pytest

WITH_A_PROVIDER = """
import json
from opentelemetry import trace
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

finished = InMemorySpanExporter()


def print_as_json(**others):
    # Each span as its name and those above it, `look up < infer < GET /`, with its status and attributes.
    spans = {span.context.span_id: span for span in finished.get_finished_spans()}
    rows = []
    for span in spans.values():
        line, above = [span.name], span.parent
        while above is not None and above.span_id in spans:
            line.append(spans[above.span_id].name)
            above = spans[above.span_id].parent
        rows.append([" < ".join(line), span.status.status_code.name, dict(span.attributes)])
    print(json.dumps({"spans": rows, **others}, default=str))
"""


@pytest.fixture
def ask(run_python):
    """Return a function that runs a program, which must say nothing on stderr, and returns the JSON that it prints."""

    def run(program, *arguments, **environment):
        done = run_python(program, *arguments, **environment)
        assert (done.returncode, done.stderr) == (0, "")
        return json.loads(done.stdout)

    return run


@pytest.fixture
def ask_for_spans(ask):
    """The same for a program that keeps its spans in `finished` and ends with `print_as_json`."""
    return lambda program, *arguments, **environment: ask(WITH_A_PROVIDER + program, *arguments, **environment)
