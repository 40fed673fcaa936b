"""`gpuscope send`: what was recorded into a file arrives as if it had been sent live."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gpuscope

from .exporters.receiver import Receiver, rejects

grpc = pytest.importorskip("grpc")

from .exporters.receiver_of_grpc import GrpcReceiver  # noqa: E402

HERE = Path(gpuscope.__file__).parents[1]
PROGRAM = """
import os, sys
from gpuscope import _runtime, flush, stage, statistics
from gpuscope._settings.config import read_environment
from gpuscope.testing import FakeDevice, ManualClock
from opentelemetry import context, trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState

if "provider" in sys.argv:
    from opentelemetry.sdk.trace import TracerProvider

    trace.set_tracer_provider(TracerProvider())
clock = ManualClock()
config = read_environment()[0].changed(mode="on", warmup=1, metrics="none")
with _runtime.period(config, device=FakeDevice(clock, completes=True), clock=clock):

    @stage("infer", attributes={"model": "vit", "gpus": 1, "scale": 0.5, "eager": True, "shape": [3, 224]})
    def infer():
        clock.advance(0.01)
        with stage("nothing"):
            pass

    above = NonRecordingSpan(SpanContext(5, 6, True, TraceFlags(1), TraceState([("vendor", "a")])))
    for number in range(int(sys.argv[1])):
        token = context.attach(trace.set_span_in_context(above)) if number % 2 else None
        with stage("request", attributes={"tenant": "a \\u00e9"}) as request:
            span = trace.get_current_span()
            span.add_event("cache", {"hit": True})
            span.add_link(SpanContext(8, 9, False), {"why": "a batch"})
            request.set_attribute("number", number)
            infer()
            try:
                with stage("postprocess"):
                    raise ValueError("no such image")
            except ValueError:
                pass
        if token:
            context.detach(token)
    assert flush(20)
"""


def environment(**variables):
    """The environment without anybody's settings of gpuscope or OpenTelemetry."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("GPUSCOPE", "OTEL_"))}
    return ours | {"PYTHONPATH": str(HERE), "PYTHONUTF8": "1"} | variables


