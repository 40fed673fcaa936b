"""The command line, run as a person runs it: in a process of its own, looking at what it prints and returns."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

import gpuscope
from gpuscope.__main__ import main
from gpuscope.commands._checks import startup
from gpuscope.commands.demo import SAMPLE

HERE = Path(gpuscope.__file__).parents[1]
STAGES = ("request", "cpu prep", "h2d", "gpu preprocess", "inference", "d2h", "postprocess")
SMALL_DEMO = ("demo", "--iterations", "4", "--batch", "2", "--device", "cpu", "--model", "vit-tiny")


def environment(**variables):
    """The environment without anybody's settings of gpuscope or OpenTelemetry."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("GPUSCOPE", "OTEL_"))}
    return ours | {"PYTHONPATH": str(HERE), "PYTHONUTF8": "1"} | variables


def gpuscope_in(folder, *arguments, **variables):
    """Run `gpuscope` with some arguments and variables, in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "gpuscope", *arguments],
        env=environment(**variables),
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        timeout=150,
        check=False,
    )


@pytest.fixture
def run(tmp_path):
    """`gpuscope` in an empty folder."""
    return functools.partial(gpuscope_in, tmp_path)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What a small demo printed, and the spans that it wrote. Run once: importing the model's library takes seconds."""
    folder = tmp_path_factory.mktemp("demo")
    return gpuscope_in(folder, *SMALL_DEMO), spans_in(folder / "gpuscope-demo.jsonl")


class Receiver(ThreadingHTTPServer):
    """An OTLP endpoint on loopback that answers with one status and keeps what it was sent."""

    def __init__(self, status):
        super().__init__(("127.0.0.1", 0), Answer)
        self.status = status
        self.span_names = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    """Reads the spans and answers."""

    def do_POST(self):
        """Keep the names of the spans."""
        request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.server.span_names += [span.name for span in scope.spans]
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        """Say nothing."""


@pytest.fixture
def receiver(request):
    """A real endpoint; parametrize it with a status other than 200."""
    server = Receiver(getattr(request, "param", 200))
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    yield server
    server.shutdown()
    serving.join()
    server.server_close()


@pytest.fixture
def closed_port():
    """A URL on which nothing listens."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        port = server.server_port
    return f"http://127.0.0.1:{port}"


def spans_in(path):
    """The spans of a file of OTLP JSON lines."""
    requests = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        span
        for request in requests
        for resource in request.get("resourceSpans", ())
        for scope in resource["scopeSpans"]
        for span in scope["spans"]
    ]


def findings(done):
    """The doctor's findings by subject; where there are several of a subject, the worst."""
    order = ("ok", "warning", "problem")
    listed = sorted(json.loads(done.stdout)["findings"], key=lambda each: order.index(each["verdict"]))
    return {each["subject"]: each for each in listed}


