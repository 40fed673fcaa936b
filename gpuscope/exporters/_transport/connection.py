"""
One HTTP/1.1 connection at a time to one endpoint, straight or by a proxy.

Python's own client, because one needs to get under it: each wait on one of these sockets ends with the deadline of the
request, however the other side drips, and no body is read further than is asked. Follows no redirect, keeps no cookie,
reads no `.netrc`. Only the resolver cannot be told a deadline.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import selectors
import socket
import ssl
import threading
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any

from gpuscope.exporters._transport.route import Route, find_route

if TYPE_CHECKING:
    from collections.abc import Mapping
    from io import BufferedReader


class NotHttpError(Exception):
    """What answers does not speak HTTP/1.1. Says what it speaks, as far as that shows, and never quotes it."""


_MOST_RECEIVED_BYTES = 1 << 20
"""In one request. Heads, interim answers and trailers are read whole, and `http.client` believes in negative chunks."""


class _Bounds(threading.local):
    """Of this thread's request."""

    up_at_s = float("inf")
    """When its time is up."""
    received_bytes = 0

    def left_s(self) -> float:
        left_s = self.up_at_s - monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out")
        return left_s

    def count(self, received_bytes: int) -> None:
        self.received_bytes += received_bytes
        if self.received_bytes > _MOST_RECEIVED_BYTES:
            raise http.client.HTTPException("the answer has no end")


_bounds = _Bounds()


class _Bounded(socket.socket):
    """A socket that waits for nothing beyond the request's deadline, and receives no more than a request may."""

    def recv(self, *arguments: Any) -> bytes:
        self.settimeout(_bounds.left_s())
        received = super().recv(*arguments)
        _bounds.count(len(received))
        return received

    def recv_into(self, *arguments: Any) -> int:
        self.settimeout(_bounds.left_s())
        received_bytes = super().recv_into(*arguments)
        _bounds.count(received_bytes)
        return received_bytes

    def send(self, *arguments: Any) -> int:
        self.settimeout(_bounds.left_s())
        return super().send(*arguments)

    def sendall(self, *arguments: Any) -> None:
        self.settimeout(_bounds.left_s())
        return super().sendall(*arguments)


class _BoundedTls(_Bounded, ssl.SSLSocket):
    def do_handshake(self, *arguments: Any) -> None:
        self.settimeout(_bounds.left_s())
        super().do_handshake(*arguments)


class _Response(http.client.HTTPResponse):
    fp: BufferedReader

    def begin(self) -> None:
        """Read the head, but not of what is not HTTP: there, no line may ever end."""
        first = self.fp.peek(1)[:2]
        if first and not first.startswith(b"H"):
            raise NotHttpError(_spoken(first))
        super().begin()


def _spoken(first: bytes) -> str:
    if first.startswith(b"\x00"):
        return "HTTP/2 without TLS, as gRPC ports do (4317); OTLP/HTTP is on another port, by default 4318"
    if first.startswith(b"\x15\x03"):
        return "TLS; write https:// in the endpoint's URL"
    return "something else than HTTP"


