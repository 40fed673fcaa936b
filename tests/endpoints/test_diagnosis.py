"""`gpuscope doctor --endpoint`: whatever is there is named, and so is what to set; within five seconds."""

from __future__ import annotations

import re
import time

import grpc
import pytest

from gpuscope._settings.config import Config
from gpuscope.commands._endpoint.diagnosis import diagnose

from ..exporters.receiver import Answer, Receiver, rejects
from ..exporters.receiver_of_grpc import GrpcReceiver
from .servers import HTTP_2, JAEGER, PAGES, RECEIVER

USUAL = "OTLP's usual ports are 4318 (http/protobuf) and 4317 (grpc)."
MOST_S = 5.0
SLACK_S = 3.0
"""A machine that others use as well."""


@pytest.fixture
def ask(closed_port):
    """Return a function that has an endpoint looked at, and returns the diagnosis; without neighbours by default."""

    def look(url, protocol="http/protobuf", neighbours=None, **settings):
        config = Config().changed(otlp_base_endpoint=url, otlp_protocol=protocol, **settings)
        began = time.monotonic()
        found = diagnose(config, neighbours or (closed_port, closed_port))
        assert time.monotonic() - began < MOST_S + SLACK_S
        assert "hush" not in found.seen + found.advice
        return found

    return look


@pytest.fixture
def receiver():
    """A receiver of OTLP over HTTP."""
    made = Receiver()
    yield made
    made.close()


@pytest.fixture
def grpc_receiver():
    """A receiver of OTLP over gRPC."""
    made = GrpcReceiver()
    yield made
    made.close()


def url(server, scheme="http"):
    """The URL of a server."""
    return f"{scheme}://127.0.0.1:{server.server_port}"


def test_a_receiver_by_http(ask, receiver):
    """It takes the span, and that is all."""
    found = ask(receiver.endpoint)
    assert (found.ok, found.advice) == (True, "")
    assert found.seen == f"{receiver.url} took a test span named `gpuscope doctor`"
    (span,) = receiver.spans
    assert (span.name, len(span.trace_id), len(span.span_id)) == ("gpuscope doctor", 16, 8)


def test_a_receiver_by_grpc(ask, grpc_receiver):
    """It takes the span by gRPC as well."""
    assert ask(grpc_receiver.endpoint, "grpc").ok
    assert grpc_receiver.names == ["gpuscope doctor"]


def test_a_receiver_that_answers_in_json(ask, start):
    """Some do, whatever they were sent."""
    assert ask(url(start(PAGES["json"]))).ok


@pytest.mark.parametrize(
    ("pages", "protocol", "seen", "advice"),
    [
        ("jaeger", "http/protobuf", "there is Jaeger's user interface", f"Jaeger takes spans on other ports. {USUAL}"),
        ("jaeger", "grpc", "there is Jaeger's user interface", f"Jaeger takes spans on other ports. {USUAL}"),
        ("prometheus", "http/protobuf", "there is Prometheus", "to an OpenTelemetry Collector or to Jaeger"),
        ("prometheus", "grpc", "there is Prometheus", "to an OpenTelemetry Collector or to Jaeger"),
        ("metrics", "http/protobuf", "a page of metrics for Prometheus", "Spans go to another port"),
        ("html", "http/protobuf", "there is a web server (tests/1)", "not a receiver of OTLP"),
        ("text", "http/protobuf", "there is a web server (tests/1)", "not a receiver of OTLP"),
        ("html", "grpc", "there is a web server (tests/1)", "not a receiver of OTLP"),
        ("missing", "http/protobuf", "HTTP 404 Not Found); there is a web server", "Correct host, port and path"),
        (
            "method",
            "http/protobuf",
            "HTTP 405 Method Not Allowed); there is a web server",
            "Correct host, port and path",
        ),
        ("redirect", "http/protobuf", "HTTP 302 Found); there is a web server", "Correct host, port and path"),
        ("unauthorized", "http/protobuf", "HTTP 401 Unauthorized", "set OTEL_EXPORTER_OTLP_HEADERS=authorization="),
        ("forbidden", "http/protobuf", "HTTP 403 Forbidden", "set OTEL_EXPORTER_OTLP_HEADERS=authorization="),
        ("busy", "http/protobuf", "HTTP 503 Service Unavailable", "look at its log, and try again"),
        (
            "receiver",
            "grpc",
            "a receiver of OTLP over HTTP",
            "Set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf, or the port",
        ),
    ],
)
def test_web_servers(ask, start, pages, protocol, seen, *, advice):
    """Each is named, and what is said to do fits it."""
    found = ask(url(start(PAGES[pages])), protocol)
    assert not found.ok
    assert seen in found.seen
    assert advice in found.advice


