"""
What a port speaks, and which well-known server that is: found out by asking, within a given time.

Uses sockets and nothing else. Verifies no certificate, because it sends nothing that is secret and believes nothing.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from dataclasses import dataclass
from threading import Thread
from time import monotonic
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

OTLP_HTTP, GRPC, JAEGER, PROMETHEUS, METRICS = "otlp_http", "grpc", "jaeger", "prometheus", "metrics"
WEB, SILENT, OTHER, NOTHING = "web", "silent", "other", "nothing"

TRACES = "/v1/traces"
_MOST_BYTES = 16_384
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")
"""What an HTTP/2 client says first, with settings that are none."""
_SETTINGS = 4
"""The kind of frame that an HTTP/2 server says first."""
_HTTP = b"HTTP/1."
_TO_TLS_BY_HTTP = (b"client sent an http request to an https server", b"plain http request was sent to https port")
_OK = 200
_SHARE = 0.8


@dataclass(frozen=True)
class There:
    """What is at a port."""

    service: str
    """One of the names above."""
    tls: bool = False
    server: str = ""
    """Of a web server: what it calls itself."""


@dataclass(frozen=True)
class Answer:
    """What came of one HTTP request: the status is 0 where that was not HTTP."""

    raw: bytes = b""

    @property
    def status(self) -> int:
        """The number after the protocol."""
        words = self.raw[:20].split(b" ")
        return int(words[1]) if self.raw.startswith(_HTTP) and len(words) > 1 and words[1].isdigit() else 0

    @property
    def body(self) -> bytes:
        """What follows the head."""
        return self.raw.partition(b"\r\n\r\n")[2]

    def has(self, *words: bytes) -> bool:
        """Tell whether this is a page with these words."""
        return self.status == _OK and all(word in self.body for word in words)

    def header(self, name: str) -> str:
        """Return a header as printable text, or nothing."""
        for line in self.raw.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]:
            key, _, value = line.partition(b":")
            if key.strip().lower() == name.encode():
                text = value.strip().decode("ascii", "replace")[:80]
                return "".join(sign for sign in text if sign.isprintable())
        return ""


def resolves(host: str, port: int, timeout_s: float) -> bool | None:
    """Tell whether a host has an address; None if that was not to be known in time: a resolver cannot be hurried."""
    return at_once(timeout_s, None, lambda: _resolves(host, port))[0]


def connects(host: str, port: int, timeout_s: float) -> str:
    """Return nothing where a connection comes about, else `refused`, `timeout` or `unreachable`."""
    try:
        socket.create_connection((host, port), timeout_s).close()
    except ConnectionRefusedError:
        return "refused"
    except TimeoutError:
        return "timeout"
    except OSError:
        return "unreachable"
    return ""


def what_is_there(host: str, port: int, timeout_s: float) -> There:
    """Ask a port that takes connections, all questions of a round at once, and for no longer than twice the time."""
    plain, preface, tls = at_once(
        timeout_s,
        Answer(),
        lambda: _get(host, port, "/", timeout_s),
        lambda: _say(host, port, _PREFACE, timeout_s),
        lambda: Answer(_alpn(host, port, timeout_s)),
    )
    says_tls = plain.raw.startswith(b"\x15\x03") or any(said in plain.raw.lower() for said in _TO_TLS_BY_HTTP)
    if tls.raw or says_tls:
        if tls.raw == b"h2":
            preface = _say(host, port, _PREFACE, timeout_s, tls=True)
        return There(**{**vars(_which(host, port, timeout_s, preface, tls=True)), "tls": True})
    if plain.status:
        return _which(host, port, timeout_s, preface, tls=False)
    if _is_http2(preface.raw) or _is_http2(plain.raw):
        return There(GRPC)
    return There(OTHER if plain.raw or preface.raw else SILENT)


def at_once(timeout_s: float, otherwise: T, *questions: Callable[[], T]) -> list[T]:
    """Return the answers to questions that are asked at the same time; one that comes too late is `otherwise`."""
    answers = [otherwise] * len(questions)

    def ask(place: int, question: Callable[[], T]) -> None:
        with contextlib.suppress(OSError, ValueError):  # No answer.
            answers[place] = question()

    threads = [Thread(target=ask, args=each, daemon=True) for each in enumerate(questions)]
    for thread in threads:
        thread.start()
    until_s = monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, until_s - monotonic()))
    return list(answers)


def _which(host: str, port: int, timeout_s: float, preface: Answer, *, tls: bool) -> There:
    """Tell well-known servers by the pages that they have."""

    def get(path: str) -> Callable[[], Answer]:
        return lambda: _get(host, port, path, timeout_s, tls=tls)

    takes, jaeger, healthy, metrics, page = at_once(
        timeout_s,
        Answer(),
        lambda: _post(host, port, timeout_s, tls=tls),
        get("/api/services"),
        get("/-/healthy"),
        get("/metrics"),
        get("/"),
    )
    names = {
        OTLP_HTTP: _is_otlp(takes),
        JAEGER: jaeger.has(b'"data"', b'"total"') or page.has(b"<title>Jaeger"),
        PROMETHEUS: healthy.has(b"Prometheus"),
        METRICS: metrics.has(b"# TYPE "),
        GRPC: _is_http2(preface.raw) and not page.status,
        WEB: bool(page.status),
    }
    return There(next((name for name, fits in names.items() if fits), OTHER), server=page.header("server"))


def _is_otlp(answer: Answer) -> bool:
    told = answer.header("content-type").startswith("application/x-protobuf")
    return answer.status == _OK and (told or not answer.body)


def _resolves(host: str, port: int) -> bool:
    try:
        return bool(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except OSError:
        return False


def _get(host: str, port: int, path: str, timeout_s: float, *, tls: bool = False) -> Answer:
    return _say(host, port, _request("GET", path, host, port), timeout_s, tls=tls)


def _post(host: str, port: int, timeout_s: float, *, tls: bool) -> Answer:
    """Send no spans, which a receiver takes."""
    more = "Content-Type: application/x-protobuf\r\nContent-Length: 0\r\n"
    return _say(host, port, _request("POST", TRACES, host, port, more), timeout_s, tls=tls)


def _request(method: str, path: str, host: str, port: int, more: str = "") -> bytes:
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return f"{method} {path} HTTP/1.1\r\nHost: {where}\r\nAccept: */*\r\nConnection: close\r\n{more}\r\n".encode()


def _say(host: str, port: int, said: bytes, timeout_s: float, *, tls: bool = False) -> Answer:
    """Say something on a connection of its own, and return what was answered in time."""
    timeout_s *= _SHARE  # What has been said by then is to be there when whoever asked looks.
    until_s = monotonic() + timeout_s
    answer = b""
    protocols = (("h2",) if said == _PREFACE else ("http/1.1",)) if tls else ()
    with _connection(host, port, timeout_s, protocols) as connection, contextlib.suppress(OSError):
        connection.sendall(said)
        while len(answer) < _MOST_BYTES and (left_s := until_s - monotonic()) > 0:
            connection.settimeout(left_s)
            piece = connection.recv(_MOST_BYTES)
            answer += piece
            if not piece or _is_http2(answer):
                break
    return Answer(answer)


def _connection(host: str, port: int, timeout_s: float, protocols: tuple[str, ...]) -> socket.socket:
    """Connect, with TLS where there are protocols to be offered."""
    connection = socket.create_connection((host, port), timeout_s)
    if not protocols:
        return connection
    try:
        return _trusting(protocols).wrap_socket(connection, server_hostname=host)
    except BaseException:  # Whatever it is goes on.
        connection.close()
        raise


def _alpn(host: str, port: int, timeout_s: float) -> bytes:
    """Return what a port with TLS speaks inside; of one that does not say so, `http/1.1`."""
    with _connection(host, port, timeout_s, ("h2", "http/1.1")) as connection:
        chosen = connection.selected_alpn_protocol() if isinstance(connection, ssl.SSLSocket) else None
        return (chosen or "http/1.1").encode()


def _trusting(protocols: tuple[str, ...]) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols([*protocols])
    return context


def _is_http2(said: bytes) -> bool:
    return len(said) > _SETTINGS - 1 and said[0] == 0 and said[3] == _SETTINGS
