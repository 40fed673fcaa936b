"""Spans in a real Jaeger: what its web page is given is what was recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from gpuscope import stage
from gpuscope._settings.config import Config
from gpuscope.exporters.file import FileExporter
from gpuscope.exporters.otlp import OtlpExporter

from ..native.conftest import driver_file, machine  # noqa: F401 - fixtures
from .conftest import Span, spans_of_otlp

ROOT = Path(__file__).parents[2]
PROTOCOLS = ("http/protobuf", "grpc")
OF_JAEGER = {
    "error",
    "otel.scope.name",
    "otel.scope.version",
    "otel.status_code",
    "otel.status_description",
    "span.kind",
}
"""What Jaeger shows as attributes of a span besides its own."""
SHOWN_AS = {"stringValue": "string", "boolValue": "bool", "intValue": "int64", "doubleValue": "float64"}

GPU = """
import sys, time
import gpuscope
from gpuscope import _runtime, stage
from gpuscope.testing import FakeDevice
from opentelemetry import trace

def recording():
    # A GPU that is half a second behind the host, so its spans begin when those around them have ended.
    device = FakeDevice(time.perf_counter_ns, delay_ns=500_000_000, completes=True)
    return _runtime.period(_runtime.state.config.changed(gpu_spans="all"), device=device, clock=time.perf_counter_ns)
"""


@pytest.fixture
def run(jaeger, tmp_path):
    """Return a function that runs a program whose spans go to Jaeger and, unless it says otherwise, into a file."""

    def run(*command, protocol="http/protobuf", timeout=100, **variables):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("GPUSCOPE", "OTEL_"))}
        ours = {"GPUSCOPE": "1", "GPUSCOPE_EXPORTER": "otlp,file", "GPUSCOPE_FILE": str(tmp_path / "{pid}.jsonl")}
        done = subprocess.run(
            [str(part) for part in command],
            env={**kept, **ours, **jaeger.variables(protocol), **variables},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


def spans_written(folder: Path) -> list[Span]:
    """Every span in a folder's files."""
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_text(encoding="utf-8").splitlines()]
    return [span for line in lines for span in spans_of_otlp(json.loads(line))]


def by_id(spans: list[Span]) -> dict[str, Span]:
    """Return the spans by their ids, each of which is there once."""
    found = {span.span_id: span for span in spans}
    assert len(found) == len(spans)
    return found


def check_shown_as_written(jaeger, service: str, folder: Path) -> list[Span]:
    """Compare both of Jaeger's answers with the file that the same process wrote; return what its page shows."""
    written = by_id(spans_written(folder))
    shown = jaeger.shown(service, len(written))
    kept = by_id(jaeger.kept({span.trace_id for span in written.values()}))
    assert set(by_id(shown)) == set(kept) == set(written)
    for span in shown:
        sent = written[span.span_id]
        assert kept[span.span_id] == sent
        check_shown(span, sent)
    return shown