class TestCommandLine:
    """What all commands have in common."""

    def test_version(self, run):
        """`--version` prints the version."""
        done = run("--version")
        assert (done.returncode, done.stdout) == (0, f"gpuscope {gpuscope.__version__}\n")

    def test_help_lists_the_commands(self, run):
        """`--help` names each command and what it does."""
        done = run("--help")
        assert done.returncode == 0
        assert {"demo", "doctor"} <= set(done.stdout.split())

    @pytest.mark.parametrize("arguments", [[], ["dmeo"], ["demo", "--iterations", "0"], ["demo", "--model", "resnet"]])
    def test_usage_errors(self, arguments, capsys):
        """A command or an option that does not exist ends with code 2 and a usage line."""
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert "usage: gpuscope" in capsys.readouterr().err

    def test_help_is_quick_to_get(self):
        """Looking at the help imports neither torch nor OpenTelemetry."""
        script = (
            "import contextlib, sys; from gpuscope.__main__ import main\n"
            "with contextlib.suppress(SystemExit): main(['--help'])\n"
            "print([name for name in ('torch', 'opentelemetry', 'numpy', 'nvtx') if name in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "[]"


class TestDemo:
    """`gpuscope demo`."""

    def test_prints_the_table(self, demo):
        """The demo needs no variable and prints a line for each stage, in order, with its share of the request."""
        done, _ = demo
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        rows = [re.split(r"\s{2,}", line.strip()) for line in lines if re.match(r" *[a-z0-9 ]+ {2,}4  ", line)]
        assert tuple(row[0] for row in rows) == STAGES
        assert rows[0][-1] == "100.0"

    def test_spans_are_six_stages_inside_a_request(self, demo):
        """Each request of the demo is one trace: a root span with the six stages as its children."""
        _, spans = demo
        assert sorted(span["name"] for span in spans) == sorted(STAGES * 4)
        roots = {span["traceId"]: span["spanId"] for span in spans if span["name"] == "request"}
        assert len(roots) == 4
        inside = [span for span in spans if span["name"] != "request"]
        assert all(span["parentSpanId"] == roots[span["traceId"]] for span in inside)

    def test_says_what_to_do_next(self, demo):
        """The demo ends with where the spans are and how to see them in Jaeger, and is silent on stderr."""
        done, _ = demo
        assert "Spans: gpuscope-demo.jsonl (OTLP JSON lines)." in done.stdout
        assert "gpuscope demo --otlp" in done.stdout
        assert done.stderr == ""

    def test_shows_a_recording_of_a_gpu_to_whoever_has_none(self, run, tmp_path):
        """`--sample` runs nothing: it reports a small recording that is shipped, and writes its timeline."""
        done = run("demo", "--sample")
        assert done.returncode == 0, done.stderr
        answer = done.stdout.splitlines()[2]
        assert answer == "`request` is cpu-bound. It takes 80.0 ms (median of 47 requests). At most"
        assert "NVIDIA H200" in (tmp_path / "gpuscope-sample.html").read_text()
        assert [path.name for path in tmp_path.iterdir()] == ["gpuscope-sample.html"]
        assert SAMPLE.stat().st_size < 200_000

    def test_sends_spans_when_asked(self, run, tmp_path, receiver):
        """With `--otlp` spans go to the endpoint as well, whatever the variables say of recording and sampling."""
        (tmp_path / "spans.jsonl").write_text('{"resourceSpans": []}\n')
        variables = {"GPUSCOPE": "1", "GPUSCOPE_EXPORTER": "none", "OTEL_TRACES_SAMPLER": "always_off"}
        endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url}
        done = run(*SMALL_DEMO, "--otlp", "--out", "spans.jsonl", **variables, **endpoint)
        assert done.returncode == 0, done.stdout + done.stderr
        assert sorted(receiver.span_names) == sorted(STAGES * 4)
        assert len(spans_in(tmp_path / "spans.jsonl")) == 28
        assert "Spans: added to spans.jsonl" in done.stdout

    def test_file_that_cannot_be_written(self, run):
        """A path that cannot be written ends the demo at once, with the reason and what to do."""
        done = run("demo", "--out", "missing/folder/spans.jsonl")
        assert done.returncode == 2
        assert done.stderr == (
            "gpuscope demo: cannot write spans to 'missing/folder/spans.jsonl': No such file or directory; "
            "name another file with `--out`.\n"
        )

    def test_missing_package(self, run, tmp_path):
        """Where a package of the extra is missing, one sentence says how to get it."""
        (tmp_path / "transformers").mkdir()
        (tmp_path / "transformers" / "__init__.py").write_text(
            "raise ModuleNotFoundError(\"No module named 'transformers'\", name='transformers')"
        )
        done = run(*SMALL_DEMO, PYTHONPATH=f"{tmp_path}{os.pathsep}{HERE}")
        assert done.returncode == 2
        assert done.stderr == 'gpuscope demo: `transformers` is missing; pip install "gpuscope[demo]" brings it.\n'

    def test_gpu_that_is_not_there(self, run):
        """Asking for a GPU where there is none ends the demo with a sentence."""
        done = run("demo", "--device", "cuda", CUDA_VISIBLE_DEVICES="")
        assert done.returncode == 2
        assert "`--device cuda` needs a GPU that PyTorch can use" in done.stderr