@dataclass(frozen=True, slots=True)
class Answer:
    """What an endpoint answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(default=b"", repr=False)
    """Of an accepted request, as far as it was asked for."""


class Connection:
    """
    Posts to a URL, and keeps the connection as long as the other side does. For one thread only.

    Args:
        url: of the endpoint; user and password in it are sent as `Authorization`, unless the headers have their own.
        headers: sent with each request.
        certificate: path of what the endpoint is checked against, or empty for the system's.
        client_certificate: path of our own certificate, or empty.
        client_key: path of its key, or empty.

    Raises:
        ValueError: where the URL, or that of the proxy, is not one.

    """

    def __init__(
        self, url: str, headers: Mapping[str, str], *, certificate: str, client_certificate: str, client_key: str
    ) -> None:
        self._route: Route = find_route(url)
        self._headers = {**self._route.headers, **{name.lower(): value for name, value in headers.items()}}
        self._files = certificate, client_certificate, client_key
        self._tls: ssl.SSLContext | None = None
        self._open: http.client.HTTPConnection | None = None

    def post(self, body: bytes, deadline_s: float, most_bytes: int) -> Answer:
        """
        Post once.

        Args:
            body: the payload.
            deadline_s: when, on the clock `monotonic`, the answer must be there.
            most_bytes: how much is read of the answer's body; nothing unless the status is 2xx.

        Raises:
            NotHttpError, http.client.HTTPException, OSError: from the connection.
            ValueError: for headers, or a URL, that cannot be sent.

        """
        _bounds.up_at_s, _bounds.received_bytes = deadline_s, 0
        try:
            response = self._ask(self._connected(), body)
            accepted = response.status // 100 == 2  # noqa: PLR2004
            answer = _read(response, most_bytes) if accepted else b""
            if not response.isclosed():
                self.close()
            return Answer(response.status, dict(response.headers.items()), answer)
        except BaseException:  # Goes on: a connection in the middle of an answer cannot be used again.
            self.close()
            raise
        finally:
            _bounds.up_at_s = float("inf")

    def prepare(self) -> None:
        """
        Read the certificate files: once, before the first request.

        Raises:
            OSError: where one cannot be read; `ssl.SSLError`, which is one too, where it is not a certificate.

        """
        if self._tls is None and self._route.tls:
            self._tls = _tls_context(*self._files)

    def close(self) -> None:
        """Close the connection; a further request opens another."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _connected(self) -> http.client.HTTPConnection:
        if self._open is not None and self._open.sock is not None and _is_silent(self._open.sock):
            return self._open
        self.close()
        self._open = self._new()
        self._open.connect()
        return self._open

    def _new(self) -> http.client.HTTPConnection:
        route = self._route
        made: http.client.HTTPConnection
        if route.tls:
            made = http.client.HTTPSConnection(route.host, route.port, context=self._tls)
        else:
            made = http.client.HTTPConnection(route.host, route.port)
        made.response_class = _Response
        made.set_debuglevel(0)  # A program that debugs its own requests would print our headers and payloads.
        made._create_connection = _connect  # type: ignore[attr-defined]
        if route.tunnel is not None:
            made.set_tunnel(*route.tunnel, headers=route.tunnel_headers)
        return made

    def _ask(self, made: http.client.HTTPConnection, body: bytes) -> http.client.HTTPResponse:
        # An endpoint may refuse a large payload before it has read all of it: its answer is there all the same.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            made.request("POST", self._route.target, body, self._headers)
        return made.getresponse()


def _read(response: http.client.HTTPResponse, most_bytes: int) -> bytes:
    """Return what is asked for of an answer's body, or nothing if it is broken or late: the status counts."""
    try:
        return response.read(most_bytes)
    except (http.client.HTTPException, OSError, ValueError):
        return b""


def _is_silent(sock: socket.socket) -> bool:
    """Whether a connection that is kept is still good: what is to be read between two requests is its end."""
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return not selector.select(0)


def _connect(address: tuple[str, int], *_: object) -> socket.socket:
    """Connect to the first address of a host that answers; none of several may take the time of all."""
    found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    error: OSError | None = None
    for number, (family, kind, protocol, _name, where) in enumerate(found):
        sock = _Bounded(family, kind, protocol)
        try:
            sock.settimeout(_bounds.left_s() / (len(found) - number))
            sock.connect(where)
            return sock
        except OSError as caught:
            sock.close()
            error = caught
    raise error or OSError("no address")


def _tls_context(certificate: str, client_certificate: str, client_key: str) -> ssl.SSLContext:
    folder = os.path.isdir(certificate)  # noqa: PTH112
    context = ssl.create_default_context(
        cafile=None if folder else certificate or None, capath=certificate if folder else None
    )
    if not certificate:
        _add_known_certificates(context)
    if client_certificate:
        # Without a password, OpenSSL would ask for that of an encrypted key on the program's terminal.
        context.load_cert_chain(client_certificate, client_key or None, password="")
    context.sslsocket_class = _BoundedTls
    return context


def _add_known_certificates(context: ssl.SSLContext) -> None:
    """Where the system has no certificates, as in slim images, take those of the package `certifi`, if it is there."""
    paths = ssl.get_default_verify_paths()
    if paths.cafile is None and not (paths.capath and os.listdir(paths.capath)):  # noqa: PTH208
        with contextlib.suppress(ImportError):
            import certifi

            context.load_verify_locations(certifi.where())
