"""Endpoints, proxies and networks that misbehave: they cost a bounded time and memory, and no secret."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import logging
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
import tracemalloc

import pytest

from gpuscope._settings.config import Config
from gpuscope.exporters._transport.http import Endpoint, HttpClient
from gpuscope.exporters._transport.route import find_route

from .receiver import Answer, rejects

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
HTTP_2 = bytes.fromhex("000018040000000000000400400000000500400000000600002000fe0300000001")


class RawServer:
    """Reads a request from each connection, and then lets a function have the connection."""

    def __init__(self, speak, tls=None):
        self.seen: list[bytes] = []
        self.connections = 0
        self._speak, self._tls = speak, tls
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.url = f"http{'s' * bool(tls)}://127.0.0.1:{self.port}/v1/traces"
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with contextlib.suppress(OSError), connection:
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
            with contextlib.closing(connection):
                while self.read(connection):
                    self._speak(connection)

    def read(self, connection):
        """Read one request, and tell whether there was one."""
        head = b""
        while b"\r\n\r\n" not in head:
            piece = connection.recv(65536)
            if not piece:
                return False
            head += piece
        head, _, body = head.partition(b"\r\n\r\n")
        length = next(
            (int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
        )
        while len(body) < length:
            body += connection.recv(65536)
        self.seen.append(head)
        return True

    def close(self):
        """Take no more connections."""
        self._server.close()


@pytest.fixture
def serve():
    """Return a function that starts a server."""
    with contextlib.ExitStack() as stack:

        def start(speak, tls=None):
            server = RawServer(speak, tls)
            stack.callback(server.close)
            return server

        yield start


@pytest.fixture
def make_client():
    """Return a function that makes a client for a URL."""
    with contextlib.ExitStack() as stack:

        def make(url, **settings):
            config = Config().changed(**{"otlp_endpoint": url, "otlp_timeout_s": 0.4, **settings})
            client = HttpClient(Endpoint.for_traces(config), threading.Event(), version="1", backoff_s=0.01)
            stack.callback(client.close)
            return client

        yield make


def drips(head, piece=b"x"):
    """Return a function that sends the head at once and then a piece at a time, for ever."""

    def speak(connection):
        pause = threading.Event()
        connection.sendall(head)
        while not pause.wait(0.02):
            connection.sendall(piece)

    return speak


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"H", b"T"),
        (b"HTTP/1.1 200 OK\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 503 No\r\n", b"x"),
    ],
)
def test_a_head_that_drips_ends_with_the_time_of_the_request(serve, make_client, head, piece):
    """However slowly an answer comes, the request ends when its time is over."""
    began = time.monotonic()
    outcome = make_client(serve(drips(head, piece)).url).post(b"payload")
    assert outcome.reason in ("timeout", "unreachable")
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("head", [b"Content-Length: 999999\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n1;"])
def test_an_accepted_payload_stays_so_while_its_answer_drips(serve, make_client, head):
    """The status has said all; the rest is waited for no longer than the request has time."""
    began = time.monotonic()
    outcome = make_client(serve(drips(b"HTTP/1.1 200 OK\r\n" + head)).url).post(b"payload")
    assert outcome.reason == ""
    assert time.monotonic() - began < 3


def test_a_body_that_is_taken_slowly_ends_with_the_time_of_the_request(make_client):
    """An endpoint that reads a little now and then holds the request no longer than its time."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        ended = threading.Event()

        def sip():
            connection, _ = server.accept()
            with contextlib.suppress(OSError), connection:
                while not ended.wait(0.02):
                    connection.recv(100)

        threading.Thread(target=sip, daemon=True).start()
        began = time.monotonic()
        outcome = make_client(f"http://127.0.0.1:{server.getsockname()[1]}").post(b"x" * 20_000_000)
        ended.set()
    assert outcome.reason == "timeout"
    assert time.monotonic() - began < 3