class TestDoctor:
    """`gpuscope doctor`."""

    def test_endpoint_that_takes_spans(self, run, receiver):
        """With an endpoint that answers, the doctor sends it one test span, finds no problem and returns 0."""
        done = run("doctor", GPUSCOPE="1", OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
        assert done.returncode == 0, done.stdout + done.stderr
        assert receiver.span_names == ["gpuscope doctor"]
        assert f"{receiver.url}/v1/traces took a test span" in done.stdout
        assert done.stdout.splitlines()[-1].startswith("no problems")

    def test_endpoint_that_refuses(self, run, closed_port):
        """With nothing at the endpoint the doctor says so, says what to do, and returns 1."""
        done = run("doctor", OTEL_EXPORTER_OTLP_ENDPOINT=closed_port, OTEL_EXPORTER_OTLP_TIMEOUT="1")
        assert done.returncode == 1
        assert f"{closed_port}/v1/traces did not take a test span (unreachable" in done.stdout
        assert "GPUSCOPE_EXPORTER=file" in done.stdout
        assert done.stderr == ""

    @pytest.mark.parametrize("receiver", [401], indirect=True)
    def test_endpoint_that_rejects(self, run, receiver):
        """An endpoint that answers with an error is a problem, named by its status."""
        done = run("doctor", "--json", OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
        assert done.returncode == 1
        assert findings(done)["endpoint"]["verdict"] == "problem"
        assert "401" in findings(done)["endpoint"]["seen"]

    def test_json(self, run):
        """With `--json` the findings are data, with the same verdict as the exit code."""
        done = run("doctor", "--json", GPUSCOPE="1", GPUSCOPE_EXPORTER="none")
        answer = json.loads(done.stdout)
        assert (done.returncode, answer["ok"]) == (0, True)
        assert {"gpuscope", "PyTorch", "GPU", "NVTX", "settings", "recording", "exporter", "cost", "start-up"} <= set(
            findings(done)
        )
        assert {"subject", "verdict", "seen", "advice"} == set(answer["findings"][0])

    def test_what_python_s_start_does_is_said(self, run, tmp_path):
        """Whether stages can be named without the program's help: as installed, switched off, and without the file."""
        assert "do not import gpuscope" in findings(run("doctor", "--json"))["start-up"]["seen"]
        switched_off = run("doctor", "--json", GPUSCOPE_STARTUP="0")
        assert findings(switched_off)["start-up"]["seen"] == "switched off by GPUSCOPE_STARTUP"
        missing, advice = startup.seen(folders=[str(tmp_path)])
        assert "is not in site-packages" in missing
        assert "gpuscope run" in advice
        # The build's own file is not imported here: it needs setuptools.
        assert f'NAME = "{startup.NAME}"' in (HERE / "gpuscope/_startup/backend.py").read_text()

    def test_a_sampler_does_not_hide_the_test_span(self, run, receiver):
        """The test span is sent whatever the sampler would do with it."""
        done = run("doctor", OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url, OTEL_TRACES_SAMPLER="always_off")
        assert done.returncode == 0, done.stdout
        assert receiver.span_names == ["gpuscope doctor"]

    def test_malformed_variables(self, run):
        """A variable that could not be understood is a problem, with what is allowed and what is used."""
        done = run("doctor", "--json", GPUSCOPE="1", GPUSCOPE_EXPORTER="none", GPUSCOPE_QUEUE_SIZE="lots")
        assert done.returncode == 1
        seen = findings(done)["settings"]["seen"]
        assert "ignoring GPUSCOPE_QUEUE_SIZE (a text of 4 characters)" in seen
        assert "using the default, 8192" in seen

    def test_settings_in_effect(self, run):
        """Settings that differ from their defaults are listed, but no credentials of headers and URLs."""
        variables = {"GPUSCOPE_WARMUP": "7", "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20hush"}
        variables["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://user:hush@127.0.0.1:1/?token=hush"
        done = run("doctor", "--json", GPUSCOPE="1", GPUSCOPE_EXPORTER="none", **variables)
        seen = findings(done)["settings"]["seen"]
        assert "warmup=7" in seen
        assert "<authorization>" in seen
        assert "hush" not in done.stdout

    def test_recording_that_is_off(self, run):
        """Without `GPUSCOPE` the doctor warns that nothing is recorded, which is not a problem."""
        done = run("doctor", "--json", GPUSCOPE_EXPORTER="none")
        assert done.returncode == 0
        assert findings(done)["recording"]["verdict"] == "warning"
        assert "GPUSCOPE=1" in findings(done)["recording"]["advice"]

    def test_machine_without_gpu(self, run):
        """Where PyTorch can use no GPU the doctor says that stages get host spans only, and finds no problem."""
        done = run("doctor", "--json", GPUSCOPE_EXPORTER="none", CUDA_VISIBLE_DEVICES="")
        assert done.returncode == 0
        assert "host spans only" in findings(done)["GPU"]["seen"]
        assert re.match(r"[\d.]+ (ns|µs|ms) per stage", findings(done)["cost"]["seen"])

    def test_file_exporter(self, run, tmp_path):
        """The file exporter's folder is looked at and nothing is written into it."""
        done = run("doctor", "--json", GPUSCOPE_EXPORTER="file", GPUSCOPE_FILE="missing/spans.jsonl")
        assert done.returncode == 1
        assert findings(done)["file"]["verdict"] == "problem"
        assert run("doctor", GPUSCOPE_EXPORTER="file").returncode == 0
        assert not list(tmp_path.iterdir())

    def test_sdk_exporter_without_provider(self, run):
        """Asking for the application's TracerProvider where there is none gets a warning and what to do."""
        done = run("doctor", "--json", GPUSCOPE_EXPORTER="sdk")
        assert done.returncode == 0
        assert findings(done)["exporter"]["verdict"] == "warning"
        assert "opentelemetry-instrument" in findings(done)["exporter"]["advice"]

    def test_one_endpoint(self, run, receiver, closed_port):
        """With `--endpoint` it looks at that alone, whatever the variables say; the exit code is the answer."""
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": closed_port, "GPUSCOPE_EXPORTER": "none"}
        done = run("doctor", "--endpoint", receiver.url, **variables)
        assert done.returncode == 0, done.stdout
        assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("ok")] == ["endpoint"]
        assert receiver.span_names == ["gpuscope doctor"]
        done = run("doctor", "--json", "--protocol", "grpc", **variables)
        assert (done.returncode, list(findings(done))) == (1, ["endpoint"])
        assert findings(done)["endpoint"]["seen"].startswith(closed_port)
        done = run("doctor", "--endpoint", "nowhere")
        assert (done.returncode, done.stdout) == (2, "")
        assert "`--endpoint`: expected a URL such as http://localhost:4318" in done.stderr

    def test_a_variable_about_the_endpoint(self, run, receiver):
        """One that could not be understood is a problem, also where the endpoint is well."""
        done = run(
            "doctor", "--json", "--endpoint", receiver.url, OTEL_EXPORTER_OTLP_TIMEOUT="soon", GPUSCOPE_WARMUP="x"
        )
        assert done.returncode == 1
        assert {name: each["verdict"] for name, each in findings(done).items()} == {
            "settings": "problem",
            "endpoint": "ok",
        }
        assert "GPUSCOPE_WARMUP" not in done.stdout
