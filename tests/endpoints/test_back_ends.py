"""The doctor at the real Jaeger and the real OpenTelemetry Collector, at each port that they have; where they are."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import urllib.request

import pytest

from gpuscope._settings.config import Config
from gpuscope.commands._endpoint.diagnosis import diagnose

from ..spans_of_files import wait_for

JAEGER = """
service:
  extensions: [jaeger_storage, jaeger_query]
  pipelines: {{traces: {{receivers: [otlp], exporters: [jaeger_storage_exporter]}}}}
  telemetry: {metrics}
extensions:
  jaeger_query:
    storage: {{traces: memory}}
    http: {{endpoint: "127.0.0.1:{page}"}}
    grpc: {{endpoint: "127.0.0.1:{page_grpc}"}}
  jaeger_storage: {{backends: {{memory: {{memory: {{max_traces: 100}}}}}}}}
receivers: {receivers}
exporters: {{jaeger_storage_exporter: {{trace_storage: memory}}}}
"""
COLLECTOR = """
service:
  pipelines: {{traces: {{receivers: [otlp], exporters: [otlp]}}}}
  telemetry: {metrics}
receivers: {receivers}
exporters: {{otlp: {{endpoint: "127.0.0.1:{page}", tls: {{insecure: true}}}}}}
"""
RECEIVERS = """{{otlp: {{protocols: {{
  http: {{endpoint: "127.0.0.1:{http}"}}, grpc: {{endpoint: "127.0.0.1:{grpc}"}}}}}}}}"""
METRICS = "{{metrics: {{readers: [{{pull: {{exporter: {{prometheus: {{host: 127.0.0.1, port: {own}}}}}}}}}]}}}}"
VARIABLES = {"jaeger": "GPUSCOPE_JAEGER", "otelcol": "GPUSCOPE_OTELCOL"}


def answers(url):
    """Tell whether a page is there."""
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return answer.status == 200
    return False


def ports_of(text):
    """Free ports by the names of them."""
    names = ("http", "grpc", "page", "page_grpc", "own")
    with contextlib.ExitStack() as probes:
        opened = [probes.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in names]
        ports = {name: probe.getsockname()[1] for name, probe in zip(names, opened, strict=True)}
    parts = {"receivers": RECEIVERS.format(**ports), "metrics": METRICS.format(**ports)}
    return ports, text.format(**ports, **parts)


@contextlib.contextmanager
def running(name, text, folder):
    """Run a program with its configuration; yield its ports."""
    program = os.environ.get(VARIABLES[name]) or shutil.which(name)
    if program is None:
        pytest.skip(f"needs `{name}` on PATH or in {VARIABLES[name]}")
    ports, configuration = ports_of(text)
    (folder / "config.yaml").write_text(configuration)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OTEL")}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, "--config", folder / "config.yaml"], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:

        def is_up():
            assert process.poll() is None, (folder / "log").read_text()
            return answers(f"http://127.0.0.1:{ports['own']}/metrics")

        wait_for(is_up)
        yield ports
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def jaeger(tmp_path_factory):
    """The ports of a Jaeger."""
    with running("jaeger", JAEGER, tmp_path_factory.mktemp("jaeger")) as ports:
        yield ports


@pytest.fixture(scope="module")
def collector(tmp_path_factory):
    """The ports of a Collector."""
    with running("otelcol", COLLECTOR, tmp_path_factory.mktemp("otelcol")) as ports:
        yield ports


def ask(port, protocol, usual_ports=(1, 1), scheme="http"):
    """What the doctor says of a port."""
    url = f"{scheme}://127.0.0.1:{port}"
    return diagnose(Config().changed(otlp_base_endpoint=url, otlp_protocol=protocol), usual_ports)


@pytest.mark.parametrize("which", ["jaeger", "collector"])
@pytest.mark.parametrize(
    ("port", "protocol", "seen", "advice"),
    [
        ("http", "http/protobuf", "took a test span", ""),
        ("grpc", "grpc", "took a test span", ""),
        ("grpc", "http/protobuf", "there is a gRPC server", "Set OTEL_EXPORTER_OTLP_PROTOCOL=grpc, or"),
        ("http", "grpc", "there is a receiver of OTLP over HTTP", "Set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf, or"),
        ("own", "http/protobuf", "there is a page of metrics for Prometheus", "Spans go to another port."),
    ],
)
def test_ports_of_otlp(request, which, port, protocol, *, seen, advice):
    """Either protocol at its own port is well, and at the other's the doctor says which it is."""
    found = ask(request.getfixturevalue(which)[port], protocol)
    assert seen in found.seen
    assert advice in found.advice
    assert found.ok is (not advice)


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_the_page_of_jaeger(jaeger, protocol):
    """16686 instead of 4318, the commonest mistake: its page answers 200 to whatever is sent there."""
    found = ask(jaeger["page"], protocol, (jaeger["http"], jaeger["grpc"]))
    assert "there is Jaeger's user interface, which takes no spans" in found.seen
    mine = jaeger["grpc" if protocol == "grpc" else "http"]
    assert f"Set OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:{mine}" in found.advice


def test_the_other_grpc_port_of_jaeger(jaeger):
    """Its query API is gRPC, too, and has no such service."""
    found = ask(jaeger["page_grpc"], "grpc")
    assert "UNIMPLEMENTED" in found.seen
    assert "Check that its OTLP receiver is on" in found.advice


def test_tls_where_there_is_none(jaeger):
    """The URL to set is said, for both protocols."""
    for port, protocol in (("http", "http/protobuf"), ("grpc", "grpc")):
        found = ask(jaeger[port], protocol, scheme="https")
        assert found.advice == f"Set OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:{jaeger[port]}."