def flood(head):
    """Return a function that sends 100 MB after a head."""

    def speak(connection):
        connection.sendall(head + b"\r\n")
        for _ in range(1600):
            connection.sendall(b"x" * 65536)

    return speak


@pytest.mark.parametrize("status", [b"200 OK", b"302 Found", b"307 Temporary", b"404 No", b"503 No", b"500 No"])
@pytest.mark.parametrize("framing", [b"Content-Length: 9999999999\r\n", b"Connection: close\r\n"])
def test_a_large_answer_is_not_read(serve, make_client, status, framing):
    """Of an answer at most a few kilobytes come into memory, whatever its status and its length."""
    head = b"HTTP/1.1 " + status + b"\r\nLocation: http://127.0.0.1:1/\r\n" + framing
    client = make_client(serve(flood(head)).url)
    tracemalloc.start()
    try:
        client.post(b"payload")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", b"x" * 65536),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", b"A: b\r\n" * 10_000),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 2000),
    ],
    ids=["negative chunk", "trailers", "interim answers"],
)
def test_an_answer_without_an_end_is_left(serve, make_client, head, piece):
    """What is not a body that was asked for is bounded too, in each attempt: memory, and what is received."""
    sent_bytes = []  # Per attempt. What the system buffers, some 40 MB at most, is sent and never received.

    def speak(connection):
        attempt = len(sent_bytes)
        sent_bytes.append(0)
        connection.sendall(head)
        while sent_bytes[attempt] < 100_000_000:
            connection.sendall(piece)
            sent_bytes[attempt] += len(piece)

    client = make_client(serve(speak).url, otlp_timeout_s=2, otlp_compression="none")
    tracemalloc.start()
    try:
        client.post(b"payload")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        client.close()
    assert peak < 5_000_000
    assert max(sent_bytes) < 50_000_000


def test_a_program_that_debugs_its_own_requests_prints_none_of_ours(serve, make_client, monkeypatch, capsys):
    """The switch of `http.client` is one for all connections of a process; our headers hold keys."""
    monkeypatch.setattr("http.client.HTTPConnection.debuglevel", 1)
    server = serve(lambda connection: connection.sendall(OK))
    assert make_client(server.url, otlp_headers={"authorization": "Bearer secret"}).post(b"payload").reason == ""
    assert capsys.readouterr().out == ""


def test_a_compressed_answer_is_read_as_far_as_a_plain_one(serve, make_client):
    """What unpacks to gigabytes is cut off; an answer of usual size that comes compressed unasked is understood."""
    bodies = [gzip.compress(bytes(50_000_000)), gzip.compress(rejects(3).body)]

    def speak(connection):
        body = bodies.pop(0)
        head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)

    client = make_client(serve(speak).url)
    bomb, usual = client.post(b"payload"), client.post(b"payload")
    assert len(bomb.body) <= 65_536
    assert usual.body == rejects(3).body


def test_nothing_is_followed_and_nothing_is_kept(make_exporter, otlp_receiver, send, account):
    """A redirect is a loss: no request goes where it points to. A cookie is not sent back."""
    headers = {"Location": f"{otlp_receiver.endpoint}/elsewhere", "Set-Cookie": "a=b"}
    otlp_receiver.answer(*(Answer(status, headers=headers) for status in (301, 302, 303, 307, 308, 200)))
    exporter = make_exporter()
    for _ in range(7):
        send(exporter)
        assert exporter.flush(10)
    assert account.exported == 2
    assert {request.path for request in otlp_receiver.requests} == {"/v1/traces"}
    assert not any("cookie" in request.headers for request in otlp_receiver.requests)


