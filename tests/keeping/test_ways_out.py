"""Kept traces by each way that spans go, and what forks, a late provider and a file make of it."""

from __future__ import annotations

import contextlib
import json

import pytest
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import gpuscope
from gpuscope import _runtime, stage
from gpuscope._recording.state import state
from gpuscope._settings.config import Config
from gpuscope.analysis.read import read
from gpuscope.analysis.verdict import judge
from gpuscope.testing import FakeDevice, ManualClock

from ..exporters.receiver import Receiver

KEEP = "slower=250ms"
KEPT = ["infer", "infer [gpu]", "request", "request [gpu]"]


class Watching(SpanProcessor):
    """Looks at spans as they begin, so that they have to begin."""

    def __init__(self):
        """Begin with none."""
        self.begun = 0

    def on_start(self, span, parent_context=None):
        """Count it."""
        self.begun += 1


@pytest.fixture
def clock():
    """A clock that is moved."""
    return ManualClock()


@pytest.fixture
def record(monkeypatch, clock):
    """Return a function that begins to record on a fake GPU, with a provider of the application's or without."""
    before = (state.engine, state.recorder, state.may_toggle)
    engines = []

    def begin(provider=None, **settings):
        if provider is not None:
            monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
        given = {"interval_s": 0.01, "schedule_delay_s": 0.01, "metrics": "none", "warmup": 0, "keep": KEEP, **settings}
        device = FakeDevice(clock, completes=True)
        engines.append(_runtime.start(Config().changed(mode="on", **given), device=device, clock=clock))
        return engines[-1]

    yield begin
    for engine in engines:
        engine.shutdown(5)
    state.engine, state.recorder, state.may_toggle = before


@pytest.fixture
def receiver():
    """A receiver of OTLP."""
    with contextlib.closing(Receiver()) as made:
        yield made


def serve(clock):
    """Run three requests, of which the second is slow; it is collected in two parts."""
    for took_s in (0.01, 0.4, 0.02):
        with stage("request"):
            with stage("infer"):
                clock.advance(took_s)
            assert state.engine.flush(10)
    assert state.engine.flush(10)


def received(receiver):
    """Return the names of the spans that were received."""
    resources = [resource for request in receiver.requests for resource in request.message.resource_spans]
    return sorted(span.name for resource in resources for scope in resource.scope_spans for span in scope.spans)


def is_accounted(way):
    """Tell whether this way was taken, and all stages of two requests were left out."""
    account = state.engine.statistics()
    return (account.exporters, account.exported, account.dropped) == ((way,), 2, {"not_kept": 4}) and not account.lost


def test_otlp(record, receiver, clock):
    """Columns to an endpoint of ours."""
    record(exporters="otlp", otlp_base_endpoint=receiver.endpoint)
    serve(clock)
    assert received(receiver) == KEPT
    assert is_accounted("otlp")