@pytest.mark.parametrize("pages", ["html", "text", "jaeger"])
def test_a_web_page_is_no_acceptance(ask, start, pages):
    """A server that answers 200 to anything has not taken the span."""
    assert "(not_otlp: " in ask(url(start(PAGES[pages]))).seen


def test_a_wrong_path(ask, start):
    """The receiver is there, and the URL to set is said."""
    server = start(RECEIVER)
    found = ask(f"{url(server)}/otlp")
    assert "http_404" in found.seen
    assert found.advice == f"Set OTEL_EXPORTER_OTLP_ENDPOINT={url(server)}."


def test_credentials_that_are_refused(ask, start):
    """Those that were sent are named, and not shown; with the right ones it is well."""
    server = start(RECEIVER, authorization="Bearer right")
    found = ask(url(server), otlp_headers={"authorization": "Bearer hush"})
    assert "It refuses the credentials: correct OTEL_EXPORTER_OTLP_HEADERS (sent: authorization)." in found.advice
    assert ask(url(server), otlp_headers={"authorization": "Bearer right"}).ok


def test_a_receiver_that_rejects(ask, receiver):
    """The message of the receiver is shown."""
    receiver.answer(rejects(1))
    found = ask(receiver.endpoint)
    assert "(rejected: no room)" in found.seen
    assert "log" in found.advice


def test_a_receiver_that_is_slow(ask, receiver):
    """It answers what costs nothing, and so is there."""
    receiver.answer(Answer(hang=True))
    try:
        found = ask(receiver.endpoint, otlp_timeout_s=0.3)
    finally:
        receiver.release()
    assert "(timeout: no answer in time); there is a" in found.seen
    assert found.advice.startswith("It is there, and slow")


def test_grpc_asked_by_http(ask, grpc_receiver):
    """The protocol to set, or the other port."""
    found = ask(grpc_receiver.endpoint)
    assert found.seen.endswith("there is a gRPC server")
    assert found.advice == "Set OTEL_EXPORTER_OTLP_PROTOCOL=grpc, or the port for HTTP, usually 4318."


def test_a_receiver_nearby_is_named(ask, start, receiver, grpc_receiver):
    """If the usual port of that host takes spans, its URL is what to set."""
    ports = receiver.port, grpc_receiver.port
    for endpoint, protocol, mine in ((grpc_receiver.endpoint, "http/protobuf", receiver), (url(start(JAEGER)), "grpc",
                                     grpc_receiver)):  # fmt: skip
        assert f"OTEL_EXPORTER_OTLP_ENDPOINT={mine.endpoint}" in ask(endpoint, protocol, ports).advice