def test_a_netrc_is_not_read(monkeypatch, tmp_path, make_exporter, otlp_receiver, send):
    """The password of another tool for the same host neither replaces the given header nor is sent unasked."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login bob password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for headers in ({"Authorization": "Bearer token"}, {}):
        exporter = make_exporter(otlp_headers=headers)
        send(exporter)
        assert exporter.flush(10)
    assert [request.headers.get("authorization") for request in otlp_receiver.requests] == ["Bearer token", None]


def test_user_and_password_of_the_url_are_sent_as_a_header(serve, make_client):
    """Percent-encoded or not, as everywhere; a header that is given comes first. The path keeps its query."""
    server = serve(lambda connection: connection.sendall(OK))
    url = server.url.replace("http://", "http://user:p%40ss@") + "?token=a b"
    for headers in ({}, {"authorization": "Bearer x"}):
        assert make_client(url, otlp_headers=headers).post(b"").reason == ""
    first, second = server.seen
    assert b"authorization: Basic dXNlcjpwQHNz" in first
    assert b"POST /v1/traces?token=a%20b HTTP/1.1" in first
    assert b"Bearer x" in second
    assert b"Basic" not in second


@pytest.mark.parametrize(("spoken", "word"), [(HTTP_2, "gRPC"), (b"\x15\x03\x01\x00\x02\x02\x46", "https://")])
@pytest.mark.parametrize("stays", [False, True])
def test_another_protocol_is_named(serve, make_client, spoken, word, stays):
    """A port of gRPC or TLS gets one readable sentence, at once, also where the other side keeps the connection."""

    def speak(connection):
        connection.sendall(spoken)
        if stays:
            connection.recv(1)
        raise OSError

    began = time.monotonic()
    outcome = make_client(serve(speak).url, otlp_timeout_s=30).post(b"payload")
    assert outcome.reason == "not_http"
    assert word in outcome.detail
    assert outcome.detail.isprintable()
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "said", [b"HTTP/1.1 4\x00\x1b[31m secret\r\n\r\n", b"HTTP/1.1 500 \x1b[31m secret\r\n\r\n", b"Hsecret\r\n"]
)
def test_nothing_that_an_endpoint_says_is_quoted(serve, make_client, said):
    """Control characters and echoed credentials stay out of the log."""

    def speak(connection):
        connection.sendall(said)
        raise OSError

    outcome = make_client(serve(speak).url).post(b"payload")
    assert outcome.reason
    assert outcome.detail.isprintable()
    assert "secret" not in outcome.detail


def test_an_early_answer_is_heard(make_client):
    """An endpoint that refuses a large payload before it has read it is understood, and not asked again."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def refuse():
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 413 Too large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                connection.shutdown(socket.SHUT_RDWR)

        threading.Thread(target=refuse, daemon=True).start()
        client = make_client(f"http://127.0.0.1:{server.getsockname()[1]}", otlp_timeout_s=10)
        assert client.post(b"x" * 5_000_000).reason == "http_413"


def test_a_connection_that_was_closed_meanwhile_is_not_used(serve, make_client):
    """One request a connection: the next opens another, without a failure before it."""
    closed = threading.Event()

    def speak(connection):
        connection.sendall(OK)
        connection.shutdown(socket.SHUT_RDWR)
        closed.set()
        raise OSError

    server = serve(speak)
    client = make_client(server.url)
    for _ in range(3):
        closed.clear()
        assert client.post(b"payload").reason == ""
        assert closed.wait(5)
    assert (len(server.seen), server.connections) == (3, 3)