@pytest.fixture
def run(tmp_path):
    """Return a function that runs Python in an empty folder."""

    def start(*arguments, code=0, **variables):
        done = subprocess.run(
            [sys.executable, *arguments],
            env=environment(**variables),
            cwd=tmp_path,
            capture_output=True,
            encoding="utf-8",
            timeout=100,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return start


@pytest.fixture
def record(run):
    """Return a function that runs the program with some exporters; it writes `spans.jsonl`."""

    def start(*arguments, exporters="file", file="spans.jsonl", **variables):
        run("-c", PROGRAM, "3", *arguments, GPUSCOPE_EXPORTER=exporters, GPUSCOPE_FILE=file, **variables)

    return start


@pytest.fixture
def send(run):
    """Return a function that runs `gpuscope send`."""
    return lambda *arguments, **more: run("-m", "gpuscope", "send", *arguments, **more)


@pytest.fixture
def receivers():
    """Two receivers: one for what is sent live, one for what is sent afterwards."""
    both = Receiver(), Receiver()
    yield both
    for each in both:
        each.close()


@pytest.fixture
def grpc_receiver():
    """A receiver of OTLP over gRPC."""
    receiver = GrpcReceiver()
    yield receiver
    receiver.close()


def spans_of(resource_spans):
    """Resource, scope and span of each span, by its id, as text in which attributes have an order."""
    found = {}
    for group in resource_spans:
        for scope in group.scope_spans:
            for span in scope.spans:
                for holder in (group.resource, span):
                    ordered = sorted(holder.attributes, key=str)
                    del holder.attributes[:]
                    holder.attributes.extend(ordered)
                found[span.span_id] = str(group.resource) + str(scope.scope) + group.schema_url + str(span)
    return found


@pytest.mark.parametrize("every", ["work", "all"])
@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_what_arrives_is_what_was_sent_live(record, send, receivers, every, compression):
    """The same run by both exporters: every field of every span is the same, GPU spans included."""
    live, afterwards = receivers
    settings = {"GPUSCOPE_GPU_SPANS": every, "OTEL_SERVICE_NAME": "demo"}
    record(exporters="file,otlp", OTEL_EXPORTER_OTLP_ENDPOINT=live.endpoint, **settings)
    said = send(
        "spans.jsonl", "--endpoint", afterwards.endpoint, OTEL_EXPORTER_OTLP_COMPRESSION=compression, **settings
    )
    sent, resent = spans_of(live.resource_spans), spans_of(afterwards.resource_spans)
    assert sent == resent
    names = sorted(span.name for span in live.spans)
    assert names.count("infer [gpu]") == 3
    assert names.count("nothing [gpu]") == (3 if every == "all" else 0)
    assert said == (
        f"Sent {len(sent)} spans of 12 stages (spans.jsonl, 1 process) to {afterwards.endpoint}/v1/traces.\n"
    )


def test_events_and_links_of_the_application(record, send, receivers):
    """What the application told the spans of its own OpenTelemetry is in the file, and arrives; trace state as well."""
    live, afterwards = receivers
    record("provider", exporters="file,otlp", OTEL_EXPORTER_OTLP_ENDPOINT=live.endpoint)
    send("spans.jsonl", "--endpoint", afterwards.endpoint)
    for receiver in receivers:
        requests = [span for span in receiver.spans if span.name == "request"]
        assert [[event.name for event in span.events] for span in requests] == [["cache"]] * 3
        assert [[link.trace_id[-1] for link in span.links] for span in requests] == [[8]] * 3
        assert sorted(span.trace_state for span in requests) == ["", "", "vendor=a"]
    groups = [receiver.resource_spans for receiver in receivers]
    for group in [*groups[0], *groups[1]]:
        group.ClearField("resource")  # Beside a provider `otlp` has that provider's.
    assert spans_of(groups[0]) == spans_of(groups[1])


def test_over_grpc(record, send, receivers, grpc_receiver):
    """The protocol of the option comes before that of the variables."""
    live, _ = receivers
    record(exporters="file,otlp", OTEL_EXPORTER_OTLP_ENDPOINT=live.endpoint)
    arguments = "--endpoint", grpc_receiver.endpoint, "--protocol", "grpc", "--header", "X-Key=a=b"
    send("spans.jsonl", *arguments, OTEL_EXPORTER_OTLP_HEADERS="other=c", OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf")
    groups = [group for request in grpc_receiver.requests for group in request.resource_spans]
    assert spans_of(live.resource_spans) == spans_of(groups)
    assert {"x-key": "a=b", "other": "c"}.items() <= grpc_receiver.metadata[0].items()


def test_the_endpoint_of_the_variables(record, send, receivers):
    """Without the option the variables say where, as they do for a program; with it the path is added once."""
    record()
    url = receivers[0].endpoint
    send("spans.jsonl", OTEL_EXPORTER_OTLP_ENDPOINT=url)
    send("spans.jsonl", OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=f"{url}/own")
    send("spans.jsonl", "--endpoint", f"{url}/v1/traces", OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=f"{url}/own")
    send("spans.jsonl", "--endpoint", f"{url}/otlp/", OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=f"{url}/own")
    paths = [request.path for request in receivers[0].requests]
    assert paths == ["/v1/traces", "/own", "/v1/traces", "/otlp/v1/traces"]


def test_several_runs_compressed_rotated_and_twice(record, send, receivers, tmp_path):
    """A file of several runs, its rotated one, one by gzip and a copy: each span arrives once, with its own process."""
    for _ in range(2):
        record()
    (tmp_path / "spans.jsonl").rename(tmp_path / "spans.jsonl.1")
    record()
    (tmp_path / "old.jsonl.gz").write_bytes(gzip.compress((tmp_path / "spans.jsonl").read_bytes()))
    record(file="other.jsonl")
    (tmp_path / "other.jsonl").write_bytes(gzip.compress((tmp_path / "other.jsonl").read_bytes()))
    said = send("spans.jsonl", "old.jsonl.gz", "other.jsonl", "--endpoint", receivers[0].endpoint)
    assert "of 48 stages (4 files, 4 processes)" in said
    spans = receivers[0].spans
    assert len({span.span_id for span in spans}) == len(spans)


def test_standard_input(record, run, receivers, tmp_path):
    """`-` is what another program gives."""
    record()
    with (tmp_path / "spans.jsonl").open("rb") as file:
        done = subprocess.run(
            [sys.executable, "-m", "gpuscope", "send", "-", "--endpoint", receivers[0].endpoint],
            stdin=file,
            env=environment(),
            capture_output=True,
            encoding="utf-8",
            timeout=100,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert len(receivers[0].spans) == 18


def test_a_refusal_is_said_and_is_a_failure(record, send, receivers):
    """What was sent, to where, what was not, and why: one sentence, then the command that looks there."""
    record()
    receivers[0].answer(rejects(2))
    url = receivers[0].endpoint
    said = send("spans.jsonl", "--endpoint", url, code=1)
    assert said == (
        f"Sent 10 of 12 stages (spans.jsonl, 1 process) to {url}/v1/traces; not taken: rejected: 2 "
        f"(2 spans rejected: no room).\n`gpuscope doctor --endpoint {url}` says what is there, and what to set.\n"
    )


def test_nobody_there(record, send, receivers):
    """A closed port is said at once; no credential of the URL is."""
    record()
    receivers[0].refuse()
    said = send("spans.jsonl", "--endpoint", f"http://me:hush@127.0.0.1:{receivers[0].port}", code=1)
    assert "Sent 0 of 12 stages" in said
    assert "not taken: unreachable: 12 (ConnectionRefusedError: Connection refused)" in said
    assert "hush" not in said


def test_a_file_that_is_cut_short(record, send, receivers, tmp_path):
    """Whole lines are sent; that something is missing is said, and is a failure."""
    record()
    whole = (tmp_path / "spans.jsonl").read_bytes()
    (tmp_path / "spans.jsonl").write_bytes(whole + whole[:1000])
    said = send("spans.jsonl", "--endpoint", receivers[0].endpoint, code=1)
    assert "Sent 18 spans of 12 stages" in said
    assert "; could not be read: truncated: 1." in said
    (tmp_path / "spans.jsonl").write_bytes(whole[:1000])
    said = send("spans.jsonl", "--endpoint", receivers[0].endpoint, code=2)
    assert said == (
        "gpuscope send: 'spans.jsonl': ends within its first line; it is damaged, or still being written: "
        "send it when it is whole.\n"
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read 'spans.jsonl': No such file or directory; GPUSCOPE=1 GPUSCOPE_EXPORTER=file"),
        (b"", "no spans in 'spans.jsonl': empty, or without a stage that ended"),
        (b"time,stage\n1,2\n", "'spans.jsonl': not a recording (skipped: foreign: 2); OTLP JSON lines are expected"),
        (b"\x00\x01" * 3000, "'spans.jsonl': not a recording (skipped: binary: 1)"),
        (b'{"resourceMetrics": []}\n', "no spans in 'spans.jsonl'"),
    ],
)
def test_what_is_no_recording(send, tmp_path, content, said):
    """What was seen, what is expected, and how to get that."""
    if content is not None:
        (tmp_path / "spans.jsonl").write_bytes(content)
    assert said in send("spans.jsonl", code=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--endpoint", "localhost:4318"], "`--endpoint`: expected a URL such as http://localhost:4318"),
        (["--endpoint", "http://host:hush"], "has a port that is not a number"),
        (["--header", "hush"], "`--header`: expected a name and a value"),
        (["--header", "a b=hush"], "`--header`: expected texts that HTTP allows as a header"),
    ],
)
def test_options_that_cannot_be_used(send, arguments, said):
    """What is expected is said, and what was given is not quoted: it may be a key."""
    answer = send("spans.jsonl", *arguments, code=2)
    assert said in answer
    assert "hush" not in answer


def test_a_variable_that_cannot_be_used_is_said(record, send, receivers):
    """As it is when a program records; of other variables nothing is said."""
    record()
    said = send(
        "spans.jsonl",
        "--endpoint",
        receivers[0].endpoint,
        OTEL_EXPORTER_OTLP_TIMEOUT="soon",
        OTEL_TRACES_SAMPLER="never",
    )
    assert "gpuscope send: ignoring OTEL_EXPORTER_OTLP_TIMEOUT" in said
    assert "SAMPLER" not in said