def test_application(record, receiver, clock):
    """Columns through the application's own exporter."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(receiver.endpoint + "/v1/traces")))
    record(provider)
    serve(clock)
    provider.force_flush()
    assert received(receiver) == KEPT
    assert is_accounted("application")
    provider.shutdown()


@pytest.mark.parametrize("way", ["processors", "sdk"])
def test_spans_of_the_application(record, clock, way):
    """One by one, also where they have to begin before it is known whether they are kept: those have no end."""
    provider, finished, watching = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter(), Watching()
    provider.add_span_processor(SimpleSpanProcessor(finished))
    if way == "sdk":
        provider.add_span_processor(watching)
    record(provider)
    serve(clock)
    assert sorted(span.name for span in finished.get_finished_spans()) == KEPT
    (trace_id,) = {span.context.trace_id for span in finished.get_finished_spans()}
    assert trace_id
    assert is_accounted(way)
    assert watching.begun == (8 if way == "sdk" else 0)


def test_a_file(record, tmp_path, clock):
    """Its account says what was left out: once, first, and not as missing."""
    path = tmp_path / "spans.jsonl"
    engine = record(exporters="file", file=str(path))
    serve(clock)
    engine.shutdown(5)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    names = [
        span["name"]
        for line in lines
        for resource in line.get("resourceSpans", ())
        for scope in resource["scopeSpans"]
        for span in scope["spans"]
    ]
    assert sorted(names) == KEPT
    recorded = read([path])
    said = str(judge(recorded)).splitlines()
    assert said[0].startswith("These are the requests that `keep` has kept")
    assert "of 4 stages, are not here." in said[0]
    assert not any("not_kept" in line for line in said)
    assert recorded.losses.missing().dropped == {}


def test_a_provider_that_comes_late_gets_none_of_what_waited(record, receiver, clock, monkeypatch):
    """What was undecided goes the way that was the way then; the rest of its trace goes the new way."""
    finished, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(finished))
    provider.add_span_processor(Watching())
    engine = record(exporters="auto", otlp_base_endpoint=receiver.endpoint)
    with stage("request"):
        with stage("infer"):
            clock.advance(0.01)
        assert engine.flush(10)
        assert not receiver.requests
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
        with stage("later"):
            pass
        assert engine.flush(10)
    assert engine.flush(10)
    assert received(receiver) == ["infer", "infer [gpu]"]
    assert engine.statistics().kept == {"cut_off": 1}
    assert not engine.statistics().lost
    assert engine.statistics().pending == 0


def test_the_applications_own_spans_are_not_left_out(record, clock):
    """They are in the hands of its provider; a request below them is decided on its own."""
    provider, finished = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(finished))
    record(provider)
    with trace.get_tracer("app").start_as_current_span("handler"):
        for took_s in (0.01, 0.4):
            with stage("request"):
                with trace.get_tracer("app").start_as_current_span("query"), stage("infer"):
                    clock.advance(took_s)
                assert state.engine.flush(10)
    assert state.engine.flush(10)
    names = sorted(span.name for span in finished.get_finished_spans())
    assert names == ["handler", *KEPT[:2], "query", "query", *KEPT[2:]]


FORK = """
import os, sys, threading, gpuscope
gpuscope.enable()
with gpuscope.stage("request"):
    with gpuscope.stage("before"): pass
    gpuscope.flush()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    with gpuscope.stage("after " + ("parent" if child else "child")): threading.Event().wait(0.05)
gpuscope.shutdown()
found = gpuscope.statistics()
print(found.recorded, found.exported, found.pending, found.lost, found.dropped, found.kept, flush=True)
if not child: os._exit(0)
"""


def test_fork(run_python, tmp_path):
    """The child begins with nothing that waits; what its parent holds stays there and is whole."""
    result = run_python(
        FORK,
        GPUSCOPE="idle",
        GPUSCOPE_KEEP="slower=20ms",
        GPUSCOPE_EXPORTER="file",
        GPUSCOPE_FILE=str(tmp_path / "{pid}.jsonl"),
    )
    assert not result.stderr, result.stderr
    child, parent = result.stdout.splitlines()
    assert parent == "3 3 0 {} {} {'slower': 1}"
    assert child.startswith("1 1 0 {} {} ")
    assert sorted("before" in file.read_text() for file in tmp_path.glob("*.jsonl*")) == [False, True]


def test_a_switch_is_said_at_the_end(run_python, tmp_path):
    """Where stages found no room, the log names the setting; what was left out is no warning."""
    program = (
        "import gpuscope, sys\ngpuscope.enable()\n"
        "with gpuscope.stage('request'):\n"
        "    for _ in range(1500):\n        with gpuscope.stage('s'): pass\n    gpuscope.flush()\n"
        "with gpuscope.stage('another'): pass\n"
    )
    file = str(tmp_path / "spans.jsonl")
    result = run_python(
        program, GPUSCOPE="idle", GPUSCOPE_KEEP="slower=1h, rows=1024", GPUSCOPE_EXPORTER="file", GPUSCOPE_FILE=file
    )
    why = "too many waited for the end of their requests, which `keep` needs; raise its `rows` if requests end"
    assert f"1,501 keep_full ({why})" in result.stderr
    assert "The stage 'request' ran on while stages inside it took half" in result.stderr
    assert "not_kept" not in result.stderr


def test_kept_by_the_keyword(clock):
    """The setting has a keyword beside its variable."""
    device = FakeDevice(clock, completes=True)
    with gpuscope.testing.capture(keep="error", device=device, clock=clock) as spans, stage("request"):
        pass
    assert spans == []