def test_a_connection_is_kept(serve, make_client):
    """As long as the other side keeps it, all requests share one connection."""
    server = serve(lambda connection: connection.sendall(OK))
    client = make_client(server.url)
    assert [client.post(b"payload").reason for _ in range(5)] == [""] * 5
    assert server.connections == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_leaves_its_parents_connection_alone(serve, make_client):
    """When a fork's child drops the client and ends, the parent goes on with the same connection."""
    server = serve(lambda connection: connection.sendall(OK))
    client = make_client(server.url)
    assert client.post(b"payload").reason == ""
    child = os.fork()
    if not child:
        client.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert client.post(b"payload").reason == ""
    assert server.connections == 1


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for 127.0.0.1 with its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the program openssl")
    folder = tmp_path_factory.mktemp("tls")
    command = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    files = ["-keyout", folder / "key.pem", "-out", folder / "cert.pem"]
    subprocess.run([openssl, *command.split(), *files], check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture
def server_tls(certificate):
    """The server's side of TLS; it asks for the client's certificate, and takes our own."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    context.load_verify_locations(certificate[0])
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def test_tls_with_certificates_of_both_sides(serve, make_client, certificate, server_tls):
    """The endpoint is checked against the file that is named, and gets the client's certificate."""
    server = serve(lambda connection: connection.sendall(OK), server_tls)
    cert, key = map(str, certificate)
    files = {"otlp_client_certificate": cert, "otlp_client_key": key}
    client = make_client(server.url, otlp_certificate=cert, otlp_timeout_s=10, **files)
    assert [client.post(b"payload" * 100_000).reason for _ in range(3)] == [""] * 3
    assert server.connections == 1
    unknown = make_client(server.url, otlp_timeout_s=10, **files).post(b"payload")
    assert unknown.reason == "tls"
    assert "self" in unknown.detail


def test_tls_keeps_the_time_of_the_request(serve, make_client, certificate, server_tls):
    """A handshake that never comes, and an answer that drips, end with the request's time."""
    cert, key = map(str, certificate)
    files = {"otlp_certificate": cert, "otlp_client_certificate": cert, "otlp_client_key": key}
    began = time.monotonic()
    dripping = serve(drips(b"HTTP/1.1 200 OK\r\n"), server_tls)
    assert make_client(dripping.url, **files).post(b"payload").reason == "timeout"
    silent = serve(lambda connection: None)
    url = silent.url.replace("http://", "https://")
    assert make_client(url, **files).post(b"payload").reason == "timeout"
    assert time.monotonic() - began < 6


def test_a_plain_port_is_named(otlp_receiver, make_client):
    """TLS to a port that speaks none gets a hint."""
    otlp_receiver._server.handle_error = lambda *_: None
    outcome = make_client(otlp_receiver.url.replace("http://", "https://"), otlp_timeout_s=5).post(b"payload")
    assert outcome.reason in ("tls", "timeout")


def test_an_encrypted_key_asks_nobody_for_its_password(tmp_path, make_client, certificate):
    """The program's terminal is left alone: the files are said to be wrong."""
    locked = tmp_path / "locked.pem"
    command = ["openssl", "pkey", "-in", certificate[1], "-aes256", "-passout", "pass:secret", "-out", locked]
    subprocess.run(command, check=True, capture_output=True)
    files = {"otlp_client_certificate": str(certificate[0]), "otlp_client_key": str(locked)}
    outcome = make_client("https://127.0.0.1:1", **files).post(b"payload")
    assert (outcome.reason, "certificate files" in outcome.detail) == ("invalid_request", True)


@pytest.fixture
def proxies(monkeypatch):
    """Return a function that sets the variables of proxies."""
    for name in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{name}_proxy", raising=False)
        monkeypatch.delenv(f"{name}_PROXY".upper(), raising=False)
    return lambda **values: [monkeypatch.setenv(f"{name}_proxy", value) for name, value in values.items()]


def test_a_proxy_is_asked_for_the_whole_url(serve, make_client, proxies):
    """A plain request goes to the proxy, which gets its own credentials and no others'."""
    server = serve(lambda connection: connection.sendall(OK))
    proxies(http=server.url.replace("http://", "http://me:pw@"))
    client = make_client("http://user:secret@collector.example:4318/v1/traces")
    proxies(http="http://127.0.0.1:1")  # The environment is read once.
    assert client.post(b"payload").reason == ""
    (head,) = server.seen
    assert head.startswith(b"POST http://collector.example:4318/v1/traces HTTP/1.1\r\nHost: collector.example:4318")
    assert b"proxy-authorization: Basic bWU6cHc=" in head


def test_a_tunnel_through_a_proxy(serve, make_client, proxies, certificate, server_tls):
    """TLS goes through the proxy's tunnel: the proxy sees the host and its own credentials."""
    server_tls.verify_mode = ssl.CERT_NONE
    inner = []

    def speak(connection):
        connection.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
        with server_tls.wrap_socket(connection, server_side=True) as tls:
            while not inner or b"payload" not in inner[-1]:
                inner.append(tls.recv(65536))
            tls.sendall(OK)
        raise OSError

    server = serve(speak)
    proxies(https=f"http://me:pw@127.0.0.1:{server.port}")
    url = "https://user:secret@127.0.0.1:4318/v1/traces"
    assert make_client(url, otlp_certificate=str(certificate[0]), otlp_timeout_s=10).post(b"payload").reason == ""
    (head,) = server.seen
    assert head.startswith(b"CONNECT 127.0.0.1:4318 HTTP/1.")
    assert b"proxy-authorization: Basic bWU6cHc=" in head.lower().replace(b"basic bwu6chc=", b"Basic bWU6cHc=")
    assert b"authorization: Basic dXNlcjpzZWNyZXQ=" in inner[0]


def test_a_proxy_that_refuses_is_not_quoted(serve, make_client, proxies):
    """What the proxy says stays out of the log."""

    def speak(connection):
        connection.sendall(b"HTTP/1.1 407 \x1b[31m secret\r\nContent-Length: 0\r\n\r\n")

    proxies(https=serve(speak).url)
    outcome = make_client("https://collector.example").post(b"payload")
    assert outcome.reason == "unreachable"
    assert "proxy" in outcome.detail
    assert "secret" not in outcome.detail


@pytest.mark.parametrize(
    ("no", "direct"),
    [
        ("10.0.0.0/8", True),
        ("example.com,10.1.2.3", True),
        ("*", True),
        ("10.1.2.3:4318", True),
        ("11.0.0.0/8,x", False),
    ],
)
def test_hosts_that_need_no_proxy(proxies, no, direct):
    """`no_proxy` holds names, addresses and networks."""
    proxies(http="http://proxy:3128", no=no)
    assert (find_route("http://10.1.2.3:4318/v1/traces").host == "10.1.2.3") is direct


@pytest.mark.parametrize(
    "setting",
    [
        {"url": "localhost:4318"},
        {"url": "http://user:secret@"},
        {"url": "http://[secret/v1"},
        {"url": "http://host:secret/v1"},
        {"url": "ftp://user:secret@host/"},
        {"url": "https://host", "https": "socks5://user:secret@proxy:1080"},
        {"url": "https://host", "https": "https://user:secret@proxy:1080"},
    ],
)
def test_a_url_that_cannot_be_used_is_said_and_not_quoted(proxies, setting):
    """The sentence says which URL it is about, the endpoint's or the proxy's, and has no part of it."""
    url = setting.pop("url")
    proxies(**setting)
    # Settings are checked when they are set; this is what comes of one that was not.
    endpoint = dataclasses.replace(Endpoint.for_traces(Config()), url=url)
    client = HttpClient(endpoint, threading.Event(), version="1")
    outcome = client.post(b"payload")
    assert outcome.reason == "invalid_request"
    assert "secret" not in outcome.detail + client.shown_url
    assert "proxy" in outcome.detail if setting else "endpoint" in outcome.detail


def test_no_logger_shows_a_secret(caplog, make_client, serve):
    """At no level does any library say what is in the URL or in the headers."""
    caplog.set_level(logging.DEBUG)
    server = serve(lambda connection: connection.sendall(OK))
    client = make_client(server.url.replace("://", "://user:secret@") + "?key=secret", otlp_headers={"k": "secret"})
    assert client.post(b"payload").reason == ""
    assert "secret" not in caplog.text + repr(vars(client)) + client.shown_url