def check_shown(span: Span, sent: Span) -> None:
    """Compare a span of Jaeger's page, whose times are whole microseconds, with the span that was sent."""
    assert (span.name, span.trace_id, span.parent_id) == (sent.name, sent.trace_id, sent.parent_id)
    assert (span.start, span.end - span.start) == (sent.start // 1000, (sent.end - sent.start) // 1000)
    assert {name: value for name, value in span.attributes.items() if name not in OF_JAEGER} == as_shown(
        sent.attributes
    )
    assert span.events == [(at // 1000, name, as_shown(values)) for at, name, values in sent.events]
    assert span.links == sent.links
    assert span.process == as_shown(sent.process)
    assert (span.error, span.scope) == (sent.error, sent.scope)
    assert span.warnings == []


def check_no_warnings(jaeger, shown: list[Span]) -> None:
    """Jaeger finds no fault with gpuscope's spans, in either of its answers."""
    kept = jaeger.kept({span.trace_id for span in shown})
    ours = [span for span in (*shown, *kept) if span.scope == "gpuscope"]
    assert len(ours) >= 2
    assert [warning for span in ours for warning in span.warnings] == []
    assert [span for span in ours if "@jaeger@warnings" in span.attributes] == []


def as_shown(attributes):
    """Return attributes of OTLP as Jaeger's page has them."""
    return {name: (SHOWN_AS[kind], value) for name, (kind, value) in attributes.items()}


def paths(spans: list[Span]) -> list[str]:
    """Return each span's name and those above it, in order: `look up < infer < GET /classify`."""
    known, found = by_id(spans), []
    for span in spans:
        names, above = [span.name], known.get(span.parent_id)
        while above is not None:
            names.append(above.name)
            above = known.get(above.parent_id)
        found.append(" < ".join(names))
    return found


class TestOnePath:
    """What gpuscope sends by itself."""

    def test_the_demonstration(self, jaeger, run, tmp_path):
        """Each request is a trace with its stages in order, exactly as in the file."""
        command = (sys.executable, "-m", "gpuscope", "demo", "--otlp", "--iterations", 3, "--batch", 1)
        run(*command, "--out", tmp_path / "demo.jsonl", OTEL_SERVICE_NAME="demo")
        shown = check_shown_as_written(jaeger, "demo", tmp_path)
        stages = ["cpu prep", "h2d", "gpu preprocess", "inference", "d2h", "postprocess"]
        assert paths(shown) == ["request", *(f"{name} < request" for name in stages)] * 3
        assert len({span.trace_id for span in shown}) == 3

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_gpu_spans_that_outlast_their_parents_stay(self, jaeger, run, tmp_path, protocol):
        """They are neither moved nor cut, and Jaeger warns of no clock."""
        program = GPU + "with recording(), stage('request'):\n    with stage('infer'): pass\n"
        service = f"late {protocol}"
        run(sys.executable, "-c", program, protocol=protocol, OTEL_SERVICE_NAME=service)
        request, infer, request_gpu, infer_gpu = check_shown_as_written(jaeger, service, tmp_path)
        assert infer_gpu.name == "infer [gpu]"
        assert infer_gpu.parent_id == infer.span_id
        assert infer_gpu.start > request.end
        assert request_gpu.parent_id == request.span_id

    def test_errors_and_every_type_of_attribute(self, jaeger, run, tmp_path):
        """An exception is a log and an error, and attributes keep their types."""
        program = GPU + (
            "attributes = {'text': 'größe', 'whole': 2**40, 'half': 0.5, 'yes': True}\n"
            "try:\n"
            "    with recording(), stage('request', attributes=attributes): raise ValueError('no picture')\n"
            "except ValueError: pass\n"
        )
        run(sys.executable, "-c", program, OTEL_SERVICE_NAME="errors")
        request, _ = check_shown_as_written(jaeger, "errors", tmp_path)
        assert request.error
        ((_, name, values),) = request.events
        assert (name, values["exception.type"]) == ("exception", ("string", "ValueError"))
        assert request.attributes["otel.status_description"] == ("string", "ValueError: no picture")
        assert request.attributes["whole"] == ("int64", 2**40)
        assert request.attributes["gpuscope.host.duration"][0] == "float64"

    def test_two_processes_are_one_trace(self, jaeger, run, tmp_path):
        """A worker's stages lie below the stage that asked for them; each process is shown as itself."""
        front = GPU + (
            "import subprocess\n"
            "with recording(), stage('request'):\n"
            "    carrier = {}\n"
            "    gpuscope.inject(carrier)\n"
            "    subprocess.run([sys.executable, *sys.argv[1:], carrier['traceparent']], check=True)\n"
        )
        (tmp_path / "worker.py").write_text(
            GPU + "with recording(), gpuscope.extract({'traceparent': sys.argv[1]}), stage('work'): pass\n"
        )
        run(sys.executable, "-c", front, tmp_path / "worker.py", OTEL_SERVICE_NAME="two", protocol="grpc")
        shown = {span.name: span for span in check_shown_as_written(jaeger, "two", tmp_path)}
        assert set(shown) == {"request", "request [gpu]", "work", "work [gpu]"}
        assert len({span.trace_id for span in shown.values()}) == 1
        assert shown["work"].parent_id == shown["request"].span_id
        front, worker = shown["request"].process, shown["work"].process
        assert front["process.pid"] != worker["process.pid"]
        assert front["service.instance.id"] != worker["service.instance.id"]
        assert front["host.name"] == worker["host.name"]

    def test_a_batch_is_in_the_trace_of_each_of_its_requests(self, jaeger, run, tmp_path):
        """The links of both directions lead to spans, and the shares of the requests are the batch's GPU time."""
        program = GPU + (
            "with recording():\n"
            "    tokens = []\n"
            "    for _ in range(3):\n"
            "        with stage('request'): tokens.append(gpuscope.here())\n"
            "    with stage('predict', members=tokens, weights=[1, 2, 4]): pass\n"
        )
        run(sys.executable, "-c", program, OTEL_SERVICE_NAME="batch")
        shown = check_shown_as_written(jaeger, "batch", tmp_path)
        batch, work = (next(span for span in shown if span.name == name) for name in ("predict", "predict [gpu]"))
        requests = [span for span in shown if span.name == "request"]
        light = [span for span in shown if span.name == "predict (shared)"]
        assert sorted(batch.links) == sorted((span.trace_id, span.span_id) for span in requests)
        assert {span.parent_id for span in light} == {span.span_id for span in requests}
        assert [span.links for span in light] == [[(batch.trace_id, batch.span_id)]] * 3
        (sent,) = (span for span in spans_written(tmp_path) if span.span_id == work.span_id)
        assert sum(span.attributes["gpuscope.gpu.share"][1] for span in light) == sent.end - sent.start

    def test_stages_inside_cuda_graphs(self, jaeger, machine, tmp_path):  # noqa: F811
        """Each replay has GPU spans for the stages inside it, below the stage around it."""
        places = {"otlp_endpoint": f"{jaeger.endpoint}/v1/traces", "file": str(tmp_path / "graphs.jsonl")}
        config = Config().changed(schedule_delay_s=0.01, **places)
        service = f"graphs {tmp_path.name}"
        resource = {"service.name": service, "host.name": "here", "service.instance.id": "one"}
        otlp, file = OtlpExporter(config, resource), FileExporter(config, resource)
        graph = sys.modules["torch.cuda.graphs"].CUDAGraph()
        with machine.period(otlp, file):
            graph.capture_begin()
            for name in ("attention", "mlp"):
                with stage(name):
                    machine.library.fake_kernel()
            graph.capture_end()
            for _ in range(2):
                with stage("request"):
                    graph.replay()
            machine.collect()
        shown = check_shown_as_written(jaeger, service, tmp_path)
        replayed = [span for span in shown if "gpuscope.graph" in span.attributes]
        assert paths(shown).count("attention [gpu] < request") == 2
        assert [span.name for span in replayed] == ["attention [gpu]", "mlp [gpu]"] * 2
        assert all(
            span.end - span.start in (49, 50) for span in replayed
        )  # The kernel takes 50 µs; all finer is cut off.


SERVER = (
    GPU
    + """
import socket, threading, urllib.error, urllib.request
import uvicorn
from fastapi import FastAPI

app, tracer = FastAPI(), trace.get_tracer("app")


@app.get("/classify")
def classify():
    with stage("classify"), stage("infer"), tracer.start_as_current_span("look up"):
        return "cat"


@app.get("/fails")
async def fails():
    with stage("classify"):
        raise ValueError("no picture")


listening = socket.create_server(("127.0.0.1", 0))
server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
with recording():
    serving = threading.Thread(target=server.run, args=([listening],))
    serving.start()
    for path in ("classify", "fails"):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{listening.getsockname()[1]}/{path}").close()
        except urllib.error.HTTPError:
            assert path == "fails"
    server.should_exit = True
    serving.join()
    assert gpuscope.flush(10)
    print(gpuscope.statistics().exporters)
"""
)
SERVED = (
    "GET /classify",
    "classify < GET /classify",
    "classify [gpu] < classify < GET /classify",
    "infer < classify < GET /classify",
    "infer [gpu] < infer < classify < GET /classify",
    "look up < infer < classify < GET /classify",
    "GET /fails",
    "classify < GET /fails",
    "classify [gpu] < classify < GET /fails",
)
STAGES = ("classify", "classify [gpu]", "infer", "infer [gpu]")


class TestBesideTheApplication:
    """Stages among the application's own spans, through its own provider."""

    def test_the_example_of_a_service(self, jaeger, run):
        """Its spans lie around the stages and inside them."""
        run(sys.executable, ROOT / "examples/service.py", GPUSCOPE_EXPORTER="auto")
        shown = jaeger.shown("classifier", 21)
        request = "classify < POST /classify < client"
        stages = ("preprocess", "inference", "postprocess", "look up name < postprocess")
        one = ["client", "POST /classify < client", request, *(f"{name} < {request}" for name in stages)]
        assert paths(shown) == one * 3
        assert {span.scope for span in shown if span.name == "postprocess"} == {"gpuscope"}
        check_no_warnings(jaeger, shown)

    def test_events_and_links_of_a_stage(self, jaeger, run):
        """What the application adds to the current span, which is the stage, is in Jaeger's logs and references."""
        program = GPU + (
            "from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter\n"
            "from opentelemetry.sdk.trace import TracerProvider\n"
            "from opentelemetry.sdk.trace.export import BatchSpanProcessor\n"
            "trace.set_tracer_provider(TracerProvider())\n"
            "trace.get_tracer_provider().add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))\n"
            "with stage('before'): context = trace.get_current_span().get_span_context()\n"
            "with stage('request'):\n"
            "    trace.get_current_span().add_event('token', {'number': 1})\n"
            "    trace.get_current_span().add_link(context)\n"
        )
        run(sys.executable, "-c", program, GPUSCOPE_EXPORTER="auto", OTEL_SERVICE_NAME="noted")
        before, request = jaeger.shown("noted", 2)
        ((at, name, values),) = request.events
        assert (name, values) == ("token", {"number": ("int64", 1)})
        assert request.start <= at <= request.end
        assert request.links == [(before.trace_id, before.span_id)]

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_fastapi_under_opentelemetry_instrument(self, jaeger, run, protocol):
        """Stages go through the application's own exporter, as columns, with its resource."""
        service = f"fastapi {protocol}"
        done = run(
            Path(sys.executable).with_name("opentelemetry-instrument"),
            sys.executable,
            "-c",
            SERVER,
            protocol=protocol,
            GPUSCOPE_EXPORTER="auto",
            OTEL_SERVICE_NAME=service,
            OTEL_TRACES_EXPORTER="otlp",
            OTEL_METRICS_EXPORTER="none",
            OTEL_LOGS_EXPORTER="none",
        )
        assert "('application',)" in done.stdout
        shown = [span for span in jaeger.shown(service, 13) if " http " not in span.name]
        assert Counter(paths(shown)) == dict.fromkeys(SERVED, 1)
        assert {span.scope for span in shown if span.name in STAGES} == {"gpuscope"}
        failed = [span for span in shown if span.error]
        assert [span.name for span in failed] == ["GET /fails", "classify"]
        assert [event[1] for event in failed[1].events] == ["exception"]
        for span in shown:
            assert span.process["service.name"] == ("string", service)
        check_no_warnings(jaeger, shown)