def test_a_grpc_server_without_otlp(ask):
    """It is one, and has no such service."""
    other = grpc.server(__import__("concurrent.futures").futures.ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    try:
        found = ask(f"http://127.0.0.1:{port}", "grpc")
    finally:
        other.stop(None)
    assert "UNIMPLEMENTED" in found.seen
    assert "there is a gRPC server" in found.seen
    assert "Check that its OTLP receiver is on, for traces." in found.advice


@pytest.mark.parametrize("code", ["UNAUTHENTICATED", "PERMISSION_DENIED"])
def test_grpc_that_wants_credentials(ask, grpc_receiver, code):
    """As over HTTP."""
    grpc_receiver.codes = [getattr(grpc.StatusCode, code)]
    assert "set OTEL_EXPORTER_OTLP_HEADERS=authorization=" in ask(grpc_receiver.endpoint, "grpc").advice


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_a_closed_port(ask, closed_port, protocol):
    """Nothing listens there; start something, go elsewhere, or write to a file."""
    found = ask(f"http://127.0.0.1:{closed_port}", protocol)
    assert f"(unreachable: nothing listens on 127.0.0.1:{closed_port})" in found.seen
    assert re.match(r"Start .* there, set OTEL_EXPORTER_OTLP_ENDPOINT, or write to a file", found.advice)


def test_a_host_without_an_address(ask):
    """It is the host that is wrong."""
    found = ask("http://no-such-host.invalid:4318")
    assert "(the host `no-such-host.invalid` has no address)" in found.seen
    assert found.advice.startswith("Correct the host in the endpoint")


@pytest.mark.parametrize(
    ("scheme", "protocol"), [("http", "http/protobuf"), ("https", "http/protobuf"), ("http", "grpc")]
)
def test_a_port_that_never_answers(ask, start, scheme, protocol):
    """It takes connections and says nothing: that is said, in time."""
    server = start(b"")
    found = ask(url(server, scheme), protocol)
    assert f"127.0.0.1:{server.server_port} takes connections and says nothing" in found.seen
    assert found.advice.startswith("Correct host and port")


def test_a_port_that_speaks_something_else(ask, start):
    """Such as that of a database."""
    found = ask(url(start(b"220 smtp.example ESMTP\r\n")))
    assert "what is there speaks neither HTTP nor gRPC" in found.seen
    assert "this is not a receiver of OTLP" in found.advice


def test_tls_on_a_plain_port(ask, receiver, start):
    """https:// where there is no TLS: the URL to set is said, for both protocols."""
    assert ask(receiver.endpoint.replace("http", "https")).advice == (
        f"Set OTEL_EXPORTER_OTLP_ENDPOINT={receiver.endpoint}."
    )
    server = start(HTTP_2)
    assert f"Set OTEL_EXPORTER_OTLP_ENDPOINT={url(server)}." in ask(url(server, "https"), "grpc").advice


def test_a_plain_request_to_a_port_with_tls(ask, start, server_tls):
    """http:// where there is TLS."""
    server = start(RECEIVER, server_tls)
    found = ask(url(server))
    assert "there is a receiver of OTLP over HTTP, with TLS" in found.seen
    assert found.advice == f"Set OTEL_EXPORTER_OTLP_ENDPOINT={url(server, 'https')}."


def test_a_certificate_that_is_not_trusted(ask, start, server_tls, certificate):
    """The variable for it is named; with it all is well."""
    server = start(RECEIVER, server_tls)
    found = ask(url(server, "https"))
    assert "self-signed certificate" in found.seen
    assert "Set OTEL_EXPORTER_OTLP_CERTIFICATE" in found.advice
    assert ask(url(server, "https"), otlp_certificate=str(certificate[0])).ok


def test_grpc_with_tls_asked_without(ask, certificate):
    """Scheme and protocol are found out together."""
    credentials = grpc.ssl_server_credentials([(certificate[1].read_bytes(), certificate[0].read_bytes())])
    made = GrpcReceiver(credentials=credentials)
    try:
        https = f"https://localhost:{made.port}"
        found = ask(f"http://localhost:{made.port}")
        assert "there is a gRPC server, with TLS" in found.seen
        assert f"Set OTEL_EXPORTER_OTLP_ENDPOINT={https} and OTEL_EXPORTER_OTLP_PROTOCOL=grpc" in found.advice
        assert f"Set OTEL_EXPORTER_OTLP_ENDPOINT={https}" in ask(f"http://localhost:{made.port}", "grpc").advice
    finally:
        made.close()


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_a_proxy_in_the_way(ask, receiver, grpc_receiver, proxies, *, closed_port, protocol):
    """The proxy is named without its password, and that the endpoint answers without it; NO_PROXY helps."""
    proxies(http=f"http://me:hush@127.0.0.1:{closed_port}")
    endpoint = grpc_receiver.endpoint if protocol == "grpc" else receiver.endpoint
    found = ask(endpoint, protocol)
    assert f"by the proxy http://127.0.0.1:{closed_port} of the environment" in found.seen
    assert "It answers without the proxy: set NO_PROXY=127.0.0.1" in found.advice
    proxies(no="127.0.0.1")
    assert ask(endpoint, protocol).ok


def test_a_proxy_that_lets_spans_through(ask, receiver, proxies):
    """It is named, because one may not know of it."""
    proxies(http=receiver.endpoint)
    found = ask("http://collector.example:4318")
    assert found.ok
    assert found.seen.endswith(f"by the proxy {receiver.endpoint} of the environment")


def test_a_proxy_before_an_endpoint_that_cannot_be_reached(ask, start, proxies, closed_port):
    """Its answer is what there is."""
    proxies(http=url(start(PAGES["forbidden"])))
    found = ask(f"http://127.0.0.1:{closed_port}")
    assert "http_403" in found.seen
    assert found.advice.startswith("Correct the proxy, or set NO_PROXY=127.0.0.1")


def test_a_proxy_that_cannot_be_used(ask, proxies):
    """What is wrong with it is said."""
    proxies(https="socks5://me:hush@127.0.0.1:1080")
    found = ask("https://127.0.0.1:4318")
    assert "proxy" in found.seen
    assert not found.ok
