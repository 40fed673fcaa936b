"""Small servers for the doctor to look at: each is something that people take for an OTLP endpoint."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HTML = "text/html; charset=utf-8"
PROTOBUF = "application/x-protobuf"
HTTP_2 = bytes.fromhex("000018040000000000000400400000000500400000000600002000fe0300000001")
"""What a gRPC server says first."""
JAEGER = {
    "GET /api/services": (200, b'{"data":["demo"],"total":1,"limit":0,"offset":0,"errors":null}', "application/json"),
    "": (200, b"<!doctype html><html><head><title>Jaeger UI</title></head></html>", HTML),
}
PROMETHEUS = {
    "GET /-/healthy": (200, b"Prometheus Server is Healthy.\n", "text/plain"),
    "GET /metrics": (200, b"# HELP up Up.\n# TYPE up gauge\nup 1\n", "text/plain; version=0.0.4"),
    "GET /": (302, b"", HTML),
    "": (404, b"404 page not found\n", "text/plain"),
}
METRICS = {"GET /metrics": PROMETHEUS["GET /metrics"], "": (404, b"", "text/plain")}
RECEIVER = {"POST /v1/traces": (200, b"", PROTOBUF), "": (404, b"404 page not found\n", "text/plain")}
PAGES = {
    "receiver": RECEIVER,
    "jaeger": JAEGER,
    "prometheus": PROMETHEUS,
    "metrics": METRICS,
    "html": {"": (200, b"<!doctype html><p>Welcome", HTML)},
    "text": {"": (200, b"hello", "text/plain")},
    "json": {"POST /v1/traces": (200, b'{"partialSuccess":{}}', "application/json"), "": (404, b"", "text/plain")},
    "missing": {"": (404, b"<html>", HTML)},
    "method": {"": (405, b"", HTML)},
    "redirect": {"": (302, b"", HTML)},
    "unauthorized": {"": (401, b"", HTML)},
    "forbidden": {"": (403, b"", HTML)},
    "mislikes": {"POST /v1/traces": (422, b"{}", "application/json"), "": (404, b"", HTML)},
    "busy": {"POST /v1/traces": (503, b"", PROTOBUF), "": (404, b"", HTML)},
}
"""Status, body and type of what a server answers, by method and path; for all others by nothing."""


class Quiet(ThreadingHTTPServer):
    """A server that does not print what its clients do to it: they hang up as soon as they know enough."""

    daemon_threads = True

    def handle_error(self, *_):
        """Say nothing."""


def web(pages, tls=None, authorization=None):
    """Return a running web server with these pages; POST is 401 without that authorization, if one is given."""

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "tests/1", ""

        def do_POST(self):
            """Give the page."""
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.server.seen.append(f"{self.command} {self.path}")
            status, body, kind = pages.get(f"{self.command} {self.path}", pages[""])
            if self.command == "POST" and authorization not in (None, self.headers.get("authorization")):
                status, body, kind = 401, b"", HTML
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            if status == 302:
                self.send_header("Location", "http://user:hush@elsewhere.example/login")
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            """Give the page."""
            self.do_POST()

        def log_message(self, *_):
            """Say nothing."""

    server = Quiet(("127.0.0.1", 0), Handler)
    server.seen = []
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


class Raw:
    """Takes connections, says something at once or nothing, and keeps them open."""

    def __init__(self, said=b"", tls=None):
        self._server = socket.create_server(("127.0.0.1", 0))
        self.server_port = self._server.getsockname()[1]
        self._said, self._tls, self._connections = said, tls, []
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with contextlib.suppress(OSError, ssl.SSLError):
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
            self._connections.append(connection)
            connection.sendall(self._said)

    def close(self):
        """Take no more connections."""
        self._server.close()
        for connection in self._connections:
            connection.close()
