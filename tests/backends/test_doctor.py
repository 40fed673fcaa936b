"""The doctor at the real Jaeger, OpenTelemetry Collector and Prometheus, at each port that they have."""

from __future__ import annotations

import pytest

from gpuscope._settings.config import Config
from gpuscope.commands._endpoint.diagnosis import diagnose

from .servers import FILES, Collector, Jaeger, Prometheus


@pytest.fixture(scope="module")
def jaeger_of_ours(tmp_path_factory):
    """A running Jaeger, by its ports."""
    with Jaeger(tmp_path_factory.mktemp("jaeger")) as server:
        yield server


@pytest.fixture(scope="module")
def collector(tmp_path_factory):
    """A running Collector with the configuration that is shipped."""
    with Collector(FILES / "otel-collector/config.yaml", tmp_path_factory.mktemp("otelcol")) as server:
        yield server


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory):
    """A running Prometheus that scrapes nothing."""
    with Prometheus(tmp_path_factory.mktemp("prometheus"), "scrape_configs: []\n") as server:
        yield server


def ask(port, protocol="http/protobuf", usual_ports=(1, 1), scheme="http"):
    """What the doctor says of a port."""
    url = f"{scheme}://127.0.0.1:{port}"
    return diagnose(Config().changed(otlp_base_endpoint=url, otlp_protocol=protocol), usual_ports)


@pytest.mark.parametrize("which", ["jaeger_of_ours", "collector"])
@pytest.mark.parametrize(
    ("port", "protocol", "seen", "advice"),
    [
        ("http", "http/protobuf", "took a test span", ""),
        ("grpc", "grpc", "took a test span", ""),
        ("grpc", "http/protobuf", "there is a gRPC server", "Set OTEL_EXPORTER_OTLP_PROTOCOL=grpc, or"),
        ("http", "grpc", "there is a receiver of OTLP over HTTP", "Set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf, or"),
    ],
)
def test_ports_of_otlp(request, which, port, protocol, *, seen, advice):
    """Either protocol at its own port is well, and at the other's the doctor says which it is."""
    found = ask(getattr(request.getfixturevalue(which), port), protocol)
    assert seen in found.seen
    assert advice in found.advice
    assert found.ok is (not advice)


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_the_page_of_jaeger(jaeger_of_ours, protocol):
    """16686 instead of 4318, the commonest mistake: its page answers 200 to whatever is sent there."""
    found = ask(jaeger_of_ours.query, protocol, (jaeger_of_ours.http, jaeger_of_ours.grpc))
    assert "there is Jaeger's user interface, which takes no spans" in found.seen
    mine = jaeger_of_ours.grpc if protocol == "grpc" else jaeger_of_ours.http
    assert f"Set OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:{mine}" in found.advice


def test_the_other_grpc_port_of_jaeger(jaeger_of_ours):
    """Its query API is gRPC, too, and has no such service."""
    found = ask(jaeger_of_ours.query_grpc, "grpc")
    assert "UNIMPLEMENTED" in found.seen
    assert "Check that its OTLP receiver is on" in found.advice


def test_tls_where_there_is_none(jaeger_of_ours):
    """The URL to set is said, for both protocols."""
    for port, protocol in ((jaeger_of_ours.http, "http/protobuf"), (jaeger_of_ours.grpc, "grpc")):
        found = ask(port, protocol, scheme="https")
        assert found.advice == f"Set OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:{port}."


def test_pages_of_metrics(collector):
    """Of a Collector: its own metrics, and those that it keeps for Prometheus, once there are some."""
    found = ask(collector.own)
    assert "there is a page of metrics for Prometheus" in found.seen
    assert found.advice.startswith("Spans go to another port.")


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_the_port_of_prometheus(prometheus, protocol):
    """It takes no spans, whoever asks."""
    found = ask(prometheus.port, protocol)
    assert "there is Prometheus, which takes no spans" in found.seen
    assert found.advice.startswith("Send spans to an OpenTelemetry Collector or to Jaeger.")
